"""AutoGen: an assistant that is shown the last ten messages of its conversation."""

from __future__ import annotations

import asyncio

from autogen_agentchat.agents import AssistantAgent
from autogen_core.model_context import BufferedChatCompletionContext
from autogen_ext.models.openai import OpenAIChatCompletionClient
from common import API_KEY, BASE_URL, MODEL, given, show


async def main() -> list[str]:
    client = OpenAIChatCompletionClient(
        model=MODEL, base_url=BASE_URL, api_key=API_KEY, max_retries=0
    )
    agent = AssistantAgent(
        "keeper",
        client,
        system_message=given["system"],
        model_context=BufferedChatCompletionContext(buffer_size=given["keep"]),
        model_client_stream=given["stream"],
    )
    said = [(await agent.run(task=text)).messages[-1].to_text() for text in given["texts"]]
    await client.close()
    return said


show(asyncio.run(main()))
