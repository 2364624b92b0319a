"""`finemesh billing estimate`: what a tuning job would cost, from numbers or from a real dataset.

It prices nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from finemesh.billing.v1 import billing_service_pb2 as pb
from finemesh.tuning.v1.tuning_service_pb2 import QuoteTuningJobResponse
from finemesh_client.billing import request_of
from finemesh_client.cli.jobs.job_options import METHODS, SFT, JobOptions
from finemesh_client.cli.jobs.job_spec import to_spec
from finemesh_client.cli.jobs.price_terms import show_counts, show_outlook, show_terms, total
from finemesh_client.cli.output import as_dict, console, print_json, progress_console
from finemesh_client.cli.runtime import AsJson, one_of, with_client
from finemesh_client.client import Client
from finemesh_client.training_kinds import METHOD_FIELDS, TRAINING_KINDS


def estimate(
    model: Annotated[str, typer.Option("--model", "-m", help="Base model id.")],
    training_tokens: Annotated[
        int | None, typer.Option("--training-tokens", min=1, help="Tokens of one epoch; or give --file.")
    ] = None,
    validation_tokens: Annotated[
        int | None, typer.Option("--validation-tokens", min=0, help="Tokens of one evaluation (default 0).")
    ] = None,
    file: Annotated[
        str, typer.Option("--file", "-f", help="Price this uploaded training file instead, by its real tokens.")
    ] = "",
    validation_file: Annotated[str, typer.Option("--validation-file", help="Held-out file, with --file.")] = "",
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Passes over the data (default 1).")] = None,
    evaluations: Annotated[int | None, typer.Option("--evaluations", min=0, help="Evaluations per epoch (0).")] = None,
    sequence_tokens_max: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Longest example, with --file.")
    ] = None,
    method: Annotated[
        str, typer.Option("--method", callback=one_of(METHODS), help=f"One of {', '.join(METHODS)}.")
    ] = SFT,
    full: Annotated[bool, typer.Option("--full", help="All weights instead of a LoRA adapter.")] = False,
    price_book: Annotated[
        str, typer.Option("--price-book", help="Version of the price book; the one in force by default.")
    ] = "",
    parameter_count: Annotated[
        int | None, typer.Option("--parameters", min=1, help="Weights of the model, for books that price by size.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Price a tuning job from numbers, or with --file from a dataset: the same code makes quotes, holds and bills."""
    if not file:
        given = {"--validation-file": validation_file or None, "--max-tokens": sequence_tokens_max}
        _refuse_given(given, "belongs to --file")
        if training_tokens is None:
            raise typer.BadParameter("give --training-tokens, or --file for a real dataset")
        return _by_numbers(
            pb.EstimatePriceRequest(
                base_model=model,
                training_kind=TRAINING_KINDS[METHOD_FIELDS[method], "full" if full else "lora"],
                training_tokens=training_tokens,
                validation_tokens=validation_tokens or 0,
                epochs=epochs or 1,
                evaluations=evaluations or 0,
                price_book_version=price_book,
                parameter_count=parameter_count or 0,
            ),
            as_json,
        )
    _refuse_given(
        {
            "--training-tokens": training_tokens,
            "--validation-tokens": validation_tokens,
            "--parameters": parameter_count,
        },
        "is counted from --file",
    )
    options = JobOptions(
        model=model,
        training_file=file,
        validation_file=validation_file,
        method=method,
        full=full,
        epochs=epochs,
        evaluations=evaluations,
        sequence_tokens_max=sequence_tokens_max,
    )
    return _by_dataset(options, price_book, as_json)


def _refuse_given(options: Mapping[str, object], why: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise typer.BadParameter(f"{name} {why}")


def _by_numbers(request: pb.EstimatePriceRequest, as_json: bool) -> None:
    async def work(mesh: Client) -> None:
        price = await mesh.billing.estimate(request)
        print_json(price) if as_json else _show(price)

    with_client(work, as_json)


def _by_dataset(options: JobOptions, price_book: str, as_json: bool) -> None:
    async def work(mesh: Client) -> None:
        with progress_console.status("counting tokens"):
            quote = await mesh.jobs.quote(to_spec(options))
            # A quote is made by the book in force; from its counts any other book can be asked.
            price = await mesh.billing.estimate(request_of(quote, price_book)) if price_book else quote
        if as_json:
            parts = {"counts": quote.counts, "spec": quote.spec, "outlook": quote.outlook}
            return print_json({**as_dict(price), **{name: as_dict(part) for name, part in parts.items()}})
        show_counts(quote.counts)
        show_outlook(quote.spec, quote.outlook)
        return _show(price)

    with_client(work, as_json)


def _show(price: pb.EstimatePriceResponse | QuoteTuningJobResponse) -> None:
    show_terms(f"estimate (price book {price.price_book_version})", price.terms)
    console.print(total(price.total_nanos_usd, price.minimum_applied))
