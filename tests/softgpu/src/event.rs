//! Events: a mark in a stream, with the time at which the stream passed it.

use std::{
    sync::{Arc, Mutex},
    time::Instant,
};

use libc::{c_float, c_uint};

use crate::{
    graph::{Capture, Kind},
    handles::{Handles, lock},
    status::{CAPTURE_ISOLATION, CAPTURED_EVENT, INVALID_HANDLE, NOT_READY, Out, SUCCESS, Status, put},
    stream::{self, Stream},
};

#[derive(Default)]
struct Event {
    mark: Mutex<Option<Mark>>,
}

#[derive(Clone)]
struct Mark {
    stream: Arc<Stream>,
    /// Operations of the stream after which the event is complete.
    number: u64,
    capture: Option<Arc<Capture>>,
    at: Arc<Mutex<Option<Instant>>>,
}

static EVENTS: Handles<Event> = Handles::new();

fn mark_of(event: usize) -> Result<Option<Mark>, Status> {
    EVENTS
        .get(event)
        .map(|event| lock(&event.mark).clone())
        .ok_or(INVALID_HANDLE)
}

#[unsafe(no_mangle)]
extern "C" fn cuEventCreate(out: Out<'_, usize>, _flags: c_uint) -> Status {
    put(out, EVENTS.insert(Event::default()))
}

#[unsafe(no_mangle)]
extern "C" fn cuEventDestroy_v2(event: usize) -> Status {
    EVENTS.remove(event).map_or(INVALID_HANDLE, |_| SUCCESS)
}

#[unsafe(no_mangle)]
extern "C" fn cuEventRecord(event: usize, stream: usize) -> Status {
    let Some(event) = EVENTS.get(event) else {
        return INVALID_HANDLE;
    };
    let stream = match stream::get(stream) {
        Ok(stream) => stream,
        Err(status) => return status,
    };
    let capture = lock(&stream.capture).clone();
    let at = Arc::new(Mutex::new(None));
    let passed = at.clone();
    let op = move || {
        *lock(&passed) = Some(Instant::now());
        SUCCESS
    };
    let number = stream.push(Kind::Event, Arc::new(op));
    *lock(&event.mark) = Some(Mark {
        stream,
        number,
        capture,
        at,
    });
    stream::sticky()
}

#[unsafe(no_mangle)]
extern "C" fn cuEventRecordWithFlags(event: usize, stream: usize, _flags: c_uint) -> Status {
    cuEventRecord(event, stream)
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamWaitEvent(stream: usize, event: usize, _flags: c_uint) -> Status {
    let (stream, mark) = match (stream::get(stream), mark_of(event)) {
        (Ok(stream), Ok(Some(mark))) => (stream, mark),
        (Ok(_), Ok(None)) => return SUCCESS, // never recorded: nothing to wait for
        (Err(status), _) | (_, Err(status)) => return status,
    };
    if let Some(capture) = mark.capture {
        // The waiting stream joins the capture. Nodes are kept in the order of their calls, which is a valid order for
        // any graph that the calls can describe.
        let mut joined = lock(&stream.capture);
        return match &*joined {
            None => {
                capture.join(&stream);
                *joined = Some(capture);
                SUCCESS
            }
            Some(own) if Arc::ptr_eq(own, &capture) => SUCCESS,
            Some(_) => CAPTURE_ISOLATION,
        };
    }
    if let Some(capture) = &*lock(&stream.capture) {
        capture.invalidate(); // recorded outside of the capture
        return CAPTURE_ISOLATION;
    }
    if !Arc::ptr_eq(&mark.stream, &stream) {
        let op = move || {
            mark.stream.wait(mark.number);
            SUCCESS
        };
        stream.push(Kind::Event, Arc::new(op));
    }
    stream::sticky()
}

#[unsafe(no_mangle)]
extern "C" fn cuEventSynchronize(event: usize) -> Status {
    match mark_of(event) {
        Ok(Some(mark)) if mark.capture.is_some() => CAPTURED_EVENT,
        Ok(Some(mark)) => {
            mark.stream.wait(mark.number);
            stream::sticky()
        }
        Ok(None) => stream::sticky(),
        Err(status) => status,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuEventQuery(event: usize) -> Status {
    match mark_of(event) {
        Ok(Some(mark)) if mark.capture.is_some() => CAPTURED_EVENT,
        Ok(Some(mark)) if !mark.stream.is_done(mark.number) => NOT_READY,
        Ok(_) => stream::sticky(),
        Err(status) => status,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuEventElapsedTime_v2(out: Out<'_, c_float>, start: usize, end: usize) -> Status {
    let (Ok(Some(start)), Ok(Some(end))) = (mark_of(start), mark_of(end)) else {
        return INVALID_HANDLE;
    };
    let (Some(start), Some(end)) = (*lock(&start.at), *lock(&end.at)) else {
        return NOT_READY;
    };
    let milliseconds = if end >= start {
        (end - start).as_secs_f32() * 1e3
    } else {
        -(start - end).as_secs_f32() * 1e3
    };
    put(out, milliseconds)
}

#[unsafe(no_mangle)]
extern "C" fn cuEventElapsedTime(out: Out<'_, c_float>, start: usize, end: usize) -> Status {
    cuEventElapsedTime_v2(out, start, end)
}
