"""The methods a job can learn by beside supervised tuning: their settings, with default and bounds. Pure.

A method is a dataclass whose fields are those of its message in the contract, `{Name}Method`; METHODS names it as the
contract's oneof `method` does. What is refused, filled in, stored and sent to a node follows from that.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, ClassVar, Protocol


class Method(Protocol):
    """`dataset_format` is the format of the files that the method learns from, and of no other method's."""

    dataset_format: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


def _number(most: float, *, zero: float | None = None) -> Any:
    """A setting from 0 to `most`. `zero`: it is above 0, and 0 stands for this default."""
    return field(default=0.0, metadata={"most": most, "zero": zero})


@dataclass(frozen=True, kw_only=True)
class Dpo:
    """Preferences between two answers. A zero alpha or gamma leaves that part out."""

    dataset_format: ClassVar[str] = "preference"

    beta: float = _number(10.0, zero=0.1)
    normalize_logratios_by_length: bool = False
    reference_free: bool = False
    rpo_alpha: float = _number(10.0)
    simpo_gamma: float = _number(10.0)


@dataclass(frozen=True, kw_only=True)
class Kto:
    """Single answers with thumbs up or down."""

    dataset_format: ClassVar[str] = "feedback"

    beta: float = _number(10.0, zero=0.1)
    desirable_weight: float = _number(100.0, zero=1.0)
    undesirable_weight: float = _number(100.0, zero=1.0)


METHODS: Mapping[str, type[Dpo] | type[Kto]] = {"dpo": Dpo, "kto": Kto}
SUPERVISED = "sft"


def name_of(method: Method | None) -> str:
    return next((name for name, kind in METHODS.items() if isinstance(method, kind)), SUPERVISED)


def method_of_format(dataset_format: str) -> str:
    """The method that learns from files of a format."""
    return next((name for name, kind in METHODS.items() if kind.dataset_format == dataset_format), SUPERVISED)


def problems_of(method: Method) -> Iterator[tuple[str, str]]:
    """The settings that are out of bounds, and why."""
    for setting in _numbers(method):
        value, most, zero = getattr(method, setting.name), setting.metadata["most"], setting.metadata["zero"]
        if not math.isfinite(value) or not 0 <= value <= most:
            rule = f"must be 0 to {most:g}" if zero is None else f"must be above 0 to {most:g}, or 0 for {zero:g}"
            yield setting.name, f"{rule}; got {value:g}"


def with_defaults(method: Method) -> Method:
    defaults = {setting.name: setting.metadata["zero"] for setting in _numbers(method)}
    left_out = {name: zero for name, zero in defaults.items() if zero is not None and not getattr(method, name)}
    return replace(method, **left_out)


def _numbers(method: Method) -> list[Field[Any]]:
    return [setting for setting in fields(method) if "most" in setting.metadata]
