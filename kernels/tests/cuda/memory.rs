//! Device memory has a limit, and uploads go through buffers that are smaller than what is uploaded.

use phalanx_kernels::cuda::devices;
use phalanx_kernels::{Backend, BatchInput, Columns, KernelError, KvSpec, Linear, WeightSource};
use phalanx_model::{KvDtype, TensorFormat};

use crate::support::{WORKSPACE_BYTES, open, options};

#[test]
#[ignore = "needs a device"]
fn more_than_there_is_is_refused_with_the_bytes() {
    let backend = open();
    let total = devices().unwrap()[0].total_bytes;
    let rows = total / 4096 + 1;
    let Err(KernelError::OutOfMemory {
        what,
        requested,
        free,
    }) = backend.buffer(rows, 1024)
    else {
        panic!("{rows} rows of 1024 values fit into {total} bytes");
    };
    assert_eq!(what, "activations");
    assert!(
        requested > total && free < total,
        "{requested} requested, {free} free"
    );
    let spec = KvSpec {
        num_blocks: usize::MAX / 64,
        block_size: 16,
        num_kv_heads: 8,
        head_dim: 64,
        dtype: KvDtype::F16,
    };
    assert!(matches!(
        backend.kv_cache(spec),
        Err(KernelError::OutOfMemory { .. })
    ));
    // The device still works.
    let buffer = backend.buffer(2, 3).unwrap();
    assert_eq!(backend.read(&buffer, 2).unwrap(), [0.0; 6]);
}

#[test]
#[ignore = "needs a device"]
fn memory_of_what_is_gone_is_used_again() {
    let backend = open();
    let free = || devices().unwrap()[0].free_bytes;
    let half = free() / 2;
    for _ in 0..5 {
        let buffer = backend.buffer(half / 4096 + 1, 1024).unwrap();
        drop(buffer);
    }
    assert!(free() > half);
}

/// A step's memory is fixed: a step that is larger is refused, and one that fits works again and again.
#[test]
#[ignore = "needs a device"]
fn a_step_larger_than_its_memory_is_refused() {
    let backend = open();
    let batch = |rows: u32| {
        backend.batch(&BatchInput {
            token_ids: vec![1; rows as usize],
            positions: (0..rows).collect(),
            slot_mapping: (0..rows).collect(),
            cu_seqlens_q: vec![0, rows],
            context_lens: vec![rows],
            block_tables: vec![],
            cu_blocks: vec![0, 0],
        })
    };
    let too_many = (options().step_bytes / 12) as u32 + 1;
    assert!(matches!(
        batch(too_many),
        Err(KernelError::OutOfMemory {
            what: "a step's input",
            ..
        })
    ));
    for _ in 0..10 {
        batch(too_many / 2).unwrap();
    }
}

/// Weights larger than the staging buffers, and inputs larger than the workspace: whole numbers, so all is exact.
#[test]
#[ignore = "needs a device"]
fn what_is_larger_than_a_buffer_is_done_in_parts() {
    let backend = open();
    let (outputs, cols) = (300, 2048);
    let rows = WORKSPACE_BYTES / (2 * cols) + 37;
    let weight: Vec<f32> = (0..outputs * cols).map(|i| (i % 7) as f32 - 3.0).collect();
    let bytes: Vec<u8> = weight.iter().flat_map(|w| w.to_le_bytes()).collect();
    assert!(bytes.len() > 2 * options().staging_bytes);
    let weight = backend
        .weight(&[WeightSource {
            format: TensorFormat::F32,
            rows: outputs,
            cols,
            data: &bytes,
            row_stride: 4 * cols,
            row_scales: None,
        }])
        .unwrap();
    assert_eq!(backend.weight_bytes(&weight), 2 * outputs * cols);
    // Row r is r % 5 times the unit vector of column r % cols.
    let mut x = vec![0.0; rows * cols];
    for (row, x) in x.chunks_mut(cols).enumerate() {
        x[row % cols] = (row % 5) as f32;
    }
    let mut input = backend.buffer(rows, cols).unwrap();
    backend.write(&mut input, &x).unwrap();
    let mut out = backend.buffer(rows, outputs).unwrap();
    let columns = Columns {
        buffer: &mut out,
        start: 0,
    };
    let layer = Linear {
        weight: &weight,
        bias: None,
    };
    backend.linear(columns, &input, &layer, rows).unwrap();
    let got = backend.read(&out, rows).unwrap();
    for (row, got) in got.chunks(outputs).enumerate() {
        for (output, &got) in got.iter().enumerate() {
            let want = ((output * cols + row % cols) % 7) as f32 - 3.0;
            assert_eq!(got, want * (row % 5) as f32, "row {row}, output {output}");
        }
    }
}
