"""Float layers that record what flows into them: an observer for the input, one for the weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import functional_sq as fsq
from bridge.observer import ObserverModule
from functional_sq.spec import check_spec

if TYPE_CHECKING:
    from bridge.config import StaticQuantConfig

__all__ = [
    "LAYERS",
    "OBSERVED",
    "Observed",
    "ObservedConv1d",
    "ObservedConv2d",
    "ObservedConv3d",
    "ObservedConvTranspose1d",
    "ObservedConvTranspose2d",
    "ObservedConvTranspose3d",
    "ObservedLinear",
    "check_plain",
    "check_static",
    "holds_tensors",
    "settings_of",
    "weight_of",
]


class Observed(nn.Module):
    """A float layer that records its input; its weight is observed when it is converted.

    Base of a class that also derives from the float layer's type, and comes before it: the layer's
    own forward then runs on what was recorded, and parameters keep their names.

    Attributes:
        act_obs: records the input. Scales whose shape depends on the batch are refused: a static scale
            must fit any.
        weight_obs: names how the weight will be quantized.
        config: the StaticQuantConfig that it was prepared with, or None.
        float_type: the type of the float layer.
        settings: the names of what its constructor takes, other than bias, device and dtype.
    """

    act_obs: ObserverModule
    weight_obs: ObserverModule
    weight: Tensor
    config: StaticQuantConfig | None
    float_type: ClassVar[type[nn.Module]]
    settings: ClassVar[tuple[str, ...]]

    def attach(self, act_obs: ObserverModule, weight_obs: ObserverModule) -> None:
        """Take two observers; called once, by the constructor of a derived class.

        Raises:
            TypeError: an observer is not an ObserverModule.
            ValueError: both are one object, or a granularity does not apply.
        """
        _check_observers(act_obs, weight_obs)
        shape = tuple(weight_of(self).shape)
        check_static(act_obs.spec, shape)
        weight_obs.spec.granularity.stat_shape(shape)
        if not act_obs.state:
            act_obs.reset(shape[1:2], self.weight.device)
        self.act_obs = act_obs
        self.weight_obs = weight_obs
        self.config = None
        # In a tuple, so that it is no submodule: its parameters are this layer's already.
        self._float: tuple[nn.Module, ...] = ()

    @classmethod
    def from_float(cls, module: nn.Module, act_obs: ObserverModule, weight_obs: ObserverModule) -> Observed:
        """Return an observed layer that shares the parameters of `module`.

        Raises:
            TypeError: an observer is not an ObserverModule, or `module` is not of `float_type`.
            ValueError: both observers are one object, a granularity does not apply, the weight is quantized already,
                or the layer has hooks or a parametrization, which would be lost.
        """
        _check_observers(act_obs, weight_obs)
        if not isinstance(module, cls.float_type):
            raise TypeError(
                f"{cls.__name__}.from_float got a {type(module).__name__}; give a torch.nn.{cls.float_type.__name__}"
            )
        check_plain(module)
        weight, shape = cast(Tensor, module.weight), tuple(weight_of(module).shape)
        check_static(act_obs.spec, shape)
        if act_obs.state and not any(value.is_meta for value in act_obs.state.values()):
            act_obs.to(weight.device)
        else:
            act_obs.reset(shape[1:2], weight.device)
        observed = cls(
            **settings_of(module, cls.settings),
            act_obs=act_obs,
            weight_obs=weight_obs,
            bias=False,
            # The parameters below replace these, so these take no memory.
            device="meta",
            dtype=weight.dtype,
        )
        observed.weight, observed.bias = weight, cast(Tensor, module.bias)  # it may be None
        observed._float = (module,)
        observed.observe_weight()
        return observed.train(module.training)

    def to_float(self) -> nn.Module:
        """Return the float layer with this layer's parameters: the very module that `from_float` took.

        A layer that was constructed gives a new one.

        Example:
            >>> import torch, functional_sq as fsq
            >>> from bridge import ObservedLinear, ObserverModule
            >>> spec, linear = fsq.QuantSpec(torch.int8, fsq.PerTensor()), torch.nn.Linear(4, 2)
            >>> layer = ObservedLinear.from_float(linear, ObserverModule(spec), ObserverModule(spec))
            >>> layer.to_float() is linear
            True
        """
        check_plain(self)
        if self._float:
            module = self._float[0]
        else:
            module = self.float_type(**settings_of(self, self.settings), bias=False, device="meta")
        module.weight, module.bias = self.weight, self.bias
        return module.train(self.training)

    # `input` is the float layer's name for it, which it may be given by; the rest is what that one takes beside it.
    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.act_obs(input if self.act_obs.mask is None else self.positions(input))
        return super().forward(input, *args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        # A model that was prepared without memory gets its parameters here; what its observers saw comes after.
        if not self.weight.is_meta and any(value.is_meta for value in self.act_obs.state.values()):
            self.act_obs.forget(self.weight.device)
            self.observe_weight()

    def positions(self, x: Tensor) -> Tensor:
        """Return an input or output of the layer with the axes that a mask is for in front."""
        return x

    @property
    def rows(self) -> int:
        """How many vectors along the input's features were seen: tokens, pixels."""
        return int(self.act_obs.state["count"].sum()) // int(getattr(self, self.settings[0]))

    def observe_weight(self) -> None:
        """Record the weight as it is now, and nothing that it was before."""
        weight = weight_of(self)
        self.weight_obs.reset(tuple(weight.shape), weight.device)
        self.weight_obs(weight)


