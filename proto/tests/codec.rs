//! The step codec: what goes in comes out, and no bytes whatever make it panic or allocate without a bound.

use phalanx_proto::{limits::MAX_LOGPROB_TOKEN_IDS, step::*};
use proptest::{collection::vec, option, prelude::*};

const LIMITS: StepLimits = StepLimits {
    max_rows: 8,
    max_tokens: 64,
    max_blocks_per_row: 10,
    num_blocks: 100,
    vocab_size: 1000,
    max_edits_per_row: 6,
    max_logprobs: 5,
};

fn penalties() -> impl Strategy<Value = Penalties> {
    (
        0.1f32..3.0,
        -2.0f32..2.0,
        -2.0f32..2.0,
        // More than any row may have bias entries.
        vec((0..1000u32, 0..9u32), 0..=60),
    )
        .prop_map(|(repetition, presence, frequency, history)| Penalties {
            repetition,
            presence,
            frequency,
            history,
        })
}

fn sampling() -> impl Strategy<Value = RowSampling> {
    let numbers = (
        0.0f32..2.0,
        0.0f32..=1.0,
        0.0f32..=1.0,
        any::<u32>(),
        any::<u64>(),
    );
    let bias = (0..1000u32, prop_oneof![Just(f32::NEG_INFINITY), -9.0f32..9.0]);
    (
        numbers,
        option::of((0..=5u32, vec(0..1000u32, 0..=MAX_LOGPROB_TOKEN_IDS))),
        option::of(penalties()),
        vec(bias, 0..=6),
    )
        .prop_map(
            |((temperature, top_p, min_p, top_k, seed), logprobs, penalties, bias)| RowSampling {
                temperature,
                top_p,
                top_k,
                min_p,
                seed,
                logprobs: logprobs.as_ref().map(|(top, _)| *top),
                logprob_token_ids: logprobs.map(|(_, ids)| ids).unwrap_or_default(),
                penalties,
                bias,
            },
        )
}

/// Targets after some of the tokens of a row with `len`.
fn prompt_logprobs(len: usize) -> impl Strategy<Value = PromptLogprobs> {
    (0..len)
        .prop_flat_map(move |first| (0..=5u32, Just(first as u32), vec(0..1000u32, 1..=len - first)))
        .prop_map(|(top, first, targets)| PromptLogprobs { top, first, targets })
}

fn row() -> impl Strategy<Value = StepRow> {
    (1..=8usize)
        .prop_flat_map(|len| {
            (
                (any::<u64>(), any::<u32>()),
                vec(0..1000u32, len),
                vec(0..100u32, 1..=10),
                option::of(sampling()),
                option::of(prompt_logprobs(len)),
            )
        })
        .prop_map(
            |((sequence, num_computed_tokens), token_ids, blocks, sampling, prompt_logprobs)| StepRow {
                sequence: SequenceId(sequence),
                token_ids,
                num_computed_tokens,
                block_table: blocks.into_iter().map(BlockId).collect(),
                sampling,
                prompt_logprobs,
            },
        )
}

fn plan() -> impl Strategy<Value = StepPlan> {
    (any::<u32>(), any::<u64>(), vec(row(), 0..=8), any::<bool>()).prop_map(
        |(epoch, step, rows, masks_follow)| StepPlan {
            epoch,
            step,
            rows,
            masks_follow,
        },
    )
}

fn top_logprobs(most: usize) -> impl Strategy<Value = Vec<(u32, f32)>> {
    vec((0..1000u32, -9.0f32..0.0), 0..=most)
}

fn scored_prompt() -> impl Strategy<Value = ScoredPrompt> {
    let token = (0..1000u32, -50.0f32..0.0, 1..1000u32, top_logprobs(5));
    let token = token.prop_map(|(token, logprob, rank, top_logprobs)| ScoredToken {
        token,
        logprob,
        rank,
        top_logprobs,
    });
    (any::<u64>(), vec(token, 1..=8)).prop_map(|(sequence, tokens)| ScoredPrompt {
        sequence: SequenceId(sequence),
        tokens,
    })
}

