//! Text to tokens and back: tokenizer, chat template, detokenizer, stop strings, and the checks of a request.

mod chat;
mod constraint;
mod detokenizer;
mod error;
mod generation;
mod json;
mod listed;
mod output;
mod pool;
mod processor;
mod repetition;
mod resume;
mod sampling;
mod stop;
mod structured;
mod thinking;
mod token_ids;
mod tokenize;
mod tokenizer;
mod tools;

pub use chat::{ChatOptions, ChatTemplate, ContentFormat, Conversation, MAX_KWARGS_BYTES};
pub use detokenizer::Detokenizer;
pub use error::TextError;
pub use generation::{GenerationConfig, GenerationDefaults, GenerationOptions};
pub use output::{OutputParser, OutputPlan, Parsed, ReasoningParser, ToolParser};
pub use pool::TextPool;
pub use processor::{PreparedRequest, TextModel, TextOptions, TextProcessor};
pub use sampling::ModelLimits;
pub use stop::{MAX_STOP_STRING_BYTES, StopMatcher};
pub use tokenizer::{
    GgufVocab, HfFiles, MAX_VOCAB_SIZE, SpecialTokens, TokenEncoding, TokenTable, Tokenizer,
};
