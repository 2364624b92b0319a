"""An answer ends where the adapter or the base model says, each request by its own adapter's list.

Shares the session's engine start; it earns that a tuned model stops where its training stopped, and nobody else does.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from formats.rows import Message
from services.inference.engines.adapters.adapter_table import Adapter
from services.inference.engines.answer_chunks import FinishReason
from services.inference.engines.answers.answer_reading import Guide
from services.inference.engines.base import AdapterInvalid, EngineSettings, GenerateRequest
from services.inference.engines.model_files import read_config
from tests.contract.engines.asking import GREEDY, ask, request_for, text_of, tokens_of
from tests.contract.engines.conftest import RANK, Subject

BEFORE = 5  # tokens of the greedy answer before the one that is made its end


def with_ends(adapter: Path, folder: Path, ends: object) -> Path:
    shutil.copytree(adapter, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "temperature": 0.1}))
    return folder


@pytest.mark.parametrize("subject", ["vllm"], indirect=True)
async def test_an_adapter_s_ends_end_its_answers_and_no_others(
    subject: Subject, adapters: list[Path], tmp_path: Path
) -> None:
    engine = subject.engine
    prompt = await engine.render_chat([Message(role="user", content="What does dedent do?")])
    await engine.load_adapter("rv_endless", adapters[0], RANK)
    whole = await ask(engine, request_for(prompt, adapter="rv_endless"))
    at = next(at for at in range(BEFORE, 20) if tokens_of(whole)[at] not in tokens_of(whole)[:at])
    end = tokens_of(whole)[at]
    await engine.load_adapter("rv_ending", with_ends(adapters[0], tmp_path / "ending", [1, end]), RANK)
    # In one batch: the same weights with and without the end.
    ended, again = await asyncio.gather(
        ask(engine, request_for(prompt, adapter="rv_ending")), ask(engine, request_for(prompt, adapter="rv_endless"))
    )
    assert tokens_of(again) == tokens_of(whole)
    assert again[-1].finish_reason == FinishReason.LENGTH
    assert tokens_of(ended) == tokens_of(whole)[: at + 1]
    assert ended[-1].finish_reason == FinishReason.STOP
    unstopped = await ask(engine, request_for(prompt, replace(GREEDY, ignore_eos=True), adapter="rv_ending"))
    assert (tokens_of(unstopped), unstopped[-1].finish_reason) == (tokens_of(whole), FinishReason.LENGTH)
    # The end counts as a token of the answer, and is no part of its text.
    assert ended[-1].usage.completion_tokens == at + 1
    assert text_of(whole).startswith(text_of(ended))
    assert await engine.count_tokens(text_of(ended)) <= at


@pytest.mark.parametrize("subject", ["vllm"], indirect=True)
async def test_an_end_that_is_no_token_is_refused_with_the_adapter(
    subject: Subject, adapters: list[Path], tmp_path: Path
) -> None:
    for name, ends, words in (
        ("far", [2, 100_000], "lists 100000, which is no token of the base model"),
        ("text", "</s>", "holds an eos_token_id that is neither"),
    ):
        with pytest.raises(AdapterInvalid, match=words):
            await subject.engine.load_adapter(f"rv_{name}", with_ends(adapters[0], tmp_path / name, ends), RANK)
    assert not {"rv_far", "rv_text"} & set(subject.engine.adapters())


def test_vllm_takes_the_base_model_s_own_ends_and_none_of_its_defaults(base_model: Path, tmp_path: Path) -> None:
    """Llama 3, Gemma and Phi name several; no engine is started for it."""
    # It imports vLLM, which takes seconds.
    from services.inference.engines.vllm import _engine_args, _sampling

    folder = tmp_path / "base"
    shutil.copytree(base_model, folder)
    said = {"eos_token_id": [1, 7, 9], "temperature": 0.1, "top_k": 3}
    (folder / "generation_config.json").write_text(json.dumps(said))
    settings = EngineSettings(kv_cache_bytes=1 << 26)
    made = _engine_args(folder, folder, read_config(folder), settings, 64).create_engine_config()
    adapter = Adapter(revision="rv", number=1, path=tmp_path, rank=8, ends=frozenset({11}))
    sampling = _sampling(GenerateRequest(request_id="r", prompt_token_ids=[5]), 8, Guide(), adapter)
    sampling.update_from_generation_config(made.model_config.try_get_generation_config(), eos_token_id=1)
    assert (sampling.eos_token_id, set(sampling.stop_token_ids)) == (1, {7, 9, 11})
    assert (sampling.temperature, sampling.top_k) == (1.0, 0)
