"""Chains of layers: codes are handed from layer to layer, and the floats between them are never written.

Between two layers with static ranges there is an activation, or nothing, and the second one's quantization
is known before any input: `requantize` is one more step on each result of the first layer. `hand_on` finds
such layers in a graph and gives them that step; it also lets layers that quantize one input alike share
its codes, layers add the residual that goes around them, and a batch norm is part of a layer's epilogue.

In the graph that `torch.compile` captures, a layer is two operators: `functional_sq::quantize` and
`functional_sq::product`. They are composed of other operators, so a compiler that knows nothing of them sees
what `quantize`, `linear` and `conv` are made of, and fuses it as ever.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from functional_sq import brgemm
from functional_sq.backends import codes_dtype, convolution_for
from functional_sq.batch_norm import fold_batch_norm
from functional_sq.conv import conv
from functional_sq.conv_transpose import conv_transpose
from functional_sq.folded import Epilogue, FoldedWeight
from functional_sq.linear import linear
from functional_sq.observers.min_max import MinMax
from functional_sq.qparams import MappingType, QParams
from functional_sq.quantize import quantize
from functional_sq.requantize import Requantization
from functional_sq.serialize import spec_from_json, spec_to_json
from functional_sq.spec import QuantSpec
from functional_sq.tracing import always, computed_together, hide_from_dynamo
from functional_sq.triton_conv import reads_real
from functional_sq.windows import Geometry, geometry_of

__all__ = ["AT_CODES", "Link", "describe", "hand_on", "layer"]


@cache
def describe(spec: QuantSpec) -> str:
    """Return what `layer` takes for a spec: JSON of what quantizes, without the observer.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from functional_sq import chains
        >>> int8 = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=fsq.Histogram())
        >>> chains.describe(int8) == chains.describe(fsq.QuantSpec(torch.int8, fsq.PerTensor()))
        True
    """
    return spec_to_json(dataclasses.replace(spec, observer=MinMax()))


_spec = cache(spec_from_json)


def layer(
    spec: str,
    x: Tensor,
    qp: QParams,
    codes: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    epilogue: Epilogue,
    *,
    geometry: str = "",
    dtype: torch.dtype = torch.float32,
    fast_accum: bool = False,
    known_by: str = "",
) -> Tensor:
    """Return `linear`, `conv` or `conv_transpose` of `quantize(x)`; captured, as the operators that `hand_on` reads.

    Args:
        spec: `describe` of the activations' quantization; one scale.
        x: real values `(..., K)`, or those that `conv` takes the codes of.
        qp: scale and zero point of the activations. Layers with the very same tensors quantize alike, and share the
            codes of one `x`.
        codes, zero_point: the folded weight's, which with an epilogue in hand are all that is read of it.
        bias: `(N,)` or None.
        epilogue: `epilogue(spec, qp, weight)`.
        geometry: JSON of the settings that `conv` or `conv_transpose` takes; "" for `linear`.
        dtype: dtype of the result.
        fast_accum: as `linear`.
        known_by: `backends.fingerprint`, by which a compiler's cache on disk tells versions of the operator apart.

    Returns:
        what that function returns.

    Raises:
        TypeError, ValueError: as that function, and as `functional_sq.serialize.spec_from_json` for `spec`.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from functional_sq import chains
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> one = fsq.QParams(torch.ones(1), torch.zeros(1, dtype=torch.int32))
        >>> weight = fsq.fold(spec, torch.tensor([[1, 2], [3, 4]], dtype=torch.int8), one)
        >>> known = fsq.epilogue(spec, one, weight)
        >>> x = torch.tensor([[10.2, 0.9]])
        >>> chains.layer(chains.describe(spec), x, one, weight.codes, weight.zero_point, None, known)
        tensor([[12., 34.]])
    """
    q = torch.ops.functional_sq.quantize.default(x, *qp, spec)
    product = torch.ops.functional_sq.product.default
    how = geometry, dtype, fast_accum, known_by
    y: Tensor = product(q, *qp, spec, codes, zero_point, bias, *epilogue, *how, None, "none", None, None, "", None)
    return y


def _quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: str) -> Tensor:
    return quantize(_spec(spec), x, QParams(scale, zero_point))


def _product(*given: Any) -> Tensor:
    q, scale, zero_point, spec, codes, weight_zero_point, bias, s, offset, *how = given
    geometry, dtype, fast_accum, _, residual, activation, to_s, to_z, to_spec, x = how
    weight = FoldedWeight(codes, s, weight_zero_point, None)  # scale and sum are not read
    arguments = _spec(spec), q, QParams(scale, zero_point), weight, bias
    then = None
    if to_spec:
        then = Requantization(_spec(to_spec), QParams(to_s, to_z), activation)
        s, bias = s.detach(), None if bias is None else bias.detach()  # codes have no gradient
    function, settings = _function_of(geometry)
    multiply: Callable[..., Tensor] = partial(function, **settings)
    if residual is not None:
        multiply = partial(multiply, residual=residual)
    if x is not None:
        multiply = partial(multiply, x=x)
    if function is conv:
        multiply = partial(multiply, relu=activation == "relu" and then is None)
    return multiply(*arguments, dtype=dtype, epilogue=Epilogue(s, offset), then=then, fast_accum=fast_accum)


def _function_of(geometry: str) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """Return which function a `functional_sq::product` is, and its settings."""
    settings = json.loads(geometry) if geometry else {}
    return conv_transpose if "output_padding" in settings else conv if settings else linear, settings


def _batch_norms(scales: Sequence[Tensor], *rest: Sequence[Any]) -> list[Tensor]:
    folded = [
        # For each output one scale; of a transposed convolution one in each phase, and the phases come first.
        fold_batch_norm(scale.reshape(-1, len(mean)).t(), bias, mean, *others)
        for scale, bias, mean, *others in zip(scales, *rest, strict=True)
    ]
    return computed_together([scale.t().reshape(-1) for scale, _ in folded] + [bias for _, bias in folded])


def _plus(zero_points: Sequence[Tensor], terms: Sequence[int]) -> list[Tensor]:
    # They may be held in a dtype of few bits.
    pairs = zip(zero_points, terms, strict=True)
    return computed_together([zero_point.to(torch.int32) + term for zero_point, term in pairs])


_SCHEMAS: dict[str, tuple[str, Callable[..., Any]]] = {
    "batch_norms": (
        "(Tensor[] product_scales, Tensor?[] biases, Tensor[] running_means, Tensor[] running_vars, Tensor?[] gammas, "
        "Tensor?[] betas, float[] eps) -> Tensor[]",
        _batch_norms,
    ),
    "plus": ("(Tensor[] zero_points, int[] terms) -> Tensor[]", _plus),
    "quantize": ("(Tensor x, Tensor scale, Tensor zero_point, str spec) -> Tensor", _quantize),
    "product": (
        "(Tensor q, Tensor scale, Tensor zero_point, str spec, Tensor codes, Tensor? weight_zero_point, "
        "Tensor? bias, Tensor product_scale, Tensor? product_offset, "
        "str geometry, ScalarType dtype, bool fast_accum, str known_by, Tensor? residual, "
        "str activation, Tensor? to_scale, Tensor? to_zero_point, str to_spec, Tensor? x) -> Tensor",
        _product,
    ),
}
for _name, (_schema, _function) in _SCHEMAS.items():
    torch.library.define(f"functional_sq::{_name}", _schema)
    torch.library.impl(f"functional_sq::{_name}", "CompositeImplicitAutograd", hide_from_dynamo(_function))

_QUANTIZE = torch.ops.functional_sq.quantize.default
_PRODUCT = torch.ops.functional_sq.product.default
_PLUS = torch.ops.functional_sq.plus.default
_BATCH_NORMS = torch.ops.functional_sq.batch_norms.default
AT_CODES, _WEIGHT_ZERO_POINT, _BIAS, _SCALE, _GEOMETRY, _RESIDUAL, _ACTIVATION, _X = (
    [argument.name for argument in _PRODUCT._schema.arguments].index(name)
    for name in ("codes", "weight_zero_point", "bias", "product_scale", "geometry", "residual", "activation", "x")
)
"""Where the arguments of a `functional_sq::product` are."""


class Link(NamedTuple):
    """A layer that hands codes on.

    Attributes:
        producer: the node of the layer that makes them, a `functional_sq::product`.
        activation: what it applies before, a key of `functional_sq.ACTIVATIONS`.
        consumers: the nodes of the layers that multiply them.
    """

    producer: fx.Node
    activation: str
    consumers: tuple[fx.Node, ...]


def hand_on(graph: fx.Graph) -> list[Link]:
    """Let the layers of a captured graph hand codes on, share those of one input, and add residuals. Changes the graph.

    A layer hands codes on if its result goes nowhere but into the quantization of the next layers, through one of
    `ACTIVATIONS` at most and dropouts in evaluation; `then` of `linear` says how codes may differ. A linear layer whose
    result, through dropouts, goes only into a sum of its shape and dtype adds the other term itself, in the dtype in
    which it scales, and the sum is rounded once. A batch norm in evaluation, of one layer's result alone, becomes part
    of that layer's scale and bias, as if folded into the weight before quantization, unless its gradient is asked for.
    A convolution on CUDA, and one by `brgemm`, adds a residual with the channels last in memory, and a ReLU after it is
    part of that; oneDNN takes longer than a pass that adds it, applies the activation and makes the next codes (8
    images of 256 x 56 x 56: 3.6 against 3.2 ms). What is written anyway is given to the one layer that multiplies its
    codes, on CUDA to convolutions, on a CPU to what `brgemm` multiplies: who reads it makes the codes.

    Args:
        graph: as Dynamo captures it: functions of torch, in-place ones too, and the operators of `layer`.

    Returns:
        the layers that hand on, in the order in which they run.

    Example:
        >>> import torch
        >>> from functional_sq import chains
        >>> chains.hand_on(torch.fx.symbolic_trace(torch.nn.ReLU()).graph)
        []
    """
    before = _Captured(graph)
    _share_codes(graph, before)
    _fold_batch_norms(graph, before)
    links = _requantize(graph, before)
    _add_residuals(graph, before)
    _give_floats(graph, before)
    return sorted(links, key=lambda link: before.order[link.producer])


class _Captured:
    """The order of a graph's nodes as it was captured, and which of them write to a tensor."""

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self._writes = [node for node in self.order if _writes(node)]
        self._start = next(node for node in self.order if node.op != "placeholder")

    def writes_between(self, first: fx.Node, last: fx.Node, but: tuple[fx.Node, ...] = ()) -> bool:
        """Whether anything between two nodes, but for some, writes to a tensor, so that the order matters."""
        return any(node not in but for node in self._written_between(first, last))

    def stay(self, values: Sequence[object], first: fx.Node, last: fx.Node) -> bool:
        """Whether nothing between two nodes may write to the memory of values."""
        read = {_memory(value) for value in values if isinstance(value, fx.Node)}
        written = {_memory(x) for node in self._written_between(first, last) for x in node.all_input_nodes}
        return not written or (None not in read | written and read.isdisjoint(written))

    def start(self, values: Sequence[object], last: fx.Node) -> fx.Node | None:
        """Return the first node of a graph, if values are there before it and stay what they are until another node."""
        given = all(not isinstance(value, fx.Node) or value.op == "placeholder" for value in values)
        return self._start if given and self.stay(values, next(iter(self.order)), last) else None

    def _written_between(self, first: fx.Node, last: fx.Node) -> list[fx.Node]:
        between = range(self.order[first] + 1, self.order[last])
        return [node for node in self._writes if self.order[node] in between]


