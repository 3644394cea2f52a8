"""LlamaIndex: a chat engine with a memory buffer, and a function agent."""

from __future__ import annotations

import asyncio

from common import API_KEY, BASE_URL, MODEL, given, ledger, show
from llama_index.core.agent.workflow import FunctionAgent, ToolCallResult
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

llm = OpenAILike(
    model=MODEL,
    api_base=BASE_URL,
    api_key=API_KEY,
    is_chat_model=True,
    is_function_calling_model=True,
    context_window=128_000,
    max_retries=0,
)


def memory() -> ChatMemoryBuffer:
    return ChatMemoryBuffer.from_defaults(token_limit=given.get("keep_tokens", 100_000))


def chat() -> list[str]:
    engine = SimpleChatEngine.from_defaults(llm=llm, memory=memory(), system_prompt=given["system"])
    said = []
    for i, text in enumerate(given["texts"]):
        if i % 2:
            said.append("".join(engine.stream_chat(text).response_gen))
        else:
            said.append(str(engine.chat(text)))
    return said


async def agent() -> list[object]:
    made = FunctionAgent(
        tools=[FunctionTool.from_defaults(ledger)],
        llm=llm,
        system_prompt=given["system"],
        streaming=given["stream"],
    )
    history = [
        ChatMessage(role="user", content="Hello."),
        ChatMessage(role="assistant", content="Hi."),
    ]
    handler = made.run(given["texts"][0], chat_history=history, memory=memory(), max_iterations=40)
    results = []
    async for event in handler.stream_events():
        if isinstance(event, ToolCallResult):
            results.append([event.tool_name, event.tool_kwargs, str(event.tool_output)])
    return [results, str(await handler)]


show(chat() if given["what"] == "chat" else asyncio.run(agent()))
