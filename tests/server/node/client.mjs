// The official openai SDK for Node against a running server, unmodified: exits 0 when all of it answers as OpenAI's would.
// node client.mjs FOLDER_WITH_NODE_MODULES BASE_URL KEY
import assert from "node:assert/strict";
import { createRequire } from "node:module";

const [folder, baseURL, apiKey] = process.argv.slice(2);
const { default: OpenAI } = createRequire(`${folder}/`)("openai");
const sdk = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 60_000 });
const model = "tiny";
const messages = [{ role: "user", content: "Hello" }];
const ask = { model, messages, max_tokens: 12, temperature: 0 };
const schema = {
  type: "object",
  properties: { ok: { type: "boolean" }, kind: { enum: ["a", "b"] } },
  required: ["ok", "kind"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "get_weather", parameters: schema } }];

const checks = {
  async models() {
    const ids = [];
    for await (const each of sdk.models.list()) ids.push(each.id);
    assert.deepEqual(ids, [model]);
    assert.equal((await sdk.models.retrieve(model)).owned_by, "ktcore");
  },

  async "stream, with usage"() {
    const whole = await sdk.chat.completions.create(ask);
    assert.equal(whole.usage.completion_tokens, 12);
    assert.equal(whole.choices[0].finish_reason, "length");
    let text = "";
    let usage;
    for await (const chunk of await sdk.chat.completions.create({
      ...ask,
      stream: true,
      stream_options: { include_usage: true },
    })) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(usage.completion_tokens, 12);
    const helper = sdk.chat.completions.stream(ask);
    assert.equal(await helper.finalContent(), text);
  },

  async "a stream that is aborted"() {
    const stream = await sdk.chat.completions.create({ ...ask, max_tokens: 3000, stream: true });
    for await (const chunk of stream) if (chunk.choices[0].delta.content) break;
    assert.ok(stream.controller.signal.aborted);
  },

  async "n and logprobs"() {
    const found = await sdk.chat.completions.create({
      ...ask,
      temperature: 1,
      seed: 2,
      n: 3,
      max_tokens: 5,
      logprobs: true,
      top_logprobs: 2,
    });
    assert.deepEqual(found.choices.map((choice) => choice.index), [0, 1, 2]);
    assert.ok(new Set(found.choices.map((choice) => choice.message.content)).size > 1);
    for (const choice of found.choices) {
      for (const token of choice.logprobs.content) {
        assert.equal(token.top_logprobs.length, 2);
        assert.ok(token.top_logprobs[0].logprob >= token.logprob && token.logprob <= 0);
      }
      const bytes = choice.logprobs.content.flatMap((token) => token.bytes);
      assert.equal(Buffer.from(bytes).toString("utf8"), choice.message.content);
    }
  },

  async "JSON schema"() {
    const found = await sdk.chat.completions.parse({
      ...ask,
      temperature: 1,
      seed: 1,
      max_tokens: 200,
      response_format: { type: "json_schema", json_schema: { name: "answer", strict: true, schema } },
    });
    const { ok, kind } = found.choices[0].message.parsed;
    assert.equal(typeof ok, "boolean");
    assert.ok(["a", "b"].includes(kind));
  },

  async "tools, whole and streamed"() {
    const forced = { ...ask, temperature: 1, seed: 1, max_tokens: 300, tools, tool_choice: "required", parallel_tool_calls: false };
    const found = await sdk.chat.completions.create(forced);
    const [call] = found.choices[0].message.tool_calls;
    assert.equal(found.choices[0].finish_reason, "tool_calls");
    assert.equal(call.function.name, "get_weather");
    const streamed = await sdk.chat.completions.stream(forced).finalMessage();
    assert.deepEqual(streamed.tool_calls.map((each) => each.function.arguments), [call.function.arguments]);
    const results = [{ role: "tool", tool_call_id: call.id, content: "sunny" }];
    const again = await sdk.chat.completions.create({
      ...ask,
      messages: [...messages, found.choices[0].message, ...results],
      tools,
    });
    assert.ok(again.usage.prompt_tokens > found.usage.prompt_tokens);
  },

  async "completions, embeddings, responses"() {
    const plain = await sdk.completions.create({ model, prompt: ["one", "two"], max_tokens: 4, temperature: 0, n: 2 });
    assert.equal(plain.choices.length, 4);
    assert.equal(plain.choices[0].text, plain.choices[1].text);
    const { data } = await sdk.embeddings.create({ model, input: ["one", "two"] });
    assert.equal(data.length, 2);
    assert.ok(Math.abs(Math.hypot(...data[0].embedding) - 1) < 1e-3);
    const response = await sdk.responses.create({ model, input: "Hello", max_output_tokens: 8, temperature: 0 });
    assert.equal(response.output_text, (await sdk.chat.completions.create({ ...ask, max_tokens: 8 })).choices[0].message.content);
  },

  async "what was too late is not asked for again"() {
    let asked = 0;
    const counted = (...words) => (asked++, fetch(...words));
    const patient = new OpenAI({ baseURL, apiKey, fetch: counted });
    const late = { model, max_tokens: 2000, temperature: 0, timeout: 0.0001 };
    const { max_tokens, ...rest } = late;
    await assert.rejects(patient.chat.completions.create({ ...late, messages }), OpenAI.InternalServerError);
    await assert.rejects(patient.completions.create({ ...late, prompt: "Hello" }), OpenAI.InternalServerError);
    await assert.rejects(patient.responses.create({ ...rest, input: "Hello" }), OpenAI.InternalServerError);
    assert.equal(asked, 3);
  },

  async errors() {
    const other = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
    await assert.rejects(other.models.list(), OpenAI.AuthenticationError);
    await assert.rejects(sdk.chat.completions.create({ ...ask, model: "other" }), (error) => {
      return error instanceof OpenAI.NotFoundError && error.code === "model_not_found";
    });
    await assert.rejects(sdk.completions.create({ model, prompt: "x".repeat(9000) }), OpenAI.BadRequestError);
    await assert.rejects(sdk.chat.completions.create({ ...ask, temperature: -1 }), (error) => {
      return error instanceof OpenAI.BadRequestError && error.param === "temperature";
    });
  },
};

for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    console.log(`passed: ${name}`);
  } catch (error) {
    console.log(`FAILED: ${name}\n${error.stack}`);
    process.exitCode = 1;
  }
}
