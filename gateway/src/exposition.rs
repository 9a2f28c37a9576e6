//! The two text formats of metrics, and which of them a scraper wants.

use http::{HeaderMap, header};

/// OpenMetrics, for those who ask for it.
pub(crate) const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// The older format, for everybody else: what reads `/metrics` without a word of what it accepts knows no other.
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Content type and body for a scraper with these headers.
pub(crate) fn negotiate(headers: &HeaderMap, openmetrics: String) -> (&'static str, String) {
    let accepts = headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|value| value.contains("application/openmetrics-text"));
    if accepts {
        (OPENMETRICS, openmetrics)
    } else {
        (TEXT, to_text_format(&openmetrics))
    }
}

/// OpenMetrics in the format 0.0.4, in which a family has its samples' name, suffix included, and nothing marks the end.
fn to_text_format(openmetrics: &str) -> String {
    let mut text = String::with_capacity(openmetrics.len());
    // HELP comes before TYPE, which decides the name.
    let mut help = None;
    for line in openmetrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ');
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            let (suffix, kind) = match kind {
                "counter" => ("_total", "counter"),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                kind => ("", kind),
            };
            if let Some((_, words)) = help.take().filter(|(of, _)| *of == name) {
                push(&mut text, &["# HELP ", name, suffix, " ", words]);
            }
            push(&mut text, &["# TYPE ", name, suffix, " ", kind]);
        } else if !line.starts_with('#') {
            push(&mut text, &[line]);
        }
    }
    text
}

fn push(text: &mut String, parts: &[&str]) {
    text.extend(parts.iter().copied());
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    const OPEN: &str = "# HELP a:b Counts.\n# TYPE a:b counter\na:b_total{x=\"1\"} 2\n# HELP g Gauges.\n# TYPE g gauge\n\
        # UNIT g seconds\ng 1.5\n# TYPE h histogram\nh_bucket{le=\"+Inf\"} 1\n# EOF\n";
    const PLAIN: &str = "# HELP a:b_total Counts.\n# TYPE a:b_total counter\na:b_total{x=\"1\"} 2\n# HELP g Gauges.\n\
        # TYPE g gauge\ng 1.5\n# TYPE h histogram\nh_bucket{le=\"+Inf\"} 1\n";

    #[test]
    fn the_older_format_is_the_default() {
        let mut headers = HeaderMap::new();
        assert_eq!(negotiate(&headers, OPEN.into()), (TEXT, PLAIN.into()));
        headers.insert(header::ACCEPT, HeaderValue::from_static("*/*"));
        assert_eq!(negotiate(&headers, OPEN.into()).0, TEXT);
        let prometheus =
            "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1";
        headers.insert(header::ACCEPT, HeaderValue::from_static(prometheus));
        assert_eq!(negotiate(&headers, OPEN.into()), (OPENMETRICS, OPEN.into()));
    }
}
