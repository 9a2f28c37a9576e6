//! Stop strings, found across token borders.

use std::sync::Arc;

use phalanx_proto::{RpcError, limits::MAX_STOP_STRINGS};

/// Most bytes of one stop string.
pub const MAX_STOP_STRING_BYTES: usize = 4096;

/// Watches text for stop strings and holds back what could be the beginning of one.
///
/// The string that is complete first wins, of several that end together the longest; so what stops a text does not
/// depend on how it was cut into tokens. One Knuth-Morris-Pratt automaton per string: a byte costs O(strings),
/// amortized.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    /// All completions of a request share them.
    strings: Arc<[StopString]>,
    /// Bytes of each string that the end of the input matches.
    matched: Vec<usize>,
    include_in_output: bool,
    /// Text that ends in the longest partial match.
    held: String,
}

#[derive(Debug)]
struct StopString {
    text: String,
    /// `failure[i]`: length of the longest proper border of the first `i + 1` bytes.
    failure: Vec<u16>,
}

impl StopMatcher {
    /// Errors: `InvalidArgument` naming `stop` for an empty string, too many or too long ones.
    pub fn new(stop: &[String], include_in_output: bool) -> Result<Self, RpcError> {
        if stop.len() > MAX_STOP_STRINGS {
            let message = format!(
                "stop has {} strings, at most {MAX_STOP_STRINGS} are allowed.",
                stop.len()
            );
            return Err(RpcError::invalid("stop", message));
        }
        let strings = stop.iter().map(|text| StopString::new(text));
        Ok(Self {
            strings: strings.collect::<Result<_, _>>()?,
            matched: vec![0; stop.len()],
            include_in_output,
            held: String::new(),
        })
    }

    /// Whether the output ends with the stop string instead of before it.
    pub fn includes_in_output(&self) -> bool {
        self.include_in_output
    }

    /// Moves `text` to `out`, less what may belong to a stop string. Once a string is complete its text is returned,
    /// `out` ends before it (or after it, if it is to be included), and nothing may be pushed any more. Unless `armed`,
    /// strings that end within `text` do not count.
    pub fn push(&mut self, text: &str, armed: bool, out: &mut String) -> Option<String> {
        if self.strings.is_empty() {
            out.push_str(text);
            return None;
        }
        let before = self.held.len();
        self.held.push_str(text);
        for (at, byte) in text.bytes().enumerate() {
            let mut found: Option<&StopString> = None;
            for (string, matched) in self.strings.iter().zip(&mut self.matched) {
                if string.advance(matched, byte)
                    && armed
                    && found.is_none_or(|other| other.text.len() < string.text.len())
                {
                    found = Some(string);
                }
            }
            if let Some(string) = found {
                let end = before + at + 1;
                let keep = if self.include_in_output {
                    end
                } else {
                    end - string.text.len()
                };
                out.push_str(&self.held[..keep]);
                let text = string.text.clone();
                self.held.clear();
                return Some(text);
            }
        }
        let partial = self.strings.iter().zip(&self.matched);
        let hold = partial.map(|(string, &matched)| string.partial(matched)).max();
        let hold = hold.unwrap_or(0);
        let release = self.held.len() - hold;
        out.push_str(&self.held[..release]);
        self.held.drain(..release);
        None
    }

    /// Appends what was held back: the text ends here, and no stop string with it.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }
}

impl StopString {
    fn new(text: &str) -> Result<Self, RpcError> {
        if text.is_empty() {
            return Err(RpcError::invalid("stop", "stop cannot contain an empty string."));
        }
        if text.len() > MAX_STOP_STRING_BYTES {
            let message = format!(
                "a stop string has {} bytes, at most {MAX_STOP_STRING_BYTES} are allowed.",
                text.len()
            );
            return Err(RpcError::invalid("stop", message));
        }
        let bytes = text.as_bytes();
        let mut failure = vec![0u16; bytes.len()];
        let mut border = 0usize;
        for at in 1..bytes.len() {
            while border > 0 && bytes[at] != bytes[border] {
                border = usize::from(failure[border - 1]);
            }
            border += usize::from(bytes[at] == bytes[border]);
            failure[at] = border as u16;
        }
        Ok(Self {
            text: text.to_owned(),
            failure,
        })
    }

