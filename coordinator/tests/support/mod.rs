//! The demo model and its text side, shared by the tests.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::{env, fs, path::PathBuf};

use phalanx_coordinator::text::{ModelLimits, TextModel, TextOptions, TextProcessor};
use phalanx_model::gguf::Gguf;

/// The demo model's file. Tests that need it fail without it: a skipped test proves nothing.
pub(crate) fn demo_path() -> PathBuf {
    let path = env::var_os("PHALANX_DEMO_MODEL").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../.cache/models/SmolLM2-135M-Instruct.Q4_1.gguf"),
        PathBuf::from,
    );
    assert!(
        path.is_file(),
        "the demo model is not at {}: run ./scripts/fetch-demo-model, or set PHALANX_DEMO_MODEL",
        path.display()
    );
    path
}

pub(crate) fn demo_model() -> TextModel {
    let bytes = fs::read(demo_path()).expect("readable");
    TextModel::from_gguf(&Gguf::parse(bytes).expect("a GGUF file")).expect("a supported tokenizer")
}

/// The demo model in a context of `max_model_len` tokens.
pub(crate) fn demo_processor(max_model_len: u32) -> TextProcessor {
    let options = TextOptions {
        limits: ModelLimits {
            max_model_len,
            vocab_size: 49_152,
            max_logprobs: 20,
        },
        chat_template: None,
        chat: Default::default(),
        threads: Some(1),
        seed: None,
    };
    TextProcessor::new(demo_model(), options).expect("a template that compiles")
}
