//! The decision: which token, given every rank's candidates.

use std::borrow::Cow;

use phalanx_kernels::{Candidate, Candidates, ChunkStatistics};
use phalanx_proto::step::{SampledToken, SequenceId};

use super::row::{Filter, Row, Strategy};

/// What came of one row.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Choice {
    Token {
        candidate: Candidate,
        logprob: Option<f32>,
        top_logprobs: Vec<(u32, f32)>,
    },
    /// Nothing can be drawn: the logits are not finite, or every token is banned.
    NotFinite,
}

impl Choice {
    /// The raw logit of a chosen token whose log-probability is reported.
    pub(super) fn reported_logit(&self) -> Option<f32> {
        match self {
            Self::Token {
                candidate, logprob, ..
            } => logprob.map(|_| candidate.raw),
            Self::NotFinite => None,
        }
    }

    /// `rank` is left to be counted.
    pub(super) fn into_token(self, sequence: SequenceId) -> SampledToken {
        match self {
            Self::Token {
                candidate,
                logprob,
                top_logprobs,
            } => SampledToken {
                sequence,
                token: candidate.id,
                finite: true,
                logprob,
                rank: None,
                top_logprobs,
            },
            Self::NotFinite => SampledToken {
                sequence,
                token: 0,
                finite: false,
                logprob: None,
                rank: None,
                top_logprobs: Vec::new(),
            },
        }
    }
}

impl Row<'_> {
    /// The choice from all ranks' candidates. None: more of them are needed. With as many as the vocabulary has there is always a choice.
    pub(super) fn decide(&self, merged: &Candidates) -> Option<Choice> {
        if !merged.finite {
            return Some(Choice::NotFinite);
        }
        let chosen = match self.strategy {
            Strategy::Unfiltered => merged.perturbed.map(|(_, candidate)| candidate),
            Strategy::Greedy => merged.best.first().copied(),
            Strategy::Filtered(filter) => {
                let drawable = merged.best.first().is_some_and(|best| best.scaled.is_finite());
                if drawable {
                    let kept = self.kept(&filter, merged)?;
                    self.draw(&merged.best[..kept])
                } else {
                    None
                }
            }
        };
        // Bans and overflowing biases can leave nothing but infinities.
        Some(match chosen.filter(|candidate| candidate.scaled.is_finite()) {
            None => Choice::NotFinite,
            Some(candidate) => self.report(candidate, merged),
        })
    }

    /// How many of the best candidates the filters keep: at least one. None if that cannot be told from these.
    fn kept(&self, filter: &Filter, merged: &Candidates) -> Option<usize> {
        let best = &merged.best;
        // Nothing beyond these can pass: they are the top k, or all that are not banned.
        let complete = filter.top_k.is_some() || best.len() < self.top || self.top == self.vocab_size;
        let max = best[0].scaled;
        let mut kept = best.len();
        if let Some(ln_min_p) = filter.ln_min_p {
            kept = best.partition_point(|candidate| candidate.scaled >= max + ln_min_p);
            if kept == best.len() && !complete {
                return None;
            }
        }
        let Some(top_p) = filter.top_p else {
            return Some(kept);
        };
        let weight = |candidate: &Candidate| f64::from(candidate.scaled - max).exp();
        let total = if merged.scaled_statistics.is_empty() {
            best[..kept].iter().map(weight).sum()
        } else {
            (log_sum_exp(&merged.scaled_statistics) - f64::from(max)).exp()
        };
        let mut mass = 0.0;
        for (i, candidate) in best[..kept].iter().enumerate() {
            mass += weight(candidate);
            if mass >= top_p * total {
                return Some(i + 1);
            }
        }
        (complete || filter.ln_min_p.is_some()).then_some(kept)
    }

    /// The largest scaled logit + Gumbel noise; of equals the smallest id.
    fn draw(&self, kept: &[Candidate]) -> Option<Candidate> {
        let perturbed = |candidate: &Candidate| candidate.scaled + self.noise.gumbel(candidate.id);
        let all = kept.iter().map(|candidate| (perturbed(candidate), *candidate));
        let better = |(a, x): (f32, Candidate), (b, y): (f32, Candidate)| {
            if b > a || (b == a && y.id < x.id) {
                (b, y)
            } else {
                (a, x)
            }
        };
        all.reduce(better).map(|(_, candidate)| candidate)
    }

    fn report(&self, chosen: Candidate, merged: &Candidates) -> Choice {
        if self.logprobs.is_none() {
            return Choice::Token {
                candidate: chosen,
                logprob: None,
                top_logprobs: Vec::new(),
            };
        }
        let Some(others) = self.others(merged) else {
            return Choice::NotFinite;
        };
        let total = log_sum_exp(&merged.raw_statistics);
        let others = others.iter();
        Choice::Token {
            candidate: chosen,
            logprob: Some(log_softmax(&chosen, total)),
            top_logprobs: others
                .map(|other| (other.id, log_softmax(other, total)))
                .collect(),
        }
    }

    /// What is reported beside the chosen token: the best, or what the row lists. None: one of these has a logit that is
    /// beyond all bounds.
    fn others<'a>(&self, merged: &'a Candidates) -> Option<Cow<'a, [Candidate]>> {
        if self.listed.is_empty() {
            return Some(Cow::Borrowed(&merged.raw_best));
        }
        let found = self.listed.iter().map(|id| {
            let at = self.found.binary_search_by_key(id, |candidate| candidate.id);
            at.ok().map(|at| self.found[at])
        });
        found.collect()
    }
}

/// A token's log-probability among raw logits with this [`log_sum_exp`].
pub(super) fn log_softmax(candidate: &Candidate, total: f64) -> f32 {
    (f64::from(candidate.raw) - total) as f32
}

/// `ln(sum(exp(x)))` from the statistics of every chunk of the vocabulary. Chunks are added by rising id, so the result
/// does not depend on which rank holds which.
pub(super) fn log_sum_exp(chunks: &[ChunkStatistics]) -> f64 {
    let max = chunks
        .iter()
        .map(|chunk| chunk.max)
        .fold(f32::NEG_INFINITY, f32::max);
    // A chunk whose tokens are all banned has no mass, and no finite maximum to scale it by.
    let masses = chunks
        .iter()
        .filter(|chunk| chunk.max > f32::NEG_INFINITY)
        .map(|chunk| f64::from(chunk.sum) * f64::from(chunk.max - max).exp());
    f64::from(max) + masses.sum::<f64>().ln()
}
