//! A rank's whole life, from the coordinator's side of a real stream and a real segment.

mod support;

use std::{path::Path, pin::Pin, sync::Arc, time::Duration};

use phalanx_model::{TensorParallelOptions, TensorParallelStyle};
use phalanx_proto::{
    step::{StepOutput, decode_output, encode_plan},
    v1::{
        self, WorkerCommand, WorkerEvent,
        cluster_server::{Cluster, ClusterServer},
        worker_command::Command,
        worker_event::Event,
    },
};
use phalanx_shm::{EnginePort, Segment, ShmError, Wait};
use phalanx_worker::{WorkerConfig, WorkerError, step_limits};
use support::*;
use tokio::{net::UnixListener, sync::mpsc, task::JoinHandle, time::timeout};
use tokio_stream::{
    Stream,
    wrappers::{ReceiverStream, UnixListenerStream},
};
use tonic::{Request, Response, Status, Streaming, transport::Server};

/// Generous: the machine may be busy, and a failing test should fail and not hang.
const LIMIT: Duration = Duration::from_secs(120);
/// What the worker promises when it is told to go.
const PROMPT: Duration = Duration::from_secs(5);

type Commands = Pin<Box<dyn Stream<Item = Result<WorkerCommand, Status>> + Send>>;

/// One attached rank, as the coordinator holds it.
struct Attached {
    commands: mpsc::Sender<Result<WorkerCommand, Status>>,
    events: Streaming<WorkerEvent>,
}

impl Attached {
    async fn order(&self, command: Command) {
        let command = WorkerCommand {
            command: Some(command),
        };
        self.commands.send(Ok(command)).await.expect("the worker listens");
    }

    /// The next event that is not progress; the progress before it.
    async fn event(&mut self) -> (Option<Event>, Vec<v1::Progress>) {
        let mut progress = Vec::new();
        loop {
            let event = timeout(LIMIT, self.events.message())
                .await
                .expect("an event in time")
                .unwrap_or(None);
            match event.and_then(|event| event.event) {
                Some(Event::Progress(at)) => progress.push(at),
                event => return (event, progress),
            }
        }
    }
}

struct Coordinator {
    attached: mpsc::Sender<Attached>,
}

#[tonic::async_trait]
impl Cluster for Coordinator {
    type AttachStream = Commands;

    async fn attach(&self, request: Request<Streaming<WorkerEvent>>) -> Result<Response<Commands>, Status> {
        let (commands, queue) = mpsc::channel(8);
        let events = request.into_inner();
        self.attached
            .send(Attached { commands, events })
            .await
            .map_err(|_| Status::unavailable("over"))?;
        Ok(Response::new(Box::pin(ReceiverStream::new(queue))))
    }
}

/// A listening coordinator, a worker that dials it, and the stream between them.
struct Scene {
    worker: JoinHandle<Result<(), WorkerError>>,
    attached: Attached,
    dir: tempfile::TempDir,
}

impl Scene {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("coordinator.sock");
        let config = WorkerConfig::new(format!("unix:{}", path.display()), 0, "secret");
        // The worker dials first: it must try again.
        let worker = tokio::spawn(phalanx_worker::serve(config));
        tokio::task::yield_now().await;
        let (sender, mut waiting) = mpsc::channel(1);
        let listener = UnixListenerStream::new(UnixListener::bind(path).unwrap());
        let service = ClusterServer::new(Coordinator { attached: sender });
        tokio::spawn(
            Server::builder()
                .add_service(service)
                .serve_with_incoming(listener),
        );
        let attached = timeout(LIMIT, waiting.recv()).await.unwrap().unwrap();
        Self {
            worker,
            attached,
            dir,
        }
    }

    /// Takes the rank through `Hello` and loading.
    async fn loaded(&mut self) -> v1::Assign {
        let (hello, _) = self.attached.event().await;
        let Some(Event::Hello(hello)) = hello else {
            panic!("{hello:?}")
        };
        assert_eq!(
            (hello.rank, hello.join_token.as_str(), hello.pid),
            (0, "secret", std::process::id())
        );
        let options = TensorParallelOptions::equal(1, TensorParallelStyle::Gather);
        let assign = assign(&demo_model(), 0, &options);
        self.attached.order(Command::Assign(assign.clone())).await;
        let (weights, progress) = self.attached.event().await;
        let Some(Event::WeightsLoaded(weights)) = weights else {
            panic!("{weights:?}")
        };
        assert_eq!((weights.fingerprint.len(), weights.taken_bytes), (32, None));
        assert_eq!(weights.model_path, assign.model_path);
        let kv = v1::AllocateKv {
            num_blocks: assign.num_blocks,
        };
        self.attached.order(Command::AllocateKv(kv)).await;
        let (loaded, allocating) = self.attached.event().await;
        assert!(allocating.iter().all(|at| at.phase() == v1::Phase::AllocatingKv));
        assert_eq!(allocating.first().map(|at| at.bytes_done), Some(0));
        let Some(Event::Loaded(loaded)) = loaded else {
            panic!("{loaded:?}")
        };
        assert!(
            loaded.weight_bytes > 80 << 20 && loaded.rss_bytes > loaded.weight_bytes / 2,
            "{loaded:?}"
        );
        let last = progress.last().unwrap();
        assert!(
            last.bytes_total > 90 << 20 && last.bytes_done == last.bytes_total,
            "{last:?}"
        );
        assert!(
            progress
                .windows(2)
                .all(|pair| pair[0].bytes_done <= pair[1].bytes_done)
        );
        assign
    }

    /// Makes a group of `epoch` and waits until the rank is in.
    async fn group(&mut self, epoch: u32) -> EnginePort {
        let segment = Arc::new(Segment::create(self.dir.path(), "test", group_shape(1, epoch)).unwrap());
        let port = EnginePort::join(Arc::clone(&segment), Wait::default()).unwrap();
        self.attached
            .order(Command::JoinGroup(v1::JoinGroup {
                epoch,
                segment_path: segment.path().to_str().unwrap().to_owned(),
                nccl_unique_id: Vec::new(),
            }))
            .await;
        let (joined, _) = self.attached.event().await;
        assert_eq!(joined, Some(Event::GroupJoined(v1::GroupJoined { epoch })));
        port
    }

    /// The worker is over, soon and well.
    async fn ends(self) -> Result<(), WorkerError> {
        timeout(PROMPT, self.worker)
            .await
            .expect("the worker ends promptly")
            .unwrap()
    }
}

