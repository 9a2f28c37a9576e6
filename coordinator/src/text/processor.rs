//! A request's way from text to sequences.

use std::{
    iter, mem,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use phalanx_model::{Checkpoint, gguf::Gguf};
use phalanx_proto::{ErrorKind, RpcError, limits::MAX_CACHE_SALT_BYTES, v1};

use super::{
    ChatOptions, GenerationDefaults, GgufVocab, HfFiles, ModelLimits, OutputPlan, StopMatcher, TextError,
    TextPool, Tokenizer,
    chat::{ChatSide, Rendered, message_bytes},
    constraint,
    sampling::{self, CheckedParams, Rules},
    structured::GrammarCompiler,
    thinking::{self, ThinkingEnd},
    tokenize, tools,
};
use crate::{
    engine::{Constraint, TenantId},
    engine_thread::NewSequence,
};

/// Prompts that may wait for a thread to tokenize them.
const MAX_WAITING_PROMPTS: usize = 1024;

/// The text side of a model, as loaded from its files.
#[derive(Debug)]
pub struct TextModel {
    pub tokenizer: Tokenizer,
    pub chat_template: Option<String>,
    /// The template of conversations with tools, if they have one of their own.
    pub tool_template: Option<String>,
    pub defaults: GenerationDefaults,
    /// What tokenizer_config.json says; of a GGUF file, what its metadata says in those terms.
    pub tokenizer_config: serde_json::Value,
}

impl TextModel {
    /// From whatever kind of files a checkpoint consists of.
    pub fn open<B: AsRef<[u8]>>(checkpoint: &Checkpoint<B>) -> Result<Self, TextError> {
        match checkpoint.gguf() {
            Some(file) => Self::from_gguf(file),
            None => Self::from_dir(checkpoint.path()),
        }
    }

    /// From a GGUF file's metadata.
    pub fn from_gguf<B: AsRef<[u8]>>(file: &Gguf<B>) -> Result<Self, TextError> {
        let vocab = GgufVocab::from_metadata(file)?;
        let tokenizer = Tokenizer::from_gguf(&vocab)?;
        Ok(Self {
            tokenizer_config: tokenize::config_of(tokenizer.special_tokens()),
            tokenizer,
            chat_template: vocab.chat_template,
            tool_template: vocab.tool_template,
            defaults: GenerationDefaults::from_gguf(file)?,
        })
    }

    /// From a Hugging Face model directory.
    pub fn from_dir(dir: &Path) -> Result<Self, TextError> {
        let files = HfFiles::read(dir)?;
        Ok(Self {
            tokenizer: files.tokenizer()?,
            chat_template: files.chat_template()?,
            tool_template: files.tool_template()?,
            defaults: GenerationDefaults::from_json(&files.generation_config)?,
            tokenizer_config: files.tokenizer_config,
        })
    }
}

/// What the server's configuration adds to a model.
#[derive(Clone, Debug)]
pub struct TextOptions {
    pub limits: ModelLimits,
    /// Source of a chat template that replaces the model's.
    pub chat_template: Option<String>,
    pub chat: ChatOptions,
    /// Prompts tokenized at a time; none: half the cores.
    pub threads: Option<usize>,
    /// Seed of requests that bring none; none: a new one for every request.
    pub seed: Option<u64>,
}

/// Turns requests into sequences. Cheap to share; needs a Tokio runtime.
#[derive(Debug)]
pub struct TextProcessor {
    pub(super) tokenizer: Arc<Tokenizer>,
    chat: Arc<ChatSide>,
    defaults: GenerationDefaults,
    limits: ModelLimits,
    /// Takes the place of the limits' own, which may have to give way to the memory there turns out to be.
    max_model_len: AtomicU32,
    seed: Option<u64>,
    grammars: GrammarCompiler,
    thinking_end: ThinkingEnd,
    pub(super) pool: TextPool,
    pub(super) tokenizer_info: String,
}

/// A checked, tokenized request.
#[derive(Debug)]
pub struct PreparedRequest {
    /// One per completion.
    pub sequences: Vec<NewSequence>,
    /// How many tokens a completion has that another server has ended; none of one that is to run.
    pub ended_after: Vec<Option<u32>>,
    pub prompt_tokens: u32,
    /// The prompt's tokens, if the reply tells of them.
    pub prompt: Option<Vec<u32>>,
    /// The prompt's text, if it comes first in the output.
    pub echo: Option<String>,
    /// Whether anything comes after the prompt. If not, the one token that is sampled is nobody's.
    pub generates: bool,
    pub stop_strings: StopMatcher,
    pub skip_special_tokens: bool,
    pub output: v1::OutputOptions,
    /// Whether the log-probabilities of listed tokens are reported in place of the best.
    pub lists_logprobs: bool,
    /// What the completions' texts consist of.
    pub plan: OutputPlan,
}

impl TextProcessor {
    /// Errors: the template does not compile; a token with a role is outside the model's vocabulary.
    pub fn new(model: TextModel, options: TextOptions) -> Result<Self, TextError> {
        let special = model.tokenizer.special_tokens();
        let last = u64::from(options.limits.vocab_size).saturating_sub(1);
        for &id in special.bos.iter().chain(&special.end_of_generation) {
            if u64::from(id) > last {
                return Err(TextError::OverLimit {
                    field: "id of a special token",
                    value: id.into(),
                    limit: last,
                });
            }
        }
        let tool_template = model.tool_template.filter(|_| options.chat_template.is_none());
        let template = options.chat_template.or(model.chat_template);
        let tokenizer_info = tokenize::info(model.tokenizer_config, template.as_deref());
        let templates = (template.as_deref(), tool_template.as_deref());
        let parser = options.chat.reasoning_parser;
        let thinking_end = ThinkingEnd::new(parser, &model.tokenizer, options.limits.vocab_size);
        let chat = ChatSide::new(templates, &model.tokenizer, options.chat)?;
        let threads = options
            .threads
            .unwrap_or_else(|| thread::available_parallelism().map_or(1, |cores| cores.get() / 2));
        let (table, special) = (model.tokenizer.table().clone(), special.clone());
        Ok(Self {
            grammars: GrammarCompiler::new(table, special, options.limits.vocab_size, threads),
            thinking_end,
            chat: Arc::new(chat),
            tokenizer: Arc::new(model.tokenizer),
            defaults: model.defaults,
            max_model_len: AtomicU32::new(options.limits.max_model_len),
            limits: options.limits,
            seed: options.seed,
            pool: TextPool::new(threads, MAX_WAITING_PROMPTS),
            tokenizer_info,
        })
    }

    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }
    pub fn limits(&self) -> ModelLimits {
        ModelLimits {
            // A number by itself: nothing else is published through it.
            max_model_len: self.max_model_len.load(Ordering::Relaxed),
            ..self.limits
        }
    }
    /// The memory has room for sequences of so many tokens. Before the first request.
    pub fn set_max_model_len(&self, tokens: u32) {
        self.max_model_len.store(tokens, Ordering::Relaxed);
    }

    /// Checks and tokenizes a completion request. Errors name the field to blame; `QueueFull` when too many prompts
    /// wait to be tokenized.
    pub async fn prepare(&self, mut request: v1::GenerateRequest) -> Result<PreparedRequest, RpcError> {
        let output = request.output.take().unwrap_or_default();
        let place = Place::checked(request.priority, request.cache_salt.take())?;
        let sampling = request.sampling.take().unwrap_or_default();
        let limit = self.thinking_end.limit(&sampling)?;
        let mut params = self.checked(sampling, &output).await?;
        let cut = Cut::checked(request.truncate_prompt_tokens, &params, &self.limits())?;
        let resume = mem::take(&mut request.resume);
        let add_special_tokens = request.add_special_tokens.unwrap_or(true);
        let (mut prompt, mut echo) = match request.prompt {
            None => {
                return Err(RpcError::invalid(
                    "prompt",
                    "Either prompt or prompt_token_ids must be given.",
                ));
            }
            Some(v1::generate_request::Prompt::Text(text)) => {
                self.check_bytes(text.len(), "prompt")?;
                let echo = output.echo.then(|| text.clone());
                (self.encode(text, add_special_tokens).await?, echo)
            }
            Some(v1::generate_request::Prompt::TokenIds(ids)) => {
                self.check_ids(&ids.ids)?;
                let echo = output
                    .echo
                    .then(|| self.tokenizer.decode(&ids.ids, params.skip_special_tokens));
                (ids.ids, echo)
            }
        };
        if cut.apply(&mut prompt) && output.echo {
            echo = Some(self.tokenizer.decode(&prompt, params.skip_special_tokens));
        }
        thinking::limit(&mut params.constraint, limit, &prompt, (&self.grammars, false));
        self.assemble(params, prompt, place, (echo, output))?
            .resume(resume)
    }

    /// Renders, checks and tokenizes a conversation. Errors as [`Self::prepare`], and those of the template.
    pub async fn prepare_chat(&self, mut request: v1::ChatRequest) -> Result<PreparedRequest, RpcError> {
        let mut output = request.output.unwrap_or_default();
        // It is the last message that is echoed, not the prompt, of which there would be log-probabilities.
        output.echo = false;
        let place = Place::checked(request.priority, request.cache_salt.take())?;
        let mut sampling = request.sampling.take().unwrap_or_default();
        let limit = self.thinking_end.limit(&sampling)?;
        let mut params = self.check(&sampling, &output)?;
        let cut = Cut::checked(request.truncate_prompt_tokens, &params, &self.limits())?;
        let resume = mem::take(&mut request.resume);
        let (mut prompt, rendered) = self.render(request).await?;
        cut.apply(&mut prompt);
        if let Some(constraint) = rendered.constraint {
            tools::restrict(&mut sampling, constraint)?;
        }
        let thinks = rendered.plan.begins_with_reasoning();
        params.constraint = self.constraint(sampling, thinks).await?;
        thinking::limit(&mut params.constraint, limit, &prompt, (&self.grammars, thinks));
        let prepared = self.assemble(params, prompt, place, (rendered.echo, output))?;
        let plan = rendered.plan;
        PreparedRequest { plan, ..prepared }.resume(resume)
    }

    /// The conversation of a request as the model's tokens, and what else came of its rendering.
    pub(super) async fn render(&self, request: v1::ChatRequest) -> Result<(Vec<u32>, Rendered), RpcError> {
        let max_bytes = self.max_prompt_bytes();
        let given = request.messages.iter().map(message_bytes);
        self.check_bytes(given.fold(0, usize::saturating_add), "messages")?;
        let (chat, tokenizer) = (self.chat.clone(), self.tokenizer.clone());
        self.pool
            .run(move || {
                let rendered = chat.render(&request, max_bytes)?;
                let prompt = encode(&tokenizer, &rendered.prompt, request.add_special_tokens)?;
                Ok((prompt, rendered))
            })
            .await
    }

    /// Errors name the field to blame; `QueueFull` when too much text waits to be worked on.
    async fn checked(
        &self,
        params: v1::SamplingParams,
        output: &v1::OutputOptions,
    ) -> Result<CheckedParams, RpcError> {
        let mut checked = self.check(&params, output)?;
        checked.constraint = self.constraint(params, false).await?;
        Ok(checked)
    }

    /// What beside its parameters restricts the tokens of a request. `thinks`: a grammar begins behind the reasoning.
    async fn constraint(&self, mut params: v1::SamplingParams, thinks: bool) -> Result<Constraint, RpcError> {
        let (vocab_size, ignore_eos) = (self.limits.vocab_size, params.ignore_eos);
        let allowed_token_ids = constraint::allowed_token_ids(&params.allowed_token_ids, vocab_size)?;
        constraint::check_bad_words(&params.bad_words)?;
        let words_of_ids = mem::take(&mut params.bad_words_token_ids);
        let words_of_ids = constraint::bad_words_token_ids(words_of_ids, vocab_size)?;
        let (mut grammar, mut bad_words) = (None, Vec::new());
        if params.structured_outputs.is_some() || !params.bad_words.is_empty() {
            let (grammars, tokenizer) = (self.grammars.clone(), self.tokenizer.clone());
            let work = move || {
                let spec = params.structured_outputs.as_ref();
                let mut grammar = spec.map(|spec| grammars.compile(spec)).transpose()?;
                if thinks {
                    grammar = grammar.map(|grammar| grammars.after_reasoning(grammar));
                }
                let bad_words = constraint::tokenize_bad_words(&params.bad_words, &tokenizer)?;
                Ok((grammar, bad_words))
            };
            (grammar, bad_words) = self.pool.run(work).await?;
        }
        bad_words.extend(words_of_ids);
        let ends = &self.tokenizer.special_tokens().end_of_generation;
        let postponed = grammar.is_some() && ignore_eos;
        Ok(Constraint {
            postponed: if postponed { ends.clone() } else { Vec::new() },
            grammar,
            allowed_token_ids,
            bad_words,
        })
    }

    fn check(
        &self,
        params: &v1::SamplingParams,
        output: &v1::OutputOptions,
    ) -> Result<CheckedParams, RpcError> {
        let limits = self.limits();
        let rules = Rules {
            limits: &limits,
            defaults: &self.defaults,
            special: self.tokenizer.special_tokens(),
        };
        let seed = params.seed.or(self.seed).or(params.fallback_seed);
        sampling::check(
            &v1::SamplingParams {
                seed,
                ..params.clone()
            },
            output,
            rules,
        )
    }

    /// Text longer than this has more tokens than the context, whatever they are.
    fn max_prompt_bytes(&self) -> usize {
        (self.limits().max_model_len as usize).saturating_mul(self.tokenizer.table().longest_token())
    }

    pub(super) fn check_bytes(&self, bytes: usize, param: &str) -> Result<(), RpcError> {
        if bytes <= self.max_prompt_bytes() {
            return Ok(());
        }
        let message = format!(
            "This model's maximum context length is {} tokens. However, your request has {bytes} bytes of text, which \
             cannot fit. Please reduce the length of the input.",
            self.limits().max_model_len
        );
        Err(RpcError::new(ErrorKind::ContextLengthExceeded, message).with_param(param))
    }

    fn check_ids(&self, ids: &[u32]) -> Result<(), RpcError> {
        self.check_vocabulary(ids, "prompt")
    }

    pub(super) fn check_vocabulary(&self, ids: &[u32], param: &str) -> Result<(), RpcError> {
        let vocab_size = self.limits.vocab_size;
        match ids.iter().find(|&&id| id >= vocab_size) {
            None => Ok(()),
            Some(id) => Err(RpcError::invalid(
                param,
                format!("Token id {id} is out of vocabulary; token ids are below {vocab_size}."),
            )),
        }
    }

    pub(super) async fn encode(&self, text: String, add_special_tokens: bool) -> Result<Vec<u32>, RpcError> {
        let tokenizer = self.tokenizer.clone();
        self.pool
            .run(move || encode(&tokenizer, &text, add_special_tokens))
            .await
    }

    fn assemble(
        &self,
        mut params: CheckedParams,
        prompt: Vec<u32>,
        place: Place,
        (echo, output): (Option<String>, v1::OutputOptions),
    ) -> Result<PreparedRequest, RpcError> {
        if prompt.is_empty() {
            return Err(RpcError::invalid("prompt", "The decoder prompt cannot be empty"));
        }
        // A tokenizer may know tokens that the model's embedding has no row for.
        self.check_ids(&prompt)?;
        let stop = params.stop_rules(prompt.len(), &self.limits())?;
        let prompt_tokens = prompt.len() as u32;
        // The last one is moved: copies of grammars are not small.
        let constraints = iter::repeat_n(mem::take(&mut params.constraint), params.n as usize);
        let sequences = (0..params.n)
            .zip(constraints)
            .map(|(index, constraint)| NewSequence {
                prompt: prompt.clone(),
                output: Vec::new(),
                sampling: params.sampling_of(index),
                stop: stop.clone(),
                constraint,
                priority: place.priority,
                cache_salt: place.cache_salt.clone(),
                tenant: TenantId::default(),
            });
        let sequences = sequences.collect();
        let tells_of_prompt = output.return_prompt_token_ids || params.sampling.prompt_logprobs.is_some();
        Ok(PreparedRequest {
            sequences,
            ended_after: vec![None; params.n as usize],
            prompt_tokens,
            prompt: tells_of_prompt.then_some(prompt),
            echo,
            generates: params.generates(),
            stop_strings: params.stop_strings,
            skip_special_tokens: params.skip_special_tokens,
            output,
            lists_logprobs: !params.sampling.logprob_token_ids.is_empty(),
            plan: OutputPlan::default(),
        })
    }
}

