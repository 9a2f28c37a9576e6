//! Configurations from GGUF metadata and from config.json: values, defaults, and what is refused.

mod support;

use phalanx_model::{
    ConfigError, ModelConfig, RopeConfig, RopeLayout, RopeScaling, TensorFormat,
    gguf::{Gguf, GgufWriter, MetadataValue, RandomWeights},
};
use serde_json::{Value, json};
use support::tiny_config;

fn tiny_writer() -> GgufWriter {
    GgufWriter::llama(&tiny_config(), |_| TensorFormat::F16).unwrap()
}

fn from_gguf(writer: &GgufWriter) -> Result<ModelConfig, ConfigError> {
    let bytes = writer
        .to_bytes(|tensor, out| RandomWeights::new(1).fill(tensor, out))
        .unwrap();
    ModelConfig::from_gguf(&Gguf::parse(bytes).unwrap())
}

fn with(key: &str, value: impl Into<MetadataValue>) -> Result<ModelConfig, ConfigError> {
    from_gguf(tiny_writer().metadata(key, value))
}

#[test]
fn a_gguf_file_gives_back_the_configuration_it_was_written_from() {
    assert_eq!(from_gguf(&tiny_writer()), Ok(tiny_config()));
    let untied = ModelConfig {
        tie_word_embeddings: false,
        attention_bias: true,
        mlp_bias: true,
        sliding_window: Some(64),
        rope: RopeConfig {
            scaling: RopeScaling::Linear { factor: 2.0 },
            ..tiny_config().rope
        },
        ..tiny_config()
    };
    assert_eq!(
        from_gguf(&GgufWriter::llama(&untied, |_| TensorFormat::F32).unwrap()),
        Ok(untied)
    );
}

#[test]
fn hostile_gguf_values_are_refused_by_name() {
    let cases: [(&str, MetadataValue, &str); 16] = [
        ("llama.block_count", 0x7fff_ffff_u32.into(), "num_hidden_layers"),
        ("llama.block_count", 0_u32.into(), "num_hidden_layers"),
        ("llama.context_length", 0_u32.into(), "max_position_embeddings"),
        ("llama.context_length", u32::MAX.into(), "max_position_embeddings"),
        ("llama.embedding_length", u64::MAX.into(), "hidden_size"),
        ("llama.feed_forward_length", u64::MAX.into(), "intermediate_size"),
        ("llama.vocab_size", u32::MAX.into(), "vocab_size"),
        (
            "llama.attention.head_count",
            0_u32.into(),
            "llama.attention.head_count",
        ),
        (
            "llama.attention.head_count",
            u32::MAX.into(),
            "num_attention_heads",
        ),
        (
            "llama.attention.head_count_kv",
            0_u32.into(),
            "num_key_value_heads",
        ),
        (
            "llama.attention.head_count_kv",
            3_u32.into(),
            "num_key_value_heads",
        ),
        (
            "llama.attention.value_length",
            8_u32.into(),
            "llama.attention.value_length",
        ),
        ("llama.rope.dimension_count", 18_u32.into(), "rotary_dim"),
        ("llama.rope.freq_base", f32::INFINITY.into(), "rope_theta"),
        (
            "llama.attention.layer_norm_rms_epsilon",
            f32::NAN.into(),
            "rms_norm_eps",
        ),
        (
            "llama.attention.layer_norm_rms_epsilon",
            0.0_f32.into(),
            "rms_norm_eps",
        ),
    ];
    for (key, value, name) in cases {
        match with(key, value.clone()) {
            Err(ConfigError::OutOfRange { key, .. }) => assert_eq!(key, name),
            other => panic!("{key} = {value:?} gave {other:?}"),
        }
    }
    let odd = with("llama.attention.key_length", 15_u32).unwrap_err();
    assert!(matches!(odd, ConfigError::OutOfRange { .. }), "{odd}");
    assert!(matches!(
        with("llama.block_count", "two"),
        Err(ConfigError::Gguf(_))
    ));
    assert!(matches!(with("llama.block_count", -1), Err(ConfigError::Gguf(_))));
}

#[test]
fn unsupported_models_are_told_what_is_supported() {
    let message = with("general.architecture", "gpt2").unwrap_err().to_string();
    assert_eq!(
        message,
        "architecture `gpt2` is not supported; supported: llama, mistral"
    );
    assert!(matches!(
        with("llama.expert_count", 8_u32),
        Err(ConfigError::Unsupported { .. })
    ));
    assert!(matches!(
        with("split.count", 3_u32),
        Err(ConfigError::Unsupported { .. })
    ));
    assert!(matches!(
        with("llama.rope.scaling.type", "longrope"),
        Err(ConfigError::Unsupported { .. })
    ));
    let empty = Gguf::parse(GgufWriter::new().to_bytes(|_, _| Ok(())).unwrap()).unwrap();
    let error = ModelConfig::from_gguf(&empty).unwrap_err();
    assert_eq!(
        error,
        ConfigError::Missing {
            key: "general.architecture".to_owned()
        }
    );
}

