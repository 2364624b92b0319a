"""The way of a program with one question: a JSON object on standard input, one on standard output, and gone when nobody waits.

It knows neither hub nor job.
"""

import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any


def answer_one(answer: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
    wanted = json.loads(sys.stdin.readline())
    threading.Thread(target=_exit_when_orphaned, daemon=True).start()
    sys.stdout.write(json.dumps(answer(wanted)) + "\n")


def root_of(error: BaseException) -> str:
    """The kind of what lies beneath an error. Texts are not told: they may hold signed addresses."""
    while error.__cause__ is not None:
        error = error.__cause__
    return type(error).__name__


def _exit_when_orphaned() -> None:
    """The agent keeps our input open for as long as it wants an answer."""
    while sys.stdin.read(1):
        continue
    os._exit(1)
