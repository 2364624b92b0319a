"""Which attention computes a model: the one place that chooses, from the config, the device and what is installed.

An attention that does not know a part of a family (a cap on its scores, sinks) leaves that part out without a word, and
the model that was trained is then not the one that is served. It knows no weights, no data and no loss.
"""

import importlib.util
from typing import Any, Literal

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

Attention = Literal["sdpa", "eager", "flash_attention_2", "flex_attention"]

_FLASH_DTYPES = (torch.float16, torch.bfloat16)
# The kernels that torch makes for flex attention take no narrower head.
_FLEX_HEAD_WIDTH_MIN = 16
# The field by which Gemma 2 and VaultGemma cap their scores: SDPA takes the cap that they hand it and ignores it.
# tests/unit/train/test_attention.py looks for other arguments of that kind in every family of transformers.
_CAP = "attn_logit_softcapping"


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def causal_class(config: Any) -> Any:
    """The class that AutoModelForCausalLM makes of `config`, or of its part about text; None for a family without
    one."""
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING
    return mapping.get(type(config), None) or mapping.get(type(config.get_text_config()), None)


def caps_scores(config: Any) -> bool:
    """Whether the scores of attention pass through tanh on their way to the softmax."""
    return bool(getattr(config.get_text_config(), _CAP, None))


def plain_attention(config: Any) -> Attention:
    """Made of torch's usual operations, on any device: SDPA, or eager where SDPA computes another function. Eager holds
    a score for every pair of tokens in a line."""
    family = causal_class(config)
    return "eager" if caps_scores(config) or (family is not None and not family._supports_sdpa) else "sdpa"


def attention_for(config: Any, device: str, dtype: Any) -> Attention:
    """What a model is trained with. Rows packed into one line need attention that stays within a row. Both varlen kinds
    see that without a dense mask: flash by the ends of the rows (cu_seqlens), flex by a block mask that transformers
    makes where positions do not rise by 1. It does so only with a batch of one line, no attention mask and no cache, as
    labelled_hidden calls it. Plain attention gets a dense mask there."""
    plain = plain_attention(config)
    family = causal_class(config)
    if not device.startswith("cuda") or family is None or not family._can_set_attn_implementation():
        return plain
    # Flash attention 2 drops sinks just as SDPA does, and in its older versions the cap; flex attention knows both.
    flash = plain == "sdpa" and family._supports_flash_attn and dtype in _FLASH_DTYPES
    if flash and is_installed("flash_attn"):
        return "flash_attention_2"
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if family._supports_flex_attn and width >= _FLEX_HEAD_WIDTH_MIN and not getattr(text, "attention_dropout", 0.0):
        return "flex_attention"
    return plain
