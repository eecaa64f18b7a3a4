"""calibrate: what is recorded, when it stops, what is saved, and what a failure leaves behind."""

from __future__ import annotations

import collections
import dataclasses
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import bridge
import functional_sq as fsq
from bridge import PRESETS, StaticQuantConfig
from functional_sq import serialize

HISTOGRAM = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=fsq.Histogram())


def net(config: StaticQuantConfig = PRESETS["int8"]) -> nn.Module:
    """Return a prepared model, the same at each call."""
    torch.manual_seed(0)
    return bridge.prepare_(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval(), config)


def data(n: int = 7) -> Tensor:
    """Return batches whose range grows now and then."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 5, 16, generator=generator) * torch.linspace(1, 2, n)[:, None, None]


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers() if ".act_obs." in name}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def whole(n: int = 7, config: StaticQuantConfig = PRESETS["int8"]) -> dict[str, Tensor]:
    model = net(config)
    bridge.calibrate(model, data(n))
    return states(model)


# --- batches, masks, modes -------------------------------------------------------------------------


class BatchEncoding(collections.UserDict):
    """A mapping that is no dict, as Hugging Face's tokenizers return."""


class Tokens(nn.Module):
    """Flattens its tokens before the second layer and pools before the third, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.flat, self.pooled = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        self.token(x)
        self.flat(x.flatten(0, 1))
        return self.pooled(x.mean(1))


def test_padding_is_left_out_of_tokens_flattened_too_and_pooled_inputs_are_recorded_whole() -> None:
    keep = torch.tensor([[1, 1, 0], [1, 0, 0]])
    x = torch.where(keep[..., None] == 1, 1.0, 99.0).expand(2, 3, 4)
    model = bridge.prepare_(Tokens().eval(), PRESETS["int8"])
    bridge.calibrate(model, [BatchEncoding(x=x, attention_mask=keep)])
    found = {name: layer.act_obs.state for name, layer in model.named_children()}
    assert {name: int(s["count"]) for name, s in found.items()} == {"token": 12, "flat": 12, "pooled": 8}
    assert {name: float(s["max"]) for name, s in found.items()}["token"] == 1.0
    assert float(found["flat"]["max"]) == 1.0
    assert float(found["pooled"]["max"]) > 1.0


def test_a_model_in_training_mode_is_refused_also_where_one_module_is() -> None:
    model = net()
    model[1].train()
    with pytest.raises(ValueError, match=r"training mode.*call model\.eval\(\) first"):
        bridge.calibrate(model, data())
    assert_same(states(model), states(net()))


def test_no_bar_is_shown_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bridge.calibrate(net(), data())
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_shown_on_a_terminal_and_counts_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bridge.calibrate(net(), data(5), max_batches=3)
    shown = terminal.getvalue()
    assert "calibrate" in shown
    assert "3/3" in shown


def test_without_tqdm_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert bridge.calibrate(net(), data(2)) == 2


# --- failures and checkpoints ----------------------------------------------------------------------


def failing(n: int, error: BaseException) -> Iterator[Tensor]:
    """Yield `n` batches, then fail."""
    yield from data()[:n]
    raise error


class Stops(nn.Module):
    """Fails in the middle of the fourth batch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.inner[0](x)
        if self.calls == 4:
            raise KeyboardInterrupt
        return self.inner[2](self.inner[1](hidden))


def test_a_batch_is_recorded_whole_or_not_at_all(tmp_path: Path) -> None:
    model, path = Stops(net()).eval(), tmp_path / "c.safetensors"
    with pytest.raises(KeyboardInterrupt):
        bridge.calibrate(model, data(), checkpoint=path)
    assert_same(states(model.inner), first(3))
    assert int(serialize.load(path)[""][1]["count"]) == 3


