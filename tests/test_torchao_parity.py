"""Parity in bits with torchao, live: whatever torchao is installed computes the expected tensors.

Runs beside torchao 0.16 (the last with both tensor subclasses of `torchao.dtypes`) and beside the
newest. The tolerance is zero everywhere. The three parts of the file:

1. parity: hypothesis draws formats, granularities, mappings, restricted ranges, dtypes and data;
2. proof: mutants of our formulas, each of which a parity check finds;
3. deviations: torchao's behaviour that is deliberately not followed, theirs and ours side by side.

Ranks. torchao reduces with `keepdim=False` unless asked: a per-tensor scale is 0-dim, a per-axis one
1-D, in its observers in both versions; with `keepdim=True` its `min_val` has the rank of the *split*
view (three axes for groups of a matrix). Ours always has the rank of the tensor. The elements are in
the same order, so expected tensors are compared after `reshape`.
"""

from __future__ import annotations

import dataclasses
import math
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, find, given, settings
from hypothesis import strategies as st
from torch import Tensor

import functional_sq as fsq
from functional_sq import MappingType, QParams, QuantSpec
from functional_sq.formats import FORMATS, Float8, Format, Integer

with warnings.catch_warnings():
    # On import, torchao 0.16 warns of its own moved modules (torchao.dtypes.uintx...), and the test
    # run turns warnings into errors. A pytestmark does not reach what happens during collection.
    warnings.simplefilter("ignore")
    import torchao
    from torchao import dtypes as ao_dtypes
    from torchao.quantization import granularity as ao_granularity
    from torchao.quantization import quant_primitives as ao
    from torchao.quantization.observer import AffineQuantizedMinMaxObserver
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor
    from torchao.quantization.utils import get_block_size

OLD = tuple(int(n) for n in torchao.__version__.split(".")[:2]) < (0, 18)
"""torchao before 0.18: eps defaults to the dtype's eps, a 0-dim range is divided in scale_dtype."""

needs_intx_tensor = pytest.mark.skipif(
    not hasattr(ao_dtypes, "to_affine_quantized_intx_static"),
    reason=f"torchao {torchao.__version__} has no integer AffineQuantizedTensor (0.17 was the last)",
)
needs_floatx_tensor = pytest.mark.skipif(
    not hasattr(ao_dtypes, "to_affine_quantized_floatx_static"),
    reason=f"torchao {torchao.__version__} has no float8 AffineQuantizedTensor (0.16 was the last)",
)
needs_int8_tensor = pytest.mark.skipif(
    OLD,
    reason=f"the Int8Tensor of torchao {torchao.__version__} drops its zero point; AffineQuantizedTensor is compared",
)
# Constructing the float8 tensor in 0.16 warns that the class is deprecated; it is what is compared with.
floatx_deprecated = pytest.mark.filterwarnings("ignore:Models quantized with version 1:UserWarning")

REALS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = tuple(d for d, f in FORMATS.items() if isinstance(f, Integer))
FLOAT8S = tuple(d for d, f in FORMATS.items() if isinstance(f, Float8))

EXAMPLES = settings(
    deadline=None,  # the first call of a torchao operator registers it
    max_examples=200,
    suppress_health_check=[HealthCheck.too_slow],
)


# --- comparing -------------------------------------------------------------------------------------


def bits(x: Tensor) -> Tensor:
    """View `x` as integers, so that equal means the same bits and -0.0 is not 0.0."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(sizes[x.dtype.itemsize])


def assert_same(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Same dtype, same elements in the same order, same bits; any NaN equals any NaN."""
    assert ours.dtype == theirs.dtype, f"{what}: ours is {ours.dtype}, torchao's {theirs.dtype}"
    assert ours.numel() == theirs.numel(), f"{what}: ours is {tuple(ours.shape)}, torchao's {tuple(theirs.shape)}"
    theirs = theirs.reshape(ours.shape)
    differ = bits(ours) != bits(theirs)
    if ours.is_floating_point():
        # float8 has no isnan on the CPU; every float8 value is exact in float32
        differ &= ~(ours.float().isnan() & theirs.float().isnan())
    if bool(differ.any()):
        where = tuple(int(i) for i in differ.nonzero()[0])
        pytest.fail(
            f"{what}: {int(differ.sum())} of {differ.numel()} differ, first at {where}: "
            f"ours {ours[where].double().item()!r}, torchao's {theirs[where].double().item()!r}"
        )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        pytest.param(torch.tensor([0.0]), torch.tensor([-0.0]), id="signed-zero"),
        pytest.param(torch.tensor([1.0]), torch.tensor([1.0 + 2**-23]), id="one-ulp"),
        pytest.param(torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), id="dtype"),
        pytest.param(torch.tensor([1.0]), torch.tensor([1.0, 1.0]), id="size"),
        pytest.param(torch.tensor([1.0]), torch.tensor([math.nan]), id="nan-against-number"),
        pytest.param(torch.tensor([0, 1]), torch.tensor([1, 0]), id="order"),
    ],
)
def test_assert_same_fails_on_what_differs(ours: Tensor, theirs: Tensor) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        assert_same(ours, theirs, "x")


# --- what torchao is asked -------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A spec and batches of one shape and dtype."""

    spec: QuantSpec
    batches: tuple[Tensor, ...]

    @property
    def x(self) -> Tensor:
        return self.batches[0]

    @property
    def block_size(self) -> tuple[int, ...]:
        return tuple(get_block_size(self.x.shape, their_granularity(self.spec)))

    @property
    def wide_codes_in_a_narrow_range(self) -> bool:
        """int16 codes and a 16-bit float range: a bound such as 32767 rounds outwards in torchao."""
        return self.spec.dtype is torch.int16 and self.x.dtype.itemsize == 2


def their_granularity(spec: QuantSpec) -> ao_granularity.Granularity:
    g = spec.granularity
    return getattr(ao_granularity, type(g).__name__)(*(getattr(g, f.name) for f in dataclasses.fields(g)))


def their_mapping(spec: QuantSpec) -> ao.MappingType:
    return ao.MappingType[spec.mapping.name]


