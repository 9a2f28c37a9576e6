//! Continuous batching: which tokens of which sequences the next step computes.
//!
//! Running sequences come before waiting ones, decodes before prompt chunks, and within each the more urgent before the
//! less urgent. When blocks are short the least urgent running sequence gives all of its back and is computed again
//! later, so the most urgent one always makes progress: alone it fits, or it would have been rejected. Every decode is
//! part of every step, so that prompts delay it by one step of bounded size at most; and as a step has room for more
//! tokens than there can be other decodes, the first prompt is part of every step, too. Guesses get what is left.

use std::collections::BTreeMap;

use phalanx_proto::step::{SampledToken, ScoredPrompt, SequenceId, StepMasks, StepOutput, StepPlan, StepRow};

use super::{
    Command, ConstraintError, EngineConfig, EngineRequest, Event, FinishReason, KvEvent, SchedulingPolicy,
    SpeculationStats,
    kv_cache_manager::{KvCacheManager, Room},
    pause::Pause,
    sequence::{Sequence, Urgency},
    speculation::Verifier,
    waiting::WaitingQueue,
};

/// The engine in numbers. Counters count since the engine's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    pub epoch: u32,
    /// Sequences that hold blocks.
    pub num_running: usize,
    /// Sequences that hold none: not started yet, preempted, or requeued after a lost rank.
    pub num_waiting: usize,
    pub num_blocks: usize,
    /// Free blocks, including those whose content can still be found.
    pub num_free_blocks: usize,
    /// Tokens of sequences that started.
    pub prefix_cache_queries: u64,
    /// Those of them that came from the prefix cache.
    pub prefix_cache_hits: u64,
    pub num_preemptions: u64,
    /// Plans made, including those that failed.
    pub num_steps: u64,
    pub speculation: SpeculationStats,
    /// Nothing new is started.
    pub paused: bool,
}

impl Snapshot {
    /// 0 to 1.
    pub fn kv_cache_usage(&self) -> f64 {
        1.0 - self.num_free_blocks as f64 / self.num_blocks.max(1) as f64
    }
}

pub(super) struct Scheduler {
    config: EngineConfig,
    pub(super) kv: KvCacheManager,
    pub(super) sequences: BTreeMap<SequenceId, Sequence>,
    /// Every sequence is in exactly one of these two.
    waiting: WaitingQueue,
    pub(super) running: BTreeMap<Urgency, SequenceId>,
    pub(super) pause: Option<Pause>,
    num_arrivals: u64,
    epoch: u32,
    /// Number of the last plan. It goes on across epochs, so no late output can be taken for a newer one.
    step: u64,
    prefix_cache_queries: u64,
    prefix_cache_hits: u64,
    pub(super) num_preemptions: u64,
    speculation: SpeculationStats,
}

/// A step in the making.
struct Draft<'a> {
    /// Tokens that may still be added.
    budget: usize,
    /// New tokens of each sequence, in order of urgency.
    chosen: BTreeMap<Urgency, usize>,
    /// Guesses at what follows some of them.
    drafts: BTreeMap<Urgency, Vec<u32>>,
    preempted: bool,
    /// It holds a sequence that will be given up if this step fails as well.
    on_last_chance: bool,
    events: &'a mut Vec<Event>,
}

impl Draft<'_> {
    fn choose(&mut self, urgency: Urgency, num_tokens: usize) {
        self.budget -= num_tokens;
        self.chosen.insert(urgency, num_tokens);
    }
}

