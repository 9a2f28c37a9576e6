"""Talks to a running server as a client of vLLM's own gRPC services does.

usage: vllm_client.py HOST:PORT [KEY ADMIN_KEY]

The messages are built from vllm_fields.tsv, the table of vLLM's fields and their numbers, and not from this project's
.proto files: what is checked is the wire. Exits 0 and prints one line when every check passed.
"""

import pathlib
import re
import sys

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, struct_pb2

SCALARS = {
    "string": "STRING", "bytes": "BYTES", "bool": "BOOL", "float": "FLOAT",
    "uint32": "UINT32", "uint64": "UINT64", "int32": "INT32", "int64": "INT64",
}
STRUCT = "google.protobuf.Struct"
PROMPT = "The capital of France is"


class Contract:
    """vLLM's messages and calls, from the table."""

    def __init__(self, table):
        rows = [line.split("\t") for line in table.read_text().splitlines() if not line.startswith("#")]
        self.calls = {}
        self.types = {}
        self.file = descriptor_pb2.FileDescriptorProto(name="vllm.proto", package="vllm", syntax="proto3")
        self.file.dependency.append("google/protobuf/struct.proto")
        self.enums = {message for _, message, _, _, kind in rows if kind == "enum value"}
        for _, message, number, name, kind in rows:
            if number == "rpc":
                request, reply = kind.split(" -> ")
                self.calls[name] = (message, request, reply.removeprefix("stream "), "stream " in reply)
                continue
            if kind == "enum value":
                self.enum(message).value.add(name=name, number=int(number))
            else:
                self.field(self.message(message), int(number), name, kind)
        for _, request, reply, _ in self.calls.values():
            self.message(request), self.message(reply)
        for path in self.types:
            if path not in self.enums:
                self.close(self.types[path])
        pool = descriptor_pool.DescriptorPool()
        pool.AddSerializedFile(struct_pb2.DESCRIPTOR.serialized_pb)
        pool.AddSerializedFile(self.file.SerializeToString())
        self.pool = pool

    def holder(self, path):
        outer, _, name = path.rpartition(".")
        return (self.message(outer) if outer else self.file), name, bool(outer)

    def message(self, path):
        if path not in self.types:
            holder, name, nested = self.holder(path)
            self.types[path] = (holder.nested_type if nested else holder.message_type).add(name=name)
        return self.types[path]

    def enum(self, path):
        if path not in self.types:
            holder, name, _ = self.holder(path)
            self.types[path] = holder.enum_type.add(name=name)
        return self.types[path]

    def field(self, message, number, name, kind):
        field = message.field.add(name=name, number=number, label="LABEL_OPTIONAL")
        oneof = re.fullmatch(r"(.*) \(oneof (\w+)\)", kind)
        if oneof:
            kind = oneof[1]
            names = [one.name for one in message.oneof_decl]
            if oneof[2] not in names:
                message.oneof_decl.add(name=oneof[2])
                names.append(oneof[2])
            field.oneof_index = names.index(oneof[2])
        if kind.startswith("repeated "):
            kind, field.label = kind.removeprefix("repeated "), field.LABEL_REPEATED
        elif kind.startswith("optional "):
            kind, field.proto3_optional = kind.removeprefix("optional "), True
        pair = re.fullmatch(r"map<(\w+), (\w+)>", kind)
        if pair:
            entry = message.nested_type.add(name="".join(part.title() for part in name.split("_")) + "Entry")
            entry.options.map_entry = True
            self.field(entry, 1, "key", pair[1])
            self.field(entry, 2, "value", pair[2])
            field.label, kind = field.LABEL_REPEATED, f"{message.name}.{entry.name}"
        self.set_type(field, message, kind)

    def set_type(self, field, message, kind):
        if kind in SCALARS:
            field.type = getattr(field, "TYPE_" + SCALARS[kind])
            return
        own = [path for path in (f"{message.name}.{kind}", kind) if path in self.enums]
        field.type = field.TYPE_ENUM if own else field.TYPE_MESSAGE
        # Without a leading dot the pool looks from the inside out, as protoc does.
        field.type_name = "." + STRUCT if kind == STRUCT else kind

    def close(self, message):
        """An optional field of proto3 is a oneof of its own, behind the real ones."""
        for field in message.field:
            if field.proto3_optional:
                field.oneof_index = len(message.oneof_decl)
                message.oneof_decl.add(name=f"_{field.name}")

    def type(self, name):
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(f"vllm.{name}"))


class Client:
    def __init__(self, contract, address, key):
        self.contract = contract
        self.channel = grpc.insecure_channel(address)
        self.metadata = [("authorization", f"Bearer {key}")] if key else []

    def __call__(self, call, **fields):
        method, request = self.prepare(call, fields)
        return method(request, metadata=self.metadata, timeout=120)

    def later(self, call, **fields):
        method, request = self.prepare(call, fields)
        return method.future(request, metadata=self.metadata, timeout=120)

    def prepare(self, call, fields):
        service, request, reply, streams = self.contract.calls[call]
        make = self.channel.unary_stream if streams else self.channel.unary_unary
        method = make(
            f"/vllm.{service}/{call}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=self.contract.type(reply).FromString,
        )
        return method, self.contract.type(request)(**fields)


def check_control(call):
    info = call("GetServerInfo")
    assert info.parallelism.tensor_parallel_size == info.parallelism.world_size > 0, info
    assert info.max_model_len and info.kv_block_size and info.total_kv_blocks and info.instance_id, info
    model = call("GetModelInfo")
    assert model.served_model_name and model.supports_text_input and not model.supports_multimodal, model
    assert not call("ListLoras").adapters and not call("IsSleeping").sleeping
    expect(grpc.StatusCode.UNIMPLEMENTED, lambda: call("Sleep", level=1))
    return model.served_model_name