def first(n: int) -> dict[str, Tensor]:
    """Return what the first `n` batches of seven give."""
    model = net()
    bridge.calibrate(model, data(), max_batches=n)
    return states(model)


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("observer", [fsq.MinMax(), fsq.Histogram(), fsq.MovingAverage(0.1)], ids=repr)
def test_an_interrupted_calibration_goes_on_to_the_same_bits(
    tmp_path: Path, observer: fsq.Observer, error: BaseException
) -> None:
    config = StaticQuantConfig(torch.int8, activation=fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=observer))
    path = tmp_path / "calibration.safetensors"
    with pytest.raises(type(error)):
        bridge.calibrate(net(config), failing(4, error), checkpoint=path)
    model = net(config)
    assert bridge.calibrate(model, data(), checkpoint=path) == 7
    assert_same(states(model), whole(config=config))
    assert os.listdir(tmp_path) == ["calibration.safetensors"]


def steady() -> Iterator[Tensor]:
    """Yield batches that soon tell nothing new."""
    yield from data(40).clamp(-1.5, 1.5)


def test_a_calibration_that_is_cut_stops_where_the_whole_one_stops(tmp_path: Path) -> None:
    model = net()
    stopped = bridge.calibrate(model, steady(), until_stable=0.02, window=5)
    assert 6 < stopped < 30
    for cut in (1, stopped - 2, stopped - 1, stopped):
        path = tmp_path / f"{cut}.safetensors"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it did not stand still so early
            bridge.calibrate(net(), steady(), until_stable=0.02, window=5, max_batches=cut, checkpoint=path)
        resumed = net()
        assert bridge.calibrate(resumed, steady(), until_stable=0.02, window=5, checkpoint=path) == stopped
        assert_same(states(resumed), states(model))


def test_a_finished_checkpoint_is_taken_whole_and_no_batch_runs_again(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    bridge.calibrate(net(), data(), checkpoint=path)
    written = path.read_bytes()
    model = net()
    assert bridge.calibrate(model, data(), checkpoint=path) == 7
    assert_same(states(model), whole())
    assert path.read_bytes() == written


def test_a_checkpoint_is_a_calibration_that_serialize_reads(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    model = net(StaticQuantConfig(torch.int8, activation=HISTOGRAM))
    bridge.calibrate(model, data(), checkpoint=path)
    saved = serialize.load(path)
    assert saved.keys() == {"", ".weights", "0.act_obs", "2.act_obs"}
    assert int(saved[""][1]["count"]) == 7
    spec, state = saved["0.act_obs"]
    assert spec == HISTOGRAM
    assert all(torch.equal(value, model[0].act_obs.state[name]) for name, value in state.items())


def test_every_nth_batch_is_saved(tmp_path: Path) -> None:
    path, seen = tmp_path / "c.safetensors", []

    def watched() -> Iterator[Tensor]:
        for batch in data():
            seen.append(int(serialize.load(path)[""][1]["count"]) if path.exists() else 0)
            yield batch

    bridge.calibrate(net(), watched(), checkpoint=path, save_every=3)
    assert seen == [0, 0, 0, 3, 3, 3, 6]
    assert int(serialize.load(path)[""][1]["count"]) == 7


KILLED = """
import os, signal, sys, torch
sys.path.insert(0, {tests!r})
from test_calibrate import data, net
import bridge

def batches():
    for i, batch in enumerate(data()):
        if i == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch

bridge.calibrate(net(), batches(), checkpoint={path!r}, save_every=2)
"""


def test_a_killed_process_loses_the_batches_since_the_last_saving_and_the_next_gives_the_same_bits(
    tmp_path: Path,
) -> None:
    path = tmp_path / "c.safetensors"
    code = KILLED.format(tests=str(Path(__file__).parent), path=str(path))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert int(serialize.load(path)[""][1]["count"]) == 4
    model = net()
    assert bridge.calibrate(model, data(), checkpoint=path) == 7
    assert_same(states(model), whole())


def trained(model: nn.Module) -> nn.Module:
    """Return the model with one bit of one weight changed."""
    with torch.no_grad():
        weight = model[2].weight.view(torch.int32)
        weight[0, 0] ^= 1
    return model


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: net(PRESETS["uint8"]),
            r"is no checkpoint of this calibration: 0\.act_obs, 2\.act_obs differ; use the",
        ),
        (
            lambda: bridge.prepare_(nn.Sequential(nn.Linear(16, 8)).eval(), PRESETS["int8"]),
            r"is no checkpoint of this calibration: 2\.act_obs differ",
        ),
        (lambda: trained(net()), r"is no checkpoint of this calibration: the layers had other weights; use the"),
        (
            lambda: bridge.prepare_(
                nn.Sequential(nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 4)).eval(), PRESETS["int8"]
            ),
            "the layers had other weights",
        ),
    ],
    ids=["config", "model", "weights", "sizes"],
)
def test_a_checkpoint_of_something_else_is_refused_and_nothing_is_changed(
    tmp_path: Path, other: Callable[[], nn.Module], message: str
) -> None:
    path = tmp_path / "c.safetensors"
    bridge.calibrate(net(), data(), checkpoint=path)
    written, model = path.read_bytes(), other()
    before = states(model)
    with pytest.raises(ValueError, match=message):
        bridge.calibrate(model, data(), checkpoint=path)
    assert_same(states(model), before)
    assert path.read_bytes() == written


