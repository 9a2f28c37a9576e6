//! Pieces of grammars in Lark's notation.

use std::fmt;

use crate::text::TokenTable;

/// Deepest nesting of brackets in a grammar, and of objects and arrays in a schema.
pub(super) const MAX_DEPTH: usize = 64;

/// A string literal.
pub(super) fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// A part of a text as the model spells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece<'a> {
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
pub(super) fn pieces<'a>(text: &'a str, table: &TokenTable) -> Vec<Piece<'a>> {
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
