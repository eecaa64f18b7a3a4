"""Every invalid call in one table: what is raised, with the value and the remedy, and nothing changes."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch

import functional_sq as fsq


def bits(t: torch.Tensor) -> tuple[object, ...]:
    return t.dtype, tuple(t.shape), t._version, t.contiguous().reshape(-1).view(torch.uint8).tolist()


def frozen(value: object) -> object:
    """Return everything of `value` that a call could change, in a form that compares."""
    if isinstance(value, torch.Tensor):
        return bits(value)
    if isinstance(value, dict):
        return [(k, frozen(v)) for k, v in value.items()]
    if isinstance(value, tuple):
        return [frozen(v) for v in value]
    return repr(value)


@dataclass(frozen=True)
class FloatSum(fsq.Accumulator):
    """Adds up floats."""

    reductions = {"sum": fsq.SUM}

    def elements(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": x}

    def range(self, spec: fsq.QuantSpec, state: fsq.State) -> tuple[torch.Tensor, torch.Tensor]:
        return -state["sum"], state["sum"]


class Misnamed(FloatSum):
    """Its elements have another name."""

    reductions = {"max": fsq.MAX}


@dataclass
class Thawed(fsq.Accumulator):
    """An observer whose author forgot `frozen=True`."""

    reductions = {}
    range = FloatSum.range


class PerTensor:
    """As torchao's, which may not be here."""

    __module__ = "torchao.quantization.granularity"

    def __repr__(self) -> str:
        return "PerTensor()"


def arguments() -> dict[str, object]:
    """The names that a row of the table may use, made anew for each."""
    x = torch.arange(-16.0, 16.0).reshape(4, 8)
    tensor, channel = (fsq.QuantSpec(torch.int8, g) for g in (fsq.PerTensor(), fsq.PerAxis(0)))
    seen, seen_channel = (fsq.observe(spec, fsq.init(spec, x.shape), x) for spec in (tensor, channel))
    return {
        "x": x,
        "q": x.to(torch.int8),
        "tensor": tensor,
        "channel": channel,
        "group": fsq.QuantSpec(torch.int4, fsq.PerGroup(4)),
        "fixed": fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=fsq.Fixed(0.0, 1.0)),
        "token": fsq.QuantSpec(torch.int8, fsq.PerToken()),
        "e4m3": fsq.QuantSpec(torch.float8_e4m3fn, fsq.PerTensor()),
        "seen": seen,
        "seen_channel": seen_channel,
        "qp": fsq.calc_qparams(tensor, seen),
        "qp_channel": fsq.calc_qparams(channel, seen_channel),
        "folded": fsq.fold(channel, x.to(torch.int8), fsq.calc_qparams(channel, seen_channel)),
        "theirs": PerTensor(),
        "thawed": Thawed(),
        "misnamed": fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=Misnamed()),
        "adds": fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=FloatSum()),
        "windows": fsq.fold(tensor, torch.ones(4, 4, 3, dtype=torch.int8), fsq.calc_qparams(tensor, seen)),
    }


CODE_DTYPES = "is not a quantized dtype; use one of int1, uint1"
REALS = "use one of torch.float32, torch.float64, torch.bfloat16, torch.float16"
CONVERT = "convert it to one of float32, float64, bfloat16, float16"
BELONGS = "use the granularity and the sizes it was made with, or reshape it"
RECORDS = "MinMax() records ['count', 'max', 'min'], this state is "
READS = "MinMax() reads ['count', 'max', 'min'], this state is "
READ = "record with an observer that has them"
MAKE = "make a state with init(spec, shape)"
E4M3 = "torch.float8_e4m3fn"
NO_CLIPPING = "mapping=MappingType.SYMMETRIC_NO_CLIPPING_ERR"

