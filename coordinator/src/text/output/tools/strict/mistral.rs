//! `[TOOL_CALLS]` and a list, as models write it until tokenizer version 7, or a name and its arguments, as from version 11
//! on. The parser reads both and so both may be written: a model knows which it was trained on.

use super::{
    super::mistral::{ARGS, CALL_ID, CALLS, is_name},
    Callee, Calls,
};
use crate::text::json::{Json, object};

/// The structural tag of free text with calls.
pub(super) fn tag(calls: &Calls<'_>) -> Json {
    let named = calls.functions.iter().filter_map(named_call);
    let format = object([
        ("type", "triggered_tags".into()),
        ("triggers", Json::Array(vec![CALLS.into()])),
        ("tags", Json::Array(named.chain([list(calls)]).collect())),
        ("stop_after_first", Json::Bool(!calls.parallel)),
    ]);
    object([("type", "structural_tag".into()), ("format", format)])
}

/// A name and its arguments, with or without marks between them. None: a name or a schema that only JSON has room for.
fn named_call(callee: &Callee<'_>) -> Option<Json> {
    let (name, schema) = (callee.function.name(), callee.schema());
    let is_object = schema.get("type").and_then(Json::as_str) == Some("object");
    if !is_object || !name.chars().all(is_name) {
        return None;
    }
    let id = object([("type", "regex".into()), ("pattern", "[a-zA-Z0-9]{9}".into())]);
    let with_id = sequence(vec![text(CALL_ID), id, text(ARGS)]);
    let marks = any_of(vec![text(""), text(ARGS), with_id]);
    let content = sequence(vec![marks, json(schema)]);
    Some(between(&format!("{CALLS}{name}"), content, ""))
}

fn list(calls: &Calls<'_>) -> Json {
    let items = calls.functions.iter().map(|callee| {
        let begin = format!("{{\"name\": {}, \"arguments\": ", callee.quoted_name());
        between(&begin, json(callee.schema()), "}")
    });
    let items = object([
        ("type", "tags_with_separator".into()),
        ("tags", Json::Array(items.collect())),
        ("separator", ", ".into()),
        ("at_least_one", Json::Bool(true)),
        ("stop_after_first", Json::Bool(!calls.parallel)),
    ]);
    let open = any_of(vec![text("["), text(" [")]);
    between(CALLS, sequence(vec![open, items]), "]")
}

fn text(value: &str) -> Json {
    object([("type", "const_string".into()), ("value", value.into())])
}

fn json(schema: Json) -> Json {
    object([("type", "json_schema".into()), ("json_schema", schema)])
}

fn sequence(elements: Vec<Json>) -> Json {
    object([("type", "sequence".into()), ("elements", Json::Array(elements))])
}

fn any_of(elements: Vec<Json>) -> Json {
    object([("type", "or".into()), ("elements", Json::Array(elements))])
}

fn between(begin: &str, content: Json, end: &str) -> Json {
    object([
        ("type", "tag".into()),
        ("begin", begin.into()),
        ("content", content),
        ("end", end.into()),
    ])
}
