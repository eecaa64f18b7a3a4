"""all_merge: real processes over gloo end with the bits of one process that saw all the data.

Four processes are started once for the file. Groups of 2, 3 and 4 of them (and of 1) merge every
case, write what they got, and the tests below judge it.
"""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import functional_sq as fsq
from functional_sq import distributed
from functional_sq.distributed import all_merge
from functional_sq.observers.moving_average import MeanRange, MovingAverage
from functional_sq.observers.skip_nonfinite import SkipNonfinite
from functional_sq.serialize import load, save
from functional_sq.testing import assert_same_bits

WORLD = 4
GROUPS = ((0,), (0, 1), (1, 2, 3), (0, 1, 2, 3))
ROWS = (5, 0, 11, 2)  # unequal, and one rank without data
COLUMNS = 6
NAN, INF = math.nan, math.inf


@dataclass(frozen=True)
class AbsMax(fsq.Accumulator):
    """A user's own table, with a sum and an integer statistic that is no count."""

    reductions = {"absmax": fsq.MAX, "negative": fsq.SUM}

    def elements(self, x: Tensor) -> Mapping[str, Tensor]:
        return {"absmax": x.abs(), "negative": (x < 0).to(torch.int64)}

    def range(self, spec: fsq.QuantSpec, state: fsq.State) -> tuple[Tensor, Tensor]:
        return -state["absmax"], state["absmax"]


@dataclass(frozen=True)
class Opaque(fsq.Observer):
    """A user's own observer that merges, but by no table that is known."""

    names = frozenset({"min", "max", "count"})

    def init(self, stat_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None) -> fsq.State:
        return fsq.MinMax().init(stat_shape, dtype, device)

    def observe(self, state: fsq.State, x: Tensor, keep: Tensor | None) -> fsq.State:
        return fsq.MinMax().observe(state, x, keep)

    def merge(self, a: fsq.State, b: fsq.State) -> fsq.State:
        return fsq.MinMax().merge(a, b)

    def range(self, spec: fsq.QuantSpec, state: fsq.State) -> tuple[Tensor, Tensor]:
        return state["min"], state["max"]


OBSERVERS = (
    fsq.MinMax(),
    fsq.Fixed(-1.0, 2.0),
    SkipNonfinite(fsq.MinMax()),
    AbsMax(),
    SkipNonfinite(AbsMax(), limit=0.5),
    Opaque(),
    SkipNonfinite(Opaque()),
)
CASES = tuple(
    (
        fsq.QuantSpec(torch.uint8, granularity, mapping=fsq.MappingType.ASYMMETRIC, observer=observer),
        dtype,
        bad,
    )
    for observer in OBSERVERS
    for granularity in (fsq.PerTensor(), fsq.PerAxis(-1))
    for dtype in (torch.float32, torch.bfloat16)
    for bad in (None, NAN, INF)
)


