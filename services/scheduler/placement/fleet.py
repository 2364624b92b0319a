"""A snapshot of all devices for the policy. Pure."""

from dataclasses import dataclass

from services.scheduler.placement.policy import DeviceGroup


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """`incarnations` says which start of its agent each node had then."""

    groups: tuple[DeviceGroup, ...]
    incarnations: dict[str, str]
