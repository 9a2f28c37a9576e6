//! Capture, replay, and the update of an instantiated graph.

use std::{mem::MaybeUninit, ptr};

use cudarc::driver::{CudaSlice, PushKernelArg, sys};

use crate::support::{Toy, download, grid, on_soft_gpu};

const ADD: &str = "extern \"C\" __global__ void f(int* p, int v) { p[threadIdx.x] += v; }";
const MODE: sys::CUstreamCaptureMode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;

/// A stream whose memory carries no events, as capture needs it.
fn toy() -> (Toy, CudaSlice<i32>) {
    let toy = Toy::new(ADD);
    // SAFETY: there is one stream.
    unsafe { toy.context.disable_event_tracking() };
    let target = toy.stream.alloc_zeros::<i32>(32).expect("allocated");
    toy.stream.synchronize().expect("sound");
    (toy, target)
}

fn add(toy: &Toy, target: &mut CudaSlice<i32>, value: i32) {
    // SAFETY: the kernel adds to 32 numbers.
    unsafe {
        toy.stream
            .launch_builder(&toy.function)
            .arg(target)
            .arg(&value)
            .launch(grid(1, 32))
    }
    .expect("launched");
}

/// A graph of additions of the values.
fn capture(toy: &Toy, target: &mut CudaSlice<i32>, values: &[i32]) -> sys::CUgraph {
    let mut graph = ptr::null_mut();
    toy.stream.begin_capture(MODE).expect("capturing");
    for value in values {
        add(toy, target, *value);
    }
    // SAFETY: the stream captures.
    unsafe { sys::cuStreamEndCapture(toy.stream.cu_stream(), &mut graph) }
        .result()
        .expect("captured");
    graph
}

#[test]
fn a_graph_runs_when_it_is_launched_and_as_often() {
    on_soft_gpu(
        "graphs::a_graph_runs_when_it_is_launched_and_as_often",
        &[],
        || {
            let (toy, mut target) = toy();
            toy.stream.begin_capture(MODE).expect("capturing");
            add(&toy, &mut target, 1);
            add(&toy, &mut target, 10);
            let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
            let graph = toy
                .stream
                .end_capture(flags)
                .expect("captured")
                .expect("not empty");
            assert_eq!(download(&toy.stream, &target), [0; 32], "capturing runs nothing");
            for _ in 0..3 {
                graph.launch().expect("launched");
            }
            assert_eq!(download(&toy.stream, &target), [33; 32]);
        },
    );
}

#[test]
fn synchronizing_spoils_a_capture() {
    on_soft_gpu("graphs::synchronizing_spoils_a_capture", &[], || {
        let (toy, mut target) = toy();
        toy.stream.begin_capture(MODE).expect("capturing");
        add(&toy, &mut target, 1);
        let refused = toy.stream.synchronize().expect_err("not while capturing");
        assert_eq!(refused.0, sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        let mut graph = ptr::null_mut();
        // SAFETY: the stream captures.
        let ended = unsafe { sys::cuStreamEndCapture(toy.stream.cu_stream(), &mut graph) };
        assert_eq!(ended, sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        assert!(graph.is_null());
        toy.stream.synchronize().expect("the stream is usable again");
    });
}

#[test]
fn memory_is_not_allocated_in_a_capture() {
    on_soft_gpu("graphs::memory_is_not_allocated_in_a_capture", &[], || {
        let (toy, _target) = toy();
        toy.stream.begin_capture(MODE).expect("capturing");
        let mut address = 0;
        // SAFETY: an out-parameter.
        let refused = unsafe { sys::cuMemAlloc_v2(&mut address, 16) };
        assert_eq!(refused, sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    });
}

#[test]
fn an_instantiated_graph_takes_the_parameters_of_another_of_its_shape() {
    let test = "graphs::an_instantiated_graph_takes_the_parameters_of_another_of_its_shape";
    on_soft_gpu(test, &[], || {
        let (toy, mut target) = toy();
        let first = capture(&toy, &mut target, &[1, 2]);
        let second = capture(&toy, &mut target, &[10, 20]);
        let longer = capture(&toy, &mut target, &[1, 2, 3]);
        let mut executable = ptr::null_mut();
        let mut info = MaybeUninit::<sys::CUgraphExecUpdateResultInfo>::zeroed();
        // SAFETY: all handles are live, and the out-parameters have room.
        unsafe {
            sys::cuGraphInstantiateWithFlags(&mut executable, first, 0)
                .result()
                .expect("instantiated");
            sys::cuGraphLaunch(executable, toy.stream.cu_stream())
                .result()
                .expect("launched");
            sys::cuGraphExecUpdate_v2(executable, second, info.as_mut_ptr())
                .result()
                .expect("updated");
            sys::cuGraphLaunch(executable, toy.stream.cu_stream())
                .result()
                .expect("launched");
            let refused = sys::cuGraphExecUpdate_v2(executable, longer, info.as_mut_ptr());
            assert_eq!(refused, sys::CUresult::CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE);
            let why = info.assume_init().result;
            assert_eq!(
                why,
                sys::CUgraphExecUpdateResult::CU_GRAPH_EXEC_UPDATE_ERROR_TOPOLOGY_CHANGED
            );
        }
        assert_eq!(download(&toy.stream, &target), [33; 32]);
    });
}
