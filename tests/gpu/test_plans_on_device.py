"""Every plan that a device offers, not only the one that it would choose; and many laps."""

from dataclasses import replace

import pytest
import torch
from scan_cases import Case, Problem, assert_close, kernels, loop, problem

import fusedrnn.kernels
from fusedrnn.cells import REGISTRY
from fusedrnn.kernels import sync
from fusedrnn.kernels.launch import device_of
from fusedrnn.kernels.plan import PASSES, Plan, candidates


def moved(p: Problem, device: str) -> Problem:
    return Problem(
        **{
            name: tuple(t.to(device) for t in value) if isinstance(value, tuple) else
            None if value is None else value.to(device)
            for name, value in vars(p).items()
        }
    )  # fmt: skip


def launchable(pass_: str, case: Case, device: torch.device) -> list[Plan]:
    """The candidates whose grid fits the device, cut into launches that do."""
    properties = device_of(device)
    plans = []
    for plan in candidates(case.cell, pass_, case.dtype, case.H, properties, "ieee"):
        if plan.exchanged:
            owners = plan.programs(case.H)
            groups = properties.multiprocessors * plan.programs_per_sm // owners
            if groups == 0:
                continue
            plan = replace(plan, batch_per_launch=groups * plan.block_b, lanes_per_launch=1)
        plans.append(plan)
    return plans


def check(case: Case, pairs) -> None:
    p = problem(case)
    exact, plain = loop(case, p, torch.float64), loop(case, p, case.dtype)
    on_device = moved(p, "cuda")
    for pair in pairs:
        answer = kernels(case, on_device, pair)
        fusedrnn.kernels.check()
        answer = replace(
            answer,
            output=answer.output.cpu(),
            final=tuple(f.cpu() for f in answer.final),
            gradients=[g.cpu() for g in answer.gradients],
        )
        try:
            assert_close(case, answer, exact, plain)
        except AssertionError as error:
            raise AssertionError(f"{pair}: {error}") from error


@pytest.mark.parametrize("H", [64, 300, 768, 2048, 2500])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_every_candidate(cell, dtype, H):
    case = Case(REGISTRY[cell], T=5, B=20, H=H, D=1, dtype=dtype)
    forward, backward = (launchable(pass_, case, torch.device("cuda", 0)) for pass_ in PASSES)
    assert forward
    assert backward
    count = max(len(forward), len(backward))
    check(
        case,
        [(forward[i % len(forward)], backward[i % len(backward)]) for i in range(count)],
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_many_laps(dtype):
    """Past the end of the ring, where the first slots are used again."""
    case = Case(REGISTRY["lstm"], T=2 * sync.LAP.value + 20, B=20, H=512, D=1, dtype=dtype)
    plans = [launchable(pass_, case, torch.device("cuda", 0)) for pass_ in PASSES]
    check(case, [tuple(next(p for p in found if p.exchanged) for found in plans)])
