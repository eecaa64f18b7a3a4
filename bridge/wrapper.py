"""What the tensor subclasses of the bridge share: which operations they have, and how torch's caches know them."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from functional_sq import backends
from functional_sq.formats import REAL_DTYPES

__all__ = ["Wrapper", "each"]

aten = torch.ops.aten


class Wrapper(Tensor):
    """What both subclasses share: a table of operations, and a clear refusal of all others."""

    operations: ClassVar[dict[object, Callable[..., Any]]]
    """By operator; the functions get it, then its arguments."""
    remedy: ClassVar[str]
    """What the error for all others says."""

    @staticmethod
    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # F.linear is taken here, before torch cuts it into view, t and mm: one step for any rank.
        if func is F.linear:
            return cls.linear(*args, **(kwargs or {}))
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            _exchange(*args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch says neither that it is a class method nor `func`
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operation = cls.operations.get(func)
        if operation is None:
            # In inference mode composite operators come here whole: reshape, matmul, to.
            result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            raise NotImplementedError(
                f"{func} has no meaning on the codes of an {cls.__name__}, and nothing is dequantized silently; "
                f"{cls.remedy}"
            )
        return return_and_correct_aliasing(func, args, kwargs, operation(func, *args, **kwargs))

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, torch.dtype]]:
        """Name the tensors inside; return also what is static, and apart from it the outer dtype."""
        raise NotImplementedError

    def _stable_hash_for_caching(self) -> str:
        """Name what a graph compiled for this tensor depends on; torch's caches on disk ask for it.

        What is traced below `F.linear` is not in the graph that they know otherwise: that is code of the bridge and of
        functional_sq.

        Raises:
            BypassFxGraphCache: a user's function is traced there. A pickle has its name alone, not its code.
        """
        names, context = self.__tensor_flatten__()
        inner = [_cache_key(getattr(self, name)) for name in names]
        code = _source(), backends.fingerprint(self.device.type)
        return hashlib.sha256(pickle.dumps((type(self).__qualname__, inner, context, code))).hexdigest()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # torch before 2.13 asks for no name: its cache pickles the tensors that it traces with, and hashes the bytes.
        if TracingContext.try_get() is not None and _is_fake(self):
            return str, (self._stable_hash_for_caching(),)
        return super().__reduce_ex__(protocol)

    def _map(self, fn: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> Wrapper:
        """Return the tensor with `fn` applied to each tensor inside, and with another outer dtype."""
        raise NotImplementedError

    def _mode(self) -> AbstractContextManager[object]:
        """Return the mode in which a view of this tensor is made: autograd refuses one that is an inference tensor."""
        if torch.is_inference_mode_enabled() and not self.is_inference():
            return torch.inference_mode(False)
        return nullcontext()

    def requires_grad_(self, requires_grad: bool = True) -> Wrapper:
        """Return the tensor as it is: codes have no gradient, whatever is asked for.

        torch asks for one with `torch.nn.Parameter(weight)`, with `load_state_dict(..., assign=True)` into a float
        model and with `model.requires_grad_()`.
        """
        return self


def _exchange(q: Wrapper, data: Tensor) -> None:
    """Give `q` the tensors inside `data`: what torch exchanges for `q.data = data` is the outside alone."""
    if type(data) is not type(q):
        raise TypeError(
            f"data = a {type(data).__name__} of a {type(q).__name__} would leave the codes as they are; "
            f"quantize it, or assign a torch.nn.Parameter in place of the tensor"
        )
    vars(q).update(vars(data.detach()))


def _source() -> str:
    return backends.sources(Path(__file__).parent)


def _is_fake(t: Tensor) -> bool:
    """Whether `t` is what a compiler traces with in place of a tensor."""
    if isinstance(t, Wrapper):
        return any(_is_fake(getattr(t, name)) for name in t.__tensor_flatten__()[0])
    return isinstance(t, FakeTensor)


def _cache_key(t: Tensor) -> str:
    if isinstance(t, Wrapper):
        return t._stable_hash_for_caching()
    # As text: a size may be symbolic.
    return f"{tuple(t.shape)} {t.stride()} {t.dtype} {t.device} {t.is_inference()}"


# Operations that both have.


def each(func: Any, q: Wrapper, *args: Any, **kwargs: Any) -> Wrapper:
    """Apply an operator to each tensor inside."""
    # A scale has the rank of its tensor, so what moves axes moves those of the scale alike.
    return q._map(lambda t: func(t, *args, **kwargs))


def to_copy(func: Any, q: Wrapper, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Wrapper:
    # The dtype is that of the values a code stands for; a scale keeps the bits it was chosen with.
    if dtype is not None and dtype not in REAL_DTYPES:
        raise TypeError(f"an {type(q).__name__} stands for real values, not for {dtype}; {q.remedy}")
    return q._map(lambda t: func(t, **kwargs), dtype)


def multiply(func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # Not F.linear: where torch functions are disabled it would come back here.
    wrapper = next(t for t in (weight, x, bias) if isinstance(t, Wrapper))
    return wrapper.linear(x, weight, bias)


def mm(func: Any, x: Tensor, weight: Tensor) -> Tensor:
    return multiply(func, x, weight.t())


def addmm(func: Any, bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if beta != 1 or alpha != 1:
        raise NotImplementedError(f"addmm with beta={beta}, alpha={alpha} on codes; use 1, or dequantize")
    return multiply(func, x, weight.t(), bias)


def copy_(func: Any, q: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not (isinstance(q, Wrapper) and isinstance(source, Wrapper)):
        names = f"a {type(source).__name__} into a {type(q).__name__}"
        raise TypeError(f"copy_ of {names}; quantize the one, or use .dequantize() of the other")
    if (ours := _kind(q)) != (theirs := _kind(source)):
        raise ValueError(
            f"copy_ between tensors that are not alike: {theirs} into {ours}; build the module with the "
            f"shapes and dtypes of the checkpoint, or use load_state_dict(..., assign=True)"
        )
    for name in q.__tensor_flatten__()[0]:
        getattr(q, name).copy_(getattr(source, name), non_blocking=non_blocking)
    return q


def _kind(q: Wrapper) -> tuple[Any, ...]:
    """What two wrappers must share for a copy of one into the other: all but values, device and outer dtype."""
    names, (static, _) = q.__tensor_flatten__()
    inner = ((name, getattr(q, name)) for name in names)
    return (
        type(q).__name__,
        *((name, _kind(t) if isinstance(t, Wrapper) else (tuple(t.shape), t.dtype)) for name, t in inner),
        static,
    )


Wrapper.operations = {
    aten.detach.default: each,
    aten.alias.default: each,
    aten.clone.default: each,
    aten._to_copy.default: to_copy,
    aten.copy_.default: copy_,
    aten.linear.default: multiply,
    aten.mm.default: mm,
    aten.addmm.default: addmm,
}
