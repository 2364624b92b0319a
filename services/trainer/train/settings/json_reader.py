"""Reads a JSON object field by field within bounds and collects every violation.

So a caller hears of all broken fields at once. It knows no setting by name.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from services.trainer.train.settings.failures import Violation

_MISSING: Any = object()


class Reader:
    """One JSON object at `path`. A getter whose field is wrong notes a violation and returns a harmless value."""

    def __init__(self, value: Any, path: str, violations: list[Violation]) -> None:
        self.violations = violations
        self._path = path
        self._seen: set[str] = set()
        self._value: Mapping[str, Any] = value if isinstance(value, dict) else {}
        if not isinstance(value, dict):
            self.refuse("", "must be a JSON object")

    def refuse(self, name: str, description: str) -> None:
        field = f"{self._path}.{name}" if self._path and name else self._path or name or "$"
        self.violations.append(Violation(field=field, description=description))

    def raw(self, name: str, default: Any = _MISSING) -> Any:
        self._seen.add(name)
        if name in self._value:
            return self._value[name]
        if default is _MISSING:
            self.refuse(name, "is required")
            return None
        return default

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self.raw(name, _MISSING if default is None else default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            if name in self._value:
                self.refuse(name, f"must be an integer from {low} to {high}, not {_shown(value)}")
            return low
        return value

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        return None if self.raw(name, None) is None else self.integer(name, low, high)

    def number(self, name: str, low: float, high: float, default: float, *, above_low: bool = False) -> float:
        value = self.raw(name, default)
        sound = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not sound or not low <= value <= high or (above_low and value == low):
            low_text = f"above {low:g}" if above_low else f"from {low:g}"
            self.refuse(name, f"must be a number {low_text} to {high:g}, not {_shown(value)}")
            return default
        return float(value)

    def optional_number(self, name: str, low: float, high: float, *, above_low: bool = False) -> float | None:
        return None if self.raw(name, None) is None else self.number(name, low, high, high, above_low=above_low)

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw(name, default)
        if not isinstance(value, bool):
            self.refuse(name, f"must be true or false, not {_shown(value)}")
            return default
        return value

    def choice(self, name: str, choices: Sequence[Any], default: Any) -> Any:
        value = self.raw(name, default)
        if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
            self.refuse(name, f"must be one of {', '.join(_shown(choice) for choice in choices)}, not {_shown(value)}")
            return default
        return value

    def text(self, name: str, length_max: int, default: str | None = None) -> str:
        value = self.raw(name, _MISSING if default is None else default)
        if not isinstance(value, str) or len(value) > length_max or "\0" in value:
            if name in self._value:
                self.refuse(name, f"must be a string of at most {length_max} characters, not {_shown(value)}")
            return default or ""
        text: str = value
        if default is None and not text:
            self.refuse(name, "must not be empty")
        return text

    def optional_text(self, name: str, length_max: int) -> str | None:
        return None if self.raw(name, None) in (None, "") else self.text(name, length_max)

    def child(self, name: str, default: Any = _MISSING) -> "Reader":
        value = self.raw(name, default)
        path = f"{self._path}.{name}" if self._path else name
        missing = value is None and name not in self._value
        return Reader({} if missing else value, path, self.violations)

    def finish(self) -> None:
        """Refuses every field that no getter asked for: a misspelt setting must not fall back to its default unseen."""
        for name in sorted(set(self._value) - self._seen):
            self.refuse(name, "is not a known field")


def _shown(value: Any) -> str:
    text = {True: "true", False: "false"}.get(value, repr(value)) if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
