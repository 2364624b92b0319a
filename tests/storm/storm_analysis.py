"""The analysis of a storm's files: `python -m tests.storm.storm_analysis`. It counts what storm_child.py will train.

The real one spends a second on loading a tokenizer; a storm is about what happens around it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.harness.fake_child import TOKENS_PER_STEP

FEATURES = ("tools", "reasoning", "message_weights", "sample_weights", "parallel_tool_calls")


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    if asked.get("describe"):
        return {"ok": True, "template": {"supports_tools": False, "supports_reasoning": False}}
    rows = len(Path(asked["train_file"]).read_text().splitlines())
    counts = {
        "format": "conversation",
        "rows": rows,
        "token_count": rows * TOKENS_PER_STEP,
        "trained_token_count": rows * TOKENS_PER_STEP,
        "truncated_rows": 0,
        "skipped_rows": 0,
        "longest_row_tokens": TOKENS_PER_STEP,
        "features": dict.fromkeys(FEATURES, False),
        "rows_per_second": 1000.0,
        "sequences": rows,
        "unpacked_sequences": rows,
    }
    return {"ok": True, "train": counts, "packing_digest": f"storm-{rows}"}


if __name__ == "__main__":
    json.dump(answer(json.load(sys.stdin)), sys.stdout)
