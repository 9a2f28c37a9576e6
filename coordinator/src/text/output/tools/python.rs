//! Python's literals, as JSON: `{'a': (1, None)}` is `{"a": [1, null]}`.

/// Most brackets within brackets.
const MAX_DEPTH: usize = 64;
/// Most bytes of a number or a name.
const MAX_WORD: usize = 256;

/// Whether a text goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    More,
    /// The outermost bracket is closed.
    Done,
    /// This is no Python, or none that JSON can say.
    Broken,
}

/// Writes JSON while it reads Python, character by character.
#[derive(Debug)]
pub(super) struct Python {
    open: Vec<Bracket>,
    expects: Expects,
    word: Word,
}

#[derive(Debug)]
struct Bracket {
    kind: Kind,
    /// It has an item already.
    is_filled: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// `f(name=value)`, an object.
    Call,
    Dict,
    List,
    Tuple,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expects {
    Key,
    Colon,
    Value,
    Comma,
}

/// What is being read.
#[derive(Debug)]
enum Word {
    None,
    /// A number, a name, a constant.
    Bare(String),
    Text {
        quote: char,
        escape: Option<String>,
    },
}

impl Kind {
    fn close(self) -> char {
        match self {
            Self::Call | Self::Tuple => ')',
            Self::Dict => '}',
            Self::List => ']',
        }
    }

    fn first(self) -> Expects {
        match self {
            Self::Call | Self::Dict => Expects::Key,
            Self::List | Self::Tuple => Expects::Value,
        }
    }
}

impl Python {
    /// The arguments of a call, after its opening parenthesis. The caller writes the first brace.
    pub(super) fn arguments() -> Self {
        Self {
            open: vec![Bracket {
                kind: Kind::Call,
                is_filled: false,
            }],
            expects: Expects::Key,
            word: Word::None,
        }
    }

    /// A list, tuple or dictionary.
    fn value() -> Self {
        Self {
            open: Vec::new(),
            expects: Expects::Value,
            word: Word::None,
        }
    }

    /// Takes the next character and appends to `out` what it adds to the JSON.
    pub(super) fn take(&mut self, char: char, out: &mut String) -> Progress {
        match &mut self.word {
            Word::Text { quote, escape } => {
                let Some(ended) = text(*quote, escape, char, out) else {
                    return Progress::Broken;
                };
                if ended {
                    self.end_item();
                }
                return Progress::More;
            }
            Word::Bare(word) if is_bare(char) && word.len() < MAX_WORD => {
                word.push(char);
                return Progress::More;
            }
            Word::Bare(word) => {
                let word = std::mem::take(word);
                if !self.bare(&word, out) {
                    return Progress::Broken;
                }
            }
            Word::None => {}
        }
        if char.is_whitespace() {
            return Progress::More;
        }
        self.punctuation(char, out)
    }

    fn punctuation(&mut self, char: char, out: &mut String) -> Progress {
        let kind = self.open.last().map(|bracket| bracket.kind);
        let separator = if kind == Some(Kind::Call) { '=' } else { ':' };
        match (char, self.expects) {
            (',', Expects::Comma) => {
                self.expects = kind.map_or(Expects::Comma, Kind::first);
                Progress::More
            }
            (char, Expects::Colon) if char == separator => {
                out.push_str(": ");
                self.expects = Expects::Value;
                Progress::More
            }
            (char, expects) if kind.is_some_and(|kind| char == kind.close() && closes(kind, expects)) => {
                self.close(out)
            }
            ('"' | '\'', Expects::Value | Expects::Key) if self.may_be_text() => {
                self.begin_item(out);
                out.push('"');
                self.word = Word::Text {
                    quote: char,
                    escape: None,
                };
                Progress::More
            }
            ('[', Expects::Value) => self.open(Kind::List, out),
            ('(', Expects::Value) => self.open(Kind::Tuple, out),
            ('{', Expects::Value) => self.open(Kind::Dict, out),
            (char, Expects::Value | Expects::Key) if is_bare(char) => {
                self.word = Word::Bare(char.into());
                Progress::More
            }
            _ => Progress::Broken,
        }
    }

