//! Memory plans: exact bytes, what fits, and what to do when it does not.

mod support;

use phalanx_model::{
    GpuBudget, GpuMemory, KvDtype, MemoryBudget, MemoryError, MemoryPlan, MemoryRequest, ModelConfig,
    Placement, RankBudget, TensorFormat, TensorFormats, TensorParallelOptions, TensorParallelStyle,
    TensorRole,
    memory::{HumanBytes, MemoryHolder, Nearest},
};
use support::{llama_70b, tiny_config};

fn formats(config: &ModelConfig, matrices: TensorFormat) -> TensorFormats {
    let format = |role: TensorRole| {
        if role.is_vector() {
            TensorFormat::F32
        } else {
            matrices
        }
    };
    config.roles().map(|role| (role, format(role))).collect()
}

fn request<'a>(config: &'a ModelConfig, formats: &'a TensorFormats, world_size: usize) -> MemoryRequest<'a> {
    MemoryRequest {
        config,
        formats,
        parallel: TensorParallelOptions::equal(world_size, TensorParallelStyle::Gather),
        placement: Placement::Host,
        most_ranks: 30,
        kv_dtype: KvDtype::F16,
        block_size: 16,
        max_tokens: 8,
        max_rows: 4,
        max_model_len: 128,
        control_bytes: 1 << 16,
    }
}

fn pooled(bytes: u64) -> MemoryBudget {
    MemoryBudget {
        ranks: RankBudget::Pooled(bytes),
        shared_memory: u64::MAX,
    }
}

fn each(sizes: &[u64]) -> MemoryBudget {
    let gpus = sizes
        .iter()
        .map(|&total| GpuMemory {
            total,
            free: total,
            multiplies_e4m3: true,
        })
        .collect();
    MemoryBudget {
        ranks: RankBudget::Gpus(GpuBudget {
            gpus,
            utilization: 1.0,
        }),
        shared_memory: u64::MAX,
    }
}

#[test]
fn a_tiny_model_is_counted_to_the_byte() {
    let config = tiny_config();
    let formats = formats(&config, TensorFormat::Q8_0);
    let plan = MemoryPlan::new(&request(&config, &formats, 1)).unwrap();
    // Rows to multiples of 8, columns to multiples of 64 (96 becomes 128), 34 bytes for 32 elements; norms are f32.
    let matrix = |rows: u64, cols: u64| rows * cols / 32 * 34;
    let layer = matrix(64, 64) * 2 + matrix(32, 64) * 2 + matrix(96, 64) * 2 + matrix(64, 128) + 2 * 64 * 4;
    assert_eq!(plan.ranks[0].weights, matrix(72, 64) + 2 * layer + 64 * 4);
    // 16 tokens, K and V, 2 layers, 2 heads of 16 f16.
    assert_eq!(plan.bytes_per_block(0), Some(16 * 2 * 2 * 2 * 16 * 2));
    assert_eq!(plan.bytes_per_block(1), None);
    // hidden is 64 wide, the wider of attention and MLP 96; 8 tokens of f32.
    assert_eq!(
        (plan.arena, plan.segment),
        // In whole pages.
        ((64 + 96) * 8 * 4, 2 * 4096 + (1 << 16))
    );
    assert_eq!(plan.blocks_per_sequence(), 8);
}

#[test]
fn ranks_share_weights_and_replicate_no_more_than_they_must() {
    let config = llama_70b();
    let formats = formats(&config, TensorFormat::Q4_K);
    let weights = |world_size| {
        let plan = MemoryPlan::new(&request(&config, &formats, world_size)).unwrap();
        plan.ranks.iter().map(|rank| rank.weights).collect::<Vec<_>>()
    };
    let whole = weights(1)[0];
    let norms = (2 * 80 + 1) * 8192 * 4;
    // 144 bytes of a block become 148 in memory.
    let matrices: u64 = config
        .roles()
        .filter(|role| !role.is_vector())
        .map(|role| {
            config
                .shape(role)
                .map_or(0, |(rows, cols)| (rows * cols / 256 * 148) as u64)
        })
        .sum();
    assert_eq!(whole, matrices + norms);
    let eighths = weights(8);
    assert_eq!(eighths.iter().sum::<u64>(), whole + 7 * norms);
    // The vocabulary's 250 and a half chunks of 512 rows do not divide by 8; all else does. Two tables are split so.
    let spread = eighths.iter().max().unwrap() - eighths.iter().min().unwrap();
    assert_eq!(spread, 2 * 3 * 256 * 8192 / 256 * 148);
}

