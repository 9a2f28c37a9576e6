//! JSON calls that are the whole message, or all of it after `<|python_tag|>`.

use super::{
    super::tag::{Piece, TagScanner},
    Sink,
    call::CallList,
};

pub(super) const PYTHON_TAG: &str = "<|python_tag|>";
pub(super) const TAGS: &[&str] = &[PYTHON_TAG];

#[derive(Debug)]
pub(super) struct Llama {
    scanner: TagScanner,
    /// None once the message has turned out to be text.
    list: Option<CallList>,
}

impl Llama {
    pub(super) fn new() -> Self {
        Self {
            scanner: TagScanner::new(TAGS),
            list: Some(CallList::new("", false)),
        }
    }

    pub(super) fn push(&mut self, text: &str, sink: &mut Sink<'_>) {
        let list = &mut self.list;
        self.scanner.push(text, |piece| match piece {
            Piece::Text(text) => take(list, text, sink),
            Piece::Tag(tag) => {
                if let Some(before) = list.replace(CallList::new(tag, false)) {
                    sink.content(&before.into_raw());
                }
            }
        });
    }

    pub(super) fn finish(&mut self, sink: &mut Sink<'_>) {
        let held = self.scanner.finish();
        take(&mut self.list, &held, sink);
        if let Some(list) = self.list.take() {
            sink.content(&list.into_raw());
        }
    }
}

fn take(list: &mut Option<CallList>, text: &str, sink: &mut Sink<'_>) {
    let Some(calls) = list else {
        return sink.content(text);
    };
    let Some(rest) = calls.push(text, sink) else {
        return;
    };
    if let Some(calls) = list.take() {
        sink.content(&calls.into_raw());
    }
    sink.content(rest);
}
