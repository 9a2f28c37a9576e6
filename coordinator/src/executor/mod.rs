//! The rank group seen as one device.

mod shm;

pub use shm::ShmExecutor;
