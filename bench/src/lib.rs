//! Measures a server from outside, as its clients see it: any server that streams OpenAI completions.
//!
//! [`Workload`] says what is asked and when, [`run`] asks it, [`Report`] says how long it took.
#![forbid(unsafe_code)]

mod client;
mod endpoint;
mod report;
mod run;
mod sse;
mod workload;

pub use client::{Failure, Outcome, Sample};
pub use endpoint::{Endpoint, EndpointError};
pub use report::{Distribution, Report};
pub use run::{Progress, Run, run};
pub use workload::{Api, Arrivals, Workload, WorkloadError};
