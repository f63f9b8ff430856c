//! The RAM of a process that runs on while it is saved: the file gets every page as it was when the
//! RAM was write-protected.
//!
//! The RAM is cut into windows. The saved moment is one at which the process stands still and
//! everything is protected ([`ProtectedRam::begin`]). From then on a window is read before its
//! protection is lifted, so what is read is what was there at that moment. A thread of the process that writes to a protected
//! window stands still: [`ProtectedRam::serve`] copies that window aside, lifts its protection at
//! once, and asks the writer to take it next. If no buffer is free, the thread waits until the
//! writer has read the window.
//!
//! A window is as long as a huge page: with shorter ones the kernel would split the huge pages of
//! the process.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmfile_engine::{BufferPool, PooledBuffer, Userfault};

use crate::memory::PageSource;
use crate::plan::{WINDOW_LEN, in_window, pieces};
use crate::process_ram::ProcessRam;

/// How many bytes of windows are kept aside at most: what the guest may write at once without
/// waiting for the disk.
pub const ASIDE_LEN_MAX: u64 = 64 << 20;

/// How long [`ProtectedRam::serve`] waits for a fault before it looks whether it is to end.
const LOOK: Duration = Duration::from_millis(2);

/// How often threads that wait are asked once more for which page, after the saved moment.
const WAKE_INTERVAL: Duration = Duration::from_millis(50);

/// How often the process had to wait, and for what.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Faults {
    /// How many faults were served.
    pub count: u64,
    /// Windows that were copied aside, in bytes.
    pub aside_bytes: u64,
    /// How long the threads of the process stood still in all, as far as this process saw it.
    pub waited: Duration,
    /// The longest time that one of them stood still.
    pub longest: Duration,
}

/// RAM that is write-protected by a userfaultfd, and read while its process runs.
#[derive(Debug)]
pub struct ProtectedRam<'a> {
    ram: &'a ProcessRam,
    userfault: &'a Userfault,
    blocks: Vec<Block>,
    buffers: BufferPool,
    /// Windows that are to be written before all others: the block's number and the offset in it.
    urgent: Mutex<VecDeque<(usize, u64)>>,
    /// Faults that wait until the writer has read their window: the window, and since when.
    waiting: Mutex<Vec<(usize, u64, Instant)>>,
    faults: Mutex<Faults>,
    before: Mutex<Before>,
    /// Why nothing is to be read any more: the first reason.
    failure: Mutex<Option<String>>,
    is_over: AtomicBool,
    aside_bytes: AtomicU64,
}

#[derive(Debug)]
struct Block {
    addresses: Range<u64>,
    windows: Vec<Mutex<Window>>,
    is_protected: bool,
}

/// What happened before the saved moment.
#[derive(Debug, Default)]
struct Before {
    is_over: bool,
    /// Windows whose protection was lifted: the block's number and the offset in it.
    lifted: BTreeSet<(usize, u64)>,
}

/// What was done with a window.
#[derive(Debug)]
enum Window {
    /// It is as it was at the saved moment.
    Untouched,
    /// It was copied, and its protection lifted.
    Aside(PooledBuffer),
    /// The same, kept in memory of its own.
    Kept(Vec<u8>),
    /// It was all zero, and its protection was lifted.
    Zero,
    /// The writer has it.
    Taken,
}

/// Takes the memory for the windows that are copied aside, [`ASIDE_LEN_MAX`] bytes: before the
/// process is stopped.
///
/// # Errors
///
/// Returns [`io::ErrorKind::OutOfMemory`] if there is not so much.
pub fn aside_buffers() -> io::Result<BufferPool> {
    let count = usize::try_from(ASIDE_LEN_MAX / WINDOW_LEN).expect("a small number");
    BufferPool::new(count, in_window(WINDOW_LEN), 4096)
}

