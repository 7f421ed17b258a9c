"""Answer a question from Wikipedia summaries: a plain LangGraph app of two model calls and one search.

    question -> rewriter (model: search keywords) -> retrieve (BM25, two passages) -> answerer (model: a few words)

It reads the usual OpenAI environment variables and knows nothing of how, or whether, its models are trained.
Run it alone:  OPENAI_API_KEY=... python -m examples.rag_qa.app "who wrote the jungle book"
"""

import os
import sys
from typing import TypedDict, cast

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph

from examples.rag_qa.search import wikipedia

MODEL = os.environ.get("RAG_QA_MODEL", "gpt-4o-mini")

REWRITER = ChatPromptTemplate(
    [
        ("system", "Write the search keywords for the question. Reply with keywords only."),
        ("user", "{question}"),
    ]
)
ANSWERER = ChatPromptTemplate(
    [
        (
            "system",
            "Answer the question from the passages with a few words only, such as a name, a place or a year.",
        ),
        ("user", "{passages}\n\nQuestion: {question}\nShort answer:"),
    ]
)


class State(TypedDict, total=False):
    """What travels through the graph."""

    question: str
    keywords: str
    passages: str
    answer: str


def retrieve(state: State) -> State:
    """Search with the question and the rewriter's keywords; two passages of at most 60 words."""
    return {
        "passages": "\n\n".join(wikipedia().top(f"{state['question']} {state['keywords']}", k=2)) or "(nothing found)"
    }


def ask(prompt: ChatPromptTemplate, max_tokens: int, key: str) -> RunnableLambda[State, State]:
    """Return a node, sync and async, that asks the model and puts its text under `key`."""
    chain = prompt | ChatOpenAI(model=MODEL, temperature=0, max_tokens=max_tokens) | StrOutputParser()

    def node(state: State) -> State:
        return cast(State, {key: chain.invoke(state).strip()})

    async def anode(state: State) -> State:
        return cast(State, {key: (await chain.ainvoke(state)).strip()})

    return RunnableLambda(node, anode)


def build() -> StateGraph:
    """Return the graph, not yet compiled."""
    graph = StateGraph(State)
    graph.add_node("rewriter", ask(REWRITER, 12, "keywords"))
    graph.add_node("retrieve", retrieve)
    graph.add_node("answerer", ask(ANSWERER, 20, "answer"))
    graph.add_edge(START, "rewriter")
    graph.add_edge("rewriter", "retrieve")
    graph.add_edge("retrieve", "answerer")
    graph.add_edge("answerer", END)
    return graph


graph = build().compile()

if __name__ == "__main__":
    result = graph.invoke({"question": " ".join(sys.argv[1:])})
    print(f"keywords: {result['keywords']}\n\n{result['passages']}\n\nanswer: {result['answer']}")
