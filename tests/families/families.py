"""The families that the README names: for each a tiny model of its own architecture, tokenizer kind and template.

Sizes are what vLLM takes on a CPU: heads of 32 or 64 dimensions, two layers.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.families import templates
from tests.families.tokenizers_of import VOCABULARY, byte_level, sentence_pieces

CONTEXT_LENGTH = 512
SEED = 11
HEAD_SCALE = 4.0


@dataclass(frozen=True, kw_only=True)
class Family:
    """`tokenizer` makes tokenizer.json; `end` is what ends a turn, which need not be `eos`."""

    name: str
    model_type: str
    config: Mapping[str, Any]
    tokenizer: Callable[[], dict[str, Any]]
    tokenizer_class: str
    template: templates.Source
    bos: str | None
    eos: str
    pad: str
    end: str
    # As their authors' generation_config.json has them.
    generation_eos: tuple[str, ...] = ()
    # What training changes; the engine serves no adapters of a mixture of experts on a CPU.
    full: bool = False
    # Whether the answers have thoughts.
    thinks: bool = False
    # The template that an import is given, where the family's own cannot be trained, and words of the refusal.
    given_template: str = ""
    refusal: str = ""
    # vLLM's parsers of answers, where they are not found by themselves, and what stands before an answer without them.
    parsers: str = ""
    before_answer: str = ""
    # Whether the prompt has today's date, which a tiny model takes for a part of the question.
    dated: bool = False
    # Words of the import's refusal, where this installation cannot serve the family.
    import_refusal: str = ""
    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)


def _llama(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT_LENGTH,
        "initializer_range": 0.06,
        "vocab_size": VOCABULARY,
        **more,
    }


def _rope3(**more: Any) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": CONTEXT_LENGTH // 8,
        **more,
    }


_LLAMA_3 = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN_3 = (*_QWEN, "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
_GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
_PHI_3 = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
_DEEPSEEK = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    *(f"<｜tool▁{name}｜>" for name in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")),
    *(f"<｜tool▁{name}｜>" for name in ("outputs▁begin", "output▁begin", "output▁end", "outputs▁end")),
)
_GPT_OSS = (
    "<|startoftext|>",
    "<|endoftext|>",
    *(f"<|{name}|>" for name in ("return", "constrain", "channel", "start", "end", "message", "call")),
)
_MISTRAL_SPM = ("<unk>", "<s>", "</s>")
_MISTRAL_V3 = (
    *_MISTRAL_SPM,
    *(f"[{name}]" for name in ("INST", "/INST", "TOOL_CALLS", "AVAILABLE_TOOLS", "/AVAILABLE_TOOLS")),
    *(f"[{name}]" for name in ("TOOL_RESULTS", "/TOOL_RESULTS")),
)
_SPM: dict[str, Any] = {"bos": "<s>", "eos": "</s>", "pad": "</s>", "end": "</s>"}


def _pieces(tokens: tuple[str, ...], begin: str | None, *, prefix_space: bool = True) -> Callable[[], dict[str, Any]]:
    return lambda: sentence_pieces(tokens, begin=begin, prefix_space=prefix_space)


def _bytes(tokens: tuple[str, ...], begin: str | None = None, **more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: byte_level(tokens, begin=begin, **more)


def _llama_3(name: str, template: str, *, dated: bool = False, **config: Any) -> Family:
    return Family(
        name=name,
        model_type="llama",
        config=_llama(**config),
        tokenizer=_bytes(_LLAMA_3, "<|begin_of_text|>"),
        tokenizer_class="PreTrainedTokenizerFast",
        template=templates.trl(template),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        pad="<|finetune_right_pad_id|>",
        end="<|eot_id|>",
        generation_eos=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        dated=dated,
    )


def _qwen(
    name: str,
    model_type: str,
    template: str,
    *,
    eos: str = "<|im_end|>",
    thinks: bool = False,
    import_refusal: str = "",
    **config: Any,
) -> Family:
    return Family(
        name=name,
        model_type=model_type,
        config=_llama(**config),
        tokenizer=_bytes(_QWEN if model_type == "qwen2" else _QWEN_3),
        tokenizer_class="Qwen2Tokenizer",
        template=templates.trl(template),
        bos=None,
        eos=eos,
        pad="<|endoftext|>",
        end="<|im_end|>",
        generation_eos=("<|im_end|>", "<|endoftext|>") if eos == "<|im_end|>" else ("<|endoftext|>",),
        thinks=thinks,
        import_refusal=import_refusal,
    )


def _mistral(name: str, version: str, model_type: str = "mistral", *, full: bool = False, **config: Any) -> Family:
    tokens = _MISTRAL_SPM if version == "v1" else _MISTRAL_V3
    return Family(
        name=name,
        model_type=model_type,
        config=_llama(sliding_window=None, **config),
        tokenizer=_pieces(tokens, "<s>"),
        tokenizer_class="LlamaTokenizer",
        template=templates.mistral(version, spm=True),
        full=full,
        **_SPM,
    )


def _gemma(name: str, model_type: str, template: str, **config: Any) -> Family:
    return Family(
        name=name,
        model_type=model_type,
        config=_llama(**config),
        tokenizer=_pieces(_GEMMA, "<bos>", prefix_space=False),
        tokenizer_class="GemmaTokenizer",
        template=templates.trl(template),
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        end="<end_of_turn>",
        generation_eos=("<eos>", "<end_of_turn>"),
    )


def _deepseek(name: str, model_type: str, **config: Any) -> Family:
    return Family(
        name=name,
        model_type=model_type,
        config=_llama(**config),
        tokenizer=_bytes(_DEEPSEEK, "<｜begin▁of▁sentence｜>"),
        # The class is Llama's, the file is byte-level.
        tokenizer_class="LlamaTokenizerFast",
        template=templates.trl("deepseek_r1_distill"),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        pad="<｜end▁of▁sentence｜>",
        end="<｜end▁of▁sentence｜>",
        thinks=True,
        given_template=templates.DEEPSEEK_THOUGHTS,
        refusal="--chat-template",
    )


_ALL = (
    Family(
        name="llama-2",
        model_type="llama",
        config=_llama(num_key_value_heads=2),
        tokenizer=_pieces(_MISTRAL_SPM, "<s>"),
        tokenizer_class="LlamaTokenizer",
        template=templates.written(templates.LLAMA_2),
        **_SPM,
    ),
    Family(
        name="codellama",
        model_type="llama",
        config=_llama(num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}),
        tokenizer=_pieces((*_MISTRAL_SPM, "▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"), "<s>"),
        tokenizer_class="CodeLlamaTokenizer",
        template=templates.written(templates.LLAMA_2),
        **_SPM,
    ),
    _llama_3("llama-3", "llama3", rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}),
    _llama_3("llama-3.1", "llama3_1", rope_parameters=_rope3()),
    _llama_3("llama-3.2", "llama3_2", dated=True, rope_parameters=_rope3(factor=32.0), tie_word_embeddings=True),
    _qwen("qwen-2.5", "qwen2", "qwen2_5", tie_word_embeddings=True),
    _qwen("qwen-2.5-base", "qwen2", "qwen2_5", eos="<|endoftext|>"),
    _qwen("qwen-3", "qwen3", "qwen3", thinks=True),
    _qwen("qwen-3-2507", "qwen3", "qwen3_instruct_2507"),
    _qwen(
        "qwen-3.5",
        "qwen3_5_text",
        "qwen3_5_think",
        thinks=True,
        # vLLM's module of it needs torchvision, whose builds for the CPU are on no index that every machine reaches.
        import_refusal="No module named 'torchvision'",
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        layer_types=["linear_attention", "full_attention"],
    ),
    _mistral("mistral-0.1", "v1"),
    _mistral("mistral-0.3", "v3"),
    Family(
        name="mistral-nemo",
        model_type="mistral",
        config=_llama(sliding_window=None),
        tokenizer=_bytes(_MISTRAL_V3, "<s>"),
        tokenizer_class="PreTrainedTokenizerFast",
        template=templates.mistral("v3", spm=False),
        **_SPM,
    ),
    _mistral("mixtral", "v1", "mixtral", full=True, num_local_experts=4, num_experts_per_tok=2),
    _gemma("gemma-1", "gemma", "gemma"),
    _gemma(
        "gemma-2",
        "gemma2",
        "gemma",
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        query_pre_attn_scalar=32,
        sliding_window=64,
    ),
    _gemma("gemma-3", "gemma3_text", "gemma3", query_pre_attn_scalar=32, sliding_window=64),
    Family(
        name="phi-3",
        model_type="phi3",
        config=_llama(num_key_value_heads=2),
        tokenizer=_pieces(_PHI_3, None),
        tokenizer_class="LlamaTokenizer",
        template=templates.trl("phi3"),
        bos="<s>",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        end="<|end|>",
        generation_eos=("<|endoftext|>", "<|assistant|>", "<|end|>"),
    ),
    Family(
        name="phi-3.5",
        model_type="phi3",
        config=_llama(num_key_value_heads=2),
        tokenizer=_pieces(_PHI_3, None),
        tokenizer_class="LlamaTokenizer",
        template=templates.trl("phi3_5"),
        bos="<s>",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        end="<|end|>",
        generation_eos=("<|endoftext|>", "<|assistant|>", "<|end|>"),
    ),
    Family(
        name="phi-4",
        model_type="phi3",
        config=_llama(num_key_value_heads=2),
        tokenizer=_bytes(("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"), split="gpt2"),
        tokenizer_class="GPT2Tokenizer",
        template=templates.written(templates.PHI_4),
        bos="<|endoftext|>",
        eos="<|im_end|>",
        pad="<|endoftext|>",
        end="<|im_end|>",
        generation_eos=("<|endoftext|>", "<|im_end|>"),
    ),
    Family(
        name="phi-4-mini",
        model_type="phi3",
        config=_llama(num_key_value_heads=2),
        tokenizer=_bytes(("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), split="gpt2"),
        tokenizer_class="GPT2Tokenizer",
        template=templates.written(templates.PHI_4_MINI),
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        end="<|end|>",
        generation_eos=("<|endoftext|>", "<|end|>"),
    ),
    _deepseek("deepseek-r1-llama", "llama", rope_parameters=_rope3()),
    _deepseek("deepseek-r1-qwen", "qwen2"),
    Family(
        name="gpt-oss",
        model_type="gpt_oss",
        config=_llama(
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=64,
            layer_types=["sliding_attention", "full_attention"],
        ),
        tokenizer=_bytes(_GPT_OSS),
        tokenizer_class="PreTrainedTokenizerFast",
        template=templates.trl("gptoss"),
        bos="<|startoftext|>",
        eos="<|return|>",
        pad="<|endoftext|>",
        end="<|return|>",
        generation_eos=("<|return|>", "<|endoftext|>", "<|call|>"),
        full=True,
        # Harmony's tokens have ids of their own, which a small vocabulary has not.
        parsers="none",
        before_answer="final",
    ),
)
FAMILIES = {family.name: family for family in _ALL}


def write_model(family: Family, folder: Path) -> Path:
    """The files of a model as a hub has them: random weights, which a seed decides."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    folder.mkdir(parents=True)
    document = family.tokenizer()
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False))
    ids = {**document["model"]["vocab"], **{token["content"]: token["id"] for token in document["added_tokens"]}}
    settings = {
        "tokenizer_class": family.tokenizer_class,
        "bos_token": family.bos,
        "eos_token": family.eos,
        "pad_token": family.pad,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_LENGTH,
        "chat_template": family.template(),
        **({"unk_token": "<unk>"} if "<unk>" in ids else {}),
        **family.tokenizer_config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False))
    config = AutoConfig.for_model(
        family.model_type,
        bos_token_id=ids[family.bos] if family.bos else None,
        eos_token_id=ids[family.eos],
        pad_token_id=ids[family.pad],
        **family.config,
    )
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        # A narrow model's hidden states are short, and a head that an adapter cannot stretch bounds how sure it can be.
        model.get_output_embeddings().weight.mul_(HEAD_SCALE)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=[ids[token] for token in family.generation_eos] or config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model.save_pretrained(str(folder))
    return folder
