//! Lists of token ids that come with a request.

use phalanx_proto::RpcError;

/// Errors: more than `most` ids, or one outside the vocabulary, of the field `param`.
pub(super) fn check(param: &'static str, ids: &[u32], most: usize, vocab_size: u32) -> Result<(), RpcError> {
    let count = ids.len();
    let message = if count > most {
        format!("{param} has {count} ids, at most {most} are allowed.")
    } else if let Some(id) = ids.iter().find(|&&id| id >= vocab_size) {
        format!("{param} holds {id}, but token ids are below {vocab_size}.")
    } else {
        return Ok(());
    };
    Err(RpcError::invalid(param, message))
}
