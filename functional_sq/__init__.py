"""Static quantization as pure functions over explicit state."""

from functional_sq.batch_norm import fold_batch_norm
from functional_sq.calibration import calc_qparams, check, init, merge, observe
from functional_sq.conv import conv, conv_reference
from functional_sq.conv_transpose import conv_transpose, conv_transpose_reference, polyphase, transpose_weight
from functional_sq.folded import Epilogue, FoldedWeight, check_product, epilogue, fold, unfold
from functional_sq.formats import FORMATS
from functional_sq.granularity import Granularity, PerAxis, PerBlock, PerGroup, PerRow, PerTensor, PerToken
from functional_sq.linear import linear, linear_reference
from functional_sq.observer import MAX, MIN, SUM, Accumulator, CalibrationError, Observer, Reduction, State
from functional_sq.observers.entropy import Entropy
from functional_sq.observers.fixed import Fixed
from functional_sq.observers.histogram import Histogram
from functional_sq.observers.min_max import MinMax
from functional_sq.observers.moving_average import MeanRange, MovingAverage
from functional_sq.observers.mse import Mse, SquaredError, expected_error
from functional_sq.observers.percentile import Percentile
from functional_sq.observers.skip_nonfinite import SkipNonfinite
from functional_sq.qparams import MappingType, QParams, from_range
from functional_sq.quantize import dequantize, fake_quantize, quantize, saturates
from functional_sq.requantize import ACTIVATIONS, Requantization, requantize
from functional_sq.spec import QuantSpec

__all__ = [
    "ACTIVATIONS",
    "FORMATS",
    "MAX",
    "MIN",
    "SUM",
    "Accumulator",
    "CalibrationError",
    "Entropy",
    "Epilogue",
    "Fixed",
    "FoldedWeight",
    "Granularity",
    "Histogram",
    "MappingType",
    "MeanRange",
    "MinMax",
    "MovingAverage",
    "Mse",
    "Observer",
    "PerAxis",
    "PerBlock",
    "PerGroup",
    "PerRow",
    "PerTensor",
    "PerToken",
    "Percentile",
    "QParams",
    "QuantSpec",
    "Reduction",
    "Requantization",
    "SkipNonfinite",
    "SquaredError",
    "State",
    "calc_qparams",
    "check",
    "check_product",
    "conv",
    "conv_reference",
    "conv_transpose",
    "conv_transpose_reference",
    "dequantize",
    "epilogue",
    "expected_error",
    "fake_quantize",
    "fold",
    "fold_batch_norm",
    "from_range",
    "init",
    "linear",
    "linear_reference",
    "merge",
    "observe",
    "polyphase",
    "quantize",
    "requantize",
    "saturates",
    "transpose_weight",
    "unfold",
]
