mod args; mod config_file; mod logging;
use clap::{CommandFactory, FromArgMatches};
fn main() -> anyhow::Result<()> {
    let arguments: Vec<_> = std::env::args_os().map(config_file::normalize).collect();
    let command = config_file::apply(args::Cli::command(), &arguments)?;
    let cli = args::Cli::from_arg_matches(&command.get_matches_from(&arguments))?;
    logging::init(&cli.logging)?;
    Ok(())
}
