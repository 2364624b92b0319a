"""The curves of one attempt on their way to Weights & Biases: a program beside the training that it never waits for.

What goes wrong here is told once, as a warning, and costs the curves only. Points that come faster than they leave are dropped,
the oldest first.
"""

import asyncio
import os
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from finemesh.tuning.v1 import tuning_job_pb2 as tuning
from services.trainer.outside import programs
from services.trainer.spawn import Spawned

log = structlog.get_logger()

MODULE = "services.trainer.outside.curves"
UNREACHABLE = "WANDB_FAILED"
# What a started program may take besides the library's own patience.
_LOADING_S = 30.0

Warn = Callable[[str, str], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where the curves go. `folder` is where the library writes its files."""

    run: tuning.WandbRun
    run_id: str
    config: dict[str, Any]
    folder: Path
    offline: bool
    init_timeout_s: float
    finish_s_max: float
    points_max: int


class Telling:
    """`begin` starts it, `tell` never blocks, `close` lets it finish within its time, `abandon` ends it at once."""

    def __init__(self, destination: Destination, home: Path, warn: Warn) -> None:
        self._destination = destination
        self._home = home
        self._warn = warn
        self._points: deque[dict[str, Any]] = deque(maxlen=destination.points_max)
        self._changed = asyncio.Event()
        self._closed = False
        self._task: asyncio.Task[None] | None = None
        self.url = ""

    def begin(self, api_key: Callable[[], Awaitable[str]]) -> None:
        self._task = asyncio.create_task(self._live(api_key))

    def tell(self, metrics: Iterable[tuning.TuningProgress]) -> None:
        self._points.extend({"step": item.step, "values": values_of(item)} for item in metrics)
        self._changed.set()

    async def close(self) -> None:
        """Everything that was told arrives, or the time is over."""
        self._closed = True
        self._changed.set()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=self._destination.finish_s_max)
        await self.abandon()

    async def abandon(self) -> None:
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _live(self, api_key: Callable[[], Awaitable[str]]) -> None:
        try:
            key = await api_key()
            if not key and not self._destination.offline:
                await self._warn(UNREACHABLE, "Weights & Biases gets no curves: no API key is known for this job")
                return
            await self._talk(key)
        except OSError as error:
            await self._warn(UNREACHABLE, f"Weights & Biases gets no more curves: {type(error).__name__}")
        except Exception:
            # Whatever it is, the training goes on.
            log.exception("the curves failed unexpectedly", run=self._destination.run_id)

    async def _talk(self, key: str) -> None:
        await asyncio.to_thread(self._home.mkdir, parents=True, exist_ok=True)
        process = await programs.start(MODULE, programs.environment_of(os.environ, self._home))
        drain = asyncio.create_task(programs.read_away(process.stderr))
        try:
            await programs.say(process, self._question(key))
            try:
                async with asyncio.timeout(self._destination.init_timeout_s + _LOADING_S):
                    opened = await programs.heard(process)
            except TimeoutError:
                opened = None
            if opened is None or "error" in opened:
                why = opened["error"] if opened else "it did not answer"
                await self._warn(UNREACHABLE, f"Weights & Biases gets no curves: {why}")
                return
            self.url = str(opened.get("url") or "")
            await self._feed(process)
            process.stdin.close()
            await process.wait()
        finally:
            drain.cancel()
            await programs.bury(process)

    async def _feed(self, process: Spawned) -> None:
        while True:
            while self._points:
                await programs.say(process, self._points.popleft())
            if self._closed:
                return
            self._changed.clear()
            await self._changed.wait()

    def _question(self, key: str) -> dict[str, Any]:
        to = self._destination
        return {
            "offline": to.offline,
            "api_key": key,
            "base_url": to.run.base_url,
            "project": to.run.project,
            "entity": to.run.entity,
            "run_name": to.run.run_name,
            "run_id": to.run_id,
            "config": to.config,
            "folder": str(to.folder),
            "init_timeout_s": to.init_timeout_s,
        }


def values_of(item: tuning.TuningProgress) -> dict[str, float]:
    """The values of one step by the names under which W&B users look for them."""
    values = {
        "train/global_step": float(item.step),
        "train/epoch": item.epoch,
        "train/loss": item.training_loss,
        "train/learning_rate": item.learning_rate,
        "train/tokens": float(item.trained_tokens),
        "train/tokens_per_second": item.tokens_per_second,
    }
    if item.HasField("validation_loss"):
        values["eval/loss"] = item.validation_loss
    if item.HasField("reward_accuracy"):
        values |= {"eval/reward_accuracy": item.reward_accuracy, "eval/reward_margin": item.reward_margin}
    return values
