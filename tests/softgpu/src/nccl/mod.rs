//! libnccl, between processes of one host. As with NCCL a lost peer hangs a collective until `ncclCommAbort`, unless
//! `SOFTGPU_NCCL_DETECT` is set.

mod comm;
mod reduce;
mod segment;

use std::{
    cell::RefCell,
    sync::{Arc, atomic::Ordering},
    thread,
};

use libc::{c_char, c_int, c_uint};

use self::{
    comm::{Buffers, Collective, Comm, Message},
    reduce::{DataType, Reduction},
    segment::{MAX_RANKS, Segment, UniqueId},
};
use crate::{
    device,
    graph::Kind,
    handles::Handles,
    memory,
    settings::settings,
    status::{self, Out},
    stream,
};

/// `ncclResult_t`.
type NcclStatus = c_int;
const SUCCESS: NcclStatus = 0;
const UNHANDLED_CUDA_ERROR: NcclStatus = 1;
const SYSTEM_ERROR: NcclStatus = 2;
const INVALID_ARGUMENT: NcclStatus = 4;
const INVALID_USAGE: NcclStatus = 5;
const REMOTE_ERROR: NcclStatus = 6;
const IN_PROGRESS: NcclStatus = 7;

const VERSION: c_int = 22803;

static COMMS: Handles<Comm> = Handles::new();

fn put<T>(out: Out<'_, T>, value: T) -> NcclStatus {
    match status::put(out, value) {
        status::SUCCESS => SUCCESS,
        _ => INVALID_ARGUMENT,
    }
}

fn of(result: Result<(), NcclStatus>) -> NcclStatus {
    result.err().unwrap_or(SUCCESS)
}

