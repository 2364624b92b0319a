"""Weights too large for one device: FSDP2 over a model's layers, and its tensors back as wholes or as shards on disk.

Shards are written by torch's distributed checkpoint through its Hugging Face storage: safetensors whose headers say
which part of which tensor they hold, no pickle, readable on any number of processes. It knows no position and no
manifest.
"""

import types
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.modeling.fsdp_exchanges import Exchanges
from services.trainer.train.runtime.process_group import Group

_MODEL, _OPTIMIZER = "model.", "optimizer."


def shard(model: CausalModel, group: Group) -> CausalModel:
    """Every layer becomes a unit that is gathered for its own pass and given back after it; what is around the layers
    (the embeddings, the last norm, the head) is one more. The parameters keep their names."""
    kind = "cuda" if model.device.startswith("cuda") else "cpu"
    mesh = init_device_mesh(kind, (group.size,))
    exchanges = Exchanges(model.base)
    for module in (*getattr(model.base.get_decoder(), "layers", ()), model.base):
        exchanges.listen_to(fully_shard(module, mesh=mesh, reshard_after_forward=True))
    # The engine calls parts of the model, not the model: this is the door behind which the outer weights are whole.
    model.base.call_gathered = types.MethodType(_call, model.base)
    register_fsdp_forward_method(model.base, "call_gathered")
    # Copies in 16 bits would stay whole between the passes, where the weights themselves are given back.
    return replace(model, call=model.base.call_gathered, exchanges=exchanges, autocast=False)


def whole(tensors: Mapping[str, Any], *, keep: bool) -> dict[str, Any]:
    """Gathers the tensors in the memory of a process that keeps them; other processes get none. All processes call it
    together."""
    gathered = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            gathered[name] = full.detach().cpu()
    return gathered


def copy_whole(target: Any, source: Any) -> None:
    """A whole tensor, the same on every process, into a parameter or a moment that may be sharded."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            source = source.to(target.device, target.dtype)
            target.copy_(distribute_tensor(source, target.device_mesh, target.placements))
        else:
            target.copy_(source)


def save_shards(folder: Path, trainable: Mapping[str, Any], moments: Mapping[str, Any]) -> None:
    """Each process writes its part. All processes call it together, with one folder that all of them see."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(_flat(trainable, moments), storage_writer=writer)


def load_shards(folder: Path, trainable: Mapping[str, Any], moments: Mapping[str, Any], group: Group) -> None:
    """Fills the given tensors, whole or sharded over any number of processes, in place."""
    tensors = {name: tensor.detach() for name, tensor in _flat(trainable, moments).items()}
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=group.size == 1)


def load_weights(folder: Path, trainable: Mapping[str, Any], group: Group) -> None:
    """Fills the given weights as `load_shards` does. Raises ValueError when the shards are not of exactly these
    weights."""
    stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    found = {name: tuple(stored[name].size) for name in stored if name.startswith(_MODEL)}
    if found != {_MODEL + name: tuple(tensor.shape) for name, tensor in trainable.items()}:
        raise ValueError("the stored weights are not those of this model and these settings")
    load_shards(folder, trainable, {}, group)


def _flat(trainable: Mapping[str, Any], moments: Mapping[str, Any]) -> dict[str, Any]:
    return {_MODEL + name: tensor for name, tensor in trainable.items()} | {
        _OPTIMIZER + name: tensor for name, tensor in moments.items()
    }


def _call(_module: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)
