//! Tokens a request allows, and words it does not want.

use phalanx_proto::{
    RpcError,
    limits::{MAX_ALLOWED_TOKEN_IDS, MAX_BAD_WORD_BYTES, MAX_BAD_WORDS},
    step::TokenSet,
    v1::TokenIds,
};

use super::{Tokenizer, token_ids};

/// The tokens that may be drawn; none: all. Errors: ids outside of the vocabulary, or more than any has.
pub(super) fn allowed_token_ids(ids: &[u32], vocab_size: u32) -> Result<Option<TokenSet>, RpcError> {
    const PARAM: &str = "allowed_token_ids";
    if ids.is_empty() {
        return Ok(None);
    }
    token_ids::check(PARAM, ids, MAX_ALLOWED_TOKEN_IDS, vocab_size)?;
    let mut set = TokenSet::empty(vocab_size);
    ids.iter().for_each(|&id| set.insert(id));
    Ok(Some(set))
}

/// Errors: too many words, or one that is empty or too long.
pub(super) fn check_bad_words(words: &[String]) -> Result<(), RpcError> {
    const PARAM: &str = "bad_words";
    if words.len() > MAX_BAD_WORDS {
        let message = format!(
            "{PARAM} has {} words, at most {MAX_BAD_WORDS} are allowed.",
            words.len()
        );
        return Err(RpcError::invalid(PARAM, message));
    }
    let fits = |word: &String| !word.trim_start().is_empty() && word.len() <= MAX_BAD_WORD_BYTES;
    if let Some(word) = words.iter().find(|word| !fits(word)) {
        let message = format!(
            "a word of {PARAM} has {} bytes, allowed are 1 to {MAX_BAD_WORD_BYTES}, not all of them spaces.",
            word.len()
        );
        return Err(RpcError::invalid(PARAM, message));
    }
    Ok(())
}

/// The tokens of each word, at the beginning of a text and, where that is spelled differently, behind a space: vLLM's
/// rule. Words must have been checked.
pub(super) fn tokenize_bad_words(words: &[String], tokenizer: &Tokenizer) -> Result<Vec<Vec<u32>>, RpcError> {
    let encode = |text: &str| {
        let tokens = tokenizer.encode(text, false);
        tokens.map_err(|error| RpcError::invalid("bad_words", error.to_string()))
    };
    let mut all = Vec::new();
    for word in words {
        let word = word.trim_start();
        let plain = encode(word)?;
        let spaced = encode(&format!(" {word}"))?;
        let differs = spaced.first() != plain.first() && spaced.len() == plain.len();
        all.extend([Some(plain), differs.then_some(spaced)].into_iter().flatten());
    }
    all.retain(|tokens| !tokens.is_empty());
    Ok(all)
}

/// Words that were given as tokens. Errors: too many, one that is empty or too long, or ids outside of the vocabulary.
pub(super) fn bad_words_token_ids(words: Vec<TokenIds>, vocab_size: u32) -> Result<Vec<Vec<u32>>, RpcError> {
    const PARAM: &str = "bad_words_token_ids";
    let refused = |message: String| Err(RpcError::invalid(PARAM, message));
    if words.len() > MAX_BAD_WORDS {
        let count = words.len();
        return refused(format!(
            "{PARAM} has {count} words, at most {MAX_BAD_WORDS} are allowed."
        ));
    }
    for TokenIds { ids } in &words {
        if !(1..=MAX_BAD_WORD_BYTES).contains(&ids.len()) {
            let count = ids.len();
            return refused(format!(
                "a word of {PARAM} has {count} ids, allowed are 1 to {MAX_BAD_WORD_BYTES}."
            ));
        }
        if let Some(id) = ids.iter().find(|&&id| id >= vocab_size) {
            return refused(format!(
                "{PARAM} holds {id}, but token ids are below {vocab_size}."
            ));
        }
    }
    Ok(words.into_iter().map(|word| word.ids).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_tokens_are_checked() {
        let word = |ids: &[u32]| TokenIds { ids: ids.to_vec() };
        assert_eq!(
            bad_words_token_ids(vec![word(&[1, 2]), word(&[9])], 10).expect("fits"),
            [vec![1, 2], vec![9]]
        );
        for (words, says) in [
            (vec![word(&[])], "has 0 ids"),
            (vec![word(&[10])], "holds 10"),
            (vec![word(&[1; MAX_BAD_WORD_BYTES + 1])], "allowed are 1 to"),
            (vec![word(&[1]); MAX_BAD_WORDS + 1], "at most"),
        ] {
            let error = bad_words_token_ids(words, 10).expect_err("refused");
            assert_eq!(error.param.as_deref(), Some("bad_words_token_ids"));
            assert!(error.message.contains(says), "{}", error.message);
        }
    }
}
