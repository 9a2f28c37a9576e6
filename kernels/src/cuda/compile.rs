//! Kernels from source to the device's machine code: compiled by NVRTC at run time, kept on disk.
//!
//! A file of the cache is `{unit}-{parameters}.{arch}.{key}.cubin`: the machine code and behind it its SHA-256, because the driver
//! takes machine code without a length and would read past the end of half a file. Ranks start together and write the
//! same files: each writes its own and renames it.

use std::ffi::{CStr, CString, OsString, c_char, c_int};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use cudarc::nvrtc::{result as nvrtc, sys};
use phalanx_model::{KvDtype, TensorFormat};
use sha2::{Digest, Sha256};

use super::error::{device, unavailable};
use super::library::{Library, require};
use super::units::{HEADERS, UNITS, Unit};
use crate::Result;

const OP: &str = "compiling the kernels";
const DIGEST_BYTES: usize = 32;
/// Larger files are not ours.
const MAX_CUBIN_BYTES: u64 = 256 << 20;

const OPTIONS: [&str; 3] = ["--std=c++17", "--extra-device-vectorization", "-lineinfo"];

/// Where machine code is looked for before it is compiled, and kept afterwards.
#[derive(Clone, Debug, Default)]
pub struct KernelCache {
    /// Read and written. Without it every start compiles.
    pub directory: Option<PathBuf>,
    /// What [`warm`] has written with the same sources: read only, and used without NVRTC.
    pub prebuilt: Option<PathBuf>,
}

/// Where the machine code of a unit came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    Prebuilt,
    Cached,
    Compiled,
}

/// A unit with values for its parameters.
#[derive(Clone, Debug)]
pub(crate) struct Variant {
    pub(crate) unit: &'static Unit,
    /// In the order of [`Unit::parameters`].
    pub(crate) values: Vec<u32>,
}

impl Variant {
    /// The units without parameters.
    pub(crate) fn plain() -> Vec<Self> {
        let plain = UNITS.iter().filter(|unit| unit.parameters.is_empty());
        plain.map(|unit| Self { unit, values: vec![] }).collect()
    }

    /// The units that are specialized for a KV cache.
    ///
    /// # Errors
    /// An element type that GPUs do not have.
    pub(crate) fn of_kv(head_dim: usize, dtype: KvDtype) -> Result<Vec<Self>> {
        let format = match dtype {
            KvDtype::F32 => TensorFormat::F32.gguf_type(),
            KvDtype::F16 => TensorFormat::F16.gguf_type(),
            KvDtype::BF16 => TensorFormat::BF16.gguf_type(),
            KvDtype::E4M3 => TensorFormat::F8_E4M3.gguf_type(),
            KvDtype::INT8 => return Err(device(OP, "a KV cache of int8 is for CPUs")),
        };
        let head_dim = u32::try_from(head_dim).unwrap_or(u32::MAX);
        let units = UNITS
            .iter()
            .filter(|unit| unit.parameters == ["HEAD_DIM", "KV_FORMAT"])
            .map(|unit| Self {
                unit,
                values: vec![head_dim, format],
            })
            .collect();
        Ok(units)
    }

    /// The units that are specialized for weights that stay quantized.
    pub(crate) fn of_weight(format: TensorFormat) -> Vec<Self> {
        let units = UNITS.iter().filter(|unit| unit.parameters == ["WEIGHT_FORMAT"]);
        let values = vec![format.gguf_type()];
        units
            .map(|unit| Self {
                unit,
                values: values.clone(),
            })
            .collect()
    }

    /// E.g. `attention-128-30`.
    fn name(&self) -> String {
        let values = self.values.iter().map(|value| format!("-{value}"));
        [self.unit.name.to_owned()].into_iter().chain(values).collect()
    }

    fn options(&self) -> Vec<String> {
        let parameters = self.unit.parameters.iter().zip(&self.values);
        OPTIONS
            .iter()
            .map(|&option| option.to_owned())
            .chain(parameters.map(|(name, value)| format!("-D{name}={value}")))
            .collect()
    }
}

/// A variant's machine code.
#[derive(Debug)]
pub(crate) struct Cubin {
    pub(crate) variant: Variant,
    pub(crate) code: Vec<u8>,
    pub(crate) origin: Origin,
}

/// What [`warm`] compiles.
#[derive(Clone, Debug)]
pub struct WarmRequest {
    /// E.g. `sm_90`.
    pub arch: String,
    /// Attention is specialized for the heads of the models that will be served.
    pub head_dims: Vec<usize>,
    pub kv_dtypes: Vec<KvDtype>,
}

/// A file that [`warm`] has made sure of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WarmKernel {
    pub path: PathBuf,
    pub bytes: usize,
    /// False if it was there already.
    pub compiled: bool,
}

