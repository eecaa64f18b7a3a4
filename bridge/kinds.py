"""What kinds of layers can be quantized, and why others cannot."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import Tensor, nn

from bridge.aqt import AffineQuantizedTensor
from bridge.linear_activation_quantized import LinearActivationQuantizedTensor
from bridge.observed import OBSERVED, Observed, holds_tensors

__all__ = ["float_reason", "is_replaceable", "observed_type"]


def observed_type(module: nn.Module) -> type[Observed] | None:
    """Return the observed type that computes what `module` computes; None where there is none.

    A subclass counts while it computes what its torch type does: with a forward, or parameters, of its
    own it is something else. A layer whose weight is quantized already is left as it is.

    Example:
        >>> import torch
        >>> from bridge.kinds import observed_type
        >>> observed_type(torch.nn.Conv2d(3, 8, 3)).__name__, observed_type(torch.nn.ReLU())
        ('ObservedConv2d', None)
    """
    # MultiheadAttention's output projection is a Linear that is never called: its parameters are used.
    # A lazy layer has no weight yet.
    if isinstance(module, (nn.modules.linear.NonDynamicallyQuantizableLinear, nn.modules.lazy.LazyModuleMixin)):
        return None
    for kind, observed in OBSERVED.items():
        if _runs_as(module, kind):
            taken = _own_parts(module) or _missing(module) or holds_tensors(module._parameters.get("weight"))
            return None if taken else observed
    return None


def is_replaceable(module: nn.Module) -> bool:
    """Say whether `make_quantizable_` replaces `module`: it computes what a type that it knows computes, and no more.

    Example:
        >>> import torch
        >>> from bridge.kinds import is_replaceable
        >>> is_replaceable(torch.nn.MultiheadAttention(8, 2)), is_replaceable(torch.nn.LSTM(8, 8))
        (True, False)
    """
    # A model that has a Conv1D has loaded transformers.
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    for kind, parts in ((nn.MultiheadAttention, _ATTENTION_PARTS), (conv1d, _PARTS)):
        if kind is not None and _runs_as(module, kind):
            return not _own_parts(module, parts)
    return False


def _runs_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is of a type, or of a subclass of it that has its forward."""
    own = [name for name in ("forward", "__call__", "_conv_forward", "_output_padding") if hasattr(kind, name)]
    return isinstance(module, kind) and all(getattr(type(module), name) is getattr(kind, name) for name in own)


_PARTS = ("weight", "bias")
_ATTENTION_PARTS = (
    *("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    *("in_proj_bias", "bias_k", "bias_v", "out_proj"),
)


def _own_parts(module: nn.Module, known: Sequence[str] = _PARTS) -> list[str]:
    """Return the parameters, buffers and modules that a subclass has beside its type's; a parent may use them."""
    if type(module) in OBSERVED or nn.utils.parametrize.is_parametrized(module):
        return []
    return [
        name for part in (module._parameters, module._buffers, module._modules) for name in part if name not in known
    ]


def _missing(module: nn.Module) -> list[str]:
    """Return the parameters of its type that a layer has not, or has as something else."""
    if nn.utils.parametrize.is_parametrized(module):
        return []
    held = module._parameters
    return [name for name in _PARTS if name not in held or (name == "weight" and held[name] is None)]


def _removal(module: nn.Module) -> str:
    """Return what of `torch.nn.utils` makes the weight a parameter again where a hook of it computes it, or ""."""
    hooked = {type(hook).__module__.removeprefix("torch.nn.utils.") for hook in module._forward_pre_hooks.values()}
    known = {"weight_norm": "remove_weight_norm", "spectral_norm": "remove_spectral_norm", "prune": "prune.remove"}
    return next((remove for name, remove in known.items() if name in hooked), "")


def float_reason(module: nn.Module) -> str | None:
    """Say why `module`, a kind of layer that one may expect to be quantized, is not; None: it is, or is no such."""
    kind = type(module).__name__
    remedy = "call bridge.make_quantizable_(model) first" if is_replaceable(module) else None
    if isinstance(module, nn.MultiheadAttention):
        return (
            f"{kind} multiplies its projections itself, calling no layer; "
            f"to have them quantized, {remedy or 'use an attention that calls torch.nn.Linear'}"
        )
    if isinstance(module, Observed):
        return None
    if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        own = [name for name, value in module.named_parameters(recurse=False) if _is_matrix(name, value)]
        if not own or isinstance(module, _LOOKS_UP_OR_SCALES):
            return None
        return (
            f"{kind} has {own[0]} of its own and calls no layer with it; "
            f"to have it quantized, {remedy or 'let a torch.nn.Linear multiply it'}"
        )
    if observed_type(module) is not None or isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    weight = module._parameters.get("weight")
    if isinstance(weight, (AffineQuantizedTensor, LinearActivationQuantizedTensor)):
        return None
    if holds_tensors(weight):
        return f"its weight is a {type(weight).__name__} already"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return f"{kind} has no weight yet; run the float model once before"
    if isinstance(module, tuple(OBSERVED)):
        if own := _own_parts(module):
            return f"{kind} has {own[0]} of its own, which a quantized layer would not have"
        if remove := _removal(module):
            return f"its weight is computed by a hook; call torch.nn.utils.{remove} first to have the layer quantized"
        if missing := _missing(module):
            return f"its {missing[0]} is no parameter; register it as torch.nn.Parameter to have the layer quantized"
        return f"{kind} has a forward of its own, which a quantized layer would not run"
    return f"no quantized layer does what {kind} does"


_LOOKS_UP_OR_SCALES = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.utils.parametrize.ParametrizationList,
)
"""What has parameters of two axes and multiplies no matrix."""


def _is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is probably multiplied as a matrix, or is one of several matrices.

    One whose first size is 1 is probably added: positions of a grid, for each image of a batch.
    """
    if isinstance(parameter, nn.parameter.UninitializedTensorMixin):  # type: ignore[attr-defined]
        return False
    long = sum(size > 1 for size in parameter.shape)
    return (long > 2 and parameter.shape[0] > 1) or (long > 1 and name.startswith("weight"))
