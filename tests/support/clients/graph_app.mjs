// A LangGraph app in JavaScript: ChatOpenAI plain and streamed, a tool, the SDK itself; invoked for several questions
// at once. It names no address: the environment does. Prints the final states as JSON.
import { tool } from "@langchain/core/tools";
import { Annotation, MessagesAnnotation, START, END, StateGraph } from "@langchain/langgraph";
import { ToolNode } from "@langchain/langgraph/prebuilt";
import { ChatOpenAI } from "@langchain/openai";
import OpenAI from "openai";
import { z } from "zod";

const model = new ChatOpenAI({ model: "main", timeout: 30_000 });
const client = new OpenAI({ timeout: 30_000 });
const weather = tool(({ city }) => `rain in ${city}`, {
  name: "weather",
  description: "Say how the weather is.",
  schema: z.object({ city: z.string() }),
});

const agent = new StateGraph(MessagesAnnotation)
  .addNode("model", async ({ messages }) => ({ messages: [await model.bindTools([weather]).invoke(messages)] }))
  .addNode("tools", new ToolNode([weather]))
  .addEdge(START, "model")
  .addConditionalEdges("model", ({ messages }) => (messages.at(-1).tool_calls?.length ? "tools" : END))
  .addEdge("tools", "model")
  .compile();

const State = Annotation.Root({
  question: Annotation,
  plan: Annotation,
  found: Annotation,
  text: Annotation,
  error: Annotation,
});
const graph = new StateGraph(State)
  .addNode("planner", async ({ question }) => ({ plan: (await model.invoke(`plan ${question}`)).content }))
  .addNode("researcher", async ({ question }) => {
    const { messages } = await agent.invoke({ messages: [["user", `call the weather for ${question}`]] });
    return { found: messages.at(-1).content };
  })
  .addNode("writer", async ({ question }) => {
    let text = "";
    for await (const chunk of await model.stream(`write ${question}`)) text += chunk.content;
    const messages = [{ role: "user", content: `check ${question}` }];
    return { text: [text, (await client.chat.completions.create({ model: "main", messages })).choices[0].message.content] };
  })
  .addNode("careful", async ({ question }) => {
    try {
      await model.invoke(`${question} ${"x".repeat(3000)}`);
      return { error: "none" };
    } catch (error) {
      return { error: `${error.name} ${error.cause.code}` };
    }
  })
  .addEdge(START, "planner")
  .addEdge("planner", "researcher")
  .addEdge("researcher", "writer")
  .addEdge("writer", "careful")
  .compile();

console.log(JSON.stringify(await Promise.all(process.argv.slice(2).map((question) => graph.invoke({ question })))));
