//! `[TOOL_CALLS]`, then a JSON list of calls (until tokenizer version 7) or a name and its arguments (from 11 on).

use super::{
    super::tag::{Piece, TagScanner},
    Sink,
    call::{CallList, End, JsonValue},
};

pub(super) const CALLS: &str = "[TOOL_CALLS]";
pub(super) const CALL_ID: &str = "[CALL_ID]";
pub(super) const ARGS: &str = "[ARGS]";
pub(super) const TAGS: &[&str] = &[CALLS, CALL_ID, ARGS];

#[derive(Debug)]
pub(super) struct Mistral {
    scanner: TagScanner,
    at: At,
}

#[derive(Debug)]
enum At {
    Text,
    /// After the first tag: the name so far, and all the text since the tag, with it.
    Head {
        name: String,
        raw: String,
        in_id: bool,
    },
    List(CallList),
    Arguments(JsonValue),
}

impl Mistral {
    pub(super) fn new() -> Self {
        Self {
            scanner: TagScanner::new(TAGS),
            at: At::Text,
        }
    }

    pub(super) fn push(&mut self, text: &str, sink: &mut Sink<'_>) {
        let at = &mut self.at;
        self.scanner.push(text, |piece| match piece {
            Piece::Text(text) => at.text(text, sink),
            Piece::Tag(tag) => at.tag(tag, sink),
        });
    }

    pub(super) fn finish(&mut self, sink: &mut Sink<'_>) {
        let held = self.scanner.finish();
        self.at.text(&held, sink);
        self.at.end(sink);
    }
}

impl At {
    fn tag(&mut self, tag: &str, sink: &mut Sink<'_>) {
        match self {
            // Within arguments it is a text that looks like a tag.
            Self::Arguments(_) => self.text(tag, sink),
            _ if tag == CALLS => {
                self.end(sink);
                *self = Self::Head {
                    name: String::new(),
                    raw: tag.to_owned(),
                    in_id: false,
                };
            }
            Self::Head { name, raw, in_id } => {
                raw.push_str(tag);
                if tag == CALL_ID {
                    *in_id = true;
                } else if name.is_empty() {
                    self.end(sink);
                } else {
                    sink.begin(name);
                    *self = Self::Arguments(JsonValue::default());
                }
            }
            Self::Text | Self::List(_) => self.text(tag, sink),
        }
    }

    fn text(&mut self, text: &str, sink: &mut Sink<'_>) {
        let mut rest = text;
        while !rest.is_empty() {
            rest = match self {
                Self::Text => {
                    sink.content(rest);
                    ""
                }
                Self::Head { .. } => self.head(rest, sink),
                Self::List(list) => match list.push(rest, sink) {
                    None => "",
                    Some(rest) => {
                        self.end(sink);
                        rest
                    }
                },
                Self::Arguments(_) => self.arguments(rest, sink),
            };
        }
    }

    /// Takes one character of what stands between the tag and the arguments; returns the rest.
    fn head<'a>(&mut self, text: &'a str, sink: &mut Sink<'_>) -> &'a str {
        let Self::Head { name, raw, in_id } = self else {
            return text;
        };
        let Some(char) = text.chars().next() else {
            return "";
        };
        match char {
            '[' | '{' if name.is_empty() => {
                *self = Self::List(CallList::new(raw, true));
                return text;
            }
            '{' => {
                sink.begin(name);
                *self = Self::Arguments(JsonValue::default());
                return text;
            }
            _ => raw.push(char),
        }
        if *in_id || char.is_whitespace() {
            // Whose id it is does not matter: the server makes its own.
        } else if is_name(char) {
            name.push(char);
        } else {
            self.end(sink);
        }
        &text[char.len_utf8()..]
    }

    /// Takes arguments; returns what follows them.
    fn arguments<'a>(&mut self, text: &'a str, sink: &mut Sink<'_>) -> &'a str {
        let Self::Arguments(value) = self else { return text };
        for (at, char) in text.char_indices() {
            let next = match value.take(char) {
                End::Not => {
                    sink.argument(char);
                    continue;
                }
                End::Here => {
                    sink.argument(char);
                    at + char.len_utf8()
                }
                End::Before => at,
            };
            *self = Self::Text;
            return &text[next..];
        }
        ""
    }

    /// The text or the list ends here: what was no call is content.
    fn end(&mut self, sink: &mut Sink<'_>) {
        match std::mem::replace(self, Self::Text) {
            Self::Text | Self::Arguments(_) => {}
            Self::Head { raw, .. } => sink.content(&raw),
            Self::List(list) => sink.content(&list.into_raw()),
        }
    }
}

/// Whether `char` can stand in a function's name that is no JSON.
pub(super) fn is_name(char: char) -> bool {
    char.is_alphanumeric() || "_-.:/".contains(char)
}