def shards(dtype: torch.dtype, bad: float | None) -> list[Tensor]:
    """Return the data of each rank; the last has one value `bad`."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(sum(ROWS), COLUMNS, generator=generator)
    if bad is not None:
        data[-1, 2] = bad
    return list(torch.split(data.to(dtype), list(ROWS)))


def recorded(spec: fsq.QuantSpec, dtype: torch.dtype, x: Tensor) -> fsq.State:
    return fsq.observe(spec, fsq.init(spec, (1, COLUMNS), dtype=dtype), x)


INT8 = fsq.QuantSpec(torch.int8, fsq.PerTensor())
PER_AXIS = fsq.QuantSpec(torch.int8, fsq.PerAxis(-1))
MOVING = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=MovingAverage(0.1))


def _other(spec: fsq.QuantSpec) -> Callable[[int], Any]:
    """Rank 2 has another spec."""
    return lambda rank: (own := spec if rank == 2 else INT8, fsq.init(own, (1, COLUMNS)))


def _broken(rank: int) -> Any:
    return INT8, {"min": torch.zeros(1)} if rank == 1 else fsq.init(INT8, (1,))


@dataclass(frozen=True)
class Fails(fsq.MinMax):
    """Raises what no function of ours does."""

    def check_state(self, state: fsq.State, *, exact: bool = True) -> tuple[int, ...]:
        raise AttributeError("a user's mistake")


def _failing(rank: int) -> Any:
    own = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=Fails()) if rank == 1 else INT8
    return own, fsq.init(INT8, (1,))


# What each rank gives, and what every rank has to say: (type, text of rank 0).
REFUSED: dict[str, tuple[Callable[[int], Any], type[Exception], str]] = {
    "dtype": (
        _other(fsq.QuantSpec(torch.uint8, fsq.PerTensor())),
        ValueError,
        'dtype is "int8" (rank 0, 1, 3), "uint8" (rank 2); give all_merge one spec',
    ),
    "eps": (_other(fsq.QuantSpec(torch.int8, fsq.PerTensor(), eps=0.25)), ValueError, "eps is 1.19"),
    "observer": (
        _other(fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=fsq.Fixed(0.0, 1.0))),
        ValueError,
        "the state's max is float32 of shape (1, 1) on cpu (rank 0, 1, 3), missing (rank 2)",
    ),
    "one of them depends on order": (_other(MOVING), ValueError, 'observer is {"class": "MinMax"} (rank 0, 1, 3)'),
    "shape": (
        lambda rank: (PER_AXIS, fsq.init(PER_AXIS, (1, 6 if rank else 5))),
        ValueError,
        "the state's min is float32 of shape (1, 5) on cpu (rank 0), float32 of shape (1, 6) on cpu (rank 1, 2, 3)",
    ),
    "state dtype": (
        lambda rank: (INT8, fsq.init(INT8, (1,), dtype=torch.bfloat16 if rank == 3 else torch.float32)),
        ValueError,
        "the state's max is float32 of shape (1,) on cpu (rank 0, 1, 2), bfloat16 of shape (1,) on cpu (rank 3)",
    ),
    "one state is wrong": (_broken, ValueError, "all_merge is wrong on 1 of 4 ranks; rank 1: MinMax() records"),
    "no state": (lambda rank: (INT8, None), ValueError, "this state is NoneType"),
    "no spec on one": (
        lambda rank: (None if rank == 1 else INT8, fsq.init(INT8, (1,))),
        ValueError,
        "all_merge is wrong on 1 of 4 ranks; rank 1: spec is None",
    ),
    "a failure on one": (_failing, ValueError, "all_merge is wrong on 1 of 4 ranks; rank 1: a user's mistake"),
    "order": (lambda rank: (MOVING, fsq.init(MOVING, (1,))), TypeError, "depends on the order of its batches"),
    "order, wrapped": (
        lambda rank: (own := fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=SkipNonfinite(MeanRange())),
                      fsq.init(own, (1,))),
        TypeError,
        "MeanRange() depends on the order",
    ),
}  # fmt: skip


OWN = {"one state is wrong": "ValueError", "no spec on one": "TypeError", "a failure on one": "AttributeError"}
"""Where one rank is wrong it raises its own error, of this type."""


def work(rank: int, folder: Path) -> None:
    """What one process does: merge every case in every group that it is in, then all that must be refused."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)  # a rank that hangs fails the test, not the machine
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD, timeout=timeout)
    merged: dict[str, list[fsq.State]] = {}
    groups = {ranks: dist.new_group(list(ranks), timeout=timeout) for ranks in GROUPS}
    outside = ""
    for ranks, group in groups.items():
        if rank in ranks:
            states = [(spec, recorded(spec, dtype, shards(dtype, bad)[rank])) for spec, dtype, bad in CASES]
            merged[str(ranks)] = [all_merge(spec, state, group=group) for spec, state in states]
        elif ranks == (0, 1):
            try:
                all_merge(INT8, fsq.init(INT8, (1,)), group=group)
            except ValueError as e:
                outside = str(e)
    said = {}
    for name, (given, _, _) in REFUSED.items():
        try:
            all_merge(*given(rank))
            said[name] = ("nothing", "")
        except Exception as e:
            said[name] = (type(e).__name__, str(e))
    # After all those refusals the ranks are still in step; an order of keys that differs does no harm.
    state = recorded(INT8, torch.float32, shards(torch.float32, None)[rank])
    after = all_merge(INT8, dict(sorted(state.items(), reverse=bool(rank % 2))))
    none = all_merge(PER_AXIS, fsq.init(PER_AXIS, (3, 0)))
    found = {"merged": merged, "said": said, "outside": outside, "after": after, "none": none}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    # Not fork (torch has threads), and not spawn, which would import the running test session anew.
    command = [sys.executable, __file__, str(folder)]
    started = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(WORLD)
    ]
    try:
        output = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * WORLD, "\n".join(output)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("members", GROUPS, ids=str)
