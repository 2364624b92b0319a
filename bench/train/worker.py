"""One side of the benchmark: `python -m bench.train.worker SIDE` imports its libraries once, then runs each task of its
standard input in a process of its own, forked, so that peak memory and allocator state are that task's alone.

A task is a line of JSON, its result another one. It knows no other side.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any

SIDES = ("ours", "trl", "plain", "gpu_ours", "gpu_trl")
Run = Callable[[dict[str, Any]], dict[str, Any]]


def main() -> None:
    side = sys.argv[1]
    if side not in SIDES:
        raise SystemExit(f"no side {side!r}; there are {', '.join(SIDES)}")
    results = os.fdopen(os.dup(1), "w")
    # What libraries print goes to the log.
    os.dup2(2, 1)
    run: Run = import_module(f"bench.train.{side}").run
    for line in sys.stdin:
        results.write(in_own_process(run, json.loads(line)) + "\n")
        results.flush()


def in_own_process(run: Run, task: dict[str, Any]) -> str:
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        try:
            answer = json.dumps(run(task))
        except BaseException:
            answer = json.dumps({"error": traceback.format_exc()})
        with os.fdopen(theirs, "w") as stream:
            stream.write(answer)
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as stream:
        answer = stream.read()
    os.waitpid(child, 0)
    return answer or json.dumps({"error": "the process died without an answer"})


if __name__ == "__main__":
    main()
