//! Token-KV simulation: ranks whose "KV cache" holds the token ids themselves, and a "model" that hashes whatever
//! attention would read through the block table. A wrong block, a stale prefix hit, a prefix hit across salts or a bad
//! requeue changes a token, and the oracle, which knows nothing of blocks, notices. No model and no device is needed.

mod executor;
mod fairness;
mod grammar;
mod indexer;
mod pauses;
mod scenario;
mod tests;

pub(crate) use executor::{Faults, SimExecutor};

use std::collections::BTreeSet;

use phalanx_proto::step::{RowSampling, ScoredToken, SequenceId, TokenSet};

use super::{Constraint, EngineRequest, FinishReason, GrammarStatus, RepetitionDetection};

/// Large enough that a wrong context seldom draws the right token, small enough that stop tokens are met.
pub(crate) const VOCAB_SIZE: u32 = 257;

/// SplitMix64 (Steele, Lea, Flood 2014).
pub(crate) struct Prng(pub(crate) u64);

impl Prng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        n > 0 && self.below(n) == 0
    }
    /// From `low` to `high`, both included.
    pub(crate) fn range(&mut self, low: u32, high: u32) -> u32 {
        low + self.below(u64::from(high - low) + 1) as u32
    }
}

fn mix(hash: u64, value: u64) -> u64 {
    Prng(hash ^ value.wrapping_mul(0xD6E8_FEB8_6659_FD93)).next()
}

/// Callers are told apart by salt, and a sequence's id says which caller's it is, so that the simulated ranks know whose
/// KV they hold without being told.
fn salt(id: SequenceId) -> Option<&'static str> {
    [None, Some("a"), Some("b")][(id.0 % 3) as usize]
}

/// What a KV slot holds of a token.
fn kv_entry(token: u32, id: SequenceId) -> u64 {
    (u64::from(token) << 8) | (id.0 % 3)
}

/// The token drawn after `context`, and whether there is one: the logits may be no numbers, and every token may be ruled
/// out. Everything a real sampler looks at counts.
fn sample(context: &[u64], sampling: &RowSampling, allowed: Option<&TokenSet>) -> (u32, bool) {
    let mut hash = context.iter().copied().fold(7, mix);
    // A request with such a seed has a weight that is no number in its way, now and then.
    let finite = sampling.seed % 8 != 7 || !hash.is_multiple_of(16);
    hash = mix(hash, sampling.seed ^ u64::from(sampling.temperature.to_bits()));
    if let Some(penalties) = &sampling.penalties {
        hash = mix(hash, penalties.repetition.to_bits().into());
        for &(token, count) in &penalties.history {
            hash = mix(hash, (u64::from(token) << 32) | u64::from(count));
        }
    }
    let mut first = (hash % u64::from(VOCAB_SIZE)) as u32;
    // Every other seed goes round in circles, of which it now and then breaks out, so that there is something to guess.
    let period = (sampling.seed / 16 % 4 + 1) as usize;
    if (sampling.seed / 8).is_multiple_of(2)
        && !hash.is_multiple_of(11)
        && let Some(at) = context.len().checked_sub(period)
    {
        first = ((context[at] >> 8) % u64::from(VOCAB_SIZE)) as u32;
    }
    let ruled_out = |token: &u32| {
        sampling.bias.contains(&(*token, f32::NEG_INFINITY))
            || allowed.is_some_and(|allowed| !allowed.contains(*token))
    };
    let mut tokens = (0..VOCAB_SIZE).map(|step| (first + step) % VOCAB_SIZE);
    match tokens.find(|token| !ruled_out(token)) {
        Some(token) => (token, finite),
        None => (0, false),
    }
}

/// How a sequence ends that is not ended from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Finished(FinishReason),
    /// By its constraint.
    Failed,
}

/// What a known token after `context` is given for a log-probability. Whoever asks for three alternatives has a weight
/// that is no number in his way, now and then.
fn score(context: impl Iterator<Item = u64>, token: u32, top: u32) -> ScoredToken {
    let hash = mix(context.fold(11, mix), token.into());
    let finite = top != 3 || !hash.is_multiple_of(64);
    ScoredToken {
        token,
        logprob: if finite { -((hash % 1000) as f32) } else { f32::NAN },
        rank: (hash % u64::from(VOCAB_SIZE)) as u32,
        top_logprobs: (0..top)
            .map(|best| ((hash >> 32) as u32 % VOCAB_SIZE, -(best as f32)))
            .collect(),
    }
}

/// The log-probability of a token after `context`.
fn logprob(context: &[u64], token: u32) -> f32 {
    let hash = mix(context.iter().copied().fold(13, mix), token.into());
    -((hash % 1000) as f32)
}

fn logprobs_of(context: &[u64], listed: &[u32]) -> Vec<(u32, f32)> {
    listed.iter().map(|&id| (id, logprob(context, id))).collect()
}

/// What is reported of the listed tokens beside each of `tokens`, which follow the output that the request brings.
pub(crate) fn listed_oracle(request: &EngineRequest, tokens: &[u32]) -> Vec<Vec<(u32, f32)>> {
    let known = [request.prompt.as_slice(), &request.output].concat();
    let mut context: Vec<u64> = known.iter().map(|&token| kv_entry(token, request.id)).collect();
    let reported = tokens.iter().map(|&token| {
        let reported = logprobs_of(&context, &request.sampling.logprob_token_ids);
        context.push(kv_entry(token, request.id));
        reported
    });
    reported.collect()
}

