"""An engine ends when its devices may be another's, also while the process that started it stands still."""

from __future__ import annotations

import asyncio
import json
import math
import multiprocessing
import signal
import time
from pathlib import Path

import pytest

from formats.rows import Message
from services.inference.engines.base import EngineFailed, EngineSettings, GenerateRequest
from services.inference.engines.engine_deadline import Deadline, SharedDeadline
from services.inference.engines.parent_watch import DieWithParent
from services.inference.engines.stub import StubEngine

NOW_S = 0.0
LATER_S = 3600.0


def test_a_deadline_moves_on_until_it_has_passed(tmp_path: Path) -> None:
    deadline = Deadline()
    seen = SharedDeadline(deadline.share(tmp_path / "deadline"))
    assert not deadline.passed
    deadline.set(time.monotonic() + LATER_S)
    deadline.set(NOW_S)
    assert not deadline.passed
    assert not seen.passed


def test_a_deadline_that_has_passed_stays_passed(tmp_path: Path) -> None:
    deadline = Deadline()
    seen = SharedDeadline(deadline.share(tmp_path / "deadline"))
    deadline.set(NOW_S)
    assert deadline.passed
    assert seen.passed
    # The answer to a renewal came too late: the engine may have ended already.
    deadline.set(time.monotonic() + LATER_S)
    deadline.set(math.inf)
    assert deadline.passed
    assert seen.passed


def compute(content: dict[str, object]) -> None:
    """A computing process that is never done."""
    time.sleep(LATER_S)


def test_a_computing_process_ends_though_its_parent_stands_still(tmp_path: Path) -> None:
    deadline = Deadline()
    watched = DieWithParent({}, deadline.share(tmp_path / "deadline"))
    child = multiprocessing.get_context("spawn").Process(target=compute, args=(watched,))
    child.start()
    try:
        child.join(1.0)
        assert child.is_alive()
        deadline.set(time.monotonic() + 0.5)
        # From here on this process says nothing any more; it only waits.
        child.join(60.0)
        assert child.exitcode == -signal.SIGKILL
    finally:
        child.kill()


async def test_a_request_under_way_ends_with_its_engines_deadline(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    engine = StubEngine(tmp_path, EngineSettings(), token_s=0.01)
    await engine.start()
    prompt = await engine.render_chat([Message(role="user", content="hi")])
    chunks = engine.generate(GenerateRequest(request_id="r1", prompt_token_ids=prompt))
    assert (await anext(chunks)).text
    engine.serve_until(NOW_S)
    with pytest.raises(EngineFailed, match="another's"):
        await anext(chunks)
    with pytest.raises(EngineFailed):
        await engine.health()
    assert isinstance(await asyncio.wait_for(engine.wait_failed(), 60), EngineFailed)
