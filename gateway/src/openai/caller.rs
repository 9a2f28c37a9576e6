//! What the coordinator is told about a request's author: who it is, and how long it waits.

use axum::extract::Request;
use http::HeaderName;
use phalanx_proto::RpcError;

use crate::auth::Tenant;

/// Milliseconds after which the proxy in front of this server gives a request up; Envoy, and the gateways that are built
/// on it, tell it.
const EXPECTED_MS: HeaderName = HeaderName::from_static("x-envoy-expected-rq-timeout-ms");
/// Longest `timeout`, seconds.
const MAX_TIMEOUT: f64 = 86_400.0;

/// Taken from a request before its body is read.
#[derive(Debug, Default)]
pub(crate) struct Caller {
    /// Empty: not known.
    tenant: String,
    expected_ms: Option<u64>,
}

impl Caller {
    pub(crate) fn of(request: &Request) -> Self {
        let tenant = request.extensions().get::<Tenant>();
        let expected = request
            .headers()
            .get(EXPECTED_MS)
            .and_then(|value| value.to_str().ok());
        Self {
            tenant: tenant.map_or_else(String::new, |tenant| tenant.0.to_string()),
            // A proxy's hint, not the client's word: what is no number is passed over, as is Envoy's 0 for no limit.
            expected_ms: expected.and_then(|ms| ms.parse().ok()).filter(|&ms| ms > 0),
        }
    }

    /// Whose request it is; empty: not known.
    pub(crate) fn tenant(&self) -> &str {
        &self.tenant
    }

    /// Fills in the fields of a gRPC request, whose own timeout stays if it is shorter.
    pub(crate) fn sign(&self, tenant: &mut String, timeout_ms: &mut Option<u64>) {
        tenant.clone_from(&self.tenant);
        *timeout_ms = [*timeout_ms, self.expected_ms].into_iter().flatten().min();
    }
}

/// The body's `timeout`, in seconds, as milliseconds.
///
/// # Errors
/// `InvalidArgument` for what is no time to wait.
pub(super) fn timeout_ms(seconds: Option<f64>) -> Result<Option<u64>, RpcError> {
    match seconds {
        None => Ok(None),
        Some(seconds) if seconds > 0.0 && seconds <= MAX_TIMEOUT => {
            Ok(Some((seconds * 1000.0).ceil() as u64))
        }
        Some(seconds) => {
            let message =
                format!("timeout must be more than 0 and at most {MAX_TIMEOUT} seconds, not {seconds}");
            Err(RpcError::invalid("timeout", message))
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn signed(header: Option<&str>, mut timeout_ms: Option<u64>) -> (String, Option<u64>) {
        let mut request = Request::new(Body::empty());
        request.extensions_mut().insert(Tenant("someone".into()));
        if let Some(header) = header {
            let value = header.parse().expect("a header");
            request.headers_mut().insert(EXPECTED_MS, value);
        }
        let mut tenant = "forged".to_owned();
        Caller::of(&request).sign(&mut tenant, &mut timeout_ms);
        (tenant, timeout_ms)
    }

    #[test]
    fn the_shorter_time_counts_and_the_name_is_the_gateways() {
        assert_eq!(signed(None, None), ("someone".to_owned(), None));
        assert_eq!(signed(Some("1500"), None).1, Some(1500));
        assert_eq!(signed(Some("1500"), Some(200)).1, Some(200));
        assert_eq!(signed(Some("1500"), Some(2000)).1, Some(1500));
        for nothing in ["0", "soon", "-1", ""] {
            assert_eq!(signed(Some(nothing), Some(7)).1, Some(7), "{nothing:?}");
        }
    }

    #[test]
    fn a_timeout_is_a_time() {
        assert_eq!(timeout_ms(None), Ok(None));
        assert_eq!(timeout_ms(Some(0.0015)), Ok(Some(2)));
        for wrong in [0.0, -1.0, f64::NAN, 1e9] {
            assert_eq!(
                timeout_ms(Some(wrong)).expect_err("refused").param.as_deref(),
                Some("timeout")
            );
        }
    }
}
