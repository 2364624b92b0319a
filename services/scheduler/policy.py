"""Who gets which devices: a pure function of a snapshot. It knows neither the database nor the clock.

First come, first served; a job gets its whole gang on one node, of one type, or nothing. A later job may pass an
earlier one only on nodes that the earlier one could never use, so that nobody starves.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Need:
    """What an owner asks for: `count` devices of one type on one node, together with at least `memory_bytes_min`."""

    owner: str
    count: int
    memory_bytes_min: int = 0
    # Empty means any.
    hardware_type: str = ""


@dataclass(frozen=True, kw_only=True)
class DeviceGroup:
    """The devices of one type on one node. `indices` are all of them, `free` those without an owner."""

    node: str
    hardware_type: str
    memory_bytes: int
    indices: frozenset[int]
    free: frozenset[int]
    # False while the node is away: it may come back, but gets nothing now.
    ready: bool = True

    def could_fit(self, need: Need) -> bool:
        """Whether the group, were it empty, is large enough. A device of unknown size counts as large enough."""
        if need.hardware_type and need.hardware_type != self.hardware_type:
            return False
        roomy = self.memory_bytes <= 0 or self.memory_bytes * need.count >= need.memory_bytes_min
        return len(self.indices) >= need.count and roomy

    def fits_now(self, need: Need) -> bool:
        return self.ready and self.could_fit(need) and len(self.free) >= need.count


@dataclass(frozen=True, kw_only=True)
class Placement:
    owner: str
    node: str
    hardware_type: str
    device_indices: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TooLarge:
    """No registered node could ever fit the need."""

    requested: str
    largest: str


def place(queue: Sequence[Need], groups: Iterable[DeviceGroup]) -> list[Placement]:
    """`queue` is in order of arrival. Every device is given out at most once."""
    open_groups = {(group.node, group.hardware_type): group for group in groups}
    reserved: set[tuple[str, str]] = set()
    placements = []
    for need in queue:
        group = choose(need, (each for key, each in open_groups.items() if key not in reserved))
        if group is None:
            # What it waits for is kept for it: later jobs would otherwise take each device as it becomes free.
            reserved |= {key for key, each in open_groups.items() if each.ready and each.could_fit(need)}
            continue
        taken = tuple(sorted(group.free)[: need.count])
        placements.append(
            Placement(owner=need.owner, node=group.node, hardware_type=group.hardware_type, device_indices=taken)
        )
        open_groups[(group.node, group.hardware_type)] = replace(group, free=group.free - frozenset(taken))
    return placements


def choose(need: Need, groups: Iterable[DeviceGroup]) -> DeviceGroup | None:
    """The tightest group that fits now, so that large gaps stay whole for large gangs."""
    fitting = [group for group in groups if group.fits_now(need)]
    return min(fitting, key=lambda group: (len(group.free), group.node, group.hardware_type), default=None)


def too_large(need: Need, groups: Sequence[DeviceGroup]) -> TooLarge | None:
    """None when some registered node could fit the need, or when no node is registered yet: then nothing is known."""
    if not groups or any(group.could_fit(need) for group in groups):
        return None
    typed = [group for group in groups if not need.hardware_type or group.hardware_type == need.hardware_type]
    largest = max(typed or groups, key=lambda group: (len(group.indices), group.memory_bytes, group.node))
    return TooLarge(requested=_need_in_words(need), largest=_group_in_words(largest))


def waiting_for(need: Need, groups: Sequence[DeviceGroup], position: int) -> str:
    """Why a queued need has no devices, in words."""
    words = _need_in_words(need)
    fitting = [group for group in groups if group.could_fit(need)]
    if not groups:
        return f"{words}; no node is registered"
    if not fitting:
        return f"{words}; no registered node is that large"
    ready = [group for group in fitting if group.ready]
    if not ready:
        return f"{words}; the nodes that could fit it are away"
    best = max(ready, key=lambda group: (len(group.free), group.node))
    status = f"{len(best.free)} of {len(best.indices)} free on {best.node}"
    if position > 1 and len(best.free) >= need.count:
        return f"{words}; {status}, kept for a job before it"
    return f"{words}; {status}"


def estimated_wait_s(position: int, remaining_s: Sequence[float]) -> int | None:
    """`remaining_s` of the running jobs on nodes that could fit: the n-th in the queue waits for the n-th to end."""
    if not 1 <= position <= len(remaining_s):
        return None
    return max(0, round(sorted(remaining_s)[position - 1]))


def memory_bytes_min(parameter_count: int, *, all_weights: bool) -> int:
    """A lower bound on device memory: below it the run fails for certain, above it nothing is promised.

    Weights in 16 bits; training all of them adds a gradient and two moments of the same width.
    """
    return parameter_count * (8 if all_weights else 2)


def _need_in_words(need: Need) -> str:
    devices = f"{need.count} GPU{'s' if need.count > 1 else ''} on one node"
    typed = f" of type {need.hardware_type}" if need.hardware_type else ""
    memory = f" with {_gib(need.memory_bytes_min)} together" if need.memory_bytes_min >= 2**30 else ""
    return devices + typed + memory


def _group_in_words(group: DeviceGroup) -> str:
    size = f" with {_gib(group.memory_bytes)} each" if group.memory_bytes > 0 else ""
    return f"{len(group.indices)} of type {group.hardware_type}{size} ({group.node})"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
