//! Matrix products of cuBLAS and cuBLASLt against sums in f64.

use std::{ffi::c_void, mem::MaybeUninit, ptr, sync::Arc};

use cudarc::{
    cublas::{CudaBlas, Gemm as _, GemmConfig, sys::cublasOperation_t},
    cublaslt::{CudaBlasLT, Matmul as _, MatmulConfig, result, sys},
    driver::{CudaSlice, CudaStream, DevicePtr, DeviceRepr, ValidAsZeroBits},
};
use half::{bf16, f16};
use softgpu::Env;

use crate::support::{download, noise, on_soft_gpu, open};

/// y[tokens, outputs] = x[tokens, inputs] w[outputs, inputs]^T, row-major: as cuBLAS sees it, column-major,
/// y^T = op(w) x^T with w transposed.
#[derive(Clone, Copy)]
struct Linear {
    tokens: usize,
    outputs: usize,
    inputs: usize,
}

const SHAPES: [Linear; 3] = [
    Linear {
        tokens: 1,
        outputs: 576,
        inputs: 192,
    },
    Linear {
        tokens: 5,
        outputs: 33,
        inputs: 70,
    },
    Linear {
        tokens: 64,
        outputs: 64,
        inputs: 256,
    },
];

impl Linear {
    fn reference(&self, w: &[f32], x: &[f32]) -> Vec<f32> {
        let dot = |t: usize, o: usize| {
            let (x, w) = (&x[t * self.inputs..], &w[o * self.inputs..]);
            (0..self.inputs)
                .map(|i| f64::from(x[i]) * f64::from(w[i]))
                .sum::<f64>() as f32
        };
        (0..self.tokens * self.outputs)
            .map(|i| dot(i / self.outputs, i % self.outputs))
            .collect()
    }

    fn lt_config(&self) -> MatmulConfig {
        MatmulConfig {
            transa: true,
            transb: false,
            transc: false,
            m: self.outputs as u64,
            n: self.tokens as u64,
            k: self.inputs as u64,
            alpha: 1.0,
            lda: self.inputs as i64,
            ldb: self.inputs as i64,
            beta: 0.0,
            ldc: self.outputs as i64,
            stride_a: None,
            stride_b: None,
            stride_c: None,
            stride_bias: None,
            batch_size: None,
        }
    }
}

fn assert_close(got: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(got.len(), expected.len());
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!(
            (got - expected).abs() <= tolerance * (1.0 + expected.abs()),
            "[{i}]: {got}, not {expected}"
        );
    }
}

