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


def build() -> StateGraph:
    """Return the graph, not yet compiled."""
    rewriter = ChatOpenAI(model=MODEL, temperature=0, max_tokens=12)
    answerer = ChatOpenAI(model=MODEL, temperature=0, max_tokens=20)
    graph = StateGraph(State)
    graph.add_node("rewriter", REWRITER | rewriter | StrOutputParser() | _into("keywords"))
    graph.add_node("retrieve", retrieve)
    graph.add_node("answerer", ANSWERER | answerer | StrOutputParser() | _into("answer"))
    graph.add_edge(START, "rewriter")
    graph.add_edge("rewriter", "retrieve")
    graph.add_edge("retrieve", "answerer")
    graph.add_edge("answerer", END)
    return graph


def _into(key: str) -> RunnableLambda[str, State]:
    """Return the last link of a node's chain: the text becomes an update of the state."""
    return RunnableLambda(lambda text: cast(State, {key: text.strip()}))


graph = build().compile()

if __name__ == "__main__":
    result = graph.invoke({"question": " ".join(sys.argv[1:])})
    print(f"keywords: {result['keywords']}\n\n{result['passages']}\n\nanswer: {result['answer']}")
