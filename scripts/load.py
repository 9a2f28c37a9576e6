"""Starts a server and loads it in a closed loop. Standard library only.

usage: load.py PHALANX MODEL [flags for phalanx serve]
"""

import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time

PROMPT, OUTPUT = int(os.environ.get("PROMPT", 128)), int(os.environ.get("OUTPUT", 128))
LEVELS = [int(level) for level in os.environ.get("CONCURRENCY", "1 16").split()]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def family(pid):
    """The process and its descendants."""
    found = [pid]
    for parent in found:
        for task in os.listdir(f"/proc/{parent}/task"):
            with open(f"/proc/{parent}/task/{task}/children") as children:
                found += [int(child) for child in children.read().split()]
    return found


def rss(pid):
    """Name of the part, resident MiB now and at most."""
    with open(f"/proc/{pid}/cmdline") as line:
        arguments = line.read().split("\0")
    name = arguments[1] + (" " + arguments[arguments.index("--rank") + 1] if "--rank" in arguments else "")
    with open(f"/proc/{pid}/status") as status:
        fields = dict(line.split(":", 1) for line in status if ":" in line)
    return name, int(fields["VmRSS"].split()[0]) / 1024, int(fields["VmHWM"].split()[0]) / 1024


async def request(port, body):
    """One streamed completion; the times of its events and the number of tokens."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    start = time.perf_counter()
    writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    times, tokens, status = [], 0, await reader.readline()
    if b" 200 " not in status:
        sys.exit(f"{status!r} {await reader.read()!r}")
    async for line in reader:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
            if event["choices"]:
                times.append(time.perf_counter() - start)
    writer.close()
    return times, tokens


async def level(port, concurrency, seed):
    """A closed loop: every client sends its next request when the last one has ended."""
    rng = random.Random(seed)
    per_client = int(os.environ.get("REQUESTS", 3 if concurrency == 1 else 2))

    def body():
        return {
            "prompt": [rng.randrange(1000, 40000) for _ in range(PROMPT)],
            "max_tokens": OUTPUT,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    async def client():
        return [await request(port, body()) for _ in range(per_client)]

    start = time.perf_counter()
    results = sum(await asyncio.gather(*(client() for _ in range(concurrency))), [])
    wall = time.perf_counter() - start
    gaps = [b - a for times, _ in results for a, b in zip(times, times[1:])]
    first = [times[0] for times, _ in results]
    decode = [(len(times) - 1) / (times[-1] - times[0]) for times, _ in results if len(times) > 1]
    return {
        "output tok/s": sum(tokens for _, tokens in results) / wall,
        "decode tok/s per stream": statistics.median(decode),
        "TTFT p50 ms": statistics.median(first) * 1000,
        "ITL p50 ms": statistics.median(gaps) * 1000,
        "ITL p99 ms": sorted(gaps)[int(len(gaps) * 0.99)] * 1000,
    }


def main():
    binary, model, *flags = sys.argv[1:]
    port = free_port()
    start = time.perf_counter()
    command = [binary, "serve", model, "--host", "127.0.0.1", "--port", str(port), "--log-level", "warn", *flags]
    server = subprocess.Popen(command)
    try:
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port), 1) as probe:
                    probe.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                    if b" 200 " in probe.recv(64):
                        break
            except OSError:
                pass
            if server.poll() is not None:
                sys.exit("the server ended before it was ready")
            time.sleep(0.005)
        print(f"ready after {time.perf_counter() - start:.2f} s; prompt {PROMPT}, output {OUTPUT}")
        asyncio.run(level(port, 1, 0))  # warm-up
        for concurrency in LEVELS:
            figures = asyncio.run(level(port, concurrency, concurrency))
            print(f"C={concurrency:<3}", "  ".join(f"{name} {value:.1f}" for name, value in figures.items()))
        for pid in family(server.pid):
            name, now, peak = rss(pid)
            print(f"RSS {name:12} {now:7.1f} MiB now {peak:7.1f} MiB peak")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
