"""What the parity gate found: two scorers compared token by token, the verdict in words, and the report.

It knows no model, no file and no engine.
"""

import json
import math
from dataclasses import asdict, dataclass

from services.trainer.train.data.tokens.token_rows import TokenRows
from services.trainer.train.export.greedy_answers import AnswerReport

# In reduced precision: weights whose scores are so much nearer to the base's than to the trained module's have lost
# what was learned, however little that was. Fewer tokens do not tell it from the noise of their sums.
TIMES_NEARER_TO_BASE = 2.0
TOKENS_TO_TELL = 16
EXPORTED, MERGED, ENGINE = "exported", "merged", "engine"


@dataclass(frozen=True, kw_only=True)
class Diverging:
    """A token whose log-probabilities (nats) are further apart than the tolerance: `row` counts the kept rows of the
    file from 0, `position` the tokens of the row."""

    row: int
    position: int
    token_id: int
    trained: float
    scored: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The trained module beside one other scorer, over `tokens` labelled tokens. `mean_from_base` is the scorer's mean
    difference from the base, the trained module with its adapter off; None in float32, where any token tells."""

    tokens: int
    max_abs_difference: float
    mean_abs_difference: float
    mean_from_base: float | None
    tolerance: float
    first_diverging: Diverging | None


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """`max_abs_difference` and `mean_abs_difference` are the largest of all comparisons, in nats. `refused` says which
    scorer does not take this kind of model, and why. A refusal proves nothing, and it is no difference. `answers` are
    those of the engine, None where it was not asked."""

    rows: int
    tokens: int
    max_abs_difference: float
    mean_abs_difference: float
    tolerance: float
    comparisons: dict[str, Comparison]
    refused: dict[str, str]
    answers: AnswerReport | None = None


@dataclass(frozen=True, kw_only=True)
class LabelledToken:
    """A token of a row that carries loss."""

    row: int
    position: int
    token_id: int


def labelled_tokens(rows: TokenRows, row: int) -> list[LabelledToken]:
    ids, labelled = rows.row(row)
    # The first token of a row is never predicted.
    return [
        LabelledToken(row=row, position=position, token_id=int(ids[position]))
        for position in range(1, len(ids))
        if labelled[position]
    ]


def compare(
    tokens: list[LabelledToken],
    trained: list[float],
    scored: list[float | None],
    base: list[float] | None,
    tolerance: float,
) -> Comparison:
    """Tokens that the other one could not score (None) are left out."""
    pairs = [
        (token, ours, theirs) for token, ours, theirs in zip(tokens, trained, scored, strict=True) if theirs is not None
    ]
    # NaN differs from everything; max() alone would pass over it.
    differences = [math.inf if math.isnan(ours - theirs) else abs(ours - theirs) for _, ours, theirs in pairs]
    from_base = [
        abs(before - theirs)
        for before, theirs in zip(base or [], scored, strict=base is not None)
        if theirs is not None
    ]
    first = next(
        (
            Diverging(**asdict(token), trained=ours, scored=theirs)
            for (token, ours, theirs), difference in zip(pairs, differences, strict=True)
            if difference > tolerance
        ),
        None,
    )
    return Comparison(
        tokens=len(pairs),
        max_abs_difference=max(differences, default=math.inf),
        mean_abs_difference=sum(differences) / len(pairs) if pairs else math.inf,
        mean_from_base=sum(from_base) / len(from_base) if from_base else None,
        tolerance=tolerance,
        first_diverging=first,
    )


def report_of(rows: int, comparisons: dict[str, Comparison], refused: dict[str, str]) -> ParityReport:
    return ParityReport(
        rows=rows,
        tokens=comparisons[EXPORTED].tokens,
        max_abs_difference=max(comparison.max_abs_difference for comparison in comparisons.values()),
        mean_abs_difference=max(comparison.mean_abs_difference for comparison in comparisons.values()),
        tolerance=comparisons[EXPORTED].tolerance,
        comparisons=comparisons,
        refused=refused,
    )


def held_by_mean(name: str, *, exact: bool, on_gpu: bool, own_kernels: bool) -> bool:
    """In reduced precision a sum in another order moves single tokens; a broken model moves the mean. The export is
    loaded with torch's usual kernels: where the trained module has its own, its sums have another order, too. On a GPU
    the engine's attention multiplies even float32 in reduced precision (TF32)."""
    if name == ENGINE:
        return on_gpu or not exact
    return not exact and (name == MERGED or own_kernels)


def resembles_base(name: str, comparison: Comparison) -> bool:
    """Whether what was learned got lost where the tolerance is too wide to show it. A merge rounds to the grid of 16
    bits: there a weak training may be truly lost, and none of its files is wrong."""
    from_base = comparison.mean_from_base
    if name == MERGED or from_base is None or comparison.tokens < TOKENS_TO_TELL:
        return False
    return comparison.mean_abs_difference > TIMES_NEARER_TO_BASE * from_base


def verdict(name: str, comparison: Comparison, measured: float) -> str:
    first = comparison.first_diverging
    where = f"; the first is token {first.position} of row {first.row} (id {first.token_id})" if first else ""
    return (
        f"the {name} weights score {comparison.tokens} tokens up to {measured:.3g} nats apart from the trained module; "
        f"the tolerance is {comparison.tolerance:.3g}{where}"
    )


def verdict_of_base(name: str, comparison: Comparison) -> str:
    return (
        f"the {name} weights score {comparison.tokens} tokens as the base does: {comparison.mean_from_base:.3g} nats "
        f"apart from it in "
        f"the mean, and {comparison.mean_abs_difference:.3g} from the trained module"
    )


def details(report: ParityReport) -> dict[str, str]:
    """One short text per comparison."""
    facts = {f"parity.{name}": json.dumps(asdict(comparison)) for name, comparison in report.comparisons.items()}
    facts |= {f"parity.{name}": f"refused: {why}" for name, why in report.refused.items()}
    return facts | {"parity.rows": str(report.rows), "parity.tokens": str(report.tokens)}
