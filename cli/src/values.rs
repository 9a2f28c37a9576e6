//! Values of flags that are more than a number or a word.

use phalanx_coordinator::config::MaxModelLen;

/// A number of bytes with an optional decimal (k, M, G) or binary (Ki, Mi, Gi) suffix, as vLLM and Kubernetes write it.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let unit: u64 = match suffix.trim_end_matches('B') {
        "" => 1,
        "k" | "K" => 1000,
        "m" | "M" => 1000 * 1000,
        "g" | "G" => 1000 * 1000 * 1000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        _ => return Err(format!("unknown suffix {suffix:?}; use K, M, G, Ki, Mi or Gi")),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| "expected a whole number of bytes".to_owned())?;
    number
        .checked_mul(unit)
        .ok_or_else(|| "more bytes than a 64-bit number holds".to_owned())
}

/// vLLM's forms of a length.
pub(crate) fn parse_max_model_len(text: &str) -> Result<MaxModelLen, String> {
    if text == "auto" || text == "-1" {
        return Ok(MaxModelLen::Auto);
    }
    let (number, unit) = match text.split_at_checked(text.len().saturating_sub(1)) {
        Some((number, "k")) => (number, 1000),
        Some((number, "m")) => (number, 1_000_000),
        Some((number, "K")) => (number, 1 << 10),
        Some((number, "M")) => (number, 1 << 20),
        _ => (text, 1),
    };
    let number: usize = number
        .parse()
        .map_err(|_| "expected a number of tokens, auto or -1".to_owned())?;
    let tokens = number
        .checked_mul(unit)
        .ok_or("more tokens than a 64-bit number holds")?;
    Ok(MaxModelLen::Tokens(tokens))
}

/// A part of a whole that leaves something: 0 or more, below 1.
pub(crate) fn parse_watermark(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(part) if (0.0..1.0).contains(&part) => Ok(part),
        Ok(part) => Err(format!("{part} is not 0 or more and below 1")),
        Err(error) => Err(error.to_string()),
    }
}

/// A part of a whole: above 0, at most 1.
pub(crate) fn parse_utilization(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(part) if part > 0.0 && part <= 1.0 => Ok(part),
        Ok(part) => Err(format!("{part} is not above 0 and at most 1")),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn utilization_is_a_part() {
        assert_eq!(parse_utilization("0.9"), Ok(0.9));
        assert_eq!(parse_utilization("1"), Ok(1.0));
        for wrong in ["0", "-0.5", "1.01", "NaN", "90%"] {
            assert!(parse_utilization(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn lengths_as_vllm_writes_them() {
        for auto in ["auto", "-1"] {
            assert_eq!(parse_max_model_len(auto), Ok(MaxModelLen::Auto));
        }
        for (text, tokens) in [("4096", 4096), ("32k", 32_000), ("32K", 32_768), ("1M", 1 << 20)] {
            assert_eq!(
                parse_max_model_len(text),
                Ok(MaxModelLen::Tokens(tokens)),
                "{text}"
            );
        }
        for wrong in ["", "k", "-2", "many", "1G", "99999999999999999M"] {
            assert!(parse_max_model_len(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_watermark_leaves_something() {
        assert_eq!(parse_watermark("0"), Ok(0.0));
        for wrong in ["1", "-0.1", "NaN", "much"] {
            assert!(parse_watermark(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn byte_suffixes() {
        assert_eq!(parse_bytes("123"), Ok(123));
        assert_eq!(parse_bytes("2Gi"), Ok(2 << 30));
        assert_eq!(parse_bytes("64MiB"), Ok(64 << 20));
        assert_eq!(parse_bytes("3G"), Ok(3_000_000_000));
        assert!(parse_bytes("-1").is_err() && parse_bytes("1T").is_err() && parse_bytes("").is_err());
        assert!(parse_bytes("99999999999999Gi").is_err());
    }
}
