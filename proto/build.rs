//! Compiles the .proto files without protoc (protox) into tonic services and prost messages.
use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    let own = ["inference", "cluster", "admin", "control", "tokenizer"]
        .map(|name| format!("proto/phalanx/v1/{name}.proto"));
    let files: Vec<String> = own
        .into_iter()
        .chain(["inference", "control"].map(|name| format!("proto/vllm/{name}.proto")))
        .chain(["proto/opentelemetry/trace.proto".to_owned()])
        .collect();
    for file in &files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(&files, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("phalanx_descriptor.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .build_transport(true)
        .compile_fds(descriptors)?;
    Ok(())
}
