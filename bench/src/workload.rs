//! What is asked, and when.

use serde_json::{Value, json};

/// What a run asks of a server. Equal workloads ask the same, request by request.
#[derive(Clone, Debug)]
pub struct Workload {
    pub api: Api,
    /// As the server calls it.
    pub model: String,
    pub num_prompts: usize,
    /// Requests in flight at most.
    pub max_concurrency: usize,
    pub arrivals: Arrivals,
    /// Tokens of every prompt, the shared prefix included.
    pub input_len: usize,
    /// Tokens at the start that all prompts have in common.
    pub prefix_len: usize,
    pub output_len: usize,
    /// Where random token ids are drawn from.
    pub token_ids: std::ops::Range<u32>,
    pub temperature: f32,
    pub ignore_eos: bool,
    pub seed: u64,
}

/// Which route, and so how a prompt is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    /// `/v1/completions` with token ids: lengths are exact.
    Completions,
    /// `/v1/chat/completions` with words: lengths are what the server's tokenizer makes of them.
    Chat,
}

/// When requests start.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arrivals {
    /// As soon as the limit on requests in flight allows.
    Closed,
    /// A Poisson process of so many requests per second, within the limit on requests in flight.
    Poisson(f64),
}

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{field} is {value}, {limit}")]
pub struct WorkloadError {
    pub field: &'static str,
    pub value: String,
    pub limit: String,
}

const MAX_PROMPTS: usize = 1_000_000;
const MAX_CONCURRENCY: usize = 16_384;
const MAX_LEN: usize = 1 << 20;

impl Workload {
    /// # Errors
    /// The first number that makes no sense.
    pub fn check(&self) -> Result<(), WorkloadError> {
        let between = |field, value: usize, least: usize, most: usize| {
            if (least..=most).contains(&value) {
                return Ok(());
            }
            Err(WorkloadError {
                field,
                value: value.to_string(),
                limit: format!("from {least} to {most} is possible"),
            })
        };
        between("--num-prompts", self.num_prompts, 1, MAX_PROMPTS)?;
        between("--max-concurrency", self.max_concurrency, 1, MAX_CONCURRENCY)?;
        between("--random-input-len", self.input_len, 1, MAX_LEN)?;
        between("--random-output-len", self.output_len, 1, MAX_LEN)?;
        between("--random-prefix-len", self.prefix_len, 0, self.input_len)?;
        if let Arrivals::Poisson(rate) = self.arrivals
            && !(rate.is_finite() && rate > 0.0)
        {
            return Err(WorkloadError {
                field: "--request-rate",
                value: rate.to_string(),
                limit: "it must be positive, or inf".into(),
            });
        }
        if self.token_ids.is_empty() {
            return Err(WorkloadError {
                field: "--random-token-ids",
                value: format!("{}..{}", self.token_ids.start, self.token_ids.end),
                limit: "it must not be empty".into(),
            });
        }
        Ok(())
    }

    pub(crate) fn route(&self) -> &'static str {
        match self.api {
            Api::Completions => "/v1/completions",
            Api::Chat => "/v1/chat/completions",
        }
    }

    /// The body of request `index`.
    pub(crate) fn body(&self, index: usize) -> Value {
        // The prefix has a stream of random numbers of its own, so that all requests draw the same.
        let mut prefix = SplitMix64(self.seed);
        let mut own = SplitMix64(self.seed ^ (index as u64 + 1).wrapping_mul(0xd134_2543_de82_ef95));
        let ids = (0..self.input_len).map(|at| {
            let source = if at < self.prefix_len {
                &mut prefix
            } else {
                &mut own
            };
            source.below(&self.token_ids)
        });
        let mut body = json!({
            "model": self.model,
            "temperature": self.temperature,
            "ignore_eos": self.ignore_eos,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        match self.api {
            Api::Completions => {
                body["prompt"] = ids.collect();
                body["max_tokens"] = self.output_len.into();
            }
            Api::Chat => {
                let words: Vec<String> = ids.map(|id| format!("w{id}")).collect();
                body["messages"] = json!([{"role": "user", "content": words.join(" ")}]);
                body["max_completion_tokens"] = self.output_len.into();
            }
        }
        body
    }

    /// Seconds from the start of the run to that of each request.
    pub(crate) fn starts(&self) -> Vec<f64> {
        let Arrivals::Poisson(rate) = self.arrivals else {
            return vec![0.0; self.num_prompts];
        };
        let mut random = SplitMix64(self.seed.wrapping_add(1));
        let mut at = 0.0;
        let gap = |_| {
            let start = at;
            at += -(1.0 - random.unit()).ln() / rate;
            start
        };
        (0..self.num_prompts).map(gap).collect()
    }
}

/// Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014).
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, range: &std::ops::Range<u32>) -> u32 {
        let width = u64::from(range.end - range.start);
        // The high half of a product: without the division of a remainder.
        range.start + ((u128::from(self.next()) * u128::from(width)) >> 64) as u32
    }

    /// In `0.0..1.0`.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload() -> Workload {
        Workload {
            api: Api::Completions,
            model: "m".into(),
            num_prompts: 2000,
            max_concurrency: 4,
            arrivals: Arrivals::Closed,
            input_len: 40,
            prefix_len: 25,
            output_len: 8,
            token_ids: 100..200,
            temperature: 0.0,
            ignore_eos: true,
            seed: 7,
        }
    }

    fn prompt(workload: &Workload, index: usize) -> Vec<u64> {
        let body = workload.body(index);
        let ids = body["prompt"].as_array().unwrap();
        ids.iter().map(|id| id.as_u64().unwrap()).collect()
    }

    #[test]
    fn prompts_share_their_prefix_and_nothing_else() {
        let workload = workload();
        let (first, second) = (prompt(&workload, 0), prompt(&workload, 1));
        assert_eq!(first.len(), 40);
        assert_eq!(first[..25], second[..25]);
        assert_ne!(first[25..], second[25..]);
        assert!(first.iter().all(|id| (100..200).contains(id)));
        assert_eq!(first, prompt(&workload, 0), "equal seeds ask the same");
        let other = Workload { seed: 8, ..workload };
        assert_ne!(first, prompt(&other, 0));
    }

    #[test]
    fn a_poisson_process_has_its_rate() {
        let workload = Workload {
            arrivals: Arrivals::Poisson(50.0),
            ..workload()
        };
        let starts = workload.starts();
        assert_eq!(starts[0], 0.0);
        assert!(starts.is_sorted());
        let rate = 2000.0 / starts.last().unwrap();
        assert!((45.0..55.0).contains(&rate), "{rate}");
    }

    #[test]
    fn numbers_without_sense_are_named() {
        let field = |workload: Workload| workload.check().unwrap_err().field;
        let good = workload();
        assert_eq!(good.check(), Ok(()));
        assert_eq!(
            field(Workload {
                num_prompts: 0,
                ..good.clone()
            }),
            "--num-prompts"
        );
        assert_eq!(
            field(Workload {
                prefix_len: 41,
                ..good.clone()
            }),
            "--random-prefix-len"
        );
        assert_eq!(
            field(Workload {
                token_ids: 5..5,
                ..good.clone()
            }),
            "--random-token-ids"
        );
        let rate = Workload {
            arrivals: Arrivals::Poisson(f64::NAN),
            ..good
        };
        assert_eq!(field(rate), "--request-rate");
    }
}
