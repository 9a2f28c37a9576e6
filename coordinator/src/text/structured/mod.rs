//! Structured outputs: the languages that completions are held to, compiled by llguidance.
//!
//! A request's grammar is compiled before the request enters any queue, on a thread of its own with a limit on time, and
//! kept for the next request that brings the same. The engine steps a copy of it (`engine::Grammar`).

mod after;
mod budget;
mod cache;
mod ebnf;
mod json_schema;
pub(crate) mod lark;
mod mark;
mod source;
mod state;
mod structural_tag;
#[cfg(test)]
mod tests;

use std::{
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc::{RecvTimeoutError, sync_channel},
    },
    thread,
    time::Duration,
};

use llguidance::{
    Matcher, ParserFactory,
    api::{ParserLimits, TopLevelGrammar},
};
use phalanx_proto::{ErrorKind, RpcError, v1};

pub(crate) use self::budget::ThinkingLimit;
use self::{after::AfterReasoning, budget::ThinkingBudget, cache::GrammarCache, state::LlGrammar};
use super::{SpecialTokens, TokenTable};
use crate::engine::Grammar;

/// Longest compilation. Fuel ends most that would take longer; what is left is given up.
const COMPILE_LIMIT: Duration = Duration::from_millis(900);
/// Grammars are trees, and a compiler descends: nesting is bounded, and there is room for all of it.
const STACK_BYTES: usize = 32 << 20;
/// Compilations that were given up and have not come to an end yet; more are refused.
const MAX_STRAYS: usize = 4;
/// Grammars kept.
const CACHED_GRAMMARS: usize = 64;
/// Longest message of the compiler that is passed on, bytes.
const MAX_SAID: usize = 400;

/// What one grammar may take: memory and time at the start, and time for each token.
fn limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 2000,
        // 20 ms.
        initial_lexer_fuel: 1_000_000,
        // 7 ms.
        step_lexer_fuel: 100_000,
        // 2 ms.
        step_max_items: 40_000,
        // Of 1 to 2 KiB.
        max_lexer_states: 30_000,
        max_grammar_size: 250_000,
        precompute_large_lexemes: true,
        // They would quote the whole grammar.
        verbose_errors: false,
    }
}

/// Compiles grammars for one vocabulary. Cheap to clone.
#[derive(Clone)]
pub(crate) struct GrammarCompiler {
    shared: Arc<Shared>,
}

struct Shared {
    table: Arc<TokenTable>,
    special: SpecialTokens,
    vocab_size: u32,
    /// Made when it is first needed; or why it cannot be.
    factory: OnceLock<Result<ParserFactory, String>>,
    cache: Mutex<GrammarCache>,
    compiling: AtomicUsize,
    max_compiling: usize,
}

impl std::fmt::Debug for GrammarCompiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GrammarCompiler")
            .field("vocab_size", &self.shared.vocab_size)
            .finish_non_exhaustive()
    }
}

