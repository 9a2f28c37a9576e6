//! What is decided about the demo model on devices of given sizes.

mod support;

use std::path::Path;

use phalanx_coordinator::{
    config::{DeviceChoice, KvCacheSize, MaxModelLen, ModelOptions},
    deployment::{Deployment, DeploymentError, Hardware, Proposal},
    engine::NgramSpeculation,
};
use phalanx_model::{GpuMemory, KvDtype, QuantizationMethod, TensorParallelStyle};
use phalanx_proto::v1::DeviceKind;
use support::demo_path;

const GIB: u64 = 1 << 30;

fn options(tensor_parallel_size: usize) -> ModelOptions {
    ModelOptions {
        path: demo_path(),
        tensor_parallel_size,
        device: DeviceChoice::Auto,
        style: None,
        rank_weights: None,
        max_model_len: MaxModelLen::Tokens(2048),
        max_num_seqs: 16,
        max_num_batched_tokens: 256,
        speculative: None,
        max_logprobs: 20,
        block_size: 16,
        kv_cache: KvCacheSize::Auto,
        kv_dtype: KvDtype::F16,
        quantization: None,
        gpu_memory_utilization: 0.75,
        disable_custom_all_reduce: false,
        enforce_eager: false,
        cudagraph_capture_sizes: None,
    }
}

fn gpus(sizes: &[u64]) -> Hardware {
    let gpu = |&total| GpuMemory {
        total,
        free: total,
        multiplies_e4m3: true,
    };
    Hardware::Cuda(sizes.iter().map(gpu).collect())
}

fn resolve(options: ModelOptions, hardware: &Hardware) -> Result<Deployment, DeploymentError> {
    Proposal::open(options)?.resolve(hardware, Path::new("/dev/shm"))
}

#[test]
fn gpus_reduce_and_cpus_gather_unless_told_otherwise() {
    let on_cpu = resolve(options(2), &Hardware::Cpu).unwrap();
    assert_eq!(
        (on_cpu.device, on_cpu.plan.style),
        (DeviceKind::Cpu, TensorParallelStyle::Gather)
    );
    let on_gpu = resolve(options(2), &gpus(&[GIB, GIB])).unwrap();
    assert_eq!(
        (on_gpu.device, on_gpu.plan.style),
        (DeviceKind::Cuda, TensorParallelStyle::Reduce)
    );
    assert!(
        on_gpu.shape(1).arena_bytes < on_cpu.shape(1).arena_bytes,
        "activations stay on the devices"
    );
    let mut asked = options(2);
    asked.style = Some(TensorParallelStyle::Gather);
    assert_eq!(
        resolve(asked, &gpus(&[GIB, GIB])).unwrap().plan.style,
        TensorParallelStyle::Gather
    );
    let assigns = on_gpu.assigns(&[1, 1], std::time::Duration::from_secs(1));
    assert!(assigns.iter().all(|assign| assign.device() == DeviceKind::Cuda));
}

