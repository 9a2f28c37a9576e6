//! `--config file.yaml`: the file's keys become the defaults of the flags they name, so that an environment variable or
//! the command line wins, as with vLLM.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use clap::{Arg, ArgAction, Command};
use serde_yaml_ng::Value;

use crate::{
    vllm,
    vllm::{FlagError, Notice},
};

/// A file larger than this is not a list of flags.
const MAX_BYTES: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigFileError {
    #[error("{path}: {message}", path = path.display())]
    File { path: PathBuf, message: String },
    #[error("{path}: `{key}` is not a flag of `phalanx {command}`", path = path.display())]
    UnknownKey {
        path: PathBuf,
        key: String,
        command: String,
    },
    #[error("{path}: {source}", path = path.display())]
    Flag { path: PathBuf, source: FlagError },
    #[error("{path}: `{key}` must be a number, a string, a boolean or a list of those", path = path.display())]
    BadValue { path: PathBuf, key: String },
}

/// Gives the flags of the chosen subcommand the defaults of the file that `--config` or `PHALANX_CONFIG` names. Keys that
/// are flags of vLLM alone are judged as on the command line.
pub(crate) fn apply(
    command: Command,
    arguments: &[OsString],
    notices: &mut Vec<Notice>,
) -> Result<Command, ConfigFileError> {
    let names: Vec<String> = command
        .get_subcommands()
        .map(|sub| sub.get_name().to_owned())
        .collect();
    let chosen = arguments.iter().skip(1).filter_map(|argument| argument.to_str());
    let Some(chosen) = chosen
        .into_iter()
        .find(|argument| names.iter().any(|name| name == argument))
    else {
        return Ok(command);
    };
    let Some(path) = config_path(arguments) else {
        return Ok(command);
    };
    let values = read(&path)?;
    let mut command = command;
    for (key, value) in values {
        // Flags of every subcommand are the main command's.
        let id = id_of(&key);
        let is_global = command
            .get_arguments()
            .any(|argument| argument.get_id() == id.as_str());
        let owner = if is_global {
            Some(&command)
        } else {
            command.find_subcommand(chosen)
        };
        let owner = owner.unwrap_or(&command);
        if let (None, Some(judged)) = (flag_of(owner, &id), vllm::judge_key(&key, &words(&value))) {
            let judged = judged.map_err(|source| ConfigFileError::Flag {
                path: path.clone(),
                source,
            })?;
            vllm::note(notices, judged);
            continue;
        }
        let named = Key {
            path: &path,
            key,
            command: chosen,
        };
        let (id, values) = default_for(owner, named, value)?;
        let set = |argument: Arg| argument.default_values(values);
        command = if is_global {
            command.mut_arg(id, set)
        } else {
            command.mut_subcommand(chosen, |sub| sub.mut_arg(id, set))
        };
    }
    Ok(command)
}

/// A key of the file, and where it stands.
struct Key<'a> {
    path: &'a Path,
    key: String,
    /// The subcommand whose flag it should be.
    command: &'a str,
}

fn id_of(key: &str) -> String {
    key.trim_start_matches("--").replace('-', "_")
}

fn config_path(arguments: &[OsString]) -> Option<PathBuf> {
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        if argument == "--config" {
            return arguments.next().map(PathBuf::from);
        }
        if let Some(path) = argument.to_str().and_then(|text| text.strip_prefix("--config=")) {
            return Some(path.into());
        }
    }
    std::env::var_os("PHALANX_CONFIG").map(PathBuf::from)
}

fn read(path: &Path) -> Result<Vec<(String, Value)>, ConfigFileError> {
    let failed = |message: String| ConfigFileError::File {
        path: path.to_owned(),
        message,
    };
    let length = fs::metadata(path)
        .map_err(|error| failed(error.to_string()))?
        .len();
    if length > MAX_BYTES {
        return Err(failed(format!("{length} bytes, limit {MAX_BYTES}")));
    }
    let text = fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
    let mapping: serde_yaml_ng::Mapping = match serde_yaml_ng::from_str(&text) {
        Ok(Value::Mapping(mapping)) => mapping,
        Ok(Value::Null) => return Ok(Vec::new()),
        Ok(_) => return Err(failed("expected a mapping of flags to values".into())),
        Err(error) => return Err(failed(error.to_string())),
    };
    let key = |key: Value| {
        key.as_str()
            .map(str::to_owned)
            .ok_or_else(|| failed("keys must be strings".into()))
    };
    mapping
        .into_iter()
        .map(|(name, value)| Ok((key(name)?, value)))
        .collect()
}

