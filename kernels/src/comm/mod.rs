//! [`Communicator`](crate::Communicator)s.

mod layout;
mod nccl;
mod shm;
mod solo;

pub use nccl::{NcclCommunicator, NcclGroup, StepLayout};
pub use shm::ShmCommunicator;
pub use solo::Solo;
