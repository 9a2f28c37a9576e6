//! OpenAI's HTTP API in vLLM's dialect, over the coordinator's gRPC.

mod answer;
mod bias;
pub(crate) mod body;
pub(crate) mod caller;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod error;
pub(crate) mod logprobs;
pub(crate) mod messages;
pub(crate) mod models;
pub(crate) mod output;
pub(crate) mod params;
mod prompt;
mod prompt_reply;
pub(crate) mod reply;
pub(crate) mod sse;
pub(crate) mod structured;
pub(crate) mod tools;
pub(crate) mod unoffered;
pub(crate) mod usage;
