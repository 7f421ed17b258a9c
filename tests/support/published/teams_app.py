"""langgraph-agent-teams: a lead puts a task on the board, a teammate claims it and does it, the lead sums up."""

import asyncio

from langgraph_agent_teams import TeamMemberSpec, create_agent_team

lead = TeamMemberSpec(name="team-lead", model="openai:gpt-4o", system_prompt="You are the LEAD.")
researcher = TeamMemberSpec(
    name="researcher", model="openai:gpt-4o", system_prompt="You are the RESEARCHER.", agent_type="researcher"
)
app = create_agent_team(lead, [researcher], team_name="team", poll_interval=0.1).compile()

if __name__ == "__main__":
    question = {"messages": [{"role": "user", "content": "Is tea older than coffee?"}]}
    print(asyncio.run(app.ainvoke(question))["messages"][-1].content)
