//! API keys from the command line, the environment and a file.

use std::{fs, path::Path};

use anyhow::Context;
use phalanx_proto::secret::ApiKeys;

/// A larger file is not a list of keys.
const MAX_BYTES: u64 = 1 << 20;

/// The keys that were given and those of `file`: one a line; empty lines and those that begin with `#` are none. A file
/// without a key is an error: it must not open the door.
pub(crate) fn load(given: &[String], file: Option<&Path>) -> anyhow::Result<ApiKeys> {
    let mut keys = given.to_vec();
    if let Some(path) = file {
        let name = || format!("--api-key-file {}", path.display());
        let bytes = fs::metadata(path).with_context(name)?.len();
        anyhow::ensure!(bytes <= MAX_BYTES, "{}: {bytes} bytes, limit {MAX_BYTES}", name());
        let text = fs::read_to_string(path).with_context(name)?;
        let lines = text.lines().map(str::trim);
        let before = keys.len();
        keys.extend(
            lines
                .filter(|line| !line.is_empty() && !line.starts_with('#'))
                .map(str::to_owned),
        );
        anyhow::ensure!(keys.len() > before, "{} holds no key", name());
    }
    ApiKeys::new(keys).context("--api-key")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_a_file_are_added() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("keys");
        fs::write(&path, "# of the team\n\n  first \nsecond\n").expect("written");
        let keys = load(&["given".to_owned()], Some(&path)).expect("keys");
        for key in ["given", "first", "second"] {
            assert!(keys.admit(Some(format!("Bearer {key}").as_bytes())), "{key}");
        }
        assert!(!keys.admit(Some(b"Bearer # of the team")) && !keys.admit(None));
        fs::write(&path, "# none\n").expect("written");
        let error = load(&[], Some(&path)).expect_err("no key").to_string();
        assert!(error.contains("holds no key"), "{error}");
        assert!(load(&[], Some(Path::new("/nonexistent/keys"))).is_err());
        assert!(load(&[], None).expect("none needed").is_empty());
    }
}