#[test]
fn vocab_size_falls_back_to_the_number_of_tokens() {
    let mut writer = GgufWriter::new();
    writer
        .metadata("general.architecture", "llama")
        .metadata("llama.embedding_length", 64_u32);
    writer
        .metadata("llama.attention.head_count", 4_u32)
        .metadata("llama.feed_forward_length", 96_u32);
    writer
        .metadata("llama.block_count", 2_u32)
        .metadata("llama.context_length", 128_u32);
    writer.metadata("llama.attention.layer_norm_rms_epsilon", 1e-5_f32);
    let missing = from_gguf(&writer).unwrap_err();
    assert_eq!(
        missing,
        ConfigError::Missing {
            key: "llama.vocab_size".to_owned()
        }
    );
    writer.metadata("tokenizer.ggml.tokens", vec!["a".to_owned(); 70]);
    let config = from_gguf(&writer).unwrap();
    assert_eq!(
        config,
        ModelConfig {
            num_key_value_heads: 4,
            ..tiny_config()
        }
    );
}

#[test]
fn rope_factors_of_gguf_files_are_read_and_combine_with_linear_scaling() {
    let factors = RopeScaling::FrequencyFactors {
        factors: vec![1.0, 1.0, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0],
    };
    let rope = RopeConfig {
        scaling: factors,
        ..tiny_config().rope
    };
    let config = ModelConfig {
        rope,
        ..tiny_config()
    };
    let mut writer = GgufWriter::llama(&config, |_| TensorFormat::F16).unwrap();
    let read = |writer: &GgufWriter| {
        let bytes = writer.to_bytes(|tensor, out| match tensor.name.as_str() {
            "rope_freqs.weight" => [1.0_f32, 1.0, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
                .iter()
                .try_for_each(|f| out.write_all(&f.to_le_bytes())),
            _ => RandomWeights::new(1).fill(tensor, out),
        });
        ModelConfig::from_gguf(&Gguf::parse(bytes.unwrap()).unwrap())
    };
    assert_eq!(read(&writer), Ok(config));
    writer
        .metadata("llama.rope.scaling.type", "linear")
        .metadata("llama.rope.scaling.factor", 2.0_f32);
    let RopeScaling::FrequencyFactors { factors } = read(&writer).unwrap().rope.scaling else {
        panic!("no factors")
    };
    assert_eq!(factors, [2.0, 2.0, 2.0, 4.0, 8.0, 16.0, 16.0, 16.0]);
    writer.metadata("llama.rope.scaling.type", "yarn");
    assert!(matches!(read(&writer), Err(ConfigError::Unsupported { .. })));
}

#[test]
fn yarn_of_gguf_files_has_the_library_defaults() {
    let mut writer = tiny_writer();
    writer
        .metadata("llama.rope.scaling.type", "yarn")
        .metadata("llama.rope.scaling.factor", 4.0_f32);
    writer.metadata("llama.rope.scaling.original_context_length", 32_u32);
    let RopeScaling::Yarn {
        factor,
        original_max_position_embeddings,
        beta_fast,
        beta_slow,
        attention_factor,
    } = from_gguf(&writer).unwrap().rope.scaling
    else {
        panic!("not YaRN")
    };
    assert_eq!(
        (factor, original_max_position_embeddings, beta_fast, beta_slow),
        (4.0, 32, 32.0, 1.0)
    );
    assert!((attention_factor - 1.138_629_4).abs() < 1e-6);
}

/// Meta's Llama 3.1 8B, as its config.json has it.
fn llama_31() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 128256
    })
}

fn from_json(value: &Value) -> Result<ModelConfig, ConfigError> {
    ModelConfig::from_config_json(value.to_string().as_bytes())
}

/// Llama 3.1 with fields replaced; null removes.
fn changed(fields: Value) -> Result<ModelConfig, ConfigError> {
    let mut config = llama_31();
    let (Value::Object(config_fields), Value::Object(fields)) = (&mut config, fields) else {
        panic!("objects")
    };
    config_fields.extend(fields);
    from_json(&config)
}

