//! Looks for the marks of reasoning, which may be one token or several.

/// Looks for a mark in bytes as they come.
#[derive(Clone, Copy, Debug)]
pub(super) struct MarkFinder {
    /// Its first byte occurs nowhere else in it.
    mark: &'static [u8],
    /// As much of it as the bytes end with.
    matched: usize,
}

impl MarkFinder {
    pub(super) fn new(mark: &'static str) -> Self {
        let mark = mark.as_bytes();
        debug_assert!(
            !mark[1..].contains(&mark[0]),
            "a mark that cannot begin within itself"
        );
        Self { mark, matched: 0 }
    }

    /// Whether the mark ends with `byte`.
    pub(super) fn push(&mut self, byte: u8) -> bool {
        self.matched = match byte {
            _ if byte == self.mark[self.matched] => self.matched + 1,
            _ if byte == self.mark[0] => 1,
            _ => 0,
        };
        let found = self.matched == self.mark.len();
        if found {
            self.matched = 0;
        }
        found
    }

    /// What of the mark is still to come.
    pub(super) fn missing(&self) -> &'static [u8] {
        &self.mark[self.matched..]
    }

    /// The mark has begun.
    pub(super) fn has_begun(&self) -> bool {
        self.matched > 0
    }
}
