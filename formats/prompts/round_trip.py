"""Whether a tokenizer gives a page of text back that it took apart, and which losses its own files declare.

Two losses are a model's own choice and are only named: what the file's normalizer changes (lower case, composed
accents), and characters that the vocabulary has no token for. Any other one is a fault: a text would be trained and
asked without its spaces, and nobody would notice.
"""

import json
import string
from dataclasses import dataclass

from tokenizers import Tokenizer

from formats.prompts.faults import ModelFault
from formats.prompts.tokenizer_files import FILE

# Every text begins with a letter: many vocabularies of SentencePiece do not tell whether a text began with a space.
PAGE = {
    "a sentence": "The quick brown fox jumps over 13 lazy dogs, isn't it? (Yes!) It's 3.14 - #1 & 100%.",
    "letters, digits and signs": f"{string.ascii_letters} {string.digits} {string.punctuation}",
    "runs of spaces": "one  two   three    four     five          ten",
    "line breaks": "first\nsecond\n\nthird\n\n\n\nseventh\r\ncarriage",
    "tabs": "a\tb\t\tc\n\td",
    "code": "def f(x, y=1):\n    if x >= y:\n        return {'k': [x, *y]}\n\n\n@g\nclass C:\n\tpass  # a + b\n",
    "JSON": 'x {"name": "a_b", "arguments": {"list": [1, 2.50, -3e8, null, true], "text": "say \\"hi\\"\\n"}}',
    "accents": "café naïve Ångström – Straße, “quotes” … œuvre € déjà",
    "combined accents": "cafe\u0301 A\u030angstro\u0308m",
    "other alphabets": "Привет мир Γειά σου नमस्ते สวัสดี",
    "Chinese, Japanese and Korean": "中文字符。日本語のテキスト、カタカナ 한국어 문장",
    "from right to left": "a שלום עולם مرحبا بالعالم b",
    "emoji": "ok 😀 👩‍👩‍👧‍👦 🇳🇴 ❤️ 👍🏽 end",
    "wide and special forms": "Ａｂｃ １２３ ﬁ ² ½ ™ x\u00a0y\u200bz",
}
# A vocabulary without one of these is none of a language model.
_NEEDED = frozenset(string.ascii_letters + string.digits + string.punctuation + " \n")
_SHOWN_CHARACTERS = 24


@dataclass(frozen=True, kw_only=True)
class Loss:
    """`what` of the page is lost, and why that is the model's own choice."""

    what: str
    why: str


def check_round_trip(tokenizer: Tokenizer, vocabulary_size: int | None = None) -> tuple[Loss, ...]:
    """The losses that the files declare. Raises ModelFault for any other one, and for tokens without a row in the
    weights, of which there are `vocabulary_size`."""
    return tuple(loss for what, text in PAGE.items() if (loss := _loss(tokenizer, what, text, vocabulary_size)))


def _loss(tokenizer: Tokenizer, what: str, text: str, vocabulary_size: int | None) -> Loss | None:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    if vocabulary_size is not None and encoding.ids and max(encoding.ids) >= vocabulary_size:
        raise ModelFault(
            FILE, f"gives token {max(encoding.ids)}, and the model has {vocabulary_size} tokens (vocab_size)"
        )
    back = tokenizer.decode(encoding.ids, skip_special_tokens=False)
    if back == text:
        return None
    if back == _normalized(tokenizer, text):
        return Loss(what=what, why=f"the normalizer of {FILE} changes it: {_difference(text, back)}")
    unknown = _unknown_id(tokenizer)
    spans = [span for number, span in zip(encoding.ids, encoding.offsets, strict=True) if number == unknown]
    lost = {character for start, end in spans for character in text[start:end]}
    if not lost or lost & _NEEDED:
        missing = f"; it has no tokens for {''.join(sorted(lost & _NEEDED))!r}" if lost else ""
        raise ModelFault(FILE, f"does not give a text back ({what}): {_difference(text, back)}{missing}")
    _loss(tokenizer, what, "".join(character for character in text if character not in lost), vocabulary_size)
    return Loss(what=what, why=f"the vocabulary has no tokens for {''.join(sorted(lost))!r}")


def _normalized(tokenizer: Tokenizer, text: str) -> str:
    """What the file's own normalizer makes of it, with the mark of SentencePiece read as the space that it is."""
    if tokenizer.normalizer is None:
        return text
    changed: str = tokenizer.normalizer.normalize_str(text).replace("\u2581", " ")
    return changed[1:] if changed.startswith(" ") else changed


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    token = getattr(tokenizer.model, "unk_token", None)
    if isinstance(token, str):
        return tokenizer.token_to_id(token)
    number = json.loads(tokenizer.to_str())["model"].get("unk_id")
    return number if isinstance(number, int) else None


def _difference(text: str, back: str) -> str:
    """Both from a little before where they part."""
    at = next((at for at, (one, other) in enumerate(zip(text, back, strict=False)) if one != other), len(back))
    start = max(0, min(at, len(text)) - _SHOWN_CHARACTERS // 2)
    one, other = (value[start : start + _SHOWN_CHARACTERS] for value in (text, back))
    return f"{one!r} becomes {other!r}"