def their_arguments(case: Case) -> dict[str, object]:
    """Everything after the mapping and block size that torchao's three choosers share."""
    spec = case.spec
    zero_point_dtype = torch.int64 if case.wide_codes_in_a_narrow_range else spec.zero_point_dtype
    return {
        "target_dtype": spec.dtype,
        "quant_min": spec.quant_min,
        "quant_max": spec.quant_max,
        "eps": spec.eps,
        "scale_dtype": spec.scale_dtype,
        "zero_point_dtype": zero_point_dtype,
    }


def assert_same_qparams(case: Case, ours: QParams, theirs: tuple[Tensor, Tensor]) -> None:
    scale, zero_point = theirs
    if case.wide_codes_in_a_narrow_range:
        # test_torchao_lets_an_int16_zero_point_out_of_the_codes and the test after it say why
        low, high = case.spec.bounds
        if case.spec.mapping is MappingType.SYMMETRIC:
            zero_point = torch.full_like(zero_point, int((high + low + 1) / 2))
        zero_point = zero_point.clamp(low, high).to(case.spec.zero_point_dtype)
    # test_torchao_casts_a_scale_to_infinity says why only these
    finite = scale.isfinite().reshape(ours.scale.shape)
    assert bool(ours.scale.isfinite().all())
    assert_same(ours.scale[finite], scale.reshape(finite.shape)[finite], "scale")
    assert_same(ours.zero_point[finite], zero_point.reshape(finite.shape)[finite], "zero point")


def calibrated(case: Case, *, dtype: torch.dtype | None = None) -> QParams:
    """Our qparams of all batches, in a state of `dtype` (default: the dtype of the data)."""
    state = fsq.init(case.spec, case.x.shape, dtype=dtype or case.x.dtype)
    for x in case.batches:
        state = fsq.observe(case.spec, state, x)
    return fsq.calc_qparams(case.spec, state)


def castable(spec: QuantSpec) -> torch.dtype:
    """The dtype to name to torchao's quantize: it cannot cast to torch.int1 ... torch.int7."""
    return torch.int8 if isinstance(spec.format, Integer) and spec.format.storage is torch.int8 else spec.dtype


# --- drawing ---------------------------------------------------------------------------------------


@cache
def zero_point_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """The zero point dtypes that QuantSpec accepts for `dtype`."""
    every = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8, *REALS, torch.float64)
    accepted = []
    for candidate in every:
        try:
            QuantSpec(dtype, fsq.PerTensor(), zero_point_dtype=candidate)
        except ValueError:
            continue
        accepted.append(candidate)
    return tuple(accepted)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def granularities(draw: st.DrawFn, shape: tuple[int, ...]) -> fsq.Granularity:
    kinds = [fsq.PerTensor]
    if shape:
        kinds += [fsq.PerAxis, fsq.PerRow, fsq.PerToken, fsq.PerGroup, fsq.PerBlock]
    kind = draw(st.sampled_from(kinds))
    if kind in (fsq.PerAxis, fsq.PerRow):
        return kind(draw(st.integers(-len(shape), len(shape) - 1)))
    if kind is fsq.PerGroup:
        return kind(draw(st.sampled_from(divisors(shape[-1]))))
    if kind is fsq.PerBlock:
        return kind(tuple(draw(st.sampled_from(divisors(n))) for n in shape))
    return kind()


