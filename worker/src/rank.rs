//! The rank's own thread: loads the shard, then serves one group after another.

use std::{
    cell::RefCell,
    path::Path,
    rc::Rc,
    sync::{Arc, mpsc as thread_mpsc},
    thread,
    time::{Duration, Instant},
};

use phalanx_proto::{
    step::{StepLimits, StepPlan, decode_masks, decode_plan, encode_output},
    v1::{self, worker_event::Event},
};
use phalanx_shm::{AbortReason, Party, RankPort, Segment, Wait};
use tokio::sync::{mpsc, oneshot};

use crate::{
    assignment::{Assignment, Device, check_num_blocks},
    device::gpu_of,
    error::{RunError, WorkerError},
    loader::{self, LoadProgress},
    numa,
    platform::{self, Place, Platform},
    process, profile,
    runner::{LoadedModel, ModelRunner},
    trace,
};

/// Progress is reported at most so often.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// What the rank's thread is to do. `Load` is the first and comes once, `AllocateKv` the second.
pub(crate) enum Task {
    Load(Box<Assignment>),
    /// Blocks.
    AllocateKv(u32),
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
    /// What the process was started with.
    pub(crate) allowed_cpus: Vec<usize>,
    /// Of the device's own memory, before anything was allocated there.
    pub(crate) free_bytes: u64,
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
            Device::Cuda => {
                self.go_near_the_gpu();
                self.work(&platform::Cuda, *assignment, tasks)
            }
        }
    }

    /// Pins this thread, and those it starts, to the CPUs of the GPU's NUMA node, where it is known.
    fn go_near_the_gpu(&self) {
        let near = gpu_of(self.rank).ok();
        let near = near.and_then(|gpu| numa::cpus_near(Path::new("/sys"), &gpu.pci_bus_id));
        let chosen = near.and_then(|near| numa::choose(&near, self.cpus.as_deref(), &self.allowed_cpus));
        let Some(cpus) = chosen else { return };
        match process::pin_to(&cpus) {
            Ok(()) => tracing::info!(rank = self.rank, ?cpus, "runs near its GPU"),
            Err(error) => tracing::warn!(rank = self.rank, %error, "runs anywhere"),
        }
    }

    fn work<P: Platform>(
        &self,
        platform: &P,
        assignment: Assignment,
        tasks: &thread_mpsc::Receiver<Task>,
    ) -> Result<(), WorkerError> {
        let mut model = self.load(platform, assignment)?;
        match tasks.recv() {
            Ok(Task::AllocateKv(num_blocks)) => self.allocate_kv(platform, &mut model, num_blocks)?,
            _ => return Ok(()),
        }
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

    /// Loads the weights, with a KV cache that is just large enough to find out what is left for it.
    fn load<P: Platform>(
        &self,
        platform: &P,
        mut assignment: Assignment,
    ) -> Result<LoadedModel<P::Backend>, WorkerError> {
        let started = Instant::now();
        let backend = platform.backend(&assignment).map_err(loader::LoadError::from)?;
        assignment.limits.num_blocks = profile::num_blocks(&assignment);
        let mut model = loader::load(backend, assignment, &mut self.progress())?;
        let taken_bytes = self.taken_bytes(platform, &mut model)?;
        let loaded = v1::WeightsLoaded {
            weight_bytes: model.weight_bytes,
            fingerprint: model.fingerprint.to_vec(),
            model_path: model.path.to_string_lossy().into_owned(),
            taken_bytes,
        };
        tracing::info!(rank = self.rank, weight_bytes = loaded.weight_bytes, taken_bytes, elapsed = ?started.elapsed(), "weights loaded");
        self.report(Report::Event(Event::WeightsLoaded(loaded)));
        Ok(model)
    }

    /// What weights and the largest step take of the device's own memory, if it has any.
    fn taken_bytes<P: Platform>(
        &self,
        platform: &P,
        model: &mut LoadedModel<P::Backend>,
    ) -> Result<Option<u64>, WorkerError> {
        if platform
            .free_bytes(&model.backend)
            .map_err(RunError::from)?
            .is_none()
        {
            return Ok(None);
        }
        let free = profile::of_largest_step(model, |backend| platform.free_bytes(backend));
        let free = free.map_err(WorkerError::Profile)?;
        // The small KV cache that the step was run with will be replaced.
        let taken = |free| {
            self.free_bytes
                .saturating_sub(free)
                .saturating_sub(model.kv_bytes)
        };
        Ok(free.map(taken))
    }

    fn allocate_kv<P: Platform>(
        &self,
        platform: &P,
        model: &mut LoadedModel<P::Backend>,
        num_blocks: u32,
    ) -> Result<(), WorkerError> {
        check_num_blocks(model.assignment.block_size as u32, num_blocks)?;
        loader::allocate_kv(model, num_blocks, &mut self.progress())
            .map_err(|source| WorkerError::AllocateKv { num_blocks, source })?;
        let loaded = v1::Loaded {
            weight_bytes: model.weight_bytes,
            kv_bytes: model.kv_bytes,
            rss_bytes: process::resident_bytes(),
        };
        tracing::info!(rank = self.rank, ?loaded, "loaded");
        self.offer_group_id(platform, &model.assignment)?;
        self.report(Report::Event(Event::Loaded(loaded)));
        Ok(())
    }

    /// Reports progress, not too often.
    fn progress(&self) -> impl FnMut(LoadProgress) {
        let mut last: Option<Instant> = None;
        move |progress: LoadProgress| {
            let due = last.is_none_or(|last| last.elapsed() >= PROGRESS_INTERVAL);
            if due || progress.bytes_done == progress.bytes_total {
                last = Some(Instant::now());
                self.report(Report::Event(Event::Progress(v1::Progress {
                    phase: progress.phase.into(),
                    bytes_done: progress.bytes_done,
                    bytes_total: progress.bytes_total,
                })));
            }
        }
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
        runner.record(trace::of(runner.assignment().trace.as_ref(), self.rank as usize));
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

/// What a trace says of a step.
fn size_of(plan: &StepPlan) -> [(&'static str, u64); 3] {
    let tokens: usize = plan.rows.iter().map(|row| row.token_ids.len()).sum();
    [
        ("step", plan.step),
        ("rows", plan.rows.len() as u64),
        ("tokens", tokens as u64),
    ]
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
        let waited_from = self.runner.trace().start();
        let (plan, arrived) = self.port.borrow_mut().next_plan(read)?;
        let plan = plan.map_err(RunError::DecodePlan)?;
        if let Some(start) = waited_from {
            self.runner.trace().end("idle", start, [("", 0); 3]);
        }
        self.check(&plan)?;
        let masks = || {
            let masks = self
                .port
                .borrow_mut()
                .next_plan(|bytes| decode_masks(bytes, &limits))?;
            masks.map_err(RunError::DecodeMasks)
        };
        let started = self.runner.trace().start();
        let mut output = self.runner.execute(&plan, masks)?;
        if let Some(start) = started {
            self.runner.trace().end("step", start, size_of(&plan));
            self.runner.trace().end_step();
        }
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
