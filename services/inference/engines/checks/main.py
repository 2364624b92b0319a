"""Looks at the files of a model and says the first thing that is wrong. Not pure: os, processes.

`python -m services.inference.engines.checks.main < request.json`. The request is {"folder": DIR, "full": bool,
"run_bytes_max": N, "prompts_s_max": S}. The answer is {"ok": true, "ran": bool} or {"ok": false, "file": NAME,
"problem": WORDS}. Without `full` it needs no torch, and looks at tokenizer, chat template and the numbers only. What it
looks at stands on standard error, so that whoever kills it knows. SIGALRM ends it when tokenizer and template take
longer than `prompts_s_max`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from services.inference.engines.checks.finding import Finding
from services.inference.engines.checks.tokenizer_check import FILE, check_prompts
from services.inference.engines.checks.weights_check import check_weights

_NICENESS = 10
LOOKING = "looking at "
PROMPTS, WEIGHTS = "tokenizer and chat template", "weights"


def main() -> int:
    # What is served meanwhile comes first.
    os.nice(_NICENESS)
    # What the libraries print is not the answer.
    answer_to = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    answer: dict[str, Any]
    try:
        answer = {"ok": True, "ran": check(request)}
    except Finding as finding:
        answer = {"ok": False, "file": finding.file, "problem": finding.problem}
    answer_to.write(json.dumps(answer))
    answer_to.flush()
    # Tearing down imported libraries takes long and frees nothing.
    os._exit(0)


def check(request: dict[str, Any]) -> bool:
    """Whether the model was run as well. Raises Finding."""
    folder, full = Path(request["folder"]), bool(request["full"])
    # Imported before its time counts.
    serving_check = _with_torch() if full else None
    _say(PROMPTS)
    signal.setitimer(signal.ITIMER_REAL, float(request["prompts_s_max"]))
    read, losses, question = check_prompts(folder)
    for loss in losses:
        print(f"{FILE} loses {loss.what}: {loss.why}", file=sys.stderr)
    if serving_check is not None:
        serving_check.check_as_served(read, question)
    signal.setitimer(signal.ITIMER_REAL, 0)
    _say(WEIGHTS)
    check_weights(folder)
    if serving_check is None:
        return False
    weights_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    run = weights_bytes <= int(request["run_bytes_max"])
    serving_check.check_model(folder, run=run)
    return run


def _with_torch() -> Any:
    # Takes seconds, and is not there where only the stub serves.
    from services.inference.engines.checks import serving_check  # noqa: PLC0415

    return serving_check


def _say(what: str) -> None:
    print(f"{LOOKING}{what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
