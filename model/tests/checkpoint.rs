//! Opening models: GGUF files and Hugging Face directories, whole and broken.

mod support;

use std::{collections::BTreeMap, fs, io, path::Path};

use phalanx_model::{
    Checkpoint, CheckpointError, LayerTensor, ModelConfig, RopeLayout, TensorFormat, TensorRole,
    gguf::{GgufWriter, RandomWeights},
};
use serde_json::{Value, json};
use support::{random_gguf, tiny_config};

type Opened = Result<Checkpoint<Vec<u8>>, CheckpointError>;

fn open(path: &Path) -> Opened {
    Checkpoint::open(path, |path| fs::read(path))
}

fn open_bytes(bytes: Vec<u8>) -> Opened {
    Checkpoint::open(Path::new("tiny.gguf"), |_| Ok::<_, io::Error>(bytes.clone()))
}

fn layer(layer: usize, tensor: LayerTensor) -> TensorRole {
    TensorRole::Layer { layer, tensor }
}

/// A directory of one tiny model whose tensors are dealt to these files, each holding its number as every byte.
struct Directory {
    root: tempfile::TempDir,
    tensors: BTreeMap<String, (Vec<usize>, &'static str)>,
}

impl Directory {
    fn new() -> Self {
        let config = tiny_config();
        let tensors = config.roles().filter_map(|role| {
            let (rows, cols) = config.shape(role)?;
            let shape = if role.is_vector() {
                vec![rows]
            } else {
                vec![rows, cols]
            };
            Some((role.hugging_face_name(), (shape, "BF16")))
        });
        let directory = Self {
            root: tempfile::tempdir().unwrap(),
            tensors: tensors.collect(),
        };
        directory.write_json("config.json", &json!({
            "model_type": "llama", "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads, "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_position_embeddings, "rms_norm_eps": config.rms_norm_eps,
            "tie_word_embeddings": true
        }));
        directory
    }

    fn path(&self) -> &Path {
        self.root.path()
    }

    fn write_json(&self, name: &str, value: &Value) {
        fs::write(self.path().join(name), value.to_string()).unwrap();
    }

    /// Writes the tensors that `wanted` picks into one file, and returns their names.
    fn write_shard(&self, file: &str, wanted: impl Fn(&str) -> bool) -> Vec<String> {
        let (mut header, mut end, mut names) = (serde_json::Map::new(), 0, Vec::new());
        for (name, (shape, dtype)) in self.tensors.iter().filter(|(name, _)| wanted(name)) {
            let width = match *dtype {
                "F64" => 8,
                "F32" => 4,
                "F8_E4M3" => 1,
                _ => 2,
            };
            let bytes = shape.iter().product::<usize>() * width;
            header.insert(
                name.clone(),
                json!({"dtype": dtype, "shape": shape, "data_offsets": [end, end + bytes]}),
            );
            end += bytes;
            names.push(name.clone());
        }
        let header = Value::Object(header).to_string();
        let data = (0..end).map(|at| at as u8);
        let bytes = (header.len() as u64)
            .to_le_bytes()
            .into_iter()
            .chain(header.bytes())
            .chain(data);
        fs::write(self.path().join(file), bytes.collect::<Vec<u8>>()).unwrap();
        names
    }

    fn write_index(&self, files: &[(&str, Vec<String>)]) {
        let entries = files
            .iter()
            .flat_map(|(file, names)| names.iter().map(move |name| (name.clone(), json!(file))));
        let weight_map: serde_json::Map<String, Value> = entries.collect();
        self.write_json(
            "model.safetensors.index.json",
            &json!({"metadata": {}, "weight_map": weight_map}),
        );
    }

