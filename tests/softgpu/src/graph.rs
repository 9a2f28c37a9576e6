//! Graphs by stream capture: the operations in the order of their calls, run again by each launch.

use std::{
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, ThreadId},
};

use libc::{c_char, c_int, c_ulonglong};

use crate::{
    handles::{Handles, lock},
    status::{
        CAPTURE_INVALIDATED, CAPTURE_UNMATCHED, CAPTURE_UNSUPPORTED, GRAPH_EXEC_UPDATE_FAILURE,
        INVALID_HANDLE, INVALID_VALUE, Out, SUCCESS, Status, put,
    },
    stream::{self, Op, STRICT_CAPTURES, Stream},
};

/// What a node is, as far as an update of an instantiated graph must match it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Kernel,
    Copy,
    Set,
    Host,
    Event,
    Collective,
    Graph,
    Free,
}

#[derive(Clone)]
pub(crate) struct Node {
    pub(crate) kind: Kind,
    pub(crate) op: Op,
}

/// A capture in progress, shared by the streams that take part in it.
pub(crate) struct Capture {
    pub(crate) nodes: Mutex<Vec<Node>>,
    joined: Mutex<Vec<Weak<Stream>>>,
    invalid: AtomicBool,
    strict: bool,
    /// The thread that began it.
    owner: ThreadId,
}

impl Capture {
    pub(crate) fn is_of_this_thread(&self) -> bool {
        self.owner == thread::current().id()
    }

    /// A call that a capture cannot hold: the capture yields no graph.
    pub(crate) fn invalidate(&self) {
        self.invalid.store(true, Ordering::Relaxed);
    }

    pub(crate) fn join(&self, stream: &Arc<Stream>) {
        lock(&self.joined).push(Arc::downgrade(stream));
    }
}

struct Graph {
    nodes: Vec<Node>,
}

/// An instantiated graph. Its nodes can be replaced by an update; a launch already enqueued keeps the old ones.
struct Executable {
    nodes: Mutex<Arc<Vec<Node>>>,
}

static GRAPHS: Handles<Graph> = Handles::new();
static EXECUTABLES: Handles<Executable> = Handles::new();

const MODE_RELAXED: c_int = 2;

