//! Tools as Responses write them: a function is not nested in an object of its own.

use phalanx_proto::RpcError;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::openai::{
    body::{Bounded, Object},
    tools::{self, Signature},
};

/// What the model may call.
#[derive(Debug, Deserialize)]
pub(super) struct Tool {
    /// `function`, or one that only OpenAI runs.
    r#type: Option<String>,
    name: Option<String>,
    description: Option<String>,
    parameters: Option<Box<RawValue>>,
    strict: Option<bool>,
}

/// `tools_json` of a chat; empty without tools.
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
        if tool.r#type.as_deref() != Some("function") {
            return refuse("type", "must be function: this server runs no tools of its own");
        }
        match &tool.name {
            Some(name) => Ok(Signature {
                name,
                description: tool.description.as_deref(),
                parameters: tool.parameters.as_deref(),
                strict: tool.strict,
            }),
            None => refuse("name", "is needed"),
        }
    });
    tools::to_json(functions.collect::<Result<_, _>>()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(tools: &str) -> Result<String, RpcError> {
        let tools: Bounded<Object<Tool>, 2> = serde_json::from_str(tools).expect(tools);
        to_json(&tools)
    }

    #[test]
    fn functions_are_nested_and_builtin_tools_refused() {
        assert_eq!(json("[]").as_deref(), Ok(""));
        assert_eq!(
            json(
                r#"[{"type": "function", "name": "add", "description": "Adds.", "strict": true,
                "parameters": {"type": "object"}}, {"type": "function", "name": "b", "parameters": null}]"#
            )
            .as_deref(),
            Ok(
                r#"[{"type":"function","function":{"name":"add","description":"Adds.","parameters":{"type": "object"},"strict":true}},{"type":"function","function":{"name":"b"}}]"#
            )
        );
        for (tools, param) in [
            (r#"[{"type": "web_search"}]"#, "tools[0].type"),
            (
                r#"[{"type": "function", "name": "f"}, {"name": "g"}]"#,
                "tools[1].type",
            ),
            (r#"[{"type": "function"}]"#, "tools[0].name"),
        ] {
            assert_eq!(json(tools).expect_err(tools).param.as_deref(), Some(param));
        }
    }
}
