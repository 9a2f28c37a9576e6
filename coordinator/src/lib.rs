//! The coordinator: engine, executor, cluster membership, text and the gRPC services.
#![forbid(unsafe_code)]

pub mod engine;
