"""The processes of one run and what they do together. Not pure: environment, peers.

They deal rows, add numbers and gradients, agree and wait. A run alone is a group of one, for which every function here
is the identity. The environment that torch's elastic launcher gives to a worker is read here once. It knows no model,
no file and no launcher.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from services.trainer.train.settings.failures import platform_failure

# Rank 0 may export and prove for long while the others wait for it.
PATIENCE = timedelta(minutes=60)
# Gradients travel in pieces of this size, so that their copies stay small beside the model.
BUCKET_BYTES = 64 * 1024**2


@dataclass(frozen=True, kw_only=True)
class Group:
    """`rank` counts over all nodes, from the leading one on; `local_rank` counts on this node. When `sharded`, every
    process holds a part of the weights (FSDP2). Else all of them hold the same weights (data parallel)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    nodes: int = 1
    sharded: bool = False

    @property
    def leads(self) -> bool:
        """One process speaks, writes and proves. A run alone has only this one."""
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes, in double precision; the same on each of them."""
        if self.size == 1:
            return list(values)
        return [float(value) for value in self.summed(torch.tensor(values, dtype=torch.float64)).tolist()]

    def summed(self, tensor: Any) -> Any:
        """The sum of a tensor in the machine's memory, in its own precision. The tensor itself may take the sum."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def add(self, tensor: Any) -> Any:
        """The sum of a tensor over the processes, in place, on the device that it is on."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        return flag if self.size == 1 else self.total([float(flag)])[0] > 0.0

    def least(self, value: int) -> int:
        """The smallest over the processes."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return int(tensor.item())

    def wait(self) -> None:
        """Until every process is here."""
        self.any(False)

    def add_gradients(self, parameters: Iterable[Any]) -> None:
        """Makes each gradient the sum over the processes. A gradient that no process has stays None: the optimizer
        skips it."""
        if self.size == 1 or self.sharded:
            # Sharded gradients are summed while the backward pass runs.
            return
        all_parameters = list(parameters)
        present = self.total([float(parameter.grad is not None) for parameter in all_parameters])
        moved = [parameter for parameter, count in zip(all_parameters, present, strict=True) if count > 0]
        for parameter in moved:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([parameter.grad for parameter in moved]):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, summed in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))


ALONE = Group()


def join_group(
    device: str, *, sharded: bool, leading_node: bool = True, environment: Mapping[str, str] = os.environ
) -> Group:
    """Meets the other processes. A worker of the elastic launcher calls it once. Numbers travel by gloo, tensors of a
    GPU by nccl. Of several nodes exactly one is the `leading_node`."""
    local_rank = int(environment["LOCAL_RANK"])
    if device.startswith("cuda"):
        torch.cuda.set_device(local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)
    nodes = int(environment.get("GROUP_WORLD_SIZE", "1"))
    return Group(
        rank=_rank_after(leading_node and local_rank == 0, nodes),
        size=dist.get_world_size(),
        local_rank=local_rank,
        nodes=nodes,
        sharded=sharded,
    )


def _rank_after(first: bool, nodes: int) -> int:
    """The rank when the leading process has rank 0: the rendezvous counts the nodes in the order of their addresses."""
    rank, size = int(dist.get_rank()), int(dist.get_world_size())
    if nodes == 1:
        return rank
    leading = torch.zeros(size, dtype=torch.int64)
    leading[rank] = int(first)
    dist.all_reduce(leading)
    if int(leading.sum()) != 1:
        raise platform_failure("TRAINING_FAILED", f"{int(leading.sum())} of {nodes} nodes lead this run instead of one")
    return (rank - int(leading.argmax())) % size


def leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def deal(lengths: Mapping[int, int], size: int) -> list[list[int]]:
    """Rows to processes, a pure function of their lengths: longest first, each to the one that has the fewest tokens so
    far (Graham 1969: at most a third more than the best division). A process may get none."""
    shares: list[list[int]] = [[] for _ in range(size)]
    loads = [0] * size
    for row in sorted(lengths, key=lambda row: (-lengths[row], row)):
        lightest = loads.index(min(loads))
        shares[lightest].append(row)
        loads[lightest] += lengths[row]
    return shares


def seed_of_step(seed: int, step: int, rank: int) -> int:
    """The seed of dropout for a process in a step, a function of nothing else. So no process has a random state that a
    checkpoint would have to carry, and a resume on other processes misses none."""
    return (seed * 1_000_003 + step * 4096 + rank) % 2**63


def _buckets(gradients: Sequence[Any]) -> list[list[Any]]:
    """Runs of gradients of one type, each at most BUCKET_BYTES or one gradient."""
    buckets: list[list[Any]] = []
    used = 0
    for gradient in gradients:
        size_bytes = gradient.numel() * gradient.element_size()
        if not buckets or used + size_bytes > BUCKET_BYTES or buckets[-1][0].dtype != gradient.dtype:
            buckets.append([])
            used = 0
        buckets[-1].append(gradient)
        used += size_bytes
    return buckets
