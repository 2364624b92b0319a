"""The gate before success: exported weights must give held-out rows the log-probabilities of the trained module.

The trained module is compared with the exported files, freshly loaded by plain transformers and peft; with the adapter
merged into its base; and with the node's serving engine where it has one (engine_scorer.py). It knows no training loop.
"""

import gc
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from services.trainer.train.data.batches.micro_batch import micro_batches
from services.trainer.train.data.packing.shuffle import epoch_order
from services.trainer.train.data.tokens.token_rows import TokenRows
from services.trainer.train.export.engine_scorer import score_outside
from services.trainer.train.memory.out_of_memory import is_out_of_memory, release
from services.trainer.train.modeling.attention import plain_attention
from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.modeling.kernels import full_precision, on_cuda
from services.trainer.train.settings.failures import platform_failure
from services.trainer.train.settings.spec import Spec

TOLERANCE_FLOAT32 = 1e-3
TOLERANCE_REDUCED = 0.1
# Another engine sums in another order, through kernels of its own.
TOLERANCE_FLOAT32_ENGINE = 5e-3
# In reduced precision: weights whose scores are so much nearer to the base's than to the trained module's have lost
# what was learned, however little that was. Fewer tokens do not tell it from the noise of their sums.
TIMES_NEARER_TO_BASE = 2.0
TOKENS_TO_TELL = 16
EXPORTED, MERGED, ENGINE = "exported", "merged", "engine"
TOO_LARGE_FOR_ENGINE: list[list[float | None]] | str = (
    "the weights are spread over several devices, which hold them still, and the engine would start on one"
)
T = TypeVar("T")


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
    scorer does not take this kind of model, and why. A refusal proves nothing, and it is no difference."""

    rows: int
    tokens: int
    max_abs_difference: float
    mean_abs_difference: float
    tolerance: float
    comparisons: dict[str, Comparison]
    refused: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class _Token:
    row: int
    position: int
    token_id: int


def check_parity(
    model: CausalModel, spec: Spec, export: Path, rows: TokenRows, *, leads: bool = True
) -> ParityReport | None:
    """Raises Failure(platform, PARITY_FAILED) past the tolerance, with the report in its details. A process that does
    not lead may hold a part of the trained module: it helps to score it and gets None."""
    sample = sorted(epoch_order(spec.seed, 0, rows.count)[: spec.parity_rows].tolist())
    tokens = [token for row in sample for token in _labelled_tokens(rows, row)]
    dtype = model.head_weight.dtype
    exact = dtype == torch.float32
    refused: dict[str, str] = {}
    scored: dict[str, list[float | None]] = {}
    model.module.eval()
    with torch.no_grad(), full_precision(model.device):
        trained = _scores(model.module, rows, sample, model.device)
        base = None if exact else _scores_of_base(model, rows, sample)
        if not leads:
            return None
        found, place = where_it_fits(lambda at: _score_export(spec, export, dtype, rows, sample, at), model.device)
        scored |= found
    if spec.parity_command:
        # The engine wants memory, too, and nothing is left for the trained module to do.
        release_device(model.module)
        answer = TOO_LARGE_FOR_ENGINE
        if not _is_sharded(model.module):
            answer = score_outside(spec, export, [rows.row(row)[0].tolist() for row in sample])
        if isinstance(answer, str):
            refused[ENGINE] = answer
        else:
            by_row = dict(zip(sample, answer, strict=True))
            scored[ENGINE] = [by_row[token.row][token.position] for token in tokens]
    report = _report(
        len(sample),
        {
            name: _compare(tokens, trained, scores, base, _tolerance(spec, name, exact=exact))
            for name, scores in scored.items()
        },
        refused,
    )
    for name, comparison in report.comparisons.items():
        own_kernels = bool(model.kernels) or place != model.device
        by_mean = held_by_mean(name, exact=exact, on_gpu=on_cuda(model.device), own_kernels=own_kernels)
        measured = comparison.mean_abs_difference if by_mean else comparison.max_abs_difference
        if measured > comparison.tolerance:
            raise platform_failure("PARITY_FAILED", _verdict(name, comparison, measured), _details(report))
        if resembles_base(name, comparison):
            raise platform_failure("PARITY_FAILED", _verdict_of_base(name, comparison), _details(report))
    return report


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


def release_device(module: Any) -> None:
    """Moves this module to the machine's memory, so that other processes can use the GPU. A module that is sharded
    stays: its peers do not expect it to move."""
    if next(module.parameters()).device.type == "cuda" and not _is_sharded(module):
        module.to("cpu")
        gc.collect()
        torch.cuda.empty_cache()


def where_it_fits(score: Callable[[str], T], device: str) -> tuple[T, str]:
    """The result of `score` on the device, or in the machine's memory when the device has no room, and where it was
    computed. A sharded run may train a model that no single device takes."""
    try:
        return score(device), device
    except (RuntimeError, MemoryError) as error:
        if device == "cpu" or not is_out_of_memory(error):
            raise
    release()
    return score("cpu"), "cpu"


def _score_export(
    spec: Spec, export: Path, dtype: Any, rows: TokenRows, sample: list[int], device: str
) -> dict[str, list[float | None]]:
    exported = _load_export(spec, export, dtype, device)
    scored: dict[str, list[float | None]] = {EXPORTED: [*_scores(exported, rows, sample, device)]}
    if isinstance(exported, PeftModel):
        scored[MERGED] = [*_scores(exported.merge_and_unload(), rows, sample, device)]
    return scored


def _is_sharded(module: Any) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def _labelled_tokens(rows: TokenRows, row: int) -> list[_Token]:
    ids, labelled = rows.row(row)
    # The first token of a row is never predicted.
    return [
        _Token(row=row, position=position, token_id=int(ids[position]))
        for position in range(1, len(ids))
        if labelled[position]
    ]


def _load_export(spec: Spec, export: Path, dtype: Any, device: str) -> Any:
    """As any user would load it, with the attention that the family was made with: nothing else of the engine takes
    part."""
    folder = str(export) if spec.training.type == "full" else spec.base_model.directory
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    module = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=plain_attention(config),
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
    )
    if spec.training.type == "lora":
        module = PeftModel.from_pretrained(module, str(export))
    return module.to(device).eval()


def _scores(module: Any, rows: TokenRows, sample: list[int], device: str) -> list[float]:
    """Log-probability of every labelled token, one row at a time through the module's own forward."""
    scores: list[float] = []
    for index in sample:
        (batch,) = micro_batches(rows, [index], tokens_max=1, layout="padded", device=device)
        logits = module(input_ids=batch.input_ids, use_cache=False).logits
        table = torch.log_softmax(logits.flatten(0, 1).index_select(0, batch.label_places).float(), dim=-1)
        scores += table.gather(1, batch.label_ids[:, None]).squeeze(1).tolist()
    return scores


