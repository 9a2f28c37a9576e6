//! `Cluster.Attach`: one stream per worker, whose life is the worker's life.

use std::{pin::Pin, time::Duration};

use phalanx_proto::{
    ErrorKind, PROTOCOL_VERSION, RpcError, secret,
    v1::{self, cluster_server, worker_event::Event},
};
use tokio::{sync::mpsc, time};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use super::members::{COMMAND_QUEUE, Cluster};

/// A worker that has connected says who it is within this time.
const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// A stream that ended may be followed by a better explanation: the launcher's exit status, which comes when the kernel
/// has taken down all of the process's memory.
const EXPLANATION_GRACE: Duration = Duration::from_millis(400);

/// `NCCL_UNIQUE_ID_BYTES`.
const NCCL_ID_BYTES: usize = 128;

type Commands = Pin<Box<dyn Stream<Item = Result<v1::WorkerCommand, Status>> + Send>>;

/// The gRPC service that workers attach to.
pub struct AttachService(pub Cluster);

#[tonic::async_trait]
impl cluster_server::Cluster for AttachService {
    type AttachStream = Commands;

    async fn attach(
        &self,
        request: Request<Streaming<v1::WorkerEvent>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut events = request.into_inner();
        let first = time::timeout(HELLO_LIMIT, events.message()).await;
        let first =
            first.map_err(|_| RpcError::new(ErrorKind::DeadlineExceeded, "no hello within 5 s"))??;
        let Some(v1::WorkerEvent {
            event: Some(Event::Hello(hello)),
        }) = first
        else {
            return Err(RpcError::invalid("event", "the first event must be hello").into());
        };
        let (rank, commands) = admit(&self.0, hello)?;
        tokio::spawn(listen(self.0.clone(), rank, events));
        Ok(Response::new(Box::pin(ReceiverStream::new(commands).map(Ok))))
    }
}

/// Checks a worker's credentials and gives it its place and its work.
fn admit(cluster: &Cluster, hello: v1::Hello) -> Result<(u32, mpsc::Receiver<v1::WorkerCommand>), RpcError> {
    if !secret::same(cluster.join_token.as_bytes(), hello.join_token.as_bytes()) {
        return Err(RpcError::new(ErrorKind::Unauthenticated, "wrong join token").with_param("join_token"));
    }
    if hello.protocol_version != PROTOCOL_VERSION {
        let message = format!(
            "worker speaks protocol {}, this coordinator {PROTOCOL_VERSION}",
            hello.protocol_version
        );
        return Err(RpcError::invalid("protocol_version", message));
    }
    let (rank, pid, host) = (hello.rank, hello.pid, hello.host.clone());
    let device = hello
        .device
        .as_ref()
        .map_or("", |device| device.name.as_str())
        .to_owned();
    let (sender, receiver) = mpsc::channel(COMMAND_QUEUE);
    cluster
        .admit(hello, sender)
        .map_err(|refusal| RpcError::invalid("rank", refusal.to_string()))?;
    tracing::info!(rank, pid, host, device, "worker attached");
    Ok((rank, receiver))
}

/// Follows a worker's events until its stream ends, which is the end of the worker.
async fn listen(cluster: Cluster, rank: u32, mut events: Streaming<v1::WorkerEvent>) {
    let end = loop {
        match events.message().await {
            Ok(Some(v1::WorkerEvent { event: Some(event) })) => record(&cluster, rank, event),
            Ok(Some(_)) => tracing::warn!(rank, "unknown worker event ignored"),
            Ok(None) => break "its stream ended".to_owned(),
            Err(status) => break format!("its stream broke: {}", status.message()),
        }
    };
    cluster.release(rank);
    let mut changes = cluster.subscribe();
    let explained = async {
        while !cluster.is_closing() && cluster.failure().is_none() && changes.changed().await.is_ok() {}
    };
    let _ = time::timeout(EXPLANATION_GRACE, explained).await;
    cluster.fail(rank, None, end);
    cluster.update_member(rank, |member| member.commands = None);
}

