"""A batch: how a model is called with it, and which of its positions count."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["call", "check_batches", "check_fitted", "mask_of"]


def call(model: nn.Module, batch: Any) -> Any:
    """Call `model` with a batch: a mapping of keyword arguments, positional arguments, or one tensor.

    Raises:
        TypeError: the model does not take these arguments; the message says what a batch is.
    """
    given = batch if isinstance(batch, (tuple, list, Mapping)) else (batch,)
    args, kwargs = ((), given) if isinstance(given, Mapping) else (given, {})
    try:
        return model(*args, **kwargs)
    except TypeError as error:
        try:
            inspect.signature(model.forward).bind(*args, **kwargs)
        except TypeError:
            raise TypeError(
                f"{error}; a tuple or list holds the positional arguments of the model, a mapping those by keyword: "
                f"give them alone, without labels, such as (batch[0] for batch in batches)"
            ) from error
        raise


def check_batches(batches: object) -> None:
    """Raise TypeError unless `batches` may be batches; one mapping is one of them."""
    if isinstance(batches, Mapping):
        raise TypeError(f"batches is one {type(batches).__name__}; give an iterable of batches: [batch]")
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches is a {type(batches).__name__}; give an iterable of batches, such as a DataLoader")


def mask_of(model: nn.Module, batch: Any, mask: Callable[[Any], Tensor | None] | None = None) -> Tensor | None:
    """Return what `mask` gives for a batch, or the batch's own mask; None where every position counts."""
    if mask is not None:
        keep = mask(batch)
        if keep is not None and (not isinstance(keep, Tensor) or keep.dtype is not torch.bool):
            found = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
            raise TypeError(f"mask(batch) is a {found}; return a bool tensor, True where a position counts, or None")
        return keep
    keep = _of_tokens(batch, "attention_mask")
    if keep is None:
        return None
    # Of labels an encoder-decoder makes the decoder's input; for others they are no input.
    of_labels = "labels" in batch and any(
        getattr(getattr(module, "config", None), "is_encoder_decoder", False) for module in model.modules()
    )
    for decoder in ("decoder_input_ids", "decoder_inputs_embeds", *(("labels",) if of_labels else ())):
        tokens = batch.get(decoder)
        if isinstance(tokens, Tensor) and tokens.shape[:2] == keep.shape:
            # Positions of the encoder and of the decoder look alike: those of both count, so that no token is lost.
            other = _of_tokens(batch, "decoder_attention_mask")
            return None if other is None else keep | other
    return keep


def _of_tokens(batch: Any, name: str) -> Tensor | None:
    """Return where a batch's own mask has tokens: 1 there, as Hugging Face has it, and 0 at padding.

    A mask of other rank is no padding mask. One of floats, none of which is above 0, is what is added to scores: 0 for
    a token, and far below for padding.
    """
    found = batch.get(name) if isinstance(batch, Mapping) else None
    if not isinstance(found, Tensor) or found.ndim != 2:
        return None
    return found >= 0 if found.is_floating_point() and not bool((found > 0).any()) else found != 0


def check_fitted(mask: Tensor | None, fitted: bool) -> None:
    """Raise ValueError where a user's mask fitted no layer's input."""
    if mask is not None and not fitted:
        raise ValueError(
            f"mask(batch) has shape {tuple(mask.shape)}, and no layer's input has these axes in front, or all of them "
            f"as one: nothing was masked; return an entry for each position, as (batch, tokens)"
        )