def _share_codes(graph: fx.Graph, before: _Captured) -> None:
    """Quantize an input once for all layers that quantize it alike."""
    seen: dict[tuple[Any, ...], fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=_QUANTIZE):
        first = seen.get(node.args)
        if first is None or not before.stay(node.args, first, node):
            seen[node.args] = node
        else:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _fold_batch_norms(graph: fx.Graph, before: _Captured) -> None:
    """Make a batch norm part of the scale and bias of the layer whose result it norms.

    Where they are known as the graph begins, those of all layers are computed there at once: each by itself is a kernel
    on a GPU, and as many of those as layers took a twentieth of a ResNet's time.
    """
    folded = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=F.batch_norm):
        normed = _normed(node)
        if normed is None:
            continue
        producer, passed, statistics = normed
        if before.writes_between(producer, node, passed):
            continue
        given = producer.args[_SCALE], producer.args[_BIAS], *statistics
        folded[before.start(given, node) or node].append((producer, passed, node, given))
    for place, layers in folded.items():
        made = _computed_at(graph, place, _BATCH_NORMS, [given for *_, given in layers], 2)
        for i, (producer, passed, node, _) in enumerate(layers):
            producer.update_arg(_SCALE, made[i])
            producer.update_arg(_BIAS, made[len(layers) + i])
            _replace(graph, node, producer, passed)


