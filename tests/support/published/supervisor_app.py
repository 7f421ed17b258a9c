"""langgraph-supervisor: a supervisor hands over to an adder, as in its README."""

from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph_supervisor import create_supervisor


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


model = ChatOpenAI(model="gpt-4o")
adder = create_agent(model, tools=[add], system_prompt="You are the ADDER.", name="adder")
writer = create_agent(model, tools=[], system_prompt="You are the WRITER.", name="writer")
workflow = create_supervisor([adder, writer], model=model, prompt="You are the SUPERVISOR.")
app = workflow.compile()

if __name__ == "__main__":
    print(app.invoke({"messages": [{"role": "user", "content": "3 and 4"}]})["messages"][-1].content)
