//! `Cluster.Attach`: one stream per worker, whose life is the worker's life.

use std::{pin::Pin, time::Duration};

use phalanx_proto::{
    ErrorKind, PROTOCOL_VERSION, RpcError,
    v1::{self, cluster_server, worker_command::Command, worker_event::Event},
};
use tokio::{sync::mpsc, time};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use super::members::{COMMAND_QUEUE, Cluster};

/// A worker that has connected says who it is within this time.
const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// A stream that ended may be followed by a better explanation: the launcher's exit status.
const EXPLANATION_GRACE: Duration = Duration::from_millis(50);

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
    if !same_token(&hello.join_token, &cluster.join_token) {
        return Err(RpcError::new(ErrorKind::Unauthenticated, "wrong join token").with_param("join_token"));
    }
    if hello.protocol_version != PROTOCOL_VERSION {
        let message = format!(
            "worker speaks protocol {}, this coordinator {PROTOCOL_VERSION}",
            hello.protocol_version
        );
        return Err(RpcError::invalid("protocol_version", message));
    }
    let rank = hello.rank;
    let (assign, free) = cluster.place(rank).ok_or_else(|| {
        RpcError::invalid(
            "rank",
            format!("rank is {rank}, the group has {} ranks", cluster.world_size()),
        )
    })?;
    if !free {
        return Err(RpcError::invalid(
            "rank",
            format!("rank {rank} is attached already"),
        ));
    }
    let (sender, receiver) = mpsc::channel(COMMAND_QUEUE);
    let command = v1::WorkerCommand {
        command: Some(Command::Assign(assign)),
    };
    sender
        .try_send(command)
        .map_err(|_| RpcError::new(ErrorKind::Internal, "the command queue is full"))?;
    tracing::info!(
        rank,
        pid = hello.pid,
        host = hello.host,
        device = hello.device,
        "worker attached"
    );
    cluster.update_member(rank, |member| {
        member.commands = Some(sender);
        member.status.pid = hello.pid;
        member.status.host = hello.host;
    });
    Ok((rank, receiver))
}

/// Compares in a time that depends on the given token's length only.
fn same_token(given: &str, want: &str) -> bool {
    let differing = |i: usize, byte: u8| byte ^ want.as_bytes().get(i).copied().unwrap_or(!byte);
    given.len() == want.len()
        && given
            .bytes()
            .enumerate()
            .fold(0, |all, (i, byte)| all | differing(i, byte))
            == 0
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
    time::sleep(EXPLANATION_GRACE).await;
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
        Event::Loaded(loaded) => {
            let (weights, kv, rss) = (loaded.weight_bytes, loaded.kv_bytes, loaded.rss_bytes);
            tracing::info!(rank, weights, kv, rss, "rank loaded");
            cluster.update_member(rank, |member| {
                member.status.phase = v1::Phase::JoiningGroup.into();
                member.status.rss_bytes = rss;
                member.loaded = Some(loaded);
            });
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
    use super::*;

    fn hello() -> v1::Hello {
        v1::Hello {
            protocol_version: PROTOCOL_VERSION,
            join_token: "secret".into(),
            rank: 1,
            ..Default::default()
        }
    }

    fn cluster() -> Cluster {
        let assign = |rank| v1::Assign {
            rank,
            world_size: 2,
            ..Default::default()
        };
        Cluster::new(vec![assign(0), assign(1)], "secret")
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
