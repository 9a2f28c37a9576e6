//! W3C Trace Context, version 00 (<https://www.w3.org/TR/trace-context/>).

use std::fmt;

use crate::secret::random;

/// Header and gRPC metadata key.
pub const TRACEPARENT: &str = "traceparent";

/// A span's identity. Neither id is ever all zeros.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TraceContext {
    pub trace_id: [u8; 16],
    pub span_id: [u8; 8],
    /// Whether anybody wants the trace's spans.
    pub sampled: bool,
}

impl TraceContext {
    /// The first span of a trace of its own, which is wanted.
    pub fn root() -> Self {
        Self {
            trace_id: nonzero(random()),
            span_id: nonzero(random()),
            sampled: true,
        }
    }

    /// A span below this one.
    pub fn child(&self) -> Self {
        Self {
            span_id: nonzero(random()),
            ..*self
        }
    }

    /// A span below `parent`, or the first of a trace where there is none.
    pub fn below(parent: Option<&Self>) -> Self {
        parent.map_or_else(Self::root, Self::child)
    }

    /// Reads a `traceparent`. None for anything that is not one: a caller's mistake in it must not cost the reply.
    pub fn parse(header: &str) -> Option<Self> {
        let mut fields = header.trim().split('-');
        let (version, trace_id, span_id, flags) =
            (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        let [version] = hex(version)?;
        // Later versions may have more fields; version ff never is one.
        if version == 0xff || (version == 0 && fields.next().is_some()) {
            return None;
        }
        let [flags] = hex(flags)?;
        let context = Self {
            trace_id: hex(trace_id)?,
            span_id: hex(span_id)?,
            sampled: flags & 1 == 1,
        };
        (context.trace_id != [0; 16] && context.span_id != [0; 8]).then_some(context)
    }
}

/// As a `traceparent`.
impl fmt::Display for TraceContext {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("00-")?;
        self.trace_id
            .iter()
            .try_for_each(|byte| write!(out, "{byte:02x}"))?;
        out.write_str("-")?;
        self.span_id
            .iter()
            .try_for_each(|byte| write!(out, "{byte:02x}"))?;
        write!(out, "-{:02x}", u8::from(self.sampled))
    }
}

impl fmt::Debug for TraceContext {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "TraceContext({self})")
    }
}

fn nonzero<const N: usize>(mut id: [u8; N]) -> [u8; N] {
    if id == [0; N] {
        id[N - 1] = 1;
    }
    id
}

/// Exactly `N` bytes in lower-case hexadecimal.
fn hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digit = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let text = text.as_bytes();
    if text.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_header_survives() {
        let context = TraceContext::parse(HEADER).expect("valid");
        assert_eq!(context.to_string(), HEADER);
        assert!(context.sampled && context.trace_id[0] == 0x4b && context.span_id[7] == 0xb7);
        let child = context.child();
        assert_eq!(child.trace_id, context.trace_id);
        assert_ne!(child.span_id, context.span_id);
        let (a, b) = (TraceContext::root(), TraceContext::root());
        assert!(a != b && TraceContext::parse(&a.to_string()) == Some(a));
    }

    #[test]
    fn what_is_no_header_is_none() {
        for wrong in [
            "",
            "00",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
            "00-é-00f067aa0ba902b7-01",
        ] {
            assert_eq!(TraceContext::parse(wrong), None, "{wrong}");
        }
        assert!(TraceContext::parse("01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00-new").is_some());
    }
}
