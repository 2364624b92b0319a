"""Who gets which devices: a pure function of a snapshot. It knows neither the database nor the clock.

First come, first served. A job gets its whole gang of one type or nothing: on one node, or, when no node is that large,
in equal parts on as few nodes as there can be. A later job may pass an earlier one only on nodes that the earlier one
could never use, so that nobody starves.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

# A training job runs on at most so many nodes.
GANG_NODES_MAX = 16


@dataclass(frozen=True, kw_only=True)
class Need:
    """What an owner asks for: `count` devices of one type on at most `nodes_max` nodes, which together have at least
    `memory_bytes_min`."""

    owner: str
    count: int
    memory_bytes_min: int = 0
    # Empty means any.
    hardware_type: str = ""
    nodes_max: int = 1
    # The node that its owner runs on; empty means any.
    node: str = ""
    # Where it failed before; it goes there only when no other node that is ready could ever take it.
    avoided_nodes: frozenset[str] = frozenset()

    def part(self, nodes: int) -> "Need":
        """What each of so many nodes has to give."""
        return replace(
            self, count=self.count // nodes, memory_bytes_min=-(-self.memory_bytes_min // nodes), nodes_max=1
        )


def job_need(owner: str, gpu_count: int, memory_bytes_min: int, avoided_nodes: frozenset[str] = frozenset()) -> Need:
    """What a training job asks for: it may run on several nodes."""
    return Need(
        owner=owner,
        count=gpu_count,
        memory_bytes_min=memory_bytes_min,
        nodes_max=GANG_NODES_MAX,
        avoided_nodes=avoided_nodes,
    )


@dataclass(frozen=True, kw_only=True)
class DeviceGroup:
    """The devices of one type on one node. `indices` are all of them, `free` those without an owner."""

    node: str
    hardware_type: str
    memory_bytes: int
    indices: frozenset[int]
    free: frozenset[int]
    # False while the node is away or in quarantine: it may come back, but gets nothing now.
    ready: bool = True
    # Why the node is in quarantine; empty when it is not.
    quarantine_reason: str = ""

    def could_fit(self, need: Need) -> bool:
        """Whether the group, were it empty, is large enough. A device of unknown size counts as large enough."""
        if need.hardware_type and need.hardware_type != self.hardware_type:
            return False
        roomy = self.memory_bytes <= 0 or self.memory_bytes * need.count >= need.memory_bytes_min
        return len(self.indices) >= need.count and roomy

    def fits_now(self, need: Need) -> bool:
        return self.ready and self.could_fit(need) and len(self.free) >= need.count


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """A snapshot of all devices, with the incarnation that each node had then. Of too many nodes some are left out."""

    groups: tuple[DeviceGroup, ...]
    incarnations: dict[str, str]
    nodes_left_out: int = 0


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The devices of one node. In a gang over several nodes it leads, and `followers` are the parts of the others."""

    owner: str
    node: str
    hardware_type: str
    device_indices: tuple[int, ...]
    followers: tuple["Placement", ...] = ()


@dataclass(frozen=True, kw_only=True)
class TooLarge:
    """No registered node could ever fit the need."""

    requested: str
    largest: str


def place(queue: Sequence[Need], groups: Iterable[DeviceGroup]) -> list[Placement]:
    """`queue` is in order of arrival. Every device is given out at most once."""
    return Placing(groups).add(queue)


class Placing:
    """One look at a queue that is read in parts: what earlier parts took or wait for is not there for later ones."""

    def __init__(self, groups: Iterable[DeviceGroup]) -> None:
        self._open = {(group.node, group.hardware_type): group for group in groups}
        self._reserved: set[tuple[str, str]] = set()
        # What could not be placed cannot be placed for a later job either: devices only become fewer.
        self._hopeless: set[Need] = set()

    @property
    def has_room(self) -> bool:
        """Whether a later job could still get a device."""
        return any(group.ready and group.free and key not in self._reserved for key, group in self._open.items())

    def add(self, queue: Sequence[Need]) -> list[Placement]:
        """What the next part of the queue gets, in order of arrival."""
        placements = []
        for need in queue:
            ask = replace(need, owner="")
            if ask in self._hopeless:
                continue
            placement = self._place(need)
            if placement is None:
                self._hopeless.add(ask)
            else:
                placements.append(placement)
        return placements

    def _place(self, need: Need) -> Placement | None:
        allowed = allowed_groups(need, list(self._open.values()))
        nodes = nodes_for(need, allowed)
        unreserved = [each for each in allowed if (each.node, each.hardware_type) not in self._reserved]
        chosen = choose_gang(need, nodes, unreserved)
        if not chosen:
            # What it waits for is kept for it: later jobs would otherwise take each device as it becomes free.
            part = need.part(max(1, nodes))
            self._reserved |= {
                (each.node, each.hardware_type) for each in allowed if each.ready and each.could_fit(part)
            }
            return None
        first, *others = [take(need, len(chosen), group) for group in chosen]
        for group, taken in zip(chosen, (first, *others), strict=True):
            left = group.free - frozenset(taken.device_indices)
            self._open[(group.node, group.hardware_type)] = replace(group, free=left)
        return replace(first, followers=tuple(others))


