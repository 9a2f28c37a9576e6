//! GGUF files (versions 2 and 3, little-endian): a directory of typed metadata and tensors over bytes that stay where
//! they are. Specification: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.
//!
//! The file is not trusted. Parsing keeps one offset per key and per tensor, each backed by more bytes of the file than
//! it takes, and decodes an entry again when it is asked for; every decoding checks every length. So a file that
//! changes under its mapping gives wrong answers or none, never a panic.

mod error;
mod reader;
mod synthetic;
mod value;
mod writer;

use std::ops::Range;

pub use error::{GgufError, GgufProblem, GgufSite};
pub use synthetic::RandomWeights;
pub use value::{Array, Elements, Value, ValueType};
pub use writer::{GgufWriter, MetadataValue, TensorDeclaration, WriteError};

use crate::TensorFormat;
use reader::{Cursor, Result, Subject};

/// Alignment of tensor data where `general.alignment` does not say otherwise.
pub const DEFAULT_ALIGNMENT: usize = 32;
/// Largest alignment accepted.
const MAX_ALIGNMENT: u64 = 1 << 20;
/// Most metadata keys and most tensors of a file.
const MAX_KEYS: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 17;
/// Fewest bytes of a key with its value: length, one letter, type, one byte.
const MIN_PAIR_BYTES: u64 = 8 + 1 + 4 + 1;
/// Fewest bytes of a tensor's entry: length, one letter, number of dimensions, one dimension, type, offset.
const MIN_TENSOR_BYTES: u64 = 8 + 1 + 4 + 8 + 4 + 8;

/// A parsed GGUF file over `bytes` (a mapping, a vector, a slice).
#[derive(Debug)]
pub struct Gguf<B> {
    bytes: B,
    version: u32,
    alignment: usize,
    /// Offsets of the pairs, by key.
    pairs: Vec<usize>,
    /// Offsets of the tensors' entries, by name.
    tensors: Vec<usize>,
    /// First byte of tensor data.
    data_start: usize,
}

/// One entry of the tensor directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufTensor<'a> {
    pub name: &'a str,
    /// GGUF's type number.
    pub type_id: u32,
    /// None: a type that exists or not, but that we do not hold.
    pub format: Option<TensorFormat>,
    /// Bytes of the file. Empty, at the right start, if the format is unknown.
    pub data: Range<usize>,
    dims: [usize; 4],
    num_dims: usize,
}

impl GgufTensor<'_> {
    /// Fastest-varying dimension first: `[cols, rows]` for a matrix.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.num_dims]
    }
}

impl<B: AsRef<[u8]>> Gguf<B> {
    /// Reads and checks the whole header, and that every tensor's data lies within the file behind it.
    pub fn parse(bytes: B) -> Result<Self> {
        let file = bytes.as_ref();
        let mut cursor = Cursor::new(file, 0);
        let version = parse_version(&mut cursor)?;
        let tensor_count = bounded_count(&mut cursor, "tensors", MAX_TENSORS)?;
        let pair_count = bounded_count(&mut cursor, "keys", MAX_KEYS)?;
        check_room(&cursor, "keys", pair_count, MIN_PAIR_BYTES)?;
        let mut pairs = Vec::with_capacity(pair_count as usize);
        for _ in 0..pair_count {
            pairs.push(cursor.position());
            cursor.pair()?;
        }
        sort_by_name(file, &mut pairs, "key", Subject::Key)?;
        check_room(&cursor, "tensors", tensor_count, MIN_TENSOR_BYTES)?;
        let mut tensors = Vec::with_capacity(tensor_count as usize);
        for _ in 0..tensor_count {
            tensors.push(cursor.position());
            parse_tensor(&mut cursor)?;
        }
        sort_by_name(file, &mut tensors, "tensor name", Subject::Tensor)?;
        let header_end = cursor.position();
        let mut gguf = Self {
            bytes,
            version,
            alignment: DEFAULT_ALIGNMENT,
            pairs,
            tensors,
            data_start: 0,
        };
        gguf.alignment = gguf.parse_alignment()?;
        // Both are far below the largest usize: one is an offset in the file, the other at most 1 MiB.
        gguf.data_start = header_end.next_multiple_of(gguf.alignment);
        for &at in &gguf.tensors {
            gguf.tensor_at(at)?;
        }
        Ok(gguf)
    }

