//! The rank's own thread: loads the shard, then serves one group after another.

use std::{
    cell::RefCell,
    rc::Rc,
    sync::{Arc, mpsc as thread_mpsc},
    thread,
    time::{Duration, Instant},
};

use phalanx_proto::{
    step::{StepLimits, StepPlan, decode_plan, encode_output},
    v1::{self, worker_event::Event},
};
use phalanx_shm::{AbortReason, Party, RankPort, Segment, Wait};
use tokio::sync::{mpsc, oneshot};

use crate::{
    assignment::{Assignment, Device},
    error::{RunError, WorkerError},
    loader::{self, LoadProgress},
    platform::{self, Place, Platform},
    process,
    runner::{LoadedModel, ModelRunner},
};

/// Progress is reported at most so often.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// What the rank's thread is to do. `Load` is the first and comes once.
pub(crate) enum Task {
    Load(Box<Assignment>),
    Join(Invitation),
}

/// To a group.
pub(crate) struct Invitation {
    pub(crate) segment: Arc<Segment>,
    /// Empty on CPUs.
    pub(crate) nccl_id: Vec<u8>,
}

pub(crate) enum Report {
    Event(Event),
    /// The last report.
    Failed(WorkerError),
}

pub(crate) struct RankContext {
    pub(crate) rank: u32,
    pub(crate) cpus: Option<Vec<usize>>,
    pub(crate) reports: mpsc::Sender<Report>,
}

/// Starts the thread. It ends with the task queue, or after a failure; then `ended` is dropped.
pub(crate) fn spawn(
    context: RankContext,
    tasks: thread_mpsc::Receiver<Task>,
    ended: oneshot::Sender<()>,
) -> Result<(), WorkerError> {
    let live = move || {
        if let Err(error) = context.live(&tasks) {
            tracing::error!(rank = context.rank, %error, "rank failed");
            context.report(Report::Failed(error));
        }
        drop(ended);
    };
    let thread = thread::Builder::new().name("rank".to_owned()).spawn(live);
    thread.map(drop).map_err(|source| WorkerError::System {
        call: "clone",
        source,
    })
}

impl RankContext {
    fn live(&self, tasks: &thread_mpsc::Receiver<Task>) -> Result<(), WorkerError> {
        // The backend's threads inherit this.
        if let Some(cpus) = &self.cpus {
            process::pin_to(cpus)?;
        }
        let Ok(Task::Load(assignment)) = tasks.recv() else {
            return Ok(());
        };
        match assignment.device {
            Device::Cpu => self.work(&platform::Cpu, *assignment, tasks),
            Device::Cuda => self.work(&platform::Cuda, *assignment, tasks),
        }
    }

    fn work<P: Platform>(
        &self,
        platform: &P,
        assignment: Assignment,
        tasks: &thread_mpsc::Receiver<Task>,
    ) -> Result<(), WorkerError> {
        let mut model = self.load(platform, assignment)?;
        while let Ok(Task::Join(invitation)) = tasks.recv() {
            self.serve(platform, &mut model, &invitation)?;
            self.offer_group_id(platform, &model.assignment)?;
        }
        Ok(())
    }

    /// Sends the identity of the next group, if it is this rank's to make.
    fn offer_group_id<P: Platform>(&self, platform: &P, assignment: &Assignment) -> Result<(), WorkerError> {
        if let Some(unique_id) = platform.group_id(assignment).map_err(RunError::from)? {
            self.report(Report::Event(Event::NcclId(v1::NcclId { unique_id })));
        }
        Ok(())
    }

    fn load<P: Platform>(
        &self,
        platform: &P,
        assignment: Assignment,
    ) -> Result<LoadedModel<P::Backend>, WorkerError> {
        let started = Instant::now();
        let backend = platform.backend(&assignment).map_err(loader::LoadError::from)?;
        let mut last: Option<Instant> = None;
        let mut progress = |progress: LoadProgress| {
            let due = last.is_none_or(|last| last.elapsed() >= PROGRESS_INTERVAL);
            if due || progress.bytes_done == progress.bytes_total {
                last = Some(Instant::now());
                self.report(Report::Event(Event::Progress(v1::Progress {
                    phase: progress.phase.into(),
                    bytes_done: progress.bytes_done,
                    bytes_total: progress.bytes_total,
                })));
            }
        };
        let model = loader::load(backend, assignment, &mut progress)?;
        let loaded = v1::Loaded {
            weight_bytes: model.weight_bytes,
            kv_bytes: model.kv_bytes,
            rss_bytes: process::resident_bytes(),
        };
        tracing::info!(rank = self.rank, ?loaded, elapsed = ?started.elapsed(), "loaded");
        self.offer_group_id(platform, &model.assignment)?;
        self.report(Report::Event(Event::Loaded(loaded)));
        Ok(model)
    }

