"""The kernels of a loaded model on a CUDA device: attention by row (attention.py), liger-kernel, reduced precision,
compilation.

On a CPU every function here leaves things as they are. The choices by device, type and installed packages were tested
there, and flex attention without its kernel; the CUDA kernels themselves were not run. It knows no data and no loss.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import masking_utils

from services.trainer.train.modeling.attention import attention_for, is_installed

# Full weights stay float32 and are multiplied in this type, which tensor cores take.
AUTOCAST_DTYPE = torch.bfloat16
# Products of float32 that are left, the vocabulary head among them, go through TF32; it is as repeatable as float32.
MATMUL_PRECISION = "high"


def on_cuda(device: str) -> bool:
    return device.startswith("cuda")


def use_kernels(base: Any, device: str, dtype: Any) -> tuple[str, ...]:
    """Gives the model the fastest kernels that it and this machine have; returns the names of those that are not
    torch's usual ones, none on a CPU."""
    if not on_cuda(device):
        return ()
    attention = attention_for(base.config, device, dtype)
    base.set_attn_implementation(attention)
    names = () if attention in ("sdpa", "eager") else (attention,)
    return (*names, "liger") if use_liger(base, device) else names


def use_liger(base: Any, device: str) -> bool:
    """Norms and MLPs of this instance by liger-kernel, where it is installed and knows the family. Its losses stay out:
    ours takes hidden states. Its rotary embedding stays out, too: it can only be put into the code of a family as a
    whole, and with it into the export that the trained module is proven against."""
    if not on_cuda(device) or not is_installed("liger_kernel"):
        return False
    liger = importlib.import_module("liger_kernel.transformers.monkey_patch")
    if base.config.model_type not in liger.MODEL_TYPE_TO_APPLY_LIGER_FN:
        return False
    # Adapters of experts are put on fused weights (3 dimensions), which liger's experts would read past them.
    mlp = all(parameter.ndim < 3 for parameter in base.parameters())
    with _family_code_kept(base):
        liger._apply_liger_kernel_to_instance(
            model=base, rms_norm=True, swiglu=mlp, geglu=mlp, rope=False, cross_entropy=False,
            fused_linear_cross_entropy=False
        )  # fmt: skip
    return True


def reduced_precision(device: str, *, wanted: bool) -> Any:
    """A context in which float32 weights are multiplied in AUTOCAST_DTYPE; a weight is met once a pass, so none is
    remembered."""
    if not wanted:
        return nullcontext()
    return torch.autocast(torch.device(device).type, AUTOCAST_DTYPE, cache_enabled=False)


def allow_tensor_cores(device: str) -> None:
    if on_cuda(device):
        torch.set_float32_matmul_precision(MATMUL_PRECISION)


@contextmanager
def rows_known(row_numbers: Any | None) -> Iterator[None]:
    """transformers reads from the device in every pass whether positions start anew somewhere. The engine laid the rows
    out and knows. Within this context transformers gets `row_numbers`, [1, length]: the row that each token is in, or
    None where no line has more than one row."""
    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda _position_ids: row_numbers
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before


@contextmanager
def full_precision(device: str) -> Iterator[None]:
    """For comparing two modules: their kernels may differ, but float32 must be float32."""
    if not on_cuda(device):
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def compile_layers(base: Any, backend: str = "inductor") -> None:
    """In place, so that parameters keep their names. All layers share what is compiled for the first one; `dynamic`,
    because every micro-batch has a length of its own. After sharding: it hooks into the layers from outside."""
    for layer in getattr(base.get_decoder(), "layers", ()):
        layer.compile(backend=backend, dynamic=True)


@contextmanager
def _family_code_kept(base: Any) -> Iterator[None]:
    """liger changes an instance and also the classes that later ones are made of: those are put back."""
    names = vars(sys.modules[type(base).__module__])
    before = dict(names)
    try:
        yield
    finally:
        names.update(before)
