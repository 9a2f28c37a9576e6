//! The table of ranks: what each has reported, which failed first, and the group they form.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use phalanx_proto::v1::{self, worker_command::Command};
use phalanx_shm::{AbortReason, Party, Segment};
use tokio::{sync::mpsc, sync::watch, time};

/// Commands waiting for one worker; a handful is sent in a whole life.
pub(super) const COMMAND_QUEUE: usize = 8;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClusterError {
    #[error("{0}")]
    RankFailed(RankFailure),
    #[error("ranks {missing:?} did not {what} within {limit:?}")]
    Timeout {
        what: &'static str,
        missing: Vec<u32>,
        limit: Duration,
    },
    #[error("rank {0} is not attached")]
    NotAttached(u32),
}

/// Why a worker gets no place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("rank is {rank}, the group has {world_size} ranks")]
    NoSuchRank { rank: u32, world_size: usize },
    #[error("rank {0} is attached already")]
    Taken(u32),
}

/// The first thing that went wrong in a group: every later error is a consequence of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rank {rank} failed while {}: {cause}", phase_name(*phase))]
pub struct RankFailure {
    pub rank: u32,
    pub phase: v1::Phase,
    pub cause: String,
}

/// A phase as a participle, for sentences.
pub(super) fn phase_name(phase: v1::Phase) -> &'static str {
    match phase {
        v1::Phase::Unspecified | v1::Phase::Starting => "starting",
        v1::Phase::LoadingWeights => "loading weights",
        v1::Phase::AllocatingKv => "allocating the KV cache",
        v1::Phase::JoiningGroup => "joining the group",
        v1::Phase::WarmingUp => "warming up",
        v1::Phase::Serving => "serving",
    }
}

/// What one rank has reported.
#[derive(Default)]
pub(super) struct Member {
    /// None: not attached, or gone.
    pub(super) commands: Option<mpsc::Sender<v1::WorkerCommand>>,
    pub(super) status: v1::RankStatus,
    /// What it said it would compute on.
    pub(super) device: Option<v1::Device>,
    pub(super) weights: Option<v1::WeightsLoaded>,
    pub(super) loaded: Option<v1::Loaded>,
    pub(super) epoch: Option<u32>,
}

impl Member {
    fn order_kv(&mut self, num_blocks: u32) {
        self.status.phase = v1::Phase::AllocatingKv.into();
        if let Some(commands) = &self.commands {
            // Whoever has gone meanwhile is told by its stream.
            let _ = commands.try_send(command(Command::AllocateKv(v1::AllocateKv { num_blocks })));
        }
    }
}

/// Why a rank cannot work with `peer`, if it has loaded another model.
fn differs_from(loaded: &v1::WeightsLoaded, peer: &Member) -> Option<String> {
    let theirs = peer.weights.as_ref()?;
    if theirs.fingerprint == loaded.fingerprint {
        return None;
    }
    let digits =
        |bytes: &[u8]| -> String { bytes.iter().take(6).map(|byte| format!("{byte:02x}")).collect() };
    Some(format!(
        "{} ({}) is another model than {} ({}) of rank {} on host {:?}: their files' headers differ",
        loaded.model_path,
        digits(&loaded.fingerprint),
        theirs.model_path,
        digits(&theirs.fingerprint),
        peer.status.rank,
        peer.status.host,
    ))
}

struct Table {
    members: Vec<Member>,
    /// In rank order; none before [`Cluster::assign`].
    assigns: Option<Vec<v1::Assign>>,
    /// Of every rank's KV cache; none before [`Cluster::allocate_kv`].
    num_blocks: Option<u32>,
    failure: Option<RankFailure>,
    group: Option<Arc<Segment>>,
    /// Of the next group on GPUs.
    nccl_id: Option<Vec<u8>>,
    /// Set by [`Cluster::shutdown`]: from then on a rank that leaves has not failed.
    closing: bool,
}

impl Table {
    /// The ranks for which `done` does not hold.
    fn missing(&self, done: impl Fn(&Member) -> bool) -> Vec<u32> {
        let missing = self.members.iter().filter(|member| !done(member));
        missing.map(|member| member.status.rank).collect()
    }
}

fn command(command: Command) -> v1::WorkerCommand {
    v1::WorkerCommand {
        command: Some(command),
    }
}

/// Handle to the table; cheap to clone.
#[derive(Clone)]
pub struct Cluster {
    table: Arc<Mutex<Table>>,
    /// Counts changes, so that waiters look again.
    changes: Arc<watch::Sender<u64>>,
    pub(super) join_token: Arc<str>,
}

impl Cluster {
    /// A cluster of so many ranks, which a worker may join with `join_token`.
    pub fn new(world_size: usize, join_token: &str) -> Self {
        let members = (0..world_size as u32).map(|rank| Member {
            status: v1::RankStatus {
                rank,
                phase: v1::Phase::Starting.into(),
                ..Default::default()
            },
            ..Default::default()
        });
        let table = Table {
            members: members.collect(),
            assigns: None,
            num_blocks: None,
            failure: None,
            group: None,
            nccl_id: None,
            closing: false,
        };
        Self {
            table: Arc::new(Mutex::new(table)),
            changes: Arc::new(watch::Sender::new(0)),
            join_token: join_token.into(),
        }
    }

