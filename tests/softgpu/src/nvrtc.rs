//! NVRTC: the host's C++ compiler makes a shared object of the unchanged CUDA source and `device/*.h`. Kernels are found
//! in the preprocessed text, so that a source needs no list of them. A compiled object is kept by the hash of all that
//! made it.

use std::{
    collections::hash_map::DefaultHasher,
    ffi::{CStr, CString},
    fs,
    hash::{Hash, Hasher},
    io,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use libc::{c_char, c_int};

use crate::{
    handles::{Handles, lock},
    settings::{log, settings},
    status::Out,
};

/// What begins a "PTX" text: the path of the object follows.
pub(crate) const PTX_MARK: &str = "//softgpu ";

const HEADERS: [(&str, &str); 6] = [
    ("softgpu_device.h", include_str!("../device/softgpu_device.h")),
    ("softgpu_fiber.h", include_str!("../device/softgpu_fiber.h")),
    (
        "softgpu_intrinsics.h",
        include_str!("../device/softgpu_intrinsics.h"),
    ),
    ("softgpu_launch.h", include_str!("../device/softgpu_launch.h")),
    ("softgpu_mma.h", include_str!("../device/softgpu_mma.h")),
    ("softgpu_warp.h", include_str!("../device/softgpu_warp.h")),
];

/// What every unit is compiled with. No exceptions, because none may cross the stacks of fibers; products and sums are
/// contracted, because NVRTC does so unless it is told not to.
const FLAGS: [&str; 8] = [
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-fno-exceptions",
    "-ffp-contract=fast",
    "-g1",
    "-w",
];
const DIALECT: [&str; 5] = ["-x", "c++", "-std=c++17", "-DSOFTGPU=1", "-D__CUDACC_RTC__=1"];
const KERNEL_MARK: &str = "__softgpu_kernel__";

/// `nvrtcResult`.
type Status = c_int;
const SUCCESS: Status = 0;
const INVALID_INPUT: Status = 3;
const INVALID_PROGRAM: Status = 4;
const INVALID_OPTION: Status = 5;
const COMPILATION: Status = 6;
const NO_LOWERED_NAMES: Status = 10;

struct Program {
    source: String,
    /// Name and text.
    headers: Vec<(String, String)>,
    expressions: Mutex<Vec<CString>>,
    log: Mutex<CString>,
    object: Mutex<Option<PathBuf>>,
}

static PROGRAMS: Handles<Program> = Handles::new();

fn put<T>(out: Out<'_, T>, value: T) -> Status {
    match crate::status::put(out, value) {
        crate::status::SUCCESS => SUCCESS,
        _ => INVALID_INPUT,
    }
}

/// # Safety
/// `text` is null or a C string.
unsafe fn text(text: *const c_char) -> Option<String> {
    // SAFETY: the caller's promise.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

/// # Safety
/// `texts` is null or points to `count` C strings.
unsafe fn texts(texts: *const *const c_char, count: c_int) -> Option<Vec<String>> {
    let count = usize::try_from(count).ok()?;
    if texts.is_null() && count > 0 {
        return None;
    }
    // SAFETY: the caller's promise.
    (0..count).map(|i| unsafe { text(*texts.add(i)) }).collect()
}

/// A header's name becomes a file's: it must not lead anywhere else.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains('/')
}

/// What NVRTC's options mean to the compiler here. Those that tune machine code of a GPU have no counterpart.
#[derive(Default, Hash)]
struct Options {
    flags: Vec<String>,
    /// Definitions, for after the device header: it has names of its own.
    defines: String,
}

impl Options {
    fn parse(options: &[String]) -> Result<Self, String> {
        let mut parsed = Self::default();
        for option in options {
            if let Some(arch) = option
                .strip_prefix("--gpu-architecture=")
                .or(option.strip_prefix("-arch="))
            {
                let digits: String = arch.chars().filter(char::is_ascii_digit).collect();
                if digits.is_empty() {
                    return Err(format!("{option}: no architecture"));
                }
                parsed.define(&format!("__CUDA_ARCH__={digits}0"));
            } else if let Some(path) = option
                .strip_prefix("--include-path=")
                .or(option.strip_prefix("-I"))
            {
                parsed.flags.push(format!("-I{path}"));
            } else if let Some(macro_) = option
                .strip_prefix("--define-macro=")
                .or(option.strip_prefix("-D"))
            {
                parsed.define(macro_);
            } else if ["--fmad=false", "-fmad=false"].contains(&option.as_str()) {
                parsed.flags.push("-ffp-contract=off".into());
            } else if !option.starts_with('-') {
                return Err(format!("{option}: not an option"));
            }
        }
        Ok(parsed)
    }

    /// `NAME` or `NAME=value`.
    fn define(&mut self, definition: &str) {
        let (name, value) = definition.split_once('=').unwrap_or((definition, "1"));
        self.defines += &format!("#define {name} {value}\n");
    }
}

/// Names of the `__global__` functions of a preprocessed unit in which the qualifier is [`KERNEL_MARK`].
fn kernel_names(preprocessed: &str) -> Vec<String> {
    let mut names = Vec::new();
    for declaration in preprocessed.split(KERNEL_MARK).skip(1) {
        // Return type and attributes come before `name (`.
        let Some((head, _)) = declaration.split_once('(') else {
            continue;
        };
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let name = head
            .trim_end()
            .rsplit(|c| !is_word(c))
            .next()
            .unwrap_or_default()
            .to_owned();
        if !name.is_empty() && !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// One compilation, in a directory of its own.
struct Compilation<'a> {
    program: &'a Program,
    options: Options,
    expressions: Vec<String>,
    directory: PathBuf,
}

impl Compilation<'_> {
    fn write_sources(&self) -> io::Result<()> {
        fs::create_dir_all(&self.directory)?;
        for (name, text) in HEADERS {
            fs::write(self.directory.join(name), text)?;
        }
        for (name, text) in &self.program.headers {
            fs::write(self.directory.join(name), text)?;
        }
        fs::write(self.directory.join("unit.cu"), &self.program.source)?;
        let scan = self.unit(&format!("#undef __global__\n#define __global__ {KERNEL_MARK}\n"));
        fs::write(self.directory.join("scan.cu"), scan)
    }

    /// The text that is compiled: the device header, `between`, the definitions, the source.
    fn unit(&self, between: &str) -> String {
        let defines = &self.options.defines;
        format!("#include \"softgpu_device.h\"\n{between}{defines}#include \"unit.cu\"\n")
    }

    fn compiler(&self) -> Command {
        let mut command = Command::new(&settings().cxx);
        command
            .args(DIALECT)
            .args(&self.options.flags)
            .arg("-I")
            .arg(&self.directory)
            .current_dir(&self.directory);
        command
    }

    /// Runs the compiler; what it says if it fails is the log.
    fn run(mut command: Command) -> Result<Vec<u8>, String> {
        let cxx = &settings().cxx;
        match command.output() {
            Ok(output) if output.status.success() => Ok(output.stdout),
            Ok(output) => Err(format!("{cxx}: {}", String::from_utf8_lossy(&output.stderr))),
            Err(error) => Err(format!(
                "the soft GPU compiles kernels with {cxx:?}, which cannot be run: {error}. Install it, or name another \
                 C++17 compiler in SOFTGPU_CXX"
            )),
        }
    }

    fn compile(&self, object: &Path) -> Result<(), String> {
        let failed = |error: io::Error| format!("{}: {error}", self.directory.display());
        self.write_sources().map_err(failed)?;
        let mut scan = self.compiler();
        scan.args(["-E", "-P", "scan.cu"]);
        let preprocessed = Self::run(scan)?;
        let mut full = format!("#define SOFTGPU_IMPL 1\n{}", self.unit(""));
        for name in kernel_names(&String::from_utf8_lossy(&preprocessed)) {
            // A template is registered by the expressions that name its instances.
            if !self
                .expressions
                .iter()
                .any(|e| e.split('<').next() == Some(&name))
            {
                full += &format!("SOFTGPU_REGISTER(\"{name}\", {name})\n");
            }
        }
        for expression in &self.expressions {
            full += &format!("SOFTGPU_REGISTER(\"{expression}\", {expression})\n");
        }
        fs::write(self.directory.join("full.cu"), full).map_err(failed)?;
        let mut build = self.compiler();
        // Flags of this compilation again, at the end, where they win.
        build
            .args(settings().cxxflags.split_whitespace())
            .args(FLAGS)
            .args(&self.options.flags);
        build.args(["full.cu", "-o", "out.so"]);
        Self::run(build)?;
        // Ranks compile the same unit at the same time: each its own, and the last one's stays.
        fs::rename(self.directory.join("out.so"), object).map_err(failed)
    }
}

impl Program {
    /// Compiles, or finds what was compiled before. An error is the log.
    fn compile(&self, options: &[String]) -> Result<PathBuf, (Status, String)> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let options = Options::parse(options).map_err(|why| (INVALID_OPTION, why))?;
        let expressions: Vec<String> = lock(&self.expressions)
            .iter()
            .map(|e| e.to_string_lossy().into_owned())
            .collect();
        let settings = settings();
        let mut key = DefaultHasher::new();
        (
            &self.source,
            &self.headers,
            &expressions,
            &options,
            HEADERS,
            FLAGS,
        )
            .hash(&mut key);
        (&settings.cxx, &settings.cxxflags).hash(&mut key);
        let key = format!("{:016x}", key.finish());
        let object = settings.cache.join(format!("{key}.so"));
        if object.exists() {
            return Ok(object);
        }
        let own = format!(
            "{key}.{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let directory = settings.cache.join(own);
        let compilation = Compilation {
            program: self,
            options,
            expressions,
            directory,
        };
        let result = compilation.compile(&object);
        if settings.keep {
            log(&format!(
                "sources are kept in {}",
                compilation.directory.display()
            ));
        } else {
            // What stays behind in the cache does no harm.
            let _ = fs::remove_dir_all(&compilation.directory);
        }
        result.map(|()| object).map_err(|log| (COMPILATION, log))
    }

    fn cubin(&self) -> Result<Vec<u8>, Status> {
        let object = lock(&self.object).clone().ok_or(INVALID_PROGRAM)?;
        fs::read(object).map_err(|_| INVALID_PROGRAM)
    }

    fn ptx(&self) -> Result<Vec<u8>, Status> {
        let object = lock(&self.object).clone().ok_or(INVALID_PROGRAM)?;
        Ok(format!("{PTX_MARK}{}\n\0", object.display()).into_bytes())
    }

    fn log(&self) -> Vec<u8> {
        lock(&self.log).as_bytes_with_nul().to_vec()
    }
}

/// One of the texts and images of a program: its length.
fn put_len(program: usize, out: Out<'_, usize>, get: fn(&Program) -> Result<Vec<u8>, Status>) -> Status {
    match PROGRAMS
        .get(program)
        .ok_or(INVALID_PROGRAM)
        .and_then(|program| get(&program))
    {
        Ok(bytes) => put(out, bytes.len()),
        Err(status) => status,
    }
}

/// And its bytes.
fn put_bytes(program: usize, out: *mut u8, get: fn(&Program) -> Result<Vec<u8>, Status>) -> Status {
    if out.is_null() {
        return INVALID_INPUT;
    }
    match PROGRAMS
        .get(program)
        .ok_or(INVALID_PROGRAM)
        .and_then(|program| get(&program))
    {
        Ok(bytes) => {
            // SAFETY: the caller has asked for the length and gives as much room (NVRTC API).
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), out, bytes.len()) };
            SUCCESS
        }
        Err(status) => status,
    }
}

