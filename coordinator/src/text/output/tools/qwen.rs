//! Calls whose arguments are tags of their own; the schema says what a value between them is.

use std::sync::Arc;

use super::{
    super::{
        super::{json::Json, tools::ToolSet},
        tag::{Piece, TagScanner},
    },
    Sink,
    hermes::{CLOSE, OPEN, Tagged},
    python::{self, escape_into},
};

pub(super) const FUNCTION: &str = "<function=";
pub(super) const END_FUNCTION: &str = "</function>";
pub(super) const PARAMETER: &str = "<parameter=";
pub(super) const END_PARAMETER: &str = "</parameter>";
pub(super) const TAGS: &[&str] = &[OPEN, CLOSE, FUNCTION, END_FUNCTION, PARAMETER, END_PARAMETER];
/// Longer names are no names.
const MAX_NAME: usize = 256;

/// Whether a text can name a function or an argument.
pub(super) fn is_name(text: &str) -> bool {
    let bare = text.trim().trim_matches(['"', '\'']);
    (1..=MAX_NAME).contains(&text.len()) && bare == text && !text.contains(['\n', '<', '>'])
}

#[derive(Debug)]
pub(super) struct Qwen {
    scanner: TagScanner,
    call: XmlCall,
}

impl Qwen {
    pub(super) fn new(tools: Arc<ToolSet>) -> Self {
        Self {
            scanner: TagScanner::new(TAGS),
            call: XmlCall {
                tools,
                at: At::Text,
                raw: String::new(),
                function: String::new(),
                is_filled: false,
            },
        }
    }

    pub(super) fn push(&mut self, text: &str, sink: &mut Sink<'_>) {
        let call = &mut self.call;
        self.scanner.push(text, |piece| match piece {
            Piece::Text(text) => call.text(text, sink),
            Piece::Tag(tag) => call.tag(tag, sink),
        });
    }

    pub(super) fn finish(&mut self, sink: &mut Sink<'_>) {
        let held = self.scanner.finish();
        self.call.text(&held, sink);
        if let At::Json(json) = std::mem::replace(&mut self.call.at, At::Text) {
            json.end("", sink);
        }
        sink.content(&self.call.raw);
    }
}

/// A call, or the text around it.
#[derive(Debug)]
struct XmlCall {
    tools: Arc<ToolSet>,
    at: At,
    /// What was taken and not told yet.
    raw: String,
    /// The function's name.
    function: String,
    /// It has an argument.
    is_filled: bool,
}

#[derive(Debug)]
enum At {
    Text,
    /// After the first tag.
    Opened,
    Json(Tagged),
    /// In the function's name.
    Function(String),
    /// Between arguments.
    Arguments,
    /// In an argument's name.
    Parameter(String),
    Value(Value),
    /// After the function, where a closing tag may come.
    Done,
}

/// The value of an argument.
#[derive(Debug)]
enum Value {
    /// Told as it comes, less one line break at either end.
    Text { is_empty: bool, line: bool },
    /// Converted at its end.
    Typed { text: String, schema: Json },
}

impl XmlCall {
    fn text(&mut self, text: &str, sink: &mut Sink<'_>) {
        let mut rest = text;
        while !rest.is_empty() {
            rest = match &mut self.at {
                At::Text => {
                    sink.content(rest);
                    ""
                }
                At::Opened => self.opened(rest, sink),
                At::Json(json) => {
                    if !json.push(rest, sink) {
                        self.at = At::Text;
                    }
                    ""
                }
                At::Function(_) | At::Parameter(_) => self.name(rest, sink),
                At::Value(value) => {
                    value.push(rest, sink);
                    ""
                }
                At::Arguments => "",
                At::Done => {
                    if !rest.trim().is_empty() {
                        self.at = At::Text;
                    }
                    sink.content(rest);
                    ""
                }
            };
        }
    }

