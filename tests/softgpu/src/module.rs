//! Modules are shared objects that the NVRTC stand-in made; a launch runs their kernels' blocks on the pool.

use std::{
    collections::HashMap,
    ffi::{CStr, CString},
    fs::File,
    io::Write,
    os::fd::{AsRawFd, IntoRawFd},
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use libc::{c_char, c_int, c_uint, c_void};

use crate::{
    device::{SMEM_DEFAULT, SMEM_OPT_IN},
    fault,
    graph::Kind,
    handles::{Handles, lock},
    memory, pool,
    settings::{log, settings},
    status::{
        FILE_NOT_FOUND, ILLEGAL_ADDRESS, INVALID_HANDLE, INVALID_IMAGE, INVALID_PTX, INVALID_VALUE,
        LAUNCH_FAILED, NO_BINARY_FOR_GPU, NOT_FOUND, OUT_OF_MEMORY, Out, SUCCESS, Status, put, put_result,
    },
    stream::{self, Op},
};

/// Threads of a block.
const MAX_THREADS: u64 = 1024;
const MAX_BLOCK: [u32; 3] = [1024, 1024, 64];
const MAX_GRID: [u32; 3] = [i32::MAX as u32, 65535, 65535];
/// An image is a file of ours: nothing of this size is one.
const MAX_IMAGE: usize = 256 << 20;
const MESSAGE: usize = 512;

/// Mirrors `softgpu::Kernel` of `device/softgpu_launch.h`.
#[repr(C)]
struct Kernel {
    name: *const c_char,
    call: *const c_void,
    params: u32,
    sizes: *const u32,
    next: *const Kernel,
}

/// Mirrors `softgpu::Run`.
#[repr(C)]
struct Run {
    kernel: *const Kernel,
    grid: [u32; 3],
    block: [u32; 3],
    smem: u32,
    seed: u32,
    params: *mut *mut c_void,
    first: u64,
    last: u64,
    scratch: *mut *mut c_void,
    message: *mut c_char,
    message_len: usize,
    switches: u64,
}

/// The entries of a module. It stays loaded for the life of the process, as a kernel may still run when the program
/// unloads its module; so do the kernels that it describes.
#[derive(Clone, Copy)]
struct Module {
    find: unsafe extern "C" fn(*const c_char) -> *const Kernel,
    run: unsafe extern "C" fn(*mut Run) -> c_int,
    fault: extern "C" fn(),
}

struct Function {
    name: String,
    kernel: &'static Kernel,
    module: Module,
    /// What `cuFuncSetAttribute` allows.
    max_smem: AtomicU32,
}

// SAFETY: a kernel's description is constant data of a module that stays loaded.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

static MODULES: Handles<Module> = Handles::new();
static FUNCTIONS: Handles<Function> = Handles::new();
/// Kernels launched and fibers switched since the start, for [`softgpu_counters`].
static LAUNCHES: AtomicU64 = AtomicU64::new(0);
static SWITCHES: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// The block that this thread runs again and again; made by the first module, used by all.
    static SCRATCH: std::cell::Cell<*mut c_void> = const { std::cell::Cell::new(std::ptr::null_mut()) };
}

impl Module {
    fn open(path: &CStr) -> Result<Self, Status> {
        // SAFETY: loading runs the object's constructors: those of the kernel registry, as it came from our NVRTC.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            // SAFETY: dlerror returns a C string after a failure.
            let reason = unsafe { CStr::from_ptr(libc::dlerror()) };
            log(&format!("module: {}", reason.to_string_lossy()));
            return Err(INVALID_IMAGE);
        }
        let symbol = |name: &CStr| {
            // SAFETY: the handle is open and the name a C string.
            let address = unsafe { libc::dlsym(handle, name.as_ptr()) };
            if address.is_null() {
                Err(INVALID_IMAGE)
            } else {
                Ok(address)
            }
        };
        let (find, run, fault) = (
            symbol(c"softgpu_find")?,
            symbol(c"softgpu_run")?,
            symbol(c"softgpu_fault")?,
        );
        // SAFETY: the three are functions of these types (device/softgpu_launch.h, device/softgpu_fiber.h); the cache of
        // compiled modules is keyed by those files.
        unsafe {
            Ok(Self {
                find: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*const c_char) -> *const Kernel>(
                    find,
                ),
                run: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut Run) -> c_int>(run),
                fault: std::mem::transmute::<*mut c_void, extern "C" fn()>(fault),
            })
        }
    }
}

