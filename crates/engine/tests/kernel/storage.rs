//! The same tests for both back ends.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::Path;
use std::thread;

use vmfile_engine::{
    Backend, BackendInUse, BufferPool, Completion, DataFile, DirectIo, Direction, Memory, Storage,
    Transfer, open_storage,
};

use crate::host::{self, Mounted};

const LEN: usize = 256 << 10;

/// Runs `test` with each back end, with and without direct I/O if the file system has it.
fn with_every_storage(test: impl Fn(Backend, DirectIo)) {
    for backend in [Backend::IoUring, Backend::Threads] {
        let file = DataFile::new(tempfile::tempfile().unwrap(), DirectIo::Off).unwrap();
        if let Err(error) = open_storage(&file, backend, 1) {
            println!("skipped: {backend:?}: {error}");
            continue;
        }
        for direct_io in [DirectIo::Preferred, DirectIo::Off] {
            println!("{backend:?}, direct I/O {direct_io:?}");
            test(backend, direct_io);
        }
    }
}

fn create(path: &Path, direct_io: DirectIo) -> DataFile {
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap();
    DataFile::new(file, direct_io).unwrap()
}

fn storage(file: &DataFile, backend: Backend) -> Box<dyn Storage> {
    open_storage(file, backend, 8).unwrap().storage
}

fn write(file_offset: u64, memory: Memory) -> Transfer {
    Transfer { direction: Direction::Write, file_offset, memory, tag: file_offset }
}

fn read(file_offset: u64, memory: Memory) -> Transfer {
    Transfer { direction: Direction::Read, file_offset, memory, tag: file_offset }
}

/// Returns pseudo-random bytes, so that exchanged pieces are noticed.
fn pattern(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()[0]
    };
    (0..len).map(|_| next()).collect()
}

/// Submits all transfers, and reaps when the queue is full; returns all completions.
fn carry_out(storage: &mut dyn Storage, transfers: Vec<Transfer>) -> Vec<Completion> {
    let mut completions = Vec::new();
    for transfer in transfers {
        if storage.in_flight() == storage.depth() {
            completions.push(storage.reap().unwrap().unwrap());
        }
        storage.submit(transfer).unwrap();
    }
    while let Some(completion) = storage.reap().unwrap() {
        completions.push(completion);
    }
    assert_eq!(storage.in_flight(), 0);
    completions
}

#[test]
fn writes_land_at_their_offsets_and_are_read_back() {
    with_every_storage(|backend, direct_io| {
        let directory = host::directory();
        let path = directory.path().join("file");
        let file = create(&path, direct_io);
        let expected = pattern(32 * LEN, 1);
        let pool = BufferPool::new(12, LEN, 4096).unwrap();
        let mut storage = storage(&file, backend);

        // From the end to the start, so that most writes leave a hole before them.
        for (index, piece) in expected.chunks(LEN).enumerate().rev() {
            let mut buffer = loop {
                match pool.try_take() {
                    Some(buffer) => break buffer,
                    None => storage.reap().unwrap().unwrap().result.unwrap(),
                }
            };
            if storage.in_flight() == storage.depth() {
                storage.reap().unwrap().unwrap().result.unwrap();
            }
            buffer.copy_from_slice(piece);
            storage.submit(write((index * LEN) as u64, Memory::Owned(buffer, 0..LEN))).unwrap();
        }
        while let Some(completion) = storage.reap().unwrap() {
            completion.result.unwrap();
        }
        assert!(fs::read(&path).unwrap() == expected, "the file differs");
        assert_eq!(pool.free_count(), 12);

        let reads =
            (0..8).map(|index| read((3 * index * LEN) as u64, Memory::Owned(pool.take(), 0..LEN)));
        for completion in carry_out(&mut *storage, reads.collect()) {
            completion.result.unwrap();
            let offset = usize::try_from(completion.transfer.tag).unwrap();
            let Memory::Owned(buffer, range) = completion.transfer.memory else { panic!() };
            assert!(buffer[range] == expected[offset..offset + LEN], "bytes at {offset}");
        }
    });
}

#[test]
fn pieces_of_one_shared_buffer_go_to_different_places() {
    with_every_storage(|backend, direct_io| {
        let directory = host::directory();
        let path = directory.path().join("file");
        let file = create(&path, direct_io);
        let pool = BufferPool::new(1, LEN, 4096).unwrap();
        let mut buffer = pool.take();
        let bytes = pattern(LEN, 2);
        buffer.copy_from_slice(&bytes);
        let shared = buffer.freeze();
        let piece = LEN / 4;
        let writes = (0..4).map(|index| {
            let range = index * piece..(index + 1) * piece;
            write(((3 - index) * piece) as u64, Memory::Shared(shared.clone(), range))
        });
        for completion in carry_out(&mut *storage(&file, backend), writes.collect()) {
            completion.result.unwrap();
        }
        drop(shared);
        assert_eq!(pool.free_count(), 1);
        let expected: Vec<u8> = bytes.chunks(piece).rev().flatten().copied().collect();
        assert!(fs::read(&path).unwrap() == expected, "the file differs");
    });
}

