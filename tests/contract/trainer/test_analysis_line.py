"""The line for analyses on a real agent: whoever goes away leaves nothing behind, and no crowd holds up the others."""

import asyncio
import signal
import subprocess
import sys
import textwrap
from typing import Any

import grpc
import pytest

from chassis.identity import Caller, metadata_of
from finemesh.artifacts.v1 import artifact_pb2
from finemesh.datasets.v1 import dataset_service_pb2, dataset_service_pb2_grpc
from tests.contract.trainer.world import ROOT, AgentWorld, eventually, is_alive

# What a file says is done: `hang` until killed, or `quick`. Each run is noted with its pid.
ANALYSIS = """
import json, os, pathlib, sys, time
question = json.load(sys.stdin)
what = pathlib.Path(question["train_file"]).read_text().split()
with (pathlib.Path(__file__).parent / "pids").open("a") as file:
    file.write(f"{os.getpid()} {what[1]}\\n")
if what[0] == "hang":
    time.sleep(600)
counts = dict(rows=1, token_count=2, trained_token_count=1, truncated_rows=0, longest_row_tokens=2)
counts |= dict(format="conversation", features={}, skipped_rows=0, rows_per_second=7.0)
counts |= dict(sequences=1, unpacked_sequences=1)
print(json.dumps({"ok": True, "train": counts, "packing_digest": "d"}))
"""
LARGE_BYTES = 2000


class Line:
    """Asks one agent on behalf of many callers."""

    def __init__(self, world: AgentWorld, stub: Any) -> None:
        self.world = world
        self._stub = stub
        self._base = world.put("base/tiny/rv_1/", b"{}", "config.json")

    def question(self, name: str, what: str = "hang", *, is_large: bool = False) -> Any:
        content = f"{what} {name} ".encode().ljust(LARGE_BYTES if is_large else 0)
        file = self.world.put(f"files/proj_1/{name}", content)
        return dataset_service_pb2.AnalyzeDatasetRequest(
            dataset=artifact_pb2.Artifact(key=f"files/proj_1/{name}", files=[file]),
            base_model=artifact_pb2.Artifact(key="base/tiny/rv_1/", files=[self._base]),
            sequence_tokens_max=256,
        )

    def ask(self, question: Any, organization: str = "org_a", key: str = "key_a", *, is_job: bool = False) -> Any:
        caller = Caller(service="scheduler", tenant="proj_1", account=organization, subject=key)
        if is_job:
            question.purpose = dataset_service_pb2.ANALYSIS_PURPOSE_JOB
        metadata = tuple(metadata_of(caller))
        return self._stub.AnalyzeDataset(question, metadata=metadata, timeout=120, wait_for_ready=True)

    def preview(self, question: Any) -> Any:
        request = dataset_service_pb2.PreviewDatasetRequest(dataset=question.dataset, base_model=question.base_model)
        return self._stub.PreviewDataset(request, timeout=120)

    @property
    def begun(self) -> list[str]:
        return [str(name) for _, name in self.world.children()]

    @property
    def running(self) -> list[int]:
        return [pid for pid, _ in self.world.children() if is_alive(pid)]

    async def nothing_is_left(self) -> None:
        await eventually(lambda: not self.running and not list(self.world.work.iterdir()))


async def begin(world: AgentWorld, **settings: Any) -> None:
    (world.folder / "fake_analysis.py").write_text(textwrap.dedent(ANALYSIS))
    given = {"analyses_concurrent_max": 4, "large_analysis_bytes_min": LARGE_BYTES, "large_analyses_concurrent_max": 2}
    await world.start_agent(analysis_module="fake_analysis", **(given | settings))


async def cancelled(calls: list[Any]) -> None:
    for call in calls:
        call.cancel()
    for call in calls:
        with pytest.raises(asyncio.CancelledError):
            await call


async def test_a_thousand_cancelled_quotes_leave_no_analysis(world: AgentWorld) -> None:
    await begin(world)
    async with world.channel() as channel:
        line = Line(world, dataset_service_pb2_grpc.DatasetServiceStub(channel))
        for hundred in range(10):
            calls = [line.ask(line.question(f"{hundred}-{number}"), key=f"key_{number}") for number in range(100)]
            await eventually(lambda: bool(line.running))
            await cancelled(calls)
        await line.nothing_is_left()
        begun = len(line.begun)
        assert (await line.ask(line.question("last", "quick"))).token_count == 2
        assert line.begun[begun:] == ["last"]


async def test_an_abandoned_preview_leaves_nothing(world: AgentWorld) -> None:
    await begin(world)
    async with world.channel() as channel:
        line = Line(world, dataset_service_pb2_grpc.DatasetServiceStub(channel))
        calls = [line.preview(line.question(str(number))) for number in range(5)]
        await eventually(lambda: bool(line.running))
        await cancelled(calls)
        await line.nothing_is_left()