class ObservedLinear(Observed, nn.Linear):
    """A float linear layer that records its input; its weight is observed when it is converted.

    Args:
        in_features: K.
        out_features: N.
        act_obs: records the input. One scale for each token is refused: a static scale must fit any
            batch.
        weight_obs: names how the weight will be quantized.
        bias: whether there is a bias.
        device: as `torch.nn.Linear`.
        dtype: as `torch.nn.Linear`.

    Raises:
        TypeError: an observer is not an ObserverModule.
        ValueError: a granularity does not apply.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from bridge import ObservedLinear, ObserverModule
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> layer = ObservedLinear.from_float(torch.nn.Linear(4, 2), ObserverModule(spec), ObserverModule(spec))
        >>> _ = layer(torch.ones(3, 4)); layer.act_obs.state["max"]
        tensor([1.])
    """

    float_type = nn.Linear
    settings = ("in_features", "out_features")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        act_obs: ObserverModule,
        weight_obs: ObserverModule,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.attach(act_obs, weight_obs)


CONV_SETTINGS: tuple[str, ...] = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)
"""What the constructor of a convolution takes, other than bias, device and dtype."""


class _ObservedConv(Observed):
    """What the convolutions share."""

    settings = CONV_SETTINGS

    def __init__(self, *settings: Any, act_obs: ObserverModule, weight_obs: ObserverModule, **kwargs: Any) -> None:
        super().__init__(*settings, **kwargs)
        self.attach(act_obs, weight_obs)

    def positions(self, x: Tensor) -> Tensor:
        # A mask (batch, tokens) fits the leading axes once the channels are last.
        return x.movedim(1 - self.weight.ndim, -1)


class ObservedConv1d(_ObservedConv, nn.Conv1d):
    """As ObservedConv2d, over one dimension.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from bridge import ObservedConv1d, ObserverModule
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> layer = ObservedConv1d.from_float(torch.nn.Conv1d(4, 2, 3), ObserverModule(spec), ObserverModule(spec))
        >>> _ = layer(torch.ones(1, 4, 9)); layer.act_obs.state["max"]
        tensor([1.])
    """

    float_type = nn.Conv1d


