"""Modules that multiply parameters of their own, as modules that call `torch.nn.Linear`, which `prepare_` finds."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import guard_or_false

from bridge.arguments import check_function, check_module
from bridge.checks import Filter
from bridge.kinds import is_replaceable
from bridge.observed import check_plain
from bridge.swapping import public_name, swap_

__all__ = ["QuantizableMultiheadAttention", "make_quantizable_"]


# A parameter made in inference mode could not be loaded into outside of it.
@torch.inference_mode(False)
def make_quantizable_(model: nn.Module, filter_fn: Filter | None = None) -> nn.Module:
    """Let `torch.nn.Linear` layers multiply what modules of `model` multiply themselves, in place.

    Call it after the weights are loaded and before `prepare_`, which then quantizes these layers as all others. The
    model stays float and computes what it computed, up to rounding. Replaced are

    * `torch.nn.MultiheadAttention`, by a QuantizableMultiheadAttention;
    * `Conv1D` of transformers (GPT-2), by a `torch.nn.Linear` with the weight transposed.

    A subclass with a forward, or parameters, of its own stays as it is, and `prepare_` says so. Where there is nothing
    to replace, nothing is changed. A `torch.nn.TransformerEncoder` takes its fused path, which writes zeros where there
    is padding, no more.

    Args:
        model: any module; may be compiled already.
        filter_fn: `(module, name) -> bool`, asked of each such module once; False: it stays as it is. Default: all.

    Returns:
        `model`. A `state_dict` of the model as it was does not fit it any more: names of parameters are others.

    Raises:
        ValueError: such modules have hooks, a parametrization or sharded weights, which would be lost, and each is
            named; or the model is itself one. Nothing was changed.

    Example:
        >>> import torch, bridge
        >>> model = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> _ = bridge.prepare_(bridge.make_quantizable_(model), bridge.PRESETS["int8"])
        >>> [name for name, module in model.named_modules() if isinstance(module, bridge.ObservedLinear)]
        ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj', 'self_attn.out_proj', 'linear1', 'linear2']
    """
    check_module(model)
    check_function("filter_fn", filter_fn, "a module and its name to a bool")
    chosen = {
        module
        for name, module in model.named_modules()
        if is_replaceable(module) and (filter_fn is None or filter_fn(module, public_name(name)))
    }
    if chosen:
        swap_(model, lambda module, name: module in chosen, _quantizable, "one that make_quantizable_ replaces")
    return model


def _quantizable(module: Any, name: str) -> nn.Module:
    if isinstance(module, nn.MultiheadAttention):
        return QuantizableMultiheadAttention(module)
    check_plain(module)
    weight = nn.Parameter(module.weight.detach().t().contiguous(), module.weight.requires_grad)
    return _linear(weight, module.bias).train(module.training)


class _NoTensor:
    """In place of a parameter that is no more; what has a `__torch_function__`, torch hands to no fused operator."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented


