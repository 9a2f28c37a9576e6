//! Grammars for calls that a model makes of its own will where a function is `strict`: text is free unless it begins a call
//! in the model's own syntax, and what begins as a call is one of a known function, whose arguments follow its schema if it
//! is strict. Each grammar says what its parser reads, and no more of the ways to write a call than models use.

mod arguments;
mod hermes;
mod llama;
mod mistral;
mod pythonic;
mod qwen;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod walks;

use phalanx_proto::{RpcError, v1::structured_outputs::Constraint};

use super::ToolParser;
use crate::text::{
    TokenTable,
    json::{Json, object},
    structured::lark::Rules,
    tools::{Function, ToolSet},
};

impl ToolParser {
    /// What texts with calls are held to; none if no function is strict. At most one call unless `parallel`. Errors: a
    /// strict function's name or schema that calls of this syntax have no room for.
    pub(crate) fn constraint(
        self,
        tools: &ToolSet,
        parallel: bool,
        table: &TokenTable,
    ) -> Result<Option<Constraint>, RpcError> {
        if !tools.functions().iter().any(Function::is_strict) {
            return Ok(None);
        }
        let calls = Calls::new(tools, parallel);
        let rules = Rules::new(table);
        Ok(Some(match self {
            Self::Hermes => Constraint::StructuralTag(hermes::tag(&calls).to_string()),
            Self::Mistral => Constraint::StructuralTag(mistral::tag(&calls).to_string()),
            Self::Llama3Json => Constraint::Grammar(llama::grammar(&calls, rules)?),
            Self::Pythonic => Constraint::Grammar(pythonic::grammar(&calls, rules)?),
            Self::Qwen3 => Constraint::Grammar(qwen::grammar(&calls, rules)?),
        }))
    }
}

/// What may be called.
struct Calls<'a> {
    functions: Vec<Callee<'a>>,
    /// More than one call may be made.
    parallel: bool,
}

/// A function, and its place among the tools.
struct Callee<'a> {
    function: &'a Function,
    at: usize,
}

impl<'a> Calls<'a> {
    /// Of functions of one name the first counts.
    fn new(tools: &'a ToolSet, parallel: bool) -> Self {
        let mut functions: Vec<Callee<'a>> = Vec::new();
        for (at, function) in tools.functions().iter().enumerate() {
            let known = |callee: &Callee<'_>| callee.function.name() == function.name();
            if !functions.iter().any(known) {
                functions.push(Callee { function, at });
            }
        }
        Self { functions, parallel }
    }
}

impl Callee<'_> {
    /// The name as a JSON string.
    fn quoted_name(&self) -> Json {
        self.function.name().into()
    }

    /// The schema that the arguments follow as one JSON object.
    fn schema(&self) -> Json {
        if self.function.is_strict() {
            self.function.schema()
        } else {
            object([("type", "object".into())])
        }
    }

    /// A rule for the JSON of `schema`, which is a part of this function's.
    fn json(&self, rules: &mut Rules<'_>, schema: &Json) -> Result<String, RpcError> {
        let schema = serde_json::to_value(schema).map_err(|error| error.to_string());
        let rule = schema.and_then(|schema| rules.json(schema));
        rule.map_err(|why| self.invalid("parameters", &why))
    }

    /// `why` goes on where the path of the field ends.
    fn invalid(&self, field: &str, why: &str) -> RpcError {
        let param = format!("tools[{}].function.{field}", self.at);
        let message = format!("{param} {why}.");
        RpcError::invalid(param, message)
    }
}

/// Free text up to a mark. Errors: this vocabulary has special tokens within the mark.
fn text_up_to(rules: &mut Rules<'_>, text: &str, mark: &str) -> Result<String, RpcError> {
    let rule = rules.text_up_to(text, mark);
    rule.map_err(|why| RpcError::invalid("tools", format!("The grammar of calls of `tools` {why}.")))
}
