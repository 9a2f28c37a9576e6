//! The worker's side of `Cluster.Attach`: one stream whose life is the worker's life.

use std::{
    sync::{Arc, mpsc as thread_mpsc},
    time::Duration,
};

use phalanx_proto::{
    PROTOCOL_VERSION,
    tls::ClientTlsFiles,
    v1::{
        self, WorkerCommand, WorkerEvent, cluster_client::ClusterClient, worker_command::Command,
        worker_event::Event,
    },
};
use phalanx_shm::{GroupShape, Segment};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::{
    assignment::Assignment,
    connect::connect,
    device::DeviceChoice,
    error::{JoinError, WorkerError},
    group::GroupSlot,
    process,
    rank::{self, Invitation, RankContext, Report, Task},
    sampler::MESSAGE_BYTES,
};

/// Commands are small; the largest is an assignment with its shard table.
const MAX_COMMAND_BYTES: usize = 1 << 20;
/// Events that wait for the stream.
const EVENT_QUEUE: usize = 64;
/// How long the last event may take to leave, and the rank's thread to notice that all is over.
const FAREWELL: Duration = Duration::from_millis(500);

/// What a worker is started with.
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// `http://host:port`, `https://host:port` or `unix:/path`.
    pub coordinator: String,
    /// For `https`.
    pub tls: Option<ClientTlsFiles>,
    pub rank: u32,
    /// Shared secret of the cluster.
    pub join_token: String,
    /// What it looks for and offers.
    pub device: DeviceChoice,
    /// CPUs to run on; none: all that the process may use.
    pub cpus: Option<Vec<usize>>,
    /// Die with this process, which must be the parent.
    pub expected_parent: Option<u32>,
    /// Instead of the assignment's number of threads.
    pub threads: Option<usize>,
    /// How long to look for the coordinator before giving up.
    pub connect_limit: Duration,
}

impl WorkerConfig {
    /// With every optional setting off.
    pub fn new(coordinator: impl Into<String>, rank: u32, join_token: impl Into<String>) -> Self {
        Self {
            coordinator: coordinator.into(),
            tls: None,
            rank,
            join_token: join_token.into(),
            device: DeviceChoice::Auto,
            cpus: None,
            expected_parent: None,
            threads: None,
            connect_limit: Duration::from_secs(60),
        }
    }
}

/// Runs one rank as this whole process: ties it to its parent, pins it, makes a panic end it, and serves until the
/// coordinator ends the attach stream or says `Shutdown`, which is success.
///
/// # Errors
/// Whatever ends the rank otherwise; the coordinator has been told where it could be.
pub async fn run(config: WorkerConfig) -> Result<(), WorkerError> {
    if let Some(parent) = config.expected_parent {
        process::die_with_parent(parent)?;
    }
    let allowed_cpus = process::allowed_cpus();
    if let Some(cpus) = &config.cpus {
        process::pin_to(cpus)?;
    }
    let group = Arc::new(GroupSlot::default());
    process::abort_on_panic(Arc::clone(&group), config.rank);
    attach(&config, group, allowed_cpus).await
}

/// [`run`] without what concerns the whole process.
///
/// # Errors
/// As [`run`].
pub async fn serve(config: WorkerConfig) -> Result<(), WorkerError> {
    attach(&config, Arc::new(GroupSlot::default()), process::allowed_cpus()).await
}