/// The length of a 64-bit ELF image in memory, which comes without one.
///
/// # Safety
/// `image` points to a whole image, or at least to 4 readable bytes that are not an ELF header's.
unsafe fn elf_len(image: *const u8) -> Result<usize, Status> {
    // SAFETY: the caller's promise: an ELF header of 64 bytes.
    let header = unsafe { std::slice::from_raw_parts(image, 64) };
    let half = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
    let machine = if cfg!(target_arch = "x86_64") { 62 } else { 183 };
    if half(18) != machine {
        log("the image is not made by the soft GPU's NVRTC: machine code of a GPU cannot run here");
        return Err(NO_BINARY_FOR_GPU);
    }
    let mut offset = [0; 8];
    offset.copy_from_slice(&header[40..48]);
    // The section headers are the last thing in the file.
    let sections = usize::try_from(u64::from_le_bytes(offset)).map_err(|_| INVALID_IMAGE)?;
    let len = sections.checked_add(half(58) * half(60)).ok_or(INVALID_IMAGE)?;
    if len <= MAX_IMAGE {
        Ok(len)
    } else {
        Err(INVALID_IMAGE)
    }
}

/// # Safety
/// As the driver asks of a caller: `image` is a whole cubin, or a text that ends with a zero.
unsafe fn load(image: *const u8) -> Result<Module, Status> {
    if image.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: even an empty text has a byte, and the comparison stops at the first that differs.
    let is_elf = (0..4).all(|i| unsafe { *image.add(i) } == b"\x7fELF"[i]);
    if !is_elf {
        // SAFETY: not an ELF image, so a text.
        let text = unsafe { CStr::from_ptr(image.cast()) }.to_string_lossy();
        let path = text
            .lines()
            .next()
            .and_then(|line| line.strip_prefix(crate::nvrtc::PTX_MARK));
        let path = CString::new(path.ok_or(INVALID_PTX)?).map_err(|_| INVALID_PTX)?;
        return Module::open(&path);
    }
    // SAFETY: the image is whole, and `elf_len` takes its length from its own header.
    let bytes = unsafe { std::slice::from_raw_parts(image, elf_len(image)?) };
    open_copy(bytes)
}

/// Loads an image from memory. The same image is loaded once: its constructors would register its kernels again, and
/// a loaded object costs memory for good.
fn open_copy(bytes: &[u8]) -> Result<Module, Status> {
    static LOADED: LazyLock<Mutex<HashMap<Vec<u8>, Module>>> = LazyLock::new(Mutex::default);
    let mut loaded = lock(&LOADED);
    if let Some(module) = loaded.get(bytes) {
        return Ok(*module);
    }
    let file = memory::unnamed_file(c"softgpu-module", 0).map_err(|_| OUT_OF_MEMORY)?;
    let mut file = File::from(file);
    file.write_all(bytes).map_err(|_| OUT_OF_MEMORY)?;
    let path = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(|_| INVALID_IMAGE)?;
    let module = Module::open(&path)?;
    // Never closed: the loader knows objects by path, and the next file of this number would be taken for this one.
    let _ = file.into_raw_fd();
    loaded.insert(bytes.to_vec(), module);
    Ok(module)
}

#[derive(Clone, Copy)]
struct Shape {
    grid: [u32; 3],
    block: [u32; 3],
    smem: u32,
}

impl Shape {
    fn check(&self, function: &Function) -> Result<(), Status> {
        let within =
            |size: &[u32; 3], limit: &[u32; 3]| size.iter().zip(limit).all(|(n, max)| (1..=*max).contains(n));
        if !within(&self.grid, &MAX_GRID) || !within(&self.block, &MAX_BLOCK) || self.threads() > MAX_THREADS
        {
            log(&format!(
                "{}: grid {:?} of blocks {:?} is out of range",
                function.name, self.grid, self.block
            ));
            return Err(INVALID_VALUE);
        }
        let max = function.max_smem.load(Ordering::Relaxed);
        if self.smem > max {
            log(&format!(
                "{}: {} bytes of dynamic shared memory, {max} without cuFuncSetAttribute",
                function.name, self.smem
            ));
            return Err(INVALID_VALUE);
        }
        Ok(())
    }

    fn threads(&self) -> u64 {
        self.block.iter().map(|n| u64::from(*n)).product()
    }

    fn blocks(&self) -> u64 {
        self.grid.iter().map(|n| u64::from(*n)).product()
    }

    /// Blocks that one thread takes at a time: all of them where there is too little to share.
    fn chunk(&self) -> u64 {
        let blocks = self.blocks();
        if blocks * self.threads() < 2048 {
            blocks
        } else {
            (blocks / 16).clamp(1, 64)
        }
    }
}

