"""`finemesh files preview` on the real mesh: what it shows of a row is what the base model's own tokenizer
and template make of it.

Earns its stack: the one place where a terminal, two doors and a trainer hand a row through token by token.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from finemesh.tuning.v1 import tuning_job_pb2 as pb
from finemesh_client.errors import FinemeshError
from tests.harness.mesh import BASE, Mesh, running_mesh, write_rows

CUT_AFTER = 32
UNLABELLED = -100
# Two answers of which the first teaches nothing, and one that does not fit.
ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "name a river"},
            {"role": "assistant", "content": "the stone", "weight": 0},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": "the river"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "say much"},
            {"role": "assistant", "content": "a word and a word and " * 12},
        ],
        "weight": 0.5,
    },
]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    async with running_mesh(tmp_path_factory.mktemp("mesh")) as running:
        yield running


async def finemesh(mesh: Mesh, *arguments: str) -> str:
    config = mesh.client.config
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from finemesh_client.cli.main import app; app()", *arguments),
        env={**os.environ, "FINEMESH_ADDRESS": config.address, "FINEMESH_API_KEY": config.api_key, "COLUMNS": "200"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return output.decode()


def expected(parts: list[tuple[str, bool]], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids and labels of rendered parts, each with whether it is trained;
    every part begins or ends with a marker of one token."""
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text, _ in parts]
    whole = tokenizer.encode("".join(text for text, _ in parts), add_special_tokens=False).ids
    assert [token for part in ids for token in part] == whole
    trained = [wanted for part, (_, wanted) in zip(ids, parts, strict=True) for _ in part]
    return whole, [token if wanted else UNLABELLED for token, wanted in zip(whole, trained, strict=True)]


async def test_a_preview_is_what_the_training_sees(mesh: Mesh, tmp_path: Path) -> None:
    file = await mesh.client.files.upload(write_rows(tmp_path / "rows.jsonl", ROWS))
    options = ("files", "preview", file.name, "-m", BASE, "--max-tokens", str(CUT_AFTER), "--rows", "2")
    seen: dict[str, Any] = json.loads(await finemesh(mesh, *options, "--json"))
    assert (seen["format"], int(seen["row_count"]), seen["sequence_tokens_max"]) == (
        "DATASET_FORMAT_CONVERSATION",
        2,
        CUT_AFTER,
    )
    assert {name for name, used in seen["features"].items() if used} == {"message_weights", "sample_weights"}
    weighed, long = seen["rows"]

    tokenizer = Tokenizer.from_file(str(mesh.folder / "tiny-llama" / "tokenizer.json"))
    ids, labels = expected(
        [
            ("<|begin|><|user|>name a river<|end|><|assistant|>", False),
            ("the stone<|end|>", False),
            ("<|user|>again<|end|><|assistant|>", False),
            ("the river<|end|>", True),
        ],
        tokenizer,
    )
    assert (weighed["line"], weighed["input_ids"], weighed["labels"]) == ("1", ids, labels)
    assert weighed["tokens"] == [tokenizer.decode([token], skip_special_tokens=False) for token in ids]
    (span,) = weighed["trained_spans"]
    assert "".join(weighed["tokens"][span["start"] : span["end"]]) == "the river<|end|>"

    answer = str(ROWS[1]["messages"][1]["content"])
    ids, labels = expected(
        [("<|begin|><|user|>say much<|end|><|assistant|>", False), (f"{answer}<|end|>", True)], tokenizer
    )
    assert (long["input_ids"], long["labels"]) == (ids[:CUT_AFTER], labels[:CUT_AFTER])
    assert (int(long["token_count"]), int(long["truncated_token_count"])) == (CUT_AFTER, len(ids) - CUT_AFTER)
    assert f"{answer}<|end|>".endswith(long["truncated_text"])
    assert long["weight"] == 0.5

    told = await finemesh(mesh, *options)
    assert f"line 2: {CUT_AFTER} tokens" in told
    assert f"{len(ids) - CUT_AFTER} cut off, weight 0.5" in told


async def test_a_quote_counts_what_the_preview_shows_and_how_fast_it_was_prepared(mesh: Mesh, tmp_path: Path) -> None:
    file = await mesh.client.files.upload(write_rows(tmp_path / "rows.jsonl", ROWS))
    seen = await mesh.client.files.preview(file.name, BASE, sequence_tokens_max=CUT_AFTER)
    spec = pb.TuningSpec(
        base_model=BASE,
        training_file=file.name,
        hyperparameters=pb.Hyperparameters(epochs=1, sequence_tokens_max=CUT_AFTER, learning_rate=1e-3),
    )
    counts = (await mesh.client.jobs.quote(spec)).counts
    assert counts.training_tokens == sum(row.token_count for row in seen.rows)
    assert (counts.training_examples, counts.truncated_examples) == (2, 1)
    assert counts.rows_per_second > 0


async def test_limits_say_what_the_template_refuses(mesh: Mesh, tmp_path: Path) -> None:
    """What `models limits` tells beforehand is what a quote says of such a row, with its line."""
    told: dict[str, Any] = json.loads(await finemesh(mesh, "models", "limits", BASE, "--json"))
    assert (told["supports_tools"], told["supports_reasoning"]) == (False, False)
    thought = {"role": "assistant", "content": "the river", "reasoning": "rivers flow"}
    tool = {"type": "function", "function": {"name": "atlas"}}
    rows = [ROWS[0], {"messages": [ROWS[0]["messages"][0], thought]}, {**ROWS[0], "tools": [tool]}]
    file = await mesh.client.files.upload(write_rows(tmp_path / "rows.jsonl", rows))
    with pytest.raises(FinemeshError) as refused:
        await mesh.client.jobs.quote(pb.TuningSpec(base_model=BASE, training_file=file.name))
    assert refused.value.reason == "DATASET_INVALID"
    assert [violation.field for violation in refused.value.violations] == ["line 2: $.messages[1]", "line 3: $.tools"]
