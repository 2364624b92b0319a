"""The users of a storm: they do what the plan says, repeat what may be repeated until it is acknowledged, and keep
what was acknowledged. Not pure: the public API alone."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, TypeVar

from finemesh.endpoints.v1 import endpoint_pb2
from finemesh.tuning.v1 import tuning_job_pb2 as pb
from finemesh_client import Client
from finemesh_client.chat import sampling, user
from finemesh_client.errors import (
    Cancelled,
    Conflict,
    FinemeshError,
    Internal,
    NotFound,
    RateLimited,
    TimedOut,
    Unavailable,
)
from tests.harness.mesh import BASE
from tests.harness.organizations import Tenant
from tests.storm.deeds import Call, Deeds
from tests.storm.plan import Act, Work

T = TypeVar("T")

# What a fault excuses, if the same call succeeds when all is well again.
PASSING = (Unavailable, TimedOut, RateLimited, Cancelled)
# The last word of a prompt to a dedicated endpoint, by which the witness tells its answers from metered ones.
DEDICATED = "dedicated"
RETRY_S = 0.3
LOOK_S = 0.2
# One answer takes a second of the stub's time; whoever waits longer hangs up.
CALL_S_MAX = 12.0
READY_S_MAX = 6.0
TOP_UP_NANOS_USD = 10**9
OVER = {endpoint_pb2.ENDPOINT_STATE_STOPPED, endpoint_pb2.ENDPOINT_STATE_FAILED}


class GaveUp(Exception):
    """A call did not succeed although all was well again for long enough."""


class Users:
    """All of one organization. `healed` is set when the storm is over; then everything succeeds within `patience_s`."""

    def __init__(
        self, client: Client, tenant: Tenant, folder: Path, *, seed: int, healed: asyncio.Event, patience_s: float
    ) -> None:
        self._client = client
        self._tenant = tenant
        self._folder = folder
        self._seed = seed
        self._healed = healed
        self._patience_s = patience_s
        self.deeds = Deeds()
        self._works: dict[Work, Callable[[Act], Awaitable[None]]] = {
            Work.JOB: self._job,
            Work.CHAT: self._chat,
            Work.STREAM: lambda act: self._stream(act, parts_max=None),
            Work.LEAVE: lambda act: self._stream(act, parts_max=act.size // 4 + 1),
            Work.ENDPOINT: self._endpoint,
            Work.TOP_UP: self._top_up,
            Work.QUOTE: self._quote,
            Work.FILE: self._file,
        }

    async def work(self, act: Act, began_s: float) -> None:
        """One act at its time; what it meets that no fault excuses becomes a surprise."""
        await asyncio.sleep(max(0.0, began_s + act.at_s - time.monotonic()))
        try:
            await self._works[act.work](act)
        except GaveUp as error:
            self.deeds.surprises.append(str(error))
        except FinemeshError as error:
            self.deeds.surprises.append(f"{act.work} {act.number}: {type(error).__name__}: {error}")

    async def insist(
        self, what: str, call: Callable[[], Awaitable[T]], *, again: tuple[type[FinemeshError], ...] = ()
    ) -> T:
        """The answer to a call that may be repeated, also after one of `again`. GaveUp when it fails for `patience_s`
        after the storm."""
        deadline: float | None = None
        excused: tuple[type[Exception], ...] = (*PASSING, *again, TimeoutError)
        while True:
            try:
                async with asyncio.timeout(CALL_S_MAX):
                    return await call()
            except excused as error:
                passing = error
            except Internal as error:
                self.deeds.surprises.append(f"{what} was answered by an untyped error: {error}")
                passing = error
            if self._healed.is_set():
                deadline = deadline or time.monotonic() + self._patience_s
                if time.monotonic() > deadline:
                    raise GaveUp(f"{what} still fails {self._patience_s:.0f} s after the storm: {passing!r}")
            await asyncio.sleep(RETRY_S)

    def _id(self, act: Act, what: str = "") -> str:
        """The same for every repetition of a call, and no other call's."""
        return f"storm-{self._seed}-{act.number}{what}"

    async def _upload(self, act: Act) -> str:
        content = json.dumps({"step_s": act.pause_s, "of": self._id(act)})
        rows = [
            {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": f"{line}"}]}
            for line in range(act.size)
        ]
        path = self._folder / f"{self._id(act)}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        request_id = self._id(act, "-file")
        # One that a fault held up for longer than an upload may take is to be sent again, as its answer says.
        file = await self.insist(
            "an upload", lambda: self._client.files.upload(path, request_id=request_id), again=(Conflict,)
        )
        self.deeds.files[file.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        path.unlink()
        return file.name

    def _spec(self, act: Act, file: str) -> pb.TuningSpec:
        hyperparameters = pb.Hyperparameters(epochs=1, batch_size=8, learning_rate=1e-3)
        return pb.TuningSpec(
            base_model=BASE,
            training_file=file,
            output_name=f"m-{act.number}",
            lora=pb.LoraTraining(rank=8),
            hyperparameters=hyperparameters,
        )

    async def _job(self, act: Act) -> None:
        spec, request_id = self._spec(act, await self._upload(act)), self._id(act)
        job = await self.insist("a job", lambda: self._client.jobs.create(spec, request_id=request_id))
        self.deeds.jobs[job.name] = act.size
        if act.cancel_s is None:
            return
        await asyncio.sleep(act.cancel_s)
        try:
            await self.insist("a cancellation", lambda: self._client.jobs.cancel(job.name))
        except Conflict:
            return  # It was over before.
        self.deeds.cancelled.add(job.name)

    async def _quote(self, act: Act) -> None:
        spec = self._spec(act, await self._upload(act))
        await self.insist("a quote", lambda: self._client.jobs.quote(spec))

    async def _file(self, act: Act) -> None:
        name = await self._upload(act)
        target = self._folder / f"{self._id(act)}.read"
        await self.insist("a download", lambda: self._client.files.download(name, target))
        target.unlink()
        if act.cancel_s is not None:
            with suppress(NotFound):  # An answer was lost, and it was deleted before.
                await self.insist("a deletion", lambda: self._client.files.delete(name))
            self.deeds.deleted_files.add(name)
            del self.deeds.files[name]

    async def _top_up(self, act: Act) -> None:
        amount = TOP_UP_NANOS_USD + act.number
        await self.insist("a top-up", lambda: self._client.billing.top_up(amount, request_id=self._id(act)))
        self.deeds.topped_up.append(amount)

    async def _chat(self, act: Act, model: str = BASE, last: str = "storm") -> None:
        asked = [user(f"{self._id(act)} says {last}")]
        try:
            async with asyncio.timeout(CALL_S_MAX):
                answer = await self._client.chat.answer(model, asked, _greedy())
        except (*PASSING, Conflict, NotFound, TimeoutError):
            return  # Not repeated: it may have been metered.
        usage = answer.usage
        self.deeds.calls.append(
            Call(
                generation_id=answer.generation_id,
                dedicated=last == DEDICATED,
                whole=True,
                input_tokens=usage.input_tokens,
                output_tokens=usage.output_tokens,
            )
        )

    async def _stream(self, act: Act, parts_max: int | None) -> None:
        parts: Any = self._client.chat.stream(BASE, [user(f"{self._id(act)} streams storm")], _greedy())
        heard: list[Any] = []
        with suppress(*PASSING, TimeoutError):
            async with asyncio.timeout(CALL_S_MAX), aclosing(parts):
                async for part in parts:
                    heard.append(part)
                    if parts_max is not None and len(heard) >= parts_max:
                        break
        if heard:
            whole = bool(heard[-1].finish_reason)
            self.deeds.calls.append(
                Call(
                    generation_id=heard[0].generation_id,
                    dedicated=False,
                    whole=whole,
                    input_tokens=heard[-1].usage.input_tokens,
                    output_tokens=heard[-1].usage.output_tokens if whole else len(heard),
                )
            )

    async def _endpoint(self, act: Act) -> None:
        asked_s, endpoints = time.monotonic(), self._client.endpoints
        made = await self.insist(
            "an endpoint", lambda: endpoints.create(f"e-{act.number}", BASE, request_id=self._id(act))
        )
        name, until_s = made.name, asked_s + READY_S_MAX
        self.deeds.endpoints[name] = 0.0
        while time.monotonic() < until_s:
            state = (await self.insist("a look at an endpoint", lambda: endpoints.get(name))).state
            if state == endpoint_pb2.ENDPOINT_STATE_READY:
                await self._chat(act, made.endpoint_id, DEDICATED)
                break
            await asyncio.sleep(LOOK_S)
        await asyncio.sleep(act.cancel_s or 1.0)
        with suppress(Conflict):  # It failed or was stopped before.
            await self.insist("the stop of an endpoint", lambda: endpoints.stop(name))
        while (await self.insist("a look at an endpoint", lambda: endpoints.get(name))).state not in OVER:
            await asyncio.sleep(LOOK_S)
        self.deeds.endpoints[name] = time.monotonic() - asked_s


def _greedy() -> Any:
    return sampling(temperature=0.0, output_tokens_max=20)
