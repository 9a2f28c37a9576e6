//! The tools of a request: what the model may call, what it must call, and the JSON that then is all it may say.

use minijinja::Value;
use phalanx_proto::{
    RpcError,
    limits::{MAX_FUNCTION_NAME_BYTES, MAX_TOOLS},
    v1::{self, structured_outputs::Constraint, tool_choice::Mode},
};

use super::json::{Json, object};

/// Most bytes of `tools`.
const MAX_TOOLS_BYTES: usize = 1 << 20;

/// Checked tools, in OpenAI's shape.
#[derive(Debug)]
pub(crate) struct ToolSet {
    tools: Json,
    functions: Vec<Function>,
}

/// A function that the model may call.
#[derive(Debug)]
pub(crate) struct Function {
    name: String,
    /// JSON schema of the arguments; none: an object without properties.
    parameters: Option<Json>,
    strict: bool,
}

/// What the model may do with its tools.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ToolChoice {
    /// It speaks.
    None,
    /// It decides whether to call.
    Auto,
    /// It calls.
    Required,
    /// It calls this function.
    Named(String),
}

impl ToolSet {
    /// Reads a JSON array of tools; an empty text is none. Errors name the tool and the field at fault.
    pub(crate) fn parse(json: &str) -> Result<Self, RpcError> {
        if json.len() > MAX_TOOLS_BYTES {
            let message = format!(
                "tools has {} bytes, at most {MAX_TOOLS_BYTES} are allowed.",
                json.len()
            );
            return Err(RpcError::invalid("tools", message));
        }
        if json.is_empty() {
            return Ok(Self {
                tools: Json::Array(Vec::new()),
                functions: Vec::new(),
            });
        }
        let tools: Json = serde_json::from_str(json)
            .map_err(|error| RpcError::invalid("tools", format!("tools is not valid JSON: {error}")))?;
        let items = tools
            .as_array()
            .ok_or_else(|| RpcError::invalid("tools", "tools must be a list of objects."))?;
        if items.len() > MAX_TOOLS {
            let message = format!(
                "tools has {} tools, at most {MAX_TOOLS} are allowed.",
                items.len()
            );
            return Err(RpcError::invalid("tools", message));
        }
        let functions = items.iter().enumerate().map(|(at, tool)| {
            Function::of(tool).map_err(|(field, why)| {
                let param = format!("tools[{at}]{field}");
                let message = format!("{param} {why}");
                RpcError::invalid(param, message)
            })
        });
        let functions = functions.collect::<Result<_, _>>()?;
        Ok(Self { tools, functions })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.functions.is_empty()
    }

    pub(crate) fn functions(&self) -> &[Function] {
        &self.functions
    }

    /// As templates see them; `None` without tools, which templates test for.
    pub(crate) fn to_value(&self) -> Value {
        if self.is_empty() {
            return Value::from(());
        }
        self.tools.to_value()
    }

    /// The schema of one argument of `function`; none if either is unknown.
    pub(crate) fn parameter(&self, function: &str, name: &str) -> Option<&Json> {
        let function = self.functions.iter().find(|known| known.name == function)?;
        function.parameters.as_ref()?.get("properties")?.get(name)
    }

    /// The choice of a request with these tools. Errors: it is unknown, asks for calls where there are no tools, or
    /// names a function that is not among them.
    pub(crate) fn choice(&self, choice: Option<&v1::ToolChoice>) -> Result<ToolChoice, RpcError> {
        const PARAM: &str = "tool_choice";
        let mode = choice.map_or(Ok(Mode::Unspecified), |choice| Mode::try_from(choice.mode));
        let mode = mode.map_err(|_| RpcError::invalid(PARAM, "tool_choice has an unknown mode."))?;
        match mode {
            Mode::None => Ok(ToolChoice::None),
            Mode::Unspecified | Mode::Auto if self.is_empty() => Ok(ToolChoice::None),
            Mode::Unspecified | Mode::Auto => Ok(ToolChoice::Auto),
            Mode::Required | Mode::Named if self.is_empty() => Err(RpcError::invalid(
                PARAM,
                "When using `tool_choice`, `tools` must be set.",
            )),
            Mode::Required => Ok(ToolChoice::Required),
            Mode::Named => {
                let name = choice.map_or("", |choice| choice.function.as_str());
                if self.functions.iter().any(|function| function.name == name) {
                    return Ok(ToolChoice::Named(name.to_owned()));
                }
                // Debug, and cut: the name is as long as its sender likes.
                let shown: String = name.chars().take(64).collect();
                let message = format!("The function {shown:?} of `tool_choice` is not among `tools`.");
                Err(RpcError::invalid(PARAM, message))
            }
        }
    }

