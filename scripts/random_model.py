"""Writes a GGUF file with random weights in the shape of a 1B Llama, to measure with. Needs the package `gguf`.

usage: random_model.py DONOR OUTPUT Q4_0|Q8_0

The tokenizer is that of DONOR. Weights are quantized blocks of random codes with one small scale: nobody reads what such a
model writes, but it takes the time of a real one.
"""

import sys

import gguf
import numpy

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, CONTEXT = 16, 2048, 32, 8, 64, 8192, 8192
BLOCK = 32
SCALE = numpy.float16(0.02 / 4)


def blocks(random, rows, cols, kind):
    """`rows` x `cols` weights as bytes: an f16 scale and 32 codes of 4 or 8 bits to a block."""
    code_bytes = BLOCK if kind == gguf.GGMLQuantizationType.Q8_0 else BLOCK // 2
    scale = SCALE / (16 if kind == gguf.GGMLQuantizationType.Q8_0 else 1)
    data = numpy.empty((rows, cols // BLOCK, 2 + code_bytes), numpy.uint8)
    data[..., :2] = numpy.frombuffer(numpy.float16(scale).tobytes(), numpy.uint8)
    data[..., 2:] = random.integers(0, 256, (rows, cols // BLOCK, code_bytes), numpy.uint8)
    return data.reshape(rows, -1)


def copy_tokenizer(writer, donor):
    for name, field in donor.fields.items():
        if name.startswith("tokenizer."):
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, inner)


def main():
    donor_path, output, kind_name = sys.argv[1:]
    kind = gguf.GGMLQuantizationType[kind_name]
    donor = gguf.GGUFReader(donor_path)
    vocab = len(donor.fields["tokenizer.ggml.tokens"].data)
    random = numpy.random.default_rng(0)
    writer = gguf.GGUFWriter(output, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocab)
    copy_tokenizer(writer, donor)

    def matrix(name, rows, cols, kind=kind):
        writer.add_tensor(name, blocks(random, rows, cols, kind), raw_dtype=kind)

    def norm(name):
        writer.add_tensor(name, numpy.ones(HIDDEN, numpy.float32))

    matrix("token_embd.weight", vocab, HIDDEN, gguf.GGMLQuantizationType.Q8_0)
    norm("output_norm.weight")
    for layer in range(LAYERS):
        at = f"blk.{layer}."
        norm(at + "attn_norm.weight")
        norm(at + "ffn_norm.weight")
        matrix(at + "attn_q.weight", HEADS * HEAD_DIM, HIDDEN)
        matrix(at + "attn_k.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        matrix(at + "attn_v.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        matrix(at + "attn_output.weight", HIDDEN, HEADS * HEAD_DIM)
        matrix(at + "ffn_gate.weight", INTERMEDIATE, HIDDEN)
        matrix(at + "ffn_up.weight", INTERMEDIATE, HIDDEN)
        matrix(at + "ffn_down.weight", HIDDEN, INTERMEDIATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
