//! Copies and fills. Host memory that is not page-locked is staged: a copy from it is taken at the call, a copy to it
//! has happened when the call returns. Both ends of a copy are checked against the allocations at the call.

use std::sync::Arc;

use libc::{c_uchar, c_uint};

use crate::{
    graph::Kind,
    memory::{check, is_pinned},
    status::{INVALID_VALUE, SUCCESS, Status, of},
    stream::{self, Op},
};

fn copy(to: usize, from: usize, bytes: usize) -> Op {
    Arc::new(move || {
        // SAFETY: the device ends lie in allocations, checked at the call, and the caller keeps the host ends valid
        // until the stream has done this (driver API). `copy`, because a copy within one allocation may overlap.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
        SUCCESS
    })
}

fn to_device(device: usize, host: usize, bytes: usize, stream: usize) -> Result<(), Status> {
    check(device, bytes, "copy to the device")?;
    let stream = stream::get(stream)?;
    if bytes == 0 {
        return Ok(());
    }
    if host == 0 {
        return Err(INVALID_VALUE);
    }
    if is_pinned(host) || stream.capturing() {
        stream.push(Kind::Copy, copy(device, host, bytes));
        return Ok(());
    }
    // SAFETY: the caller gives `bytes` readable bytes (driver API).
    let staged = unsafe { std::slice::from_raw_parts(host as *const u8, bytes) }.to_vec();
    let op = move || copy(device, staged.as_ptr() as usize, staged.len())();
    stream.push(Kind::Copy, Arc::new(op));
    Ok(())
}

fn to_host(host: usize, device: usize, bytes: usize, stream: usize) -> Result<(), Status> {
    check(device, bytes, "copy from the device")?;
    let stream = stream::get(stream)?;
    if bytes == 0 {
        return Ok(());
    }
    if host == 0 {
        return Err(INVALID_VALUE);
    }
    let number = stream.push(Kind::Copy, copy(host, device, bytes));
    if !is_pinned(host) && !stream.capturing() {
        stream.wait(number);
    }
    Ok(())
}

fn on_device(to: usize, from: usize, bytes: usize, stream: usize) -> Result<(), Status> {
    check(to, bytes, "copy on the device, destination")?;
    check(from, bytes, "copy on the device, source")?;
    stream::get(stream)?.push(Kind::Copy, copy(to, from, bytes));
    Ok(())
}

/// `CUDA_MEMCPY2D`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Plane {
    from_x: usize,
    from_y: usize,
    from_kind: c_uint,
    from_host: usize,
    from_device: usize,
    from_array: usize,
    from_pitch: usize,
    to_x: usize,
    to_y: usize,
    to_kind: c_uint,
    to_host: usize,
    to_device: usize,
    to_array: usize,
    to_pitch: usize,
    width: usize,
    height: usize,
}

/// `CU_MEMORYTYPE_DEVICE`.
const DEVICE: c_uint = 2;

/// Rows of device memory; other kinds of memory are not offered.
fn plane_on_device(plane: &Plane, stream: usize) -> Result<(), Status> {
    if (plane.from_kind, plane.to_kind) != (DEVICE, DEVICE) {
        return Err(INVALID_VALUE);
    }
    let (width, height) = (plane.width, plane.height);
    if width == 0 || height == 0 {
        return Ok(());
    }
    let start = |base: usize, (x, y): (usize, usize), pitch: usize, what| {
        let end_of_row = x
            .checked_add(width)
            .filter(|end| *end <= pitch)
            .ok_or(INVALID_VALUE)?;
        let skipped = y.checked_mul(pitch).ok_or(INVALID_VALUE)?;
        let bytes = (height - 1)
            .checked_mul(pitch)
            .and_then(|rows| rows.checked_add(end_of_row));
        let first = base.checked_add(skipped).ok_or(INVALID_VALUE)?;
        check(first, bytes.ok_or(INVALID_VALUE)?, what)?;
        Ok::<usize, Status>(first + x)
    };
    let from = (plane.from_x, plane.from_y);
    let from = start(plane.from_device, from, plane.from_pitch, "copy of rows, source")?;
    let to = (plane.to_x, plane.to_y);
    let to = start(plane.to_device, to, plane.to_pitch, "copy of rows, destination")?;
    let (from_pitch, to_pitch) = (plane.from_pitch, plane.to_pitch);
    let op = move || {
        for row in 0..height {
            copy(to + row * to_pitch, from + row * from_pitch, width)();
        }
        SUCCESS
    };
    stream::get(stream)?.push(Kind::Copy, Arc::new(op));
    Ok(())
}

fn fill<T: Copy + Send + Sync + 'static>(
    device: usize,
    value: T,
    count: usize,
    stream: usize,
) -> Result<(), Status> {
    let bytes = count.checked_mul(size_of::<T>()).ok_or(INVALID_VALUE)?;
    if !device.is_multiple_of(align_of::<T>()) {
        return Err(INVALID_VALUE);
    }
    check(device, bytes, "memset")?;
    let op = move || {
        // SAFETY: the range lies in an allocation, checked at the call, and is aligned, checked above.
        unsafe { std::slice::from_raw_parts_mut(device as *mut T, count) }.fill(value);
        SUCCESS
    };
    stream::get(stream)?.push(Kind::Set, Arc::new(op));
    Ok(())
}

/// What a call returns that has enqueued its work: its own refusal, or the state of the context.
fn enqueued(result: Result<(), Status>) -> Status {
    result.map_or_else(|status| status, |()| stream::sticky())
}

/// What a synchronous call returns, on the default stream.
fn completed(result: Result<(), Status>) -> Status {
    of(result
        .and_then(|()| stream::refuse_in_capture())
        .and_then(|()| stream::get(0))
        .and_then(|stream| match stream.synchronize() {
            SUCCESS => Ok(()),
            status => Err(status),
        }))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoDAsync_v2(device: usize, host: usize, bytes: usize, stream: usize) -> Status {
    enqueued(to_device(device, host, bytes, stream))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoHAsync_v2(host: usize, device: usize, bytes: usize, stream: usize) -> Status {
    enqueued(to_host(host, device, bytes, stream))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoDAsync_v2(to: usize, from: usize, bytes: usize, stream: usize) -> Status {
    enqueued(on_device(to, from, bytes, stream))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpy2DAsync_v2(plane: Option<&Plane>, stream: usize) -> Status {
    enqueued(
        plane
            .ok_or(INVALID_VALUE)
            .and_then(|plane| plane_on_device(plane, stream)),
    )
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyPeerAsync(
    to: usize,
    _to_context: usize,
    from: usize,
    _from_context: usize,
    bytes: usize,
    stream: usize,
) -> Status {
    enqueued(on_device(to, from, bytes, stream))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoD_v2(device: usize, host: usize, bytes: usize) -> Status {
    completed(to_device(device, host, bytes, 0))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoH_v2(host: usize, device: usize, bytes: usize) -> Status {
    completed(to_host(host, device, bytes, 0))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoD_v2(to: usize, from: usize, bytes: usize) -> Status {
    enqueued(on_device(to, from, bytes, 0)) // does not wait, as the driver's does not
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8Async(device: usize, value: c_uchar, count: usize, stream: usize) -> Status {
    enqueued(fill(device, value, count, stream))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD32Async(device: usize, value: c_uint, count: usize, stream: usize) -> Status {
    enqueued(fill(device, value, count, stream))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8_v2(device: usize, value: c_uchar, count: usize) -> Status {
    enqueued(fill(device, value, count, 0))
}