# call: exception type, what the message contains: the value, the rule, the remedy
INVALID: dict[str, tuple[object, ...]] = {
    # Granularities.
    "PerGroup(0)": (ValueError, "PerGroup(group_size=0)", "must be at least 1"),
    "PerGroup(-4)": (ValueError, "group_size is -4", "must be at least 1"),
    "PerGroup(4.0)": (TypeError, "group_size is 4.0", "must be an int"),
    "PerGroup(True)": (TypeError, "group_size is True", "must be an int"),
    "PerGroup('4')": (TypeError, "group_size is '4'", "must be an int"),
    "PerAxis(None)": (TypeError, "axis is None", "must be an int"),
    "PerAxis(torch.tensor(0))": (TypeError, "axis is tensor(0)", "must be an int"),
    "PerRow(1.0)": (TypeError, "dim is 1.0", "must be an int"),
    "PerBlock(4)": (TypeError, "block_size=4", "give a tuple with a size for each axis"),
    "PerBlock((1, 0))": (ValueError, "PerBlock(block_size=(1, 0))", "must be at least 1"),
    "PerBlock((1, 2.0))": (TypeError, "a block size is 2.0", "must be an int"),
    "PerGroup(7).stat_shape((2, 16))": (
        ValueError,
        "PerGroup(group_size=7) does not divide axis 1 of shape (2, 16)",
        "use a divisor of 16",
    ),
    "PerAxis(2).stat_shape((2, 16))": (ValueError, "rank 2 has no axis 2", "use an axis from -2 to 1"),
    "PerAxis(-3).stat_shape((2, 16))": (ValueError, "rank 2 has no axis -3", "use an axis from -2 to 1"),
    "PerRow(2).stat_shape((2, 16))": (ValueError, "PerRow(dim=2) does not apply", "use an axis from -2 to 1"),
    "PerToken().stat_shape(())": (ValueError, "PerToken() does not apply to a scalar", "use PerTensor()"),
    "PerGroup(1).stat_shape(())": (ValueError, "PerGroup(group_size=1)", "use PerTensor()"),
    "PerBlock((1, 2, 3)).stat_shape((4, 6))": (
        ValueError,
        "PerBlock(block_size=(1, 2, 3)) has 3 axes and shape (4, 6) has 2",
        "give one block size for each axis",
    ),
    "PerBlock((3, 2)).stat_shape((4, 6))": (ValueError, "does not divide axis 0 of shape (4, 6)", "use a divisor of 4"),
    "observe(adds, init(adds, x.shape), x)": (
        TypeError,
        "FloatSum(): sum is a SUM of torch.float32",
        "held in torch.int64",
        "give integers",
    ),
    # Specs.
    "QuantSpec(torch.float32, PerTensor())": (TypeError, "torch.float32", CODE_DTYPES),
    "QuantSpec(torch.uint16, PerTensor())": (TypeError, "torch.uint16", CODE_DTYPES),
    "QuantSpec('int8', PerTensor())": (TypeError, "'int8'", CODE_DTYPES),
    "QuantSpec(PerTensor(), torch.int8)": (TypeError, "PerTensor()", CODE_DTYPES),
    "QuantSpec(torch.int8, PerTensor)": (TypeError, "granularity=<class", "did you mean PerTensor()?"),
    "QuantSpec(torch.int8, 'per_tensor')": (
        TypeError,
        "granularity='per_tensor'",
        "is not a functional_sq Granularity",
    ),
    "QuantSpec(torch.int8, theirs)": (TypeError, "that is torchao's; use functional_sq.PerTensor()"),
    "QuantSpec(torch.int8, PerTensor(), observer=thawed)": (
        TypeError,
        "observer=Thawed() is not hashable",
        "decorate its class @dataclass(frozen=True)",
    ),
    "QuantSpec(torch.int8, None)": (TypeError, "granularity=None", "is not a functional_sq Granularity"),
    "QuantSpec(torch.int8, PerTensor(), observer=MinMax)": (TypeError, "observer=<class", "did you mean MinMax()?"),
    "QuantSpec(torch.int8, PerTensor(), observer='mse')": (TypeError, "observer='mse'", "not a functional_sq Observer"),
    "QuantSpec(torch.int8, PerTensor(), mapping=MappingType)": (
        TypeError,
        "mapping=<enum",
        "use one of MappingType.SYM",
    ),
    f"QuantSpec(torch.int8, PerTensor(), {NO_CLIPPING}, quant_min=-5)": (
        ValueError,
        "int8 with codes -5 to 127",
        "with 0 in the middle",
        "use MappingType.SYMMETRIC",
    ),
    "QuantSpec(torch.int8, PerTensor(), mapping='SYMMETRIC')": (TypeError, "mapping='SYMMETRIC'", "MappingType"),
    "QuantSpec(torch.int8, PerTensor(), MappingType.SYMMETRIC)": (TypeError, "positional arguments"),
    f"QuantSpec({E4M3}, PerTensor(), mapping=MappingType.ASYMMETRIC)": (
        ValueError,
        "float8_e4m3fn with mapping=MappingType.ASYMMETRIC: a float format has no zero point",
        "use MappingType.SYMMETRIC",
    ),
    f"QuantSpec({E4M3}, PerTensor(), {NO_CLIPPING})": (ValueError, NO_CLIPPING, "use MappingType.SYMMETRIC"),
    f"QuantSpec(torch.uint8, PerTensor(), {NO_CLIPPING})": (
        ValueError,
        f"uint8 with codes 0 to 255 and {NO_CLIPPING}",
        "needs quant_min < 0 < quant_max",
        "use MappingType.SYMMETRIC",
    ),
    f"QuantSpec(torch.int8, PerTensor(), {NO_CLIPPING}, quant_min=0)": (
        ValueError,
        "codes 0 to 127",
        "use MappingType",
    ),
    f"QuantSpec(torch.int1, PerTensor(), {NO_CLIPPING})": (ValueError, "codes -1 to 0", "use MappingType.SYMMETRIC"),
    "QuantSpec(torch.int8, PerTensor(), quant_min=5, quant_max=4)": (
        ValueError,
        "quant_min=5 is not below quant_max=4",
        "at least two codes are needed",
    ),
    "QuantSpec(torch.int8, PerTensor(), quant_max=-128)": (ValueError, "quant_min=-128", "at least two codes"),
    "QuantSpec(torch.int8, PerTensor(), quant_min=-129)": (
        ValueError,
        "quant_min=-129 is not a code of int8",
        "use a value from -128 to 127",
    ),
    "QuantSpec(torch.uint4, PerTensor(), quant_max=16)": (ValueError, "quant_max=16", "use a value from 0 to 15"),
    "QuantSpec(torch.int8, PerTensor(), quant_min=-127.0)": (TypeError, "quant_min=-127.0", "codes are integers"),
    "QuantSpec(torch.int8, PerTensor(), quant_max=True)": (TypeError, "quant_max=True", "codes are integers"),
    f"QuantSpec({E4M3}, PerTensor(), quant_max=100)": (ValueError, "with quant_max=100", "leave quant_max out"),
    "QuantSpec(torch.int8, PerTensor(), eps=0)": (ValueError, "eps=0", "use an eps from 1.17549"),
    "QuantSpec(torch.int8, PerTensor(), eps=-1e-05)": (ValueError, "eps=-1e-05", "use an eps from 1.17549"),
    "QuantSpec(torch.int8, PerTensor(), eps=1e-40)": (ValueError, "eps=1e-40", "use an eps from 1.17549"),
    "QuantSpec(torch.int8, PerTensor(), eps=float('nan'))": (ValueError, "eps=nan", "use an eps from 1.17549"),
    "QuantSpec(torch.int8, PerTensor(), eps=float('inf'))": (ValueError, "eps=inf", "use an eps from 1.17549"),
    "QuantSpec(torch.int8, PerTensor(), eps='1e-5')": (TypeError, "eps='1e-5'", "is not a number"),
    "QuantSpec(torch.int8, PerTensor(), eps=None)": (TypeError, "eps=None", "is not a number"),
    "QuantSpec(torch.int8, PerTensor(), scale_dtype=torch.float16)": (
        ValueError,
        "eps=1.1920928955078125e-07 with scale_dtype=torch.float16",
        "use an eps from 6.1",
    ),
    "QuantSpec(torch.int8, PerTensor(), scale_dtype=torch.int32)": (TypeError, "scale_dtype=torch.int32", REALS),
    "QuantSpec(torch.int8, PerTensor(), scale_dtype=None)": (TypeError, "scale_dtype=None", REALS),
    "QuantSpec(torch.int16, PerTensor(), scale_dtype=torch.bfloat16)": (
        ValueError,
        "int16 with scale_dtype=torch.bfloat16",
        "use torch.float32",
    ),
    "QuantSpec(torch.uint8, PerTensor(), zero_point_dtype=torch.int8)": (
        ValueError,
        "zero_point_dtype=torch.int8 is no float, and none of int8, uint8, int16",
        "that holds every code from 0 to 255",
        "use torch.int32",
    ),
    "QuantSpec(torch.int8, PerTensor(), zero_point_dtype=torch.uint8)": (ValueError, "torch.uint8", "use torch.int32"),
    "QuantSpec(torch.int16, PerTensor(), zero_point_dtype=torch.bfloat16)": (
        ValueError,
        "zero_point_dtype=torch.bfloat16 is no float, and none of",
        "that holds every code from -32768 to 32767",
        "use torch.int32",
    ),
    f"QuantSpec(torch.int8, PerTensor(), zero_point_dtype={E4M3})": (ValueError, E4M3, "use torch.int32"),
    "QuantSpec(torch.int8, PerTensor(), zero_point_dtype=torch.bool)": (TypeError, "torch.bool", "use torch.int32"),
    "QuantSpec(torch.int8, PerTensor(), zero_point_dtype='int32')": (TypeError, "'int32'", "use torch.int32"),
    "formats.format_of(None)": (TypeError, "None", CODE_DTYPES),
    # Observers.
    "observe(misnamed, init(misnamed, (4, 8)), x)": (
        TypeError,
        "elements gives ['sum']",
        "has ['max']",
        "same names",
    ),
    "Fixed(1.0, 0.0)": (ValueError, "lo=1.0 is above hi=0.0", "exchange them"),
    "Fixed(float('-inf'), 0.0)": (ValueError, "lo=-inf is not a finite float32", "two such ends"),
    "Fixed(0.0, float('nan'))": (ValueError, "hi=nan is not a finite float32", "two such ends"),
    "Fixed(0.0, 1e300)": (ValueError, "hi=1e+300 is not a finite float32", "two such ends"),
    "Fixed('0', 1.0)": (TypeError, "lo='0' is not a number", "two numbers"),
    "Fixed(0.0, True)": (TypeError, "hi=True is not a number", "two numbers"),
    # init.
    "init(tensor, x)": (TypeError, "shape is a Tensor", "give a tuple of ints, such as x.shape"),
    "init(QuantSpec, x.shape)": (TypeError, "spec is <class", "give a QuantSpec"),
    "init(tensor, (4.0, 8))": (ValueError, "shape (4.0, 8) has the size 4.0", "sizes are ints, at least 0"),
    "init(tensor, (-4, 8))": (ValueError, "has the size -4", "sizes are ints, at least 0"),
    "init(tensor, 8)": (TypeError, "shape is a int", "give a tuple of ints"),
    "init(x.shape, tensor)": (TypeError, "spec is torch.Size([4, 8])", "give a QuantSpec"),
    "init(tensor, x.shape, dtype=torch.int32)": (TypeError, "dtype=torch.int32", REALS),
    f"init(tensor, x.shape, dtype={E4M3})": (TypeError, f"dtype={E4M3}", REALS),
    "init(group, (4, 6))": (ValueError, "PerGroup(group_size=4)", "shape (4, 6)", "use a divisor of 6"),
    "init(channel, ())": (ValueError, "PerAxis(axis=0)", "use PerTensor()"),
    # observe.
    "observe(tensor, seen, x.int())": (TypeError, "observe got a tensor of torch.int32", CONVERT),
    "observe(tensor, seen, x.to(torch.complex64))": (TypeError, "torch.complex64", CONVERT),
    "observe(tensor, seen, x > 0)": (TypeError, "torch.bool", CONVERT),
    f"observe(tensor, seen, x.to({E4M3}))": (TypeError, E4M3, CONVERT),
    "observe(tensor, seen, [1.0])": (TypeError, "observe got a list", "give a tensor"),
    "observe(None, seen, x)": (TypeError, "spec is None", "give a QuantSpec"),
    "observe(tensor, seen | {'min': torch.zeros(3)}, x)": (ValueError, "min has shape (3,) and its count (1, 1)", MAKE),
    "observe(tensor, seen | {'min': 3.0}, x)": (ValueError, "the state's min is a float, not a tensor", MAKE),
    "observe(tensor, seen | {'count': 3}, x)": (ValueError, "the state's count is a int, not a tensor", MAKE),
    "observe(tensor, seen, x, mask=[True] * 4)": (TypeError, "mask is list", "give a bool tensor"),
    "observe(tensor, x, seen)": (TypeError, "observe got a dict", "give a tensor"),
    "observe(tensor, {}, x)": (ValueError, f"{RECORDS}[]", MAKE),
    "observe(tensor, None, x)": (ValueError, f"{RECORDS}NoneType", MAKE),
    "observe(tensor, x, x)": (ValueError, f"{RECORDS}Tensor", MAKE),
    "observe(tensor, {'count': seen['count']}, x)": (ValueError, f"{RECORDS}['count']", MAKE),
    "observe(fixed, seen, x)": (ValueError, "Fixed(lo=0.0, hi=1.0) records ['count']", MAKE),
    "observe(tensor, seen_channel, x)": (
        ValueError,
        "the state has shape (4, 1), but PerTensor() of a tensor of shape (4, 8) needs (1, 1)",
        BELONGS,
    ),
    "observe(channel, seen, x)": (ValueError, "the state has shape (1, 1)", "needs (4, 1)", BELONGS),
    "observe(channel, seen_channel, x.T)": (ValueError, "of shape (8, 4) needs (8, 1)", BELONGS),
    "observe(group, init(group, (4, 8)), x[:, :6])": (ValueError, "shape (4, 6)", "use a divisor of 6"),
    "observe(tensor, seen, x, mask=torch.ones(4))": (
        TypeError,
        "mask is torch.float32",
        "give a bool tensor that is True where x counts",
    ),
    "observe(tensor, seen, x, mask=torch.ones(4, dtype=torch.int64))": (TypeError, "torch.int64", "give a bool tensor"),
    "observe(tensor, seen, x, mask=torch.ones(8, dtype=torch.bool))": (
        ValueError,
        "mask of shape (8,) does not fit x of shape (4, 8)",
        "must be that of the leading axes of x",
    ),
    "observe(tensor, seen, x, mask=torch.ones(4, 8, 1, dtype=torch.bool))": (ValueError, "(4, 8, 1)", "leading axes"),
    # merge, calc_qparams, check.
    "merge(tensor, seen, seen_channel)": (
        ValueError,
        "differ in the shape of 'min'",
        "both must come from init() with the same spec, shape, dtype and device",
    ),
    "merge(tensor, seen, init(tensor, x.shape, dtype=torch.bfloat16))": (
        ValueError,
        "differ in the dtype of 'min': torch.float32 and torch.bfloat16",
        "both must come from init()",
    ),
    "merge(tensor, seen, init(tensor, x.shape, device='meta'))": (
        ValueError,
        "device of 'min'",
        "must come from init()",
    ),
    "merge(channel, seen_channel, init(channel, (5, 8)))": (ValueError, "shape of 'min'", "must come from init()"),
    "merge(tensor, seen, {})": (ValueError, f"{RECORDS}[]", MAKE),
    "merge(tensor, None, seen)": (ValueError, f"{RECORDS}NoneType", MAKE),
    "calc_qparams(tensor, seen | {'min': x})": (ValueError, "min has shape (4, 8) and its count (1, 1)", MAKE),
    "from_range(tensor, 0.0, 1.0)": (TypeError, "from_range (lo) got a float", "give a tensor"),
    "from_range(tensor, x, x[0])": (ValueError, "shape (4, 8) and hi torch.float32 of shape (8,)", "two ends alike"),
    "from_range(tensor, x, x.double())": (ValueError, "hi torch.float64", "a range has two ends alike"),
    "calc_qparams(tensor, {})": (ValueError, f"{READS}[]", READ),
    "calc_qparams(tensor, x)": (ValueError, f"{READS}Tensor", READ),
    "calc_qparams(tensor, init(fixed, x.shape))": (ValueError, f"{READS}['count']", READ),
    "check(tensor, {})": (ValueError, f"{READS}[]", READ),
    "check(tensor, init(tensor, x.shape))": (fsq.CalibrationError, "nothing was seen", "calibrate with data that"),
    "check(channel, init(channel, x.shape))": (fsq.CalibrationError, "nothing was seen in 4 of 4 blocks", "calibrate"),
    "check(tensor, seen, min_count=33)": (fsq.CalibrationError, "only 32 values", "at least 33 needed", "more data"),
    "check(tensor, observe(tensor, init(tensor, x.shape), x * 0))": (
        fsq.CalibrationError,
        "only zeros were seen",
        "calibrate with data that is not all zero",
    ),
    "check(channel, observe(channel, seen_channel, x / 0))": (
        fsq.CalibrationError,
        "was seen (min in 3 of 4 blocks)",
        "leave them out with a mask, or record with SkipNonfinite",
    ),
    "check(tensor, observe(tensor, seen, x * float('nan')))": (fsq.CalibrationError, "NaN was seen (min)", "a mask"),
    "check(tensor, observe(tensor, seen, x + float('inf')))": (fsq.CalibrationError, "Inf was seen (max)", "a mask"),
    "check(tensor, observe(tensor, init(tensor, x.shape, dtype=torch.float16), x + 1e5))": (
        fsq.CalibrationError,
        "if the data has none, the state's torch.float16 is too small",
        "use init(..., dtype=torch.float32)",
    ),
    "check(tensor, observe(tensor, seen, x.double() + 1e300))": (
        fsq.CalibrationError,
        "the state's torch.float32 is too small",
        "use init(..., dtype=torch.float64)",
    ),
    # quantize, dequantize, fake_quantize.
    "quantize(tensor, x.int(), qp)": (TypeError, "quantize got a tensor of torch.int32", CONVERT),
    "quantize(tensor, x.to(torch.complex64), qp)": (TypeError, "torch.complex64", CONVERT),
    "quantize(tensor, x > 0, qp)": (TypeError, "torch.bool", CONVERT),
    f"quantize(e4m3, x.to({E4M3}), qp)": (TypeError, E4M3, CONVERT),
    "quantize('int8', x, qp)": (TypeError, "spec is 'int8'", "give a QuantSpec, such as QuantSpec(torch.int8"),
    "quantize(tensor, x, qp.scale)": (TypeError, "qp is tensor([[", "give QParams(scale, zero_point), two tensors"),
    "quantize(tensor, x, None)": (TypeError, "qp is None", "give QParams(scale, zero_point)"),
    "quantize(tensor, x, (1.0, 0))": (TypeError, "qp is (1.0, 0)", "two tensors"),
    "dequantize(tensor, q, QParams(1.0, 0))": (TypeError, "qp is QParams(scale=1.0", "two tensors"),
    "quantize(tensor, 1.0, qp)": (TypeError, "quantize got a float", "give a tensor"),
    "quantize(tensor, qp, x)": (TypeError, "quantize got a QParams", "give a tensor"),
    "quantize(tensor, x, qp_channel)": (
        ValueError,
        "the scale has shape (4, 1), but PerTensor() of a tensor of shape (4, 8) needs (1, 1)",
        BELONGS,
    ),
    "quantize(channel, x, qp)": (ValueError, "the scale has shape (1, 1)", "needs (4, 1)", BELONGS),
    "quantize(channel, x[:2], qp_channel)": (ValueError, "of shape (2, 8) needs (2, 1)", BELONGS),
    "quantize(channel, x, QParams(qp_channel.scale, qp.zero_point))": (
        ValueError,
        "the zero point has shape (1, 1) and the scale (4, 1)",
        "they must be equal",
    ),
    "quantize(group, x[:, :6], QParams(torch.ones(4, 2), torch.zeros(4, 2)))": (ValueError, "use a divisor of 6"),
    "dequantize(tensor, x, qp)": (TypeError, "torch.float32", "the codes of torch.int8 are a tensor of torch.int8"),
    "dequantize(tensor, q.to(torch.uint8), qp)": (TypeError, "torch.uint8", "are a tensor of torch.int8"),
    "dequantize(group, q.to(torch.int16), qp)": (
        TypeError,
        "torch.int16",
        "codes of torch.int4 are a tensor of torch.int8",
    ),
    "dequantize(e4m3, x.to(torch.float8_e5m2), qp)": (TypeError, "torch.float8_e5m2", f"are a tensor of {E4M3}"),
    "dequantize(tensor, [1], qp)": (TypeError, "dequantize got list", "are a tensor of torch.int8"),
    "dequantize(tensor, q, qp, dtype=torch.int32)": (TypeError, "dequantize to torch.int32", REALS),
    "dequantize(tensor, q, qp, dtype='float32')": (TypeError, "dequantize to float32", REALS),
    "dequantize(tensor, q, qp_channel)": (ValueError, "the scale has shape (4, 1)", BELONGS),
    "fake_quantize(tensor, x.int(), qp)": (TypeError, "fake_quantize got a tensor of torch.int32", CONVERT),
    "fake_quantize(tensor, x, qp_channel)": (ValueError, "the scale has shape (4, 1)", BELONGS),
    # Products of codes.
    "fold(channel, q[0], qp_channel)": (ValueError, "fold got codes of shape (8,)", "is (out, in)"),
    "fold(channel, x, qp_channel)": (TypeError, "fold got torch.float32", "are a tensor of torch.int8"),
    "fold(channel, q, qp)": (ValueError, "the weight's scale has shape (1, 1)", BELONGS),
    "fold(channel, q, QParams(qp_channel.scale, qp_channel.zero_point + 1))": (
        ValueError,
        "has the zero point 0, got [1, 1, 1, 1]",
        "use MappingType.ASYMMETRIC for other zero points",
    ),
    "check_product(e4m3, channel, (4, 8))": (ValueError, f"{E4M3} and a weight of torch.int8", "or the reference path"),
    "check_product(tensor, QuantSpec(torch.int16, PerTensor()), (4, 8))": (ValueError, "torch.int16", "at most 8 bits"),
    "check_product(tensor, group, (4, 8))": (
        ValueError,
        "PerGroup(group_size=4) gives several scales",
        "use PerAxis(0) or PerTensor() for the weight",
    ),
    "check_product(group, channel, (4, 8))": (ValueError, "PerGroup(group_size=4)", "use PerTensor() for the act"),
    "linear(tensor, q[:, :4], qp, folded)": (
        ValueError,
        "activations of shape (4, 4) meet a weight of shape (4, 8)",
        "the last axes must be equal",
    ),
    "linear(tensor, x, qp, folded)": (TypeError, "product got torch.float32", "are a tensor of torch.int8"),
    f"linear(e4m3, x.to({E4M3}), qp, folded)": (
        TypeError,
        f"{E4M3} meet a weight of torch.int8",
        "quantize both alike",
    ),
    "linear(tensor, q, qp, folded, residual=torch.ones(4, 1))": (
        ValueError,
        "residual has shape (4, 1), and the result (4, 4)",
        "expand it",
    ),
    "linear(tensor, q, qp, folded, residual=torch.ones(4, 4).half())": (
        TypeError,
        "residual is torch.float16, and the result torch.float32",
        "cast it, or ask for dtype=torch.float16",
    ),
    "linear(tensor, q, qp, folded, residual=[1])": (TypeError, "a product (residual) got a list", "give a tensor"),
    "linear(tensor, q, qp, folded, x=[1])": (TypeError, "a product (x) got a list", "give a tensor"),
    "linear(token, q, QParams(torch.ones(2, 2, 1), torch.zeros(2, 2, 1)), folded)": (
        ValueError,
        "the activations' scale has shape (2, 2, 1), but PerToken() of a tensor of shape (4, 8) needs (4, 1)",
        "reshape it",
    ),
    "Fixed(-(10**400), 1)": (ValueError, "lo=-inf is not a finite float32", "two such ends"),
    "linear(tensor, [1], qp, folded)": (TypeError, "a product got list", "are a tensor of torch.int8"),
    "linear(tensor, q[0, 0], qp, folded)": (ValueError, "activations of shape ()", "the last axes must be equal"),
    "linear(tensor, q, qp.scale, folded)": (TypeError, "qp is tensor([[", "give QParams(scale, zero_point)"),
    "linear(tensor, q, qp, q)": (TypeError, "weight is a Tensor", "the FoldedWeight that fold(spec, q, qp) returns"),
    "linear(tensor, q, qp, folded, x[:3, 0])": (
        ValueError,
        "bias has shape (3,), and the weight 4 outputs",
        "one entry",
    ),
    "linear(tensor, q, qp, folded, x[0, 0])": (ValueError, "bias has shape ()", "4 outputs; give one entry for each"),
    "linear(tensor, q, qp, folded, x[:, 0].to(torch.complex64))": (TypeError, "a product (bias) got a tensor", CONVERT),
    "linear(tensor, q, qp, folded, epilogue=Epilogue(torch.ones(3), torch.ones(3)))": (
        ValueError,
        "shapes (3,) and (3,), and the weight 4 outputs",
        "compute it with epilogue(spec, qp, weight)",
    ),
    "linear(tensor, q, qp, folded, epilogue=epilogue(tensor, qp, folded)._replace(offset=None))": (
        ValueError,
        "shapes (4,) and None, and the weight 4 outputs of torch.int8",
        "compute it with epilogue(spec, qp, weight)",
    ),
    "conv(tensor, q, qp, windows, epilogue=Epilogue(torch.ones(4), None))": (
        ValueError,
        "shapes (4,) and None, and the weight 4 outputs of torch.int8",
        "compute it with epilogue(spec, qp, weight)",
    ),
    "linear(tensor, q, qp, folded, epilogue=3)": (
        TypeError,
        "epilogue is a int",
        "give what epilogue(spec, qp, weight)",
    ),
    "linear_reference(tensor, q, qp, folded)": (
        TypeError,
        "linear_reference (weight) got a FoldedWeight",
        "give a tensor",
    ),
    "linear_reference(tensor, q, qp, q)": (TypeError, "linear_reference (weight) got a tensor of torch.int8", CONVERT),
    "linear_reference(tensor, q[:, :3], qp, x)": (
        ValueError,
        "of shape (4, 3) meet a weight of shape (4, 8)",
        "last axes",
    ),
    "linear_reference(tensor, [1], qp, x)": (TypeError, "dequantize got list", "are a tensor of torch.int8"),
    "linear_reference(tensor, q, qp, x, x[:3, 0])": (ValueError, "bias has shape (3,)", "give one entry for each"),
    "conv_reference(tensor, [1], qp, x[:, :, None])": (TypeError, "dequantize got list", "are a tensor of torch.int8"),
    "conv_reference(tensor, q.T, qp, x[..., None], x[0])": (ValueError, "bias has shape (8,)", "one entry for each"),
    "conv_transpose_reference(tensor, q.T, qp, x[..., None], x[0])": (ValueError, "bias has shape (8,)", "one entry"),
    "linear_reference(tensor, q, qp, x, x[:, 0].double())": (TypeError, "bias is torch.float64", "cast one of them"),
    "conv_reference(tensor, q.T, qp, x[..., None], x[:, 0].half())": (TypeError, "bias is torch.float16", "cast one"),
    "conv_transpose_reference(tensor, q.T, qp, x[..., None], x[:, 0].half())": (TypeError, "torch.float16", "cast one"),
    "conv_transpose_reference(tensor, q.T[:, :0], qp, x[..., None])": (
        ValueError,
        "(8, 0)",
        "give more of them, or pad",
    ),
    "transpose_weight([1])": (TypeError, "weight is a list", "give a tensor of (in, out / groups, *kernel)"),
    "transpose_weight(x[..., None], True)": (ValueError, "groups=True", "groups a divisor of its first axis"),
    "transpose_weight(x[..., None], 1.0)": (ValueError, "groups=1.0", "groups a divisor of its first axis"),
    "fold_batch_norm(q, None, x[:, 0], x[:, 0], None, None, 0.1)": (
        TypeError,
        "fold_batch_norm (weight) got a tensor of torch.int8",
        CONVERT,
    ),
    "fold_batch_norm(x, [1.0], x[:, 0], x[:, 0], None, None, 0.1)": (TypeError, "(bias) got a list", "give a tensor"),
    "fold_batch_norm(x, None, None, x[:, 0], None, None, 0.1)": (TypeError, "(running_mean) got a NoneType", "give a"),
    "fold_batch_norm(x, None, x[:, 0], x[:, 0], q[:, 0], None, 0.1)": (TypeError, "(gamma) got a tensor", CONVERT),
    "fold_batch_norm(x[0, 0], None, x[0], x[0], None, None, 0.1)": (ValueError, "a weight of shape ()", "give that of"),
    "fold_batch_norm(x, None, x[:, 0], x[:, 0], None, None, None)": (TypeError, "eps=None", "that of the batch norm"),
    "quantize(tensor, x.to_sparse(), qp)": (TypeError, "got a sparse_coo tensor", "give a dense one"),
    "observe(tensor, seen, torch.nested.nested_tensor([x, x], layout=torch.jagged))": (
        TypeError,
        "got a nested tensor",
        "give a dense one",
    ),
    "conv_reference(tensor, q, qp, windows)": (
        TypeError,
        "conv_reference (weight) got a FoldedWeight",
        "give a tensor",
    ),
    "conv_transpose_reference(tensor, q, qp, windows)": (
        TypeError,
        "conv_transpose_reference (weight) got a FoldedWeight",
        "give a tensor",
    ),
    "requantize(x, Requantization(tensor, None))": (TypeError, "qp is None", "give QParams(scale, zero_point)"),
    "linear(tensor, q, qp, folded, then=Requantization(tensor, None))": (TypeError, "qp is None", "give QParams("),
    "linear(tensor, q, qp, folded, dtype=torch.float64, epilogue=epilogue(tensor, qp, folded))": (
        TypeError,
        "the epilogue's scale is torch.float32, and this result is scaled in torch.float64",
        "compute it with epilogue(..., dtype=torch.float64)",
    ),
    "linear(tensor, q, qp, folded, then=Requantization(tensor, qp, ['relu']))": (ValueError, "['relu']", "use one of"),
    "epilogue(tensor, qp, None)": (TypeError, "weight is a NoneType", "give the FoldedWeight"),
    "fold(channel, [1], qp_channel)": (TypeError, "fold got list", "are a tensor of torch.int8"),
    "fold(channel, q, None)": (TypeError, "qp is None", "give QParams(scale, zero_point)"),
    "unfold(None, folded)": (TypeError, "spec is None", "give a QuantSpec"),
    "unfold(e4m3, folded)": (TypeError, f"of {E4M3} has codes of {E4M3}, this one torch.int8", "give its spec"),
    "epilogue(tensor, qp, folded, dtype=torch.int8)": (TypeError, "epilogue in torch.int8", REALS),
    "unfold(channel, q)": (TypeError, "weight is a Tensor", "give the FoldedWeight"),
    "check_product(None, channel, (4, 8))": (TypeError, "spec is None", "give a QuantSpec"),
    "check_product(tensor, channel, (8,))": (ValueError, "a weight of shape (8,)", "give (N, K)"),
    "from_range(None, x, x)": (TypeError, "spec is None", "give a QuantSpec"),
    "init(tensor, ('a',))": (ValueError, "the size 'a'", "sizes are ints"),
    "check(tensor, seen, min_count=1.5)": (ValueError, "min_count=1.5", "give an int, at least 1"),
    "check(tensor, seen, min_count='a')": (ValueError, "min_count='a'", "give an int, at least 1"),
    "conv(tensor, q, qp, windows, stride=1.5)": (ValueError, "stride=1.5", "give an int from 1"),
    "conv(tensor, q, qp, windows, padding=None)": (ValueError, "padding=None", "give an int from 0"),
    "conv(tensor, q, qp, windows, groups='2')": (ValueError, "groups='2' and 4 output channels", "use a divisor of 4"),
    "conv(tensor, q, qp, windows, groups=1.0)": (ValueError, "groups=1.0 and 4 output channels", "use a divisor of 4"),
    "conv(tensor, q, qp, windows, residual=torch.ones(4, 4))": (
        ValueError,
        "residual has shape (4, 4), and the result (4, 6)",
        "expand it",
    ),
    "conv(tensor, q, qp, windows, residual=torch.ones(4, 6).half())": (
        TypeError,
        "residual is torch.float16, and the result torch.float32",
        "cast it, or ask for dtype=torch.float16",
    ),
    "conv(tensor, q, qp, windows, x=x[:2])": (
        ValueError,
        "x has shape (2, 8), and its codes (4, 8)",
        "give what they are the codes of",
    ),
    "conv(tensor, q, qp, windows, relu='no')": (TypeError, "relu='no'", "use True or False"),
    "conv(tensor, q, qp, windows, x=[1])": (TypeError, "a product (x) got a list", "give a tensor"),
    "conv(tensor, q, qp, windows, x[:1, 0])": (
        ValueError,
        "bias has shape (1,), and the weight 4 outputs",
        "one entry",
    ),
    "linear(tensor, q, qp, folded, dtype=torch.int32)": (TypeError, "linear to torch.int32", REALS),
}


