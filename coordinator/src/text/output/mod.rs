//! What a completion's text consists of: reasoning, content, calls of tools.
//!
//! Every parser is incremental, and is the only one there is: a whole reply is parsed as a stream is, so both say the
//! same, however the text was cut into tokens. A stream takes nothing back, so a call is told only once the text can be
//! nothing else; text that looked like a call and is none comes out as content.

mod reasoning;
mod tag;
mod tools;

use std::sync::Arc;

use phalanx_proto::v1;

pub use reasoning::ReasoningParser;
pub use tools::ToolParser;

use self::{
    reasoning::ReasoningSplitter,
    tools::{CallLog, Sink, ToolText},
};
use super::tools::{ToolChoice, ToolSet};

/// How the texts of a request's completions are to be taken apart.
#[derive(Clone, Debug, Default)]
pub struct OutputPlan {
    pub(super) reasoning: Option<ReasoningPlan>,
    pub(super) tools: Option<ToolPlan>,
    /// Special tokens that are part of the text all the same: parsers look for them. Sorted.
    pub(super) markers: Arc<[u32]>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct ReasoningPlan {
    pub(super) parser: ReasoningParser,
    /// The text begins with it.
    pub(super) begins: bool,
    /// It is told; else it is left out.
    pub(super) include: bool,
}

#[derive(Clone, Debug)]
pub(super) struct ToolPlan {
    /// How calls look that the model makes of its own will; none: it was made to.
    pub(super) parser: Option<ToolParser>,
    pub(super) choice: ToolChoice,
    pub(super) tools: Arc<ToolSet>,
    /// More than one call is told.
    pub(super) parallel: bool,
}

/// What a piece of text turned out to be.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parsed {
    pub content: String,
    pub reasoning: String,
    /// Pieces of calls in order; a call's first has its id and name.
    pub calls: Vec<v1::ToolCall>,
}

impl OutputPlan {
    /// The text is content and nothing else.
    pub fn is_plain(&self) -> bool {
        self.reasoning.is_none() && self.tools.is_none()
    }

    /// Whether completions begin with reasoning.
    pub(super) fn begins_with_reasoning(&self) -> bool {
        self.reasoning.is_some_and(|plan| plan.begins)
    }

    /// Whether replies say what the reasoning was, if only that there was none.
    pub fn tells_reasoning(&self) -> bool {
        self.reasoning.is_some_and(|plan| plan.include)
    }

    /// The reasoning is left out, and so is what would give it away: log-probabilities name their tokens.
    pub(crate) fn hides_tokens(&self) -> bool {
        self.reasoning.is_some_and(|plan| !plan.include)
    }

    pub(crate) fn markers(&self) -> &Arc<[u32]> {
        &self.markers
    }

    /// A parser for one completion.
    pub fn parser(&self) -> OutputParser {
        let reasoning = self.reasoning.filter(|plan| plan.begins);
        let tools = self.tools.as_ref();
        OutputParser {
            splitter: reasoning.map(|plan| ReasoningSplitter::new(plan.parser)),
            tells_reasoning: self.tells_reasoning(),
            tools: tools.and_then(ToolText::new),
            log: CallLog::new(tools),
            // As OpenAI has it: a call that the model was made to make is how it was to stop.
            counts_calls: tools.is_some_and(|plan| !matches!(plan.choice, ToolChoice::Named(_))),
        }
    }
}

/// Takes one completion's text apart.
#[derive(Debug)]
pub struct OutputParser {
    splitter: Option<ReasoningSplitter>,
    tells_reasoning: bool,
    tools: Option<ToolText>,
    log: CallLog,
    counts_calls: bool,
}

impl OutputParser {
    /// Appends to `out` what the next text says.
    pub fn push(&mut self, text: &str, out: &mut Parsed) {
        let Some(splitter) = &mut self.splitter else {
            return self.content(text, out);
        };
        let (mut reasoning, mut content) = (String::new(), String::new());
        splitter.push(text, &mut reasoning, &mut content);
        self.reasoning(&reasoning, out);
        self.content(&content, out);
    }

    /// Appends what was held back: the text ends here.
    pub fn finish(&mut self, out: &mut Parsed) {
        if let Some(splitter) = &mut self.splitter {
            let mut reasoning = String::new();
            splitter.finish(&mut reasoning);
            self.reasoning(&reasoning, out);
        }
        if let Some(tools) = &mut self.tools {
            let mut sink = Sink::new(out, &mut self.log);
            tools.finish(&mut sink);
            sink.finish();
        }
    }

    /// The model has called tools, of its own will or because it had to call some.
    pub fn has_called(&self) -> bool {
        self.counts_calls && self.log.count() > 0
    }

    fn reasoning(&self, text: &str, out: &mut Parsed) {
        if self.tells_reasoning {
            out.reasoning.push_str(text);
        }
    }

    fn content(&mut self, text: &str, out: &mut Parsed) {
        match &mut self.tools {
            None => out.content.push_str(text),
            Some(tools) => tools.push(text, &mut Sink::new(out, &mut self.log)),
        }
    }
}

#[cfg(test)]
mod tests;
