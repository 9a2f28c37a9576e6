//! The metrics of several coordinators as one OpenMetrics exposition.

use std::{collections::HashMap, fmt::Write};

use crate::backend::Backend;

/// The metrics of one coordinator; none if it does not answer, or in another format.
pub(super) async fn of(backend: &Backend) -> Option<String> {
    match backend.metrics().await {
        Ok(reply) if reply.content_type.starts_with("application/openmetrics-text") => {
            String::from_utf8(reply.body).ok()
        }
        Ok(reply) => {
            tracing::warn!(
                content_type = reply.content_type,
                "the coordinator's metrics are not OpenMetrics"
            );
            None
        }
        Err(error) => {
            tracing::debug!(%error, "no metrics from the coordinator");
            None
        }
    }
}

/// A family's lines: what describes it, and its samples.
#[derive(Default)]
struct Family {
    about: String,
    samples: String,
}

/// One exposition of all, whose samples say in a label `backend` whose they are; none of none.
pub(super) fn merge<'a>(expositions: impl Iterator<Item = (&'a str, String)>) -> Option<String> {
    let mut families: Vec<Family> = Vec::new();
    let mut places: HashMap<String, usize> = HashMap::new();
    for (address, text) in expositions {
        let label = format!("backend=\"{}\"", escape(address));
        // Of the family that the lines are about, and whether another coordinator has described it.
        let (mut at, mut described) = (None, false);
        for line in text.lines().filter(|line| !line.is_empty() && *line != "# EOF") {
            let Some(about) = line.strip_prefix("# ") else {
                if let Some(family) = at.and_then(|at: usize| families.get_mut(at)) {
                    sample(&mut family.samples, line, &label);
                }
                continue;
            };
            let name = about.split(' ').nth(1).unwrap_or_default();
            let place = *places.entry(name.to_owned()).or_insert(families.len());
            if at != Some(place) {
                described = place < families.len();
                at = Some(place);
            }
            if place == families.len() {
                families.push(Family::default());
            }
            if !described {
                families[place].about.push_str(line);
                families[place].about.push('\n');
            }
        }
    }
    if families.is_empty() {
        return None;
    }
    let lines = families
        .iter()
        .flat_map(|family| [&family.about, &family.samples]);
    Some(lines.map(String::as_str).collect())
}

/// Appends a sample with one more label.
fn sample(out: &mut String, line: &str, label: &str) {
    let end = line.find(['{', ' ']).unwrap_or(line.len());
    let (name, rest) = line.split_at(end);
    let written = match rest.strip_prefix('{') {
        Some(labels) if labels.starts_with('}') => writeln!(out, "{name}{{{label}{labels}"),
        Some(labels) => writeln!(out, "{name}{{{label},{labels}"),
        None => writeln!(out, "{name}{{{label}}}{rest}"),
    };
    // Writing to a String cannot fail.
    debug_assert!(written.is_ok());
}

fn escape(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_stay_whole_and_samples_say_whose_they_are() {
        let a =
            "# HELP x X.\n# TYPE x counter\nx_total{k=\"v\"} 1\n# HELP y Y.\n# TYPE y gauge\ny 2\n# EOF\n";
        let b =
            "# HELP y Y.\n# TYPE y gauge\ny{} 3\n# HELP z Z.\n# TYPE z gauge\n# UNIT z seconds\nz 4\n# EOF\n";
        let merged = merge([("http://a:1", a.to_owned()), ("unix:/b\"", b.to_owned())].into_iter());
        assert_eq!(
            merged.as_deref(),
            Some(
                "# HELP x X.\n# TYPE x counter\nx_total{backend=\"http://a:1\",k=\"v\"} 1\n\
                 # HELP y Y.\n# TYPE y gauge\ny{backend=\"http://a:1\"} 2\ny{backend=\"unix:/b\\\"\"} 3\n\
                 # HELP z Z.\n# TYPE z gauge\n# UNIT z seconds\nz{backend=\"unix:/b\\\"\"} 4\n"
            )
        );
        assert_eq!(merge(std::iter::empty()), None);
    }
}
