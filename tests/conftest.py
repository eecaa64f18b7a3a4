"""What every test shares: the hypothesis profile, the seed, the `cuda` marker and failures of laws as found."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch
import torch._dynamo.guards
import torch._inductor.config

import functional_sq.testing.law
from functional_sq import brgemm, onednn, onednn_conv

hypothesis.settings.register_profile(
    "functional_sq",
    deadline=None,  # the first call of a torch operator is slow, and the machine is shared
    print_blob=True,
    derandomize="CI" in os.environ,  # a run of CI fails for what it was given, not by chance
)
hypothesis.settings.load_profile("functional_sq")

# The compiler logs thousands of lines for tools; under a failed test they hide what failed.
logging.getLogger("torch.__trace").addFilter(lambda record: False)

# It measures the guards of each graph for that log too, behind a flush of the caches of 25 ms.
torch._dynamo.guards.profile_guard_manager = lambda *guards: 0.0


def pytest_configure(config: pytest.Config) -> None:
    # Several processes (-n 2) have more threads than the machine has cores: one that spins while it waits keeps those
    # that it waits for from running, and a test takes up to 18 times as long. Read when a process loads torch.
    if getattr(config.option, "numprocesses", None):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # torchao 0.16 warns, when it is imported, of its own moved modules, and torch's compiler instantiates
    # torch.autograd.Function where it compiles one.
    config.addinivalue_line("filterwarnings", "ignore:Importing .*torchao:DeprecationWarning")
    config.addinivalue_line("filterwarnings", "ignore:.*Function'> should not be instantiated:DeprecationWarning")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    torch.manual_seed(0)
    torch.compiler.reset()  # what other tests compiled of the same code counts against its limit of compilations


@pytest.fixture
def multiply_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Choose what multiplies integers on a CPU, however small they are: "brgemm", "oneDNN", or "torch" alone."""

    def choose(name: str) -> None:
        there = {"brgemm": brgemm.is_built(), "oneDNN": onednn.AVAILABLE, "torch": True}
        if not there[name]:
            pytest.skip(f"this machine has no {name}, or no VNNI")
        if name != "brgemm":
            monkeypatch.setattr(brgemm, "AVAILABLE", False)
        monkeypatch.setattr(brgemm, "_COPIED", 0)
        monkeypatch.setattr(brgemm, "_CALL", 10**18)
        for each in (onednn, onednn_conv):
            monkeypatch.setattr(each, "WORTH", 0 if name == "oneDNN" else 10**18)

    return choose


@pytest.fixture(params=["brgemm", "oneDNN"])
def packing(request: pytest.FixtureRequest, multiply_by: Callable[[str], None]) -> str:
    """Each backend of a CPU that packs a weight, alone."""
    multiply_by(request.param)
    name: str = request.param
    return name


@pytest.fixture
def kernels_of_torch() -> Iterator[None]:
    """Let Inductor call torch's kernels and generate none: a test of a graph needs none, and g++ a second for each."""
    with torch._inductor.config.patch(fallback_by_default=True):
        yield


@pytest.fixture
def as_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let laws tell the first case where they do not hold; a search for the smallest runs them a hundred times."""
    monkeypatch.setattr(functional_sq.testing.law, "_PHASES", (hypothesis.Phase.generate,))
