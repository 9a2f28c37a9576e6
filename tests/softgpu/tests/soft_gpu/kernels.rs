//! NVRTC and what kernels are made of: shared memory, barriers, warp operations, tensor cores, asynchronous copies.

use std::{
    ffi::{CStr, CString},
    ptr,
};

use cudarc::{
    driver::{CudaContext, LaunchConfig, PushKernelArg, sys::CUresult},
    nvrtc::{self, CompileError, Ptx, compile_ptx},
};
use softgpu::Env;

use crate::support::{Settings, Toy, download, grid, noise, on_soft_gpu};

/// Blocks of 8 warps: a shuffle within the warp, shared memory and a barrier between them, an atomic between blocks.
const SUM: &str = r#"
extern "C" __global__ void f(int* out, const int* in) {
  __shared__ int of_warp[8];
  int v = in[blockIdx.x * blockDim.x + threadIdx.x];
  for (int o = 16; o > 0; o >>= 1) v += __shfl_down_sync(0xffffffffu, v, o);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x == 0) {
    int sum = 0;
    for (int w = 0; w < 8; w++) sum += of_warp[w];
    atomicAdd(out, sum);
  }
}"#;

fn sum_is_right() {
    let toy = Toy::new(SUM);
    let numbers: Vec<i32> = (0..256 * 50).collect();
    let input = toy.stream.clone_htod(&numbers).expect("copied");
    let mut sum = toy.stream.alloc_zeros::<i32>(1).expect("allocated");
    let mut launch = toy.stream.launch_builder(&toy.function);
    // SAFETY: 50 blocks of 256 threads read a number each.
    unsafe { launch.arg(&mut sum).arg(&input).launch(grid(50, 256)) }.expect("launched");
    assert_eq!(download(&toy.stream, &sum), [numbers.iter().sum::<i32>()]);
}

#[test]
fn threads_meet_in_warps_blocks_and_grids() {
    on_soft_gpu(
        "kernels::threads_meet_in_warps_blocks_and_grids",
        &[],
        sum_is_right,
    );
}

#[test]
fn the_order_of_threads_does_not_matter_to_a_right_kernel() {
    let settings = [(Env::JITTER_US, "100")];
    on_soft_gpu(
        "kernels::the_order_of_threads_does_not_matter_to_a_right_kernel",
        &settings,
        || {
            (0..5).for_each(|_| sum_is_right());
        },
    );
}

#[test]
fn dynamic_shared_memory_has_a_limit_that_can_be_raised() {
    let source = r#"
    extern "C" __global__ void f(int* out) {
      unsigned char* s = (unsigned char*)softgpu::dyn_smem();
      s[60000] = 9;
      out[0] = s[60000];
    }"#;
    on_soft_gpu(
        "kernels::dynamic_shared_memory_has_a_limit_that_can_be_raised",
        &[],
        move || {
            let toy = Toy::new(source);
            let out = toy.stream.alloc_zeros::<i32>(1).expect("allocated");
            let config = LaunchConfig {
                shared_mem_bytes: 60001,
                ..grid(1, 1)
            };
            // SAFETY: the kernel uses the shared memory that it asks for.
            let launch = || unsafe { toy.stream.launch_builder(&toy.function).arg(&out).launch(config) };
            assert_eq!(
                launch().expect_err("too much").0,
                CUresult::CUDA_ERROR_INVALID_VALUE
            );
            let most = cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            toy.function.set_attribute(most, 60001).expect("allowed");
            launch().expect("launched");
            assert_eq!(download(&toy.stream, &out), [9]);
        },
    );
}

#[test]
fn fresh_shared_memory_is_not_a_number() {
    let source = r#"
    extern "C" __global__ void f(float* out) {
      __shared__ float s[32];
      float* dynamic = (float*)softgpu::dyn_smem();
      out[blockIdx.x * 32 + threadIdx.x] = s[threadIdx.x] + dynamic[threadIdx.x];
      s[threadIdx.x] = dynamic[threadIdx.x] = 1;
    }"#;
    on_soft_gpu("kernels::fresh_shared_memory_is_not_a_number", &[], move || {
        let toy = Toy::new(source);
        let mut out = toy.stream.alloc_zeros::<f32>(8 * 32).expect("allocated");
        let config = LaunchConfig {
            shared_mem_bytes: 128,
            ..grid(8, 32)
        };
        // SAFETY: eight blocks write 32 numbers each.
        unsafe {
            toy.stream
                .launch_builder(&toy.function)
                .arg(&mut out)
                .launch(config)
        }
        .expect("launched");
        assert!(
            download(&toy.stream, &out).iter().all(|value| value.is_nan()),
            "also after another block"
        );
    });
}

