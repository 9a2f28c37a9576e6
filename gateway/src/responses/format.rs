//! What the text of an answer must look like.

use phalanx_proto::RpcError;
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};

use super::request::in_own_terms;
use crate::openai::{body::Object, unoffered};

#[derive(Debug, Deserialize)]
pub(super) struct Text {
    format: Option<Object<Format>>,
}

#[derive(Debug, Deserialize)]
struct Format {
    r#type: Option<String>,
    name: Option<String>,
    description: Option<String>,
    schema: Option<Box<RawValue>>,
    strict: Option<bool>,
}

/// `response_format` of a chat.
#[derive(Serialize)]
struct ChatFormat<'a> {
    response_format: Spelled<'a>,
}

#[derive(Serialize)]
struct Spelled<'a> {
    r#type: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    json_schema: Option<JsonSchema<'a>>,
}

#[derive(Serialize)]
struct JsonSchema<'a> {
    name: Option<&'a str>,
    description: Option<&'a str>,
    schema: Option<&'a RawValue>,
    strict: Option<bool>,
}

impl Text {
    /// Restricts the answer as the same `response_format` of a chat does.
    ///
    /// # Errors
    /// `InvalidArgument` naming `text.format` or a field of it.
    pub(super) fn restrict(&self) -> Result<(), RpcError> {
        const TYPE: &str = "text.format.type";
        let Some(Object(format)) = &self.format else {
            return Ok(());
        };
        let kind = format.r#type.as_deref();
        let kind = kind.filter(|kind| ["text", "json_object", "json_schema"].contains(kind));
        let Some(kind) = kind else {
            let message = format!("{TYPE} must be text, json_object or json_schema");
            return Err(RpcError::invalid(TYPE, message));
        };
        let json_schema = (kind == "json_schema").then_some(JsonSchema {
            name: format.name.as_deref(),
            description: format.description.as_deref(),
            schema: format.schema.as_deref(),
            strict: format.strict,
        });
        let spelled = Spelled {
            r#type: kind,
            json_schema,
        };
        let chat = to_raw_value(&ChatFormat {
            response_format: spelled,
        });
        let chat = chat.map_err(|error| RpcError::invalid("text.format", error.to_string()))?;
        unoffered::refuse_for_chat(chat.get().as_bytes()).map_err(in_own_terms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn restrict(format: &str) -> Result<(), RpcError> {
        let text: Text = serde_json::from_str(&format!(r#"{{"format": {format}}}"#)).expect(format);
        text.restrict()
    }

    #[test]
    fn text_may_be_any_and_json_is_refused_as_in_chats() {
        for any in ["null", r#"{"type": "text"}"#] {
            assert_eq!(restrict(any), Ok(()));
        }
        for (format, param) in [
            (r#"{"type": "xml"}"#, "text.format.type"),
            (r#"{}"#, "text.format.type"),
            (r#"{"type": "json_object"}"#, "text.format"),
            (
                r#"{"type": "json_schema", "name": "a", "schema": {}}"#,
                "text.format",
            ),
        ] {
            let error = restrict(format).expect_err(format);
            assert_eq!(error.param.as_deref(), Some(param), "{error}");
            assert!(!error.message.contains("response_format"), "{error}");
        }
    }
}