    /// Serves the group of `invitation` until it ends. That is an error only if this rank is why.
    fn serve<P: Platform>(
        &self,
        platform: &P,
        model: &mut LoadedModel<P::Backend>,
        invitation: &Invitation,
    ) -> Result<(), WorkerError> {
        let segment = &invitation.segment;
        let epoch = segment.shape().epoch;
        let error = match self.join(platform, model, invitation) {
            Ok(mut steps) => {
                self.report(Report::Event(Event::GroupJoined(v1::GroupJoined { epoch })));
                steps.run()
            }
            Err(error) => error,
        };
        // A device whose collectives were aborted may fail in any way.
        let ended_by_others = segment.abort_reason().is_some() && error.is_of_device();
        // Whoever waits for this rank must not wait longer. If the group has been aborted, the first reason stays.
        segment.abort(match &error {
            RunError::Peer { rank, .. } => AbortReason::OutOfStep(Party::Rank(*rank as u32)),
            _ => AbortReason::Lost(Party::Rank(self.rank)),
        });
        if error.is_group_end() || ended_by_others {
            tracing::info!(rank = self.rank, epoch, reason = %error, "the group ended");
            Ok(())
        } else {
            Err(error.into())
        }
    }

    fn join<'a, P: Platform>(
        &self,
        platform: &P,
        model: &'a mut LoadedModel<P::Backend>,
        invitation: &Invitation,
    ) -> Result<StepLoop<'a, P>, RunError> {
        let segment = &invitation.segment;
        let assignment = &model.assignment;
        let limit = assignment.step_timeout;
        let port = RankPort::join(Arc::clone(segment), self.rank, Wait::calibrated(), limit)?;
        let port = Rc::new(RefCell::new(port));
        let place = Place {
            assignment,
            port: Rc::clone(&port),
            group_id: &invitation.nccl_id,
        };
        let comm = platform.join(&model.backend, place)?;
        let limits = assignment.limits;
        let mut runner = ModelRunner::new(model, comm)?;
        runner.capture_graphs(&mut |done, total| {
            self.report(Report::Event(Event::Progress(v1::Progress {
                phase: v1::Phase::WarmingUp.into(),
                bytes_done: done as u64,
                bytes_total: total as u64,
            })));
        })?;
        Ok(StepLoop {
            limits,
            epoch: segment.shape().epoch,
            last_step: None,
            port,
            runner,
        })
    }

    fn report(&self, report: Report) {
        // Nobody listens once the stream is over; the task queue ends as well then.
        let _ = self.reports.blocking_send(report);
    }
}

/// Plans in, outputs out, for one epoch.
struct StepLoop<'a, P: Platform> {
    limits: StepLimits,
    epoch: u32,
    /// None before the first step.
    last_step: Option<u64>,
    /// The communicator's port, between steps.
    port: Rc<RefCell<RankPort>>,
    runner: ModelRunner<'a, P::Backend, P::Comm>,
}

impl<P: Platform> StepLoop<'_, P> {
    /// Returns what ended the group.
    fn run(&mut self) -> RunError {
        loop {
            if let Err(error) = self.step() {
                return error;
            }
        }
    }

    fn step(&mut self) -> Result<(), RunError> {
        let limits = self.limits;
        let read = |bytes: &[u8]| (decode_plan(bytes, &limits), Instant::now());
        let (plan, arrived) = self.port.borrow_mut().next_plan(read)?;
        let plan = plan.map_err(RunError::DecodePlan)?;
        self.check(&plan)?;
        let mut output = self.runner.execute(&plan)?;
        let mut port = self.port.borrow_mut();
        if port.rank() == 0 {
            output.forward_us = u32::try_from(arrived.elapsed().as_micros()).unwrap_or(u32::MAX);
            port.publish_output(|slot| encode_output(&output, slot).map_err(RunError::EncodeOutput))?;
        }
        Ok(())
    }

    /// A plan belongs to this epoch and follows the last one.
    fn check(&mut self, plan: &StepPlan) -> Result<(), RunError> {
        if plan.epoch != self.epoch {
            return Err(RunError::Epoch {
                expected: self.epoch,
                found: plan.epoch,
            });
        }
        let expected = self.last_step.map_or(plan.step, |last| last.wrapping_add(1));
        if plan.step != expected {
            return Err(RunError::StepNumber {
                expected,
                found: plan.step,
            });
        }
        self.last_step = Some(plan.step);
        Ok(())
    }
}
