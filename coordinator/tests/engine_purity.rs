//! The engine runs under a simulator because it reaches for nothing outside of itself. This keeps it so.

use std::{fs, path::Path};

const FORBIDDEN: [&str; 10] = [
    "tokio",
    "tonic",
    "std::env",
    "std::fs",
    "std::net",
    "std::thread",
    "std::sync",
    "time::Instant",
    "SystemTime",
    "HashSet",
];

/// Returns how many files were looked at.
fn check(folder: &Path) -> usize {
    let entries = fs::read_dir(folder).expect("readable");
    let paths = entries.map(|entry| entry.expect("readable").path());
    // The simulator is the outside.
    paths
        .filter(|path| !path.ends_with("sim"))
        .map(|path| check_path(&path))
        .sum()
}

fn check_path(path: &Path) -> usize {
    if path.is_dir() {
        return check(path);
    }
    let text = fs::read_to_string(path).expect("readable");
    for (index, line) in text.lines().enumerate() {
        let named = FORBIDDEN.iter().find(|name| line.contains(**name));
        let comment = line.trim_start().starts_with("//");
        assert!(
            named.is_none() || comment,
            "{} line {}: {line}",
            path.display(),
            index + 1
        );
    }
    1
}

#[test]
fn the_engine_names_no_runtime_no_clock_and_no_environment() {
    let num_files = check(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/engine"));
    assert!(num_files >= 9, "only {num_files} files");
}
