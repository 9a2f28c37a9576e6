//! Who asks, and until when.

use std::time::Duration;

use phalanx_proto::{ErrorKind, RpcError, secret, spans::TraceContext};
use tokio::time::{Instant, timeout_at};
use tonic::{Request, metadata::MetadataMap};

use super::observe::parent_of;
use crate::engine::TenantId;

/// A later deadline is none: timers have an end, too.
const LATEST: Duration = Duration::from_secs(30 * 86_400);

/// What the key check found out about a caller. Without it, as over a stranger's transport, nobody is trusted.
#[derive(Clone, Debug, Default)]
pub(super) struct Credentials {
    /// Of the key that was presented.
    pub(super) tenant: Option<String>,
    /// It is the gateway's, which has checked its callers' keys and says who they are.
    pub(super) speaks_for_others: bool,
}

/// The fields of a request that say something about the caller.
pub(super) struct Claims<'a> {
    pub(super) tenant: &'a str,
    pub(super) timeout_ms: Option<u64>,
}

/// The author of one request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Caller {
    pub(super) tenant: TenantId,
    pub(super) deadline: Option<Deadline>,
    /// The caller's span.
    pub(super) parent: Option<TraceContext>,
}

impl Caller {
    /// Of a request that has just arrived.
    ///
    /// # Errors
    /// A timeout of zero.
    pub(super) fn of<T>(request: &Request<T>, claims: Claims<'_>) -> Result<Self, RpcError> {
        let credentials = request.extensions().get::<Credentials>().cloned();
        let Credentials {
            tenant,
            speaks_for_others,
        } = credentials.unwrap_or_default();
        let claimed = (speaks_for_others && !claims.tenant.is_empty()).then_some(claims.tenant);
        let name = claimed.or(tenant.as_deref());
        Ok(Self {
            tenant: TenantId(name.map_or(0, secret::fingerprint)),
            deadline: Deadline::of(request.metadata(), claims.timeout_ms)?,
            parent: parent_of(request.metadata()),
        })
    }

    /// What comes of `work`, unless the deadline passes first.
    pub(super) async fn in_time<T>(
        &self,
        work: impl Future<Output = Result<T, RpcError>>,
    ) -> Result<T, RpcError> {
        match self.deadline {
            None => work.await,
            Some(deadline) => timeout_at(deadline.at, work)
                .await
                .unwrap_or_else(|_| Err(deadline.error())),
        }
    }
}

/// When a request must have ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline {
    pub(super) at: Instant,
    limit: Duration,
}

impl Deadline {
    /// The earlier one of the call's own (`grpc-timeout`) and the request's.
    fn of(metadata: &MetadataMap, timeout_ms: Option<u64>) -> Result<Option<Self>, RpcError> {
        if timeout_ms == Some(0) {
            return Err(RpcError::invalid(
                "timeout",
                "timeout must be more than 0 seconds.",
            ));
        }
        let of_call = metadata.get("grpc-timeout").and_then(|value| value.to_str().ok());
        let limits = [of_call.and_then(parse), timeout_ms.map(Duration::from_millis)];
        let limit = limits.into_iter().flatten().min().filter(|&limit| limit < LATEST);
        Ok(limit.map(|limit| Self {
            at: Instant::now() + limit,
            limit,
        }))
    }

    pub(super) fn error(&self) -> RpcError {
        let message = format!("the request was not finished within its {:?}", self.limit);
        RpcError::new(ErrorKind::DeadlineExceeded, message)
    }
}

/// At most 8 digits and a unit (gRPC over HTTP/2). What is malformed is no deadline, as for tonic, which reads it for
/// calls without a stream.
fn parse(timeout: &str) -> Option<Duration> {
    let (digits, unit) = timeout.split_at_checked(timeout.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(credentials: Option<Credentials>, tenant: &str) -> TenantId {
        let mut request = Request::new(());
        if let Some(credentials) = credentials {
            request.extensions_mut().insert(credentials);
        }
        let claims = Claims {
            tenant,
            timeout_ms: None,
        };
        Caller::of(&request, claims).expect("no timeout").tenant
    }

    #[test]
    fn only_the_gateway_says_who_somebody_else_is() {
        let key = |speaks_for_others| {
            Some(Credentials {
                tenant: Some("mine".to_owned()),
                speaks_for_others,
            })
        };
        let (mine, other) = (
            TenantId(secret::fingerprint("mine")),
            TenantId(secret::fingerprint("other")),
        );
        assert_eq!(
            (caller(key(false), "other"), caller(key(true), "other")),
            (mine, other)
        );
        assert_eq!(caller(key(true), ""), mine);
        assert_eq!(caller(None, "other"), TenantId(0));
    }

    #[test]
    fn the_earlier_deadline_counts() {
        let limit = |grpc: Option<&str>, timeout_ms| {
            let mut metadata = MetadataMap::new();
            if let Some(grpc) = grpc {
                metadata.insert("grpc-timeout", grpc.parse().expect("ascii"));
            }
            let deadline = Deadline::of(&metadata, timeout_ms).expect("more than 0");
            deadline.map(|deadline| deadline.limit.as_millis())
        };
        assert_eq!(limit(None, None), None);
        assert_eq!(limit(Some("2S"), None), Some(2000));
        assert_eq!(limit(Some("2S"), Some(300)), Some(300));
        assert_eq!(limit(Some("100m"), Some(300)), Some(100));
        assert_eq!(limit(None, Some(u64::MAX)), None, "no deadline at all");
        for malformed in ["", "S", "2", "123456789S", "+2S", "2s"] {
            assert_eq!(limit(Some(malformed), None), None, "{malformed:?}");
        }
        let zero = Deadline::of(&MetadataMap::new(), Some(0)).expect_err("refused");
        assert_eq!(zero.param.as_deref(), Some("timeout"));
    }
}
