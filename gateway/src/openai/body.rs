//! Request bodies: read within limits, parsed with the offending field named.

use std::{fmt, marker::PhantomData};

use axum::{body::Body, extract::Request};
use futures_util::StreamExt;
use http::{HeaderMap, header};
use phalanx_proto::{ErrorKind, RpcError};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, Error, MapAccess, SeqAccess, Visitor, value::MapAccessDeserializer},
};
use tokio::time::timeout;

use super::error::ApiError;
use crate::limits::HttpLimits;

/// How much of an oversized body is read and thrown away, as a multiple of the limit. A client that is still sending
/// when the connection closes never reads why.
const DISCARD: usize = 4;

/// Reads a JSON body whole.
///
/// # Errors
/// 408, 413, 415, or 400 for a body that breaks off.
pub(crate) async fn read(request: Request, limits: &HttpLimits) -> Result<Vec<u8>, ApiError> {
    check_content_type(request.headers())?;
    let body = request.into_body();
    timeout(limits.body_timeout, collect(body, limits.body_bytes))
        .await
        .map_err(|_| ApiError::request_timeout())?
}

/// No content type is taken for JSON. Another one is refused: a browser sends `text/plain` and forms to any address
/// from any page, but JSON only after asking.
fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else {
        return Ok(());
    };
    let text = value.to_str().unwrap_or("unreadable");
    let essence = text
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    if essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json")) {
        return Ok(());
    }
    Err(ApiError::unsupported_media_type(text))
}

async fn collect(body: Body, limit: usize) -> Result<Vec<u8>, ApiError> {
    let mut stream = body.into_data_stream();
    let mut bytes = Vec::new();
    let mut total = 0_usize;
    while let Some(piece) = stream.next().await {
        let piece = piece.map_err(|_| RpcError::new(ErrorKind::InvalidArgument, "the body broke off"))?;
        total = total.saturating_add(piece.len());
        if total <= limit {
            bytes.extend_from_slice(&piece);
        } else if total > limit.saturating_mul(DISCARD) {
            break;
        }
    }
    if total > limit {
        let message = format!("the body is larger than {limit} bytes");
        return Err(RpcError::new(ErrorKind::PayloadTooLarge, message).into());
    }
    Ok(bytes)
}

/// Parses the fields of `T` and ignores the others.
///
/// # Errors
/// `InvalidArgument` with the position of a syntax error, or with the path of a field of the wrong type.
pub(crate) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, RpcError> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let parsed = serde_path_to_error::deserialize::<_, Object<T>>(&mut json);
    let Object(value) = parsed.map_err(|error| refuse(&error))?;
    json.end().map_err(|error| not_json(&error))?;
    Ok(value)
}

fn refuse(error: &serde_path_to_error::Error<serde_json::Error>) -> RpcError {
    if !error.inner().is_data() {
        return not_json(error.inner());
    }
    match error.path().to_string() {
        path if path == "." => {
            RpcError::new(ErrorKind::InvalidArgument, format!("the body: {}", error.inner()))
        }
        path => {
            let message = format!("{path}: {}", error.inner());
            RpcError::invalid(path, message)
        }
    }
}

fn not_json(error: &serde_json::Error) -> RpcError {
    RpcError::new(
        ErrorKind::InvalidArgument,
        format!("the body is not valid JSON: {error}"),
    )
}

/// A struct from a JSON object only; serde's derive takes an array of the fields' values as well.
#[derive(Debug)]
pub(crate) struct Object<T>(pub(crate) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ObjectVisitor(PhantomData)).map(Self)
    }
}

struct ObjectVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for ObjectVisitor<T> {
    type Value = T;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map))
    }
}

/// A list of at most `MAX` items, refused at the first one more: a body of `{},{},{}...` must not become a hundred
/// times its size in memory before it is counted.
#[derive(Debug)]
pub(crate) struct Bounded<T, const MAX: usize>(pub(crate) Vec<T>);

impl<T, const MAX: usize> Default for Bounded<T, MAX> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for Bounded<T, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(BoundedVisitor(PhantomData))
    }
}

struct BoundedVisitor<T, const MAX: usize>(PhantomData<T>);

impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for BoundedVisitor<T, MAX> {
    type Value = Bounded<T, MAX>;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            if list.len() == MAX {
                return Err(A::Error::custom(format_args!("more than {MAX} items")));
            }
            list.push(item);
        }
        Ok(Bounded(list))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    struct Inner {
        #[serde(default)]
        text: String,
    }

    #[derive(Debug, Deserialize)]
    struct Outer {
        n: Option<u32>,
        inner: Option<Bounded<Object<Inner>, 2>>,
    }

    #[test]
    fn errors_name_the_field_or_the_position() {
        for (body, param, part) in [
            (
                r#"{"n": -1}"#,
                Some("n"),
                "invalid value: integer `-1`, expected u32",
            ),
            (
                r#"{"inner": [{}, {"text": 1}]}"#,
                Some("inner[1].text"),
                "invalid type: integer `1`",
            ),
            (r#"{"inner": [["x"]]}"#, Some("inner[0]"), "expected an object"),
            (r#"{"inner": [{}, {}, {}]}"#, Some("inner"), "more than 2 items"),
            ("[]", None, "the body: invalid type: sequence, expected an object"),
            ("\"hello\"", None, "expected an object"),
            ("42", None, "expected an object"),
            ("null", None, "expected an object"),
            (
                "",
                None,
                "not valid JSON: EOF while parsing a value at line 1 column 0",
            ),
            (
                r#"{"n": 1"#,
                None,
                "EOF while parsing an object at line 1 column 7",
            ),
            (r#"{"n": 1} x"#, None, "trailing characters at line 1 column 10"),
            (r#"{"n": 1, "n": 2}"#, None, "duplicate field `n`"),
        ] {
            let error = parse::<Outer>(body.as_bytes()).expect_err(body);
            assert_eq!(error.param.as_deref(), param, "{body}: {error}");
            assert!(error.message.contains(part), "{body}: {error}");
        }
    }

    #[test]
    fn unknown_fields_are_ignored() {
        let outer: Outer =
            parse(br#"{"n": 2, "inner": [{"text": "a", "x": 1}], "y": {"z": []}}"#).expect("valid");
        assert_eq!(outer.n, Some(2));
        assert_eq!(outer.inner.expect("given").0[0].0.text, "a");
    }
}