    /// The JSON schema of all that a model may say under `choice`: vLLM's, so that its prompts and ours mean the same.
    /// For a named function its arguments; for `required` a list of calls, each an object of `name` and `parameters`.
    /// None where the model may speak.
    pub(crate) fn constraint(&self, choice: &ToolChoice, parallel: bool) -> Result<Option<Json>, RpcError> {
        match choice {
            ToolChoice::None | ToolChoice::Auto => Ok(None),
            ToolChoice::Named(name) => {
                let function = self.functions.iter().find(|function| function.name == *name);
                Ok(function.map(Function::schema))
            }
            ToolChoice::Required => {
                let calls = self.functions.iter().map(|function| {
                    let (schema, _) = split_definitions(function.schema());
                    let name = object([
                        ("type", "string".into()),
                        ("enum", Json::Array(vec![function.name.as_str().into()])),
                    ]);
                    object([
                        ("properties", object([("name", name), ("parameters", schema)])),
                        ("required", Json::Array(vec!["name".into(), "parameters".into()])),
                    ])
                });
                let call = object([("type", "object".into()), ("anyOf", Json::Array(calls.collect()))]);
                let mut list = vec![
                    ("type".to_owned(), Json::from("array")),
                    ("minItems".to_owned(), Json::Number(1.into())),
                    ("items".to_owned(), call),
                ];
                if !parallel {
                    list.push(("maxItems".to_owned(), Json::Number(1.into())));
                }
                let definitions = self.definitions()?;
                if !definitions.is_empty() {
                    list.push(("$defs".to_owned(), Json::Object(definitions)));
                }
                Ok(Some(Json::Object(list)))
            }
        }
    }

    /// The `$defs` of all functions: references to them start at the root of the schema that joins the functions.
    fn definitions(&self) -> Result<Vec<(String, Json)>, RpcError> {
        let mut all: Vec<(String, Json)> = Vec::new();
        for (at, function) in self.functions.iter().enumerate() {
            let (_, definitions) = split_definitions(function.schema());
            for (name, definition) in definitions {
                match all.iter().find(|(known, _)| *known == name) {
                    None => all.push((name, definition)),
                    Some((_, known)) if *known == definition => {}
                    Some(_) => {
                        let param = format!("tools[{at}].function.parameters");
                        let message =
                            format!("{param} defines `{name}` in another way than an earlier tool.");
                        return Err(RpcError::invalid(param, message));
                    }
                }
            }
        }
        Ok(all)
    }
}

impl Function {
    /// Errors: the path of a field within the tool, and what is wrong with it.
    fn of(tool: &Json) -> Result<Self, (&'static str, String)> {
        let must = |field, what: &str| (field, format!("must be {what}."));
        if !tool.is_object() {
            return Err(must("", "an object"));
        }
        match tool.get("type") {
            Some(Json::String(kind)) if kind == "function" => {}
            _ => {
                return Err(must(
                    ".type",
                    "\"function\", the only kind of tool this server offers",
                ));
            }
        }
        let function = tool.get("function").filter(|function| function.is_object());
        let function = function.ok_or_else(|| must(".function", "an object"))?;
        let name = function.get("name").and_then(Json::as_str).unwrap_or_default();
        let allowed = 1..=MAX_FUNCTION_NAME_BYTES;
        if !allowed.contains(&name.len()) || name.chars().any(char::is_control) {
            let what = format!("a text of 1 to {MAX_FUNCTION_NAME_BYTES} bytes without control characters");
            return Err(must(".function.name", &what));
        }
        let parameters = match function.get("parameters") {
            None | Some(Json::Null) => None,
            Some(schema) if schema.is_object() => Some(schema.clone()),
            Some(_) => return Err(must(".function.parameters", "an object: a JSON schema")),
        };
        match function.get("description") {
            None | Some(Json::Null | Json::String(_)) => {}
            Some(_) => return Err(must(".function.description", "a text")),
        }
        let strict = match function.get("strict") {
            None | Some(Json::Null) => false,
            Some(Json::Bool(strict)) => *strict,
            Some(_) => return Err(must(".function.strict", "true or false")),
        };
        Ok(Self {
            name: name.to_owned(),
            parameters,
            strict,
        })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Arguments follow their schema even where the model need not call.
    pub(crate) fn is_strict(&self) -> bool {
        self.strict
    }

    /// The JSON schema of the arguments.
    pub(crate) fn schema(&self) -> Json {
        let empty = || {
            object([
                ("type", "object".into()),
                ("properties", Json::Object(Vec::new())),
            ])
        };
        self.parameters.clone().unwrap_or_else(empty)
    }
}

/// Makes `constraint` all that completions may say. Errors: calls are forced, and the request has said already what
/// completions must look like; where the model may speak, that goes before.
pub(crate) fn restrict(sampling: &mut v1::SamplingParams, constraint: Constraint) -> Result<(), RpcError> {
    if sampling.structured_outputs.is_some() {
        if !matches!(constraint, Constraint::JsonSchema(_)) {
            return Ok(());
        }
        let message = "tool_choice cannot ask for a call where structured outputs are asked for.";
        return Err(RpcError::invalid("tool_choice", message));
    }
    sampling.structured_outputs = Some(v1::StructuredOutputs {
        constraint: Some(constraint),
        param: "tools".to_owned(),
        ..v1::StructuredOutputs::default()
    });
    Ok(())
}

/// A schema without its definitions, and those.
fn split_definitions(schema: Json) -> (Json, Vec<(String, Json)>) {
    let Json::Object(entries) = schema else {
        return (schema, Vec::new());
    };
    let (definitions, rest): (Vec<_>, Vec<_>) = entries.into_iter().partition(|(key, _)| key == "$defs");
    let definitions = definitions
        .into_iter()
        .flat_map(|(_, definitions)| match definitions {
            Json::Object(entries) => entries,
            _ => Vec::new(),
        });
    (Json::Object(rest), definitions.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEATHER: &str = r##"{"type": "function", "function": {"name": "get_weather", "description": "x", "parameters":
        {"type": "object", "properties": {"zone": {"type": "string"}, "city": {"$ref": "#/$defs/City"}},
         "$defs": {"City": {"type": "string"}}}}}"##;
    const NOW: &str = r#"{"type": "function", "function": {"name": "now"}}"#;

