//! The GGUF parser against files that are whole, cut, flipped and hostile.

mod support;

use phalanx_model::{
    TensorFormat,
    gguf::{Gguf, GgufError, GgufProblem, GgufSite, GgufWriter, RandomWeights, Value, ValueType, WriteError},
};
use proptest::prelude::*;
use support::{random_gguf, tiny_config};

fn tiny() -> Vec<u8> {
    random_gguf(&tiny_config(), |_| TensorFormat::Q8_0)
}

/// A header with these counts and nothing behind them but `rest`.
fn header(version: u32, tensors: u64, pairs: u64, rest: &[u8]) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.extend(tensors.to_le_bytes());
    bytes.extend(pairs.to_le_bytes());
    bytes.extend(rest);
    bytes
}

fn string(text: &[u8]) -> Vec<u8> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text);
    bytes
}

fn pair(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [
        string(key.as_bytes()),
        kind.to_le_bytes().to_vec(),
        value.to_vec(),
    ]
    .concat()
}

fn tensor(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut bytes = string(name.as_bytes());
    bytes.extend((dims.len() as u32).to_le_bytes());
    bytes.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
    bytes.extend(kind.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

fn refuse(bytes: Vec<u8>) -> GgufError {
    Gguf::parse(bytes).expect_err("the file is broken")
}

#[test]
fn what_was_written_is_read_back() {
    let bytes = tiny();
    let gguf = Gguf::parse(bytes.as_slice()).unwrap();
    assert_eq!((gguf.version(), gguf.alignment()), (3, 32));
    assert_eq!(gguf.str("general.architecture").unwrap(), Some("llama"));
    assert_eq!(gguf.u64("llama.block_count").unwrap(), Some(2));
    assert_eq!(gguf.f64("llama.rope.freq_base").unwrap(), Some(10_000.0));
    assert_eq!(gguf.bool("tokenizer.ggml.add_bos_token").unwrap(), Some(true));
    assert_eq!(gguf.get("llama.nothing"), None);
    let tokens: Vec<&str> = gguf.strings("tokenizer.ggml.tokens").unwrap().unwrap().collect();
    assert_eq!(tokens, ["<s>", "é", ""]);
    let types: Vec<i64> = gguf
        .integers("tokenizer.ggml.token_type")
        .unwrap()
        .unwrap()
        .collect();
    assert_eq!(types, [3, 1, 1]);
    let scores: Vec<f32> = gguf.floats("tokenizer.ggml.scores").unwrap().unwrap().collect();
    assert_eq!(scores, [0.0, -1.0, -2.5]);

    let down = gguf.tensor("blk.1.ffn_down.weight").unwrap();
    assert_eq!(
        (down.dims(), down.format),
        ([96, 64].as_slice(), Some(TensorFormat::Q8_0))
    );
    assert_eq!(down.data.len(), 64 * 96 / 32 * 34);
    assert_eq!(down.data.start % 32, 0);
    assert!(down.data.start >= gguf.header_bytes().len() && down.data.end <= bytes.len());
    assert_eq!(gguf.tensors().count(), 2 * 9 + 2);
    assert!(gguf.pairs().map(|(key, _)| key).is_sorted());
}

#[test]
fn getters_name_the_key_they_cannot_convert() {
    let gguf = Gguf::parse(tiny()).unwrap();
    let error = gguf.u64("general.architecture").unwrap_err();
    assert_eq!(error.site, GgufSite::Key("general.architecture".to_owned()));
    assert!(matches!(
        error.problem,
        GgufProblem::WrongType {
            found: "a string",
            ..
        }
    ));
    assert!(gguf.strings("tokenizer.ggml.scores").is_err());
    assert!(gguf.bool("llama.block_count").is_err());
}

#[test]
fn every_prefix_is_refused() {
    let bytes = tiny();
    let header = Gguf::parse(bytes.as_slice()).unwrap().header_bytes().len();
    for end in (0..header).chain((header..bytes.len()).step_by(997)) {
        assert!(
            Gguf::parse(&bytes[..end]).is_err(),
            "a file cut at {end} was accepted"
        );
    }
}

#[test]
fn foreign_files_and_versions_are_told_apart() {
    assert_eq!(
        refuse(b"PK\x03\x04 and more".to_vec()).problem,
        GgufProblem::Magic(*b"PK\x03\x04")
    );
    assert_eq!(refuse(header(1, 0, 0, &[])).problem, GgufProblem::Version(1));
    assert_eq!(refuse(header(4, 0, 0, &[])).problem, GgufProblem::Version(4));
    assert_eq!(
        refuse(header(3_u32.swap_bytes(), 0, 0, &[])).problem,
        GgufProblem::BigEndian
    );
    assert!(Gguf::parse(header(2, 0, 0, &[])).is_ok());
}

#[test]
fn counts_beyond_the_file_are_refused() {
    assert!(matches!(
        refuse(header(3, u64::MAX, 0, &[])).problem,
        GgufProblem::TooMany { what: "tensors", .. }
    ));
    assert!(matches!(
        refuse(header(3, 0, 1 << 40, &[])).problem,
        GgufProblem::TooMany { what: "keys", .. }
    ));
    assert!(matches!(
        refuse(header(3, 0, 60_000, &[])).problem,
        GgufProblem::Truncated { what: "keys", .. }
    ));
    assert!(matches!(
        refuse(header(3, 100_000, 0, &[])).problem,
        GgufProblem::Truncated { what: "tensors", .. }
    ));
}

#[test]
fn hostile_values_are_refused_by_key() {
    let huge = u64::MAX.to_le_bytes();
    let array = |element: u32, len: u64| [element.to_le_bytes().as_slice(), &len.to_le_bytes()].concat();
    let cases: [(&str, u32, Vec<u8>); 8] = [
        ("string", 8, huge.to_vec()),
        ("u32 array", 9, array(4, u64::MAX)),
        ("u64 array", 9, array(10, u64::MAX / 8 + 1)),
        ("string array", 9, array(8, u64::MAX)),
        ("bool array", 9, array(7, 1 << 50)),
        ("unknown", 13, vec![0; 8]),
        ("boolean", 7, vec![2]),
        ("bytes", 8, string(&[0xff, 0xfe])),
    ];
    for (key, kind, value) in cases {
        let error = refuse(header(3, 0, 1, &pair(key, kind, &value)));
        assert_eq!(error.site, GgufSite::Key(key.to_owned()), "{error}");
    }
    let nested: Vec<u8> = std::iter::repeat_n(array(9, 1), 1000).flatten().collect();
    let error = refuse(header(3, 0, 1, &pair("nested", 9, &nested)));
    assert!(matches!(error.problem, GgufProblem::NestedTooDeep(_)), "{error}");
}

#[test]
fn nested_arrays_within_the_limit_are_walked() {
    // An array (type 9) of one array of two u32 (type 4).
    let words = |words: &[u32]| {
        words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    let value = words(&[9, 1, 0, 4, 2, 0, 5, 6]);
    let gguf = Gguf::parse(header(3, 0, 1, &pair("nested", 9, &value))).unwrap();
    let outer = gguf.array("nested").unwrap().unwrap();
    assert_eq!((outer.element_type(), outer.len()), (ValueType::Array, 1));
    let Some(Value::Array(inner)) = outer.iter().next() else {
        panic!("no inner array")
    };
    assert_eq!(inner.integers().unwrap().collect::<Vec<_>>(), [5, 6]);
}

#[test]
fn duplicates_are_refused() {
    let twice = pair("key", 4, &[0; 4]).repeat(2);
    let error = refuse(header(3, 0, 2, &twice));
    assert_eq!(
        (error.site, error.problem),
        (GgufSite::Key("key".to_owned()), GgufProblem::Duplicate)
    );
    let twice = tensor("t", &[8], 0, 0).repeat(2);
    let error = refuse([header(3, 2, 0, &twice), vec![0; 96]].concat());
    assert_eq!(
        (error.site, error.problem),
        (GgufSite::Tensor("t".to_owned()), GgufProblem::Duplicate)
    );
}

#[test]
fn alignment_must_be_a_sane_power_of_two() {
    for alignment in [0_u32, 3, 33, 1 << 21, u32::MAX] {
        let error = refuse(header(
            3,
            0,
            1,
            &pair("general.alignment", 4, &alignment.to_le_bytes()),
        ));
        assert_eq!(error.problem, GgufProblem::Alignment(alignment.into()));
    }
    let wide = Gguf::parse(header(
        3,
        0,
        1,
        &pair("general.alignment", 4, &64_u32.to_le_bytes()),
    ))
    .unwrap();
    assert_eq!(wide.alignment(), 64);
}

#[test]
fn hostile_tensors_are_refused_by_name() {
    let (f32s, q4_0) = (0, 2);
    let problem = |entry: Vec<u8>| {
        let error = refuse([header(3, 1, 0, &entry), vec![0; 256]].concat());
        assert_eq!(error.site, GgufSite::Tensor("t".to_owned()), "{error}");
        error.problem
    };
    assert_eq!(problem(tensor("t", &[], f32s, 0)), GgufProblem::DimensionCount(0));
    assert_eq!(
        problem(tensor("t", &[1; 5], f32s, 0)),
        GgufProblem::DimensionCount(5)
    );
    assert_eq!(problem(tensor("t", &[4, 0], f32s, 0)), GgufProblem::ZeroDimension);
    assert_eq!(
        problem(tensor("t", &[1 << 32, 1 << 32], f32s, 0)),
        GgufProblem::SizeOverflow
    );
    assert_eq!(
        problem(tensor("t", &[u64::MAX], f32s, 0)),
        GgufProblem::SizeOverflow
    );
    assert!(matches!(
        problem(tensor("t", &[33], q4_0, 0)),
        GgufProblem::CutBlock {
            row: 33,
            block: 32,
            ..
        }
    ));
    assert!(matches!(
        problem(tensor("t", &[8], f32s, 1)),
        GgufProblem::Misaligned { offset: 1, .. }
    ));
    assert!(matches!(
        problem(tensor("t", &[8], f32s, 1 << 40)),
        GgufProblem::OutsideFile { .. }
    ));
    assert!(matches!(
        problem(tensor("t", &[8], f32s, u64::MAX - 31)),
        GgufProblem::OutsideFile { .. }
    ));
    assert!(matches!(
        problem(tensor("t", &[1 << 20], f32s, 0)),
        GgufProblem::OutsideFile { .. }
    ));
}

#[test]
fn unknown_tensor_types_are_listed_without_a_format() {
    let entry = tensor("t", &[256], 16, 0);
    let gguf = Gguf::parse([header(3, 1, 0, &entry), vec![0; 256]].concat()).unwrap();
    assert_eq!(
        gguf.tensor("t").map(|tensor| (tensor.type_id, tensor.format)),
        Some((16, None))
    );
}

#[test]
fn a_file_that_changes_later_gives_no_answers_instead_of_wrong_ranges() {
    use std::cell::Cell;
    /// A mapping that another process truncates.
    struct Shrinking(Vec<u8>, Cell<usize>);
    impl AsRef<[u8]> for Shrinking {
        fn as_ref(&self) -> &[u8] {
            &self.0[..self.1.get()]
        }
    }
    let bytes = tiny();
    let len = bytes.len();
    let gguf = Gguf::parse(Shrinking(bytes, Cell::new(len))).unwrap();
    gguf.bytes().1.set(40);
    assert_eq!(gguf.get("llama.block_count"), None);
    assert_eq!(gguf.tensor("output_norm.weight"), None);
    assert_eq!((gguf.pairs().count(), gguf.tensors().count()), (0, 0));
    assert_eq!(gguf.header_bytes().len(), 40);
}

#[test]
fn the_writer_refuses_wrong_shapes_and_data() {
    let mut writer = GgufWriter::new();
    assert!(matches!(
        writer.tensor("t", &[33], TensorFormat::Q4_0),
        Err(WriteError::Shape { .. })
    ));
    assert!(matches!(
        writer.tensor("t", &[], TensorFormat::F32),
        Err(WriteError::Shape { .. })
    ));
    writer.tensor("t", &[8], TensorFormat::F32).unwrap();
    let short = writer.to_bytes(|_, out| out.write_all(&[0; 31]));
    assert!(matches!(
        short,
        Err(WriteError::DataLength {
            expected: 32,
            written: 31,
            ..
        })
    ));
}

#[test]
fn random_weights_depend_on_seed_and_name_and_have_the_deviation_they_should() {
    let mut writer = GgufWriter::new();
    writer.tensor("a.weight", &[64, 512], TensorFormat::F32).unwrap();
    writer.tensor("b.weight", &[64, 512], TensorFormat::F32).unwrap();
    let data = |seed| {
        let bytes = writer
            .to_bytes(|tensor, out| RandomWeights::new(seed).fill(tensor, out))
            .unwrap();
        let gguf = Gguf::parse(bytes.as_slice()).unwrap();
        gguf.tensors()
            .map(|tensor| bytes[tensor.data].to_vec())
            .collect::<Vec<_>>()
    };
    let first = data(1);
    assert_eq!(first, data(1));
    assert!(first[0] != first[1] && first[0] != data(2)[0]);
    let values: Vec<f32> = first[0]
        .as_chunks::<4>()
        .0
        .iter()
        .map(|&bytes| f32::from_le_bytes(bytes))
        .collect();
    let mean = values.iter().sum::<f32>() / values.len() as f32;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f32>() / values.len() as f32;
    assert!(
        mean.abs() < 0.002 && (variance - 1.0 / 64.0).abs() < 0.001,
        "mean {mean}, variance {variance}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn flipped_bytes_never_panic(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut bytes = tiny();
        let header = Gguf::parse(bytes.as_slice()).unwrap().header_bytes().len();
        for (at, value) in flips {
            bytes[at.index(header)] ^= value;
        }
        if let Ok(gguf) = Gguf::parse(bytes.as_slice()) {
            for (_, value) in gguf.pairs() {
                if let Value::Array(array) = value {
                    prop_assert!(array.iter().count() <= array.len());
                }
            }
            for tensor in gguf.tensors() {
                prop_assert!(tensor.data.start >= gguf.header_bytes().len() || tensor.data.is_empty());
                prop_assert!(tensor.data.end <= bytes.len());
            }
        }
    }

    #[test]
    fn overwritten_integers_never_panic(at in any::<prop::sample::Index>(), value in prop_oneof![
        Just(u64::MAX), Just(i64::MAX as u64), Just(0), Just(u64::from(u32::MAX)), any::<u64>(),
    ]) {
        let mut bytes = tiny();
        let header = Gguf::parse(bytes.as_slice()).unwrap().header_bytes().len();
        let at = at.index(header - 8);
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        let _ = Gguf::parse(bytes);
    }
}
