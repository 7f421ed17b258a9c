"""What programs do with the OpenAI SDK itself, on whatever the environment names. Prints what it got as JSON."""

import asyncio
import json
import sys
from typing import Any

import openai
from pydantic import BaseModel

TOOL: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
client = openai.OpenAI(timeout=30)


class Verdict(BaseModel):
    answer: int
    why: str


def said(text: str) -> Any:
    return {"model": "main", "messages": [{"role": "user", "content": text}]}


def plain(text: str, **more: Any) -> list[str]:
    return [choice.message.content for choice in client.chat.completions.create(**said(text), **more).choices]


def streamed(text: str, **more: Any) -> list[str]:
    texts: dict[int, str] = {}
    for chunk in client.chat.completions.create(**said(text), stream=True, **more):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    return [texts[index] for index in sorted(texts)]


def tool_streamed() -> list[Any]:
    with client.chat.completions.stream(**said("call it"), tools=[TOOL]) as stream:
        for _ in stream:
            pass
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    return [call.function.name, call.function.arguments]


def tool_called() -> list[Any]:
    message = client.chat.completions.create(**said("call it"), tools=[TOOL]).choices[0].message
    (call,) = message.tool_calls or ()
    return [call.function.name, call.function.arguments]


def parsed() -> dict[str, Any]:
    message = client.chat.completions.parse(**said("judge"), response_format=Verdict).choices[0].message
    return message.parsed.model_dump() if message.parsed else {}


def error_of(text: str, *, stream: bool) -> list[Any]:
    """(class, code, the characters that had come)."""
    came = ""
    try:
        answer: Any = client.chat.completions.create(**said(text), stream=stream)
        for chunk in answer if stream else ():
            came += chunk.choices[0].delta.content or ""
    except openai.APIError as error:
        return [type(error).__name__, error.code, came]
    return ["no error", None, came]


def raw() -> list[Any]:
    answer = client.chat.completions.with_raw_response.create(**said("raw"))
    return [answer.retries_taken, answer.headers["x-tracegrad-call"][:5], answer.parse().choices[0].message.content]


def stopped() -> str:
    """The reader leaves in mid-stream."""
    with client.chat.completions.create(**said("a long answer that nobody reads"), stream=True) as stream:
        return next(chunk.choices[0].delta.content for chunk in stream if chunk.choices[0].delta.content)


def impatient() -> Any:
    """The SDK itself gives up, and asks again."""
    patience = client.with_options(timeout=1.0, max_retries=1)
    return patience.chat.completions.create(**said("slow")).choices[0].message.content


async def asynchronous() -> dict[str, Any]:
    async with openai.AsyncOpenAI(timeout=30) as one:

        async def ask(text: str) -> Any:
            return (await one.chat.completions.create(**said(text))).choices[0].message.content

        async def stream(text: str) -> str:
            chunks = await one.chat.completions.create(**said(text), stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

        return {
            "async": await ask("async"),
            "async stream": await stream("async stream"),
            "equal and at once": await asyncio.gather(*(ask("equal") for _ in range(3))),
            "async retry": await ask("busy async"),
        }


def main() -> None:
    retried = client.chat.completions.with_raw_response.create(**said("busy"))
    found = {
        "version": openai.__version__,
        "http": [name for name in ("httpx", "httpx2") if name in sys.modules],
        "stopped": stopped(),
        "impatient": impatient(),
        "plain": plain("plain"),
        "stream": streamed("stream"),
        "several": plain("several", n=2, temperature=0.5),
        "several streamed": streamed("several streamed", n=2, temperature=0.5),
        "tool": tool_called(),
        "tool streamed": tool_streamed(),
        "parsed": parsed(),
        "raw": raw(),
        "retry": [retried.retries_taken, retried.parse().choices[0].message.content],
        "overflow": error_of("x" * 3000, stream=False),
        "overflow streamed": error_of("x" * 3000, stream=True),
        "fails": error_of("fails", stream=True),
        "dies": error_of("dies", stream=True),
        "completion": client.completions.create(model="main", prompt="text").choices[0].text,
        "embedding": client.embeddings.create(model="main", input="text").data[0].embedding,
        "models": [card.id for card in client.models.list()],
        **asyncio.run(asynchronous()),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
