//! Server-sent events, cut out of a body as it arrives.

/// More than any event of a token has. A server that sends more in one line is not measured, it is broken.
const MAX_LINE: usize = 4 << 20;

/// Collects the `data:` lines of a stream.
#[derive(Debug, Default)]
pub(crate) struct Events {
    buffer: Vec<u8>,
    /// Where the next line starts.
    start: usize,
    /// What has been searched for the end of that line.
    searched: usize,
}

/// A line that does not end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct TooLong;

impl Events {
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<(), TooLong> {
        self.buffer.drain(..self.start);
        self.searched -= self.start;
        self.start = 0;
        if self.buffer.len() + bytes.len() > MAX_LINE {
            return Err(TooLong);
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// The value of the next `data:` line that has arrived whole.
    pub(crate) fn next(&mut self) -> Option<&[u8]> {
        loop {
            let found = self.buffer[self.searched..]
                .iter()
                .position(|&byte| byte == b'\n');
            let Some(end) = found.map(|at| self.searched + at) else {
                self.searched = self.buffer.len();
                return None;
            };
            let line = self.start..end;
            self.start = end + 1;
            self.searched = self.start;
            if self.buffer[line.clone()].starts_with(b"data:") {
                return Some(
                    self.buffer[line]
                        .strip_prefix(b"data:")
                        .unwrap_or_default()
                        .trim_ascii(),
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_the_same_wherever_the_body_is_cut() {
        let body = b": hello\n\ndata: {\"a\":1}\r\n\r\nevent: x\ndata:b\n\ndata: [DONE]\n\n";
        for size in 1..body.len() {
            let mut events = Events::default();
            let mut seen = Vec::new();
            for piece in body.chunks(size) {
                events.push(piece).unwrap();
                while let Some(data) = events.next() {
                    seen.push(String::from_utf8(data.to_vec()).unwrap());
                }
            }
            assert_eq!(seen, ["{\"a\":1}", "b", "[DONE]"], "pieces of {size}");
        }
    }

    #[test]
    fn a_line_without_end_is_refused() {
        let mut events = Events::default();
        let piece = vec![b'x'; MAX_LINE / 2];
        assert_eq!(events.push(&piece), Ok(()));
        assert_eq!(events.next(), None);
        assert_eq!(events.push(&piece), Ok(()));
        assert_eq!(events.push(b"x"), Err(TooLong));
    }
}