/// Runs one step through the rings.
fn run_step(port: &mut EnginePort, assign: &v1::Assign, plan: phalanx_proto::step::StepPlan) -> StepOutput {
    let encode = |slot: &mut [u8]| Ok::<_, ShmError>(encode_plan(&plan, slot).unwrap());
    port.publish_plan(LIMIT, encode).unwrap();
    let limits = step_limits(assign).unwrap();
    port.wait_output(LIMIT, |bytes| decode_output(bytes, &limits))
        .unwrap()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rank_serves_two_epochs_with_the_same_weights() {
    let mut scene = Scene::start().await;
    let assign = scene.loaded().await;
    let prompt = tokens("The capital of France is");
    let mut tokens_of_epochs = Vec::new();
    for epoch in [1, 2] {
        // The second group replaces the first, in which the rank waits for work.
        let mut port = scene.group(epoch).await;
        let assign = assign.clone();
        let mut plan = plan(10, vec![row(3, 0, &prompt, true)]);
        plan.epoch = epoch;
        let step = tokio::task::spawn_blocking(move || run_step(&mut port, &assign, plan));
        let output = timeout(LIMIT, step).await.unwrap().unwrap();
        assert_eq!((output.epoch, output.step), (epoch, 10));
        assert!(output.forward_us > 0 && output.sampled[0].finite);
        tokens_of_epochs.push(output.sampled[0].token);
    }
    assert_eq!(tokens_of_epochs[0], tokens_of_epochs[1]);
    scene.attached.order(Command::Shutdown(v1::Shutdown {})).await;
    scene.ends().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_the_stream_ends_a_rank_that_waits_for_work() {
    let mut scene = Scene::start().await;
    scene.loaded().await;
    let port = scene.group(1).await;
    let Scene {
        worker,
        attached,
        dir,
    } = scene;
    drop(attached);
    timeout(PROMPT, worker).await.expect("promptly").unwrap().unwrap();
    assert!(port.segment().abort_reason().is_some(), "the group knows");
    drop(dir);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_of_another_epoch_is_a_failure_that_is_told() {
    let mut scene = Scene::start().await;
    let assign = scene.loaded().await;
    let mut port = scene.group(7).await;
    let late = plan(1, vec![row(0, 0, &[1, 2, 3], true)]);
    let encode = move |slot: &mut [u8]| Ok::<_, ShmError>(encode_plan(&late, slot).unwrap());
    let limits = step_limits(&assign).unwrap();
    let refused = tokio::task::spawn_blocking(move || {
        port.publish_plan(LIMIT, encode).unwrap();
        port.wait_output(LIMIT, |bytes| decode_output(bytes, &limits).map(drop))
            .map(drop)
    });
    let error = timeout(LIMIT, refused).await.unwrap().unwrap().unwrap_err();
    assert!(matches!(error, ShmError::Aborted { .. }), "{error}");
    let (failure, _) = scene.attached.event().await;
    let Some(Event::Failure(failure)) = failure else {
        panic!("{failure:?}")
    };
    assert_eq!(failure.message, "step: plan of epoch 1, the group's is 7");
    let error = scene.ends().await.unwrap_err();
    assert!(matches!(error, WorkerError::Run(_)), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_assignment_that_makes_no_sense_is_refused_by_name() {
    let mut scene = Scene::start().await;
    let _ = scene.attached.event().await;
    let options = TensorParallelOptions::equal(1, TensorParallelStyle::Gather);
    let mut assign = assign(&demo_model(), 0, &options);
    assign.block_size = 0;
    scene.attached.order(Command::Assign(assign)).await;
    let (failure, _) = scene.attached.event().await;
    let Some(Event::Failure(failure)) = failure else {
        panic!("{failure:?}")
    };
    assert_eq!(failure.phase(), v1::Phase::Starting);
    assert!(failure.message.contains("block_size is 0"), "{}", failure.message);
    assert!(matches!(scene.ends().await, Err(WorkerError::Assignment(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_model_is_a_failure_of_loading() {
    let mut scene = Scene::start().await;
    let _ = scene.attached.event().await;
    let options = TensorParallelOptions::equal(1, TensorParallelStyle::Gather);
    let mut assign = assign(&demo_model(), 0, &options);
    let absent = Path::new(&assign.model_path).with_file_name("absent.gguf");
    assign.model_path = absent.to_str().unwrap().to_owned();
    scene.attached.order(Command::Assign(assign)).await;
    let (failure, _) = scene.attached.event().await;
    let Some(Event::Failure(failure)) = failure else {
        panic!("{failure:?}")
    };
    assert_eq!(failure.phase(), v1::Phase::LoadingWeights);
    assert!(failure.message.contains("absent.gguf"), "{}", failure.message);
    assert!(matches!(scene.ends().await, Err(WorkerError::Load(_))));
}