@st.composite
def specs(
    draw: st.DrawFn, shape: tuple[int, ...], real: torch.dtype, dtypes: tuple[torch.dtype, ...] = (*INTEGERS, *FLOAT8S)
) -> QuantSpec:
    """Every legal combination; `eps` is one that a range of dtype `real` can hold."""
    dtype = draw(st.sampled_from(dtypes))
    quant_min = quant_max = None
    mappings = [MappingType.SYMMETRIC]
    if dtype in INTEGERS:
        low, high = FORMATS[dtype].bounds
        if draw(st.booleans()):
            quant_min = draw(st.integers(low, high - 1))
            quant_max = draw(st.integers(quant_min + 1, high))
            low, high = quant_min, quant_max
        mappings.append(MappingType.ASYMMETRIC)
        if low < 0 < high and int((low + high + 1) / 2) == 0:  # others are refused: torchao clips them
            mappings.append(MappingType.SYMMETRIC_NO_CLIPPING_ERR)
    scales = [torch.float32, torch.float64] if dtype is torch.int16 else [*REALS, torch.float64]
    scale_dtype = draw(st.sampled_from(scales))
    # float32's is our default, the dtype's own is torchao 0.16's, its tiny is torchao 0.18's
    limits = [torch.finfo(torch.float32).eps, torch.finfo(real).eps, torch.finfo(real).tiny, 2.0**-6]
    return QuantSpec(
        dtype,
        draw(granularities(shape)),
        mapping=draw(st.sampled_from(mappings)),
        quant_min=quant_min,
        quant_max=quant_max,
        eps=draw(st.sampled_from([e for e in limits if e >= torch.finfo(scale_dtype).tiny])),
        scale_dtype=scale_dtype,
        zero_point_dtype=draw(st.sampled_from(zero_point_dtypes(dtype))),
    )


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Noise of any size, any finite floats, or multiples of a half (ties); both signs or one.

    No value is above a quarter of the largest, so that no width `hi - lo` overflows:
    test_torchao_gives_an_infinite_scale_where_the_width_overflows is about those.
    """
    n = math.prod(shape)
    limit = torch.finfo(dtype).max / 4
    kind = draw(st.sampled_from(["noise", "floats", "halves"]))
    if kind == "noise":
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        x = torch.randn(n, generator=generator) * 2.0 ** draw(st.integers(-20, 10))
    else:
        largest = float(torch.tensor(limit, dtype=torch.float32))
        width = 16 if dtype is torch.float16 else 32
        floats = st.floats(-largest, largest, width=width, allow_subnormal=True)
        halves = st.integers(-600, 600).map(lambda k: k / 2)
        some = draw(st.lists(floats if kind == "floats" else halves, min_size=1, max_size=min(n, 16)))
        x = torch.tensor(some).repeat(-(-n // len(some)))[:n]
    side = draw(st.sampled_from([None, torch.abs, lambda v: -v.abs()]))
    if side:
        x = side(x)
    x = x.clamp(-limit, limit).to(dtype).reshape(shape)
    return x.mT.contiguous().mT if x.ndim > 1 and draw(st.booleans()) else x  # a transposed layout


@st.composite
def cases(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = (*INTEGERS, *FLOAT8S),
    reals: tuple[torch.dtype, ...] = REALS,
    batches: int = 1,
) -> Case:
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), max_size=3)))
    real = draw(st.sampled_from(reals))
    spec = draw(specs(shape, real, dtypes))
    return Case(spec, tuple(draw(tensors(shape, real)) for _ in range(draw(st.integers(1, batches)))))


@st.composite
def quantized_cases(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], reals: tuple[torch.dtype, ...] = REALS
) -> tuple[Case, QParams]:
    """A case and qparams: calibrated ones, ones that saturate, or ones whose scale is a power of two.

    A scale that is a power of two makes ties of the data that are multiples of a half.
    """
    case = draw(cases(dtypes, reals))
    scale, zero_point = calibrated(case)
    kind = draw(st.sampled_from(["calibrated", "saturating", "power of two"]))
    if kind == "saturating":
        scale = (scale / 4).clamp(min=torch.finfo(scale.dtype).tiny)
    if kind == "power of two":
        scale = torch.full_like(scale, 2.0 ** draw(st.integers(-3, 3)))
        if dtypes != FLOAT8S:
            low, high = case.spec.bounds
            zero_point = torch.full_like(zero_point, draw(st.integers(int(low), int(high))))
    return case, QParams(scale, zero_point)


# --- 1. parity: scale and zero point ---------------------------------------------------------------


def check_choose_qparams_affine(case: Case) -> None:
    theirs = ao.choose_qparams_affine(case.x, their_mapping(case.spec), case.block_size, **their_arguments(case))
    assert_same_qparams(case, calibrated(case), theirs)


def check_min_max(case: Case) -> None:
    state = fsq.observe(case.spec, fsq.init(case.spec, case.x.shape, dtype=case.x.dtype), case.x)
    lo, hi = state["min"], state["max"]
    # The rank of our range is the tensor's: at least 1, or 0.16 divides in another dtype (see deviations).
    lo, hi = torch.atleast_1d(lo), torch.atleast_1d(hi)
    theirs = ao.choose_qparams_affine_with_min_max(lo, hi, their_mapping(case.spec), (), **their_arguments(case))
    assert_same_qparams(case, fsq.calc_qparams(case.spec, state), theirs)


def reduces_nothing(case: Case) -> bool:
    """Every block is one element, and torchao's reduction over no axis reduces them all (see deviations)."""
    return case.x.ndim > 0 and set(case.block_size) == {1} and case.x.numel() > 1


@EXAMPLES
@given(cases())
def test_a_state_in_the_data_dtype_gives_the_bits_of_choose_qparams_affine(case: Case) -> None:
    assume(not reduces_nothing(case))
    check_choose_qparams_affine(case)


@EXAMPLES
@given(cases())
def test_any_range_gives_the_bits_of_choose_qparams_affine_with_min_max(case: Case) -> None:
    check_min_max(case)


@EXAMPLES
@given(cases(reals=(torch.bfloat16, torch.float16)))
def test_a_float32_state_gives_the_bits_that_torchao_has_for_the_data_in_float32(case: Case) -> None:
    assume(not reduces_nothing(case))
    ours = calibrated(case, dtype=torch.float32)
    case = dataclasses.replace(case, batches=(case.x.float(),))
    theirs = ao.choose_qparams_affine(case.x, their_mapping(case.spec), case.block_size, **their_arguments(case))
    assert_same_qparams(case, ours, theirs)


@EXAMPLES
@given(case=cases(batches=3), keepdim=st.booleans())
def test_batches_give_the_bits_of_the_min_max_observer(case: Case, keepdim: bool) -> None:
    assume(not reduces_nothing(case))
    # 0.16 divides a 0-dim range in scale_dtype (see deviations); with keepdim it is never 0-dim.
    keepdim = keepdim or OLD
    observer = AffineQuantizedMinMaxObserver(
        their_mapping(case.spec), granularity=their_granularity(case.spec), keepdim=keepdim, **their_arguments(case)
    )
    for x in case.batches:
        observer(x)
    if OLD and case.x.ndim == 0:
        observer.min_val, observer.max_val = observer.min_val.reshape(1), observer.max_val.reshape(1)
    assert_same_qparams(case, calibrated(case), observer.calculate_qparams())


@EXAMPLES
@given(cases(dtypes=FLOAT8S))
def test_float8_scales_have_the_bits_of_choose_scale_float8_where_eps_does_not_bind(case: Case) -> None:
    """`_choose_scale_float8` has no lower limit: a block of zeros has scale 0 there and `eps` here.

    So the two differ exactly in the blocks whose scale is below `eps`, and there ours is `eps`.
    """
    assume(not reduces_nothing(case))
    spec = dataclasses.replace(case.spec, scale_dtype=torch.float32)  # the only one it returns
    case = dataclasses.replace(case, spec=spec)
    theirs = ao._choose_scale_float8(case.x, list(case.block_size), spec.dtype)
    limit = torch.tensor(spec.eps, dtype=case.x.dtype).float()
    ours = calibrated(case)
    assert theirs.shape == ours.scale.shape, "this chooser keeps the rank"
    assert_same(ours.scale, torch.where(theirs < limit, limit, theirs), "scale")
    assert_same(ours.zero_point, torch.zeros_like(theirs, dtype=spec.zero_point_dtype), "zero point")


# --- 1. parity: codes and values -------------------------------------------------------------------


def check_codes(case: Case, qp: QParams) -> None:
    spec = case.spec
    low, high = spec.bounds
    theirs = ao.quantize_affine(case.x, case.block_size, *qp, castable(spec), low, high)
    assert_same(fsq.quantize(spec, case.x, qp), theirs, "codes")


