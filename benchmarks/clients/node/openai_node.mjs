// OpenAI's Node client.
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { assert, check, KEY, MODEL, QUESTION, Trip, URL, z } from "./features.mjs";

const client = new OpenAI({ baseURL: URL, apiKey: KEY, maxRetries: 0, timeout: 300_000 });
const messages = [{ role: "user", content: QUESTION }];
const parameters = z.toJSONSchema(Trip);
const chat = (fields) => client.chat.completions.create({ model: MODEL, messages, max_tokens: 8, ...fields });

await check("openai", [
  ["models", async () => assert((await client.models.list()).data.some((m) => m.id === MODEL))],
  ["chat, the same text streamed, .stream()", async () => {
    const text = (await chat({ seed: 5 })).choices[0].message.content;
    let streamed = "";
    for await (const chunk of await chat({ seed: 5, stream: true })) streamed += chunk.choices[0]?.delta.content ?? "";
    assert.equal(streamed, text);
    const helper = client.chat.completions.stream({ model: MODEL, messages, max_tokens: 8, seed: 5 });
    assert.equal(await helper.finalContent(), text);
  }],
  ["parse with zod", async () => {
    const answer = await client.chat.completions.parse({
      model: MODEL, messages, max_tokens: 96, response_format: zodResponseFormat(Trip, "trip"),
    });
    Trip.parse(answer.choices[0].message.parsed);
  }],
  ["tool loop", async () => {
    const tools = [{ type: "function", function: { name: "book", parameters } }];
    const { message } = (await chat({
      tools, tool_choice: "required", parallel_tool_calls: false, max_tokens: 96,
    })).choices[0];
    const [call] = message.tool_calls;
    Trip.parse(JSON.parse(call.function.arguments));
    const result = { role: "tool", tool_call_id: call.id, content: "done" };
    assert((await chat({ tools, messages: [...messages, message, result] })).choices.length);
  }],
  ["responses: text, streamed, parse, tool", async () => {
    const fields = { model: MODEL, input: QUESTION, max_output_tokens: 96 };
    assert((await client.responses.create({ ...fields, max_output_tokens: 16 })).output_text);
    const helper = client.responses.stream({ ...fields, max_output_tokens: 16 });
    assert((await helper.finalResponse()).output.length);
    const parsed = await client.responses.parse({ ...fields, text: { format: zodTextFormat(Trip, "trip") } });
    Trip.parse(parsed.output_parsed);
    const tools = [{ type: "function", name: "book", parameters, strict: true }];
    const called = await client.responses.create({ ...fields, tools, tool_choice: "required", parallel_tool_calls: false });
    Trip.parse(JSON.parse(called.output[0].arguments));
  }],
  ["embeddings", () => client.embeddings.create({ model: MODEL, input: "a" }), "404"],
]);