impl GrammarCompiler {
    /// For a model of `vocab_size` tokens, on at most `threads` callers' threads at a time.
    pub(crate) fn new(
        table: Arc<TokenTable>,
        special: SpecialTokens,
        vocab_size: u32,
        threads: usize,
    ) -> Self {
        let shared = Shared {
            table,
            special,
            vocab_size,
            factory: OnceLock::new(),
            cache: Mutex::new(GrammarCache::new(CACHED_GRAMMARS)),
            compiling: AtomicUsize::new(0),
            max_compiling: threads + MAX_STRAYS,
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// The language of `spec` at its beginning. Blocks, so it belongs in the text pool.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field and what is wrong or which limit it breaks; `QueueFull` while compilations that
    /// take too long occupy all places.
    pub(crate) fn compile(&self, spec: &v1::StructuredOutputs) -> Result<Box<dyn Grammar>, RpcError> {
        let shared = &self.shared;
        let hit = shared.cache().get(spec);
        if let Some(grammar) = hit {
            return Ok(Box::new(grammar));
        }
        let invalid = |message: String| {
            let param = source::param(spec);
            RpcError::invalid(&param, format!("{param}: {message}"))
        };
        let grammar = source::grammar(spec, &shared.table).map_err(invalid)?;
        // Made outside of the limit on time, which is the grammar's own.
        let factory = shared.factory();
        factory.map_err(|message| RpcError::new(ErrorKind::Internal, message))?;
        let slot = Slot::take(shared)?;
        let compiled = compile_in_time(slot, grammar).map_err(invalid)?;
        let grammar = compiled.fork();
        shared.cache().insert(spec.clone(), compiled);
        Ok(grammar)
    }

    /// The same language for what comes after a completion's reasoning, which may be anything.
    pub(crate) fn after_reasoning(&self, grammar: Box<dyn Grammar>) -> Box<dyn Grammar> {
        let (table, vocab_size) = (Arc::clone(&self.shared.table), self.shared.vocab_size);
        Box::new(AfterReasoning::new(table, vocab_size, grammar))
    }

    /// The same language, or any text, for completions of `prompt` that reason within a limit.
    pub(crate) fn limit_thinking(
        &self,
        limit: ThinkingLimit,
        prompt: &[u32],
        grammar: Option<Box<dyn Grammar>>,
    ) -> Box<dyn Grammar> {
        let (table, vocab_size) = (Arc::clone(&self.shared.table), self.shared.vocab_size);
        let has_begun = ThinkingLimit::has_begun_in(prompt, &table);
        let limit = ThinkingLimit { has_begun, ..limit };
        Box::new(ThinkingBudget::new(table, vocab_size, limit, grammar))
    }
}

impl Shared {
    fn cache(&self) -> std::sync::MutexGuard<'_, GrammarCache> {
        // A panic elsewhere leaves nothing half done in it.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn factory(&self) -> Result<&ParserFactory, String> {
        let made = self.factory.get_or_init(|| {
            let env = state::token_env(&self.table, &self.special.end_of_generation, self.vocab_size);
            let mut factory = ParserFactory::new_simple(&env).map_err(|error| said(&error))?;
            *factory.limits_mut() = limits();
            factory.quiet();
            Ok(factory)
        });
        made.as_ref().map_err(Clone::clone)
    }

    fn build(&self, grammar: TopLevelGrammar) -> Result<LlGrammar, String> {
        let parser = self.factory()?.create_parser(grammar);
        let mut matcher = Matcher::new(Ok(parser.map_err(|error| said(&error))?));
        // What cannot even begin is refused now, and what is learned by beginning is of use to all that follow.
        matcher.compute_mask().map_err(|error| said(&error))?;
        Ok(LlGrammar::new(matcher, self.vocab_size))
    }
}

/// A place among the compilations, held until the thread ends, be it waited for or not.
struct Slot(Arc<Shared>);

impl Slot {
    fn take(shared: &Arc<Shared>) -> Result<Self, RpcError> {
        let one_more = |running: usize| (running < shared.max_compiling).then_some(running + 1);
        let taken = shared
            .compiling
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more);
        match taken {
            Ok(_) => Ok(Self(Arc::clone(shared))),
            Err(_) => Err(RpcError::new(
                ErrorKind::QueueFull,
                "grammars that take too long to compile occupy all threads for it",
            )),
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.compiling.fetch_sub(1, Ordering::Relaxed);
    }
}

fn compile_in_time(slot: Slot, grammar: TopLevelGrammar) -> Result<LlGrammar, String> {
    let (sender, receiver) = sync_channel(1);
    let compile = move || {
        let compiled = slot.0.build(grammar);
        // First, so that who has an answer has his place back.
        drop(slot);
        // Whoever has waited too long is gone.
        let _ = sender.send(compiled);
    };
    thread::Builder::new()
        .name("grammar".into())
        .stack_size(STACK_BYTES)
        .spawn(compile)
        .map_err(|error| format!("no thread to compile it: {error}"))?;
    match receiver.recv_timeout(COMPILE_LIMIT) {
        Ok(compiled) => compiled,
        Err(RecvTimeoutError::Timeout) => Err(format!(
            "takes longer than the limit of {} ms to compile",
            COMPILE_LIMIT.as_millis()
        )),
        Err(RecvTimeoutError::Disconnected) => Err("cannot be compiled".to_owned()),
    }
}

/// The compiler's message, without its state and not too long.
fn said(error: &impl std::fmt::Display) -> String {
    let text = format!("{error:#}");
    let end = text.find("\n<").unwrap_or(text.len());
    let text = text[..end].trim_end();
    let cut = text.floor_char_boundary(MAX_SAID);
    if cut < text.len() {
        return format!("{}…", &text[..cut]);
    }
    text.to_owned()
}
