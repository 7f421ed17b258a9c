"""rag7: agentic retrieval over documents in memory; its own graph, its own prompts, its own models."""

from rag7 import init_agent
from rag7.backend import InMemoryBackend

DOCUMENTS = [
    {"id": "1", "content": "The capital of France is Paris."},
    {"id": "2", "content": "The capital of Italy is Rome."},
    {"id": "3", "content": "Bread is made of flour and water."},
]

rag = init_agent("docs", backend=InMemoryBackend(documents=DOCUMENTS), auto_strategy=False)

if __name__ == "__main__":
    print(rag.invoke("What is the capital of France?").answer)
