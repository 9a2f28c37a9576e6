//! The services over a real gRPC server on a unix socket and the real engine; only the ranks are scripted.

mod control;
mod operations;
mod prompts;
mod ranks;
mod requests;
mod resume;
mod server;
mod structured;
#[path = "../support/mod.rs"]
mod support;
mod tokenizer;
mod tools;
