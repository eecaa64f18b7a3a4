"""Calibration of a prepared model: batches run through it, and what was recorded is saved, taken up and merged."""

from __future__ import annotations

import hashlib
import itertools
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import functional_sq as fsq
from bridge.arguments import check_counts, check_function, check_module
from bridge.batches import call, check_batches, check_fitted, mask_of
from bridge.buffers import write
from bridge.checks import check_memory, listed, observed_layers
from bridge.observed import Observed, weight_of
from bridge.observer import ObserverModule
from bridge.swapping import choose_paths, public_name
from functional_sq import serialize
from functional_sq.distributed import all_merge

__all__ = ["calibrate"]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    mask: Callable[[Any], Tensor | None] | None = None,
    max_batches: int | None = None,
    until_stable: float | None = None,
    window: int = 8,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: int = 64,
    group: dist.ProcessGroup | None = None,
) -> int:
    """Run batches through a prepared model, without gradients, so that its observers record them.

    A batch is recorded whole or not at all: if the model raises, or the user interrupts, the
    observers hold what the batches before it gave. A progress bar is shown on a terminal where tqdm
    is installed.

    Where `torch.distributed` is initialised, each rank runs its own batches, perhaps none, and at
    the end every rank has the record of all of them, in the same bits as one process. Of what was
    recorded before, that of rank 0 counts.

    Args:
        model: a prepared model in eval mode.
        batches: each a tensor, a tuple or list of positional arguments, or a mapping of keyword
            arguments.
        mask: `batch -> bool tensor`, True where a position counts, for inputs whose leading axes
            have the mask's shape, or its axes flattened into one; or None, for a batch without
            padding. Default: a batch's own `attention_mask`, if it has one; where `decoder_input_ids`, or
            the `labels` of an encoder-decoder, have its shape, the positions of either sequence. Other
            inputs (pooled ones, or images with another number of tokens) are recorded whole; where a model takes
            images of as many tokens as its texts, give `lambda batch: None`.
        max_batches: stop after so many, those of the checkpoint included.
        until_stable: stop when in the last `window` batches no layer's scale moved by more than this
            share of itself, and no zero point by more than this share of the codes. Where the
            batches end before that, a warning says which layers still moved.
        window: batches that `until_stable` looks back on.
        checkpoint: a file. What was recorded is saved to it after every `save_every` batches, at the
            end, and on an interruption; if the file is there, its record is taken and as many batches
            are skipped as it has seen. The same batches, in the same order, so give the same bits as
            one run. A record of layers with other weights is refused. With several ranks each has a file
            of its own, `checkpoint` with `.rank0of2` added: another number of them starts anew, as each skips what it
            has seen of its own batches.
        save_every: batches between two savings.
        group: ranks to merge; default: all.

    Returns:
        the number of batches that the record holds, of this rank.

    Raises:
        ValueError: there are no batches; the model is not prepared, or not in eval mode; an observer of your own was
            made without a shape; the checkpoint is of other layers or weights; `mask` gives positions that no layer's
            input has; an argument is outside its range; this rank is not in `group`.
        TypeError: an observer whose states do not merge (a moving average), with several ranks;
            `mask` gives no bool tensor.

    Example:
        >>> import torch, bridge
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4)).eval()
        >>> _ = bridge.prepare_(model, bridge.StaticQuantConfig(torch.int8))
        >>> bridge.calibrate(model, torch.randn(3, 16, 8))
        3
    """
    check_module(model)
    check_memory(model)
    choose_paths(model)
    observers = _observers(model)
    rank, ranks = _rank(group)
    _check_calibration(model, observers, max_batches, until_stable, window, save_every, ranks)
    check_batches(batches)
    check_function("mask", mask, "a batch to a bool tensor")
    file = None if checkpoint is None else _Checkpoint(_rank_path(Path(checkpoint), rank, ranks), model, observers)
    record, aside = _start(observers, None if file is None else file.load(), rank)
    done = record.batches
    stability = None if until_stable is None else _Stability(observers, until_stable, window, record.recent)
    if stability is not None and stability.reached():
        return done
    try:
        # Not in inference mode: what the model makes and keeps, a cache or a table of angles, would stay unusable.
        with torch.no_grad(), _own_buffers(model):
            for batch in _progress(itertools.islice(batches, done, max_batches), done, max_batches):
                _observe(model, observers, batch, mask)
                recent = () if stability is None else stability.look()
                record = _Record(record.batches + 1, _states(observers), recent)
                if file is not None and record.batches % save_every == 0:
                    file.save(record)
                if stability is not None and stability.reached():
                    break
    except BaseException:
        _restore(observers, record.states if aside is None else _merged(observers, aside, record.states))
        if file is not None:
            file.save(record)
        raise
    if file is not None and record.batches > done:
        file.save(record)
    if ranks > 1:
        all_ranks = {name: all_merge(o.spec, record.states[name], group=group) for name, o in observers.items()}
        _restore(observers, all_ranks)
    elif record.batches == 0:
        raise ValueError("there were no batches to calibrate with; give at least one (an iterator is used up once)")
    if stability is not None:
        stability.warn()
    return record.batches