#[unsafe(no_mangle)]
extern "C" fn cuStreamBeginCapture_v2(stream: usize, mode: c_int) -> Status {
    let stream = match stream::get(stream) {
        Ok(stream) => stream,
        Err(status) => return status,
    };
    if stream.is_default {
        return CAPTURE_UNSUPPORTED;
    }
    let mut capture = lock(&stream.capture);
    if capture.is_some() || !(0..=MODE_RELAXED).contains(&mode) {
        return INVALID_VALUE;
    }
    let strict = mode != MODE_RELAXED;
    let new = Arc::new(Capture {
        nodes: Mutex::default(),
        joined: Mutex::default(),
        invalid: AtomicBool::new(false),
        strict,
        owner: thread::current().id(),
    });
    new.join(&stream);
    *capture = Some(new);
    STRICT_CAPTURES.set(STRICT_CAPTURES.get() + u32::from(strict));
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamEndCapture(stream: usize, out: Out<'_, usize>) -> Status {
    let stream = match stream::get(stream) {
        Ok(stream) => stream,
        Err(status) => return status,
    };
    let Some(capture) = lock(&stream.capture).clone() else {
        return CAPTURE_UNMATCHED;
    };
    let joined: Vec<_> = lock(&capture.joined).iter().filter_map(Weak::upgrade).collect();
    if joined.first().is_none_or(|origin| !Arc::ptr_eq(origin, &stream)) {
        return CAPTURE_UNMATCHED; // ended on a stream that only joined
    }
    for stream in joined {
        *lock(&stream.capture) = None;
    }
    STRICT_CAPTURES.set(STRICT_CAPTURES.get().saturating_sub(u32::from(capture.strict)));
    if capture.invalid.load(Ordering::Relaxed) {
        put(out, 0);
        return CAPTURE_INVALIDATED;
    }
    let nodes = std::mem::take(&mut *lock(&capture.nodes));
    put(out, GRAPHS.insert(Graph { nodes }))
}

/// 0: not capturing, 1: capturing, 2: capture invalidated.
#[unsafe(no_mangle)]
extern "C" fn cuStreamIsCapturing(stream: usize, out: Out<'_, c_int>) -> Status {
    match stream::get(stream) {
        Ok(stream) => {
            let state = match &*lock(&stream.capture) {
                None => 0,
                Some(capture) => 1 + c_int::from(capture.invalid.load(Ordering::Relaxed)),
            };
            put(out, state)
        }
        Err(status) => status,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphInstantiateWithFlags(out: Out<'_, usize>, graph: usize, _flags: c_ulonglong) -> Status {
    let Some(graph) = GRAPHS.get(graph) else {
        return INVALID_HANDLE;
    };
    let nodes = Mutex::new(Arc::new(graph.nodes.clone()));
    put(out, EXECUTABLES.insert(Executable { nodes }))
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphInstantiate_v2(
    out: Out<'_, usize>,
    graph: usize,
    _error_node: usize,
    _log: *mut c_char,
    _log_len: usize,
) -> Status {
    cuGraphInstantiateWithFlags(out, graph, 0)
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphLaunch(executable: usize, stream: usize) -> Status {
    let Some(executable) = EXECUTABLES.get(executable) else {
        return INVALID_HANDLE;
    };
    let nodes = lock(&executable.nodes).clone();
    let op = move || {
        nodes
            .iter()
            .map(|node| (node.op)())
            .find(|status| *status != SUCCESS)
            .unwrap_or(SUCCESS)
    };
    stream::enqueue(stream, Kind::Graph, Arc::new(op))
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphUpload(executable: usize, stream: usize) -> Status {
    match (EXECUTABLES.get(executable), stream::get(stream)) {
        (Some(_), Ok(_)) => SUCCESS,
        (None, _) => INVALID_HANDLE,
        (_, Err(status)) => status,
    }
}

#[repr(C)]
struct UpdateResult {
    result: c_int,
    error_node: usize,
    error_from_node: usize,
}

const UPDATE_SUCCESS: c_int = 0;
const UPDATE_TOPOLOGY_CHANGED: c_int = 2;
const UPDATE_NODE_TYPE_CHANGED: c_int = 3;

/// Gives an instantiated graph the parameters of another with the same nodes.
#[unsafe(no_mangle)]
extern "C" fn cuGraphExecUpdate_v2(executable: usize, graph: usize, out: Out<'_, UpdateResult>) -> Status {
    let (Some(executable), Some(graph)) = (EXECUTABLES.get(executable), GRAPHS.get(graph)) else {
        return INVALID_HANDLE;
    };
    let mut nodes = lock(&executable.nodes);
    let result = if nodes.len() != graph.nodes.len() {
        UPDATE_TOPOLOGY_CHANGED
    } else if nodes
        .iter()
        .zip(&graph.nodes)
        .any(|(old, new)| old.kind != new.kind)
    {
        UPDATE_NODE_TYPE_CHANGED
    } else {
        UPDATE_SUCCESS
    };
    put(
        out,
        UpdateResult {
            result,
            error_node: 0,
            error_from_node: 0,
        },
    );
    if result != UPDATE_SUCCESS {
        return GRAPH_EXEC_UPDATE_FAILURE;
    }
    *nodes = Arc::new(graph.nodes.clone());
    SUCCESS
}

/// Writes the number of nodes; their handles are not given out.
#[unsafe(no_mangle)]
extern "C" fn cuGraphGetNodes(graph: usize, nodes: *mut usize, count: Out<'_, usize>) -> Status {
    match GRAPHS.get(graph) {
        Some(graph) if nodes.is_null() => put(count, graph.nodes.len()),
        Some(_) => crate::status::NOT_SUPPORTED,
        None => INVALID_HANDLE,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphExecDestroy(executable: usize) -> Status {
    EXECUTABLES.remove(executable).map_or(INVALID_HANDLE, |_| SUCCESS)
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphDestroy(graph: usize) -> Status {
    GRAPHS.remove(graph).map_or(INVALID_HANDLE, |_| SUCCESS)
}