    pub fn version(&self) -> u32 {
        self.version
    }

    /// Of tensor data, in bytes.
    pub fn alignment(&self) -> usize {
        self.alignment
    }

    /// What was parsed.
    pub fn bytes(&self) -> &B {
        &self.bytes
    }

    /// Everything before the tensors' data.
    pub fn header_bytes(&self) -> &[u8] {
        let file = self.bytes.as_ref();
        &file[..self.data_start.min(file.len())]
    }

    /// The value of `key`, if the file has it.
    pub fn get(&self, key: &str) -> Option<Value<'_>> {
        let index = self.find(&self.pairs, key)?;
        Cursor::new(self.bytes.as_ref(), self.pairs[index])
            .pair()
            .ok()
            .map(|(_, value)| value)
    }

    /// All keys with their values, by key.
    pub fn pairs(&self) -> impl Iterator<Item = (&str, Value<'_>)> {
        let file = self.bytes.as_ref();
        self.pairs
            .iter()
            .filter_map(move |&at| Cursor::new(file, at).pair().ok())
    }

    /// A non-negative integer of any width. Absent is none; another type is an error.
    pub fn u64(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "a non-negative integer", |value| value.as_u64())
    }

    /// A float of either width.
    pub fn f64(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", |value| value.as_f64())
    }

    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a boolean", |value| value.as_bool())
    }

    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |value| value.as_str())
    }

    pub fn array(&self, key: &str) -> Result<Option<Array<'_>>> {
        self.typed(key, "an array", |value| value.as_array())
    }

    /// An array of strings, such as `tokenizer.ggml.tokens`, decoded as it is iterated.
    pub fn strings(&self, key: &str) -> Result<Option<impl Iterator<Item = &str>>> {
        self.typed(key, "an array of strings", |value| value.as_array()?.strings())
    }

    /// An array of floats, such as `tokenizer.ggml.scores`.
    pub fn floats(&self, key: &str) -> Result<Option<impl Iterator<Item = f32>>> {
        self.typed(key, "an array of numbers", |value| value.as_array()?.floats())
    }

    /// An array of integers, such as `tokenizer.ggml.token_type`.
    pub fn integers(&self, key: &str) -> Result<Option<impl Iterator<Item = i64>>> {
        self.typed(key, "an array of integers", |value| value.as_array()?.integers())
    }

    /// The directory entry of the tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<GgufTensor<'_>> {
        let index = self.find(&self.tensors, name)?;
        self.tensor_at(self.tensors[index]).ok()
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> impl Iterator<Item = GgufTensor<'_>> {
        self.tensors.iter().filter_map(|&at| self.tensor_at(at).ok())
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        convert: impl FnOnce(Value<'a>) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let found = value.value_type().name();
        convert(value).map(Some).ok_or_else(|| GgufError {
            site: GgufSite::Key(key.to_owned()),
            offset: self
                .find(&self.pairs, key)
                .map_or(0, |index| self.pairs[index] as u64),
            problem: GgufProblem::WrongType { expected, found },
        })
    }

    fn find(&self, offsets: &[usize], name: &str) -> Option<usize> {
        let file = self.bytes.as_ref();
        offsets
            .binary_search_by(|&at| name_at(file, at, "name").unwrap_or_default().cmp(name))
            .ok()
    }

    fn parse_alignment(&self) -> Result<usize> {
        let key = "general.alignment";
        match self.u64(key)? {
            None => Ok(DEFAULT_ALIGNMENT),
            Some(alignment) if alignment.is_power_of_two() && alignment <= MAX_ALIGNMENT => {
                Ok(alignment as usize)
            }
            Some(alignment) => Err(GgufError {
                site: GgufSite::Key(key.to_owned()),
                offset: self
                    .find(&self.pairs, key)
                    .map_or(0, |index| self.pairs[index] as u64),
                problem: GgufProblem::Alignment(alignment),
            }),
        }
    }

    fn tensor_at(&self, at: usize) -> Result<GgufTensor<'_>> {
        let file = self.bytes.as_ref();
        let mut cursor = Cursor::new(file, at);
        let entry = parse_tensor(&mut cursor)?;
        cursor = Cursor::new(file, at);
        cursor.subject = Subject::Tensor(entry.name);
        if entry.offset % self.alignment as u64 != 0 {
            let problem = GgufProblem::Misaligned {
                offset: entry.offset,
                alignment: self.alignment,
            };
            return Err(cursor.error(problem));
        }
        let format = TensorFormat::from_gguf_type(entry.type_id);
        let bytes = match format {
            Some(format) => entry.bytes(format).map_err(|problem| cursor.error(problem))?,
            None => 0,
        };
        let start = entry.offset.saturating_add(self.data_start as u64);
        let data = start
            .checked_add(bytes)
            .filter(|&end| end <= file.len() as u64)
            .map(|end| start as usize..end as usize)
            .ok_or_else(|| {
                cursor.error(GgufProblem::OutsideFile {
                    start,
                    bytes,
                    file: file.len() as u64,
                })
            })?;
        let TensorEntry {
            name,
            type_id,
            dims,
            num_dims,
            ..
        } = entry;
        Ok(GgufTensor {
            name,
            type_id,
            format,
            data,
            dims,
            num_dims,
        })
    }
}