def greedy(model, **fields):
    return dict(
        model=model,
        text=PROMPT,
        temperature=0.0,
        stopping={"max_new_tokens": 12},
        response={"prompt_token_ids": True, "output_token_ids": True},
        **fields,
    )


def check_generate(call, model):
    whole = call("Generate", **greedy(model))
    prompt, output = whole.prompt_info, whole.outputs
    assert "Paris" in output.text, whole
    assert prompt.num_prompt_tokens == len(prompt.token_ids) > 0, prompt
    assert output.num_tokens == len(output.token_ids) == output.finish_info.num_output_tokens == 12, output
    assert output.finish_info.finish_reason == 1, output.finish_info
    again = dict(greedy(model), token_ids={"ids": list(prompt.token_ids)})
    del again["text"]
    assert call("Generate", **again).outputs.text == output.text
    pieces = list(call("GenerateStream", **greedy(model)))
    assert "".join(piece.outputs.text for piece in pieces) == output.text, pieces
    assert len(pieces) > 3 and pieces[-1].outputs.HasField("finish_info"), pieces
    assert [piece.HasField("prompt_info") for piece in pieces].count(True) == 1, pieces
    assert sum(piece.outputs.num_tokens for piece in pieces) == 12, pieces


def check_sampling(call, model):
    sampled = greedy(model, sampling={"num_sequences": 2, "seed": 7, "top_k": 40, "top_p": 0.9})
    sampled["temperature"] = 1.0
    texts = [{}, {}]
    for run in texts:
        for piece in call("GenerateStream", **sampled):
            run[piece.outputs.index] = run.get(piece.outputs.index, "") + piece.outputs.text
    assert texts[0] == texts[1] and set(texts[0]) == {0, 1} and texts[0][0] != texts[0][1], texts
    forced = greedy(model, decoding={"logit_bias": {1000: 100.0}}, kv={"bypass_prefix_cache": True})
    reply = call("Generate", **forced)
    assert set(reply.outputs.token_ids) == {1000}, reply
    assert reply.outputs.finish_info.num_cached_tokens == 0, reply


def check_logprobs(call, model):
    wants = greedy(model)
    wants["response"] = {"output_token_ids": True, "output_logprobs": True, "output_candidates": {"top_n": 3}}
    output = call("Generate", **wants).outputs
    assert len(output.logprobs) == len(output.ranks) == len(output.candidate_tokens) == output.num_tokens, output
    for token, logprob, rank, candidates in zip(
        output.token_ids, output.logprobs, output.ranks, output.candidate_tokens
    ):
        best = candidates.tokens[0]
        assert (best.id, best.logprob, rank, best.rank) == (token, logprob, 1, 1), output
        assert len(candidates.tokens) == 3 and logprob <= 0, output


def check_stop(call, model):
    wants = greedy(model)
    text = call("Generate", **wants).outputs.text
    stop = text.split()[1]
    wants["stopping"] = {"max_new_tokens": 12, "stop_strings": [stop]}
    output = call("Generate", **wants).outputs
    assert output.text == text[: text.index(stop)], (output, text)
    assert output.finish_info.stop_string == stop and output.finish_info.finish_reason == 2, output


def expect(code, call):
    try:
        call()
    except grpc.RpcError as error:
        assert error.code() == code, error
        return error.details()
    raise AssertionError(f"not refused with {code}")


def check_errors(call, model):
    bad = grpc.StatusCode.INVALID_ARGUMENT
    expect(grpc.StatusCode.NOT_FOUND, lambda: call("Generate", **greedy("no-such-model")))
    assert "prompt" in expect(bad, lambda: call("Generate", model=model))
    assert "temperature" in expect(bad, lambda: call("Generate", **dict(greedy(model), temperature=-1.0)))
    assert "lora_name" in expect(bad, lambda: call("Generate", **greedy(model, lora_name="mine")))
    assert "media" in expect(bad, lambda: list(call("GenerateStream", **greedy(model, media=[{"url": "http://x"}]))))


def check_pause(call, operate, model):
    """What everybody would feel is for operators: a client's key is not enough."""
    for method in ("PauseGeneration", "ResumeGeneration", "Shutdown"):
        expect(grpc.StatusCode.UNAUTHENTICATED, lambda: call(method))
    operate("PauseGeneration", mode=2)
    assert call("IsPaused").paused
    held = call.later("Generate", **greedy(model))
    operate("ResumeGeneration")
    assert not call("IsPaused").paused
    assert "Paris" in held.result().outputs.text


def check_abort(call, model):
    long = greedy(model, request_id="to-be-aborted")
    long["stopping"] = {"max_new_tokens": 1500, "ignore_eos": True}
    stream = call("GenerateStream", **long)
    next(stream)
    call("Abort", request_ids=["to-be-aborted"])
    last = list(stream)[-1]
    assert last.outputs.finish_info.finish_reason == 3, last


def main():
    address, key, admin_key = (sys.argv[1:] + [None, None])[:3]
    contract = Contract(pathlib.Path(__file__).with_name("vllm_fields.tsv"))
    call = Client(contract, address, key)
    if key:
        expect(grpc.StatusCode.UNAUTHENTICATED, lambda: Client(contract, address, None)("GetModelInfo"))
    model = check_control(call)
    for check in (check_generate, check_sampling, check_logprobs, check_stop, check_errors, check_abort):
        check(call, model)
    operate = Client(contract, address, admin_key)
    if admin_key:
        check_pause(call, operate, model)
    operate("Shutdown")
    print(f"grpcio {grpc.__version__}: every check passed against {model} at {address}")


if __name__ == "__main__":
    main()
