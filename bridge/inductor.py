"""Layers that hand codes on: the pass where Inductor looks for it, and a look at what it finds."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import torch._dynamo
from torch import fx, nn
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

from bridge.arguments import check_module
from bridge.observed import Observed
from bridge.swapping import choose_paths, module_names
from functional_sq import backends
from functional_sq.chains import AT_CODES, hand_on
from functional_sq.tracing import asked_once

__all__ = ["Chain", "HandOn", "capture", "chains", "install", "uncompiled"]


class HandOn(CustomGraphPass):
    """`functional_sq.chains.hand_on` as a pass over the graphs that Inductor compiles.

    Args:
        first: a pass that was set before; it runs first.
    """

    def __init__(self, first: Any = None) -> None:
        self.first = first

    def __call__(self, graph: fx.Graph) -> None:
        if self.first is not None:
            self.first(graph)
        hand_on(graph)

    def uuid(self) -> Any:
        """Name what a graph becomes, for Inductor's caches on disk; None: not cached."""
        ours = backends.sources()  # what backends choose by is in each node: `known_by`
        if self.first is None:
            return ours
        theirs = self.first.uuid() if isinstance(self.first, CustomGraphPass) else None
        return None if theirs is None else (theirs, ours)


@asked_once  # by Dynamo while it captures a layer, just before the pass is looked for
def install(device: str) -> str:
    """Set the pass, after one that is set already. A list of passes, which newer versions take, gets it at its end.

    Called for each layer that is captured, as others may set theirs at any time.

    Args:
        device: type of the device that the layer is on.

    Returns:
        `backends.fingerprint(device)`: no pass is told of a device, and torch 2.11 asks none for its name.

    Example:
        >>> from torch._inductor import config
        >>> from bridge import inductor
        >>> _ = inductor.install("cpu")
        >>> isinstance(config.pre_grad_custom_pass, inductor.HandOn)
        True
    """
    known = config.pre_grad_custom_pass
    if isinstance(known, (list, tuple)):
        if not any(isinstance(each, HandOn) for each in known):
            config.pre_grad_custom_pass = [*known, HandOn()]
    elif not isinstance(known, HandOn):
        config.pre_grad_custom_pass = HandOn(known)
    return backends.fingerprint(device)


@dataclass(frozen=True)
class Chain:
    """A layer that makes the codes of the next ones, where it is compiled.

    Attributes:
        producer: name of the layer.
        activation: what it applies before; a key of `functional_sq.ACTIVATIONS`.
        consumers: names of the layers that multiply the codes.

    Example: see `chains`.
    """

    producer: str
    activation: str
    consumers: tuple[str, ...]

    @property
    def to(self) -> str:
        """What the codes go to: `"gelu encoder.1.fc2"`."""
        through = "" if self.activation == "none" else f"{self.activation} "
        return f"{through}{', '.join(self.consumers)}"

    def __str__(self) -> str:
        return f"{self.producer} -> {self.to}"


def chains(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Chain, ...]:
    """Say which layers of a converted model hand codes on once it is compiled.

    The model is captured as `torch.compile` captures it for these arguments, and runs eagerly.

    Args:
        model: a model with quantized layers, in evaluation mode.
        args, kwargs: what it is called with.

    Returns:
        a Chain for each layer that hands on, in the order in which they run.

    Raises:
        TypeError: `model` is no module.
        ValueError: the model has observers, which would record this call.

    Example:
        >>> import torch, bridge
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8)).eval()
        >>> _ = bridge.prepare_(model, bridge.StaticQuantConfig(torch.int8))
        >>> _ = bridge.calibrate(model, torch.randn(3, 16, 8))
        >>> _ = bridge.convert_(model)
        >>> print(*bridge.chains(model, torch.randn(16, 8)))
        0 -> gelu 2
    """
    check_module(model)
    names = module_names(model)
    if observed := [name for module, name in names.items() if isinstance(module, Observed)]:
        raise ValueError(f"{observed[0]} has observers, which would record this call; call convert_(model) first")
    choose_paths(model)
    plain = uncompiled(model)
    return capture(lambda: plain(*args, **kwargs), names)


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model that `torch.compile` was given, whose compiled code would keep `capture` from its graphs."""
    return getattr(model, "_orig_mod", model)


def capture(run: Callable[[], object], names: Mapping[nn.Module, str]) -> tuple[Chain, ...]:
    """Return which layers hand codes on in what `run()` computes, compiled; `names` are those of the layers."""
    # Dynamo notes the identity of the modules that a node is from, but for one that is called as layer.forward(x).
    known = {str(id(module)): name for module, name in names.items()}
    owners: dict[int, list[str]] = defaultdict(list)
    for module, owner in names.items():
        for buffer in module.buffers(recurse=False):
            owners[id(buffer)].append(owner)
    found: list[Chain] = []

    def backend(graph: fx.GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
        for target in dict.fromkeys(str(node.target) for node in graph.graph.find_nodes(op="get_attr")):
            inner = getattr(graph, target, None)
            if isinstance(inner, fx.GraphModule):  # a region, or a branch: what goes into it is not known
                backend(inner, ())
        changed, copies = fx.Graph(), dict[Any, fx.Node]()
        changed.output(changed.graph_copy(graph.graph, copies))
        taken = (copies[node] for node in graph.graph.find_nodes(op="placeholder"))
        values: dict[Any, object] = dict(zip(taken, inputs, strict=bool(inputs)))

        def name(node: fx.Node) -> str:
            caller = known[next(reversed(node.meta["nn_module_stack"])).partition("@")[0]]
            holding = owners.get(id(values.get(node.args[AT_CODES])), [caller])
            return caller if caller in holding else holding[0]

        for link in hand_on(changed):
            found.append(Chain(name(link.producer), link.activation, tuple(map(name, link.consumers))))
        return graph.forward

    # However often this runs, it sees a graph, and code that a user compiles has its own count of compilations.
    unlimited = {"recompile_limit": sys.maxsize, "accumulated_recompile_limit": sys.maxsize}
    apart = {"isolate_recompiles": True} if "isolate_recompiles" in signature(torch.compile).parameters else {}
    # A stance that the caller set would keep it from compiling.
    with torch.no_grad(), torch.compiler.set_stance("default"), torch._dynamo.config.patch(unlimited):
        torch.compile(run, backend=backend, **apart)()  # type: ignore[call-overload]
    return tuple(found)
