//! Calls of tools in the text of a model, in the formats that models were trained on.

mod call;
mod forced;
mod hermes;
mod llama;
mod mistral;
mod python;
mod pythonic;
mod qwen;
mod strict;

use std::{fmt, str::FromStr};

use phalanx_proto::{secret::random_u64, v1};

use super::{Parsed, ToolPlan};

/// A format of calls; the names are vLLM's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolParser {
    /// `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes 2 Pro, Qwen 2.5 and 3.
    Hermes,
    /// The whole message is `{"name": ..., "parameters": {...}}`, or several with `;` between them: Llama 3.1 and 3.2.
    Llama3Json,
    /// The whole message is a Python list of calls: Llama 3.2 and 4, ToolACE.
    Pythonic,
    /// `[TOOL_CALLS]` and a JSON list of calls, or a name and its arguments: Mistral.
    Mistral,
    /// `<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`, or Hermes' JSON within the
    /// same tags: Qwen3-Coder, and Qwen3 of any kind.
    Qwen3,
}

impl ToolParser {
    pub const NAMES: [&str; 5] = ["hermes", "llama3_json", "pythonic", "mistral", "qwen3"];
    const ALL: [Self; 5] = [
        Self::Hermes,
        Self::Llama3Json,
        Self::Pythonic,
        Self::Mistral,
        Self::Qwen3,
    ];

    /// Tokens that must reach the parser even if special tokens are not shown.
    pub(crate) fn markers(self) -> &'static [&'static str] {
        match self {
            Self::Hermes => hermes::TAGS,
            Self::Llama3Json => llama::TAGS,
            Self::Pythonic => pythonic::TAGS,
            Self::Mistral => mistral::TAGS,
            Self::Qwen3 => qwen::TAGS,
        }
    }
}

impl FromStr for ToolParser {
    type Err = String;

    /// Also takes the names of vLLM's other parsers for the same formats.
    fn from_str(name: &str) -> Result<Self, String> {
        let name = match name {
            "llama4_json" => "llama3_json",
            "llama4_pythonic" => "pythonic",
            "qwen3_xml" | "qwen3_coder" => "qwen3",
            name => name,
        };
        let found = Self::NAMES.iter().position(|known| *known == name);
        found
            .map(|at| Self::ALL[at])
            .ok_or_else(|| format!("there is {}", Self::NAMES.join(", ")))
    }
}

impl fmt::Display for ToolParser {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = Self::ALL.iter().position(|parser| parser == self);
        out.write_str(at.map_or("", |at| Self::NAMES[at]))
    }
}

/// The text of a completion that may hold calls.
#[derive(Debug)]
pub(super) struct ToolText(Format);

#[derive(Debug)]
enum Format {
    Forced(forced::Forced),
    Hermes(hermes::Hermes),
    Llama(llama::Llama),
    Mistral(mistral::Mistral),
    Pythonic(pythonic::Pythonic),
    Qwen(qwen::Qwen),
}

impl ToolText {
    /// None where calls are not looked for.
    pub(super) fn new(plan: &ToolPlan) -> Option<Self> {
        if let Some(forced) = forced::Forced::new(&plan.choice) {
            return Some(Self(Format::Forced(forced)));
        }
        Some(Self(match plan.parser? {
            ToolParser::Hermes => Format::Hermes(hermes::Hermes::new()),
            ToolParser::Llama3Json => Format::Llama(llama::Llama::new()),
            ToolParser::Mistral => Format::Mistral(mistral::Mistral::new()),
            ToolParser::Pythonic => Format::Pythonic(pythonic::Pythonic::new()),
            ToolParser::Qwen3 => Format::Qwen(qwen::Qwen::new(plan.tools.clone())),
        }))
    }

