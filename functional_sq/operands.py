"""What a backend multiplies, or convolves with, in one tuple."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Operands"]


class Operands(NamedTuple):
    """Codes and what turns their sums into real values: `sum (q - z_q) (codes - z_w) * scale + bias`.

    Attributes:
        q: codes of the activations, of the dtype that the backend's `CODES` names: `(M, K)`; of a convolution
            `(B, C, H, W)`, or `(B, C, D, H, W)`, the channels last in memory.
        zero_point: int32, one element: of `q`, and for a convolution a code; None where it is known to be 0.
        codes: int8, the weight's: `(N, K)`; of a convolution `(N, C / groups, *kernel)`, whose one dimension is W.
        weight_zero_point: `(N,)` int32; None where it is 0.
        scale: `(N,)` float32.
        offset: `(N,)` int32, above K = 33025 int64, for backends of int8 codes: `zero_point` times the sum of
            `codes - weight_zero_point`. Not to be read by those of uint8. None for float8.
        bias: `(N,)` of any real dtype, or None.
        x: what `q` are the codes of, for a backend that would rather read these; or None. Real values, shape of `q`,
            without a gradient.
        x_scale: float32, one element: `q` is `x` in its steps, plus `zero_point`, rounded and limited to 8 bits.

    Example:
        >>> import torch
        >>> from functional_sq.operands import Operands
        >>> q, w = torch.tensor([[10, 1]], dtype=torch.int8), torch.tensor([[1, 2], [3, 4]], dtype=torch.int8)
        >>> one = torch.tensor([1], dtype=torch.int32)
        >>> Operands(q, one, w, None, torch.ones(2), w.sum(1, dtype=torch.int32), None).offset
        tensor([3, 7], dtype=torch.int32)
    """

    q: Tensor
    zero_point: Tensor | None
    codes: Tensor
    weight_zero_point: Tensor | None
    scale: Tensor
    offset: Tensor | None
    bias: Tensor | None
    x: Tensor | None = None
    x_scale: Tensor | None = None
