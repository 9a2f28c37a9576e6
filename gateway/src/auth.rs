//! API keys. Everything but the probes and the metrics needs one when any is configured, unknown routes included.

use std::{fmt, hint::black_box, sync::Arc};

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use http::{HeaderValue, header};
use phalanx_proto::{ErrorKind, RpcError};

use crate::{config::GatewayError, openai::error::ApiError};

/// Routes that answer without a key: what a kubelet and a metrics scraper ask.
const OPEN_ROUTES: [&str; 3] = ["/health", "/ping", "/metrics"];

/// The keys a client may present as `Authorization: Bearer <key>`. Never printed.
#[derive(Clone, Default)]
pub struct ApiKeys(Arc<[String]>);

impl ApiKeys {
    /// Takes the keys as configured.
    ///
    /// # Errors
    /// [`GatewayError::EmptyApiKey`] for an empty key: a variable that was not set must not open the door.
    pub fn new(keys: impl IntoIterator<Item = String>) -> Result<Self, GatewayError> {
        let keys: Vec<String> = keys.into_iter().collect();
        match keys.iter().position(String::is_empty) {
            Some(index) => Err(GatewayError::EmptyApiKey { position: index + 1 }),
            None => Ok(Self(keys.into())),
        }
    }

    fn admits(&self, authorization: Option<&HeaderValue>) -> bool {
        let given = authorization
            .and_then(|value| bearer(value.as_bytes()))
            .unwrap_or_default();
        // Every key is compared, whether or not an earlier one matched.
        self.0
            .iter()
            .fold(false, |found, key| found | same(key.as_bytes(), given))
    }
}

impl fmt::Debug for ApiKeys {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "ApiKeys({} hidden)", self.0.len())
    }
}

/// The token of a `Bearer` authorization; the scheme is case-insensitive (RFC 9110, 11.1).
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked(7)?;
    scheme
        .eq_ignore_ascii_case(b"bearer ")
        .then(|| token.trim_ascii())
}

/// Compares in a time that depends on the length of `given` alone, which its sender knows.
fn same(key: &[u8], given: &[u8]) -> bool {
    let mut difference = u8::from(key.len() != given.len());
    for (index, byte) in given.iter().enumerate() {
        // Keys are not empty (`ApiKeys::new`).
        difference |= black_box(byte ^ key[index % key.len()]);
    }
    difference == 0
}

/// Middleware: 401 unless the route is open or a key fits.
pub(crate) async fn require_key(State(keys): State<ApiKeys>, request: Request, next: Next) -> Response {
    let open = keys.0.is_empty() || OPEN_ROUTES.contains(&request.uri().path());
    if open || keys.admits(request.headers().get(header::AUTHORIZATION)) {
        return next.run(request).await;
    }
    let message = "this server needs an API key: Authorization: Bearer <key>";
    let mut response = ApiError::from(RpcError::new(ErrorKind::Unauthenticated, message)).into_response();
    let challenge = HeaderValue::from_static("Bearer");
    response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admits(keys: &[&str], authorization: &'static str) -> bool {
        let keys = ApiKeys::new(keys.iter().map(ToString::to_string)).expect("no empty key");
        keys.admits(Some(&HeaderValue::from_static(authorization)))
    }

    #[test]
    fn only_a_whole_key_is_admitted() {
        assert!(admits(&["abc", "sesame"], "Bearer sesame"));
        assert!(admits(&["sesame"], "bearer  sesame "));
        for wrong in [
            "Bearer sesam",
            "Bearer sesamesesame",
            "Bearer ",
            "Bearer",
            "sesame",
            "Basic sesame",
            "",
        ] {
            assert!(!admits(&["sesame"], wrong), "{wrong}");
        }
    }

    #[test]
    fn empty_keys_are_refused_and_keys_are_not_printed() {
        let error = ApiKeys::new(["a".to_owned(), String::new()]).expect_err("an empty key");
        assert_eq!(error.to_string(), "API key number 2 is empty");
        let keys = ApiKeys::new(["sesame".to_owned()]).expect("no empty key");
        assert_eq!(format!("{keys:?}"), "ApiKeys(1 hidden)");
    }
}
