"""Haystack: an agent with a tool, and a pipeline of a prompt builder and a chat generator."""

from __future__ import annotations

from typing import Any

from common import BASE_URL, MODEL, given, ledger, show
from haystack import Pipeline
from haystack.components.agents import Agent
from haystack.components.builders import ChatPromptBuilder
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import create_tool_from_function

pieces: list[str] = []


def generator() -> OpenAIChatGenerator:
    callback = (lambda chunk: pieces.append(chunk.content)) if given["stream"] else None
    return OpenAIChatGenerator(
        model=MODEL, api_base_url=BASE_URL, streaming_callback=callback, max_retries=0
    )


def parts_of(message: ChatMessage) -> list[Any]:
    calls = [[c.tool_name, c.arguments, c.id] for c in message.tool_calls]
    results = [[r.result, r.error] for r in message.tool_call_results]
    return [message.role.value, message.text, calls, results, message.meta.get("finish_reason")]


def agent() -> list[Any]:
    made = Agent(
        chat_generator=generator(),
        tools=[create_tool_from_function(ledger)],
        system_prompt=given["system"],
    )
    messages = made.run(messages=[ChatMessage.from_user(given["texts"][0])])["messages"]
    return [[parts_of(m) for m in messages], "".join(pieces)]


def chat() -> list[Any]:
    pipeline = Pipeline()
    pipeline.add_component("prompt", ChatPromptBuilder())
    pipeline.add_component("llm", generator())
    pipeline.connect("prompt.prompt", "llm.messages")
    messages = [ChatMessage.from_system(given["system"])]
    for text in given["texts"]:
        messages.append(ChatMessage.from_user("{{ text }}"))
        found = pipeline.run(
            {"prompt": {"template": messages, "template_variables": {"text": text}}}
        )
        messages[-1] = ChatMessage.from_user(text)
        messages += found["llm"]["replies"]
    return [[parts_of(m) for m in messages], "".join(pieces)]


show(chat() if given["what"] == "chat" else agent())
