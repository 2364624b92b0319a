"""What a model computes with, chosen by device, type and what is installed; the CUDA kernels themselves need a CUDA
device."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.models.llama import modeling_llama

from services.trainer.train.data.batches.micro_batch import MicroBatch, micro_batches
from services.trainer.train.data.tokens.token_rows import TokenRows
from services.trainer.train.loop.start_run import set_up_torch
from services.trainer.train.losses.objective import Supervised
from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.modeling.kernels import (
    compile_layers,
    full_precision,
    on_cuda,
    reduced_precision,
    use_kernels,
    use_liger,
)
from services.trainer.train.modeling.lora import add_adapter
from services.trainer.train.settings.spec import LoraTraining
from services.trainer.train.settings.spec_json import parse_spec

SHAPE = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
LENGTHS = (20, 33, 1, 9)


def llama(**changes: Any) -> Any:
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes})).eval()


def causal(base: Any) -> CausalModel:
    return CausalModel(module=base, base=base, device="cpu", softcap=None)


def rows() -> TokenRows:
    total = sum(LENGTHS)
    return TokenRows(
        ids=np.random.default_rng(5).integers(0, 64, total).astype(np.int32),
        labelled=np.ones(total, np.bool_),
        offsets=np.cumsum(np.array([0, *LENGTHS], np.int64)),
        rows=len(LENGTHS),
        truncated_rows=0,
        skipped_rows=0,
        longest_row_tokens=max(LENGTHS),
    )


def packed() -> MicroBatch:
    (batch,) = micro_batches(rows(), range(len(LENGTHS)), tokens_max=512, layout="packed", device="cpu")
    return batch


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The packages of a GPU machine that are found here; none at first."""
    names: set[str] = set()
    find_spec = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> Any:
        if name in ("flash_attn", "liger_kernel"):
            return find_spec("json") if name in names else None
        return find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    return names


def test_a_cpu_gets_nothing_and_a_gpu_what_was_chosen(installed: set[str]) -> None:
    base = llama()
    before = base.config._attn_implementation
    installed |= {"flash_attn", "liger_kernel"}
    assert use_kernels(base, "cpu", torch.float32) == ()
    assert base.config._attn_implementation == before == "sdpa"
    installed.clear()
    assert use_kernels(base, "cuda:0", torch.bfloat16) == ("flex_attention",)
    assert {layer.self_attn.config._attn_implementation for layer in base.model.layers} == {"flex_attention"}
    assert use_kernels(llama(head_dim=8), "cuda:0", torch.bfloat16) == ()


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_rows_packed_into_a_line_score_as_alone(attention: str) -> None:
    """Flex attention without its kernel, which this machine may have no compiler for: the mask is what is looked at."""
    base = llama()
    model, batch = causal(base), packed()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        alone = torch.cat(
            [
                model.labelled_hidden(each)[0]
                for row in batch.rows
                for each in micro_batches(rows(), [row], tokens_max=1, layout="padded", device="cpu")
            ]
        )
        base.set_attn_implementation(attention)
        together, _ = model.labelled_hidden(batch)
        leaking, _ = model.labelled_hidden(replace(batch, row_numbers=None))
    assert (together - alone).abs().max() < 1e-5
    assert (leaking - alone).abs().max() > 1e-2


def test_flash_attention_is_told_where_rows_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = causal(llama()), packed()
    assert batch.row_ends is not None
    assert (batch.row_ends.tolist(), batch.row_ends.dtype) == ([0, 33, 53, 62, 63], torch.int32)
    assert model._row_ends(batch) == {}
    monkeypatch.setattr(model.base.config, "_attn_implementation_internal", "flash_attention_2")
    told = model._row_ends(batch)
    assert told["cu_seq_lens_q"] is told["cu_seq_lens_k"] is batch.row_ends
    assert told["max_length_q"] == told["max_length_k"] == 33
    (padded,) = micro_batches(rows(), [0], tokens_max=1, layout="padded", device="cpu")
    assert model._row_ends(padded) == {}