def _computed_at(
    graph: fx.Graph, place: fx.Node, op: Any, operands: Sequence[tuple[Any, ...]], results: int
) -> list[fx.Node]:
    """Call an operator of lists before a node, and return its results: the first of all operands, then the second."""
    with graph.inserting_before(place):
        made = graph.call_function(op, tuple(zip(*operands, strict=True)))
        return [graph.call_function(operator.getitem, (made, i)) for i in range(results * len(operands))]


def _requantize(graph: fx.Graph, before: _Captured) -> list[Link]:
    """Let a layer make the codes that all its result is quantized to; return the layers that do."""
    found, makers = [], {}
    for node in graph.find_nodes(op="call_function", target=_QUANTIZE):
        source = _source(node.args[0])
        if source is not None and not before.writes_between(source[0], node, source[2]):
            found.append((node, *source))
            makers[node] = source[0]
        elif node.users and all(_may_read(user) for user in node.users):
            makers[node] = next(iter(node.users))
    _shift(graph, before, makers)
    links = []
    for node, producer, activation, passed in found:
        _, *made = node.args
        links.append(Link(producer, activation, tuple(node.users)))
        producer.args = (*producer.args[:_ACTIVATION], activation, *made, None)
        _replace(graph, node, producer, passed)
    return links


def _shift(graph: fx.Graph, before: _Captured, makers: Mapping[fx.Node, fx.Node]) -> None:
    """Let codes that are multiplied alone be made as backends take them: those of the layer that makes, or reads, them.

    Codes of int8 plus 128, and their zero point, are the same differences; flipping their top bit twice between two
    layers would cost two passes. Zero points are computed together, as in `_fold_batch_norms`.
    """
    shifted = defaultdict(list)
    for node, maker in makers.items():
        _, _, zero_point, text = node.args
        assert isinstance(text, str)
        spec, codes = _spec(text), _example(maker.args[AT_CODES])
        dtype = torch.uint8 if codes is None else codes_dtype(codes)
        multiplied = all(user.target is _PRODUCT and user.args[0] is node for user in node.users)
        eight = spec.format.bounds[1] == 255  # what `operand` shifts
        if multiplied and (spec.format.storage is torch.int8 or eight) and spec.format.storage is not dtype:
            up = 128 if dtype is torch.uint8 else -128
            low, high = (int(code) + up for code in spec.bounds)
            taken = QuantSpec(dtype, spec.granularity, mapping=MappingType.ASYMMETRIC, quant_min=low, quant_max=high)
            shifted[before.start([zero_point], node) or node].append((node, zero_point, up, describe(taken)))
    for place, nodes in shifted.items():
        made = _computed_at(graph, place, _PLUS, [(zero_point, up) for _, zero_point, up, _ in nodes], 1)
        for (node, _, _, text), zero_point in zip(nodes, made, strict=True):
            node.args = (*node.args[:2], zero_point, text)
            for user in tuple(node.users):
                user.args = (*user.args[:2], zero_point, text, *user.args[4:])