@dataclasses.dataclass(frozen=True)
class Holds(fsq.MinMax):
    value: object = None


def test_a_class_of_the_users_own_within_another_is_taken_up(tmp_path: Path) -> None:
    spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=fsq.SkipNonfinite(Holds((Holds(1),))))
    for _ in range(2):
        model = net(StaticQuantConfig(torch.int8, activation=spec))
        assert bridge.calibrate(model, data(), checkpoint=tmp_path / "c.safetensors") == 7


def test_an_observer_that_cannot_be_saved_is_refused_before_a_batch_runs(tmp_path: Path) -> None:
    spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=Holds(1j))
    model = net(StaticQuantConfig(torch.int8, activation=spec))
    with pytest.raises(TypeError, match=r"observer\.value=1j has no JSON"):
        bridge.calibrate(model, failing(0, AssertionError()), checkpoint=tmp_path / "c.safetensors")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("saved", [False, True], ids=["of the float model", "of a prepared one"])
def test_a_model_that_gets_its_memory_late_takes_up_a_checkpoint(tmp_path: Path, saved: bool) -> None:
    path = tmp_path / "c.safetensors"
    other = net()
    bridge.calibrate(other, data(), checkpoint=path, max_batches=3)
    with torch.device("meta"):
        model = net()
    weights = {name: value for name, value in other.state_dict().items() if saved or "_obs." not in name}
    for refused in (lambda: bridge.calibrate(model, data()), lambda: bridge.convert_(model), lambda: report(model)):
        with pytest.raises(
            ValueError, match="2 layers of the model, such as '0', are on the device meta, which holds no"
        ):
            refused()
    model.load_state_dict(weights, assign=True)
    if saved:
        assert_same(states(model), states(other))
    model.to(torch.float32)
    assert bridge.calibrate(model, data(), checkpoint=path) == 7
    assert_same(states(model), whole())
    with pytest.raises(RuntimeError):
        bridge.calibrate(model, [torch.ones(2, 3)])
    assert_same(states(model), whole())
    assert report(model).batches == 7


def report(model: nn.Module) -> bridge.Report:
    return bridge.report(model, data(), rank=None)


