"""States of several ranks become one: `merge` over a `torch.distributed` group.

A merge is a table of reductions, and reductions are what a collective does: the statistics of one
reduction travel packed in one tensor. What the arithmetic of a backend would not keep is brought
round it:

    NaN         the MIN and MAX of a backend may drop it: it travels as a flag in the sums
    16 bits     exact in float32, which every backend reduces
    disagreement of ranks about what to merge would hang or mix bits up: a hash is compared first
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from functional_sq.formats import name_of
from functional_sq.observer import Observer, Reduction, State
from functional_sq.serialize import spec_to_plain
from functional_sq.spec import QuantSpec, check_spec

__all__ = ["all_merge"]

_HALVES: Final = (torch.bfloat16, torch.float16)


def all_merge(spec: QuantSpec, state: State, *, group: dist.ProcessGroup | None = None) -> State:
    """Merge the states of all ranks; every rank gets the same bits, those of `merge` one by one.

    Collective: every rank of `group` calls it, with an equal spec and a state of equal form. A rank
    that saw no data gives the state from `init`. One small `all_reduce` in which the ranks agree on
    that, and one for each kind of reduction; the tensors stay on their device.

    An observer whose `merge` is not a table of `MIN`, `MAX` and integer `SUM` has its states gathered
    and merged in the order of ranks: as exact, with `world_size` times the traffic.

    Args:
        spec: the quantization; equal on every rank.
        state: what this rank recorded; keys, shapes and dtypes equal on every rank, on a device that
            the group's backend serves (gloo: CPU, nccl: CUDA).
        group: the ranks to merge; all, if None.

    Returns:
        a new state with the keys, shapes, dtypes and device of `state`. A NaN is kept as a NaN.

    Raises:
        RuntimeError: `torch.distributed` is not initialised.
        ValueError: the ranks disagree, and all of them raise it with what differs and where; or this
            rank is not in `group`, or `state` is not one of the spec's observer.
        TypeError: the observer depends on order (a moving average), as in `merge`; on every rank.

    Example:
        >>> import torch, torch.distributed as dist, functional_sq as fsq
        >>> from functional_sq.distributed import all_merge
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> state = fsq.observe(spec, fsq.init(spec, (2,)), torch.tensor([-1.0, 3.0]))
        >>> all_merge(spec, state)
        {'min': tensor([-1.]), 'max': tensor([3.]), 'count': tensor([2])}
        >>> dist.destroy_process_group()
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "all_merge needs a process group; call torch.distributed.init_process_group() on every rank first "
            "(torchrun starts them), or merge(spec, state, other) in one process"
        )
    if dist.get_rank(group) < 0:
        raise ValueError("this rank is not in the group; call all_merge on the ranks of the group only")
    _agree(spec, state, group)
    spec.observer.merge(state, state)  # the TypeError of an observer that depends on order
    table = spec.observer.table
    if all(name in table and _collective(table[name], value) for name, value in state.items()):
        return _reduced(table, state, group)
    return _gathered(spec.observer, state, group)


def _collective(reduction: Reduction, value: Tensor) -> bool:
    """Return whether a collective gives the bits of `reduction.combine`; a float sum depends on order."""
    return reduction.name in ("min", "max") or (reduction.name == "sum" and not value.is_floating_point())


def _reduced(table: Mapping[str, Reduction], state: State, group: dist.ProcessGroup | None) -> State:
    """Merge by one all_reduce for each reduction and dtype."""
    packs: dict[tuple[str, torch.dtype], dict[str, Tensor]] = {}
    for name in sorted(state):  # not in the dict's order, which may differ between ranks
        value, kind = state[name], table[name].name
        if value.is_floating_point():
            isnan = value.isnan()
            packs.setdefault(("sum", torch.int64), {})[f"{name} is NaN"] = isnan.to(torch.int64)
            value = value.masked_fill(isnan, table[name].identity(value.dtype))
            value = value.to(torch.float32) if value.dtype in _HALVES else value
        packs.setdefault((kind, value.dtype), {})[name] = value
    merged: State = {}
    for kind, dtype in sorted(packs, key=str):
        merged |= _all_reduce(packs[kind, dtype], kind, group)
    new = {}
    for name, value in state.items():
        new[name] = merged[name].to(value.dtype)
        if value.is_floating_point():
            new[name] = new[name].masked_fill(merged[f"{name} is NaN"] > 0, float("nan"))
    return new


