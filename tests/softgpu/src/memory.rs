//! Device memory: host memory that is accounted to a device, filled with NaN, and followed by a page that cannot be
//! touched. An allocation ends at that page, up to the 256 bytes to which addresses are aligned; what lies between its
//! end and the page is checked when it is freed.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::CStr,
    fs::OpenOptions,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::{Arc, LazyLock, Mutex},
};

use libc::{c_uint, c_void};

use crate::{
    device,
    graph::Kind,
    handles::lock,
    settings::{MAX_DEVICES, log, settings},
    status::{
        CAPTURE_UNSUPPORTED, ILLEGAL_ADDRESS, INVALID_CONTEXT, INVALID_VALUE, OUT_OF_MEMORY, Out,
        PEER_ACCESS_UNSUPPORTED, SUCCESS, Status, put, put_result,
    },
    stream,
};

const PAGE: usize = 4096;
/// The alignment that the driver promises.
const ALIGN: usize = 256;
/// What fills the bytes between the end of an allocation and its guard page.
const MARGIN: u8 = 0xa5;

/// A mapping: `data` bytes of memory and a guard page.
struct Mapping {
    base: usize,
    data: usize,
}

impl Mapping {
    /// Maps `bytes` (a multiple of a page) of `file`, or of anonymous memory, and a guard page behind them.
    fn new(bytes: usize, file: Option<&OwnedFd>) -> io::Result<Self> {
        let whole = bytes.checked_add(PAGE).ok_or(io::ErrorKind::OutOfMemory)?;
        let reserve = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: the kernel chooses a free range; nothing is placed over anything.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), whole, libc::PROT_NONE, reserve, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mapping = Self {
            base: base as usize,
            data: bytes,
        };
        let (kind, fd) = match file {
            Some(file) => (libc::MAP_SHARED, file.as_raw_fd()),
            None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1),
        };
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: MAP_FIXED replaces the first `bytes` of the range reserved above, which nobody else knows yet.
        let data = unsafe { libc::mmap(base, bytes, access, kind | libc::MAP_FIXED, fd, 0) };
        if data == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(mapping)
    }

    /// The lowest address at which `bytes` end at the guard page, aligned.
    fn start(&self, bytes: usize) -> usize {
        self.base + self.data - bytes.next_multiple_of(ALIGN)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new`; an allocation is dropped when the program has freed it, and what still
        // uses it then is an error of the program, which the hole in the address space reports.
        unsafe { libc::munmap(self.base as *mut c_void, self.data + PAGE) };
    }
}

struct Allocation {
    bytes: usize,
    device: usize,
    mapping: Mapping,
    /// Behind memory that can be handed to other processes.
    file: Option<OwnedFd>,
}

impl Allocation {
    fn start(&self) -> usize {
        self.mapping.start(self.bytes)
    }

    fn margin(&self) -> (usize, usize) {
        (
            self.start() + self.bytes,
            self.bytes.next_multiple_of(ALIGN) - self.bytes,
        )
    }

    /// Fills the memory with NaN and the margin with its mark.
    fn prepare(&self) {
        let (margin, len) = self.margin();
        let poisoned = if self.bytes <= settings().poison {
            self.bytes
        } else {
            0
        };
        // SAFETY: both ranges lie in the mapping, which nobody else knows yet.
        unsafe {
            std::ptr::write_bytes(self.start() as *mut u8, 0xff, poisoned);
            std::ptr::write_bytes(margin as *mut u8, MARGIN, len);
        }
    }

    fn margin_is_whole(&self) -> bool {
        let (margin, len) = self.margin();
        // SAFETY: the range lies in the mapping, which lives as long as `self`.
        unsafe { std::slice::from_raw_parts(margin as *const u8, len) }
            .iter()
            .all(|byte| *byte == MARGIN)
    }
}

#[derive(Default)]
struct Memory {
    /// By start address.
    allocations: BTreeMap<usize, Allocation>,
    /// Bytes in use by device.
    used: [u64; MAX_DEVICES],
    /// Page-locked host memory: bytes by start address.
    pinned: BTreeMap<usize, usize>,
    /// Memory of other processes, by start address.
    imported: HashMap<usize, Imported>,
}

struct Imported {
    bytes: usize,
    /// Kept for its `Drop`, which unmaps the memory when the entry is removed.
    _mapping: Mapping,
}

static MEMORY: LazyLock<Mutex<Memory>> = LazyLock::new(Mutex::default);

/// A file without a name, which disappears with its last user.
pub(crate) fn unnamed_file(name: &CStr, bytes: usize) -> io::Result<OwnedFd> {
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and owned by nobody else.
    let file = unsafe { OwnedFd::from_raw_fd(fd) };
    let length = libc::off_t::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the descriptor is open.
    if unsafe { libc::ftruncate(file.as_raw_fd(), length) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

fn allocate(bytes: usize, shareable: bool) -> Result<usize, Status> {
    let device = device::current_ordinal()?;
    let mut memory = lock(&MEMORY);
    let free = settings().memory - memory.used[device];
    if bytes as u64 > free {
        log(&format!(
            "device {device}: no room for {bytes} bytes, {free} are free"
        ));
        return Err(OUT_OF_MEMORY);
    }
    let room = bytes.next_multiple_of(PAGE);
    let file = shareable
        .then(|| unnamed_file(c"softgpu-memory", room))
        .transpose()
        .map_err(|_| OUT_OF_MEMORY)?;
    let mapping = Mapping::new(room, file.as_ref()).map_err(|_| OUT_OF_MEMORY)?;
    let allocation = Allocation {
        bytes,
        device,
        mapping,
        file,
    };
    allocation.prepare();
    let start = allocation.start();
    memory.used[device] += bytes as u64;
    memory.allocations.insert(start, allocation);
    Ok(start)
}

fn free(address: usize) -> Status {
    let mut memory = lock(&MEMORY);
    let Some(allocation) = memory.allocations.remove(&address) else {
        log(&format!(
            "free of {address:#x}, which is not the start of an allocation"
        ));
        return INVALID_VALUE;
    };
    memory.used[allocation.device] -= allocation.bytes as u64;
    if allocation.margin_is_whole() {
        return SUCCESS;
    }
    log(&format!(
        "something wrote past the end of the {}-byte allocation at {address:#x}",
        allocation.bytes
    ));
    stream::poison(ILLEGAL_ADDRESS);
    ILLEGAL_ADDRESS
}

/// Whether `[address, address + bytes)` lies in one allocation. On a GPU such an access faults later, or not at all.
pub(crate) fn check(address: usize, bytes: usize, what: &str) -> Result<(), Status> {
    if bytes == 0 || contains(&lock(&MEMORY), address, bytes) {
        return Ok(());
    }
    log(&format!(
        "{what}: {bytes} bytes at {address:#x} are not inside of a device allocation ({})",
        place(address)
    ));
    Err(INVALID_VALUE)
}

fn contains(memory: &Memory, address: usize, bytes: usize) -> bool {
    let Some(end) = address.checked_add(bytes) else {
        return false;
    };
    let own = memory.allocations.range(..=address).next_back();
    own.is_some_and(|(start, allocation)| end <= start + allocation.bytes)
        || memory
            .imported
            .iter()
            .any(|(start, imported)| address >= *start && end <= start + imported.bytes)
}

/// Where an address lies, for a message. Takes no lock that is held: a fault may have interrupted its holder.
pub(crate) fn place(address: usize) -> String {
    let Ok(memory) = MEMORY.try_lock() else {
        return "allocations are in use".into();
    };
    match memory.allocations.range(..=address).next_back() {
        Some((start, allocation)) => {
            format!(
                "{} bytes past the start of {} bytes at {start:#x}",
                address - start,
                allocation.bytes
            )
        }
        None => "below all allocations".into(),
    }
}

/// Whether a host address is page-locked: copies from and to it are truly asynchronous.
pub(crate) fn is_pinned(address: usize) -> bool {
    let memory = lock(&MEMORY);
    memory
        .pinned
        .range(..=address)
        .next_back()
        .is_some_and(|(start, bytes)| address < start + bytes)
}

/// Memory that other processes may open, at a start address.
#[unsafe(no_mangle)]
extern "C" fn cuMemAlloc_v2(out: Out<'_, usize>, bytes: usize) -> Status {
    if bytes == 0 {
        return INVALID_VALUE;
    }
    put_result(
        out,
        stream::refuse_in_capture().and_then(|()| allocate(bytes, true)),
    )
}

/// Memory of the device's pool, which cannot be shared. Nothing of it is kept in graphs.
#[unsafe(no_mangle)]
extern "C" fn cuMemAllocAsync(out: Out<'_, usize>, bytes: usize, stream: usize) -> Status {
    match stream::get(stream) {
        Ok(stream) if stream.capturing() => {
            log("memory allocated in a capture: the soft GPU has no memory nodes");
            CAPTURE_UNSUPPORTED
        }
        Ok(_) if bytes == 0 => put(out, 0),
        Ok(_) => put_result(out, allocate(bytes, false)),
        Err(status) => status,
    }
}

/// Waits for the device first, as the driver does.
#[unsafe(no_mangle)]
extern "C" fn cuMemFree_v2(address: usize) -> Status {
    if address == 0 {
        return SUCCESS;
    }
    if let Err(status) = stream::refuse_in_capture() {
        return status;
    }
    // The memory is given back even if an earlier failure is all that the wait has to tell.
    let waited = stream::synchronize_all();
    let freed = free(address);
    if freed == SUCCESS { waited } else { freed }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFreeAsync(address: usize, stream: usize) -> Status {
    match stream::get(stream) {
        Ok(stream) if stream.capturing() => CAPTURE_UNSUPPORTED,
        Ok(_) if address == 0 => SUCCESS,
        Ok(stream) => {
            stream.push(Kind::Free, Arc::new(move || free(address)));
            stream::sticky()
        }
        Err(status) => status,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemGetInfo_v2(free: Out<'_, usize>, total: Out<'_, usize>) -> Status {
    let device = match device::current_ordinal() {
        Ok(device) => device,
        Err(status) => return status,
    };
    let used = lock(&MEMORY).used[device];
    match put(free, (settings().memory - used) as usize) {
        SUCCESS => put(total, settings().memory as usize),
        status => status,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemHostAlloc(out: Out<'_, *mut c_void>, bytes: usize, _flags: c_uint) -> Status {
    let Some(room) = bytes.checked_next_multiple_of(PAGE).filter(|room| *room > 0) else {
        return INVALID_VALUE;
    };
    if let Err(status) = stream::refuse_in_capture() {
        return status;
    }
    // SAFETY: the alignment is a power of two and the size a multiple of it.
    let address = unsafe { libc::aligned_alloc(PAGE, room) };
    if address.is_null() {
        return OUT_OF_MEMORY;
    }
    lock(&MEMORY).pinned.insert(address as usize, bytes);
    put(out, address)
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFreeHost(address: *mut c_void) -> Status {
    if lock(&MEMORY).pinned.remove(&(address as usize)).is_none() {
        return INVALID_VALUE;
    }
    // The driver waits for copies from and to the memory.
    let waited = stream::synchronize_all();
    // SAFETY: the address came from `aligned_alloc` in `cuMemHostAlloc` and was registered until now.
    unsafe { libc::free(address) };
    waited
}

/// `CUipcMemHandle`: 64 bytes that mean something to the driver only. Here: the file behind the allocation.
#[repr(C)]
#[derive(Clone, Copy)]
struct IpcHandle {
    magic: u64,
    process: u64,
    fd: u64,
    bytes: u64,
    reserved: [u64; 4],
}

const IPC_MAGIC: u64 = u64::from_ne_bytes(*b"softgpu\x01");

#[unsafe(no_mangle)]
extern "C" fn cuIpcGetMemHandle(out: Out<'_, IpcHandle>, address: usize) -> Status {
    let memory = lock(&MEMORY);
    let Some(allocation) = memory.allocations.get(&address) else {
        return INVALID_VALUE;
    };
    let Some(file) = &allocation.file else {
        log("memory of a pool cannot be shared: allocate it with cuMemAlloc");
        return INVALID_VALUE;
    };
    let handle = IpcHandle {
        magic: IPC_MAGIC,
        process: u64::from(std::process::id()),
        fd: file.as_raw_fd() as u64,
        bytes: allocation.bytes as u64,
        reserved: [0; 4],
    };
    put(out, handle)
}

fn import(handle: &IpcHandle) -> Result<usize, Status> {
    if settings().no_peer_access {
        return Err(PEER_ACCESS_UNSUPPORTED);
    }
    // As with the driver, a process cannot open its own memory.
    if handle.magic != IPC_MAGIC || handle.process == u64::from(std::process::id()) {
        return Err(INVALID_VALUE);
    }
    let path = format!("/proc/{}/fd/{}", handle.process, handle.fd);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(|error| {
            log(&format!("memory of process {}: {path}: {error}", handle.process));
            INVALID_CONTEXT
        })?;
    let bytes = usize::try_from(handle.bytes).map_err(|_| INVALID_VALUE)?;
    let length = file.metadata().map_err(|_| INVALID_VALUE)?.len();
    // Touching a mapping past the end of its file kills: the size is believed only if it is the file's.
    if bytes == 0
        || bytes
            .checked_next_multiple_of(PAGE)
            .is_none_or(|room| room as u64 != length)
    {
        return Err(INVALID_VALUE);
    }
    let mapping = Mapping::new(length as usize, Some(&file.into())).map_err(|_| OUT_OF_MEMORY)?;
    let start = mapping.start(bytes);
    lock(&MEMORY).imported.insert(
        start,
        Imported {
            bytes,
            _mapping: mapping,
        },
    );
    Ok(start)
}

#[unsafe(no_mangle)]
extern "C" fn cuIpcOpenMemHandle_v2(out: Out<'_, usize>, handle: IpcHandle, _flags: c_uint) -> Status {
    put_result(out, import(&handle))
}

#[unsafe(no_mangle)]
extern "C" fn cuIpcCloseMemHandle(address: usize) -> Status {
    let waited = stream::synchronize_all();
    match lock(&MEMORY).imported.remove(&address) {
        Some(_) => waited,
        None => INVALID_VALUE,
    }
}

const _: () = assert!(size_of::<IpcHandle>() == 64);
