//! Every bound the gateway puts on what a client may send.
//!
//! Values the coordinator judges with more knowledge (context length, sampling ranges, number of alternatives) are not
//! repeated here; those that both check are in `phalanx_proto::limits`.

use std::time::Duration;

/// Prompts in one completions request; each becomes a gRPC request of its own.
pub(crate) const MAX_PROMPTS: usize = 128;
/// Prompts times completions: what one HTTP request may have running at once.
pub(crate) const MAX_CHOICES: usize = 256;
/// Ids in one request to abort others.
pub(crate) const MAX_ABORTED: usize = 1024;
/// Bytes of a client's `X-Request-Id`; a longer one is replaced, as it ends up in every log line.
pub(crate) const MAX_REQUEST_ID: usize = 128;

/// Header lines of one HTTP request; more are answered 431.
pub(crate) const MAX_HEADERS: usize = 100;
/// Bytes of one HTTP request's head (431 beyond), and of hyper's read buffer.
pub(crate) const MAX_HEAD_BYTES: usize = 64 << 10;

/// Bytes of one gRPC reply. The largest is a unary reply with many choices and their logprobs.
pub(crate) const MAX_REPLY_BYTES: usize = 64 << 20;
/// Deadline of the `Admin` calls and of the model list. The coordinator answers them without asking its ranks, so
/// one that takes longer is not well.
pub(crate) const ADMIN_DEADLINE: Duration = Duration::from_secs(2);

/// Bounds of the HTTP server that an operator may want to move.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpLimits {
    /// Bytes of a request body; more is answered 413.
    ///
    /// The default is tonic's default limit for one gRPC message. The protobuf form of a request is never much larger
    /// than its JSON, so what passes here fits there.
    pub body_bytes: usize,
    /// Connections open at once; further ones wait in the kernel's accept queue.
    pub connections: usize,
    /// Prompts running at once; more are answered 429. The coordinator allows 1024 streams on one gRPC connection, and
    /// what exceeds them would wait unseen inside the client library.
    pub running_prompts: usize,
    /// Time for a request's head to arrive, and for an idle connection to send its next request. Longer than the 5 s
    /// for which common clients reuse an idle connection: closing first would race with their next request.
    pub header_timeout: Duration,
    /// Time for a whole request body to arrive.
    pub body_timeout: Duration,
    /// Time for which a client may accept no byte of a reply before its connection is cut.
    pub write_stall_timeout: Duration,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            body_bytes: 4 << 20,
            connections: 4096,
            running_prompts: 1024,
            header_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(60),
            write_stall_timeout: Duration::from_secs(60),
        }
    }
}