fn output() -> impl Strategy<Value = StepOutput> {
    let sampled = (
        any::<u64>(),
        0..1000u32,
        any::<bool>(),
        option::of((-50.0f32..0.0, 1..1000u32)),
        top_logprobs(MAX_LOGPROB_TOKEN_IDS),
    );
    let sampled = sampled.prop_map(|(sequence, token, finite, scored, top_logprobs)| SampledToken {
        sequence: SequenceId(sequence),
        token,
        finite,
        logprob: scored.map(|(logprob, _)| logprob),
        rank: scored.map(|(_, rank)| rank),
        top_logprobs,
    });
    let lists = (vec(sampled, 0..=8), vec(scored_prompt(), 0..=8));
    (any::<u32>(), any::<u64>(), any::<u32>(), lists).prop_map(
        |(epoch, step, forward_us, (sampled, prompt_logprobs))| StepOutput {
            epoch,
            step,
            sampled,
            prompt_logprobs,
            forward_us,
        },
    )
}

fn masks() -> impl Strategy<Value = StepMasks> {
    let allowed = vec(0..LIMITS.vocab_size, 0..40).prop_map(|ids| {
        let mut set = TokenSet::empty(LIMITS.vocab_size);
        ids.into_iter().for_each(|id| set.insert(id));
        set
    });
    let allowed = prop_oneof![Just(TokenSet::full(LIMITS.vocab_size)), allowed];
    let mask = (any::<u64>(), allowed).prop_map(|(sequence, allowed)| TokenMask {
        sequence: SequenceId(sequence),
        allowed,
    });
    (any::<u32>(), any::<u64>(), vec(mask, 0..=8)).prop_map(|(epoch, step, masks)| StepMasks {
        epoch,
        step,
        masks,
    })
}

fn encoded_masks(masks: &StepMasks) -> Vec<u8> {
    let mut slot = vec![0; LIMITS.masks_bytes()];
    let used = encode_masks(masks, &mut slot).expect("masks_bytes() holds the masks of any plan");
    slot.truncate(used);
    slot
}

fn encoded(plan: &StepPlan) -> Vec<u8> {
    let mut slot = vec![0; LIMITS.plan_bytes()];
    let used = encode_plan(plan, &mut slot).expect("plan_bytes() holds any plan within the limits");
    slot.truncate(used);
    slot
}