def _add_residuals(graph: fx.Graph, before: _Captured) -> None:
    """Let a layer add what its result is added to, and a convolution apply a ReLU after that."""
    for node in before.order:
        term = _addition(node) if node.target in _ADDITIONS else None
        if term is None:
            continue
        producer, passed, residual = term
        if before.writes_between(producer, node, (node, *passed)):
            continue
        producer.update_arg(_RESIDUAL, residual)
        _replace(graph, node, producer, passed)
        users = [*producer.users]
        if producer.args[_GEOMETRY] == "" or len(users) != 1 or _activation(users[0]) != "relu":
            continue
        if not before.writes_between(node, users[0]):
            producer.update_arg(_ACTIVATION, "relu")
            _replace(graph, users[0], producer)


def _give_floats(graph: fx.Graph, before: _Captured) -> None:
    """Give a layer what its codes are made of, which it may read instead: in memory, and codes for it alone.

    A layer by `brgemm`, or a convolution on CUDA; several of those too, if all of them read that.
    """
    quantizing = graph.find_nodes(op="call_function", target=_QUANTIZE)
    sharing = defaultdict(list)
    for node in before.order if quantizing else ():  # most graphs have none
        sharing[_memory(node)].append(node)
    for node in quantizing:
        x, users = node.args[0], [*node.users]
        memory = _memory(x)
        kept = all(_may_read(user) and before.stay([x], node, user) for user in users)
        if not kept or (len(users) > 1 and not all(_is_cuda_conv(user) and _reads_real(user, x) for user in users)):
            continue
        if _is_stored([x] if memory is None else sharing[memory]):
            for user in users:
                user.update_arg(_X, x)