    fn tag(&mut self, tag: &str, sink: &mut Sink<'_>) {
        match (&mut self.at, tag) {
            (At::Json(_), CLOSE | OPEN) => self.end_json(tag, sink),
            (At::Text | At::Done, OPEN) => self.hold(At::Opened, tag),
            (At::Text | At::Opened | At::Done, FUNCTION) => self.hold(At::Function(String::new()), tag),
            (At::Done, _) => self.at = if tag == CLOSE { At::Text } else { At::Done },
            (At::Arguments, PARAMETER) => self.at = At::Parameter(String::new()),
            (At::Arguments, END_FUNCTION) => self.end_function(At::Done, sink),
            (At::Arguments, CLOSE) => self.end_function(At::Text, sink),
            // Models forget to close arguments.
            (At::Value(_), PARAMETER | END_PARAMETER | END_FUNCTION | CLOSE) => {
                self.end_value(sink);
                if tag != END_PARAMETER {
                    self.tag(tag, sink);
                }
            }
            (At::Text | At::Json(_) | At::Value(_), _) => self.text(tag, sink),
            (At::Arguments, _) => {}
            (At::Parameter(_), _) => {
                self.at = At::Arguments;
                self.tag(tag, sink);
            }
            (At::Opened | At::Function(_), _) => self.give_up(tag, sink),
        }
    }

    fn hold(&mut self, at: At, tag: &str) {
        self.raw.push_str(tag);
        self.at = at;
    }

    /// A tag ends JSON calls; an opening one begins the next call, too.
    fn end_json(&mut self, tag: &str, sink: &mut Sink<'_>) {
        let At::Json(json) = std::mem::replace(&mut self.at, At::Text) else {
            return;
        };
        if tag == OPEN {
            json.end("", sink);
            self.hold(At::Opened, tag);
        } else {
            json.end(tag, sink);
        }
    }

    /// This is no call: what was held back is content.
    fn give_up(&mut self, text: &str, sink: &mut Sink<'_>) {
        self.at = At::Text;
        sink.content(&std::mem::take(&mut self.raw));
        sink.content(text);
    }

    /// Takes one character after the opening tag; returns the rest.
    fn opened<'a>(&mut self, text: &'a str, sink: &mut Sink<'_>) -> &'a str {
        let length = text.chars().next().map_or(0, char::len_utf8);
        let (first, rest) = text.split_at(length);
        if first.trim().is_empty() {
            self.raw.push_str(first);
        } else if first == "{" || first == "[" {
            self.at = At::Json(Tagged::new(&std::mem::take(&mut self.raw)));
            return text;
        } else {
            self.give_up(first, sink);
        }
        rest
    }

    /// Takes a name as far as its end; returns the rest.
    fn name<'a>(&mut self, text: &'a str, sink: &mut Sink<'_>) -> &'a str {
        let (At::Function(name) | At::Parameter(name)) = &mut self.at else {
            return text;
        };
        let end = text.find('>');
        let (more, rest) = text.split_at(end.unwrap_or(text.len()));
        name.push_str(more);
        let is_function = matches!(self.at, At::Function(_));
        if is_function {
            self.raw.push_str(more);
        }
        let (At::Function(name) | At::Parameter(name)) = &self.at else {
            return rest;
        };
        let is_empty = end.is_some() && name.trim().trim_matches(['"', '\'']).is_empty();
        if is_empty || name.len() > MAX_NAME || name.contains(['\n', '<']) {
            if is_function {
                self.give_up("", sink);
            } else {
                self.at = At::Arguments;
            }
            return rest;
        }
        if end.is_none() {
            return "";
        }
        let name = name.trim().trim_matches(['"', '\'']).to_owned();
        if is_function {
            self.begin_function(name, sink);
        } else {
            self.begin_value(&name, sink);
        }
        &rest[1..]
    }

    fn begin_function(&mut self, name: String, sink: &mut Sink<'_>) {
        self.raw.clear();
        sink.begin(&name);
        sink.arguments("{");
        self.function = name;
        self.is_filled = false;
        self.at = At::Arguments;
    }

