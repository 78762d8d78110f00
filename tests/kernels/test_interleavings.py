"""The time loops spread over programs: the same bits whoever runs first, and no race on the way."""

from __future__ import annotations

from collections import deque

import pytest
import torch
import triton.language as tl
from loops import forward_and_backward
from races import Detector, Race
from scan_cases import Case
from scheduler import Deadlock, cooperative

from fusedrnn.cells import REGISTRY
from fusedrnn.kernels import launch, sync

CASES = {  # and how many interleavings of each
    "rnn": (Case(REGISTRY["rnn_tanh"], T=6, B=2, H=20, D=1), 6),
    "gru, ragged": (Case(REGISTRY["gru"], T=4, B=2, H=20, D=1, lengths=(2, 4)), 3),
    "lstm, packed, both directions": (
        Case(REGISTRY["lstm"], T=4, B=3, H=20, D=2, lengths=(4, 2, 1), layout="packed"),
        2,
    ),
    "reset before, ragged": (
        Case(REGISTRY["gru_reset_before"], T=3, B=2, H=20, D=1, lengths=(2, 3)),
        2,
    ),
    # The first stage waits only for those who own a part of h: nobody else need have come so far.
    "projection": (Case(REGISTRY["lstm"], T=3, B=2, H=20, P=5, D=1), 2),
    "heads": (Case(REGISTRY["gru"], T=3, B=2, H=40, heads=2, D=1), 2),
    "three stages": (Case(REGISTRY["layer_norm_lstm"], T=2, B=1, H=20, D=1), 1),
}


@pytest.fixture
def lap(monkeypatch):
    return lambda steps: monkeypatch.setattr(sync, "LAP", tl.constexpr(steps))


def run(case: Case, seed: int | None) -> list[torch.Tensor]:
    with cooperative(seed, detector=Detector()):
        answer = forward_and_backward(case)
    return [tensor for _, tensor in answer.named()]


@pytest.mark.parametrize("name", CASES)
def test_interleavings_agree(name, lap):
    case, seeds = CASES[name]
    lap(4 if case.P or len(case.cell.stages) > 2 else 2)  # a multiple of `round_of`
    first = run(case, 0)
    for seed in range(1, seeds):
        for a, b in zip(first, run(case, seed), strict=True):
            assert torch.equal(a, b), f"seed {seed}"


def test_a_lap_of_two_steps_is_too_short_for_a_projection(lap):
    """What the ring of real laps rests on: all have read what was exchanged a few steps ago."""
    lap(2)
    case, _ = CASES["projection"]
    with pytest.raises((Race, Deadlock)):
        deque((run(case, seed) for seed in range(12)), maxlen=0)


def test_timeout_and_the_call_after_it(monkeypatch, lap):
    """Programs that run one after the other never meet: as on a GPU that cannot hold them all."""
    lap(2)
    case, _ = CASES["rnn"]
    right = run(case, 0)
    outputs = []
    with monkeypatch.context() as patch:
        patch.setattr(sync, "spin_limit", lambda device: 20)
        patch.setattr(launch, "scan_forward_kernel", Keeping(launch.scan_forward_kernel, outputs))
        with pytest.raises(RuntimeError, match="timed out at step 1: its results are NaN"):
            run(case, None)
    (output,) = outputs
    assert output.isnan().all()
    launch.check("cpu")
    after = run(case, 0)
    assert all(torch.equal(a, b) for a, b in zip(right, after, strict=True))


class Keeping:
    """A kernel, which keeps the outputs of its launches."""

    def __init__(self, kernel, outputs):
        self.kernel = kernel
        self.outputs = outputs

    def __getitem__(self, grid):
        def launched(**arguments):
            self.outputs.append(arguments["output_ptr"])
            self.kernel[grid](**arguments)

        return launched
