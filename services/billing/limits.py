"""The largest values that billing takes as meant; beyond them a request or an event is a mistake or an attack."""

from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Largest counts that are taken as meant; beyond them a request is a mistake or an attack."""

    tokens_max: int = 10**14
    epochs_max: int = 1000
    evaluations_max: int = 1000
    amount_nanos_usd_max: int = 10**18


@dataclass(frozen=True, kw_only=True)
class FactLimits:
    tokens_max: int = 10**12
    devices_max: int = 4096
    nodes_max: int = 4096
    steps_max: int = 10**9
    # How far a node's clock may run ahead of ours.
    clock_skew: timedelta = timedelta(hours=1)
