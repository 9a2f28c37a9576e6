//! What one request may ask for, whichever door it comes through: the gateway refuses more before it allocates, the
//! coordinator before it queues.

/// Completions of one prompt.
pub const MAX_N: u32 = 128;
/// Stop strings.
pub const MAX_STOP_STRINGS: usize = 64;
/// Stop token ids.
pub const MAX_STOP_TOKEN_IDS: usize = 128;
/// Entries of `logit_bias`.
pub const MAX_LOGIT_BIAS: usize = 512;
/// Ids of `allowed_token_ids`: as many as the largest published vocabularies have.
pub const MAX_ALLOWED_TOKEN_IDS: usize = 262_144;
/// Entries of `bad_words`, and bytes of each.
pub const MAX_BAD_WORDS: usize = 128;
pub const MAX_BAD_WORD_BYTES: usize = 256;
/// Tokens of a pattern that `repetition_detection` looks for, and how often it may have to stand there.
pub const MAX_PATTERN_SIZE: u32 = 512;
pub const MAX_PATTERN_COUNT: u32 = 1024;
/// What vLLM calls the end of a text that repeats itself, beside its finish reason.
pub const REPETITION_DETECTED: &str = "repetition_detected";
/// Bytes of a JSON schema, a grammar or a structural tag.
pub const MAX_GRAMMAR_BYTES: usize = 256 << 10;
/// Bytes of a regular expression.
pub const MAX_REGEX_BYTES: usize = 16 << 10;
/// Entries of `choice`, whose bytes together count as a grammar's.
pub const MAX_CHOICES: usize = 4096;
/// Alternatives per token that a server may be told to allow (`--max-logprobs`): a step's output has room for as many
/// of every token.
pub const MAX_LOGPROBS: u32 = 1024;
/// Ids of `logprob_token_ids`, as in vLLM; beside, not within, what `--max-logprobs` allows.
pub const MAX_LOGPROB_TOKEN_IDS: usize = 128;
/// Bytes of `cache_salt`.
pub const MAX_CACHE_SALT_BYTES: usize = 256;
/// Messages of a conversation; each takes some tokens, so more hardly fit any context.
pub const MAX_MESSAGES: usize = 8192;
/// Tools of a request.
pub const MAX_TOOLS: usize = 1024;
/// Calls of one assistant message.
pub const MAX_TOOL_CALLS: usize = 1024;
/// Bytes of a function's name.
pub const MAX_FUNCTION_NAME_BYTES: usize = 256;
/// Bytes of a message's role.
pub const MAX_ROLE_BYTES: usize = 64;
