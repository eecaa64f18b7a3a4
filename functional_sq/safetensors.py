"""Tensors and strings to a safetensors file and back: the same bits, a whole file or none.

    8 bytes      length of the header, little-endian
    header       JSON: name -> dtype, shape, data_offsets; "__metadata__" -> strings
    data         the tensors' bytes, little-endian, without gaps

Any reader of that format opens the file. Written here, for the package depends on torch alone.

Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
from collections.abc import Mapping
from io import BufferedReader
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor

from functional_sq.files import replacing

__all__ = ["DAMAGED", "fault", "read", "write"]

DAMAGED: Final = "the file is damaged: copy it again, or save it again"
"""What an error says of a file that no writer leaves so."""

_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Every dtype of the format whose elements are whole bytes; it has no complex128 and no quantized one."""
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}


def fault(value: object) -> str | None:
    """Say what makes `value` unfit for a file, with the remedy, or None.

    Example:
        >>> import torch
        >>> from functional_sq.safetensors import fault
        >>> fault(torch.ones(2))
        >>> fault(3)
        'is a int; give a tensor'
        >>> fault(torch.ones(2, device="meta"))
        'is on the meta device and has no values; load them first'
    """
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}; give a tensor"
    # A subclass has its values elsewhere, or in several tensors. A parameter, detached, is a Tensor.
    if type(value.detach()) is not Tensor:
        return f"is a {type(value).__name__}; give the tensors that it is made of"
    if value.layout is not torch.strided:
        return f"has the layout {value.layout}; give value.to_dense()"
    if value.dtype not in _NAMES:
        return f"is {value.dtype}; safetensors holds {', '.join(map(str, _NAMES))}"
    if value.is_meta:
        return "is on the meta device and has no values; load them first"
    return None


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all; the same arguments give the same bytes.

    Args:
        path: the file; one that exists is replaced.
        tensors: name to tensor, from any device; only their values count, not strides or shared memory.
        metadata: any strings.

    Raises:
        TypeError: `fault` has something to say of a tensor; nothing was written.
        OSError: the file cannot be written; nothing is left behind.

    Example: see `read`.
    """
    for name, t in tensors.items():
        if found := fault(t):
            raise TypeError(f"tensor {name!r} {found}")
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    # Wide elements first, so that each tensor lies at a multiple of its element size.
    placed = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    offsets: dict[str, tuple[int, int]] = {}
    end = 0
    for name in placed:
        offsets[name] = (end, end + tensors[name].nbytes)
        end = offsets[name][1]
    for name, t in tensors.items():
        header[name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": offsets[name]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in placed:
            _write_values(file, tensors[name])


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file; each tensor goes from the disk to its own memory, and nowhere else.

    Args:
        path: the file.

    Returns:
        the tensors, on the CPU, aligned as torch aligns its own, and the metadata.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut short or damaged, or was written by another program. The message
            does not have the path: the caller, who knows what the file was to be, adds it.

    Example:
        >>> import pathlib, tempfile, torch
        >>> from functional_sq.safetensors import read, write
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "x.safetensors")
        ...     write(path, {"x": torch.arange(3)}, {"unit": "m"})
        ...     read(path)
        ({'x': tensor([0, 1, 2])}, {'unit': 'm'})
    """
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        raw = f.read(9)
        if raw[8:9] not in (b"{", b""):
            raise ValueError("not a safetensors file; give a file written by save()")
        start = 8 + int.from_bytes(raw[:8], "little")
        if size < max(start, 9):
            raise ValueError(f"cut short: {size} bytes, and the header alone needs {max(start, 9)}; {DAMAGED}")
        f.seek(8)
        spans, metadata = _parse(f.read(start - 8), size - start)
        tensors = {name: _read_values(f, start + first, dtype, shape) for name, (dtype, shape, first) in spans.items()}
    return tensors, metadata


def _parse(header: bytes, size: int) -> tuple[dict[str, tuple[torch.dtype, list[int], int]], dict[str, str]]:
    """Return dtype, shape and first byte of each tensor, and the metadata; `size` bytes of data follow."""
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"the header is not JSON ({e}); {DAMAGED}") from e
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"__metadata__ is not a map of strings; {DAMAGED}")

    spans = {name: _span(name, entry) for name, entry in entries.items()}
    end = 0
    for name, (_, _, (first, last)) in sorted(spans.items(), key=lambda item: item[1][2]):
        if first != end:
            raise ValueError(f"tensor {name!r} starts at byte {first} of the data, expected {end}; {DAMAGED}")
        end = last
    if size != end:
        kind = "cut short" if size < end else "too long"
        raise ValueError(f"{kind}: {size} bytes of data, and the header describes {end}; {DAMAGED}")
    return {name: (dtype, shape, first) for name, (dtype, shape, (first, _)) in spans.items()}, metadata


def _span(name: str, entry: Any) -> tuple[torch.dtype, list[int], tuple[int, int]]:
    """Check one entry of the header; return dtype, shape and first and last byte."""
    try:
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sizes = [*shape, first, last]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"tensor {name!r} is described as {entry!r}; {DAMAGED}") from None
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"tensor {name!r} has dtype {dtype!r}, known: {', '.join(_DTYPES)}; update functional_sq")
    # 2**63: what torch takes as a size.
    if not all(type(n) is int and 0 <= n < 2**63 for n in sizes) or math.prod(n or 1 for n in shape) >= 2**63:
        raise ValueError(f"tensor {name!r} has shape {shape} at bytes {first} to {last}; {DAMAGED}")
    needed = math.prod(shape) * _DTYPES[dtype].itemsize
    if last - first != needed:
        raise ValueError(f"tensor {name!r} has {last - first} bytes, and its shape {shape} needs {needed}; {DAMAGED}")
    return _DTYPES[dtype], list(shape), (first, last)


def _write_values(f: BinaryIO, t: Tensor) -> None:
    if t.numel() == 0:
        return
    values = t.detach().cpu().resolve_conj().resolve_neg().contiguous()
    raw = _little_endian(values.reshape(-1).view(torch.uint8), t.itemsize)
    f.write(_memory(raw))


def _read_values(f: BufferedReader, first: int, dtype: torch.dtype, shape: list[int]) -> Tensor:
    # Torch's own memory, not a view of the file: aligned, so that a product takes the same kernel as
    # before, and independent of what happens to the file.
    t = torch.empty(shape, dtype=dtype, device="cpu")
    if t.numel() == 0:
        return t
    raw = t.reshape(-1).view(torch.uint8)
    f.seek(first)
    if f.readinto(_memory(raw)) != t.nbytes:
        raise ValueError(f"cut short while it was read; {DAMAGED}")
    return _little_endian(raw, dtype.itemsize).view(dtype).reshape(shape)


def _memory(raw: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor; Tensor.numpy() needs numpy, which torch does not."""
    return memoryview((ctypes.c_ubyte * raw.numel()).from_address(raw.data_ptr())).cast("B")


def _little_endian(raw: Tensor, itemsize: int) -> Tensor:
    """Exchange the machine's byte order and the file's, either way."""
    return raw if sys.byteorder == "little" else raw.reshape(-1, itemsize).flip(1).reshape(-1)
