"""Laws of what an observer records: states, however data is split, merged, masked, mapped, compiled or saved."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import functional_sq as fsq
from functional_sq.observer import State
from functional_sq.testing.assertions import as_text, assert_same_bits, bits, require

__all__ = [
    "compiled_equals_eager",
    "large_is_its_pieces",
    "masked_values_do_not_count",
    "merge_is_a_commutative_monoid",
    "observe_in_turn",
    "observe_is_a_homomorphism",
    "observe_is_pure",
    "qparams_ignore_splits",
    "round_trips",
    "unfit_states_are_faulty",
    "vmap_equals_loop",
]


def merge_is_a_commutative_monoid(
    spec: fsq.QuantSpec, batches: Sequence[Tensor], *, dtype: torch.dtype = torch.float32
) -> None:
    """Assert that merging states is associative and commutative, with `init` as its identity.

    Neither part changes, and the observer's `table`, by which ranks merge, gives the same bits. An observer that
    depends on order says so: `merge` raises a TypeError that has the word "order".

    Args:
        spec: the quantization, with the observer under test.
        batches: three tensors of one shape; a state is recorded from each.
        dtype: dtype of the states.

    Example:
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> merge_is_a_commutative_monoid(spec, (torch.ones(2), torch.zeros(2), torch.rand(2)))
    """
    empty = fsq.init(spec, batches[0].shape, dtype=dtype)
    a, b, c = (fsq.observe(spec, empty, x) for x in batches)
    if _depends_on_order(spec, empty):
        return
    merge, before = functools.partial(fsq.merge, spec), copy.deepcopy((empty, a, b, c))
    assert_same_bits("merge(init, a)", "a", merge(empty, a), a)
    assert_same_bits("merge(a, init)", "a", merge(a, empty), a)
    assert_same_bits("merge(init, init)", "init", merge(empty, empty), empty)
    assert_same_bits("merge(a, b)", "merge(b, a)", merge(a, b), merge(b, a))
    assert_same_bits("merge(merge(a, b), c)", "merge(a, merge(b, c))", merge(merge(a, b), c), merge(a, merge(b, c)))
    assert_same_bits("(init, a, b, c) after merges", "(init, a, b, c) before", (empty, a, b, c), before)
    merged = merge(a, b)
    known: dict[str, Callable[..., Tensor]] = {"min": torch.minimum, "max": torch.maximum, "sum": torch.add}
    for key, reduction in spec.observer.table.items():
        if reduction.name in known:
            by_name = known[reduction.name](a[key], b[key])
            assert_same_bits(f"merge(a, b)[{key!r}]", f"{reduction.name} of both, by its table", merged[key], by_name)


def observe_is_a_homomorphism(
    spec: fsq.QuantSpec, batches: Sequence[Tensor], *, dtype: torch.dtype = torch.float32
) -> None:
    """Assert that recording two batches, their concatenation, or each apart and merging is one.

    Batches are joined and cut along each axis that is reduced whole, where longer data has the same
    statistics: every axis for PerTensor, the last for PerToken, none for PerGroup. An observer that
    depends on order is left out: there the three are meant to differ.

    Args:
        spec: the quantization, with the observer under test.
        batches: three tensors of one shape; the first makes the state that the others add to.
        dtype: dtype of the states.

    Example:
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> observe_is_a_homomorphism(spec, (torch.ones(2), torch.zeros(2), torch.rand(2)))
    """
    empty = fsq.init(spec, batches[0].shape, dtype=dtype)
    if _depends_on_order(spec, empty):
        return
    observe, merge = functools.partial(fsq.observe, spec), functools.partial(fsq.merge, spec)
    s, (a, b) = observe(empty, batches[0]), batches[1:]
    both = observe(observe(s, a), b)
    joined = "observe(observe(s, a), b)"
    assert_same_bits(joined, "observe(observe(s, b), a)", both, observe(observe(s, b), a))
    assert_same_bits(joined, "merge(observe(s, a), observe(init, b))", both, merge(observe(s, a), observe(empty, b)))
    for axis in _whole_axes(spec, a.shape):
        for first, second, text in ((a, b, "a, b"), (b, a, "b, a")):
            cat = torch.cat([first, second], axis)
            assert_same_bits(joined, f"observe(s, cat([{text}], {axis}))", both, observe(s, cat))
        once, n = observe(s, a), a.shape[axis]
        for at in (0, n // 2, n):
            parts = torch.split(a, [at, n - at], axis)
            text = f"observe(observe(s, p), q) with p, q = a.split([{at}, {n - at}], {axis})"
            assert_same_bits("observe(s, a)", text, once, observe(observe(s, parts[0]), parts[1]))


def qparams_ignore_splits(
    spec: fsq.QuantSpec, batches: Sequence[Tensor], *, dtype: torch.dtype = torch.float32
) -> None:
    """Assert that scales, zero points and codes do not depend on how data was ordered or sharded.

    An observer that depends on order is left out.

    Args:
        spec: the quantization, with the observer under test.
        batches: three tensors of one shape.
        dtype: dtype of the states.

    Example:
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> qparams_ignore_splits(spec, (torch.ones(2), torch.zeros(2), torch.rand(2)))
    """
    empty = fsq.init(spec, batches[0].shape, dtype=dtype)
    if _depends_on_order(spec, empty):
        return
    a, b, c = (fsq.observe(spec, empty, x) for x in batches)
    expected = fsq.calc_qparams(spec, observe_in_turn(spec, empty, *batches))
    codes = fsq.quantize(spec, batches[0], expected)
    others = {
        "the batches in reverse": observe_in_turn(spec, empty, *reversed(batches)),
        "merge(a, merge(b, c))": fsq.merge(spec, a, fsq.merge(spec, b, c)),
        "merge(merge(c, a), b)": fsq.merge(spec, fsq.merge(spec, c, a), b),
    }
    for axis in _whole_axes(spec, batches[0].shape):
        others[f"cat(batches, {axis})"] = fsq.observe(spec, empty, torch.cat(list(batches), axis))
    for text, state in others.items():
        qp = fsq.calc_qparams(spec, state)
        assert_same_bits("calc_qparams(the batches in turn)", f"calc_qparams({text})", expected, qp)
        assert_same_bits("codes(the batches in turn)", f"codes({text})", codes, fsq.quantize(spec, batches[0], qp))


def masked_values_do_not_count(
    spec: fsq.QuantSpec, batches: Sequence[Tensor], *, mask: Tensor, dtype: torch.dtype = torch.float32
) -> None:
    """Assert that what `mask` leaves out is not seen, whatever it is, and that the rest is, once.

    Args:
        spec: the quantization, with the observer under test.
        batches: three tensors of one shape; the first two make a state, the third is masked.
        mask: bool, of the shape of the batches' leading axes.
        dtype: dtype of the states.

    Example:
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> masked_values_do_not_count(spec, (torch.ones(2),) * 3, mask=torch.tensor([True, False]))
    """
    empty = fsq.init(spec, batches[0].shape, dtype=dtype)
    s = observe_in_turn(spec, empty, *batches[:2])
    x = batches[2]
    observe = functools.partial(fsq.observe, spec, s)
    every, none = torch.ones_like(mask), torch.zeros_like(mask)
    assert_same_bits("observe(s, x, mask=every)", "observe(s, x)", observe(x, mask=every), observe(x))
    assert_same_bits("observe(s, x, mask=none)", "s", observe(x, mask=none), s)
    assert_same_bits("observe(init, x, mask=none)", "init", fsq.observe(spec, empty, x, mask=none), empty)
    left_out = ~mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    seen = observe(x, mask=mask)
    if not _depends_on_order(spec, s):
        rest = fsq.observe(spec, seen, x, mask=~mask)
        assert_same_bits("observe(observe(s, x, mask=mask), x, mask=~mask)", "observe(s, x)", rest, observe(x))
    for garbage in (0.0, torch.finfo(x.dtype).max, math.nan):
        y = x.masked_fill(left_out, garbage)
        text = f"observe(s, x with {garbage} where not mask, mask=mask)"
        assert_same_bits("observe(s, x, mask=mask)", text, seen, observe(y, mask=mask))


def observe_is_pure(spec: fsq.QuantSpec, batches: Sequence[Tensor], *, dtype: torch.dtype = torch.float32) -> None:
    """Assert that `observe` keeps the form of the state, changes nothing and gives the same twice.

    Keys, shapes, dtypes and device stay; neither state nor data change, also not in `merge` and
    `calc_qparams`; a batch without elements adds nothing; new tensors are contiguous and share
    memory neither with the data nor with each other. `init` makes tensors of its own in each call, on
    the device and in the dtype that it is given, or a wider one; `count` is int64. `calc_qparams`
    reads by name: other keys, and their order, do not matter.

    Args:
        spec: the quantization, with the observer under test.
        batches: tensors of one shape.
        dtype: dtype of the states.

    Example:
        >>> observe_is_pure(fsq.QuantSpec(torch.int8, fsq.PerTensor()), (torch.ones(2), torch.zeros(2)))
    """
    empty = fsq.init(spec, batches[0].shape, dtype=dtype)
    _assert_made(spec, batches[0].shape, dtype, empty)
    state = empty
    for x in batches:
        old_state, old_x, old_tensors = copy.deepcopy(state), x.clone(), dict(state)
        new = fsq.observe(spec, state, x)
        assert_same_bits("s after observe(s, x)", "s before", state, old_state)
        assert_same_bits("x after observe(s, x)", "x before", x, old_x)
        replaced = [name for name in state if state[name] is not old_tensors[name]]
        require(new is not state and not replaced, "observe(s, x) is a new dict and leaves s as it was", s=replaced)
        _assert_form(new, empty, x)
        assert_same_bits("observe(s, x)", "observe(s, x) again", new, fsq.observe(spec, state, x))
        nothing = x.new_empty((0, *x.shape[1:]))
        if x.ndim and 0 in _whole_axes(spec, x.shape):
            assert_same_bits("observe(s, x[:0])", "s", fsq.observe(spec, state, nothing), state)
        state = new
    before = copy.deepcopy((empty, state))
    qp = fsq.calc_qparams(spec, state)
    assert_same_bits("calc_qparams(s)", "calc_qparams(s) again", qp, fsq.calc_qparams(spec, state))
    more = {"of another observer": state["count"]} | dict(reversed(state.items()))
    assert_same_bits("calc_qparams(s)", "that of s in another order, with more in it", qp, fsq.calc_qparams(spec, more))
    if not _depends_on_order(spec, empty):
        _assert_form(fsq.merge(spec, state, state), empty, batches[0])
    assert_same_bits("(init, s) after calc_qparams and merge", "(init, s) before", (empty, state), before)


def vmap_equals_loop(spec: fsq.QuantSpec, batches: Sequence[Tensor], *, dtype: torch.dtype = torch.float32) -> None:
    """Assert that `torch.vmap(partial(observe, spec))` gives what a loop gives, with masks and without.

    Args:
        spec: the quantization, with the observer under test.
        batches: tensors of one shape, stacked to the batch that vmap runs over.
        dtype: dtype of the states.

    Example:
        >>> vmap_equals_loop(fsq.QuantSpec(torch.int8, fsq.PerTensor()), (torch.ones(2), torch.zeros(2)))
    """
    empty = fsq.init(spec, batches[0].shape, dtype=dtype)
    states = [observe_in_turn(spec, empty, *batches[:i]) for i in range(len(batches))]
    looped = [fsq.observe(spec, s, x) for s, x in zip(states, batches, strict=True)]
    mapped = torch.vmap(functools.partial(fsq.observe, spec))(_stack(states), torch.stack(list(batches)))
    assert_same_bits("vmap(observe)(states, xs)", "stack of observe(s, x)", mapped, _stack(looped))
    read = functools.partial(fsq.calc_qparams, spec)
    right = fsq.QParams(*map(torch.stack, zip(*map(read, looped), strict=True)))
    assert_same_bits("vmap(calc_qparams)(states)", "stack of calc_qparams(s)", torch.vmap(read)(_stack(looped)), right)
    masks = torch.stack([x > 0 for x in batches])

    def masked(s: State, x: Tensor, mask: Tensor) -> State:
        return fsq.observe(spec, s, x, mask=mask)

    looped = [masked(*each) for each in zip(states, batches, masks, strict=True)]
    mapped = torch.vmap(masked)(_stack(states), torch.stack(list(batches)), masks)
    assert_same_bits("vmap(observe)(states, xs, masks)", "stack of observe(s, x, mask)", mapped, _stack(looped))


def compiled_equals_eager(
    spec: fsq.QuantSpec,
    batches: Sequence[Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    backend: str = "inductor",
) -> None:
    """Assert that compiled `observe` is one graph, compiled once for equal specs, with eager's bits.

    Forgets what torch has compiled in this process, before and after, to count from nothing.

    Args:
        spec: the quantization, with the observer under test.
        batches: tensors of one shape, observed in turn.
        dtype: dtype of the states.
        backend: what compiles the graph. "inductor" needs a C++ compiler,
            "aot_eager" does not.

    Example:
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> compiled_equals_eager(spec, (torch.ones(2), torch.zeros(2)), backend="aot_eager")
    """
    from torch._dynamo import lookup_backend  # which takes a second to import

    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return lookup_backend(backend)(graph, inputs)

    empty = fsq.init(spec, batches[0].shape, dtype=dtype)
    torch.compiler.reset()
    try:
        for equal_spec in (spec, copy.deepcopy(spec)):
            compiled = torch.compile(functools.partial(fsq.observe, equal_spec), fullgraph=True, backend=count)
            state = empty
            for x in batches:
                eager = fsq.observe(spec, state, x)
                assert_same_bits(f"compile(observe, {backend!r})(s, x)", "observe(s, x)", compiled(state, x), eager)
                state = eager
            require(
                len(graphs) == 1,
                f"{len(batches)} batches, and then an equal spec, compile once",
                compilations=len(graphs),
            )
    finally:
        torch.compiler.reset()


def round_trips(spec: fsq.QuantSpec, batches: Sequence[Tensor], *, dtype: torch.dtype = torch.float32) -> None:
    """Assert that spec and state survive pickle, deepcopy, JSON, a file, and the spec its repr.

    Args:
        spec: the quantization, with the observer under test.
        batches: tensors of one shape, observed in turn.
        dtype: dtype of the state.

    Example:
        >>> round_trips(fsq.QuantSpec(torch.int8, fsq.PerTensor()), (torch.ones(2), torch.zeros(2)))
    """
    from functional_sq.serialize import load, own_classes, save, spec_from_json, spec_to_json

    state = observe_in_turn(spec, fsq.init(spec, batches[0].shape, dtype=dtype), *batches)
    own = own_classes(spec)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "calibration.safetensors")
        save(path, {"layer.0": (spec, state)})
        loaded = load(path, classes=own)
    require(list(loaded) == ["layer.0"], "load(save({'layer.0': ...})) has that one layer", loaded=list(loaded))
    copies = {
        "pickle.loads(pickle.dumps((spec, s)))": pickle.loads(pickle.dumps((spec, state))),
        "copy.deepcopy((spec, s))": copy.deepcopy((spec, state)),
        "load(save((spec, s)))": loaded["layer.0"],
    }
    for text, pair in copies.items():
        assert_same_bits(f"{text}[1]", "s", pair[1], state)
    names = {name: getattr(fsq, name) for name in fsq.__all__}
    equals = {text: pair[0] for text, pair in copies.items()} | {
        "spec_from_json(spec_to_json(spec))": spec_from_json(spec_to_json(spec), classes=own),
        "eval(repr(spec))": eval(repr(spec), {"torch": torch, **{cls.__name__: cls for cls in own}, **names}),
    }
    for text, other in equals.items():
        require(other == spec and hash(other) == hash(spec), f"{text} == spec, with its hash", other=other, spec=spec)


def large_is_its_pieces(spec: fsq.QuantSpec, *, rows: int, dtype: torch.dtype = torch.float32) -> None:
    """Assert that a tensor of any size counts its elements, and is recorded as its pieces are.

    An observer that depends on order has the first part alone to obey.

    Args:
        spec: the quantization, with the observer under test; its granularity reduces the first axis whole.
        rows: of a tensor of normal values `(rows, 3)`, which is cut into 16 pieces.
        dtype: dtype of the states.

    Example:
        >>> large_is_its_pieces(fsq.QuantSpec(torch.int8, fsq.PerTensor()), rows=2000)
    """
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows))
    empty = fsq.init(spec, x.shape, dtype=dtype)
    state = fsq.observe(spec, empty, x)
    counted = int(state["count"].sum())
    require(counted == x.numel(), "the counts of a state sum to the elements", counted=counted, elements=x.numel())
    if _depends_on_order(spec, empty):
        return
    pieces = [fsq.observe(spec, empty, piece) for piece in x.tensor_split(16)]
    merged = functools.reduce(functools.partial(fsq.merge, spec), pieces)
    assert_same_bits("observe(init, x)", "the merge of its 16 pieces", state, merged)


def unfit_states_are_faulty(
    spec: fsq.QuantSpec, batches: Sequence[Tensor], *, dtype: torch.dtype = torch.float32
) -> None:
    """Assert that `fault` tells of a state that saw too little, and of one that saw a NaN or an Inf in any block.

    An observer whose range does not depend on data need not. One that leaves such values out or replaces them need
    not either, but then its state says so: it is another than that of the data without them, and than that of the
    data with a 0, a 1 or the largest value of either sign in their place.

    Args:
        spec: the quantization, with the observer under test.
        batches: three tensors of one shape, finite.
        dtype: dtype of the states.

    Example:
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> unfit_states_are_faulty(spec, (torch.ones(2), torch.zeros(2), torch.rand(2)))
    """
    empty = fsq.init(spec, batches[0].shape, dtype=dtype)
    if spec.observer.fault(empty, 1) is None:
        fixed = fsq.calc_qparams(spec, empty)
        for x in batches:
            qp = fsq.calc_qparams(spec, observe_in_turn(spec, empty, x))
            assert_same_bits("calc_qparams(observe(init, x))", "calc_qparams(init), which is not faulty", qp, fixed)
        return
    seen = fsq.observe(spec, empty, batches[0])
    few = int(seen["count"].max()) + 1
    require(spec.observer.fault(seen, few) is not None, f"less than {few} values in a block are a fault", s=seen)
    first = torch.zeros(batches[0].shape, dtype=torch.bool)
    first.view(-1)[0] = True
    seen = fsq.observe(spec, empty, batches[0], mask=first)
    told = int(seen["count"].min()) > 0 or spec.observer.fault(seen, 1) is not None
    require(told, "no value in one block of several is a fault", s=seen)
    top = torch.finfo(batches[0].dtype).max
    for place, value in ((0, math.nan), (-1, math.nan), (0, math.inf), (-1, -math.inf)):
        there = torch.zeros(batches[0].shape, dtype=torch.bool)
        there.view(-1)[place] = True
        x = batches[0].masked_fill(there, value)
        seen = fsq.observe(spec, empty, x)
        if spec.observer.fault(seen, 1) is not None:
            continue
        hidden = {"it masked": fsq.observe(spec, empty, x, mask=~there)}
        for finite in (0.0, 1.0, top, -top):
            hidden[f"{finite} in its place"] = fsq.observe(spec, empty, x.masked_fill(there, finite))
        for text, other in hidden.items():
            told = any(not torch.equal(bits(seen[name]), bits(other[name])) for name in seen)
            require(told, f"{value} is a fault, or the state is another than with {text}", x=x, s=seen)


def observe_in_turn(spec: fsq.QuantSpec, state: State, *batches: Tensor) -> State:
    """Return the state that has recorded each batch after the one before."""
    for x in batches:
        state = fsq.observe(spec, state, x)
    return state


def _stack(states: Sequence[State]) -> State:
    return {name: torch.stack([s[name] for s in states]) for name in states[0]}


def _depends_on_order(spec: fsq.QuantSpec, empty: State) -> bool:
    """Return whether merge says that the observer depends on order; another TypeError is a failure."""
    try:
        fsq.merge(spec, empty, empty)
    except TypeError as error:
        require("order" in str(error), 'the TypeError of merge gives its reason, with the word "order"', error=error)
        return True
    return False


def _whole_axes(spec: fsq.QuantSpec, shape: Sequence[int]) -> list[int]:
    """Return the axes along which more data has the same statistics: reduced, and as a whole."""
    stat_shape = spec.granularity.stat_shape(shape)
    whole = []
    for axis, n in enumerate(shape):
        # A PerBlock or PerGroup whose block is the axis reduces it too, but not when it is longer.
        longer = [*shape[:axis], 2 * n, *shape[axis + 1 :]]
        try:
            same = spec.granularity.stat_shape(longer) == stat_shape
        except ValueError:
            same = False
        if same:
            whole.append(axis)
    return whole


def _assert_made(spec: fsq.QuantSpec, shape: torch.Size, dtype: torch.dtype, state: State) -> None:
    """Assert that `init` makes tensors of its own, as it is asked to."""
    again, elsewhere = (fsq.init(spec, shape, dtype=dtype, device=device) for device in (None, "meta"))
    for name, value in state.items():
        right = torch.int64 if name == "count" else torch.promote_types(value.dtype, dtype)
        if name == "count" or value.is_floating_point():
            require(value.dtype is right, f"{name!r} of init(..., dtype={dtype}) is {right}", found=str(value.dtype))
        apart = value.untyped_storage().data_ptr() != again[name].untyped_storage().data_ptr()
        require(apart or value.numel() == 0, f"{name!r} of two calls of init shares no memory")
        require(elsewhere[name].is_meta, f"{name!r} of init(..., device) is there", found=str(elsewhere[name].device))


def _assert_form(new: State, old: State, x: Tensor) -> None:
    require(new.keys() == old.keys(), "a new state has the keys of the old", new=sorted(new), old=sorted(old))
    memory = {x.untyped_storage().data_ptr(): "x"}
    for name, value in new.items():
        for what in ("shape", "dtype", "device"):
            ours, theirs = getattr(value, what), getattr(old[name], what)
            require(
                ours == theirs,
                f"{name!r} of a new state has the {what} of the old",
                new=as_text(ours),
                old=as_text(theirs),
            )
        require(value.is_contiguous(), f"{name!r} of a new state is contiguous", strides=value.stride())
        where = value.untyped_storage().data_ptr()
        require(where not in memory, f"{name!r} of a new state shares no memory with {memory.get(where)}")
        memory[where] = repr(name)
