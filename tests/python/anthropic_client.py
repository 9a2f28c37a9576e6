"""What a user of the anthropic package does, against a running server: argv[1] is its base URL."""

import sys

import anthropic

client = anthropic.Anthropic(base_url=sys.argv[1], api_key="none", max_retries=0)
ASK = {
    "model": "demo",
    "max_tokens": 48,
    "extra_body": {"temperature": 0},
    "system": "You are a helpful assistant.",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
}


def whole() -> str:
    message = client.messages.create(**ASK)
    assert message.type == "message" and message.role == "assistant", message
    assert message.stop_reason == "end_turn" and message.stop_sequence is None, message
    text = message.content[0].text
    assert "Paris" in text, text
    counted = client.messages.count_tokens(
        model="demo", system=ASK["system"], messages=ASK["messages"]
    )
    usage = message.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens, (counted, usage)
    assert usage.output_tokens > 3, usage
    return text


def streamed(text: str) -> None:
    with client.messages.stream(**ASK) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(pieces) > 3 and "".join(pieces) == text, pieces
    assert final.content[0].text == text and final.stop_reason == "end_turn", final
    assert final.usage.output_tokens > 3, final


def limits_and_stops() -> None:
    short = client.messages.create(**(ASK | {"max_tokens": 2}))
    assert short.stop_reason == "max_tokens" and short.usage.output_tokens == 2, short
    stopped = client.messages.create(**(ASK | {"stop_sequences": ["Paris"]}))
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "Paris"), stopped
    assert "Paris" not in stopped.content[0].text, stopped


def errors() -> None:
    for change, error in [
        ({"model": "nobody"}, anthropic.NotFoundError),
        ({"messages": []}, anthropic.BadRequestError),
        ({"max_tokens": 9_000}, anthropic.BadRequestError),
    ]:
        try:
            client.messages.create(**(ASK | change))
        except error as raised:
            assert raised.body["type"] == "error", raised.body
        else:
            raise AssertionError(f"{change} was accepted")


text = whole()
streamed(text)
limits_and_stops()
errors()
print("anthropic client: fine")
