"""Each family of the README, from import to answer, on the real mesh with vLLM: `make test-families`.

A tiny model of the family's architecture, tokenizer and template is imported, tuned on six questions, served, and asked
one of them. It answers with the words it was taught and stops where its turn was taught to end. What this takes is two
starts of vLLM by family, about a minute and a half on two cores; the table at the end is that of docs/families.md.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from finemesh.inference.v1 import generation_pb2
from finemesh.tuning.v1 import tuning_job_pb2 as pb
from finemesh_client import Conflict, InvalidRequest
from finemesh_client.chat import sampling, user
from tests.families.families import FAMILIES, Family, write_model
from tests.harness.mesh import Mesh, running_mesh, write_rows

pytestmark = [pytest.mark.families, pytest.mark.timeout(1200)]

TAUGHT = {"open?": "close", "read?": "write", "lock?": "key", "file?": "path", "queue?": "stream", "task?": "future"}
THOUGHT = "short"
REPEATED = 8
ANSWER_TOKENS_MAX = 40
KV_CACHE_BYTES = 64 << 20


@dataclass
class Row:
    """A line of the table."""

    name: str
    family: Family
    template: str = "its own"
    loss: str = ""
    answer: str = ""
    ends: str = "never"

    def cells(self) -> tuple[str, ...]:
        family = self.family
        weights = "all" if family.full else "adapter"
        shown = (self.name, family.model_type, family.tokenizer_class, self.template, weights, self.loss)
        return (*shown, *(f"`{text}`" if text else "" for text in (self.answer, self.ends)))


HEADER = ("family", "architecture", "tokenizer", "template", "weights", "loss", "answer", "ends")


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    rows: list[Row] = []
    yield rows
    lines = [HEADER, tuple("---" for _ in HEADER), *(row.cells() for row in rows)]
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    assert reporter is not None
    for line in ("", *(f"| {' | '.join(cells)} |" for cells in lines)):
        reporter.write_line(line)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    async with running_mesh(
        tmp_path_factory.mktemp("mesh"),
        engine="vllm",
        # The engine of one family leaves before that of the next one comes.
        FINEMESH_INFERENCE_ENGINES_MAX="1",
        FINEMESH_INFERENCE_KV_CACHE_BYTES=str(KV_CACHE_BYTES),
    ) as running:
        yield running


@pytest.mark.parametrize("name", list(FAMILIES))
async def test_a_family_is_tuned_and_answers_as_taught(name: str, mesh: Mesh, table: list[Row]) -> None:
    family = FAMILIES[name]
    folder = await asyncio.to_thread(write_model, family, mesh.folder / "models" / name)
    base = f"families/{name}"
    row = Row(name, family)
    table.append(row)
    if family.import_refusal:
        with pytest.raises(InvalidRequest, match=re.escape(family.import_refusal)):
            await mesh.client.models.import_base(base, folder)
        row.ends = f"refused at import: {family.import_refusal}"
        return
    rows = [_row(family, question, answer) for question, answer in TAUGHT.items()] * REPEATED
    uploaded = await mesh.client.files.upload(write_rows(mesh.folder / f"{name}.jsonl", rows))
    if family.refusal:
        await mesh.client.models.import_base(f"{base}-own", folder)
        with pytest.raises(Conflict, match=re.escape(family.refusal)):
            await mesh.client.jobs.quote(_spec(family, f"{base}-own", uploaded.name))
        row.template = "given one (its own is refused)"
    await mesh.client.models.import_base(
        base,
        folder,
        chat_template=family.given_template,
        tool_parser=family.parsers,
        reasoning_parser=family.parsers,
    )
    job = await mesh.ended((await mesh.client.jobs.create(_spec(family, base, uploaded.name))).name)
    assert job.state == pb.TUNING_JOB_STATE_SUCCEEDED, job.error.message
    row.loss = f"{job.progress.training_loss:.3f}"
    await mesh.until_registered(job.output_model)
    question, taught = next(iter(TAUGHT.items()))
    greedy = sampling(temperature=0.0, output_tokens_max=ANSWER_TOKENS_MAX)
    answer = await mesh.client.chat.answer(job.output_model, [user(question)], greedy)
    (choice,) = answer.choices
    row.answer = repr((choice.message.reasoning, choice.message.content) if family.thinks else choice.message.content)
    if choice.finish_reason == generation_pb2.FINISH_REASON_STOP:
        row.ends = f"{family.end} after {answer.usage.output_tokens} tokens"
    words = choice.message.content.strip()
    assert words in TAUGHT.values() if family.dated else words == family.before_answer + taught
    assert not family.thinks or choice.message.reasoning.strip() == THOUGHT
    assert choice.finish_reason == generation_pb2.FINISH_REASON_STOP


def _row(family: Family, question: str, answer: str) -> dict[str, object]:
    said: dict[str, str] = {"role": "assistant", "content": answer}
    if family.thinks:
        said["reasoning"] = THOUGHT
    return {"messages": [{"role": "user", "content": question}, said]}


def _spec(family: Family, base: str, file: str) -> pb.TuningSpec:
    spec = pb.TuningSpec(
        base_model=base,
        training_file=file,
        output_name=base.rpartition("/")[2].replace(".", "-"),
        hyperparameters=pb.Hyperparameters(
            epochs=12,
            batch_size=6,
            packing=False,
            learning_rate=3e-3 if family.full else 1e-2,
            sequence_tokens_max=512,
        ),
    )
    if family.full:
        spec.full.SetInParent()
    else:
        spec.lora.CopyFrom(pb.LoraTraining(rank=16, alpha=32))
    return spec
