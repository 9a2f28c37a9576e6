//! A Python list of calls that is the whole message.

use super::{
    super::tag::{Piece, TagScanner},
    Sink,
    python::{Progress, Python},
};

pub(super) const START: &str = "<|python_start|>";
pub(super) const END: &str = "<|python_end|>";
pub(super) const TAGS: &[&str] = &[START, END];
/// Longer names are no names.
const MAX_NAME: usize = 256;

#[derive(Debug)]
pub(super) struct Pythonic {
    scanner: TagScanner,
    at: At,
    /// What was taken and not told yet.
    raw: String,
}

#[derive(Debug)]
enum At {
    /// Before the list.
    Start,
    /// In the list, before or in a function's name.
    Name(String),
    Arguments(Python),
    /// After a call.
    Comma,
    /// After the list, or in a message that is none.
    Text,
}

impl Pythonic {
    pub(super) fn new() -> Self {
        Self {
            scanner: TagScanner::new(TAGS),
            at: At::Start,
            raw: String::new(),
        }
    }

    pub(super) fn push(&mut self, text: &str, sink: &mut Sink<'_>) {
        let (at, raw) = (&mut self.at, &mut self.raw);
        self.scanner.push(text, |piece| match (piece, &*at) {
            // They mark where a list begins and ends, which its brackets tell, too.
            (Piece::Tag(_), At::Start | At::Text) => {}
            (Piece::Tag(text) | Piece::Text(text), _) => take_all(at, raw, text, sink),
        });
    }

    pub(super) fn finish(&mut self, sink: &mut Sink<'_>) {
        let held = self.scanner.finish();
        take_all(&mut self.at, &mut self.raw, &held, sink);
        sink.content(&self.raw);
    }
}

fn take_all(at: &mut At, raw: &mut String, text: &str, sink: &mut Sink<'_>) {
    for (place, char) in text.char_indices() {
        if matches!(at, At::Text) {
            return sink.content(&text[place..]);
        }
        raw.push(char);
        if !take(at, raw, char, sink) {
            *at = At::Text;
            sink.content(raw);
            raw.clear();
        }
    }
}

/// False if `char` does not belong here: it and what was held back are text.
fn take(at: &mut At, raw: &mut String, char: char, sink: &mut Sink<'_>) -> bool {
    match at {
        At::Start if char.is_whitespace() => {}
        At::Start if char == '[' => *at = At::Name(String::new()),
        At::Name(name) if char == '(' && !name.is_empty() => {
            sink.begin(name);
            sink.arguments("{");
            raw.clear();
            *at = At::Arguments(Python::arguments());
        }
        At::Name(name) if char.is_whitespace() && name.is_empty() => {}
        // A comma after the last call.
        At::Name(name) if char == ']' && name.is_empty() && raw.trim_start() == "]" => {
            raw.clear();
            *at = At::Text;
        }
        At::Name(name) if is_name(char, name) && name.len() < MAX_NAME => name.push(char),
        At::Arguments(python) => {
            let mut json = String::new();
            let progress = python.take(char, &mut json);
            sink.arguments(&json);
            match progress {
                Progress::Broken => return false,
                Progress::More => {}
                Progress::Done => *at = At::Comma,
            }
            raw.clear();
        }
        At::Comma if char.is_whitespace() => raw.clear(),
        At::Comma if char == ',' => {
            raw.clear();
            *at = At::Name(String::new());
        }
        At::Comma if char == ']' => {
            raw.clear();
            *at = At::Text;
        }
        At::Start | At::Name(_) | At::Comma => return false,
        At::Text => {}
    }
    true
}

fn is_name(char: char, before: &str) -> bool {
    let begins = char.is_alphabetic() || char == '_';
    begins || (!before.is_empty() && (char.is_alphanumeric() || matches!(char, '.' | '-')))
}

/// Whether a text can name a function.
pub(super) fn is_function_name(text: &str) -> bool {
    let mut chars = text.char_indices();
    (1..=MAX_NAME).contains(&text.len()) && chars.all(|(at, char)| is_name(char, &text[..at]))
}
