"""The engine's greedy answers are held to the trained module, token for token and up to their end."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from services.trainer.train.data.tokens.token_rows import TokenRows
from services.trainer.train.export.greedy_answers import (
    ANSWER_TOKENS_MAX,
    ANSWERS_MAX,
    MORE_TOKENS,
    Answer,
    AnswersDiffer,
    Question,
    compare_answers,
    questions_of,
)

VOCABULARY = 16
END = 3
QUESTION = Question(row=4, ids=[1, 9], tokens_max=6)


def counting(input_ids: Any, use_cache: bool) -> Any:
    """Says the token after the last one; likes the one after that nearly as much."""
    following = torch.nn.functional.one_hot((input_ids + 1) % VOCABULARY, VOCABULARY)
    second = torch.nn.functional.one_hot((input_ids + 2) % VOCABULARY, VOCABULARY)
    return SimpleNamespace(logits=5.0 * following + 4.995 * second)


def compare(*ids: int, stopped: bool, gap_max: float = 1e-3, ends: frozenset[int] = frozenset({END})) -> Any:
    answers = [Answer(ids=list(ids), stopped=stopped)]
    return compare_answers(counting, [QUESTION], answers, ends=ends, gap_max=gap_max, device="cpu")


def test_what_the_trained_module_would_say_is_right() -> None:
    report = compare(10, 11, 12, stopped=True, ends=frozenset({12}))
    assert (report.answers, report.tokens, report.ended, report.largest_gap) == (1, 3, 1, 0.0)
    cut = compare(10, 11, 12, 13, 14, 15, stopped=False)
    assert (cut.tokens, cut.ended) == (6, 0)


def test_another_token_is_another_answer_unless_both_are_as_likely() -> None:
    with pytest.raises(AnswersDiffer, match=r"row 4 .* says token 12 at place 1 .* trained module says 11 \(0\.005 "):
        compare(10, 12, 13, 14, 15, 0, stopped=False)
    assert compare(10, 12, 13, 14, 15, 0, stopped=False, gap_max=1e-2).largest_gap == pytest.approx(0.005, abs=1e-4)
    with pytest.raises(AnswersDiffer, match="says token 7 at place 0"):
        compare(7, 8, 9, 10, 11, 12, stopped=False, gap_max=1.0)


@pytest.mark.parametrize(
    ("ids", "stopped", "words"),
    [
        ((10, 11, 12), True, "ended its answer with token 12, which ends none in training"),
        (
            (10, END, 4, 5, 6, 7),
            False,
            "goes on behind token 3, which ends a trained answer: it said 6 tokens, .* has 2",
        ),
        ((10, 11, END), False, "did not end its answer with token 3, which ends every one"),
        ((10, 11), False, "said 2 of 6 tokens and no end"),
        ((), False, "said 0 of 6 tokens"),
        ((), True, "said 0 of 6 tokens"),
    ],
)
def test_an_answer_ends_where_training_ends_it_and_nowhere_else(
    ids: tuple[int, ...], stopped: bool, words: str
) -> None:
    with pytest.raises(AnswersDiffer, match=words):
        compare(*ids, stopped=stopped)


def test_no_number_is_no_agreement() -> None:
    def broken(input_ids: Any, use_cache: bool) -> Any:
        return SimpleNamespace(logits=torch.full((*input_ids.shape, VOCABULARY), float("nan")))

    answers = [Answer(ids=[10] * 6, stopped=False)]
    with pytest.raises(AnswersDiffer):
        compare_answers(broken, [QUESTION], answers, ends={END}, gap_max=1e9, device="cpu")


def rows_of(*lengths: tuple[int, int]) -> TokenRows:
    """Rows of a question and an answer of these lengths."""
    marks = [np.repeat([False, True], length) for length in lengths]
    total = sum(len(mark) for mark in marks)
    return TokenRows(
        ids=np.arange(total, dtype=np.int32),
        labelled=np.concatenate(marks),
        offsets=np.cumsum([0, *(len(mark) for mark in marks)]).astype(np.int64),
        rows=len(lengths),
        truncated_rows=0,
        skipped_rows=0,
        longest_row_tokens=max(map(sum, lengths)),
    )


def test_the_shortest_answers_are_asked_for_within_the_context() -> None:
    rows = rows_of((5, 9), (3, 4), (4, 2), (6, 100), (30, 1))
    asked = questions_of(rows, range(5), context_tokens=28)
    assert len(asked) == ANSWERS_MAX
    assert [(each.row, each.tokens_max) for each in asked] == [(2, 2 + MORE_TOKENS), (1, 4 + MORE_TOKENS)]
    assert asked[0].ids == list(range(21, 25))
    (long,) = questions_of(rows, [3], context_tokens=500)
    assert long.tokens_max == ANSWER_TOKENS_MAX
    # A question that fills the context has no answer.
    assert questions_of(rows, [4], context_tokens=30) == []


def test_the_question_of_a_long_row_reaches_to_its_last_answer() -> None:
    rows = rows_of((2, 3))
    twice = replace(
        rows, ids=np.tile(rows.ids, 2), labelled=np.tile(rows.labelled, 2), offsets=np.array([0, 10], np.int64)
    )
    (asked,) = questions_of(twice, [0], context_tokens=99)
    assert (asked.ids, asked.tokens_max) == ([0, 1, 2, 3, 4, 0, 1], 3 + MORE_TOKENS)