fn parse_version(cursor: &mut Cursor<'_>) -> Result<u32> {
    let start = cursor.clone();
    let magic = cursor.array("magic")?;
    if &magic != b"GGUF" {
        return Err(start.error(GgufProblem::Magic(magic)));
    }
    let at_version = cursor.clone();
    match cursor.u32("version")? {
        version @ 2..=3 => Ok(version),
        version if matches!(version.swap_bytes(), 1..=3) => Err(at_version.error(GgufProblem::BigEndian)),
        version => Err(at_version.error(GgufProblem::Version(version))),
    }
}

fn bounded_count(cursor: &mut Cursor<'_>, what: &'static str, limit: u64) -> Result<u64> {
    let start = cursor.clone();
    match cursor.u64("count")? {
        count if count <= limit => Ok(count),
        count => Err(start.error(GgufProblem::TooMany { what, count, limit })),
    }
}

/// Refuses a count that the rest of the file cannot hold, before anything is allocated for it.
fn check_room(cursor: &Cursor<'_>, what: &'static str, count: u64, least: u64) -> Result<()> {
    // At most 2^17 entries of at most 33 bytes.
    let (needed, available) = (count * least, cursor.remaining() as u64);
    if needed <= available {
        Ok(())
    } else {
        Err(cursor.error(GgufProblem::Truncated {
            what,
            needed,
            available,
        }))
    }
}

fn name_at<'a>(file: &'a [u8], at: usize, what: &'static str) -> Result<&'a str> {
    Cursor::new(file, at).name(what)
}

/// Sorts offsets of entries by the name each entry starts with, and refuses equal names.
fn sort_by_name<'a>(
    file: &'a [u8],
    offsets: &mut [usize],
    what: &'static str,
    subject: impl Fn(&'a str) -> Subject<'a>,
) -> Result<()> {
    let name = |at: usize| name_at(file, at, what).unwrap_or_default();
    offsets.sort_unstable_by(|&a, &b| name(a).cmp(name(b)).then(a.cmp(&b)));
    for pair in offsets.windows(2) {
        if name(pair[0]) == name(pair[1]) {
            let mut cursor = Cursor::new(file, pair[1]);
            cursor.subject = subject(name(pair[1]));
            return Err(cursor.error(GgufProblem::Duplicate));
        }
    }
    Ok(())
}

