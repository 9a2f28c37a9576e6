"""Talks to a running cluster with the openai package, as a user would.

usage: openai_client.py [BASE_URL]        e.g. http://127.0.0.1:8000/v1

BASE_URL defaults to $OPENAI_BASE_URL, the key to $OPENAI_API_KEY. Exits 0 and prints one line when every check passed.
"""

import os
import sys

import openai

QUESTION = [{"role": "user", "content": "Name three colours of the rainbow."}]


def check_models(client):
    models = client.models.list().data
    assert models and all(model.object == "model" for model in models), models
    return models[0].id


def check_chat(client, model):
    reply = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=16, temperature=0)
    assert reply.object == "chat.completion" and reply.id.startswith("chatcmpl-"), reply
    (choice,) = reply.choices
    assert choice.message.role == "assistant" and choice.message.content, choice
    assert choice.finish_reason in ("stop", "length"), choice
    usage = reply.usage
    assert 0 < usage.completion_tokens <= 16 < usage.prompt_tokens + 16, usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage
    return choice.message.content, usage


def check_content_parts(client, model, expected):
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    reply = client.chat.completions.create(model=model, messages=parts, max_tokens=16, temperature=0)
    assert reply.choices[0].message.content == expected, (reply, expected)


def check_chat_stream(client, model, expected, expected_usage):
    stream = client.chat.completions.create(
        model=model,
        messages=QUESTION,
        max_tokens=16,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant", chunks[0]
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected, (text, expected)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] in ("stop", "length") and not any(reasons[:-1]), reasons
    last = chunks[-1]
    assert not last.choices and last.usage.total_tokens == expected_usage.total_tokens, last
    assert all(chunk.usage is None for chunk in chunks[:-1])


def check_abandoned_stream(client, model):
    with client.completions.create(model=model, prompt="Once", max_tokens=200, stream=True) as stream:
        next(iter(stream))


def check_n(client, model):
    reply = client.chat.completions.create(
        model=model, messages=QUESTION, max_tokens=8, n=2, seed=11, temperature=1.0
    )
    assert [choice.index for choice in reply.choices] == [0, 1], reply
    stream = client.chat.completions.create(
        model=model, messages=QUESTION, max_tokens=8, n=2, seed=11, temperature=1.0, stream=True
    )
    texts = ["", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in reply.choices], (texts, reply)


def check_completions(client, model):
    prompts = ["The capital of France is", "Two and two are"]
    reply = client.completions.create(model=model, prompt=prompts, max_tokens=4, temperature=0)
    assert reply.object == "text_completion" and reply.id.startswith("cmpl-"), reply
    assert [choice.index for choice in reply.choices] == [0, 1], reply
    alone = client.completions.create(model=model, prompt=prompts[1], max_tokens=4, temperature=0)
    assert alone.choices[0].text == reply.choices[1].text, (alone, reply)
    echoed = client.completions.create(model=model, prompt=prompts[1], max_tokens=4, temperature=0, echo=True)
    assert echoed.choices[0].text == prompts[1] + alone.choices[0].text, (echoed, alone)


def check_stop(client, model):
    whole = client.completions.create(model=model, prompt="1, 2, 3, 4,", max_tokens=12, temperature=0)
    text = whole.choices[0].text
    stop = text[len(text) // 2]
    cut = client.completions.create(model=model, prompt="1, 2, 3, 4,", max_tokens=12, temperature=0, stop=stop)
    assert cut.choices[0].text == text[: text.index(stop)], (cut, whole)
    assert cut.choices[0].finish_reason == "stop", cut


def check_seed(client, model):
    def draw(seed):
        reply = client.completions.create(
            model=model, prompt="Once upon a time", max_tokens=16, temperature=1.0, seed=seed
        )
        return reply.choices[0].text

    assert draw(7) == draw(7)
    assert len({draw(seed) for seed in (7, 8, 9)}) > 1, "three seeds, one text"


def check_logprobs(client, model):
    chat = client.chat.completions.create(
        model=model, messages=QUESTION, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2
    )
    for token in chat.choices[0].logprobs.content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 2, token
        assert token.top_logprobs[0].token == token.token, token
    reply = client.completions.create(model=model, prompt="One, two,", max_tokens=4, temperature=0, logprobs=2)
    logprobs = reply.choices[0].logprobs
    assert "".join(logprobs.tokens) == reply.choices[0].text, reply
    assert logprobs.text_offset[0] == 0 and len(logprobs.top_logprobs) == len(logprobs.tokens), reply


def expect(error, param, call, **arguments):
    try:
        call(**arguments)
    except error as caught:
        assert caught.body["type"] and caught.body["message"], caught.body
        assert param is None or caught.param == param, (caught.param, param, caught.message)
        return
    raise AssertionError(f"{arguments} was not refused")


def check_errors(client, model):
    chat, complete = client.chat.completions.create, client.completions.create
    bad = openai.BadRequestError
    expect(bad, "messages", chat, model=model, messages=[])
    expect(bad, "messages[0].role", chat, model=model, messages=[{"role": "", "content": "hi"}])
    expect(bad, "temperature", chat, model=model, messages=QUESTION, temperature=-1)
    expect(bad, "temperature", chat, model=model, messages=QUESTION, temperature="hot")
    expect(bad, "top_p", chat, model=model, messages=QUESTION, top_p=1.5)
    expect(bad, "n", chat, model=model, messages=QUESTION, n=0)
    expect(bad, "max_tokens", complete, model=model, prompt="a", max_tokens=-1)
    expect(bad, "prompt", complete, model=model, prompt=[])
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    expect(bad, "response_format.json_schema.schema", chat, model=model, messages=QUESTION, response_format=schema)
    expect(bad, None, complete, model=model, prompt="word " * 20_000)
    expect(openai.NotFoundError, "model", chat, model="no-such-model", messages=QUESTION)
    expect(openai.NotFoundError, "model", complete, model="no-such-model", prompt="a")


def main():
    base_url = sys.argv[1] if len(sys.argv) > 1 else os.environ["OPENAI_BASE_URL"]
    key = os.environ.get("OPENAI_API_KEY", "none")
    client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=120)
    model = check_models(client)
    text, usage = check_chat(client, model)
    check_content_parts(client, model, text)
    check_chat_stream(client, model, text, usage)
    check_abandoned_stream(client, model)
    check_n(client, model)
    check_completions(client, model)
    check_stop(client, model)
    check_seed(client, model)
    check_logprobs(client, model)
    check_errors(client, model)
    print(f"openai {openai.__version__}: every check passed against {model} at {base_url}")


if __name__ == "__main__":
    main()
