//! JSON between tags.

use super::{
    super::hermes::{CLOSE, OPEN},
    Calls,
};
use crate::text::json::{Json, object};

/// The structural tag of free text with calls.
pub(super) fn tag(calls: &Calls<'_>) -> Json {
    let tags = calls.functions.iter().map(|callee| {
        let begin = format!("{OPEN}\n{{\"name\": {}, \"arguments\": ", callee.quoted_name());
        let content = object([("type", "json_schema".into()), ("json_schema", callee.schema())]);
        object([
            ("type", "tag".into()),
            ("begin", begin.as_str().into()),
            ("content", content),
            ("end", format!("}}\n{CLOSE}").as_str().into()),
        ])
    });
    let format = object([
        ("type", "triggered_tags".into()),
        ("triggers", Json::Array(vec![OPEN.into()])),
        ("tags", Json::Array(tags.collect())),
        ("stop_after_first", Json::Bool(!calls.parallel)),
    ]);
    object([("type", "structural_tag".into()), ("format", format)])
}