def _scores_of_base(model: CausalModel, rows: TokenRows, sample: list[int]) -> list[float]:
    """Scores of the base under the adapter. Only a run with an adapter is ever in reduced precision, so there is one to
    switch off."""
    with model.module.disable_adapter():
        return _scores(model.module, rows, sample, model.device)


def _compare(
    tokens: list[_Token],
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


def _report(rows: int, comparisons: dict[str, Comparison], refused: dict[str, str]) -> ParityReport:
    return ParityReport(
        rows=rows,
        tokens=comparisons[EXPORTED].tokens,
        max_abs_difference=max(comparison.max_abs_difference for comparison in comparisons.values()),
        mean_abs_difference=max(comparison.mean_abs_difference for comparison in comparisons.values()),
        tolerance=comparisons[EXPORTED].tolerance,
        comparisons=comparisons,
        refused=refused,
    )


def _tolerance(spec: Spec, name: str, *, exact: bool) -> float:
    if spec.parity_tolerance is not None:
        return spec.parity_tolerance
    if not exact:
        return TOLERANCE_REDUCED
    return TOLERANCE_FLOAT32_ENGINE if name == ENGINE else TOLERANCE_FLOAT32


def _verdict(name: str, comparison: Comparison, measured: float) -> str:
    first = comparison.first_diverging
    where = f"; the first is token {first.position} of row {first.row} (id {first.token_id})" if first else ""
    return (
        f"the {name} weights score {comparison.tokens} tokens up to {measured:.3g} nats apart from the trained module; "
        f"the tolerance is {comparison.tolerance:.3g}{where}"
    )


def _verdict_of_base(name: str, comparison: Comparison) -> str:
    return (
        f"the {name} weights score {comparison.tokens} tokens as the base does: {comparison.mean_from_base:.3g} nats "
        f"apart from it in "
        f"the mean, and {comparison.mean_abs_difference:.3g} from the trained module"
    )


def _details(report: ParityReport) -> dict[str, str]:
    """One short text per comparison."""
    facts = {f"parity.{name}": json.dumps(asdict(comparison)) for name, comparison in report.comparisons.items()}
    facts |= {f"parity.{name}": f"refused: {why}" for name, why in report.refused.items()}
    return facts | {"parity.rows": str(report.rows), "parity.tokens": str(report.tokens)}
