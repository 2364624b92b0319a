"""What the config of a LoRA adapter says: which layers have one, with which rank and scale, exactly as peft reads it.

One rule for whoever takes an adapter: a run that starts from it, and an engine that serves it. It is an allowlist, so
what could mean something else than two matrices and a scale is refused by name. It reads no weights and knows no model.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from formats.adapter_fields import refusal_of, refusal_of_initialisation
from formats.strict_json import loose_object

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ALL_LINEAR = "all-linear"
# The largest rank that anybody here takes.
RANK_MAX = 256
PATTERNS_MAX = 4096
PATTERN_CHARS_MAX = 1024
LAYERS_MAX = 4096
ALPHA_MAX = 1e6
# Matching the expressions of a whole adapter takes milliseconds.
MATCHING_S_MAX = 5.0
MATRIX_PREFIX = "base_model.model."

_MATRIX = re.compile(r"base_model\.model\.(?P<module>[A-Za-z0-9_.]{1,256})\.lora_(?P<side>[AB])\.weight")
_SHOWN_CHARS_MAX = 80
Number = TypeVar("Number", int, float)


class AdapterRefused(ValueError):
    """The first thing that the config says and nobody here honours; its text names the field and what to do."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What decides what an adapter computes. Module names are those of the base model, `model.layers.0.mlp.up_proj`.

    A string of `target_modules` and `exclude_modules` is a regular expression over whole names, or `all-linear`; names
    in a list fit the ends of names. Keys of the patterns are regular expressions over the ends of names, and the first
    that fits counts. Expressions are a stranger's, and may take for ever: whoever does not know them matches them in a
    process that can be ended."""

    rank: int
    alpha: float
    use_rslora: bool = False
    target_modules: str | tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    # Parameters of fused experts, whose matrices have names of their own.
    target_parameters: tuple[str, ...] = ()

    def targets(self, module: str) -> bool:
        """Whether this layer has an adapter, as `peft.tuners.tuners_utils.check_target_module_exists` says. For
        `all-linear` the caller knows which layers are linear."""
        if _fits(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str):
            return self.target_modules.lower() == ALL_LINEAR or _fits(self.target_modules, module)
        if module in self.target_modules:
            return True
        if not _fits(self.target_modules, module):
            return False
        return not self.layers_to_transform or self._layer_of(module) in self.layers_to_transform

    def rank_of(self, module: str) -> int:
        """The rank of this layer's matrices."""
        return _first_fit(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """The numerator of this layer's scale."""
        return _first_fit(self.alpha_pattern, module, self.alpha)

    def scale_of(self, module: str) -> float:
        """What the product of the matrices is multiplied with: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def check_module(self, module: str, rank: int) -> None:
        """Raises AdapterRefused for matrices that the config does not speak of, or that have another rank."""
        if not self.targets(module):
            raise AdapterRefused(
                f"there are matrices for {module}, which its target_modules, exclude_modules and layers_to_transform"
                " leave out; peft would drop them"
            )
        if rank != self.rank_of(module):
            raise AdapterRefused(f"{module} has rank {rank}; its config says {self.rank_of(module)}")

    def _layer_of(self, module: str) -> int | None:
        if not self.layers_pattern:
            found = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", module)
            return int(found["index"]) if found else None
        for pattern in self.layers_pattern:
            if found := re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", module):
                return int(found["idx"])
        return None


def read_adapter_config(content: bytes, *, rank_max: int) -> LoraConfig:
    """What an adapter_config.json says. Raises AdapterRefused for what is not honoured, or no config at all."""
    try:
        document = loose_object(content)
    except ValueError as error:
        raise AdapterRefused(f"{ADAPTER_CONFIG} cannot be read: {error}") from error
    return parse_adapter_config(document, rank_max=rank_max)


def parse_adapter_config(document: Mapping[str, Any], *, rank_max: int) -> LoraConfig:
    """As `read_adapter_config`, of the parsed document."""
    _check_kind(document)
    for name, value in document.items():
        if refused := refusal_of(name, value):
            raise AdapterRefused(
                f"its {name[:64]} is {_shown(value)} ({refused.means}), which is not taken; {refused.cure}"
            )
    start = document.get("init_lora_weights")
    if refused := refusal_of_initialisation(start):
        raise AdapterRefused(
            f"its init_lora_weights is {_shown(start)} ({refused.means}), which is not taken; {refused.cure}"
        )
    target_modules = _modules(document, "target_modules")
    target_parameters = _names(document, "target_parameters")
    if not target_modules and not target_parameters:
        raise AdapterRefused("its target_modules are missing: names of layers, a regular expression or all-linear")
    layers, pattern = _layers(document), _names(document, "layers_pattern", single=True)
    chosen = [document.get(name) is not None for name in ("layers_to_transform", "layers_pattern")]
    if isinstance(target_modules, str) and any(chosen):
        raise AdapterRefused(
            "its layers_to_transform and layers_pattern go with a list of target_modules, not with an expression"
        )
    if pattern and not chosen[0]:
        raise AdapterRefused("its layers_pattern goes with layers_to_transform, which is missing")
    for each in pattern:
        _check_expression("layers_pattern", each)
    return LoraConfig(
        rank=_rank("r", document.get("r"), rank_max),
        alpha=_alpha("lora_alpha", document.get("lora_alpha")),
        use_rslora=_flag(document, "use_rslora"),
        target_modules=target_modules,
        exclude_modules=_modules(document, "exclude_modules"),
        layers_to_transform=layers,
        layers_pattern=pattern,
        rank_pattern={
            key: _rank(f"rank_pattern[{key!r:.80}]", value, rank_max)
            for key, value in _pattern(document, "rank_pattern").items()
        },
        alpha_pattern={
            key: _alpha(f"alpha_pattern[{key!r:.80}]", value)
            for key, value in _pattern(document, "alpha_pattern").items()
        },
        target_parameters=target_parameters,
    )


def too_slow() -> AdapterRefused:
    """For whoever ended the matching of its expressions after MATCHING_S_MAX."""
    return AdapterRefused(
        f"its expressions (target_modules, rank_pattern, ...) take more than {MATCHING_S_MAX:g} s to match; name the"
        " layers in lists"
    )


def modules_of(tensors: Iterable[str]) -> tuple[str, ...]:
    """The layers that have matrices, by name. Raises AdapterRefused for a tensor that is none of a plain adapter."""
    sides: dict[str, set[str]] = {}
    for name in tensors:
        found = _MATRIX.fullmatch(name)
        if found is None:
            raise AdapterRefused(f"{name[:128]} in {ADAPTER_WEIGHTS} is no matrix of a plain adapter")
        sides.setdefault(found["module"], set()).add(found["side"])
    for module, found_sides in sides.items():
        if len(found_sides) != 2:
            raise AdapterRefused(f"{module} has only lora_{next(iter(found_sides))} in {ADAPTER_WEIGHTS}")
    return tuple(sorted(sides))


def plain_adapter_config(config: LoraConfig, modules: Iterable[str], base_model: str = "") -> bytes:
    """The same adapter in the plainest words: each layer by its own name, and no expression that could take long.

    For adapters of layers; fused experts (`target_parameters`) have names that only peft knows."""
    named = sorted(modules)
    ranks = {_literal(module): config.rank_of(module) for module in named if config.rank_of(module) != config.rank}
    alphas = {_literal(module): config.alpha_of(module) for module in named if config.alpha_of(module) != config.alpha}
    document = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or None,
        "inference_mode": True,
        "bias": "none",
        "init_lora_weights": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "use_rslora": config.use_rslora,
        "target_modules": named,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


def _literal(module: str) -> str:
    # From the beginning: `layers.1` must not speak for a layer whose name ends so.
    return "^" + re.escape(module)


def _check_kind(document: Mapping[str, Any]) -> None:
    if document.get("peft_type") != "LORA":
        raise AdapterRefused(f"its peft_type is {_shown(document.get('peft_type'))}; only LORA is taken")
    if document.get("task_type") not in (None, "CAUSAL_LM"):
        raise AdapterRefused(f"its task_type is {_shown(document.get('task_type'))}; only CAUSAL_LM is taken")


def _fits(wanted: str | tuple[str, ...], module: str) -> bool:
    if isinstance(wanted, str):
        return bool(wanted) and re.fullmatch(wanted, module) is not None
    return module in wanted or any(module.endswith(f".{name}") for name in wanted)


def _first_fit(patterns: Mapping[str, Number], module: str, otherwise: Number) -> Number:
    """As `peft.utils.other.get_pattern_key`."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


def _modules(document: Mapping[str, Any], name: str) -> str | tuple[str, ...]:
    value = document.get(name)
    if isinstance(value, str):
        if value.lower() != ALL_LINEAR or name == "exclude_modules":
            _check_expression(name, value)
        return value
    return _names(document, name)


def _names(document: Mapping[str, Any], name: str, *, single: bool = False) -> tuple[str, ...]:
    value = document.get(name)
    if single and isinstance(value, str):
        value = [value] if value else []
    names = [] if value is None else value
    if not isinstance(names, list) or len(names) > PATTERNS_MAX:
        raise AdapterRefused(f"its {name} are no list of at most {PATTERNS_MAX} names")
    if not all(isinstance(each, str) and 0 < len(each) <= PATTERN_CHARS_MAX for each in names):
        raise AdapterRefused(f"its {name} are not all names of 1 to {PATTERN_CHARS_MAX} characters")
    return tuple(names)


def _layers(document: Mapping[str, Any]) -> tuple[int, ...]:
    value = document.get("layers_to_transform")
    layers = [] if value is None else [value] if _is_whole(value) else value
    if not isinstance(layers, list) or len(layers) > LAYERS_MAX or not all(_is_whole(each) for each in layers):
        raise AdapterRefused(f"its layers_to_transform is {_shown(value)}; expected numbers of layers")
    return tuple(layers)


def _pattern(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = document.get(name)
    patterns = {} if value is None else value
    if not isinstance(patterns, dict) or len(patterns) > PATTERNS_MAX:
        raise AdapterRefused(f"its {name} is not an object of at most {PATTERNS_MAX} keys")
    for key in patterns:
        _check_expression(name, key)
    return patterns


def _check_expression(name: str, expression: str) -> None:
    if len(expression) > PATTERN_CHARS_MAX:
        raise AdapterRefused(f"its {name} has an expression of more than {PATTERN_CHARS_MAX} characters")
    try:
        re.compile(f"({expression})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterRefused(f"its {name} has {_shown(expression)}, which is no regular expression: {error}") from error


def _rank(name: str, value: Any, rank_max: int) -> int:
    if not _is_whole(value) or value < 1:
        raise AdapterRefused(f"its {name} is {_shown(value)}; expected a positive whole number")
    if value > rank_max:
        raise AdapterRefused(f"its {name} is {_shown(value)}; the largest rank that is taken is {rank_max}")
    return int(value)


def _alpha(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= ALPHA_MAX:
        raise AdapterRefused(f"its {name} is {_shown(value)}; expected a positive number of at most {ALPHA_MAX:g}")
    return value


def _flag(document: Mapping[str, Any], name: str) -> bool:
    value = document.get(name)
    if value is not None and not isinstance(value, bool):
        raise AdapterRefused(f"its {name} is {_shown(value)}; expected true or false")
    return bool(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return f"{value!r:.{_SHOWN_CHARS_MAX}}"
