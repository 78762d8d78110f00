"""The time loops spread over programs that wait for each other, randomly interleaved."""

import pytest
import torch
from races import Detector
from scan_cases import Case, assert_close, kernels, loop, problem
from scheduler import cooperative

from fusedrnn.cells import REGISTRY
from fusedrnn.kernels import sync
from fusedrnn.kernels.plan import Plan

CELLS = sorted(REGISTRY)
PROTOCOLS = sync.PROTOCOLS


def spread(protocol: str, resident: int = 2, split: int = 2, slab: int | None = None) -> Plan:
    """H = 20 over three programs of 8 units, K in two chunks of 16."""
    return Plan(
        schedule="spread",
        block_b=2,
        block_h=8,
        block_k=16,
        chunks=2,
        resident=resident,
        split=split,
        num_warps=1,
        protocol=protocol,
        slab=slab,
    )


@pytest.fixture
def detector(monkeypatch):
    """Told of every ring whose words carry their own step, as the launches allocate them."""
    detector = Detector()
    workspace = sync.workspace

    def watched(protocol, **sizes):
        space = workspace(protocol, **sizes)
        detector.error_word(space.error)
        if protocol in ("ll", "sentinel"):
            detector.polled(space.ring)
        return space

    monkeypatch.setattr(sync, "workspace", watched)
    return detector


def check(case: Case, plan: Plan, seed: int, detector: Detector) -> None:
    p = problem(case, seed)
    exact, plain = loop(case, p, torch.float64), loop(case, p, case.dtype)
    with cooperative(seed, detector=detector):
        ours = kernels(case, p, (plan, plan))
    assert_close(case, ours, exact, plain)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("cell", CELLS)
def test_matches_float64(cell, protocol, detector):
    case = Case(REGISTRY[cell], T=3, B=3, H=20, lengths=(1, 3, 2))
    check(case, spread(protocol), 1, detector)


@pytest.mark.parametrize("resident", [0, 1])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_streams_what_is_not_resident(cell, resident, detector):
    case = Case(REGISTRY[cell], T=3, B=3, H=20)
    check(case, spread("counter", resident=resident, split=1), 2, detector)