#[test]
fn the_kv_cache_gets_what_a_gpu_has_left() {
    let deployment = resolve(options(2), &gpus(&[GIB, 2 * GIB])).unwrap();
    let ranks = &deployment.plan.memory.ranks;
    // The file's 94 MiB stay as they are; two thirds of the heads and half of the rest on the first rank.
    assert!(
        (44 << 20..60 << 20).contains(&ranks[0].weights),
        "{}",
        ranks[0].weights
    );
    let blocks = u64::from(deployment.plan.num_blocks);
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
fn the_segment_has_the_bytes_that_were_planned() {
    for (ranks, hardware) in [(1, Hardware::Cpu), (3, Hardware::Cpu), (2, gpus(&[GIB, GIB]))] {
        let deployment = resolve(options(ranks), &hardware).unwrap();
        let shape = deployment.shape(1);
        assert_eq!(
            deployment.plan.memory.segment,
            shape.total_bytes(),
            "{hardware:?}"
        );
    }
}

#[test]
fn what_the_ranks_measured_decides_the_kv_cache() {
    let planned = resolve(options(2), &gpus(&[GIB, GIB])).unwrap();
    // NCCL's buffers and graphs come after the cache.
    let fixed = |rank: usize| {
        let bytes = &planned.plan.memory.ranks[rank];
        bytes.fixed() - bytes.communicator - bytes.graphs
    };
    let as_planned = planned.settle(&[Some(fixed(0)), Some(fixed(1))]).unwrap();
    assert_eq!(as_planned.plan.num_blocks, planned.plan.num_blocks);
    let more = planned
        .settle(&[Some(fixed(0)), Some(fixed(1) - (1 << 20))])
        .unwrap();
    assert_eq!(
        more.plan.num_blocks, planned.plan.num_blocks,
        "the poorest rank decides"
    );
    let fewer = planned
        .settle(&[Some(fixed(0) + (61 << 20)), Some(fixed(1))])
        .unwrap();
    assert!(fewer.plan.num_blocks < planned.plan.num_blocks);
    assert_eq!(fewer.engine_config().num_blocks, fewer.plan.num_blocks);
    assert_eq!(fewer.limits.num_blocks, fewer.plan.num_blocks);
    let refused = planned
        .settle(&[Some(fixed(0)), Some(GIB)])
        .err()
        .expect("no room");
    assert!(refused.to_string().starts_with("rank 1 needs "), "{refused}");
    // CPU ranks have nothing to measure.
    let on_cpu = resolve(options(2), &Hardware::Cpu).unwrap();
    let settled = on_cpu.settle(&[None, None]).unwrap();
    assert_eq!(settled.plan.num_blocks, on_cpu.plan.num_blocks);
}

#[test]
fn bytes_of_a_kv_cache_take_the_place_of_a_share() {
    let mut asked = options(1);
    asked.kv_cache = KvCacheSize::BytesPerRank(130 << 20);
    asked.gpu_memory_utilization = 0.1;
    let deployment = resolve(asked.clone(), &gpus(&[GIB])).unwrap();
    // Two times 2 MiB for each of 30 layers; a block has 16 tokens of 3 heads of 64, K and V, in two bytes.
    assert_eq!(
        u64::from(deployment.plan.num_blocks),
        (120 << 20) / (30 * 16 * 3 * 64 * 2 * 2)
    );
    asked.kv_cache = KvCacheSize::BytesPerRank(GIB);
    assert!(matches!(
        resolve(asked, &gpus(&[GIB])),
        Err(DeploymentError::OverLimit {
            field: "number of KV blocks",
            ..
        })
    ));
}

#[test]
fn another_quantization_than_the_files_is_refused() {
    let asked = |method| ModelOptions {
        quantization: Some(method),
        ..options(1)
    };
    assert!(Proposal::open(asked(QuantizationMethod::Gguf)).is_ok());
    for method in [QuantizationMethod::Awq, QuantizationMethod::Fp8] {
        let error = Proposal::open(asked(method)).err().expect("refused").to_string();
        assert!(error.contains(method.name()), "{error}");
    }
}

#[test]
fn the_longest_sequence_is_made_to_fit_the_memory() {
    let auto = |kv_cache| ModelOptions {
        max_model_len: MaxModelLen::Auto,
        kv_cache,
        ..options(1)
    };
    let longest = |kv_cache, hardware: &Hardware| {
        let deployment = resolve(auto(kv_cache), hardware).expect("something fits");
        let config = deployment.engine_config();
        assert_eq!(config.max_model_len as usize, deployment.blueprint.max_model_len);
        assert_eq!(
            deployment.limits.max_blocks_per_row,
            config.max_model_len.div_ceil(16)
        );
        (config.max_model_len, config.num_blocks)
    };
    let own = longest(KvCacheSize::Auto, &Hardware::Cpu).0;
    assert_eq!(own, 8192, "the model's own limit, where there is room for it");
    assert_eq!(longest(KvCacheSize::Blocks(100), &Hardware::Cpu), (1600, 100));
    let none = resolve(auto(KvCacheSize::BytesPerRank(1)), &Hardware::Cpu);
    assert!(matches!(none, Err(DeploymentError::KvCacheTooSmall { .. })));
    // A card that has room for the weights and a short sequence, but not for the longest.
    let asked = |max_model_len| ModelOptions {
        max_model_len,
        ..options(1)
    };
    let small = (GIB / 8..4 * GIB).step_by(GIB as usize / 32).find(|&size| {
        let fits = |length| resolve(asked(length), &gpus(&[size])).is_ok();
        fits(MaxModelLen::Auto) && !fits(MaxModelLen::Model)
    });
    let hardware = gpus(&[small.expect("a size between the two")]);
    let deployment = resolve(asked(MaxModelLen::Auto), &hardware).expect("fits");
    let (fitted, blocks) = (deployment.blueprint.max_model_len, deployment.plan.num_blocks);
    assert!(
        fitted < 8192 && fitted.is_multiple_of(16) && blocks as usize * 16 >= fitted,
        "{fitted}"
    );
    assert!(
        resolve(asked(MaxModelLen::Tokens(fitted + 16)), &hardware).is_err(),
        "one block more does not fit"
    );
}

#[test]
fn guesses_get_rows_and_the_memory_for_them() {
    let limits = |speculative| {
        let asked = ModelOptions {
            speculative,
            ..options(1)
        };
        let deployment = resolve(asked, &Hardware::Cpu).expect("fits");
        assert_eq!(deployment.engine_config().max_num_seqs, 16);
        assert_eq!(deployment.engine_config().step_limits(), deployment.limits);
        (
            deployment.limits.max_rows,
            deployment.plan.memory.ranks[0].workspace,
        )
    };
    let speculative = NgramSpeculation {
        num_speculative_tokens: 4,
        prompt_lookup_min: 2,
        prompt_lookup_max: 4,
    };
    let ((alone, bytes), (guessing, more_bytes)) = (limits(None), limits(Some(speculative)));
    assert_eq!((alone, guessing), (16, 80));
    assert!(more_bytes > bytes, "logits of 64 rows more");
}
