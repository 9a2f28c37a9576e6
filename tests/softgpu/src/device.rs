//! Devices and contexts: one primary context per device, and nothing else.

use std::{cell::Cell, ffi::CStr};

use libc::{c_char, c_int, c_uint};

use crate::{
    settings::{log, settings},
    status::{self, INVALID_CONTEXT, INVALID_DEVICE, INVALID_VALUE, NO_DEVICE, Out, SUCCESS, Status, put},
};

/// Dynamic shared memory of a block without and with `cuFuncSetAttribute`, bytes (the figures of sm_86).
pub(crate) const SMEM_DEFAULT: u32 = 48 << 10;
pub(crate) const SMEM_OPT_IN: u32 = 99 << 10;

const VERSION: c_int = 12080;

thread_local! {
    /// The current context of this thread: the device's ordinal plus one, 0 for none.
    static CONTEXT: Cell<usize> = const { Cell::new(0) };
}

/// The current context's number; 0 if there is none.
pub(crate) fn current() -> usize {
    CONTEXT.get()
}

/// The ordinal of the current device.
pub(crate) fn current_ordinal() -> Result<usize, Status> {
    CONTEXT.get().checked_sub(1).ok_or(INVALID_CONTEXT)
}

fn ordinal(device: c_int) -> Result<usize, Status> {
    usize::try_from(device)
        .ok()
        .filter(|ordinal| *ordinal < settings().devices)
        .ok_or(INVALID_DEVICE)
}

