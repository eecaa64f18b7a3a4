"""A batch norm in evaluation, taken into the layer before it."""

from __future__ import annotations

from torch import Tensor

from functional_sq.formats import check_real

__all__ = ["fold_batch_norm"]


def fold_batch_norm(
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return the weight and bias of a layer that computes what it and a batch norm after it compute.

    In evaluation a batch norm is affine: `(y - mean) / sqrt(var + eps) * gamma + beta`, one number
    for each output channel, so the layer can do it. Fold before calibration: the folded weight is the
    one that is quantized.

    Args:
        weight: `(N, ...)`, of a linear layer or a convolution (its output channels first; of a transposed one
            as `transpose_weight` lays it out).
        bias: `(N,)` or None.
        running_mean: `(N,)`, of the batch norm, as the three below.
        running_var: `(N,)`.
        gamma: `(N,)` or None, its weight.
        beta: `(N,)` or None, its bias.
        eps: added to the variance.

    Returns:
        weight and bias in the dtype of `weight`, computed in float64 and rounded once.

    Raises:
        TypeError: the weight or a statistic has no real values, or `eps` is no number.
        ValueError: a statistic does not have one entry for each output channel.

    Source: Jacob et al. 2018 (arXiv:1712.05877), equation 14.

    Example:
        >>> import torch, functional_sq as fsq
        >>> mean, var = torch.tensor([1.0]), torch.tensor([3.0])
        >>> fsq.fold_batch_norm(torch.tensor([[4.0]]), None, mean, var, None, torch.tensor([0.5]), 1.0)
        (tensor([[2.]]), tensor([0.]))
    """
    check_real(weight, "fold_batch_norm (weight)")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps={eps!r} is not a number; give that of the batch norm")
    if weight.ndim == 0:
        raise ValueError("a weight of shape () has no output channels; give that of a linear layer or a convolution")
    statistics = {"running_mean": running_mean, "running_var": running_var}
    given = {name: t for name, t in (("bias", bias), ("gamma", gamma), ("beta", beta)) if t is not None}
    n = weight.shape[0]
    for name, value in (statistics | given).items():
        check_real(value, f"fold_batch_norm ({name})")
        if value.shape != (n,):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, and a weight of shape {tuple(weight.shape)} has {n} output "
                f"channels; give one entry for each"
            )
    factor = (running_var.double() + eps).rsqrt()
    if gamma is not None:
        factor = factor * gamma.double()
    shift = (0.0 if bias is None else bias.double()) - running_mean.double()
    folded = shift * factor + (0.0 if beta is None else beta.double())
    scaled = weight.double() * factor.reshape(-1, *(1,) * (weight.ndim - 1))
    return scaled.to(weight.dtype), folded.to(weight.dtype)
