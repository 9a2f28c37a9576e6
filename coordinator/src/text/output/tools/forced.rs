//! Calls that the model had to make: its whole text is the JSON that the constraint left it.

use super::{super::super::tools::ToolChoice, Sink, call::CallList};

#[derive(Debug)]
pub(super) enum Forced {
    /// The arguments of this function; `begun` once there are any.
    Named { name: String, begun: bool },
    /// A list of calls; none once the text is no such list any more.
    Required(Option<CallList>),
}

impl Forced {
    /// None where the model may speak.
    pub(super) fn new(choice: &ToolChoice) -> Option<Self> {
        match choice {
            ToolChoice::Named(name) => Some(Self::Named {
                name: name.clone(),
                begun: false,
            }),
            ToolChoice::Required => Some(Self::Required(Some(CallList::new("", true)))),
            ToolChoice::None | ToolChoice::Auto => None,
        }
    }

    pub(super) fn push(&mut self, text: &str, sink: &mut Sink<'_>) {
        match self {
            Self::Named { name, begun } => {
                if text.is_empty() {
                    return;
                }
                if !std::mem::replace(begun, true) {
                    sink.begin(name);
                }
                sink.arguments(text);
            }
            Self::Required(Some(list)) => {
                let Some(rest) = list.push(text, sink) else { return };
                self.finish(sink);
                sink.content(rest);
            }
            Self::Required(None) => sink.content(text),
        }
    }

    pub(super) fn finish(&mut self, sink: &mut Sink<'_>) {
        if let Self::Required(list) = self
            && let Some(list) = list.take()
        {
            sink.content(&list.into_raw());
        }
    }
}
