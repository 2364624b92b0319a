"""Reads a safetensors file of strangers: its header within bounds, its data in small blocks. Not pure: disk.

It refuses to know what the matrices are for.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from formats.strict_json import json_value

HEADER_BYTES_MAX = 16 << 20
MATRICES_MAX = 1 << 16
READ_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class _Dtype:
    """How to look at a float's bits: all bits of `exponent` set means infinite or not a number. None: it always is
    one."""

    unsigned: npt.DTypeLike
    item_bytes: int
    exponent: int | None


_FLOATS = {
    "F32": _Dtype(unsigned="<u4", item_bytes=4, exponent=0x7F800000),
    "F16": _Dtype(unsigned="<u2", item_bytes=2, exponent=0x7C00),
    "BF16": _Dtype(unsigned="<u2", item_bytes=2, exponent=0x7F80),
}
# What else whole models are kept in, quantized ones among them.
_DTYPES = _FLOATS | {
    "F64": _Dtype(unsigned="<u8", item_bytes=8, exponent=0x7FF0000000000000),
    "F8_E5M2": _Dtype(unsigned="u1", item_bytes=1, exponent=0x7C),
    # Has no infinity, and its only NaN has every bit but the sign.
    "F8_E4M3": _Dtype(unsigned="u1", item_bytes=1, exponent=0x7F),
    **{name: _Dtype(unsigned="u1", item_bytes=1, exponent=None) for name in ("BOOL", "U8", "I8", "F8_E8M0")},
    **{name: _Dtype(unsigned="<u2", item_bytes=2, exponent=None) for name in ("U16", "I16")},
    **{name: _Dtype(unsigned="<u4", item_bytes=4, exponent=None) for name in ("U32", "I32")},
    **{name: _Dtype(unsigned="<u8", item_bytes=8, exponent=None) for name in ("U64", "I64")},
}
DIMENSIONS_MAX = 8


class FileProblem(Exception):
    """The first thing that is wrong with the file, in words for its owner."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One entry of the header; `start` and `end` are byte offsets in the whole file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: BinaryIO, file_bytes: int, *, matrices_only: bool = True) -> list[Tensor]:
    """Tensors in file order, proven to tile the data exactly; `matrices_only` takes nothing but matrices of floats.
    Raises FileProblem."""
    prefix = file.read(8)
    if len(prefix) < 8:
        raise FileProblem("the file is truncated: it has no header")
    (header_bytes,) = struct.unpack("<Q", prefix)
    if header_bytes > HEADER_BYTES_MAX:
        raise FileProblem(f"its header claims {header_bytes} bytes, the limit is {HEADER_BYTES_MAX}")
    position = 8 + header_bytes
    if position > file_bytes:
        raise FileProblem(f"the file is truncated: its header claims {header_bytes} bytes")
    entries = _parse_header(file.read(header_bytes))
    matrices = [_parse_entry(name, entry, position, matrices_only) for name, entry in entries.items()]
    matrices.sort(key=lambda matrix: (matrix.start, matrix.end))
    for matrix in matrices:
        if matrix.start != position:
            raise FileProblem(f"the data of {matrix.name} overlaps another matrix or leaves a gap")
        position = matrix.end
    if position != file_bytes:
        raise FileProblem(f"the file has {file_bytes} bytes where its header describes {position}")
    return matrices


def check_finite(file: BinaryIO, matrices: Sequence[Tensor]) -> None:
    """Read every number once, a few MiB at a time. Raises FileProblem naming the matrix that is not finite."""
    for matrix in matrices:
        dtype = _DTYPES[matrix.dtype]
        if dtype.exponent is None:
            continue
        for block in _blocks(file, matrix):
            bits = np.frombuffer(block, dtype=dtype.unsigned)
            if bool(np.any((bits & dtype.exponent) == dtype.exponent)):
                raise FileProblem(f"{matrix.name} holds values that are infinite or not numbers")


def _parse_header(raw: bytes) -> dict[str, Any]:
    try:
        header = json_value(raw)
    except ValueError as error:
        raise FileProblem(f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise FileProblem("its header is not a JSON object")
    header.pop("__metadata__", None)
    if not 1 <= len(header) <= MATRICES_MAX:
        raise FileProblem(f"it holds {len(header)} matrices, expected 1 to {MATRICES_MAX}")
    return header


def _parse_entry(name: str, entry: object, data_start: int, matrices_only: bool) -> Tensor:
    shown = name[:128]
    if not isinstance(entry, dict):
        raise FileProblem(f"the header entry of {shown} is not an object")
    taken = _FLOATS if matrices_only else _DTYPES
    dtype = taken.get(str(entry.get("dtype")))
    if dtype is None:
        raise FileProblem(f"{shown} has dtype {str(entry.get('dtype'))[:32]}, expected one of {', '.join(taken)}")
    shape = _sizes(entry.get("shape"), low=1 if matrices_only else 0)
    if shape is None or (matrices_only and len(shape) != 2):
        raise FileProblem(f"{shown} is not a matrix" if matrices_only else f"{shown} has no shape")
    offsets = _sizes(entry.get("data_offsets"), low=0)
    if offsets is None or len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.item_bytes:
        raise FileProblem(f"the bytes of {shown} do not match its shape {list(shape)}")
    start, end = offsets
    return Tensor(name=name, dtype=entry["dtype"], shape=shape, start=data_start + start, end=data_start + end)


def _sizes(value: object, *, low: int) -> tuple[int, ...] | None:
    if not isinstance(value, list) or len(value) > DIMENSIONS_MAX:
        return None
    if not all(isinstance(item, int) and not isinstance(item, bool) and low <= item < 1 << 48 for item in value):
        return None
    return tuple(value)


def _blocks(file: BinaryIO, matrix: Tensor) -> Iterator[bytes]:
    file.seek(matrix.start)
    left = matrix.end - matrix.start
    while left:
        # Sizes of matrices and of blocks are multiples of the item size, so a block never splits a number.
        block = file.read(min(left, READ_BYTES))
        if not block or len(block) % _DTYPES[matrix.dtype].item_bytes:
            raise FileProblem(f"the file is truncated inside {matrix.name}")
        left -= len(block)
        yield block
