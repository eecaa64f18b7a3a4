"""A state dict held as module buffers, which `write` copies a new state into."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["Buffers", "write"]


class Buffers(nn.Module):
    """A module whose buffers move between devices but keep their dtype.

    `model.bfloat16()` and `model.to(torch.float16)` convert every floating-point buffer. Scales and
    statistics lose what they are for when rounded to eight bits, and float8 codes would stop being
    codes.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Buffers:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                # From the old values, so that nothing was rounded on the way.
                moved = old.to(device=new.device)
                if moved.stride() != new.stride():  # a memory format was asked for too
                    moved = torch.empty_like(new, dtype=old.dtype).copy_(moved)
                self._buffers[name] = moved
        return self


def write(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a state into the buffers of the same names.

    Args:
        module: has a buffer for each name in `state`, of the same shape and dtype.
        state: new values.

    Example:
        >>> import torch
        >>> from bridge.buffers import Buffers, write
        >>> module = Buffers()
        >>> module.register_buffer("count", torch.zeros(1))
        >>> write(module, {"count": torch.ones(1)}); module.count
        tensor([1.])
    """
    with torch.no_grad():
        for name, value in state.items():
            module.get_buffer(name).copy_(value)
