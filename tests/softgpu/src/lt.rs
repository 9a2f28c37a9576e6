//! libcublasLt: matmul descriptors, layouts, and the product.

use std::sync::Mutex;

use libc::{c_int, c_void};

use crate::{
    blas::{
        BlasStatus, INVALID_VALUE, NOT_INITIALIZED, NOT_SUPPORTED, SUCCESS, enqueue, is_f32_compute, put,
        transposes,
    },
    formats::Format,
    gemm::{Epilogue, Gemm, Matrix},
    handles::{Handles, lock},
    memory,
    settings::{log, settings},
    status::Out,
};

#[derive(Clone, Copy)]
struct Layout {
    format: Format,
    rows: usize,
    columns: usize,
    ld: usize,
    batch: usize,
    stride: usize,
}

#[derive(Clone, Copy)]
struct Description {
    transposed: [bool; 2],
    epilogue: u32,
    bias: usize,
    scales: [usize; 2],
}

struct Library;
struct Preference;

static LIBRARIES: Handles<Library> = Handles::new();
static PREFERENCES: Handles<Preference> = Handles::new();
static LAYOUTS: Handles<Mutex<Layout>> = Handles::new();
static DESCRIPTIONS: Handles<Mutex<Description>> = Handles::new();

/// The bit that all epilogues with a bias have.
const EPILOGUE_BIAS: u32 = 4;
/// FP8 products need this compute capability.
const FP8_CAPABILITY: u32 = 89;
/// And dimensions and addresses in multiples of this.
const FP8_ALIGN: usize = 16;

