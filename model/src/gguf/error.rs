//! What is wrong with a GGUF header, and where.

use std::fmt;

use crate::TensorFormat;

/// A defect of a GGUF file: at which byte, in which key or tensor, and what.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{site} (byte {offset}): {problem}")]
pub struct GgufError {
    pub site: GgufSite,
    /// From the start of the file.
    pub offset: u64,
    pub problem: GgufProblem,
}

/// The part of the header that was being read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GgufSite {
    Header,
    Key(String),
    Tensor(String),
}

impl fmt::Display for GgufSite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header => f.write_str("GGUF header"),
            Self::Key(key) => write!(f, "GGUF key `{}`", Shortened(key)),
            Self::Tensor(name) => write!(f, "GGUF tensor `{}`", Shortened(name)),
        }
    }
}

/// A name from the file, cut to what fits a line of a log.
struct Shortened<'a>(&'a str);

impl fmt::Display for Shortened<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const LIMIT: usize = 96;
        let cut = self.0.floor_char_boundary(LIMIT);
        write!(f, "{}", self.0[..cut].escape_debug())?;
        if cut < self.0.len() {
            f.write_str("…")
        } else {
            Ok(())
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GgufProblem {
    #[error("not a GGUF file: it starts with {0:02x?}, not with `GGUF`")]
    Magic([u8; 4]),
    #[error("version {0}; versions 2 and 3 are supported")]
    Version(u32),
    #[error("big-endian; only little-endian files are supported")]
    BigEndian,
    #[error("{what} needs {needed} bytes, the file has {available} left")]
    Truncated {
        what: &'static str,
        needed: u64,
        available: u64,
    },
    #[error("{count} {what}, limit {limit}")]
    TooMany {
        what: &'static str,
        count: u64,
        limit: u64,
    },
    #[error("{0} is not valid UTF-8")]
    NotUtf8(&'static str),
    #[error("the name is empty")]
    EmptyName,
    #[error("value type {0} is unknown")]
    UnknownValueType(u32),
    #[error("arrays nest deeper than {0}")]
    NestedTooDeep(usize),
    #[error("a boolean is {0}")]
    NotBoolean(u8),
    #[error("it appears twice")]
    Duplicate,
    #[error("alignment {0} is not a power of two up to {limit}", limit = super::MAX_ALIGNMENT)]
    Alignment(u64),
    #[error("{0} dimensions; 1 to 4 are allowed")]
    DimensionCount(u32),
    #[error("a dimension is zero")]
    ZeroDimension,
    #[error("the dimensions' product overflows")]
    SizeOverflow,
    #[error("a row of {row} elements is not a multiple of the {block} elements of a {format} block")]
    CutBlock {
        row: u64,
        block: usize,
        format: TensorFormat,
    },
    #[error("data offset {offset} is not a multiple of the alignment {alignment}")]
    Misaligned { offset: u64, alignment: usize },
    #[error("{bytes} bytes of data at byte {start} lie outside the file of {file} bytes")]
    OutsideFile { start: u64, bytes: u64, file: u64 },
    #[error("is {found}, expected {expected}")]
    WrongType {
        expected: &'static str,
        found: &'static str,
    },
}
