//! Streams: an OS thread with a queue each. Work handed to a stream runs in order, later, and reports nothing to the
//! call that enqueued it: the first failure poisons the context, and every later call returns it.

use std::{
    cell::Cell,
    collections::{HashMap, VecDeque},
    io,
    sync::{
        Arc, Condvar, LazyLock, Mutex, PoisonError, Weak,
        atomic::{AtomicI32, Ordering},
    },
    thread,
    time::Duration,
};

use libc::{c_int, c_uint, c_void};

use crate::{
    device,
    graph::{Capture, Kind, Node},
    handles::{Handles, lock},
    settings::settings,
    status::{CAPTURE_UNSUPPORTED, INVALID_HANDLE, NOT_READY, OUT_OF_MEMORY, Out, SUCCESS, Status, put},
};

/// One piece of work; run again at each launch of the graph that captured it.
pub(crate) type Op = Arc<dyn Fn() -> Status + Send + Sync>;

static STICKY: AtomicI32 = AtomicI32::new(SUCCESS);
static STREAMS: Handles<Stream> = Handles::new();
/// All streams with a thread: those that are destroyed and have work left are among them.
static RUNNING: Mutex<Vec<Weak<Stream>>> = Mutex::new(Vec::new());
/// The default streams, one per device, made when first used.
static DEFAULTS: LazyLock<Mutex<HashMap<usize, Arc<Stream>>>> = LazyLock::new(Mutex::default);

/// The error that has poisoned the context, or success.
pub(crate) fn sticky() -> Status {
    STICKY.load(Ordering::Relaxed)
}

/// Poisons the context; the first error stays.
pub(crate) fn poison(status: Status) {
    // The error of an earlier operation explains the later ones, so it is kept.
    let _ = STICKY.compare_exchange(SUCCESS, status, Ordering::Relaxed, Ordering::Relaxed);
}

#[derive(Default)]
struct Queue {
    ops: VecDeque<Op>,
    enqueued: u64,
    done: u64,
    closed: bool,
}

pub(crate) struct Stream {
    queue: Mutex<Queue>,
    changed: Condvar,
    /// The capture this stream takes part in.
    pub(crate) capture: Mutex<Option<Arc<Capture>>>,
    pub(crate) is_default: bool,
}

impl Stream {
    fn new(is_default: bool) -> io::Result<Arc<Self>> {
        let stream = Arc::new(Self {
            queue: Mutex::default(),
            changed: Condvar::new(),
            capture: Mutex::new(None),
            is_default,
        });
        {
            let mut running = lock(&RUNNING);
            running.retain(|other| other.strong_count() > 0);
            running.push(Arc::downgrade(&stream));
        }
        let worker = stream.clone();
        thread::Builder::new()
            .name("softgpu-stream".into())
            .spawn(move || worker.run())?;
        Ok(stream)
    }

    fn run(&self) {
        let mut jitter = Jitter::new(std::ptr::from_ref(self) as u64);
        while let Some(op) = self.next() {
            jitter.sleep();
            if sticky() == SUCCESS {
                let status = op();
                if status != SUCCESS {
                    poison(status);
                }
            }
            drop(op);
            lock(&self.queue).done += 1;
            self.changed.notify_all();
        }
    }

