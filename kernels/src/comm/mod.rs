//! [`Communicator`]s that need no device library.

mod shm;
mod solo;

pub use shm::{ShmCommunicator, arena_bytes};
pub use solo::Solo;