async def test_a_caller_that_was_killed_leaves_nothing(world: AgentWorld) -> None:
    """No clean cancellation: the process is gone, and so is its connection."""
    await begin(world)
    async with world.channel() as channel:
        line = Line(world, dataset_service_pb2_grpc.DatasetServiceStub(channel))
        request = world.folder / "request"
        request.write_bytes(line.question("killed").SerializeToString())
        program = f"""
            import asyncio, pathlib
            from finemesh.datasets.v1 import dataset_service_pb2, dataset_service_pb2_grpc
            from tests.contract.trainer.world import AgentWorld

            async def ask():
                folder = pathlib.Path({str(world.folder)!r})
                world = AgentWorld(None, None, folder, pathlib.Path({str(world.tls_dir)!r}))
                question = dataset_service_pb2.AnalyzeDatasetRequest.FromString((folder / "request").read_bytes())
                async with world.channel() as channel:
                    await dataset_service_pb2_grpc.DatasetServiceStub(channel).AnalyzeDataset(question, timeout=120)

            asyncio.run(ask())
        """
        caller = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT)  # noqa: ASYNC220
        await eventually(lambda: bool(line.running))
        caller.send_signal(signal.SIGKILL)
        caller.wait()
        await line.nothing_is_left()


async def test_a_deadline_that_passes_ends_the_analysis(world: AgentWorld) -> None:
    await begin(world)
    async with world.channel() as channel:
        line = Line(world, dataset_service_pb2_grpc.DatasetServiceStub(channel))
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await dataset_service_pb2_grpc.DatasetServiceStub(channel).AnalyzeDataset(line.question("a"), timeout=3)
        assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await line.nothing_is_left()


async def test_an_analysis_goes_on_for_whoever_still_waits(world: AgentWorld) -> None:
    await begin(world)
    async with world.channel() as channel:
        line = Line(world, dataset_service_pb2_grpc.DatasetServiceStub(channel))
        question = line.question("shared")
        quote, job = line.ask(question), line.ask(line.question("shared"), "org_b", is_job=True)
        await eventually(lambda: bool(line.running))
        await cancelled([quote])
        # Another caller's question passes through the agent, so that it has seen the cancellation.
        await line.ask(line.question("between", "quick"), "org_c")
        assert (len(line.running), line.begun) == (1, ["shared", "between"])
        await cancelled([job])
        await line.nothing_is_left()


async def test_another_keys_quote_and_a_job_pass_a_flood(world: AgentWorld) -> None:
    await begin(world)
    async with world.channel() as channel:
        line = Line(world, dataset_service_pb2_grpc.DatasetServiceStub(channel))
        flood = [line.ask(line.question(f"flood-{number}"), key="flooder") for number in range(200)]
        await eventually(lambda: bool(line.running))
        assert (await line.ask(line.question("other", "quick"), key="other")).token_count == 2
        assert (await line.ask(line.question("job", "quick"), key="flooder", is_job=True)).token_count == 2
        assert (await line.ask(line.question("stranger", "quick"), "org_b", "b")).token_count == 2
        await cancelled(flood)
        await line.nothing_is_left()


async def test_a_giants_validation_holds_up_no_small_one(world: AgentWorld) -> None:
    await begin(world)
    async with world.channel() as channel:
        line = Line(world, dataset_service_pb2_grpc.DatasetServiceStub(channel))
        giants = [
            line.ask(line.question(f"giant-{number}", is_large=True), f"org_{number}", is_job=True)
            for number in range(10)
        ]
        await eventually(lambda: len(line.running) == 2)
        assert (await line.ask(line.question("small", "quick"), "org_1", is_job=True)).token_count == 2
        assert (await line.ask(line.question("quote", "quick"), "org_x")).token_count == 2
        assert len(line.running) == 2
        await cancelled(giants)


async def test_a_small_file_of_much_work_holds_up_nobodys_quote(world: AgentWorld) -> None:
    """A few kilobytes may be millions of rows; whose they are, others of the same organization are served."""
    await begin(world)
    async with world.channel() as channel:
        line = Line(world, dataset_service_pb2_grpc.DatasetServiceStub(channel))
        questions = [line.question(f"rows-{number}") for number in range(3)]
        for question in questions:
            question.dataset.files[0].work_bytes = LARGE_BYTES
        asked = [line.ask(question, key=f"key_{number}") for number, question in enumerate(questions)]
        await eventually(lambda: bool(line.running))
        async with asyncio.timeout(20):
            assert (await line.ask(line.question("other", "quick"), key="other")).token_count == 2
        assert len(line.running) == 1
        await cancelled(asked)


async def test_one_organization_never_has_all_places(world: AgentWorld) -> None:
    await begin(world)
    async with world.channel() as channel:
        line = Line(world, dataset_service_pb2_grpc.DatasetServiceStub(channel))
        jobs = [line.ask(line.question(f"large-{number}", is_large=True), is_job=True) for number in range(5)]
        jobs += [line.ask(line.question(f"small-{number}"), is_job=True) for number in range(5)]
        await eventually(lambda: len(line.running) == 3)
        other = line.question("other", "quick", is_large=True)
        assert (await line.ask(other, "org_b")).token_count == 2
        assert len(line.running) == 3
        await cancelled(jobs)
