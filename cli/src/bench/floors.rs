//! `phalanx bench floors`: what the machine allows, to hold what was measured against.

use std::{
    fmt::{self, Write as _},
    path::{Path, PathBuf},
    thread,
};

use anyhow::Context;
use clap::Args;
use phalanx_bench::Report;
use phalanx_kernels::cpu::limits;
use phalanx_model::{Checkpoint, Floors, MachineLimits, TokenCost};
use phalanx_shm::MappedFile;
use serde::Serialize;

#[derive(Debug, Args)]
pub(super) struct BenchFloorsArgs {
    /// A .gguf file or a model directory.
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Threads that read and compute; default: all CPUs that the process may use.
    #[arg(long)]
    threads: Option<usize>,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// A model's floors on this machine.
#[derive(Debug, Serialize)]
pub(super) struct ModelFloors {
    threads: usize,
    #[serde(flatten)]
    limits: MachineLimits,
    #[serde(flatten)]
    cost: TokenCost,
    #[serde(flatten)]
    floors: Floors,
}

pub(super) fn run(args: &BenchFloorsArgs) -> anyhow::Result<()> {
    let floors = ModelFloors::measure(&args.model, args.threads)?;
    #[expect(clippy::print_stdout, reason = "the result is what was asked for")]
    if args.json {
        println!("{}", serde_json::to_string_pretty(&floors)?);
    } else {
        print!("{floors}");
    }
    Ok(())
}

impl ModelFloors {
    /// Takes about half a second, in which the machine should have nothing else to do.
    pub(super) fn measure(model: &Path, threads: Option<usize>) -> anyhow::Result<Self> {
        let checkpoint = Checkpoint::open(model, MappedFile::open)
            .with_context(|| format!("{}: cannot read the model", model.display()))?;
        let cost = TokenCost::of(&checkpoint);
        let available = thread::available_parallelism().map_or(1, usize::from);
        let threads = threads.unwrap_or(available);
        anyhow::ensure!(
            (1..=available).contains(&threads),
            "--threads is {threads}, must be between 1 and {available}"
        );
        let limits = limits::measure(threads)?;
        let limits = MachineLimits {
            read_gb_s: limits.read_gb_s,
            int8_gop_s: limits.int8_gop_s,
        };
        Ok(Self {
            threads,
            limits,
            floors: cost.floors(&limits),
            cost,
        })
    }

    /// The figures of a report that a floor limits, as parts of it.
    pub(super) fn beside(&self, report: &Report) -> String {
        let mut text = self.to_string();
        let decode = report.decode_throughput_per_stream / self.floors.decode_tokens_per_s;
        let tokens = report.total_token_throughput / self.floors.prefill_tokens_per_s;
        // Cannot fail: it is a string.
        let _ = writeln!(
            text,
            "reached             {:.0} % of the first per stream, {:.0} % of the second with all tokens in and out",
            100.0 * decode,
            100.0 * tokens
        );
        text
    }
}

impl fmt::Display for ModelFloors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            threads,
            limits,
            cost,
            floors,
        } = self;
        writeln!(
            f,
            "machine             {:.1} GB/s read, {:.0} GOP/s int8 with {threads} threads",
            limits.read_gb_s, limits.int8_gop_s
        )?;
        writeln!(
            f,
            "a token             {:.1} MB of weights, {:.3} GOP in the layers, {:.3} in the LM head",
            cost.weight_bytes as f64 / 1e6,
            cost.layer_operations as f64 / 1e9,
            cost.head_operations as f64 / 1e9
        )?;
        writeln!(
            f,
            "floors              {:.0} tokens/s decode of one stream, {:.0} tokens/s prefill",
            floors.decode_tokens_per_s, floors.prefill_tokens_per_s
        )
    }
}
