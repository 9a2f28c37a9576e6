"""Asks a running cluster for responses with the openai package, as a user would.

usage: openai_responses.py BASE_URL

The server must have been started with --enable-responses-api-store. Exits 0 and prints one line when every check passed.
"""

import sys
import time
import typing

import openai
import pydantic

ASK = {
    "instructions": "You are a helpful assistant.",
    "input": "What is the capital of France?",
    "max_output_tokens": 48,
    "temperature": 0,
}


def check_create(client):
    response = client.responses.create(**ASK, metadata={"case": "whole"})
    assert response.object == "response" and response.id.startswith("resp_"), response
    assert response.status == "completed" and response.error is None, response
    (message,) = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed"), message
    assert "Paris" in response.output_text, response
    assert response.instructions == ASK["instructions"] and response.metadata == {"case": "whole"}, response
    assert (response.tools, response.tool_choice, response.parallel_tool_calls) == ([], "auto", True), response
    usage = response.usage
    assert usage.output_tokens > 3 and usage.output_tokens_details.reasoning_tokens == 0, usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens, usage
    chat = client.chat.completions.create(
        model=ASK["model"],
        messages=[{"role": "system", "content": ASK["instructions"]}, {"role": "user", "content": ASK["input"]}],
        max_tokens=48,
        temperature=0,
    )
    assert chat.choices[0].message.content == response.output_text, (chat, response)
    assert chat.usage.prompt_tokens == usage.input_tokens, (chat, usage)
    return response


def check_stream(client, expected):
    with client.responses.stream(**ASK) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events))), events
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ], kinds
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ], kinds
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 3 and "".join(deltas) == expected.output_text, deltas
    assert final.output_text == expected.output_text, final
    assert final.usage.output_tokens == expected.usage.output_tokens, final
    stored = client.responses.retrieve(final.id)
    assert stored.output_text == final.output_text, stored


def check_limits_and_logprobs(client):
    short = client.responses.create(**(ASK | {"max_output_tokens": 2}))
    assert (short.status, short.incomplete_details.reason) == ("incomplete", "max_output_tokens"), short
    assert short.usage.output_tokens == 2 and short.output[0].status == "incomplete", short
    told = client.responses.create(
        **(ASK | {"max_output_tokens": 4}), include=["message.output_text.logprobs"], top_logprobs=2
    )
    tokens = told.output[0].content[0].logprobs
    assert "".join(token.token for token in tokens) == told.output_text and len(tokens) == 4, told
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in tokens), tokens
    parts = [{"role": "user", "content": [{"type": "input_text", "text": ASK["input"]}]}]
    assert client.responses.create(**(ASK | {"input": parts})).output_text.startswith(short.output_text)


class City(pydantic.BaseModel):
    continent: typing.Literal["Africa", "Asia", "Europe"]
    is_capital: bool


def check_format(client):
    parsed = client.responses.parse(
        model=ASK["model"], input="Describe Paris.", text_format=City, max_output_tokens=200, temperature=0
    )
    assert parsed.status == "completed" and isinstance(parsed.output_parsed, City), parsed
    assert parsed.text.format.type == "json_schema" and parsed.text.format.name == "City", parsed
    broken = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "wizard"}}}
    expect(openai.BadRequestError, "text.format.schema", client.responses.create, **ASK, text=broken)


def check_store(client, first):
    assert client.responses.retrieve(first.id) == first
    more = {"max_output_tokens": 24, "temperature": 0}
    question = "And what is the capital of Italy?"
    by_id = client.responses.create(model=ASK["model"], previous_response_id=first.id, input=question, **more)
    assert by_id.previous_response_id == first.id, by_id
    items = [{"role": "user", "content": ASK["input"]}]
    items += [item.model_dump(exclude_none=True) for item in first.output]
    items += [{"role": "user", "content": question}]
    by_items = client.responses.create(model=ASK["model"], input=items, **more)
    assert by_items.output_text == by_id.output_text, (by_items, by_id)
    assert by_items.usage.input_tokens == by_id.usage.input_tokens, (by_items, by_id)
    unstored = client.responses.create(**ASK, store=False)
    expect(openai.NotFoundError, "response_id", client.responses.retrieve, unstored.id)


def check_background(client, expected):
    queued = client.responses.create(**ASK, background=True)
    assert queued.status == "queued" and queued.output == [] and queued.model == ASK["model"], queued
    response = queued
    while response.status in ("queued", "in_progress"):
        time.sleep(0.05)
        response = client.responses.retrieve(queued.id)
    assert response.status == "completed" and response.output_text == expected.output_text, response

    long = ASK | {"max_output_tokens": 1500, "background": True, "extra_body": {"ignore_eos": True}}
    endless = client.responses.create(**long)
    assert client.responses.cancel(endless.id).status == "cancelled"
    assert client.responses.retrieve(endless.id).status == "cancelled"
    expect(openai.BadRequestError, "response_id", client.responses.cancel, expected.id)

    events = []
    with client.responses.create(**ASK, background=True, stream=True) as stream:
        for event in stream:
            events.append(event)
            if event.type == "response.output_text.delta":
                break
    name, last = events[0].response.id, events[-1].sequence_number
    events += list(client.responses.retrieve(name, stream=True, starting_after=last))
    assert [event.sequence_number for event in events] == list(range(len(events))), events
    assert events[-1].type == "response.completed", events[-1]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == expected.output_text, deltas


def expect(error, param, call, *arguments, **named):
    try:
        call(*arguments, **named)
    except error as caught:
        assert caught.param == param, (caught.param, param, caught.message)
        return
    raise AssertionError(f"{arguments} {named} was not refused")


def check_errors(client):
    image = [{"role": "user", "content": [{"type": "input_image", "image_url": "http://127.0.0.1/a.png"}]}]
    for param, change in [
        ("input", {"input": []}),
        ("input[0].content[0]", {"input": image}),
        ("max_output_tokens", {"max_output_tokens": 9_000}),
        ("temperature", {"temperature": -1}),
        ("tools[0].type", {"tools": [{"type": "web_search"}]}),
        ("top_logprobs", {"top_logprobs": 2}),
    ]:
        expect(openai.BadRequestError, param, client.responses.create, **(ASK | change))
    create = client.responses.create
    expect(openai.NotFoundError, "model", create, **(ASK | {"model": "nobody"}))
    expect(openai.NotFoundError, "previous_response_id", create, **ASK, previous_response_id="resp_none")
    expect(openai.NotFoundError, "response_id", client.responses.retrieve, "resp_none")
    expect(openai.NotFoundError, "response_id", client.responses.cancel, "resp_none")


def main():
    client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0, timeout=120)
    ASK["model"] = client.models.list().data[0].id
    first = check_create(client)
    check_stream(client, first)
    check_limits_and_logprobs(client)
    check_format(client)
    check_store(client, first)
    check_background(client, first)
    check_errors(client)
    print(f"openai {openai.__version__}: every check of responses passed against {ASK['model']}")


if __name__ == "__main__":
    main()
