//! The pure engine. Events in, plans and events out: no tokio, no I/O, no clock but [`Clock`], no randomness.
//!
//! [`EngineCore::step`] is the whole of it; `engine_thread` runs it in production, the seeded simulator in `sim` in
//! tests. The coordinator owns every token and all sampling state, the ranks own weights and KV only, so that losing
//! them is no different from preempting every sequence at once.

mod block_hash;
mod block_pool;
mod config;
mod constraint;
mod core;
mod kv_cache_manager;
mod kv_events;
mod ngram;
mod pause;
mod repetition;
mod request;
mod scheduler;
mod sequence;
#[cfg(test)]
pub(crate) mod sim;
mod speculation;
mod types;
mod waiting;

pub use self::core::{EngineCore, EngineFailure, Progress, StepStats};
pub use block_hash::{BlockHash, PrefixHashAlgo};
pub use config::{ConfigError, EngineConfig, SchedulingPolicy};
pub use constraint::{Constraint, ConstraintError, Grammar, GrammarStatus};
pub use kv_events::KvEvent;
pub use ngram::NgramSpeculation;
pub use pause::PauseMode;
pub use repetition::RepetitionDetection;
pub use request::RequestError;
pub use scheduler::Snapshot;
pub use speculation::SpeculationStats;
pub use types::{
    Clock, Command, EngineRequest, Event, Executor, ExecutorError, FinishReason, Instant, SamplingParams,
    StopRules, TenantId,
};
