//! Everything that crosses a process boundary: the gRPC services, the step codec, the error table, and what both sides of
//! a boundary must treat alike: limits, secrets, sockets, traces.
#![forbid(unsafe_code)]

pub mod error;
pub mod limits;
pub mod secret;
pub mod socket;
pub mod spans;
pub mod step;
pub mod tls;
pub mod trace;

/// Generated from `proto/phalanx/v1/*.proto`.
pub mod v1 {
    #![allow(
        unreachable_pub,
        unused_qualifications,
        clippy::all,
        missing_docs,
        reason = "generated"
    )]
    tonic::include_proto!("phalanx.v1");
}

/// Generated from `proto/vllm/*.proto`.
pub mod vllm {
    #![allow(
        unreachable_pub,
        unused_qualifications,
        clippy::all,
        missing_docs,
        reason = "generated"
    )]
    tonic::include_proto!("vllm");
}

/// Generated from `proto/opentelemetry/*.proto`.
pub mod otlp {
    #![allow(
        unreachable_pub,
        unused_qualifications,
        clippy::all,
        missing_docs,
        reason = "generated"
    )]
    tonic::include_proto!("opentelemetry.proto.collector.trace.v1");
}

pub use error::{ErrorKind, RpcError};

/// The encoded `FileDescriptorSet` of every service, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("phalanx_descriptor");

/// Version of `Cluster.Attach` and of the step codec together; both sides must agree.
pub const PROTOCOL_VERSION: u32 = 2;
