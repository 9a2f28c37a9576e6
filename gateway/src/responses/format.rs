//! What the text of an answer must look like.

use phalanx_proto::{RpcError, v1::SamplingParams};
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};

use super::request::in_own_terms;
use crate::openai::{body::Object, structured};

const FORMAT: &str = "text.format";
const SCHEMA: &str = "text.format.schema";

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
    /// `InvalidArgument` naming `text.format` or a field of it: not offered, or one constraint too many.
    pub(super) fn restrict(&self, sampling: &mut SamplingParams) -> Result<(), RpcError> {
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
        let is_schema = kind == "json_schema";
        let json_schema = is_schema.then_some(JsonSchema {
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
        let chat = chat.map_err(|error| RpcError::invalid(FORMAT, error.to_string()))?;
        let mut restricted = SamplingParams::default();
        structured::restrict(chat.get().as_bytes(), &mut restricted).map_err(in_own_terms)?;
        let Some(mut constraint) = restricted.structured_outputs else {
            return Ok(());
        };
        if let Some(first) = &sampling.structured_outputs {
            let message = format!(
                "only one constraint can be given, not {} and {FORMAT} together",
                first.param
            );
            return Err(RpcError::invalid(FORMAT, message));
        }
        // What the coordinator finds wrong with it is told by this name.
        constraint.param = if is_schema { SCHEMA } else { FORMAT }.to_owned();
        sampling.structured_outputs = Some(constraint);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use phalanx_proto::v1::structured_outputs::Constraint;

    use super::*;

    fn restrict(format: &str, sampling: &mut SamplingParams) -> Result<(), RpcError> {
        let text: Text = serde_json::from_str(&format!(r#"{{"format": {format}}}"#)).expect(format);
        text.restrict(sampling)
    }

    #[test]
    fn formats_are_those_of_chats() {
        let restricted = |format: &str| {
            let mut sampling = SamplingParams::default();
            restrict(format, &mut sampling).expect(format);
            let structured = sampling.structured_outputs;
            structured.map(|structured| (structured.param, structured.constraint.expect("one")))
        };
        for any in ["null", r#"{"type": "text"}"#] {
            assert_eq!(restricted(any), None);
        }
        assert_eq!(
            restricted(r#"{"type": "json_object"}"#),
            Some((FORMAT.to_owned(), Constraint::JsonObject(true)))
        );
        assert_eq!(
            restricted(
                r#"{"type": "json_schema", "name": "a", "strict": true, "schema": {"type": "object"}}"#
            ),
            Some((
                SCHEMA.to_owned(),
                Constraint::JsonSchema(r#"{"type": "object"}"#.to_owned())
            ))
        );
    }

    #[test]
    fn refusals_name_the_format() {
        for (format, param) in [
            (r#"{"type": "xml"}"#, "text.format.type"),
            (r#"{}"#, "text.format.type"),
            (r#"{"type": "json_schema", "name": "a"}"#, "text.format.schema"),
        ] {
            let error = restrict(format, &mut SamplingParams::default()).expect_err(format);
            assert_eq!(error.param.as_deref(), Some(param), "{error}");
            assert!(!error.message.contains("response_format"), "{error}");
        }
        let mut sampling = SamplingParams::default();
        restrict(r#"{"type": "json_object"}"#, &mut sampling).expect("the first");
        let error = restrict(r#"{"type": "json_object"}"#, &mut sampling).expect_err("one too many");
        assert_eq!(error.param.as_deref(), Some(FORMAT));
    }
}