LIGER = """
import sys
CALLS = []

def _apply_liger_kernel_to_instance(model, **settings):
    CALLS.append(settings)
    setattr(sys.modules[type(model).__module__], type(model.model.norm).__name__, object)
    model.model.norm.patched = True

MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None, "mixtral": None}
"""


def test_liger_changes_this_instance_and_neither_its_family_nor_the_loss(
    installed: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in that does what liger does to a family: its kernels load where triton does."""
    folder = tmp_path / "liger_kernel" / "transformers"
    folder.mkdir(parents=True)
    for package in (folder.parent, folder):
        (package / "__init__.py").write_text("")
    (folder / "monkey_patch.py").write_text(LIGER)
    monkeypatch.syspath_prepend(str(tmp_path))
    base, norm = llama(), modeling_llama.LlamaRMSNorm
    assert not use_liger(base, "cuda:0")
    installed.add("liger_kernel")
    assert not use_liger(base, "cpu")
    try:
        assert use_liger(base, "cuda:0")
        assert base.model.norm.patched
        assert modeling_llama.LlamaRMSNorm is norm
        mixture = MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=2))
        assert use_liger(mixture, "cuda:0")
        base.config.model_type = "a family of its own"
        assert not use_liger(base, "cuda:0")
        calls = sys.modules["liger_kernel.transformers.monkey_patch"].CALLS
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "liger_kernel"]:
            del sys.modules[name]
    heads = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False, "rms_norm": True}
    assert calls == [{**heads, "swiglu": True, "geglu": True}, {**heads, "swiglu": False, "geglu": False}]


def test_reduced_precision_is_the_body_s_alone() -> None:
    """As full weights on CUDA: hidden states, the loss and all gradients stay float32."""
    model, batch = causal(llama()), packed()
    exact = Supervised().loss_sum(model, batch)
    assert torch.equal(exact, Supervised().loss_sum(replace(model, kernels=()), batch))
    reduced = replace(model, autocast=True)
    loss = Supervised().loss_sum(reduced, batch)
    loss.backward()
    assert loss.dtype == reduced.labelled_hidden(batch)[0].dtype == torch.float32
    assert 0 < abs(loss.item() - exact.item()) < 0.01 * exact.item()
    assert {parameter.grad.dtype for parameter in model.trainable.values()} == {torch.float32}
    with reduced_precision("cuda:1", wanted=False):
        assert not torch.is_autocast_enabled("cuda")


def test_compiled_layers_keep_their_names_and_their_sums() -> None:
    """With the backend that compiles nothing: what torch could not trace or guard would fail or differ here."""
    training = LoraTraining(r=4, alpha=8, dropout=0.0, target_modules="all-linear")
    model, batch = add_adapter(causal(llama()), training, "base"), packed()
    names = list(model.trainable)
    plain = Supervised().loss_sum(model, batch)
    compile_layers(model.base, backend="eager")
    compiled = Supervised().loss_sum(model, batch)
    compiled.backward()
    assert list(model.trainable) == names
    assert compiled.item() == pytest.approx(plain.item(), abs=1e-4)
    assert all(parameter.grad is not None for parameter in model.trainable.values())


@pytest.mark.parametrize(("device", "made_current"), [("cpu", []), ("cuda:3", ["cuda:3"])])
def test_the_device_of_a_run_is_the_current_one(
    monkeypatch: pytest.MonkeyPatch, device: str, made_current: list[str]
) -> None:
    """Or what goes by the current device, like the event behind a copy, would go to the first one."""
    chosen: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("use_deterministic_algorithms", "set_float32_matmul_precision", "set_num_threads"):
        monkeypatch.setattr(torch, name, lambda *_, **__: None)
    spec = {"job_id": "ft-1", "base_model": {"directory": "base"}, "train_file": "train.jsonl", "device": device}
    set_up_torch(parse_spec(spec))
    assert chosen == made_current


def test_products_are_as_exact_as_before_on_a_cpu() -> None:
    before = torch.get_float32_matmul_precision()
    with full_precision("cpu"):
        assert torch.get_float32_matmul_precision() == before
    assert on_cuda("cuda:0")
    assert not on_cuda("cpu")
