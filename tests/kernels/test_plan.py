"""The plan never asks for more than the device has, for any shape on any device."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fusedrnn.cells import REGISTRY
from fusedrnn.kernels.plan import (
    INTERPRETER,
    PASSES,
    Device,
    candidates,
    cycles,
    placed,
    plan_scan,
)

KIB = 1024
# Shared memory of a program and of a multiprocessor: sm_80, sm_86 / 89 / 120, sm_90 / 100, gfx942.
SHARED = {
    (8, 0): (163 * KIB, 164 * KIB, "cuda"),
    (8, 6): (99 * KIB, 100 * KIB, "cuda"),
    (9, 0): (227 * KIB, 228 * KIB, "cuda"),
    (9, 4): (64 * KIB, 64 * KIB, "hip"),
}
MULTIPROCESSORS = (1, 2, 8, 30, 64, 108, 132, 304)
HIDDEN = (1, 2, 15, 16, 17, 63, 64, 65, 96, 128, 129, 192, 256, 300, 384, 512, 640, 768)
HIDDEN += (1000, 1024, 1500, 1536, 2048, 4096)
H200 = Device((9, 0), 132, 227 * KIB, 228 * KIB)
A100 = Device((8, 0), 108, 163 * KIB, 164 * KIB)
LSTM = REGISTRY["lstm"]


def device(capability, multiprocessors):
    per_program, per_multiprocessor, backend = SHARED[capability]
    return Device(capability, multiprocessors, per_program, per_multiprocessor, backend)


def plans(where, precision="tf32", batches=(1, 16, 100, 4096)):
    """Every plan for that device, with the shape it is for."""
    for cell in (LSTM, REGISTRY["gru"], REGISTRY["rnn_tanh"]):
        for pass_ in PASSES:
            for dtype in (torch.bfloat16, torch.float32):
                for H in HIDDEN:
                    for B in batches:
                        for D in (1, 2):
                            shape = {"B": B, "H": H, "D": D}
                            try:
                                plan = plan_scan(
                                    cell,
                                    pass_,
                                    dtype,
                                    device=where,
                                    input_precision=precision,
                                    **shape,
                                )
                            except ValueError as error:
                                plan = str(error)
                            yield cell, pass_, dtype, shape, plan


@pytest.mark.parametrize("multiprocessors", MULTIPROCESSORS)
@pytest.mark.parametrize("capability", SHARED)
def test_every_plan_fits(capability, multiprocessors):
    where = device(capability, multiprocessors)
    for cell, pass_, dtype, shape, plan in plans(where):
        told = (cell.name, pass_, dtype, shape, plan)
        B, H, D = shape["B"], shape["H"], shape["D"]
        if isinstance(plan, str):
            # On a whole GPU only what is far too large may find no plan.
            assert "no plan for" in plan, told
            assert multiprocessors < 108 or H > 1024 or capability != (9, 0), told
            continue
        assert plan.shared_bytes(cell, pass_) <= where.shared_per_program, told
        assert plan.chunks * plan.block_k >= H > (plan.chunks - 1) * plan.block_k, told
        assert 0 <= plan.resident <= plan.chunks, told
        for power in (plan.block_b, plan.block_h, plan.block_k, plan.split_k, plan.num_warps):
            assert power & (power - 1) == 0, told
        owners = plan.programs(H)
        if plan.schedule == "wgmma":
            # A thread polls a vector of 16 bytes of each chunk, or two; forward, on Hopper.
            assert plan.block_b * plan.block_k == 2048 * (2 if plan.block_b == 32 else 1), told
            assert (plan.block_h, plan.split_k, plan.num_warps) == (16, 2, 8), told
            assert (pass_, capability, dtype.itemsize) == ("forward", (9, 0), 2), told
        elif plan.schedule == "wgmma_scatter":
            # A warp hands 16 units of a chunk to their owner, 8 elements a lane; so there are as
            # many programs as chunks have warps.
            assert (plan.block_h, plan.block_k, plan.num_warps) == (16, 128, 8), told
            assert owners == 8 * plan.chunks >= -(-H // 16), told
            assert plan.block_b in (16, 32), told
            assert plan.prefetch * plan.block_b <= 128, told
            assert (pass_, capability, dtype.itemsize) == ("backward", (9, 0), 2), told
        else:
            # What the layout of the exchange rests on (`fragments`): a warp for each 16 units of a
            # chunk, and a program's units all in one chunk.
            assert plan.block_b == 16, told
            assert plan.block_k == 16 * plan.split_k, told
            assert plan.split_k == plan.num_warps, told
            assert plan.block_k % plan.block_h == 0, told
        assert 1 <= plan.prefetch <= plan.chunks, told
        # No launch has more programs than run at the same time, and each launch does something.
        assert plan.batch_per_launch % plan.block_b == 0, told
        assert 1 <= plan.lanes_per_launch <= D, told
        grid = owners * plan.lanes_per_launch * -(-min(B, plan.batch_per_launch) // plan.block_b)
        assert grid <= multiprocessors * plan.programs_per_sm, told
        # Of two programs on a multiprocessor, each has half of its 65,536 registers.
        assert plan.programs_per_sm * plan.num_warps * 32 * 256 <= 65536, told
        used = plan.shared_bytes(cell, pass_) + KIB
        assert plan.programs_per_sm * used <= where.shared_per_multiprocessor, told
        assert (plan.schedule == "streamed") == (plan.resident < plan.chunks), told


def test_every_plan_fits_in_full_precision():
    for cell, pass_, _, _, plan in plans(H200, "ieee", batches=(16,)):
        if not isinstance(plan, str):
            used = plan.shared_bytes(cell, pass_)
            assert used <= H200.shared_per_program, plan


def test_a_measurement_is_believed_instead_of_the_estimate():
    found = candidates(LSTM, "forward", torch.bfloat16, 512, H200, "tf32")
    assert all(plan.exchanged for plan in found)
    for fastest in found:
        times = dict.fromkeys(found, 2.0) | {fastest: 1.0}
        plan = plan_scan(
            LSTM, "forward", torch.bfloat16, B=1, H=512, D=1, device=H200, step_times=times
        )
        assert replace(plan, batch_per_launch=None, lanes_per_launch=None) == fastest


def test_the_cheapest_candidate_is_chosen():
    for B in (1, 64, 1000):
        costs = {}
        for plan in candidates(LSTM, "backward", torch.bfloat16, 512, H200, "tf32"):
            whole, launches, programs = placed(plan, 512, 1, B, H200)
            cost = cycles(plan, LSTM, "backward", 2, 512, "16-bit", programs, H200)
            costs[whole] = launches * cost
        chosen = plan_scan(LSTM, "backward", torch.bfloat16, B=B, H=512, D=1, device=H200)
        assert costs[chosen] == min(costs.values())


def test_a_batch_is_cut_into_as_few_launches_as_hold_it():
    (plan,) = (
        p
        for p in candidates(LSTM, "forward", torch.bfloat16, 512, H200, "tf32")
        if (p.block_h, p.split_k) == (16, 8)
    )
    # 32 programs hold 512 units, and 132 multiprocessors hold four times 32.
    for B, launches, programs in ((1, 1, 32), (16, 1, 32), (17, 1, 64), (64, 1, 128), (65, 2, 128)):
        whole, *counts = placed(plan, 512, 1, B, H200)
        assert (whole.batch_per_launch, counts) == (64, [launches, programs])
    assert placed(plan, 132 * 16 + 1, 1, 1, H200) is None


@pytest.mark.parametrize(
    ("H", "dtype", "schedules"),
    [
        (8, torch.bfloat16, ("multi_block", "multi_block")),
        (128, torch.bfloat16, ("multi_block", "multi_block")),
        (128, torch.float32, ("multi_block", "multi_block")),
        (300, torch.bfloat16, ("multi_block", "wgmma_scatter")),
        (768, torch.bfloat16, ("wgmma", "wgmma_scatter")),
        (1024, torch.float16, ("wgmma", "wgmma_scatter")),
        (2048, torch.bfloat16, ("streamed", "streamed")),
    ],
)
def test_schedule_on_a_large_gpu(H, dtype, schedules):
    for pass_, schedule in zip(PASSES, schedules, strict=True):
        plan = plan_scan(LSTM, pass_, dtype, B=16, H=H, D=1, device=H200)
        assert plan.schedule == schedule, plan
        assert plan.batch_per_launch is None or plan.batch_per_launch >= 16


def test_batch_decides_between_few_kernels():
    """What is compiled for one batch size serves nearly all."""
    kernels = {
        replace(
            plan_scan(LSTM, "forward", torch.bfloat16, B=B, H=512, D=1, device=H200),
            batch_per_launch=None,
            lanes_per_launch=None,
        )
        for B in range(1, 2000)
    }
    assert len(kernels) <= 4, kernels


def test_units_beyond_16_for_each_multiprocessor():
    for pass_ in PASSES:
        for H, block_h in ((132 * 16, 16), (132 * 16 + 1, 32), (132 * 32, 32)):
            plan = plan_scan(LSTM, pass_, torch.bfloat16, B=16, H=H, D=1, device=H200)
            assert (plan.schedule, plan.block_h) == ("streamed", block_h)
        with pytest.raises(ValueError, match="133 programs"):
            plan_scan(LSTM, pass_, torch.bfloat16, B=16, H=132 * 32 + 1, D=1, device=H200)


def test_two_directions_share_a_launch_where_they_fit():
    one = plan_scan(LSTM, "forward", torch.bfloat16, B=16, H=512, D=2, device=H200)
    assert one.lanes_per_launch == 2
    two = plan_scan(LSTM, "forward", torch.bfloat16, B=16, H=1500, D=2, device=H200)
    assert two.lanes_per_launch == 1


def test_interpreter_runs_everything_resident():
    for H in HIDDEN:
        plan = plan_scan(LSTM, "forward", torch.float32, B=5, H=H, D=2, device=INTERPRETER)
        assert plan.schedule == "single_block"
        assert plan.block_h >= H


@pytest.mark.parametrize(
    ("where", "H", "why"),
    [
        (Device((8, 0), 8, 163 * KIB, 164 * KIB), 4096, "128 programs .* has 8 multiprocessors"),
        (Device((8, 0), 108, 2 * KIB, 2 * KIB), 2048, "2048 bytes of shared memory"),
    ],
)
def test_says_why_there_is_no_plan(where, H, why):
    with pytest.raises(ValueError, match=rf"no plan for backward of 'lstm' with H = {H}.*{why}"):
        plan_scan(LSTM, "backward", torch.float32, B=1, H=H, D=1, device=where)


def test_says_what_it_does_not_know():
    with pytest.raises(ValueError, match="pass_ must be one of"):
        plan_scan(LSTM, "sideways", torch.float32, B=1, H=8, D=1, device=H200)
    with pytest.raises(ValueError, match=r"dtype must be one of .* got torch.float64"):
        plan_scan(LSTM, "forward", torch.float64, B=1, H=8, D=1, device=H200)


def test_readme_says_up_to_which_size():
    """One multiprocessor for every 32 hidden units, whatever the cell and the dtype."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert "one multiprocessor for every 32 hidden" in readme
    for device, said in ((H200, "4,224 on an H100"), (A100, "3,456 on an A100")):
        most = 32 * device.multiprocessors
        assert f"{most:,}" == said.split()[0]
        assert said in readme
        for cell in REGISTRY.values():
            for dtype in (torch.bfloat16, torch.float32):
                for pass_ in PASSES:
                    plan_scan(cell, pass_, dtype, B=1, H=most, D=1, device=device)
                if cell.diagonal:  # whose programs need not run at the same time
                    plan_scan(cell, "forward", dtype, B=1, H=most + 1, D=1, device=device)
                    continue
                with pytest.raises(ValueError, match="multiprocessors"):
                    plan_scan(cell, "forward", dtype, B=1, H=most + 1, D=1, device=device)