/// 12, and a number that changes with the headers: who keeps compiled modules by version does not mix those of two
/// layouts of a block.
#[unsafe(no_mangle)]
extern "C" fn nvrtcVersion(major: Out<'_, c_int>, minor: Out<'_, c_int>) -> Status {
    let bytes = HEADERS.iter().flat_map(|(_, text)| text.bytes());
    // FNV-1a, folded to what a version may look like.
    let hash = bytes.fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    match put(major, 12) {
        SUCCESS => put(minor, 8 + (hash % 100_000) as c_int),
        status => status,
    }
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcGetErrorString(status: Status) -> *const c_char {
    let name = match status {
        SUCCESS => c"NVRTC_SUCCESS",
        INVALID_INPUT => c"NVRTC_ERROR_INVALID_INPUT",
        INVALID_PROGRAM => c"NVRTC_ERROR_INVALID_PROGRAM",
        INVALID_OPTION => c"NVRTC_ERROR_INVALID_OPTION",
        COMPILATION => c"NVRTC_ERROR_COMPILATION",
        NO_LOWERED_NAMES => c"NVRTC_ERROR_NO_LOWERED_NAMES_BEFORE_COMPILATION",
        _ => c"NVRTC_ERROR unknown",
    };
    name.as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcCreateProgram(
    out: Out<'_, usize>,
    source: *const c_char,
    _name: *const c_char,
    count: c_int,
    headers: *const *const c_char,
    names: *const *const c_char,
) -> Status {
    // SAFETY: the caller gives C strings, `count` each (NVRTC API).
    let given = unsafe { (text(source), texts(names, count), texts(headers, count)) };
    let (Some(source), Some(names), Some(headers)) = given else {
        return INVALID_INPUT;
    };
    if !names.iter().all(|name| is_plain(name)) {
        log("a header's name is a path");
        return INVALID_INPUT;
    }
    let program = Program {
        source,
        headers: names.into_iter().zip(headers).collect(),
        expressions: Mutex::default(),
        log: Mutex::default(),
        object: Mutex::default(),
    };
    put(out, PROGRAMS.insert(program))
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcDestroyProgram(program: Option<&mut usize>) -> Status {
    let Some(program) = program else {
        return INVALID_PROGRAM;
    };
    PROGRAMS
        .remove(std::mem::take(program))
        .map_or(INVALID_PROGRAM, |_| SUCCESS)
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcAddNameExpression(program: usize, expression: *const c_char) -> Status {
    let Some(program) = PROGRAMS.get(program) else {
        return INVALID_PROGRAM;
    };
    if expression.is_null() {
        return INVALID_INPUT;
    }
    // SAFETY: the caller gives a C string (NVRTC API).
    lock(&program.expressions).push(unsafe { CStr::from_ptr(expression) }.to_owned());
    SUCCESS
}

/// The name under which a kernel is found: here the expression itself. It lives as long as the program.
#[unsafe(no_mangle)]
extern "C" fn nvrtcGetLoweredName(
    program: usize,
    expression: *const c_char,
    out: Out<'_, *const c_char>,
) -> Status {
    let Some(program) = PROGRAMS.get(program) else {
        return INVALID_PROGRAM;
    };
    if expression.is_null() {
        return INVALID_INPUT;
    }
    // SAFETY: the caller gives a C string (NVRTC API).
    let expression = unsafe { CStr::from_ptr(expression) };
    let expressions = lock(&program.expressions);
    match expressions.iter().find(|known| known.as_c_str() == expression) {
        Some(known) => put(out, known.as_ptr()),
        None => NO_LOWERED_NAMES,
    }
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcCompileProgram(program: usize, count: c_int, options: *const *const c_char) -> Status {
    let Some(program) = PROGRAMS.get(program) else {
        return INVALID_PROGRAM;
    };
    // SAFETY: the caller gives `count` C strings (NVRTC API).
    let Some(options) = (unsafe { texts(options, count) }) else {
        return INVALID_INPUT;
    };
    match program.compile(&options) {
        Ok(object) => {
            *lock(&program.object) = Some(object);
            SUCCESS
        }
        Err((status, text)) => {
            *lock(&program.log) = CString::new(text.replace('\0', " ")).unwrap_or_default();
            status
        }
    }
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcGetPTXSize(program: usize, out: Out<'_, usize>) -> Status {
    put_len(program, out, Program::ptx)
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcGetPTX(program: usize, out: *mut u8) -> Status {
    put_bytes(program, out, Program::ptx)
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcGetCUBINSize(program: usize, out: Out<'_, usize>) -> Status {
    put_len(program, out, Program::cubin)
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcGetCUBIN(program: usize, out: *mut u8) -> Status {
    put_bytes(program, out, Program::cubin)
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcGetProgramLogSize(program: usize, out: Out<'_, usize>) -> Status {
    put_len(program, out, |program| Ok(program.log()))
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcGetProgramLog(program: usize, out: *mut u8) -> Status {
    put_bytes(program, out, |program| Ok(program.log()))
}
