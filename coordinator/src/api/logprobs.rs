//! Log-probabilities as replies have them.

use phalanx_proto::v1;

use crate::text::TokenTable;

/// A token with its log-probability and rank, the best tokens at its position, and where it begins in the text.
pub(super) fn of(
    table: &TokenTable,
    (token, logprob, rank): (u32, f32, u32),
    top: &[(u32, f32)],
    text_offset: u32,
) -> v1::TokenLogprobs {
    let top = (1..).zip(top);
    v1::TokenLogprobs {
        chosen: Some(entry(table, token, logprob, Some(rank))),
        top: top
            .map(|(rank, &(token, logprob))| entry(table, token, logprob, Some(rank)))
            .collect(),
        text_offset,
    }
}

/// The same beside the tokens that the request lists: the chosen one first, and each once, as with vLLM. Nobody has counted
/// the others' ranks.
pub(super) fn of_listed(
    table: &TokenTable,
    chosen: (u32, f32, u32),
    listed: &[(u32, f32)],
    text_offset: u32,
) -> v1::TokenLogprobs {
    let mut told = of(table, chosen, &[], text_offset);
    let others = listed.iter().filter(|&&(token, _)| token != chosen.0);
    told.top.extend(told.chosen.clone());
    told.top
        .extend(others.map(|&(token, logprob)| entry(table, token, logprob, None)));
    told
}

/// The first token of a prompt, which has nothing before it to be likely after.
pub(super) fn of_first(table: &TokenTable, token: u32) -> v1::TokenLogprobs {
    v1::TokenLogprobs {
        chosen: Some(entry(table, token, f32::NAN, None)),
        top: Vec::new(),
        text_offset: 0,
    }
}

fn entry(table: &TokenTable, token_id: u32, logprob: f32, rank: Option<u32>) -> v1::TokenLogprob {
    let bytes = table.bytes(token_id);
    v1::TokenLogprob {
        token_id,
        token: String::from_utf8_lossy(bytes).into_owned(),
        logprob,
        bytes: bytes.to_vec(),
        rank,
        special: table.is_special(token_id),
    }
}
