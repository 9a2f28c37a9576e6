//! The rank group seen as one device.

mod paced;
mod shm;
mod traced;

pub use paced::PacedExecutor;
pub use shm::ShmExecutor;
pub use traced::TracedExecutor;