#[test]
fn llama_31_is_read() {
    let config = from_json(&llama_31()).unwrap();
    let expected = ModelConfig {
        architecture: "llama".to_owned(),
        hidden_size: 4096,
        intermediate_size: 14_336,
        num_hidden_layers: 32,
        num_attention_heads: 32,
        num_key_value_heads: 8,
        head_dim: 128,
        vocab_size: 128_256,
        max_position_embeddings: 131_072,
        rms_norm_eps: 1e-5,
        rope: RopeConfig {
            theta: 500_000.0,
            rotary_dim: 128,
            layout: RopeLayout::Half,
            scaling: RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 8192,
            },
        },
        tie_word_embeddings: false,
        attention_bias: false,
        mlp_bias: false,
        sliding_window: None,
    };
    assert_eq!(config, expected);
}

#[test]
fn mistral_has_its_own_defaults() {
    let mistral = json!({"model_type": "mistral", "rope_scaling": null, "rope_theta": 10000.0});
    assert_eq!(changed(mistral.clone()).unwrap().sliding_window, Some(4096));
    let mut windowless = mistral;
    windowless["sliding_window"] = Value::Null;
    windowless["num_key_value_heads"] = Value::Null;
    let config = changed(windowless).unwrap();
    assert_eq!((config.sliding_window, config.num_key_value_heads), (None, 8));
}

#[test]
fn rope_settings_of_old_and_new_versions_of_the_library_are_read() {
    let scaling = |fields: Value| changed(json!({"rope_scaling": fields})).map(|config| config.rope.scaling);
    assert_eq!(
        scaling(json!({"type": "linear", "factor": 2.0})),
        Ok(RopeScaling::Linear { factor: 2.0 })
    );
    assert_eq!(scaling(json!({"rope_type": "default"})), Ok(RopeScaling::None));
    assert!(matches!(
        scaling(json!({"type": "dynamic", "factor": 2.0})),
        Err(ConfigError::Unsupported { .. })
    ));
    assert_eq!(
        scaling(json!({"type": "linear"})),
        Err(ConfigError::Missing {
            key: "rope_scaling.factor".to_owned()
        })
    );
    let yarn = scaling(json!({"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}));
    assert!(
        matches!(
            yarn,
            Ok(RopeScaling::Yarn {
                attention_factor: 1.0,
                ..
            })
        ),
        "{yarn:?}"
    );
    let v5 = changed(json!({
        "rope_scaling": null, "rope_theta": null,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6, "partial_rotary_factor": 0.5}
    }));
    let rope = v5.unwrap().rope;
    assert_eq!(
        (rope.theta, rope.rotary_dim, rope.scaling),
        (1e6, 64, RopeScaling::Linear { factor: 4.0 })
    );
}

#[test]
fn unusable_config_json_is_refused_by_field() {
    let cases = [
        (json!({"num_hidden_layers": 2_147_483_647}), "num_hidden_layers"),
        (json!({"max_position_embeddings": 0}), "max_position_embeddings"),
        (json!({"hidden_size": -1}), "hidden_size"),
        (json!({"hidden_size": "4096"}), "hidden_size"),
        (json!({"hidden_size": [1, 2, 3]}), "hidden_size"),
        (json!({"head_dim": 63}), "head_dim"),
        (json!({"head_dim": 1024}), "head_dim"),
        (json!({"num_key_value_heads": 5}), "num_key_value_heads"),
        (json!({"rms_norm_eps": 0.0}), "rms_norm_eps"),
        (json!({"rms_norm_eps": 1e300}), "rms_norm_eps"),
        (json!({"rope_theta": 0.5}), "rope_theta"),
        (json!({"partial_rotary_factor": 1e30}), "rotary_dim"),
        (json!({"sliding_window": 0}), "sliding_window"),
    ];
    for (fields, name) in cases {
        match changed(fields.clone()) {
            Err(ConfigError::OutOfRange { key, .. }) => assert_eq!(key, name),
            other => panic!("{fields} gave {other:?}"),
        }
    }
    assert!(matches!(
        changed(json!({"hidden_act": "gelu"})),
        Err(ConfigError::Unsupported { .. })
    ));
    assert!(matches!(
        changed(json!({"model_type": "gpt_neox"})),
        Err(ConfigError::UnsupportedArchitecture { found }) if found == "gpt_neox"
    ));
    assert!(matches!(
        ModelConfig::from_config_json(b"{\"model_type\": NaN}"),
        Err(ConfigError::Json(_))
    ));
    assert!(matches!(
        ModelConfig::from_config_json(&b"[".repeat(100_000)),
        Err(ConfigError::Json(_))
    ));
    assert!(matches!(
        ModelConfig::from_config_json(&vec![b' '; 2 << 20]),
        Err(ConfigError::OutOfRange { .. })
    ));
}