    pub(super) fn push(&mut self, text: &str, sink: &mut Sink<'_>) {
        match &mut self.0 {
            Format::Forced(parser) => parser.push(text, sink),
            Format::Hermes(parser) => parser.push(text, sink),
            Format::Llama(parser) => parser.push(text, sink),
            Format::Mistral(parser) => parser.push(text, sink),
            Format::Pythonic(parser) => parser.push(text, sink),
            Format::Qwen(parser) => parser.push(text, sink),
        }
    }

    /// The text ends here.
    pub(super) fn finish(&mut self, sink: &mut Sink<'_>) {
        match &mut self.0 {
            Format::Forced(parser) => parser.finish(sink),
            Format::Hermes(parser) => parser.finish(sink),
            Format::Llama(parser) => parser.finish(sink),
            Format::Mistral(parser) => parser.finish(sink),
            Format::Pythonic(parser) => parser.finish(sink),
            Format::Qwen(parser) => parser.finish(sink),
        }
    }
}

/// The calls of a completion so far.
#[derive(Debug)]
pub(super) struct CallLog {
    count: u32,
    /// Calls after the first are told.
    parallel: bool,
    /// Mistral's templates take ids of nine letters and digits and no others.
    short_ids: bool,
    /// White space that is content only if more content follows: around calls it means nothing.
    space: String,
}

impl CallLog {
    pub(super) fn new(plan: Option<&ToolPlan>) -> Self {
        Self {
            count: 0,
            parallel: plan.is_some_and(|plan| plan.parallel),
            short_ids: plan.is_some_and(|plan| plan.parser == Some(ToolParser::Mistral)),
            space: String::new(),
        }
    }

    /// Calls found, those that are not told included.
    pub(super) fn count(&self) -> u32 {
        self.count
    }

    fn new_id(&self) -> String {
        const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
        if !self.short_ids {
            return format!("chatcmpl-tool-{:016x}{:016x}", random_u64(), random_u64());
        }
        let mut number = random_u64();
        let mut digit = || {
            let digit = DIGITS[(number % 62) as usize];
            number /= 62;
            char::from(digit)
        };
        (0..9).map(|_| digit()).collect()
    }
}

/// Where parsers put what they find.
pub(super) struct Sink<'a> {
    out: &'a mut Parsed,
    log: &'a mut CallLog,
}

impl<'a> Sink<'a> {
    pub(super) fn new(out: &'a mut Parsed, log: &'a mut CallLog) -> Self {
        Self { out, log }
    }

    /// Text that belongs to no call.
    fn content(&mut self, text: &str) {
        let solid = text.trim_end();
        if !solid.is_empty() {
            self.out.content.push_str(&self.log.space);
            self.log.space.clear();
            self.out.content.push_str(solid);
        }
        self.log.space.push_str(&text[solid.len()..]);
    }

    /// A call of `name`.
    fn begin(&mut self, name: &str) {
        self.log.space.clear();
        let index = self.log.count;
        self.log.count += 1;
        if self.is_told() {
            self.out.calls.push(v1::ToolCall {
                index,
                id: self.log.new_id(),
                name: name.to_owned(),
                arguments: String::new(),
            });
        }
    }

    /// More of the last call's arguments.
    fn arguments(&mut self, text: &str) {
        let Some(index) = self.log.count.checked_sub(1) else {
            return;
        };
        if !self.is_told() {
            return;
        }
        match self.out.calls.last_mut().filter(|call| call.index == index) {
            Some(call) => call.arguments.push_str(text),
            None => self.out.calls.push(v1::ToolCall {
                index,
                arguments: text.to_owned(),
                ..v1::ToolCall::default()
            }),
        }
    }

    fn argument(&mut self, char: char) {
        self.arguments(char.encode_utf8(&mut [0; 4]));
    }

    /// Whether the last call is one that the request wants.
    fn is_told(&self) -> bool {
        self.log.parallel || self.log.count <= 1
    }

    /// The text ends here.
    pub(super) fn finish(&mut self) {
        if self.log.count == 0 {
            self.out.content.push_str(&self.log.space);
        }
        self.log.space.clear();
    }
}
