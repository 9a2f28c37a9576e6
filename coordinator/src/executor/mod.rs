//! The rank group seen as one device.

mod shm;
mod traced;

pub use shm::ShmExecutor;
pub use traced::TracedExecutor;
