"""Static quantization of PyTorch models: modules that observe, and modules that multiply codes."""

from bridge.aqt import (
    AffineQuantizedTensor,
    Float8Layout,
    Float8MMConfig,
    PlainLayout,
    to_affine_quantized_floatx_static,
    to_affine_quantized_intx,
    to_affine_quantized_intx_static,
)
from bridge.calibration import calibrate
from bridge.config import PRESETS, StaticQuantConfig
from bridge.inductor import Chain, chains
from bridge.linear_activation_quantized import LinearActivationQuantizedTensor, to_linear_activation_quantized
from bridge.min_max_observer import AffineQuantizedMinMaxObserver
from bridge.observed import (
    ObservedConv1d,
    ObservedConv2d,
    ObservedConv3d,
    ObservedConvTranspose1d,
    ObservedConvTranspose2d,
    ObservedConvTranspose3d,
    ObservedLinear,
)
from bridge.observer import ObserverModule
from bridge.quantizable import QuantizableMultiheadAttention, make_quantizable_
from bridge.quantized import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
    QuantizedConvTranspose3d,
    QuantizedLinear,
)
from bridge.report import LayerReport, Report, report
from bridge.saving import load, save
from bridge.torchao import AOBaseConfig, compute_error, register_quantize_module_handler
from bridge.workflow import convert_, insert_observers_, prepare_, quantize_, reread_, unprepare_
from functional_sq import CalibrationError, MappingType, PerAxis, PerBlock, PerGroup, PerRow, PerTensor, PerToken

__all__ = [
    "PRESETS",
    "AOBaseConfig",
    "AffineQuantizedMinMaxObserver",
    "AffineQuantizedTensor",
    "CalibrationError",
    "Chain",
    "Float8Layout",
    "Float8MMConfig",
    "LayerReport",
    "LinearActivationQuantizedTensor",
    "MappingType",
    "ObservedConv1d",
    "ObservedConv2d",
    "ObservedConv3d",
    "ObservedConvTranspose1d",
    "ObservedConvTranspose2d",
    "ObservedConvTranspose3d",
    "ObservedLinear",
    "ObserverModule",
    "PerAxis",
    "PerBlock",
    "PerGroup",
    "PerRow",
    "PerTensor",
    "PerToken",
    "PlainLayout",
    "QuantizableMultiheadAttention",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConv3d",
    "QuantizedConvTranspose1d",
    "QuantizedConvTranspose2d",
    "QuantizedConvTranspose3d",
    "QuantizedLinear",
    "Report",
    "StaticQuantConfig",
    "calibrate",
    "chains",
    "compute_error",
    "convert_",
    "insert_observers_",
    "load",
    "make_quantizable_",
    "prepare_",
    "quantize_",
    "register_quantize_module_handler",
    "report",
    "reread_",
    "save",
    "to_affine_quantized_floatx_static",
    "to_affine_quantized_intx",
    "to_affine_quantized_intx_static",
    "to_linear_activation_quantized",
    "unprepare_",
]
