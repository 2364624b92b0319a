"""Rows of like length side by side, under a limit on their tokens: how the plain loop pads little.
It knows no torch."""

from __future__ import annotations

from bench.train.bench_rows import Row

BUCKET_TOKENS = 2048


def buckets(rows: list[Row], tokens_max: int = BUCKET_TOKENS) -> list[list[Row]]:
    """Longest rows first; each bucket has at most `tokens_max` tokens with its padding, but at least one row."""
    made: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        if not made or (len(made[-1]) + 1) * len(made[-1][0].ids) > tokens_max:
            made.append([])
        made[-1].append(row)
    return made
