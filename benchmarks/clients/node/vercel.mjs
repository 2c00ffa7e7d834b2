// Vercel's AI SDK: its OpenAI provider in its default mode (responses) and in chat, the providers of
// compatible servers and of Anthropic.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, isStepCount, Output, streamText, tool } from "ai";
import { assert, check, KEY, MODEL, QUESTION, Trip, URL } from "./features.mjs";

const openai = createOpenAI({ baseURL: URL, apiKey: KEY });
const compatible = createOpenAICompatible({ name: "idlm", baseURL: URL, supportsStructuredOutputs: true });
const anthropic = createAnthropic({ baseURL: URL, apiKey: KEY });
const models = [
  ["@ai-sdk/openai, responses", openai(MODEL)],
  ["@ai-sdk/openai, chat", openai.chat(MODEL)],
  ["@ai-sdk/openai-compatible", compatible(MODEL)],
  ["@ai-sdk/anthropic", anthropic(MODEL)],
];
const tools = { book: tool({ description: "Books.", inputSchema: Trip, execute: async () => "done" }) };
// a call in the first step, an answer in the second
const calls = {
  tools, stopWhen: isStepCount(2), maxOutputTokens: 96,
  prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber ? "none" : "required" }),
};
const parallel = { providerOptions: { openai: { parallelToolCalls: false }, anthropic: { disableParallelToolUse: true }, idlm: { parallel_tool_calls: false } } };

const features = models.flatMap(([name, model]) => {
  const fields = { model, prompt: QUESTION, maxRetries: 0, maxOutputTokens: 16, onError: () => {}, ...parallel };
  return [
    [`${name}: generateText, streamText`, async () => {
      assert((await generateText(fields)).text);
      assert(await streamText(fields).text);
    }],
    [`${name}: structured output, whole and streamed`, async () => {
      const form = { ...fields, maxOutputTokens: 96, output: Output.object({ schema: Trip }) };
      Trip.parse((await generateText(form)).output);
      Trip.parse(await streamText(form).output);
    }],
    [`${name}: tool loop, whole and streamed`, async () => {
      const whole = await generateText({ ...fields, ...calls });
      assert(whole.steps.length === 2 && whole.steps[0].toolResults.length);
      const streamed = await streamText({ ...fields, ...calls }).steps;
      assert(streamed.length === 2 && streamed[0].toolResults.length);
    }],
  ];
});
features.push(["@ai-sdk/openai-compatible: reasoningEffort", async () => {
  const providerOptions = { idlm: { reasoningEffort: "low" } };
  assert((await generateText({ model: compatible(MODEL), prompt: QUESTION, maxOutputTokens: 8, providerOptions })).text);
}]);
features.push(["@ai-sdk/openai-compatible: completionModel", async () => {
  const model = compatible.completionModel(MODEL);
  assert((await generateText({ model, prompt: "One two", maxOutputTokens: 8 })).text);
}]);
await check("ai", features);
