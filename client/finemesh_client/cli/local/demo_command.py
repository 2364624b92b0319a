"""`finemesh demo`: the main job from nothing to an invoice, on real parts, with figures.

It only calls the client and draws.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from finemesh.models.v1 import model_pb2
from finemesh.tuning.v1 import tuning_job_pb2 as pb
from finemesh_client.billing import NANOS_PER_DOLLAR, dollars
from finemesh_client.cli.billing.billing_commands import show_invoice
from finemesh_client.cli.datasets.file_commands import show as show_file
from finemesh_client.cli.jobs.job_follow import watch_job
from finemesh_client.cli.jobs.job_show import show_quote
from finemesh_client.cli.local.demo_dataset import Row, make_rows, write_rows
from finemesh_client.cli.local.demo_quiz import accuracy, ask_grpc, ask_openai
from finemesh_client.cli.local.demo_stack import DemoFailed, make_base_model, running_stack
from finemesh_client.cli.output import console, progress_console, size
from finemesh_client.cli.runtime import EXIT_REFUSED
from finemesh_client.client import Client
from finemesh_client.config import default_data_dir, find_config
from finemesh_client.errors import FinemeshError, NotFound

BASE_RECIPE = "demo-llama"
BASE_MODEL = f"finemesh/{BASE_RECIPE}"
CREDIT_NANOS_USD = 25 * NANOS_PER_DOLLAR
REGISTER_TIMEOUT_S = 60.0
GRPC_QUESTIONS = 20


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What the last line reports."""

    loss_before: float
    loss_after: float
    accuracy_before: float
    accuracy_after: float
    price_nanos_usd: int


@contextlib.contextmanager
def step(number: int, title: str) -> Iterator[None]:
    """A heading before a step and its duration after it."""
    console.print(f"\n{number}. {title}", style="bold cyan")
    began = time.monotonic()
    yield
    console.print(f"took {time.monotonic() - began:.1f} s", style="dim")


def demo(
    data_dir: Annotated[
        Path | None, typer.Option("--data", help="Data folder (default: the `demo` folder in FINEMESH_DATA_DIR).")
    ] = None,
) -> None:
    """The whole story on this machine: dataset, quote, tuning, chat, weights, invoice.

    Starts a mesh of its own (no Docker, no GPU), makes a small base model and a dataset from the standard library's
    docstrings, tunes with LoRA and asks base and tuned model the same held-out questions. Takes about four minutes.
    """
    began = time.monotonic()
    folder = data_dir or default_data_dir() / "demo"
    try:
        figures = asyncio.run(tell(folder))
    except (DemoFailed, FinemeshError) as error:
        failed = f"demo: failed after {time.monotonic() - began:.0f} s"
        console.print(Text.assemble((failed, "red"), f": {error}"))
        raise typer.Exit(EXIT_REFUSED) from None
    console.print(
        f"demo: ok in {time.monotonic() - began:.0f} s; "
        f"held-out loss {figures.loss_before:.3f} -> {figures.loss_after:.3f}; "
        f"held-out accuracy {figures.accuracy_before:.1%} -> {figures.accuracy_after:.1%}; "
        f"quote = hold = charge = {dollars(figures.price_nanos_usd)}",
        soft_wrap=True,
    )


async def tell(folder: Path) -> Figures:
    """The steps in order."""
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    with step(1, "A small base model, pre-trained on this machine's standard library"):
        base_folder = await base_model(folder)
    with step(2, "The mesh: PostgreSQL, nats-server and five services"):
        stack = running_stack(folder)
        ready = await stack.__aenter__()
        console.print(f"gRPC {ready['public_grpc']}, HTTP {ready['http_url']}/v1")
    async with contextlib.AsyncExitStack() as ending:
        ending.push_async_exit(stack.__aexit__)
        mesh = await ending.enter_async_context(Client(find_config(data_dir=folder)))
        with step(3, "Base model into the catalogue, credit onto the balance"):
            base = await mesh.models.import_base(BASE_MODEL, base_folder)
            console.print(f"{base.model_id} {base.revision}: {base.parameter_count:,} weights")
            await ensure_credit(mesh)
        with step(4, "A dataset from real text: which of ten modules does this docstring come from?"):
            training_file, validation_file, held_out = await upload_dataset(mesh, folder)
        with step(5, "An exact quote, and a job"):
            name, quoted = await create_job(mesh, training_file, validation_file)
        with step(6, "Tuning with LoRA"):
            job = await watch_job(mesh, name)
            if job.state != pb.TUNING_JOB_STATE_SUCCEEDED:
                raise DemoFailed(f"the job ended as {pb.TuningJobState.Name(job.state)}: {job.error.message}")
            before, after = job.progress.initial_validation_loss, job.progress.validation_loss
            console.print(f"held-out loss {before:.3f} before, {after:.3f} after")
        with step(7, "The same held-out questions to base and tuned model"):
            base_accuracy, tuned_accuracy = await quiz(mesh, job, held_out)
        with step(8, "The weights are yours"):
            await download(mesh, job, folder / "weights" / job.name.rpartition("/")[2])
        with step(9, "The invoice, and the proof"):
            await prove(mesh, job, quoted)
        if after >= before or tuned_accuracy <= base_accuracy:
            raise DemoFailed("the tuned model is not better than its base on the held-out rows")
        return Figures(
            loss_before=before,
            loss_after=after,
            accuracy_before=base_accuracy,
            accuracy_after=tuned_accuracy,
            price_nanos_usd=quoted,
        )