@pytest.mark.parametrize(
    "case", range(len(CASES)), ids=lambda i: "-".join(map(str, (CASES[i][0].observer, *CASES[i][1:])))
)
def test_bits_of_one_process(ranks: list[dict[str, Any]], members: tuple[int, ...], case: int) -> None:
    spec, dtype, bad = CASES[case]
    data = shards(dtype, bad)
    whole = recorded(spec, dtype, torch.cat([data[rank] for rank in members]))
    one_by_one = functools.reduce(functools.partial(fsq.merge, spec), (recorded(spec, dtype, data[r]) for r in members))
    assert_same_bits("merge one by one", "one process", one_by_one, whole)
    qparams = fsq.calc_qparams(spec, whole)
    for rank in members:
        merged = ranks[rank]["merged"][str(members)][case]
        assert_same_bits(f"all_merge on rank {rank}", "one process", merged, whole)
        assert_same_bits(f"qparams on rank {rank}", "one process", fsq.calc_qparams(spec, merged), qparams)


def test_a_nan_on_one_rank_is_seen_on_all(ranks: list[dict[str, Any]]) -> None:
    cases = [i for i, (spec, _, bad) in enumerate(CASES) if spec.observer == fsq.MinMax() and bad is NAN]
    assert len(cases) == 4
    for found in ranks:
        for case in cases:
            value = found["merged"]["(0, 1, 2, 3)"][case]["min"]
            assert value.isnan().nonzero().tolist() == [[0, 2 % value.shape[1]]]


def test_merged_states_share_no_memory(ranks: list[dict[str, Any]]) -> None:
    states = [state for found in ranks for states in found["merged"].values() for state in states]
    assert len(states) == len(CASES) * sum(map(len, GROUPS))
    for state in states:
        assert all(value.is_contiguous() for value in state.values())
        assert all(value.untyped_storage().nbytes() == value.nbytes for value in state.values())


@pytest.mark.parametrize("name", REFUSED)
def test_every_rank_refuses(ranks: list[dict[str, Any]], name: str) -> None:
    _, kind, text = REFUSED[name]
    assert text in ranks[0]["said"][name][1]
    for found in ranks:
        assert found["said"][name][0] in (kind.__name__, OWN.get(name)), found
    if name not in OWN:
        assert len({found["said"][name] for found in ranks}) == 1
    else:
        assert "all_merge is wrong" not in ranks[1]["said"][name][1]
        assert ranks[1]["said"][name][1]


def test_ranks_are_in_step_after_refusals(ranks: list[dict[str, Any]]) -> None:
    whole = recorded(INT8, torch.float32, torch.cat(shards(torch.float32, None)))
    for found in ranks:
        assert_same_bits("after", "one process", found["after"], whole)