fn comm(handle: usize) -> Result<Arc<Comm>, NcclStatus> {
    COMMS.get(handle).ok_or(INVALID_ARGUMENT)
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetVersion(out: Out<'_, c_int>) -> NcclStatus {
    put(out, VERSION)
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetErrorString(status: NcclStatus) -> *const c_char {
    let text = match status {
        SUCCESS => c"no error",
        UNHANDLED_CUDA_ERROR => c"unhandled cuda error",
        SYSTEM_ERROR => c"unhandled system error",
        INVALID_ARGUMENT => c"invalid argument",
        INVALID_USAGE => c"invalid usage",
        REMOTE_ERROR => c"remote process exited or there was a network error",
        IN_PROGRESS => c"NCCL operation in progress",
        _ => c"unknown result code",
    };
    text.as_ptr()
}

/// What went wrong is said on standard error when it happens.
#[unsafe(no_mangle)]
extern "C" fn ncclGetLastError(_comm: usize) -> *const c_char {
    c"".as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetUniqueId(out: Out<'_, UniqueId>) -> NcclStatus {
    match UniqueId::new() {
        Ok(id) => put(out, id),
        Err(status) => status,
    }
}

/// The beginning of `ncclConfig_t`, which grows at its end.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
}

const CONFIG_MAGIC: c_uint = 0xcafe_beef;

fn init(id: UniqueId, world: c_int, rank: c_int, blocking: bool) -> Result<Arc<Comm>, NcclStatus> {
    let world = usize::try_from(world).map_err(|_| INVALID_ARGUMENT)?;
    let rank = usize::try_from(rank).map_err(|_| INVALID_ARGUMENT)?;
    if rank >= world || world > MAX_RANKS {
        return Err(INVALID_ARGUMENT);
    }
    if GROUP.with_borrow(|group| group.depth > 0) {
        return Err(INVALID_USAGE); // several ranks in one process: not here
    }
    let device = device::current_ordinal().map_err(|_| UNHANDLED_CUDA_ERROR)?;
    let segment = Segment::join(&id, world, rank)?;
    let comm = Arc::new(Comm::new(segment, (rank, world), device, blocking));
    let joining = comm.clone();
    let meet = move || {
        let met = of(joining.segment.meet(&id, joining.world, &joining.aborted));
        joining.state.store(met, Ordering::Release);
        met
    };
    if blocking {
        let met = meet();
        return if met == SUCCESS { Ok(comm) } else { Err(met) };
    }
    thread::Builder::new()
        .name("softgpu-nccl".into())
        .spawn(meet)
        .map_err(|_| SYSTEM_ERROR)?;
    Ok(comm)
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommInitRankConfig(
    out: Out<'_, usize>,
    world: c_int,
    id: UniqueId,
    rank: c_int,
    config: Option<&Config>,
) -> NcclStatus {
    let known = |config: &Config| config.magic == CONFIG_MAGIC && config.size >= size_of::<Config>();
    if config.is_some_and(|config| !known(config)) {
        return INVALID_ARGUMENT;
    }
    // Undefined, the least number, means blocking.
    let blocking = config.is_none_or(|config| config.blocking != 0);
    match init(id, world, rank, blocking) {
        Ok(comm) => match put(out, COMMS.insert_shared(comm)) {
            SUCCESS if !blocking => IN_PROGRESS,
            status => status,
        },
        Err(status) => status,
    }
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommInitRank(out: Out<'_, usize>, world: c_int, id: UniqueId, rank: c_int) -> NcclStatus {
    ncclCommInitRankConfig(out, world, id, rank, None)
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommGetAsyncError(handle: usize, out: Out<'_, NcclStatus>) -> NcclStatus {
    match comm(handle) {
        Ok(comm) => {
            let pretended = &comm.pretended;
            let less =
                pretended.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |times| times.checked_sub(1));
            put(
                out,
                if less.is_ok() {
                    IN_PROGRESS
                } else {
                    comm.state.load(Ordering::Acquire)
                },
            )
        }
        Err(status) => status,
    }
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommFinalize(handle: usize) -> NcclStatus {
    match comm(handle) {
        Ok(comm) => {
            comm.finish();
            SUCCESS
        }
        Err(status) => status,
    }
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommDestroy(handle: usize) -> NcclStatus {
    match COMMS.remove(handle) {
        Some(comm) => {
            comm.finish();
            SUCCESS
        }
        None => INVALID_ARGUMENT,
    }
}

/// Operations that are enqueued end without effect, and so does the one that runs: the stream drains.
#[unsafe(no_mangle)]
extern "C" fn ncclCommAbort(handle: usize) -> NcclStatus {
    match COMMS.remove(handle) {
        Some(comm) => {
            comm.abort();
            SUCCESS
        }
        None => INVALID_ARGUMENT,
    }
}

fn answer(handle: usize, out: Out<'_, c_int>, value: fn(&Comm) -> usize) -> NcclStatus {
    match comm(handle) {
        Ok(comm) => put(out, value(&comm) as c_int),
        Err(status) => status,
    }
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommCount(handle: usize, out: Out<'_, c_int>) -> NcclStatus {
    answer(handle, out, |comm| comm.world)
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommUserRank(handle: usize, out: Out<'_, c_int>) -> NcclStatus {
    answer(handle, out, |comm| comm.rank)
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommCuDevice(handle: usize, out: Out<'_, c_int>) -> NcclStatus {
    answer(handle, out, |comm| comm.device)
}

/// A call that waits for the end of its group.
enum Call {
    Collective(Collective, Buffers),
    Message(Message),
}

struct Queued {
    comm: Arc<Comm>,
    stream: usize,
    call: Call,
}

#[derive(Default)]
struct Group {
    depth: u32,
    queued: Vec<Queued>,
}

thread_local! {
    static GROUP: RefCell<Group> = const { RefCell::new(Group { depth: 0, queued: Vec::new() }) };
}

/// Queues a call in the group, or makes a group of it alone.
fn submit(queued: Queued) -> NcclStatus {
    if let Err(status) = queued.comm.ready() {
        return status;
    }
    let alone = GROUP.with_borrow_mut(|group| {
        if group.depth == 0 {
            return Some(queued);
        }
        group.queued.push(queued);
        None
    });
    alone.map_or(SUCCESS, |queued| flush(vec![queued]))
}

/// Enqueues collectives in their order; messages of one communicator and stream move together, after them.
fn flush(queued: Vec<Queued>) -> NcclStatus {
    let mut result = SUCCESS;
    let mut messages: Vec<(Arc<Comm>, usize, Vec<Message>)> = Vec::new();
    for Queued { comm, stream, call } in queued {
        if settings().jitter_us > 0 && !comm.blocking {
            comm.pretended.store(2, Ordering::Relaxed);
            result = IN_PROGRESS;
        }
        match call {
            Call::Collective(collective, buffers) => {
                let op = move || {
                    comm.run_collective(collective, buffers);
                    status::SUCCESS
                };
                if stream::enqueue(stream, Kind::Collective, Arc::new(op)) != status::SUCCESS {
                    return UNHANDLED_CUDA_ERROR;
                }
            }
            Call::Message(message) => {
                let same = messages
                    .iter_mut()
                    .find(|(other, s, _)| Arc::ptr_eq(other, &comm) && *s == stream);
                match same {
                    Some((_, _, together)) => together.push(message),
                    None => messages.push((comm, stream, vec![message])),
                }
            }
        }
    }
    for (comm, stream, together) in messages {
        let op = move || {
            comm.run_messages(&together);
            status::SUCCESS
        };
        if stream::enqueue(stream, Kind::Collective, Arc::new(op)) != status::SUCCESS {
            return UNHANDLED_CUDA_ERROR;
        }
    }
    result
}

#[unsafe(no_mangle)]
extern "C" fn ncclGroupStart() -> NcclStatus {
    GROUP.with_borrow_mut(|group| group.depth += 1);
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclGroupEnd() -> NcclStatus {
    let ended = GROUP.with_borrow_mut(|group| {
        group.depth = group.depth.checked_sub(1)?;
        Some(if group.depth == 0 {
            std::mem::take(&mut group.queued)
        } else {
            Vec::new()
        })
    });
    ended.map_or(INVALID_USAGE, flush)
}

/// The arguments that all collectives have.
struct Given {
    send: usize,
    receive: usize,
    count: usize,
    data_type: c_int,
    comm: usize,
    stream: usize,
}

impl Given {
    fn submit(self, collective: Option<Collective>) -> NcclStatus {
        of(self.check(collective).and_then(|queued| match submit(queued) {
            SUCCESS => Ok(()),
            status => Err(status),
        }))
    }

    fn check(self, collective: Option<Collective>) -> Result<Queued, NcclStatus> {
        let comm = comm(self.comm)?;
        let collective = collective.ok_or(INVALID_ARGUMENT)?;
        let data_type = DataType::of(self.data_type).ok_or(INVALID_ARGUMENT)?;
        let (reduces, root) = match collective {
            Collective::AllReduce(_) | Collective::ReduceScatter(_) => (true, 0),
            Collective::Reduce { root, .. } => (true, root),
            Collective::AllGather => (false, 0),
            Collective::Broadcast { root } => (false, root),
        };
        if root >= comm.world || reduces && data_type == DataType::F8 {
            return Err(INVALID_ARGUMENT);
        }
        let (send, receive) = collective.counts(&comm, self.count).ok_or(INVALID_ARGUMENT)?;
        let within = |address: usize, count: Option<usize>, what: &str| {
            let bytes = count
                .unwrap_or(0)
                .checked_mul(data_type.bytes())
                .ok_or(INVALID_ARGUMENT)?;
            memory::check(address, bytes, what).map_err(|_| INVALID_ARGUMENT)
        };
        within(self.send, send, "nccl send buffer")?;
        within(self.receive, receive, "nccl receive buffer")?;
        let buffers = Buffers {
            send: self.send,
            receive: self.receive,
            count: self.count,
            data_type,
        };
        Ok(Queued {
            comm,
            stream: self.stream,
            call: Call::Collective(collective, buffers),
        })
    }
}

fn root(number: c_int) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[unsafe(no_mangle)]
extern "C" fn ncclAllReduce(
    send: usize,
    receive: usize,
    count: usize,
    data_type: c_int,
    reduction: c_int,
    comm: usize,
    stream: usize,
) -> NcclStatus {
    Given {
        send,
        receive,
        count,
        data_type,
        comm,
        stream,
    }
    .submit(Reduction::of(reduction).map(Collective::AllReduce))
}

#[unsafe(no_mangle)]
extern "C" fn ncclReduce(
    send: usize,
    receive: usize,
    count: usize,
    data_type: c_int,
    reduction: c_int,
    to: c_int,
    comm: usize,
    stream: usize,
) -> NcclStatus {
    let collective = |reduction| Collective::Reduce {
        reduction,
        root: root(to),
    };
    Given {
        send,
        receive,
        count,
        data_type,
        comm,
        stream,
    }
    .submit(Reduction::of(reduction).map(collective))
}

#[unsafe(no_mangle)]
extern "C" fn ncclAllGather(
    send: usize,
    receive: usize,
    count: usize,
    data_type: c_int,
    comm: usize,
    stream: usize,
) -> NcclStatus {
    Given {
        send,
        receive,
        count,
        data_type,
        comm,
        stream,
    }
    .submit(Some(Collective::AllGather))
}

#[unsafe(no_mangle)]
extern "C" fn ncclReduceScatter(
    send: usize,
    receive: usize,
    count: usize,
    data_type: c_int,
    reduction: c_int,
    comm: usize,
    stream: usize,
) -> NcclStatus {
    Given {
        send,
        receive,
        count,
        data_type,
        comm,
        stream,
    }
    .submit(Reduction::of(reduction).map(Collective::ReduceScatter))
}

#[unsafe(no_mangle)]
extern "C" fn ncclBroadcast(
    send: usize,
    receive: usize,
    count: usize,
    data_type: c_int,
    from: c_int,
    comm: usize,
    stream: usize,
) -> NcclStatus {
    Given {
        send,
        receive,
        count,
        data_type,
        comm,
        stream,
    }
    .submit(Some(Collective::Broadcast { root: root(from) }))
}

fn message(
    sends: bool,
    (address, count): (usize, usize),
    data_type: c_int,
    peer: c_int,
    (handle, stream): (usize, usize),
) -> Result<Queued, NcclStatus> {
    let comm = comm(handle)?;
    let bytes = DataType::of(data_type).and_then(|data_type| count.checked_mul(data_type.bytes()));
    let bytes = bytes.ok_or(INVALID_ARGUMENT)?;
    let peer = root(peer);
    if peer >= comm.world || memory::check(address, bytes, "nccl message").is_err() {
        return Err(INVALID_ARGUMENT);
    }
    Ok(Queued {
        comm,
        stream,
        call: Call::Message(Message {
            sends,
            peer,
            address,
            bytes,
        }),
    })
}

#[unsafe(no_mangle)]
extern "C" fn ncclSend(
    address: usize,
    count: usize,
    data_type: c_int,
    peer: c_int,
    comm: usize,
    stream: usize,
) -> NcclStatus {
    message(true, (address, count), data_type, peer, (comm, stream)).map_or_else(|status| status, submit)
}

#[unsafe(no_mangle)]
extern "C" fn ncclRecv(
    address: usize,
    count: usize,
    data_type: c_int,
    peer: c_int,
    comm: usize,
    stream: usize,
) -> NcclStatus {
    message(false, (address, count), data_type, peer, (comm, stream)).map_or_else(|status| status, submit)
}