impl<'a> ProtectedRam<'a> {
    /// Takes the RAM of a process that has write-protected it; finds out which blocks are
    /// protected. Copies go into `buffers`, see [`aside_buffers`].
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub fn new(
        ram: &'a ProcessRam,
        userfault: &'a Userfault,
        buffers: BufferPool,
    ) -> io::Result<ProtectedRam<'a>> {
        let blocks = ram.addresses().map(|addresses| block(addresses, userfault));
        Ok(ProtectedRam {
            ram,
            userfault,
            blocks: blocks.collect::<io::Result<_>>()?,
            buffers,
            urgent: Mutex::default(),
            waiting: Mutex::default(),
            faults: Mutex::default(),
            before: Mutex::default(),
            failure: Mutex::default(),
            is_over: AtomicBool::new(false),
            aside_bytes: AtomicU64::new(0),
        })
    }

    /// Begins the saved moment. Call it while the threads of the process stand still; from then on
    /// [`PageSource::read`] may be called.
    ///
    /// Protects again what [`ProtectedRam::serve`] has lifted. Copies here and now what the process
    /// itself has lifted or may still lift, `lifted`: blocks by number, and a byte of the block. A
    /// block that is not protected, such as firmware, is copied as well.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error; or that the blocks that are not protected have more than
    /// [`ASIDE_LEN_MAX`] bytes.
    pub fn begin(&self, lifted: impl IntoIterator<Item = (usize, u64)>) -> io::Result<()> {
        let mut before = lock(&self.before);
        before.is_over = true;
        for &(block, offset) in &before.lifted {
            self.userfault.protect(&self.blocks[block].range(offset))?;
        }
        for (block, offset) in lifted {
            self.keep(block, offset - offset % WINDOW_LEN)?;
        }
        self.keep_unprotected()
    }

    /// Copies a window into memory of its own, unless that was done.
    fn keep(&self, number: usize, start: u64) -> io::Result<()> {
        let mut window = self.window(number, start);
        if matches!(*window, Window::Untouched) {
            let range = start..(start + WINDOW_LEN).min(self.blocks[number].len());
            let mut bytes = vec![0; in_window(range.end - range.start)];
            let has_data = self.ram.read(number, &range, &mut bytes)?;
            *window = if has_data { Window::Kept(bytes) } else { Window::Zero };
        }
        Ok(())
    }

    fn keep_unprotected(&self) -> io::Result<()> {
        let unprotected = self.blocks.iter().enumerate().filter(|(_, block)| !block.is_protected);
        let len = |(_, block): (usize, &Block)| block.len();
        let bytes: u64 = unprotected.clone().map(len).sum();
        if bytes > ASIDE_LEN_MAX {
            let what = format!(
                "{bytes} bytes of RAM are not write-protected, expected at most {ASIDE_LEN_MAX}"
            );
            return Err(io::Error::other(what));
        }
        for (number, block) in unprotected {
            for range in pieces(0..block.len(), WINDOW_LEN) {
                self.keep(number, range.start)?;
            }
        }
        Ok(())
    }

    /// Lets the threads of the process go on that write to protected pages, until
    /// [`ProtectedRam::end`] is called. Run it in a thread of its own, as soon as the memory is
    /// protected.
    ///
    /// If a fault cannot be served, the next [`PageSource::read`] fails, so that the save ends and the
    /// process removes its protection.
    pub fn serve(&self) {
        let mut woken = Instant::now();
        while !self.is_over.load(Ordering::Acquire) {
            if let Err(error) = self.serve_some(&mut woken) {
                self.fail(&format!("serve the faults of the process: {error}"));
                // An error that lasts must not take a whole processor until `end` is called.
                std::thread::sleep(LOOK);
            }
        }
    }

    /// Has the next [`PageSource::read`] fail for this reason: what is read after that is not of the saved
    /// moment.
    pub fn fail(&self, reason: &str) {
        lock(&self.failure).get_or_insert_with(|| reason.to_owned());
    }

    /// Serves the faults that come next; `woken` is when the threads were last asked once more.
    fn serve_some(&self, woken: &mut Instant) -> io::Result<()> {
        let addresses = self.userfault.wait(LOOK)?;
        for &address in &addresses {
            self.serve_one(address)?;
        }
        let is_before = !lock(&self.before).is_over;
        let is_idle = || woken.elapsed() >= WAKE_INTERVAL && lock(&self.waiting).is_empty();
        if addresses.is_empty() && (is_before || is_idle()) {
            *woken = Instant::now();
            self.wake_all()?;
        }
        Ok(())
    }

    /// Has every thread that waits tell once more for which page. The process reads its userfaultfd as
    /// well, and may have taken a fault that it does not serve: QEMU (8.2 to 11.1) sends the page first,
    /// and waits for room in the socket. It does so for one fault at most, also after the saved moment.
    fn wake_all(&self) -> io::Result<()> {
        let protected = self.blocks.iter().filter(|block| block.is_protected);
        protected
            .map(|block| &block.addresses)
            .try_for_each(|addresses| self.userfault.wake(addresses))
    }

    /// Ends [`ProtectedRam::serve`].
    pub fn end(&self) {
        self.is_over.store(true, Ordering::Release);
    }

    /// Returns how the process had to wait so far.
    #[must_use]
    pub fn faults(&self) -> Faults {
        let aside_bytes = self.aside_bytes.load(Ordering::Relaxed);
        Faults { aside_bytes, ..*lock(&self.faults) }
    }

    /// Checks that every protected block is still registered with a userfaultfd. Call it once
    /// everything was read: if the process removed the protection meanwhile, what was read is not
    /// of one moment. The kernel (6.18) does not say with which userfaultfd: that the process has not
    /// protected the memory anew must be known otherwise.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error: [`io::ErrorKind::NotFound`] if it is not.
    pub fn verify(&self) -> io::Result<()> {
        let protected = self.blocks.iter().filter(|block| block.is_protected);
        protected
            .map(|block| block.range(block.len().saturating_sub(1)))
            .try_for_each(|last| self.userfault.lift(&last))
    }

    /// Returns the window that the writer is to take next: the block's number, and the offset in
    /// it.
    pub(crate) fn urgent(&self) -> Option<(usize, u64)> {
        lock(&self.urgent).pop_front()
    }

    fn serve_one(&self, address: u64) -> io::Result<()> {
        let since = Instant::now();
        let holds = |block: &Block| block.addresses.contains(&address);
        let Some(number) = self.blocks.iter().position(holds) else {
            // A block that came later: the process protects only what it had.
            return self.let_go(&page(address));
        };
        let offset = address - self.blocks[number].addresses.start;
        let start = offset - offset % WINDOW_LEN;
        let mut before = lock(&self.before);
        if !before.is_over {
            before.lifted.insert((number, start));
            return self.let_go(&self.blocks[number].range(start));
        }
        drop(before);
        match self.lift(number, start)? {
            Lifted::Now => self.count(since.elapsed()),
            Lifted::Later => {
                lock(&self.waiting).push((number, start, since));
                lock(&self.urgent).push_front((number, start));
                // The writer may have read it before it was in the list.
                if !matches!(*self.window(number, start), Window::Untouched) {
                    self.woken(number, start);
                }
            }
        }
        Ok(())
    }

    /// Lifts the protection of a window, whose content is copied aside first if it is not yet.
    fn lift(&self, number: usize, start: u64) -> io::Result<Lifted> {
        let block = &self.blocks[number];
        let mut window = self.window(number, start);
        if matches!(*window, Window::Untouched) {
            let range = start..(start + WINDOW_LEN).min(block.len());
            if self.ram.first_data(number, &range)?.is_none() {
                // No buffer is needed, and the writer does not come to windows without data.
                *window = Window::Zero;
            } else {
                let Some(mut buffer) = self.buffers.try_take() else { return Ok(Lifted::Later) };
                let len = in_window(range.end - range.start);
                self.ram.read(number, &range, &mut buffer[..len])?;
                *window = Window::Aside(buffer);
                self.aside_bytes.fetch_add(len as u64, Ordering::Relaxed);
                lock(&self.urgent).push_back((number, start));
            }
        }
        if block.is_protected {
            // Also if it was lifted before: the thread may have seen the protection just then.
            self.let_go(&block.range(start))?;
        }
        Ok(Lifted::Now)
    }

    /// Lifts the protection of addresses, and wakes the threads that wait there. If the process has
    /// removed the protection itself, they wait all the same: the kernel (6.18) wakes them only once the
    /// last duplicate of the userfaultfd is closed.
    fn let_go(&self, addresses: &Range<u64>) -> io::Result<()> {
        match self.userfault.lift(addresses) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.userfault.wake(addresses),
            lifted => lifted,
        }
    }

    /// Counts the faults that waited for a window.
    fn woken(&self, number: usize, start: u64) {
        lock(&self.waiting).retain(|&(block, at, since)| {
            let is_here = (block, at) == (number, start);
            if is_here {
                self.count(since.elapsed());
            }
            !is_here
        });
    }

    fn count(&self, waited: Duration) {
        let mut faults = lock(&self.faults);
        faults.count += 1;
        faults.waited += waited;
        faults.longest = faults.longest.max(waited);
    }

    fn window(&self, number: usize, start: u64) -> MutexGuard<'_, Window> {
        let index = usize::try_from(start / WINDOW_LEN).expect("a window of memory");
        lock(&self.blocks[number].windows[index])
    }
}

