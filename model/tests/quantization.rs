//! `quantization_config`: what is read of it, and what is refused by name.

use phalanx_model::{
    Quantization,
    quantization::{GptqZeros, Int4Packing, Int4Quantization},
};
use serde_json::{Value, json};

fn read(config: &Value) -> Result<Option<Quantization>, String> {
    let json = json!({"quantization_config": config}).to_string();
    Quantization::from_config_json(json.as_bytes()).map_err(|error| error.to_string())
}

#[test]
fn awq_and_gptq_are_read() {
    let int4 = |packing, group_size, symmetric| {
        let int4 = Int4Quantization {
            packing,
            group_size,
            symmetric,
        };
        Ok(Some(Quantization::Int4(int4)))
    };
    let awq = json!({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": true, "version": "gemm",
        "modules_to_not_convert": null});
    assert_eq!(read(&awq), int4(Int4Packing::Awq, Some(128), false));
    let old_names = json!({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": false});
    assert_eq!(read(&old_names), int4(Int4Packing::Awq, Some(64), true));
    let gptq = json!({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": true, "desc_act": false});
    let zeros = GptqZeros::LessOne;
    assert_eq!(read(&gptq), int4(Int4Packing::Gptq { zeros }, Some(32), true));
    let v2 = json!({"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": false, "dynamic": {},
        "checkpoint_format": "gptq_v2"});
    let zeros = GptqZeros::Plain;
    assert_eq!(read(&v2), int4(Int4Packing::Gptq { zeros }, None, false));
    assert_eq!(read(&Value::Null), Ok(None));
    assert_eq!(Quantization::from_config_json(b"{}"), Ok(None));
}

#[test]
fn what_is_not_supported_is_named() {
    let refused = |method: &str, change: Value| {
        let mut config = json!({"quant_method": method, "bits": 4, "group_size": 128});
        let fields = config.as_object_mut().unwrap();
        fields.extend(change.as_object().unwrap().clone());
        read(&config).unwrap_err()
    };
    let gptq = |change| refused("gptq", change);
    assert_eq!(
        gptq(json!({"desc_act": true})),
        "quantization_config.desc_act is true: groups of input features that do not follow each other are not supported"
    );
    assert_eq!(
        gptq(json!({"bits": 8})),
        "quantization_config.bits is 8: only 4 is supported"
    );
    for (field, error) in [
        (json!({"group_size": 48}), "group_size is 48"),
        (json!({"group_size": 0}), "group_size is 0"),
        (json!({"group_size": null}), "group_size is missing"),
        (json!({"bits": "4"}), "bits is \"4\""),
        (json!({"bits": null}), "bits is missing"),
        (
            json!({"checkpoint_format": "marlin"}),
            "checkpoint_format is \"marlin\"",
        ),
        (json!({"is_marlin_format": true}), "is_marlin_format is true"),
        (json!({"dynamic": {"-:.*": {}}}), "dynamic is set"),
        (json!({"quant_method": null}), "quant_method is missing"),
        (
            json!({"quant_method": "bitsandbytes"}),
            "quant_method is \"bitsandbytes\"",
        ),
    ] {
        let text = gptq(field);
        assert!(
            text.starts_with(&format!("quantization_config.{error}")),
            "{text}"
        );
    }
    let text = refused("awq", json!({"version": "gemv"}));
    assert!(
        text.starts_with("quantization_config.version is \"gemv\""),
        "{text}"
    );
}

#[test]
fn fp8_checkpoints_of_both_kinds_are_read() {
    let fp8 = json!({"quant_method": "fp8", "activation_scheme": "static", "fmt": "e4m3", "ignored_layers": ["lm_head"]});
    assert_eq!(read(&fp8), Ok(Some(Quantization::Fp8)));
    let compressed = |weights: Value, format: &str| {
        read(
            &json!({"quant_method": "compressed-tensors", "format": format, "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights,
                "input_activations": {"num_bits": 8, "type": "float", "dynamic": true, "strategy": "token"}}}}),
        )
    };
    for strategy in ["tensor", "channel"] {
        let weights = json!({"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": true});
        assert_eq!(
            compressed(weights, "float-quantized"),
            Ok(Some(Quantization::Fp8))
        );
    }
    let prefix = "quantization_config.";
    for (found, error) in [
        (
            read(&json!({"quant_method": "fp8", "weight_block_size": [128, 128]})),
            "weight_block_size is set: scales of blocks are not supported, only those of tensors and channels",
        ),
        (
            read(&json!({"quant_method": "fp8", "fmt": "e5m2"})),
            "fmt is \"e5m2\": supported: e4m3",
        ),
        (
            compressed(
                json!({"num_bits": 8, "type": "int", "strategy": "channel"}),
                "float-quantized",
            ),
            "config_groups.*.weights.type is \"int\": supported: float",
        ),
        (
            compressed(
                json!({"num_bits": 8, "type": "float", "strategy": "block"}),
                "float-quantized",
            ),
            "config_groups.*.weights.strategy is \"block\": supported: tensor, channel",
        ),
        (
            compressed(json!({"num_bits": 8, "type": "float"}), "float-quantized"),
            "config_groups.*.weights.strategy is missing",
        ),
        (
            compressed(json!({}), "pack-quantized"),
            "format is \"pack-quantized\": supported: float-quantized",
        ),
    ] {
        assert_eq!(found.unwrap_err(), format!("{prefix}{error}"));
    }
}