    fn next(&self) -> Option<Op> {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(op) = queue.ops.pop_front() {
                return Some(op);
            }
            if queue.closed {
                return None;
            }
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Enqueues, or captures. Returns the number of operations after which this one is done; 0 if captured.
    pub(crate) fn push(&self, kind: Kind, op: Op) -> u64 {
        if let Some(capture) = &*lock(&self.capture) {
            lock(&capture.nodes).push(Node { kind, op });
            return 0;
        }
        let mut queue = lock(&self.queue);
        queue.ops.push_back(op);
        queue.enqueued += 1;
        let number = queue.enqueued;
        drop(queue);
        self.changed.notify_all();
        number
    }

    pub(crate) fn capturing(&self) -> bool {
        lock(&self.capture).is_some()
    }

    pub(crate) fn is_done(&self, number: u64) -> bool {
        lock(&self.queue).done >= number
    }

    /// Waits until `number` operations are done. Without a deadline, as `cuStreamSynchronize` has none.
    pub(crate) fn wait(&self, number: u64) {
        let mut queue = lock(&self.queue);
        while queue.done < number {
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(crate) fn enqueued(&self) -> u64 {
        lock(&self.queue).enqueued
    }

    pub(crate) fn synchronize(&self) -> Status {
        if let Some(capture) = &*lock(&self.capture) {
            capture.invalidate();
            return CAPTURE_UNSUPPORTED;
        }
        self.wait(self.enqueued());
        sticky()
    }

    /// Whether another thread is capturing it.
    fn is_captured_elsewhere(&self) -> bool {
        lock(&self.capture)
            .as_ref()
            .is_some_and(|capture| !capture.is_of_this_thread())
    }

    fn close(&self) {
        lock(&self.queue).closed = true;
        self.changed.notify_all();
    }
}

/// Random delays that bring out a missing synchronisation.
struct Jitter {
    state: u64,
}

impl Jitter {
    fn new(seed: u64) -> Self {
        Self { state: seed | 1 }
    }

    fn sleep(&mut self) {
        let limit = settings().jitter_us;
        if limit > 0 {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            thread::sleep(Duration::from_micros(self.state % limit));
        }
    }
}

/// The stream of a handle; 0, 1 and 2 are the default stream of the current context (legacy and per thread alike).
pub(crate) fn get(handle: usize) -> Result<Arc<Stream>, Status> {
    if handle > 2 {
        return STREAMS.get(handle).ok_or(INVALID_HANDLE);
    }
    let mut defaults = lock(&DEFAULTS);
    if let Some(stream) = defaults.get(&device::current()) {
        return Ok(stream.clone());
    }
    let stream = Stream::new(true).map_err(|_| OUT_OF_MEMORY)?;
    defaults.insert(device::current(), stream.clone());
    Ok(stream)
}

/// Enqueues `op`; what the call returns is the context's state, not the operation's result.
pub(crate) fn enqueue(handle: usize, kind: Kind, op: Op) -> Status {
    match get(handle) {
        Ok(stream) => {
            stream.push(kind, op);
            sticky()
        }
        Err(status) => status,
    }
}

/// Waits for all streams, also for what destroyed ones have left to do, as `cuCtxSynchronize`.
pub(crate) fn synchronize_all() -> Status {
    let all: Vec<_> = lock(&RUNNING).iter().filter_map(Weak::upgrade).collect();
    for stream in all {
        if stream.is_captured_elsewhere() {
            // Only what was enqueued before can run; the capture is its thread's business.
            stream.wait(stream.enqueued());
            continue;
        }
        let status = stream.synchronize();
        if status != SUCCESS {
            return status;
        }
    }
    sticky()
}

thread_local! {
    /// Captures that this thread has begun in another mode than "relaxed": they forbid what may wait for the device.
    pub(crate) static STRICT_CAPTURES: Cell<u32> = const { Cell::new(0) };
}

/// Refuses a call that may synchronise while this thread captures.
pub(crate) fn refuse_in_capture() -> Result<(), Status> {
    if STRICT_CAPTURES.get() == 0 {
        return Ok(());
    }
    // What other threads capture goes on.
    for stream in STREAMS.all() {
        if let Some(capture) = &*lock(&stream.capture)
            && capture.is_of_this_thread()
        {
            capture.invalidate();
        }
    }
    Err(CAPTURE_UNSUPPORTED)
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamCreate(out: Out<'_, usize>, _flags: c_uint) -> Status {
    match Stream::new(false) {
        Ok(stream) => put(out, STREAMS.insert_shared(stream)),
        Err(_) => OUT_OF_MEMORY,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamCreateWithPriority(out: Out<'_, usize>, flags: c_uint, _priority: c_int) -> Status {
    cuStreamCreate(out, flags)
}

/// Returns at once; work that is enqueued still runs.
#[unsafe(no_mangle)]
extern "C" fn cuStreamDestroy_v2(stream: usize) -> Status {
    match STREAMS.remove(stream) {
        Some(stream) => {
            stream.close();
            SUCCESS
        }
        None => INVALID_HANDLE,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamSynchronize(stream: usize) -> Status {
    get(stream).map_or_else(|status| status, |stream| stream.synchronize())
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamQuery(stream: usize) -> Status {
    match get(stream) {
        Ok(stream) if stream.capturing() => CAPTURE_UNSUPPORTED,
        Ok(stream) if stream.is_done(stream.enqueued()) => sticky(),
        Ok(_) => NOT_READY,
        Err(status) => status,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSynchronize() -> Status {
    refuse_in_capture().map_or_else(|status| status, |()| synchronize_all())
}

#[unsafe(no_mangle)]
extern "C" fn cuLaunchHostFunc(
    stream: usize,
    function: Option<extern "C" fn(*mut c_void)>,
    data: usize,
) -> Status {
    let Some(function) = function else {
        return crate::status::INVALID_VALUE;
    };
    let op = move || {
        function(data as *mut c_void);
        SUCCESS
    };
    enqueue(stream, Kind::Host, Arc::new(op))
}