class QuantizableMultiheadAttention(nn.Module):
    """Computes what a `torch.nn.MultiheadAttention` computes, up to rounding, by calling four `torch.nn.Linear`.

    It takes the same arguments and returns the same. Nested tensors, which torch's own takes on its fast path alone,
    are not supported.

    Args:
        attention: what it computes. Weights of its input projections are copied, other parameters are shared.

    Attributes:
        q_proj, k_proj, v_proj, out_proj: the layers.
        embed_dim, kdim, vdim, num_heads, head_dim, dropout, batch_first, bias_k, bias_v, add_zero_attn: those of
            `attention`.

    Raises:
        TypeError: `attention` is none, or has a forward or parameters of its own.
        ValueError: `attention` or its output projection has hooks, a parametrization or sharded weights.

    Example:
        >>> import torch
        >>> from bridge import QuantizableMultiheadAttention
        >>> attention, x = torch.nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 5, 8)
        >>> y, weights = QuantizableMultiheadAttention(attention)(x, x, x)
        >>> torch.allclose(y, attention(x, x, x)[0], atol=1e-6), weights.shape
        (True, torch.Size([3, 5, 5]))
    """

    # What torch's encoders look at: as in an attention of torch's whose weights are not in one piece. An encoder
    # that was constructed before has found them in one piece.
    in_proj_weight = _NoTensor()
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        if not (isinstance(attention, nn.MultiheadAttention) and is_replaceable(attention)):
            raise TypeError(
                f"{type(self).__name__} got a {type(attention).__name__}; give a torch.nn.MultiheadAttention, or a "
                f"subclass that computes the same"
            )
        check_plain(attention)
        check_plain(attention.out_proj)
        self.embed_dim, self.kdim, self.vdim = attention.embed_dim, attention.kdim, attention.vdim
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.dropout, self.batch_first = attention.dropout, attention.batch_first
        self.bias_k, self.bias_v, self.add_zero_attn = attention.bias_k, attention.bias_v, attention.add_zero_attn
        weights = _thirds(attention.in_proj_weight)
        if attention.in_proj_weight is None:
            weights = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, _thirds(attention.in_proj_bias))
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the result, and the weights of attention or None; arguments as `torch.nn.MultiheadAttention`.

        Raises:
            ValueError: shapes do not fit, a mask is neither bool nor float, or `is_causal` comes without `attn_mask`,
                of which it says that it is the causal one.
        """
        if not query.dim() == key.dim() == value.dim() in (2, 3):
            raise ValueError(f"{_shapes(query, key, value)}; give three axes, or two for one sequence")
        if attn_mask is None and is_causal:
            raise ValueError("is_causal=True says that attn_mask is the causal one, and attn_mask is None; give it too")
        # Not before: compiled, the layers share the codes of what is one tensor.
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        batched = query.dim() == 3
        if not batched:
            q, k, v = q[None], k[None], v[None]
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        if k.shape != v.shape or q.shape[0] != k.shape[0]:
            raise ValueError(
                f"{_shapes(query, key, value)}; give as many sequences in each, and as many tokens in key and value"
            )

        # Torch's encoder finds out by a look at the mask, which a compiler cannot know; the mask serves too.
        causal = key_padding_mask is None and not need_weights and guard_or_false(is_causal)
        mask = None if causal else self._mask(q, k, attn_mask, key_padding_mask, batched)
        tokens = k.shape[1]
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], 1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if mask is not None and k.shape[1] > tokens:
            mask = F.pad(mask, (0, k.shape[1] - tokens))

        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        weights: Tensor | None = None
        if need_weights:
            scores = (q * math.sqrt(1 / self.head_dim)) @ k.transpose(-2, -1)
            scores = scores if mask is None else scores + mask
            weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0, causal)

        y = y.transpose(1, 2).flatten(2)
        if not batched:
            y, weights = y[0], None if weights is None else weights[0]
        elif not self.batch_first:
            y = y.transpose(0, 1)
        return self.out_proj(y), weights

    def _mask(
        self, q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, batched: bool
    ) -> Tensor | None:
        """Return what is added to the scores (N, heads, L, S): both masks."""
        mask, (batch, tokens) = None, k.shape[:2]
        if attn_mask is not None:
            each = (batch * self.num_heads,) if attn_mask.dim() == 3 else ()
            mask = _added("attn_mask", attn_mask, q.dtype, (*each, q.shape[1], tokens))
            if each:
                mask = mask.unflatten(0, (batch, self.num_heads))
        if key_padding_mask is not None:
            shape = (batch, tokens) if batched else (tokens,)
            padding = _added("key_padding_mask", key_padding_mask, q.dtype, shape).reshape(batch, 1, 1, tokens)
            mask = padding if mask is None else mask + padding
        return mask

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def _shapes(query: Tensor, key: Tensor, value: Tensor) -> str:
    return f"query, key and value are of shapes {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"


def _added(name: str, mask: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return a mask as it is added to scores: -inf where a bool one is True."""
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"{name} is of {mask.dtype}; give a bool mask, True where there is no attention, or a float one"
        )
    if mask.shape != shape:
        raise ValueError(f"{name} is of shape {tuple(mask.shape)}; it must be {shape}")
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
    return mask.to(dtype)


def _linear(weight: Any, bias: Any) -> nn.Linear:
    """Return a linear layer with these very parameters; `bias` may be None."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight, linear.bias = weight, bias
    return linear


def _thirds(parameter: nn.Parameter | None) -> list[Any]:
    """Return the parts for query, key and value of a parameter that has them in one piece."""
    if parameter is None:
        return [None, None, None]
    return [nn.Parameter(part.clone(), parameter.requires_grad) for part in parameter.detach().chunk(3)]
