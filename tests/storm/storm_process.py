"""Starts a service of a storm: `python -m tests.storm.storm_process`. The real one, with a clock that can be set.

`STORM_MODULE` is the service; `STORM_CLOCK` is a file with the seconds by which this process's wall clock is wrong.
The stub engine tells the witness of each token. Nothing else differs from the service.
"""

from __future__ import annotations

import os
import runpy
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from chassis.clock import SystemClock
from tests.storm import witness

INFERENCE = "services.inference.main"


def shift_clock(path: Path) -> None:
    """Adds what the file says, at every look, to the wall clock; the monotonic clock goes on."""

    def now(self: SystemClock) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=float(path.read_text() or 0))

    SystemClock.now = now  # type: ignore[method-assign]


def watch_engine(folder: Path) -> None:
    """Each token that an answer of the stub goes on by, with what it was asked for."""
    from services.inference.engines import stub_answer

    told, step = witness.Witness(folder, "tokens"), stub_answer.StubAnswer.step

    def watched(self: stub_answer.StubAnswer) -> Any:
        chunk = step(self)
        prompt = self.request.prompt_token_ids
        told.tell(call=self.request.request_id, input=len(prompt), output=self.count, last=prompt[-3])
        return chunk

    stub_answer.StubAnswer.step = watched  # type: ignore[method-assign]


def main() -> None:
    module = os.environ["STORM_MODULE"]
    shift_clock(Path(os.environ["STORM_CLOCK"]))
    if module == INFERENCE:
        watch_engine(Path(os.environ["FINEMESH_DATA_DIR"]) / witness.FOLDER)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
