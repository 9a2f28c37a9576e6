//! From a request's constraint to the source that the compiler takes.

use llguidance::api::TopLevelGrammar;
use phalanx_proto::{
    limits::{MAX_CHOICES, MAX_GRAMMAR_BYTES, MAX_REGEX_BYTES},
    v1::{self, structured_outputs::Constraint},
};
use serde_json::json;

use super::{
    ebnf,
    json_schema::{self, JsonOptions},
    lark::{self, MAX_DEPTH},
    structural_tag,
};
use crate::text::TokenTable;

/// Longest name of a field that is repeated in an error.
const MAX_PARAM_BYTES: usize = 64;

type Result<T> = std::result::Result<T, String>;

/// What the caller calls the field with the constraint.
pub(super) fn param(spec: &v1::StructuredOutputs) -> String {
    if (1..=MAX_PARAM_BYTES).contains(&spec.param.len()) {
        return spec.param.clone();
    }
    let field = match &spec.constraint {
        None => return "structured_outputs".to_owned(),
        Some(Constraint::JsonSchema(_)) => "json",
        Some(Constraint::JsonObject(_)) => "json_object",
        Some(Constraint::Regex(_)) => "regex",
        Some(Constraint::Choice(_)) => "choice",
        Some(Constraint::Grammar(_)) => "grammar",
        Some(Constraint::StructuralTag(_)) => "structural_tag",
    };
    format!("structured_outputs.{field}")
}

/// The source of `spec`. Errors say what is wrong, or which limit is broken.
pub(super) fn grammar(spec: &v1::StructuredOutputs, table: &TokenTable) -> Result<TopLevelGrammar> {
    let options = JsonOptions {
        disable_any_whitespace: spec.disable_any_whitespace,
        disable_additional_properties: spec.disable_additional_properties,
        whitespace_pattern: spec.whitespace_pattern.as_deref(),
    };
    let pattern = options.whitespace_pattern.unwrap_or_default();
    within("whitespace_pattern ", pattern.len(), MAX_REGEX_BYTES)?;
    match &spec.constraint {
        None => Err("one of json, json_object, regex, choice, grammar and structural_tag is needed".into()),
        Some(Constraint::JsonSchema(schema)) => {
            within("", schema.len(), MAX_GRAMMAR_BYTES)?;
            let schema = json_schema::parse(schema, options)?;
            Ok(TopLevelGrammar::from_json_schema(schema))
        }
        Some(Constraint::JsonObject(true)) => {
            let schema = json_schema::prepare(json!({"type": "object"}), options)?;
            Ok(TopLevelGrammar::from_json_schema(schema))
        }
        Some(Constraint::JsonObject(false)) => Err("must be true, or absent".into()),
        Some(Constraint::Regex(regex)) => of_regex(regex),
        Some(Constraint::Choice(choice)) => of_choice(&choice.choices),
        Some(Constraint::Grammar(grammar)) => of_grammar(grammar),
        Some(Constraint::StructuralTag(tag)) => {
            within("", tag.len(), MAX_GRAMMAR_BYTES)?;
            let grammar = structural_tag::to_lark(tag, options, table)?;
            checked_lark(grammar)
        }
    }
}

fn within(what: &str, bytes: usize, limit: usize) -> Result<()> {
    if bytes <= limit {
        return Ok(());
    }
    Err(format!("{what}has {bytes} bytes, the limit is {limit}"))
}

fn of_regex(regex: &str) -> Result<TopLevelGrammar> {
    within("", regex.len(), MAX_REGEX_BYTES)?;
    let regex = unanchored(regex);
    if regex.is_empty() {
        return Err("must not be empty".into());
    }
    Ok(TopLevelGrammar::from_regex(regex))
}

/// The whole completion matches, so anchors at the ends say nothing.
pub(super) fn unanchored(regex: &str) -> &str {
    let regex = regex.strip_prefix('^').unwrap_or(regex);
    let Some(rest) = regex.strip_suffix('$') else {
        return regex;
    };
    let escapes = rest.chars().rev().take_while(|&char| char == '\\').count();
    if escapes % 2 == 0 { rest } else { regex }
}

fn of_choice(choices: &[String]) -> Result<TopLevelGrammar> {
    if choices.is_empty() || choices.len() > MAX_CHOICES {
        let count = choices.len();
        return Err(format!("has {count} entries, allowed are 1 to {MAX_CHOICES}"));
    }
    let bytes = choices.iter().map(String::len).fold(0, usize::saturating_add);
    within("", bytes, MAX_GRAMMAR_BYTES)?;
    if let Some(at) = choices.iter().position(String::is_empty) {
        return Err(format!("[{at}] is empty"));
    }
    let choices: Vec<String> = choices.iter().map(|choice| lark::quoted(choice)).collect();
    // One terminal is one state machine, however many there are.
    let grammar = format!("start: CHOICE\nCHOICE: {}\n", choices.join(" | "));
    Ok(TopLevelGrammar::from_lark(grammar))
}

fn of_grammar(grammar: &str) -> Result<TopLevelGrammar> {
    within("", grammar.len(), MAX_GRAMMAR_BYTES)?;
    if grammar.trim().is_empty() {
        return Err("must not be empty".into());
    }
    if ebnf::is_ebnf(grammar) {
        checked_lark(ebnf::to_lark(grammar)?)
    } else {
        checked_lark(grammar.to_owned())
    }
}

fn checked_lark(grammar: String) -> Result<TopLevelGrammar> {
    if lark::depth(&grammar) > MAX_DEPTH {
        return Err(format!("is nested deeper than the limit of {MAX_DEPTH}"));
    }
    Ok(TopLevelGrammar::from_lark(grammar))
}
