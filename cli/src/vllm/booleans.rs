//! Every flag that is a yes or a no can be written `--flag`, `--no-flag` or `--flag=false`, as with vLLM. The last one
//! counts, so that a manifest can take back what an environment variable or a file has set.

use std::ffi::OsString;

use clap::{Arg, ArgAction, Command};

/// Lets every on/off flag, those of all subcommands and those of each, take an optional value.
pub(crate) fn make_negatable(command: Command) -> Command {
    let names: Vec<String> = command
        .get_subcommands()
        .map(|sub| sub.get_name().to_owned())
        .collect();
    names
        .into_iter()
        .fold(command.mut_args(optional_value), |command, name| {
            command.mut_subcommand(name, |sub| sub.mut_args(optional_value))
        })
}

fn optional_value(argument: Arg) -> Arg {
    if !matches!(argument.get_action(), ArgAction::SetTrue) {
        return argument;
    }
    let unset = argument.get_default_values().is_empty();
    let argument = argument
        .action(ArgAction::Set)
        .num_args(0..=1)
        .require_equals(true)
        .hide_possible_values(true)
        .default_missing_value("true");
    if unset {
        argument.default_value("false").hide_default_value(true)
    } else {
        argument
    }
}

/// `--no-<flag>` as `--<flag>=false`, for the flags that [`make_negatable`] has changed and their like.
pub(crate) fn negate(command: &Command, argument: OsString) -> OsString {
    let Some(rest) = argument.to_str().and_then(|text| text.strip_prefix("--no-")) else {
        return argument;
    };
    let optional = |arg: &Arg| arg.get_long() == Some(rest) && arg.is_require_equals_set();
    let known = command.get_arguments().any(optional)
        || command
            .get_subcommands()
            .any(|sub| sub.get_arguments().any(optional));
    if known {
        format!("--{rest}=false").into()
    } else {
        argument
    }
}
