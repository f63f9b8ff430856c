//! Runs the examples.

#[path = "../examples/own_memory.rs"]
#[expect(dead_code, reason = "its `main` reads the command line")]
mod own_memory;
#[path = "../examples/pages_of_file.rs"]
#[expect(dead_code, reason = "its `main` reads the command line")]
mod pages_of_file;

#[test]
fn the_memory_of_a_process_is_saved_checked_and_loaded_and_its_pages_are_read() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("own.vmf");
    own_memory::run(&path, 8 << 20).expect("it runs");
    assert_eq!(pages_of_file::run(&path).expect("it runs"), 2048_u64.div_ceil(3));
}
