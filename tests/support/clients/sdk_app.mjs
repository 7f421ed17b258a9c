// What programs do with the OpenAI SDK for JavaScript, on whatever the environment names. Prints what it got as JSON.
import OpenAI from "openai";

const client = new OpenAI({ timeout: 30_000 });
const tools = [
  {
    type: "function",
    function: { name: "weather", parameters: { type: "object", properties: { city: { type: "string" } } } },
  },
];
const say = (text, more = {}) => ({ model: "main", messages: [{ role: "user", content: text }], ...more });
const create = (text, more) => client.chat.completions.create(say(text, more));
const plain = async (text, more) => (await create(text, more)).choices.map((choice) => choice.message.content);

async function streamed(text, more) {
  const texts = [];
  for await (const chunk of await create(text, { stream: true, ...more })) {
    for (const choice of chunk.choices) texts[choice.index] = (texts[choice.index] ?? "") + (choice.delta.content ?? "");
  }
  return texts;
}

const called = ({ tool_calls: [call] }) => [call.function.name, call.function.arguments];

async function errorOf(text, stream) {
  let came = "";
  try {
    const answer = await create(text, { stream });
    if (stream) for await (const chunk of answer) came += chunk.choices[0].delta.content ?? "";
  } catch (error) {
    return [error.constructor.name, error instanceof OpenAI.APIError, error.code, came];
  }
  return ["no error", false, null, came];
}

// The reader leaves in mid-stream.
async function stopped() {
  for await (const chunk of await create("a long answer that nobody reads", { stream: true })) {
    if (chunk.choices[0].delta.content) return chunk.choices[0].delta.content;
  }
}

// The SDK itself gives up, and asks again.
const impatient = async () =>
  (await client.chat.completions.create(say("slow"), { timeout: 1_000, maxRetries: 1 })).choices[0].message.content;

const retried = await client.chat.completions.create(say("busy")).withResponse();
const found = {
  stopped: await stopped(),
  impatient: await impatient(),
  plain: await plain("plain"),
  stream: await streamed("stream"),
  several: await plain("several", { n: 2, temperature: 0.5 }),
  "several streamed": await streamed("several streamed", { n: 2, temperature: 0.5 }),
  tool: called((await create("call it", { tools })).choices[0].message),
  "tool streamed": called(await client.chat.completions.stream(say("call it", { tools })).finalMessage()),
  retry: [retried.response.headers.get("x-tracegrad-call").slice(0, 5), retried.data.choices[0].message.content],
  overflow: await errorOf("x".repeat(3000), false),
  "overflow streamed": await errorOf("x".repeat(3000), true),
  fails: await errorOf("fails", true),
  dies: await errorOf("dies", true),
  completion: (await client.completions.create({ model: "main", prompt: "text" })).choices[0].text,
  embedding: (await client.embeddings.create({ model: "main", input: "text" })).data[0].embedding,
  models: (await client.models.list()).data.map((card) => card.id),
  "equal and at once": await Promise.all([1, 2, 3].map(async () => (await plain("equal"))[0])),
};
console.log(JSON.stringify(found));
