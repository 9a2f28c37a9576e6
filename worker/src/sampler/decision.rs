//! The decision: which token, given every rank's candidates.

use phalanx_kernels::{Candidate, ChunkStatistics, gumbel};
use phalanx_proto::step::{SampledToken, SequenceId};

use super::row::{Filter, Row, Strategy};

/// The candidates of all ranks for one row. Order of both lists: larger value first, then smaller id.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Merged {
    pub(super) best: Vec<Candidate>,
    pub(super) raw_best: Vec<Candidate>,
    pub(super) perturbed: Option<(f32, Candidate)>,
    /// Of the scaled logits, and of the raw ones, when statistics were asked for.
    pub(super) scaled_log_sum_exp: Option<f64>,
    pub(super) raw_log_sum_exp: Option<f64>,
    /// False if any rank met a NaN or an infinity.
    pub(super) finite: bool,
}

/// What came of one row.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Choice {
    Token {
        id: u32,
        logprob: Option<f32>,
        top_logprobs: Vec<(u32, f32)>,
    },
    /// Nothing can be drawn: the logits are not finite, or every token is banned.
    NotFinite,
}

impl Choice {
    pub(super) fn into_token(self, sequence: SequenceId) -> SampledToken {
        match self {
            Self::Token {
                id,
                logprob,
                top_logprobs,
            } => SampledToken {
                sequence,
                token: id,
                finite: true,
                logprob,
                top_logprobs,
            },
            Self::NotFinite => SampledToken {
                sequence,
                token: 0,
                finite: false,
                logprob: None,
                top_logprobs: Vec::new(),
            },
        }
    }
}

impl Row {
    /// None: more candidates are needed. With as many as the vocabulary has there is always a choice.
    pub(super) fn decide(&self, merged: &Merged) -> Option<Choice> {
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
    fn kept(&self, filter: &Filter, merged: &Merged) -> Option<usize> {
        let best = &merged.best;
        // Nothing beyond these can pass: they are the top k, or the whole vocabulary.
        let complete = filter.top_k.is_some() || best.len() == self.vocab_size;
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
        let total = match merged.scaled_log_sum_exp {
            Some(log_sum_exp) => (log_sum_exp - f64::from(max)).exp(),
            None => best[..kept].iter().map(weight).sum(),
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
        let perturbed = |candidate: &Candidate| candidate.scaled + gumbel(self.noise, candidate.id);
        kept.iter()
            .map(|candidate| (perturbed(candidate), candidate))
            .max_by(|(a, x), (b, y)| a.total_cmp(b).then(y.id.cmp(&x.id)))
            .map(|(_, candidate)| *candidate)
    }

    fn report(&self, chosen: Candidate, merged: &Merged) -> Choice {
        let (logprob, top_logprobs) = match (self.logprobs, merged.raw_log_sum_exp) {
            (Some(_), Some(log_sum_exp)) => {
                let logprob = |candidate: &Candidate| (f64::from(candidate.raw) - log_sum_exp) as f32;
                let best = merged.raw_best.iter();
                (
                    Some(logprob(&chosen)),
                    best.map(|candidate| (candidate.id, logprob(candidate))).collect(),
                )
            }
            _ => (None, Vec::new()),
        };
        Choice::Token {
            id: chosen.id,
            logprob,
            top_logprobs,
        }
    }
}

/// `ln(sum(exp(x)))` from the statistics of every chunk of the vocabulary. Chunks are added by rising id, so the result
/// does not depend on which rank holds which.
pub(super) fn log_sum_exp<'a>(chunks: impl Iterator<Item = &'a ChunkStatistics> + Clone) -> f64 {
    let max = chunks.clone().map(|chunk| chunk.max).fold(f32::NEG_INFINITY, f32::max);
    if max == f32::NEG_INFINITY {
        return f64::NEG_INFINITY;
    }
    let terms = chunks
        .filter(|chunk| chunk.max > f32::NEG_INFINITY)
        .map(|chunk| f64::from(chunk.sum) * f64::from(chunk.max - max).exp());
    f64::from(max) + terms.sum::<f64>().ln()
}