    fn choice(mode: Mode, function: &str) -> v1::ToolChoice {
        v1::ToolChoice {
            mode: mode.into(),
            function: function.into(),
        }
    }

    #[test]
    fn bad_tools_are_refused_by_name() {
        let many = format!("[{}{NOW}]", format!("{NOW},").repeat(9_999));
        let deep = format!("[{}{}]", r#"{"a":"#.repeat(500), "}".repeat(500));
        let long = format!(
            r#"[{{"type": "function", "function": {{"name": "{}"}}}}]"#,
            "f".repeat(300)
        );
        for (json, param) in [
            ("{}", "tools"),
            ("[", "tools"),
            (many.as_str(), "tools"),
            (&deep, "tools"),
            (&"[".repeat(2 << 20), "tools"),
            (r#"["f"]"#, "tools[0]"),
            ("[[]]", "tools[0]"),
            (r#"[{"function": {"name": "f"}}]"#, "tools[0].type"),
            (r#"[{"type": "web_search"}]"#, "tools[0].type"),
            (r#"[{"type": "function"}]"#, "tools[0].function"),
            (
                r#"[{"type": "function", "function": {}}]"#,
                "tools[0].function.name",
            ),
            (
                r#"[{"type": "function", "function": {"name": ""}}]"#,
                "tools[0].function.name",
            ),
            (long.as_str(), "tools[0].function.name"),
            (
                r#"[{"type": "function", "function": {"name": "f", "parameters": "none"}}]"#,
                "tools[0].function.parameters",
            ),
        ] {
            let error = ToolSet::parse(json).expect_err("refused");
            assert_eq!(error.param.as_deref(), Some(param), "{error}");
        }
    }

    #[test]
    fn a_choice_needs_its_tools() {
        let none = ToolSet::parse("").expect("no tools");
        let some = ToolSet::parse(&format!("[{NOW}]")).expect("valid");
        assert_eq!(none.choice(None), Ok(ToolChoice::None));
        assert_eq!(some.choice(None), Ok(ToolChoice::Auto));
        assert_eq!(some.choice(Some(&choice(Mode::None, ""))), Ok(ToolChoice::None));
        assert_eq!(
            some.choice(Some(&choice(Mode::Named, "now"))),
            Ok(ToolChoice::Named("now".into()))
        );
        for (tools, bad) in [
            (&none, choice(Mode::Required, "")),
            (&none, choice(Mode::Named, "now")),
            (&some, choice(Mode::Named, "then")),
        ] {
            let error = tools.choice(Some(&bad)).expect_err("refused");
            assert_eq!(error.param.as_deref(), Some("tool_choice"));
        }
    }

    #[test]
    fn constraints_are_vllms() {
        let tools = ToolSet::parse(&format!("[{WEATHER}, {NOW}]")).expect("valid");
        let constraint = |choice, parallel| {
            let schema = tools.constraint(&choice, parallel).expect("definitions agree");
            schema.map(|schema| schema.to_string())
        };
        assert_eq!(constraint(ToolChoice::Auto, true), None);
        assert_eq!(
            constraint(ToolChoice::Named("now".into()), true).as_deref(),
            Some(r#"{"type":"object","properties":{}}"#)
        );
        assert_eq!(
            constraint(ToolChoice::Required, false).as_deref(),
            Some(concat!(
                r#"{"type":"array","minItems":1,"items":{"type":"object","anyOf":["#,
                r#"{"properties":{"name":{"type":"string","enum":["get_weather"]},"parameters":"#,
                r##"{"type":"object","properties":{"zone":{"type":"string"},"city":{"$ref":"#/$defs/City"}}}},"##,
                r#""required":["name","parameters"]},"#,
                r#"{"properties":{"name":{"type":"string","enum":["now"]},"parameters":"#,
                r#"{"type":"object","properties":{}}},"required":["name","parameters"]}]},"#,
                r#""maxItems":1,"$defs":{"City":{"type":"string"}}}"#,
            ))
        );
        let other = WEATHER
            .replace("get_weather", "other")
            .replace(r#""City": {"type": "string"}"#, r#""City": {"type": "integer"}"#);
        let tools = ToolSet::parse(&format!("[{WEATHER}, {other}]")).expect("valid");
        let error = tools
            .constraint(&ToolChoice::Required, true)
            .expect_err("two Cities");
        assert_eq!(error.param.as_deref(), Some("tools[1].function.parameters"));
    }
}