class Rope(nn.Module):
    """Keeps what it made in the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0, 1, 16).cos()
        self.table += 0
        return x * self.table


def test_what_a_model_keeps_of_a_calibration_can_be_used_in_training() -> None:
    for last in (lambda m: bridge.calibrate(m, data()), lambda m: bridge.report(m, data())):
        model = bridge.prepare_(nn.Sequential(Rope(), nn.Linear(16, 8)).eval(), PRESETS["int8"])
        bridge.calibrate(model, data())
        model[0].table = None
        last(model)
        bridge.unprepare_(model)(data()[0].requires_grad_()).sum().backward()
    bridge.prepare_(model, PRESETS["int8"])
    bridge.calibrate(model, data())
    bridge.convert_(model)[0].table = None
    bridge.chains(model, data()[0])
    with torch.no_grad():
        model(data()[0])


def test_a_calibration_that_counts_no_batches_is_no_checkpoint(tmp_path: Path) -> None:
    model, path = net(), tmp_path / "c.safetensors"
    serialize.save(path, {f"{i}.act_obs": (model[i].act_obs.spec, model[i].act_obs.state) for i in (0, 2)})
    with pytest.raises(ValueError, match=r"it counts no batches; use the model"):
        bridge.calibrate(model, data(), checkpoint=path)


# --- the stop rule ---------------------------------------------------------------------------------


def test_it_stops_when_the_qparams_of_every_layer_stand_still() -> None:
    growing = data(30)
    growing[4, 0, 0] = 20.0  # the last batch that moves the first layer's range
    for i in range(5, 30):
        growing[i] = growing[3]
    model = net()
    assert bridge.calibrate(model, growing, until_stable=0.01, window=6) == 4 + 1 + 6
    once = net()
    bridge.calibrate(once, growing[:11])
    assert_same(states(model), states(once))


def test_a_loose_tolerance_stops_earlier() -> None:
    counts = [bridge.calibrate(net(), data(200), until_stable=tol, window=4) for tol in (0.5, 0.05)]
    assert counts[0] < counts[1] < 200
    assert counts[0] >= 5


def test_batches_that_end_first_are_told_with_the_layers_that_moved_most() -> None:
    with pytest.warns(
        UserWarning, match=r"until_stable=0\.001: 2 observers still moved in the last 3 .*\n  [02]\.act_obs"
    ):
        assert bridge.calibrate(net(), data(), until_stable=1e-3, window=3) == 7
    with pytest.warns(UserWarning, match="until_stable: 2 batches ran, at least 4 are needed to tell"):
        assert bridge.calibrate(net(), data(2), until_stable=1e-3, window=3) == 2


# --- ranks -----------------------------------------------------------------------------------------


RUNS = ("once", "twice", "DDP", "empty", "resumed", "moving average", "stable")


def worker(rank: int, world: int, folder: Path) -> None:
    """Run each of RUNS as one of the ranks.

    One group is for all: gloo fails where a rank leaves before the other has connected, as one that is refused may.
    """
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    dist.barrier()
    for what in RUNS:
        run_rank(rank, world, folder / what, what)
    dist.destroy_process_group()


def run_rank(rank: int, world: int, folder: Path, what: str) -> None:
    """Calibrate one of the shards; leave the states, or the error, in a file."""
    try:
        if what == "moving average":
            spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=fsq.MovingAverage())
            model = net(StaticQuantConfig(torch.int8, activation=spec))
        else:
            model = net(StaticQuantConfig(torch.int8, activation=HISTOGRAM))
        shard = [*data()][rank::world] if what != "empty" else [*data()] * (rank == 0)
        half = len(shard) // 2
        if what == "DDP":
            bridge.calibrate(model, shard[:half])
            bridge.calibrate(nn.Sequential(nn.parallel.DistributedDataParallel(model)).eval(), shard[half:])
        elif what == "twice":
            bridge.calibrate(model, shard[:half])
            Path(f"{folder}/c.safetensors.rank{rank}of{world}").write_bytes(b"of another program")
            with pytest.raises(ValueError, match="not a safetensors file"):  # and nothing is lost
                bridge.calibrate(model, shard, checkpoint=f"{folder}/c.safetensors")
            bridge.calibrate(model, shard[half:])
        elif what == "stable":
            with pytest.raises(ValueError, match="this rank is not in the group; call calibrate on the ranks of"):
                bridge.calibrate(model, shard, group=dist.GroupMember.NON_GROUP_MEMBER)
            bridge.calibrate(model, shard, until_stable=0.1)
        elif what == "resumed":
            path = f"{folder}/c.safetensors"
            bridge.calibrate(net(StaticQuantConfig(torch.int8, activation=HISTOGRAM)), shard[:half], checkpoint=path)
            with pytest.raises(TypeError):
                bridge.calibrate(model, [*shard[: half + 1], None], checkpoint=path)
            bridge.calibrate(model, shard, checkpoint=path)
        else:
            bridge.calibrate(model, shard)
        torch.save(states(model) | {"y": bridge.convert_(model)(data()[0])}, f"{folder}/{rank}")
    except (TypeError, ValueError) as e:
        Path(folder, str(rank)).write_text(f"{type(e).__name__}: {e}")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that has one for each of RUNS; two processes make them all, for each imports torch anew."""
    folder, world = tmp_path_factory.mktemp("ranks"), 2
    for what in RUNS:
        (folder / what).mkdir()
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=worker, args=(r, world, folder)) for r in range(world)]
    for process in processes:
        process.start()
    stop = time.monotonic() + 120
    for process in processes:
        process.join(stop - time.monotonic())
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * world
    return folder


