"""A weight that quantizes the input of its layer: the form of a quantized layer that stays a `torch.nn.Linear`."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.codecache import BypassFxGraphCache

from bridge.aqt import AffineQuantizedTensor, to_affine_quantized_floatx_static, to_affine_quantized_intx_static
from bridge.wrapper import Wrapper

__all__ = ["LinearActivationQuantizedTensor", "static_activation", "to_linear_activation_quantized"]

aten = torch.ops.aten


class LinearActivationQuantizedTensor(Wrapper):
    """The weight of a `torch.nn.Linear` that also quantizes what the layer is given.

    `F.linear(x, weight, bias)` is `F.linear(input_quant_func(x, **quant_kwargs), original, bias)`. So a
    module stays a `torch.nn.Linear`, and only its weight is exchanged.

    Args:
        original_weight_tensor: the weight `(N, K)`, an AffineQuantizedTensor as a rule.
        input_quant_func: a function of the input, as `static_activation`. One that is defined in a
            module can be saved; a lambda cannot. A graph with another than `static_activation` is compiled anew in
            each process: a cache on disk would know it by its name, not by its code.
        quant_kwargs: its keyword arguments. The tensors among them are tensors of the weight: they
            move with it, and are saved with it; a change of dtype leaves them as they are.

    Slices, single elements, transposes and views are those of `original_weight_tensor`, each with the same function: a
    shard of such a weight is one.

    Source: the class of the same name in `torchao.quantization` 0.16, which held no tensors.

    Example: see `to_linear_activation_quantized`.
    """

    original_weight_tensor: Tensor
    input_quant_func: Callable[..., Tensor]

    remedy = "use weight.original_weight_tensor"

    @staticmethod
    def __new__(
        cls, original_weight_tensor: Tensor, input_quant_func: Callable[..., Tensor], quant_kwargs: Mapping[str, Any]
    ) -> LinearActivationQuantizedTensor:
        w = original_weight_tensor
        made: LinearActivationQuantizedTensor = Tensor._make_wrapper_subclass(
            cls, w.shape, strides=w.stride(), dtype=w.dtype, device=w.device
        )
        return made

    def __init__(
        self, original_weight_tensor: Tensor, input_quant_func: Callable[..., Tensor], quant_kwargs: Mapping[str, Any]
    ) -> None:
        self.original_weight_tensor = original_weight_tensor
        self.input_quant_func = input_quant_func
        # Tensors are attributes, for __tensor_flatten__ names attributes.
        self._static = tuple((name, value) for name, value in quant_kwargs.items() if not isinstance(value, Tensor))
        self._dynamic = tuple(name for name, value in quant_kwargs.items() if isinstance(value, Tensor))
        for name in self._dynamic:
            setattr(self, f"quant_{name}", quant_kwargs[name])

    @property
    def quant_kwargs(self) -> dict[str, Any]:
        """The keyword arguments of `input_quant_func`."""
        return dict(self._static) | {name: getattr(self, f"quant_{name}") for name in self._dynamic}

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, torch.dtype]]:
        names = ["original_weight_tensor", *(f"quant_{name}" for name in self._dynamic)]
        return names, ((self.input_quant_func, self._static, self._dynamic), self.dtype)

    @classmethod
    def __tensor_unflatten__(
        cls, tensors: Mapping[str, Tensor], context: tuple[Any, torch.dtype], size: Any, stride: Any
    ) -> LinearActivationQuantizedTensor:
        (function, static, dynamic), _ = context
        kwargs = dict(static) | {name: tensors[f"quant_{name}"] for name in dynamic}
        return cls(tensors["original_weight_tensor"], function, kwargs)

    def _stable_hash_for_caching(self) -> str:
        if self.input_quant_func is not static_activation:
            raise BypassFxGraphCache(f"{self.input_quant_func!r} is code that a cache on disk does not know")
        return super()._stable_hash_for_caching()

    def _map(self, fn: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> LinearActivationQuantizedTensor:
        kwargs = {name: fn(value) if isinstance(value, Tensor) else value for name, value in self.quant_kwargs.items()}
        original = fn(self.original_weight_tensor)
        return self._like(original if dtype is None else original.to(dtype), kwargs)

    def _like(self, original: Tensor, quant_kwargs: Mapping[str, Any]) -> LinearActivationQuantizedTensor:
        """Return a weight that quantizes its input by the same function, with other tensors inside."""
        with self._mode():
            return LinearActivationQuantizedTensor(original, self.input_quant_func, quant_kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        function = getattr(self.input_quant_func, "__qualname__", repr(self.input_quant_func))
        kwargs = ", ".join(f"{name}={value!r}" for name, value in self.quant_kwargs.items())
        return f"{type(self).__name__}({self.original_weight_tensor!r}, {function}, {{{kwargs}}})"

    @staticmethod
    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not isinstance(weight, LinearActivationQuantizedTensor):
            raise NotImplementedError(
                f"a weight that quantizes its input meets a {type(weight).__name__} as its weight; "
                f"give it as the weight, or use .original_weight_tensor"
            )
        return F.linear(weight.input_quant_func(input, **weight.quant_kwargs), weight.original_weight_tensor, bias)


def to_linear_activation_quantized(
    weight: Tensor, input_quant_func: Callable[..., Tensor], quant_kwargs: Mapping[str, Any] | None = None
) -> LinearActivationQuantizedTensor:
    """Make a weight that also quantizes what its layer is given.

    Args:
        weight: `(N, K)`, an AffineQuantizedTensor as a rule.
        input_quant_func: a function of the input, as `static_activation`. Tensors that a lambda
            takes from where it is defined become `quant_kwargs`, and so do the keyword arguments of a
            `functools.partial`.
        quant_kwargs: its keyword arguments; tensors among them move and are saved with the weight.

    Raises:
        TypeError: an argument is not of its kind.

    Source: the function of the same name in `torchao.quantization` 0.16.

    Example:
        >>> import torch
        >>> from bridge import to_affine_quantized_intx_static, to_linear_activation_quantized
        >>> from bridge.linear_activation_quantized import static_activation
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> weight = to_affine_quantized_intx_static(
        ...     torch.tensor([[1.0, 2.0]]), torch.tensor(0.1), torch.tensor(0), (1, 2), torch.int8
        ... )
        >>> activation = {"scale": torch.tensor(0.5), "zero_point": torch.tensor(0), "target_dtype": torch.int8}
        >>> weight = to_linear_activation_quantized(weight, static_activation, activation)
        >>> layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        >>> layer(torch.tensor([[3.1, 1.0]]))
        tensor([[5.]])
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight is a {type(weight).__name__}; give a tensor")
    if not callable(input_quant_func):
        raise TypeError(f"input_quant_func is a {type(input_quant_func).__name__}; give a function of the input")
    function: Any = input_quant_func
    kwargs = dict(quant_kwargs or {})
    while isinstance(function, functools.partial) and not function.args:
        function, kwargs = function.func, function.keywords | kwargs
    held = {name: value for name, value in _held_tensors(function).items() if name not in kwargs}
    if held:
        assert isinstance(function, types.FunctionType)
        function = _Rebound(function, tuple(held))
    # Copies: weights that are made with one scale are loaded apart.
    own = {name: v.detach().clone() if isinstance(v, Tensor) else v for name, v in (held | kwargs).items()}
    return LinearActivationQuantizedTensor(weight, function, own)


