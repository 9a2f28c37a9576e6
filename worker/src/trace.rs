//! What a rank does when, op by op, for the first steps after it joined a group.
//!
//! On GPUs an op ends when it is queued; the time that the device takes appears where the host waits for it, in
//! `sample`.

use std::{
    cell::RefCell,
    io,
    path::{Path, PathBuf},
};

use phalanx_proto::trace::{Moment, Span, TraceFile};

/// Spans kept before they are written: about five steps of a small model.
const KEPT_SPANS: usize = 2048;

/// Where to, and for how many steps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceOptions {
    /// Begun by the coordinator.
    pub path: PathBuf,
    pub steps: u64,
}

/// Records spans, or nothing at the price of a branch.
#[derive(Debug, Default)]
pub struct Trace(RefCell<Option<Recorder>>);

#[derive(Debug)]
struct Recorder {
    file: TraceFile,
    spans: Vec<Span>,
    steps_left: u64,
}

impl Trace {
    /// Records nothing.
    pub fn off() -> Self {
        Self::default()
    }

    /// Records `rank`'s next steps.
    pub fn open(options: &TraceOptions, rank: usize) -> io::Result<Self> {
        let file = TraceFile::open(&options.path, rank as u32 + 1, &format!("rank {rank}"))?;
        Ok(Self(RefCell::new(Some(Recorder {
            file,
            spans: Vec::with_capacity(KEPT_SPANS),
            steps_left: options.steps,
        }))))
    }

    /// Runs `op` and records how long it took.
    #[inline]
    pub fn op<T>(&self, name: &'static str, op: impl FnOnce() -> T) -> T {
        let Some(start) = self.start() else { return op() };
        let result = op();
        self.end(name, start, [("", 0); 3]);
        result
    }

    /// The beginning of a span, if anybody wants to know.
    pub(crate) fn start(&self) -> Option<Moment> {
        self.0.borrow().is_some().then(Moment::now)
    }

    /// Ends a span that [`Self::start`] has begun.
    pub(crate) fn end(&self, name: &'static str, start: Moment, numbers: [(&'static str, u64); 3]) {
        if let Some(recorder) = &mut *self.0.borrow_mut() {
            let end = Moment::now();
            recorder.spans.push(Span {
                name,
                start,
                end,
                numbers,
            });
        }
    }

    /// Ends a step. Writes if much has come together; ends the recording with its last step, or if it cannot write.
    pub(crate) fn end_step(&self) {
        let mut trace = self.0.borrow_mut();
        let Some(recorder) = &mut *trace else { return };
        recorder.steps_left -= 1;
        let last = recorder.steps_left == 0;
        if last || recorder.spans.len() >= KEPT_SPANS {
            let written = recorder.write();
            if let Err(error) = &written {
                tracing::warn!(%error, "the trace ends here");
            }
            if last || written.is_err() {
                *trace = None;
            }
        }
    }
}

impl Recorder {
    fn write(&mut self) -> io::Result<()> {
        for span in self.spans.drain(..) {
            self.file.push(&span);
        }
        self.file.flush()
    }
}

/// What was recorded before a group's end is what explains it.
impl Drop for Recorder {
    fn drop(&mut self) {
        if let Err(error) = self.write() {
            tracing::warn!(%error, "the trace lacks its end");
        }
    }
}

/// The trace that an assignment asks for. A rank that cannot write it serves all the same.
pub(crate) fn of(options: Option<&TraceOptions>, rank: usize) -> Trace {
    let Some(options) = options else {
        return Trace::off();
    };
    Trace::open(options, rank).unwrap_or_else(|error| {
        let path: &Path = &options.path;
        tracing::warn!(path = %path.display(), %error, "no trace of this rank");
        Trace::off()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_ends_with_its_last_step() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("trace.json");
        TraceFile::create(&path).expect("a file");
        let trace = of(
            Some(&TraceOptions {
                path: path.clone(),
                steps: 2,
            }),
            3,
        );
        for step in 0..4 {
            assert_eq!(trace.op("linear", || step), step);
            trace.end_step();
        }
        assert!(trace.start().is_none());
        let text = std::fs::read_to_string(&path).expect("readable");
        assert_eq!(text.matches(r#""name":"linear""#).count(), 2);
        assert!(text.contains(r#""pid":4"#) && text.contains(r#""name":"rank 3""#));
    }

    #[test]
    fn what_cannot_be_written_is_not_recorded() {
        let options = TraceOptions {
            path: "/nonexistent/trace.json".into(),
            steps: 1,
        };
        assert!(of(Some(&options), 0).start().is_none());
    }
}
