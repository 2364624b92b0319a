"""How a price looks to people: its terms with quantity and rate, and its total. It computes nothing."""

from __future__ import annotations

from collections.abc import Iterable

from rich.text import Text

from finemesh.billing.v1 import billing_service_pb2
from finemesh.tuning.v1 import tuning_job_pb2, tuning_service_pb2
from finemesh_client.billing import dollars
from finemesh_client.cli.output import console, table


def show_counts(counts: tuning_job_pb2.DatasetCounts) -> None:
    """What a dataset was counted as."""
    held_out = f"; {counts.validation_examples:,} held out ({counts.validation_tokens:,} tokens)"
    console.print(
        f"{counts.training_examples:,} examples, {counts.training_tokens:,} tokens per epoch"
        + (held_out if counts.validation_examples else "")
        + (f"; {counts.truncated_examples:,} cut to the limit" if counts.truncated_examples else "")
        + (f"; {counts.rows_per_second:,.0f} examples prepared per second" if counts.rows_per_second else "")
    )


def show_outlook(spec: tuning_job_pb2.TuningSpec, outlook: tuning_job_pb2.RunOutlook) -> None:
    """How long and how fast the run will learn, and what will surprise."""
    if outlook.step_count:
        epochs, rate = spec.hyperparameters.epochs, spec.hyperparameters.learning_rate
        console.print(f"steps: {epochs} x {outlook.steps_per_epoch:,} = {outlook.step_count:,}; learning rate {rate:g}")
    show_warnings(outlook)


def show_warnings(outlook: tuning_job_pb2.RunOutlook) -> None:
    """A line for each, with its cure."""
    for warning in outlook.warnings:
        said = f"{warning.field.removeprefix('spec.')}: {warning.description}; {warning.cure}"
        console.print(Text.assemble(("warning ", "yellow"), said), soft_wrap=True)


def show_terms(title: str, terms: Iterable[billing_service_pb2.PriceTerm | tuning_service_pb2.QuoteTerm]) -> None:
    """A line per term: a fixed amount has neither quantity nor rate."""
    rows = [
        (
            term.description,
            f"{term.quantity:,}" if term.nanos_usd_per_million else "",
            f"{dollars(term.nanos_usd_per_million)} / M" if term.nanos_usd_per_million else "",
            dollars(term.amount_nanos_usd),
        )
        for term in terms
    ]
    table(title, ("term", "quantity", "price", "amount"), rows)


def total(total_nanos_usd: int, minimum_applied: bool) -> Text:
    """The sum of the terms, and whether the minimum made it."""
    return Text.assemble("total ", (dollars(total_nanos_usd), "bold"), " (the minimum)" if minimum_applied else "")
