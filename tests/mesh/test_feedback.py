"""Learning from thumbs up and down by the command line on the real mesh: upload, quote, training, charge and invoice.

Earns its minute: the only place where answers with thumbs go through every service.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from finemesh.files.v1 import file_pb2
from finemesh.tuning.v1 import tuning_job_pb2 as pb
from finemesh_client.errors import InvalidRequest
from tests.harness.books import write_next_books
from tests.harness.mesh import BASE, Mesh, running_mesh, write_rows
from tests.mesh.test_preferences import finemesh


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    folder = tmp_path_factory.mktemp("mesh")
    books = write_next_books(folder / "books")
    async with running_mesh(folder, FINEMESH_BILLING_PRICE_BOOKS_DIR=str(books)) as running:
        yield running


def judged(count: int) -> list[dict[str, object]]:
    """Good answers name the second word, bad ones the first."""
    words = ["river", "stone", "cloud", "ember", "meadow", "harbor"]
    return [
        {
            "prompt": [{"role": "user", "content": f"{words[n % 6]} {words[(n + 1) % 6]} number {n}"}],
            "completion": [{"role": "assistant", "content": words[(n + 1) % 6] if n % 2 else words[n % 6]}],
            "label": bool(n % 2),
        }
        for n in range(count)
    ]


async def test_thumbs_are_learned_and_charged_as_quoted(mesh: Mesh, tmp_path: Path) -> None:
    training = await mesh.client.files.upload(write_rows(tmp_path / "judged.jsonl", judged(48)))
    held_out = await mesh.client.files.upload(write_rows(tmp_path / "held-out.jsonl", judged(12)))
    assert training.format == file_pb2.DATASET_FORMAT_FEEDBACK
    assert (training.features.thumbs_up, training.features.thumbs_down) == (True, True)
    asked = (
        *("jobs", "create", "-m", BASE, "--method", "kto", "-t", training.name, "--validation-file", held_out.name),
        *("--kto-beta", "0.3", "--undesirable-weight", "1.5", "--rank", "4", "--epochs", "6", "--evaluations", "1"),
        *("--batch-size", "8", "--learning-rate", "0.005", "--max-tokens", "64", "--name", "judging"),
    )
    quote = await finemesh(mesh, *asked, "--quote")
    made = await finemesh(mesh, *asked, "--yes", "--watch")
    job = await mesh.client.jobs.get(str(made["name"]))
    assert job.state == pb.TUNING_JOB_STATE_SUCCEEDED, job.error.message
    assert job.spec.kto == pb.KtoMethod(beta=0.3, desirable_weight=1.0, undesirable_weight=1.5)
    assert job.counts.training_examples == 48
    assert job.progress.trained_tokens == 6 * job.counts.training_tokens
    assert job.progress.reward_accuracy > 0.5
    assert job.progress.reward_margin > 0
    charge = await mesh.settled(job.name)
    paid = (charge.held_nanos_usd, charge.charged_nanos_usd)  # type: ignore[attr-defined]
    assert paid == (int(str(quote["total_nanos_usd"])), job.quoted_nanos_usd)
    assert charge.price_book_version == "default-2026-3"  # type: ignore[attr-defined]
    invoice = await mesh.client.billing.invoice()
    assert sum(line.amount_nanos_usd for line in invoice.lines if line.resource == job.name) == paid[1]


async def test_files_for_another_method_and_thumbs_of_one_kind_are_refused(mesh: Mesh, tmp_path: Path) -> None:
    spec = pb.TuningSpec(base_model=BASE, training_file=mesh.training_file, kto=pb.KtoMethod())
    with pytest.raises(InvalidRequest, match="the method sft learns from, and the method kto does not"):
        await mesh.client.jobs.quote(spec)
    alike = await mesh.client.files.upload(
        write_rows(tmp_path / "alike.jsonl", [row for row in judged(8) if row["label"]])
    )
    assert alike.state == file_pb2.FILE_STATE_INVALID
    (error,) = alike.validation.errors
    assert (error.line, error.path, error.found) == (0, "$.label", "only rows with label true")