def test_a_state_without_blocks(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert_same_bits("merged", "init", found["none"], fsq.init(PER_AXIS, (3, 0)))


def test_a_rank_outside_the_group(ranks: list[dict[str, Any]]) -> None:
    assert [found["outside"] for found in ranks[:2]] == ["", ""]
    for found in ranks[2:]:
        assert "this rank is not in the group" in found["outside"]


# One process.


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_not_initialised() -> None:
    with pytest.raises(RuntimeError, match=r"needs a process group; call torch\.distributed\.init_process_group\(\)"):
        all_merge(INT8, fsq.init(INT8, (1,)))


@pytest.mark.usefixtures("alone")
def test_one_collective_for_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, torch.dtype, int]] = []
    real = dist.all_reduce

    def all_reduce(tensor: Tensor, op: Any, group: Any = None) -> None:
        calls.append((op, tensor.dtype, tensor.numel()))
        real(tensor, op, group=group)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    spec = fsq.QuantSpec(torch.int8, fsq.PerAxis(-1), observer=SkipNonfinite(fsq.MinMax()))
    state = recorded(spec, torch.bfloat16, torch.randn(4, COLUMNS))
    before = {name: value.clone() for name, value in state.items()}
    merged = all_merge(spec, state)
    assert_same_bits("merged", "the state", merged, state)
    assert_same_bits("the state after", "before", state, before)
    assert not {v.data_ptr() for v in merged.values()} & {v.data_ptr() for v in state.values()}
    agreed, *rest = calls
    assert agreed[2] == 3
    # SUM: count, nonfinite, and a flag for each min and max.
    expected = {("MAX", torch.float32, 6), ("MIN", torch.float32, 6), ("SUM", torch.int64, 24)}
    assert {(str(op).rpartition(".")[2], dtype, n) for op, dtype, n in rest} == expected
    assert len(rest) == 3


@pytest.mark.usefixtures("alone")
def test_a_state_on_two_devices_or_on_one_that_the_backend_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    state = fsq.init(INT8, (1,))
    with pytest.raises(ValueError, match=r"the state is on cpu, meta; move its tensors to one device"):
        all_merge(INT8, state | {"min": state["min"].to("meta")})
    with pytest.raises(ValueError, match=r"the state is on meta, the group reduces on cpu or cuda; move the state"):
        all_merge(INT8, {name: value.to("meta") for name, value in state.items()})
    # What a rank with a wrong state meets the others on; nccl has no CPU.
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    for wrong in (state, {}, None):
        assert distributed._meeting_place(wrong, None) == torch.device("cuda")
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "meta:some")
    assert distributed._meeting_place({"min": state["min"].to("meta")}, None) == torch.device("meta")


@pytest.mark.cuda
def test_nccl_keeps_the_state_on_its_device(tmp_path: Path) -> None:
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        for spec, dtype, bad in CASES:
            state = {k: v.cuda() for k, v in recorded(spec, dtype, shards(dtype, bad)[3]).items()}
            assert_same_bits("merged", "the state", all_merge(spec, state), state)
        with pytest.raises(ValueError, match="the state is on cpu, the group reduces on cuda"):
            all_merge(INT8, fsq.init(INT8, (1,)))
    finally:
        dist.destroy_process_group()


# Without a network: files from several machines.


@pytest.mark.parametrize("observer", OBSERVERS, ids=repr)
def test_files_of_several_machines_merge(tmp_path: Path, observer: fsq.Observer) -> None:
    spec = fsq.QuantSpec(torch.int8, fsq.PerAxis(-1), observer=observer)
    data = shards(torch.float32, NAN)
    for machine, x in enumerate(data):
        save(tmp_path / f"{machine}.safetensors", {"layer": (spec, recorded(spec, torch.float32, x))})
    classes = (AbsMax, Opaque, SkipNonfinite)
    loaded = [load(path, classes=classes)["layer"] for path in sorted(tmp_path.iterdir())]
    assert {own for own, _ in loaded} == {spec}
    merged = functools.reduce(functools.partial(fsq.merge, spec), (state for _, state in reversed(loaded)))
    whole = recorded(spec, torch.float32, torch.cat(data))
    assert_same_bits("merged files", "one process", merged, whole)
    assert_same_bits("qparams", "one process", fsq.calc_qparams(spec, merged), fsq.calc_qparams(spec, whole))


if __name__ == "__main__":
    work(int(sys.argv[2]), Path(sys.argv[1]))