/// The arguments of a launch, copied at the call.
struct Arguments {
    /// 16 bytes a piece, the largest alignment that a parameter has.
    storage: Vec<u128>,
    /// Where each parameter begins in `storage`.
    starts: Vec<usize>,
}

impl Arguments {
    /// # Safety
    /// `params` points to as many addresses as the kernel has parameters, each of a value of the parameter's size.
    unsafe fn copy(kernel: &Kernel, params: *const *const u8) -> Result<Self, Status> {
        let mut arguments = Self {
            storage: Vec::new(),
            starts: Vec::new(),
        };
        if params.is_null() && kernel.params > 0 {
            return Err(INVALID_VALUE);
        }
        for i in 0..kernel.params as usize {
            // SAFETY: the module's table has an entry for each parameter.
            let size = unsafe { *kernel.sizes.add(i) } as usize;
            let start = arguments.storage.len();
            arguments.storage.resize(start + size.div_ceil(16), 0);
            // SAFETY: the caller's promise for the source; the target has room, just made.
            unsafe {
                let target = arguments.storage[start..].as_mut_ptr().cast();
                std::ptr::copy_nonoverlapping(*params.add(i), target, size);
            }
            arguments.starts.push(start);
        }
        Ok(arguments)
    }
}

impl Function {
    fn launch(self: &Arc<Self>, shape: Shape, arguments: Arguments) -> Op {
        let function = self.clone();
        let arguments = Arc::new(arguments);
        Arc::new(move || {
            let number = LAUNCHES.fetch_add(1, Ordering::Relaxed);
            let seed = if settings().jitter_us > 0 {
                number as u32 | 1
            } else {
                0
            };
            let (function, arguments) = (function.clone(), arguments.clone());
            let body = move |first, last| function.blocks(shape, &arguments, (first, last, seed));
            pool::run(shape.blocks(), shape.chunk(), Arc::new(body))
        })
    }