    /// Takes the next byte after `matched` ones; true if it completes the string.
    fn advance(&self, matched: &mut usize, byte: u8) -> bool {
        let bytes = self.text.as_bytes();
        while *matched > 0 && (*matched == bytes.len() || bytes[*matched] != byte) {
            *matched = usize::from(self.failure[*matched - 1]);
        }
        *matched += usize::from(bytes[*matched] == byte);
        *matched == bytes.len()
    }

    /// Bytes at the end of the input that may yet grow into this string. Always whole characters: the input ends with
    /// one, and the string begins with one.
    fn partial(&self, matched: usize) -> usize {
        if matched == self.text.len() {
            return usize::from(self.failure[matched - 1]);
        }
        matched
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    /// Feeds `pieces`; returns the output and the string that stopped it.
    fn run(stop: &[String], include: bool, pieces: &[String]) -> (String, Option<String>) {
        let mut matcher = StopMatcher::new(stop, include).expect("within the limits");
        let mut out = String::new();
        for piece in pieces {
            if let Some(found) = matcher.push(piece, true, &mut out) {
                return (out, Some(found));
            }
            assert!(matcher.held.is_empty() || stop.iter().any(|s| s.starts_with(&matcher.held)));
        }
        matcher.finish(&mut out);
        (out, None)
    }

    /// The definition: the shortest prefix of the text that ends in a stop string, and the longest such string.
    fn naive(stop: &[String], include: bool, text: &str) -> (String, Option<String>) {
        for end in (1..=text.len()).filter(|&end| text.is_char_boundary(end)) {
            let head = &text[..end];
            let found = stop
                .iter()
                .filter(|s| head.ends_with(s.as_str()))
                .max_by_key(|s| s.len());
            if let Some(found) = found {
                let keep = if include { end } else { end - found.len() };
                return (text[..keep].to_owned(), Some(found.clone()));
            }
        }
        (text.to_owned(), None)
    }

    proptest! {
        #[test]
        fn equals_the_definition_however_the_text_is_cut(
            stop in vec("[abé]{1,4}", 0..4),
            pieces in vec("[abcéè]{0,5}", 0..12),
            include: bool,
        ) {
            prop_assert_eq!(run(&stop, include, &pieces), naive(&stop, include, &pieces.concat()));
        }
    }

    #[test]
    fn holds_back_only_what_could_begin_a_stop_string() {
        let mut matcher = StopMatcher::new(&["\n\nUser:".into()], false).expect("valid");
        let mut out = String::new();
        assert_eq!(matcher.push("Hi.\n\nUs", true, &mut out), None);
        assert_eq!(out, "Hi.");
        assert_eq!(matcher.push("ually", true, &mut out), None);
        assert_eq!(out, "Hi.\n\nUsually");
    }

    #[test]
    fn completions_share_the_strings_and_not_the_state() {
        let mut first = StopMatcher::new(&["ab".into()], false).expect("valid");
        let mut second = first.clone();
        assert!(Arc::ptr_eq(&first.strings, &second.strings));
        let mut out = String::new();
        assert_eq!(first.push("a", true, &mut out), None);
        assert_eq!(second.push("b", true, &mut out), None);
        assert_eq!(first.push("b", true, &mut out), Some("ab".into()));
        assert_eq!(out, "b");
    }

    #[test]
    fn strings_that_end_before_min_tokens_do_not_count() {
        let mut matcher = StopMatcher::new(&["ab".into()], false).expect("valid");
        let mut out = String::new();
        assert_eq!(matcher.push("ab a", false, &mut out), None);
        assert_eq!(matcher.push("b", true, &mut out), Some("ab".into()));
        assert_eq!(out, "ab ");
    }

    #[test]
    fn limits_name_the_field() {
        for stop in [
            vec![String::new()],
            vec!["x".repeat(MAX_STOP_STRING_BYTES + 1)],
            vec!["x".to_owned(); 65],
        ] {
            let error = StopMatcher::new(&stop, false).expect_err("over a limit");
            assert_eq!(error.param.as_deref(), Some("stop"));
        }
    }
}