def test_any_pair_of_tensors_is_qparams() -> None:
    """As torchao gives them; whether a backend multiplies or not."""
    tensor, channel = (fsq.QuantSpec(torch.int8, g) for g in (fsq.PerTensor(), fsq.PerAxis(0)))
    of_x = torch.tensor([0.5]), torch.tensor([0], dtype=torch.int32)
    of_w = torch.full((128, 1), 0.25), torch.zeros(128, 1, dtype=torch.int32)
    q, w = (torch.randint(-128, 128, (size, 64), dtype=torch.int8) for size in (100, 128))
    named = fsq.QParams(*of_x), fsq.QParams(*of_w)
    folded = fsq.fold(channel, w, of_w)
    assert all(a is None or torch.equal(a, b) for a, b in zip(folded, fsq.fold(channel, w, named[1]), strict=True))
    windows = fsq.fold(channel, w.reshape(128, 4, 16), tuple(t.reshape(128, 1, 1) for t in of_w))
    for weight, call, codes in ((folded, fsq.linear, q), (windows, fsq.conv, q[None, :4])):
        known = fsq.epilogue(tensor, of_x, weight)
        for epilogue in (None, known):
            given, right = (
                call(tensor, codes, qp, weight, epilogue=epilogue, then=fsq.Requantization(tensor, qp, "relu"))
                for qp in (of_x, named[0])
            )
            assert torch.equal(given, right)