impl KernelCache {
    /// What a user's environment names. The directory is `$PHALANX_KERNEL_CACHE`, else `phalanx/kernels` in
    /// `$XDG_CACHE_HOME` or in `$HOME/.cache`; prebuilt kernels are in `$PHALANX_PREBUILT_KERNELS`, else also there.
    pub fn of_environment(variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let path = |name| {
            variable(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let directory = path("PHALANX_KERNEL_CACHE").or_else(|| {
            let caches = path("XDG_CACHE_HOME").or_else(|| path("HOME").map(|home| home.join(".cache")))?;
            Some(caches.join("phalanx/kernels"))
        });
        Self {
            prebuilt: path("PHALANX_PREBUILT_KERNELS").or_else(|| directory.clone()),
            directory,
        }
    }

    /// The machine code of `variants` for `arch`. What has to be compiled is compiled in parallel.
    ///
    /// # Errors
    /// [`KernelError::Device`](crate::KernelError::Device) if something has to be compiled and NVRTC is missing or
    /// refuses; the message has its log. A cache that cannot be written is not an error.
    pub(crate) fn cubins(&self, arch: &str, variants: Vec<Variant>) -> Result<Vec<Cubin>> {
        check_arch(arch)?;
        thread::scope(|scope| {
            let threads: Vec<_> = variants
                .into_iter()
                .map(|variant| scope.spawn(move || self.cubin(variant, arch)))
                .collect();
            threads
                .into_iter()
                .map(|thread| {
                    thread
                        .join()
                        .unwrap_or_else(|_| Err(device(OP, "a thread panicked")))
                })
                .collect()
        })
    }

    fn cubin(&self, variant: Variant, arch: &str) -> Result<Cubin> {
        let prebuilt = self.prebuilt.as_ref();
        let prebuilt = prebuilt.and_then(|directory| read(&directory.join(file_name(&variant, arch, None))));
        if let Some(code) = prebuilt {
            return Ok(Cubin {
                variant,
                code,
                origin: Origin::Prebuilt,
            });
        }
        require(&[Library::Nvrtc]).map_err(|why| unavailable(OP, why))?;
        let file = file_name(&variant, arch, Some(version()?));
        let path = self.directory.as_ref().map(|directory| directory.join(file));
        if let Some(code) = path.as_deref().and_then(read) {
            return Ok(Cubin {
                variant,
                code,
                origin: Origin::Cached,
            });
        }
        let code = compile(&variant, arch)?;
        if let Some(path) = path {
            // Nothing depends on the file but the time of the next start.
            let _ = write(&path, &code);
        }
        Ok(Cubin {
            variant,
            code,
            origin: Origin::Compiled,
        })
    }
}

/// Compiles every kernel into `directory`, for [`KernelCache::prebuilt`]. Needs NVRTC and no device.
///
/// # Errors
/// [`KernelError::Device`](crate::KernelError::Device) if NVRTC is missing, does not know the architecture or refuses a
/// source, or if the directory cannot be written.
pub fn warm(request: &WarmRequest, directory: &Path) -> Result<Vec<WarmKernel>> {
    let cache = KernelCache {
        directory: None,
        prebuilt: Some(directory.to_owned()),
    };
    let mut variants = Variant::plain();
    let quantized = TensorFormat::ALL
        .into_iter()
        .filter(|format| format.stays_quantized_on_gpus());
    variants.extend(quantized.flat_map(Variant::of_weight));
    for &head_dim in &request.head_dims {
        for &dtype in &request.kv_dtypes {
            variants.extend(Variant::of_kv(head_dim, dtype)?);
        }
    }
    let mut files = Vec::new();
    for cubin in cache.cubins(&request.arch, variants)? {
        let path = directory.join(file_name(&cubin.variant, &request.arch, None));
        let compiled = cubin.origin == Origin::Compiled;
        if compiled {
            write(&path, &cubin.code).map_err(|e| device(OP, format!("{}: {e}", path.display())))?;
        }
        files.push(WarmKernel {
            bytes: cubin.code.len(),
            path,
            compiled,
        });
    }
    Ok(files)
}

/// An architecture becomes an option and part of a file name.
fn check_arch(arch: &str) -> Result<()> {
    let digits = arch
        .strip_prefix("sm_")
        .map(|rest| rest.strip_suffix(['a', 'f']).unwrap_or(rest));
    let known = digits.is_some_and(|digits| {
        (2..=3).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit())
    });
    if known {
        Ok(())
    } else {
        Err(device(
            OP,
            format!("{arch:?} is not an architecture such as sm_90"),
        ))
    }
}

/// The key covers all that decides the machine code, but the compiler only where its version is given.
fn file_name(variant: &Variant, arch: &str, version: Option<(i32, i32)>) -> String {
    let mut hash = Sha256::new();
    let mut part = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    part(variant.unit.source.as_bytes());
    for (name, text) in HEADERS {
        part(name.as_bytes());
        part(text.as_bytes());
    }
    for option in variant.options() {
        part(option.as_bytes());
    }
    if let Some((major, minor)) = version {
        part(&major.to_le_bytes());
        part(&minor.to_le_bytes());
    }
    let key: String = hash.finalize()[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("{}.{arch}.{key}.cubin", variant.name())
}

/// The machine code in a file, if the file is there and whole.
fn read(path: &Path) -> Option<Vec<u8>> {
    if fs::metadata(path).ok()?.len() > MAX_CUBIN_BYTES {
        return None;
    }
    let mut code = fs::read(path).ok()?;
    let digest = code.split_off(code.len().checked_sub(DIGEST_BYTES)?);
    (digest == Sha256::digest(&code).as_slice()).then_some(code)
}

fn write(path: &Path, code: &[u8]) -> std::io::Result<()> {
    static WRITES: AtomicU32 = AtomicU32::new(0);
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(directory)?;
    let unique = (std::process::id(), WRITES.fetch_add(1, Ordering::Relaxed));
    let own = path.with_extension(format!("{}-{}.tmp", unique.0, unique.1));
    let result = fs::write(&own, [code, Sha256::digest(code).as_slice()].concat())
        .and_then(|()| fs::rename(&own, path));
    if result.is_err() {
        // Nobody else knows the name.
        let _ = fs::remove_file(&own);
    }
    result
}

/// Major and minor version of NVRTC.
fn version() -> Result<(i32, i32)> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is there (`require`), and both numbers outlive the call.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor).result() }.map_err(|e| device(OP, e))?;
    Ok((major, minor))
}

