//! OpenAI's HTTP API in vLLM's dialect, over the coordinator's gRPC.

mod answer;
mod bias;
mod body;
mod caller;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod error;
mod logprobs;
mod messages;
pub(crate) mod models;
pub(crate) mod output;
mod params;
mod prompt;
mod prompt_reply;
mod reply;
mod sse;
mod tools;
mod unoffered;
mod usage;
