//! Calls written as JSON objects, `{"name": ..., "arguments": {...}}`, one after another.

use super::Sink;

/// Characters between calls, be they in a list or not.
const SEPARATORS: [char; 4] = ['[', ']', ',', ';'];

/// Calls one after another. Takes text until it is no such thing any more.
#[derive(Debug)]
pub(super) struct CallList {
    call: Option<Call>,
    /// What was taken and not told yet.
    raw: String,
    /// The text says that these are calls, so one without arguments is one, too.
    is_certain: bool,
    has_called: bool,
}

impl CallList {
    /// `raw` is what stood before the list and is content with it should it hold no call.
    pub(super) fn new(raw: &str, is_certain: bool) -> Self {
        Self {
            call: None,
            raw: raw.to_owned(),
            is_certain,
            has_called: false,
        }
    }

    /// Takes the next text; returns what is left of it once it is no list of calls, of which [`Self::into_raw`] is the
    /// beginning.
    pub(super) fn push<'a>(&mut self, text: &'a str, sink: &mut Sink<'_>) -> Option<&'a str> {
        for (at, char) in text.char_indices() {
            self.raw.push(char);
            if !self.take(char, sink) {
                return Some(&text[at + char.len_utf8()..]);
            }
        }
        None
    }

    /// False if `char` does not belong here.
    fn take(&mut self, char: char, sink: &mut Sink<'_>) -> bool {
        if self.call.is_none() && char != '{' {
            return char.is_whitespace() || SEPARATORS.contains(&char);
        }
        let certain = self.is_certain;
        let call = self.call.get_or_insert_with(|| Call::new(certain));
        let progress = call.take(char, sink);
        if call.is_told {
            self.has_called = true;
            self.raw.clear();
        }
        match progress {
            Progress::More => true,
            Progress::Done => {
                self.call = None;
                true
            }
            Progress::Broken => {
                // The stray character after a call that was told is content.
                if self.raw.is_empty() {
                    self.raw.push(char);
                }
                false
            }
        }
    }

    pub(super) fn has_called(&self) -> bool {
        self.has_called
    }

