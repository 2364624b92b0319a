"""Small tokenizers of the kinds that the families ship, made on the spot: parts and flags are theirs, the words not.

Each has the class name that its family's tokenizer_config.json gives, misleading or not.
"""

import inspect
import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

# As in the tokenizer.json of Llama 3, Qwen 2.5 and gpt-oss.
LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA_3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
O200K_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Kind:
    """`class_name` and `model_type` as the family has them; `made` trains the tokenizer."""

    class_name: str
    model_type: str
    begin: str | None
    end: str
    made: Callable[[], Tokenizer]


def write_kind(kind: Kind, folder: Path, **config: Any) -> Path:
    """tokenizer.json, tokenizer_config.json and config.json of a model of ROWS tokens."""
    kind.made().save(str(folder / "tokenizer.json"))
    written = {"tokenizer_class": kind.class_name, "bos_token": kind.begin, "eos_token": kind.end} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    about = {"model_type": kind.model_type, "vocab_size": ROWS, "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(about))
    return folder


def _texts() -> list[str]:
    return [inspect.getdoc(getattr(module, name)) or "" for module in (json, textwrap) for name in module.__all__]


def _trained(tokenizer: Tokenizer, specials: list[str], alphabet: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return tokenizer


def _byte_level(specials: list[str], split: str | None = None, *, composed: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=split is not None))
    if composed:
        tokenizer.normalizer = normalizers.NFC()
    if split is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        whole = pre_tokenizers.Split(Regex(split), behavior="isolated")
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([whole, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return _trained(tokenizer, specials, pre_tokenizers.ByteLevel.alphabet())


def _opened(tokenizer: Tokenizer, begin: str) -> Tokenizer:
    number = tokenizer.token_to_id(begin)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, number)]
    )
    return tokenizer


def _sentencepiece(specials: list[str], form: str) -> Tokenizer:
    """`form`: the space before a text is put there by the normalizer, by the pre-tokenizer, or not at all."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    back: list[Any] = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if form == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    elif form == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    if form != "bare":
        back.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(back)
    tokenizer = _trained(tokenizer, [*specials, *BYTES], ["\u2581"])
    # The bytes are tokens of the model, not markers that a text could name.
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] in specials]
    return Tokenizer.from_str(json.dumps(document))


def _phi_3() -> Tokenizer:
    tokenizer = _sentencepiece(["<unk>", "<s>", "</s>"], "prepend")
    names = ("<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>")
    tokenizer.add_special_tokens([AddedToken(name, rstrip=True, normalized=False, special=True) for name in names])
    return tokenizer


def _sp(form: str) -> Callable[[], Tokenizer]:
    return lambda: _opened(_sentencepiece(["<unk>", "<s>", "</s>"], form), "<s>")


KINDS = {
    "Llama 2": Kind(class_name="LlamaTokenizer", model_type="llama", begin="<s>", end="</s>", made=_sp("prepend")),
    "Llama 2, rewritten": Kind(
        class_name="LlamaTokenizerFast", model_type="llama", begin="<s>", end="</s>", made=_sp("metaspace")
    ),
    "CodeLlama": Kind(
        class_name="CodeLlamaTokenizer", model_type="llama", begin="<s>", end="</s>", made=_sp("prepend")
    ),
    "Mistral v3": Kind(
        class_name="LlamaTokenizer", model_type="mistral", begin="<s>", end="</s>", made=_sp("metaspace")
    ),
    "Gemma": Kind(
        class_name="GemmaTokenizer",
        model_type="gemma2",
        begin="<bos>",
        end="<eos>",
        made=lambda: _opened(_sentencepiece(["<unk>", "<bos>", "<eos>", "<end_of_turn>"], "bare"), "<bos>"),
    ),
    "Phi 3": Kind(class_name="LlamaTokenizer", model_type="phi3", begin="<s>", end="<|endoftext|>", made=_phi_3),
    "GPT-2": Kind(
        class_name="GPT2Tokenizer",
        model_type="gpt2",
        begin="<|endoftext|>",
        end="<|endoftext|>",
        made=lambda: _byte_level(["<|endoftext|>"]),
    ),
    "Llama 3": Kind(
        class_name="PreTrainedTokenizerFast",
        model_type="llama",
        begin="<|begin_of_text|>",
        end="<|eot_id|>",
        made=lambda: _opened(_byte_level(["<|begin_of_text|>", "<|eot_id|>"], LLAMA_3_SPLIT), "<|begin_of_text|>"),
    ),
    "Qwen": Kind(
        class_name="Qwen2Tokenizer",
        model_type="qwen2",
        begin=None,
        end="<|im_end|>",
        made=lambda: _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], QWEN_SPLIT, composed=True),
    ),
    "DeepSeek distilled": Kind(
        class_name="LlamaTokenizerFast",
        model_type="qwen2",
        begin="<｜begin▁of▁sentence｜>",
        end="<｜end▁of▁sentence｜>",
        made=lambda: _opened(
            _byte_level(["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"], LLAMA_3_SPLIT), "<｜begin▁of▁sentence｜>"
        ),
    ),
    "Mistral tekken": Kind(
        class_name="PreTrainedTokenizerFast",
        model_type="mistral",
        begin="<s>",
        end="</s>",
        made=lambda: _opened(_byte_level(["<unk>", "<s>", "</s>", "[INST]"], O200K_SPLIT), "<s>"),
    ),
    "gpt-oss": Kind(
        class_name="PreTrainedTokenizerFast",
        model_type="gpt_oss",
        begin="<|startoftext|>",
        end="<|return|>",
        made=lambda: _byte_level(["<|startoftext|>", "<|return|>", "<|end|>", "<|message|>"], O200K_SPLIT),
    ),
}
