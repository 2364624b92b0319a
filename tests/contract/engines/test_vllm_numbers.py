"""vLLM with an adapter computes what transformers with peft computes: the same model is served that was trained.

Shares the session's engine start; it earns that neither the adapter format nor the CPU kernels bend the numbers.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from formats.rows import Message
from services.inference.engines.adapters.import_program import check
from services.inference.engines.base import Sampling
from tests.contract.engines.asking import ask, request_for
from tests.contract.engines.conftest import RANK, Subject
from tests.contract.engines.tiny_llama import build_adapter

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


@pytest.mark.parametrize("subject", ["vllm"], indirect=True)
@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True, "lora_alpha": 4},
        {
            "use_rslora": True,
            "lora_alpha": 4,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 12},
            "alpha_pattern": {"k_proj": 1, r"^model\.layers\.0\.mlp\.down_proj": 9, "up_proj": 2.5},
            "target_modules": r".*\.(q|k|v|up|down)_proj",
            "exclude_modules": r".*\.1\..*v_proj",
        },
    ],
    ids=["rslora", "patterns"],
)
async def test_scales_and_ranks_by_pattern_equal_the_reference(
    subject: Subject, tmp_path: Path, settings: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """As peft wrote the adapter, and as an import stores it."""
    folder = build_adapter(subject.base, tmp_path / "adapter", rank=RANK, **settings)
    reference = _reference(subject.base, folder)
    prompt = await subject.engine.render_chat([Message(role="user", content=QUESTIONS[0])])
    name = f"rv_{request.node.callspec.id}"
    await subject.engine.load_adapter(name, folder, RANK)
    await _compare(subject, reference, prompt, name)
    base_config = json.loads((subject.base / "config.json").read_text())
    asked = {"folder": str(folder), "base_config": base_config, "rank_max": 16, "bytes_max": 1 << 24}
    assert check(asked) == RANK
    await subject.engine.load_adapter(f"{name}_plain", folder, RANK)
    await _compare(subject, reference, prompt, f"{name}_plain")


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