    fn open(&self) -> Opened {
        open(self.path())
    }
}

#[test]
fn a_gguf_file_is_opened_with_all_its_tensors() {
    let bytes = random_gguf(&tiny_config(), |_| TensorFormat::Q8_0);
    let checkpoint = open_bytes(bytes.clone()).unwrap();
    assert_eq!(checkpoint.config(), &tiny_config());
    assert_eq!(checkpoint.tensors().count(), tiny_config().roles().count());
    let down = checkpoint.tensor(layer(1, LayerTensor::Down)).unwrap();
    assert_eq!(
        (down.format, down.rows, down.cols, down.bytes),
        (TensorFormat::Q8_0, 64, 96, 64 * 3 * 34)
    );
    assert_eq!(
        checkpoint.tensor_bytes(layer(1, LayerTensor::Down)).unwrap(),
        &bytes[down.offset..][..down.bytes]
    );
    let norm = checkpoint.tensor(TensorRole::OutputNorm).unwrap();
    assert_eq!((norm.format, norm.rows, norm.cols), (TensorFormat::F32, 64, 1));
    assert_eq!(
        checkpoint.tensor(TensorRole::LmHead),
        checkpoint.tensor(TensorRole::TokenEmbedding)
    );
    assert_eq!(checkpoint.tensor(layer(2, LayerTensor::Q)), None);
    assert_eq!(checkpoint.tensor(layer(0, LayerTensor::QBias)), None);
    assert_eq!(
        checkpoint
            .gguf()
            .unwrap()
            .array("tokenizer.ggml.tokens")
            .unwrap()
            .unwrap()
            .len(),
        3
    );
    assert_eq!(checkpoint.maps(), [bytes]);
}

#[test]
fn every_format_can_be_written_and_opened() {
    let mut config = tiny_config();
    (config.hidden_size, config.intermediate_size) = (256, 512);
    config.head_dim = 64;
    config.rope.rotary_dim = 64;
    for format in TensorFormat::ALL.into_iter().filter(|format| format.is_gguf()) {
        let checkpoint = open_bytes(random_gguf(&config, |_| format)).unwrap();
        assert_eq!(
            checkpoint.tensor(layer(0, LayerTensor::O)).unwrap().format,
            format
        );
        let blocks = checkpoint.row_split_blocks();
        assert_eq!((blocks.o, blocks.down), (format.block_len(), format.block_len()));
    }
}

#[test]
fn biases_are_found_and_the_output_bias_of_gguf_files_is_optional() {
    let config = ModelConfig {
        attention_bias: true,
        mlp_bias: true,
        ..tiny_config()
    };
    let checkpoint = open_bytes(random_gguf(&config, |_| TensorFormat::F16)).unwrap();
    assert_eq!(
        checkpoint
            .tensor(layer(0, LayerTensor::KBias))
            .map(|info| info.rows),
        Some(32)
    );
    assert_eq!(
        checkpoint
            .tensor(layer(1, LayerTensor::DownBias))
            .map(|info| info.rows),
        Some(64)
    );
    let checkpoint = open_bytes(without(&config, |name| name.ends_with("attn_output.bias"))).unwrap();
    assert_eq!(checkpoint.tensor(layer(0, LayerTensor::OBias)), None);
    assert!(checkpoint.tensor(layer(0, LayerTensor::VBias)).is_some());
}

/// A GGUF file whose directory lacks some of the configuration's tensors.
fn without(config: &ModelConfig, drop: impl Fn(&str) -> bool) -> Vec<u8> {
    let whole = GgufWriter::llama(config, |_| TensorFormat::F16).unwrap();
    let mut writer = GgufWriter::llama(
        &ModelConfig {
            num_hidden_layers: 0,
            ..config.clone()
        },
        |_| TensorFormat::F16,
    )
    .unwrap();
    writer.metadata("llama.block_count", config.num_hidden_layers as u64);
    for tensor in whole
        .tensors()
        .iter()
        .filter(|tensor| tensor.name.starts_with("blk.") && !drop(&tensor.name))
    {
        writer
            .tensor(tensor.name.clone(), &tensor.dims, tensor.format)
            .unwrap();
    }
    writer
        .to_bytes(|tensor, out| RandomWeights::new(3).fill(tensor, out))
        .unwrap()
}

#[test]
fn a_missing_tensor_is_named() {
    let error = open_bytes(without(&tiny_config(), |name| name == "blk.1.attn_k.weight")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "tensor `blk.1.attn_k.weight` is missing; expected 32 x 64"
    );
}

#[test]
fn a_wrong_shape_is_named_with_both_shapes() {
    let mut writer = GgufWriter::llama(&tiny_config(), |_| TensorFormat::F16).unwrap();
    writer.metadata("llama.vocab_size", 71_u32);
    let bytes = writer
        .to_bytes(|tensor, out| RandomWeights::new(3).fill(tensor, out))
        .unwrap();
    let error = open_bytes(bytes).unwrap_err();
    assert_eq!(
        error.to_string(),
        "tensor `token_embd.weight` has shape [70, 64], expected [71, 64]"
    );
}

#[test]
fn unsupported_formats_are_named() {
    let mut bytes = random_gguf(&tiny_config(), |_| TensorFormat::Q8_0);
    // The type number follows the name, the number of dimensions and two dimensions.
    let name = b"blk.0.attn_v.weight";
    let at = bytes
        .windows(name.len())
        .position(|window| window == name)
        .unwrap()
        + name.len()
        + 4
        + 16;
    bytes[at..at + 4].copy_from_slice(&16_u32.to_le_bytes());
    let message = open_bytes(bytes).unwrap_err().to_string();
    assert!(
        message.starts_with("tensor `blk.0.attn_v.weight` is IQ2_XXS; expected one of F32, F16"),
        "{message}"
    );
}

#[test]
fn fingerprints_differ_with_the_header_only() {
    let fingerprint = |bytes: Vec<u8>| open_bytes(bytes).unwrap().fingerprint();
    let bytes = random_gguf(&tiny_config(), |_| TensorFormat::Q8_0);
    let mut other_weights = bytes.clone();
    *other_weights.last_mut().unwrap() ^= 1;
    assert_eq!(fingerprint(bytes.clone()), fingerprint(other_weights));
    let other_header = random_gguf(
        &ModelConfig {
            rms_norm_eps: 1e-6,
            ..tiny_config()
        },
        |_| TensorFormat::Q8_0,
    );
    assert_ne!(fingerprint(bytes), fingerprint(other_header));
}

#[test]
fn files_that_cannot_be_mapped_are_named() {
    let error = open(Path::new("/nonexistent/model.gguf")).unwrap_err();
    assert!(
        matches!(&error, CheckpointError::Map { path, .. } if path == Path::new("/nonexistent/model.gguf"))
    );
    let empty = tempfile::tempdir().unwrap();
    assert!(
        open(empty.path())
            .unwrap_err()
            .to_string()
            .contains("config.json")
    );
}

#[test]
fn one_safetensors_file_and_several_shards_give_the_same_tensors() {
    let single = Directory::new();
    single.write_shard("model.safetensors", |_| true);
    let single = single.open().unwrap();
    assert_eq!(single.config().rope.layout, RopeLayout::Half);
    assert!(single.gguf().is_none());

    let sharded = Directory::new();
    let first = sharded.write_shard("model-00001-of-00002.safetensors", |name| {
        name.contains("layers.0.")
    });
    let second = sharded.write_shard("model-00002-of-00002.safetensors", |name| {
        !name.contains("layers.0.")
    });
    let files = [
        ("model-00001-of-00002.safetensors", first),
        ("model-00002-of-00002.safetensors", second),
    ];
    sharded.write_index(&files);
    let sharded = sharded.open().unwrap();
    assert_eq!(sharded.maps().len(), 2);
    for role in tiny_config().roles() {
        let (one, two) = (single.tensor(role).unwrap(), sharded.tensor(role).unwrap());
        assert_eq!(
            (one.format, one.rows, one.cols, one.bytes),
            (two.format, two.rows, two.cols, two.bytes)
        );
        assert_eq!(one.format, TensorFormat::BF16);
        assert_eq!(sharded.tensor_bytes(role).unwrap().len(), two.bytes);
    }
    // Data starts right behind the header, and every byte holds its position in the data.
    let first = single.tensors().min_by_key(|(_, info)| info.offset).unwrap().0;
    assert_eq!(single.tensor_bytes(first).unwrap()[..4], [0, 1, 2, 3]);
    assert_ne!(single.fingerprint(), sharded.fingerprint());
}

#[test]
fn index_entries_cannot_leave_the_directory() {
    for name in [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "a\\b.safetensors",
        "",
        "passwd",
        "..safetensors",
    ] {
        let directory = Directory::new();
        directory.write_index(&[(name, vec!["model.norm.weight".to_owned()])]);
        let error = directory.open().unwrap_err().to_string();
        assert!(
            error.contains("is not the plain name of a .safetensors file"),
            "{name}: {error}"
        );
    }
}

#[test]
fn an_index_that_names_absent_tensors_or_files_is_refused() {
    let directory = Directory::new();
    let mut names = directory.write_shard("model-1.safetensors", |_| true);
    names.push("model.layers.9.mlp.up_proj.weight".to_owned());
    directory.write_index(&[("model-1.safetensors", names)]);
    assert!(
        directory
            .open()
            .unwrap_err()
            .to_string()
            .contains("model.layers.9.mlp.up_proj.weight")
    );
    directory.write_index(&[("model-2.safetensors", vec!["model.norm.weight".to_owned()])]);
    assert!(matches!(
        directory.open().unwrap_err(),
        CheckpointError::Map { .. }
    ));
}

#[test]
fn broken_safetensors_headers_are_refused() {
    let directory = Directory::new();
    let open_with = |bytes: &[u8]| {
        fs::write(directory.path().join("model.safetensors"), bytes).unwrap();
        directory.open().unwrap_err().to_string()
    };
    let with_header = |json: &str| [&(json.len() as u64).to_le_bytes(), json.as_bytes()].concat();
    assert!(open_with(&[]).contains("no length"));
    assert!(open_with(&[0xff; 8]).contains("limit"));
    assert!(open_with(&[&200_u64.to_le_bytes()[..], &[b' '; 100]].concat()).contains("limit 100"));
    assert!(open_with(&with_header("{")).contains("header"));
    let beyond = r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#;
    assert!(open_with(&with_header(beyond)).contains("tensor data ends 16 bytes"));
    // Eight tensors of 2^61 bytes end just below 2^64: adding the header's length to that overflows.
    let huge = (0..8_u64).map(|i| {
        let end = (i + 1).saturating_mul(1 << 61);
        format!(
            r#""t{i}":{{"dtype":"U8","shape":[{}],"data_offsets":[{},{end}]}}"#,
            end - (i << 61),
            i << 61
        )
    });
    let huge = format!("{{{}}}", huge.collect::<Vec<_>>().join(","));
    assert!(open_with(&with_header(&huge)).contains("model.safetensors"));
}

#[test]
fn safetensors_of_other_types_are_named() {
    let mut directory = Directory::new();
    let name = "model.layers.1.mlp.gate_proj.weight";
    directory.tensors.get_mut(name).unwrap().1 = "F64";
    directory.write_shard("model.safetensors", |_| true);
    let message = directory.open().unwrap_err().to_string();
    assert!(
        message.starts_with(&format!("tensor `{name}` is F64; expected one of F32, F16, BF16")),
        "{message}"
    );
}

/// A checkpoint whose matrices of layers are E4M3, with these scales beside them.
fn fp8_directory(scale: (Vec<usize>, &'static str)) -> Directory {
    let mut directory = Directory::new();
    let mut config: Value =
        serde_json::from_slice(&fs::read(directory.path().join("config.json")).unwrap()).unwrap();
    config["quantization_config"] = json!({"quant_method": "fp8", "activation_scheme": "dynamic"});
    directory.write_json("config.json", &config);
    let mut scales = Vec::new();
    for (name, (shape, dtype)) in &mut directory.tensors {
        if name.contains("_proj.weight") {
            *dtype = "F8_E4M3";
            let shape = scale
                .0
                .iter()
                .map(|&rows| if rows == 0 { shape[0] } else { rows });
            scales.push((format!("{name}_scale"), (shape.collect(), scale.1)));
        }
    }
    directory.tensors.extend(scales);
    directory
}

#[test]
fn fp8_matrices_have_a_scale_for_each_row() {
    let down = layer(1, LayerTensor::Down);
    // Zero stands for the matrix's rows.
    for shape in [vec![], vec![1], vec![0], vec![0, 1]] {
        let directory = fp8_directory((shape.clone(), "BF16"));
        directory.write_shard("model.safetensors", |_| true);
        let checkpoint = directory.open().unwrap();
        assert_eq!(checkpoint.tensor(down).unwrap().format, TensorFormat::F8_E4M3);
        let scales = checkpoint.row_scales(down).unwrap().unwrap();
        assert_eq!(scales.len(), checkpoint.tensor(down).unwrap().rows);
        assert_eq!(
            scales.iter().all(|&scale| scale == scales[0]),
            !shape.contains(&0)
        );
        assert_eq!(checkpoint.row_scales(TensorRole::TokenEmbedding).unwrap(), None);
        assert_eq!(checkpoint.row_split_blocks().down, 1);
    }
}

#[test]
fn scales_that_are_missing_or_odd_are_named() {
    let refused = |directory: Directory| {
        directory.write_shard("model.safetensors", |_| true);
        directory.open().unwrap_err().to_string()
    };
    let name = "model.layers.1.mlp.down_proj.weight_scale";
    let mut directory = fp8_directory((vec![], "F32"));
    let scale = directory.tensors.remove(name).unwrap();
    assert!(refused(directory).starts_with(&format!("tensor `{name}` is missing")));
    let mut directory = fp8_directory((vec![], "F32"));
    directory.tensors.remove(name);
    directory.tensors.insert(format!("{name}_inv"), scale);
    assert!(refused(directory).contains("scales of blocks, which are not supported"));
    let mut directory = fp8_directory((vec![], "F32"));
    directory.tensors.get_mut(name).unwrap().0 = vec![3, 2];
    assert!(refused(directory).contains("has shape [3, 2], expected [64, 1]"));
    let mut directory = fp8_directory((vec![], "F32"));
    directory.tensors.get_mut(name).unwrap().1 = "F64";
    assert!(refused(directory).contains("is F64; expected one of F32, BF16"));
    // The embedding is a table, not a factor.
    let mut directory = fp8_directory((vec![], "F32"));
    directory.tensors.get_mut("model.embed_tokens.weight").unwrap().1 = "F8_E4M3";
    assert!(refused(directory).contains("`model.embed_tokens.weight` is F8_E4M3; expected one of F32"));
    // Without a word in config.json nobody knows what the codes are scaled with.
    let directory = fp8_directory((vec![], "F32"));
    let mut config: Value =
        serde_json::from_slice(&fs::read(directory.path().join("config.json")).unwrap()).unwrap();
    config.as_object_mut().unwrap().remove("quantization_config");
    directory.write_json("config.json", &config);
    assert!(refused(directory).contains("config.json has no quantization_config of fp8"));
}