def test_codes_of_several_scales_are_made_by_no_backend() -> None:
    """One scale for each token, of which there is one in the statistics: refused whoever multiplies."""
    tensor, token = (fsq.QuantSpec(torch.int8, g) for g in (fsq.PerTensor(), fsq.PerToken()))
    qp = fsq.QParams(torch.tensor([[0.5]]), torch.tensor([[0]], dtype=torch.int32))
    weight = fsq.fold(tensor, torch.ones(1024, 4096, dtype=torch.int8), qp)
    for epilogue in (None, fsq.epilogue(tensor, qp, weight)):
        q, then = torch.ones(128, 4096, dtype=torch.int8), fsq.Requantization(token, qp)
        with pytest.raises(ValueError, match=r"the scale has shape \(1, 1\)"):
            fsq.linear(tensor, q, qp, weight, epilogue=epilogue, then=then)


@pytest.mark.parametrize("call", INVALID)
def test_refuses(call: str) -> None:
    error, *fragments = INVALID[call]
    names = arguments()
    given = frozen(names)
    with pytest.raises(error, match=re.escape(fragments[0])) as e:
        eval(call, {"torch": torch, **vars(fsq), **names})
    assert type(e.value) is error  # not a subclass of it
    for fragment in fragments[1:]:
        assert fragment in str(e.value)
    assert [line for line in str(e.value).splitlines() if len(line) > 400] == []
    assert frozen(names) == given