def check_values(case: Case, qp: QParams, out: torch.dtype) -> None:
    spec = case.spec
    low, high = spec.bounds
    q = fsq.quantize(spec, case.x, qp)
    theirs = ao.dequantize_affine(q, case.block_size, *qp, castable(spec), low, high, output_dtype=exact(spec, out))
    assert_same(fsq.dequantize(spec, q, qp, dtype=out), theirs.to(out), "values")


def exact(spec: QuantSpec, out: torch.dtype) -> torch.dtype:
    """The dtype in which codes less their zero point are exact: int16 is not subtracted in a 16-bit `out` (see
    test_torchao_subtracts_int16_codes_in_a_16_bit_dtype), so parity is with torchao's float32 there."""
    return torch.promote_types(out, torch.float32) if spec.dtype is torch.int16 else out


def check_float8_codes(case: Case, qp: QParams) -> None:
    theirs = ao._quantize_affine_float8(case.x, qp.scale, case.spec.dtype)
    assert_same(fsq.quantize(case.spec, case.x, qp), theirs, "codes")


@EXAMPLES
@given(quantized_cases(INTEGERS))
def test_integer_codes_have_the_bits_of_quantize_affine(drawn: tuple[Case, QParams]) -> None:
    check_codes(*drawn)


@EXAMPLES
@given(quantized_cases(INTEGERS), st.sampled_from(REALS))
def test_integer_values_have_the_bits_of_dequantize_affine(drawn: tuple[Case, QParams], out: torch.dtype) -> None:
    check_values(*drawn, out)


@EXAMPLES
@given(quantized_cases(FLOAT8S))
def test_float8_codes_have_the_bits_of_quantize_affine_float8(drawn: tuple[Case, QParams]) -> None:
    check_float8_codes(*drawn)


@EXAMPLES
@given(quantized_cases(FLOAT8S), st.sampled_from(REALS))
def test_float8_values_have_the_bits_of_dequantize_affine_float8(drawn: tuple[Case, QParams], out: torch.dtype) -> None:
    case, qp = drawn
    q = fsq.quantize(case.spec, case.x, qp)
    theirs = ao._dequantize_affine_float8(q, qp.scale, out)
    assert_same(fsq.dequantize(case.spec, q, qp, dtype=out), theirs, "values")


@EXAMPLES
@given(quantized_cases(tuple(d for d in INTEGERS if d.itemsize == 1)))
def test_fake_quantize_has_the_bits_of_torchao_fake_quantize(drawn: tuple[Case, QParams]) -> None:
    """For codes of 8 bits and fewer; theirs does not cast in between, which matters to a sign of zero only."""
    case, qp = drawn
    low, high = case.spec.bounds
    theirs = ao._fake_quantize_affine(case.x, case.block_size, *qp, castable(case.spec), low, high)
    # Adding 0 turns -0.0 into 0.0: the code of a small negative value is -0.0 as long as it is a float.
    assert_same(fsq.fake_quantize(case.spec, case.x, qp) + 0, theirs + 0, "values")


# --- 1. parity: torchao's tensor subclasses --------------------------------------------------------


def test_every_version_has_a_tensor_subclass_to_compare_with() -> None:
    """The skips below never leave a version without one: AffineQuantizedTensor until 0.17, then Int8Tensor."""
    assert hasattr(ao_dtypes, "to_affine_quantized_intx_static") is OLD
    assert hasattr(ao_dtypes, "to_affine_quantized_floatx_static") is torchao.__version__.startswith("0.16")


@needs_intx_tensor
@EXAMPLES
@given(quantized_cases(INTEGERS))
def test_to_affine_quantized_intx_static_holds_our_codes_and_values(drawn: tuple[Case, QParams]) -> None:
    case, qp = drawn
    spec = case.spec
    theirs = ao_dtypes.to_affine_quantized_intx_static(
        case.x, qp.scale, qp.zero_point, case.block_size, castable(spec), *spec.bounds
    )
    q = fsq.quantize(spec, case.x, qp)
    codes, scale, zero_point = theirs.tensor_impl.get_plain()
    assert_same(q, codes, "codes")
    assert_same(qp.scale, scale, "scale")
    assert_same(qp.zero_point, zero_point, "zero point")
    values = theirs.dequantize(exact(spec, case.x.dtype)).to(case.x.dtype)
    assert_same(fsq.dequantize(spec, q, qp, dtype=case.x.dtype), values, "values")


@needs_intx_tensor
@EXAMPLES
@given(cases(INTEGERS))
def test_to_affine_quantized_intx_holds_our_qparams_codes_and_values(case: Case) -> None:
    assume(not reduces_nothing(case) and not case.wide_codes_in_a_narrow_range)
    spec = case.spec
    low, high = spec.bounds
    arguments = their_arguments(case) | {"target_dtype": castable(spec), "quant_min": low, "quant_max": high}
    theirs = ao_dtypes.to_affine_quantized_intx(case.x, their_mapping(spec), case.block_size, **arguments)
    qp = calibrated(case)
    q = fsq.quantize(spec, case.x, qp)
    codes, *qparams = theirs.tensor_impl.get_plain()
    assume(bool(qparams[0].isfinite().all()))
    assert_same_qparams(case, qp, tuple(qparams))
    assert_same(q, codes, "codes")
    assert_same(fsq.dequantize(spec, q, qp, dtype=case.x.dtype), theirs.dequantize(), "values")


@needs_floatx_tensor
@floatx_deprecated
@EXAMPLES
@given(quantized_cases(FLOAT8S))
def test_to_affine_quantized_floatx_static_holds_our_codes_and_values(drawn: tuple[Case, QParams]) -> None:
    case, qp = drawn
    spec = case.spec
    theirs = ao_dtypes.to_affine_quantized_floatx_static(
        case.x, qp.scale, case.block_size, spec.dtype, ao_dtypes.Float8Layout()
    )
    q = fsq.quantize(spec, case.x, qp)
    codes, scale, _ = theirs.tensor_impl.get_plain()
    assert_same(q, codes, "codes")
    assert_same(qp.scale, scale, "scale")
    assert_same(fsq.dequantize(spec, q, qp, dtype=case.x.dtype), theirs.dequantize(), "values")


