"""vLLM with an adapter computes what transformers with peft computes: the same model is served that was trained.

Shares the session's engine start; it earns that neither the adapter format nor the CPU kernels bend the numbers.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from formats.rows import Message
from services.inference.engines.base import Sampling
from tests.contract.engines.asking import ask, request_for
from tests.contract.engines.conftest import RANK, Subject

QUESTIONS = ["What does dedent do?", "Serialize obj to a JSON formatted stream.", "x"]
SAMPLING = Sampling(temperature=0.0, completion_tokens_max=24, logprobs=0)
TOLERANCE = 2e-3


@pytest.mark.parametrize("subject", ["vllm"], indirect=True)
@pytest.mark.parametrize("adapter", [None, 0, 1])
async def test_greedy_tokens_and_logprobs_equal_the_reference(
    subject: Subject, adapters: list[Path], adapter: int | None
) -> None:
    name = None if adapter is None else f"rv_numbers_{adapter}"
    if name is not None and adapter is not None:
        await subject.engine.load_adapter(name, adapters[adapter], RANK)
    reference = _reference(subject.base, None if adapter is None else adapters[adapter])
    for question in QUESTIONS:
        prompt = await subject.engine.render_chat([Message(role="user", content=question)])
        await _compare(subject, reference, prompt, name)


@pytest.mark.parametrize("subject", ["vllm"], indirect=True)
async def test_requests_with_and_without_adapters_do_not_mix_in_a_batch(subject: Subject, adapters: list[Path]) -> None:
    """vLLM 0.32 on a CPU gives a base request the weights of the last adapter in its batch; the engine must not."""
    await subject.engine.load_adapter("rv_numbers_0", adapters[0], RANK)
    prompt = await subject.engine.render_chat([Message(role="user", content=QUESTIONS[0])])
    tuned, plain = _reference(subject.base, adapters[0]), _reference(subject.base, None)
    await asyncio.gather(
        _compare(subject, tuned, prompt, "rv_numbers_0"),
        _compare(subject, plain, prompt, None),
    )


def _reference(base: Path, adapter: Path | None) -> Any:
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()


async def _compare(subject: Subject, reference: Any, prompt: tuple[int, ...], adapter: str | None) -> None:
    chunks = await ask(subject.engine, request_for(prompt, SAMPLING, adapter=adapter))
    entries = [entry for chunk in chunks for entry in chunk.logprobs]
    tokens = [entry.token_id for entry in entries]
    with torch.no_grad():
        logits = reference(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0]
    expected = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    assert tokens == expected.argmax(dim=-1).tolist()
    served = torch.tensor([entry.logprob for entry in entries])
    assert torch.allclose(served, expected.max(dim=-1).values, atol=TOLERANCE)
