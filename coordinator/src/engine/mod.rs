//! The pure engine. Events in, plans and events out: no tokio, no I/O, no clock but [`Clock`], no randomness.

mod types;

pub use types::{
    Clock, Command, EngineRequest, Event, Executor, ExecutorError, FinishReason, Instant, SamplingParams,
    StopRules,
};