    /// The text that was no call, less what stands between calls.
    pub(super) fn into_raw(self) -> String {
        if !self.has_called {
            return self.raw;
        }
        let is_gap = |char: char| char.is_whitespace() || SEPARATORS.contains(&char);
        self.raw.trim_start_matches(is_gap).to_owned()
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Progress {
    More,
    /// The object is closed.
    Done,
    /// This is no call, or its rest is no JSON.
    Broken,
}

/// One call, character by character.
#[derive(Debug)]
struct Call {
    at: At,
    name: Option<String>,
    /// Arguments that came before the name.
    early: String,
    has_arguments: bool,
    is_certain: bool,
    is_told: bool,
}

/// Where in the object the next character stands.
#[derive(Debug)]
enum At {
    Open,
    /// Before a key, or the end.
    Key,
    InKey(JsonValue, String),
    Colon(Field),
    Value(Field),
    InValue(Field, JsonValue, String),
    /// After a value.
    Comma,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Name,
    Arguments,
    /// Arguments as a JSON text in a JSON string, as OpenAI's API has them.
    Quoted,
    Other,
}

impl Call {
    fn new(is_certain: bool) -> Self {
        Self {
            at: At::Open,
            name: None,
            early: String::new(),
            has_arguments: false,
            is_certain,
            is_told: false,
        }
    }

    fn take(&mut self, char: char, sink: &mut Sink<'_>) -> Progress {
        let is_space = char.is_whitespace();
        match &mut self.at {
            At::Open if char == '{' => self.go(At::Key),
            At::Key | At::Colon(_) | At::Value(_) | At::Comma if is_space => Progress::More,
            At::Key if char == '"' => self
                .go(At::InKey(JsonValue::default(), String::new()))
                .then(self, char, sink),
            At::Key | At::Comma if char == '}' => self.close(sink),
            At::Comma if char == ',' => self.go(At::Key),
            At::Colon(field) if char == ':' => {
                let field = *field;
                self.go(At::Value(field))
            }
            At::Value(field) => {
                let field = *field;
                self.begin_value(field, char, sink)
            }
            At::InKey(value, text) => {
                text.push(char);
                match value.take(char) {
                    End::Here => {
                        let key: Option<String> = serde_json::from_str(text).ok();
                        let field = self.field(key.as_deref());
                        self.go(At::Colon(field))
                    }
                    End::Not | End::Before => Progress::More,
                }
            }
            At::InValue(field, value, text) => match (value.take(char), *field) {
                (End::Before, field) => self.end_value(field, sink).then(self, char, sink),
                (end, Field::Arguments) => {
                    self.argument(char, sink);
                    if end == End::Here {
                        self.end_value(Field::Arguments, sink)
                    } else {
                        Progress::More
                    }
                }
                (end, field) => {
                    text.push(char);
                    if end == End::Here {
                        self.end_value(field, sink)
                    } else {
                        Progress::More
                    }
                }
            },
            At::Open | At::Key | At::Colon(_) | At::Comma => Progress::Broken,
        }
    }

    fn go(&mut self, at: At) -> Progress {
        self.at = at;
        Progress::More
    }

    fn field(&self, key: Option<&str>) -> Field {
        match key {
            Some("name") if self.name.is_none() => Field::Name,
            Some("arguments" | "parameters") if !self.has_arguments => Field::Arguments,
            _ => Field::Other,
        }
    }

    fn begin_value(&mut self, field: Field, first: char, sink: &mut Sink<'_>) -> Progress {
        let field = match field {
            Field::Arguments if first == '"' => Field::Quoted,
            Field::Name if first != '"' => return Progress::Broken,
            field => field,
        };
        if matches!(field, Field::Arguments | Field::Quoted) {
            self.has_arguments = true;
            self.tell(sink);
        }
        self.at = At::InValue(field, JsonValue::default(), String::new());
        self.take(first, sink)
    }

    fn end_value(&mut self, field: Field, sink: &mut Sink<'_>) -> Progress {
        let At::InValue(_, _, text) = std::mem::replace(&mut self.at, At::Comma) else {
            return Progress::Broken;
        };
        match field {
            Field::Arguments | Field::Other => {}
            Field::Quoted => {
                let arguments = serde_json::from_str(&text).unwrap_or(text);
                self.put(&arguments, sink);
            }
            Field::Name => match serde_json::from_str::<String>(&text) {
                Ok(name) if !name.is_empty() => {
                    self.name = Some(name);
                    self.tell(sink);
                }
                _ => return Progress::Broken,
            },
        }
        Progress::More
    }

    fn close(&mut self, sink: &mut Sink<'_>) -> Progress {
        if !self.has_arguments && self.is_certain {
            self.has_arguments = true;
            self.early.push_str("{}");
            self.tell(sink);
        }
        if self.is_told {
            Progress::Done
        } else {
            Progress::Broken
        }
    }

    /// Tells the call once its name is known and it has arguments.
    fn tell(&mut self, sink: &mut Sink<'_>) {
        if let Some(name) = self.name.as_ref().filter(|_| self.has_arguments && !self.is_told) {
            sink.begin(name);
            sink.arguments(&std::mem::take(&mut self.early));
            self.is_told = true;
        }
    }

    fn argument(&mut self, char: char, sink: &mut Sink<'_>) {
        self.put(char.encode_utf8(&mut [0; 4]), sink);
    }

    fn put(&mut self, text: &str, sink: &mut Sink<'_>) {
        if self.is_told {
            sink.arguments(text);
        } else {
            self.early.push_str(text);
        }
    }
}

impl Progress {
    /// Goes on with a character that has only decided what the one before it was.
    fn then(self, call: &mut Call, char: char, sink: &mut Sink<'_>) -> Self {
        match self {
            Self::More => call.take(char, sink),
            end => end,
        }
    }
}

/// Whether a JSON value ends with a character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Not,
    /// It is the value's last.
    Here,
    /// It is not the value's any more.
    Before,
}

/// Follows one JSON value to its end, by its strings and brackets alone.
#[derive(Debug, Default)]
pub(super) struct JsonValue {
    depth: usize,
    in_string: bool,
    is_escaped: bool,
    has_begun: bool,
}

impl JsonValue {
    pub(super) fn take(&mut self, char: char) -> End {
        let is_first = !std::mem::replace(&mut self.has_begun, true);
        if self.in_string {
            if std::mem::take(&mut self.is_escaped) {
                return End::Not;
            }
            self.is_escaped = char == '\\';
            self.in_string = char != '"';
            return self.end_if(char == '"');
        }
        match char {
            '"' if is_first || self.depth > 0 => {
                self.in_string = true;
                End::Not
            }
            '{' | '[' if is_first || self.depth > 0 => {
                self.depth += 1;
                End::Not
            }
            '}' | ']' if self.depth > 0 => {
                self.depth -= 1;
                self.end_if(true)
            }
            ',' | '}' | ']' | '"' | '{' | '[' if self.depth == 0 => End::Before,
            char if char.is_whitespace() && self.depth == 0 => End::Before,
            _ => End::Not,
        }
    }

    fn end_if(&self, closes: bool) -> End {
        if closes && self.depth == 0 {
            End::Here
        } else {
            End::Not
        }
    }
}
