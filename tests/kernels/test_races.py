"""The teeth: every mistake in an exchange is caught, in the miniature and in the real loops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exchange import BENCH, expected, roundtrip
from loops import forward_and_backward
from mutants import BACKWARD, CALLER, FORWARD, SYNC, Mutant, WrongResult
from mutation import mutated
from races import Detector, Race
from scan_cases import Case
from scheduler import Deadlock, cooperative

from fusedrnn.cells import REGISTRY
from fusedrnn.kernels import launch, sync

SYNC_PATH = Path(sync.__file__)
SEEDS = range(12)  # for a mistake that only some interleavings show
ALWAYS_SEEDS = range(2)


@pytest.fixture
def broken_sync(monkeypatch, tmp_path):
    """Puts the functions of a mutated sync.py in the place of the right ones."""

    def break_it(changes):
        mutant = mutated(SYNC_PATH, tmp_path, *changes)
        for name in ("slot", "store", "arrive", "wait", "load", "poison", "workspace"):
            monkeypatch.setattr(sync, name, getattr(mutant, name))

    return break_it


def hunt(mutant: Mutant, run) -> None:
    """Checks that runs of the mutant fail as it says."""
    for seed in ALWAYS_SEEDS if mutant.always else SEEDS:
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


X = (torch.arange(5 * 3 * 6) * 7 % 13 - 6.0).view(5, 3, 6) / 8
H0 = (torch.arange(3 * 6) * 5 % 11 - 5.0).view(3, 6) / 8
EXPECTED = expected(X, H0)


def miniature(protocol: str, module=roundtrip) -> None:
    output = module.exchange(protocol, X, H0, block_b=4, block_h=2, chunk=4, spin_limit=300)
    if not torch.allclose(output, EXPECTED):
        raise WrongResult(f"{protocol}: {output} should be {EXPECTED}")


@pytest.mark.parametrize("mutant", SYNC, ids=str)
def test_mistakes_in_sync(mutant, broken_sync):
    broken_sync(mutant.sync)
    hunt(mutant, lambda: miniature(mutant.protocol))


@pytest.mark.parametrize("mutant", CALLER, ids=str)
def test_mistakes_of_a_caller(mutant, tmp_path):
    module = mutated(BENCH / "roundtrip.py", tmp_path, *mutant.kernel)
    hunt(mutant, lambda: miniature(mutant.protocol, module))


CASE = Case(REGISTRY["rnn_tanh"], T=3, B=2, H=20, D=1)


@pytest.fixture(scope="module")
def answers():
    with cooperative(0):
        return forward_and_backward(CASE, "counter")


@pytest.fixture
def compare(answers, monkeypatch):
    """Runs the loops, with little patience, and raises WrongResult."""
    monkeypatch.setattr(sync, "spin_limit", lambda device: 300)

    def run(protocol):
        for (name, ours), (_, right) in zip(
            forward_and_backward(CASE, protocol).named(), answers.named(), strict=True
        ):
            if not torch.allclose(ours, right, atol=1e-6):
                raise WrongResult(name)

    yield run
    launch._error_word(torch.device("cpu")).zero_()  # a mutant may have been stopped half-way


@pytest.mark.parametrize("mutant", SYNC, ids=str)
def test_mistakes_in_sync_under_the_loops(mutant, broken_sync, compare):
    broken_sync(mutant.sync)
    hunt(mutant, lambda: compare(mutant.protocol))


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        *(pytest.param("scan_forward", mutant, id=str(mutant)) for mutant in FORWARD),
        *(pytest.param("scan_backward", mutant, id=str(mutant)) for mutant in BACKWARD),
    ],
)
def test_mistakes_in_the_loops(name, mutant, compare, tmp_path, monkeypatch):
    module = mutated(SYNC_PATH.with_name(f"{name}.py"), tmp_path, *mutant.kernel)
    monkeypatch.setattr(launch, f"{name}_kernel", getattr(module, f"{name}_kernel"))
    hunt(mutant, lambda: compare(mutant.protocol))
