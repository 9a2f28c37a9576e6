"""Phalanx beside llama.cpp: the same model files, the same cores, in turn. Standard library only.

Every load is asked of both servers in alternating rounds, so that a noisy machine is noisy for both; what is printed are
the medians over the rounds. Both are loaded by `phalanx bench serve`.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from load import family, free_port

READY_LIMIT_S = 120
LONG_PROMPT = 2048
KV_BLOCK = 16


@dataclass(frozen=True)
class Load:
    """What is asked, and which of the figures are of interest."""

    name: str
    concurrency: int
    prompt: int
    output: int
    requests: int
    figures: tuple
    # Prompts of LONG_PROMPT tokens that arrive meanwhile, per second.
    long_prompts: float = 0.0


@dataclass(frozen=True)
class Figure:
    name: str
    unit: str
    # From a report of the load generator.
    value: Callable
    more_is_better: bool
    # Which of the model's floors nobody surpasses.
    floor: str = ""


DECODE = Figure(
    "decode, one stream", "tok/s", lambda r: r["decode_throughput_per_stream"], True, "decode_tokens_per_s"
)
PREFILL = Figure(
    "prefill",
    "tok/s",
    lambda r: r["total_input_tokens"] / r["completed"] / r["ttft_ms"]["median"] * 1e3,
    True,
    "prefill_tokens_per_s",
)
OUTPUT = Figure("output", "tok/s", lambda r: r["output_throughput"], True)
TTFT = Figure("time to first token p50", "ms", lambda r: r["ttft_ms"]["median"], False)
ITL_P99 = Figure("inter-token latency p99", "ms", lambda r: r["itl_ms"]["p99"], False)
READY = Figure("ready after", "s", None, False)
RESIDENT = Figure("resident", "MiB", None, False)

LOADS = (
    Load("C=1, 128 in, 128 out", 1, 128, 128, 3, (DECODE,)),
    Load("C=1, 512 in, 2 out", 1, 512, 2, 4, (PREFILL,)),
    Load("C=16, 128 in, 128 out", 16, 128, 128, 32, (OUTPUT, TTFT)),
    Load("C=64, 128 in, 64 out", 64, 128, 64, 128, (OUTPUT, TTFT)),
    Load(f"C=16, 128 in, 128 out, {LONG_PROMPT}-token prompts arriving", 16, 128, 128, 32, (ITL_P99,), 0.1),
)
# Of models beyond so many bytes, less is asked.
LARGE = 300 << 20
LARGE_LOADS = (
    Load("C=1, 128 in, 64 out", 1, 128, 64, 2, (DECODE,)),
    Load("C=1, 512 in, 2 out", 1, 512, 2, 2, (PREFILL,)),
    Load("C=16, 128 in, 64 out", 16, 128, 64, 16, (OUTPUT, TTFT)),
    Load("C=64, 128 in, 32 out", 64, 128, 32, 64, (OUTPUT, TTFT)),
)


@dataclass
class Server:
    name: str
    command: list
    port: int
    model_name: str
    process: subprocess.Popen = None
    ready_s: float = 0.0
    rss_mib: float = 0.0

    @property
    def base_url(self):
        return f"http://127.0.0.1:{self.port}"


def room(load):
    """(sequences, tokens of each) that a server's KV cache shall hold."""
    longest = LONG_PROMPT if load.long_prompts else load.prompt + load.output
    return load.concurrency + (1 if load.long_prompts else 0), longest + 64


def phalanx(binary, model, load):
    """As it comes, with room for as many tokens as the other one has."""
    port = free_port()
    slots, longest = room(load)
    blocks = slots * -(-longest // KV_BLOCK)
    command = [binary, "serve", model, "--host", "127.0.0.1", "--port", str(port), "--log-level", "warn"]
    command += ["--max-model-len", str(longest), "--num-gpu-blocks-override", str(blocks)]
    return Server("phalanx", command + ["--served-model-name", "default"], port, "default")


def llama_cpp(binary, model, load):
    """With the flags that suit it best: a KV cache per slot, flash attention, as many slots as streams."""
    port = free_port()
    slots, longest = room(load)
    flags = ["-t", "2", "-np", str(slots), "-no-kvu", "-fa", "on", "-cb", "-c", str(slots * longest)]
    command = [binary, "-m", model, "--host", "127.0.0.1", "--port", str(port), "--log-disable", *flags]
    return Server("llama.cpp", command, port, "default")


def healthy(port):
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as probe:
            probe.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            return b" 200 " in probe.recv(64)
    except OSError:
        return False


@contextmanager
def running(server):
    start = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        server.process = subprocess.Popen(server.command, stdout=log, stderr=log)
        try:
            while not healthy(server.port):
                if server.process.poll() is not None or time.perf_counter() - start > READY_LIMIT_S:
                    log.seek(0)
                    sys.exit(f"{' '.join(server.command)}\nis not ready:\n{log.read().decode(errors='replace')}")
                time.sleep(0.005)
            server.ready_s = time.perf_counter() - start
            yield server
        finally:
            server.process.terminate()
            server.process.wait()


def resident_mib(pid):
    """Of all processes of a server. Pages that they share are counted once (PSS)."""
    total = 0
    for member in family(pid):
        with open(f"/proc/{member}/smaps_rollup") as rollup:
            total += next(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))
    return total / 1024