@needs_floatx_tensor
@floatx_deprecated
@EXAMPLES
@given(cases(FLOAT8S))
def test_to_affine_quantized_floatx_holds_our_scale_codes_and_values(case: Case) -> None:
    spec = dataclasses.replace(case.spec, scale_dtype=torch.float32, eps=torch.finfo(torch.float32).eps)
    case = dataclasses.replace(case, spec=spec)
    assume(not reduces_nothing(case))
    qp = calibrated(case)
    assume(bool((qp.scale > spec.eps).all()))  # it has no lower limit of a scale
    theirs = ao_dtypes.to_affine_quantized_floatx(case.x, case.block_size, spec.dtype, ao_dtypes.Float8Layout())
    q = fsq.quantize(spec, case.x, qp)
    codes, scale, _ = theirs.tensor_impl.get_plain()
    assert_same(qp.scale, scale, "scale")
    assert_same(q, codes, "codes")
    assert_same(fsq.dequantize(spec, q, qp, dtype=case.x.dtype), theirs.dequantize(), "values")


@needs_int8_tensor
@EXAMPLES
@given(cases((torch.int8,)), st.booleans())
def test_int8_tensor_from_hp_holds_our_qparams_codes_and_values(case: Case, reduce_range: bool) -> None:
    """Its scale has the rank of the tensor, as ours has; its zero point is int8, its eps float32's."""
    spec = dataclasses.replace(
        case.spec,
        quant_min=-64 if reduce_range else None,
        quant_max=63 if reduce_range else None,
        eps=torch.finfo(torch.float32).eps,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.int8,
    )
    case = dataclasses.replace(case, spec=spec)
    assume(not reduces_nothing(case))
    theirs = Int8Tensor.from_hp(case.x, their_granularity(spec), their_mapping(spec), reduce_range=reduce_range)
    qp = calibrated(case)
    q = fsq.quantize(spec, case.x, qp)
    assert theirs.scale.shape == theirs.zero_point.shape == qp.scale.shape
    assert_same_qparams(case, qp, (theirs.scale, theirs.zero_point))
    assert_same(q, theirs.qdata, "codes")
    assert_same(fsq.dequantize(spec, q, qp, dtype=case.x.dtype), theirs.dequantize(), "values")


# --- 2. proof: the checks can fail -----------------------------------------------------------------


def _quotient(self: Format, x: Tensor, qp: QParams) -> Tensor:
    return (x / qp.scale).round_().add_(qp.zero_point)


def _half_away_from_zero(self: Format, x: Tensor, qp: QParams) -> Tensor:
    steps = x * (1.0 / qp.scale)
    return ((steps.abs() + 0.5).floor() * steps.sign()).add_(qp.zero_point)


def _zero_point_before_rounding(self: Format, x: Tensor, qp: QParams) -> Tensor:
    return (x * (1.0 / qp.scale) + qp.zero_point).round_()


def _reciprocal(self: Format, x: Tensor, qp: QParams) -> Tensor:
    return x.to(torch.float32) * (1.0 / qp.scale)


def _scaled_apart(self: Format, q: Tensor, qp: QParams, dtype: torch.dtype) -> Tensor:
    return (q.to(dtype) * qp.scale - qp.zero_point * qp.scale).to(dtype)


def _in_the_output_dtype(self: Format, q: Tensor, qp: QParams, dtype: torch.dtype) -> Tensor:
    return ((q.to(dtype) - qp.zero_point.to(dtype)) * qp.scale).to(dtype)


def _float32_range(spec: QuantSpec, lo: Tensor, hi: Tensor) -> QParams:
    return fsq.from_range(spec, lo.float(), hi.float())


def _one_eps(spec: QuantSpec, lo: Tensor, hi: Tensor) -> QParams:
    return fsq.from_range(dataclasses.replace(spec, eps=2.0**-14), lo, hi)


def _truncated_midpoint(spec: QuantSpec, lo: Tensor, hi: Tensor) -> QParams:
    scale, zero_point = fsq.from_range(spec, lo, hi)
    if spec.mapping is MappingType.SYMMETRIC:
        low, high = spec.bounds
        zero_point = torch.full_like(zero_point, int((low + high) / 2))
    return QParams(scale, zero_point)


@dataclass(frozen=True)
class Mutant:
    where: str
    formula: Callable[..., object]
    drawn: st.SearchStrategy
    check: Callable[..., None]


STEPS, DECODE = "functional_sq.formats.Integer.steps", "functional_sq.formats.Integer.decode"
RANGE = "functional_sq.calibration.from_range"
CODES = quantized_cases(INTEGERS)
CHOOSABLE = cases().filter(lambda case: not reduces_nothing(case))

MUTANTS = {
    "quotient-for-reciprocal": Mutant(STEPS, _quotient, CODES, lambda d: check_codes(*d)),
    "halves-away-from-zero": Mutant(STEPS, _half_away_from_zero, CODES, lambda d: check_codes(*d)),
    "zero-point-before-rounding": Mutant(STEPS, _zero_point_before_rounding, CODES, lambda d: check_codes(*d)),
    "scaled-apart": Mutant(DECODE, _scaled_apart, CODES, lambda d: check_values(*d, torch.float32)),
    # Only 16-bit codes are inexact in a 16-bit float.
    "decoded-in-the-output-dtype": Mutant(
        DECODE, _in_the_output_dtype, quantized_cases((torch.int16,)), lambda d: check_values(*d, torch.bfloat16)
    ),
    "float8-reciprocal-for-quotient": Mutant(
        "functional_sq.formats.Float8.steps", _reciprocal, quantized_cases(FLOAT8S), lambda d: check_float8_codes(*d)
    ),
    "range-in-float32": Mutant(RANGE, _float32_range, CHOOSABLE, check_choose_qparams_affine),
    "another-eps": Mutant(RANGE, _one_eps, CHOOSABLE, check_choose_qparams_affine),
    "truncated-midpoint": Mutant(RANGE, _truncated_midpoint, CHOOSABLE, check_choose_qparams_affine),
}


