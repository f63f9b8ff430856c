//! Reads the pages of a saved VM, of which ever VMM: what RAM it has, and where its data is.
//!
//! ```text
//! cargo run -p vmfile-pages --example pages_of_file -- FILE
//! ```

#![expect(clippy::print_stdout, reason = "an example that shows what it does")]

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};

use vmfile_pages::layers::Layers;
use vmfile_pages::{PageSource as _, Snapshot};

fn main() -> Result<(), Box<dyn Error>> {
    let path = env::args_os().nth(1).ok_or("usage: pages_of_file FILE")?;
    run(&PathBuf::from(path)).map(drop)
}

/// Prints the blocks of the file at `path`, with the first page of each that has data; returns how
/// many pages have data.
///
/// # Errors
///
/// Returns an error if the file cannot be read, or is not what was written.
pub(crate) fn run(path: &Path) -> Result<u64, Box<dyn Error>> {
    let snapshot = Snapshot::open(path, 0)?;
    // A thin file has pages in others.
    let layers = Layers::new(&snapshot)?;
    let mut pages_data = 0;
    for (number, placed) in snapshot.structure().blocks.iter().enumerate() {
        let bitmap = layers.bitmap(number);
        let (name, count) = (placed.block.name(), bitmap.data_count().0);
        println!("{name}: {} pages, {count} with data", placed.block.page_count().0);
        pages_data += count;
        let Some(first) = bitmap.data_runs().next().map(|run| run.start) else { continue };
        let page_size = placed.block.page_size().bytes();
        let mut bytes = vec![0; usize::try_from(page_size)?];
        // A page is compared with its hash before it is returned.
        let start = first.0 * page_size;
        layers.read(number, &(start..start + page_size), &mut bytes)?;
        println!("    the first is page {}: {:02x?} ...", first.0, &bytes[..8]);
    }
    Ok(pages_data)
}
