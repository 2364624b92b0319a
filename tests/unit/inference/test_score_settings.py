"""The engine that scores a few rows: as large as the rows need, whatever the model declares."""

import json
from pathlib import Path
from typing import Any

import pytest

from services.inference.engines.base import EngineFailed
from services.inference.engines.model_files import cache_bytes_per_token
from services.inference.engines.score import settings_for

# The shape of Llama-3.1-8B: its whole context would take 32 GiB of cache in float32.
LLAMA_8B = {
    "max_position_embeddings": 131_072,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
}


def request(folder: Path, lengths: list[int], **config: Any) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(LLAMA_8B | config))
    rows = [[7] * length for length in lengths]
    return {"base_model": str(folder), "export": "nowhere", "kind": "adapter", "rank": 16, "rows": rows} | {
        "questions": []
    }


def test_the_context_is_that_of_the_longest_row_and_the_token_after_it(tmp_path: Path) -> None:
    settings = settings_for(request(tmp_path, [3, 900, 12]))
    assert settings.context_tokens_max == 901
    assert settings.adapter_rank_max == 16


def test_a_question_needs_room_for_its_answer(tmp_path: Path) -> None:
    asked = request(tmp_path, [3, 12]) | {"questions": [{"ids": [7] * 20, "tokens_max": 64}]}
    assert settings_for(asked).context_tokens_max == 84


def test_the_cache_holds_that_row_and_not_the_declared_context(tmp_path: Path) -> None:
    settings = settings_for(request(tmp_path, [8192]))
    per_token = cache_bytes_per_token(LLAMA_8B)
    assert per_token == 2 * 32 * 8 * 128 * 4
    assert settings.kv_cache_bytes is not None
    assert 8193 * per_token <= settings.kv_cache_bytes < 10_000 * per_token


def test_a_row_longer_than_the_model_can_read_is_cut_to_what_it_declares(tmp_path: Path) -> None:
    assert settings_for(request(tmp_path, [500], max_position_embeddings=64)).context_tokens_max == 64


def test_whole_weights_are_scored_in_the_precision_that_they_are_held_to(tmp_path: Path) -> None:
    """On a GPU vLLM would make 16 bits of float32 by itself. An adapter is scored as its base is served."""
    adapter = request(tmp_path, [3])
    assert settings_for(adapter | {"kind": "full", "export": str(tmp_path)}).dtype == "float32"
    assert settings_for(adapter).dtype == "auto"


def test_no_row_at_all_is_no_error(tmp_path: Path) -> None:
    assert settings_for(request(tmp_path, [])).context_tokens_max == 2


def test_a_config_without_the_shape_of_its_attention_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match="shape of its attention"):
        settings_for(request(tmp_path, [4], num_attention_heads=None))
