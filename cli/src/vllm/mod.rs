//! Flags of `vllm serve` that mean nothing here: accepted with a warning where ignoring them cannot change a reply,
//! refused with a reason where it would. A manifest written for vLLM then starts, or says why it cannot.

mod booleans;
mod table;

use std::ffi::{OsStr, OsString};

use clap::{Arg, Command};

pub(crate) use booleans::{make_negatable, negate};

use self::table::entries;

/// The subcommands that take vLLM's flags.
const SUBCOMMANDS: [&str; 4] = ["serve", "coordinator", "gateway", "plan"];

/// Flags with the same fate for the same reason.
struct Group {
    treatment: Treatment,
    reason: &'static str,
    flags: &'static [Flag],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Treatment {
    /// Accepted with a warning.
    Ignored,
    Refused,
}

impl Group {
    const fn ignored(reason: &'static str, flags: &'static [Flag]) -> Self {
        Self {
            treatment: Treatment::Ignored,
            reason,
            flags,
        }
    }

    const fn refused(reason: &'static str, flags: &'static [Flag]) -> Self {
        Self {
            treatment: Treatment::Refused,
            reason,
            flags,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Flag {
    /// With the two dashes.
    name: &'static str,
    /// With one dash.
    short: Option<&'static str>,
    takes: Takes,
    /// Values that ask for what happens anyway: neither refused nor warned of.
    no_ops: &'static [&'static str],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Takes {
    /// `--flag` or `--no-flag`.
    Nothing,
    One,
    Many,
}

impl Flag {
    const fn short(mut self, short: &'static str) -> Self {
        self.short = Some(short);
        self
    }
}

const fn flag(name: &'static str, takes: Takes, no_ops: &'static [&'static str]) -> Flag {
    Flag {
        name,
        short: None,
        takes,
        no_ops,
    }
}

const fn switch(name: &'static str) -> Flag {
    flag(name, Takes::Nothing, &[])
}

const fn value(name: &'static str, no_ops: &'static [&'static str]) -> Flag {
    flag(name, Takes::One, no_ops)
}

const fn many(name: &'static str) -> Flag {
    flag(name, Takes::Many, &[])
}

/// A flag that was accepted and does nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Notice {
    pub(crate) flag: &'static str,
    pub(crate) reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FlagError {
    #[error("{flag} is not offered: {reason}")]
    Refused {
        flag: &'static str,
        reason: &'static str,
    },
    #[error("{flag} needs a value")]
    NoValue { flag: &'static str },
    #[error("{flag} takes no value, got {value:?}")]
    ExtraValue { flag: &'static str, value: String },
}

/// What one use of a flag asks for.
enum Asked<'a> {
    /// `--flag`, without a value.
    On,
    /// `--no-flag`.
    Off,
    Values(&'a [String]),
}

impl Group {
    /// None where nothing is asked that does not happen anyway.
    fn judge(&self, flag: &Flag, asked: &Asked<'_>) -> Result<Option<Notice>, FlagError> {
        let no_op = match asked {
            Asked::On => false,
            Asked::Off => self.treatment == Treatment::Refused,
            Asked::Values(values) => values
                .iter()
                .all(|value| value.is_empty() || flag.no_ops.contains(&value.as_str())),
        };
        let (flag, reason) = (flag.name, self.reason);
        match self.treatment {
            _ if no_op => Ok(None),
            Treatment::Ignored => Ok(Some(Notice { flag, reason })),
            Treatment::Refused => Err(FlagError::Refused { flag, reason }),
        }
    }
}

/// Takes the flags that mean nothing off a command line, and tells of each once.
///
/// # Errors
/// A flag that is refused, or one of the table without its value.
pub(crate) fn strip(
    command: &Command,
    arguments: Vec<OsString>,
) -> Result<(Vec<OsString>, Vec<Notice>), FlagError> {
    let Some(sub) = subcommand(command, &arguments) else {
        return Ok((arguments, Vec::new()));
    };
    let (mut kept, mut notices) = (Vec::new(), Vec::new());
    let mut rest = arguments.as_slice();
    while let Some((argument, tail)) = rest.split_first() {
        rest = tail;
        if argument == "--" {
            kept.push(argument.clone());
            break;
        }
        let Some((group, flag, written)) = find(command, sub, argument) else {
            kept.push(argument.clone());
            continue;
        };
        let values = values_of(flag, &written, &mut rest)?;
        let asked = match (flag.takes, written.negated) {
            (_, true) => Asked::Off,
            (Takes::Nothing, false) => Asked::On,
            _ => Asked::Values(&values),
        };
        note(&mut notices, group.judge(flag, &asked)?);
    }
    kept.extend_from_slice(rest);
    Ok((kept, notices))
}

/// The values of a flag as written: the one after its `=`, or the arguments that follow it.
fn values_of(flag: &Flag, written: &Written, rest: &mut &[OsString]) -> Result<Vec<String>, FlagError> {
    let name = flag.name;
    if written.negated || flag.takes == Takes::Nothing {
        return match &written.value {
            Some(value) => Err(FlagError::ExtraValue {
                flag: name,
                value: value.clone(),
            }),
            None => Ok(Vec::new()),
        };
    }
    if let Some(value) = &written.value {
        return Ok(vec![value.clone()]);
    }
    let most = if flag.takes == Takes::Many { rest.len() } else { 1 };
    let count = rest.iter().take(most).take_while(|next| !is_flag(next)).count();
    if count == 0 {
        return Err(FlagError::NoValue { flag: name });
    }
    let (values, tail) = rest.split_at(count);
    *rest = tail;
    Ok(values
        .iter()
        .map(|value| value.to_string_lossy().into_owned())
        .collect())
}

/// The same for a key of a configuration file; none if the table does not know it. `values` are those of a list.
pub(crate) fn judge_key(key: &str, values: &[String]) -> Option<Result<Option<Notice>, FlagError>> {
    let name = format!("--{}", key.trim_start_matches("--").replace('_', "-"));
    let (group, flag, negated) = entries().find_map(|(group, flag)| {
        let negated = name
            .strip_prefix("--no-")
            .is_some_and(|rest| flag.name[2..] == *rest);
        (flag.name == name || negated).then_some((group, flag, negated))
    })?;
    let asked = match values {
        [value] if flag.takes == Takes::Nothing => {
            if (value == "true") == negated {
                Asked::Off
            } else {
                Asked::On
            }
        }
        values => Asked::Values(values),
    };
    Some(group.judge(flag, &asked))
}

pub(crate) fn note(notices: &mut Vec<Notice>, notice: Option<Notice>) {
    notices.extend(notice.filter(|notice| !notices.contains(notice)));
}

/// Says once, after logging has begun, what was ignored.
pub(crate) fn warn(notices: &[Notice]) {
    for Notice { flag, reason } in notices {
        tracing::warn!(flag, "accepted and ignored: {reason}");
    }
}

/// The chosen subcommand, if it takes vLLM's flags.
fn subcommand<'a>(command: &'a Command, arguments: &[OsString]) -> Option<&'a Command> {
    let names: Vec<&str> = command.get_subcommands().map(Command::get_name).collect();
    let chosen = arguments
        .iter()
        .skip(1)
        .filter_map(|argument| argument.to_str())
        .find(|argument| names.contains(argument))?;
    SUBCOMMANDS
        .contains(&chosen)
        .then(|| command.find_subcommand(chosen))?
}

/// A flag as it stands on the command line.
struct Written {
    value: Option<String>,
    negated: bool,
}

/// The table's entry for `argument`. A flag that the subcommand has itself is not the table's business.
fn find(
    command: &Command,
    sub: &Command,
    argument: &OsStr,
) -> Option<(&'static Group, &'static Flag, Written)> {
    let text = argument.to_str().filter(|text| text.starts_with('-'))?;
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (text, None),
    };
    // `--compilation-config.mode 3` sets one key of a JSON flag.
    let name = name.split_once('.').map_or(name, |(name, _)| name);
    let positive = name.strip_prefix("--no-");
    let mut entries = entries().filter(|(_, flag)| !offers(command, flag.name) && !offers(sub, flag.name));
    entries.find_map(|(group, flag)| {
        let negated = positive.is_some_and(|rest| flag.name[2..] == *rest);
        // `-O3` is `-O 3`.
        let glued = (flag.short == Some("-O") && name.len() == 3)
            .then(|| name.strip_prefix("-O").map(str::to_owned))
            .flatten();
        let is_it = negated || flag.name == name || flag.short == Some(name) || glued.is_some();
        let value = value.clone().or(glued);
        is_it.then_some((group, flag, Written { value, negated }))
    })
}

/// Whether the program has the flag, in any of its subcommands.
pub(crate) fn offers_anywhere(command: &Command, name: &str) -> bool {
    offers(command, name) || command.get_subcommands().any(|sub| offers(sub, name))
}

/// Whether the command has the flag in `args.rs`, under this name or as an alias.
fn offers(command: &Command, name: &str) -> bool {
    let long = name.trim_start_matches('-');
    let has = |arg: &Arg| {
        arg.get_long() == Some(long) || arg.get_all_aliases().is_some_and(|names| names.contains(&long))
    };
    command.get_arguments().any(has)
}

/// A negative number is a value.
fn is_flag(argument: &OsStr) -> bool {
    let text = argument.to_string_lossy();
    let mut chars = text.chars();
    chars.next() == Some('-')
        && chars
            .next()
            .is_some_and(|next| next == '-' || next.is_alphabetic())
}

#[cfg(test)]
mod tests;
