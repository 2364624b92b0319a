"""The rows and dimensions of a report of what things cost. Plain values."""

import enum
from dataclasses import dataclass


class Dimension(enum.StrEnum):
    PROJECT = "project"
    MODEL = "model"
    DAY = "day"
    RESOURCE = "resource"
    API_KEY = "api_key"
    KIND = "kind"


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """`keys` are in the order of the dimensions; `quantity` is 0 where units mix."""

    keys: tuple[str, ...]
    quantity: int
    amount_nanos_usd: int
    usage_record_count: int
