//! The house rules that a compiler does not check: who may depend on whom, and how large things may grow.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use cargo_metadata::{DependencyKind, MetadataCommand};

const MAX_FILE_LINES: usize = 600;
const MAX_FUNCTION_LINES: usize = 70;
const MAX_MODEL_LINES: usize = 250;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the tests crate lies in the workspace")
        .to_owned()
}

/// What each crate may use of the others.
fn allowed() -> BTreeMap<&'static str, BTreeSet<&'static str>> {
    let rules: [(&str, &[&str]); 11] = [
        ("proto", &[]),
        ("shm", &[]),
        ("model", &[]),
        ("kernels", &["model", "shm"]),
        ("worker", &["proto", "shm", "model", "kernels"]),
        ("coordinator", &["proto", "shm", "model"]),
        ("gateway", &["proto"]),
        // Measures any server, so it knows nothing of ours either.
        ("bench", &[]),
        // Stands in for CUDA's libraries, so it knows nothing of ours.
        ("softgpu", &[]),
        (
            "cli",
            &[
                "proto",
                "shm",
                "model",
                "kernels",
                "worker",
                "coordinator",
                "gateway",
                "bench",
            ],
        ),
        (
            "tests",
            &[
                "proto",
                "shm",
                "model",
                "kernels",
                "worker",
                "coordinator",
                "gateway",
            ],
        ),
    ];
    rules
        .into_iter()
        .map(|(name, uses)| (name, uses.iter().copied().collect()))
        .collect()
}

#[test]
fn dependencies_point_one_way() {
    let metadata = MetadataCommand::new()
        .manifest_path(root().join("Cargo.toml"))
        .exec()
        .expect("cargo metadata");
    let mut allowed = allowed();
    for package in metadata.workspace_packages() {
        let name = package
            .name
            .strip_prefix("phalanx-")
            .expect("our crates are called phalanx-*");
        let may = allowed
            .remove(name)
            .unwrap_or_else(|| panic!("{name}: a new crate needs a rule here"));
        let normal = package
            .dependencies
            .iter()
            .filter(|dependency| dependency.kind != DependencyKind::Development);
        for dependency in normal {
            match dependency.name.strip_prefix("phalanx-") {
                Some(used) => assert!(may.contains(used), "{name} must not depend on {used}"),
                None => check_foreign(name, &dependency.name),
            }
        }
    }
    assert!(
        allowed.is_empty(),
        "rules for crates that do not exist: {:?}",
        allowed.keys()
    );
}

#[test]
fn candle_is_built_for_cpus_only() {
    let metadata = MetadataCommand::new()
        .manifest_path(root().join("Cargo.toml"))
        .exec()
        .expect("cargo metadata");
    let names: BTreeMap<_, _> = metadata
        .packages
        .iter()
        .map(|package| (&package.id, package.name.as_str()))
        .collect();
    let nodes = metadata.resolve.expect("a resolved graph").nodes;
    let candle: Vec<_> = nodes
        .iter()
        .filter(|node| names[&node.id].starts_with("candle-"))
        .collect();
    assert!(
        !candle.is_empty(),
        "candle is what the quantized formats are checked against"
    );
    for node in candle {
        // They need CUDA to build, and link it another way than cudarc does here.
        let mut features = node.features.iter().map(|feature| feature.as_str());
        let device = features.find(|feature| ["cuda", "cudnn", "nccl", "flash-attn"].contains(feature));
        assert_eq!(device, None, "{} has it on", names[&node.id]);
    }
}

fn check_foreign(crate_name: &str, dependency: &str) {
    let device = ["cudarc", "candle-core", "candle-transformers"].contains(&dependency);
    assert!(
        !device || crate_name == "kernels",
        "{crate_name} must not name {dependency}"
    );
    assert!(
        dependency != "anyhow" || crate_name == "cli",
        "anyhow belongs in cli, not in {crate_name}"
    );
}

/// Every Rust source of ours, without build output.
fn sources() -> Vec<PathBuf> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).expect("readable").flatten() {
            let path = entry.path();
            let name = entry.file_name();
            let skipped =
                name.to_string_lossy().starts_with('.') || name.to_string_lossy().starts_with("target");
            if path.is_dir() && !skipped {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&root(), &mut found);
    assert!(found.len() > 30, "the walk must find the workspace");
    found
}

#[test]
fn files_stay_short() {
    let long: Vec<String> = sources()
        .iter()
        .map(|path| (path, fs::read_to_string(path).expect("readable").lines().count()))
        .filter(|(path, lines)| {
            let model = path.components().any(|part| part.as_os_str() == "models");
            *lines > if model { MAX_MODEL_LINES } else { MAX_FILE_LINES }
        })
        .map(|(path, lines)| format!("{}: {lines} lines", path.display()))
        .collect();
    assert!(
        long.is_empty(),
        "a second subject wants its own file:\n{}",
        long.join("\n")
    );
}

/// Functions as rustfmt lays them out: from the line with `fn` to the closing brace at the same indentation.
fn long_functions(text: &str) -> Vec<(usize, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let indent = |line: &str| line.len() - line.trim_start().len();
    let is_fn = |line: &str| {
        let words = line.trim_start();
        let starts = [
            "fn ",
            "pub fn ",
            "pub(",
            "async fn ",
            "pub async fn ",
            "unsafe fn ",
            "pub unsafe fn ",
            "const fn ",
        ];
        starts.iter().any(|start| words.starts_with(start)) && words.contains("fn ")
    };
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate().filter(|(_, line)| is_fn(line)) {
        let closes = |other: &str| indent(other) == indent(line) && other.trim_start().starts_with('}');
        let opened = lines[start..]
            .iter()
            .find(|line| line.trim_end().ends_with(['{', '}', ';']));
        let declared_only = opened.is_none_or(|line| line.trim_end().ends_with(';'));
        let end = lines[start..].iter().position(|other| closes(other));
        if let (false, Some(length)) = (declared_only, end)
            && length + 1 > MAX_FUNCTION_LINES
        {
            found.push((start + 1, length + 1));
        }
    }
    found
}

#[test]
fn functions_stay_short() {
    let mut long = Vec::new();
    // A test may be a table.
    let is_test = |path: &PathBuf| path.components().any(|part| part.as_os_str() == "tests");
    for path in sources().into_iter().filter(|path| !is_test(path)) {
        let text = fs::read_to_string(&path).expect("readable");
        let functions = long_functions(&text).into_iter();
        long.extend(functions.map(|(line, length)| format!("{}:{line}: {length} lines", path.display())));
    }
    assert!(
        long.is_empty(),
        "over {MAX_FUNCTION_LINES} lines:\n{}",
        long.join("\n")
    );
}

#[test]
fn the_map_names_only_what_exists() {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    let quoted = text.split('`').skip(1).step_by(2);
    let paths = quoted.filter(|word| {
        word.contains('/') && !word.contains([' ', '*', '<', '{', ':', '$']) && !word.starts_with('/')
    });
    let missing: BTreeSet<&str> = paths
        .filter(|path| !root().join(path.trim_end_matches('/')).exists())
        .collect();
    assert!(
        missing.is_empty(),
        "ARCHITECTURE.md names paths that do not exist: {missing:?}"
    );
}
