"""Lets agents of openai-agents run on a cluster, which calls their tool through Responses.

usage: openai_agents.py BASE_URL

The server must have been started with tests/templates/weather.jinja, --enable-auto-tool-choice, --tool-call-parser hermes
and --reasoning-parser qwen3. Exits 0 and prints one line when every check passed.
"""

import asyncio
import json
import sys

import agents
import openai

ASK = "What is the weather in Paris?"
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
# After a tool's answer the demo model thinks of calling it again.
CALM = {"chat_template_kwargs": {"enable_thinking": False}}
STOP = {"stop": ["END"]}
asked = []


@agents.function_tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    asked.append(city)
    return json.dumps({"city": city, "weather": "sunny"})


def check_usage(usage, requests):
    assert usage.requests == requests and usage.output_tokens > 0, usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens, usage


async def check_run(agent):
    result = await agents.Runner.run(agent, ASK, max_turns=4)
    assert asked == ["Paris"], asked
    assert "sunny in Paris" in result.final_output, result
    kinds = [item.type for item in result.new_items]
    assert kinds == ["tool_call_item", "tool_call_output_item", "message_output_item"], kinds
    check_usage(result.context_wrapper.usage, 2)
    return result


async def check_streamed(agent, expected):
    asked.clear()
    result = agents.Runner.run_streamed(agent, ASK, max_turns=4)
    kinds = [event.data.type async for event in result.stream_events() if event.type == "raw_response_event"]
    assert asked == ["Paris"] and result.final_output == expected.final_output, result
    for kind in ("function_call_arguments", "output_text"):
        assert f"response.{kind}.delta" in kinds and f"response.{kind}.done" in kinds, kinds
    assert kinds.count("response.completed") == 2, kinds
    check_usage(result.context_wrapper.usage, 2)


async def check_by_hand(client, model):
    common = {"model": model, "temperature": 0, "max_output_tokens": 64, "tools": [WEATHER]}
    first = await client.responses.create(input=ASK, extra_body=STOP, **common)
    reasoning, call = first.output
    assert reasoning.type == "reasoning" and "Paris" in reasoning.content[0].text, reasoning
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "get_weather", {"city": "Paris"})
    assert 0 < first.usage.output_tokens_details.reasoning_tokens < first.usage.output_tokens, first.usage
    output = json.dumps({"city": "Paris", "weather": "sunny"})
    result = {"type": "function_call_output", "call_id": call.call_id, "output": output}
    by_id = await client.responses.create(
        input=[result], previous_response_id=first.id, extra_body=STOP | CALM, **common
    )
    assert "sunny in Paris" in by_id.output_text, by_id
    assert by_id.usage.output_tokens_details.reasoning_tokens == 0, by_id.usage
    forced = await client.responses.create(
        input=ASK, tool_choice={"type": "function", "name": "get_weather"}, extra_body=STOP | CALM, **common
    )
    (call,) = forced.output
    assert call.name == "get_weather" and isinstance(json.loads(call.arguments)["city"], str), call
    silent = await client.responses.create(input=ASK, tool_choice="none", extra_body=STOP | CALM, **common)
    assert all(item.type != "function_call" for item in silent.output), silent


async def main():
    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=sys.argv[1], api_key="none", max_retries=0, timeout=120)
    model = (await client.models.list()).data[0].id
    agent = agents.Agent(
        name="Weather",
        instructions="Answer questions about the weather.",
        model=agents.OpenAIResponsesModel(model=model, openai_client=client),
        tools=[get_weather],
        model_settings=agents.ModelSettings(temperature=0, max_tokens=64, extra_body=STOP | CALM),
    )
    result = await check_run(agent)
    await check_streamed(agent, result)
    await check_by_hand(client, model)
    print(f"openai-agents: every check passed against {model}")


if __name__ == "__main__":
    asyncio.run(main())
