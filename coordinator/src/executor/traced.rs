//! An executor whose calls are recorded: what the engine does between two steps, and how long it waits for the ranks.

use std::{io, path::Path, time::Duration};

use phalanx_proto::{
    step::{StepMasks, StepOutput, StepPlan},
    trace::{Moment, Span, TraceFile},
};

use crate::engine::{Executor, ExecutorError};

/// The engine's row of the drawing; rank `n` has row `n + 1`.
const ENGINE_ROW: u32 = 0;
/// Steps between two writes.
const STEPS_PER_WRITE: u64 = 64;

pub struct TracedExecutor<E> {
    inner: E,
    /// None when enough was recorded.
    recorder: Option<Recorder>,
}

struct Recorder {
    file: TraceFile,
    steps_left: u64,
    /// When the last step's output was there.
    received: Option<Moment>,
}

impl<E> TracedExecutor<E> {
    /// Records the next `steps` steps into a file that was begun.
    pub fn new(inner: E, path: &Path, steps: u64) -> io::Result<Self> {
        let recorder = Recorder {
            file: TraceFile::open(path, ENGINE_ROW, "engine")?,
            steps_left: steps,
            received: None,
        };
        Ok(Self {
            inner,
            recorder: Some(recorder),
        })
    }

    fn record(&mut self, name: &'static str, start: Moment, numbers: [(&'static str, u64); 3]) {
        if let Some(recorder) = &mut self.recorder {
            let end = Moment::now();
            recorder.file.push(&Span {
                name,
                start,
                end,
                numbers,
            });
        }
    }

    /// A step is over.
    fn end_step(&mut self) {
        let Some(recorder) = &mut self.recorder else {
            return;
        };
        recorder.received = Some(Moment::now());
        recorder.steps_left -= 1;
        let last = recorder.steps_left == 0;
        if last || recorder.steps_left % STEPS_PER_WRITE == 0 {
            let written = recorder.file.flush();
            if let Err(error) = &written {
                tracing::warn!(%error, "the engine's trace ends here");
            } else if last {
                tracing::info!("all steps of --trace-steps are recorded");
            }
            if last || written.is_err() {
                self.recorder = None;
            }
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        if let Err(error) = self.file.flush() {
            tracing::warn!(%error, "the engine's trace lacks its end");
        }
    }
}

impl<E: Executor> Executor for TracedExecutor<E> {
    fn submit(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        let start = Moment::now();
        if let Some(received) = self
            .recorder
            .as_mut()
            .and_then(|recorder| recorder.received.take())
        {
            // Also the time without anything to do.
            self.record("between steps", received, [("", 0); 3]);
        }
        self.inner.submit(plan)?;
        let rows = ("rows", plan.rows.len() as u64);
        self.record("submit", start, [("step", plan.step), rows, ("", 0)]);
        Ok(())
    }

    fn post_masks(&mut self, masks: &StepMasks) -> Result<(), ExecutorError> {
        let start = Moment::now();
        self.inner.post_masks(masks)?;
        let rows = ("rows", masks.masks.len() as u64);
        self.record("post masks", start, [("step", masks.step), rows, ("", 0)]);
        Ok(())
    }

    fn wait(&mut self, step: u64, limit: Duration) -> Result<StepOutput, ExecutorError> {
        let start = Moment::now();
        let output = self.inner.wait(step, limit)?;
        let forward = ("forward_us", u64::from(output.forward_us));
        self.record("wait", start, [("step", step), forward, ("", 0)]);
        self.end_step();
        Ok(output)
    }

    fn rebuild(&mut self) -> Result<u32, ExecutorError> {
        self.inner.rebuild()
    }
}
