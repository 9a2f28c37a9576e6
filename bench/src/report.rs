//! What a run came to, in numbers.

use std::{collections::BTreeMap, fmt, time::Duration};

use serde::Serialize;

use crate::{Run, Sample};

/// Of one quantity over all requests, in milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Distribution {
    pub mean: f64,
    pub median: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

/// The names are those of `vllm bench serve`'s result files, where it has them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Seconds.
    pub duration: f64,
    pub completed: usize,
    pub failed: usize,
    pub total_input_tokens: u64,
    pub total_output_tokens: u64,
    pub cached_input_tokens: u64,
    /// Requests per second.
    pub request_throughput: f64,
    /// Tokens per second.
    pub output_throughput: f64,
    pub total_token_throughput: f64,
    /// Of one stream after its first token: the median over the requests, tokens per second.
    pub decode_throughput_per_stream: f64,
    pub ttft_ms: Distribution,
    pub tpot_ms: Distribution,
    pub itl_ms: Distribution,
    pub e2el_ms: Distribution,
    /// How often each error came.
    pub errors: BTreeMap<String, usize>,
}

impl Distribution {
    fn of(durations: impl Iterator<Item = Duration>) -> Self {
        let mut values: Vec<f64> = durations.map(|duration| duration.as_secs_f64() * 1e3).collect();
        if values.is_empty() {
            return Self::default();
        }
        values.sort_by(f64::total_cmp);
        Self {
            mean: values.iter().sum::<f64>() / values.len() as f64,
            median: quantile(&values, 0.5),
            p90: quantile(&values, 0.9),
            p99: quantile(&values, 0.99),
            max: values[values.len() - 1],
        }
    }
}

/// Of sorted values, with straight lines between them.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let place = q * (sorted.len() - 1) as f64;
    let (low, high) = (place.floor() as usize, place.ceil() as usize);
    sorted[low] + (sorted[high] - sorted[low]) * place.fract()
}

impl Report {
    pub fn of(run: &Run) -> Self {
        let samples: Vec<&Sample> = run.outcomes.iter().flatten().collect();
        let mut errors = BTreeMap::new();
        for failure in run.outcomes.iter().filter_map(|outcome| outcome.as_ref().err()) {
            *errors.entry(failure.to_string()).or_default() += 1;
        }
        let duration = run.duration.as_secs_f64();
        let total = |count: fn(&Sample) -> u64| samples.iter().map(|sample| count(sample)).sum::<u64>();
        let (input, output) = (total(|s| s.prompt_tokens), total(|s| s.completion_tokens));
        let tpot_ms = Distribution::of(samples.iter().filter_map(|s| s.time_per_output_token()));
        Self {
            duration,
            completed: samples.len(),
            failed: run.outcomes.len() - samples.len(),
            total_input_tokens: input,
            total_output_tokens: output,
            cached_input_tokens: total(|s| s.cached_tokens),
            request_throughput: samples.len() as f64 / duration,
            output_throughput: output as f64 / duration,
            total_token_throughput: (input + output) as f64 / duration,
            decode_throughput_per_stream: if tpot_ms.median > 0.0 {
                1e3 / tpot_ms.median
            } else {
                0.0
            },
            ttft_ms: Distribution::of(samples.iter().map(|s| s.time_to_first_token())),
            itl_ms: Distribution::of(samples.iter().flat_map(|s| s.inter_token_latencies())),
            e2el_ms: Distribution::of(samples.iter().map(|s| s.end_to_end_latency())),
            tpot_ms,
            errors,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "requests            {} completed, {} failed",
            self.completed, self.failed
        )?;
        writeln!(f, "duration            {:.2} s", self.duration)?;
        writeln!(
            f,
            "tokens              {} in ({} of them cached), {} out",
            self.total_input_tokens, self.cached_input_tokens, self.total_output_tokens
        )?;
        writeln!(
            f,
            "throughput          {:.2} requests/s, {:.1} output tokens/s, {:.1} tokens/s in and out",
            self.request_throughput, self.output_throughput, self.total_token_throughput
        )?;
        writeln!(
            f,
            "decode              {:.1} tokens/s per stream",
            self.decode_throughput_per_stream
        )?;
        writeln!(
            f,
            "{:<19} {:>10} {:>10} {:>10} {:>10} {:>10}",
            "ms", "mean", "median", "p90", "p99", "max"
        )?;
        for (name, d) in [
            ("time to first token", &self.ttft_ms),
            ("time per out. token", &self.tpot_ms),
            ("inter-token latency", &self.itl_ms),
            ("end to end", &self.e2el_ms),
        ] {
            let Distribution {
                mean,
                median,
                p90,
                p99,
                max,
            } = d;
            writeln!(
                f,
                "{name:<19} {mean:>10.2} {median:>10.2} {p90:>10.2} {p99:>10.2} {max:>10.2}"
            )?;
        }
        for (error, count) in &self.errors {
            writeln!(f, "{count} x {error}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Failure;

    fn sample(events: &[u64], tokens: u64) -> Sample {
        Sample {
            events: events.iter().copied().map(Duration::from_millis).collect(),
            prompt_tokens: 10,
            completion_tokens: tokens,
            cached_tokens: 4,
        }
    }

    #[test]
    fn a_run_is_summed_up() {
        let run = Run {
            duration: Duration::from_secs(2),
            outcomes: vec![
                Ok(sample(&[100, 110, 130], 3)),
                // Two tokens in one event: its gap is one, its time per token half of that.
                Ok(sample(&[200, 240], 3)),
                Err(Failure::Connection("refused".into())),
            ],
        };
        let report = Report::of(&run);
        assert_eq!((report.completed, report.failed), (2, 1));
        assert_eq!(report.output_throughput, 3.0);
        assert_eq!(report.total_token_throughput, 13.0);
        assert_eq!(report.cached_input_tokens, 8);
        assert!((report.ttft_ms.median - 150.0).abs() < 1e-9);
        assert!((report.tpot_ms.mean - 17.5).abs() < 1e-9);
        assert!((report.itl_ms.median - 20.0).abs() < 1e-9);
        assert!((report.itl_ms.max - 40.0).abs() < 1e-9);
        assert_eq!(report.errors["connection: refused"], 1);
        assert!(report.to_string().contains("1 x connection: refused"));
    }

    #[test]
    fn quantiles_lie_on_lines_between_values() {
        let values = [1.0, 2.0, 3.0, 4.0, 5.0];
        assert_eq!(quantile(&values, 0.5), 3.0);
        assert!((quantile(&values, 0.9) - 4.6).abs() < 1e-12);
        assert_eq!(quantile(&[7.0], 0.99), 7.0);
        assert_eq!(Distribution::of(std::iter::empty()), Distribution::default());
    }
}
