"""The main job on the real mesh with a real vLLM engine: upload, quote, tune, chat by both doors, download, invoice."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio

from finemesh.billing.v1 import invoice_service_pb2, usage_record_pb2
from finemesh.endpoints.v1 import endpoint_pb2
from finemesh.files.v1 import file_pb2
from finemesh.tuning.v1 import tuning_job_pb2 as pb
from finemesh_client import InvalidRequest, NotFound, Unauthenticated
from finemesh_client.chat import sampling, tool, tool_choice, user
from finemesh_client.client import Client
from finemesh_client.config import ClientConfig
from tests.harness.mesh import BASE, Mesh, running_mesh, write_rows
from tests.harness.polling import eventually

# Enough for every job of this file but the dear one.
CREDIT_NANOS_USD = 50_000_000_000


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    async with running_mesh(
        tmp_path_factory.mktemp("mesh"),
        engine="vllm",
        credit_nanos_usd=CREDIT_NANOS_USD,
        FINEMESH_INFERENCE_KV_CACHE_BYTES=str(64 << 20),
    ) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def tuned(mesh: Mesh) -> pb.TuningJob:
    job = await mesh.run_job("tuned")
    assert job.state == pb.TUNING_JOB_STATE_SUCCEEDED, job.error.message
    return job


async def test_the_job_learned_and_was_charged_what_it_was_quoted(mesh: Mesh, tuned: pb.TuningJob) -> None:
    assert tuned.progress.validation_loss < tuned.progress.initial_validation_loss
    assert tuned.progress.step == tuned.progress.step_count
    quote = await mesh.client.jobs.quote(mesh.spec("quoted-again"))
    # What was told before the run is what it did.
    assert quote.outlook.step_count == tuned.outlook.step_count == tuned.progress.step_count
    charge = await mesh.settled(tuned.name)
    assert (
        quote.total_nanos_usd
        == tuned.quoted_nanos_usd
        == charge.held_nanos_usd  # type: ignore[attr-defined]
        == charge.charged_nanos_usd  # type: ignore[attr-defined]
    )
    usage = [record async for record in mesh.client.billing.usage(tuned.name)]
    trained = sum(r.quantity for r in usage if ":train:" in r.work_key)
    evaluated = sum(r.quantity for r in usage if ":evaluate:" in r.work_key)
    assert trained == tuned.counts.training_tokens * 6
    assert evaluated == tuned.counts.validation_tokens * 6


async def test_both_doors_give_the_tuned_models_answer(mesh: Mesh, tuned: pb.TuningJob) -> None:
    await mesh.adapter_sha256(tuned.output_model)
    greedy = sampling(temperature=0.0, output_tokens_max=8)
    question = "river stone number 3"
    whole = await mesh.client.chat.answer(tuned.output_model, [user(question)], greedy)
    streamed = "".join(
        [part.text_delta async for part in mesh.client.chat.stream(tuned.output_model, [user(question)], greedy)]
    )
    base = await mesh.client.chat.answer(BASE, [user(question)], greedy)
    assert whole.revision == tuned.output_revision != base.revision
    async with openai.AsyncOpenAI(base_url=mesh.client.config.http_url, api_key=mesh.client.config.api_key) as client:
        plain = await client.chat.completions.create(
            model=tuned.output_model,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=8,
        )
        stream = await client.chat.completions.create(
            model=tuned.output_model,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        listed = [model.id async for model in await client.models.list()]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert plain.choices[0].message.content == whole.choices[0].message.content == streamed == text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.output_tokens
    assert {BASE, tuned.output_model} <= set(listed)


async def test_the_usage_in_http_answers_is_what_is_booked(mesh: Mesh, tuned: pb.TuningJob) -> None:
    model, told = tuned.output_model, dict[str, tuple[int, int]]()
    with_usage: Any = {"stream": True, "stream_options": {"include_usage": True}}
    asked: Any = {"model": model, "temperature": 0, "max_tokens": 5}
    talk: Any = {**asked, "messages": [{"role": "user", "content": [{"type": "text", "text": "river stone"}]}]}
    text: Any = {**asked, "prompt": "river stone", "echo": True}
    async with openai.AsyncOpenAI(base_url=mesh.client.config.http_url, api_key=mesh.client.config.api_key) as client:
        chat, completion = client.chat.completions, client.completions
        streams = [await chat.create(**talk, **with_usage), await completion.create(**text, **with_usage)]
        answers: list[Any] = [
            await chat.create(**talk),
            await completion.create(**text),
            several := await chat.create(**{**talk, "temperature": 1}, n=2, logprobs=True, top_logprobs=1),
            *[[chunk async for chunk in stream][-1] for stream in streams],
        ]
        texts = [chunk.choices[0].text async for chunk in await completion.create(**text, stream=True)]
    assert "".join(texts) == answers[1].choices[0].text
    assert "".join(texts).startswith("river stone")
    tokens = [len(choice.logprobs.content) for choice in several.choices]
    assert (len(tokens), sum(tokens)) == (2, several.usage.completion_tokens)
    for answer in answers:
        told[answer.id] = (answer.usage.prompt_tokens, answer.usage.completion_tokens)
    assert all(prompt > 0 and answer > 0 for prompt, answer in told.values())
    kinds = (usage_record_pb2.USAGE_KIND_INPUT_TOKENS, usage_record_pb2.USAGE_KIND_OUTPUT_TOKENS)

    async def booked() -> dict[str, tuple[int, int]]:
        records = [record async for record in mesh.client.billing.usage(kinds=kinds)]
        return {
            generation: (
                sum(r.quantity for r in records if r.work_key.startswith(f"{generation}:") and r.kind == kinds[0]),
                sum(r.quantity for r in records if r.work_key.startswith(f"{generation}:") and r.kind == kinds[1]),
            )
            for generation in told
        }

    assert await eventually(booked, lambda found: all(all(pair) for pair in found.values())) == told


async def test_a_tool_that_must_be_called_is_called_by_both_doors(mesh: Mesh, tuned: pb.TuningJob) -> None:
    """Answers of several choices, too; each of their tokens is booked."""
    parameters = {"type": "object", "properties": {"town": {"enum": ["Paris", "Rome"]}}, "required": ["town"]}
    weather: Any = {
        "type": "function",
        "function": {"name": "weather", "parameters": {**parameters, "additionalProperties": False}},
    }
    asked: Any = {
        "model": tuned.output_model,
        "messages": [{"role": "user", "content": "river stone"}],
        "tools": [weather],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "parallel_tool_calls": False,
        "max_tokens": 150,
        "seed": 7,
        "n": 2,
    }
    whole = await mesh.client.chat.answer(
        tuned.output_model,
        [user("river stone")],
        sampling(output_tokens_max=150, seed=7, choices=2),
        tools=[tool(weather)],
        tool_choice=tool_choice("weather"),
        parallel_tool_calls=False,
    )
    async with openai.AsyncOpenAI(base_url=mesh.client.config.http_url, api_key=mesh.client.config.api_key) as client:
        plain = await client.chat.completions.create(**asked)
        chunks = [chunk async for chunk in await client.chat.completions.create(**asked, stream=True)]
    streamed = ["", ""]
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        for call in choice.delta.tool_calls or ():
            streamed[choice.index] += call.function.arguments or ""
    for by_grpc, by_http, in_parts in zip(whole.choices, plain.choices, streamed, strict=True):
        (called,) = by_grpc.message.tool_calls
        (also,) = by_http.message.tool_calls or []
        assert also.type == "function"
        assert (called.name, also.function.name) == ("weather", "weather")
        assert called.arguments == also.function.arguments == in_parts
        assert json.loads(in_parts) in [{"town": "Paris"}, {"town": "Rome"}]
        assert by_http.finish_reason == "tool_calls"
    kinds = [usage_record_pb2.USAGE_KIND_OUTPUT_TOKENS]

    async def booked() -> int:
        records = [record async for record in mesh.client.billing.usage(kinds=kinds)]
        return sum(record.quantity for record in records if record.work_key.startswith(f"{whole.generation_id}:"))

    assert await eventually(booked, bool) == whole.usage.output_tokens


async def test_the_weights_load_in_plain_peft(mesh: Mesh, tuned: pb.TuningJob, tmp_path: Path) -> None:
    paths = await mesh.client.models.download(tuned.output_model, tmp_path / "adapter")
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {path.name for path in paths}
    code = (
        "import sys; from transformers import AutoModelForCausalLM; from peft import PeftModel; "
        "m = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]); "
        "print(sum(p.numel() for n, p in m.named_parameters() if 'lora' in n))"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        str(mesh.folder / "tiny-llama"),
        str(tmp_path / "adapter"),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    assert int(output.split()[-1]) > 0


async def test_the_invoice_links_to_usage(mesh: Mesh, tuned: pb.TuningJob) -> None:
    await mesh.settled(tuned.name)
    invoice = await mesh.client.billing.invoice()
    line, minimum = [line for line in invoice.lines if line.resource == tuned.name]
    assert (line.kind, minimum.kind) == ("tuning", "minimum")
    assert line.amount_nanos_usd + minimum.amount_nanos_usd == tuned.quoted_nanos_usd
    assert line.usage_record_count == len([r async for r in mesh.client.billing.usage(tuned.name)])
    exact = sum(line.amount_nanos_usd for line in invoice.lines)
    assert invoice.total_nanos_usd == exact + invoice.rounding_nanos_usd
    document = await mesh.client.invoices.render(invoice.name, invoice_service_pb2.INVOICE_FORMAT_PDF)
    assert document.content.startswith(b"%PDF-")
    by_resource = await mesh.client.invoices.costs(group_by=[invoice_service_pb2.COST_DIMENSION_RESOURCE])
    costs = {row.keys[0]: row.amount_nanos_usd for row in by_resource.rows}
    assert costs[tuned.name] == tuned.quoted_nanos_usd
    exported = [record async for record in mesh.client.invoices.export_usage(month=invoice.name[-7:])]
    assert sum(record.resource == tuned.name for record in exported) == line.usage_record_count


async def test_creating_is_idempotent_and_cancelling_before_it_runs_costs_nothing(mesh: Mesh) -> None:
    spec = mesh.spec("cancelled")
    first = await mesh.client.jobs.create(spec, request_id="same")
    again = await mesh.client.jobs.create(spec, request_id="same")
    assert first.name == again.name
    await mesh.client.jobs.cancel(first.name)
    job = await mesh.ended(first.name)
    assert job.state == pb.TUNING_JOB_STATE_CANCELLED
    held_before = (await mesh.client.billing.balance()).held_nanos_usd
    assert held_before == 0 or (await mesh.settled(first.name)).charged_nanos_usd == 0  # type: ignore[attr-defined]


async def test_full_weights_ship_and_answer(mesh: Mesh) -> None:
    spec = mesh.spec("full", epochs=1)
    spec.full.SetInParent()
    job = await mesh.ended((await mesh.client.jobs.create(spec)).name)
    assert job.state == pb.TUNING_JOB_STATE_SUCCEEDED, job.error.message
    await mesh.until_registered(job.output_model)
    answer = await mesh.client.chat.answer(
        job.output_model, [user("river stone number 3")], sampling(temperature=0.0, output_tokens_max=4)
    )
    assert answer.revision == job.output_revision


async def test_bad_files_are_kept_with_every_error_and_cannot_be_tuned_on(mesh: Mesh, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"messages": []}\nnot json\n{"prompt": "a"}\n', encoding="utf-8")
    file = await mesh.client.files.upload(path)
    assert file.state == file_pb2.FILE_STATE_INVALID
    assert {error.line for error in file.validation.errors} == {1, 2, 3}
    spec = mesh.spec("never")
    spec.training_file = file.name
    with pytest.raises(Exception, match="FILE_NOT_READY"):
        await mesh.client.jobs.create(spec)


async def test_bad_requests_are_typed_and_leave_no_job(mesh: Mesh) -> None:
    before = [job.name async for job in mesh.client.jobs.list()]
    wrong = mesh.spec("wrong", epochs=100_000, batch_size=-1)
    with pytest.raises(InvalidRequest) as refused:
        await mesh.client.jobs.create(wrong)
    fields = {violation.field for violation in refused.value.violations}
    assert {"spec.hyperparameters.epochs", "spec.hyperparameters.batch_size"} <= fields
    unknown = mesh.spec("unknown")
    unknown.base_model = "nobody/nothing"
    with pytest.raises(NotFound) as missing:
        await mesh.client.jobs.create(unknown)
    assert missing.value.reason == "MODEL_UNKNOWN"
    huge = mesh.spec("huge")
    huge.gpu_count = 64
    with pytest.raises(Exception, match="JOB_TOO_LARGE"):
        await mesh.client.jobs.create(huge)
    assert [job.name async for job in mesh.client.jobs.list()] == before


async def test_foreign_projects_see_nothing_and_keys_can_be_revoked(mesh: Mesh, tuned: pb.TuningJob) -> None:
    project = await mesh.client.identity.create_project("second")
    key = await mesh.client.identity.create_key("second", project=project.name)
    config = ClientConfig(address=mesh.client.config.address, api_key=key.secret)
    async with Client(config) as other:
        with pytest.raises(NotFound):
            await other.jobs.get(tuned.name)
        with pytest.raises(NotFound):
            await other.files.get(mesh.training_file)
        with pytest.raises(NotFound):
            await other.chat.answer(tuned.output_model, [user("hi")])
        assert [job async for job in other.jobs.list()] == []
    await mesh.client.identity.revoke_key(key.key.name)
    async with Client(config) as revoked:
        with pytest.raises(Unauthenticated) as refused:
            await revoked.identity.caller()
        assert refused.value.reason == "API_KEY_REVOKED"


async def test_too_little_credit_fails_the_job_with_the_shortfall(mesh: Mesh, tmp_path: Path) -> None:
    balance = await mesh.client.billing.balance()
    minimum = 5_000_000_000
    rows = [
        {"messages": [{"role": "user", "content": "x " * 200}, {"role": "assistant", "content": "y " * 100}]}
        for _ in range(2000)
    ]
    file = await mesh.client.files.upload(write_rows(tmp_path / "dear.jsonl", rows))
    spec = mesh.spec("dear", epochs=100, sequence_tokens_max=512)
    spec.training_file = file.name
    quote = await mesh.client.jobs.quote(spec)
    if quote.total_nanos_usd <= balance.available_nanos_usd:
        pytest.fail(f"the job is too cheap to be refused: {quote.total_nanos_usd} of {balance.available_nanos_usd}")
    job = await mesh.ended((await mesh.client.jobs.create(spec)).name)
    assert job.state == pb.TUNING_JOB_STATE_FAILED
    assert job.error.reason == "BALANCE_INSUFFICIENT"
    shortfall = int(job.error.metadata["shortfall_nanos_usd"])
    assert shortfall == quote.total_nanos_usd - balance.available_nanos_usd > -minimum
    after = await mesh.client.billing.balance()
    assert (after.available_nanos_usd, after.held_nanos_usd) == (balance.available_nanos_usd, balance.held_nanos_usd)


async def test_a_dedicated_endpoint_serves_and_is_billed_by_the_minute(mesh: Mesh, tuned: pb.TuningJob) -> None:
    made = await mesh.client.endpoints.create("mine", tuned.output_model)
    look = partial(mesh.client.endpoints.get, made.name)
    endpoint = await eventually(look, lambda found: found.state == endpoint_pb2.ENDPOINT_STATE_READY, within_s=180)
    answer = await mesh.client.chat.answer(
        endpoint.endpoint_id, [user("river stone number 3")], sampling(temperature=0.0, output_tokens_max=4)
    )
    assert answer.revision == tuned.output_revision
    await mesh.client.endpoints.stop(made.name)
    endpoint = await eventually(look, lambda found: found.state == endpoint_pb2.ENDPOINT_STATE_STOPPED)
    assert endpoint.billed_minutes >= 1

    async def booked() -> list[usage_record_pb2.UsageRecord]:
        return [record async for record in mesh.client.billing.usage(made.name)]

    found = await eventually(booked, lambda records: len(records) >= endpoint.billed_minutes)
    assert sum(record.quantity for record in found) == endpoint.billed_minutes


async def test_the_command_line_prints_json(mesh: Mesh, tuned: pb.TuningJob) -> None:
    environment = {
        **os.environ,
        "FINEMESH_ADDRESS": mesh.client.config.address,
        "FINEMESH_API_KEY": mesh.client.config.api_key,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from finemesh_client.cli.main import app; app()",
        "jobs",
        "get",
        tuned.name,
        "--json",
        env=environment,
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    assert json.loads(output)["output_model"] == tuned.output_model