#[test]
fn no_offset_length_or_address_needs_to_be_aligned() {
    with_every_storage(|backend, direct_io| {
        let directory = host::directory();
        let path = directory.path().join("file");
        let file = create(&path, direct_io);
        let pool = BufferPool::new(1, LEN, 4096).unwrap();
        let mut storage = storage(&file, backend);
        let mut expected = vec![0; 2 * LEN];
        for (seed, (offset, start, len)) in (10..).zip([
            (0, 0, 4096 + 7),
            (100_usize, 100_usize, 20_000),
            (4096, 1, 8192),
            (5000, 0, 50_000),
            (LEN - 3, 0, 10),
            (2 * LEN - 5000, 4096, 5000),
            (8192, 512, 8192),
        ]) {
            let bytes = pattern(len, seed);
            expected[offset..offset + len].copy_from_slice(&bytes);
            let mut buffer = pool.take();
            buffer[start..start + len].copy_from_slice(&bytes);
            let transfer = write(offset as u64, Memory::Owned(buffer, start..start + len));
            for completion in carry_out(&mut *storage, vec![transfer]) {
                completion.result.unwrap();
            }
            let transfer = read(offset as u64, Memory::Owned(pool.take(), start..start + len));
            for completion in carry_out(&mut *storage, vec![transfer]) {
                completion.result.unwrap();
                let Memory::Owned(buffer, range) = completion.transfer.memory else { panic!() };
                assert!(buffer[range] == bytes, "{len} bytes at {offset}");
            }
        }
        assert!(fs::read(&path).unwrap() == expected, "the file differs");
    });
}

#[test]
fn a_read_past_the_end_keeps_what_there_is_and_says_so() {
    with_every_storage(|backend, direct_io| {
        let directory = host::directory();
        let path = directory.path().join("file");
        let bytes = pattern(5000, 3);
        fs::write(&path, &bytes).unwrap();
        let file = DataFile::new(File::open(&path).unwrap(), direct_io).unwrap();
        let pool = BufferPool::new(2, 16_384, 4096).unwrap();
        let transfers = vec![
            read(0, Memory::Owned(pool.take(), 0..16_384)),
            read(1 << 20, Memory::Owned(pool.take(), 0..4096)),
        ];
        for completion in carry_out(&mut *storage(&file, backend), transfers) {
            let error = completion.result.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{error}");
            let Memory::Owned(buffer, _) = completion.transfer.memory else { panic!() };
            if completion.transfer.file_offset == 0 {
                assert!(buffer[..5000] == bytes, "the bytes before the end");
            }
        }
    });
}

#[test]
fn a_read_of_exactly_the_file_is_whole_whatever_its_length() {
    with_every_storage(|backend, direct_io| {
        let directory = host::directory();
        let pool = BufferPool::new(1, 16_384, 4096).unwrap();
        for len in [1, 511, 512, 4095, 4096, 4097, 12_288, 13_000] {
            let path = directory.path().join(len.to_string());
            let bytes = pattern(len, 4);
            fs::write(&path, &bytes).unwrap();
            let file = DataFile::new(File::open(&path).unwrap(), direct_io).unwrap();
            let transfer = read(0, Memory::Owned(pool.take(), 0..len));
            for completion in carry_out(&mut *storage(&file, backend), vec![transfer]) {
                completion.result.unwrap();
                let Memory::Owned(buffer, range) = completion.transfer.memory else { panic!() };
                assert!(buffer[range] == bytes, "{len} bytes");
            }
        }
    });
}

#[test]
fn an_empty_transfer_completes() {
    with_every_storage(|backend, direct_io| {
        let directory = host::directory();
        let file = create(&directory.path().join("file"), direct_io);
        let pool = BufferPool::new(1, 4096, 4096).unwrap();
        let transfer = read(77, Memory::Owned(pool.take(), 10..10));
        let completions = carry_out(&mut *storage(&file, backend), vec![transfer]);
        assert_eq!(completions.len(), 1);
        assert!(completions[0].result.is_ok());
    });
}

#[test]
fn a_read_only_file_refuses_writes_with_ebadf_and_goes_on_reading() {
    with_every_storage(|backend, direct_io| {
        let directory = host::directory();
        let path = directory.path().join("file");
        fs::write(&path, vec![5; 8192]).unwrap();
        let file = DataFile::new(File::open(&path).unwrap(), direct_io).unwrap();
        let pool = BufferPool::new(1, 4096, 4096).unwrap();
        let mut storage = storage(&file, backend);

        let transfer = write(0, Memory::Owned(pool.take(), 0..4096));
        let error = carry_out(&mut *storage, vec![transfer]).pop().unwrap().result.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF), "{error}");

        let transfer = read(4096, Memory::Owned(pool.take(), 0..4096));
        carry_out(&mut *storage, vec![transfer]).pop().unwrap().result.unwrap();
    });
}

