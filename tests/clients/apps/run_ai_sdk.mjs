// The AI SDK with its OpenAI-compatible provider: a chat, and an agent of several steps.
//
// stdin: {what, model, system, texts, ledgers, stream}; the last line of stdout: what was seen.
// argv[2]: the folder with node_modules. `npm install` is never run in the repository.
import { createRequire } from 'node:module';
import path from 'node:path';

const require = createRequire(path.join(process.argv[2], 'package.json'));
const { generateText, jsonSchema, stepCountIs, streamText, tool } = require('ai');
const { createOpenAICompatible } = require('@ai-sdk/openai-compatible');

const pieces = [];
for await (const piece of process.stdin) pieces.push(piece);
const given = JSON.parse(Buffer.concat(pieces).toString());

const provider = createOpenAICompatible({
  name: 'upstream',
  baseURL: process.env.OPENAI_BASE_URL,
  apiKey: process.env.OPENAI_API_KEY,
  includeUsage: true,
});
const ledger = tool({
  description: 'The ledger of a depot.',
  inputSchema: jsonSchema({
    type: 'object',
    properties: { depot: { type: 'integer' } },
    required: ['depot'],
    additionalProperties: false,
  }),
  execute: async ({ depot }) => given.ledgers[depot],
});
const common = { model: provider(given.model), system: given.system, maxRetries: 0 };

/** One answer with all of its steps; streamed or not. */
async function ask(options) {
  if (!given.stream) {
    const result = await generateText({ ...common, ...options });
    return [result.text, result.finishReason, result.steps, result.response.messages];
  }
  const result = streamText({ ...common, ...options, onError: ({ error }) => { throw error; } });
  let text = '';
  for await (const piece of result.textStream) text += piece;
  return [text, await result.finishReason, await result.steps, (await result.response).messages];
}

const shape = (step) => [
  step.text,
  step.finishReason,
  step.toolCalls.map(({ toolCallId, toolName, input }) => [toolCallId, toolName, input]),
  step.toolResults.map(({ toolCallId, output }) => [toolCallId, output]),
];

const seen = [];
let messages = [];
for (const text of given.texts) {
  messages.push({ role: 'user', content: text });
  const tools = given.what === 'agent' ? { tools: { ledger }, stopWhen: stepCountIs(20) } : {};
  const [said, finish, steps, more] = await ask({ messages, ...tools });
  messages = [...messages, ...more];
  seen.push([said, finish, steps.map(shape)]);
}
process.stdout.write(`${JSON.stringify(seen)}\n`);
