//! What is decided about the demo model on devices of given sizes.

mod support;

use std::path::Path;

use phalanx_coordinator::{
    config::{DeviceChoice, KvCacheSize, ModelOptions},
    deployment::{Deployment, DeploymentError, GpuMemory, Hardware, Proposal},
};
use phalanx_model::{KvDtype, TensorParallelStyle};
use phalanx_proto::v1::DeviceKind;
use support::demo_path;

const GIB: u64 = 1 << 30;

fn options(tensor_parallel_size: usize) -> ModelOptions {
    ModelOptions {
        path: demo_path(),
        tensor_parallel_size,
        device: DeviceChoice::Auto,
        quantization: None,
        style: None,
        rank_weights: None,
        max_model_len: Some(2048),
        max_num_seqs: 16,
        max_num_batched_tokens: 256,
        block_size: 16,
        kv_cache: KvCacheSize::Auto,
        kv_dtype: KvDtype::F16,
        gpu_memory_utilization: 0.75,
    }
}

fn gpus(sizes: &[u64]) -> Hardware {
    let gpu = |&total| GpuMemory { total, free: total };
    Hardware::Cuda(sizes.iter().map(gpu).collect())
}

fn resolve(options: ModelOptions, hardware: &Hardware) -> Result<Deployment, DeploymentError> {
    Proposal::open(options)?.resolve(hardware, Path::new("/dev/shm"))
}

#[test]
fn gpus_reduce_and_cpus_gather_unless_told_otherwise() {
    let on_cpu = resolve(options(2), &Hardware::Cpu).unwrap();
    assert_eq!(
        (on_cpu.device, on_cpu.style),
        (DeviceKind::Cpu, TensorParallelStyle::Gather)
    );
    let on_gpu = resolve(options(2), &gpus(&[GIB, GIB])).unwrap();
    assert_eq!(
        (on_gpu.device, on_gpu.style),
        (DeviceKind::Cuda, TensorParallelStyle::Reduce)
    );
    assert!(
        on_gpu.shape(1).arena_bytes < on_cpu.shape(1).arena_bytes,
        "activations stay on the devices"
    );
    let mut asked = options(2);
    asked.style = Some(TensorParallelStyle::Gather);
    assert_eq!(
        resolve(asked, &gpus(&[GIB, GIB])).unwrap().style,
        TensorParallelStyle::Gather
    );
    let assigns = on_gpu.assigns(&[1, 1], std::time::Duration::from_secs(1));
    assert!(assigns.iter().all(|assign| assign.device() == DeviceKind::Cuda));
}

#[test]
fn the_kv_cache_gets_what_a_gpu_has_left() {
    let deployment = resolve(options(2), &gpus(&[GIB, 2 * GIB])).unwrap();
    let ranks = &deployment.memory.ranks;
    // The file's 94 MiB stay as they are; two thirds of the heads and half of the rest on the first rank.
    assert!(
        (44 << 20..60 << 20).contains(&ranks[0].weights),
        "{}",
        ranks[0].weights
    );
    let blocks = u64::from(deployment.num_blocks);
    let budget = GIB * 3 / 4;
    assert!(ranks[0].total(blocks) <= budget && ranks[0].total(blocks + 1) > budget);
}

#[test]
fn a_gpu_that_is_too_small_is_named() {
    let error = resolve(options(2), &gpus(&[GIB, GIB / 4]))
        .err()
        .expect("refused");
    assert!(error.to_string().starts_with("rank 1 needs "), "{error}");
}

#[test]
fn another_quantization_than_the_files_is_refused() {
    let mut asked = options(1);
    asked.quantization = Some("gguf".to_owned());
    assert!(Proposal::open(asked.clone()).is_ok());
    asked.quantization = Some("awq".to_owned());
    let error = Proposal::open(asked).err().expect("refused");
    assert_eq!(
        error.to_string(),
        "quantization is awq, the model's files say gguf"
    );
}
