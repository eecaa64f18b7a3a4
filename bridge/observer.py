"""An observer as a module: the state in buffers, recorded by what flows through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import functional_sq as fsq
from bridge.buffers import Buffers, write
from functional_sq.spec import check_spec

__all__ = ["ObserverModule", "fit_mask", "qparams_of", "weight_qparams"]


class ObserverModule(Buffers):
    """A `functional_sq` state as buffers; forward records its input and returns it.

    Args:
        spec: what is recorded and how it is read.
        shape: shape of the tensors to come; only the sizes that the granularity keeps matter. Left
            out, a per-tensor observer needs none and any other takes that of the first tensor.
        device: device of the buffers.

    Attributes:
        spec: as given.
        mask: bool tensor of the leading axes of the tensors to come, True where they count, or None.
            It also fits tensors in which these axes are one (tokens of all sequences in a row);
            others are recorded whole.
        masked: whether it fitted any tensor since `calibrate` set it.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from bridge import ObserverModule
        >>> observer = ObserverModule(fsq.QuantSpec(torch.int8, fsq.PerTensor()))
        >>> _ = observer(torch.tensor([-1.0, 1.27]))
        >>> observer.calculate_qparams()
        QParams(scale=tensor([0.0100]), zero_point=tensor([0], dtype=torch.int32))
    """

    def __init__(
        self,
        spec: fsq.QuantSpec,
        shape: tuple[int, ...] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_spec(spec)
        self.spec = spec
        self.mask: Tensor | None = None
        self.masked = False
        if shape is None and isinstance(spec.granularity, fsq.PerTensor):
            shape = (1,)
        if shape is not None:
            self.reset(shape, device)

    def reset(self, shape: tuple[int, ...], device: torch.device | str | None = None) -> None:
        """Forget everything; take tensors of `shape` from now on."""
        # Buffers made in inference mode could never be written outside of it.
        with torch.inference_mode(False):
            for name, value in fsq.init(self.spec, tuple(shape), device=device).items():
                self.register_buffer(name, value)

    @property
    def state(self) -> fsq.State:
        """What was recorded: the buffers as a `functional_sq` state."""
        return {name: value for name, value in self._buffers.items() if value is not None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ObserverModule:
        unwritten = any(value.is_meta for value in self.state.values())
        super()._apply(fn, recurse)
        if unwritten:  # to_empty gives memory that holds anything
            self.forget()
        return self

    def empty_state(self, device: torch.device | None = None) -> fsq.State:
        """Return the state of an observer like this one that has seen nothing."""
        count = self.state["count"]
        return self.spec.observer.init(tuple(count.shape), torch.float32, device or count.device)

    def forget(self, device: torch.device | None = None) -> None:
        """Forget everything, and take memory on `device`; default: where the record is."""
        with torch.inference_mode(False):  # as `reset`
            for name, value in self.empty_state(device).items():
                self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        if not self._buffers:
            self.reset(tuple(x.shape), x.device)
        elif self.state["count"].is_meta and not x.is_meta:  # parameters were assigned to a model without memory
            self.forget(x.device)
        mask = None if self.mask is None else fit_mask(self.mask, x.shape[:-1])
        if mask is not None:
            self.masked = True
        write(self, fsq.observe(self.spec, self.state, x, mask=mask))
        return x

    def fault(self, min_count: int = 1) -> str | None:
        """Say what makes the record unfit to choose a range from, or None."""
        if not self._buffers:
            return "nothing was seen; calibrate with data that reaches it"
        return self.spec.observer.fault(self.state, min_count)

    def calculate_qparams(self) -> fsq.QParams:
        """Return scale and zero point.

        Raises:
            CalibrationError: nothing was seen, or NaN or Inf was.
        """
        if fault := self.fault():
            raise fsq.CalibrationError(fault)
        return fsq.calc_qparams(self.spec, self.state)

    def extra_repr(self) -> str:
        return repr(self.spec)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = list(self._buffers) or list(self.spec.observer.init((1,), torch.float32, None))
        found = [name for name in names if prefix + name in state_dict]
        if not found:
            return  # A checkpoint of the float model: the calibration stays as it is.
        if not self._buffers:
            for name in found:
                self.register_buffer(name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def fit_mask(mask: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """Return the mask as it fits the first of these axes, flattened or not; None where it is of other positions.

    Of what a layer takes or gives, `shape` leaves out the features, whose number may be that of tokens.
    """
    if mask is None or mask.shape == tuple(shape[: mask.ndim]):
        return mask
    return mask.reshape(-1) if tuple(shape[:1]) == (mask.numel(),) else None


def qparams_of(observer: ObserverModule) -> fsq.QParams:
    """Return what an observer calculates, with zeros for a zero point that is None."""
    scale, zero_point = observer.calculate_qparams()
    if zero_point is None:
        zero_point = torch.zeros_like(scale, dtype=observer.spec.zero_point_dtype)
    return fsq.QParams(scale, zero_point)


def weight_qparams(spec: fsq.QuantSpec, weight: Tensor) -> fsq.QParams:
    """Return scale and zero point of a weight as it is now; `weight` is that of `weight_of`."""
    return fsq.calc_qparams(spec, fsq.observe(spec, fsq.init(spec, weight.shape, device=weight.device), weight))