def _is_stored(nodes: Sequence[fx.Node]) -> bool:
    """Whether what nodes share is written anyway: what is computed for codes alone is not, if a compiler makes the
    codes where it computes it."""
    readers = {user for node in nodes for user in node.users}.difference(nodes)
    kept = any(node.op == "placeholder" or node.target in _STORED for node in nodes)
    return kept or any(user.target is not _QUANTIZE for user in readers)


def _replace(graph: fx.Graph, node: fx.Node, producer: fx.Node, passed: tuple[fx.Node, ...] = ()) -> None:
    """Let a layer stand where a node of its result stood, and leave out what was between."""
    # After its new arguments, which are known before the node: a buffer, or computed from one.
    node.append(producer)
    node.replace_all_uses_with(producer)
    for done in (node, *passed):
        graph.erase_node(done)


_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_ACTIVATION_OF: dict[Any, str] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    **dict.fromkeys((F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"), "tanh"),
}
_STORED = (_PRODUCT, F.scaled_dot_product_attention, F.linear, torch.matmul, operator.matmul, "matmul", torch.bmm)
"""What no compiler computes where it is read."""
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


def _source(x: object) -> tuple[fx.Node, str, tuple[fx.Node, ...]] | None:
    """Return the layer whose result a value is made of alone, its activation, and the nodes between."""
    activation = "none"
    passed: list[fx.Node] = []
    while isinstance(x, fx.Node) and len(x.users) == 1:
        if x.target is _PRODUCT:
            return x, activation, tuple(passed)
        name = _activation(x)
        if name is None or "none" not in (name, activation):
            return None
        activation = activation if name == "none" else name
        passed.append(x)
        x = _argument(x, "input", 0)
    return None


def _normed(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...], tuple[Any, ...]] | None:
    """Return the layer whose result alone a batch norm in evaluation norms, the nodes between, and what
    `fold_batch_norm` takes of it."""
    x, mean, variance, gamma, beta, training, _, eps = _arguments(node).values()
    source = _source(x)
    if source is None or mean is None or variance is None or training is not False:
        return None
    producer, activation, passed = source
    plain = activation == "none" and producer.args[_RESIDUAL] is None
    # The channels are axis 1: of images with a batch, and of rows without another axis.
    y, codes, result = _example(producer), _example(producer.args[AT_CODES]), _example(node)
    if not plain or y is None or codes is None or result is None or y.ndim != codes.ndim:
        return None
    if result.requires_grad and not _is_quantized(node):
        return None
    return producer, passed, (mean, variance, gamma, beta, eps)


def _is_quantized(node: fx.Node) -> bool:
    """Whether all that is done with a result, but for an activation, is a quantization, which no gradient passes."""
    users = [*node.users]
    while len(users) == 1 and _activation(users[0]) is not None:
        users = [*users[0].users]
    return all(user.target is _QUANTIZE for user in users)


