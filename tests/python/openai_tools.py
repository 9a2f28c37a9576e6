"""Lets a running cluster call tools, with the openai package, as a user would.

usage: openai_tools.py BASE_URL

The server must have been started with tests/templates/weather.jinja, --enable-auto-tool-choice, --tool-call-parser hermes
and --reasoning-parser qwen3. Exits 0 and prints one line when every check passed.
"""

import json
import sys

import openai

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASK = {"role": "user", "content": "What is the weather in Paris?"}
COMMON = {"max_tokens": 64, "temperature": 0, "stop": ["END"]}
CALM = {"chat_template_kwargs": {"enable_thinking": False}}


def check_call(client, model):
    reply = client.chat.completions.create(model=model, messages=[ASK], tools=[WEATHER], **COMMON)
    (choice,) = reply.choices
    assert choice.finish_reason == "tool_calls", choice
    assert choice.message.content is None, choice
    assert "Paris" in choice.message.reasoning_content, choice
    assert choice.message.reasoning == choice.message.reasoning_content, choice
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.id.startswith("chatcmpl-tool-"), call
    assert call.function.name == "get_weather" and json.loads(call.function.arguments) == {"city": "Paris"}, call
    return choice.message


def check_stream(client, model, expected):
    stream = client.chat.completions.create(model=model, messages=[ASK], tools=[WEATHER], stream=True, **COMMON)
    reasoning, name, ids, pieces, reasons = "", "", [], [], []
    for chunk in stream:
        (choice,) = chunk.choices
        reasons.append(choice.finish_reason)
        assert "<" not in (choice.delta.content or ""), chunk
        reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        for call in choice.delta.tool_calls or []:
            assert call.index == 0, call
            ids += [call.id] if call.id else []
            name += call.function.name or ""
            pieces.append(call.function.arguments)
    (call,) = expected.tool_calls
    assert reasoning == expected.reasoning_content, (reasoning, expected)
    assert name == "get_weather" and len(ids) == 1, (name, ids)
    assert "".join(pieces) == call.function.arguments and len(pieces) > 2, pieces
    assert reasons[-1] == "tool_calls" and not any(reasons[:-1]), reasons


def check_answer(client, model, message):
    (call,) = message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"city": "Paris", "weather": "sunny"}'}
    reply = client.chat.completions.create(
        model=model, messages=[ASK, message, result], tools=[WEATHER], extra_body=CALM, **COMMON
    )
    (choice,) = reply.choices
    assert choice.finish_reason == "stop" and choice.message.tool_calls is None, choice
    assert "sunny in Paris" in choice.message.content, choice
    assert choice.message.reasoning_content is None, choice


def check_choices(client, model):
    reply = client.chat.completions.create(
        model=model, messages=[ASK], tools=[WEATHER], tool_choice="none", extra_body=CALM, **COMMON
    )
    (choice,) = reply.choices
    assert choice.finish_reason == "stop" and choice.message.tool_calls is None, choice
    assert "<tool_call>" in choice.message.content, choice
    hidden = client.chat.completions.create(
        model=model, messages=[ASK], tools=[WEATHER], extra_body={"include_reasoning": False}, **COMMON
    )
    message = hidden.choices[0].message
    assert message.tool_calls and not hasattr(message, "reasoning_content"), message


def check_forced(client, model):
    forecast = {
        "type": "function",
        "function": {
            "name": "get_forecast",
            "parameters": {
                "type": "object",
                "properties": {"days": {"type": "integer", "minimum": 1, "maximum": 9}, "exact": {"type": "boolean"}},
                "required": ["days", "exact"],
                "additionalProperties": False,
            },
        },
    }
    ask = [{"role": "user", "content": "Tell me a story."}]
    named = {"type": "function", "function": {"name": "get_forecast"}}
    for choice, reason in ((named, "stop"), ("required", "tool_calls")):
        arguments = {
            "model": model,
            "messages": ask,
            "tools": [forecast],
            "tool_choice": choice,
            "parallel_tool_calls": False,
            "temperature": 0,
            "max_tokens": 200,
        }
        reply = client.chat.completions.create(**arguments)
        (answer,) = reply.choices
        assert answer.finish_reason == reason and answer.message.reasoning_content is None, answer
        (call,) = answer.message.tool_calls
        assert call.function.name == "get_forecast", call
        given = json.loads(call.function.arguments)
        assert given.keys() == {"days", "exact"} and 1 <= given["days"] <= 9, given
        pieces = ""
        for chunk in client.chat.completions.create(stream=True, **arguments):
            for piece in chunk.choices[0].delta.tool_calls or []:
                pieces += piece.function.arguments
        assert pieces == call.function.arguments, (pieces, call)


def check_strict(client, model):
    strict = json.loads(json.dumps(WEATHER))
    strict["function"]["strict"] = True
    strict["function"]["parameters"] = {
        "type": "object",
        "properties": {"city": {"enum": ["Lyon", "Nice"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    reply = client.chat.completions.create(model=model, messages=[ASK], tools=[strict], extra_body=CALM, **COMMON)
    (choice,) = reply.choices
    assert choice.message.tool_calls, choice
    call = choice.message.tool_calls[0]
    assert json.loads(call.function.arguments)["city"] in ("Lyon", "Nice"), call


def check_thought_before_json(client, model):
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "sunny": {"type": "boolean"}},
        "required": ["city", "sunny"],
        "additionalProperties": False,
    }
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": '{"city": "Paris", "weather": "sunny"}'}],
        response_format={"type": "json_schema", "json_schema": {"name": "weather", "strict": True, "schema": schema}},
        **COMMON,
    )
    (choice,) = reply.choices
    assert choice.finish_reason == "stop" and choice.message.reasoning_content, choice
    assert json.loads(choice.message.content).keys() == {"city", "sunny"}, choice


def expect(param, call, **arguments):
    try:
        call(**arguments)
    except openai.BadRequestError as caught:
        assert caught.param == param, (caught.param, param, caught.message)
        return
    raise AssertionError(f"{arguments} was not refused")


def check_errors(client, model):
    def refused(param, **arguments):
        expect(param, client.chat.completions.create, model=model, messages=[ASK], **arguments)

    deep = {"type": "object"}
    for _ in range(300):
        deep = {"type": "object", "properties": {"x": deep}}
    refused("tools[0]", tools=["get_weather"])
    refused("tools[0].function.name", tools=[{"type": "function", "function": {}}])
    refused("tools", tools=[WEATHER] * 10_000)
    refused("tools", tools=[{"type": "function", "function": {"name": "f", "parameters": deep}}])
    refused("tool_choice", tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "other"}})
    refused("tool_choice", tool_choice="required")
    refused("tool_choice", tools=[WEATHER], tool_choice="sometimes")
    refused("tool_choice", tools=[WEATHER], tool_choice="required", response_format={"type": "json_object"})
    refused("tools", tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "thing"}}}], tool_choice="required")
    refused("chat_template", extra_body={"chat_template": "{{ 1 }}"})
    image = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}]
    expect(
        "messages[0].content[0]",
        client.chat.completions.create,
        model=model,
        messages=[{"role": "user", "content": image}],
    )


def main():
    client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0, timeout=120)
    model = client.models.list().data[0].id
    message = check_call(client, model)
    check_stream(client, model, message)
    check_answer(client, model, message)
    check_choices(client, model)
    check_forced(client, model)
    check_strict(client, model)
    check_thought_before_json(client, model)
    check_errors(client, model)
    print(f"openai {openai.__version__}: every check of tools passed against {model}")


if __name__ == "__main__":
    main()
