//! Query strings of a few flags, read as vLLM's server reads them.

use http::Uri;
use phalanx_proto::RpcError;

/// The value of `name`, the last one if there are several. Names that nobody asks for are ignored. Nothing is decoded:
/// no name or value here needs an escape.
pub(crate) fn value<'a>(uri: &'a Uri, name: &str) -> Option<&'a str> {
    let pairs = uri.query().unwrap_or_default().split('&');
    let pairs = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs
        .filter(|(key, _)| *key == name)
        .map(|(_, value)| value)
        .next_back()
}

/// A flag. Errors: a value that is neither true nor false.
pub(crate) fn flag(uri: &Uri, name: &str, default: bool) -> Result<bool, RpcError> {
    let Some(value) = value(uri, name) else {
        return Ok(default);
    };
    match value.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" | "t" | "y" => Ok(true),
        "false" | "0" | "no" | "off" | "f" | "n" => Ok(false),
        _ => Err(RpcError::invalid(name, format!("{name} must be true or false"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_read_as_pydantic_reads_them() {
        let uri = |query: &str| format!("/pause?{query}").parse::<Uri>().expect("a URI");
        let read = |query: &str| flag(&uri(query), "wait", false);
        for yes in [
            "wait=true",
            "wait=True",
            "wait=1",
            "x=2&wait=on",
            "wait=0&wait=yes",
        ] {
            assert_eq!(read(yes), Ok(true), "{yes}");
        }
        for no in ["", "wait=false", "waiting=true", "wait=1&wait=0"] {
            assert_eq!(read(no), Ok(false), "{no}");
        }
        for bad in ["wait", "wait=", "wait=2", "wait=%31"] {
            assert_eq!(read(bad).expect_err(bad).param.as_deref(), Some("wait"));
        }
        assert_eq!(value(&"/pause".parse().expect("a URI"), "wait"), None);
    }
}
