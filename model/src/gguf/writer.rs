//! Writes GGUF version 3 files: for tests, for benchmarks on geometries nobody has weights of, and for planning models
//! that do not fit the machine.

use std::io::{self, Write};

use super::{DEFAULT_ALIGNMENT, value::ValueType};
use crate::TensorFormat;

const VERSION: u32 = 3;

/// Why a file cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    #[error("tensor `{name}`: {dims:?} elements of {format} make no whole number of blocks")]
    Shape {
        name: String,
        dims: Vec<usize>,
        format: TensorFormat,
    },
    #[error("tensor `{name}`: {written} bytes of data were given, its shape needs {expected}")]
    DataLength {
        name: String,
        expected: u64,
        written: u64,
    },
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A metadata value to be written. Arrays hold values of one type.
#[derive(Clone, Debug, PartialEq)]
pub enum MetadataValue {
    U32(u32),
    U64(u64),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Strings(Vec<String>),
    F32s(Vec<f32>),
    I32s(Vec<i32>),
}

macro_rules! from {
    ($($source:ty => $variant:ident),* $(,)?) => {$(
        impl From<$source> for MetadataValue {
            fn from(value: $source) -> Self {
                Self::$variant(value.into())
            }
        }
    )*};
}
from! {
    u32 => U32, u64 => U64, i32 => I32, f32 => F32, bool => Bool, &str => String, String => String,
    Vec<String> => Strings, Vec<f32> => F32s, Vec<i32> => I32s,
}

/// A tensor's entry in the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorDeclaration {
    pub name: String,
    /// Fastest-varying dimension first: `[cols, rows]` for a matrix.
    pub dims: Vec<usize>,
    pub format: TensorFormat,
    /// Of its data.
    pub bytes: u64,
}

/// Collects metadata and tensor declarations, then writes them with data that is produced one tensor at a time.
#[derive(Clone, Debug, Default)]
pub struct GgufWriter {
    pairs: Vec<(String, MetadataValue)>,
    tensors: Vec<TensorDeclaration>,
}

impl GgufWriter {
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a key; a later value replaces an earlier one.
    pub fn metadata(&mut self, key: impl Into<String>, value: impl Into<MetadataValue>) -> &mut Self {
        let (key, value) = (key.into(), value.into());
        match self.pairs.iter_mut().find(|(existing, _)| *existing == key) {
            Some(pair) => pair.1 = value,
            None => self.pairs.push((key, value)),
        }
        self
    }

    /// Declares a tensor; data is written in the order of declaration.
    pub fn tensor(
        &mut self,
        name: impl Into<String>,
        dims: &[usize],
        format: TensorFormat,
    ) -> Result<&mut Self, WriteError> {
        let (name, dims) = (name.into(), dims.to_vec());
        let bytes = dims.split_first().and_then(|(&cols, rest)| {
            let rows = rest
                .iter()
                .try_fold(1_usize, |product, &dim| product.checked_mul(dim))?;
            format.file_bytes(rows, cols)
        });
        match bytes {
            Some(bytes) if !dims.contains(&0) && format.is_gguf() => {
                self.tensors.push(TensorDeclaration {
                    name,
                    dims,
                    format,
                    bytes: bytes as u64,
                });
                Ok(self)
            }
            _ => Err(WriteError::Shape { name, dims, format }),
        }
    }

    pub fn tensors(&self) -> &[TensorDeclaration] {
        &self.tensors
    }