/// `allowed_cpus` are those that the process was started with.
async fn attach(
    config: &WorkerConfig,
    group: Arc<GroupSlot>,
    allowed_cpus: Vec<usize>,
) -> Result<(), WorkerError> {
    // Before the coordinator waits for it: starting a driver takes a while.
    let hello = hello(config);
    let free_bytes = hello.device.as_ref().map_or(0, |device| device.free_bytes);
    let channel = connect(&config.coordinator, config.tls.as_ref(), config.connect_limit).await?;
    let mut client = ClusterClient::new(channel).max_decoding_message_size(MAX_COMMAND_BYTES);
    let (events, queue) = mpsc::channel(EVENT_QUEUE);
    // The queue is empty and its receiver at hand.
    let _ = events.try_send(event(Event::Hello(hello)));
    let response = client.attach(ReceiverStream::new(queue)).await;
    let mut commands = response
        .map_err(|status| WorkerError::Refused(Box::new(status)))?
        .into_inner();
    tracing::debug!(rank = config.rank, coordinator = config.coordinator, "attached");
    let (tasks, todo) = thread_mpsc::channel();
    let (reports, heard) = mpsc::channel(EVENT_QUEUE);
    let (ended, end) = oneshot::channel();
    let context = RankContext {
        rank: config.rank,
        cpus: config.cpus.clone(),
        allowed_cpus,
        free_bytes,
        reports,
    };
    rank::spawn(context, todo, ended)?;
    let mut session = Session {
        config,
        group,
        events,
        tasks,
        state: State::Attached,
    };
    let result = session.drive(&mut commands, heard).await;
    session.leave(&result, commands, end).await;
    result
}

fn hello(config: &WorkerConfig) -> v1::Hello {
    v1::Hello {
        protocol_version: PROTOCOL_VERSION,
        join_token: config.join_token.clone(),
        rank: config.rank,
        pid: std::process::id(),
        host: process::host_name(),
        device: Some(config.device.probe(config.rank)),
    }
}

fn event(event: Event) -> WorkerEvent {
    WorkerEvent { event: Some(event) }
}

/// Where the conversation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Attached,
    /// Told what to load.
    Assigned {
        world_size: u32,
    },
    /// Told how large its KV cache is; groups may follow.
    Allocated {
        world_size: u32,
    },
    /// In the group of this epoch, or on the way into it.
    Grouped {
        world_size: u32,
        epoch: u32,
    },
}

struct Session<'a> {
    config: &'a WorkerConfig,
    group: Arc<GroupSlot>,
    events: mpsc::Sender<WorkerEvent>,
    tasks: thread_mpsc::Sender<Task>,
    state: State,
}

