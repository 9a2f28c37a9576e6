//! Clients as they are written in Python, with the packages that `scripts/test` installs.

use std::process::Command;

use crate::root;

/// Runs a script of tests/python, which must end well.
pub fn run(script: &str, arguments: &[&str]) {
    let python = root().join(".venv/bin/python");
    assert!(
        python.exists(),
        "{} is missing: run ./scripts/test",
        python.display()
    );
    let output = Command::new(python)
        .arg(root().join("tests/python").join(script))
        .args(arguments)
        .output()
        .expect("python starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{}\n{}",
        text(&output.stdout),
        text(&output.stderr)
    );
}
