"""What a stranger's tokenizer may take at its import: bounded by a kill, and a typed answer says which limit it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chassis.errors import InvalidArgument
from services.inference.config import GIB, InferenceSettings
from services.inference.models.import_check import check_files
from tests.harness.base_model import write_tokenizer


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"import_prompts_s_max": 0.3}, "took more than 0.3 s (import_prompts_s_max)"),
        ({"import_check_memory_bytes_max": GIB}, f"took more than {GIB} bytes of memory"),
    ],
)
async def test_a_tokenizer_that_grows_without_end_is_killed(
    tmp_path: Path, limits: dict[str, float], told: str
) -> None:
    write_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    doubling = {"type": "Replace", "pattern": {"String": "o"}, "content": "oo"}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [doubling] * 40}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidArgument) as refused:
        await check_files(tmp_path, InferenceSettings(engine="stub", **limits))  # type: ignore[arg-type]
    assert refused.value.reason == "MODEL_INVALID"
    assert refused.value.violations[0].field == "tokenizer and chat template"
    assert told in refused.value.message
