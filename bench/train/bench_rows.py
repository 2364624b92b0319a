"""Rows, pairs of answers and a tokenizer for the benchmark: words of a made-up vocabulary with log-normal row lengths.

Every side trains on the very same token ids: a row's text is the names of its ids, so tokenising it gives them back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from bench.train.gpu_shapes import ROW_LENGTH_MEDIAN, WARM_STEPS, GpuShape
from bench.train.shapes import (
    CONTEXT_LENGTH,
    HELD_OUT,
    LENGTH_MEDIAN,
    LENGTH_MIN,
    LENGTH_SIGMA,
    PROMPT_SHARE,
    SEED,
    Shape,
)

IGNORED = -100
PAD, BEGIN, END = "<pad>", "<begin>", "<end>"
PAD_ID, BEGIN_ID, END_ID = 0, 1, 2
# The words of a question and of its answer, one space between them; a word is a token.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %} <end>{% elif not loop.last %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %} {% endif %}"
)
_SPECIAL = 3


@dataclass(frozen=True, kw_only=True)
class Row:
    """`ids` end with END_ID; `labels` are the ids of the completion, IGNORED before it."""

    ids: list[int]
    labels: list[int]

    @property
    def prompt_length(self) -> int:
        return self.labels.count(IGNORED)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two rows with the same prompt."""

    preferred: Row
    other: Row


def training_rows(shape: Shape, count: int) -> list[Row]:
    return _rows(shape.vocabulary, SEED, count)


def held_out_rows(shape: Shape) -> list[Row]:
    return _rows(shape.vocabulary, SEED + 1, HELD_OUT)


def training_pairs(shape: Shape, count: int) -> list[Pair]:
    return _pairs(shape.vocabulary, SEED + 2, count)


def held_out_pairs(shape: Shape) -> list[Pair]:
    return _pairs(shape.vocabulary, SEED + 3, HELD_OUT)


def gpu_rows(shape: GpuShape, length: int) -> list[Row]:
    """Enough for every step and a few more: packed sequences are not quite full."""
    wanted = int((WARM_STEPS + shape.timed_steps + 2) * shape.step_tokens * 1.1)
    count = 8
    while tokens_in(rows := _rows(shape.vocabulary, SEED, count, min(ROW_LENGTH_MEDIAN, length // 4), length)) < wanted:
        count *= 2
    return rows


def rows_of(pairs: Iterable[Pair]) -> list[Row]:
    return [row for pair in pairs for row in (pair.preferred, pair.other)]


def tokens_in(rows: Iterable[Row]) -> int:
    return sum(len(row.ids) for row in rows)


def labels_in(rows: Iterable[Row]) -> int:
    """The first token of a row is never predicted."""
    return sum(label != IGNORED for row in rows for label in row.labels[1:])


def require_same_tokens(side: str, rows: list[Row], *, tokens: int, labels: int | None = None) -> None:
    """Raises ValueError when a side read anything but `rows`; `labels` is None where a side does not say."""
    expected = {"tokens": tokens_in(rows)}
    found = {"tokens": tokens}
    if labels is not None:
        expected["labels"], found["labels"] = labels_in(rows), labels
    if found != expected:
        raise ValueError(f"{side} reads other tokens than the other sides: {found} instead of {expected}")


def _rows(
    vocabulary: int, seed: int, count: int, typical: int = LENGTH_MEDIAN, longest: int = CONTEXT_LENGTH
) -> list[Row]:
    """Words follow Zipf's law, and every second word repeats what stood a little before it, so that there is something
    to learn for the embeddings and for the attention."""
    dice = np.random.default_rng(seed)
    words = vocabulary - _SPECIAL
    share = 1.0 / np.arange(1, words + 1)
    share /= share.sum()
    rows = []
    for _ in range(count):
        length = int(np.clip(dice.lognormal(np.log(typical), LENGTH_SIGMA), LENGTH_MIN, longest))
        ids = dice.choice(words, length - 1, p=share) + _SPECIAL
        ids[4::2] = ids[1:-3:2][: len(ids[4::2])]
        prompt = max(1, int(length * dice.uniform(*PROMPT_SHARE)))
        rows.append(_row(ids.tolist(), prompt))
    return rows


def _pairs(vocabulary: int, seed: int, count: int) -> list[Pair]:
    """The other answer is about as long, and of words that are all equally likely: easy to tell apart."""
    dice = np.random.default_rng(seed)
    pairs = []
    for preferred in _rows(vocabulary, seed, count):
        prompt = preferred.prompt_length
        answer = len(preferred.ids) - prompt
        length = int(np.clip(answer * dice.uniform(0.7, 1.3), 2, CONTEXT_LENGTH - prompt))
        words = dice.integers(_SPECIAL, vocabulary, length - 1).tolist()
        pairs.append(Pair(preferred=preferred, other=_row(preferred.ids[:prompt] + words, prompt)))
    return pairs


def _row(words: list[int], prompt: int) -> Row:
    tokens = [*words, END_ID]
    return Row(ids=tokens, labels=[IGNORED] * prompt + tokens[prompt:])


def prompt_text(row: Row) -> str:
    return _text(row.ids[: row.prompt_length])


def answer_text(row: Row) -> str:
    """Without its end."""
    return _text(row.ids[row.prompt_length : -1])


def _text(ids: list[int]) -> str:
    return " ".join(f"w{token}" for token in ids)


def write_rows(rows: list[Row], path: Path) -> None:
    """As users write them: prompt and completion in words."""
    _write_lines(path, ({"prompt": prompt_text(row), "completion": " " + answer_text(row)} for row in rows))


def write_pairs(pairs: list[Pair], path: Path) -> None:
    _write_lines(
        path,
        (
            {
                "input": {"messages": [{"role": "user", "content": prompt_text(pair.preferred)}]},
                "preferred_output": [{"role": "assistant", "content": answer_text(pair.preferred)}],
                "non_preferred_output": [{"role": "assistant", "content": answer_text(pair.other)}],
            }
            for pair in pairs
        ),
    )


def _write_lines(path: Path, documents: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")


def write_tokenizer(vocabulary: int, context_length: int, folder: Path) -> None:
    """One word, one token."""
    names = {PAD: PAD_ID, BEGIN: BEGIN_ID, END: END_ID} | {
        f"w{number}": number for number in range(_SPECIAL, vocabulary)
    }
    tokenizer = Tokenizer(models.WordLevel(names, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BEGIN,
        "eos_token": END,
        "model_max_length": context_length,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