def generator(bench, server, seed, **flags):
    command = [bench, "bench", "serve", "--json", "--base-url", server.base_url, "--model", server.model_name]
    command += ["--seed", str(seed)]
    for name, value in flags.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def measure(bench, server, load, seed):
    """One round on one server; the report of the load generator."""
    beside = None
    if load.long_prompts:
        lengths = {"random_input_len": LONG_PROMPT, "random_output_len": 1}
        beside = generator(bench, server, seed + 1000, **lengths, num_prompts=1000, request_rate=load.long_prompts)
    main = generator(
        bench,
        server,
        seed,
        num_prompts=load.requests,
        max_concurrency=load.concurrency,
        random_input_len=load.prompt,
        random_output_len=load.output,
    )
    report = json.loads(main.communicate()[0])
    if beside:
        beside.terminate()
        beside.wait()
    if report["failed"]:
        sys.exit(f"{server.name}: {report['errors']}")
    server.rss_mib = max(server.rss_mib, resident_mib(server.process.pid))
    return report


def compare(arguments, model, load):
    """Both servers, in turn, `arguments.rounds` times. Rows of (figure, values by server)."""
    makers = {"phalanx": (phalanx, arguments.phalanx), "llama.cpp": (llama_cpp, arguments.llama_server)}
    with ExitStack() as stack:
        servers = [stack.enter_context(running(make(binary, model, load))) for make, binary in makers.values()]
        reports = {server.name: [] for server in servers}
        for server in servers:
            warm_up = replace(load, requests=min(load.requests, load.concurrency), long_prompts=0.0)
            measure(arguments.phalanx, server, warm_up, 0)
        for number in range(arguments.rounds):
            for server in servers if number % 2 == 0 else reversed(servers):
                reports[server.name].append(measure(arguments.phalanx, server, load, number + 1))
        rows = []
        for figure in load.figures:
            rows.append((figure, {name: statistics.median(map(figure.value, of)) for name, of in reports.items()}))
        if load.concurrency == 16 and not load.long_prompts:
            rows.append((READY, {s.name: s.ready_s for s in servers}))
            rows.append((RESIDENT, {s.name: s.rss_mib for s in servers}))
    return rows


def line(load, figure, values, floors):
    ours, theirs = values["phalanx"], values["llama.cpp"]
    ratio = ours / theirs if figure.more_is_better else theirs / ours
    digits = 2 if ours < 10 else 0 if ours >= 100 else 1
    text = f"| {figure.name}, {load.name} | {figure.unit} | {ours:.{digits}f} | {theirs:.{digits}f} | {ratio:.2f} |"
    if not figure.floor:
        return text + "  |"
    return text + f" {100 * ours / floors[figure.floor]:.0f} % of {floors[figure.floor]:.0f} |"


def floors_of(bench, model):
    command = [bench, "bench", "floors", "--json", model]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def machine():
    with open("/proc/cpuinfo") as info:
        fields = dict(line.split(":", 1) for line in info if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")
    features = [flag for flag in wanted if flag in fields["flags"].split()]
    return f"{fields['model name']}, {os.cpu_count()} CPUs, {' '.join(features)}"


def revision():
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True)
    return f"revision {found.stdout.strip()}" if found.returncode == 0 else "of no revision"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--phalanx", required=True)
    parser.add_argument("--llama-server", required=True)
    parser.add_argument("--peer-version", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loads", default="", help="only those whose name contains this")
    parser.add_argument("--output", help="a Markdown file")
    parser.add_argument("models", nargs="+", help="NAME=FILE")
    arguments = parser.parse_args()
    text = [
        "# Benchmarks",
        "",
        "Written by `./scripts/bench`, which runs both servers on the same cores and model files, in turn, and asks them the",
        "same with `phalanx bench serve`.",
        "",
        "## Serving",
        "",
        f"Machine: {machine()}. Phalanx: {revision()}, as it comes. Peer: {arguments.peer_version},",
        "`-t 2 -np C -no-kvu -fa on -cb`. Both have a KV cache for as many tokens as the load needs.",
        f"Medians of {arguments.rounds} interleaved rounds; a ratio above 1 is in favour of Phalanx. A limit is what `phalanx bench floors`",
        "measures: reading all weights once per token of one stream, or the layers' integer products of every prompt token.",
    ]
    print("\n".join(text), flush=True)
    for entry in arguments.models:
        name, model = entry.split("=", 1)
        floors = floors_of(arguments.phalanx, model)
        head = [
            "",
            f"### {name}",
            "",
            f"{floors['weight_bytes'] / 1e6:.1f} MB of weights and {floors['layer_operations'] / 1e9:.3f} GOP a token; "
            f"{floors['read_gb_s']:.1f} GB/s and {floors['int8_gop_s']:.0f} GOP/s with {floors['threads']} threads.",
            "",
            "| | unit | Phalanx | llama.cpp | ratio | reached of the limit |",
            "| --- | --- | ---: | ---: | ---: | ---: |",
        ]
        print("\n".join(head), flush=True)
        text += head
        for load in LARGE_LOADS if os.path.getsize(model) > LARGE else LOADS:
            if arguments.loads in load.name:
                for figure, values in compare(arguments, model, load):
                    text.append(line(load, figure, values, floors))
                    print(text[-1], flush=True)
    if arguments.output:
        with open(arguments.output, "w") as file:
            file.write("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
