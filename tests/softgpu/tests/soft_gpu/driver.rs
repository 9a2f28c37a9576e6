//! Devices, memory, copies, streams and events.

use cudarc::driver::{CudaContext, DevicePtr, PushKernelArg, sys};
use softgpu::Env;

use crate::support::{Toy, download, grid, on_ranks, on_soft_gpu, open, wait_for};

#[test]
fn devices_are_described() {
    let settings = [
        (Env::DEVICES, "2"),
        (Env::COMPUTE_CAPABILITY, "90"),
        (Env::MEMORY_MIB, "100"),
    ];
    on_soft_gpu("driver::devices_are_described", &settings, || {
        assert_eq!(CudaContext::device_count(), Ok(2));
        let context = CudaContext::new(1).expect("the second device");
        assert_eq!(context.compute_capability(), Ok((9, 0)));
        assert_eq!(context.total_mem(), Ok(100 << 20));
        assert_eq!(context.name().expect("a name"), "Soft GPU");
        let error = CudaContext::new(2).expect_err("there is no third");
        assert_eq!(error.0, sys::CUresult::CUDA_ERROR_INVALID_DEVICE);
    });
}

#[test]
fn memory_is_limited_and_given_back() {
    on_soft_gpu(
        "driver::memory_is_limited_and_given_back",
        &[(Env::MEMORY_MIB, "64")],
        || {
            let (context, stream) = open();
            let some = stream.alloc_zeros::<u8>(40 << 20).expect("there is room");
            assert_eq!(context.mem_get_info(), Ok((24 << 20, 64 << 20)));
            // SAFETY: nothing is read.
            let error = unsafe { stream.alloc::<u8>(25 << 20) }.expect_err("there is not");
            assert_eq!(error.0, sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY);
            drop(some);
            stream.synchronize().expect("sound");
            assert_eq!(context.mem_get_info(), Ok((64 << 20, 64 << 20)));
        },
    );
}

#[test]
fn fresh_memory_is_not_a_number() {
    on_soft_gpu("driver::fresh_memory_is_not_a_number", &[], || {
        let (_context, stream) = open();
        // SAFETY: any bytes are a number.
        let fresh = unsafe { stream.alloc::<f32>(1000) }.expect("allocated");
        assert!(download(&stream, &fresh).iter().all(|value| value.is_nan()));
    });
}

#[test]
fn a_copy_past_the_end_is_refused() {
    let said = on_soft_gpu("driver::a_copy_past_the_end_is_refused", &[], || {
        let (_context, stream) = open();
        let target = stream.alloc_zeros::<u8>(100).expect("allocated");
        let (address, _guard) = target.device_ptr(&stream);
        let bytes = [1u8; 101];
        // SAFETY: the host memory is there, and that the device's is not is what is tested.
        let result =
            unsafe { sys::cuMemcpyHtoDAsync_v2(address, bytes.as_ptr().cast(), 101, stream.cu_stream()) };
        assert_eq!(result, sys::CUresult::CUDA_ERROR_INVALID_VALUE);
        stream.synchronize().expect("a refusal harms nothing");
    });
    if let Some(said) = said {
        assert!(said.contains("101 bytes"), "{said}");
    }
}

#[test]
fn events_order_streams() {
    // With delays, what is not ordered is seen out of order.
    on_soft_gpu(
        "driver::events_order_streams",
        &[(Env::JITTER_US, "3000")],
        || {
            let toy = Toy::new("extern \"C\" __global__ void f(int* p, int v) { p[threadIdx.x] = v; }");
            let other = toy.context.new_stream().expect("a stream");
            let mut target = toy.stream.alloc_zeros::<i32>(32).expect("allocated");
            for round in 0..20 {
                let mut launch = toy.stream.launch_builder(&toy.function);
                // SAFETY: the kernel writes 32 numbers.
                unsafe { launch.arg(&mut target).arg(&round).launch(grid(1, 32)) }.expect("launched");
                let event = toy.stream.record_event(None).expect("recorded");
                other.wait(&event).expect("waits");
                assert_eq!(download(&other, &target), [round; 32]);
            }
        },
    );
}

#[test]
fn events_measure_time() {
    on_soft_gpu("driver::events_measure_time", &[(Env::JITTER_US, "2000")], || {
        let (_context, stream) = open();
        let timed = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let first = stream.record_event(timed).expect("recorded");
        for _ in 0..50 {
            stream.alloc_zeros::<u8>(16).expect("allocated");
        }
        let second = stream.record_event(timed).expect("recorded");
        wait_for("the event", || second.is_complete().then_some(()));
        let elapsed = first.elapsed_ms(&second).expect("both are complete");
        assert!(elapsed > 1.0, "{elapsed} ms for 100 operations with delays");
    });
}

