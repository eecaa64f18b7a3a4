"""Static quantization as pure functions over explicit state."""

from functional_sq.calibration import calc_qparams, check, init, merge, observe
from functional_sq.formats import FORMATS
from functional_sq.granularity import Granularity, PerAxis, PerBlock, PerGroup, PerRow, PerTensor, PerToken
from functional_sq.linear import Epilogue, FoldedWeight, check_product, epilogue, fold, linear, linear_reference, unfold
from functional_sq.observer import MAX, MIN, SUM, Accumulator, CalibrationError, Observer, Reduction, State
from functional_sq.observers.fixed import Fixed
from functional_sq.observers.min_max import MinMax
from functional_sq.qparams import MappingType, QParams, from_range
from functional_sq.quantize import dequantize, fake_quantize, quantize
from functional_sq.spec import QuantSpec

__all__ = [
    "FORMATS",
    "MAX",
    "MIN",
    "SUM",
    "Accumulator",
    "CalibrationError",
    "Epilogue",
    "Fixed",
    "FoldedWeight",
    "Granularity",
    "MappingType",
    "MinMax",
    "Observer",
    "PerAxis",
    "PerBlock",
    "PerGroup",
    "PerRow",
    "PerTensor",
    "PerToken",
    "QParams",
    "QuantSpec",
    "Reduction",
    "State",
    "calc_qparams",
    "check",
    "check_product",
    "dequantize",
    "epilogue",
    "fake_quantize",
    "fold",
    "from_range",
    "init",
    "linear",
    "linear_reference",
    "merge",
    "observe",
    "quantize",
    "unfold",
]