    pub fn world_size(&self) -> usize {
        self.lock().members.len()
    }

    /// What every rank is doing, in rank order.
    pub fn statuses(&self) -> Vec<v1::RankStatus> {
        self.lock()
            .members
            .iter()
            .map(|member| member.status.clone())
            .collect()
    }

    pub fn failure(&self) -> Option<RankFailure> {
        self.lock().failure.clone()
    }

    /// Becomes ready whenever a rank has reported something.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Gives every rank its work, in rank order: those that have attached at once, the others when they do.
    pub fn assign(&self, assigns: Vec<v1::Assign>) {
        self.update(|table| {
            for (member, assign) in table.members.iter().zip(&assigns) {
                if let Some(commands) = &member.commands {
                    // Whoever has gone meanwhile, or is replaced, is told by its stream.
                    let _ = commands.try_send(command(Command::Assign(assign.clone())));
                }
            }
            table.assigns = Some(assigns);
        });
    }

    /// Waits until every rank has attached; returns what they would compute on, in rank order.
    pub async fn wait_attached(&self, limit: Duration) -> Result<Vec<v1::Device>, ClusterError> {
        let attached = |table: &Table| table.missing(|member| member.device.is_some());
        self.wait_until("attach", limit, attached).await?;
        let devices = self
            .lock()
            .members
            .iter()
            .map(|member| member.device.clone().unwrap_or_default())
            .collect();
        Ok(devices)
    }

    /// Waits until every rank holds its weights, all of the same model; returns what they say, in rank order.
    pub async fn wait_weights(&self, limit: Duration) -> Result<Vec<v1::WeightsLoaded>, ClusterError> {
        self.wait_until("load their weights", limit, |table| {
            table.missing(|member| member.weights.is_some())
        })
        .await?;
        let table = self.lock();
        Ok(table
            .members
            .iter()
            .filter_map(|member| member.weights.clone())
            .collect())
    }

    /// Tells every rank how many KV blocks to allocate: those with weights at once, the others when they have them.
    pub fn allocate_kv(&self, num_blocks: u32) {
        self.update(|table| {
            table.num_blocks = Some(num_blocks);
            for member in table.members.iter_mut().filter(|member| member.weights.is_some()) {
                member.order_kv(num_blocks);
            }
        });
    }

    /// Takes down what a rank has loaded. Another model than a peer's is its failure.
    pub(super) fn weights_loaded(&self, rank: u32, loaded: v1::WeightsLoaded) {
        let mut differs = None;
        self.update(|table| {
            let num_blocks = table.num_blocks;
            let peers = table.members.iter().filter(|member| member.status.rank != rank);
            differs = peers.filter_map(|peer| differs_from(&loaded, peer)).next();
            let Some(member) = table.members.get_mut(rank as usize) else {
                return;
            };
            member.weights = Some(loaded);
            if let (Some(num_blocks), None) = (num_blocks, &differs) {
                member.order_kv(num_blocks);
            }
        });
        if let Some(cause) = differs {
            self.fail(rank, Some(v1::Phase::LoadingWeights), cause);
        }
    }

    /// Waits until every rank holds its weights and KV cache.
    pub async fn wait_loaded(&self, limit: Duration) -> Result<(), ClusterError> {
        self.wait_until("load", limit, |table| {
            table.missing(|member| member.loaded.is_some())
        })
        .await
    }

    /// Tells every rank to join the group of `segment`, and waits until all have.
    pub async fn form_group(&self, segment: &Arc<Segment>, limit: Duration) -> Result<(), ClusterError> {
        let epoch = segment.shape().epoch;
        let nccl_unique_id = self.take_nccl_id(limit).await?;
        let join = command(Command::JoinGroup(v1::JoinGroup {
            epoch,
            segment_path: segment.path().to_string_lossy().into_owned(),
            nccl_unique_id,
        }));
        self.lock().group = Some(segment.clone());
        for (rank, commands) in self.command_senders() {
            let sender = commands.ok_or(ClusterError::NotAttached(rank))?;
            sender
                .try_send(join.clone())
                .map_err(|_| ClusterError::NotAttached(rank))?;
        }
        self.wait_until("join the group", limit, |table| {
            table.missing(|member| member.epoch == Some(epoch))
        })
        .await
    }

    /// The identity of the next NCCL clique, which rank 0 makes and which serves one group. Empty where there is none:
    /// on CPUs, and for a rank that is alone.
    async fn take_nccl_id(&self, limit: Duration) -> Result<Vec<u8>, ClusterError> {
        let needed = |table: &Table| {
            let first = table.assigns.as_ref().and_then(|assigns| assigns.first());
            first.is_some_and(|assign| assign.device() == v1::DeviceKind::Cuda && assign.world_size > 1)
        };
        self.wait_until("make an NCCL id", limit, |table| {
            let missing = needed(table) && table.nccl_id.is_none();
            missing.then_some(0).into_iter().collect()
        })
        .await?;
        Ok(self.lock().nccl_id.take().unwrap_or_default())
    }

