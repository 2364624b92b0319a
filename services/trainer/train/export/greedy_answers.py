"""Whether the engine answers as the trained module would: greedy, token for token, up to the token that ends the turn.

The engine answers first. One pass of the trained module over question and answer then shows what it would have said at
each place. It knows no files and no tolerance of scores.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from services.trainer.train.data.tokens.token_rows import TokenRows

ANSWERS_MAX = 2
ANSWER_TOKENS_MAX = 64
# Behind the length of the row's own answer, for a model that says it in other words.
MORE_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Question:
    """A row up to its last answer. The engine is to say at most `tokens_max` tokens."""

    row: int
    ids: list[int]
    tokens_max: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """`ids` hold the token that ended it, where one did (`stopped`)."""

    ids: list[int]
    stopped: bool


@dataclass(frozen=True, kw_only=True)
class AnswerReport:
    """Of greedy answers by the engine: how many, with how many tokens, and how many of them came to their end.
    `largest_gap` is the most (in nats) by which the trained module preferred another token to one of them."""

    answers: int
    tokens: int
    ended: int
    largest_gap: float


class AnswersDiffer(Exception):
    """The text says where, and what the trained module would have said."""


def questions_of(rows: TokenRows, sample: Iterable[int], context_tokens: int) -> list[Question]:
    """At most ANSWERS_MAX of the sampled rows: those whose last answers are the shortest and end soonest."""
    found = []
    for row in sample:
        ids, labelled = rows.row(row)
        end = len(labelled) - int(labelled[::-1].argmax())
        unlabelled = (~labelled[:end]).nonzero()[0]
        begins = int(unlabelled[-1]) + 1
        tokens_max = min(end - begins + MORE_TOKENS, ANSWER_TOKENS_MAX, context_tokens - begins)
        if tokens_max > 0:
            found.append(Question(row=row, ids=ids[:begins].tolist(), tokens_max=tokens_max))
    return sorted(found, key=lambda question: (question.tokens_max, len(question.ids)))[:ANSWERS_MAX]


def compare_answers(
    module: Any,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    *,
    ends: Collection[int],
    gap_max: float,
    device: str,
) -> AnswerReport:
    """Raises AnswersDiffer where the trained module prefers another token by more than `gap_max` nats, or where the
    answer goes on behind a token that ends it, or ends without one."""
    largest = 0.0
    for question, answer in zip(questions, answers, strict=True):
        _check_end(question, answer, ends)
        ids = torch.tensor([[*question.ids, *answer.ids]], device=device)
        with torch.no_grad():
            logits = module(input_ids=ids[:, :-1], use_cache=False).logits[0, len(question.ids) - 1 :]
        scores = torch.log_softmax(logits.float(), dim=-1)
        best, preferred = scores.max(dim=-1)
        gaps = best - scores.gather(1, ids[0, len(question.ids) :, None]).squeeze(1)
        # NaN is no gap that could be allowed.
        wrong = (~(gaps <= gap_max)).nonzero()
        if len(wrong):
            at = int(wrong[0])
            raise AnswersDiffer(
                f"to row {question.row} the engine says token {answer.ids[at]} at place {at} of its answer, where the "
                f"trained module says {int(preferred[at])} ({float(gaps[at]):.3g} nats more likely)"
            )
        largest = max(largest, float(gaps.max()))
    return AnswerReport(
        answers=len(answers),
        tokens=sum(len(answer.ids) for answer in answers),
        ended=sum(answer.stopped for answer in answers),
        largest_gap=largest,
    )


def _check_end(question: Question, answer: Answer, ends: Collection[int]) -> None:
    over = next((at for at, token_id in enumerate(answer.ids[:-1]) if token_id in ends), None)
    if over is not None:
        raise AnswersDiffer(
            f"to row {question.row} the engine goes on behind token {answer.ids[over]}, which ends a trained answer: "
            f"it said {len(answer.ids)} tokens, and the answer has {over + 1}"
        )
    if answer.ids and answer.stopped != (answer.ids[-1] in ends):
        how = "ended its answer with" if answer.stopped else "did not end its answer with"
        does = "ends none" if answer.stopped else "ends every one"
        raise AnswersDiffer(f"to row {question.row} the engine {how} token {answer.ids[-1]}, which {does} in training")
    if not answer.ids or (not answer.stopped and len(answer.ids) < question.tokens_max):
        raise AnswersDiffer(
            f"to row {question.row} the engine said {len(answer.ids)} of {question.tokens_max} tokens and no end"
        )
