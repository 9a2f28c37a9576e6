//! The coordinator: engine, executor, cluster membership, text and the gRPC services.
#![forbid(unsafe_code)]

pub mod api;
pub mod cluster;
pub mod config;
pub mod control_plane;
mod coordinator;
pub mod deployment;
pub mod engine;
pub mod engine_thread;
pub mod executor;
pub mod kv_events;
pub mod metrics;
mod server_info;
pub mod text;

pub use coordinator::{Coordinator, CoordinatorError};
