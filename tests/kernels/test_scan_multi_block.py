"""The time loops spread over programs that wait for each other, against a float64 loop.

`test_interleavings.py` runs many interleavings under the race detector; here it is one of each,
and what is computed is looked at.
"""

from dataclasses import replace

import layer_checks
import pytest
import torch
from layer_checks import assert_as_good_as_torch
from races import Detector
from scan_cases import Case, assert_close, kernels, loop, problem
from scheduler import cooperative
from tolerances import assert_as_good

import fusedrnn
from fusedrnn.cells import REGISTRY
from fusedrnn.kernels.plan import Plan

# H = 20 over three programs of 8 units, K in two chunks of 16; the batch in tiles of 16 rows.
MULTI_BLOCK = Plan("multi_block", 16, 8, 16, 2, 2, split_k=1, num_warps=1)
RAGGED = {"T": 3, "B": 3, "H": 20, "lengths": (1, 3, 2)}
EVEN = {"T": 3, "B": 3, "H": 20, "D": 1}


def check(case: Case, plan: Plan, seed: int = 1) -> None:
    p = problem(case, seed)
    exact, plain = loop(case, p, torch.float64), loop(case, p, case.dtype)
    with cooperative(seed):
        ours = kernels(case, p, (plan, plan))
    assert_close(case, ours, exact, plain)


@pytest.mark.parametrize("cell", ["gru", "layer_norm_lstm", "lstm", "multiplicative_lstm", "slstm"])
def test_every_kind_of_cell(cell):
    check(Case(REGISTRY[cell], D=2 if cell == "gru" else 1, **RAGGED), MULTI_BLOCK)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype(dtype):
    check(Case(REGISTRY["gru"], dtype=dtype, **EVEN), MULTI_BLOCK)


def test_all_chunks_read_together():
    check(Case(REGISTRY["gru"], **EVEN), replace(MULTI_BLOCK, prefetch=2))


# Every two of these values meet.
@pytest.mark.parametrize(
    ("resident", "split", "ahead"), [(0, 1, 2), (0, 2, 1), (1, 1, 1), (1, 2, 2)]
)
def test_streams_what_is_not_resident(resident, split, ahead):
    case = Case(REGISTRY["lstm"], T=3, B=3, H=20 * split, D=1)
    plan = replace(
        MULTI_BLOCK, schedule="streamed", resident=resident, split_k=split, prefetch=ahead
    )
    check(case, replace(plan, block_k=16 * split))


@pytest.mark.parametrize("save", ["gates", "states"])
def test_packed(save):
    case = Case(REGISTRY["lstm"], T=3, B=3, H=20, lengths=(3, 2, 1), layout="packed", save=save)
    check(case, MULTI_BLOCK)


def test_one_direction_backwards():
    case = replace(Case(REGISTRY["lstm"], **RAGGED), D=1, reverse=True)
    check(case, MULTI_BLOCK)


def test_several_launches():
    """A grid for two rows of one direction, so four launches for three rows of two."""
    check(
        Case(REGISTRY["gru"], **RAGGED),
        replace(MULTI_BLOCK, batch_per_launch=2, lanes_per_launch=1),
    )


@pytest.mark.parametrize(
    ("cell", "H"),
    [
        ("peephole_lstm_full", 20),
        ("mlp_transition(layer_sizes=(20, 9), negative_slope=0.1)", 7),
        ("mlp_transition(layer_sizes=(5, 9), negative_slope=0.1)", 20),
    ],
)
def test_stages_with_matrices_of_their_own(cell, H, monkeypatch):
    """Of several widths: programs without a unit of a stage wait as the others do."""
    rnn, x = fusedrnn.Recurrent(cell, 4, H, bidirectional=True), torch.randn(3, 3, 4)

    def run(backend, dtype):
        rnn.to(dtype).backend = backend
        leaves = [x.to(dtype).requires_grad_(), *rnn.parameters()]
        output, final = rnn(leaves[0], lengths=[3, 1, 2])
        results = [output, *(final if isinstance(final, tuple) else (final,))]
        loss = sum(result.square().sum() for result in results)
        return [*results, *torch.autograd.grad(loss, leaves)]

    exact, plain = run("reference", torch.float64), run("reference", torch.float32)
    for owner in (fusedrnn.kernels, fusedrnn.kernels.launch):
        monkeypatch.setattr(owner, "plan_for", lambda *_, **__: MULTI_BLOCK)
    for seed in (1, 2):
        with cooperative(seed, detector=Detector()):
            found = run("triton", torch.float32)
        for number, parts in enumerate(zip(found, plain, exact, strict=True)):
            assert_as_good(*parts, f"{cell}: result {number}")


def test_the_layers_of_a_stack_exchange_beside_each_other(monkeypatch):
    """What they exchange through is one tensor, filled once."""
    monkeypatch.setattr(fusedrnn.kernels, "plan_for", lambda *_, **__: MULTI_BLOCK)
    options = {"num_layers": 2}
    with cooperative(1, detector=Detector()):
        assert_as_good_as_torch(layer_checks.Case(T=2, B=2, H=20, options=options), "cpu")


ONE_CHUNK = replace(MULTI_BLOCK, chunks=1, resident=1)
STAGED = {
    "projection": (Case(REGISTRY["lstm"], P=5, **RAGGED), MULTI_BLOCK),
    "projection, fp16": (Case(REGISTRY["lstm"], P=18, dtype=torch.float16, **EVEN), MULTI_BLOCK),
    "projection, streamed": (
        Case(REGISTRY["lstm"], P=5, **EVEN),
        replace(MULTI_BLOCK, schedule="streamed", resident=1),
    ),
    "lstm, heads": (Case(REGISTRY["lstm"], heads=2, **RAGGED), ONE_CHUNK),
    "gru, heads": (Case(REGISTRY["gru"], heads=2, **EVEN), ONE_CHUNK),
    "heads in several launches": (
        Case(REGISTRY["gru"], heads=2, T=2, B=2, H=20),
        replace(ONE_CHUNK, lanes_per_launch=3),
    ),
    "reset before, heads": (Case(REGISTRY["gru_reset_before"], heads=2, **EVEN), ONE_CHUNK),
    "means": (Case(REGISTRY["layer_norm_gru"], **RAGGED), MULTI_BLOCK),
    "means, fp16, streamed": (
        Case(REGISTRY["layer_norm_gru"], dtype=torch.float16, **EVEN),
        replace(MULTI_BLOCK, schedule="streamed", resident=0),
    ),
    "reset before, streamed": (
        Case(REGISTRY["gru_reset_before"], **EVEN),
        replace(MULTI_BLOCK, schedule="streamed", resident=0),
    ),
}


@pytest.mark.parametrize("name", STAGED)
def test_stages_and_heads(name):
    check(*STAGED[name])
