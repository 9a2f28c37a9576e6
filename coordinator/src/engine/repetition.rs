//! Output that goes round in circles, which nobody wants the rest of.

/// Output ends as soon as it ends with some pattern so many times in a row; vLLM's `repetition_detection`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RepetitionDetection {
    /// Tokens of the shortest pattern looked for, at least 1.
    pub min_pattern_size: u32,
    /// Tokens of the longest one, at least those of the shortest.
    pub max_pattern_size: u32,
    /// At least 2.
    pub min_count: u32,
}

impl RepetitionDetection {
    /// Tokens at the end that equal those a pattern of `size` before them, if the pattern stands there often enough.
    fn repeated(self, size: usize) -> usize {
        size.saturating_mul(self.min_count as usize - 1)
    }

    /// Whether `output` ends with such a pattern.
    pub(super) fn is_at_end_of(self, output: &[u32]) -> bool {
        let repeats = |size: u32| {
            let size = size as usize;
            let Some(first) = output.len().checked_sub(self.repeated(size)) else {
                return false;
            };
            let before = first.checked_sub(size);
            before.is_some_and(|before| output[first..] == output[before..output.len() - size])
        };
        (self.min_pattern_size..=self.max_pattern_size).any(repeats)
    }
}

/// Says the same of output that grows by a token at a time. What a token costs depends on the number of sizes alone,
/// whatever the output looks like.
pub(super) struct RepetitionDetector {
    rule: RepetitionDetection,
    /// For each size, how many tokens at the end equal those so far before them.
    runs: Vec<u32>,
}

impl RepetitionDetector {
    pub(super) fn new(rule: RepetitionDetection) -> Self {
        let num_sizes = rule.max_pattern_size - rule.min_pattern_size + 1;
        Self {
            rule,
            runs: vec![0; num_sizes as usize],
        }
    }

    /// Whether `output`, whose last token is new, ends with a pattern that is to end it.
    pub(super) fn push(&mut self, output: &[u32]) -> bool {
        let Some((last, before)) = output.split_last() else {
            return false;
        };
        let mut found = false;
        for (size, run) in (self.rule.min_pattern_size as usize..).zip(&mut self.runs) {
            let other = before.len().checked_sub(size).map(|at| &output[at]);
            *run = if other == Some(last) { *run + 1 } else { 0 };
            found |= *run as usize >= self.rule.repeated(size);
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::{super::sim::Prng, *};

    fn rule(min_pattern_size: u32, max_pattern_size: u32, min_count: u32) -> RepetitionDetection {
        RepetitionDetection {
            min_pattern_size,
            max_pattern_size,
            min_count,
        }
    }

    #[test]
    fn a_pattern_ends_where_it_has_stood_often_enough() {
        let thrice = rule(2, 3, 3);
        for (output, ends) in [
            (&[][..], false),
            (&[1, 2, 1, 2, 1], false),
            (&[1, 2, 1, 2, 1, 2], true),
            (&[9, 1, 2, 1, 2, 1, 2], true),
            (&[1, 2, 1, 2, 1, 2, 9], false),
            (&[1, 2, 3, 1, 2, 3, 1, 2, 3], true),
            // A pattern of one token is one of two as well, once it is there six times.
            (&[7, 7, 7, 7, 7], false),
            (&[7, 7, 7, 7, 7, 7], true),
            // One of four is too long.
            (&[1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4], false),
        ] {
            assert_eq!(thrice.is_at_end_of(output), ends, "{output:?}");
        }
        assert!(rule(1, 1, 2).is_at_end_of(&[5, 5]) && !rule(1, 1, 2).is_at_end_of(&[5]));
    }

    #[test]
    fn growing_output_is_judged_as_whole_output_is() {
        let mut found = 0;
        for seed in 0..200 {
            let mut prng = Prng(seed);
            let shortest = prng.range(1, 4);
            let rule = rule(shortest, shortest + prng.range(0, 4), prng.range(2, 4));
            let mut detector = RepetitionDetector::new(rule);
            let mut output = Vec::new();
            for _ in 0..60 {
                output.push(prng.below(2) as u32);
                let ends = detector.push(&output);
                assert_eq!(ends, rule.is_at_end_of(&output), "{rule:?} {output:?}");
                found += u32::from(ends);
            }
        }
        assert!(found > 1000, "{found}");
    }
}