def _observers(model: nn.Module) -> dict[str, ObserverModule]:
    """Return the observers that data reaches, by name; a weight is observed when it is converted."""
    weights = {id(module.weight_obs) for module in model.modules() if isinstance(module, Observed)}
    return {
        public_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, ObserverModule) and id(module) not in weights
    }


def _check_calibration(
    model: nn.Module,
    observers: Mapping[str, ObserverModule],
    max_batches: int | None,
    until_stable: float | None,
    window: int,
    save_every: int,
    ranks: int,
) -> None:
    if not observers:
        raise ValueError(f"{type(model).__name__} has no observers; call prepare_(model, config) first")
    if shapeless := [name for name, observer in observers.items() if not observer.state]:
        raise ValueError(
            f"{shapeless[0]} takes its shape from the first tensor, so there is no record to go back to, to save or to "
            f"merge; give it a shape: ObserverModule(spec, shape)"
        )
    if any(module.training for module in model.modules()):
        raise ValueError(
            "the model is in training mode, in which dropout and batch norm change what is recorded; "
            "call model.eval() first"
        )
    check_counts(window=window, save_every=save_every, **({} if max_batches is None else {"max_batches": max_batches}))
    if until_stable is not None:
        if not isinstance(until_stable, (int, float)) or not 0 < until_stable < 1:
            raise ValueError(f"until_stable={until_stable!r}; it is a share between 0 and 1, such as 0.01")
        if ranks > 1:
            raise ValueError(
                "until_stable with several ranks: each would stop at another batch; use max_batches, or one rank"
            )
    if ranks > 1:
        for observer in observers.values():
            observer.spec.observer.merge(observer.state, observer.state)  # the TypeError of a moving average


