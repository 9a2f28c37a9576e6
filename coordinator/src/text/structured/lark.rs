//! Pieces of grammars in Lark's notation, and a grammar that is written rule by rule.

use std::fmt::{self, Write as _};

use serde_json::Value;

use super::json_schema::{self, JsonOptions};
use crate::text::TokenTable;

/// Deepest nesting of brackets in a grammar, and of objects and arrays in a schema.
pub(super) const MAX_DEPTH: usize = 64;
/// The terminal of any text, special tokens excepted.
pub(crate) const TEXT: &str = "TEXT";

/// A string literal.
pub(crate) fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// A part of a text as the model spells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Piece<'a> {
    Text(&'a str),
    /// A special token.
    Special(u32),
}

impl fmt::Display for Piece<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => f.write_str(&quoted(text)),
            Self::Special(id) => write!(f, "<[{id}]>"),
        }
    }
}

/// Text cut at the names of special tokens, which the model spells with one token and grammars not as text.
pub(crate) fn pieces<'a>(text: &'a str, table: &TokenTable) -> Vec<Piece<'a>> {
    let mut rest = text;
    let mut out = Vec::new();
    while let Some((at, len, id)) = first_special(rest, table) {
        if at > 0 {
            out.push(Piece::Text(&rest[..at]));
        }
        out.push(Piece::Special(id));
        rest = &rest[at + len..];
    }
    if !rest.is_empty() {
        out.push(Piece::Text(rest));
    }
    out
}

/// The same as an expression of a rule; empty for no text.
pub(super) fn literals(text: &str, table: &TokenTable) -> String {
    let pieces: Vec<String> = pieces(text, table).iter().map(Piece::to_string).collect();
    pieces.join(" ")
}

/// A grammar as it is written.
pub(crate) struct Rules<'a> {
    pub(super) table: &'a TokenTable,
    options: JsonOptions<'a>,
    text: String,
    count: usize,
}

impl<'a> Rules<'a> {
    pub(crate) fn new(table: &'a TokenTable) -> Self {
        Self::with_options(table, JsonOptions::default())
    }

    pub(super) fn with_options(table: &'a TokenTable, options: JsonOptions<'a>) -> Self {
        Self {
            table,
            options,
            text: String::new(),
            count: 0,
        }
    }

    /// The name of a new rule.
    pub(crate) fn rule(&mut self, body: &str) -> String {
        self.define(("r", ""), body)
    }

    /// The name of a new terminal, which is one regular language to the lexer.
    pub(crate) fn terminal(&mut self, body: &str) -> String {
        self.define(("T", ""), body)
    }

    fn define(&mut self, (prefix, attributes): (&str, &str), body: &str) -> String {
        let name = format!("{prefix}{}", self.count);
        self.count += 1;
        let nothing = quoted("");
        let body = if body.trim().is_empty() { &nothing } else { body };
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "{name}{attributes}: {body}");
        name
    }

    pub(crate) fn literals(&self, text: &str) -> String {
        literals(text, self.table)
    }

    /// The special token of this name, if the vocabulary has one.
    pub(crate) fn special(&self, name: &str) -> Option<String> {
        match &pieces(name, self.table)[..] {
            [token @ Piece::Special(_)] => Some(token.to_string()),
            _ => None,
        }
    }

    /// A rule for the JSON of a schema. Errors: not a schema, too deep.
    pub(crate) fn json(&mut self, schema: Value) -> Result<String, String> {
        let schema = json_schema::prepare(schema, self.options)?;
        Ok(self.rule(&format!("%json {schema}")))
    }

    /// A rule for what the terminal `text` matches, with the first `end` behind it. Errors: nothing of `end` is sure to end
    /// the text.
    pub(crate) fn text_up_to(&mut self, text: &str, end: &str) -> Result<String, String> {
        let body = format!("{text} {}", self.literals(end));
        match &pieces(end, self.table)[..] {
            [Piece::Text(_)] => Ok(self.define(("r", "[lazy]"), &body)),
            // Text holds no special tokens, so the first one ends it.
            [Piece::Special(_), ..] => Ok(self.rule(&body)),
            _ => {
                let end = quoted(end);
                Err(format!(
                    "has {end} after free text, which must be text alone or begin with a special token"
                ))
            }
        }
    }

    /// The grammar of the texts that `start` matches.
    pub(crate) fn finish(self, start: &str) -> String {
        format!("start: {start}\n{}{TEXT}: /(.|\\n)*/\n", self.text)
    }
}

/// Place, length and id of the first special token in `text`; of several at one place the longest.
fn first_special(text: &str, table: &TokenTable) -> Option<(usize, usize, u32)> {
    let specials = (0..table.len() as u32).filter(|&id| table.is_special(id));
    let found = specials.filter_map(|id| {
        let name = std::str::from_utf8(table.bytes(id)).ok()?;
        let at = text.find(name).filter(|_| !name.is_empty())?;
        Some((at, name.len(), id))
    });
    found.min_by_key(|&(at, len, _)| (at, usize::MAX - len))
}

/// How deep brackets nest outside of strings, regular expressions and comments.
pub(super) fn depth(grammar: &str) -> usize {
    let (mut depth, mut deepest) = (0usize, 0);
    let mut chars = grammar.chars().peekable();
    while let Some(char) = chars.next() {
        match char {
            '(' | '[' | '{' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            '/' if chars.peek() == Some(&'/') => while chars.next().is_some_and(|char| char != '\n') {},
            '"' | '/' => {
                while let Some(inner) = chars.next() {
                    match inner {
                        '\\' => {
                            chars.next();
                        }
                        '\n' => break,
                        _ if inner == char => break,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    deepest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn brackets_count_where_they_are_brackets() {
        assert_eq!(depth(r#"start: ("a" | [b ( c )])"#), 3);
        assert_eq!(depth(r#"start: "((((" /[(]{2}\/(((/ // ((((("#), 0);
        assert_eq!(depth("start: )))) ( \"\\\"(\""), 1);
        assert_eq!(depth(&"(".repeat(1000)), 1000);
    }
}
