"""`finemesh files preview`: rows of a dataset as a training would see them, token by token.

It renders nothing itself.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from finemesh.files.v1 import dataset_preview_pb2, file_pb2
from finemesh.tuning.v1 import tuning_job_pb2
from finemesh_client.cli.output import console, fields, print_json
from finemesh_client.cli.runtime import AsJson, with_client
from finemesh_client.client import Client

TRAIN_ON_INPUTS = {
    "auto": tuning_job_pb2.TRAIN_ON_INPUTS_AUTO,
    "true": tuning_job_pb2.TRAIN_ON_INPUTS_TRUE,
    "false": tuning_job_pb2.TRAIN_ON_INPUTS_FALSE,
}
TRAINED_STYLE, SEEN_STYLE, CUT_STYLE = "bold green", "dim", "red strike"


def preview(
    name: Annotated[str, typer.Argument(help="Resource name, projects/.../files/...")],
    model: Annotated[str, typer.Option("--model", "-m", help="Base model id: its template and tokenizer are used.")],
    rows: Annotated[int, typer.Option("--rows", min=0, help="Most rows to show (default 5).")] = 0,
    tokens: Annotated[int, typer.Option("--tokens", min=0, help="Most tokens to show of a row (default 1024).")] = 0,
    sequence_tokens_max: Annotated[int, typer.Option("--max-tokens", min=0, help="Longest example.")] = 0,
    train_on_inputs: Annotated[str, typer.Option("--train-on-inputs", help="auto, true or false.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Show sampled rows as the training would see them: what carries loss is green, what is cut off is struck out."""
    if train_on_inputs not in TRAIN_ON_INPUTS:
        raise typer.BadParameter(f"must be one of {', '.join(TRAIN_ON_INPUTS)}", param_hint="--train-on-inputs")

    async def work(mesh: Client) -> None:
        seen = await mesh.files.preview(
            name,
            model,
            rows=rows,
            tokens_shown=tokens,
            sequence_tokens_max=sequence_tokens_max,
            train_on_inputs=TRAIN_ON_INPUTS[train_on_inputs],
        )
        print_json(seen) if as_json else show(seen)

    with_client(work, as_json)


def show(seen: dataset_preview_pb2.DatasetPreview) -> None:
    """A preview for people."""
    fields(
        [
            ("format", file_pb2.DatasetFormat.Name(seen.format).removeprefix("DATASET_FORMAT_").lower()),
            ("uses", features_of(seen.features)),
            ("rows", f"{seen.row_count:,}, {len(seen.rows)} shown"),
            ("cut after", f"{seen.sequence_tokens_max:,} tokens"),
            ("train on inputs", seen.train_on_inputs),
        ]
    )
    for row in seen.rows:
        console.print()
        console.print(_heading(row), style="bold")
        console.print(_tokens(row))


def features_of(features: file_pb2.DatasetFeatures) -> str:
    """Names of the features in use, for people."""
    return ", ".join(field.name.replace("_", " ") for field, _ in features.ListFields())


def _heading(row: dataset_preview_pb2.PreviewRow) -> str:
    part = "" if row.part == "row" else f", {row.part.replace('_', ' ')}"
    facts = [f"line {row.line}{part}: {row.token_count:,} tokens, {row.trained_token_count:,} trained"]
    if row.truncated_token_count:
        facts.append(f"{row.truncated_token_count:,} cut off")
    if row.weight != 1:
        facts.append(f"weight {row.weight:g}")
    if row.skipped:
        facts.append("left out: nothing in it carries loss")
    return ", ".join(facts)


def _tokens(row: dataset_preview_pb2.PreviewRow) -> Text:
    trained = {index for span in row.trained_spans for index in range(span.start, span.end)}
    text = Text()
    for index, token in enumerate(row.tokens):
        text.append(token, style=TRAINED_STYLE if index in trained else SEEN_STYLE)
    if len(row.tokens) < row.token_count:
        text.append(f" ... {row.token_count - len(row.tokens):,} more tokens", style="italic")
    if row.truncated_text:
        text.append(row.truncated_text, style=CUT_STYLE)
    return text
