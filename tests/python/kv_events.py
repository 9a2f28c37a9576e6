"""An indexer as one writes it for vLLM: pyzmq, msgpack, and names computed with cbor2 and hashlib.

Arguments: host:port of the HTTP server, the port of its events, the port of its replays."""

import hashlib
import json
import sys
import urllib.request

import cbor2
import msgpack
import zmq

ADDRESS, EVENTS, REPLAY = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
LIMIT_MS = 20_000
END = (2**64 - 1).to_bytes(8, "big")


def complete(prompt, **more):
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, **more}
    request = urllib.request.Request(
        f"http://{ADDRESS}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def digest(value):
    return hashlib.sha256(cbor2.dumps(value, canonical=True)).digest()


def low(name):
    return int.from_bytes(name, "big") & (2**64 - 1)


class Index:
    """What the server's prefix cache can find, by the numbers that events call blocks."""

    def __init__(self):
        self.names = {}
        self.sequence = -1
        self.counts = {"BlockStored": 0, "BlockRemoved": 0, "AllBlocksCleared": 0}

    def follow(self, sequence, payload):
        assert sequence == self.sequence + 1, (sequence, self.sequence)
        self.sequence = sequence
        timestamp, events, rank = msgpack.unpackb(payload)
        assert timestamp > 1e9 and rank == 0
        for event in events:
            self.counts[event["type"]] += 1
            if event["type"] == "BlockStored":
                self.store(event)
            elif event["type"] == "BlockRemoved":
                for block in event["block_hashes"]:
                    del self.names[block]

    def store(self, event):
        parent = digest("vllm-none-hash")
        if event["parent_block_hash"] is not None:
            parent = self.names[event["parent_block_hash"]]
        size, tokens = event["block_size"], event["token_ids"]
        assert len(tokens) == size * len(event["block_hashes"])
        assert event["medium"] == "GPU" and len(event["extra_keys"]) == len(event["block_hashes"])
        for index, (block, extra) in enumerate(zip(event["block_hashes"], event["extra_keys"])):
            extra = tuple(extra) if extra else None
            parent = digest((parent, tuple(tokens[index * size : (index + 1) * size]), extra))
            assert block == low(parent), "the name follows from parent, tokens and extra keys"
            self.names[block] = parent


def read(socket):
    assert socket.poll(LIMIT_MS), "nothing came in time"
    return socket.recv_multipart()


context = zmq.Context()
subscriber = context.socket(zmq.SUB)
subscriber.connect(f"tcp://127.0.0.1:{EVENTS}")
subscriber.setsockopt(zmq.SUBSCRIBE, b"kv-")
dealer = context.socket(zmq.DEALER)
dealer.connect(f"tcp://127.0.0.1:{REPLAY}")

# Until the subscription has arrived, nothing is published to it: ask until something comes.
words = 0
while not subscriber.poll(50):
    words += 1
    complete(f"{words} " + "one two three four five six seven eight nine ten " * 4)
assert words < 200

index = Index()
topic, first, _ = read(subscriber)
assert topic == b"kv-events"
dealer.send_multipart([b"", (0).to_bytes(8, "big")])
while True:
    delimiter, sequence, payload = read(dealer)
    assert delimiter == b""
    if sequence == END:
        break
    index.follow(int.from_bytes(sequence, "big"), payload)
assert index.sequence >= int.from_bytes(first, "big"), "what was published is kept for replay"

# Salted prompts have other names, and a small cache throws blocks out.
for number in range(12):
    complete([number] + list(range(1, 100)), cache_salt=f"tenant {number}")
while subscriber.poll(500):
    _, sequence, payload = read(subscriber)
    if int.from_bytes(sequence, "big") > index.sequence:
        index.follow(int.from_bytes(sequence, "big"), payload)
# Three prompts fit; each of the others throws out what another has stored.
assert index.counts["BlockStored"] >= 12 and index.counts["BlockRemoved"] >= 9, index.counts
assert 0 < len(index.names) <= 20, len(index.names)
print(index.counts, len(index.names))
