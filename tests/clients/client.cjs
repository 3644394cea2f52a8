// OpenAI's own Node client in every scene; what it saw goes to stdout as JSON.
//
// stdin: {baseURL, keys: {test: API key}, model, opening, pictures, questions, agentQuestion,
//         pictureQuestions, reportQuestion, tools, schema}
// stdout: {test: what was seen}; an exception in a test is data too.
// argv[2]: the folder with node_modules. `npm install` is never run in the repository.
'use strict';

const { createRequire } = require('node:module');
const path = require('node:path');
const OpenAI = createRequire(path.join(process.argv[2], 'package.json'))('openai');

const FUNCTIONS = {
  weather: ({ city }) => `It is ${city.length} degrees in ${city}.`,
  depot_code: ({ depot }) => `code ${depot * 7919}`,
};

let given;
const user = (content) => ({ role: 'user', content });
const client = (test, maxRetries = 0) =>
  new OpenAI({ baseURL: given.baseURL, apiKey: given.keys[test], maxRetries, timeout: 20_000 });

/** Equal neighbours once: where a text is cut is nobody's business. */
const collapsed = (list) => list.filter((x, i) => i === 0 || JSON.stringify(list[i - 1]) !== JSON.stringify(x));

const usageFields = (usage) => usage && Object.keys(usage).filter((k) => k !== 'vm').sort();

/** Without what differs from request to request. */
const withoutId = ({ id, usage, ...rest }) => [rest, usageFields(usage)];

function shape(chunk) {
  const choices = chunk.choices.map((choice) => [
    choice.index,
    Object.keys(choice.delta).sort(),
    (choice.delta.tool_calls || []).map((c) => [c.index, Object.keys(c).sort()]),
    choice.finish_reason,
  ]);
  const { object, created, model, system_fingerprint: fingerprint } = chunk;
  return [object, created, model, fingerprint, choices, 'usage' in chunk, usageFields(chunk.usage)];
}

/** One request: the message to echo and what else was seen. */
async function ask(made, messages, stream, fields = {}) {
  if (!stream) {
    const reply = await made.chat.completions.create({ model: given.model, messages, ...fields });
    const { refusal, ...message } = reply.choices[0].message;
    return [message, withoutId(reply), reply._request_id];
  }
  const message = { role: 'assistant', content: null };
  const shapes = [];
  const ids = new Set();
  const options = { stream_options: { include_usage: true }, ...fields };
  const chunks = await made.chat.completions.create({ model: given.model, messages, stream: true, ...options });
  for await (const chunk of chunks) {
    shapes.push(shape(chunk));
    ids.add(chunk.id);
    for (const { delta } of chunk.choices) {
      if (delta.content) message.content = (message.content ?? '') + delta.content;
      for (const { index, ...part } of delta.tool_calls || []) {
        message.tool_calls ??= [];
        if (part.id) message.tool_calls[index] = { ...part, function: { ...part.function } };
        else message.tool_calls[index].function.arguments += part.function.arguments;
      }
    }
  }
  return [message, [collapsed(shapes), ids.size]];
}

const talk = (stream) => async (test) => {
  const made = client(test);
  const messages = [...given.opening];
  const seen = [];
  for (const question of given.questions) {
    messages.push(user(question));
    const [message, what] = await ask(made, messages, stream);
    messages.push(message);
    seen.push([message, what]);
  }
  return seen;
};

const images = (stream) => async (test) => {
  const made = client(test);
  const messages = [...given.pictures];
  const seen = [];
  for (const question of given.pictureQuestions) {
    messages.push(question);
    const [message, what] = await ask(made, messages, stream);
    messages.push(message);
    seen.push([message, what]);
  }
  return seen;
};

const runTools = (stream) => async (test) => {
  const tools = given.tools.map((tool) => ({
    type: 'function',
    function: { ...tool.function, parse: JSON.parse, function: FUNCTIONS[tool.function.name] },
  }));
  const messages = [...given.opening, user(given.agentQuestion)];
  const runner = client(test).chat.completions.runTools({ model: given.model, messages, tools, stream });
  const events = [];
  for (const name of ['functionToolCall', 'functionToolCallResult', 'content', 'finalContent']) {
    runner.on(name, (what) => events.push([name, name === 'content' ? null : what]));
  }
  const final = await runner.finalContent();
  const usage = await runner.totalUsage();
  const completions = runner.allChatCompletions().map(withoutId);
  return [final, collapsed(events), runner.messages.slice(messages.length), completions, usage.total_tokens > 0];
};

