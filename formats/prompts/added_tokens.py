"""The tokens that the files beside tokenizer.json declare: in lists, by name, or by id.

They are joined as the class `TokenizersBackend` of transformers 5 joins them, which takes tokenizer.json as it is
(`tokenization_utils_base.py::_from_pretrained` and `tokenization_utils_tokenizers.py::__init__` there). Where that
class would give a token another id than its file says, or one without a row in the model, it says nothing; here it is a
fault.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer

from formats.prompts.faults import ModelFault

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
# In the order in which transformers gives ids to those that have none.
STANDARD_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


def with_map(config: Mapping[str, Any], special_tokens_map: Mapping[str, Any]) -> dict[str, Any]:
    """What tokenizer_config.json and special_tokens_map.json say together: names in the map win, unless the config is
    of the kind that lists added tokens itself."""
    if "added_tokens_decoder" in config:
        return dict(config)
    together = {**config, **special_tokens_map}
    # Lists of the map count where the config has none; those under the newer name are joined.
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    more = special_tokens_map.get("extra_special_tokens")
    if isinstance(extra, list) and isinstance(more, list):
        extra = [*extra, *(token for token in more if token not in extra)]
    together["extra_special_tokens"] = extra or more or special_tokens_map.get("additional_special_tokens")
    together.pop("additional_special_tokens", None)
    return together


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Tokens with a name, such as bos_token or image_token: those that a chat template may use."""
    names = [name for name in config if name.endswith("_token") and name not in STANDARD_NAMES]
    found = {name: _content(config.get(name)) for name in (*STANDARD_NAMES, *names)}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):
        found |= {str(name): _content(token) for name, token in extra.items()}
    return {name: text for name, text in found.items() if text is not None}


def add_declared_tokens(
    tokenizer: Tokenizer, config: Mapping[str, Any], added_tokens: Mapping[str, Any], rows: int | None
) -> None:
    """Adds to `tokenizer` what `config` (as `with_map` gives it) and added_tokens.json declare.

    `rows` is how many tokens the model has weights for, None where it does not say. Raises ModelFault for a token that
    gets another id than its file says, and for a new one without a row.
    """
    if config.get("split_special_tokens"):
        raise ModelFault(
            CONFIG,
            "sets split_special_tokens, which spells every marker of a conversation in ordinary tokens; leave it out",
        )
    before = tokenizer.get_vocab(with_added_tokens=True)
    own = tokenizer.get_added_tokens_decoder()
    named, listed = _named(config), _listed(config)
    if "added_tokens_decoder" in config:
        file, by_id = CONFIG, _from_decoder(config["added_tokens_decoder"])
        repeated = by_id
    else:
        file, by_id = ADDED, _from_encoder(added_tokens, {*named, *listed})
        # Files of the older kind say nothing of the tokens of tokenizer.json, which are taken as they stand there.
        repeated = by_id | own
    tokens = {token.content: token for _, token in sorted(repeated.items())}
    known = {token.content for token in own.values()}
    for text in named:
        if text in tokens:
            tokens[text].special = True
    for text, token in (*named.items(), *listed.items()):
        if text not in known:
            tokens.setdefault(text, token)
    # A token that is there already takes the flags of the later declaration and keeps its id.
    tokenizer.add_tokens(list(tokens.values()))
    _check_ids(tokenizer, by_id, file)
    _check_rows(tokenizer, [text for text in tokens if text not in before], rows)


def _check_ids(tokenizer: Tokenizer, declared: Mapping[int, AddedToken], file: str) -> None:
    for number, token in sorted(declared.items()):
        found = tokenizer.token_to_id(token.content)
        if found != number:
            raise ModelFault(
                file,
                f"declares {token.content!r} as token {number}, and by tokenizer.json it is token {found}; make "
                "the two files agree",
            )


def _check_rows(tokenizer: Tokenizer, texts: list[str], rows: int | None) -> None:
    for text in texts:
        number = tokenizer.token_to_id(text)
        if rows is not None and number is not None and number >= rows:
            raise ModelFault(
                CONFIG,
                f"or a file beside it declares a token {text!r} that tokenizer.json does not have; it would be token "
                f"{number}, and the model has {rows} tokens (vocab_size of config.json)",
            )


def _named(config: Mapping[str, Any]) -> dict[str, AddedToken]:
    """By content. Flags count where the file gives them."""
    extra = config.get("extra_special_tokens")
    values = {name: config.get(name) for name in named_tokens(config)}
    if isinstance(extra, dict):
        values |= {str(name): token for name, token in extra.items()}
    return {token.content: token for value in values.values() if (token := _special(value)) is not None}


def _listed(config: Mapping[str, Any]) -> dict[str, AddedToken]:
    """Special tokens without a name, by content."""
    value = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(value, dict):
        return {}
    if not isinstance(value, list):
        raise ModelFault(CONFIG, "has extra_special_tokens that are neither a list nor an object")
    tokens = [_special(entry) for entry in value]
    return {token.content: token for token in tokens if token is not None}


def _from_decoder(value: Any) -> dict[int, AddedToken]:
    """`{"32000": {"content": ..., "lstrip": ...}}`"""
    try:
        return {int(number): _token(entry) for number, entry in value.items()}
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise ModelFault(CONFIG, f"has an added_tokens_decoder that is no object of tokens by id: {error}") from error


def _from_encoder(value: Mapping[str, Any], special: set[str]) -> dict[int, AddedToken]:
    """`{"<pad>": 32000}`"""
    for text, number in value.items():
        if isinstance(number, bool) or not isinstance(number, int):
            raise ModelFault(ADDED, f"gives {text!r} an id that is no integer")
    return {
        number: AddedToken(text, normalized=text not in special, special=text in special)
        for text, number in value.items()
    }


def _special(value: Any) -> AddedToken | None:
    if isinstance(value, dict):
        try:
            return _token({**value, "special": True})
        except (TypeError, KeyError) as error:
            raise ModelFault(CONFIG, f"has a special token with values of a wrong kind: {error}") from error
    return AddedToken(value, special=True) if isinstance(value, str) and value else None


def _token(entry: Mapping[str, Any]) -> AddedToken:
    flags = {name: entry[name] for name in _FLAGS if name in entry}
    return AddedToken(entry["content"], **flags)


def _content(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None