def _rank(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return which rank of `group` this is, and of how many."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("this rank is not in the group; call calibrate on the ranks of the group only")
    return rank, dist.get_world_size(group)


def _rank_path(path: Path, rank: int, ranks: int) -> Path:
    return path if ranks == 1 else path.with_name(f"{path.name}.rank{rank}of{ranks}")


def _start(observers: Mapping[str, ObserverModule], saved: _Record | None, rank: int) -> tuple[_Record, _States | None]:
    """Put the record to go on from into the observers; return it, and the states that were set aside for it, if any.

    The first rank alone goes on from what was there already; the others set it aside, so that it is not counted once a
    rank.
    """
    if saved is not None:
        _restore(observers, saved.states)
        return saved, None
    aside = None
    if rank > 0:
        aside = _states(observers)
        _restore(observers, {name: observer.empty_state() for name, observer in observers.items()})
    return _Record(0, _states(observers), ()), aside


def _observe(
    model: nn.Module,
    observers: Mapping[str, ObserverModule],
    batch: Any,
    mask: Callable[[Any], Tensor | None] | None,
) -> None:
    """Run a batch through the model, so that observers record the positions that count."""
    keep = mask_of(model, batch, mask)
    with _masked(observers.values(), keep):
        call(model, batch)
    if mask is not None:
        check_fitted(keep, any(observer.masked for observer in observers.values()))


def _progress(batches: Iterator[Any], done: int, total: int | None) -> Iterable[Any]:
    """Show a bar on a terminal, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return batches
    bar: Iterable[Any] = tqdm(batches, "calibrate", total, initial=done, unit="batch", disable=None)
    return bar


@contextmanager
def _masked(observers: Iterable[ObserverModule], mask: Tensor | None) -> Iterator[None]:
    for observer in observers:
        observer.mask, observer.masked = mask, False
    try:
        yield
    finally:
        for observer in observers:
            observer.mask = None


@contextmanager
def _own_buffers(model: nn.Module) -> Iterator[None]:
    """Keep what each rank records its own: DistributedDataParallel copies the first rank's buffers before each call."""
    wrappers = [
        m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel) and m.broadcast_buffers
    ]
    try:
        for wrapper in wrappers:
            wrapper.broadcast_buffers = False
        yield
    finally:
        for wrapper in wrappers:
            wrapper.broadcast_buffers = True


# What is recorded, saved and taken up again.

_States = dict[str, fsq.State]


class _Record(NamedTuple):
    """So many batches, what observers saw in them, and the qparams after each of the last ones, if someone asks."""

    batches: int
    states: _States
    recent: tuple[list[fsq.QParams], ...]


def _states(observers: Mapping[str, ObserverModule]) -> _States:
    return {name: {k: v.clone() for k, v in observer.state.items()} for name, observer in observers.items()}


def _merged(observers: Mapping[str, ObserverModule], a: _States, b: _States) -> _States:
    return {name: fsq.merge(observer.spec, a[name], b[name]) for name, observer in observers.items()}


def _restore(observers: Mapping[str, ObserverModule], states: _States) -> None:
    for name, state in states.items():
        write(observers[name], state)


class _Checkpoint:
    """The file that a calibration is saved to and goes on from: a calibration, and numbers under names of no observer.

    Args:
        path: where it is.
        model: by whose weights the file is known again.
        observers: whose states it holds.

    Raises:
        FileNotFoundError: there is no folder for it; now, not when the first batches have run.
        TypeError: a spec has no JSON.
    """

    NUMBERS: Final = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=fsq.Fixed(0.0, 0.0))
    """Integers are the `count` of a state of this."""
    BATCHES: Final = ""
    WEIGHTS: Final = ".weights"
    RECENT: Final = ".recent."
    """And an observer's name: scales and zero points after each of the last batches, as bits of float64."""

    def __init__(self, path: Path, model: nn.Module, observers: Mapping[str, ObserverModule]) -> None:
        folder = path.absolute().parent
        if not folder.is_dir():
            raise FileNotFoundError(f"checkpoint={str(path)!r}: there is no folder {folder}; make it first")
        for observer in observers.values():
            serialize.spec_to_json(observer.spec)
        self.path, self.observers, self.weights = path, observers, _fingerprint(model)

    def save(self, record: _Record) -> None:
        numbers = {self.BATCHES: torch.tensor([record.batches]), self.WEIGHTS: torch.tensor([self.weights])}
        for name, over_time in zip(self.observers, zip(*record.recent, strict=True), strict=False):
            values = torch.stack([torch.stack([value.double() for value in qp]) for qp in over_time])
            numbers[self.RECENT + name] = values.view(torch.int64)
        states = {name: (observer.spec, record.states[name]) for name, observer in self.observers.items()}
        serialize.save(self.path, {k: (self.NUMBERS, {"count": v}) for k, v in numbers.items()} | states)

    def load(self) -> _Record | None:
        """Return what the file holds; None if there is none, ValueError if it is of another calibration."""
        if not self.path.exists():
            return None
        specs = {name: observer.spec for name, observer in self.observers.items()}
        own = {kind for spec in specs.values() for kind in serialize.own_classes(spec)}
        saved = serialize.load(self.path, classes=own)
        names = self.BATCHES, self.WEIGHTS, *(self.RECENT + name for name in specs)
        numbers = {name: saved.pop(name)[1]["count"] for name in names if name in saved}
        found = {name: spec for name, (spec, _) in saved.items()}
        differ = sorted(name for name in found.keys() | specs.keys() if found.get(name) != specs.get(name))
        fault = None
        if differ:
            fault = f"{', '.join(differ[:8])} differ{'...' if differ[8:] else ''}"
        elif not {self.BATCHES, self.WEIGHTS} <= numbers.keys():
            fault = "it counts no batches"
        elif int(numbers[self.WEIGHTS]) != self.weights:
            fault = "the layers had other weights"
        if fault is not None:
            raise ValueError(
                f"{self.path} is no checkpoint of this calibration: {fault}; "
                f"use the model and the config that it was made with, or another file"
            )
        recent = [numbers[self.RECENT + name].view(torch.float64) for name in specs if self.RECENT + name in numbers]
        over_time = zip(*([fsq.QParams(*qp) for qp in values] for values in recent), strict=True)
        states = {name: state for name, (_, state) in saved.items()}
        return _Record(int(numbers[self.BATCHES]), states, tuple(map(list, over_time)))


