"""The teeth: every mistake in an exchange is caught, in the miniature and in the real loops."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path

import pytest
import roundtrip
import torch
import triton.language as tl
from exchange import expected
from loops import forward_and_backward
from mutants import BACKWARD, CALLER, FORWARD, MATMUL, MEANS, STAGES, SYNC, Mutant, WrongResult
from mutation import mutated
from races import Detector, Race
from scan_cases import Case
from scheduler import Deadlock, cooperative

from fusedrnn.cells import REGISTRY
from fusedrnn.kernels import launch, sync

SYNC_PATH = Path(sync.__file__)
FUNCTIONS = ("slot", "publish", "arrive", "arrivals", "load", "report", "workspaces")
SEEDS = range(12)  # for a mistake that only some interleavings show
ALWAYS_SEEDS = range(2)


@pytest.fixture
def lap(monkeypatch):
    """Lets the ring come round within few steps."""
    return lambda steps: monkeypatch.setattr(sync, "LAP", tl.constexpr(steps))


@pytest.fixture
def broken_sync(monkeypatch, tmp_path):
    """Puts the functions of a mutated sync.py in the place of the right ones."""

    def break_it(mutant):
        module = mutated(SYNC_PATH, tmp_path, *mutant.sync)
        module.LAP, module.spin_limit = tl.constexpr(mutant.lap), sync.spin_limit
        for name in FUNCTIONS:
            monkeypatch.setattr(sync, name, getattr(module, name))

    return break_it


def hunt(mutant: Mutant, run, always_seeds=ALWAYS_SEEDS) -> None:
    """Checks that runs of the mutant fail as it says."""
    for seed in always_seeds if mutant.always else SEEDS:
        caught = None
        try:
            with cooperative(seed, detector=Detector()):
                run()
        except (Race, Deadlock, WrongResult, RuntimeError) as error:
            caught = error
        if caught is None:
            assert not mutant.always, f"survives seed {seed}"
            continue
        assert isinstance(caught, mutant.caught), f"seed {seed}: {caught!r}"
        if not mutant.always:
            return
    assert mutant.always, f"survives {len(SEEDS)} seeds"


X = (torch.arange(8 * 3 * 20) * 7 % 13 - 6.0).view(8, 3, 20) / 8
H0 = (torch.arange(3 * 20) * 5 % 11 - 5.0).view(3, 20) / 8
H0[1, 13] = -0.0


def miniature(mutant: Mutant, module=roundtrip) -> None:
    x, h0 = X.to(mutant.dtype), H0.to(mutant.dtype)
    output = module.exchange(x, h0, split=1, ahead=2, pairwise=mutant.pairwise, spin_limit=300)
    # In 16 bit, the mean of a row differs by what 20 values lose in another order of float32.
    wrong = (output.float() - expected(x, h0).float()).abs() > 2 * torch.finfo(mutant.dtype).eps
    if wrong.any() or output.isnan().any():
        raise WrongResult(mutant.name)


@pytest.mark.parametrize("mutant", SYNC, ids=str)
def test_mistakes_in_sync(mutant, broken_sync):
    broken_sync(mutant)
    hunt(mutant, lambda: miniature(mutant))


@pytest.mark.parametrize("mutant", CALLER, ids=str)
def test_mistakes_of_a_caller(mutant, lap, tmp_path):
    lap(mutant.lap)
    module = mutated(Path(roundtrip.__file__), tmp_path, *mutant.kernel)
    hunt(mutant, lambda: miniature(mutant, module))


CASE = Case(REGISTRY["rnn_tanh"], T=7, B=2, H=20, D=1)
STAGED = Case(REGISTRY["gru_reset_before"], T=4, B=2, H=20, D=1)
MEAN = Case(REGISTRY["layer_norm_gru"], T=3, B=2, H=20, D=1)


@functools.cache
def answers(case: Case):
    with cooperative(0):
        return forward_and_backward(case)


@pytest.fixture
def compare(monkeypatch):
    """Runs the loops, with little patience, and raises WrongResult."""

    def run(case: Case = CASE):
        for (name, ours), (_, right) in zip(
            forward_and_backward(case).named(), right_answers[case].named(), strict=True
        ):
            if not torch.allclose(ours, right, atol=1e-6):
                raise WrongResult(name)

    right_answers = {case: answers(case) for case in (CASE, STAGED, MEAN)}
    monkeypatch.setattr(sync, "spin_limit", lambda device: 300)
    yield run
    launch._error_word(torch.device("cpu")).zero_()  # a mutant may have been stopped half-way


@pytest.mark.parametrize("mutant", [m for m in SYNC if m.dtype == CASE.dtype], ids=str)
def test_mistakes_in_sync_under_the_loops(mutant, broken_sync, compare):
    broken_sync(mutant)
    hunt(mutant, compare, ALWAYS_SEEDS[:1])


LOOPS = {"matmul": MATMUL, "scan_forward": FORWARD, "scan_backward": BACKWARD}


def each(mutants):
    return [pytest.param(name, m, id=str(m)) for name, found in mutants.items() for m in found]


@pytest.mark.parametrize(("name", "mutant"), each(LOOPS))
def test_mistakes_in_the_loops(name, mutant, compare, lap, tmp_path, monkeypatch):
    put_in_place(name, mutant, lap, tmp_path, monkeypatch)
    hunt(mutant, compare, ALWAYS_SEEDS[:1])


@pytest.mark.parametrize(("name", "mutant"), each(MEANS))
def test_mistakes_with_means(name, mutant, compare, lap, tmp_path, monkeypatch):
    put_in_place(name, mutant, lap, tmp_path, monkeypatch)
    hunt(mutant, lambda: compare(MEAN), ALWAYS_SEEDS[:1])


@pytest.mark.parametrize(("name", "mutant"), each(STAGES))
def test_mistakes_between_stages(name, mutant, compare, lap, tmp_path, monkeypatch):
    put_in_place(name, mutant, lap, tmp_path, monkeypatch)
    hunt(mutant, lambda: compare(STAGED), ALWAYS_SEEDS[:1])


def put_in_place(name, mutant, lap, tmp_path, monkeypatch) -> None:
    lap(mutant.lap)
    module = mutated(SYNC_PATH.with_name(f"{name}.py"), tmp_path, *mutant.kernel)
    if name == "launch":
        monkeypatch.setattr(launch, "workspaces", module.workspaces)
    elif name == "matmul":
        for loop in ("scan_forward", "scan_backward"):  # as the package calls its functions, too
            loop = importlib.import_module(f"fusedrnn.kernels.{loop}")
            monkeypatch.setattr(loop, "recurrent_matmul", module.recurrent_matmul)
    else:
        monkeypatch.setattr(launch, f"{name}_kernel", getattr(module, f"{name}_kernel"))
