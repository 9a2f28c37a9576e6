//! `--speculative-config.method ngram`: one key of a flag whose value is JSON, as vLLM lets it be written.

use std::{collections::BTreeMap, ffi::OsString};

use anyhow::bail;
use serde_json::{Map, Value};

/// Joins what was written key by key to one `--flag=JSON` for each flag that is `offered`; a whole value that was given as
/// well is completed. Everything else stays as it is.
///
/// # Errors
/// A key without a value, or below one that is no object.
pub(crate) fn join(
    arguments: Vec<OsString>,
    offered: impl Fn(&str) -> bool,
) -> anyhow::Result<Vec<OsString>> {
    let mut rest = Vec::with_capacity(arguments.len());
    let mut keys: BTreeMap<String, Vec<(String, String)>> = BTreeMap::new();
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        let text = argument.to_str().unwrap_or_default();
        let (name, value) = text
            .split_once('=')
            .map_or((text, None), |(name, value)| (name, Some(value)));
        match name.split_once('.') {
            Some((flag, path)) if flag.starts_with("--") && offered(flag) => {
                let value = match value {
                    Some(value) => value.to_owned(),
                    None => match arguments.next().map(OsString::into_string) {
                        Some(Ok(value)) if !value.starts_with("--") => value,
                        _ => bail!("{name} needs a value"),
                    },
                };
                keys.entry(flag.to_owned())
                    .or_default()
                    .push((path.to_owned(), value));
            }
            _ => rest.push(argument),
        }
    }
    for (flag, keys) in keys {
        let mut object = take_whole(&mut rest, &flag)?;
        for (path, value) in keys {
            set(&mut object, &path, value)
                .map_err(|at| anyhow::anyhow!("{flag}.{path}: {at} is no object"))?;
        }
        rest.push(format!("{flag}={}", Value::Object(object)).into());
    }
    Ok(rest)
}

/// The value of the flag, if it was given as a whole.
fn take_whole(arguments: &mut Vec<OsString>, flag: &str) -> anyhow::Result<Map<String, Value>> {
    let glued = format!("{flag}=");
    let Some(at) = arguments.iter().rposition(|argument| {
        argument
            .to_str()
            .is_some_and(|text| text == flag || text.starts_with(&glued))
    }) else {
        return Ok(Map::new());
    };
    let argument = arguments.remove(at).into_string().unwrap_or_default();
    let value = match argument.strip_prefix(&glued) {
        Some(value) => value.to_owned(),
        None if at < arguments.len() => arguments.remove(at).into_string().unwrap_or_default(),
        None => bail!("{flag} needs a value"),
    };
    match serde_json::from_str(&value) {
        Ok(Value::Object(object)) => Ok(object),
        _ => bail!("{flag} must be a JSON object where keys of it are given as well, not {value}"),
    }
}

/// What is no JSON is a string. An error is the key that is in the way.
fn set<'a>(object: &mut Map<String, Value>, path: &'a str, value: String) -> Result<(), &'a str> {
    let Some((key, below)) = path.split_once('.') else {
        let value = serde_json::from_str(&value).unwrap_or(Value::String(value));
        object.insert(path.to_owned(), value);
        return Ok(());
    };
    let inner = object.entry(key).or_insert_with(|| Value::Object(Map::new()));
    set(inner.as_object_mut().ok_or(key)?, below, value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(arguments: &[&str]) -> anyhow::Result<Vec<String>> {
        let arguments = arguments.iter().map(OsString::from).collect();
        let joined = join(arguments, |name| ["--a", "--b"].contains(&name))?;
        Ok(joined
            .into_iter()
            .map(|argument| argument.into_string().expect("UTF-8"))
            .collect())
    }

    #[test]
    fn keys_become_one_value() {
        let whole = joined(&[
            "serve",
            "m.gguf",
            "--a.x_y",
            "ngram",
            "--a.n.k=3",
            "--c.d",
            "1",
            "--a.n.l",
            "true",
        ]);
        let whole = whole.expect("valid");
        let (last, rest) = whole.split_last().expect("not empty");
        assert_eq!(rest, ["serve", "m.gguf", "--c.d", "1"]);
        let value: Value = serde_json::from_str(last.strip_prefix("--a=").expect("the flag")).expect("JSON");
        assert_eq!(
            value,
            serde_json::json!({"n": {"k": 3, "l": true}, "x_y": "ngram"})
        );
    }

    #[test]
    fn a_whole_value_is_completed() {
        for given in [&["--b", r#"{"x":1}"#][..], &[r#"--b={"x":1}"#]] {
            let given = [given, &["--b.y", "2"]].concat();
            assert_eq!(joined(&given).expect("valid"), [r#"--b={"x":1,"y":2}"#]);
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (wrong, why) in [
            (&["--a.x"][..], "--a.x needs a value"),
            (&["--a.x", "--b", "{}"], "--a.x needs a value"),
            (&["--a.x", "1", "--a.x.y", "2"], "--a.x.y: x is no object"),
            (&["--a", "3", "--a.x", "1"], "--a must be a JSON object"),
        ] {
            let error = joined(wrong).expect_err(why).to_string();
            assert!(error.starts_with(why), "{error}");
        }
    }
}