/// An element type of the test.
trait Number: DeviceRepr + ValidAsZeroBits + Copy + Default + Unpin + 'static {
    fn of(value: f32) -> Self;
    fn wide(self) -> f32;
}
impl Number for f32 {
    fn of(value: f32) -> Self {
        value
    }
    fn wide(self) -> f32 {
        self
    }
}
impl Number for f16 {
    fn of(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn wide(self) -> f32 {
        self.to_f32()
    }
}
impl Number for bf16 {
    fn of(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn wide(self) -> f32 {
        self.to_f32()
    }
}

fn numbers<T: Number>(seed: u64, count: usize) -> Vec<T> {
    noise(seed, count).into_iter().map(T::of).collect()
}

fn wide<T: Number>(values: &[T]) -> Vec<f32> {
    values.iter().map(|value| value.wide()).collect()
}

/// The product of one shape through cublasLt's safe interface.
fn lt_product<T: Number>(stream: &Arc<CudaStream>, shape: Linear, w: &[T], x: &[T]) -> Vec<T>
where
    CudaBlasLT: cudarc::cublaslt::Matmul<T>,
{
    let lt = CudaBlasLT::new(stream.clone()).expect("a handle");
    let (w, x) = (
        stream.clone_htod(w).expect("copied"),
        stream.clone_htod(x).expect("copied"),
    );
    let mut y = stream
        .alloc_zeros::<T>(shape.tokens * shape.outputs)
        .expect("allocated");
    // SAFETY: the configuration describes the buffers.
    unsafe { lt.matmul(shape.lt_config(), &w, &x, &mut y, None, None) }.expect("enqueued");
    download(stream, &y)
}

fn lt_is_right<T: Number>(stream: &Arc<CudaStream>, tolerance: f32)
where
    CudaBlasLT: cudarc::cublaslt::Matmul<T>,
{
    for shape in SHAPES {
        let w = numbers::<T>(1, shape.outputs * shape.inputs);
        let x = numbers::<T>(2, shape.tokens * shape.inputs);
        let y = lt_product(stream, shape, &w, &x);
        assert_close(&wide(&y), &shape.reference(&wide(&w), &wide(&x)), tolerance);
    }
}

#[test]
fn cublaslt_multiplies_in_all_formats() {
    on_soft_gpu("products::cublaslt_multiplies_in_all_formats", &[], || {
        let (_context, stream) = open();
        lt_is_right::<f32>(&stream, 1e-5);
        lt_is_right::<f16>(&stream, 1e-3);
        lt_is_right::<bf16>(&stream, 1e-2);
    });
}

#[test]
fn cublas_multiplies() {
    on_soft_gpu("products::cublas_multiplies", &[], || {
        let (_context, stream) = open();
        let blas = CudaBlas::new(stream.clone()).expect("a handle");
        for shape in SHAPES {
            let w = numbers::<bf16>(3, shape.outputs * shape.inputs);
            let x = numbers::<bf16>(4, shape.tokens * shape.inputs);
            let (dw, dx) = (
                stream.clone_htod(&w).expect("copied"),
                stream.clone_htod(&x).expect("copied"),
            );
            let mut y = stream
                .alloc_zeros::<bf16>(shape.tokens * shape.outputs)
                .expect("allocated");
            let config = GemmConfig {
                transa: cublasOperation_t::CUBLAS_OP_T,
                transb: cublasOperation_t::CUBLAS_OP_N,
                m: shape.outputs as i32,
                n: shape.tokens as i32,
                k: shape.inputs as i32,
                alpha: bf16::ONE,
                lda: shape.inputs as i32,
                ldb: shape.inputs as i32,
                beta: bf16::ZERO,
                ldc: shape.outputs as i32,
            };
            // SAFETY: the configuration describes the buffers.
            unsafe { blas.gemm(config, &dw, &dx, &mut y) }.expect("enqueued");
            let expected = shape.reference(&wide(&w), &wide(&x));
            assert_close(&wide(&download(&stream, &y)), &expected, 1e-2);
        }
    });
}

#[test]
fn a_row_does_not_depend_on_the_others() {
    on_soft_gpu("products::a_row_does_not_depend_on_the_others", &[], || {
        let (_context, stream) = open();
        let shape = Linear {
            tokens: 7,
            outputs: 37,
            inputs: 100,
        };
        let w = numbers::<f32>(5, shape.outputs * shape.inputs);
        let x = numbers::<f32>(6, shape.tokens * shape.inputs);
        let together = lt_product(&stream, shape, &w, &x);
        for token in 0..shape.tokens {
            let one = Linear { tokens: 1, ..shape };
            let alone = lt_product(&stream, one, &w, &x[token * shape.inputs..][..shape.inputs]);
            assert_eq!(alone, together[token * shape.outputs..][..shape.outputs]);
        }
    });
}

/// What a product in FP8 needs besides its operands.
struct Fp8<'a> {
    stream: &'a Arc<CudaStream>,
    shape: Linear,
    w: &'a CudaSlice<u8>,
    x: &'a CudaSlice<u8>,
    /// One number per operand.
    scales: &'a [CudaSlice<f32>; 2],
}

impl Fp8<'_> {
    /// y in f32 and bias, through the interface that has scales; the heuristic's refusal if there is one.
    fn product(&self, bias: &CudaSlice<f32>, y: &mut CudaSlice<f32>) -> Result<(), result::CublasError> {
        let address = |slice: &CudaSlice<f32>| slice.device_ptr(self.stream).0;
        let size = size_of::<u64>();
        let Linear {
            tokens,
            outputs,
            inputs,
        } = self.shape;
        // SAFETY: all descriptors are live until they are destroyed, attributes have their types' sizes, and the layouts
        // describe the buffers.
        unsafe {
            use sys::cublasLtMatmulDescAttributes_t as Name;
            let handle = result::create_handle()?;
            let (fp8, f32_type) = (
                sys::cudaDataType_t::CUDA_R_8F_E4M3,
                sys::cudaDataType_t::CUDA_R_32F,
            );
            let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
            let description = result::create_matmul_desc(compute, f32_type)?;
            let set = |name: Name, value: *const c_void, size: usize| {
                result::set_matmul_desc_attribute(description, name, value, size)
            };
            let transpose = 1i32;
            set(
                Name::CUBLASLT_MATMUL_DESC_TRANSA,
                ptr::from_ref(&transpose).cast(),
                4,
            )?;
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_RELU_BIAS as u32;
            set(
                Name::CUBLASLT_MATMUL_DESC_EPILOGUE,
                ptr::from_ref(&epilogue).cast(),
                4,
            )?;
            let pointers = [address(bias), address(&self.scales[0]), address(&self.scales[1])];
            let names = [
                Name::CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                Name::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER,
                Name::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER,
            ];
            for (name, pointer) in names.into_iter().zip(&pointers) {
                set(name, ptr::from_ref(pointer).cast(), size)?;
            }
            let a = result::create_matrix_layout(fp8, inputs as u64, outputs as u64, inputs as i64)?;
            let b = result::create_matrix_layout(fp8, inputs as u64, tokens as u64, inputs as i64)?;
            let c = result::create_matrix_layout(f32_type, outputs as u64, tokens as u64, outputs as i64)?;
            let preference = result::create_matmul_pref()?;
            let algorithm = result::get_matmul_algo_heuristic(handle, description, a, b, c, c, preference);
            let product = algorithm.and_then(|found| {
                let (alpha, beta) = (1f32, 0f32);
                let (w, x) = (self.w.device_ptr(self.stream).0, self.x.device_ptr(self.stream).0);
                let out = y.device_ptr(self.stream).0;
                sys::cublasLtMatmul(
                    handle,
                    description,
                    ptr::from_ref(&alpha).cast(),
                    w as *const c_void,
                    a,
                    x as *const c_void,
                    b,
                    ptr::from_ref(&beta).cast(),
                    out as *const c_void,
                    c,
                    out as *mut c_void,
                    c,
                    &found.algo,
                    ptr::null_mut(),
                    0,
                    self.stream.cu_stream().cast(),
                )
                .result()
            });
            result::destroy_matmul_pref(preference)?;
            for layout in [a, b, c] {
                result::destroy_matrix_layout(layout)?;
            }
            result::destroy_matmul_desc(description)?;
            result::destroy_handle(handle)?;
            product
        }
    }
}