    /// Keeps what rank 0 has made for the next group.
    pub(super) fn offer_nccl_id(&self, unique_id: Vec<u8>) {
        self.update(|table| table.nccl_id = Some(unique_id));
    }

    /// Marks every rank as serving: the first step has come back from all of them.
    pub fn mark_serving(&self) {
        self.update(|table| {
            for member in &mut table.members {
                member.status.phase = v1::Phase::Serving.into();
            }
        });
    }

    /// Asks every worker to leave. Whoever leaves from now on has not failed.
    pub fn shutdown(&self) {
        self.update(|table| {
            table.closing = true;
            table.group = None;
        });
        let shutdown = command(Command::Shutdown(v1::Shutdown {}));
        for sender in self
            .command_senders()
            .into_iter()
            .filter_map(|(_, sender)| sender)
        {
            // A worker whose queue is full or gone is ended by its stream, or killed.
            let _ = sender.try_send(shutdown.clone());
        }
    }

    /// Records a failure unless one is known already, and releases everybody who waits in the group.
    pub fn fail(&self, rank: u32, phase: Option<v1::Phase>, cause: impl Into<String>) {
        self.update(|table| {
            if table.closing || table.failure.is_some() {
                return;
            }
            let member = table.members.get(rank as usize);
            let reported = member.map_or(v1::Phase::Unspecified, |member| member.status.phase());
            let failure = RankFailure {
                rank,
                phase: phase.unwrap_or(reported),
                cause: cause.into(),
            };
            tracing::error!(
                rank,
                phase = phase_name(failure.phase),
                cause = failure.cause,
                "rank failed"
            );
            table.failure = Some(failure);
            if let Some(segment) = &table.group {
                segment.abort(AbortReason::Lost(Party::Rank(rank)));
            }
        });
    }

    /// Lets everybody go who waits in the group for a rank that is gone. Why it is gone may take a moment to be known.
    pub(super) fn release(&self, rank: u32) {
        if let Some(segment) = &self.lock().group {
            segment.abort(AbortReason::Lost(Party::Rank(rank)));
        }
    }

    /// Changes one rank's entry; false if there is no such rank.
    pub(super) fn update_member(&self, rank: u32, change: impl FnOnce(&mut Member)) -> bool {
        let mut found = false;
        self.update(|table| {
            if let Some(member) = table.members.get_mut(rank as usize) {
                change(member);
                found = true;
            }
        });
        found
    }

    /// Gives a worker its place and, if that is known already, its work.
    pub(super) fn admit(
        &self,
        hello: v1::Hello,
        commands: mpsc::Sender<v1::WorkerCommand>,
    ) -> Result<(), Refusal> {
        let rank = hello.rank;
        let mut result = Ok(());
        self.update(|table| {
            let world_size = table.members.len();
            let Some(member) = table.members.get_mut(rank as usize) else {
                result = Err(Refusal::NoSuchRank { rank, world_size });
                return;
            };
            if member.commands.is_some() {
                result = Err(Refusal::Taken(rank));
                return;
            }
            if let Some(assign) = table
                .assigns
                .as_ref()
                .and_then(|assigns| assigns.get(rank as usize))
            {
                // The queue is empty and its receiver at hand.
                let _ = commands.try_send(command(Command::Assign(assign.clone())));
            }
            member.commands = Some(commands);
            member.status.pid = hello.pid;
            member.status.host = hello.host;
            member.device = Some(hello.device.unwrap_or_default());
        });
        result
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.lock().closing
    }

    fn update(&self, change: impl FnOnce(&mut Table)) {
        change(&mut self.lock());
        self.changes.send_modify(|count| *count += 1);
    }

    fn command_senders(&self) -> Vec<(u32, Option<mpsc::Sender<v1::WorkerCommand>>)> {
        let table = self.lock();
        table
            .members
            .iter()
            .map(|member| (member.status.rank, member.commands.clone()))
            .collect()
    }

    /// Waits until no rank is `missing`.
    async fn wait_until(
        &self,
        what: &'static str,
        limit: Duration,
        missing: impl Fn(&Table) -> Vec<u32>,
    ) -> Result<(), ClusterError> {
        let mut changes = self.subscribe();
        let deadline = time::Instant::now() + limit;
        loop {
            let missing: Vec<u32> = {
                let table = self.lock();
                if let Some(failure) = &table.failure {
                    return Err(ClusterError::RankFailed(failure.clone()));
                }
                missing(&table)
            };
            if missing.is_empty() {
                return Ok(());
            }
            if time::timeout_at(deadline, changes.changed()).await.is_err() {
                return Err(ClusterError::Timeout { what, missing, limit });
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // The table is plain data and every change to it is complete before anything can panic.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