#[test]
fn a_destroyed_handle_is_refused() {
    on_soft_gpu("driver::a_destroyed_handle_is_refused", &[], || {
        let (_context, stream) = open();
        let mut event = std::ptr::null_mut();
        // SAFETY: the soft GPU looks handles up; that it does so for stale and foreign ones is what is tested.
        unsafe {
            assert_eq!(sys::cuEventCreate(&mut event, 0), sys::CUresult::CUDA_SUCCESS);
            assert_eq!(sys::cuEventDestroy_v2(event), sys::CUresult::CUDA_SUCCESS);
            let invalid = sys::CUresult::CUDA_ERROR_INVALID_HANDLE;
            assert_eq!(sys::cuEventRecord(event, stream.cu_stream()), invalid);
            assert_eq!(sys::cuStreamSynchronize(event.cast()), invalid);
            assert_eq!(sys::cuEventQuery(stream.cu_stream().cast()), invalid);
        }
    });
}

#[test]
fn a_write_behind_the_end_is_noticed_when_it_is_freed() {
    let said = on_soft_gpu(
        "driver::a_write_behind_the_end_is_noticed_when_it_is_freed",
        &[],
        || {
            let toy = Toy::new("extern \"C\" __global__ void f(char* p) { p[100] = 1; }");
            let target = toy.stream.alloc_zeros::<u8>(100).expect("allocated");
            // SAFETY: the kernel writes behind the end, which is what is tested.
            unsafe {
                toy.stream
                    .launch_builder(&toy.function)
                    .arg(&target)
                    .launch(grid(1, 1))
            }
            .expect("launched");
            toy.stream
                .synchronize()
                .expect("a small overrun is not seen at once");
            drop(target);
            let error = toy.stream.synchronize().expect_err("but here");
            assert_eq!(error.0, sys::CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
        },
    );
    if let Some(said) = said {
        assert!(said.contains("past the end of the 100-byte allocation"), "{said}");
    }
}

#[test]
fn memory_is_shared_between_processes() {
    on_ranks("driver::memory_is_shared_between_processes", 2, &[], |rank| {
        let toy = Toy::new("extern \"C\" __global__ void f(int* p) { p[threadIdx.x] = 7 * threadIdx.x; }");
        let bytes = 1000 * size_of::<i32>();
        // SAFETY: addresses and handles are the driver's own, and all memory outlives its use: both processes wait for
        // each other.
        unsafe {
            let mut address = 0;
            let mut handle: sys::CUipcMemHandle = std::mem::zeroed();
            if rank.rank == 0 {
                sys::cuMemAlloc_v2(&mut address, bytes)
                    .result()
                    .expect("allocated");
                sys::cuMemsetD8_v2(address, 0, bytes).result().expect("zeroed");
                toy.context.synchronize().expect("sound");
                sys::cuIpcGetMemHandle(&mut handle, address)
                    .result()
                    .expect("a handle");
                rank.publish("handle", &handle.reserved.map(|byte| byte as u8));
                rank.read("written");
                let mut values = vec![0i32; 1000];
                sys::cuMemcpyDtoH_v2(values.as_mut_ptr().cast(), address, bytes)
                    .result()
                    .expect("copied");
                let expected: Vec<i32> = (0..1000).map(|i| 7 * i).collect();
                assert_eq!(values, expected);
                return;
            }
            for (to, from) in handle.reserved.iter_mut().zip(rank.read("handle")) {
                *to = from as _;
            }
            sys::cuIpcOpenMemHandle_v2(&mut address, handle, 1)
                .result()
                .expect("opened");
            toy.stream
                .launch_builder(&toy.function)
                .arg(&address)
                .launch(grid(1, 1000))
                .expect("launched");
            toy.stream.synchronize().expect("sound");
            sys::cuIpcCloseMemHandle(address).result().expect("closed");
            rank.publish("written", &[]);
        }
    });
}

#[test]
fn freeing_memory_waits_for_streams_that_are_already_destroyed() {
    let settings = [(Env::JITTER_US, "2000")];
    on_soft_gpu(
        "driver::freeing_memory_waits_for_streams_that_are_already_destroyed",
        &settings,
        || {
            let (_context, _other) = open();
            let (mut stream, mut address) = (std::ptr::null_mut(), 0);
            // SAFETY: handles and addresses are the driver's own.
            unsafe {
                sys::cuStreamCreate(&mut stream, 0).result().expect("a stream");
                sys::cuMemAlloc_v2(&mut address, 1 << 20)
                    .result()
                    .expect("allocated");
                for value in 0..50 {
                    sys::cuMemsetD8Async(address, value, 1 << 20, stream)
                        .result()
                        .expect("enqueued");
                }
                sys::cuStreamDestroy_v2(stream)
                    .result()
                    .expect("destroyed, with work to do");
                sys::cuMemFree_v2(address)
                    .result()
                    .expect("freed, after that work");
            }
        },
    );
}
