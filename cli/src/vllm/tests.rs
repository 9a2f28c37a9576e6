use std::{collections::BTreeSet, fs, path::Path};

use clap::CommandFactory;

use super::*;
use crate::args::Cli;

/// Every flag of vLLM 0.33's engine and front end, by name.
const NAMES: &str = include_str!("flags.txt");

fn stripped(flags: &[&str]) -> Result<(Vec<String>, Vec<&'static str>), String> {
    let arguments = ["phalanx", "serve", "m.gguf"].iter().chain(flags);
    let arguments = arguments.map(OsString::from).collect();
    let (kept, notices) = strip(&Cli::command(), arguments).map_err(|error| error.to_string())?;
    let kept = kept
        .iter()
        .skip(3)
        .map(|argument| argument.to_string_lossy().into_owned());
    Ok((kept.collect(), notices.iter().map(|notice| notice.flag).collect()))
}

fn is_offered(name: &str) -> bool {
    let command = Cli::command();
    let serve = command.find_subcommand("serve").expect("serve");
    offers(&command, name) || offers(serve, name)
}

#[test]
fn every_flag_of_vllm_is_offered_ignored_or_refused() {
    let table: BTreeSet<&str> = entries().map(|(_, flag)| flag.name).collect();
    assert_eq!(table.len(), entries().count(), "a flag stands in the table twice");
    for name in NAMES.lines() {
        let (offered, listed) = (is_offered(name), table.contains(name));
        assert!(offered || listed, "{name}: neither in args.rs nor in the table");
        assert!(
            !(offered && listed),
            "{name} is offered now: take it out of the table"
        );
    }
}

#[test]
fn the_document_says_the_same() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/compatibility.md");
    let text = fs::read_to_string(path).expect("docs/compatibility.md");
    let mut missing = Vec::new();
    for name in NAMES.lines().filter(|name| is_offered(name)) {
        let line = format!("| `{name}` | same |");
        if !text.lines().any(|it| it.starts_with(&line)) {
            missing.push(line);
        }
    }
    for (group, flag) in entries() {
        let treatment = match group.treatment {
            Treatment::Ignored => "ignored",
            Treatment::Refused => "refused",
        };
        let unless = match flag.no_ops {
            [] => String::new(),
            values => format!(", unless {}", values.join(", ")),
        };
        let line = format!("| `{}` | {treatment}{unless} | {} |", flag.name, group.reason);
        if !text.lines().any(|it| it == line) {
            missing.push(line);
        }
    }
    assert!(
        missing.is_empty(),
        "docs/compatibility.md lacks:\n{}",
        missing.join("\n")
    );
}

#[test]
fn what_means_nothing_is_taken_off_with_its_values() {
    let (kept, notices) = stripped(&[
        "--trust-remote-code",
        "--port",
        "1",
        "--compilation-config",
        "{\"mode\": 3}",
        "--compilation-config.mode=3",
        "--no-async-scheduling",
        "-O3",
        "--numa-bind-nodes",
        "0",
        "1",
        "--kv-offloading-size=-1",
        "--max-num-active-seqs",
        "-1",
        "--seed",
        "7",
    ])
    .expect("accepted");
    assert_eq!(kept, ["--port", "1", "--seed", "7"]);
    assert_eq!(
        notices
            .iter()
            .filter(|flag| **flag == "--compilation-config")
            .count(),
        1
    );
    assert!(notices.contains(&"--optimization-level") && notices.contains(&"--async-scheduling"));
}

#[test]
fn what_would_change_replies_is_refused_with_its_reason() {
    for (flags, words) in [
        (&["--enable-lora"][..], "--enable-lora is not offered: adapters"),
        (&["-pp", "2"], "--pipeline-parallel-size is not offered"),
        (
            &["--tokenizer=other"],
            "--tokenizer is not offered: the tokenizer",
        ),
        (&["--runner"], "--runner needs a value"),
        (
            &["--enable-lora=yes"],
            "--enable-lora takes no value, got \"yes\"",
        ),
    ] {
        let error = stripped(flags).expect_err("refused");
        assert!(error.contains(words), "{error}");
    }
    let no_ops = ["-pp", "1", "--runner=auto", "--no-enable-lora", "--dtype", "auto"];
    assert_eq!(stripped(&no_ops), Ok((Vec::new(), Vec::new())));
}

#[test]
fn only_vllms_commands_are_looked_at() {
    let arguments: Vec<OsString> = ["phalanx", "bench", "serve", "--enable-lora"]
        .map(OsString::from)
        .to_vec();
    let (kept, notices) = strip(&Cli::command(), arguments.clone()).expect("not looked at");
    assert_eq!((kept, notices), (arguments, Vec::new()));
    let (kept, _) = stripped(&["--", "--enable-lora"]).expect("not looked at");
    assert_eq!(kept, ["--", "--enable-lora"]);
}

#[test]
fn keys_of_a_file_are_judged_alike() {
    let judge = |key: &str, value: &str| judge_key(key, &[value.to_owned()]);
    assert_eq!(
        judge("trust_remote_code", "false"),
        Some(Ok(Some(Notice {
            flag: "--trust-remote-code",
            reason: "no code of a model or a plugin is ever run",
        })))
    );
    assert!(matches!(
        judge("enable-lora", "true"),
        Some(Err(FlagError::Refused { .. }))
    ));
    assert_eq!(judge("enable-lora", "false"), Some(Ok(None)));
    assert_eq!(judge("no-enable-lora", "true"), Some(Ok(None)));
    assert_eq!(judge("pipeline-parallel-size", "1"), Some(Ok(None)));
    assert_eq!(judge("tensor-parallel-size", "1"), None);
}