/// The flag's id and its values as clap parses them. `no-<flag>: true` is `<flag>: false`.
fn default_for(
    owner: &Command,
    named: Key<'_>,
    value: Value,
) -> Result<(String, Vec<String>), ConfigFileError> {
    let id = id_of(&named.key);
    let negated = id.strip_prefix("no_").filter(|id| flag_of(owner, id).is_some());
    let (id, value) = match (negated, value) {
        (Some(id), Value::Bool(value)) => (id.to_owned(), Value::Bool(!value)),
        (_, value) => (id, value),
    };
    let Some(argument) = flag_of(owner, &id) else {
        return Err(ConfigFileError::UnknownKey {
            path: named.path.to_owned(),
            key: named.key,
            command: named.command.to_owned(),
        });
    };
    let flag = matches!(argument.get_action(), ArgAction::SetTrue | ArgAction::SetFalse);
    let values = match value {
        Value::Sequence(items) => items.iter().map(scalar).collect::<Option<Vec<_>>>(),
        single if flag && !single.is_bool() => None,
        single => scalar(&single).map(|value| vec![value]),
    };
    let values = values.ok_or_else(|| ConfigFileError::BadValue {
        path: named.path.to_owned(),
        key: named.key,
    })?;
    Ok((id, values))
}

fn flag_of<'a>(owner: &'a Command, id: &str) -> Option<&'a Arg> {
    let mut arguments = owner.get_arguments();
    arguments.find(|argument| argument.get_id() == id && id != "config" && !argument.is_positional())
}