/// One 16 x 16 matrix of A, row-major, times one 16 x 8 matrix of B, row-major: A by ldmatrix, B transposed by it.
const MMA: &str = r#"
extern "C" __global__ void f(float* d, const unsigned short* a, const unsigned short* b) {
  __shared__ __align__(16) unsigned short sa[16 * 16], sb[16 * 8];
  for (int i = threadIdx.x; i < 256; i += 32) sa[i] = a[i];
  for (int i = threadIdx.x; i < 128; i += 32) sb[i] = b[i];
  __syncwarp();
  unsigned fa[4], fb[2];
  const int lane = threadIdx.x;
  softgpu::ldmatrix_x4(fa, sa + (lane % 16) * 16 + (lane / 16) * 8);
  softgpu::ldmatrix_x2_trans(fb, sb + (lane % 16) * 8);
  float c[4] = {0, 0, 0, 0};
  softgpu::MMA(c, fa, fb);
  const int row = lane / 4, column = lane % 4 * 2;
  d[row * 8 + column] = c[0];
  d[row * 8 + column + 1] = c[1];
  d[(row + 8) * 8 + column] = c[2];
  d[(row + 8) * 8 + column + 1] = c[3];
}"#;

fn mma_is_right(instruction: &str, narrow: fn(f32) -> u16, widen: fn(u16) -> f32) {
    let toy = Toy::new(&MMA.replace("MMA", instruction));
    let bits = |seed, count| noise(seed, count).into_iter().map(narrow).collect::<Vec<u16>>();
    let (a, b) = (bits(1, 256), bits(2, 128));
    let (da, db) = (
        toy.stream.clone_htod(&a).expect("copied"),
        toy.stream.clone_htod(&b).expect("copied"),
    );
    let mut d = toy.stream.alloc_zeros::<f32>(128).expect("allocated");
    // SAFETY: the sizes are the kernel's.
    unsafe {
        toy.stream
            .launch_builder(&toy.function)
            .arg(&mut d)
            .arg(&da)
            .arg(&db)
            .launch(grid(1, 32))
    }
    .expect("launched");
    for (i, value) in download(&toy.stream, &d).into_iter().enumerate() {
        let (row, column) = (i / 8, i % 8);
        let expected: f32 = (0..16)
            .map(|k| widen(a[row * 16 + k]) * widen(b[k * 8 + column]))
            .sum();
        assert!(
            (value - expected).abs() < 1e-5,
            "{instruction} [{row}, {column}]: {value}, not {expected}"
        );
    }
}

#[test]
fn tensor_cores_multiply() {
    use half::{bf16, f16};
    on_soft_gpu("kernels::tensor_cores_multiply", &[], || {
        let bf16_of = |v| bf16::from_f32(v).to_bits();
        mma_is_right("mma_m16n8k16_bf16", bf16_of, |v| bf16::from_bits(v).to_f32());
        let f16_of = |v| f16::from_f32(v).to_bits();
        mma_is_right("mma_m16n8k16_f16", f16_of, |v| f16::from_bits(v).to_f32());
    });
}

#[test]
fn conversions_round_as_the_reference_does() {
    let source = r#"
    extern "C" __global__ void f(unsigned* out, const float* in, int n) {
      for (int i = threadIdx.x; i < n; i += blockDim.x)
        out[i] = softgpu::f16_rn(in[i]) | (unsigned)softgpu::bf16_rn(in[i]) << 16;
    }"#;
    on_soft_gpu(
        "kernels::conversions_round_as_the_reference_does",
        &[],
        move || {
            let toy = Toy::new(source);
            // All magnitudes from subnormal to overflow, and ties.
            let mut values = vec![
                0.0,
                -0.0,
                65504.0,
                65519.9,
                65520.0,
                1e30,
                f32::INFINITY,
                2f32.powi(-25),
            ];
            for (i, v) in noise(3, 4096).into_iter().enumerate() {
                values.push(v * 2f32.powi(i as i32 % 44 - 26));
            }
            let input = toy.stream.clone_htod(&values).expect("copied");
            let mut out = toy.stream.alloc_zeros::<u32>(values.len()).expect("allocated");
            let count = values.len() as i32;
            let mut launch = toy.stream.launch_builder(&toy.function);
            // SAFETY: both buffers have `count` elements.
            unsafe { launch.arg(&mut out).arg(&input).arg(&count).launch(grid(1, 64)) }.expect("launched");
            for (value, bits) in values.into_iter().zip(download(&toy.stream, &out)) {
                assert_eq!(
                    bits as u16,
                    half::f16::from_f32(value).to_bits(),
                    "f16 of {value:e}"
                );
                assert_eq!(
                    (bits >> 16) as u16,
                    half::bf16::from_f32(value).to_bits(),
                    "bf16 of {value:e}"
                );
            }
        },
    );
}

