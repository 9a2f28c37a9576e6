"""Reads log-probabilities, token ids and echoes with the openai package, as an evaluation harness would.

usage: outputs_client.py BASE_URL        e.g. http://127.0.0.1:8000/v1

Exits 0 and prints one line when every check passed.
"""

import sys

import openai

PROMPT = "The capital of France is"


def check_loglikelihood(client, model):
    """How lm-evaluation-harness scores a continuation: nothing is generated."""
    reply = client.completions.create(
        model=model, prompt=[PROMPT + " Paris", PROMPT + " Rome"], max_tokens=0, echo=True, logprobs=1, temperature=0
    )
    scores = []
    for choice in reply.choices:
        logprobs = choice.logprobs
        assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None, logprobs
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset), logprobs
        assert "".join(logprobs.tokens) == choice.text, choice
        scores.append(logprobs.token_logprobs[-1])
    assert scores[0] > scores[1], scores
    assert reply.usage.completion_tokens == 0, reply.usage


def check_prompt_logprobs(client, model):
    reply = client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=1,
        temperature=0,
        extra_body={"prompt_logprobs": 2, "return_token_ids": True},
    )
    (choice,) = reply.choices
    extra = choice.model_extra
    ids, scored = extra["prompt_token_ids"], extra["prompt_logprobs"]
    assert scored[0] is None and len(scored) == len(ids), extra
    for token, position in zip(ids[1:], scored[1:]):
        known = position[str(token)]
        assert known["logprob"] <= 0 and known["rank"] >= 1, known
        ranks = sorted(entry["rank"] for entry in position.values())
        assert ranks[:2] == [1, 2] and 2 <= len(position) <= 3, position
    assert len(extra["token_ids"]) == 1, extra


def check_chat(client, model):
    messages = [{"role": "user", "content": "Say hello."}]
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=5,
        temperature=0,
        stream=True,
        logprobs=True,
        top_logprobs=2,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        extra_body={"return_token_ids": True, "return_tokens_as_token_ids": True},
    )
    chunks = list(stream)
    assert chunks[0].model_extra["prompt_token_ids"], chunks[0]
    ids, names = [], []
    for chunk in chunks:
        for choice in chunk.choices:
            ids += choice.model_extra.get("token_ids") or []
            if choice.logprobs:
                names += [token.token for token in choice.logprobs.content]
                assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content), choice
    assert names == [f"token_id:{token}" for token in ids], (names, ids)
    assert chunks[-1].usage.completion_tokens == len(ids), chunks[-1]


def main():
    client = openai.OpenAI(base_url=sys.argv[1], api_key="unused", max_retries=0, timeout=60)
    model = client.models.list().data[0].id
    check_loglikelihood(client, model)
    check_prompt_logprobs(client, model)
    check_chat(client, model)
    print("every check passed")


if __name__ == "__main__":
    main()
