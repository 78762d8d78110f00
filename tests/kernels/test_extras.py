"""Resets, recurrent dropout, zoneout and clipping inside the fused loop, against the reference.

The noise is drawn before the loop, so both backends see the same masks from the same seed.
"""

import pytest
import torch
from scheduler import cooperative

import fusedrnn
from fusedrnn.kernels import launch
from fusedrnn.kernels.plan import Plan

T, B, I, H = 6, 3, 5, 17
OPTIONS = {
    "reset": {},
    "reset_state": {},
    "recurrent_dropout": {"recurrent_dropout": 0.4},
    "zoneout": {"zoneout": 0.3},
    "expected_zoneout": {"zoneout": 0.3},
    "clip": {"clip_gradient": 0.05},
    "all": {"recurrent_dropout": 0.4, "zoneout": 0.3, "clip_gradient": 0.2},
}


def run(module, option, backend, dtype, batch_first, rows):
    """Outputs and all gradients, those of the states that resets set included."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.float().to(dtype)

    torch.manual_seed(4)
    rnn = getattr(fusedrnn, module)(
        I, H, bidirectional=True, batch_first=batch_first, backend=backend, **OPTIONS[option]
    ).to(dtype)
    rnn.train(option != "expected_zoneout")
    S = 2 if module == "LSTM" else 1
    input = draw(*((B, T) if batch_first else (T, B)), I).requires_grad_()
    states = [draw(2, B, H).requires_grad_() for _ in range(S)]
    fresh = [draw(2, 1, H).requires_grad_() for _ in range(S)]
    resets = option in ("reset", "reset_state", "all")
    arguments = {}
    if rows == "lengths":
        arguments["lengths"] = torch.tensor([T, 2, 4])
    if resets:
        mask = torch.rand(T, B, generator=generator) < 0.4
        mask[0, 0] = mask[3, 1] = True  # the first step, and one beyond a row's length
        mask = mask.T if batch_first else mask
        with_state = option != "reset"
        state = tuple(fresh) if S == 2 else fresh[0]
        arguments["reset"] = (mask, state) if with_state else mask
    if rows == "packed":
        lengths = torch.tensor([T, 2, 4])
        fed = torch.nn.utils.rnn.pack_padded_sequence(
            input, lengths, batch_first, enforce_sorted=False
        )
    else:
        fed = input
    torch.manual_seed(9)
    output, final = rnn(fed, tuple(states) if S == 2 else states[0], **arguments)
    output = output.data if rows == "packed" else output
    outputs = [output, *(final if S == 2 else (final,))]
    leaves = [input, *states, *rnn.parameters()]
    if resets and option != "reset":
        leaves += fresh
    gradients = torch.autograd.grad(outputs, leaves, [draw(*o.shape) for o in outputs])
    return [t.detach().double() for t in (*outputs, *gradients)]


CASES = [
    (option, batch_first, rows)
    for option in OPTIONS
    for batch_first, rows in ((False, "all"), (True, "lengths"), (False, "packed"))
    if not (rows == "packed" and option in ("reset", "reset_state", "all"))
]


@pytest.mark.parametrize("module", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize(("option", "batch_first", "rows"), CASES)
def test_as_the_reference(module, option, batch_first, rows):
    exact = run(module, option, "reference", torch.float64, batch_first, rows)
    plain = run(module, option, "reference", torch.float32, batch_first, rows)
    fused = run(module, option, "triton", torch.float32, batch_first, rows)

    def error(values):
        pairs = zip(values, exact, strict=True)
        return [((v - e).abs().max() / e.abs().max().clamp(min=1e-30)).item() for v, e in pairs]

    # Twice the reference's own worst error in float32, and eight roundings for another order.
    limit = 2 * max(error(plain)) + 8 * torch.finfo(torch.float32).eps
    assert max(error(fused)) <= limit, error(fused)


@pytest.mark.parametrize("option", [o for o in OPTIONS if o != "expected_zoneout"])
def test_the_option_matters(option):
    """What the comparison above would miss if neither backend did anything."""
    with_it = run("GRU", option, "triton", torch.float32, False, "all")
    OPTIONS["nothing"] = {}
    without = run("GRU", "nothing", "triton", torch.float32, False, "all")
    del OPTIONS["nothing"]
    pairs = zip(with_it[: len(without)], without, strict=True)
    assert any(not torch.allclose(a, b) for a, b in pairs)


@pytest.mark.parametrize("protocol", ["counter", "ll"])
@pytest.mark.parametrize("module", ["LSTM", "GRU"])
def test_spread_over_programs(module, protocol, monkeypatch):
    """What a program hands on is what the next step reads: already reset, already masked."""
    plan = Plan("spread", 2, 8, 16, chunks=2, resident=2, split=2, num_warps=1, protocol=protocol)
    expected = run(module, "all", "triton", torch.float32, True, "lengths")
    monkeypatch.setattr(launch, "_plan", lambda *arguments: plan)
    with cooperative(3):
        spread = run(module, "all", "triton", torch.float32, True, "lengths")
    for ours, other in zip(spread, expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)
