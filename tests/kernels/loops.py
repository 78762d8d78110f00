"""The real time loops, spread over programs, in a size for the interpreter."""

from __future__ import annotations

from scan_cases import Answer, Case, kernels, problem

from fusedrnn.kernels.plan import Plan


def forward_and_backward(case: Case) -> Answer:
    """H = 20 over three programs of 8 units, K in two chunks of 16."""
    plan = Plan(
        schedule="multi_block",
        block_b=16,
        block_h=8,
        block_k=16,
        chunks=2,
        resident=2,
        split_k=1,
        num_warps=1,
        prefetch=2,
    )
    p = problem(case)
    p.state[0][0, 0, 0] = -0.0  # the sentinel
    return kernels(case, p, (plan, plan))
