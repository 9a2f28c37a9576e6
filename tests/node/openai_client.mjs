// The openai package for Node against a running cluster.
//
// usage: node openai_client.mjs BASE_URL        e.g. http://127.0.0.1:8000/v1
// Ends with 0 and prints one line when every check passed.

import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const question = [{ role: "user", content: "Name three colours of the rainbow." }];
const ask = { messages: question, max_tokens: 16, temperature: 0 };

const models = await client.models.list();
const model = models.data[0].id;

const reply = await client.chat.completions.create({ model, ...ask });
const text = reply.choices[0].message.content;
assert.ok(text.length > 0 && reply.usage.completion_tokens <= 16, JSON.stringify(reply));

const stream = await client.chat.completions.create({
  model,
  ...ask,
  stream: true,
  stream_options: { include_usage: true },
});
let streamed = "";
let usage = null;
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(streamed, text);
assert.equal(usage.total_tokens, reply.usage.total_tokens);

// The package's own accumulator, which is strict about the order of events.
const events = client.chat.completions.stream({ model, ...ask });
assert.equal(await events.finalContent(), text);

const response = await client.responses.create({ model, input: question, max_output_tokens: 16, temperature: 0 });
assert.equal(response.output_text, text);

const schema = {
  type: "object",
  properties: { colour: { enum: ["red", "green"] } },
  required: ["colour"],
  additionalProperties: false,
};
const structured = await client.chat.completions.create({
  model,
  ...ask,
  max_tokens: 64,
  response_format: { type: "json_schema", json_schema: { name: "colour", strict: true, schema } },
});
assert.ok(schema.properties.colour.enum.includes(JSON.parse(structured.choices[0].message.content).colour));

const abandoned = await client.completions.create({ model, prompt: "Once", max_tokens: 1000, stream: true });
for await (const _ of abandoned) break;

await assert.rejects(client.chat.completions.create({ model: "nobody", ...ask }), OpenAI.NotFoundError);
await assert.rejects(client.chat.completions.create({ model, ...ask, temperature: -1 }), (error) => {
  assert.ok(error instanceof OpenAI.BadRequestError && error.param === "temperature", JSON.stringify(error));
  return true;
});

console.log("openai for Node: all checks passed");
