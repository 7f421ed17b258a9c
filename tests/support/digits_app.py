"""A LangGraph app that knows nothing of tracegrad: one model answers "max 3 7", another call checks the answer."""

from typing import TypedDict

from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph


class State(TypedDict, total=False):
    question: str
    first: str
    answer: str


model = ChatOpenAI(model="gpt-4o-mini", temperature=0, max_tokens=2)


async def solver(state: State) -> State:
    reply = await model.ainvoke([("system", "solve"), ("user", state["question"])])
    return {"first": reply.text.strip()}


async def checker(state: State) -> State:
    reply = await model.ainvoke([("system", "check"), ("user", f"{state['question']} = {state['first']}")])
    return {"answer": reply.text.strip()}


builder = StateGraph(State)
builder.add_node("solver", solver)
builder.add_node("checker", checker)
builder.add_edge(START, "solver")
builder.add_edge("solver", "checker")
builder.add_edge("checker", END)
graph = builder.compile()