def counterexample(drawn: st.SearchStrategy, check: Callable[..., None]) -> object:
    """Return a drawn value on which `check` fails; NoSuchExample if 2000 do not."""

    def fails(value: object) -> bool:
        try:
            check(value)
        except (AssertionError, pytest.fail.Exception):
            return True
        return False

    options = settings(EXAMPLES, max_examples=2000, database=None, phases=[Phase.generate])
    return find(drawn, fails, settings=options, random=random.Random(0))


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutated_formula_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]
    monkeypatch.setattr(mutant.where, mutant.formula)
    assert counterexample(mutant.drawn, mutant.check) is not None


# --- 3. deviations: torchao's behaviour that is not followed ---------------------------------------


def theirs_of(x: Tensor, mapping: MappingType, dtype: torch.dtype, **options: object) -> tuple[Tensor, Tensor]:
    """torchao's per-tensor qparams of `x`."""
    return ao.choose_qparams_affine(x, ao.MappingType[mapping.name], tuple(x.shape), dtype, **options)


def ours_of(x: Tensor, mapping: MappingType, dtype: torch.dtype, **options: object) -> QParams:
    """Our per-tensor qparams of `x`."""
    return calibrated(Case(QuantSpec(dtype, fsq.PerTensor(), mapping=mapping, **options), (x,)))


def test_torchao_takes_another_eps_in_each_version_where_ours_is_always_float32s() -> None:
    """A block of zeros has scale eps: the dtype's eps in 0.16, its smallest normal number in 0.18.

    With bfloat16's eps (0.0078) every value below 0.0039 is quantized to 0. So a parity test must name eps.
    """
    for real in REALS:
        default = torch.finfo(real).eps if OLD else torch.finfo(real).tiny
        zeros = torch.zeros(2, dtype=real)
        assert theirs_of(zeros, MappingType.SYMMETRIC, torch.int8)[0].item() == default
        assert ours_of(zeros, MappingType.SYMMETRIC, torch.int8).scale.item() == torch.finfo(torch.float32).eps


@pytest.mark.parametrize("real", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_torchao_gives_an_infinite_scale_where_the_width_overflows(real: torch.dtype) -> None:
    """All its codes are then the zero point and all its values NaN; 60000 is an ordinary float16 outlier."""
    largest = torch.finfo(real).max * 0.9
    x = torch.tensor([-largest, largest], dtype=real)
    theirs = theirs_of(x, MappingType.ASYMMETRIC, torch.uint8, eps=2.0**-10)
    assert theirs[0].isinf()
    codes = ao.quantize_affine(x, (2,), *theirs, torch.uint8)
    assert codes.tolist() == [0, 0]
    assert ao.dequantize_affine(codes, (2,), *theirs, torch.uint8).isnan().all()

    spec = QuantSpec(torch.uint8, fsq.PerTensor(), mapping=MappingType.ASYMMETRIC)
    ours = calibrated(Case(spec, (x,)))
    # the width over 255 in float64, to the precision of the range
    exact = 2 * x[1].double().item() / 255
    assert abs(ours.scale.item() - exact) <= 2 * torch.finfo(real).eps * exact
    assert ours.zero_point.item() == 128
    assert fsq.quantize(spec, x, ours).tolist() in ([0, 255], [1, 255])  # -127.5 rounds either way


def test_torchao_casts_a_scale_to_infinity_where_ours_is_the_largest_number() -> None:
    """A float32 range with float16 scales; so does int1, whose one step is half of the range."""
    x = torch.tensor([-1e9, 1e9])
    theirs = theirs_of(x, MappingType.SYMMETRIC, torch.int8, scale_dtype=torch.float16, eps=2.0**-10)
    assert theirs[0].isinf()
    ours = ours_of(x, MappingType.SYMMETRIC, torch.int8, scale_dtype=torch.float16, eps=2.0**-10)
    assert ours.scale.item() == torch.finfo(torch.float16).max
    for mapping, dtype in ((MappingType.ASYMMETRIC, torch.uint1), (MappingType.SYMMETRIC, torch.int1)):
        assert theirs_of(x * 3e29, mapping, dtype)[0].isinf()
        assert ours_of(x * 3e29, mapping, dtype).scale.item() == torch.finfo(torch.float32).max


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint4, torch.int1], ids=str)
def test_torchao_divides_by_an_end_that_is_zero_and_we_refuse_it(dtype: torch.dtype) -> None:
    """SYMMETRIC_NO_CLIPPING_ERR divides by both ends, so it clips (uint) or gives an infinite scale (int1)."""
    x = torch.tensor([-4.0, 1.0])
    scale, zero_point = theirs_of(x, MappingType.SYMMETRIC_NO_CLIPPING_ERR, dtype)
    low, high = FORMATS[dtype].bounds
    if dtype is torch.int1:
        assert scale.isinf()
    else:
        assert scale.item() == torch.tensor(1.0 / high).item()
        assert zero_point.item() + x[0].item() / scale.item() < low
    with pytest.raises(ValueError, match="needs quant_min < 0 < quant_max"):
        QuantSpec(dtype, fsq.PerTensor(), mapping=MappingType.SYMMETRIC_NO_CLIPPING_ERR)


def test_torchao_gives_a_float8_a_zero_point_out_of_its_codes_and_we_refuse_it() -> None:
    """There is no torchao function that would use it: `_quantize_affine_float8` takes a scale alone."""
    _, zero_point = theirs_of(torch.tensor([-4.0, 1.0]), MappingType.ASYMMETRIC, torch.float8_e4m3fn)
    assert zero_point.item() != 0
    with pytest.raises(ValueError, match="a float format has no zero point"):
        QuantSpec(torch.float8_e4m3fn, fsq.PerTensor(), mapping=MappingType.ASYMMETRIC)


def test_torchao_quantizes_zeros_to_float8_nan_where_ours_are_zero() -> None:
    """`_choose_scale_float8` has no eps: 0 / 0."""
    zeros = torch.zeros(2)
    scale = ao._choose_scale_float8(zeros, [2])
    assert scale.item() == 0
    assert ao._quantize_affine_float8(zeros, scale).float().isnan().all()
    spec = QuantSpec(torch.float8_e4m3fn, fsq.PerTensor())
    assert fsq.quantize(spec, zeros, calibrated(Case(spec, (zeros,)))).float().tolist() == [0, 0]


