"""langchain's `create_agent` with one tool, as its documentation shows it."""

from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool
def population(city: str) -> str:
    """Return how many people live in a city."""
    return f"{city}: 2 million"


agent = create_agent(ChatOpenAI(model="gpt-4o"), tools=[population], system_prompt="You are the CLERK.", name="clerk")

if __name__ == "__main__":
    print(agent.invoke({"messages": [{"role": "user", "content": "Paris?"}]})["messages"][-1].content)