/// The scores of all prompt tokens but the first; none if none are asked for.
pub(crate) fn prompt_oracle(request: &EngineRequest) -> Vec<ScoredToken> {
    let Some(top) = request.sampling.prompt_logprobs else {
        return Vec::new();
    };
    let entry = |&token: &u32| kv_entry(token, request.id);
    let scored = (1..request.prompt.len())
        .map(|at| score(request.prompt[..at].iter().map(entry), request.prompt[at], top));
    scored.collect()
}

/// Tokens and end of a request that has the machine to itself, computed without blocks, chunks or batches: those that
/// follow the output it brings.
pub(crate) fn oracle(request: &EngineRequest) -> (Vec<u32>, End) {
    if prompt_oracle(request)
        .iter()
        .any(|scored| scored.logprob.is_nan())
    {
        return (Vec::new(), End::Finished(FinishReason::NotFinite));
    }
    let num_prompt = request.prompt.len();
    let mut tokens = [request.prompt.as_slice(), &request.output].concat();
    let num_known = tokens.len();
    let mut constraint = request.constraint.clone();
    for &token in &request.output {
        if let Some(grammar) = &mut constraint.grammar {
            // As with the engine, a failure is one when it is asked.
            let _ = grammar.accept(token);
        }
    }
    loop {
        let num_output = tokens.len() - num_prompt;
        let s = &request.sampling;
        let mut bias = s.logit_bias.clone();
        let patient = num_output < request.stop.min_tokens as usize;
        let banned = if patient {
            &request.stop.stop_token_ids[..]
        } else {
            &[]
        };
        if !constraint.is_active() {
            bias.extend(banned.iter().map(|&id| (id, f32::NEG_INFINITY)));
        }
        let sampling = RowSampling {
            temperature: s.temperature,
            seed: s.seed,
            penalties: s.penalties(|| naive_history(&tokens, num_prompt, s.repetition_penalty)),
            bias,
            ..RowSampling::GREEDY
        };
        let output = |tokens: &[u32]| tokens[num_known..].to_vec();
        let Some(allowed) = naive_mask(&mut constraint, &tokens[num_prompt..], banned) else {
            return (output(&tokens), End::Failed);
        };
        let context: Vec<u64> = tokens.iter().map(|&token| kv_entry(token, request.id)).collect();
        let (token, finite) = sample(&context, &sampling, Some(&allowed));
        if !finite {
            return (output(&tokens), End::Finished(FinishReason::NotFinite));
        }
        tokens.push(token);
        let late = num_output + 1 >= request.stop.min_tokens as usize;
        if late && request.stop.stop_token_ids.contains(&token) {
            return (output(&tokens), End::Finished(FinishReason::Stop));
        }
        match constraint.grammar.as_mut().map(|grammar| grammar.accept(token)) {
            None | Some(Ok(GrammarStatus::Open)) => {}
            Some(Ok(GrammarStatus::Complete)) => return (output(&tokens), End::Finished(FinishReason::Stop)),
            Some(Err(_)) => return (output(&tokens), End::Failed),
        }
        if num_output + 1 == request.stop.max_tokens as usize {
            return (output(&tokens), End::Finished(FinishReason::Length));
        }
        if late && naively_repeats(&tokens[num_prompt..], request.stop.repetition) {
            return (output(&tokens), End::Finished(FinishReason::Repetition));
        }
    }
}

/// Whether `output` ends with copies of one of its tails.
fn naively_repeats(output: &[u32], rule: Option<RepetitionDetection>) -> bool {
    let Some(rule) = rule else { return false };
    let mut sizes = rule.min_pattern_size as usize..=rule.max_pattern_size as usize;
    sizes.any(|size| {
        let Some(first) = output.len().checked_sub(size) else {
            return false;
        };
        output.ends_with(&output[first..].repeat(rule.min_count as usize))
    })
}

/// What may follow `output`, token by token; none if nothing may, or the grammar fails.
fn naive_mask(constraint: &mut Constraint, output: &[u32], banned: &[u32]) -> Option<TokenSet> {
    let grammar = match &mut constraint.grammar {
        Some(grammar) => Some(grammar.allowed().ok()?),
        None => None,
    };
    let fits = |id: &u32| {
        let listed = |set: &Option<TokenSet>| set.as_ref().is_none_or(|set| set.contains(*id));
        let ends_badly = |word: &Vec<u32>| [output, &[*id]].concat().ends_with(word);
        listed(&grammar)
            && listed(&constraint.allowed_token_ids)
            && !constraint.bad_words.iter().any(ends_badly)
    };
    let all: Vec<u32> = (0..VOCAB_SIZE).filter(fits).collect();
    let unwanted = |id: &u32| banned.contains(id) || constraint.postponed.contains(id);
    let mut chosen: Vec<u32> = all.iter().copied().filter(|id| !unwanted(id)).collect();
    if chosen.is_empty() || !constraint.is_active() {
        chosen = all;
    }
    let mut set = TokenSet::empty(VOCAB_SIZE);
    chosen.iter().for_each(|&id| set.insert(id));
    (!chosen.is_empty()).then_some(set)
}

/// Prompt tokens are part of it only for a repetition penalty.
fn naive_history(tokens: &[u32], num_prompt: usize, repetition: f32) -> Vec<(u32, u32)> {
    let seen = if repetition == 1.0 {
        &tokens[num_prompt..]
    } else {
        tokens
    };
    let distinct: BTreeSet<u32> = seen.iter().copied().collect();
    let count = |token| {
        tokens[num_prompt..]
            .iter()
            .filter(|&&other| other == token)
            .count() as u32
    };
    distinct.into_iter().map(|token| (token, count(token))).collect()
}