class ObservedConv2d(_ObservedConv, nn.Conv2d):
    """A float convolution over two dimensions that records its input.

    Args:
        settings: what `torch.nn.Conv2d` takes.
        act_obs: records the input; one scale for the tensor.
        weight_obs: names how the weight will be quantized.
        kwargs: what `torch.nn.Conv2d` takes by name.

    Raises:
        TypeError: an observer is not an ObserverModule.
        ValueError: a granularity does not apply.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from bridge import ObservedConv2d, ObserverModule
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> layer = ObservedConv2d.from_float(torch.nn.Conv2d(4, 2, 3), ObserverModule(spec), ObserverModule(spec))
        >>> _ = layer(torch.ones(1, 4, 9, 9)); layer.act_obs.state["max"]
        tensor([1.])
    """

    float_type = nn.Conv2d


class ObservedConv3d(_ObservedConv, nn.Conv3d):
    """As ObservedConv2d, over three dimensions.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from bridge import ObservedConv3d, ObserverModule
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> layer = ObservedConv3d.from_float(torch.nn.Conv3d(4, 2, 3), ObserverModule(spec), ObserverModule(spec))
        >>> _ = layer(torch.ones(1, 4, 5, 5, 5)); layer.act_obs.state["max"]
        tensor([1.])
    """

    float_type = nn.Conv3d


class _ObservedConvTranspose(_ObservedConv):
    """What the transposed ones share: the weight is torch's, and is observed in the layout of `weight_of`."""

    settings = (*CONV_SETTINGS, "output_padding")


class ObservedConvTranspose1d(_ObservedConvTranspose, nn.ConvTranspose1d):
    """As ObservedConv1d, of a `torch.nn.ConvTranspose1d`.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from bridge import ObservedConvTranspose1d, ObserverModule
        >>> observers = (ObserverModule(fsq.QuantSpec(torch.int8, fsq.PerTensor())) for _ in range(2))
        >>> layer = ObservedConvTranspose1d.from_float(torch.nn.ConvTranspose1d(4, 2, 3), *observers)
        >>> _ = layer(torch.ones(1, 4, 9)); layer.act_obs.state["max"]
        tensor([1.])
    """

    float_type = nn.ConvTranspose1d


class ObservedConvTranspose2d(_ObservedConvTranspose, nn.ConvTranspose2d):
    """As ObservedConv2d, of a `torch.nn.ConvTranspose2d`; PerAxis(0) of its weight is a scale for each output channel.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from bridge import ObservedConvTranspose2d, ObserverModule
        >>> observers = (ObserverModule(fsq.QuantSpec(torch.int8, each)) for each in (fsq.PerTensor(), fsq.PerAxis(0)))
        >>> layer = ObservedConvTranspose2d.from_float(torch.nn.ConvTranspose2d(4, 2, 3), *observers)
        >>> layer.weight.shape, layer.weight_obs.state["max"].shape
        (torch.Size([4, 2, 3, 3]), torch.Size([2, 1, 1, 1]))
    """

    float_type = nn.ConvTranspose2d


class ObservedConvTranspose3d(_ObservedConvTranspose, nn.ConvTranspose3d):
    """As ObservedConv3d, of a `torch.nn.ConvTranspose3d`.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from bridge import ObservedConvTranspose3d, ObserverModule
        >>> observers = (ObserverModule(fsq.QuantSpec(torch.int8, fsq.PerTensor())) for _ in range(2))
        >>> layer = ObservedConvTranspose3d.from_float(torch.nn.ConvTranspose3d(4, 2, 3), *observers)
        >>> layer(torch.ones(1, 4, 5, 5, 5)).shape
        torch.Size([1, 2, 7, 7, 7])
    """

    float_type = nn.ConvTranspose3d


OBSERVED: dict[type[nn.Module], type[Observed]] = {
    observed.float_type: observed
    for observed in (
        ObservedLinear,
        ObservedConv1d,
        ObservedConv2d,
        ObservedConv3d,
        ObservedConvTranspose1d,
        ObservedConvTranspose2d,
        ObservedConvTranspose3d,
    )
}
"""Which observed type takes the place of a float one."""

LAYERS = ", ".join(f"torch.nn.{kind.__name__}" for kind in OBSERVED)
"""The float types, for messages."""


