"""`finemesh chat`: one question, or a conversation on the terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from finemesh.inference.v1 import generation_pb2
from finemesh_client.chat import sampling, user
from finemesh_client.cli.output import console, print_json, progress_console
from finemesh_client.cli.runtime import AsJson, with_client
from finemesh_client.client import Client


async def say(
    mesh: Client,
    model: str,
    messages: list[generation_pb2.ChatMessage],
    parameters: generation_pb2.SamplingParameters,
) -> str:
    """Prints an answer as it is made, thoughts dimly, and returns its text."""
    text = ""
    usage = generation_pb2.TokenUsage()
    async for part in mesh.chat.stream(model, messages, parameters):
        text += part.text_delta
        usage = part.usage
        console.print(part.reasoning_delta, end="", soft_wrap=True, style="dim")
        console.print(part.text_delta, end="", soft_wrap=True)
    console.print()
    progress_console.print(f"{usage.input_tokens} tokens in, {usage.output_tokens} out", style="dim")
    return text


def chat(
    model: Annotated[str, typer.Argument(help="Base model, tuned model or endpoint id.")],
    prompt: Annotated[str, typer.Argument(help="The question; without one, a conversation until Ctrl-D.")] = "",
    system: Annotated[str, typer.Option("--system", "-s", help="System message.")] = "",
    output_tokens_max: Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens to generate.")] = 256,
    temperature: Annotated[float | None, typer.Option("--temperature", help="0 is greedy (default 1).")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the sampling.")] = None,
    as_json: AsJson = False,
) -> None:
    """Chat with a base model, a tuned model or an endpoint. The first question to a model loads it."""
    if as_json and not prompt:
        raise typer.BadParameter("--json needs a question")
    parameters = sampling(output_tokens_max=output_tokens_max, temperature=temperature, seed=seed)
    messages = [generation_pb2.ChatMessage(role="system", content=system)] if system else []

    async def work(mesh: Client) -> None:
        if as_json:
            return print_json(await mesh.chat.answer(model, [*messages, user(prompt)], parameters))
        question = prompt or typer.prompt(">", prompt_suffix=" ")
        while True:
            messages.append(user(question))
            text = await say(mesh, model, messages, parameters)
            messages.append(generation_pb2.ChatMessage(role="assistant", content=text))
            if prompt:
                return None
            try:
                question = typer.prompt(">", prompt_suffix=" ")
            except typer.Abort:
                return None

    with_client(work, as_json)
