"""DatasetService of a real agent with the real analysis: counts, typed violations, bounds,
one analysis for many callers."""

import asyncio
import json
import shutil
import signal
import textwrap
from pathlib import Path
from typing import Any

import grpc
import pytest

from chassis.errors import DomainError, FailedPrecondition, InvalidArgument, ResourceExhausted, Unavailable, unpack
from chassis.identity import Caller, metadata_of
from finemesh.artifacts.v1 import artifact_pb2
from finemesh.datasets.v1 import dataset_service_pb2, dataset_service_pb2_grpc
from services.trainer.train.data.preparation.prepare import CACHED_FILE_BYTES_MIN
from tests.contract.trainer.world import AgentWorld, eventually

GOOD_ROWS = [
    {"messages": [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": word}]}
    for word in ("one", "two", "three", "four")
]


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def make_request(world: AgentWorld, base: Path, content: bytes, **fields: Any) -> Any:
    file = world.put("files/proj_1/file-data", content)
    return dataset_service_pb2.AnalyzeDatasetRequest(
        dataset=artifact_pb2.Artifact(key="files/proj_1/file-data", files=[file]),
        base_model=world.put_folder("base/tiny/rv_1/", base),
        base_revision="rv_1",
        sequence_tokens_max=256,
        train_on_inputs="auto",
        **fields,
    )


async def ask(world: AgentWorld, request: Any, service: str = "scheduler", organization: str = "") -> Any:
    metadata = tuple(metadata_of(Caller(service=service, account=organization)))
    async with world.channel(service) as channel:
        stub = dataset_service_pb2_grpc.DatasetServiceStub(channel)
        try:
            return await stub.AnalyzeDataset(request, timeout=120, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise unpack(error) from error


def fake_analysis(world: AgentWorld, body: str) -> dict[str, str]:
    """Settings that run `body` in place of the real analysis."""
    (world.folder / "fake_analysis.py").write_text(textwrap.dedent(body))
    return {"analysis_module": "fake_analysis"}


async def test_a_dataset_is_counted_without_the_weights(world: AgentWorld, tiny_base: Path) -> None:
    await world.start_agent()
    request = make_request(world, tiny_base, jsonl(GOOD_ROWS))
    (world.store / "base/tiny/rv_1/model.safetensors").unlink()
    answer = await ask(world, request)
    assert (answer.example_count, answer.format, answer.truncated_count) == (4, "conversation", 0)
    assert 0 < answer.labelled_token_count < answer.token_count
    # What steps are made of: each row alone, and all of them in one sequence.
    assert (answer.row_count, answer.packed_sequence_count) == (4, 1)
    assert 0 < answer.longest_tokens < answer.token_count
    assert len(answer.plan_sha256) == 64
    assert answer.rows_per_second > 0
    assert not answer.features.tools
    assert await ask(world, request) == answer
    await eventually(lambda: not list(world.work.iterdir()))


async def test_a_large_file_is_prepared_once_for_all_who_need_it(world: AgentWorld, tiny_base: Path) -> None:
    """Asked again in another name, the answer is the kept one: down to how fast it was made."""
    await world.start_agent()
    row = {"prompt": "how?", "completion": "well " * 2000}
    request = make_request(world, tiny_base, jsonl([row] * (CACHED_FILE_BYTES_MIN // 10_000 + 1)))
    answer = await ask(world, request)
    prepared = world.folder / "data" / "cache" / "artifacts" / "prepared"
    (kept,) = [path for path in prepared.iterdir() if path.name != "locks"]
    request.base_revision = "rv_2"
    assert await ask(world, request) == answer
    assert [path for path in prepared.iterdir() if path.name != "locks"] == [kept]
    await eventually(lambda: not list(world.work.iterdir()))


async def test_a_preview_shows_rows_token_by_token(world: AgentWorld, tiny_base: Path) -> None:
    await world.start_agent()
    counted = make_request(world, tiny_base, jsonl(GOOD_ROWS))
    request = dataset_service_pb2.PreviewDatasetRequest(
        dataset=counted.dataset, base_model=counted.base_model, sequence_tokens_max=64, row_count_max=2
    )
    async with world.channel("scheduler") as channel:
        stub = dataset_service_pb2_grpc.DatasetServiceStub(channel)
        preview = (await stub.PreviewDataset(request, timeout=120)).preview
        assert (preview.row_count, preview.sequence_tokens_max, preview.train_on_inputs) == (4, 64, "auto")
        assert [row.line for row in preview.rows] == [1, 3]
        row = preview.rows[0]
        assert len(row.input_ids) == len(row.labels) == len(row.tokens) == row.token_count
        (span,) = row.trained_spans
        assert "".join(row.tokens[span.start : span.end]) == "one<|end|>"
        assert [label for label in row.labels if label != -100] == list(row.input_ids[span.start : span.end])
        request.dataset.CopyFrom(make_request(world, tiny_base, b'{"text": 1}').dataset)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.PreviewDataset(request, timeout=120)
        assert [violation.field for violation in unpack(refused.value).violations] == ["line 1: $.text"]
    await eventually(lambda: not list(world.work.iterdir()))


async def test_every_broken_line_is_a_violation(world: AgentWorld, tiny_base: Path) -> None:
    await world.start_agent()
    rows = [GOOD_ROWS[0], {"messages": [{"role": "wizard", "content": "x"}]}, {"messages": []}]
    request = make_request(world, tiny_base, jsonl(rows) + b"not json\n")
    with pytest.raises(InvalidArgument) as refused:
        await ask(world, request)
    assert refused.value.reason == "DATASET_INVALID"
    fields = [violation.field for violation in refused.value.violations]
    assert {field.split(":")[0] for field in fields} == {"line 2", "line 3", "line 4"}
    assert any("$.messages[0].role" in field for field in fields)
    assert int(refused.value.metadata["error_count"]) >= 3


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[]\n"])
async def test_what_is_no_dataset_is_refused(world: AgentWorld, tiny_base: Path, content: bytes) -> None:
    await world.start_agent()
    with pytest.raises(InvalidArgument) as refused:
        await ask(world, make_request(world, tiny_base, content))
    assert refused.value.reason in ("DATASET_INVALID", "TRAINING_INPUT_INVALID")


async def test_a_base_without_a_tokenizer_is_the_models_fault(world: AgentWorld, tiny_base: Path) -> None:
    await world.start_agent()
    request = make_request(world, tiny_base, jsonl(GOOD_ROWS))
    kept = [file for file in request.base_model.files if "tokenizer" not in file.path]
    del request.base_model.files[:]
    request.base_model.files.extend(kept)
    with pytest.raises(FailedPrecondition) as refused:
        await ask(world, request)
    assert refused.value.reason == "MODEL_INVALID"


@pytest.mark.parametrize(
    ("change", "field"),
    [({"train_on_inputs": "maybe"}, "train_on_inputs"), ({"sequence_tokens_max": 3}, "max_seq_length")],
)
async def test_a_wrong_setting_names_its_field(
    world: AgentWorld, tiny_base: Path, change: dict[str, Any], field: str
) -> None:
    await world.start_agent()
    request = make_request(world, tiny_base, jsonl(GOOD_ROWS))
    for name, value in change.items():
        setattr(request, name, value)
    with pytest.raises(InvalidArgument) as refused:
        await ask(world, request)
    assert [violation.field for violation in refused.value.violations] == [field]


async def test_a_path_escape_is_refused_before_anything_is_read(world: AgentWorld, tiny_base: Path) -> None:
    await world.start_agent()
    request = make_request(world, tiny_base, jsonl(GOOD_ROWS))
    request.base_model.files[0].path = "../../../etc/passwd"
    with pytest.raises(InvalidArgument) as refused:
        await ask(world, request)
    assert refused.value.reason == "INVALID_FIELD"


async def test_only_the_scheduler_may_ask(world: AgentWorld, tiny_base: Path) -> None:
    await world.start_agent()
    with pytest.raises(DomainError) as refused:
        await ask(world, make_request(world, tiny_base, jsonl(GOOD_ROWS)), service="gateway")
    assert refused.value.reason == "CALLER_NOT_ALLOWED"


async def test_equal_questions_share_one_analysis(world: AgentWorld, tiny_base: Path) -> None:
    settings = fake_analysis(
        world,
        """
        import json, pathlib, sys, time
        request = json.load(sys.stdin)
        with (pathlib.Path(__file__).parent / "runs").open("a") as file:
            file.write("x")
        time.sleep(0.5)  # long enough for the other callers to come
        counts = dict(rows=1, token_count=2, trained_token_count=1, truncated_rows=0, longest_row_tokens=2)
        counts |= dict(format="conversation", features={}, skipped_rows=0, rows_per_second=7.0)
        counts |= dict(unpacked_sequences=1, sequences=1)
        print(json.dumps({"ok": True, "train": counts, "packing_digest": "d"}))
        """,
    )
    await world.start_agent(**settings)
    request = make_request(world, tiny_base, jsonl(GOOD_ROWS))
    answers = await asyncio.gather(*(ask(world, request) for _ in range(5)))
    assert {answer.token_count for answer in answers} == {2}
    assert (world.folder / "runs").read_text() == "x"


async def test_an_analysis_that_takes_too_long_is_ended(world: AgentWorld, tiny_base: Path) -> None:
    settings = fake_analysis(world, "import time; time.sleep(600)")
    await world.start_agent(**settings, analysis_s_max=0.5)
    with pytest.raises(ResourceExhausted) as refused:
        await ask(world, make_request(world, tiny_base, jsonl(GOOD_ROWS)))
    assert refused.value.metadata["limit"] == "analysis_s_max"


async def test_a_template_without_an_end_is_no_fault_of_the_mesh(world: AgentWorld, tiny_base: Path) -> None:
    # What the program does to itself when it cannot interrupt a template.
    settings = fake_analysis(world, "import os, signal, sys; sys.stdin.read(); os.kill(os.getpid(), signal.SIGPROF)")
    await world.start_agent(**settings)
    with pytest.raises(FailedPrecondition) as refused:
        await ask(world, make_request(world, tiny_base, jsonl(GOOD_ROWS)))
    assert refused.value.reason == "MODEL_INVALID"
    assert "does not come to an end" in refused.value.message


async def test_a_description_has_less_time_than_an_analysis(world: AgentWorld, tiny_base: Path) -> None:
    settings = fake_analysis(world, "import time; time.sleep(600)")
    await world.start_agent(**settings, description_s_max=0.5)
    request = dataset_service_pb2.DescribeModelRequest(base_model=world.put_folder("base/tiny/rv_1/", tiny_base))
    async with world.channel("scheduler") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await dataset_service_pb2_grpc.DatasetServiceStub(channel).DescribeModel(request, timeout=60)
    told = unpack(refused.value)
    assert (told.reason, told.metadata["limit"]) == ("MODEL_INVALID", "description_s_max")


async def test_an_analysis_that_needs_too_much_memory_is_ended(world: AgentWorld, tiny_base: Path) -> None:
    settings = fake_analysis(world, "import sys; sys.stdin.read(); x = bytearray(2 * 1024**3)")
    await world.start_agent(**settings, analysis_memory_bytes_max=512 * 1024**2)
    with pytest.raises(ResourceExhausted) as refused:
        await ask(world, make_request(world, tiny_base, jsonl(GOOD_ROWS)))
    assert refused.value.metadata["limit"] == "analysis_memory_bytes_max"


async def test_a_full_disk_is_not_the_datas_fault_and_another_node_may_be_asked(
    world: AgentWorld, tiny_base: Path
) -> None:
    answer = {"ok": False, "reason": "TRAINING_FAILED", "message": "the disk is full", "errors": [], "violations": []}
    await world.start_agent(**fake_analysis(world, f"import json; print(json.dumps({answer}))"))
    with pytest.raises(Unavailable, match="the disk is full"):
        await ask(world, make_request(world, tiny_base, jsonl(GOOD_ROWS)))


@pytest.mark.parametrize("body", ["raise SystemExit(3)", "print('no answer')", "print('[]')"])
async def test_a_crashed_analysis_tells_no_detail(world: AgentWorld, tiny_base: Path, body: str) -> None:
    await world.start_agent(**fake_analysis(world, body))
    with pytest.raises(DomainError) as refused:
        await ask(world, make_request(world, tiny_base, jsonl(GOOD_ROWS)))
    assert refused.value.reason == "INTERNAL"


async def test_a_stopped_agent_leaves_no_analysis_behind(world: AgentWorld, tiny_base: Path) -> None:
    body = """
    import os, pathlib, time
    (pathlib.Path(__file__).parent / "pids").write_text(f"{os.getpid()} x\\n")
    time.sleep(600)
    """
    agent = await world.start_agent(**fake_analysis(world, body), drain_grace_s=0.5)
    request = make_request(world, tiny_base, jsonl(GOOD_ROWS))
    asking = asyncio.create_task(ask(world, request))
    pid = await world.wait_for_child()
    agent.send_signal(signal.SIGTERM)
    await agent.wait()
    await eventually(lambda: not Path(f"/proc/{pid}").exists())
    with pytest.raises(DomainError):
        await asking


async def test_a_model_is_described_while_all_analyses_are_busy(world: AgentWorld, tiny_base: Path) -> None:
    settings = fake_analysis(
        world,
        """
        import json, os, pathlib, sys, time
        if json.load(sys.stdin).get("describe"):
            print(json.dumps({"ok": True, "template": {"supports_tools": True, "supports_reasoning": False}}))
        else:
            with (pathlib.Path(__file__).parent / "pids").open("a") as file:
                file.write(f"{os.getpid()} x\\n")
            time.sleep(600)
        """,
    )
    await world.start_agent(**settings, analyses_concurrent_max=2)
    quote = make_request(world, tiny_base, jsonl(GOOD_ROWS))
    job = make_request(world, tiny_base, jsonl(GOOD_ROWS), purpose=dataset_service_pb2.ANALYSIS_PURPOSE_JOB)
    job.sequence_tokens_max = 128
    asking = [
        asyncio.create_task(ask(world, quote, organization="org_a")),
        asyncio.create_task(ask(world, job, organization="org_b")),
    ]
    await world.wait_for_child(2)
    async with world.channel("scheduler") as channel:
        stub = dataset_service_pb2_grpc.DatasetServiceStub(channel)
        described = dataset_service_pb2.DescribeModelRequest(base_model=quote.base_model)
        assert (await stub.DescribeModel(described, timeout=60)).supports_tools
    for task in asking:
        task.cancel()


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ((Path(__file__).parents[2] / "assets/templates/qwen3.jinja").read_text(), (True, True)),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}",
            (False, False),
        ),
        ("{{ broken", (False, False)),
    ],
    ids=["qwen3", "plain", "broken"],
)
async def test_a_model_tells_what_its_template_renders(
    world: AgentWorld, tiny_base: Path, template: str, told: tuple[bool, bool]
) -> None:
    base = world.folder / "described"
    shutil.copytree(tiny_base, base)
    (base / "chat_template.jinja").write_text(template)
    await world.start_agent()
    request = dataset_service_pb2.DescribeModelRequest(base_model=world.put_folder("base/described/rv_1/", base))
    async with world.channel("scheduler") as channel:
        answer = await dataset_service_pb2_grpc.DatasetServiceStub(channel).DescribeModel(request, timeout=120)
    assert (answer.supports_tools, answer.supports_reasoning) == told
