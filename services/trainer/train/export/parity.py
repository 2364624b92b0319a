"""The gate before success: exported weights must give held-out rows the log-probabilities of the trained module.

The trained module is compared with the exported files, freshly loaded by plain transformers and peft; with the adapter
merged into its base; and with the node's serving engine where it has one (engine_scorer.py). It knows no training loop.
"""

import gc
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from services.trainer.train.data.batches.micro_batch import micro_batches
from services.trainer.train.data.packing.shuffle import epoch_order
from services.trainer.train.data.tokens.token_rows import TokenRows
from services.trainer.train.export.engine_scorer import EngineSays, ask_engine
from services.trainer.train.export.greedy_answers import Answer, AnswersDiffer, Question, compare_answers, questions_of
from services.trainer.train.export.parity_report import (
    ENGINE,
    EXPORTED,
    MERGED,
    ParityReport,
    compare,
    details,
    held_by_mean,
    labelled_tokens,
    report_of,
    resembles_base,
    verdict,
    verdict_of_base,
)
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
# Where single tokens move with the order of a sum, another token is another answer from this difference on, in nats.
ANSWER_GAP_REDUCED = 1.0
TOO_LARGE_FOR_ENGINE = (
    "the weights are spread over several devices, which hold them still, and the engine would start on one"
)
T = TypeVar("T")


def check_parity(
    model: CausalModel, spec: Spec, export: Path, rows: TokenRows, *, ends: Collection[int], leads: bool = True
) -> ParityReport | None:
    """Raises Failure(platform, PARITY_FAILED) past the tolerance, with the report in its details. `ends` are the tokens
    that end an answer of the trained module. A process that does not lead may hold a part of that: it helps to score it
    and gets None."""
    sample = sorted(epoch_order(spec.seed, 0, rows.count)[: spec.parity_rows].tolist())
    tokens = [token for row in sample for token in labelled_tokens(rows, row)]
    dtype = model.head_weight.dtype
    exact = dtype == torch.float32
    refused: dict[str, str] = {}
    scored: dict[str, list[float | None]] = {}
    # What declares no context is served by no engine.
    context_tokens = getattr(model.base.config.get_text_config(), "max_position_embeddings", 0)
    questions = questions_of(rows, sample, context_tokens)
    answers: list[Answer] = []
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
        said: EngineSays | str = TOO_LARGE_FOR_ENGINE
        if not _is_sharded(model.module):
            said = ask_engine(spec, export, [rows.row(row)[0].tolist() for row in sample], questions)
        if isinstance(said, str):
            refused[ENGINE] = said
        else:
            answers = said.answers
            by_row = dict(zip(sample, said.log_probs, strict=True))
            scored[ENGINE] = [by_row[token.row][token.position] for token in tokens]
    report = report_of(
        len(sample),
        {
            name: compare(tokens, trained, scores, base, _tolerance(spec, name, exact=exact))
            for name, scores in scored.items()
        },
        refused,
    )
    for name, comparison in report.comparisons.items():
        own_kernels = bool(model.kernels) or place != model.device
        by_mean = held_by_mean(name, exact=exact, on_gpu=on_cuda(model.device), own_kernels=own_kernels)
        measured = comparison.mean_abs_difference if by_mean else comparison.max_abs_difference
        if measured > comparison.tolerance:
            raise platform_failure("PARITY_FAILED", verdict(name, comparison, measured), details(report))
        if resembles_base(name, comparison):
            raise platform_failure("PARITY_FAILED", verdict_of_base(name, comparison), details(report))
    return _with_answers(report, model, spec, questions, answers, ends) if answers else report


def _with_answers(
    report: ParityReport,
    model: CausalModel,
    spec: Spec,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    ends: Collection[int],
) -> ParityReport:
    exact = model.head_weight.dtype == torch.float32
    by_mean = held_by_mean(ENGINE, exact=exact, on_gpu=on_cuda(model.device), own_kernels=bool(model.kernels))
    gap_max = max(2 * _tolerance(spec, ENGINE, exact=exact), ANSWER_GAP_REDUCED if by_mean else 0.0)
    # The engine has left the device.
    module = model.module.to(model.device)
    try:
        with full_precision(model.device):
            told = compare_answers(module, questions, answers, ends=ends, gap_max=gap_max, device=model.device)
    except AnswersDiffer as difference:
        message = f"the engine answers otherwise: {difference}"
        raise platform_failure("PARITY_FAILED", message, details(report)) from None
    return replace(report, answers=told)


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


def _tolerance(spec: Spec, name: str, *, exact: bool) -> float:
    if spec.parity_tolerance is not None:
        return spec.parity_tolerance
    if not exact:
        return TOLERANCE_REDUCED
    return TOLERANCE_FLOAT32_ENGINE if name == ENGINE else TOLERANCE_FLOAT32