async def base_model(folder: Path) -> Path:
    """The base model's folder, made or found in the cache."""
    target = folder / "base" / BASE_RECIPE
    with progress_console.status("starting") as status:

        def told(line: str) -> None:
            status.update(Text(line))

        described = await make_base_model(BASE_RECIPE, target, folder.parent / "cache", told)
    console.print("found in the cache" if described.get("cached") else "made from its recipe")
    return Path(str(described["directory"]))


async def ensure_credit(mesh: Client) -> None:
    """Prepaid credit for the demo's job, as an operator adds it."""
    balance = await mesh.billing.balance()
    if balance.available_nanos_usd < CREDIT_NANOS_USD:
        balance = await mesh.billing.top_up(CREDIT_NANOS_USD - balance.available_nanos_usd)
    console.print(f"prepaid credit {dollars(balance.available_nanos_usd)}")


async def upload_dataset(mesh: Client, folder: Path) -> tuple[str, str, list[Row]]:
    """Names of the uploaded training and held-out files, and the held-out rows."""
    training, held_out = make_rows()
    names = []
    for rows, file_name in ((training, "train.jsonl"), (held_out, "held-out.jsonl")):
        file = await mesh.files.upload(write_rows(rows, folder / file_name))
        show_file(file)
        names.append(file.name)
    console.print(
        f"for example: {training[0].question.rpartition(chr(10))[2]!r} -> {training[0].answer}",
        soft_wrap=True,
    )
    return names[0], names[1], held_out


async def create_job(mesh: Client, training_file: str, validation_file: str) -> tuple[str, int]:
    """The new job's name and its quoted price in nano-dollars."""
    spec = pb.TuningSpec(
        base_model=BASE_MODEL,
        training_file=training_file,
        validation_file=validation_file,
        output_name=f"docstrings-{time.time_ns() // 1_000_000:x}",
        lora=pb.LoraTraining(rank=16, alpha=32),
        hyperparameters=pb.Hyperparameters(
            epochs=4, evaluations=1, batch_size=2, learning_rate=4e-3, warmup_ratio=0.05
        ),
    )
    quote = await mesh.jobs.quote(spec)
    show_quote(quote)
    job = await mesh.jobs.create(spec)
    console.print(f"created {job.name}", soft_wrap=True)
    return job.name, quote.total_nanos_usd


async def quiz(mesh: Client, job: pb.TuningJob, held_out: Sequence[Row]) -> tuple[float, float]:
    """(accuracy of the base, accuracy of the tuned model), 0 to 1, and a check that both doors give the same
    answers."""
    await registered(mesh, job.output_model)
    url, key = mesh.config.http_url, mesh.config.api_key
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=progress_console, transient=True) as bar:
        answers = {}
        for model in (BASE_MODEL, job.output_model):
            task = bar.add_task(f"asking {model} (the first question starts its engine)", total=len(held_out))
            answers[model] = await ask_openai(url, key, model, held_out, lambda task=task: bar.advance(task))  # type: ignore[misc]
    base, tuned = (accuracy(answers[model], held_out) for model in (BASE_MODEL, job.output_model))
    console.print(
        f"{BASE_MODEL}: {base:.1%} right; {job.output_model}: {tuned:.1%} right (openai client)", soft_wrap=True
    )
    some = held_out[:GRPC_QUESTIONS]
    by_grpc = await ask_grpc(mesh, job.output_model, some)
    same = sum(a == b for a, b in zip(by_grpc, answers[job.output_model], strict=False))
    console.print(
        f"gRPC client: {same} of {len(some)} streamed answers are the same, {accuracy(by_grpc, some):.1%} right"
    )
    for row, answer in list(zip(held_out, answers[job.output_model], strict=True))[:3]:
        console.print(f"  {row.question.rpartition(chr(10))[2][:80]!r} -> {answer!r}", soft_wrap=True)
    return base, tuned


async def registered(mesh: Client, model_id: str) -> model_pb2.Model:
    """The tuned model, once the registry has heard of it."""
    async with asyncio.timeout(REGISTER_TIMEOUT_S):
        while True:
            try:
                return await mesh.models.get(model_id)
            except NotFound:
                await asyncio.sleep(0.2)


async def download(mesh: Client, job: pb.TuningJob, folder: Path) -> None:
    """Downloads the adapter and says what came."""
    for path in await mesh.models.download(job.output_model, folder):
        console.print(f"{path} {size((await asyncio.to_thread(path.stat)).st_size)}", soft_wrap=True)


async def prove(mesh: Client, job: pb.TuningJob, quoted: int) -> None:
    """The invoice, and quote = hold = charge."""
    charge = await mesh.billing.job_charge(job.name)
    show_invoice(await mesh.billing.invoice())
    console.print(
        f"quoted {dollars(quoted)}, held {dollars(charge.held_nanos_usd)}, "
        f"charged {dollars(charge.charged_nanos_usd)}, given back {dollars(charge.released_nanos_usd)}",
        soft_wrap=True,
    )
    if not charge.settled or not quoted == charge.quoted_nanos_usd == charge.held_nanos_usd == charge.charged_nanos_usd:
        raise DemoFailed("quote, hold and charge are not the same")
