//! Kernels that are wrong, and what is said about them.

use cudarc::driver::{PushKernelArg, sys::CUresult};

use crate::support::{Toy, grid, on_soft_gpu};

/// Runs `f(int*)` with 64 numbers on one block; what the stream says afterwards, and again.
fn run(body: &str, threads: u32) -> [CUresult; 2] {
    let toy = Toy::new(&format!("extern \"C\" __global__ void f(int* p) {{ {body} }}"));
    let target = toy.stream.alloc_zeros::<i32>(64).expect("allocated");
    // SAFETY: what the kernel does wrong is what is tested.
    let launched = unsafe {
        toy.stream
            .launch_builder(&toy.function)
            .arg(&target)
            .launch(grid(1, threads))
    };
    // The failure may surface at the launch already.
    let first = launched.map(drop).and_then(|()| toy.stream.synchronize());
    let second = toy.stream.synchronize();
    std::mem::forget(target); // freeing fails now
    [first, second].map(|result| result.expect_err("the kernel fails").0)
}

#[test]
fn a_deadlock_is_reported_with_thread_and_place() {
    let said = on_soft_gpu(
        "faults::a_deadlock_is_reported_with_thread_and_place",
        &[],
        || {
            let body = "if (threadIdx.x < 16) p[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1); else __syncthreads();";
            assert_eq!(run(body, 32), [CUresult::CUDA_ERROR_LAUNCH_FAILED; 2]);
        },
    );
    if let Some(said) = said {
        assert!(said.contains("deadlock"), "{said}");
        assert!(said.contains("thread 0 waits in __shfl_xor_sync"), "{said}");
    }
}

#[test]
fn a_lane_outside_of_its_mask_is_reported() {
    let said = on_soft_gpu("faults::a_lane_outside_of_its_mask_is_reported", &[], || {
        assert_eq!(
            run("p[0] = __shfl_sync(1u, 5, 0);", 32),
            [CUresult::CUDA_ERROR_LAUNCH_FAILED; 2]
        );
    });
    if let Some(said) = said {
        assert!(said.contains("does not name the calling lane"), "{said}");
    }
}

#[test]
fn an_illegal_access_fails_the_context_and_not_the_process() {
    let said = on_soft_gpu(
        "faults::an_illegal_access_fails_the_context_and_not_the_process",
        &[],
        || {
            let status = run("p[threadIdx.x + 64] = 1;", 32);
            assert_eq!(status, [CUresult::CUDA_ERROR_ILLEGAL_ADDRESS; 2]);
        },
    );
    if let Some(said) = said {
        assert!(said.contains("illegal memory access"), "{said}");
        assert!(said.contains("256 bytes past the start of 256 bytes"), "{said}");
    }
}

#[test]
fn a_misaligned_asynchronous_copy_is_reported() {
    let said = on_soft_gpu("faults::a_misaligned_asynchronous_copy_is_reported", &[], || {
        let body =
            "__shared__ __align__(16) int s[8]; softgpu::cp_async16(s + 1, p, true); softgpu::cp_wait(0);";
        assert_eq!(run(body, 1), [CUresult::CUDA_ERROR_LAUNCH_FAILED; 2]);
    });
    if let Some(said) = said {
        assert!(said.contains("not aligned"), "{said}");
    }
}