const streamHelper = async (test) => {
  const made = client(test);
  const messages = [...given.opening];
  const seen = [];
  for (const question of given.questions) {
    messages.push(user(question));
    const events = [];
    const stream = made.chat.completions.stream({ model: given.model, messages });
    stream.on('content', (_, snapshot) => events.push(['content', snapshot.length > 0]));
    stream.on('content.done', ({ content }) => events.push(['content.done', content]));
    const final = await stream.finalChatCompletion();
    seen.push([collapsed(events), withoutId(final)]);
    messages.push({ role: 'assistant', content: final.choices[0].message.content });
  }
  return seen;
};

const report = (how) => async (test) => {
  const made = client(test);
  const messages = [...given.opening];
  const format = { type: 'json_schema', json_schema: { name: 'report', strict: true, schema: given.schema } };
  const seen = [];
  for (let turn = 0; turn < 2; turn += 1) {
    messages.push(user(given.reportQuestion));
    let message;
    if (how === 'parse') {
      const asked = { model: given.model, messages, response_format: format };
      message = (await made.chat.completions.parse(asked)).choices[0].message;
    } else {
      [message] = await ask(made, messages, how === 'stream', { response_format: format });
    }
    seen.push([JSON.parse(message.content), message]);
    messages.push({ role: 'assistant', content: message.content });
  }
  return seen;
};

const retried = (stream) => async (test) =>
  ask(client(test, 3), [...given.opening, user(given.questions[0])], stream);

const refused = (stream) => async (test) => {
  try {
    return await ask(client(test), [...given.opening, user(given.questions[0])], stream);
  } catch (e) {
    return told(e);
  }
};

/** All that a program can read from an exception of the client. */
function told(e) {
  const headers = ['retry-after', 'retry-after-ms'].map((name) => e.headers?.get?.(name) ?? null);
  return [e.constructor.name, e.message, e.status ?? null, e.error ?? null, e.code ?? null, e.requestID ?? null, headers];
}

const endsBadly = async (test) => {
  const made = client(test);
  const messages = [...given.opening, user(given.questions[0])];
  let first;
  try {
    first = await ask(made, messages, true);
  } catch (e) {
    first = told(e);
  }
  return [first, await ask(made, messages, true)];
};

const TESTS = {
  'talk, whole': talk(false),
  'talk, stream': talk(true),
  'talk, stream helper': streamHelper,
  'runTools, whole': runTools(false),
  'runTools, stream': runTools(true),
  'json schema, whole': report('whole'),
  'json schema, stream': report('stream'),
  'json schema, parse': report('parse'),
  'images, whole': images(false),
  'images, stream': images(true),
  'rate limit retried, whole': retried(false),
  'rate limit retried, stream': retried(true),
  'rate limit later retried, whole': retried(false),
  'rate limit later retried, stream': retried(true),
  'failure later retried, whole': retried(false),
  'failure later retried, stream': retried(true),
  'rate limit, whole': refused(false),
  'rate limit, stream': refused(true),
  'refused, whole': refused(false),
  'refused, stream': refused(true),
  'refused later, whole': refused(false),
  'refused later, stream': refused(true),
  'stream broken off': endsBadly,
  'stream broken off later': endsBadly,
  'stream with a late error': endsBadly,
};

async function main() {
  const pieces = [];
  for await (const piece of process.stdin) pieces.push(piece);
  given = JSON.parse(Buffer.concat(pieces).toString());
  const seen = {};
  for (const [test, run] of Object.entries(TESTS)) {
    try {
      seen[test] = await run(test);
    } catch (e) {
      seen[test] = { raised: String(e.stack) };
    }
  }
  process.stdout.write(JSON.stringify(seen));
}

main();
