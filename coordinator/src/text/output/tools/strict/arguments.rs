//! A function's arguments one by one, for calls that name each of them.

use crate::text::json::Json;

/// Keywords that restrict nothing.
const ANNOTATIONS: [&str; 10] = [
    "$schema",
    "$id",
    "$comment",
    "title",
    "description",
    "default",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
];
const DEFINITIONS: [&str; 2] = ["$defs", "definitions"];

/// One argument.
pub(super) struct Argument {
    pub(super) name: String,
    /// Complete by itself.
    pub(super) schema: Json,
    pub(super) is_required: bool,
}

/// The arguments of a strict function in the order of its schema, which others than these never break: what they are not
/// named for is left out of calls. Errors: what the schema says beyond them, or of them together.
pub(super) fn of(schema: &Json) -> Result<Vec<Argument>, String> {
    let Json::Object(entries) = schema else {
        return Err("must be an object: a JSON schema".to_owned());
    };
    let mut keywords = entries.iter().map(|(key, _)| key.as_str());
    let is_known = |key: &str| {
        let own = ["type", "properties", "required", "additionalProperties"];
        own.contains(&key) || ANNOTATIONS.contains(&key) || DEFINITIONS.contains(&key)
    };
    if let Some(other) = keywords.find(|key| !is_known(key)) {
        return Err(format!(
            "has `{other}`, which cannot be enforced where calls name each argument"
        ));
    }
    if schema
        .get("type")
        .is_some_and(|kind| kind.as_str() != Some("object"))
    {
        return Err("must be of type object, as the arguments of a call are".to_owned());
    }
    if let Some(stray) = stray_reference(schema) {
        let shown: String = stray.chars().take(64).collect();
        return Err(format!(
            "refers to {shown:?}, which cannot be enforced where calls name each argument: definitions can"
        ));
    }
    let properties = match schema.get("properties") {
        Some(Json::Object(properties)) => properties.as_slice(),
        _ => &[],
    };
    let required = schema
        .get("required")
        .and_then(Json::as_array)
        .unwrap_or_default();
    let required: Vec<&str> = required.iter().filter_map(Json::as_str).collect();
    let is_named = |name: &str| properties.iter().any(|(known, _)| known == name);
    if let Some(unknown) = required.iter().find(|name| !is_named(name)) {
        return Err(format!("requires {unknown:?}, which is not among its properties"));
    }
    let arguments = properties.iter().map(|(name, property)| Argument {
        name: name.clone(),
        schema: completed(property, schema),
        is_required: required.contains(&name.as_str()),
    });
    Ok(arguments.collect())
}

/// Whether values are all those of type `kind` and no others.
pub(super) fn is_plain(schema: &Json, kind: &str) -> bool {
    schema.get("type").and_then(Json::as_str) == Some(kind) && restricts_by(schema, &["type"])
}

/// Whether a schema has no other keywords than these and annotations.
pub(super) fn restricts_by(schema: &Json, keywords: &[&str]) -> bool {
    let Json::Object(entries) = schema else {
        return false;
    };
    entries.iter().all(|(key, _)| {
        let key = key.as_str();
        keywords.contains(&key) || ANNOTATIONS.contains(&key)
    })
}

/// `property` with the definitions of `root` that it may refer to.
fn completed(property: &Json, root: &Json) -> Json {
    let Json::Object(entries) = property else {
        return property.clone();
    };
    if first_reference(property, &|_| true).is_none() {
        return property.clone();
    }
    let is_definitions = |key: &str| DEFINITIONS.contains(&key);
    let own = entries.iter().filter(|(key, _)| !is_definitions(key)).cloned();
    let definitions = DEFINITIONS.iter().filter_map(|key| {
        let definitions = root.get(key)?.clone();
        Some(((*key).to_owned(), definitions))
    });
    Json::Object(own.chain(definitions).collect())
}

/// A reference that leads elsewhere once arguments stand alone.
fn stray_reference(schema: &Json) -> Option<&str> {
    first_reference(schema, &|target| {
        !target.starts_with("#/$defs/") && !target.starts_with("#/definitions/")
    })
}

/// The parser of JSON bounds the depth.
fn first_reference<'a>(schema: &'a Json, wanted: &dyn Fn(&str) -> bool) -> Option<&'a str> {
    match schema {
        Json::Array(items) => items.iter().find_map(|item| first_reference(item, wanted)),
        Json::Object(entries) => entries.iter().find_map(|(key, value)| {
            let is_reference = matches!(key.as_str(), "$ref" | "$dynamicRef" | "$recursiveRef");
            let target = value.as_str().filter(|target| is_reference && wanted(target));
            target.or_else(|| first_reference(value, wanted))
        }),
        _ => None,
    }
}
