//! Where the server is.

use http::{HeaderMap, HeaderValue, Uri, header, uri::PathAndQuery};

/// A server's address and what every request to it carries.
#[derive(Clone, Debug)]
pub struct Endpoint {
    host: String,
    port: u16,
    /// Before every route; without the slash at its end.
    prefix: String,
    headers: HeaderMap,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    #[error("--base-url {url}: {reason}")]
    Url { url: String, reason: String },
    #[error("the API key cannot be sent in a header")]
    Key,
}

impl Endpoint {
    /// `url` is `http://host[:port][/prefix]`; `api_key` is sent as a bearer token.
    ///
    /// # Errors
    /// A URL that is none or wants TLS, a key that does not fit a header.
    pub fn new(url: &str, api_key: Option<&str>) -> Result<Self, EndpointError> {
        let wrong = |reason: String| EndpointError::Url {
            url: url.to_owned(),
            reason,
        };
        let uri: Uri = url.parse().map_err(|error| wrong(format!("{error}")))?;
        if uri.scheme_str() != Some("http") {
            return Err(wrong("only http:// is spoken".into()));
        }
        let host = uri.host().ok_or_else(|| wrong("no host".into()))?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let port = uri.port_u16().unwrap_or(80);
        let name = if host.contains(':') {
            format!("[{host}]:{port}")
        } else {
            format!("{host}:{port}")
        };
        let mut headers = HeaderMap::new();
        let name = HeaderValue::try_from(name).map_err(|error| wrong(format!("{error}")))?;
        headers.insert(header::HOST, name);
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(key) = api_key {
            let mut value = HeaderValue::try_from(format!("Bearer {key}")).map_err(|_| EndpointError::Key)?;
            value.set_sensitive(true);
            headers.insert(header::AUTHORIZATION, value);
        }
        let prefix = uri.path_and_query().map_or("", PathAndQuery::path);
        Ok(Self {
            host: host.to_owned(),
            port,
            prefix: prefix.trim_end_matches('/').to_owned(),
            headers,
        })
    }

    pub(crate) fn address(&self) -> (&str, u16) {
        (&self.host, self.port)
    }

    pub(crate) fn path(&self, route: &str) -> String {
        format!("{}{route}", self.prefix)
    }

    pub(crate) fn headers(&self) -> &HeaderMap {
        &self.headers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_apart() {
        let endpoint = Endpoint::new("http://[::1]:8000/base/", Some("k")).unwrap();
        assert_eq!(endpoint.address(), ("::1", 8000));
        assert_eq!(endpoint.path("/v1/completions"), "/base/v1/completions");
        assert_eq!(endpoint.headers()[header::HOST], "[::1]:8000");
        assert_eq!(endpoint.headers()[header::AUTHORIZATION], "Bearer k");
        let plain = Endpoint::new("http://example", None).unwrap();
        assert_eq!(
            (plain.address(), plain.path("/x")),
            (("example", 80), "/x".into())
        );
    }

    #[test]
    fn what_cannot_be_asked_is_an_error() {
        for url in ["https://example", "example", "/v1", "http://"] {
            let error = Endpoint::new(url, None).unwrap_err().to_string();
            assert!(error.starts_with("--base-url"), "{url}: {error}");
        }
        assert_eq!(
            Endpoint::new("http://x", Some("a\nb")).unwrap_err(),
            EndpointError::Key
        );
    }
}
