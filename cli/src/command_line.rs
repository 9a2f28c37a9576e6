//! The arguments as they were typed, in clap's terms.

use std::ffi::OsString;

use clap::{Command, CommandFactory};

use crate::{args::Cli, config_file, dotted, vllm, vllm::Notice};

/// What clap parses, and what it must not see.
pub(crate) struct CommandLine {
    pub(crate) command: Command,
    pub(crate) arguments: Vec<OsString>,
    /// Flags and keys of the file that were accepted and do nothing.
    pub(crate) notices: Vec<Notice>,
}

impl CommandLine {
    /// # Errors
    /// A flag of vLLM that is refused; a configuration file that cannot be read or holds what is no flag.
    pub(crate) fn read(arguments: Vec<OsString>) -> anyhow::Result<Self> {
        let command = Cli::command();
        let arguments = arguments.into_iter().map(spell).collect();
        let arguments = dotted::join(arguments, |name| vllm::offers_anywhere(&command, name))?;
        let (arguments, mut notices) = vllm::strip(&command, arguments)?;
        let command = config_file::apply(command, &arguments, &mut notices)?;
        let command = vllm::make_negatable(command);
        let arguments = arguments.into_iter();
        Ok(Self {
            arguments: arguments
                .map(|argument| vllm::negate(&command, argument))
                .collect(),
            command,
            notices,
        })
    }
}

/// vLLM's `-tp N`, and its underscores in the names of flags, in clap's terms, which knows neither.
fn spell(argument: OsString) -> OsString {
    let Some(text) = argument.to_str() else {
        return argument;
    };
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (text, None),
    };
    let name = match name {
        "-tp" => "--tensor-parallel-size".to_owned(),
        name if name.starts_with("--") && name.contains('_') => {
            // The keys of a JSON flag keep theirs.
            let flag = name.find('.').unwrap_or(name.len());
            name[..flag].replace('_', "-") + &name[flag..]
        }
        _ => return argument,
    };
    match value {
        Some(value) => format!("{name}={value}").into(),
        None => name.into(),
    }
}
