"""The time loops spread over programs: the same bits whoever runs first, and no race on the way."""

from __future__ import annotations

import pytest
import torch
from races import Detector
from scan_cases import Case, kernels, problem
from scheduler import cooperative
from test_scan_spread import spread

from fusedrnn.cells import REGISTRY
from fusedrnn.kernels import launch, sync

CASES = {  # and how many interleavings of each
    "rnn": (Case(REGISTRY["rnn_tanh"], T=4, B=2, H=20, D=1), 10),
    "gru": (Case(REGISTRY["gru"], T=3, B=2, H=20, D=1), 5),
    "lstm, ragged, both directions": (
        Case(REGISTRY["lstm"], T=3, B=3, H=20, D=2, lengths=(1, 3, 2)),
        2,
    ),
}


def forward_and_backward(case: Case, protocol: str, seed: int | None) -> list[torch.Tensor]:
    plan = spread(protocol)
    with cooperative(seed, detector=Detector()):
        answer = kernels(case, problem(case), (plan, plan))
    return [tensor for _, tensor in answer.named()]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("protocol", sync.PROTOCOLS)
def test_interleavings_agree(protocol, name):
    case, seeds = CASES[name]
    first = forward_and_backward(case, protocol, 0)
    for seed in range(1, seeds):
        for a, b in zip(first, forward_and_backward(case, protocol, seed), strict=True):
            assert torch.equal(a, b), f"seed {seed}"


@pytest.mark.parametrize("protocol", sync.PROTOCOLS)
def test_timeout_and_the_call_after_it(protocol, monkeypatch):
    """Programs that run one after the other never meet: as on a GPU that cannot hold them all."""
    case, _ = CASES["rnn"]
    right = forward_and_backward(case, protocol, 0)
    with monkeypatch.context() as patch:
        patch.setattr(sync, "spin_limit", lambda device: 20)
        with pytest.raises(RuntimeError, match=r"timed out at step \d: its results are NaN"):
            forward_and_backward(case, protocol, None)
    launch.check("cpu")
    after = forward_and_backward(case, protocol, 0)
    assert all(torch.equal(a, b) for a, b in zip(right, after, strict=True))
