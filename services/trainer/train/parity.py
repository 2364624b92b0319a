"""The gate before success: the trained module and the exported files, freshly loaded by plain transformers and peft, must give
the same log-probabilities. It knows no training loop."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from services.trainer.train.batches import IGNORED, micro_batches
from services.trainer.train.failures import platform_failure
from services.trainer.train.model import CausalModel
from services.trainer.train.order import epoch_order
from services.trainer.train.spec import Spec
from services.trainer.train.tokens import TokenRows

TOLERANCE_FLOAT32 = 1e-3
TOLERANCE_REDUCED = 0.1


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """Differences of log-probabilities in nats over `tokens` labelled tokens of `rows` rows."""

    rows: int
    tokens: int
    max_abs_difference: float
    mean_abs_difference: float
    tolerance: float


def check_parity(model: CausalModel, spec: Spec, export: Path, rows: TokenRows) -> ParityReport:
    """Raises Failure(platform, PARITY_FAILED) past the tolerance."""
    sample = sorted(epoch_order(spec.seed, 0, rows.count)[: spec.parity_rows].tolist())
    dtype = model.head_weight.dtype
    model.module.eval()
    with torch.no_grad():
        trained = _scores(model.module, rows, sample, model.device)
        exported = _scores(_load_export(spec, export, dtype, model.device), rows, sample, model.device)
    difference = (trained - exported).abs()
    report = ParityReport(
        rows=len(sample),
        tokens=len(difference),
        max_abs_difference=difference.max().item(),
        mean_abs_difference=difference.mean().item(),
        tolerance=spec.parity_tolerance or (TOLERANCE_FLOAT32 if dtype == torch.float32 else TOLERANCE_REDUCED),
    )
    # Written so that NaN fails, too.
    if not report.max_abs_difference <= report.tolerance:
        raise platform_failure(
            "PARITY_FAILED",
            f"the exported weights score {report.tokens} tokens up to {report.max_abs_difference:.3g} nats apart from "
            f"the trained module; the tolerance is {report.tolerance:.3g}",
        )
    return report


def _load_export(spec: Spec, export: Path, dtype: Any, device: str) -> Any:
    """As any user would load it: nothing of the engine takes part."""
    folder = str(export) if spec.training.type == "full" else spec.base_model.directory
    module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, local_files_only=True
    )
    if spec.training.type == "lora":
        module = PeftModel.from_pretrained(module, str(export))
    return module.to(device).eval()


def _scores(module: Any, rows: TokenRows, sample: list[int], device: str) -> Any:
    """Log-probability of every labelled token, one row at a time through the module's own forward."""
    scores = []
    for index in sample:
        (batch,) = micro_batches(rows, [index], tokens_max=1, layout="padded", device=device)
        logits = module(input_ids=batch.input_ids, use_cache=False).logits
        chosen = batch.targets != IGNORED
        table = torch.log_softmax(logits[chosen].float(), dim=-1)
        scores.append(table.gather(1, batch.targets[chosen][:, None]).squeeze(1))
    return torch.cat(scores).cpu()
