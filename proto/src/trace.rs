//! A profile that a person can read: spans in Chrome's Trace Event Format, which Perfetto and chrome://tracing open.
//!
//! All processes of a host append to one file, whole lines at a time. The format lets an array lack its end, so nobody
//! has to be the last. Times are of the host's monotonic clock, which all processes share.

use std::{
    fmt::Write as _,
    fs::{File, OpenOptions},
    io::{self, Write as _},
    path::Path,
};

use rustix::time::{ClockId, clock_gettime};

/// A moment of the host's monotonic clock, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(u64);

impl Moment {
    pub fn now() -> Self {
        let time = clock_gettime(ClockId::Monotonic);
        Self(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
    }
}

/// Something that took a while. Spans of one process that lie within each other are drawn so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub name: &'static str,
    pub start: Moment,
    pub end: Moment,
    /// Names and values shown with it; unnamed ones are not.
    pub numbers: [(&'static str, u64); 3],
}

/// One process's way into the file.
#[derive(Debug)]
pub struct TraceFile {
    file: File,
    /// The row of the drawing that its spans are in.
    process: u32,
    lines: String,
}

impl TraceFile {
    /// Begins a file, over what was there.
    pub fn create(path: &Path) -> io::Result<()> {
        File::create(path)?.write_all(b"[\n")
    }

    /// Appends to a file that was begun. `name` is what the row is called.
    pub fn open(path: &Path, process: u32, name: &str) -> io::Result<Self> {
        let mut trace = Self {
            file: OpenOptions::new().append(true).open(path)?,
            process,
            lines: String::new(),
        };
        // Cannot fail: it is a string. The same holds below.
        let _ = writeln!(
            trace.lines,
            r#"{{"ph":"M","pid":{process},"tid":0,"name":"process_name","args":{{"name":"{name}"}}}},"#
        );
        trace.flush()?;
        Ok(trace)
    }

    /// Keeps a span until the next [`Self::flush`].
    pub fn push(&mut self, span: &Span) {
        let micros = |nanos: u64| (nanos / 1000, nanos % 1000);
        let (start, duration) = (
            micros(span.start.0),
            micros(span.end.0.saturating_sub(span.start.0)),
        );
        let _ = write!(
            self.lines,
            r#"{{"ph":"X","pid":{},"tid":0,"name":"{}","ts":{}.{:03},"dur":{}.{:03},"args":{{"#,
            self.process, span.name, start.0, start.1, duration.0, duration.1
        );
        let named = span.numbers.iter().filter(|(name, _)| !name.is_empty());
        for (i, (name, value)) in named.enumerate() {
            let comma = if i == 0 { "" } else { "," };
            let _ = write!(self.lines, r#"{comma}"{name}":{value}"#);
        }
        self.lines.push_str("}},\n");
    }

    /// Appends all spans that were kept, in one write: lines of several processes do not mix.
    pub fn flush(&mut self) -> io::Result<()> {
        let written = self.file.write_all(self.lines.as_bytes());
        self.lines.clear();
        written
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_append_to_one_file() {
        let path = std::env::temp_dir().join(format!("phalanx-trace-{}.json", std::process::id()));
        TraceFile::create(&path).unwrap();
        let mut first = TraceFile::open(&path, 0, "engine").unwrap();
        let mut second = TraceFile::open(&path, 1, "rank 0").unwrap();
        let span = |name, start, end, numbers| Span {
            name,
            start: Moment(start),
            end: Moment(end),
            numbers,
        };
        second.push(&span(
            "step",
            1_002_003,
            2_000_000,
            [("rows", 4), ("tokens", 9), ("", 0)],
        ));
        second.flush().unwrap();
        first.push(&span("schedule", 5, 5, [("", 0); 3]));
        first.flush().unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let expected = r#"[
{"ph":"M","pid":0,"tid":0,"name":"process_name","args":{"name":"engine"}},
{"ph":"M","pid":1,"tid":0,"name":"process_name","args":{"name":"rank 0"}},
{"ph":"X","pid":1,"tid":0,"name":"step","ts":1002.003,"dur":997.997,"args":{"rows":4,"tokens":9}},
{"ph":"X","pid":0,"tid":0,"name":"schedule","ts":0.005,"dur":0.000,"args":{}},
"#;
        assert_eq!(text, expected);
    }

    #[test]
    fn a_file_that_nobody_began_is_not_made() {
        assert!(TraceFile::open(Path::new("/nonexistent/trace.json"), 0, "engine").is_err());
    }
}
