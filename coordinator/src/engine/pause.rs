//! Holding the engine still while something outside of it changes: weights, a configuration, a machine.

use super::{Event, FinishReason, scheduler::Scheduler};

/// What becomes of the sequences that are in flight when a pause begins: vLLM's three modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PauseMode {
    /// They are aborted.
    Abort,
    /// Those that have started go on to their end; the others wait.
    Wait,
    /// They stand still, with their blocks, and go on after the pause.
    Keep,
}

/// A pause in force.
pub(super) struct Pause {
    mode: PauseMode,
    clear_cache: bool,
    /// Nothing is in flight any more, and everybody has been told.
    settled: bool,
}

impl Pause {
    /// Whether sequences that have started go on.
    fn runs_started(&self) -> bool {
        self.mode != PauseMode::Keep
    }
}

impl Scheduler {
    pub(super) fn pause(&mut self, mode: PauseMode, clear_cache: bool, events: &mut Vec<Event>) {
        if mode == PauseMode::Abort {
            let live: Vec<_> = self.sequences.keys().copied().collect();
            for id in live {
                self.finish(id, FinishReason::Abort, events);
            }
        }
        self.pause = Some(Pause {
            mode,
            // Frozen sequences need what the cache holds.
            clear_cache: clear_cache && mode != PauseMode::Keep,
            settled: false,
        });
    }

    pub(super) fn resume(&mut self, events: &mut Vec<Event>) {
        self.pause = None;
        events.push(Event::Resumed);
    }

    /// Reports a pause as soon as nothing is in flight that it lets go on.
    pub(super) fn settle_pause(&mut self, events: &mut Vec<Event>) {
        let Some(pause) = self.pause.as_ref().filter(|pause| !pause.settled) else {
            return;
        };
        if pause.runs_started() && self.has_started_sequences() {
            return;
        }
        if pause.clear_cache {
            self.forget_prefixes();
        }
        if let Some(pause) = &mut self.pause {
            pause.settled = true;
        }
        events.push(Event::Paused);
    }

    /// Nothing computed so far will be found by later sequences. With `reset_running`, running ones are preempted, so
    /// that they are computed again; the others keep their blocks to themselves.
    pub(super) fn reset_prefix_cache(&mut self, reset_running: bool, events: &mut Vec<Event>) {
        if reset_running {
            while let Some((urgency, id)) = self.running.pop_last() {
                self.requeue(urgency, id);
                self.num_preemptions += 1;
                events.push(Event::Preempted { sequence: id });
            }
        }
        self.forget_prefixes();
        events.push(Event::PrefixCacheReset);
    }

    fn forget_prefixes(&mut self) {
        self.kv.forget();
        for sequence in self.sequences.values_mut() {
            sequence.kv.withhold();
        }
    }

    /// Whether a step could be planned: a pause leaves sequences that must not run.
    pub(super) fn has_work(&self) -> bool {
        match &self.pause {
            None => !self.sequences.is_empty(),
            Some(pause) => pause.runs_started() && self.has_started_sequences(),
        }
    }

    fn has_started_sequences(&self) -> bool {
        self.sequences.values().any(|sequence| sequence.started)
    }
}