#[test]
fn workspaces_follow_style_and_formats() {
    let config = tiny_config();
    let widths = |style, matrices| {
        let formats = formats(&config, matrices);
        let mut request = request(&config, &formats, 2);
        request.parallel.style = style;
        let plan = MemoryPlan::new(&request).unwrap();
        let buffers = request.workspace(&plan.shards, 1);
        assert_eq!(plan.arena > 0, style == TensorParallelStyle::Gather);
        let own = buffers
            .iter()
            .filter(|buffer| !buffer.shared)
            .map(|buffer| buffer.bytes());
        assert_eq!(plan.ranks[1].workspace, own.sum::<u64>());
        move |name: &str| {
            buffers
                .iter()
                .find(|buffer| buffer.name == name)
                .map(|buffer| (buffer.rows, buffer.width))
        }
    };
    let gather = widths(TensorParallelStyle::Gather, TensorFormat::Q8_0);
    assert_eq!(
        (gather("wide"), gather("gate_up")),
        (Some((8, 96)), Some((8, 96)))
    );
    // 8 tokens of 96 columns: 3 blocks, padded to 4, of 72 bytes.
    assert_eq!(
        (gather("wide_input_blocks"), gather("narrow_input_blocks")),
        (Some((8 * 4, 18)), Some((0, 12)))
    );
    // 2 heads of 16; half of the intermediate columns of 96, which is 48.
    let reduce = widths(TensorParallelStyle::Reduce, TensorFormat::F32);
    assert_eq!((reduce("wide"), reduce("qkv")), (Some((8, 48)), Some((8, 64))));
    assert_eq!(
        (reduce("wide_input_blocks"), reduce("logits")),
        (Some((0, 18)), Some((4, 0)))
    );
}

#[test]
fn blocks_are_what_the_poorest_rank_has_room_for() {
    let config = tiny_config();
    let formats = formats(&config, TensorFormat::F32);
    let plan = MemoryPlan::new(&request(&config, &formats, 2)).unwrap();
    let block = plan.bytes_per_block(0).unwrap();
    assert_eq!(plan.num_blocks_for_kv(10 * block + 1), 10);
    let fixed: Vec<u64> = plan.ranks.iter().map(|rank| rank.fixed()).collect();
    let budget = each(&[fixed[0] + 7 * block, fixed[1] + 6 * block - 1]);
    assert_eq!(plan.num_blocks(&budget), Ok(5));
    assert_eq!(plan.num_blocks(&each(&[0, u64::MAX])), Ok(0));
    let together = fixed.iter().sum::<u64>() + plan.segment;
    assert_eq!(plan.num_blocks(&pooled(together + 2 * 9 * block)), Ok(9));
    assert_eq!(
        plan.num_blocks(&each(&[1])),
        Err(MemoryError::BudgetCount {
            found: 1,
            expected: 2
        })
    );
}

#[test]
fn a_shortage_names_the_rank_and_a_context_that_fits() {
    let config = tiny_config();
    let formats = formats(&config, TensorFormat::F32);
    let request = request(&config, &formats, 2);
    let plan = MemoryPlan::new(&request).unwrap();
    let need = plan.ranks[1].total(8);
    assert_eq!(plan.check(&request, &each(&[u64::MAX, need])), Ok(()));
    let budget = each(&[u64::MAX, need - 1]);
    let Err(MemoryError::DoesNotFit {
        holder,
        needed,
        available,
        nearest,
        ..
    }) = plan.check(&request, &budget)
    else {
        panic!("it does not fit")
    };
    assert_eq!(
        (holder, needed, available),
        (MemoryHolder::Rank(1), need, need - 1)
    );
    assert_eq!(nearest.max_model_len, Some(7 * 16));
    let mut shorter = request.clone();
    shorter.max_model_len = 7 * 16;
    assert_eq!(
        MemoryPlan::new(&shorter).unwrap().check(&shorter, &budget),
        Ok(())
    );
}

