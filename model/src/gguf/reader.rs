//! A bounds-checked walk over the bytes of a header.

use super::{
    GgufError, GgufProblem, GgufSite,
    value::{Array, Value, ValueType},
};

/// Deepest nesting of arrays. No known writer nests at all.
const MAX_ARRAY_DEPTH: usize = 4;
/// Longest key or tensor name, as the specification has it for keys.
const MAX_NAME_BYTES: u64 = 65_535;

pub(crate) type Result<T> = std::result::Result<T, GgufError>;

/// What errors are to be blamed on.
#[derive(Clone, Copy)]
pub(super) enum Subject<'a> {
    Header,
    Key(&'a str),
    Tensor(&'a str),
}

/// A position in the file. Nothing is allocated on the way; lengths are compared with what is left before use.
#[derive(Clone)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    pub(super) subject: Subject<'a>,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8], at: usize) -> Self {
        Self {
            bytes,
            at,
            subject: Subject::Header,
        }
    }

    pub(super) fn position(&self) -> usize {
        self.at
    }

    pub(super) fn remaining(&self) -> usize {
        self.bytes.len().saturating_sub(self.at)
    }

    /// An error at the cursor's position.
    pub(super) fn error(&self, problem: GgufProblem) -> GgufError {
        let site = match self.subject {
            Subject::Header => GgufSite::Header,
            Subject::Key(key) => GgufSite::Key(key.to_owned()),
            Subject::Tensor(name) => GgufSite::Tensor(name.to_owned()),
        };
        GgufError {
            site,
            offset: self.at as u64,
            problem,
        }
    }

    pub(super) fn take(&mut self, len: u64, what: &'static str) -> Result<&'a [u8]> {
        let available = self.remaining();
        let taken = usize::try_from(len)
            .ok()
            .filter(|&len| len <= available)
            .and_then(|len| self.bytes.get(self.at..self.at + len));
        let Some(taken) = taken else {
            return Err(self.error(GgufProblem::Truncated {
                what,
                needed: len,
                available: available as u64,
            }));
        };
        self.at += taken.len();
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N]> {
        let bytes = self.take(N as u64, what)?;
        let mut array = [0; N];
        array.copy_from_slice(bytes);
        Ok(array)
    }

    pub(super) fn u32(&mut self, what: &'static str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: &'static str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    pub(super) fn string(&mut self, what: &'static str) -> Result<&'a str> {
        let start = self.clone();
        let len = self.u64(what)?;
        let bytes = self.take(len, what)?;
        std::str::from_utf8(bytes).map_err(|_| start.error(GgufProblem::NotUtf8(what)))
    }

    /// A key or a tensor's name.
    pub(super) fn name(&mut self, what: &'static str) -> Result<&'a str> {
        let start = self.clone();
        let name = self.string(what)?;
        match name.len() as u64 {
            0 => Err(start.error(GgufProblem::EmptyName)),
            1..=MAX_NAME_BYTES => Ok(name),
            count => {
                let what = "bytes in a name";
                Err(start.error(GgufProblem::TooMany {
                    what,
                    count,
                    limit: MAX_NAME_BYTES,
                }))
            }
        }
    }

    pub(super) fn value_type(&mut self) -> Result<ValueType> {
        let start = self.clone();
        let id = self.u32("value type")?;
        ValueType::from_id(id).ok_or_else(|| start.error(GgufProblem::UnknownValueType(id)))
    }

    /// Reads a key and its value, and leaves the cursor behind them.
    pub(super) fn pair(&mut self) -> Result<(&'a str, Value<'a>)> {
        let key = self.name("key")?;
        self.subject = Subject::Key(key);
        let kind = self.value_type()?;
        let value = self.value(kind, 0)?;
        self.subject = Subject::Header;
        Ok((key, value))
    }

    /// `depth` counts the arrays around the value.
    pub(super) fn value(&mut self, kind: ValueType, depth: usize) -> Result<Value<'a>> {
        let what = "value";
        Ok(match kind {
            ValueType::U8 => Value::U8(u8::from_le_bytes(self.array(what)?)),
            ValueType::I8 => Value::I8(i8::from_le_bytes(self.array(what)?)),
            ValueType::U16 => Value::U16(u16::from_le_bytes(self.array(what)?)),
            ValueType::I16 => Value::I16(i16::from_le_bytes(self.array(what)?)),
            ValueType::U32 => Value::U32(self.u32(what)?),
            ValueType::I32 => Value::I32(i32::from_le_bytes(self.array(what)?)),
            ValueType::F32 => Value::F32(f32::from_le_bytes(self.array(what)?)),
            ValueType::U64 => Value::U64(self.u64(what)?),
            ValueType::I64 => Value::I64(i64::from_le_bytes(self.array(what)?)),
            ValueType::F64 => Value::F64(f64::from_le_bytes(self.array(what)?)),
            ValueType::Bool => {
                let start = self.clone();
                match self.array(what)? {
                    [0] => Value::Bool(false),
                    [1] => Value::Bool(true),
                    [other] => return Err(start.error(GgufProblem::NotBoolean(other))),
                }
            }
            ValueType::String => Value::String(self.string("string")?),
            ValueType::Array => Value::Array(self.array_value(depth)?),
        })
    }

    fn array_value(&mut self, depth: usize) -> Result<Array<'a>> {
        if depth == MAX_ARRAY_DEPTH {
            return Err(self.error(GgufProblem::NestedTooDeep(MAX_ARRAY_DEPTH)));
        }
        let element = self.value_type()?;
        let len = self.u64("array length")?;
        // An element takes at least a byte, so this bounds the loop below too.
        let least = len.saturating_mul(element.min_bytes() as u64);
        let start = self.clone();
        if element.is_fixed_size() && element != ValueType::Bool {
            self.take(least, "array")?;
        } else if least > self.remaining() as u64 {
            let (needed, available) = (least, self.remaining() as u64);
            return Err(self.error(GgufProblem::Truncated {
                what: "array",
                needed,
                available,
            }));
        } else {
            for _ in 0..len {
                self.value(element, depth + 1)?;
            }
        }
        let bytes = &self.bytes[start.at..self.at];
        Ok(Array {
            element,
            len: len as usize,
            bytes,
        })
    }
}
