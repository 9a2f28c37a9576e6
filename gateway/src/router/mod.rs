//! Replicas of one model behind one gateway: which of them a request goes to, and who takes over when one is lost.
//!
//! A gateway in front of one fixed coordinator hands everything through, as there is nothing to choose. With several, or
//! with a DNS name, every replica's health is watched, requests are spread by a [`RoutingPolicy`], one that has not
//! begun its reply is tried elsewhere, and one that has is resumed elsewhere: the coordinator is sent the same request
//! and the tokens so far. All a stream needs for that is its request and its token ids.

mod affinity;
mod call;
mod config;
mod control;
mod dns;
mod exposition;
mod health;
mod ledger;
mod metrics;
mod migration;
mod policy;
mod pool;
mod replica;

use std::sync::Arc;

use futures_util::future::join_all;
use phalanx_proto::{
    ErrorKind, RpcError,
    v1::{ChatRequest, GenerateRequest, GenerateResponse, ListModelsResponse},
};
use tokio::task::JoinHandle;

pub use self::config::{Backends, RoutingPolicy};
use self::{
    affinity::Affinity, call::Call, migration::Migrating, policy::Chooser, pool::Pool, replica::Running,
};
pub(crate) use self::{
    affinity::{X_SESSION_ID, session},
    metrics::RouterMetrics,
    replica::Overview,
};
use crate::{
    auth::Keys,
    backend::{Backend, Chunks},
    config::GatewayError,
};

/// Replicas that are asked in turn for one request. More would let a request that kills whom it reaches end them all.
const MAX_ATTEMPTS: usize = 3;

/// What the handlers ask: the coordinator, whichever it is. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Replicas {
    shared: Arc<Shared>,
    /// Requests of one session stay together if the policy says so.
    session: Option<u64>,
}

struct Shared {
    pool: Arc<Pool>,
    chooser: Chooser,
    metrics: RouterMetrics,
    resolver: Option<JoinHandle<()>>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(resolver) = &self.resolver {
            resolver.abort();
        }
    }
}

impl Replicas {
    /// Prepares for the configured coordinators and begins to watch them, if there is more than one; connects to none.
    /// Must be called within a Tokio runtime.
    ///
    /// # Errors
    /// What is wrong with an address or the name, or that there is none.
    pub(crate) fn new(
        backends: &Backends,
        keys: &Keys,
        metrics: RouterMetrics,
    ) -> Result<Self, GatewayError> {
        config::check(backends)?;
        let pool = Arc::new(Pool::new(backends, keys, metrics.clone())?);
        let follow = |name: &String| tokio::spawn(dns::follow(name.clone(), Arc::downgrade(&pool)));
        let resolver = backends.dns.as_ref().map(follow);
        Ok(Self {
            shared: Arc::new(Shared {
                pool,
                chooser: Chooser::new(backends.policy),
                metrics,
                resolver,
            }),
            session: None,
        })
    }