/// A request's place in the queue and in the prefix cache.
struct Place {
    priority: i32,
    cache_salt: Option<String>,
}

impl Place {
    /// Errors: a salt that is empty or too long. Whether priorities are offered is the engine's to say.
    fn checked(priority: i32, cache_salt: Option<String>) -> Result<Self, RpcError> {
        let bytes = cache_salt.as_ref().map_or(1, String::len);
        if !(1..=MAX_CACHE_SALT_BYTES).contains(&bytes) {
            let message = format!("cache_salt has {bytes} bytes, allowed are 1 to {MAX_CACHE_SALT_BYTES}.");
            return Err(RpcError::invalid("cache_salt", message));
        }
        Ok(Self { priority, cache_salt })
    }
}

/// How many of a prompt's last tokens are kept.
struct Cut(Option<usize>);

impl Cut {
    /// `asked`: -1 for as many as fit. Errors: `InvalidArgument` for a number that cuts nothing or all.
    fn checked(asked: Option<i32>, params: &CheckedParams, limits: &ModelLimits) -> Result<Self, RpcError> {
        const PARAM: &str = "truncate_prompt_tokens";
        let most = limits.max_model_len;
        match asked {
            None => Ok(Self(None)),
            Some(-1) => Ok(Self(Some(params.room_for_prompt(limits).max(1)))),
            Some(kept) if u32::try_from(kept).is_ok_and(|kept| (1..=most).contains(&kept)) => {
                Ok(Self(Some(kept as usize)))
            }
            Some(kept) if kept > 0 => {
                let message = format!(
                    "truncate_prompt_tokens value ({kept}) is greater than max_model_len ({most}). Please, select a \
                     smaller truncation size."
                );
                Err(RpcError::invalid(PARAM, message))
            }
            Some(kept) => {
                let message = format!("truncate_prompt_tokens must be -1 or at least 1, got {kept}.");
                Err(RpcError::invalid(PARAM, message))
            }
        }
    }

    /// Whether anything was cut off.
    fn apply(&self, prompt: &mut Vec<u32>) -> bool {
        let surplus = self.0.map_or(0, |kept| prompt.len().saturating_sub(kept));
        prompt.drain(..surplus);
        surplus > 0
    }
}

fn encode(tokenizer: &Tokenizer, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, RpcError> {
    tokenizer
        .encode(text, add_special_tokens)
        .map_err(|error| RpcError::invalid("prompt", error.to_string()))
}