impl Scheduler {
    pub(super) fn new(config: EngineConfig) -> Self {
        Self {
            kv: KvCacheManager::new(&config),
            sequences: BTreeMap::new(),
            waiting: WaitingQueue::new(config.policy),
            running: BTreeMap::new(),
            pause: None,
            num_arrivals: 0,
            epoch: config.epoch,
            step: 0,
            prefix_cache_queries: 0,
            prefix_cache_hits: 0,
            num_preemptions: 0,
            speculation: SpeculationStats::default(),
            config,
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.sequences.is_empty()
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        Snapshot {
            epoch: self.epoch,
            num_running: self.running.len(),
            num_waiting: self.waiting.len(),
            num_blocks: self.kv.num_blocks(),
            num_free_blocks: self.kv.num_free_blocks(),
            prefix_cache_queries: self.prefix_cache_queries,
            prefix_cache_hits: self.prefix_cache_hits,
            num_preemptions: self.num_preemptions,
            num_steps: self.step,
            speculation: self.speculation,
            paused: self.pause.is_some(),
        }
    }

    pub(super) fn take_kv_events(&mut self) -> Vec<KvEvent> {
        self.kv.take_events()
    }

    #[cfg(test)]
    pub(super) fn cached_blocks(&self) -> std::collections::BTreeSet<super::BlockHash> {
        self.kv.cached_blocks()
    }

    pub(super) fn apply(&mut self, command: Command, events: &mut Vec<Event>) {
        match command {
            Command::Submit(request) => self.submit(request, events),
            Command::Finish(id, reason) if self.sequences.contains_key(&id) => {
                self.finish(id, reason, events)
            }
            Command::Finish(..) => {}
            Command::Pause { mode, clear_cache } => self.pause(mode, clear_cache, events),
            Command::Resume => self.resume(events),
            Command::ResetPrefixCache { reset_running } => self.reset_prefix_cache(reset_running, events),
        }
    }

    fn submit(&mut self, request: EngineRequest, events: &mut Vec<Event>) {
        let id = request.id;
        if let Err(cause) = request.check(&self.config) {
            return events.push(Event::Rejected { sequence: id, cause });
        }
        let urgency = Urgency {
            priority: match self.config.policy {
                SchedulingPolicy::Fcfs | SchedulingPolicy::Fair => 0,
                SchedulingPolicy::Priority => request.priority,
            },
            arrival: self.num_arrivals,
        };
        self.num_arrivals += 1;
        let kv = self.kv.sequence(request.cache_salt.as_deref());
        self.waiting.submit(urgency, id, request.tenant);
        let replaced = self.sequences.insert(id, Sequence::new(request, urgency, kv));
        assert!(replaced.is_none(), "{id:?} was submitted twice");
    }

    /// The next step; none if there is no sequence that may run.
    pub(super) fn schedule(&mut self, events: &mut Vec<Event>) -> Option<StepPlan> {
        if !self.has_work() {
            return None;
        }
        let mut draft = Draft {
            budget: self.config.max_num_batched_tokens as usize,
            chosen: BTreeMap::new(),
            drafts: BTreeMap::new(),
            preempted: false,
            on_last_chance: false,
            events,
        };
        self.choose_running(&mut draft, |remaining| remaining == 1);
        self.choose_running(&mut draft, |remaining| remaining > 1);
        // Who was just preempted would be the next to be admitted.
        if !draft.preempted {
            self.admit_waiting(&mut draft);
            self.add_drafts(&mut draft);
        }
        let Draft { chosen, drafts, .. } = draft;
        assert!(!chosen.is_empty(), "sequences are live but none can run");
        self.step += 1;
        let rows = self.rows(&chosen, &drafts);
        let masks_follow = rows.iter().any(|row| self.is_masked(row));
        Some(StepPlan {
            epoch: self.epoch,
            step: self.step,
            rows,
            masks_follow,
        })
    }

    fn is_masked(&self, row: &StepRow) -> bool {
        row.sampling.is_some() && self.sequences[&row.sequence].is_masked()
    }

    /// What the plan's sampled rows may draw, where that is not everything. Takes its time; the ranks run meanwhile.
    pub(super) fn masks(&mut self, plan: &StepPlan) -> StepMasks {
        let mut masks = Vec::new();
        for row in plan.rows.iter().filter(|row| row.sampling.is_some()) {
            let sequence = self.sequences.get_mut(&row.sequence);
            if let Some(sequence) = sequence.filter(|sequence| sequence.is_masked()) {
                masks.push(sequence.mask(self.config.vocab_size));
            }
        }
        StepMasks {
            epoch: plan.epoch,
            step: plan.step,
            masks,
        }
    }

    /// The rows of the chosen sequences, the most urgent first, each with its guesses behind it. One whose penalties look
    /// at more tokens than the plan has room for is left to a later step: alone, every history fits.
    fn rows(&self, chosen: &BTreeMap<Urgency, usize>, drafts: &BTreeMap<Urgency, Vec<u32>>) -> Vec<StepRow> {
        let mut history_left = self.config.step_limits().max_history() as usize;
        let mut rows = Vec::with_capacity(chosen.len());
        for (urgency, &num_tokens) in chosen {
            let sequence = &self.sequences[&self.running[urgency]];
            let own = sequence.row(num_tokens, &self.config);
            let guesses = drafts
                .get(urgency)
                .map_or_else(Vec::new, |drafts| sequence.draft_rows(drafts, &self.config));
            for row in std::iter::once(own).chain(guesses) {
                let Some(left) = history_left.checked_sub(history_len(&row)) else {
                    break;
                };
                history_left = left;
                rows.push(row);
            }
        }
        rows
    }

    /// Gives tokens to the running sequences whose number of remaining tokens passes `turn`.
    fn choose_running(&mut self, draft: &mut Draft<'_>, turn: impl Fn(usize) -> bool) {
        let candidates: Vec<_> = self.running.iter().map(|(&urgency, &id)| (urgency, id)).collect();
        for (urgency, id) in candidates {
            // A candidate may be preempted for a more urgent one, or in the end for itself.
            while draft.budget > 0 && self.running.contains_key(&urgency) {
                let Some(sequence) = self.sequences.get_mut(&id) else {
                    break;
                };
                if !turn(sequence.num_remaining_tokens()) {
                    break;
                }
                let num_tokens = chunk(sequence, draft.budget, &self.config);
                let end = sequence.num_computed_tokens + num_tokens;
                if self.kv.grow(&mut sequence.kv, end) {
                    draft.choose(urgency, num_tokens);
                    break;
                }
                self.preempt_least_urgent(draft);
            }
        }
    }

    fn preempt_least_urgent(&mut self, draft: &mut Draft<'_>) {
        let Some((urgency, id)) = self.least_urgent_running() else {
            return;
        };
        self.running.remove(&urgency);
        self.requeue(urgency, id);
        self.num_preemptions += 1;
        draft.preempted = true;
        draft.budget += draft.chosen.remove(&urgency).unwrap_or(0);
        draft.events.push(Event::Preempted { sequence: id });
    }

    /// The first to give way: the last of the tenant that was served most.
    fn least_urgent_running(&self) -> Option<(Urgency, SequenceId)> {
        if self.config.policy != SchedulingPolicy::Fair {
            return self.running.last_key_value().map(|(&urgency, &id)| (urgency, id));
        }
        let served = |id: &SequenceId| self.waiting.service(self.sequences[id].tenant);
        let most_served = self
            .running
            .iter()
            .max_by_key(|&(urgency, id)| (served(id), *urgency));
        most_served.map(|(&urgency, &id)| (urgency, id))
    }

    /// Back to waiting, with nothing computed and in its old place of the order.
    pub(super) fn requeue(&mut self, urgency: Urgency, id: SequenceId) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            self.kv.free(&mut sequence.kv);
            sequence.num_computed_tokens = 0;
            self.waiting.put_back(urgency, id, sequence.tenant);
        }
    }

    /// Admits in order: nobody overtakes a sequence that does not fit yet, or a large one might never run.
    fn admit_waiting(&mut self, draft: &mut Draft<'_>) {
        let mut promised = self.promised_blocks();
        while draft.budget > 0 && self.running.len() < self.config.max_num_seqs as usize {
            let Some((urgency, id)) = self.next_waiting() else {
                return;
            };
            let Some(sequence) = self.sequences.get_mut(&id) else {
                return;
            };
            // If one of them kills the ranks, the others must not be given up with it. Whatever runs already has
            // been part of a successful step.
            let last_chance =
                sequence.failed_steps > 0 && sequence.failed_steps + 1 == self.config.max_step_failures;
            if last_chance && draft.on_last_chance {
                return;
            }
            let room = Room {
                num_cacheable: sequence.num_cacheable_tokens(),
                new_tokens: if self.config.reserve_full_isl {
                    usize::MAX
                } else {
                    longest_chunk(draft.budget, &self.config)
                },
                // What runs alone may have all of it.
                kept_blocks: if self.running.is_empty() {
                    0
                } else {
                    self.kv.watermark_blocks() + promised
                },
            };
            let Some(num_cached_tokens) = self.kv.admit(&mut sequence.kv, &sequence.tokens, room) else {
                return;
            };
            draft.on_last_chance |= last_chance;
            sequence.num_computed_tokens = num_cached_tokens;
            let num_tokens = chunk(sequence, draft.budget, &self.config);
            let grown = self.kv.grow(&mut sequence.kv, num_cached_tokens + num_tokens);
            assert!(grown, "admission has made sure of the blocks of {id:?}");
            if self.config.reserve_full_isl {
                promised += self.kv.num_missing_blocks(&sequence.kv, &sequence.tokens);
            }
            if !std::mem::replace(&mut sequence.started, true) {
                self.waiting
                    .charge_prompt(sequence.tenant, sequence.tokens.len() - num_cached_tokens);
                self.prefix_cache_queries += sequence.tokens.len() as u64;
                self.prefix_cache_hits += num_cached_tokens as u64;
                draft.events.push(Event::Started {
                    sequence: id,
                    // What was found of resumed output is no part of the prompt.
                    cached_tokens: num_cached_tokens.min(sequence.num_prompt_tokens()) as u32,
                });
            }
            self.waiting.remove(&urgency);
            self.running.insert(urgency, id);
            draft.choose(urgency, num_tokens);
        }
    }

    /// The one to admit next; in a pause, of those that have started and were preempted.
    fn next_waiting(&self) -> Option<(Urgency, SequenceId)> {
        match self.pause {
            None => self.waiting.next(),
            Some(_) => self.waiting.find(|id| self.sequences[&id].started),
        }
    }

    /// Blocks that running prompts still need, if they are kept for them.
    fn promised_blocks(&self) -> usize {
        if !self.config.reserve_full_isl || self.waiting.len() == 0 {
            return 0;
        }
        let sequences = self.running.values().map(|id| &self.sequences[id]);
        let missing = sequences.map(|sequence| self.kv.num_missing_blocks(&sequence.kv, &sequence.tokens));
        missing.sum()
    }

    /// Guesses with the tokens, rows and blocks that nobody else can use in this step.
    fn add_drafts(&mut self, draft: &mut Draft<'_>) {
        let Some(speculation) = self.config.speculative else {
            return;
        };
        let mut rows = self.config.step_limits().max_rows as usize - draft.chosen.len();
        for (urgency, &num_tokens) in &draft.chosen {
            let most = rows.min(draft.budget);
            let sequence = self
                .running
                .get(urgency)
                .and_then(|id| self.sequences.get_mut(id));
            let Some(sequence) = sequence.filter(|sequence| num_tokens == sequence.num_remaining_tokens())
            else {
                continue;
            };
            let mut drafts = sequence.propose(&speculation, most);
            let end = sequence.tokens.len();
            while !drafts.is_empty() && !self.kv.grow(&mut sequence.kv, end + drafts.len()) {
                drafts.pop();
            }
            if drafts.is_empty() {
                continue;
            }
            rows -= drafts.len();
            draft.budget -= drafts.len();
            draft.drafts.insert(*urgency, drafts);
        }
    }

    /// Books what a step has computed. The output must answer the plan; sequences that ended meanwhile are skipped.
    pub(super) fn update(&mut self, plan: &StepPlan, output: StepOutput, events: &mut Vec<Event>) {
        let mut verifier = Verifier::default();
        let mut sampled = output.sampled.into_iter();
        let mut scored = output.prompt_logprobs.into_iter();
        for row in &plan.rows {
            let answer = Answer {
                scored: row.prompt_logprobs.as_ref().and_then(|_| scored.next()),
                sampled: row.sampling.as_ref().and_then(|_| sampled.next()),
            };
            if verifier.check(row, answer.sampled.as_ref(), &mut self.speculation) {
                self.book(row, answer, events);
            }
        }
    }

    /// Books a row whose tokens are its sequence's.
    fn book(&mut self, row: &StepRow, answer: Answer, events: &mut Vec<Event>) {
        let Some(sequence) = self.sequences.get_mut(&row.sequence) else {
            return;
        };
        // Of a mask that allows nothing the logits are innocent.
        if answer.scores_are_finite()
            && let Some(cause) = sequence.take_masked_out()
        {
            return self.fail(row.sequence, cause, events);
        }
        if !answer.is_finite() {
            // Nobody may find blocks that lead to logits that are no numbers.
            self.kv.discard(&mut sequence.kv);
            return self.finish(row.sequence, FinishReason::NotFinite, events);
        }
        let num_computed = row.num_computed_tokens as usize + row.token_ids.len();
        sequence.num_computed_tokens = num_computed;
        sequence.failed_steps = 0;
        self.kv.offer(&mut sequence.kv, &sequence.tokens, num_computed);
        if let Some(scored) = answer.scored {
            self.accept_scored(scored, events);
        }
        if let Some(sampled) = answer.sampled {
            self.accept(sampled, events);
        }
    }

    fn accept_scored(&mut self, scored: ScoredPrompt, events: &mut Vec<Event>) {
        let ScoredPrompt { sequence: id, tokens } = scored;
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.scored(tokens.len());
            events.push(Event::PromptLogprobs { sequence: id, tokens });
        }
    }

    fn accept(&mut self, sampled: SampledToken, events: &mut Vec<Event>) {
        let id = sampled.sequence;
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        self.waiting.charge_output_token(sequence.tenant);
        let pushed = sequence.push(sampled.token);
        events.push(Event::Token(sampled));
        match pushed {
            Ok(None) => {}
            Ok(Some(reason)) => self.finish(id, reason, events),
            Err(cause) => self.fail(id, cause, events),
        }
    }

    fn fail(&mut self, id: SequenceId, cause: ConstraintError, events: &mut Vec<Event>) {
        self.remove(id);
        events.push(Event::Failed { sequence: id, cause });
    }

    pub(super) fn finish(&mut self, id: SequenceId, reason: FinishReason, events: &mut Vec<Event>) {
        self.remove(id);
        events.push(Event::Finished { sequence: id, reason });
    }

    fn remove(&mut self, id: SequenceId) {
        if let Some(mut sequence) = self.sequences.remove(&id) {
            self.kv.free(&mut sequence.kv);
            self.waiting.remove(&sequence.urgency);
            self.running.remove(&sequence.urgency);
        }
    }

    /// A new group has taken over: no KV is left, every token still is. `failed` is the plan that the old one was lost
    /// over, if any; a sequence for which that happens too often is given up.
    pub(super) fn requeue_running(&mut self, epoch: u32, failed: Option<&StepPlan>, events: &mut Vec<Event>) {
        self.epoch = epoch;
        while let Some((urgency, id)) = self.running.pop_last() {
            self.requeue(urgency, id);
        }
        self.kv.reset();
        let rows = failed.into_iter().flat_map(|plan| &plan.rows);
        let mut sequences: Vec<SequenceId> = rows.map(|row| row.sequence).collect();
        // Rows of guesses stand behind their sequence's own.
        sequences.dedup();
        for id in sequences {
            let Some(sequence) = self.sequences.get_mut(&id) else {
                continue;
            };
            sequence.failed_steps += 1;
            let failed_steps = sequence.failed_steps;
            if failed_steps >= self.config.max_step_failures {
                self.remove(id);
                events.push(Event::Lost {
                    sequence: id,
                    failed_steps,
                });
            }
        }
    }

    /// Panics on a state that must not be. The full check is linear in sequences and blocks and left to debug builds.
    pub(super) fn check_invariants(&self) {
        assert_eq!(
            self.waiting.len() + self.running.len(),
            self.sequences.len(),
            "every sequence either waits or runs"
        );
        assert!(
            !self.running.is_empty() || self.kv.num_free_blocks() == self.kv.num_blocks(),
            "blocks are held but nothing runs"
        );
        if cfg!(debug_assertions) {
            self.check_every_sequence();
        }
    }

    fn check_every_sequence(&self) {
        self.kv
            .check(self.sequences.values().map(|sequence| &sequence.kv));
        for (id, sequence) in &self.sequences {
            let (urgency, computed) = (&sequence.urgency, sequence.num_computed_tokens);
            let room = sequence.kv.table.len() * self.config.block_size as usize;
            if self.running.get(urgency) == Some(id) {
                assert!(
                    computed < sequence.tokens.len() && computed <= room,
                    "{id:?} has {computed} of {} tokens computed in room for {room}",
                    sequence.tokens.len()
                );
            } else {
                assert_eq!(self.waiting.get(urgency), Some(*id), "place of {id:?}");
                assert_eq!((computed, room), (0, 0), "{id:?} waits and holds nothing");
            }
        }
    }
}

/// Entries of a row's penalty history.
fn history_len(row: &StepRow) -> usize {
    let penalties = row
        .sampling
        .as_ref()
        .and_then(|sampling| sampling.penalties.as_ref());
    penalties.map_or(0, |penalties| penalties.history.len())
}

/// What came of one row.
struct Answer {
    scored: Option<ScoredPrompt>,
    sampled: Option<SampledToken>,
}

impl Answer {
    /// No logits of the row held a NaN or an infinity.
    fn is_finite(&self) -> bool {
        self.scores_are_finite() && self.sampled.as_ref().is_none_or(|sampled| sampled.finite)
    }

    fn scores_are_finite(&self) -> bool {
        let mut scores = self.scored.iter().flat_map(|scored| &scored.tokens);
        scores.all(|token| !token.logprob.is_nan())
    }
}

/// How many tokens a sequence may compute in this step.
fn chunk(sequence: &Sequence, budget: usize, config: &EngineConfig) -> usize {
    sequence.num_remaining_tokens().min(longest_chunk(budget, config))
}

fn longest_chunk(budget: usize, config: &EngineConfig) -> usize {
    match config.long_prefill_token_threshold {
        0 => budget,
        threshold => budget.min(threshold as usize),
    }
}
