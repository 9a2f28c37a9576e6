//! Llama-3.1-70B on GPUs that are not there. Every number is computed by hand beside it.

use phalanx_model::{
    Geometry, GpuBudget, GpuMemory, GpuPlacement, KvDtype, MemoryBudget, MemoryError, MemoryPlan,
    MemoryRequest, Placement, RankBudget, TensorFormat, TensorParallelOptions, TensorParallelStyle,
    memory::{GpuCard, NCCL_BYTES, Nearest},
};

const GIB: u64 = 1 << 30;

fn llama_70b() -> Geometry {
    Geometry::from_config_json(include_bytes!("data/llama-3.1-70b.config.json")).expect("a configuration")
}

fn request(geometry: &Geometry, world_size: usize) -> MemoryRequest<'_> {
    MemoryRequest {
        config: &geometry.config,
        formats: &geometry.formats,
        parallel: TensorParallelOptions::equal(world_size, TensorParallelStyle::Reduce),
        placement: Placement::Gpus(GpuPlacement::default()),
        most_ranks: 30,
        kv_dtype: KvDtype::F16,
        block_size: 16,
        max_tokens: 512,
        max_rows: 256,
        max_model_len: 131_072,
        control_bytes: 1 << 20,
    }
}

fn cards(name: &str, count: usize) -> MemoryBudget {
    let card = GpuCard::find(name).expect("a card");
    MemoryBudget {
        ranks: RankBudget::Gpus(GpuBudget {
            gpus: vec![GpuMemory::unused(card.total, card.multiplies_e4m3()); count],
            utilization: 0.9,
        }),
        shared_memory: u64::MAX,
    }
}

fn nearest(request: &MemoryRequest<'_>, budget: &MemoryBudget) -> (Nearest, String) {
    let plan = MemoryPlan::new(request).expect("a plan");
    let error = plan.check(request, budget).expect_err("it does not fit");
    let text = error.to_string();
    match error {
        MemoryError::DoesNotFit { nearest, .. } => (*nearest, text),
        other => panic!("{other}"),
    }
}

#[test]
fn eight_h100_hold_ten_sequences_of_the_longest() {
    let geometry = llama_70b();
    let request = request(&geometry, 8);
    let plan = MemoryPlan::new(&request).unwrap();
    let rank = &plan.ranks[0];
    // 8 of 64 query heads, 1 of 8 KV heads, an eighth of the MLP, 32 of 250.5 chunks of 512 tokens. In bf16:
    //   a layer: 8192 x (q 1024 + k 128 + v 128 + o 1024 + gate, up, down 3 x 3584) x 2 = 213,909,504
    //   80 layers 17,112,760,320; 161 norms of 8192 f32 5,275,648; two tables of 16,384 x 8192 x 2 = 536,870,912
    assert_eq!(rank.weights, 17_112_760_320 + 5_275_648 + 536_870_912);
    // K and V, 80 layers, 1 head of 128, 2 bytes: 40,960 a token.
    assert_eq!(rank.kv_bytes_per_block, 16 * 40_960);
    // f32: 512 x (hidden, residual, normed 3 x 8192 + wide 3584 + qkv 1280 + gate_up 7168) x 4 = 74,973,184
    //   256 sampled rows of 8192 and of 16,384 logits: 8,388,608 + 16,777,216
    assert_eq!(rank.workspace, 74_973_184 + 8_388_608 + 16_777_216);
    assert_eq!((rank.overhead, rank.communicator), (192 << 20, 256 << 20));
    // Activations stay on the GPUs.
    assert_eq!((plan.arena, plan.segment), (0, request.control_bytes));
    let budget = cards("H100-80GB", 8);
    assert_eq!(plan.check(&request, &budget), Ok(()));
    // 0.9 of 79.1 GiB is 76,439,680,450; without the context (512 MiB) and the above (18,224,807,936) 57,678,001,602
    // are left: 343 times 2 MiB for every layer, 57,545,850,880 bytes, 87,808 blocks.
    let blocks = plan.num_blocks(&budget).unwrap();
    assert_eq!(blocks, 87_808);
    assert_eq!(blocks / plan.blocks_per_sequence(), 10);
}

#[test]
fn four_a100_hold_three_sequences_of_the_longest() {
    let geometry = llama_70b();
    let request = request(&geometry, 4);
    let plan = MemoryPlan::new(&request).unwrap();
    let rank = plan.ranks.iter().max_by_key(|rank| rank.weights).expect("ranks");
    // Twice the heads and columns of eight ranks, and 63 chunks of 512 tokens.
    assert_eq!(
        rank.weights,
        2 * 17_112_760_320 + 5_275_648 + 2 * 63 * 512 * 8192 * 2
    );
    assert_eq!(rank.kv_bytes_per_block, 16 * 81_920);
    // 75,902,809,538 less 35,287,760,896 of weights, 141,033,472 of workspace and 448 MiB: 40,004,253,122 are 238 times
    // 2 MiB for every layer, 39,929,774,080 bytes.
    let blocks = plan.num_blocks(&cards("A100-80GB", 4)).unwrap();
    assert_eq!(blocks, 39_929_774_080 / (16 * 81_920));
    assert_eq!(blocks / plan.blocks_per_sequence(), 3);
}

