//! Tools: which of them a model may call, and the calls it made.

use phalanx_proto::{
    RpcError,
    v1::{self, tool_choice::Mode},
};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{Error, MapAccess, Visitor, value::MapAccessDeserializer},
};
use serde_json::value::RawValue;

use super::body::Object;

const FUNCTION: &str = "function";

/// A function that the model may call.
#[derive(Serialize)]
pub(crate) struct Signature<'a> {
    pub(crate) name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) description: Option<&'a str>,
    /// A JSON schema.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) parameters: Option<&'a RawValue>,
    /// Whether arguments must follow the schema.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) strict: Option<bool>,
}

/// A tool in the shape of chat completions, which is what templates and the coordinator read.
#[derive(Serialize)]
struct Tool<'a> {
    r#type: &'static str,
    function: Signature<'a>,
}

/// `tools_json` of a request; empty without functions.
///
/// # Errors
/// `InvalidArgument` for what cannot be JSON.
pub(crate) fn to_json(functions: Vec<Signature<'_>>) -> Result<String, RpcError> {
    if functions.is_empty() {
        return Ok(String::new());
    }
    let tools = functions.into_iter().map(|function| Tool {
        r#type: FUNCTION,
        function,
    });
    serde_json::to_string(&tools.collect::<Vec<_>>())
        .map_err(|error| RpcError::invalid("tools", error.to_string()))
}

/// `"none"`, `"auto"`, `"required"`, or `{"type": "function", "function": {"name": ...}}`, which Responses write
/// `{"type": "function", "name": ...}`.
#[derive(Debug)]
pub(crate) struct ToolChoice(pub(crate) v1::ToolChoice);

#[derive(Deserialize)]
struct Named {
    r#type: Option<String>,
    name: Option<String>,
    function: Option<Object<Function>>,
}

#[derive(Deserialize)]
struct Function {
    name: Option<String>,
}

impl<'de> Deserialize<'de> for ToolChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ChoiceVisitor;

        impl<'de> Visitor<'de> for ChoiceVisitor {
            type Value = ToolChoice;

            fn expecting(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                out.write_str(r#""none", "auto", "required", or an object that names a function"#)
            }

            fn visit_str<E: Error>(self, word: &str) -> Result<ToolChoice, E> {
                let mode = match word {
                    "none" => Mode::None,
                    "auto" => Mode::Auto,
                    "required" => Mode::Required,
                    _ => return Err(E::invalid_value(serde::de::Unexpected::Str(word), &self)),
                };
                Ok(choice(mode, String::new()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ToolChoice, A::Error> {
                let named = Named::deserialize(MapAccessDeserializer::new(map))?;
                if named.r#type.as_deref().is_some_and(|kind| kind != FUNCTION) {
                    return Err(A::Error::custom(
                        r#"only the type "function" is offered by this server"#,
                    ));
                }
                let name = named.function.and_then(|Object(function)| function.name);
                let name = name.or(named.name);
                let name = name.ok_or_else(|| A::Error::custom("function.name is needed"))?;
                Ok(choice(Mode::Named, name))
            }
        }

        deserializer.deserialize_any(ChoiceVisitor)
    }
}

fn choice(mode: Mode, function: String) -> ToolChoice {
    ToolChoice(v1::ToolChoice {
        mode: mode.into(),
        function,
    })
}

/// A call in an assistant's message.
#[derive(Debug, Deserialize)]
pub(super) struct GivenCall {
    id: Option<String>,
    r#type: Option<String>,
    function: Option<Object<GivenFunction>>,
}

#[derive(Debug, Deserialize)]
struct GivenFunction {
    name: Option<String>,
    /// A text that holds JSON, or the JSON itself.
    arguments: Option<Box<RawValue>>,
}

impl GivenCall {
    /// Errors: the field of the call at fault, and why.
    pub(super) fn into_grpc(self) -> Result<v1::ToolCall, (&'static str, &'static str)> {
        if self.r#type.is_some_and(|kind| kind != FUNCTION) {
            return Err(("type", r#"only "function" is offered by this server"#));
        }
        let Object(function) = self.function.ok_or(("function", "is needed"))?;
        let arguments = function.arguments.as_deref().map_or("", RawValue::get).to_owned();
        Ok(v1::ToolCall {
            index: 0,
            id: self.id.unwrap_or_default(),
            name: function.name.ok_or(("function.name", "is needed"))?,
            arguments: match arguments.starts_with('"') {
                true => serde_json::from_str(&arguments).map_err(|_| ("function.arguments", "is no text"))?,
                false => arguments,
            },
        })
    }
}

/// A call in a reply, or the next piece of one.
#[derive(Serialize)]
pub(super) struct ReplyCall<'a> {
    /// Streams only.
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<&'static str>,
    function: ReplyFunction<'a>,
}

#[derive(Serialize)]
struct ReplyFunction<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    arguments: &'a str,
}

impl<'a> ReplyCall<'a> {
    /// The calls of a whole reply; none if there are none.
    pub(super) fn whole(calls: &'a [v1::ToolCall]) -> Option<Vec<Self>> {
        let calls = calls.iter().map(|call| Self::of(call, None));
        Some(calls.collect()).filter(|calls: &Vec<_>| !calls.is_empty())
    }

    /// The pieces of calls in an event; none if there are none.
    pub(super) fn pieces(calls: &'a [v1::ToolCall]) -> Option<Vec<Self>> {
        let calls = calls.iter().map(|call| Self::of(call, Some(call.index)));
        Some(calls.collect()).filter(|calls: &Vec<_>| !calls.is_empty())
    }

    fn of(call: &'a v1::ToolCall, index: Option<u32>) -> Self {
        // Only a call's first piece has these.
        let given = |text: &'a String| (!text.is_empty()).then_some(text.as_str());
        let id = given(&call.id);
        Self {
            index,
            id,
            r#type: id.map(|_| FUNCTION),
            function: ReplyFunction {
                name: given(&call.name),
                arguments: &call.arguments,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::body::parse, *};

    #[derive(Debug, Deserialize)]
    struct Body {
        tool_choice: Option<ToolChoice>,
    }

    fn parsed(json: &str) -> Result<v1::ToolChoice, RpcError> {
        let body: Body = parse(format!(r#"{{"tool_choice": {json}}}"#).as_bytes())?;
        Ok(body.tool_choice.map(|choice| choice.0).unwrap_or_default())
    }

    #[test]
    fn choices_are_words_or_name_a_function() {
        for (json, mode, function) in [
            ("null", Mode::Unspecified, ""),
            (r#""none""#, Mode::None, ""),
            (r#""auto""#, Mode::Auto, ""),
            (r#""required""#, Mode::Required, ""),
            (
                r#"{"type": "function", "function": {"name": "f"}}"#,
                Mode::Named,
                "f",
            ),
            (r#"{"type": "function", "name": "f"}"#, Mode::Named, "f"),
        ] {
            let choice = parsed(json).expect(json);
            assert_eq!(
                (choice.mode(), choice.function.as_str()),
                (mode, function),
                "{json}"
            );
        }
        for json in [
            r#""any""#,
            "5",
            "[]",
            "{}",
            r#"{"type": "function"}"#,
            r#"{"type": "allowed_tools", "mode": "auto"}"#,
            r#"{"type": "function", "function": {}}"#,
        ] {
            let error = parsed(json).expect_err(json);
            assert_eq!(error.param.as_deref(), Some("tool_choice"), "{json}: {error}");
        }
    }
}
