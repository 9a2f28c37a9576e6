//! Servers on the soft GPU, one at a time: it wants all the CPUs there are.

use std::{
    ffi::OsStr,
    sync::{Mutex, MutexGuard, PoisonError},
};

use phalanx_tests::{
    demo_model, http,
    server::{Server, chat},
};
use softgpu::LibraryDir;

/// A short context: few blocks, small workspaces. One graph, which decode steps of up to as many rows are padded to: every
/// forward pass of a soft GPU takes seconds.
pub(crate) const SMALL: [&str; 8] = [
    "--max-model-len",
    "256",
    "--max-num-batched-tokens",
    "32",
    "--max-num-seqs",
    "8",
    "--cudagraph-capture-sizes",
    "4",
];

pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A server that finds its libraries by `search_path` and is shown these devices.
pub(crate) fn launch(search_path: &OsStr, visible: &str, arguments: &[&str]) -> Server {
    let model = demo_model();
    let arguments = [&SMALL, arguments].concat();
    let environment: [(&str, &OsStr); 4] = [
        ("LD_LIBRARY_PATH", search_path),
        ("CUDA_VISIBLE_DEVICES", visible.as_ref()),
        ("SOFTGPU_MEM_MIB", "1536".as_ref()),
        ("PHALANX_KERNEL_CACHE", KERNELS.as_ref()),
    ];
    Server::launch_in(&model.to_string_lossy(), &arguments, &environment)
}

/// Compiled with what is tested, and removed with it.
pub(crate) const KERNELS: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/kernels");

/// A server whose ranks are on GPUs, ready.
pub(crate) fn on_gpus(libraries: &LibraryDir, arguments: &[&str]) -> Server {
    let arguments = [&["--device", "cuda"], arguments].concat();
    let server = launch(&libraries.search_path(), "0,1,2,3", &arguments);
    server.wait_ready();
    let log = server.log_text();
    assert!(log.contains("hardware=Cuda(["), "{log}");
    server
}

/// A stream that has begun and would go on for long.
pub(crate) fn endless_stream(server: &Server) -> http::Stream {
    let mut body = chat("Tell me everything about trees.");
    body["stream"] = true.into();
    body["ignore_eos"] = true.into();
    body["max_tokens"] = 100.into();
    let mut stream = http::open(&server.address, "/v1/chat/completions", &body).expect("a stream");
    for _ in 0..2 {
        stream.next_event().expect("an event").expect("not over");
    }
    stream
}

/// The last thing a stream says that ends in an error.
pub(crate) fn last_event(mut stream: http::Stream) -> String {
    let mut last = String::new();
    while let Ok(Some(data)) = stream.next_event() {
        last = if data == "[DONE]" { last } else { data };
    }
    last
}