/// A value as it would be typed; a mapping is some JSON or other.
fn words(value: &Value) -> Vec<String> {
    match value {
        Value::Null => Vec::new(),
        Value::Sequence(items) => items.iter().flat_map(words).collect(),
        Value::Mapping(mapping) if mapping.is_empty() => vec!["{}".to_owned()],
        other => vec![scalar(other).unwrap_or_else(|| "{...}".to_owned())],
    }
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::Bool(value) => Some(value.to_string()),
        Value::Number(value) => Some(value.to_string()),
        Value::String(value) => Some(value.clone()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use clap::FromArgMatches;

    use super::*;
    use crate::{
        args::{Cli, Command as Sub},
        command_line::CommandLine,
    };

    fn parse(yaml: &str, extra: &[&str]) -> Result<Cli, String> {
        let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
        file.write_all(yaml.as_bytes()).expect("written");
        let path = file.path().to_str().expect("utf-8");
        let arguments = ["phalanx", "serve", "--config", path]
            .into_iter()
            .chain(extra.iter().copied());
        let line =
            CommandLine::read(arguments.map(OsString::from).collect()).map_err(|error| error.to_string())?;
        let matches = line
            .command
            .try_get_matches_from(&line.arguments)
            .map_err(|error| error.to_string())?;
        crate::args::refuse_two_models(&matches).map_err(|error| error.to_string())?;
        Cli::from_arg_matches(&matches).map_err(|error| error.to_string())
    }

    fn serve(yaml: &str, extra: &[&str]) -> crate::args::ServeArgs {
        match parse(yaml, extra).expect("valid").command {
            Sub::Serve(args) => *args,
            other => panic!("expected serve, got {other:?}"),
        }
    }

    #[test]
    fn the_file_gives_defaults_and_the_command_line_wins() {
        let yaml = "model: m.gguf\ntensor-parallel-size: 3\nport: 9000\nserved_model_name: [a, b]\n";
        let args = serve(yaml, &[]);
        assert_eq!((args.model.tensor_parallel_size, args.frontend.port), (3, 9000));
        assert_eq!(args.engine.served_model_name, ["a", "b"]);
        let args = serve(yaml, &["-tp", "2"]);
        assert_eq!((args.model.tensor_parallel_size, args.frontend.port), (2, 9000));
    }

    #[test]
    fn flags_of_every_subcommand_are_keys_too() {
        let cli = parse("log-level: debug\nlog-format: json\n", &[]).expect("valid");
        assert_eq!(
            cli.logging.arguments(),
            ["--log-level", "debug", "--log-format", "json"]
        );
        let cli = parse("log-level: debug\n", &["--log-level", "warn"]).expect("valid");
        assert_eq!(cli.logging.log_level, "warn");
    }

    #[test]
    fn the_last_word_on_prefix_caching_counts() {
        let enabled = |yaml: &str, extra: &[&str]| serve(yaml, extra).engine.enable_prefix_caching;
        let (on, off) = ("--enable-prefix-caching", "--no-enable-prefix-caching");
        assert!(enabled("", &[]) && !enabled("", &[off]) && enabled("", &[off, on]));
        for yaml in [
            "no-enable-prefix-caching: true\n",
            "enable-prefix-caching: false\n",
        ] {
            assert!(!enabled(yaml, &[]) && enabled(yaml, &[on]), "{yaml}");
        }
        assert!(!enabled("enable-prefix-caching: true\n", &[off]));
        // A flag without a value must not take the model for one.
        let args = serve("", &[on, "m.gguf"]);
        assert_eq!(args.model.model_tag, Some("m.gguf".into()));
    }

    #[test]
    fn the_model_is_given_once_on_the_command_line() {
        let args = serve("model: file.gguf\n", &["typed.gguf"]);
        assert_eq!(args.model.model_tag, Some("typed.gguf".into()));
        let error = parse("", &["a.gguf", "--model", "b.gguf"]).unwrap_err();
        assert!(error.contains("given twice"), "{error}");
    }

    #[test]
    fn graphs_are_chosen_in_the_file_or_on_the_command_line() {
        let args = serve("enforce-eager: true\ncudagraph-capture-sizes: [1, 2, 8]\n", &[]);
        assert!(args.model.enforce_eager);
        assert_eq!(args.model.cudagraph_capture_sizes, Some(vec![1, 2, 8]));
        let args = serve("", &["--cudagraph-capture-sizes", "4", "16", "--port", "1"]);
        assert!(!args.model.enforce_eager);
        assert_eq!(args.model.cudagraph_capture_sizes, Some(vec![4, 16]));
        let zero = parse("cudagraph-capture-sizes: [0]\n", &[]).unwrap_err();
        assert!(zero.contains("--cudagraph-capture-sizes"), "{zero}");
    }

    #[test]
    fn every_switch_can_be_taken_back() {
        let args = serve(
            "enforce-eager: true\n",
            &["--no-enforce-eager", "--no_disable_custom_all_reduce"],
        );
        assert!(!args.model.enforce_eager && !args.model.disable_custom_all_reduce);
        let args = serve(
            "enforce-eager: true\n",
            &["--disable_custom_all_reduce", "m.gguf"],
        );
        assert!(args.model.enforce_eager && args.model.disable_custom_all_reduce);
        assert_eq!(args.model.model_tag, Some("m.gguf".into()));
    }

    #[test]
    fn keys_of_vllm_alone_are_judged_as_its_flags() {
        let args = serve(
            "trust-remote-code: true\ncompilation-config: {mode: 3}\nport: 1\n",
            &[],
        );
        assert_eq!(args.frontend.port, 1);
        let error = parse("enable-lora: true\n", &[]).unwrap_err();
        assert!(
            error.contains("--enable-lora is not offered: adapters"),
            "{error}"
        );
    }

    #[test]
    fn mistakes_are_named() {
        let error = parse("tensor-paralel-size: 2\n", &[]).unwrap_err();
        assert!(
            error.contains("`tensor-paralel-size` is not a flag of `phalanx serve`"),
            "{error}"
        );
        assert!(
            parse("port: {a: 1}\n", &[])
                .unwrap_err()
                .contains("`port` must be")
        );
        assert!(parse("port: many\n", &[]).unwrap_err().contains("many"));
        assert!(parse("- a\n", &[]).unwrap_err().contains("expected a mapping"));
    }
}
