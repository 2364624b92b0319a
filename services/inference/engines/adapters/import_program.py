"""Looks at an adapter from outside as an engine does, and writes its config in the plainest words. Not pure: disk.

`python -m services.inference.engines.adapters.import_program < request.json`. The request is {"folder": DIR,
"base_config": {...}, "rank_max": N, "bytes_max": N}. The answer is {"ok": true, "rank": N} or {"ok": false, "problem":
WORDS}. A stranger's regular expressions are matched here, where whoever started it can end it, and by nobody later.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from chassis.time_limit import processor_seconds
from formats.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MATCHING_S_MAX,
    AdapterRefused,
    modules_of,
    plain_adapter_config,
    read_adapter_config,
    too_slow,
)
from formats.prompts.answer_ends import GENERATION_CONFIG, ends_of_adapter
from formats.prompts.faults import ModelFault
from formats.prompts.model_config import vocabulary_size
from services.inference.engines.adapters.adapter_check import CONFIG_BYTES_MAX, check_adapter
from services.inference.engines.adapters.safetensors_file import FileProblem, read_header
from services.inference.engines.base import AdapterInvalid, EngineSettings

_NICENESS = 10


def main() -> int:
    # What is served meanwhile comes first.
    os.nice(_NICENESS)
    request = json.load(sys.stdin)
    answer: dict[str, Any]
    try:
        answer = {"ok": True, "rank": check(request)}
    except AdapterInvalid as refused:
        answer = {"ok": False, "problem": refused.problem}
    except AdapterRefused as refused:
        answer = {"ok": False, "problem": str(refused)}
    json.dump(answer, sys.stdout)
    return 0


def check(request: dict[str, Any]) -> int:
    """The rank that the config says. Raises AdapterInvalid or AdapterRefused."""
    folder = Path(request["folder"])
    path, weights = folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS
    if path.stat().st_size > CONFIG_BYTES_MAX:
        raise AdapterRefused(f"{ADAPTER_CONFIG} has more than {CONFIG_BYTES_MAX} bytes")
    config = read_adapter_config(path.read_bytes(), rank_max=request["rank_max"])
    try:
        with processor_seconds(MATCHING_S_MAX), weights.open("rb") as file:
            modules = modules_of(matrix.name for matrix in read_header(file, weights.stat().st_size))
            plain = plain_adapter_config(config, [module for module in modules if config.targets(module)])
    except TimeoutError:
        raise too_slow() from None
    except FileProblem as problem:
        raise AdapterRefused(f"{ADAPTER_WEIGHTS}: {problem}") from None
    limits = EngineSettings(adapter_rank_max=request["rank_max"], adapter_bytes_max=request["bytes_max"])
    check_adapter("imported", folder, config.rank, request["base_config"], limits)
    path.write_bytes(plain)
    _write_ends(folder, request["base_config"])
    return config.rank


def _write_ends(folder: Path, base_config: dict[str, Any]) -> None:
    """Leaves of generation_config.json what ends an answer: the rest would change calls behind their caller's back."""
    path = folder / GENERATION_CONFIG
    if not path.exists():
        return
    try:
        ends, size = sorted(ends_of_adapter(folder)), vocabulary_size(base_config)
    except ModelFault as fault:
        raise AdapterRefused(str(fault)) from fault
    if size is not None and ends and ends[-1] >= size:
        raise AdapterRefused(f"{GENERATION_CONFIG} lists {ends[-1]}, which is no token of the base model")
    path.write_text(json.dumps({"eos_token_id": ends}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
