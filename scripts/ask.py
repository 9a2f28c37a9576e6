"""Asks a phalanx server one question, prints the answer as it streams, and the rate. Standard library only.

usage: ask.py BASE_URL SERVER_PID QUESTION
"""

import json
import os
import sys
import time
import urllib.error
import urllib.request


def wait_ready(base, server, limit=120):
    """Waits for /health, as long as the server lives."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        try:
            os.kill(server, 0)
            urllib.request.urlopen(base + "/health", timeout=5).close()
            return
        except ProcessLookupError:
            sys.exit("the server ended before it was ready")
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    sys.exit(f"the server was not ready within {limit} s")


def stream(base, question):
    """Yields the chunks of a streamed chat completion."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 200,
        "temperature": 0,
    }
    request = urllib.request.Request(
        base + "/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        for line in response:
            data = line.decode().strip().removeprefix("data: ")
            if data == "[DONE]":
                return
            if data:
                chunk = json.loads(data)
                if "error" in chunk:
                    sys.exit(f"\nthe server reported: {chunk['error']['message']}")
                yield chunk
    sys.exit("\nthe stream ended without [DONE]")


def main():
    base, server, question = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    wait_ready(base, server)
    print(f"\n> {question}\n")
    start, first, usage = time.monotonic(), None, {}
    for chunk in stream(base, question):
        for choice in chunk["choices"]:
            text = choice["delta"].get("content")
            if text:
                first = first or time.monotonic()
                print(text, end="", flush=True)
        usage = chunk.get("usage") or usage
    end = time.monotonic()
    if first is None:
        sys.exit("the answer was empty")
    tokens = usage["completion_tokens"]
    rate = (tokens - 1) / (end - first) if end > first else 0.0
    print(
        f"\n\n{usage['prompt_tokens']} prompt tokens, first token after {(first - start) * 1000:.0f} ms, "
        f"{tokens} tokens at {rate:.1f} tokens/s"
    )


if __name__ == "__main__":
    main()
