//! Distributed traces: a request's place in its caller's trace, and spans on their way to a collector.

mod context;
mod exporter;

use std::{borrow::Cow, time::SystemTime};

pub use context::{TRACEPARENT, TraceContext};
pub use exporter::{Tracer, TracerError};

/// Something that took a while.
#[derive(Clone, Debug)]
pub struct Span {
    pub name: Cow<'static, str>,
    /// Whether it answers a call from outside the process.
    pub is_server: bool,
    pub context: TraceContext,
    /// The span it is a part of.
    pub parent: Option<[u8; 8]>,
    pub start: SystemTime,
    pub end: SystemTime,
    pub attributes: Vec<(&'static str, Value)>,
    /// Why it failed, if it did.
    pub error: Option<String>,
}

/// What an attribute may be.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Text(String),
    Integer(i64),
    Number(f64),
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<u32> for Value {
    fn from(count: u32) -> Self {
        Self::Integer(count.into())
    }
}

impl From<f64> for Value {
    fn from(number: f64) -> Self {
        Self::Number(number)
    }
}