def test_frozen_sees_a_change() -> None:
    names = arguments()
    before = frozen(names)
    names["seen"]["count"].add_(1)
    assert frozen(names) != before
    assert frozen(arguments()) == before


def test_a_valid_call_is_not_refused() -> None:
    names = arguments()
    for call in ("observe(tensor, seen, x)", "quantize(channel, x, qp_channel)", "dequantize(tensor, q, qp)"):
        eval(call, {**vars(fsq), **names})
    assert frozen(names) == frozen(arguments())


@pytest.mark.parametrize(
    "observer",
    [
        fsq.MinMax(),
        fsq.MovingAverage(),
        fsq.MeanRange(),
        fsq.Histogram(),
        fsq.Percentile(),
        fsq.Mse(),
        fsq.Entropy(),
        fsq.SkipNonfinite(fsq.MinMax()),
    ],
    ids=repr,
)
def test_a_constant_zero_is_refused_and_a_dead_channel_among_others_is_not(observer: fsq.Observer) -> None:
    spec = fsq.QuantSpec(torch.int8, fsq.PerAxis(-1), observer=observer)
    x = torch.zeros(4, 3)
    state = fsq.observe(spec, fsq.init(spec, x.shape), x)
    with pytest.raises(fsq.CalibrationError, match=r"only zeros were seen.*calibrate with data"):
        fsq.check(spec, state)
    x[2, 1] = -1e-30
    fsq.check(spec, fsq.observe(spec, state, x))


def test_a_fixed_range_needs_no_data() -> None:
    spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=fsq.Fixed(0.0, 0.0))
    fsq.check(spec, fsq.init(spec, (3,)))