    /// Everything before the tensors' data, padded to the alignment. With a sparse file behind it this is a whole model
    /// of zeros.
    pub fn header(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(b"GGUF");
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(self.tensors.len() as u64).to_le_bytes());
        out.extend_from_slice(&(self.pairs.len() as u64).to_le_bytes());
        for (key, value) in &self.pairs {
            put_string(&mut out, key);
            put_value(&mut out, value);
        }
        let mut offset = 0_u64;
        for tensor in &self.tensors {
            put_string(&mut out, &tensor.name);
            out.extend_from_slice(&(tensor.dims.len() as u32).to_le_bytes());
            for &dim in &tensor.dims {
                out.extend_from_slice(&(dim as u64).to_le_bytes());
            }
            out.extend_from_slice(&tensor.format.gguf_type().to_le_bytes());
            out.extend_from_slice(&offset.to_le_bytes());
            offset += padded(tensor.bytes);
        }
        out.resize(out.len().next_multiple_of(DEFAULT_ALIGNMENT), 0);
        out
    }

    /// Bytes of the tensors' data, padding included.
    pub fn data_bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| padded(tensor.bytes)).sum()
    }

    /// Writes the file. `fill` writes each tensor's data, in the order of declaration.
    pub fn write<W: Write>(
        &self,
        out: &mut W,
        mut fill: impl FnMut(&TensorDeclaration, &mut dyn Write) -> io::Result<()>,
    ) -> Result<(), WriteError> {
        out.write_all(&self.header())?;
        for tensor in &self.tensors {
            let mut counted = Counted {
                out: &mut *out,
                written: 0,
            };
            fill(tensor, &mut counted)?;
            let written = counted.written;
            if written != tensor.bytes {
                let name = tensor.name.clone();
                return Err(WriteError::DataLength {
                    name,
                    expected: tensor.bytes,
                    written,
                });
            }
            let padding = [0; DEFAULT_ALIGNMENT];
            out.write_all(&padding[..(padded(written) - written) as usize])?;
        }
        out.flush()?;
        Ok(())
    }

    /// The whole file in memory.
    pub fn to_bytes(
        &self,
        fill: impl FnMut(&TensorDeclaration, &mut dyn Write) -> io::Result<()>,
    ) -> Result<Vec<u8>, WriteError> {
        let mut out = Vec::new();
        self.write(&mut out, fill)?;
        Ok(out)
    }
}

fn padded(bytes: u64) -> u64 {
    bytes.next_multiple_of(DEFAULT_ALIGNMENT as u64)
}

struct Counted<'a, W> {
    out: &'a mut W,
    written: u64,
}

impl<W: Write> Write for Counted<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.out.write(bytes)?;
        self.written += n as u64;
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn put_type(out: &mut Vec<u8>, kind: ValueType) {
    out.extend_from_slice(&kind.id().to_le_bytes());
}

fn put_array<T>(out: &mut Vec<u8>, element: ValueType, items: &[T], put: impl Fn(&mut Vec<u8>, &T)) {
    put_type(out, ValueType::Array);
    put_type(out, element);
    out.extend_from_slice(&(items.len() as u64).to_le_bytes());
    for item in items {
        put(out, item);
    }
}

fn put_value(out: &mut Vec<u8>, value: &MetadataValue) {
    let mut scalar = |kind, bytes: &[u8]| {
        put_type(out, kind);
        out.extend_from_slice(bytes);
    };
    match value {
        MetadataValue::U32(v) => scalar(ValueType::U32, &v.to_le_bytes()),
        MetadataValue::U64(v) => scalar(ValueType::U64, &v.to_le_bytes()),
        MetadataValue::I32(v) => scalar(ValueType::I32, &v.to_le_bytes()),
        MetadataValue::F32(v) => scalar(ValueType::F32, &v.to_le_bytes()),
        MetadataValue::Bool(v) => scalar(ValueType::Bool, &[u8::from(*v)]),
        MetadataValue::String(text) => {
            put_type(out, ValueType::String);
            put_string(out, text);
        }
        MetadataValue::Strings(items) => {
            put_array(out, ValueType::String, items, |out, item| put_string(out, item))
        }
        MetadataValue::F32s(items) => {
            put_array(out, ValueType::F32, items, |out, item| {
                out.extend_from_slice(&item.to_le_bytes())
            });
        }
        MetadataValue::I32s(items) => {
            put_array(out, ValueType::I32, items, |out, item| {
                out.extend_from_slice(&item.to_le_bytes())
            });
        }
    }
}
