//! The ops. [`Backend`] is the seam between the model's forward pass and a device; [`Communicator`] the one between
//! ranks. `cpu` runs on AVX2 + FMA + F16C where the machine has them, and portably where not.
//!
//! Batch invariance: the order in which an output element is summed depends on its row alone, never on the batch
//! shape, the chunking, the thread count or (in gather style) the number of ranks.

pub mod backend;
pub mod batch;
pub mod candidates;
pub mod comm;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod cpu;
pub mod cuda;
mod e4m3;
pub mod error;
mod fp8;
pub mod int4;
mod noise;
pub mod philox;

pub use backend::{
    Backend, CapturedCollectives, Columns, Communicator, DecodeShape, GatherLayout, GraphCache, Heads,
    KvSpec, Linear, NoGraphs, Norm, Rope, Threshold, WeightSource,
};
pub use batch::BatchInput;
pub use candidates::{
    Candidate, CandidateRequest, Candidates, ChunkStatistics, LogitEdit, Noise, VOCAB_CHUNK,
};
pub use e4m3::E4m3;
pub use error::KernelError;
pub use fp8::Fp8Matrix;

pub type Result<T, E = KernelError> = std::result::Result<T, E>;
