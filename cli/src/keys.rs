//! API keys from the command line, the environment and a file.

use std::{env, fs, path::Path};

use anyhow::Context;
use phalanx_proto::secret::ApiKeys;

/// A larger file is not a list of keys.
const MAX_BYTES: u64 = 1 << 20;

/// vLLM's variable for a key, which counts where none is given otherwise.
const VLLM_KEY: &str = "VLLM_API_KEY";

/// The keys that were given, or else vLLM's variable, and those of `file`.
pub(crate) fn load(given: &[String], file: Option<&Path>) -> anyhow::Result<ApiKeys> {
    let of_vllm = match env::var(VLLM_KEY) {
        Ok(key) => key,
        Err(env::VarError::NotPresent) => String::new(),
        // Whoever sets it wants the door closed.
        Err(error) => return Err(error).context(VLLM_KEY),
    };
    collect(given, of_vllm, file)
}

/// Of `file` one a line; empty lines and those that begin with `#` are none. A file without a key is an error: it must not
/// open the door.
fn collect(given: &[String], of_vllm: String, file: Option<&Path>) -> anyhow::Result<ApiKeys> {
    let mut keys: Vec<String> = given.iter().filter(|key| !key.is_empty()).cloned().collect();
    if keys.is_empty() && !of_vllm.is_empty() {
        keys.push(of_vllm);
    }
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
        let keys = collect(&["given".to_owned()], "unused".to_owned(), Some(&path)).expect("keys");
        for key in ["given", "first", "second"] {
            assert!(keys.admit(Some(format!("Bearer {key}").as_bytes())), "{key}");
        }
        for nobody in [&b"Bearer # of the team"[..], b"Bearer unused"] {
            assert!(!keys.admit(Some(nobody)));
        }
        assert!(!keys.admit(None));
        let of_vllm = collect(&[], "sesame".to_owned(), None).expect("a key");
        assert!(of_vllm.admit(Some(b"Bearer sesame")) && !of_vllm.admit(None));
        fs::write(&path, "# none\n").expect("written");
        let error = collect(&[], String::new(), Some(&path))
            .expect_err("no key")
            .to_string();
        assert!(error.contains("holds no key"), "{error}");
        assert!(collect(&[], String::new(), Some(Path::new("/nonexistent/keys"))).is_err());
        assert!(collect(&[], String::new(), None).expect("none needed").is_empty());
    }
}
