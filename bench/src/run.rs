//! Asking everything of a workload, with a bound on what is in flight.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{sync::Semaphore, task::JoinSet, time};

use crate::{
    Endpoint, Workload,
    client::{self, Failure, Outcome},
};

/// Called whenever a request has ended, with how many have.
pub type Progress<'a> = &'a mut (dyn FnMut(usize) + Send);

/// What came of a workload.
#[derive(Clone, Debug)]
pub struct Run {
    /// From the first request to the end of the last.
    pub duration: Duration,
    /// In the order in which they ended.
    pub outcomes: Vec<Outcome>,
}

/// Asks everything; a request that has not ended after `timeout` is given up.
pub async fn run(endpoint: &Endpoint, workload: &Workload, timeout: Duration, progress: Progress<'_>) -> Run {
    let shared = Arc::new((endpoint.clone(), workload.route()));
    let in_flight = Arc::new(Semaphore::new(workload.max_concurrency));
    let mut requests = JoinSet::new();
    let mut outcomes = Vec::with_capacity(workload.num_prompts);
    let mut collect = |ended: Result<Outcome, tokio::task::JoinError>| {
        outcomes.push(ended.unwrap_or_else(|error| Err(Failure::Stream(error.to_string()))));
        progress(outcomes.len());
    };
    let start = Instant::now();
    for (index, at) in workload.starts().into_iter().enumerate() {
        // Made before its time has come, so that it does not delay the request.
        let body = workload.body(index).to_string().into_bytes();
        time::sleep_until((start + Duration::from_secs_f64(at)).into()).await;
        let Ok(permit) = Arc::clone(&in_flight).acquire_owned().await else {
            unreachable!("the semaphore is never closed");
        };
        let shared = Arc::clone(&shared);
        requests.spawn(async move {
            let (endpoint, route) = &*shared;
            let request = client::stream(endpoint, route, body);
            let outcome = time::timeout(timeout, request).await;
            drop(permit);
            outcome.unwrap_or(Err(Failure::Timeout(timeout)))
        });
        while let Some(ended) = requests.try_join_next() {
            collect(ended);
        }
    }
    while let Some(ended) = requests.join_next().await {
        collect(ended);
    }
    Run {
        duration: start.elapsed(),
        outcomes,
    }
}
