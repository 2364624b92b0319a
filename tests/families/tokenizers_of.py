"""The kinds of tokenizers that the families ship: small ones, trained on the standard library's docstrings.

Each keeps what its kind is about: how a space is written, what a byte without an entry becomes, where a text begins.
"""

import json
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from services.trainer.train.recipes.corpus import standard_library_docstrings

VOCABULARY = 1024
_UNKNOWN = "<unk>"
_PLAIN = ("<think>", "</think>", "<tool_", "</tool_")
# The words are split as Llama 3, Qwen and gpt-oss do it, less what only other scripts need.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def byte_level(special_tokens: tuple[str, ...], *, begin: str | None = None, split: str = "words") -> dict[str, Any]:
    """A `tokenizer.json` whose pieces are bytes: Llama 3, Qwen, GPT-2 (`split` "gpt2"), DeepSeek, Mistral's tekken.
    Marks of thoughts and calls are tokens that are not special, as these families have them: they stay in a text."""
    tokenizer = Tokenizer(models.BPE())
    if split == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    # Behind all pieces, as these families have them.
    for token in special_tokens:
        plain = token.startswith(_PLAIN)
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=not plain)])
    _begin(tokenizer, begin)
    return _document(tokenizer)


def sentence_pieces(special_tokens: tuple[str, ...], *, begin: str | None, prefix_space: bool = True) -> dict[str, Any]:
    """A `tokenizer.json` as made of a SentencePiece model: spaces are a letter of their own, bytes without an entry are
    pieces. With `prefix_space` as of Llama 2, Mistral and Phi-3, without as of Gemma."""
    in_front = tuple(token for token in special_tokens if token in (_UNKNOWN, "<s>", "</s>", "<pad>", "<bos>", "<eos>"))
    all_bytes = tuple(f"<0x{byte:02X}>" for byte in range(256))
    tokenizer = Tokenizer(models.BPE(unk_token=_UNKNOWN, fuse_unk=True, byte_fallback=True))
    # No piece of a SentencePiece model holds a line break: it is the byte alone.
    words = pre_tokenizers.Metaspace(prepend_scheme="always" if prefix_space else "never")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", behavior="removed"), words])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - (len(special_tokens) - len(in_front)),
        special_tokens=[*in_front, *all_bytes],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix_space else spaces
    joined = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*joined, decoders.Strip(" ", 1, 0)] if prefix_space else joined)
    document = _document(tokenizer)
    document["pre_tokenizer"] = None
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] not in all_bytes]
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special_tokens])
    _begin(tokenizer, begin)
    return _document(tokenizer)


def _begin(tokenizer: Tokenizer, begin: str | None) -> None:
    if begin is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A",
            pair=f"{begin} $A {begin} $B",
            special_tokens=[(begin, tokenizer.token_to_id(begin))],
        )


def _document(tokenizer: Tokenizer) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    return document


@cache
def _texts() -> tuple[str, ...]:
    return tuple(text for texts in standard_library_docstrings("asyncio/*.py") for text in texts)