    /// Names of arguments are no texts.
    fn may_be_text(&self) -> bool {
        let in_call = self.open.last().is_some_and(|bracket| bracket.kind == Kind::Call);
        !(in_call && self.expects == Expects::Key)
    }

    fn open(&mut self, kind: Kind, out: &mut String) -> Progress {
        if self.open.len() == MAX_DEPTH {
            return Progress::Broken;
        }
        self.begin_item(out);
        out.push(if kind == Kind::Dict { '{' } else { '[' });
        self.open.push(Bracket {
            kind,
            is_filled: false,
        });
        self.expects = kind.first();
        Progress::More
    }

    fn close(&mut self, out: &mut String) -> Progress {
        let Some(bracket) = self.open.pop() else {
            return Progress::Broken;
        };
        let is_object = matches!(bracket.kind, Kind::Call | Kind::Dict);
        out.push(if is_object { '}' } else { ']' });
        self.expects = Expects::Comma;
        if self.open.is_empty() {
            Progress::Done
        } else {
            Progress::More
        }
    }

    /// Separates a key, or a value that has none, from what comes before it.
    fn begin_item(&mut self, out: &mut String) {
        let Some(bracket) = self.open.last_mut() else {
            return;
        };
        let has_key = matches!(bracket.kind, Kind::Call | Kind::Dict);
        if has_key && self.expects == Expects::Value {
            return;
        }
        if std::mem::replace(&mut bracket.is_filled, true) {
            out.push_str(", ");
        }
    }

    fn end_item(&mut self) {
        self.word = Word::None;
        self.expects = if self.expects == Expects::Key {
            Expects::Colon
        } else {
            Expects::Comma
        };
    }

