"""Frameworks that build on OpenAI's API, against a running cluster: LangChain, LiteLLM and Outlines.

usage: frameworks.py BASE_URL        e.g. http://127.0.0.1:8000/v1

The model is too small to be right; what is checked is what a server decides: shapes, streams, and that constraints hold.
"""

import os
import re
import sys
from typing import Literal

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # Nothing is fetched from elsewhere.

import litellm
import openai
import outlines
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict

QUESTION = "Which colour is the sky?"


class Answer(BaseModel):
    # Else the schema allows further properties, of which the model can find many.
    model_config = ConfigDict(extra="forbid")

    colour: Literal["red", "green", "blue"]
    sure: bool


def langchain(base_url, model):
    chat = ChatOpenAI(
        base_url=base_url, api_key="none", model=model, temperature=0, max_tokens=96, max_retries=0, stream_usage=True
    )
    reply = chat.invoke(QUESTION)
    assert reply.content and reply.usage_metadata["output_tokens"] > 0, reply
    pieces = list(chat.stream(QUESTION))
    assert "".join(piece.content for piece in pieces) == reply.content, pieces
    for method in ("json_schema", "function_calling"):
        answer = chat.with_structured_output(Answer, method=method).invoke(QUESTION)
        assert isinstance(answer, Answer), (method, answer)
    called = chat.bind_tools([Answer], tool_choice="any").invoke(QUESTION)
    (call,) = called.tool_calls
    assert call["name"] == "Answer" and Answer(**call["args"]), called
    batch = chat.batch([QUESTION] * 4)
    assert {reply.content for reply in batch} == {reply.content}, batch


def lite(base_url, model):
    ask = {
        "model": f"hosted_vllm/{model}",
        "api_base": base_url,
        "api_key": "none",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 16,
        "num_retries": 0,
    }
    reply = litellm.completion(**ask)
    text = reply.choices[0].message.content
    assert text and reply.usage.completion_tokens <= 16, reply
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**ask, stream=True))
    assert streamed == text, (streamed, text)
    try:
        litellm.completion(**(ask | {"model": "hosted_vllm/nobody"}))
    except litellm.NotFoundError:
        pass
    else:
        raise AssertionError("an unknown model was accepted")


def structured(client, model):
    """Outlines asks as it asks vLLM: `structured_outputs` with a schema, a regular expression or a grammar."""
    model = outlines.from_vllm(client, model)
    ask = {"temperature": 0, "max_tokens": 64}
    choice = model(QUESTION, Literal["red", "blue"], **ask)
    assert choice in ("red", "blue"), choice
    assert Answer.model_validate_json(model(QUESTION, Answer, **ask))
    plate = model(QUESTION, outlines.types.Regex(r"[A-Z]{3}-[0-9]{4}"), **ask)
    assert re.fullmatch(r"[A-Z]{3}-[0-9]{4}", plate), plate
    sum_ = model("1 + 1 is", outlines.types.CFG('start: NUMBER (" + " NUMBER)~2\nNUMBER: /[0-9]{1,2}/'), **ask)
    assert re.fullmatch(r"[0-9]{1,2}( \+ [0-9]{1,2}){2}", sum_), sum_


def main():
    base_url = sys.argv[1]
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    langchain(base_url, model)
    lite(base_url, model)
    structured(client, model)
    print("frameworks: all checks passed")


if __name__ == "__main__":
    main()
