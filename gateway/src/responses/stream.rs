//! A response as a stream of named, numbered events.

use phalanx_proto::{RpcError, v1};

use super::{draft::Draft, events::Wire, store::Keeper};
use crate::openai::{
    reply::Head,
    sse::{Events, Piece},
};

pub(super) struct ResponseEvents {
    draft: Draft,
    /// Number of the next event.
    next: u64,
    keeper: Option<Keeper>,
}

impl ResponseEvents {
    pub(super) fn new(draft: Draft, keeper: Option<Keeper>) -> Self {
        Self {
            draft,
            next: 0,
            keeper,
        }
    }
}

impl Events for ResponseEvents {
    fn piece(&mut self, out: &mut Vec<u8>, head: &Head, piece: Piece<'_>) -> Result<(), RpcError> {
        let next = &mut self.next;
        let mut wire = Wire { out, next };
        self.draft.begin(&mut wire, &head.model);
        self.draft.piece(&mut wire, piece.choice)
    }

    fn usage(&mut self, _: &mut Vec<u8>, _: &Head, usage: v1::Usage) {
        self.draft.count(usage);
    }

    fn fail(&mut self, out: &mut Vec<u8>, error: RpcError) {
        let next = &mut self.next;
        self.draft.fail(&mut Wire { out, next }, &error);
    }

    fn end(&mut self, out: &mut Vec<u8>) {
        let next = &mut self.next;
        let mut wire = Wire { out, next };
        if let Err(error) = self.draft.end(&mut wire) {
            self.draft.fail(&mut wire, &error);
        }
        if let Some(keeper) = self.keeper.take() {
            keeper.keep(self.draft.reply.clone());
        }
    }
}
