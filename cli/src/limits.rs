//! What flags may be. Refused here by the flag's name, before a model is opened; the parts below check again.

use std::ops::RangeInclusive;

use phalanx_coordinator::config::MaxModelLen;
use phalanx_proto::limits::MAX_LOGPROBS;
use phalanx_shm::MAX_WORLD_SIZE;

use crate::args::{EngineArgs, ModelArgs};

/// Every backend lays out KV blocks in groups of so many positions.
const BLOCK_SIZE_UNIT: u64 = 8;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LimitError {
    #[error("{flag} is {value}, allowed are {min} to {max}")]
    OutOfRange {
        flag: &'static str,
        value: u64,
        min: u64,
        max: u64,
    },
    #[error("--block-size is {0}, must be a multiple of {BLOCK_SIZE_UNIT}")]
    BlockSize(u64),
    #[error(
        "--max-num-batched-tokens is {tokens}, must be at least --max-num-seqs, which is {seqs}: every sequence may need \
         a token in one step"
    )]
    TokensBelowSequences { tokens: usize, seqs: usize },
}

pub(crate) fn model(args: &ModelArgs) -> Result<(), LimitError> {
    let block_size = args.block_size as u64;
    within(
        "--tensor-parallel-size",
        args.tensor_parallel_size as u64,
        1..=MAX_WORLD_SIZE.into(),
    )?;
    within("--block-size", block_size, BLOCK_SIZE_UNIT..=1024)?;
    if !block_size.is_multiple_of(BLOCK_SIZE_UNIT) {
        return Err(LimitError::BlockSize(block_size));
    }
    within("--max-num-seqs", args.max_num_seqs as u64, 1..=1 << 16)?;
    within(
        "--max-num-batched-tokens",
        args.max_num_batched_tokens as u64,
        1..=1 << 20,
    )?;
    within(
        "--max-logprobs",
        args.max_logprobs as u64,
        0..=MAX_LOGPROBS.into(),
    )?;
    // One token of prompt and one of completion; positions fit an i32 on every device.
    let length = match args.max_model_len {
        Some(MaxModelLen::Tokens(tokens)) => Some(tokens),
        Some(MaxModelLen::Model | MaxModelLen::Auto) | None => None,
    };
    given("--max-model-len", length, 2..=1 << 30)?;
    given("--threads-per-rank", args.threads_per_rank, 1..=256)?;
    given(
        "--num-gpu-blocks-override",
        args.num_gpu_blocks_override,
        1..=u32::MAX.into(),
    )?;
    let (tokens, seqs) = (args.max_num_batched_tokens, args.max_num_seqs);
    if tokens < seqs {
        return Err(LimitError::TokensBelowSequences { tokens, seqs });
    }
    Ok(())
}

pub(crate) fn engine(args: &EngineArgs) -> Result<(), LimitError> {
    const DAY: u64 = 86_400;
    within(
        "--execute-model-timeout-seconds",
        args.execute_model_timeout_seconds,
        1..=3600,
    )?;
    within(
        "--engine-ready-timeout-seconds",
        args.engine_ready_timeout_seconds,
        1..=DAY,
    )?;
    within("--shutdown-timeout", args.shutdown_timeout, 0..=DAY)?;
    within(
        "--max-num-queued-reqs",
        args.max_num_queued_reqs as u64,
        1..=1 << 20,
    )?;
    within(
        "--max-num-queued-tokens",
        args.max_num_queued_tokens as u64,
        1..=1 << 40,
    )?;
    let threshold = args.long_prefill_token_threshold as u64;
    within("--long-prefill-token-threshold", threshold, 0..=u32::MAX.into())
}

fn given(flag: &'static str, value: Option<usize>, allowed: RangeInclusive<u64>) -> Result<(), LimitError> {
    value.map_or(Ok(()), |value| within(flag, value as u64, allowed))
}

fn within(flag: &'static str, value: u64, allowed: RangeInclusive<u64>) -> Result<(), LimitError> {
    if allowed.contains(&value) {
        return Ok(());
    }
    let (min, max) = allowed.into_inner();
    Err(LimitError::OutOfRange {
        flag,
        value,
        min,
        max,
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn refused(flags: &[&str]) -> Option<String> {
        let arguments = ["phalanx", "serve", "m.gguf"].iter().chain(flags);
        let Command::Serve(args) = Cli::parse_from(arguments).command else {
            panic!("serve was asked for");
        };
        let checked = model(&args.model).and_then(|()| engine(&args.engine));
        checked.err().map(|error| error.to_string())
    }

    #[test]
    fn the_defaults_are_allowed() {
        assert_eq!(refused(&[]), None);
        assert_eq!(
            refused(&["--max-num-seqs", "600", "--max-num-batched-tokens", "600"]),
            None
        );
    }

    #[test]
    fn the_flag_and_its_limit_are_named() {
        for (flags, message) in [
            (
                &["--max-num-seqs", "600"][..],
                "--max-num-batched-tokens is 512, must be at least --max-num-seqs, which is 600",
            ),
            (
                &["--max-num-seqs", "0"],
                "--max-num-seqs is 0, allowed are 1 to 65536",
            ),
            (
                &["--max-model-len", "1"],
                "--max-model-len is 1, allowed are 2 to 1073741824",
            ),
            (
                &["--block-size", "2048"],
                "--block-size is 2048, allowed are 8 to 1024",
            ),
            (
                &["--max-logprobs", "1025"],
                "--max-logprobs is 1025, allowed are 0 to 1024",
            ),
            (
                &["--block-size", "12"],
                "--block-size is 12, must be a multiple of 8",
            ),
            (
                &["--threads-per-rank", "0"],
                "--threads-per-rank is 0, allowed are 1 to 256",
            ),
            (&["--tensor-parallel-size", "0"], "--tensor-parallel-size is 0"),
            (
                &["--execute-model-timeout-seconds", "0"],
                "--execute-model-timeout-seconds is 0, allowed are 1 to 3600",
            ),
            (
                &["--execute-model-timeout-seconds", "99999999999"],
                "allowed are 1 to 3600",
            ),
            (
                &["--shutdown-timeout", "18446744073709551615"],
                "--shutdown-timeout is 18446744073709551615",
            ),
            (&["--max-num-queued-reqs", "0"], "--max-num-queued-reqs is 0"),
            (&["--max-num-queued-tokens", "0"], "--max-num-queued-tokens is 0"),
        ] {
            let refusal = refused(flags).unwrap_or_else(|| panic!("{flags:?} is allowed"));
            assert!(refusal.contains(message), "{refusal}");
        }
    }
}
