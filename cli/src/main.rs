//! The one binary. Everything it does is in the crates below; here are flags, signals and processes.
#![forbid(unsafe_code)]

mod args;
mod bench;
mod chat_args;
mod command_line;
mod config_file;
mod dotted;
mod gateway;
mod keys;
mod kv_events;
mod limits;
mod logging;
mod open_files;
mod output_args;
mod plan;
mod progress;
mod resolve;
mod responses_args;
mod runtime_dir;
mod serve;
mod signals;
mod speculative;
mod values;
mod vllm;
mod warm_kernels;
mod worker;

use std::{ffi::OsString, process::ExitCode};

use clap::FromArgMatches;

use crate::{
    args::{Cli, Command},
    command_line::CommandLine,
};

fn main() -> ExitCode {
    match run(std::env::args_os().collect()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The last line is the reason, whatever was logged before.
            #[expect(clippy::print_stderr, reason = "logging may not be set up yet")]
            {
                eprintln!("phalanx: {}", sentence(&error));
            }
            ExitCode::FAILURE
        }
    }
}

/// An error and its causes, each once: some have their cause in their own words.
fn sentence(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn run(arguments: Vec<OsString>) -> anyhow::Result<()> {
    let line = CommandLine::read(arguments)?;
    let matches = line.command.get_matches_from(&line.arguments);
    args::refuse_two_models(&matches)?;
    let cli = Cli::from_arg_matches(&matches)?;
    logging::init(&cli.logging)?;
    vllm::warn(&line.notices);
    open_files::raise_limit();
    match cli.command {
        Command::Serve(args) => serve::serve(*args, &cli.logging),
        Command::Coordinator(args) => serve::coordinator(*args, &cli.logging),
        Command::Worker(args) => worker::run(args),
        Command::Gateway(args) => gateway::run(*args, &cli.logging),
        Command::Plan(args) => plan::run(&args),
        Command::Bench(args) => bench::run(args),
        Command::WarmKernels(args) => warm_kernels::run(args),
    }
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::sentence;

    #[test]
    fn a_cause_that_was_named_is_not_named_again() {
        let named = anyhow!("the disk is full").context("weights: the disk is full");
        assert_eq!(sentence(&named), "weights: the disk is full");
        let added = Err::<(), _>(anyhow!("the disk is full"))
            .context("weights")
            .unwrap_err();
        assert_eq!(sentence(&added), "weights: the disk is full");
    }
}
