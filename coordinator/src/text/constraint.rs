//! Tokens a request allows, and words it does not want.

use phalanx_proto::{
    RpcError,
    limits::{MAX_ALLOWED_TOKEN_IDS, MAX_BAD_WORD_BYTES, MAX_BAD_WORDS},
    step::TokenSet,
};

use super::Tokenizer;

/// The tokens that may be drawn; none: all. Errors: ids outside of the vocabulary, or more than any has.
pub(super) fn allowed_token_ids(ids: &[u32], vocab_size: u32) -> Result<Option<TokenSet>, RpcError> {
    const PARAM: &str = "allowed_token_ids";
    if ids.is_empty() {
        return Ok(None);
    }
    if ids.len() > MAX_ALLOWED_TOKEN_IDS {
        let count = ids.len();
        let message = format!("{PARAM} has {count} ids, at most {MAX_ALLOWED_TOKEN_IDS} are allowed.");
        return Err(RpcError::invalid(PARAM, message));
    }
    if let Some(id) = ids.iter().find(|&&id| id >= vocab_size) {
        let message = format!("{PARAM} holds {id}, but token ids are below {vocab_size}.");
        return Err(RpcError::invalid(PARAM, message));
    }
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