def test_torchao_wraps_int16_codes_in_a_bfloat16_scale_and_we_refuse_it() -> None:
    """32767 is 32768 in bfloat16, and as int16 that is -32768: the largest value has the smallest code."""
    x = torch.tensor([0.0, 1.0], dtype=torch.bfloat16)
    scale = torch.tensor(2.0**-15, dtype=torch.bfloat16)
    assert ao.quantize_affine(x, (2,), scale, torch.tensor(0), torch.int16).tolist() == [0, -32768]
    with pytest.raises(ValueError, match="16-bit codes are not exact"):
        QuantSpec(torch.int16, fsq.PerTensor(), scale_dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("zero_point_dtype", "zero_point", "values"),
    [
        pytest.param(torch.int32, 32768, [-1.0, -(2.0**-16)], id="int32-and-zero-has-no-code"),
        pytest.param(torch.int16, -32768, [0.0, 0.0], id="int16-wraps-and-all-values-are-lost"),
    ],
)
def test_torchao_lets_an_int16_zero_point_out_of_the_codes(
    zero_point_dtype: torch.dtype, zero_point: int, values: list[float]
) -> None:
    """It clamps to 32767 in the dtype of the range, where that is 32768. Ours clamps as integers.

    The scale has torchao's bits.
    """
    x = torch.tensor([-1.0, 0.0], dtype=torch.bfloat16)
    options = {"eps": 2.0**-23, "scale_dtype": torch.float32, "zero_point_dtype": zero_point_dtype}
    theirs = theirs_of(x, MappingType.ASYMMETRIC, torch.int16, **options)
    assert theirs[1].item() == zero_point
    codes = ao.quantize_affine(x, (2,), *theirs, torch.int16)
    assert ao.dequantize_affine(codes, (2,), *theirs, torch.int16).tolist() == values

    spec = QuantSpec(torch.int16, fsq.PerTensor(), mapping=MappingType.ASYMMETRIC, **options)
    ours = calibrated(Case(spec, (x,)))
    assert_same(ours.scale, theirs[0], "scale")
    assert_same(ours.zero_point, torch.tensor([32767], dtype=zero_point_dtype), "zero point")
    assert fsq.dequantize(spec, fsq.quantize(spec, x, ours), ours).tolist() == [-65535 * 2.0**-16, 0.0]


@pytest.mark.parametrize("real", [torch.bfloat16, torch.float16], ids=str)
def test_torchao_rounds_the_middle_of_int16_codes(real: torch.dtype) -> None:
    """It makes the zero point of a SYMMETRIC mapping in the dtype of the range."""
    case = Case(QuantSpec(torch.int16, fsq.PerTensor(), quant_min=0, quant_max=4097), (torch.ones(2, dtype=real),))
    scale, zero_point = ao.choose_qparams_affine(
        case.x, ao.MappingType.SYMMETRIC, case.block_size, **their_arguments(case)
    )
    assert zero_point.item() == 2048
    assert_same(calibrated(case).scale, scale, "scale")
    assert calibrated(case).zero_point.item() == 2049


@pytest.mark.parametrize(("out", "least"), [(torch.float16, -math.inf), (torch.bfloat16, -64.0)], ids=str)
def test_torchao_subtracts_int16_codes_in_a_16_bit_dtype(out: torch.dtype, least: float) -> None:
    """The zero point 32767 is 32768 there, a step more, and 65535 steps are Inf in float16."""
    spec = QuantSpec(torch.int16, fsq.PerTensor(), mapping=MappingType.ASYMMETRIC)
    qp = QParams(torch.tensor([2.0**-10]), torch.tensor([32767], dtype=torch.int32))
    q = torch.tensor([-32768, 32640], dtype=torch.int16)
    assert ao.dequantize_affine(q, (2,), *qp, torch.int16, output_dtype=out).tolist() == [least, -128 / 1024]
    assert fsq.dequantize(spec, q, qp, dtype=out).tolist() == [-64.0, -127 / 1024]


@pytest.mark.parametrize("granularity", [fsq.PerGroup(1), fsq.PerBlock((1, 1))], ids=repr)
def test_torchao_reduces_everything_where_a_block_is_one_element(granularity: fsq.Granularity) -> None:
    """It calls `amin(dim=[])`, which torch reads as all axes: one scale where four are asked for."""
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    case = Case(QuantSpec(torch.int8, granularity), (x,))
    arguments = their_arguments(case)
    scale, _ = ao.choose_qparams_affine(x, ao.MappingType.SYMMETRIC, case.block_size, **arguments)
    assert scale.shape == ()
    with pytest.raises(RuntimeError, match="invalid for input of size 1"):
        ao._choose_scale_float8(x, list(case.block_size))
    assert_same(calibrated(case).scale, x / 127.5, "scale")


def test_torchao_reduces_everything_for_per_axis_of_a_vector() -> None:
    """The same `amin(dim=[])`: a bias with a scale for each element gets one for all."""
    case = Case(QuantSpec(torch.int8, fsq.PerAxis(0)), (torch.tensor([1.0, 2.0]),))
    scale, _ = ao.choose_qparams_affine(case.x, ao.MappingType.SYMMETRIC, case.block_size, **their_arguments(case))
    assert scale.shape == ()
    assert calibrated(case).scale.shape == (2,)


def test_torchao_pads_a_block_size_to_the_rank_and_we_refuse_it() -> None:
    """A block without a size for each axis says nothing of the leading ones; theirs shares no scale along them."""
    spec = QuantSpec(torch.int8, fsq.PerBlock((2, 3)))
    assert tuple(get_block_size((2, 4, 6), their_granularity(spec))) == (1, 2, 3)
    with pytest.raises(ValueError, match="give one block size for each axis"):
        fsq.init(spec, (2, 4, 6))


