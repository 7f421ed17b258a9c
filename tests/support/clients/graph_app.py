"""A LangGraph app on ChatOpenAI, an agent with a tool, and the OpenAI SDK itself; three invocations at once.

It names no address: the environment does. Prints the final states as JSON.
"""

import asyncio
import json
import operator
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, TypedDict

import openai
from langchain.agents import create_agent
from langchain_core.exceptions import ContextOverflowError
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph

model = ChatOpenAI(model="main", timeout=30)
client = openai.OpenAI(timeout=30)


class State(TypedDict, total=False):
    question: str
    plan: str
    found: str
    errors: list[str]
    notes: Annotated[list[str], operator.add]


@tool
def weather(city: str) -> str:
    """Say how the weather is."""
    return f"rain in {city}"


agent = create_agent(model, tools=[weather], name="researcher")


def planner(state: State) -> State:
    if state["question"] == "Nowhere":
        raise LookupError("there is no such town")
    return {"plan": str(model.invoke(f"plan {state['question']}").content)}


def researcher(state: State) -> State:
    asked = {"messages": [("user", f"call the weather for {state['question']}")]}
    return {"found": agent.invoke(asked)["messages"][-1].content}


async def writer(state: State) -> State:
    """The SDK in an async node, streamed."""
    async with openai.AsyncOpenAI(timeout=30) as one:
        messages: Any = [{"role": "user", "content": f"write {state['question']}"}]
        stream = await one.chat.completions.create(model="main", messages=messages, stream=True)
        return {"notes": ["".join([chunk.choices[0].delta.content or "" async for chunk in stream])]}


def checker(state: State) -> State:
    """The SDK in threads that the node starts."""

    def ask(number: int) -> str:
        messages: Any = [{"role": "user", "content": f"check {state['question']} {number}"}]
        return str(client.chat.completions.create(model="main", messages=messages).choices[0].message.content)

    with ThreadPoolExecutor(2) as pool:
        return {"notes": list(pool.map(ask, range(2)))}


async def careful(state: State) -> State:
    """What goes wrong arrives as the exceptions that apps catch."""
    caught = []
    try:
        await model.ainvoke(f"{state['question']} " + "x" * 3000)
    except ContextOverflowError as error:
        caught.append(f"{type(error).__name__} {error.code}")
    try:
        async for _ in model.astream(f"{state['question']} fails"):
            pass
    except openai.APIError as error:
        caught.append(f"{type(error).__name__} {error.code}")
    caught.append(str((await model.ainvoke(f"busy {state['question']}")).content))
    return {"errors": caught}


builder = StateGraph(State).add_node(planner).add_node(researcher).add_node(writer).add_node(checker).add_node(careful)
builder.add_edge(START, "planner").add_edge("planner", "researcher")
builder.add_edge("researcher", "writer").add_edge("researcher", "checker")
graph = builder.add_edge(["writer", "checker"], "careful").compile()


async def main(questions: list[str]) -> None:
    states = await asyncio.gather(*(graph.ainvoke({"question": question}) for question in questions))
    print(json.dumps([openai.__version__, *states]))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
