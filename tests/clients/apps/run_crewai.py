"""crewAI: a crew of one agent with a tool; the second task has the first one's answer."""

from __future__ import annotations

from common import API_KEY, BASE_URL, MODEL, given, show
from common import ledger as read_ledger
from crewai import LLM, Agent, Crew, Process, Task
from crewai.tools import tool

ledger = tool("ledger")(read_ledger)
llm = LLM(model=f"openai/{MODEL}", base_url=BASE_URL, api_key=API_KEY, stream=given["stream"])
keeper = Agent(
    role="Keeper of the ledgers",
    goal=given["system"],
    backstory="Years among depots.",
    tools=[ledger],
    llm=llm,
    max_iter=40,
    verbose=False,
)
first = Task(description=given["texts"][0], expected_output="One sentence.", agent=keeper)
second = Task(
    description=given["texts"][1], expected_output="One sentence.", agent=keeper, context=[first]
)
crew = Crew(agents=[keeper], tasks=[first, second], process=Process.sequential, verbose=False)
result = crew.kickoff()
show([[output.raw for output in result.tasks_output], result.raw])
