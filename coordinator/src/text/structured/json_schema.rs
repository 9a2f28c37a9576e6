//! JSON schemas on their way to the compiler.

use serde_json::{Map, Value, json};

use super::lark::MAX_DEPTH;

/// Between the tokens of JSON, unless the request says otherwise: enough for an indented line, and not so much that a
/// model which likes white space never comes to an end.
const WHITESPACE: &str = r"[\x20\x0A\x0D\x09]{1,40}";
/// Where llguidance looks for options.
const OPTIONS: &str = "x-guidance";

/// How objects and white space are treated.
#[derive(Clone, Copy, Default)]
pub(super) struct JsonOptions<'a> {
    pub(super) disable_any_whitespace: bool,
    pub(super) disable_additional_properties: bool,
    pub(super) whitespace_pattern: Option<&'a str>,
}

/// The schema in `text` with the options written into it. Errors: not JSON, not a schema, too deep.
pub(super) fn parse(text: &str, options: JsonOptions<'_>) -> Result<Value, String> {
    let schema: Value = serde_json::from_str(text).map_err(|error| format!("is not valid JSON: {error}"))?;
    prepare(schema, options)
}

/// The same for a schema that has been parsed.
pub(super) fn prepare(mut schema: Value, options: JsonOptions<'_>) -> Result<Value, String> {
    if schema == Value::Bool(true) {
        schema = json!({});
    }
    if !schema.is_object() {
        return Err("must be a JSON schema, which is an object or true".to_owned());
    }
    if depth(&schema) > MAX_DEPTH {
        return Err(format!("is nested deeper than the limit of {MAX_DEPTH}"));
    }
    if options.disable_additional_properties {
        close(&mut schema);
    }
    if let Some(object) = schema.as_object_mut() {
        // What the schema itself says of them stays.
        let own = object.remove(OPTIONS);
        let mut merged = guidance(options);
        if let Some(Value::Object(own)) = own {
            merged.extend(own);
        }
        object.insert(OPTIONS.to_owned(), merged.into());
    }
    Ok(schema)
}

fn guidance(options: JsonOptions<'_>) -> Map<String, Value> {
    let pattern = match options.whitespace_pattern {
        Some(pattern) => Some(pattern),
        None if options.disable_any_whitespace => None,
        None => Some(WHITESPACE),
    };
    let mut guidance = Map::new();
    // Generators of schemas write oneOf for alternatives that exclude each other anyway.
    guidance.insert("coerce_one_of".to_owned(), true.into());
    guidance.insert("whitespace_flexible".to_owned(), pattern.is_some().into());
    guidance.insert("whitespace_pattern".to_owned(), pattern.into());
    guidance
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + deepest(items.iter()),
        Value::Object(fields) => 1 + deepest(fields.values()),
        _ => 0,
    }
}

fn deepest<'a>(values: impl Iterator<Item = &'a Value>) -> usize {
    values.map(depth).max().unwrap_or(0)
}

/// As vLLM does: what lists properties and is silent about others has no others.
fn close(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(close),
        Value::Object(fields) => {
            fields.values_mut().for_each(close);
            let lists = ["properties", "patternProperties"]
                .iter()
                .any(|key| fields.contains_key(*key));
            if lists && !fields.contains_key("additionalProperties") {
                fields.insert("additionalProperties".to_owned(), false.into());
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_closed_where_they_say_nothing() {
        let options = JsonOptions {
            disable_additional_properties: true,
            ..JsonOptions::default()
        };
        let schema = r#"{"properties": {"a": {"properties": {}, "additionalProperties": true}}, "x-guidance": {"lenient": true}}"#;
        let schema = parse(schema, options).expect("a schema");
        assert_eq!(schema["additionalProperties"], false);
        assert_eq!(schema["properties"]["a"]["additionalProperties"], true);
        assert_eq!(schema["x-guidance"]["lenient"], true);
        assert_eq!(schema["x-guidance"]["whitespace_pattern"], WHITESPACE);
    }

    #[test]
    fn what_is_no_schema_or_too_deep_is_refused() {
        for text in ["", "[]", "3", "false", "{\"a\":", "nope"] {
            assert!(parse(text, JsonOptions::default()).is_err(), "{text}");
        }
        assert!(parse("true", JsonOptions::default()).is_ok());
        for levels in [MAX_DEPTH + 1, 5000] {
            let deep = format!("{}{{}}{}", "{\"not\":".repeat(levels), "}".repeat(levels));
            let error = parse(&deep, JsonOptions::default()).expect_err("too deep");
            assert!(error.contains("limit"), "{error}");
        }
    }
}