#[test]
fn a_shortage_names_the_fewest_ranks_that_fit() {
    let config = llama_70b();
    let formats = formats(&config, TensorFormat::BF16);
    let mut request = request(&config, &formats, 1);
    request.max_model_len = 8192;
    let budget = each(&[80 << 30]);
    let plan = MemoryPlan::new(&request).unwrap();
    let error = plan.check(&request, &budget).unwrap_err();
    let MemoryError::DoesNotFit { nearest, .. } = &error else {
        panic!("{error}")
    };
    let expected = Nearest {
        world_size: Some(2),
        // 70.6 billion parameters in 8.5 bits are 70 GiB; 2.5 more are those 8192 tokens.
        format: Some(TensorFormat::Q8_0),
        ..Nearest::default()
    };
    assert_eq!(**nearest, expected);
    let message = error.to_string();
    assert!(
        message.starts_with("rank 0 needs ")
            && message.contains("; no --max-model-len helps, ")
            && message.ends_with("it fits with --tensor-parallel-size 2, or with weights in Q8_0"),
        "{message}"
    );
}

#[test]
fn a_pool_too_small_for_weights_has_no_remedy() {
    let config = tiny_config();
    let formats = formats(&config, TensorFormat::F32);
    let request = request(&config, &formats, 2);
    let plan = MemoryPlan::new(&request).unwrap();
    let error = plan.check(&request, &pooled(1 << 20)).unwrap_err();
    let MemoryError::DoesNotFit {
        holder,
        needed,
        nearest,
        ..
    } = &error
    else {
        panic!("{error}")
    };
    assert_eq!(
        (holder, *needed),
        (&MemoryHolder::Host { largest_rank: 0 }, plan.host_total(8))
    );
    assert_eq!(**nearest, Nearest::default());
    assert!(error.to_string().ends_with("nothing nearby fits"));
}

#[test]
fn a_small_shm_is_told_apart_and_gets_smaller_steps() {
    let config = tiny_config();
    let formats = formats(&config, TensorFormat::F32);
    let mut request = request(&config, &formats, 2);
    request.max_tokens = 64;
    let plan = MemoryPlan::new(&request).unwrap();
    let budget = MemoryBudget {
        ranks: RankBudget::Pooled(u64::MAX),
        shared_memory: plan.segment - 4096,
    };
    let Err(MemoryError::DoesNotFit { holder, nearest, .. }) = plan.check(&request, &budget) else {
        panic!("it does not fit")
    };
    // Nine pages instead of ten, less padding, for tokens of 64 and 96 f32.
    assert_eq!(
        (holder, nearest.max_tokens),
        (MemoryHolder::SharedSegment, Some(57))
    );
    let mut smaller = request.clone();
    smaller.max_tokens = 57;
    assert_eq!(
        MemoryPlan::new(&smaller).unwrap().check(&smaller, &budget),
        Ok(())
    );
}

#[test]
fn requests_out_of_range_are_refused_by_field() {
    let config = tiny_config();
    let formats = formats(&config, TensorFormat::F32);
    let refused = |change: fn(&mut MemoryRequest<'_>)| {
        let mut request = request(&config, &formats, 1);
        change(&mut request);
        MemoryPlan::new(&request).map(|_| ())
    };
    let field = |field, value, limit| Err(MemoryError::Request { field, value, limit });
    assert_eq!(
        refused(|request| request.block_size = 0),
        field("block_size", 0, 4096)
    );
    assert_eq!(
        refused(|request| request.max_tokens = usize::MAX),
        field("max_tokens", usize::MAX, 1 << 20)
    );
    assert_eq!(
        refused(|request| request.max_model_len = 129),
        field("max_model_len", 129, 128)
    );
    assert!(matches!(
        refused(|request| request.parallel.world_size = 5),
        Err(MemoryError::Shard(_))
    ));
}

#[test]
fn the_table_shows_ranges_and_exact_bytes() {
    let config = llama_70b();
    let formats = formats(&config, TensorFormat::Q4_K);
    let plan = MemoryPlan::new(&request(&config, &formats, 8)).unwrap();
    let table = plan.table(1000).to_string();
    assert!(table.contains("56..64"), "{table}");
    assert!(
        table.contains(&HumanBytes(plan.ranks[7].weights).to_string()),
        "{table}"
    );
    assert!(
        table.contains("1000 KV blocks of 16 tokens: 16000 tokens"),
        "{table}"
    );
    assert_eq!(HumanBytes(98_362_432).to_string(), "98,362,432 B (93.8 MiB)");
    assert_eq!(
        (HumanBytes(0).to_string(), HumanBytes(1023).to_string()),
        ("0 B".to_owned(), "1,023 B".to_owned())
    );
    assert_eq!(
        HumanBytes(u64::MAX).to_string(),
        "18,446,744,073,709,551,615 B (16.0 EiB)"
    );
}
