//! What can go wrong in a kernel or a collective.

#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("out of memory: {requested} bytes requested for {what}, {free} free")]
    OutOfMemory {
        what: &'static str,
        requested: usize,
        free: usize,
    },
    #[error("{op}: {message}")]
    Shape { op: &'static str, message: String },
    #[error("{op}: {message}")]
    Device { op: &'static str, message: String },
    /// Memory would be allocated or uploaded, or the device waited for, while a step is captured in a graph.
    #[error("{op}: not while a step is captured: a graph repeats only what the device does by itself")]
    Capture { op: &'static str },
    /// A peer is dead, hung or told the group to stop. The group's epoch is over.
    #[error("collective failed: {0}")]
    Collective(String),
}

/// An error of shape unless `ok`.
pub(crate) fn check(op: &'static str, ok: bool, message: impl FnOnce() -> String) -> Result<(), KernelError> {
    if ok {
        Ok(())
    } else {
        Err(KernelError::Shape {
            op,
            message: message(),
        })
    }
}