/// Exact in E4M3, and its bits: the integers to 15, with either sign.
fn fp8_integers(seed: u64, count: usize) -> (Vec<f32>, Vec<u8>) {
    let values: Vec<f32> = noise(seed, count)
        .into_iter()
        .map(|v| (v * 15.0).trunc())
        .collect();
    let bits = |v: &f32| {
        let magnitude = v.abs();
        if magnitude == 0.0 {
            return 0;
        }
        let exponent = magnitude.log2().floor() as i32;
        let mantissa = (magnitude / 2f32.powi(exponent) - 1.0) * 8.0;
        u8::from(*v < 0.0) << 7 | ((exponent + 7) as u8) << 3 | mantissa as u8
    };
    let encoded = values.iter().map(bits).collect();
    (values, encoded)
}

fn fp8_product() -> Result<(), result::CublasError> {
    let (_context, stream) = open();
    let shape = Linear {
        tokens: 16,
        outputs: 32,
        inputs: 64,
    };
    let (w, w_bits) = fp8_integers(7, shape.outputs * shape.inputs);
    let (x, x_bits) = fp8_integers(8, shape.tokens * shape.inputs);
    let bias = noise(9, shape.outputs);
    let slice = |bits: &[u8]| stream.clone_htod(bits).expect("copied");
    let scale = |value: f32| stream.clone_htod(&[value]).expect("copied");
    let scales = [scale(0.5), scale(0.25)];
    let mut y = stream
        .alloc_zeros::<f32>(shape.tokens * shape.outputs)
        .expect("allocated");
    let problem = Fp8 {
        stream: &stream,
        shape,
        w: &slice(&w_bits),
        x: &slice(&x_bits),
        scales: &scales,
    };
    problem.product(&stream.clone_htod(&bias).expect("copied"), &mut y)?;
    let mut expected = shape.reference(&w, &x);
    for (i, value) in expected.iter_mut().enumerate() {
        *value = (*value * 0.125 + bias[i % shape.outputs]).max(0.0);
    }
    assert_close(&download(&stream, &y), &expected, 1e-5);
    assert!(
        expected.iter().any(|value| *value > 1.0),
        "the reference is not all zeros"
    );
    Ok(())
}

#[test]
fn fp8_products_are_scaled() {
    on_soft_gpu(
        "products::fp8_products_are_scaled",
        &[(Env::COMPUTE_CAPABILITY, "89")],
        || {
            fp8_product().expect("multiplied");
        },
    );
}

#[test]
fn fp8_needs_a_device_that_has_it() {
    on_soft_gpu(
        "products::fp8_needs_a_device_that_has_it",
        &[(Env::COMPUTE_CAPABILITY, "80")],
        || {
            let refused = fp8_product().expect_err("refused");
            assert_eq!(refused.0, sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED);
        },
    );
}

#[test]
fn an_operand_outside_of_memory_is_refused() {
    let said = on_soft_gpu("products::an_operand_outside_of_memory_is_refused", &[], || {
        let (_context, stream) = open();
        let lt = CudaBlasLT::new(stream.clone()).expect("a handle");
        let shape = Linear {
            tokens: 2,
            outputs: 8,
            inputs: 16,
        };
        let w = stream.alloc_zeros::<f32>(8 * 16 - 1).expect("allocated");
        let x = stream.alloc_zeros::<f32>(2 * 16).expect("allocated");
        let mut y = stream.alloc_zeros::<f32>(2 * 8).expect("allocated");
        // SAFETY: that the weights are too small is what is tested.
        unsafe { lt.matmul(shape.lt_config(), &w, &x, &mut y, None, None) }.expect_err("refused");
    });
    if let Some(said) = said {
        assert!(said.contains("matrix product, A"), "{said}");
    }
}

/// The layouts agree with the library that is not there.
const _: () = assert!(size_of::<MaybeUninit<sys::cublasLtMatmulHeuristicResult_t>>() == 96);
