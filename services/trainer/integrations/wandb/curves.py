"""Sends the curves of one attempt to Weights & Biases, by a program beside the training. Not pure: programs.

The training never waits for it. A failure is reported once, as a warning, and costs the curves only. When points come
faster than they leave, the oldest are dropped.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from finemesh.tuning.v1 import tuning_job_pb2 as tuning
from services.trainer.integrations import programs
from services.trainer.integrations.programs import Program

log = structlog.get_logger()

WRITE_PROGRAM = "services.trainer.integrations.wandb.write"
FAILED = "WANDB_FAILED"
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


class Curves:
    """`begin` starts it, `add` never blocks, `close` lets it finish within its time, `abandon` ends it at once."""

    def __init__(self, destination: Destination, home: Path, warn: Warn) -> None:
        self._destination = destination
        self._home = home
        self._warn = warn
        self._points: deque[dict[str, Any]] = deque(maxlen=destination.points_max)
        self._changed = asyncio.Event()
        self._closed = False
        self._task: asyncio.Task[None] | None = None

    def begin(self, api_key: Callable[[], Awaitable[str]]) -> None:
        self._task = asyncio.create_task(self._run(api_key))

    def add(self, metrics: Iterable[tuning.TuningProgress]) -> None:
        self._points.extend({"step": item.step, "values": values_of(item)} for item in metrics)
        self._changed.set()

    async def close(self) -> None:
        """Every point arrives, or the time is over."""
        self._closed = True
        self._changed.set()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=self._destination.finish_s_max)
        await self.abandon()

    async def abandon(self) -> None:
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self, api_key: Callable[[], Awaitable[str]]) -> None:
        try:
            key = await api_key()
            if not key and not self._destination.offline:
                await self._warn(FAILED, "Weights & Biases gets no curves: no API key is known for this job")
                return
            async with programs.running(WRITE_PROGRAM, self._home) as program:
                await self._write(program, key)
        except OSError as error:
            await self._warn(FAILED, f"Weights & Biases gets no more curves: {type(error).__name__}")
        except Exception:
            # Whatever it is, the training goes on.
            log.exception("curves_failed", run=self._destination.run_id)

    async def _write(self, program: Program, key: str) -> None:
        await program.send(self._request(key))
        try:
            async with asyncio.timeout(self._destination.init_timeout_s + _LOADING_S):
                opened = await program.receive()
        except TimeoutError:
            opened = None
        if opened is None or "error" in opened:
            why = opened["error"] if opened else "it did not answer"
            await self._warn(FAILED, f"Weights & Biases gets no curves: {why}")
            return
        await self._feed(program)
        await program.finish()

    async def _feed(self, program: Program) -> None:
        while True:
            while self._points:
                await program.send(self._points.popleft())
            if self._closed:
                return
            self._changed.clear()
            await self._changed.wait()

    def _request(self, key: str) -> dict[str, Any]:
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
    if item.HasField("balancing_loss"):
        values["train/balancing_loss"] = item.balancing_loss
    if item.HasField("validation_loss"):
        values["eval/loss"] = item.validation_loss
    if item.HasField("reward_accuracy"):
        values |= {"eval/reward_accuracy": item.reward_accuracy, "eval/reward_margin": item.reward_margin}
    return values
