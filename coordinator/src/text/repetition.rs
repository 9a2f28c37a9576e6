//! Repetition that a request wants to end at.

use phalanx_proto::{
    RpcError,
    limits::{MAX_PATTERN_COUNT, MAX_PATTERN_SIZE},
    v1,
};

use crate::engine::RepetitionDetection;

const PARAM: &str = "repetition_detection";

/// The rule for the engine; none for one that looks for no pattern. Errors: `InvalidArgument` naming field, value and
/// limit.
pub(super) fn detection(
    given: Option<v1::RepetitionDetection>,
) -> Result<Option<RepetitionDetection>, RpcError> {
    let Some(given) = given else { return Ok(None) };
    let v1::RepetitionDetection {
        max_pattern_size,
        min_pattern_size,
        min_count,
    } = given;
    let refused = |field: &str, rule: String, value: u32| {
        let param = format!("{PARAM}.{field}");
        let message = format!("{param} must be {rule}, got {value}.");
        Err(RpcError::invalid(&param, message))
    };
    if max_pattern_size > MAX_PATTERN_SIZE {
        let rule = format!("at most {MAX_PATTERN_SIZE}");
        return refused("max_pattern_size", rule, max_pattern_size);
    }
    if min_pattern_size > max_pattern_size {
        let rule = format!("at most max_pattern_size={max_pattern_size}");
        return refused("min_pattern_size", rule, min_pattern_size);
    }
    if max_pattern_size == 0 {
        return Ok(None);
    }
    if !(2..=MAX_PATTERN_COUNT).contains(&min_count) {
        return refused("min_count", format!("2 to {MAX_PATTERN_COUNT}"), min_count);
    }
    Ok(Some(RepetitionDetection {
        min_pattern_size: min_pattern_size.max(1),
        max_pattern_size,
        min_count,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(max: u32, min: u32, count: u32) -> Option<v1::RepetitionDetection> {
        Some(v1::RepetitionDetection {
            max_pattern_size: max,
            min_pattern_size: min,
            min_count: count,
        })
    }

    #[test]
    fn no_pattern_is_no_rule_and_the_shortest_has_a_token() {
        assert_eq!(detection(None), Ok(None));
        assert_eq!(detection(given(0, 0, 0)), Ok(None));
        let rule = detection(given(512, 0, 1024))
            .expect("within limits")
            .expect("a rule");
        assert_eq!(
            (rule.min_pattern_size, rule.max_pattern_size, rule.min_count),
            (1, 512, 1024)
        );
    }

    #[test]
    fn what_is_out_of_range_is_named() {
        for (given, field) in [
            (given(513, 0, 2), "max_pattern_size"),
            (given(u32::MAX, u32::MAX, u32::MAX), "max_pattern_size"),
            (given(3, 4, 2), "min_pattern_size"),
            (given(0, 1, 2), "min_pattern_size"),
            (given(3, 1, 1), "min_count"),
            (given(3, 1, 1025), "min_count"),
        ] {
            let error = detection(given).expect_err(field);
            assert_eq!(error.param, Some(format!("repetition_detection.{field}")));
        }
    }
}