#[test]
fn an_asynchronous_copy_is_done_when_it_was_waited_for() {
    let source = r#"
    extern "C" __global__ void f(float* out, const float* in) {
      __shared__ __align__(16) float s[4];
      if (threadIdx.x == 0) {
        s[0] = 5;
        softgpu::cp_async16(s, in, true);
        softgpu::cp_commit();
        out[0] = s[0];
        softgpu::cp_wait(0);
        out[1] = s[0];
        softgpu::cp_async16(s, in, false);
        softgpu::cp_commit();
        softgpu::cp_wait(0);
        out[2] = s[0];
      }
    }"#;
    on_soft_gpu(
        "kernels::an_asynchronous_copy_is_done_when_it_was_waited_for",
        &[],
        move || {
            let toy = Toy::new(source);
            let input = toy.stream.clone_htod(&[2f32; 4]).expect("copied");
            let mut out = toy.stream.alloc_zeros::<f32>(3).expect("allocated");
            // SAFETY: the sizes are the kernel's.
            unsafe {
                toy.stream
                    .launch_builder(&toy.function)
                    .arg(&mut out)
                    .arg(&input)
                    .launch(grid(1, 32))
            }
            .expect("launched");
            assert_eq!(download(&toy.stream, &out), [5.0, 2.0, 0.0]);
        },
    );
}

/// What the compiler says about a source.
fn log_of(source: &str) -> String {
    match compile_ptx(source).expect_err("it does not compile") {
        CompileError::CompileError { log, .. } => log.to_string_lossy().into_owned(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_wrong_source_is_refused_with_its_line() {
    on_soft_gpu("kernels::a_wrong_source_is_refused_with_its_line", &[], || {
        let log = log_of("extern \"C\" __global__ void f(int* p) {\n  p[0] = undefined_thing;\n}");
        assert!(
            log.contains("unit.cu:2") && log.contains("undefined_thing"),
            "{log}"
        );
    });
}

#[test]
fn a_missing_compiler_is_named() {
    let cache = tempfile::tempdir().expect("a directory");
    let cache = cache.path().to_str().expect("UTF-8").to_owned();
    let settings: Settings<'_> = &[(Env::CXX, "no-such-compiler"), (Env::CACHE, &cache)];
    on_soft_gpu("kernels::a_missing_compiler_is_named", settings, || {
        let log = log_of("extern \"C\" __global__ void f(int* p) {}");
        assert!(
            log.contains("no-such-compiler") && log.contains(Env::CXX),
            "{log}"
        );
    });
}

/// The way of the backend: headers from memory, definitions, machine code instead of PTX.
fn cubin(source: &CStr, options: &[&str]) -> Vec<u8> {
    use nvrtc::{result, sys};
    let (header, name) = (c"#define SEVEN 7", c"seven.cuh");
    let (headers, names) = ([header.as_ptr()], [name.as_ptr()]);
    let mut program = ptr::null_mut();
    // SAFETY: all texts are C strings and outlive the calls.
    unsafe {
        let unit = c"unit.cu".as_ptr();
        sys::nvrtcCreateProgram(
            &mut program,
            source.as_ptr(),
            unit,
            1,
            headers.as_ptr(),
            names.as_ptr(),
        )
        .result()
        .expect("a program");
        result::compile_program(program, options).expect("it compiles");
        let mut len = 0;
        sys::nvrtcGetCUBINSize(program, &mut len)
            .result()
            .expect("a length");
        let mut code = vec![0u8; len];
        sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast())
            .result()
            .expect("code");
        result::destroy_program(program).expect("destroyed");
        code
    }
}

#[test]
fn machine_code_is_loaded_from_memory() {
    on_soft_gpu("kernels::machine_code_is_loaded_from_memory", &[], || {
        let source = c"#include \"seven.cuh\"\nextern \"C\" __global__ void f(int* p) { p[0] = SEVEN * N + __CUDA_ARCH__; }";
        let context = CudaContext::new(0).expect("a device");
        let stream = context.default_stream();
        for n in [2, 3] {
            let definition = CString::new(format!("-DN={n}")).expect("no zero");
            let options = [
                "--gpu-architecture=sm_80",
                "--std=c++17",
                definition.to_str().expect("UTF-8"),
            ];
            let code = cubin(source, &options);
            let module = context.load_module(Ptx::from_binary(code)).expect("loaded");
            let function = module.load_function("f").expect("a kernel");
            let missing = module.load_function("g").map(drop).expect_err("no such kernel");
            assert_eq!(missing.0, CUresult::CUDA_ERROR_NOT_FOUND);
            let mut out = stream.alloc_zeros::<i32>(1).expect("allocated");
            // SAFETY: the kernel writes one number.
            unsafe { stream.launch_builder(&function).arg(&mut out).launch(grid(1, 1)) }.expect("launched");
            assert_eq!(download(&stream, &out), [7 * n + 800]);
        }
    });
}

#[test]
fn machine_code_of_a_gpu_is_refused() {
    on_soft_gpu("kernels::machine_code_of_a_gpu_is_refused", &[], || {
        let mut code = vec![0u8; 128];
        code[..4].copy_from_slice(b"\x7fELF");
        code[18] = 190; // EM_CUDA
        let refused = CudaContext::new(0)
            .expect("a device")
            .load_module(Ptx::from_binary(code));
        let error = refused.map(drop).expect_err("not for this machine");
        assert_eq!(error.0, CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU);
    });
}
