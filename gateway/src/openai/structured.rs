//! What a completion must look like: `response_format`, `structured_outputs` and its older `guided_*` spelling; and
//! `allowed_token_ids` and `bad_words`, which restrict it as well. Schemas and grammars are passed on as they are.

use phalanx_proto::{
    RpcError,
    limits::{MAX_ALLOWED_TOKEN_IDS, MAX_BAD_WORDS, MAX_CHOICES},
    v1::{
        SamplingParams, StructuredOutputs,
        structured_outputs::{Choices, Constraint},
    },
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::value::RawValue;

use super::body::{Bounded, Object, parse};

#[derive(Debug, Deserialize)]
pub(crate) struct StructuredFields {
    response_format: Option<Box<RawValue>>,
    structured_outputs: Option<Object<Structured>>,
    guided_json: Option<Box<RawValue>>,
    guided_json_object: Option<bool>,
    guided_regex: Option<String>,
    guided_choice: Option<Bounded<String, MAX_CHOICES>>,
    guided_grammar: Option<String>,
    guided_whitespace_pattern: Option<String>,
    allowed_token_ids: Option<Bounded<u32, MAX_ALLOWED_TOKEN_IDS>>,
    bad_words: Option<Bounded<String, MAX_BAD_WORDS>>,
}

#[derive(Debug, Deserialize)]
struct Structured {
    /// A schema, or a string that holds one.
    json: Option<Box<RawValue>>,
    json_object: Option<bool>,
    regex: Option<String>,
    choice: Option<Bounded<String, MAX_CHOICES>>,
    grammar: Option<String>,
    structural_tag: Option<Box<RawValue>>,
    disable_any_whitespace: Option<bool>,
    disable_additional_properties: Option<bool>,
    whitespace_pattern: Option<String>,
}

#[derive(Debug, Deserialize)]
struct ResponseFormat {
    r#type: String,
    json_schema: Option<Object<JsonSchema>>,
}

/// A schema and its name, which means nothing here.
#[derive(Debug, Deserialize)]
struct JsonSchema {
    schema: Option<Box<RawValue>>,
}

/// Adds to `sampling` what the body says of the completion's form.
///
/// # Errors
/// `InvalidArgument` naming the field: of the wrong type, without a constraint, or one constraint too many.
pub(crate) fn restrict(body: &[u8], sampling: &mut SamplingParams) -> Result<(), RpcError> {
    let fields: StructuredFields = parse(body)?;
    sampling.bad_words = fields.bad_words.map(|words| words.0).unwrap_or_default();
    if let Some(ids) = fields.allowed_token_ids {
        if ids.0.is_empty() {
            let message = "allowed_token_ids must not be empty";
            return Err(RpcError::invalid("allowed_token_ids", message));
        }
        sampling.allowed_token_ids = ids.0;
    }
    let mut found = Found::default();
    if let Some(format) = &fields.response_format {
        found.response_format(format)?;
    }
    if let Some(Object(structured)) = fields.structured_outputs {
        found.structured_outputs(structured)?;
    }
    if let Some(schema) = &fields.guided_json {
        found.add(
            "guided_json",
            Constraint::JsonSchema(text_of("guided_json", schema)?),
        )?;
    }
    if fields.guided_json_object == Some(true) {
        found.add("guided_json_object", Constraint::JsonObject(true))?;
    }
    if let Some(regex) = fields.guided_regex {
        found.add("guided_regex", Constraint::Regex(regex))?;
    }
    if let Some(Bounded(choices)) = fields.guided_choice {
        found.add("guided_choice", Constraint::Choice(Choices { choices }))?;
    }
    if let Some(grammar) = fields.guided_grammar {
        found.add("guided_grammar", Constraint::Grammar(grammar))?;
    }
    if fields.guided_whitespace_pattern.is_some() {
        found.options.whitespace_pattern = fields.guided_whitespace_pattern;
    }
    sampling.structured_outputs = found.constraint.map(|(param, constraint)| StructuredOutputs {
        constraint: Some(constraint),
        param: param.to_owned(),
        ..found.options
    });
    Ok(())
}

/// The constraint found so far, by the name of its field, and the options beside it.
#[derive(Default)]
struct Found {
    constraint: Option<(&'static str, Constraint)>,
    options: StructuredOutputs,
}

impl Found {
    fn add(&mut self, param: &'static str, constraint: Constraint) -> Result<(), RpcError> {
        if let Some((first, _)) = &self.constraint {
            let message = format!("only one constraint can be given, not {first} and {param} together");
            return Err(RpcError::invalid(param, message));
        }
        self.constraint = Some((param, constraint));
        Ok(())
    }

    fn response_format(&mut self, raw: &RawValue) -> Result<(), RpcError> {
        const FIELD: &str = "response_format";
        let format: ResponseFormat = parse_within(FIELD, raw)?;
        match format.r#type.as_str() {
            "text" => Ok(()),
            "json_object" => self.add(FIELD, Constraint::JsonObject(true)),
            "json_schema" => {
                const SCHEMA: &str = "response_format.json_schema.schema";
                let schema = format.json_schema.and_then(|Object(format)| format.schema);
                let Some(schema) = schema else {
                    return Err(RpcError::invalid(SCHEMA, format!("{SCHEMA} is needed")));
                };
                self.add(SCHEMA, Constraint::JsonSchema(schema.get().to_owned()))
            }
            "structural_tag" => self.add(FIELD, Constraint::StructuralTag(raw.get().to_owned())),
            _ => {
                let message = "response_format.type must be text, json_object, json_schema or structural_tag";
                Err(RpcError::invalid("response_format.type", message))
            }
        }
    }

    fn structured_outputs(&mut self, structured: Structured) -> Result<(), RpcError> {
        if let Some(schema) = &structured.json {
            let param = "structured_outputs.json";
            self.add(param, Constraint::JsonSchema(text_of(param, schema)?))?;
        }
        if structured.json_object == Some(true) {
            self.add("structured_outputs.json_object", Constraint::JsonObject(true))?;
        }
        if let Some(regex) = structured.regex {
            self.add("structured_outputs.regex", Constraint::Regex(regex))?;
        }
        if let Some(Bounded(choices)) = structured.choice {
            let choices = Constraint::Choice(Choices { choices });
            self.add("structured_outputs.choice", choices)?;
        }
        if let Some(grammar) = structured.grammar {
            self.add("structured_outputs.grammar", Constraint::Grammar(grammar))?;
        }
        if let Some(tag) = &structured.structural_tag {
            let param = "structured_outputs.structural_tag";
            self.add(param, Constraint::StructuralTag(text_of(param, tag)?))?;
        }
        if self.constraint.is_none() {
            let message = "structured_outputs needs one of json, json_object, regex, choice, grammar and structural_tag";
            return Err(RpcError::invalid("structured_outputs", message));
        }
        self.options = StructuredOutputs {
            disable_any_whitespace: structured.disable_any_whitespace.unwrap_or(false),
            disable_additional_properties: structured.disable_additional_properties.unwrap_or(false),
            whitespace_pattern: structured.whitespace_pattern,
            ..StructuredOutputs::default()
        };
        Ok(())
    }
}

/// JSON as it is, or the JSON within a string.
pub(crate) fn text_of(field: &str, raw: &RawValue) -> Result<String, RpcError> {
    let text = raw.get();
    if !text.starts_with('"') {
        return Ok(text.to_owned());
    }
    serde_json::from_str(text).map_err(|error| RpcError::invalid(field, format!("{field}: {error}")))
}

/// Parses a field that was passed over; errors name it.
fn parse_within<T: DeserializeOwned>(field: &str, raw: &RawValue) -> Result<T, RpcError> {
    parse(raw.get().as_bytes()).map_err(|error| {
        let param = match &error.param {
            Some(inner) => format!("{field}.{inner}"),
            None => field.to_owned(),
        };
        RpcError::invalid(param, format!("{field}: {}", error.message))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn restricted(body: &str) -> Result<SamplingParams, RpcError> {
        let mut sampling = SamplingParams::default();
        restrict(body.as_bytes(), &mut sampling)?;
        Ok(sampling)
    }

    /// Field and constraint.
    fn constraint(body: &str) -> (String, Constraint) {
        let structured = restricted(body).expect(body).structured_outputs.expect(body);
        (structured.param, structured.constraint.expect(body))
    }

    #[test]
    fn every_spelling_is_carried() {
        let named = |name: &str, constraint: Constraint| (name.to_owned(), constraint);
        let schema = || Constraint::JsonSchema(r#"{"type": "object"}"#.into());
        for (body, expected) in [
            (
                r#"{"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": true,
                    "schema": {"type": "object"}}}}"#,
                named("response_format.json_schema.schema", schema()),
            ),
            (
                r#"{"response_format": {"type": "json_object"}}"#,
                named("response_format", Constraint::JsonObject(true)),
            ),
            (
                r#"{"response_format": {"type": "structural_tag", "structures": [], "triggers": []}}"#,
                named(
                    "response_format",
                    Constraint::StructuralTag(
                        r#"{"type": "structural_tag", "structures": [], "triggers": []}"#.into(),
                    ),
                ),
            ),
            (
                r#"{"structured_outputs": {"json": {"type": "object"}}}"#,
                named("structured_outputs.json", schema()),
            ),
            (
                r#"{"structured_outputs": {"json": "{\"type\": \"object\"}"}}"#,
                named("structured_outputs.json", schema()),
            ),
            (
                r#"{"structured_outputs": {"grammar": "root ::= \"x\"", "json_object": false}}"#,
                named(
                    "structured_outputs.grammar",
                    Constraint::Grammar("root ::= \"x\"".into()),
                ),
            ),
            (
                r#"{"guided_json": {"type": "object"}, "guided_regex": null}"#,
                named("guided_json", schema()),
            ),
            (
                r#"{"guided_regex": "a+"}"#,
                named("guided_regex", Constraint::Regex("a+".into())),
            ),
            (
                r#"{"guided_choice": ["a", "b"]}"#,
                named(
                    "guided_choice",
                    Constraint::Choice(Choices {
                        choices: vec!["a".into(), "b".into()],
                    }),
                ),
            ),
        ] {
            assert_eq!(constraint(body), expected);
        }
    }

    #[test]
    fn options_and_token_lists_come_along() {
        let body = r#"{"structured_outputs": {"json_object": true, "disable_any_whitespace": true,
            "whitespace_pattern": " "}, "allowed_token_ids": [1, 2], "bad_words": ["no"]}"#;
        let sampling = restricted(body).expect("valid");
        let structured = sampling.structured_outputs.expect("a constraint");
        assert!(structured.disable_any_whitespace && !structured.disable_additional_properties);
        assert_eq!(structured.whitespace_pattern.as_deref(), Some(" "));
        assert_eq!(sampling.allowed_token_ids, [1, 2]);
        assert_eq!(sampling.bad_words, ["no"]);
        let nothing = r#"{"response_format": {"type": "text"}, "structured_outputs": null, "bad_words": []}"#;
        assert_eq!(restricted(nothing).expect("valid"), SamplingParams::default());
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        for (body, param) in [
            (r#"{"response_format": {"type": "yaml"}}"#, "response_format.type"),
            (r#"{"response_format": {}}"#, "response_format"),
            (r#"{"response_format": []}"#, "response_format"),
            (r#"{"response_format": {"type": 3}}"#, "response_format.type"),
            (
                r#"{"response_format": {"type": "json_schema"}}"#,
                "response_format.json_schema.schema",
            ),
            (
                r#"{"response_format": {"type": "json_schema", "json_schema": 5}}"#,
                "response_format.json_schema",
            ),
            (r#"{"structured_outputs": {}}"#, "structured_outputs"),
            (
                r#"{"structured_outputs": {"choice": 5}}"#,
                "structured_outputs.choice",
            ),
            (
                r#"{"structured_outputs": {"regex": "a", "choice": ["b"]}}"#,
                "structured_outputs.choice",
            ),
            (r#"{"guided_regex": "a", "guided_json": {}}"#, "guided_regex"),
            (
                r#"{"response_format": {"type": "json_object"}, "guided_regex": "a"}"#,
                "guided_regex",
            ),
            (r#"{"allowed_token_ids": []}"#, "allowed_token_ids"),
            (r#"{"allowed_token_ids": [-1]}"#, "allowed_token_ids[0]"),
            (r#"{"bad_words": "no"}"#, "bad_words"),
            (r#"{"bad_words": [5]}"#, "bad_words[0]"),
        ] {
            let error = restricted(body).expect_err(body);
            assert_eq!(error.param.as_deref(), Some(param), "{body}: {error}");
        }
    }
}
