"""What torch before 2.13 lacks; this file goes when the package asks for 2.13."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_exporting"]


def is_exporting() -> bool:
    """Whether a program is made for `torch.export`, which has operators of torch alone.

    `torch.compiler.is_exporting()`, but for Dynamo of torch 2.11, which takes it for true wherever it traces.
    """
    return torch.compiler._is_exporting_flag


def _view(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.view(dtype)` of a batch of vmap, between dtypes of one size, where every axis stays what it is."""
    if x.dtype.itemsize != dtype.itemsize:
        raise NotImplementedError(
            f"vmap of view from {x.dtype} to {dtype}; views between dtypes of one size have a rule"
        )
    functorch = torch._C._functorch
    inner = functorch.get_unwrapped(x).view(dtype)
    return functorch._add_batch_dim(inner, functorch.maybe_get_bdim(x), functorch.maybe_get_level(x))


if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::view.dtype", "FuncTorchBatched"):
    torch.library.impl("aten::view.dtype", "FuncTorchBatched", _view)