def _fingerprint(model: nn.Module) -> int:
    """Return a number by which the weights of observed layers are known again: their bits are added up, exactly."""
    digest = hashlib.sha256()
    for name, module in observed_layers(model).items():
        w = weight_of(module).detach()
        bits = w.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[w.itemsize])
        total = None if w.is_meta else int(bits.sum(dtype=torch.int64))
        digest.update(f"{name} {w.dtype} {tuple(w.shape)} {total}\n".encode())
    return int.from_bytes(digest.digest()[:8], "little", signed=True)


class _Stability:
    """How far the qparams of each layer moved within the last batches; `recent` are those of batches before."""

    def __init__(
        self,
        observers: Mapping[str, ObserverModule],
        tolerance: float,
        window: int,
        recent: tuple[list[fsq.QParams], ...],
    ) -> None:
        self.observers, self.tolerance = observers, tolerance
        self.last: deque[list[fsq.QParams]] = deque(recent, maxlen=window + 1)
        self.moving: dict[str, float] = {}

    def look(self) -> tuple[list[fsq.QParams], ...]:
        """Take note of the qparams of now; return those of the last batches."""
        self.last.append([fsq.calc_qparams(o.spec, o.state) for o in self.observers.values()])
        return tuple(self.last)

    def reached(self) -> bool:
        """Say whether none moved by more than the tolerance."""
        self.moving = {}
        for (name, observer), over_time in zip(self.observers.items(), zip(*self.last, strict=True), strict=False):
            scales = torch.stack([qp.scale.double() for qp in over_time])
            points = torch.stack([qp.zero_point.double() for qp in over_time])
            low, high = observer.spec.bounds
            moved = max(
                float((scales.amax(0) / scales.amin(0) - 1).max()),
                float((points.amax(0) - points.amin(0)).max()) / (high - low),
            )
            if not moved <= self.tolerance:
                self.moving[name] = moved
        return len(self.last) == self.last.maxlen and not self.moving

    def warn(self) -> None:
        """Warn if the batches ended before the qparams stood still."""
        if len(self.last) < (self.last.maxlen or 0):
            seen, needed = len(self.last), self.last.maxlen
            warnings.warn(f"until_stable: {seen} batches ran, at least {needed} are needed to tell", stacklevel=3)
        elif self.moving:
            worst = dict(sorted(self.moving.items(), key=lambda item: -item[1])[:8])
            shares = listed({name: f"{100 * moved:.2g} %" for name, moved in worst.items()})
            warnings.warn(
                f"until_stable={self.tolerance}: {len(self.moving)} observers still moved in the last "
                f"{len(self.last) - 1} batches, most of all\n{shares}",
                stacklevel=3,
            )