@pytest.mark.parametrize("what", ["once", "twice", "empty", "resumed", "DDP"])
def test_two_processes_give_the_model_of_one(ranks: Path, what: str) -> None:
    model = net(StaticQuantConfig(torch.int8, activation=HISTOGRAM))
    bridge.calibrate(model, data())
    expected = states(model) | {"y": bridge.convert_(model)(data()[0])}
    for rank in range(2):
        assert_same(torch.load(ranks / what / str(rank)), expected)
    if what == "resumed":
        names = sorted(p.name for p in (ranks / what).glob("c.*"))
        assert names == ["c.safetensors.rank0of2", "c.safetensors.rank1of2"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("moving average", "TypeError: MovingAverage(momentum=0.01) depends on the order of its batches"),
        ("stable", "ValueError: until_stable with several ranks: each would stop at another batch; use max_batches"),
    ],
)
def test_what_several_ranks_cannot_do_is_refused_by_each_before_a_batch_runs(
    ranks: Path, what: str, message: str
) -> None:
    for rank in range(2):
        assert (ranks / what / str(rank)).read_text().startswith(message)


# --- refusals --------------------------------------------------------------------------------------


def test_an_observer_without_a_shape_is_refused_by_its_name() -> None:
    own = bridge.ObserverModule(fsq.QuantSpec(torch.int8, fsq.PerAxis(-1)))
    model = bridge.prepare_(nn.Sequential(nn.Linear(8, 8), own).eval(), PRESETS["int8"])
    with pytest.raises(ValueError, match=r"^1 takes its shape from the first tensor, .* ObserverModule\(spec, shape\)"):
        bridge.calibrate(model, torch.randn(3, 4, 8))
    own.reset((4, 8))
    assert bridge.calibrate(model, torch.randn(3, 4, 8)) == 3
    assert int(own.state["count"].sum()) == 3 * 4 * 8


def test_labels_in_a_batch_are_told_of() -> None:
    for batch in ((data()[0], torch.ones(5)), {"input": data()[0], "labels": torch.ones(5)}):
        with pytest.raises(
            TypeError, match=r"; a tuple or list holds the positional arguments of the model, a mapping"
        ):
            bridge.calibrate(net(), [batch])
    with pytest.raises(TypeError, match=r"^observe got a str; give a tensor"):  # of the model itself
        bridge.calibrate(net(), [("text",)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window=0; give an int, at least 1"),
        ({"window": None, "until_stable": 0.1}, "window=None; give an int, at least 1"),
        ({"save_every": -1}, "save_every=-1; give an int, at least 1"),
        ({"until_stable": 0.0}, r"until_stable=0\.0; it is a share between 0 and 1, such as 0\.01"),
        ({"until_stable": 1.5}, r"until_stable=1\.5; it is a share"),
    ],
)
def test_a_refusal_says_value_rule_and_remedy(arguments: dict[str, float], message: str) -> None:
    model = net()
    with pytest.raises(ValueError, match=message):
        bridge.calibrate(model, data(), **arguments)
    assert_same(states(model), states(net()))
