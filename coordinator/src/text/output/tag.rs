//! Finds tags in a text that comes in pieces.

/// What a text consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    Text(&'a str),
    Tag(&'static str),
}

/// Cuts text at tags. Holds back what may yet become one, so half a tag is never text.
///
/// All tags begin with the same ASCII character, and no tag has it in any other place: so where a tag ends does not
/// depend on how the text was cut.
#[derive(Debug)]
pub(super) struct TagScanner {
    tags: &'static [&'static str],
    /// A proper beginning of at least one tag, or nothing.
    held: String,
}

impl TagScanner {
    pub(super) fn new(tags: &'static [&'static str]) -> Self {
        debug_assert!(
            tags.iter()
                .all(|tag| tag.matches(&tags[0][..1]).count() == 1 && tag.starts_with(&tags[0][..1]))
        );
        Self {
            tags,
            held: String::new(),
        }
    }

    /// Takes the next text and gives `each` what is certain, in order.
    pub(super) fn push(&mut self, text: &str, mut each: impl FnMut(Piece<'_>)) {
        let first = &self.tags[0][..1];
        let mut rest = text;
        while !rest.is_empty() {
            if self.held.is_empty() {
                let at = rest.find(first).unwrap_or(rest.len());
                let (plain, tail) = rest.split_at(at);
                if !plain.is_empty() {
                    each(Piece::Text(plain));
                }
                let Some(after) = tail.strip_prefix(first) else {
                    return;
                };
                self.held.push_str(first);
                rest = after;
            }
            rest = self.grow(rest, &mut each);
        }
    }

    /// Takes from `rest` what decides about the text held back, or all of it; returns what is left.
    fn grow<'a>(&mut self, rest: &'a str, each: &mut impl FnMut(Piece<'_>)) -> &'a str {
        for (at, char) in rest.char_indices() {
            self.held.push(char);
            let complete = self.tags.iter().find(|tag| **tag == self.held);
            if let Some(tag) = complete {
                self.held.clear();
                each(Piece::Tag(tag));
                return &rest[at + char.len_utf8()..];
            }
            if !self.tags.iter().any(|tag| tag.starts_with(&self.held)) {
                // This character may begin a tag itself.
                self.held.pop();
                each(Piece::Text(&self.held));
                self.held.clear();
                return &rest[at..];
            }
        }
        ""
    }

    /// The text ends here: what was held back is text.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const TAGS: &[&str] = &["<a>", "</a>", "<ab="];

    /// Text between brackets, tags as they are.
    fn cut(pieces: &[String]) -> String {
        let mut scanner = TagScanner::new(TAGS);
        let mut out = String::new();
        let mut text = String::new();
        for piece in pieces {
            scanner.push(piece, |piece| match piece {
                Piece::Text(more) => text.push_str(more),
                Piece::Tag(tag) => {
                    out.push_str(&format!("[{}]{tag}", std::mem::take(&mut text)));
                }
            });
        }
        text.push_str(&scanner.finish());
        format!("{out}[{text}]")
    }

    #[test]
    fn tags_are_found_and_the_rest_is_text() {
        let cut = |text: &str| cut(&[text.to_owned()]);
        assert_eq!(cut("x<a>y</a>z"), "[x]<a>[y]</a>[z]");
        assert_eq!(cut("<<a><ab=<a"), "[<]<a>[]<ab=[<a]");
        assert_eq!(cut("1 < 2 </b> é"), "[1 < 2 </b> é]");
    }

    proptest! {
        #[test]
        fn cuts_do_not_matter(pieces in vec("[<>/ab=é]{0,4}", 0..10)) {
            prop_assert_eq!(cut(&pieces), cut(&[pieces.concat()]));
        }
    }
}