/// A directory entry before its data is located.
struct TensorEntry<'a> {
    name: &'a str,
    dims: [usize; 4],
    num_dims: usize,
    type_id: u32,
    /// From the start of the data section.
    offset: u64,
}

impl TensorEntry<'_> {
    fn bytes(&self, format: TensorFormat) -> std::result::Result<u64, GgufProblem> {
        let cols = self.dims[0];
        if !cols.is_multiple_of(format.block_len()) {
            return Err(GgufProblem::CutBlock {
                row: cols as u64,
                block: format.block_len(),
                format,
            });
        }
        let rows = self.dims[1..]
            .iter()
            .try_fold(1_usize, |product, &dim| product.checked_mul(dim));
        let bytes = rows.and_then(|rows| format.file_bytes(rows, cols));
        bytes.map(|bytes| bytes as u64).ok_or(GgufProblem::SizeOverflow)
    }
}

fn parse_tensor<'a>(cursor: &mut Cursor<'a>) -> Result<TensorEntry<'a>> {
    let name = cursor.name("tensor name")?;
    cursor.subject = Subject::Tensor(name);
    let start = cursor.clone();
    let num_dims = cursor.u32("number of dimensions")?;
    if !matches!(num_dims, 1..=4) {
        return Err(start.error(GgufProblem::DimensionCount(num_dims)));
    }
    let mut dims = [1; 4];
    for dim in &mut dims[..num_dims as usize] {
        let start = cursor.clone();
        *dim = match usize::try_from(cursor.u64("dimension")?) {
            Ok(0) => return Err(start.error(GgufProblem::ZeroDimension)),
            Ok(dim) => dim,
            Err(_) => return Err(start.error(GgufProblem::SizeOverflow)),
        };
    }
    let (type_id, offset) = (cursor.u32("tensor type")?, cursor.u64("data offset")?);
    cursor.subject = Subject::Header;
    Ok(TensorEntry {
        name,
        dims,
        num_dims: num_dims as usize,
        type_id,
        offset,
    })
}

/// The name of a tensor type, known or not, for messages.
pub(crate) fn gguf_type_name(id: u32) -> String {
    const OTHERS: [(u32, &str); 24] = [
        (9, "Q8_1"),
        (10, "Q2_K"),
        (11, "Q3_K"),
        (15, "Q8_K"),
        (16, "IQ2_XXS"),
        (17, "IQ2_XS"),
        (18, "IQ3_XXS"),
        (19, "IQ1_S"),
        (20, "IQ4_NL"),
        (21, "IQ3_S"),
        (22, "IQ2_S"),
        (23, "IQ4_XS"),
        (24, "I8"),
        (25, "I16"),
        (26, "I32"),
        (27, "I64"),
        (28, "F64"),
        (29, "IQ1_M"),
        (31, "Q4_0_4_4"),
        (32, "Q4_0_4_8"),
        (33, "Q4_0_8_8"),
        (34, "TQ1_0"),
        (35, "TQ2_0"),
        (39, "MXFP4"),
    ];
    let known = TensorFormat::from_gguf_type(id).map(|format| format.to_string());
    let other = || {
        OTHERS
            .iter()
            .find(|(other, _)| *other == id)
            .map(|(_, name)| (*name).to_owned())
    };
    known.or_else(other).unwrap_or_else(|| format!("type {id}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_takes_fewer_bytes_than_the_entries_behind_it() {
        let mut writer = GgufWriter::new();
        for i in 0..100_u32 {
            writer.metadata(format!("{i}"), true);
            writer.tensor(format!("{i}"), &[1], TensorFormat::F32).unwrap();
        }
        let gguf = Gguf::parse(writer.to_bytes(|_, out| out.write_all(&[0; 4])).unwrap()).unwrap();
        let index_bytes = |offsets: &Vec<usize>| offsets.capacity() as u64 * size_of::<usize>() as u64;
        assert!(index_bytes(&gguf.pairs) <= 100 * MIN_PAIR_BYTES);
        assert!(index_bytes(&gguf.tensors) <= 100 * MIN_TENSOR_BYTES);
    }
}
