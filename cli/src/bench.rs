//! `phalanx bench`: measures a server, ours or another's.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};
use indicatif::ProgressBar;
use phalanx_bench::{Api, Arrivals, Endpoint, Report, Workload};
use serde::Serialize;

use self::{
    control_plane::BenchControlPlaneArgs,
    floors::{BenchFloorsArgs, ModelFloors},
};

mod control_plane;
mod floors;

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// Load a running server with streamed completions and print latencies and throughput.
    Serve(Box<BenchServeArgs>),
    /// Measure this machine's memory and arithmetic, and print how many tokens per second a model cannot surpass on it.
    Floors(BenchFloorsArgs),
    /// Load a coordinator and a gateway whose ranks are simulated, and print what a token costs outside of the ranks.
    ControlPlane(BenchControlPlaneArgs),
}

/// Names are those of `vllm bench serve`.
#[derive(Debug, Args)]
struct BenchServeArgs {
    /// Where the server is: http://host:port, and a path before /v1 if it has one.
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    base_url: String,
    /// The model as the server calls it.
    #[arg(long, default_value = "default")]
    model: String,
    /// Sent as a bearer token.
    #[arg(long, env = "OPENAI_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// The route: token ids of exact length to completions, or words to chat.
    #[arg(long, value_enum, default_value = "completions")]
    endpoint: ApiArg,
    /// Requests in all.
    #[arg(long, default_value_t = 32)]
    num_prompts: usize,
    /// Requests in flight at most.
    #[arg(long, default_value_t = 1)]
    max_concurrency: usize,
    /// Requests per second, as a Poisson process; inf: as soon as --max-concurrency allows.
    #[arg(long, default_value_t = f64::INFINITY)]
    request_rate: f64,
    /// Tokens per prompt.
    #[arg(long, default_value_t = 128)]
    random_input_len: usize,
    /// Of those, tokens at the start that all prompts share.
    #[arg(long, default_value_t = 0)]
    random_prefix_len: usize,
    /// Tokens per answer.
    #[arg(long, default_value_t = 128)]
    random_output_len: usize,
    /// Token ids are drawn from FIRST..END.
    #[arg(long, default_value = "1000..32000", value_parser = token_ids, value_name = "FIRST..END")]
    random_token_ids: std::ops::Range<u32>,
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Let answers end where the model ends them.
    #[arg(long)]
    respect_eos: bool,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Seconds after which a request is given up.
    #[arg(long, default_value_t = 600)]
    timeout: u64,
    /// Also write the figures to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    result_filename: Option<PathBuf>,
    /// The file or directory of the model that the server serves, on this machine: its floors are printed, too.
    #[arg(long, value_name = "MODEL")]
    floors_of: Option<PathBuf>,
    /// Print JSON and nothing else.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ApiArg {
    Completions,
    Chat,
}

fn token_ids(text: &str) -> Result<std::ops::Range<u32>, String> {
    let parse = |number: &str| number.trim().parse::<u32>().map_err(|error| error.to_string());
    let (first, end) = text.split_once("..").ok_or("as in 1000..32000")?;
    Ok(parse(first)?..parse(end)?)
}

impl BenchServeArgs {
    fn workload(&self) -> Workload {
        Workload {
            api: match self.endpoint {
                ApiArg::Completions => Api::Completions,
                ApiArg::Chat => Api::Chat,
            },
            model: self.model.clone(),
            num_prompts: self.num_prompts,
            max_concurrency: self.max_concurrency,
            arrivals: if self.request_rate == f64::INFINITY {
                Arrivals::Closed
            } else {
                Arrivals::Poisson(self.request_rate)
            },
            input_len: self.random_input_len,
            prefix_len: self.random_prefix_len,
            output_len: self.random_output_len,
            token_ids: self.random_token_ids.clone(),
            temperature: self.temperature,
            ignore_eos: !self.respect_eos,
            seed: self.seed,
        }
    }
}

/// What a result file holds.
#[derive(Serialize)]
struct ResultFile<'a> {
    #[serde(flatten)]
    report: &'a Report,
    #[serde(skip_serializing_if = "Option::is_none")]
    floors: Option<&'a ModelFloors>,
}

pub(crate) fn run(args: BenchArgs) -> anyhow::Result<()> {
    match args.command {
        BenchCommand::Serve(args) => serve(&args),
        BenchCommand::Floors(args) => floors::run(&args),
        BenchCommand::ControlPlane(args) => control_plane::run(&args),
    }
}

fn serve(args: &BenchServeArgs) -> anyhow::Result<()> {
    let endpoint = Endpoint::new(&args.base_url, args.api_key.as_deref())?;
    let workload = args.workload();
    workload.check()?;
    // Before the server is busy: both would disturb each other.
    let floors = args
        .floors_of
        .as_deref()
        .map(|model| ModelFloors::measure(model, None));
    let floors = floors.transpose()?;
    let bar = if args.json {
        ProgressBar::hidden()
    } else {
        ProgressBar::new(args.num_prompts as u64)
    };
    // The client takes as little as it can from a server on the same machine.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut progress = |ended: usize| bar.set_position(ended as u64);
    let timeout = Duration::from_secs(args.timeout);
    let begun = Instant::now();
    let run = runtime.block_on(phalanx_bench::run(&endpoint, &workload, timeout, &mut progress));
    bar.finish_and_clear();
    let report = Report::of(&run);
    let json = serde_json::to_string_pretty(&ResultFile {
        report: &report,
        floors: floors.as_ref(),
    })?;
    if let Some(path) = &args.result_filename {
        fs::write(path, &json).with_context(|| format!("--result-filename {}", path.display()))?;
    }
    #[expect(clippy::print_stdout, reason = "the result is what was asked for")]
    if args.json {
        println!("{json}");
    } else {
        print!("{report}");
        if let Some(floors) = &floors {
            print!("{}", floors.beside(&report));
        }
    }
    anyhow::ensure!(
        report.completed > 0,
        "none of {} requests was answered within {:.1} s",
        args.num_prompts,
        begun.elapsed().as_secs_f64()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_token_ids_are_read() {
        assert_eq!(token_ids("5..10"), Ok(5..10));
        assert!(token_ids("5").is_err() && token_ids("a..b").is_err());
    }
}
