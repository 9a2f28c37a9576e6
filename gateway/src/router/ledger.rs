//! What a stream's client has got: token ids, and nothing else.

use phalanx_proto::v1::{FinishReason, GenerateChunk, ResumedChoice};

/// Tokens that are kept for one request; a request with more of them is not moved. They have to fit one message.
const MAX_TOKENS: usize = 1 << 19;

pub(super) struct Ledger {
    choices: Vec<ResumedChoice>,
    /// Tokens of the choices that have not ended.
    kept: usize,
}

impl Ledger {
    /// Of a request with `n` choices, of which there is nothing yet.
    pub(super) fn new(n: usize) -> Self {
        Self {
            choices: vec![ResumedChoice::default(); n],
            kept: 0,
        }
    }

    /// Notes what the chunk brings; true if that is progress. A choice that was not asked for is the caller's to refuse.
    pub(super) fn record(&mut self, chunk: &GenerateChunk) -> bool {
        let Some(piece) = &chunk.choice else { return false };
        let Some(choice) = self.choices.get_mut(piece.index as usize) else {
            return false;
        };
        self.kept += piece.token_ids.len();
        choice.token_ids.extend_from_slice(&piece.token_ids);
        if piece.finish_reason() != FinishReason::Unspecified {
            let ids = std::mem::take(&mut choice.token_ids);
            self.kept -= ids.len();
            choice.ended_after = u32::try_from(ids.len()).ok();
        }
        // What is too much to be moved need not be kept.
        if self.kept > MAX_TOKENS {
            self.choices.clear();
            self.kept = 0;
        }
        true
    }

    /// Every choice has ended.
    pub(super) fn is_complete(&self) -> bool {
        !self.choices.is_empty() && self.choices.iter().all(|choice| choice.ended_after.is_some())
    }

    /// What another replica has to know to go on; none if there is too much of it.
    pub(super) fn resume(&self) -> Option<Vec<ResumedChoice>> {
        (!self.choices.is_empty()).then(|| self.choices.clone())
    }
}

#[cfg(test)]
mod tests {
    use phalanx_proto::v1::Choice;

    use super::*;

    fn chunk(index: u32, token_ids: &[u32], reason: FinishReason) -> GenerateChunk {
        GenerateChunk {
            choice: Some(Choice {
                index,
                token_ids: token_ids.to_vec(),
                finish_reason: reason.into(),
                ..Choice::default()
            }),
            ..GenerateChunk::default()
        }
    }

    #[test]
    fn tokens_of_open_choices_are_kept_and_those_of_ended_ones_counted() {
        let mut ledger = Ledger::new(2);
        assert!(ledger.record(&chunk(0, &[5, 6], FinishReason::Unspecified)));
        assert!(ledger.record(&chunk(1, &[7], FinishReason::Unspecified)));
        assert!(ledger.record(&chunk(1, &[8, 9], FinishReason::Stop)));
        assert!(!ledger.record(&chunk(2, &[1], FinishReason::Unspecified)));
        assert!(!ledger.record(&GenerateChunk::default()));
        let open = ResumedChoice {
            token_ids: vec![5, 6],
            ended_after: None,
        };
        let ended = ResumedChoice {
            token_ids: vec![],
            ended_after: Some(3),
        };
        assert_eq!(ledger.resume(), Some(vec![open, ended]));
        assert!(!ledger.is_complete());
        ledger.record(&chunk(0, &[], FinishReason::Length));
        assert!(ledger.is_complete());
    }

    #[test]
    fn too_much_is_not_kept() {
        let mut ledger = Ledger::new(1);
        ledger.record(&chunk(0, &vec![1; MAX_TOKENS + 1], FinishReason::Unspecified));
        assert_eq!(ledger.resume(), None);
        assert!(!ledger.is_complete());
        assert!(ledger.choices.is_empty());
    }
}