impl PageSource for ProtectedRam<'_> {
    /// What is zero now and still protected was zero before. What was copied aside counts as data.
    fn first_data(&self, number: usize, range: &Range<u64>) -> io::Result<Option<u64>> {
        let block = &self.blocks[number];
        if !block.is_protected {
            return Ok((!range.is_empty()).then_some(range.start));
        }
        self.ram.first_data(number, range)
    }

    fn read(&self, number: usize, range: &Range<u64>, into: &mut [u8]) -> io::Result<bool> {
        if let Some(reason) = &*lock(&self.failure) {
            return Err(io::Error::other(reason.clone()));
        }
        let block = &self.blocks[number];
        let mut window = self.window(number, range.start);
        match std::mem::replace(&mut *window, Window::Taken) {
            Window::Untouched => {
                let has_data = self.ram.read(number, range, into)?;
                self.userfault.lift(&block.range(range.start))?;
                drop(window);
                self.woken(number, range.start);
                Ok(has_data)
            }
            Window::Aside(buffer) => {
                into.copy_from_slice(&buffer[..into.len()]);
                Ok(true)
            }
            Window::Kept(bytes) => {
                into.copy_from_slice(&bytes);
                Ok(true)
            }
            Window::Zero => Ok(false),
            Window::Taken => unreachable!("each window is a unit, and each unit is taken once"),
        }
    }
}

/// Whether the protection of a window was lifted.
enum Lifted {
    Now,
    /// The writer will do it: no buffer is free.
    Later,
}

impl Block {
    fn len(&self) -> u64 {
        self.addresses.end - self.addresses.start
    }

    /// Returns the addresses of the window that holds a byte of the block.
    fn range(&self, offset: u64) -> Range<u64> {
        let start = self.addresses.start + (offset - offset % WINDOW_LEN);
        start..(start + WINDOW_LEN).min(self.addresses.end)
    }
}

fn block(addresses: Range<u64>, userfault: &Userfault) -> io::Result<Block> {
    let windows = (addresses.end - addresses.start).div_ceil(WINDOW_LEN);
    let windows = (0..windows).map(|_| Mutex::new(Window::Untouched)).collect();
    let mut block = Block { addresses, windows, is_protected: true };
    // Protecting what is protected changes nothing, and tells whether the block is registered.
    match userfault.protect(&block.range(0)) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => block.is_protected = false,
        Err(error) => return Err(error),
    }
    Ok(block)
}

/// Returns the page that holds an address.
fn page(address: u64) -> Range<u64> {
    let start = address - address % 4096;
    start..start + 4096
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