def _addition(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...], fx.Node] | None:
    """Return the layer whose result is a term of a sum that it can add, the nodes between, and the other term."""
    if len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    in_place = node.target in (operator.iadd, "add_")
    pairs = [(first, second)] if in_place else [(first, second), (second, first)]
    for x, residual in pairs:
        source = _source(x)
        if source is None or not isinstance(residual, fx.Node) or residual is x or not _alike(x, residual):
            continue
        producer, activation, passed = source
        adds = activation == "none" and producer.args[_RESIDUAL] is None and _adds(producer)
        if adds and (producer.args[_GEOMETRY] == "" or _is_channels_last(producer, residual)):
            return producer, passed, residual
    return None


def _adds(node: fx.Node) -> bool:
    """Whether a layer adds a residual: a linear one, a convolution on CUDA, or one by `brgemm`."""
    if node.args[_GEOMETRY] == "" or _is_cuda_conv(node):
        return True
    codes, zero_point = _example(node.args[AT_CODES]), _example(node.args[_WEIGHT_ZERO_POINT])
    function, settings = _function_of(str(node.args[_GEOMETRY]))
    if codes is None or function is not conv:
        return False
    if brgemm.float8_for(codes, settings["groups"]) is not None:
        return True
    stride, _, dilation = geometry_of(codes.shape[2:], *(settings[name] for name in Geometry._fields))
    y, of_weight = _example(node), (codes, zero_point, stride, dilation, settings["groups"])
    return y is not None and convolution_for(y.numel() // codes.shape[0], *of_weight) is brgemm


def _is_cuda_conv(node: fx.Node) -> bool:
    """Whether a node is a convolution on CUDA, not a transposed one."""
    if node.target is not _PRODUCT or _function_of(str(node.args[_GEOMETRY]))[0] is not conv:
        return False
    codes = _example(node.args[AT_CODES])
    return codes is not None and codes.is_cuda


def _may_read(node: fx.Node) -> bool:
    """Whether what multiplies may read what its codes are made of: a convolution on CUDA, or `brgemm`, if it takes the
    weight; whether it does for a size is not known. No transposed convolution."""
    codes = _example(node.args[AT_CODES]) if node.target is _PRODUCT else None
    if codes is None or _function_of(str(node.args[_GEOMETRY]))[0] is conv_transpose:
        return False
    return _is_cuda_conv(node) or brgemm.supports(codes, None) or brgemm.float8_for(codes) is not None


def _reads_real(node: fx.Node, x: fx.Node) -> bool:
    """Whether a convolution on CUDA would read what its codes are made of."""
    value, codes = _example(x), _example(node.args[AT_CODES])
    _, settings = _function_of(str(node.args[_GEOMETRY]))
    return value is not None and codes is not None and reads_real(value, codes, settings["stride"], settings["groups"])


def _is_channels_last(producer: fx.Node, x: fx.Node) -> bool:
    """Whether a value of the shape of a convolution's result lies as kernels write that, so that none copies it."""
    y, codes = _example(x), _example(producer.args[AT_CODES])
    return y is not None and codes is not None and always(y.stride(y.ndim - codes.ndim + 1) == 1)


def _alike(x: object, y: object) -> bool:
    """Whether two nodes are known to be tensors of one shape, layout and dtype."""
    a, b = _example(x), _example(y)
    return (
        a is not None
        and b is not None
        and a.dtype is b.dtype
        and a.ndim == b.ndim
        and all(always(m == n) for m, n in zip((*a.shape, *a.stride()), (*b.shape, *b.stride()), strict=True))
    )


def _example(node: object) -> Tensor | None:
    """Return the fake tensor that Dynamo noted for a node; None: it is no tensor, or not known."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _memory(node: fx.Node) -> int | None:
    """Return what fake memory a node's tensor is in, which is that of all that share its memory; None: not known."""
    from torch._subclasses.fake_tensor import FakeTensor  # imports sympy

    value = _example(node)
    if not isinstance(value, FakeTensor) or value.layout is not torch.strided:
        return None  # others are made of several tensors
    memory: int = value.untyped_storage()._cdata
    return memory


def _activation(node: fx.Node) -> str | None:
    """Return which of `ACTIVATIONS` a node computes of its first argument; None: another function."""
    if "out" in node.kwargs:
        return None
    if node.target is F.gelu:
        return "gelu_tanh" if _argument(node, "approximate", 1) == "tanh" else "gelu"
    if node.target is F.hardtanh:  # as torch.nn.ReLU6 calls it
        ends = _argument(node, "min_val", 1), _argument(node, "max_val", 2)
        return "relu6" if ends == (0, 6) else None
    if node.target in (F.pad, torch._C._nn.pad):  # Dynamo notes the latter
        widths = _argument(node, "pad", 1)
        return "none" if isinstance(widths, Sequence) and all(width == 0 for width in widths) else None
    if node.target in _DROPOUTS:
        return None if _argument(node, "training", 2) is not False else "none"
    return _ACTIVATION_OF.get(node.target)


def _argument(node: fx.Node, name: str, position: int) -> object:
    return node.kwargs.get(name, node.args[position] if len(node.args) > position else None)


_IN_PLACE = frozenset(
    name[2:-2]
    for kind in (operator, Tensor)
    for name in dir(kind)
    if name.startswith("__i") and hasattr(kind, f"__{name[3:]}")
)
"""`iadd`, `iand` and the like: what `operator` and a tensor have with an `i` in front, and without."""


def _writes(node: fx.Node) -> bool:
    """Whether a node may write to a tensor that was there before; also where that cannot be told."""
    target = node.target
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if isinstance(target, torch._ops.OpOverload):
        return _mutates(target)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(_mutates(getattr(target, name)) for name in target.overloads())  # type: ignore[no-untyped-call]
    if node.op == "call_module" or isinstance(target, torch._ops.HigherOrderOperator):
        return True
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    module = getattr(target, "__module__", None) or "torch"
    # Dynamo has functions of its own for those of numpy, and for what it is told not to trace.
    if module.partition(".")[0] not in ("torch", "_operator", "builtins", "math") or module.startswith("torch._dynamo"):
        return True  # somebody's own
    of = _arguments(node).get
    statistics = of("running_mean") is not None and of("training", of("use_input_stats")) is not False
    if of("out") is not None or of("inplace") or of("max_norm") is not None or statistics:
        return True
    bare = name[2:-2] if name.startswith("__") else name
    if bare in _IN_PLACE or bare in ("setitem", "delitem") or bare.endswith("_"):
        return True
    if inspect.isfunction(target):
        return False
    # What torch has built in is an operator, or several, by the same name; what it writes but for `out` is no option.
    packet = getattr(torch.ops.aten, name, None)
    names = packet.overloads() if isinstance(packet, torch._ops.OpOverloadPacket) else []  # type: ignore[no-untyped-call]
    schemas = [getattr(packet, each)._schema for each in names]
    return _tracks(name) or any(_is_written(argument) for schema in schemas for argument in schema.arguments)


def _mutates(op: torch._ops.OpOverload) -> bool:
    """Whether an operator says that it writes, or does and says nothing: collectives, and norms with statistics."""
    name = op._schema.name.rpartition(":")[2]
    return op._schema.is_mutable or name.endswith("_") or (op.namespace == "aten" and _tracks(name))


def _tracks(name: str) -> bool:
    """Whether a function of torch may write to statistics, which it takes by position and no schema tells."""
    return "batch_norm" in name or "instance_norm" in name


def _is_written(argument: Any) -> bool:
    """Whether a function always writes to an argument: a tensor that is no `out`."""
    of_tensor = argument.type.kind() in ("TensorType", "OptionalType")
    return of_tensor and argument.is_write and not (argument.is_out or argument.kwarg_only)


def _arguments(node: fx.Node) -> Mapping[str, Any]:
    """Return the arguments of a call by their names; of what is built in, those that are given by name."""
    if not inspect.isfunction(node.target):
        return node.kwargs
    arguments = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    arguments.apply_defaults()
    return arguments.arguments