fn record(cluster: &Cluster, rank: u32, event: Event) {
    match event {
        Event::Hello(_) => tracing::warn!(rank, "second hello ignored"),
        Event::Failure(failure) => cluster.fail(rank, Some(failure.phase()), failure.message),
        Event::Progress(progress) => {
            cluster.update_member(rank, |member| {
                member.status.phase = progress.phase;
                member.status.bytes_done = progress.bytes_done;
                member.status.bytes_total = progress.bytes_total;
            });
        }
        Event::WeightsLoaded(loaded) => {
            let (weights, taken) = (loaded.weight_bytes, loaded.taken_bytes);
            tracing::info!(rank, weights, taken, "weights loaded");
            cluster.weights_loaded(rank, loaded);
        }
        Event::Loaded(loaded) => {
            let (weights, kv, rss) = (loaded.weight_bytes, loaded.kv_bytes, loaded.rss_bytes);
            tracing::info!(rank, weights, kv, rss, "rank loaded");
            cluster.update_member(rank, |member| {
                member.status.phase = v1::Phase::JoiningGroup.into();
                member.status.rss_bytes = rss;
                member.loaded = Some(loaded);
            });
        }
        Event::NcclId(id) if rank == 0 && id.unique_id.len() == NCCL_ID_BYTES => {
            cluster.offer_nccl_id(id.unique_id);
        }
        Event::NcclId(id) => {
            let length = id.unique_id.len();
            cluster.fail(
                rank,
                None,
                format!("it sent an NCCL id of {length} bytes; rank 0 sends {NCCL_ID_BYTES}"),
            );
        }
        Event::GroupJoined(joined) => {
            cluster.update_member(rank, |member| {
                member.status.phase = v1::Phase::WarmingUp.into();
                member.epoch = Some(joined.epoch);
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use phalanx_proto::v1::worker_command::Command;

    use super::*;

    fn hello() -> v1::Hello {
        v1::Hello {
            protocol_version: PROTOCOL_VERSION,
            join_token: "secret".into(),
            rank: 1,
            ..Default::default()
        }
    }

    fn assigns(device: v1::DeviceKind) -> Vec<v1::Assign> {
        let assign = |rank| v1::Assign {
            rank,
            world_size: 2,
            device: device.into(),
            ..Default::default()
        };
        vec![assign(0), assign(1)]
    }

    fn cluster() -> Cluster {
        let cluster = Cluster::new(2, "secret");
        cluster.assign(assigns(v1::DeviceKind::Cpu));
        cluster
    }

    #[tokio::test]
    async fn work_that_depends_on_the_devices_follows_the_last_hello() {
        let cluster = Cluster::new(2, "secret");
        let device = |name: &str| v1::Device {
            name: name.into(),
            ..Default::default()
        };
        let greet = |rank, name| {
            let hello = v1::Hello {
                rank,
                device: Some(device(name)),
                ..hello()
            };
            admit(&cluster, hello).expect("the place is free").1
        };
        let mut first = greet(1, "b");
        assert!(first.try_recv().is_err());
        let limit = Duration::from_millis(1);
        let missing = cluster.wait_attached(limit).await.unwrap_err();
        assert_eq!(missing.to_string(), "ranks [0] did not attach within 1ms");
        let mut second = greet(0, "a");
        assert_eq!(
            cluster.wait_attached(limit).await,
            Ok(vec![device("a"), device("b")])
        );
        cluster.assign(assigns(v1::DeviceKind::Cuda));
        for (rank, commands) in [(1, &mut first), (0, &mut second)] {
            let command = commands.try_recv().expect("work").command;
            assert!(matches!(command, Some(Command::Assign(assign)) if assign.rank == rank));
        }
    }

    #[tokio::test]
    async fn the_nccl_id_of_rank_0_serves_one_group() {
        let dir = tempfile::tempdir().expect("a directory");
        let shape = phalanx_shm::GroupShape {
            world_size: 2,
            epoch: 1,
            plan_slots: 1,
            plan_slot_bytes: 64,
            output_slots: 1,
            output_slot_bytes: 64,
            message_bytes: 64,
            arena_bytes: 0,
        };
        let segment = phalanx_shm::Segment::create(dir.path(), "test", shape).expect("a segment");
        let segment = std::sync::Arc::new(segment);
        let cluster = Cluster::new(2, "secret");
        cluster.assign(assigns(v1::DeviceKind::Cuda));
        let mut queues =
            [0, 1].map(|rank| admit(&cluster, v1::Hello { rank, ..hello() }).expect("a place").1);
        let limit = Duration::from_millis(1);
        let early = cluster.form_group(&segment, limit).await.unwrap_err();
        assert_eq!(early.to_string(), "ranks [0] did not make an NCCL id within 1ms");
        let unique_id = vec![7; NCCL_ID_BYTES];
        record(
            &cluster,
            0,
            Event::NcclId(v1::NcclId {
                unique_id: unique_id.clone(),
            }),
        );
        // Nobody answers here, but both are asked.
        assert!(cluster.form_group(&segment, limit).await.is_err());
        for queue in &mut queues {
            let _assign = queue.try_recv().expect("work");
            let command = queue.try_recv().expect("a group").command;
            assert!(matches!(command, Some(Command::JoinGroup(join)) if join.nccl_unique_id == unique_id));
        }
        let again = cluster.form_group(&segment, limit).await.unwrap_err();
        assert!(again.to_string().contains("NCCL id"), "{again}");
        record(&cluster, 1, Event::NcclId(v1::NcclId { unique_id }));
        assert_eq!(cluster.failure().map(|failure| failure.rank), Some(1));
    }

    #[test]
    fn a_place_is_given_once_and_only_with_the_token() {
        let cluster = cluster();
        let refused = |hello| admit(&cluster, hello).unwrap_err();
        assert_eq!(
            refused(v1::Hello {
                join_token: "secreT".into(),
                ..hello()
            })
            .kind,
            ErrorKind::Unauthenticated
        );
        assert_eq!(
            refused(v1::Hello {
                join_token: String::new(),
                ..hello()
            })
            .kind,
            ErrorKind::Unauthenticated
        );
        assert_eq!(
            refused(v1::Hello { rank: 2, ..hello() }).param.as_deref(),
            Some("rank")
        );
        assert_eq!(
            refused(v1::Hello {
                protocol_version: 99,
                ..hello()
            })
            .param
            .as_deref(),
            Some("protocol_version")
        );
        let (rank, mut commands) = admit(&cluster, hello()).expect("the place is free");
        assert_eq!(rank, 1);
        let Some(Command::Assign(assign)) = commands.try_recv().expect("work comes at once").command else {
            panic!("the first command must be assign");
        };
        assert_eq!((assign.rank, assign.world_size), (1, 2));
        assert_eq!(refused(hello()).message, "rank 1 is attached already");
    }

    #[test]
    fn of_many_who_want_a_place_one_gets_it() {
        let cluster = cluster();
        let admitted = std::thread::scope(|scope| {
            let all: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| admit(&cluster, hello()).ok()))
                .collect();
            let all = all.into_iter().map(|one| one.join().expect("no panic"));
            all.flatten().count()
        });
        assert_eq!(admitted, 1);
    }

    #[test]
    fn kv_is_allocated_by_ranks_with_the_same_weights() {
        let cluster = cluster();
        let mut queues =
            [0, 1].map(|rank| admit(&cluster, v1::Hello { rank, ..hello() }).expect("a place").1);
        let load = |rank, fingerprint: u8| {
            let loaded = v1::WeightsLoaded {
                fingerprint: vec![fingerprint; 32],
                model_path: format!("/models/{fingerprint}"),
                ..Default::default()
            };
            record(&cluster, rank, Event::WeightsLoaded(loaded));
        };
        load(0, 7);
        cluster.allocate_kv(99);
        let mut ordered = |rank: usize| {
            let commands = std::iter::from_fn(|| queues[rank].try_recv().ok());
            let mut commands = commands.filter_map(|command| command.command);
            commands.any(|command| matches!(command, Command::AllocateKv(kv) if kv.num_blocks == 99))
        };
        assert!(ordered(0) && !ordered(1));
        assert_eq!(cluster.statuses()[0].phase(), v1::Phase::AllocatingKv);
        // As a rank that comes later, whatever the reason.
        load(1, 7);
        assert!(ordered(1));
        load(1, 8);
        let failure = cluster.failure().expect("another model").to_string();
        assert!(
            failure.starts_with(
                "rank 1 failed while loading weights: /models/8 (080808080808) is another model"
            ) && failure.contains("/models/7 (070707070707) of rank 0"),
            "{failure}"
        );
    }

    #[test]
    fn the_first_failure_is_kept_with_its_phase() {
        let cluster = cluster();
        record(
            &cluster,
            1,
            Event::Progress(v1::Progress {
                phase: v1::Phase::LoadingWeights.into(),
                ..Default::default()
            }),
        );
        cluster.fail(1, None, "killed by signal 9");
        cluster.fail(0, None, "a consequence");
        let failure = cluster.failure().expect("recorded");
        assert_eq!(
            failure.to_string(),
            "rank 1 failed while loading weights: killed by signal 9"
        );
    }

    #[test]
    fn leaving_during_shutdown_is_no_failure() {
        let cluster = cluster();
        cluster.shutdown();
        cluster.fail(0, None, "its stream ended");
        assert_eq!(cluster.failure(), None);
    }
}
