//! Tools in Anthropic's terms, and in those of the coordinator.

use phalanx_proto::{
    RpcError,
    v1::{self, tool_choice::Mode},
};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::openai::{
    body::{Bounded, Object},
    tools::{self, Signature},
};

/// What the model may call.
#[derive(Debug, Deserialize)]
pub(super) struct Tool {
    name: Option<String>,
    description: Option<String>,
    input_schema: Option<Box<RawValue>>,
    /// `custom`, or one that only Anthropic runs.
    r#type: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct ToolChoice {
    r#type: Option<String>,
    name: Option<String>,
    disable_parallel_tool_use: Option<bool>,
}

/// A JSON array of functions; empty without tools.
///
/// # Errors
/// `InvalidArgument` naming the tool's field at fault.
pub(super) fn to_json<const MAX: usize>(tools: &Bounded<Object<Tool>, MAX>) -> Result<String, RpcError> {
    let functions = tools.0.iter().enumerate().map(|(index, Object(tool))| {
        let refuse = |field: &str, why: &str| {
            let field = format!("tools[{index}].{field}");
            let message = format!("{field} {why}");
            Err(RpcError::invalid(field, message))
        };
        if tool.r#type.as_deref().is_some_and(|kind| kind != "custom") {
            return refuse("type", "must be custom: this server runs no tools");
        }
        match &tool.name {
            Some(name) => Ok(Signature {
                name,
                description: tool.description.as_deref(),
                parameters: tool.input_schema.as_deref(),
                strict: None,
            }),
            None => refuse("name", "is needed"),
        }
    });
    tools::to_json(functions.collect::<Result<_, _>>()?)
}

impl ToolChoice {
    /// The choice, and whether there may be several calls.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field at fault.
    pub(super) fn into_grpc(self) -> Result<(v1::ToolChoice, Option<bool>), RpcError> {
        let refuse = |field: &str, why: &str| {
            let field = format!("tool_choice.{field}");
            let message = format!("{field} {why}");
            Err(RpcError::invalid(field, message))
        };
        let mode = match self.r#type.as_deref() {
            Some("auto") => Mode::Auto,
            Some("any") => Mode::Required,
            Some("tool") if self.name.is_none() => return refuse("name", "is needed"),
            Some("tool") => Mode::Named,
            Some("none") => Mode::None,
            _ => return refuse("type", "must be auto, any, tool or none"),
        };
        let choice = v1::ToolChoice {
            mode: mode.into(),
            function: self.name.filter(|_| mode == Mode::Named).unwrap_or_default(),
        };
        Ok((choice, self.disable_parallel_tool_use.map(|disabled| !disabled)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tools_and_choices_have_their_counterparts() {
        let tools =
            r#"[{"name": "add", "description": "Adds.", "input_schema": {"type": "object"}}, {"name": "b"}]"#;
        let tools: Bounded<Object<Tool>, 2> = serde_json::from_str(tools).expect("valid");
        assert_eq!(
            to_json(&tools).expect("valid"),
            r#"[{"type":"function","function":{"name":"add","description":"Adds.","parameters":{"type": "object"}}},{"type":"function","function":{"name":"b"}}]"#
        );
        let foreign: Bounded<Object<Tool>, 2> =
            serde_json::from_str(r#"[{"name": "web_search", "type": "web_search_20250305"}]"#)
                .expect("valid");
        assert_eq!(
            to_json(&foreign).expect_err("refused").param.as_deref(),
            Some("tools[0].type")
        );
        let choice = |json: &str| {
            serde_json::from_str::<ToolChoice>(json)
                .expect("valid")
                .into_grpc()
        };
        let (named, parallel) =
            choice(r#"{"type": "tool", "name": "add", "disable_parallel_tool_use": true}"#).expect("valid");
        assert_eq!(
            (named.mode(), named.function.as_str(), parallel),
            (Mode::Named, "add", Some(false))
        );
        assert_eq!(
            choice(r#"{"type": "any"}"#).expect("valid").0.mode(),
            Mode::Required
        );
        assert_eq!(
            choice(r#"{"type": "tool"}"#)
                .expect_err("refused")
                .param
                .as_deref(),
            Some("tool_choice.name")
        );
        assert_eq!(
            choice("{}").expect_err("refused").param.as_deref(),
            Some("tool_choice.type")
        );
    }
}