    /// Runs the blocks `[first, last)` on this thread.
    fn blocks(&self, shape: Shape, arguments: &Arguments, (first, last, seed): (u64, u64, u32)) -> Status {
        let parameter = |start: &usize| arguments.storage[*start..].as_ptr().cast_mut().cast();
        let mut params: Vec<*mut c_void> = arguments.starts.iter().map(parameter).collect();
        let mut message = [0u8; MESSAGE];
        let mut scratch = SCRATCH.get();
        let mut run = Run {
            kernel: self.kernel,
            grid: shape.grid,
            block: shape.block,
            smem: shape.smem,
            seed,
            params: params.as_mut_ptr(),
            first,
            last,
            scratch: &mut scratch,
            message: message.as_mut_ptr().cast(),
            message_len: MESSAGE,
            switches: 0,
        };
        // SAFETY: the structure is the one of the module's header, and all it points to outlives the call. What the
        // kernel does with its arguments is the program's responsibility, as on a GPU.
        let (result, fault) = fault::guard(self.module.fault, || unsafe { (self.module.run)(&mut run) });
        SWITCHES.fetch_add(run.switches, Ordering::Relaxed);
        SCRATCH.set(scratch);
        if result == 0 {
            return SUCCESS;
        }
        let message = CStr::from_bytes_until_nul(&message)
            .unwrap_or_default()
            .to_string_lossy();
        match fault {
            Some(address) => {
                log(&format!(
                    "kernel failed: {message} at {address:#x} ({})",
                    memory::place(address)
                ));
                ILLEGAL_ADDRESS
            }
            None => {
                log(&format!("kernel failed: {message}"));
                LAUNCH_FAILED
            }
        }
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleLoadData(out: Out<'_, usize>, image: *const u8) -> Status {
    // SAFETY: the caller gives a whole image (driver API).
    put_result(out, unsafe { load(image) }.map(|module| MODULES.insert(module)))
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleLoadDataEx(
    out: Out<'_, usize>,
    image: *const u8,
    _options: c_uint,
    _names: *mut c_int,
    _values: *mut *mut c_void,
) -> Status {
    cuModuleLoadData(out, image)
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleLoad(out: Out<'_, usize>, path: *const c_char) -> Status {
    if path.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: the caller gives a C string (driver API).
    let path = unsafe { CStr::from_ptr(path) }.to_string_lossy();
    match std::fs::read(path.as_ref()) {
        Ok(mut image) if image.len() <= MAX_IMAGE => {
            image.resize(image.len().max(64) + 1, 0); // an ELF header's worth, and a zero for a text
            cuModuleLoadData(out, image.as_ptr())
        }
        Ok(_) => INVALID_IMAGE,
        Err(_) => FILE_NOT_FOUND,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleUnload(module: usize) -> Status {
    MODULES.remove(module).map_or(INVALID_HANDLE, |_| SUCCESS)
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleGetFunction(out: Out<'_, usize>, module: usize, name: *const c_char) -> Status {
    let Some(module) = MODULES.get(module) else {
        return INVALID_HANDLE;
    };
    if name.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: the caller gives a C string (driver API), which is what the module's function takes. What it returns is
    // null or constant data of a module that stays loaded.
    let kernel = unsafe { (module.find)(name).as_ref::<'static>() };
    let Some(kernel) = kernel else { return NOT_FOUND };
    // SAFETY: as above.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
    let max_smem = AtomicU32::new(SMEM_DEFAULT);
    put(
        out,
        FUNCTIONS.insert(Function {
            name,
            kernel,
            module: *module,
            max_smem,
        }),
    )
}

/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`.
const MAX_DYNAMIC_SHARED: c_int = 8;

#[unsafe(no_mangle)]
extern "C" fn cuFuncSetAttribute(function: usize, attribute: c_int, value: c_int) -> Status {
    let Some(function) = FUNCTIONS.get(function) else {
        return INVALID_HANDLE;
    };
    match (attribute, u32::try_from(value)) {
        (MAX_DYNAMIC_SHARED, Ok(bytes)) if bytes <= SMEM_OPT_IN => {
            function.max_smem.store(bytes, Ordering::Relaxed);
            SUCCESS
        }
        (9, Ok(_)) => SUCCESS, // the preferred carve-out is a hint
        _ => INVALID_VALUE,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuFuncGetAttribute(out: Out<'_, c_int>, attribute: c_int, function: usize) -> Status {
    let Some(function) = FUNCTIONS.get(function) else {
        return INVALID_HANDLE;
    };
    match attribute {
        0 => put(out, MAX_THREADS as c_int),
        MAX_DYNAMIC_SHARED => put(out, function.max_smem.load(Ordering::Relaxed) as c_int),
        _ => INVALID_VALUE, // registers, local and constant memory: unknown on a CPU
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuFuncSetCacheConfig(function: usize, _config: c_int) -> Status {
    FUNCTIONS.get(function).map_or(INVALID_HANDLE, |_| SUCCESS)
}

#[unsafe(no_mangle)]
extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    out: Out<'_, c_int>,
    function: usize,
    threads: c_int,
    _smem: usize,
    _flags: c_uint,
) -> Status {
    if FUNCTIONS.get(function).is_none() {
        return INVALID_HANDLE;
    }
    if threads < 1 || threads as u64 > MAX_THREADS {
        return INVALID_VALUE;
    }
    put(out, (2048 / threads).min(16))
}

#[unsafe(no_mangle)]
extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
    out: Out<'_, c_int>,
    function: usize,
    threads: c_int,
    smem: usize,
) -> Status {
    cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(out, function, threads, smem, 0)
}

#[unsafe(no_mangle)]
extern "C" fn cuLaunchKernel(
    function: usize,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    smem: c_uint,
    stream: usize,
    params: *const *const u8,
    extra: *const c_void,
) -> Status {
    let Some(function) = FUNCTIONS.get(function) else {
        return INVALID_HANDLE;
    };
    if !extra.is_null() {
        return INVALID_VALUE; // arguments in one buffer: nobody does
    }
    let shape = Shape {
        grid: [grid_x, grid_y, grid_z],
        block: [block_x, block_y, block_z],
        smem,
    };
    // SAFETY: the caller gives an address for each parameter (driver API).
    let launch = shape
        .check(&function)
        .and_then(|()| unsafe { Arguments::copy(function.kernel, params) });
    match launch {
        Ok(arguments) => stream::enqueue(stream, Kind::Kernel, function.launch(shape, arguments)),
        Err(status) => status,
    }
}

/// Not CUDA's: kernels run and fibers switched so far, for tests that something ran on the device at all.
#[unsafe(no_mangle)]
extern "C" fn softgpu_counters(launches: Out<'_, u64>, switches: Out<'_, u64>) -> Status {
    match put(launches, LAUNCHES.load(Ordering::Relaxed)) {
        SUCCESS => put(switches, SWITCHES.load(Ordering::Relaxed)),
        status => status,
    }
}