fn fills_up(mounted: &Mounted, backend: Backend, direct_io: DirectIo) {
    let path = mounted.path().join("file");
    let file = create(&path, direct_io);
    let pool = BufferPool::new(8, LEN, 4096).unwrap();
    let mut storage = storage(&file, backend);
    let mut refused = None;
    for index in 0..256_u64 {
        let buffer = loop {
            match pool.try_take() {
                Some(buffer) => break buffer,
                None => {
                    if let Err(error) = storage.reap().unwrap().unwrap().result {
                        refused.get_or_insert(error);
                    }
                }
            }
        };
        if refused.is_some() {
            break;
        }
        storage.submit(write(index * LEN as u64, Memory::Owned(buffer, 0..LEN))).unwrap();
    }
    while let Some(completion) = storage.reap().unwrap() {
        if let Err(error) = completion.result {
            refused.get_or_insert(error);
        }
    }
    let error = refused.expect("64 MiB cannot fit");
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{error}");
    fs::remove_file(&path).unwrap();
}

#[test]
fn a_full_tmpfs_is_enospc() {
    let mounted = match Mounted::tmpfs(4 << 20) {
        Ok(mounted) => mounted,
        Err(reason) => return println!("skipped: {reason}"),
    };
    with_every_storage(|backend, direct_io| fills_up(&mounted, backend, direct_io));
}

#[test]
fn a_full_ext4_is_enospc() {
    let mounted = match Mounted::ext4(16 << 20) {
        Ok(mounted) => mounted,
        Err(reason) => return println!("skipped: {reason}"),
    };
    with_every_storage(|backend, direct_io| fills_up(&mounted, backend, direct_io));
}

#[test]
fn dropping_with_transfers_in_flight_finishes_them_first() {
    with_every_storage(|backend, direct_io| {
        let directory = host::directory();
        let path = directory.path().join("file");
        let file = create(&path, direct_io);
        let pool = BufferPool::new(8, LEN, 4096).unwrap();
        let expected = pattern(8 * LEN, 5);
        let mut storage = storage(&file, backend);
        for (index, piece) in expected.chunks(LEN).enumerate() {
            let mut buffer = pool.take();
            buffer.copy_from_slice(piece);
            storage.submit(write((index * LEN) as u64, Memory::Owned(buffer, 0..LEN))).unwrap();
        }
        assert_eq!(storage.in_flight(), 8);

        drop(storage);

        assert_eq!(pool.free_count(), 8);
        assert!(fs::read(&path).unwrap() == expected, "the file differs");
    });
}

#[test]
fn a_storage_outlives_the_thread_that_submitted() {
    with_every_storage(|backend, direct_io| {
        let directory = host::directory();
        let path = directory.path().join("file");
        let file = create(&path, direct_io);
        let pool = BufferPool::new(8, LEN, 4096).unwrap();
        let expected = pattern(8 * LEN, 6);
        let mut storage = storage(&file, backend);
        let pieces: Vec<Vec<u8>> = expected.chunks(LEN).map(<[u8]>::to_vec).collect();
        let submitter = thread::spawn(move || {
            for (index, piece) in pieces.iter().enumerate() {
                let mut buffer = pool.take();
                buffer.copy_from_slice(piece);
                let memory = Memory::Owned(buffer, 0..LEN);
                storage.submit(write((index * LEN) as u64, memory)).unwrap();
            }
            storage
        });
        let mut storage = submitter.join().unwrap();
        while let Some(completion) = storage.reap().unwrap() {
            completion.result.unwrap();
        }
        assert!(fs::read(&path).unwrap() == expected, "the file differs");
    });
}

#[test]
#[should_panic(expected = "reap before submitting")]
fn submitting_beyond_the_depth_panics() {
    let file = DataFile::new(tempfile::tempfile().unwrap(), DirectIo::Off).unwrap();
    let pool = BufferPool::new(2, 4096, 4096).unwrap();
    let mut storage = open_storage(&file, Backend::Threads, 1).unwrap().storage;
    for offset in [0, 4096] {
        storage.submit(write(offset, Memory::Owned(pool.take(), 0..4096))).unwrap();
    }
}

#[test]
fn the_back_end_in_use_is_told() {
    let file = DataFile::new(tempfile::tempfile().unwrap(), DirectIo::Off).unwrap();
    let threads = open_storage(&file, Backend::Threads, 1).unwrap().backend;
    assert_eq!(threads, BackendInUse::Threads { reason: None });
    assert_eq!(threads.to_string(), "threads");
    match open_storage(&file, Backend::Auto, 1).unwrap().backend {
        BackendInUse::IoUring => {}
        BackendInUse::Threads { reason } => assert!(reason.unwrap().starts_with("io_uring: ")),
    }
}

#[test]
fn the_depth_is_brought_into_its_limits() {
    let file = DataFile::new(tempfile::tempfile().unwrap(), DirectIo::Off).unwrap();
    for (asked, given) in [(0, 1), (1, 1), (5, 5), (64, 64), (1000, 64)] {
        let storage = open_storage(&file, Backend::Auto, asked).unwrap().storage;
        assert_eq!(storage.depth(), given);
    }
}