#[unsafe(no_mangle)]
extern "C" fn cublasLtCreate(out: Out<'_, usize>) -> BlasStatus {
    put(out, LIBRARIES.insert(Library))
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtDestroy(handle: usize) -> BlasStatus {
    LIBRARIES.remove(handle).map_or(NOT_INITIALIZED, |_| SUCCESS)
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatrixLayoutCreate(
    out: Out<'_, usize>,
    data_type: c_int,
    rows: u64,
    columns: u64,
    ld: i64,
) -> BlasStatus {
    let Some(format) = Format::of(data_type) else {
        return NOT_SUPPORTED;
    };
    let (Ok(rows), Ok(columns), Ok(ld)) = (
        usize::try_from(rows),
        usize::try_from(columns),
        usize::try_from(ld),
    ) else {
        return INVALID_VALUE;
    };
    put(
        out,
        LAYOUTS.insert(Mutex::new(Layout {
            format,
            rows,
            columns,
            ld,
            batch: 1,
            stride: 0,
        })),
    )
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatrixLayoutDestroy(layout: usize) -> BlasStatus {
    LAYOUTS.remove(layout).map_or(INVALID_VALUE, |_| SUCCESS)
}

/// An attribute's value, of the size that `T` has.
///
/// # Safety
/// `value` is null or points to `bytes` readable bytes.
unsafe fn attribute<T: Copy>(value: *const c_void, bytes: usize) -> Result<T, BlasStatus> {
    if value.is_null() || bytes != size_of::<T>() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: the caller's promise, and the sizes are equal; `T` is an integer, so any bytes are a value.
    Ok(unsafe { value.cast::<T>().read_unaligned() })
}

fn done(result: Result<(), BlasStatus>) -> BlasStatus {
    result.err().unwrap_or(SUCCESS)
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatrixLayoutSetAttribute(
    layout: usize,
    name: c_int,
    value: *const c_void,
    bytes: usize,
) -> BlasStatus {
    let Some(layout) = LAYOUTS.get(layout) else {
        return INVALID_VALUE;
    };
    let mut layout = lock(&layout);
    let mut set = || {
        // SAFETY: the caller gives `bytes` bytes (cublasLt API).
        unsafe {
            match name {
                // Order: column-major is all there is here.
                1 if attribute::<i32>(value, bytes)? == 0 => {}
                5 => {
                    layout.batch =
                        usize::try_from(attribute::<i32>(value, bytes)?).map_err(|_| INVALID_VALUE)?
                }
                6 => {
                    layout.stride =
                        usize::try_from(attribute::<i64>(value, bytes)?).map_err(|_| INVALID_VALUE)?
                }
                _ => return Err(NOT_SUPPORTED),
            }
        }
        Ok(())
    };
    done(set())
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmulDescCreate(out: Out<'_, usize>, compute: c_int, scale_type: c_int) -> BlasStatus {
    if !is_f32_compute(compute) || Format::of(scale_type) != Some(Format::F32) {
        return NOT_SUPPORTED;
    }
    let description = Description {
        transposed: [false; 2],
        epilogue: 1,
        bias: 0,
        scales: [0; 2],
    };
    put(out, DESCRIPTIONS.insert(Mutex::new(description)))
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmulDescDestroy(description: usize) -> BlasStatus {
    DESCRIPTIONS
        .remove(description)
        .map_or(INVALID_VALUE, |_| SUCCESS)
}

/// Attributes by number of `cublasLtMatmulDescAttributes_t`; what is not known is refused rather than ignored.
#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmulDescSetAttribute(
    description: usize,
    name: c_int,
    value: *const c_void,
    bytes: usize,
) -> BlasStatus {
    let Some(description) = DESCRIPTIONS.get(description) else {
        return INVALID_VALUE;
    };
    let mut description = lock(&description);
    let mut set = || {
        // SAFETY: the caller gives `bytes` bytes (cublasLt API).
        unsafe {
            match name {
                2 if attribute::<i32>(value, bytes)? == 0 => {} // alpha and beta on the host
                3 | 4 => {
                    let operation = attribute::<i32>(value, bytes)?;
                    description.transposed[name as usize - 3] = transposes(operation).ok_or(INVALID_VALUE)?;
                }
                5 if attribute::<i32>(value, bytes)? == 0 => {} // C is never transposed
                7 => description.epilogue = attribute(value, bytes)?,
                8 => description.bias = attribute(value, bytes)?,
                17 | 18 => description.scales[name as usize - 17] = attribute(value, bytes)?,
                25 => {
                    attribute::<i8>(value, bytes)?; // fast accumulation: allowed, not done
                }
                _ => {
                    log(&format!(
                        "cublasLt: descriptor attribute {name} is unknown to the soft GPU"
                    ));
                    return Err(NOT_SUPPORTED);
                }
            }
        }
        Ok(())
    };
    done(set())
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmulPreferenceCreate(out: Out<'_, usize>) -> BlasStatus {
    put(out, PREFERENCES.insert(Preference))
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmulPreferenceDestroy(preference: usize) -> BlasStatus {
    PREFERENCES.remove(preference).map_or(INVALID_VALUE, |_| SUCCESS)
}

/// Limits of workspace and alignments: the one algorithm needs neither.
#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmulPreferenceSetAttribute(
    preference: usize,
    _name: c_int,
    value: *const c_void,
    _bytes: usize,
) -> BlasStatus {
    match PREFERENCES.get(preference) {
        Some(_) if !value.is_null() => SUCCESS,
        _ => INVALID_VALUE,
    }
}

/// `cublasLtMatmulAlgo_t`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Algorithm([u64; 8]);

/// Marks an algorithm that came from the heuristic, so that one that did not is noticed.
const ALGORITHM: Algorithm = Algorithm([u64::from_ne_bytes(*b"softgpu\x02"); 8]);

#[repr(C)]
struct Heuristic {
    algorithm: Algorithm,
    workspace: usize,
    status: BlasStatus,
    waves: f32,
    reserved: [c_int; 4],
}

/// A product's description and layouts, found.
struct Problem {
    description: Description,
    a: Layout,
    b: Layout,
    c: Layout,
    d: Layout,
}

impl Problem {
    fn find(description: usize, layouts: [usize; 4]) -> Result<Self, BlasStatus> {
        let layout = |handle: usize| {
            LAYOUTS
                .get(handle)
                .map(|layout| *lock(&layout))
                .ok_or(INVALID_VALUE)
        };
        let description = DESCRIPTIONS.get(description).ok_or(INVALID_VALUE)?;
        let [a, b, c, d] = layouts;
        let problem = Self {
            description: *lock(&description),
            a: layout(a)?,
            b: layout(b)?,
            c: layout(c)?,
            d: layout(d)?,
        };
        problem.check()?;
        Ok(problem)
    }

    /// m, n, k.
    fn sizes(&self) -> (usize, usize, usize) {
        let k = if self.description.transposed[0] {
            self.a.rows
        } else {
            self.a.columns
        };
        (self.d.rows, self.d.columns, k)
    }

    fn check(&self) -> Result<(), BlasStatus> {
        let (m, n, k) = self.sizes();
        let op = |layout: &Layout, transposed: bool| {
            if transposed {
                (layout.columns, layout.rows)
            } else {
                (layout.rows, layout.columns)
            }
        };
        let shapes = op(&self.a, self.description.transposed[0]) == (m, k)
            && op(&self.b, self.description.transposed[1]) == (k, n)
            && (self.c.rows, self.c.columns) == (m, n);
        let layouts = [self.a, self.b, self.c, self.d];
        if !shapes
            || layouts
                .iter()
                .any(|layout| layout.batch != self.d.batch || layout.ld < layout.rows)
        {
            return Err(INVALID_VALUE);
        }
        if self.c.format != self.d.format || self.d.format == Format::E4m3 {
            return Err(NOT_SUPPORTED); // an 8-bit output would need its own scale
        }
        if self.a.format == Format::E4m3 || self.b.format == Format::E4m3 {
            return self.check_fp8();
        }
        // The library has no products of different 16-bit formats, nor of f32 with less.
        let wide = self.d.format == Format::F32;
        let same = self.a.format == self.b.format && (self.a.format == self.d.format || wide);
        if same && self.description.scales == [0; 2] {
            Ok(())
        } else {
            Err(NOT_SUPPORTED)
        }
    }

    /// FP8: sm_89, both operands contiguous along k, everything in multiples of 16.
    fn check_fp8(&self) -> Result<(), BlasStatus> {
        let (m, n, k) = self.sizes();
        let both = self.a.format == self.b.format && self.description.transposed == [true, false];
        let aligned = [m, n, k, self.a.ld, self.b.ld]
            .iter()
            .all(|size| size.is_multiple_of(FP8_ALIGN));
        let capable = settings().compute_capability >= FP8_CAPABILITY;
        if both && aligned && capable {
            Ok(())
        } else {
            Err(NOT_SUPPORTED)
        }
    }

    /// The address of a bias may still be missing: an algorithm is chosen for shapes.
    fn epilogue(&self) -> Result<Epilogue, BlasStatus> {
        let (bias, relu, gelu) = match self.description.epilogue {
            1 => (false, false, false),
            2 => (false, true, false),
            4 => (true, false, false),
            6 => (true, true, false),
            32 => (false, false, true),
            36 => (true, false, true),
            _ => return Err(NOT_SUPPORTED),
        };
        Ok(Epilogue {
            bias: if bias { self.description.bias } else { 0 },
            relu,
            gelu,
        })
    }

    fn gemm(&self, [a, b, c, d]: [usize; 4], scalars: [Option<&f32>; 2]) -> Result<Gemm, BlasStatus> {
        if self.description.epilogue & EPILOGUE_BIAS != 0 && self.description.bias == 0 {
            return Err(INVALID_VALUE);
        }
        let fp8 = self.a.format == Format::E4m3;
        if fp8 && [a, b, d].iter().any(|address| !address.is_multiple_of(FP8_ALIGN)) {
            return Err(NOT_SUPPORTED);
        }
        let matrix = |address: usize, layout: &Layout, transposed: bool| Matrix {
            address,
            format: layout.format,
            ld: layout.ld,
            stride: layout.stride,
            transposed,
        };
        let (m, n, k) = self.sizes();
        Ok(Gemm {
            m,
            n,
            k,
            batch: self.d.batch,
            a: matrix(a, &self.a, self.description.transposed[0]),
            b: matrix(b, &self.b, self.description.transposed[1]),
            c: matrix(c, &self.c, false),
            d: matrix(d, &self.d, false),
            alpha: *scalars[0].ok_or(INVALID_VALUE)?,
            beta: *scalars[1].ok_or(INVALID_VALUE)?,
            epilogue: self.epilogue()?,
            scales: self.description.scales,
        })
    }
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmulAlgoGetHeuristic(
    handle: usize,
    description: usize,
    a: usize,
    b: usize,
    c: usize,
    d: usize,
    preference: usize,
    requested: c_int,
    results: Out<'_, Heuristic>,
    found: Out<'_, c_int>,
) -> BlasStatus {
    if LIBRARIES.get(handle).is_none() {
        return NOT_INITIALIZED;
    }
    if PREFERENCES.get(preference).is_none() || requested < 1 {
        return INVALID_VALUE;
    }
    if let Err(status) = Problem::find(description, [a, b, c, d]).and_then(|problem| problem.epilogue()) {
        put(found, 0);
        return status;
    }
    let one = Heuristic {
        algorithm: ALGORITHM,
        workspace: 0,
        status: SUCCESS,
        waves: 1.0,
        reserved: [0; 4],
    };
    match put(results, one) {
        SUCCESS => put(found, 1),
        status => status,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmul(
    handle: usize,
    description: usize,
    alpha: Option<&f32>,
    a: usize,
    layout_a: usize,
    b: usize,
    layout_b: usize,
    beta: Option<&f32>,
    c: usize,
    layout_c: usize,
    d: usize,
    layout_d: usize,
    algorithm: Option<&Algorithm>,
    workspace: usize,
    workspace_bytes: usize,
    stream: usize,
) -> BlasStatus {
    if LIBRARIES.get(handle).is_none() {
        return NOT_INITIALIZED;
    }
    if algorithm.is_some_and(|algorithm| algorithm.0 != ALGORITHM.0)
        || memory::check(workspace, workspace_bytes, "matrix product, workspace").is_err()
    {
        return INVALID_VALUE;
    }
    let gemm = Problem::find(description, [layout_a, layout_b, layout_c, layout_d])
        .and_then(|problem| problem.gemm([a, b, c, d], [alpha, beta]));
    match gemm {
        Ok(gemm) => enqueue(gemm, stream),
        Err(status) => status,
    }
}

const _: () = assert!(size_of::<Heuristic>() == 96);