    /// Writes a number, a constant or a key; false if it is none.
    fn bare(&mut self, word: &str, out: &mut String) -> bool {
        self.begin_item(out);
        let is_key = self.expects == Expects::Key;
        let constant = match word {
            "True" | "true" => Some("true"),
            "False" | "false" => Some("false"),
            "None" | "null" => Some("null"),
            _ => None,
        };
        if let (Some(constant), false) = (constant, is_key) {
            out.push_str(constant);
        } else if is_key && self.open.last().is_some_and(|bracket| bracket.kind == Kind::Call) {
            if word.starts_with(|first: char| first.is_ascii_digit()) {
                return false;
            }
            quote(word, out);
        } else {
            let Some(number) = number(word) else { return false };
            // JSON's keys are texts.
            if is_key {
                quote(&number, out)
            } else {
                out.push_str(&number)
            }
        }
        self.end_item();
        true
    }
}

/// The JSON of a whole list, tuple or dictionary; none if it is something else.
pub(super) fn to_json(text: &str) -> Option<String> {
    let (mut python, mut out) = (Python::value(), String::new());
    let mut chars = text.trim().chars();
    if !text.trim().starts_with(['[', '(', '{']) {
        return None;
    }
    for char in chars.by_ref() {
        match python.take(char, &mut out) {
            Progress::More => {}
            Progress::Broken => return None,
            Progress::Done => return chars.next().is_none().then_some(out),
        }
    }
    None
}

/// Brackets may be empty, and end with a comma.
fn closes(kind: Kind, expects: Expects) -> bool {
    expects == Expects::Comma || expects == kind.first()
}

fn is_bare(char: char) -> bool {
    char.is_alphanumeric() || matches!(char, '_' | '.' | '+' | '-')
}

/// Whether a text can name an argument.
pub(super) fn is_argument_name(text: &str) -> bool {
    let begins = text.starts_with(|first: char| is_bare(first) && !first.is_ascii_digit());
    begins && text.len() <= MAX_WORD && text.chars().all(is_bare)
}

/// A Python number as JSON has it.
fn number(word: &str) -> Option<String> {
    let plain = word.replace('_', "");
    if serde_json::from_str::<serde_json::Number>(&plain).is_ok() {
        return Some(plain);
    }
    let float: f64 = plain.parse().ok()?;
    serde_json::Number::from_f64(float).map(|number| number.to_string())
}

fn quote(text: &str, out: &mut String) {
    out.push('"');
    text.chars().for_each(|char| escape_into(char, out));
    out.push('"');
}

/// A character within a JSON string.
pub(super) fn escape_into(char: char, out: &mut String) {
    use std::fmt::Write as _;
    match char {
        '"' => out.push_str("\\\""),
        '\\' => out.push_str("\\\\"),
        '\n' => out.push_str("\\n"),
        '\r' => out.push_str("\\r"),
        '\t' => out.push_str("\\t"),
        // Writing to a String does not fail.
        char if u32::from(char) < 0x20 => drop(write!(out, "\\u{:04x}", u32::from(char))),
        char => out.push(char),
    }
}

/// Takes the next character of a text; whether it ended it. None: an escape that is none.
fn text(quote: char, escape: &mut Option<String>, char: char, out: &mut String) -> Option<bool> {
    if let Some(code) = escape {
        code.push(char);
        let done = unescape(code)?;
        if let Some(char) = done {
            char.into_iter().for_each(|char| escape_into(char, out));
            *escape = None;
        }
        return Some(false);
    }
    match char {
        '\\' => *escape = Some(String::new()),
        char if char == quote => {
            out.push('"');
            return Some(true);
        }
        char => escape_into(char, out),
    }
    Some(false)
}

/// The characters that a backslash and `code` stand for; inner none: not yet. Unknown escapes stand for themselves.
fn unescape(code: &str) -> Option<Option<Vec<char>>> {
    let mut chars = code.chars();
    let first = chars.next()?;
    let digits = chars.as_str();
    let length = match first {
        'x' => 2,
        'u' => 4,
        'U' => 8,
        _ => {
            let one = |char| Some(Some(vec![char]));
            return match first {
                'n' => one('\n'),
                'r' => one('\r'),
                't' => one('\t'),
                'b' => one('\u{8}'),
                'f' => one('\u{c}'),
                '0' => one('\0'),
                '\\' | '\'' | '"' => one(first),
                // A line that goes on.
                '\n' => Some(Some(Vec::new())),
                other => Some(Some(vec!['\\', other])),
            };
        }
    };
    if digits.len() < length {
        return digits
            .chars()
            .all(|digit| digit.is_ascii_hexdigit())
            .then_some(None);
    }
    let point = u32::from_str_radix(digits, 16).ok()?;
    // Half of a surrogate pair is no character.
    let char = char::from_u32(point).unwrap_or(char::REPLACEMENT_CHARACTER);
    Some(Some(vec![char]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_are_json() {
        for (python, json) in [
            ("[1, -2.5, 1_000, .5, 1e3]", "[1, -2.5, 1000, 0.5, 1e3]"),
            (
                "{'a': True, \"b\": (None, False,)}",
                r#"{"a": true, "b": [null, false]}"#,
            ),
            (
                r#"['it\'s', "a\"b", 'a"b', '\x41\u00e9\n\b\f\q']"#,
                r#"["it's", "a\"b", "a\"b", "Aé\n\u0008\u000c\\q"]"#,
            ),
            ("{1: [], 2.5: {}}", r#"{"1": [], "2.5": {}}"#),
            ("()", "[]"),
        ] {
            assert_eq!(to_json(python).as_deref(), Some(json), "{python}");
            serde_json::from_str::<serde_json::Value>(json).expect("JSON");
        }
        for other in [
            "1",
            "[1",
            "[1 2]",
            "{1, 2}",
            "[a]",
            "[1]]",
            "['\\xq1']",
            "[,]",
            "",
            &"[".repeat(100),
        ] {
            assert_eq!(to_json(other), None, "{other}");
        }
    }
}