def static_activation(
    x: Tensor,
    *,
    scale: Tensor,
    target_dtype: torch.dtype,
    zero_point: Tensor | None = None,
    quant_min: int | None = None,
    quant_max: int | None = None,
) -> AffineQuantizedTensor:
    """Quantize an input of any shape with one scale: an `input_quant_func` that can be saved.

    Args:
        x: real values.
        scale: one value, input units per step.
        target_dtype: an integer dtype or an 8-bit float.
        zero_point: one whole number, the code of 0.0; None: 0. Integers only.
        quant_min: smallest code to use; None: the dtype's. Integers only.
        quant_max: largest code to use; None: the dtype's. Integers only.

    Raises:
        ValueError: more than one scale, or a zero point or bounds for an 8-bit float.
        TypeError: `x` holds no real values.

    Example:
        >>> import torch
        >>> from bridge.linear_activation_quantized import static_activation
        >>> static_activation(torch.tensor([1.0, 2.0]), scale=torch.tensor(0.5), target_dtype=torch.int8).int_data
        tensor([2, 4], dtype=torch.int8)
    """
    if target_dtype.is_floating_point:
        given = {"zero_point": zero_point, "quant_min": quant_min, "quant_max": quant_max}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} is given for {target_dtype}: an 8-bit float has none; leave it out")
        return to_affine_quantized_floatx_static(x, scale, x.shape, target_dtype)
    return to_affine_quantized_intx_static(x, scale, zero_point, x.shape, target_dtype, quant_min, quant_max)


def _held_tensors(function: Callable[..., Any]) -> dict[str, Tensor]:
    """Return the tensors that a Python function takes from where it was defined, by name."""
    if not isinstance(function, types.FunctionType):
        return {}
    held = {name: function.__globals__.get(name) for name in _global_names(function.__code__)}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # a cell is empty before what it is for is assigned
            held[name] = cell.cell_contents
    return {name: value for name, value in held.items() if isinstance(value, Tensor)}


def _global_names(code: types.CodeType) -> set[str]:
    """Return the globals that code reads, and what is defined in it; `co_names` has those of attributes too."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    return names.union(*(_global_names(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))


@dataclass(frozen=True)
class _Rebound:
    """A function that is given the tensors it was defined with.

    The tutorial writes `lambda x: to_affine_quantized_intx_static(x, act_scale, ...)`. There a
    compiler does not see `act_scale`, and `to(device)` does not reach it.
    """

    function: types.FunctionType
    names: tuple[str, ...]

    def __call__(self, x: Tensor, **kwargs: Any) -> Tensor:
        given = {name: kwargs.pop(name) for name in self.names}
        f = self.function
        cells = zip(f.__code__.co_freevars, f.__closure__ or (), strict=True)
        bound = tuple(types.CellType(given[name]) if name in given else cell for name, cell in cells)
        made = types.FunctionType(f.__code__, f.__globals__ | given, f.__name__, f.__defaults__, bound)
        made.__kwdefaults__ = f.__kwdefaults__
        result: Tensor = made(x, **kwargs)
        return result


def _of_original(
    func: Any, weight: LinearActivationQuantizedTensor, *args: Any, **kwargs: Any
) -> LinearActivationQuantizedTensor:
    return weight._like(func(weight.original_weight_tensor, *args, **kwargs), weight.quant_kwargs)


LinearActivationQuantizedTensor.operations = Wrapper.operations | dict.fromkeys(
    (
        aten.t.default,
        aten.transpose.int,
        aten.permute.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.index.Tensor,
        aten.view.default,
        aten._unsafe_view.default,
    ),
    _of_original,
)

# As in aqt.py.
torch.compiler.allow_in_graph(LinearActivationQuantizedTensor.linear)
torch.serialization.add_safe_globals([LinearActivationQuantizedTensor, static_activation])