def allowed_groups(need: Need, groups: Sequence[DeviceGroup]) -> list[DeviceGroup]:
    """The groups without those of avoided nodes, as long as others that are ready could serve the need."""
    others = [group for group in groups if group.node not in need.avoided_nodes]
    could_serve = nodes_for(need, [group for group in others if group.ready]) > 0
    return others if could_serve else list(groups)


def nodes_for(need: Need, groups: Sequence[DeviceGroup]) -> int:
    """The least number of nodes that could serve the need, were they empty; 0 when no number could."""
    for nodes in range(1, need.nodes_max + 1):
        if need.count % nodes:
            continue
        part = need.part(nodes)
        fitting = Counter(group.hardware_type for group in groups if group.could_fit(part))
        if max(fitting.values(), default=0) >= nodes:
            return nodes
    return 0


def choose_gang(need: Need, nodes: int, groups: Iterable[DeviceGroup]) -> list[DeviceGroup]:
    """The tightest groups of one type that fit now, one on each of so many nodes; none unless there are as many."""
    if nodes == 0:
        return []
    part = need.part(nodes)
    by_type: dict[str, list[DeviceGroup]] = {}
    for group in groups:
        if group.fits_now(part):
            by_type.setdefault(group.hardware_type, []).append(group)
    gangs = [sorted(fitting, key=_tightness)[:nodes] for fitting in by_type.values() if len(fitting) >= nodes]
    return min(gangs, key=lambda gang: [_tightness(group) for group in gang], default=[])


def choose(need: Need, groups: Iterable[DeviceGroup]) -> DeviceGroup | None:
    """The tightest group that fits now, so that large gaps stay whole for large gangs."""
    return min((group for group in groups if group.fits_now(need)), key=_tightness, default=None)


def take(need: Need, nodes: int, group: DeviceGroup) -> Placement:
    """The part of a need over so many nodes that this group gives."""
    return Placement(
        owner=need.owner,
        node=group.node,
        hardware_type=group.hardware_type,
        device_indices=tuple(sorted(group.free)[: need.count // nodes]),
    )


def too_large(need: Need, groups: Sequence[DeviceGroup]) -> TooLarge | None:
    """None when the registered nodes could serve the need, or when no node is registered yet: then nothing is known."""
    if not groups or nodes_for(need, groups):
        return None
    typed = [group for group in groups if not need.hardware_type or group.hardware_type == need.hardware_type]
    largest = max(typed or groups, key=lambda group: (len(group.indices), group.memory_bytes, group.node))
    return TooLarge(requested=_need_in_words(need), largest=_group_in_words(largest))


def waiting_for(need: Need, groups: Sequence[DeviceGroup], position: int) -> str:
    """Why a queued need has no devices, in words."""
    groups = allowed_groups(need, groups)
    nodes = nodes_for(need, groups)
    part = need.part(max(1, nodes))
    words = _need_in_words(part if nodes else need)
    if nodes > 1:
        words = f"{words}, on {nodes} nodes at the same time"
    fitting = [group for group in groups if group.could_fit(part)]
    if not groups:
        return f"{words}; no node is registered"
    if not nodes:
        return f"{words}; no registered node is that large"
    ready = [group for group in fitting if group.ready]
    if not ready:
        quarantined = next((group for group in fitting if group.quarantine_reason), None)
        if quarantined is not None:
            return f"{words}; {quarantined.node} is in quarantine: {quarantined.quarantine_reason}"
        return f"{words}; the nodes that could fit it are away"
    best = max(ready, key=lambda group: (len(group.free), group.node))
    status = f"{len(best.free)} of {len(best.indices)} free on {best.node}"
    if position > 1 and len(best.free) >= part.count:
        return f"{words}; {status}, kept for a job before it"
    return f"{words}; {status}"


def estimated_wait_s(position: int, remaining_s: Sequence[float]) -> int | None:
    """`remaining_s` of the running jobs on nodes that could fit: the n-th in the queue waits for the n-th to end."""
    if not 1 <= position <= len(remaining_s):
        return None
    return max(0, round(sorted(remaining_s)[position - 1]))


def memory_bytes_min(parameter_count: int, *, all_weights: bool) -> int:
    """A lower bound on device memory: below it the run fails for certain, above it nothing is promised.

    Under an adapter the weights are held in 16 bits. When they are trained themselves they are float32, and so are
    their gradients and two moments.
    """
    return parameter_count * (16 if all_weights else 2)


def _tightness(group: DeviceGroup) -> tuple[int, str, str]:
    return len(group.free), group.node, group.hardware_type


def _need_in_words(need: Need) -> str:
    nodes_max = min(need.nodes_max, need.count)
    where = "on one node" if nodes_max == 1 else f"on at most {nodes_max} nodes"
    devices = f"{need.count} GPU{'s' if need.count > 1 else ''} {where}"
    typed = f" of type {need.hardware_type}" if need.hardware_type else ""
    memory = f" with {_gib(need.memory_bytes_min)} together" if need.memory_bytes_min >= 2**30 else ""
    return devices + typed + memory


def _group_in_words(group: DeviceGroup) -> str:
    size = f" with {_gib(group.memory_bytes)} each" if group.memory_bytes > 0 else ""
    return f"{len(group.indices)} of type {group.hardware_type}{size} ({group.node})"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
