//! Calls between tags, as JSON or with tags of their own for function and arguments. The parser reads both, and JSON has
//! room for every schema; a schema that the other form has none for is left to JSON.

use phalanx_proto::RpcError;

use super::{
    super::{
        hermes::{CLOSE, OPEN},
        qwen::{END_FUNCTION, END_PARAMETER, FUNCTION, PARAMETER, TAGS, is_name, is_text, types},
    },
    Callee, Calls,
    arguments::{self, Argument, is_plain, restricts_by},
    text_up_to,
};
use crate::text::{
    json::Json,
    structured::lark::{Rules, TEXT, quoted},
};

/// A text with a tag in it that ends an argument.
const ENDS_VALUE: &str = r"(?s:.*)(<parameter=|<\/parameter>|<\/function>|<\/tool_call>)(?s:.*)";
/// A text with a tag in it that ends a call, or begins one.
const ENDS_CALL: &str = r"(?s:.*)(<tool_call>|<\/tool_call>|<function=|<\/function>)(?s:.*)";
/// A text with a tag in it that begins a call without the tag around it.
const BEGINS_CALL: &str = r"(?s:.*)<function=(?s:.*)";

/// Rules that all functions share.
struct Shared {
    /// A text and the end of the argument that it is.
    value: String,
    /// Whatever stands in a call, and its end.
    anything: String,
}

/// The grammar of free text with calls.
pub(super) fn grammar(calls: &Calls<'_>, mut rules: Rules<'_>) -> Result<String, RpcError> {
    let free = rules.terminal(&format!("{TEXT} & ~/{BEGINS_CALL}/"));
    let tagged = text_up_to(&mut rules, &free, OPEN)?;
    let untagged = text_up_to(&mut rules, &free, FUNCTION)?;
    let shared = Shared::new(&mut rules)?;
    let close = rules.literals(CLOSE);
    let (mut within, mut without) = (Vec::new(), Vec::new());
    for callee in &calls.functions {
        let open = quoted(&format!(
            "\n{{\"name\": {}, \"arguments\": ",
            callee.quoted_name()
        ));
        let arguments = callee.json(&mut rules, &callee.schema())?;
        within.push(format!(r#"{open} {arguments} "}}\n" {close}"#));
        if let Some(call) = call(&mut rules, callee, &shared)? {
            within.push(format!(
                r#"{} {call} "\n" {close}"#,
                quoted(&format!("\n{FUNCTION}"))
            ));
            without.push(call);
        }
    }
    let within = rules.rule(&within.join(" | "));
    let mut any = format!("{tagged} {within}");
    if !without.is_empty() {
        let without = rules.rule(&without.join(" | "));
        any = format!("{any} | {untagged} {without}");
    }
    let start = if calls.parallel {
        format!("({any})* {free}")
    } else {
        format!("{any} | {free}")
    };
    Ok(rules.finish(&start))
}

impl Shared {
    fn new(rules: &mut Rules<'_>) -> Result<Self, RpcError> {
        let value = rules.terminal(&format!("{TEXT} & ~/{ENDS_VALUE}/"));
        let inside = rules.terminal(&format!("{TEXT} & ~/{ENDS_CALL}/"));
        Ok(Self {
            value: text_up_to(rules, &value, &end_of_value())?,
            anything: text_up_to(rules, &inside, END_FUNCTION)?,
        })
    }
}

fn end_of_value() -> String {
    format!("\n{END_PARAMETER}\n")
}

/// What stands behind the tag that begins a function. None: tags have no room for its schema.
fn call(rules: &mut Rules<'_>, callee: &Callee<'_>, shared: &Shared) -> Result<Option<String>, RpcError> {
    let name = callee.function.name();
    if !is_name(name) {
        return Ok(None);
    }
    if !callee.function.is_strict() {
        let open = quoted(&format!("{name}>"));
        return Ok(Some(rules.rule(&format!("{open} {}", shared.anything))));
    }
    let Ok(arguments) = arguments::of(&callee.schema()) else {
        return Ok(None);
    };
    let values: Option<Vec<Value>> = arguments.iter().map(Value::of).collect();
    let Some(values) = values else { return Ok(None) };
    let mut body = quoted(&format!("{name}>\n"));
    for (argument, value) in arguments.iter().zip(values) {
        let value = match value {
            Value::Text => shared.value.clone(),
            Value::OneOf(texts) => {
                let texts: Vec<String> = texts.iter().map(|text| quoted(text)).collect();
                format!("({}) {}", texts.join(" | "), quoted(&end_of_value()))
            }
            Value::Json => {
                let json = callee.json(rules, &argument.schema)?;
                format!("{json} {}", quoted(&end_of_value()))
            }
        };
        let open = quoted(&format!("{PARAMETER}{}>\n", argument.name));
        let given = rules.rule(&format!("{open} {value}"));
        body.push_str(&format!(
            " {given}{}",
            if argument.is_required { "" } else { "?" }
        ));
    }
    Ok(Some(rules.rule(&format!("{body} {}", quoted(END_FUNCTION)))))
}

/// What stands between the tags of an argument.
enum Value {
    /// Any text.
    Text,
    /// One of these texts.
    OneOf(Vec<String>),
    Json,
}

impl Value {
    /// None: what the parser would make of the text is not sure to follow the schema.
    fn of(argument: &Argument) -> Option<Self> {
        let schema = &argument.schema;
        if !is_name(&argument.name) {
            return None;
        }
        if is_text(schema) {
            return Self::text(schema);
        }
        // Of references the parser knows no types, and takes JSON of any; where it knows some, it must know all.
        let branches = ["anyOf", "oneOf"]
            .iter()
            .filter_map(|key| schema.get(key)?.as_array());
        let mut branches = branches.flatten();
        let is_sure = schema.get("type").is_some()
            || types(schema).is_empty()
            || branches.all(|branch| branch.get("type").is_some());
        is_sure.then_some(Self::Json)
    }

    fn text(schema: &Json) -> Option<Self> {
        if admits_any_text(schema) {
            return Some(Self::Text);
        }
        let only = ["type", "enum", "const"];
        if !restricts_by(schema, &only) || (schema.get("type").is_some() && types(schema) != ["string"]) {
            return None;
        }
        let texts: Vec<&Json> = match (schema.get("enum"), schema.get("const")) {
            (Some(Json::Array(texts)), None) => texts.iter().collect(),
            (None, Some(text)) => vec![text],
            _ => return None,
        };
        let texts = texts.into_iter().map(|text| {
            let text = text.as_str()?;
            let is_clean = !TAGS.iter().any(|tag| text.contains(tag));
            is_clean.then(|| text.to_owned())
        });
        texts
            .collect::<Option<Vec<_>>>()
            .filter(|texts| !texts.is_empty())
            .map(Self::OneOf)
    }
}

/// Whether every text follows a schema, which the parser takes for one of texts.
fn admits_any_text(schema: &Json) -> bool {
    if restricts_by(schema, &[]) || is_plain(schema, "string") {
        return true;
    }
    if let Some(Json::Array(kinds)) = schema.get("type") {
        let has_text = kinds.iter().any(|kind| kind.as_str() == Some("string"));
        return has_text && restricts_by(schema, &["type"]);
    }
    // Not of `oneOf`: a text that two branches admit does not follow it.
    let branches = schema.get("anyOf").and_then(Json::as_array).unwrap_or_default();
    branches.iter().any(admits_any_text) && restricts_by(schema, &["anyOf"])
}
