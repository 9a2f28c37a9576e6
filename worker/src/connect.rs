//! The way to the coordinator.

use std::time::Duration;

use hyper_util::rt::TokioIo;
use phalanx_proto::tls::ClientTlsFiles;
use tokio::{net::UnixStream, time::Instant};
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

use crate::error::WorkerError;

/// How long one attempt may take.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(5);
/// Waits between attempts: doubled from the first to the longest.
const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(2);
/// A connection that does not answer a ping for so long is dead; pings are sent as often.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// Connects to `http://host:port`, `https://host:port` or `unix:/path`, trying again until `limit` has passed: in a cluster ranks and
/// coordinator start in any order.
///
/// # Errors
/// [`WorkerError::BadAddress`] at once, [`WorkerError::Unreachable`] with the last attempt's error after `limit`.
pub(crate) async fn connect(
    address: &str,
    tls: Option<&ClientTlsFiles>,
    limit: Duration,
) -> Result<Channel, WorkerError> {
    let deadline = Instant::now() + limit;
    let mut wait = FIRST_WAIT;
    loop {
        let source = match attempt(address, tls).await {
            Ok(channel) => return Ok(channel),
            Err(ConnectError::Address(message)) => {
                return Err(WorkerError::BadAddress {
                    address: address.to_owned(),
                    message,
                });
            }
            Err(ConnectError::Transport(source)) => source,
        };
        if Instant::now() + wait > deadline {
            return Err(WorkerError::Unreachable {
                address: address.to_owned(),
                limit,
                source,
            });
        }
        if wait == FIRST_WAIT {
            tracing::warn!(address, error = %source, ?limit, "coordinator not reachable yet, trying again");
        } else {
            tracing::debug!(address, error = %source, "coordinator not reachable yet");
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}

enum ConnectError {
    Address(String),
    Transport(tonic::transport::Error),
}

impl From<tonic::transport::Error> for ConnectError {
    fn from(error: tonic::transport::Error) -> Self {
        Self::Transport(error)
    }
}

async fn attempt(address: &str, tls: Option<&ClientTlsFiles>) -> Result<Channel, ConnectError> {
    if let Some(path) = address.strip_prefix("unix:") {
        // The authority means nothing on a socket, but HTTP/2 wants one.
        let endpoint = limits(Endpoint::from_static("http://coordinator"));
        let path = path.trim_start_matches("//").to_owned();
        let connector = service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        return Ok(endpoint.connect_with_connector(connector).await?);
    }
    let endpoint = Endpoint::from_shared(address.to_owned());
    let endpoint = endpoint.map_err(|error| ConnectError::Address(error.to_string()))?;
    let endpoint = match (address.split_once("://"), tls) {
        (Some(("http", _)), _) => endpoint,
        (Some(("https", _)), Some(files)) => {
            let tls = files
                .load()
                .map_err(|error| ConnectError::Address(error.to_string()))?;
            endpoint.tls_config(tls)?
        }
        (Some(("https", _)), None) => {
            return Err(ConnectError::Address(
                "https needs the authorities of the coordinator's certificate".to_owned(),
            ));
        }
        _ => {
            return Err(ConnectError::Address(
                "expected http://host:port, https://host:port or unix:/path".to_owned(),
            ));
        }
    };
    Ok(limits(endpoint).connect().await?)
}

fn limits(endpoint: Endpoint) -> Endpoint {
    endpoint
        .connect_timeout(ATTEMPT_LIMIT)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn other_schemes_are_refused_at_once() {
        let error = connect("ftp://example", None, Duration::from_secs(60))
            .await
            .unwrap_err();
        assert!(matches!(error, WorkerError::BadAddress { .. }), "{error}");
    }

    #[tokio::test]
    async fn an_absent_coordinator_is_given_up_after_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let address = format!("unix:{}", dir.path().join("no-such-socket").display());
        let error = connect(&address, None, Duration::from_millis(200))
            .await
            .unwrap_err();
        assert!(matches!(error, WorkerError::Unreachable { .. }), "{error}");
    }
}
