"""A spec is a value: it compares, hashes, copies and prints as the call that makes it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import pickle

import numpy as np
import pytest
import torch

import functional_sq as fsq
from functional_sq.serialize import spec_from_json, spec_to_json

T = fsq.PerTensor()
ASYMMETRIC, NO_CLIPPING = fsq.MappingType.ASYMMETRIC, fsq.MappingType.SYMMETRIC_NO_CLIPPING_ERR

SPECS = {
    "QuantSpec(torch.int8, PerTensor())": fsq.QuantSpec(torch.int8, T),
    "QuantSpec(torch.int8, PerAxis(axis=0))": fsq.QuantSpec(torch.int8, fsq.PerAxis(0)),
    "QuantSpec(torch.int8, PerRow(dim=-1))": fsq.QuantSpec(torch.int8, fsq.PerRow()),
    "QuantSpec(torch.int4, PerGroup(group_size=32))": fsq.QuantSpec(torch.int4, fsq.PerGroup(32)),
    "QuantSpec(torch.int8, PerBlock(block_size=(1, 32)))": fsq.QuantSpec(torch.int8, fsq.PerBlock([1, 32])),
    "QuantSpec(torch.float8_e4m3fn, PerToken())": fsq.QuantSpec(torch.float8_e4m3fn, fsq.PerToken()),
    "QuantSpec(torch.uint8, PerTensor(), mapping=MappingType.ASYMMETRIC)": fsq.QuantSpec(
        torch.uint8, T, mapping=ASYMMETRIC
    ),
    "QuantSpec(torch.int8, PerTensor(), mapping=MappingType.SYMMETRIC_NO_CLIPPING_ERR, quant_min=-127)": fsq.QuantSpec(
        torch.int8, T, mapping=NO_CLIPPING, quant_min=-127
    ),
    "QuantSpec(torch.uint8, PerTensor(), quant_min=0, quant_max=127)": fsq.QuantSpec(
        torch.uint8, T, quant_min=0, quant_max=127
    ),
    "QuantSpec(torch.int8, PerTensor(), observer=Fixed(lo=-1.0, hi=6.0))": fsq.QuantSpec(
        torch.int8, T, observer=fsq.Fixed(-1.0, 6.0)
    ),
    "QuantSpec(torch.int8, PerTensor(), eps=1e-05, scale_dtype=torch.bfloat16, zero_point_dtype=torch.int8)": (
        fsq.QuantSpec(torch.int8, T, eps=1e-5, scale_dtype=torch.bfloat16, zero_point_dtype=torch.int8)
    ),
}
by_repr = pytest.mark.parametrize(("text", "spec"), SPECS.items(), ids=SPECS)


@by_repr
def test_repr_is_the_call(text: str, spec: fsq.QuantSpec) -> None:
    assert repr(spec) == text
    again = eval(text, {"torch": torch, **vars(fsq)})
    assert again == spec
    assert hash(again) == hash(spec)


def test_different_specs_differ() -> None:
    assert len(set(SPECS.values())) == len(SPECS)
    for spec in SPECS.values():
        assert [other for other in SPECS.values() if other == spec] == [spec]


@by_repr
def test_copies_are_equal(text: str, spec: fsq.QuantSpec) -> None:
    for other in (
        pickle.loads(pickle.dumps(spec)),
        copy.copy(spec),
        copy.deepcopy(spec),
        dataclasses.replace(spec),
        spec_from_json(spec_to_json(spec)),
    ):
        assert other == spec
        assert hash(other) == hash(spec)
        assert repr(other) == text
        assert other.bounds == spec.bounds
        assert other.format is spec.format


@by_repr
def test_frozen(text: str, spec: fsq.QuantSpec) -> None:
    for value in (spec, spec.granularity, spec.observer):
        for name in [*(f.name for f in dataclasses.fields(value)), "new"]:
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, name, None)
    assert repr(spec) == text


def test_every_field_takes_part_in_equality() -> None:
    spec = fsq.QuantSpec(torch.uint8, T)
    others = {
        "dtype": torch.int8,
        "granularity": fsq.PerAxis(0),
        "mapping": ASYMMETRIC,
        "quant_min": 1,
        "quant_max": 254,
        "observer": fsq.Fixed(0.0, 1.0),
        "eps": 1e-3,
        "scale_dtype": torch.float64,
        "zero_point_dtype": torch.int64,
    }
    assert others.keys() == {f.name for f in dataclasses.fields(spec)}
    for name, value in others.items():
        other = dataclasses.replace(spec, **{name: value})
        assert other != spec
        assert f"{name}=" in repr(other) or name in ("dtype", "granularity")
        assert eval(repr(other), {"torch": torch, **vars(fsq)}) == other


def test_a_number_of_numpy_is_held_as_one_of_python() -> None:
    """It is a float, but prints as `np.float64(...)`, and a compiler takes it for no constant."""
    x, number = torch.randn(64), np.linspace(99, 100, 5)[1]
    spec = fsq.QuantSpec(torch.int8, T, observer=fsq.Percentile(number), eps=number * 1e-8)
    assert repr(spec) == "QuantSpec(torch.int8, PerTensor(), observer=Percentile(p=99.25), eps=9.925e-07)"
    state = fsq.observe(spec, fsq.init(spec, x.shape), x)
    compiled = torch.compile(functools.partial(fsq.calc_qparams, spec), backend="eager", fullgraph=True)
    assert torch.equal(compiled(state).scale, fsq.calc_qparams(spec, state).scale)
    observers = (
        fsq.Fixed(-number, number),
        fsq.MovingAverage(number / 100),
        fsq.SkipNonfinite(fsq.MinMax(), number / 100),
    )
    for observer in observers:
        assert eval(repr(observer), vars(fsq)) == observer


def test_two_arguments_are_positional() -> None:
    kinds = [p.kind for p in inspect.signature(fsq.QuantSpec).parameters.values()]
    assert kinds[:2] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2
    assert set(kinds[2:]) == {inspect.Parameter.KEYWORD_ONLY}


def test_bounds_default_to_the_format() -> None:
    assert fsq.QuantSpec(torch.uint4, T).bounds == (0, 15)
    assert fsq.QuantSpec(torch.uint4, T, quant_min=1).bounds == (1, 15)
    assert fsq.QuantSpec(torch.int8, T, quant_max=126).bounds == (-128, 126)
    assert fsq.QuantSpec(torch.float8_e5m2, T).bounds == (-57344.0, 57344.0)


@pytest.mark.parametrize("mapping", fsq.MappingType)
def test_an_enum_prints_as_it_is_written(mapping: fsq.MappingType) -> None:
    assert eval(repr(mapping), vars(fsq)) is mapping
    assert pickle.loads(pickle.dumps(mapping)) is mapping


def test_qparams_unpack_and_are_a_pytree() -> None:
    qp = fsq.QParams(torch.ones(1), torch.zeros(1, dtype=torch.int32))
    scale, zero_point = qp
    assert scale is qp.scale
    assert zero_point is qp.zero_point
    leaves, tree = torch.utils._pytree.tree_flatten(qp)
    assert leaves[0] is scale
    assert isinstance(torch.utils._pytree.tree_unflatten(leaves, tree), fsq.QParams)