#[test]
fn two_t4_fit_no_context_at_all_and_the_ranks_that_would_are_named() {
    let geometry = llama_70b();
    let request = request(&geometry, 2);
    // Half of the weights: 68.5 billion parameters in layers and 2.1 in tables, in two bytes.
    let plan = MemoryPlan::new(&request).unwrap();
    assert_eq!(plan.ranks[0].weights / GIB, 65);
    let budget = cards("T4-16GB", 2);
    let (nearest, text) = nearest(&request, &budget);
    assert_eq!(
        nearest,
        Nearest {
            // Above 8 ranks every one holds a whole KV head: 5 GiB for the longest sequence.
            world_size: Some(20),
            world_size_and_len: Some((13, 8192)),
            ..Nearest::default()
        }
    );
    assert!(text.contains("no --max-model-len helps"), "{text}");
    let fits = |world_size, max_model_len| {
        let mut wider = self::request(&geometry, world_size);
        wider.max_model_len = max_model_len;
        let plan = MemoryPlan::new(&wider).unwrap();
        plan.check(&wider, &cards("T4", world_size)).is_ok()
    };
    assert!(fits(20, 131_072) && !fits(19, 131_072) && fits(13, 8192) && !fits(12, 8192));
}

#[test]
fn what_is_suggested_fits() {
    let geometry = llama_70b();
    let asked = MemoryRequest {
        kv_dtype: KvDtype::F32,
        max_model_len: 65_536,
        ..request(&geometry, 2)
    };
    let budget = cards("H100-80GB", 2);
    let (nearest, text) = nearest(&asked, &budget);
    let longest = nearest.max_model_len.expect("a shorter context");
    let fits = |max_model_len| {
        let request = MemoryRequest {
            max_model_len,
            ..asked.clone()
        };
        MemoryPlan::new(&request)
            .unwrap()
            .check(&request, &budget)
            .is_ok()
    };
    assert!(fits(longest) && !fits(longest + 16), "{text}");
    // The cache in two bytes needs 10 GiB, of which 4 are there; three ranks have 15 more.
    assert_eq!((nearest.kv_dtype, nearest.world_size), (None, Some(3)));
    // At 0.97 there are 5.5 GiB more.
    let near = MemoryRequest {
        max_model_len: 28_672,
        ..request(&geometry, 2)
    };
    let (nearest, _) = self::nearest(&near, &budget);
    let utilization = nearest.gpu_memory_utilization.expect("a larger share");
    assert!((0.905..0.925).contains(&utilization), "{utilization}");
}

#[test]
fn what_was_measured_takes_the_place_of_what_was_predicted() {
    let geometry = llama_70b();
    let request = request(&geometry, 8);
    let plan = MemoryPlan::new(&request).unwrap();
    let budget = cards("H100-80GB", 8);
    let predicted: Vec<u64> = plan.ranks.iter().map(|rank| rank.fixed() - NCCL_BYTES).collect();
    assert_eq!(plan.measured(&predicted), Ok(plan.clone()));
    let mut worse = predicted;
    worse[5] += 10 * GIB;
    let measured = plan.measured(&worse).unwrap();
    assert_eq!(measured.ranks[5].fixed(), plan.ranks[5].fixed() + 10 * GIB);
    // The poorest rank decides: 64 times 160 MiB less.
    let blocks = plan.num_blocks(&budget).unwrap();
    assert_eq!(measured.num_blocks(&budget), Ok(blocks - 64 * 256));
    assert!(plan.measured(&[1]).is_err());
}

#[test]
fn eight_bits_a_weight_and_graphs_are_counted() {
    let geometry = llama_70b();
    let fp8 = geometry.clone().quantized_online();
    let plan = |geometry: &Geometry, gpus: GpuPlacement| {
        let placement = Placement::Gpus(gpus);
        MemoryPlan::new(&MemoryRequest {
            placement,
            ..request(geometry, 8)
        })
        .unwrap()
        .ranks[0]
            .clone()
    };
    let native = GpuPlacement {
        multiplies_e4m3: true,
        ..GpuPlacement::default()
    };
    // A byte for a weight of a layer and an f32 for each of its rows: 80 layers of (q 1024 + k 128 + v 128 + o 8192 +
    // gate and up 2 x 3584 + down 8192) rows.
    let in_bf16 = plan(&geometry, native).weights;
    let expected = in_bf16 - 17_112_760_320 / 2 + 80 * 4 * (1024 + 128 + 128 + 8192 + 2 * 3584 + 8192);
    assert_eq!(plan(&fp8, native).weights, expected);
    assert_eq!(plan(&fp8, GpuPlacement::default()).weights, in_bf16);
    // 80 layers of 14 ops and 12 others, 8 KiB each, in each of 35 graphs.
    let captured = GpuPlacement {
        num_graphs: 35,
        ..GpuPlacement::default()
    };
    assert_eq!(plan(&geometry, captured).graphs, 35 * (80 * 14 + 12) * 8192);
}

#[test]
fn a_configuration_declares_its_type() {
    let geometry = llama_70b();
    assert!(
        geometry
            .formats
            .values()
            .all(|format| *format == TensorFormat::BF16)
    );
    let text = include_str!("data/llama-3.1-70b.config.json");
    let typed = |key: &str, dtype: &str| {
        let text = text.replace(
            "\"torch_dtype\": \"bfloat16\"",
            &format!("\"{key}\": \"{dtype}\""),
        );
        let geometry = Geometry::from_config_json(text.as_bytes());
        geometry.map(|geometry| geometry.formats.values().next().copied())
    };
    assert_eq!(typed("dtype", "float16"), Ok(Some(TensorFormat::F16)));
    assert_eq!(typed("some_key", "x"), Ok(Some(TensorFormat::F32)));
    let refused = typed("torch_dtype", "int8").unwrap_err();
    assert!(
        refused.to_string().starts_with("torch_dtype is \"int8\""),
        "{refused}"
    );
}
