//! JSON calls between tags, with text around them.

use super::{
    super::tag::{Piece, TagScanner},
    Sink,
    call::CallList,
};

pub(super) const OPEN: &str = "<tool_call>";
pub(super) const CLOSE: &str = "</tool_call>";
pub(super) const TAGS: &[&str] = &[OPEN, CLOSE];

#[derive(Debug)]
pub(super) struct Hermes {
    scanner: TagScanner,
    tagged: Option<Tagged>,
}

impl Hermes {
    pub(super) fn new() -> Self {
        Self {
            scanner: TagScanner::new(TAGS),
            tagged: None,
        }
    }

    pub(super) fn push(&mut self, text: &str, sink: &mut Sink<'_>) {
        let tagged = &mut self.tagged;
        self.scanner.push(text, |piece| take(tagged, piece, sink));
    }

    pub(super) fn finish(&mut self, sink: &mut Sink<'_>) {
        let held = self.scanner.finish();
        take(&mut self.tagged, Piece::Text(&held), sink);
        if let Some(tagged) = self.tagged.take() {
            tagged.end("", sink);
        }
    }
}

fn take(tagged: &mut Option<Tagged>, piece: Piece<'_>, sink: &mut Sink<'_>) {
    match (piece, tagged.as_mut()) {
        (Piece::Text(text), Some(inside)) => {
            if !inside.push(text, sink) {
                *tagged = None;
            }
        }
        (Piece::Tag(OPEN), _) => {
            // A model that forgets to close a call has ended it all the same.
            if let Some(unclosed) = tagged.replace(Tagged::new(OPEN)) {
                unclosed.end("", sink);
            }
        }
        (Piece::Tag(tag), Some(_)) => {
            if let Some(inside) = tagged.take() {
                inside.end(tag, sink);
            }
        }
        (Piece::Text(text) | Piece::Tag(text), None) => sink.content(text),
    }
}

/// JSON calls after an opening tag.
#[derive(Debug)]
pub(super) enum Tagged {
    Calls(CallList),
    /// What a model says after a call and before the closing tag; nobody is told.
    Ignored,
}

impl Tagged {
    pub(super) fn new(tag: &str) -> Self {
        Self::Calls(CallList::new(tag, true))
    }

    /// False if these are no calls: the text has been told as content.
    pub(super) fn push(&mut self, text: &str, sink: &mut Sink<'_>) -> bool {
        let Self::Calls(list) = self else { return true };
        let Some(rest) = list.push(text, sink) else {
            return true;
        };
        let Self::Calls(list) = std::mem::replace(self, Self::Ignored) else {
            return true;
        };
        if list.has_called() {
            return true;
        }
        sink.content(&list.into_raw());
        sink.content(rest);
        false
    }

    /// The closing tag, or the text's end.
    pub(super) fn end(self, tag: &str, sink: &mut Sink<'_>) {
        match self {
            Self::Calls(list) if !list.has_called() => {
                sink.content(&list.into_raw());
                sink.content(tag);
            }
            Self::Calls(_) | Self::Ignored => {}
        }
    }
}
