//! OpenAI's HTTP API in vLLM's dialect, over the coordinator's gRPC.

mod bias;
mod body;
mod caller;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod error;
mod logprobs;
mod messages;
pub(crate) mod models;
mod params;
mod prompt;
mod reply;
mod sse;
mod unoffered;
mod usage;