impl Session<'_> {
    /// Passes commands to the rank's thread and its reports to the coordinator until either says that it is over.
    async fn drive(
        &mut self,
        commands: &mut Streaming<WorkerCommand>,
        mut reports: mpsc::Receiver<Report>,
    ) -> Result<(), WorkerError> {
        loop {
            tokio::select! {
                command = commands.message() => match command {
                    Ok(Some(WorkerCommand { command: Some(command) })) => {
                        if !self.command(command).await? {
                            return Ok(());
                        }
                    }
                    // A command of a later protocol.
                    Ok(Some(WorkerCommand { command: None })) => {}
                    Ok(None) => return Ok(()),
                    Err(status) => return stream_error(status),
                },
                report = reports.recv() => match report {
                    Some(Report::Event(event)) => self.send(event).await,
                    Some(Report::Failed(error)) => return Err(error),
                    None => return Err(WorkerError::ThreadLost),
                },
            }
        }
    }

    /// False once there is nothing more to do.
    async fn command(&mut self, command: Command) -> Result<bool, WorkerError> {
        match (command, self.state) {
            (Command::Shutdown(_), _) => return Ok(false),
            (Command::Assign(assign), State::Attached) => self.assign(&assign)?,
            (Command::AllocateKv(kv), State::Assigned { world_size }) => {
                self.state = State::Allocated { world_size };
                self.order(Task::AllocateKv(kv.num_blocks))?;
            }
            (Command::JoinGroup(join), State::Allocated { world_size }) => {
                self.join(join, world_size).await?;
            }
            (Command::JoinGroup(join), State::Grouped { world_size, epoch }) if join.epoch > epoch => {
                self.join(join, world_size).await?;
            }
            (Command::Assign(_), _) => return Err(out_of_turn("JoinGroup or Shutdown", "a second Assign")),
            (Command::AllocateKv(_), State::Attached) => return Err(out_of_turn("Assign", "AllocateKv")),
            (Command::AllocateKv(_), _) => {
                return Err(out_of_turn("JoinGroup or Shutdown", "a second AllocateKv"));
            }
            (Command::JoinGroup(_), State::Attached) => return Err(out_of_turn("Assign", "JoinGroup")),
            (Command::JoinGroup(_), State::Assigned { .. }) => {
                return Err(out_of_turn("AllocateKv", "JoinGroup"));
            }
            (Command::JoinGroup(join), State::Grouped { epoch, .. }) => {
                tracing::warn!(
                    epoch,
                    late = join.epoch,
                    "ignored a JoinGroup of an epoch that is over"
                );
            }
        }
        Ok(true)
    }

    fn assign(&mut self, assign: &v1::Assign) -> Result<(), WorkerError> {
        let mut assignment = Assignment::try_from(assign)?;
        if assign.rank != self.config.rank {
            return Err(WorkerError::Protocol {
                expected: "the assignment of this rank",
                found: "another rank's",
            });
        }
        if let Some(threads) = self.config.threads {
            assignment.threads = threads;
        }
        self.state = State::Assigned {
            world_size: assign.world_size,
        };
        self.order(Task::Load(Box::new(assignment)))
    }

    async fn join(&mut self, join: v1::JoinGroup, world_size: u32) -> Result<(), WorkerError> {
        let epoch = join.epoch;
        let failed = |source| WorkerError::Join { epoch, source };
        // Mapping a segment touches all its pages.
        let path = join.segment_path;
        let opened = tokio::task::spawn_blocking(move || Segment::open(path.as_ref())).await;
        let segment = opened.map_err(|_| WorkerError::ThreadLost)?;
        let segment = Arc::new(segment.map_err(|error| failed(JoinError::Segment(error)))?);
        check_shape(segment.shape(), world_size, epoch).map_err(failed)?;
        self.state = State::Grouped { world_size, epoch };
        // Ends the step loop of the last group, whose thread then takes up this task.
        self.group.replace(Arc::clone(&segment));
        self.order(Task::Join(Invitation {
            segment,
            nccl_id: join.nccl_unique_id,
        }))
    }

    fn order(&self, task: Task) -> Result<(), WorkerError> {
        self.tasks.send(task).map_err(|_| WorkerError::ThreadLost)
    }

    async fn send(&self, sent: Event) {
        // An error means that the stream is gone, which the command side reports.
        let _ = self.events.send(event(sent)).await;
    }

    /// Releases the group, and tells the coordinator why if that is not its own wish.
    async fn leave(
        self,
        result: &Result<(), WorkerError>,
        mut commands: Streaming<WorkerCommand>,
        end: oneshot::Receiver<()>,
    ) {
        self.group.close();
        let Self { events, tasks, .. } = self;
        drop(tasks);
        if let Err(error) = result {
            let failure = v1::Failure {
                phase: error.phase().into(),
                message: error.to_string(),
            };
            // The coordinator ends the stream when it has heard this.
            let last_word = async {
                if events.send(event(Event::Failure(failure))).await.is_ok() {
                    drop(events);
                    while let Ok(Some(_)) = commands.message().await {}
                }
            };
            let _ = tokio::time::timeout(FAREWELL, last_word).await;
        }
        // A thread that loads weights does not look up; the process ends without it.
        let _ = tokio::time::timeout(FAREWELL, end).await;
    }
}

fn out_of_turn(expected: &'static str, found: &'static str) -> WorkerError {
    WorkerError::Protocol { expected, found }
}

/// The segment must be the one that was announced, and large enough for what the sampler exchanges.
fn check_shape(shape: &GroupShape, world_size: u32, epoch: u32) -> Result<(), JoinError> {
    let least = MESSAGE_BYTES as u64;
    let fields = [
        ("epoch", u64::from(shape.epoch), u64::from(epoch)),
        ("world_size", shape.world_size.into(), world_size.into()),
        ("message_bytes", shape.message_bytes.min(least), least),
    ];
    match fields.into_iter().find(|(_, found, expected)| found != expected) {
        None => Ok(()),
        Some((field, found, expected)) => Err(JoinError::Shape {
            field,
            found,
            expected,
        }),
    }
}

/// Whether an error of the command stream is the coordinator's verdict, or only its end.
fn stream_error(status: Status) -> Result<(), WorkerError> {
    match status.code() {
        Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Aborted => {
            tracing::info!(status = status.message(), "the attach stream ended");
            Ok(())
        }
        _ => Err(WorkerError::Refused(Box::new(status))),
    }
}
