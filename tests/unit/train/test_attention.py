"""Which attention a model gets: one that computes what its family means, and what it is served with."""

import ast
import importlib.util
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    FalconConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from services.trainer.train.data.batches.micro_batch import Layout, micro_batches
from services.trainer.train.losses.objective import Supervised
from services.trainer.train.modeling.attention import attention_for, plain_attention
from services.trainer.train.modeling.base_model import CausalModel, load_base
from services.trainer.train.modeling.kernels import rows_known
from tests.unit.train.test_kernels import LENGTHS, SHAPE, packed, rows

# A cap that matters at this size, and a window that is shorter than the longest row.
CAPPED = {**SHAPE, "head_dim": 16, "attn_logit_softcapping": 0.5, "sliding_window": 8, "initializer_range": 0.2}
SINKS = {**SHAPE, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8}


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Empty while flash attention is not installed."""
    found: list[str] = []
    find_spec = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> Any:
        return find_spec(name, package) if name != "flash_attn" else find_spec("json") if found else None

    monkeypatch.setattr(importlib.util, "find_spec", find)
    return found


@pytest.mark.parametrize(
    ("device", "dtype", "installed", "expected"),
    [
        ("cpu", torch.float32, True, "sdpa"),
        ("cpu", torch.bfloat16, True, "sdpa"),
        ("cuda:0", torch.bfloat16, True, "flash_attention_2"),
        ("cuda:3", torch.bfloat16, False, "flex_attention"),
        # Flash attention takes 16 bits only; full weights are float32.
        ("cuda:0", torch.float32, True, "flex_attention"),
    ],
)
def test_attention_follows_the_device_the_type_and_what_is_installed(
    device: str, dtype: Any, installed: bool, expected: str, flash: list[str]
) -> None:
    flash += ["flash_attn"] if installed else []
    assert attention_for(LlamaConfig(**SHAPE), device, dtype) == expected


@pytest.mark.parametrize("changes", [{"attention_dropout": 0.1}, {"head_dim": 8}])
def test_what_flex_attention_refuses_keeps_the_plain_one(changes: dict[str, Any], flash: list[str]) -> None:
    assert attention_for(LlamaConfig(**{**SHAPE, **changes}), "cuda:0", torch.float32) == "sdpa"
    assert attention_for(Gemma2Config(**{**CAPPED, **changes}), "cuda:0", torch.float32) == "eager"


def test_a_family_without_varlen_kernels_keeps_the_plain_one(flash: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    flash.append("flash_attn")
    config = LlamaConfig(**SHAPE)
    monkeypatch.setattr(LlamaForCausalLM, "_supports_flash_attn", False)
    assert attention_for(config, "cuda:0", torch.bfloat16) == "flex_attention"
    monkeypatch.setattr(LlamaForCausalLM, "_supports_flex_attn", False)
    assert attention_for(config, "cuda:0", torch.bfloat16) == "sdpa"
    # Falcon's attention is a class of its own for each kind: it is not changed once it is loaded.
    assert attention_for(FalconConfig(), "cuda:0", torch.bfloat16) == "sdpa"


def test_what_sdpa_leaves_out_is_computed_by_another(flash: list[str]) -> None:
    flash.append("flash_attn")
    capped, uncapped, sinks = Gemma2Config(), Gemma2Config(attn_logit_softcapping=None), GptOssConfig()
    assert [plain_attention(each) for each in (capped, uncapped, sinks)] == ["eager", "sdpa", "eager"]
    on_cuda = [attention_for(each, "cuda:0", torch.bfloat16) for each in (capped, uncapped, sinks)]
    assert on_cuda == ["flex_attention", "flash_attention_2", "flex_attention"]
    # A model of several parts says it of its language part.
    assert plain_attention(transformers.AutoConfig.for_model("gemma3")) == "sdpa"


def test_no_other_family_hands_its_attention_what_sdpa_would_ignore() -> None:
    """Reads the installed transformers. Arguments that SDPA does not name are dropped without a word: those that
    matter must be known to `plain_attention`."""
    known = set(inspect.signature(sdpa_attention_forward).parameters)
    # Said by the mask as well, or only for kernels that take rows packed end to end.
    harmless = {"sliding_window", "position_ids", "output_attentions"}
    harmless |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
    ignored: dict[str, set[str]] = {}
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        source = path.read_text(encoding="utf-8")
        if "ForCausalLM" not in source or "attention_interface(" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "attention_interface":
                for keyword in node.keywords:
                    if keyword.arg is not None and keyword.arg not in known | harmless:
                        ignored.setdefault(keyword.arg, set()).add(path.parent.name)
    # Sparse attention of an implementation of its own, which the family chooses itself.
    assert ignored.pop("indices") == {"axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4"}
    assert ignored.pop("block_indices") == {"minimax_m3_vl"}
    assert ignored.pop("softcap") == {"gemma2", "vaultgemma"}
    without_sdpa = ignored.pop("s_aux")
    assert ignored == {}
    for family in without_sdpa:
        assert plain_attention(transformers.AutoConfig.for_model(family)) == "eager", family


def model_of(config: Any, attention: str) -> CausalModel:
    torch.manual_seed(3)
    family = {"gemma2": Gemma2ForCausalLM, "gpt_oss": GptOssForCausalLM}[config.model_type]
    base = family._from_config(config, attn_implementation=attention).eval()
    return CausalModel(module=base, base=base, device="cpu", softcap=None)


@pytest.mark.parametrize(
    ("config", "layout"),
    # gpt-oss does not tell its mask where packed rows begin.
    [(Gemma2Config(**CAPPED), "padded"), (Gemma2Config(**CAPPED), "packed"), (GptOssConfig(**SINKS), "padded")],
    ids=["capped padded", "capped packed", "sinks padded"],
)
def test_rows_score_as_alone_under_eager_attention(config: Any, layout: Layout) -> None:
    model = model_of(config, plain_attention(config))
    assert model.base.config._attn_implementation == "eager"
    with torch.no_grad():
        (batch,) = micro_batches(rows(), range(len(LENGTHS)), tokens_max=512, layout=layout, device="cpu")
        together = model.labelled_hidden(batch)[0]
        alone = torch.cat(
            [
                model.base.model(input_ids=each.input_ids, use_cache=False)
                .last_hidden_state.flatten(0, 1)
                .index_select(0, each.label_places)
                for row in batch.rows
                for each in micro_batches(rows(), [row], tokens_max=1, layout="padded", device="cpu")
            ]
        )
        assert (together - alone).abs().max() < 1e-5
        leaking = replace(packed(), row_numbers=None)
        with rows_known(None):
            assert (model.labelled_hidden(leaking)[0] - alone).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_knows_the_cap() -> None:
    """Without its kernel, which this machine may have no compiler for."""
    config = Gemma2Config(**CAPPED)
    eager, flex = (model_of(config, kind) for kind in ("eager", "flex_attention"))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        difference = eager.labelled_hidden(packed())[0] - flex.labelled_hidden(packed())[0]
    assert difference.abs().max() < 1e-5


def test_the_loss_of_a_capped_model_is_that_of_eager_attention(tmp_path: Path) -> None:
    """It is what engines serve; SDPA leaves the cap out."""
    model_of(Gemma2Config(**CAPPED), "eager").base.save_pretrained(str(tmp_path))
    model = load_base(tmp_path, "cpu", full=True)
    (batch,) = micro_batches(rows(), range(len(LENGTHS)), tokens_max=512, layout="padded", device="cpu")
    plain = {}
    with torch.no_grad():
        ours = float(Supervised().loss_sum(model, batch, 1 / batch.labelled))
        for kind in ("eager", "sdpa"):
            theirs = Gemma2ForCausalLM.from_pretrained(str(tmp_path), dtype=torch.float32, attn_implementation=kind)
            logits = theirs(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)[batch.label_places]
            plain[kind] = float(torch.nn.functional.cross_entropy(logits, batch.label_ids))
    assert ours == pytest.approx(plain["eager"], abs=1e-5)
    assert abs(ours - plain["sdpa"]) > 1e-2