proptest! {
    #[test]
    fn plans_round_trip_and_fit_their_slot(plan in plan()) {
        prop_assert_eq!(decode_plan(&encoded(&plan), &LIMITS), Ok(plan));
    }

    #[test]
    fn outputs_round_trip_and_fit_their_slot(output in output()) {
        let mut slot = vec![0; LIMITS.output_bytes()];
        let used = encode_output(&output, &mut slot).expect("output_bytes() holds any output within the limits");
        prop_assert_eq!(decode_output(&slot[..used], &LIMITS), Ok(output));
    }

    #[test]
    fn masks_round_trip_and_nothing_shorter_or_longer_passes(masks in masks()) {
        let mut bytes = encoded_masks(&masks);
        prop_assert_eq!(decode_masks(&bytes, &LIMITS), Ok(masks));
        for end in 0..bytes.len() {
            prop_assert!(decode_masks(&bytes[..end], &LIMITS).is_err());
        }
        bytes.push(0);
        prop_assert_eq!(decode_masks(&bytes, &LIMITS), Err(CodecError::Trailing(1)));
    }

    #[test]
    fn damaged_masks_never_panic_and_never_allow_what_is_no_token(
        masks in masks(),
        hits in vec((any::<usize>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = encoded_masks(&masks);
        for (at, value) in hits {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        if let Ok(masks) = decode_masks(&bytes, &LIMITS) {
            prop_assert!(masks.masks.len() <= LIMITS.max_rows as usize);
            let beyond = LIMITS.vocab_size..LIMITS.vocab_size + 64;
            prop_assert!(masks.masks.iter().all(|mask| beyond.clone().all(|id| !mask.allowed.contains(id))));
        }
    }

    #[test]
    fn every_proper_prefix_of_an_output_is_refused(output in output()) {
        let mut slot = vec![0; LIMITS.output_bytes()];
        let used = encode_output(&output, &mut slot).expect("fits");
        for end in 0..used {
            prop_assert!(decode_output(&slot[..end], &LIMITS).is_err());
        }
    }

    #[test]
    fn every_proper_prefix_and_every_extension_is_refused(plan in plan()) {
        let mut bytes = encoded(&plan);
        for end in 0..bytes.len() {
            prop_assert!(decode_plan(&bytes[..end], &LIMITS).is_err());
        }
        bytes.push(0);
        prop_assert_eq!(decode_plan(&bytes, &LIMITS), Err(CodecError::Trailing(1)));
    }

    #[test]
    fn damaged_bytes_never_panic_and_never_break_a_limit(plan in plan(), hits in vec((any::<usize>(), any::<u8>()), 1..6)) {
        let mut bytes = encoded(&plan);
        for (at, value) in hits {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        if let Ok(plan) = decode_plan(&bytes, &LIMITS) {
            prop_assert!(plan.rows.len() <= LIMITS.max_rows as usize && plan.num_tokens() <= LIMITS.max_tokens as usize);
            let blocks = plan.rows.iter().flat_map(|row| &row.block_table);
            prop_assert!(blocks.copied().all(|block| block.0 < LIMITS.num_blocks));
            for row in &plan.rows {
                let scored = row.prompt_logprobs.as_ref().map_or(0, |wanted| wanted.first as usize + wanted.targets.len());
                prop_assert!(scored <= row.token_ids.len());
            }
        }
    }

    #[test]
    fn noise_is_refused(bytes in vec(any::<u8>(), 0..300)) {
        let _ = decode_plan(&bytes, &LIMITS);
        let _ = decode_output(&bytes, &LIMITS);
        let _ = decode_masks(&bytes, &LIMITS);
    }

    #[test]
    fn a_small_slot_is_an_error(plan in plan(), cut in 1usize..40) {
        let mut slot = vec![0; encoded(&plan).len().saturating_sub(cut)];
        prop_assert_eq!(encode_plan(&plan, &mut slot), Err(CodecError::NoRoom(slot.len())));
    }
}

#[test]
fn errors_name_the_field_and_the_limit() {
    let row = StepRow {
        sequence: SequenceId(1),
        token_ids: vec![1000],
        num_computed_tokens: 0,
        block_table: vec![BlockId(0)],
        sampling: Some(RowSampling::GREEDY),
        prompt_logprobs: None,
    };
    let plan = |row: &StepRow| StepPlan {
        epoch: 1,
        step: 1,
        rows: vec![row.clone()],
        masks_follow: false,
    };
    let error = decode_plan(&encoded(&plan(&row)), &LIMITS).unwrap_err();
    assert_eq!(error.to_string(), "token_ids is 1000, limit 999");
    let row = StepRow {
        token_ids: vec![1],
        block_table: vec![BlockId(100)],
        ..row
    };
    let error = decode_plan(&encoded(&plan(&row)), &LIMITS).unwrap_err();
    assert_eq!(error.to_string(), "block_table is 100, limit 99");
    let sampling = RowSampling {
        temperature: f32::NAN,
        ..RowSampling::GREEDY
    };
    let row = StepRow {
        block_table: vec![BlockId(0)],
        sampling: Some(sampling),
        ..row
    };
    assert!(matches!(
        decode_plan(&encoded(&plan(&row)), &LIMITS),
        Err(CodecError::Invalid {
            field: "temperature",
            ..
        })
    ));
    // Two tokens, so that the message is not too short for two rows.
    let whole = StepRow {
        token_ids: vec![1, 2],
        sampling: None,
        ..row
    };
    let nowhere = StepRow {
        token_ids: vec![1],
        block_table: vec![],
        ..whole.clone()
    };
    let plan = StepPlan {
        rows: vec![nowhere, whole.clone()],
        ..plan(&whole)
    };
    assert_eq!(
        decode_plan(&encoded(&plan), &LIMITS),
        Err(CodecError::Invalid {
            field: "block_table",
            value: 0
        })
    );
}

fn plan_of(rows: Vec<StepRow>) -> StepPlan {
    StepPlan {
        epoch: 1,
        step: 1,
        rows,
        masks_follow: false,
    }
}

fn plain_row() -> StepRow {
    StepRow {
        sequence: SequenceId(1),
        token_ids: vec![1, 2, 3],
        num_computed_tokens: 0,
        block_table: vec![BlockId(0)],
        sampling: None,
        prompt_logprobs: None,
    }
}

#[test]
fn targets_stay_within_their_row() {
    let refused = |first: u32, targets: Vec<u32>| {
        let wanted = PromptLogprobs {
            top: 0,
            first,
            targets,
        };
        let row = StepRow {
            prompt_logprobs: Some(wanted),
            ..plain_row()
        };
        let error = decode_plan(&encoded(&plan_of(vec![row])), &LIMITS).unwrap_err();
        error.to_string()
    };
    assert_eq!(refused(1, vec![7, 7, 7]), "prompt_logprobs.targets is 3, limit 2");
    assert_eq!(refused(3, vec![7]), "prompt_logprobs.first is 3, limit 2");
    assert_eq!(
        refused(0, vec![]),
        "prompt_logprobs.targets is 0, which is not valid"
    );
    assert_eq!(
        refused(0, vec![1000]),
        "prompt_logprobs.targets is 1000, limit 999"
    );
}

/// As many as a request may have, whatever `--max-logprobs` says.
#[test]
fn listed_tokens_are_of_the_vocabulary_and_bounded() {
    let refused = |logprob_token_ids: Vec<u32>| {
        let row = StepRow {
            sampling: Some(RowSampling {
                logprobs: Some(0),
                logprob_token_ids,
                ..RowSampling::GREEDY
            }),
            ..plain_row()
        };
        let mut slot = vec![0; 2 * LIMITS.plan_bytes()];
        let used = encode_plan(&plan_of(vec![row]), &mut slot).expect("fits");
        decode_plan(&slot[..used], &LIMITS).unwrap_err().to_string()
    };
    assert_eq!(refused(vec![5, 1000]), "logprob_token_ids is 1000, limit 999");
    assert_eq!(
        refused(vec![5; MAX_LOGPROB_TOKEN_IDS + 1]),
        "logprob_token_ids is 129, limit 128"
    );
}

/// A row's history may be long; those of a plan together may not be longer than the slot was sized for.
#[test]
fn histories_share_one_bound() {
    let limits = StepLimits {
        max_rows: 2,
        vocab_size: 5000,
        ..LIMITS
    };
    assert_eq!(limits.max_history(), 5000);
    let row = |len: u32| StepRow {
        sampling: Some(RowSampling {
            penalties: Some(Penalties {
                repetition: 1.5,
                presence: 0.0,
                frequency: 0.0,
                history: (0..len).map(|id| (id, 1)).collect(),
            }),
            ..RowSampling::GREEDY
        }),
        ..plain_row()
    };
    let code = |rows: Vec<StepRow>| {
        let mut slot = vec![0; limits.plan_bytes()];
        let used = encode_plan(&plan_of(rows), &mut slot).expect("fits");
        decode_plan(&slot[..used], &limits)
    };
    assert!(code(vec![row(5000)]).is_ok() && code(vec![row(2000), row(3000)]).is_ok());
    assert_eq!(
        code(vec![row(2001), row(3000)]).unwrap_err().to_string(),
        "history is 3000, limit 2999"
    );
}
