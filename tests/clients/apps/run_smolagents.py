"""smolagents: the agent that writes code and the one that calls tools, both asked a second time."""

from __future__ import annotations

from typing import Any

from common import API_KEY, BASE_URL, MODEL, given, ledger, show
from smolagents import CodeAgent, LogLevel, OpenAIModel, ToolCallingAgent, tool

kind = CodeAgent if given["what"] == "code" else ToolCallingAgent
agent = kind(
    tools=[tool(ledger)],
    model=OpenAIModel(model_id=MODEL, api_base=BASE_URL, api_key=API_KEY),
    max_steps=20,
    verbosity_level=LogLevel.OFF,
    stream_outputs=given["stream"],
)
answers: list[Any] = [agent.run(text, reset=i == 0) for i, text in enumerate(given["texts"])]
steps = [
    [type(step).__name__, getattr(step, "observations", None), str(getattr(step, "error", None))]
    for step in agent.memory.steps
]
show([answers, steps])