def _all_reduce(parts: Mapping[str, Tensor], kind: str, group: dist.ProcessGroup | None) -> State:
    """Reduce tensors of one dtype as one; the results share no memory."""
    flat = torch.cat([value.reshape(-1) for value in parts.values()])
    if flat.numel():
        op = {"min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX, "sum": dist.ReduceOp.SUM}[kind]
        dist.all_reduce(flat, op, group=group)
    split = torch.split(flat, [value.numel() for value in parts.values()])
    return {name: part.reshape(parts[name].shape).clone() for name, part in zip(parts, split, strict=True)}


def _gathered(observer: Observer, state: State, group: dist.ProcessGroup | None) -> State:
    """Merge the states of all ranks in the order of ranks."""
    states: list[State] = [{} for _ in range(dist.get_world_size(group))]
    for name in sorted(state):
        value = state[name].contiguous()
        raw = value.reshape(-1).view(torch.uint8)  # bytes: every backend gathers them
        parts = [torch.empty_like(raw) for _ in states]
        if raw.numel():
            dist.all_gather(parts, raw, group=group)
        for other, part in zip(states, parts, strict=True):
            other[name] = part.view(value.dtype).reshape(value.shape)
    return functools.reduce(observer.merge, states)


def _agree(spec: QuantSpec, state: State, group: dist.ProcessGroup | None) -> None:
    """Raise on every rank unless all of them have one spec and one form of state.

    A rank whose own arguments are wrong says so here before it raises: the others would wait for it.
    """
    error: Exception | None = None
    try:
        about = _described(spec, state, group)
    except Exception as e:
        error, about = e, {"fault": str(e)}
    raw = json.dumps(about, sort_keys=True).encode()
    # 63 bits, so that the negative is an int64 too: one MAX gives the largest and the smallest.
    digest = int.from_bytes(hashlib.sha256(raw).digest()[:8], "little") >> 1
    device = _meeting_place(state, group)
    ends = torch.tensor([digest, -digest, len(raw)], dtype=torch.int64, device=device)
    dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
    largest, smallest, length = ends.tolist()
    if largest != -smallest:
        rows = torch.zeros(dist.get_world_size(group), length, dtype=torch.uint8, device=device)
        rows[dist.get_rank(group), : len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8).to(device)
        dist.all_reduce(rows, dist.ReduceOp.MAX, group=group)
        ranks = [json.loads(bytes(row).rstrip(b"\0")) for row in rows.tolist()]
        error = error or ValueError(_disagreement(ranks))
    if error is not None:
        raise error


def _described(spec: QuantSpec, state: State, group: dist.ProcessGroup | None) -> dict[str, str]:
    """Return what the ranks have to agree on, by name; TypeError or ValueError if it is wrong already."""
    check_spec(spec)
    spec.observer.check_state(state)
    devices = {str(value.device) for value in state.values()}
    if len(devices) > 1:
        raise ValueError(f"the state is on {', '.join(sorted(devices))}; move its tensors to one device")
    served = _served(group)
    if (device := state["count"].device.type) not in served:
        raise ValueError(f"the state is on {device}, the group reduces on {' or '.join(served)}; move the state there")
    about = {name: json.dumps(value, sort_keys=True) for name, value in spec_to_plain(spec).items()}
    for name, value in state.items():
        dtype = name_of(value.dtype)
        about[f"the state's {name}"] = f"{dtype} of shape {tuple(value.shape)} on {value.device.type}"
    return about


def _disagreement(ranks: list[dict[str, str]]) -> str:
    if faults := [f"rank {rank}: {about['fault']}" for rank, about in enumerate(ranks) if "fault" in about]:
        return f"all_merge is wrong on {len(faults)} of {len(ranks)} ranks; {'; '.join(faults)}"
    differ = []
    for name in sorted(set().union(*ranks)):
        found: dict[str, list[str]] = {}
        for rank, about in enumerate(ranks):
            found.setdefault(about.get(name, "missing"), []).append(str(rank))
        if len(found) > 1:
            differ.append(f"{name} is " + ", ".join(f"{what} (rank {', '.join(who)})" for what, who in found.items()))
    return f"the ranks disagree: {'; '.join(differ)}; give all_merge one spec, and states that init() made alike"


def _served(group: dist.ProcessGroup | None) -> list[str]:
    """Return the types of devices on which the group reduces: a config is as `cpu:gloo,cuda:nccl`."""
    return [part.split(":")[0] for part in dist.get_backend_config(group).split(",")]


def _meeting_place(state: object, group: dist.ProcessGroup | None) -> torch.device:
    """Return a device on which every rank can meet, also one whose `state` is wrong."""
    served = _served(group)
    tensors = [v for v in state.values() if isinstance(v, Tensor)] if isinstance(state, dict) else []
    if "cpu" not in served and tensors and tensors[0].device.type in served:
        return tensors[0].device
    return torch.device("cpu" if "cpu" in served else served[0])