def weight_of(layer: Any) -> Tensor:
    """Return the weight of a float or observed layer as it is quantized: its output channels first.

    Example:
        >>> import torch
        >>> from bridge.observed import weight_of
        >>> weight_of(torch.nn.ConvTranspose1d(6, 8, 3, groups=2)).shape
        torch.Size([8, 3, 3])
    """
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    return fsq.transpose_weight(layer.weight, layer.groups) if transposed else layer.weight


def settings_of(made: object, names: Sequence[str]) -> dict[str, Any]:
    """Return what the constructor of a module or a config took, by name."""
    return {name: getattr(made, name) for name in names}


def _check_observers(act_obs: object, weight_obs: object) -> None:
    for name, observer in (("act_obs", act_obs), ("weight_obs", weight_obs)):
        if not isinstance(observer, ObserverModule):
            raise TypeError(
                f"{name} is a {type(observer).__name__}; give an ObserverModule, "
                f"such as bridge.AffineQuantizedMinMaxObserver"
            )
    if act_obs is weight_obs:
        raise ValueError(
            "act_obs and weight_obs are one object, which would mix both ranges; give a copy.deepcopy of it for one"
        )


def holds_tensors(weight: Tensor | None) -> bool:
    """Whether a weight has other tensors inside, as quantized ones do; a DTensor is float, and has its own refusal."""
    return is_traceable_wrapper_subclass(weight) and not hasattr(weight, "placements")


def _hooks_of(name: str, found: Any) -> list[object]:
    """Return the hooks that an attribute of a module holds."""
    if not name.startswith("_") or not name.endswith("_hooks"):
        return []
    hooks = [*found.values()] if isinstance(found, Mapping) else [found] if found else []
    if name == "_load_state_dict_pre_hooks":
        # Where a norm of the weight was removed, torch leaves what changes its parameters in a state that is loaded.
        left = "torch.nn.utils.parametrizations", "torch.nn.utils.spectral_norm"
        return [hook for hook in hooks if getattr(hook, "__module__", "") not in left]
    return hooks


def check_plain(module: nn.Module) -> None:
    """Raise ValueError if a layer that takes the place of `module` would do less than it.

    Asked before observers are put in, and again before they are taken out.
    """
    if nn.utils.parametrize.is_parametrized(module):
        raise ValueError(
            "the weight is computed by a parametrization, which would be lost; "
            "call torch.nn.utils.parametrize.remove_parametrizations first, or leave the layer out by a rule"
        )
    own = MethodType(type(module).forward, module)
    # Where accelerate took its hooks away, it has left the class's own.
    if vars(module).get("forward", own) != own:
        raise ValueError(
            "the layer has a forward of its own, which would be lost; take it away first, or leave the layer out by a "
            "rule"
        )
    if any(_hooks_of(name, found) for name, found in vars(module).items()):
        raise ValueError("the layer has hooks, which would be lost; remove them first, or leave it out by a rule")
    for weight in [module.weight] if hasattr(module, "weight") else module.parameters(recurse=False):
        if hasattr(weight, "placements"):  # a DTensor
            raise ValueError("the weight is sharded; quantize the model before it is sharded, or leave the layer out")
        if holds_tensors(weight):
            raise ValueError(
                f"the weight is a {type(weight).__name__} already; give the float layer, or leave this one as it is"
            )


def check_static(spec: fsq.QuantSpec, shape: Sequence[int]) -> None:
    """Raise ValueError unless a static scale of the input fits every batch and image size.

    Args:
        spec: the activations' quantization.
        shape: shape of the weight as it is quantized, of a linear layer or a convolution.
    """
    check_spec(spec)
    granularity = spec.granularity
    if len(shape) > 2:
        if not isinstance(granularity, fsq.PerTensor):
            raise ValueError(
                f"{granularity} gives the input of a convolution several scales, and a static scale must fit any "
                f"batch and image; use PerTensor() for activations"
            )
        return
    wide, narrow = (granularity.stat_shape((rows, shape[1])) for rows in (5, 3))
    if wide != narrow:
        raise ValueError(
            f"{granularity} gives each token a scale of its own, and a static scale must fit any batch; "
            f"use PerTensor() for activations"
        )