    fn end_function(&mut self, at: At, sink: &mut Sink<'_>) {
        sink.arguments("}");
        self.at = at;
    }

    fn begin_value(&mut self, name: &str, sink: &mut Sink<'_>) {
        let separator = if std::mem::replace(&mut self.is_filled, true) {
            ", "
        } else {
            ""
        };
        sink.arguments(&format!("{separator}{}: ", Json::from(name)));
        let schema = self.tools.parameter(&self.function, name);
        self.at = At::Value(match schema.filter(|schema| !is_text(schema)) {
            Some(schema) => Value::Typed {
                text: String::new(),
                schema: schema.clone(),
            },
            None => {
                sink.arguments("\"");
                Value::Text {
                    is_empty: true,
                    line: false,
                }
            }
        });
    }

    fn end_value(&mut self, sink: &mut Sink<'_>) {
        if let At::Value(value) = std::mem::replace(&mut self.at, At::Arguments) {
            match value {
                Value::Text { .. } => sink.arguments("\""),
                Value::Typed { text, schema } => sink.arguments(&convert(&text, &schema)),
            }
        }
    }
}

impl Value {
    fn push(&mut self, text: &str, sink: &mut Sink<'_>) {
        match self {
            Self::Typed { text: all, .. } => all.push_str(text),
            Self::Text { is_empty, line } => {
                let mut json = String::new();
                for char in text.chars() {
                    if std::mem::take(line) {
                        json.push_str("\\n");
                    }
                    match char {
                        '\n' if *is_empty => {}
                        '\n' => *line = true,
                        char => escape_into(char, &mut json),
                    }
                    *is_empty = false;
                }
                sink.arguments(&json);
            }
        }
    }
}

/// The types a schema allows, in lower case.
pub(super) fn types(schema: &Json) -> Vec<String> {
    let names: Vec<&Json> = match schema.get("type") {
        Some(Json::Array(names)) => names.iter().collect(),
        Some(name) => vec![name],
        None => {
            let any = schema.get("anyOf").or_else(|| schema.get("oneOf"));
            let any = any.and_then(Json::as_array).unwrap_or_default();
            return any.iter().flat_map(types).collect();
        }
    };
    let names = names.into_iter().filter_map(Json::as_str);
    names.map(str::to_ascii_lowercase).collect()
}

/// Whether values are texts whatever they look like: the schema says so, or nothing.
pub(super) fn is_text(schema: &Json) -> bool {
    let is_bare = ["type", "anyOf", "oneOf", "$ref", "allOf"]
        .iter()
        .all(|key| schema.get(key).is_none());
    is_bare
        || types(schema)
            .iter()
            .any(|name| matches!(name.as_str(), "string" | "str" | "text" | "enum"))
}

/// A value as its schema has it; a text if it does not fit.
fn convert(text: &str, schema: &Json) -> String {
    let text = text.strip_prefix('\n').unwrap_or(text);
    let text = text.strip_suffix('\n').unwrap_or(text);
    let word = text.trim();
    let constant = match word.to_ascii_lowercase().as_str() {
        "null" | "none" => Some("null"),
        "true" => Some("true"),
        "false" => Some("false"),
        _ => None,
    };
    if let Some(constant) = constant {
        return constant.to_owned();
    }
    let types = types(schema);
    let is_structure = types.is_empty()
        || types
            .iter()
            .any(|name| matches!(name.as_str(), "object" | "array" | "dict" | "list"));
    match serde_json::from_str::<Json>(word) {
        Ok(Json::Number(_) | Json::Array(_) | Json::Object(_)) => return word.to_owned(),
        Ok(Json::String(_)) if is_structure => return word.to_owned(),
        _ => {}
    }
    let literal = is_structure.then(|| python::to_json(word)).flatten();
    literal.unwrap_or_else(|| Json::from(text).to_string())
}
