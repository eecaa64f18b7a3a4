"""Tables of facts, and every code and every half-precision value through the float8 formats."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import oracle
import pytest
import torch

import functional_sq as fsq
from functional_sq import formats
from functional_sq.formats import REAL_DTYPES, Float8, Integer, as_float32, format_of

BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in fsq.FORMATS}
FLOAT8 = [name for name in BY_NAME if name.startswith("float8")]
HALVES = {torch.bfloat16: oracle.BF16, torch.float16: oracle.F16}


def test_there_is_a_format_for_each_row() -> None:
    assert BY_NAME.keys() == oracle.FORMATS.keys()
    assert set(REAL_DTYPES) == {torch.float32, torch.float64, *HALVES}


@pytest.mark.parametrize("name", oracle.FORMATS)
def test_facts(name: str) -> None:
    facts, format = oracle.FORMATS[name], fsq.FORMATS[BY_NAME[name]]
    assert format is format_of(BY_NAME[name])
    assert format.dtype is BY_NAME[name]
    assert format.bounds == (facts.qmin, facts.qmax)
    assert str(format.storage).removeprefix("torch.") == facts.storage.name
    assert isinstance(format, Float8 if facts.is_float else Integer)
    if isinstance(format, Integer):
        assert (format.bits, format.signed) == (facts.bits, not name.startswith("u"))
        assert facts.qmax - facts.qmin + 1 == 2**facts.bits
        assert [type(b) for b in format.bounds] == [int, int]


@pytest.mark.parametrize("name", FLOAT8)
def test_bounds_are_those_of_ml_dtypes(name: str) -> None:
    info = ml_dtypes.finfo(getattr(ml_dtypes, name))
    assert fsq.FORMATS[BY_NAME[name]].bounds == (float(info.min), float(info.max))


def test_the_table_is_read_only() -> None:
    with pytest.raises(TypeError):
        fsq.FORMATS[torch.int8] = None
    assert fsq.FORMATS[torch.int8].bounds == (-128, 127)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bool, torch.uint16, "int8", None, []], ids=repr)
def test_format_of_refuses(dtype: object) -> None:
    with pytest.raises(TypeError, match="is not a quantized dtype; use one of int1, uint1, "):
        format_of(dtype)


def unit(dtype: torch.dtype, scale: float = 1.0) -> tuple[fsq.QuantSpec, fsq.QParams]:
    spec = fsq.QuantSpec(dtype, fsq.PerTensor())
    return spec, fsq.QParams(torch.tensor([scale]), torch.tensor([0], dtype=torch.int32))


def codes_of(q: torch.Tensor) -> np.ndarray:
    return q.view(torch.uint8).numpy()


@pytest.mark.parametrize("name", FLOAT8)
@pytest.mark.parametrize("scale", [1.0, 0.3, 2.0**-20])
def test_every_float8_code_decodes_to_the_value_of_ml_dtypes(name: str, scale: float) -> None:
    spec, qp = unit(BY_NAME[name], scale)
    codes = np.arange(256, dtype=np.uint8)
    with np.errstate(invalid="ignore"):  # the NaN of a FNUZ format
        expected = codes.view(getattr(ml_dtypes, name)).astype(np.float32) * np.float32(scale)
    decoded = fsq.dequantize(spec, torch.from_numpy(codes).view(BY_NAME[name]), qp).numpy()
    np.testing.assert_array_equal(decoded, expected)  # NaN where and only where NaN
    real = ~np.isnan(expected)
    assert np.signbit(decoded)[real].tolist() == np.signbit(expected)[real].tolist()
    assert not real.all()  # each of the formats has a NaN


def _transposed(codes: torch.Tensor) -> torch.Tensor:
    return as_float32(codes.reshape(256, -1).t()).t().reshape(-1)


WAYS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "eager": as_float32,
    "eager, few": lambda codes: torch.cat([as_float32(part) for part in codes.split(256)]),
    "eager, transposed": _transposed,
    "eager, to memory": lambda codes: as_float32(codes, torch.full(codes.shape, 7.0)),
    "compiled": torch.compile(as_float32, fullgraph=True),
    "compiled, transposed": torch.compile(_transposed, fullgraph=True),
    "vmap": torch.vmap(as_float32),
}


@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_every_float8_code_is_a_float32(way: str, flushed: bool) -> None:
    """By their bits where they are many, or compiled: also where the CPU takes a subnormal float32 for zero."""
    codes = np.repeat(np.arange(256, dtype=np.uint8), 2**12)
    with np.errstate(invalid="ignore"):
        expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert codes.size > formats._PIECE > formats._FEW > 256
    q = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    torch.set_flush_denormal(flushed)
    try:
        decoded = WAYS[way](q).numpy()
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(decoded, expected)
    real = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(decoded)[real], np.signbit(expected)[real])


@pytest.mark.parametrize("name", FLOAT8)
def test_every_finite_float8_code_comes_back(name: str) -> None:
    spec, qp = unit(BY_NAME[name], 0.25)
    values = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, name))
    codes = values[np.isfinite(oracle.cast(values, oracle.F32))].view(np.uint8)
    q = torch.from_numpy(codes).view(BY_NAME[name])
    again = fsq.quantize(spec, fsq.dequantize(spec, q, qp), qp)
    assert codes_of(again).tolist() == codes.tolist()
    assert len(codes) == {"float8_e4m3fn": 254, "float8_e5m2": 248}.get(name, 255)


@pytest.mark.parametrize("name", FLOAT8)
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_every_half_becomes_the_float8_of_ml_dtypes(half: torch.dtype, name: str) -> None:
    """All 65536 bit patterns: finite values and infinities as the clamped value, NaN as NaN."""
    spec, qp = unit(BY_NAME[name])
    patterns = np.arange(2**16, dtype=np.uint16)
    x = torch.from_numpy(patterns.view(np.int16)).view(half)
    values = patterns.view(HALVES[half]).astype(np.float32)
    largest = oracle.FORMATS[name].qmax
    expected = oracle.cast(np.clip(values, np.float32(-largest), np.float32(largest)), getattr(ml_dtypes, name))
    q = fsq.quantize(spec, x, qp)
    nan = np.isnan(values)
    assert codes_of(q)[~nan].tolist() == expected.view(np.uint8)[~nan].tolist()
    assert torch.isnan(q.float()).numpy().tolist() == nan.tolist()


@pytest.mark.parametrize("name", FLOAT8)
@pytest.mark.parametrize("scale", [0.017, 3.3])
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_every_half_at_another_scale(half: torch.dtype, name: str, scale: float) -> None:
    spec, qp = unit(BY_NAME[name], scale)
    patterns = np.arange(2**16, dtype=np.uint16)
    values = patterns.view(HALVES[half])
    keep = ~np.isnan(values.astype(np.float32))
    facts = oracle.FORMATS[name]
    expected = oracle.quantize(
        values[keep], qp.scale.numpy(), qp.zero_point.numpy(), facts, qmin=facts.qmin, qmax=facts.qmax
    )
    q = fsq.quantize(spec, torch.from_numpy(patterns.view(np.int16)).view(half), qp)
    assert codes_of(q)[keep].tolist() == expected.view(np.uint8).tolist()


@pytest.mark.parametrize("name", [n for n in BY_NAME if n not in FLOAT8])
def test_every_integer_code_comes_back(name: str) -> None:
    facts = oracle.FORMATS[name]
    storage = fsq.FORMATS[BY_NAME[name]].storage
    q = torch.arange(facts.qmin, facts.qmax + 1).to(storage)
    for zero_point in {facts.qmin, (facts.qmin + facts.qmax) // 2, facts.qmax}:
        for scale in (1.0, 0.1, 2.0**-23):
            spec = fsq.QuantSpec(BY_NAME[name], fsq.PerTensor())
            qp = fsq.QParams(torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32))
            x = fsq.dequantize(spec, q, qp)
            assert x[zero_point - facts.qmin] == 0
            assert (x.diff() > 0).all()
            assert torch.equal(fsq.quantize(spec, x, qp), q)


@pytest.mark.parametrize("zero_point", [-32768, 0, 32767])
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_every_int16_code_becomes_a_half_that_is_rounded_once(half: torch.dtype, zero_point: int) -> None:
    spec, (scale, _) = unit(torch.int16, 2.0**-15)
    q = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    y = fsq.dequantize(spec, q, fsq.QParams(scale, torch.tensor([zero_point], dtype=torch.int32)), dtype=half)
    assert torch.equal(y, ((q.double() - zero_point) * 2.0**-15).to(half))  # exact until the cast


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("name", ["int8", "uint8", "int4"])
def test_every_half_becomes_the_integer_of_the_oracle(name: str, half: torch.dtype) -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    values = patterns.view(HALVES[half])
    values = values[~np.isnan(values.astype(np.float32))]
    x = torch.from_numpy(values.view(np.int16)).view(half)
    facts = oracle.FORMATS[name]
    for scale_dtype in (torch.float32, half):
        spec = fsq.QuantSpec(BY_NAME[name], fsq.PerTensor(), scale_dtype=torch.float32)
        scale, zero_point = torch.tensor([0.11], dtype=scale_dtype), torch.tensor([3], dtype=torch.int32)
        # The scale's own bits, as an array.
        s = scale.view(torch.int16).numpy().view(HALVES[half]) if scale_dtype is half else scale.numpy()
        expected = oracle.quantize(values, s, zero_point.numpy(), facts, qmin=facts.qmin, qmax=facts.qmax)
        q = fsq.quantize(spec, x, fsq.QParams(scale, zero_point))
        assert q.numpy().tolist() == expected.tolist()