/// A program of NVRTC, destroyed with this value.
struct Program {
    handle: sys::nvrtcProgram,
    /// Source, names and headers: NVRTC may refer to them.
    _texts: Vec<CString>,
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program was created and not destroyed yet.
        let _ = unsafe { nvrtc::destroy_program(self.handle) };
    }
}

impl Program {
    fn new(unit: &Unit) -> Result<Self> {
        let name = format!("{}.cu", unit.name);
        let headers = HEADERS.iter().flat_map(|&(name, text)| [name, text]);
        let texts = [unit.source, &name]
            .into_iter()
            .chain(headers)
            .map(CString::new)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| device(OP, e))?;
        let pointers: Vec<*const c_char> = texts.iter().map(|text| text.as_ptr()).collect();
        let (own, headers) = pointers.split_at(2);
        let (names, bodies): (Vec<_>, Vec<_>) =
            headers.chunks_exact(2).map(|pair| (pair[0], pair[1])).unzip();
        let mut handle = std::ptr::null_mut();
        // SAFETY: every pointer is to a terminated string that lives as long as the program. Both arrays have as many
        // entries as the count says.
        let created = unsafe {
            sys::nvrtcCreateProgram(
                &mut handle,
                own[0],
                own[1],
                names.len() as c_int,
                bodies.as_ptr(),
                names.as_ptr(),
            )
        };
        created.result().map_err(|e| device(OP, e))?;
        Ok(Self {
            handle,
            _texts: texts,
        })
    }

    fn log(&self) -> String {
        // SAFETY: the program is alive.
        match unsafe { nvrtc::get_program_log(self.handle) } {
            Ok(log) => {
                let bytes: Vec<u8> = log.iter().map(|&c| c as u8).collect();
                CStr::from_bytes_until_nul(&bytes)
                    .map(|text| text.to_string_lossy().trim_end().to_owned())
                    .unwrap_or_default()
            }
            Err(error) => format!("no log: {error}"),
        }
    }

    fn cubin(&self) -> Result<Vec<u8>, nvrtc::NvrtcError> {
        let mut len = 0;
        // SAFETY: the program is alive, and the buffer is as long as NVRTC says.
        unsafe {
            sys::nvrtcGetCUBINSize(self.handle, &mut len).result()?;
            let mut code = vec![0u8; len];
            sys::nvrtcGetCUBIN(self.handle, code.as_mut_ptr().cast::<c_char>()).result()?;
            Ok(code)
        }
    }
}

fn compile(variant: &Variant, arch: &str) -> Result<Vec<u8>> {
    let program = Program::new(variant.unit)?;
    let mut options = variant.options();
    options.push(format!("--gpu-architecture={arch}"));
    let failed = |error| {
        let name = variant.name();
        device(OP, format!("{name} for {arch}: {error}\n{}", program.log()))
    };
    // SAFETY: the program is alive; no option has a zero byte.
    unsafe { nvrtc::compile_program(program.handle, &options) }.map_err(failed)?;
    program.cubin().map_err(failed)
}