    /// The same replicas for requests of one session.
    pub(crate) fn for_session(&self, session: Option<u64>) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            session,
        }
    }

    /// The only coordinator there can be; none for a router.
    pub(crate) fn sole(&self) -> Option<&Backend> {
        self.shared.pool.sole()
    }

    /// Every replica as it is known now.
    pub(crate) fn overview(&self) -> Vec<Overview> {
        self.shared
            .pool
            .list()
            .iter()
            .map(|replica| replica.overview())
            .collect()
    }

    pub(crate) async fn generate(&self, request: GenerateRequest) -> Result<GenerateResponse, RpcError> {
        match self.sole() {
            Some(backend) => backend.generate(request).await,
            None => self.whole(Call::Generate(request)).await,
        }
    }

    pub(crate) async fn generate_stream(&self, request: GenerateRequest) -> Result<Chunks, RpcError> {
        match self.sole() {
            Some(backend) => backend.generate_stream(request).await,
            None => Migrating::start(self.clone(), Call::Generate(request)).await,
        }
    }

    pub(crate) async fn chat(&self, request: ChatRequest) -> Result<GenerateResponse, RpcError> {
        match self.sole() {
            Some(backend) => backend.chat(request).await,
            None => self.whole(Call::Chat(request)).await,
        }
    }

    pub(crate) async fn chat_stream(&self, request: ChatRequest) -> Result<Chunks, RpcError> {
        match self.sole() {
            Some(backend) => backend.chat_stream(request).await,
            None => Migrating::start(self.clone(), Call::Chat(request)).await,
        }
    }

    pub(crate) async fn list_models(&self) -> Result<ListModelsResponse, RpcError> {
        self.anywhere(|backend| async move { backend.list_models().await })
            .await
    }

    /// The coordinators' metrics as one exposition; none if nobody answered.
    pub(crate) async fn metrics(&self) -> Option<String> {
        if let Some(backend) = self.sole() {
            return exposition::of(backend).await;
        }
        let replicas = self.shared.pool.list();
        let texts = join_all(replicas.iter().map(|replica| exposition::of(replica.backend()))).await;
        let answered = replicas.iter().zip(texts);
        let answered = answered.filter_map(|(replica, text)| Some((replica.address(), text?)));
        exposition::merge(answered)
    }

    /// Asks what every replica answers alike, of whichever does.
    ///
    /// # Errors
    /// The last replica's, or that none serves.
    pub(crate) async fn anywhere<T, F, Answer>(&self, ask: F) -> Result<T, RpcError>
    where
        F: Fn(Backend) -> Answer,
        Answer: Future<Output = Result<T, RpcError>>,
    {
        match self.sole() {
            Some(backend) => ask(backend.clone()).await,
            None => {
                let (answer, _) = self.attempt(&Affinity::default(), &mut Vec::new(), ask).await?;
                Ok(answer)
            }
        }
    }

    /// The whole reply at once: nothing has reached the client, so that a lost one is asked for again.
    async fn whole(&self, mut call: Call) -> Result<GenerateResponse, RpcError> {
        call.fix_seed();
        let affinity = self.affinity(&call);
        let ask = |backend| {
            let call = call.clone();
            async move { call.whole(&backend).await }
        };
        let (reply, _) = self.attempt(&affinity, &mut Vec::new(), ask).await?;
        Ok(reply)
    }

    fn affinity(&self, call: &Call) -> Affinity {
        Affinity {
            session: self.session,
            blocks: if self.shared.chooser.wants_blocks() {
                call.blocks()
            } else {
                Vec::new()
            },
        }
    }

    /// Asks one replica after the other, none of those in `avoid`, to which it adds those that failed.
    ///
    /// # Errors
    /// What is the request's own fault; else the last replica's refusal, or that none serves.
    async fn attempt<T, F, Answer>(
        &self,
        affinity: &Affinity,
        avoid: &mut Vec<u64>,
        ask: F,
    ) -> Result<(T, Running), RpcError>
    where
        F: Fn(Backend) -> Answer,
        Answer: Future<Output = Result<T, RpcError>>,
    {
        let Shared { pool, chooser, .. } = &*self.shared;
        let mut refusal = None;
        for _ in 0..MAX_ATTEMPTS {
            let replicas = pool.list();
            let Some(replica) = chooser.choose(&replicas, affinity, avoid) else {
                break;
            };
            if refusal.is_some() {
                self.shared.metrics.retried();
            }
            let running = Running::on(replica);
            match ask(running.replica().backend().clone()).await {
                Ok(answer) => {
                    running.replica().succeeded();
                    return Ok((answer, running));
                }
                Err(error) if error.kind.is_retryable() => {
                    running.replica().failed(&error);
                    avoid.push(running.replica().id());
                    refusal = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        Err(refusal.unwrap_or_else(|| self.none_serves()))
    }

    fn none_serves(&self) -> RpcError {
        let count = self.shared.pool.list().len();
        let message = format!("none of the {count} replicas of the model serves now");
        RpcError::new(ErrorKind::Unavailable, message)
    }
}