def test_torchao_before_018_divides_a_0_dim_range_in_scale_dtype() -> None:
    """0.16 makes the number of steps a 0-dim tensor of scale_dtype, which promotes a 0-dim range and no other.

    So a per-tensor bfloat16 range gives other bits than the same range with an axis; 0.18 divides by a
    Python number. Ours has the bits of 0.18, and of 0.16 for every range with an axis.
    """
    lo, hi = torch.tensor(-1.0, dtype=torch.bfloat16), torch.tensor(0.3, dtype=torch.bfloat16)
    options = {"eps": 2.0**-23, "scale_dtype": torch.float32, "zero_point_dtype": torch.int32}
    asymmetric = (ao.MappingType.ASYMMETRIC, (), torch.uint8)
    scalar = ao.choose_qparams_affine_with_min_max(lo, hi, *asymmetric, **options)
    vector = ao.choose_qparams_affine_with_min_max(lo[None], hi[None], *asymmetric, **options)
    assert (scalar[1].item(), vector[1].item()) == (197 if OLD else 196, 196)
    ours = ours_of(torch.stack([lo, hi]), MappingType.ASYMMETRIC, torch.uint8)
    assert_same(ours.scale, vector[0], "scale")
    assert_same(ours.zero_point, vector[1], "zero point")


def test_torchao_leaves_a_symmetric_zero_point_in_the_dtype_of_the_range() -> None:
    """Unless zero_point_dtype is given, the variant that observers call makes it a float; ours is int32."""
    observer = AffineQuantizedMinMaxObserver(ao.MappingType.SYMMETRIC, torch.int8, ao_granularity.PerTensor())
    observer(torch.ones(2, dtype=torch.bfloat16))
    assert observer.calculate_qparams()[1].dtype is torch.bfloat16
    assert ours_of(torch.ones(2), MappingType.SYMMETRIC, torch.int8).zero_point.dtype is torch.int32


def test_torchao_cannot_cast_to_signed_codes_below_8_bits() -> None:
    x, one, zero = torch.tensor([-9.0, 3.0]), torch.tensor([1.0]), torch.tensor([0], dtype=torch.int32)
    with pytest.raises((NotImplementedError, RuntimeError), match="not implemented for 'Int4'"):
        ao.quantize_affine(x, (2,), one, zero, torch.int4)
    q = fsq.quantize(QuantSpec(torch.int4, fsq.PerTensor()), x, QParams(one, zero))
    assert (q.tolist(), q.dtype) == ([-8, 3], torch.int8)


def test_torchao_refuses_float64_and_we_take_it() -> None:
    x, one, zero = torch.tensor([2.5], dtype=torch.float64), torch.tensor([1.0]), torch.tensor([0])
    with pytest.raises(AssertionError, match="Unsupported input dtype"):
        ao.quantize_affine(x, (1,), one, zero, torch.int8)
    assert fsq.quantize(QuantSpec(torch.int8, fsq.PerTensor()), x, QParams(one, zero)).tolist() == [2]


def test_a_torchao_observer_reduces_to_0_dim_and_1_dim_and_ours_keeps_the_rank() -> None:
    x = torch.ones(4, 6)
    for granularity, theirs in ((fsq.PerTensor(), ()), (fsq.PerAxis(0), (4,)), (fsq.PerGroup(3), (4, 2))):
        case = Case(QuantSpec(torch.int8, granularity), (x,))
        observer = AffineQuantizedMinMaxObserver(ao.MappingType.SYMMETRIC, torch.int8, their_granularity(case.spec))
        observer(x)
        scale, zero_point = observer.calculate_qparams()
        assert scale.shape == zero_point.shape == theirs
        assert calibrated(case).scale.ndim == x.ndim


def test_a_torchao_observer_refuses_another_batch_size_and_ours_takes_any() -> None:
    """A batch of one has no axis that is reduced, so the rank of its per-tensor minimum is another."""
    observer = AffineQuantizedMinMaxObserver(ao.MappingType.SYMMETRIC, torch.int8, ao_granularity.PerTensor())
    observer(torch.ones(4, 6))
    with pytest.raises(AssertionError, match="shape mismatch"):
        observer(torch.ones(1, 6))
    spec = QuantSpec(torch.int8, fsq.PerTensor())
    state = fsq.observe(spec, fsq.init(spec, (4, 6)), torch.ones(4, 6))
    assert fsq.observe(spec, state, torch.ones(1, 6))["count"].item() == 30


def test_a_torchao_observer_that_saw_nan_says_nothing_and_our_check_does() -> None:
    x = torch.tensor([1.0, math.nan])
    observer = AffineQuantizedMinMaxObserver(
        ao.MappingType.ASYMMETRIC, torch.uint8, ao_granularity.PerTensor(), zero_point_dtype=torch.int32
    )
    observer(x)
    scale, zero_point = observer.calculate_qparams()
    assert scale.isnan()
    assert not 0 <= zero_point.item() <= 255
    spec = QuantSpec(torch.uint8, fsq.PerTensor(), mapping=MappingType.ASYMMETRIC)
    with pytest.raises(fsq.CalibrationError, match="NaN was seen"):
        fsq.check(spec, fsq.observe(spec, fsq.init(spec, (2,)), x))


def test_a_torchao_observer_saves_nothing_and_our_state_is_tensors() -> None:
    observer = AffineQuantizedMinMaxObserver(ao.MappingType.SYMMETRIC, torch.int8, ao_granularity.PerTensor())
    observer(torch.ones(2))
    assert not observer.state_dict()
    spec = QuantSpec(torch.int8, fsq.PerTensor())
    assert fsq.observe(spec, fsq.init(spec, (2,)), torch.ones(2)).keys() == {"min", "max", "count"}


def test_an_empty_batch_changes_neither_observer() -> None:
    observer = AffineQuantizedMinMaxObserver(ao.MappingType.SYMMETRIC, torch.int8, ao_granularity.PerTensor())
    observer(torch.ones(2))
    observer(torch.ones(0))
    assert observer.max_val.item() == 1
    spec = QuantSpec(torch.int8, fsq.PerTensor())
    state = fsq.observe(spec, fsq.init(spec, (2,)), torch.ones(2))
    assert fsq.observe(spec, state, torch.ones(0)) == state