/// Answers about a device that exists.
fn answer<T>(out: Out<'_, T>, device: c_int, value: impl FnOnce(usize) -> T) -> Status {
    match ordinal(device) {
        Ok(ordinal) => put(out, value(ordinal)),
        Err(status) => status,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuInit(flags: c_uint) -> Status {
    match (flags, settings().devices) {
        (0, 0) => NO_DEVICE,
        (0, _) => SUCCESS,
        _ => INVALID_VALUE,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuDriverGetVersion(out: Out<'_, c_int>) -> Status {
    put(out, VERSION)
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetCount(out: Out<'_, c_int>) -> Status {
    put(out, settings().devices as c_int)
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGet(out: Out<'_, c_int>, index: c_int) -> Status {
    answer(out, index, |ordinal| ordinal as c_int)
}

/// Copies a text into room for `len` bytes, cut to fit, ended by a zero.
fn put_text(out: *mut c_char, len: c_int, text: &str) -> Status {
    let Ok(len @ 1..) = usize::try_from(len) else {
        return INVALID_VALUE;
    };
    if out.is_null() {
        return INVALID_VALUE;
    }
    let count = text.len().min(len - 1);
    // SAFETY: the caller gives room for `len` bytes (driver API), and count + 1 <= len.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr().cast(), out, count);
        *out.add(count) = 0;
    }
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetName(out: *mut c_char, len: c_int, device: c_int) -> Status {
    match ordinal(device) {
        Ok(_) => put_text(out, len, "Soft GPU"),
        Err(status) => status,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetPCIBusId(out: *mut c_char, len: c_int, device: c_int) -> Status {
    match ordinal(device) {
        Ok(ordinal) => put_text(out, len, &bus_id(ordinal)),
        Err(status) => status,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetUuid_v2(out: Out<'_, [u8; 16]>, device: c_int) -> Status {
    answer(out, device, |ordinal| {
        let mut uuid = *b"softgpu-device-?";
        uuid[15] = ordinal as u8;
        uuid
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetUuid(out: Out<'_, [u8; 16]>, device: c_int) -> Status {
    cuDeviceGetUuid_v2(out, device)
}

fn bus_id(ordinal: usize) -> String {
    format!("0000:{:02x}:00.0", ordinal + 1)
}

/// Only the form that [`cuDeviceGetPCIBusId`] writes.
#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetByPCIBusId(out: Out<'_, c_int>, id: *const c_char) -> Status {
    if id.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: not null, and the caller gives a C string.
    let id = unsafe { CStr::from_ptr(id) }.to_bytes();
    match (0..settings().devices).find(|ordinal| bus_id(*ordinal).as_bytes() == id) {
        Some(ordinal) => put(out, ordinal as c_int),
        None => INVALID_DEVICE,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceTotalMem_v2(out: Out<'_, usize>, device: c_int) -> Status {
    answer(out, device, |_| settings().memory as usize)
}

/// Attributes that a backend asks for, by number of `CUdevice_attribute`; any other is refused, so that nobody decides
/// by a value that was never thought about.
#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetAttribute(out: Out<'_, c_int>, attribute: c_int, device: c_int) -> Status {
    let ordinal = match ordinal(device) {
        Ok(ordinal) => ordinal as c_int,
        Err(status) => return status,
    };
    let capability = settings().compute_capability as c_int;
    let value = match attribute {
        1..=3 => 1024,              // threads per block, block x and y
        4 => 64,                    // block z
        5 => c_int::MAX,            // grid x
        6 | 7 => 65535,             // grid y, z
        8 => SMEM_DEFAULT as c_int, // shared memory per block
        9 => 64 << 10,              // constant memory
        10 => 32,                   // warp size
        12 => 65536,                // registers per block
        13 => 1_400_000,            // clock, kHz
        16 => 8,                    // multiprocessors
        31 => 1,                    // concurrent kernels
        33 => ordinal + 1,          // PCI bus
        34 | 35 | 50 => 0,          // PCI device, TCC driver, PCI domain
        36 => 1_000_000,            // memory clock, kHz
        37 => 256,                  // bus width, bits
        38 => 4 << 20,              // L2, bytes
        39 => 2048,                 // threads per multiprocessor
        40 => 2,                    // copy engines
        41 => 1,                    // unified addressing
        75 => capability / 10,      // major
        76 => capability % 10,      // minor
        81 => 100 << 10,            // shared memory per multiprocessor
        82 => 65536,                // registers per multiprocessor
        83 | 89 | 95 => 0,          // managed memory, concurrent managed access, cooperative launch
        97 => SMEM_OPT_IN as c_int, // shared memory per block, opt-in
        106 => 16,                  // blocks per multiprocessor
        111 => 1 << 10,             // reserved shared memory per block
        115 => 1,                   // memory pools
        _ => {
            log(&format!(
                "device attribute {attribute} is unknown to the soft GPU"
            ));
            return INVALID_VALUE;
        }
    };
    put(out, value)
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceCanAccessPeer(out: Out<'_, c_int>, device: c_int, peer: c_int) -> Status {
    match ordinal(peer) {
        Ok(_) => answer(out, device, |_| {
            c_int::from(device != peer && !settings().no_peer_access)
        }),
        Err(status) => status,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRetain(out: Out<'_, usize>, device: c_int) -> Status {
    answer(out, device, |ordinal| ordinal + 1)
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> Status {
    ordinal(device).map_or_else(|status| status, |_| SUCCESS)
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetCurrent(out: Out<'_, usize>) -> Status {
    put(out, current())
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(context: usize) -> Status {
    if context > settings().devices {
        return INVALID_CONTEXT;
    }
    CONTEXT.set(context);
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetDevice(out: Out<'_, c_int>) -> Status {
    status::put_result(out, current_ordinal().map(|ordinal| ordinal as c_int))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetFlags(_flags: c_uint) -> Status {
    of_current()
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxEnablePeerAccess(peer: usize, flags: c_uint) -> Status {
    if peer == 0 || peer > settings().devices || flags != 0 {
        return INVALID_CONTEXT;
    }
    of_current() // all devices share this process's memory: access is there already
}

fn of_current() -> Status {
    status::of(current_ordinal().map(drop))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetStreamPriorityRange(least: Out<'_, c_int>, greatest: Out<'_, c_int>) -> Status {
    match put(least, 0) {
        SUCCESS => put(greatest, -5),
        status => status,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuGetErrorName(error: c_int, out: Out<'_, *const c_char>) -> Status {
    put(out, status::name(error).as_ptr())
}

#[unsafe(no_mangle)]
extern "C" fn cuGetErrorString(error: c_int, out: Out<'_, *const c_char>) -> Status {
    cuGetErrorName(error, out)
}
