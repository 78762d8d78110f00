"""Modules with resets, recurrent dropout, zoneout and clipping, run by any backend.

The noise is drawn before the time loop, so backends on one device see the same masks from the
same seed. `tests/kernels/test_state_ops.py` runs them in the interpreter, `tests/gpu` on a device.
"""

from functools import partial

import torch

import fusedrnn
from fusedrnn import cells


def alternating(I, H, bidirectional, **options):
    """Layers of one direction, the first of them backwards in time."""
    way = ("reverse", "forward")
    return fusedrnn.LSTM(I, H, num_layers=2, direction=way, residual=True, **options)


def narrowing(I, H, **options):
    return fusedrnn.GRU(I, (H, H - 6, H - 6), num_layers=3, residual=True, **options)


MODULES = {
    "LSTM": fusedrnn.LSTM,
    "GRU": fusedrnn.GRU,
    "RNN": fusedrnn.RNN,
    "projected": partial(fusedrnn.LSTM, proj_size=5),
    "reset before": partial(fusedrnn.Recurrent, "gru_reset_before"),
    "heads": partial(fusedrnn.LSTM, num_heads=3),
    "alternating": alternating,
    "narrowing": narrowing,
    "means": partial(fusedrnn.LayerNormGRU, num_heads=2),
    **{cell: partial(fusedrnn.Recurrent, cell) for cell in cells.REGISTRY},
}
T, B, I, H = 6, 3, 5, 17
OPTIONS = {
    "reset": {},
    "reset_state": {},
    "recurrent_dropout": {"recurrent_dropout": 0.4},
    "zoneout": {"zoneout": 0.3},
    "expected_zoneout": {"zoneout": 0.3},
    "clip": {"clip_gradient": 0.05},
    "all": {"recurrent_dropout": 0.4, "zoneout": 0.3, "clip_gradient": 0.2},
    "all but zoneout": {"recurrent_dropout": 0.4, "clip_gradient": 0.2},  # for projections
}


def run(module, option, backend, dtype, batch_first, rows, device="cpu", H=H):
    """Outputs and all gradients, those of the states that resets set included."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.float().to(dtype).to(device)

    torch.manual_seed(4)
    rnn = (
        MODULES[module](
            I, H, bidirectional=True, batch_first=batch_first, backend=backend, **OPTIONS[option]
        )
        .to(dtype)
        .to(device)
    )
    rnn.train(option != "expected_zoneout")
    names = cells.get(rnn.mode.lower()).states
    S = len(names)
    widths = [rnn.proj_size or H] + [H] * (S - 1)
    input = draw(*((B, T) if batch_first else (T, B)), I).requires_grad_()
    layers = rnn.num_layers * (2 if rnn.bidirectional else 1)
    states = [draw(layers, B, width) for width in widths]
    fresh = [draw(layers, 1, width) for width in widths]
    for values in (states, fresh):  # a normaliser, which divides, is not near 0
        values[:] = [v.abs() + 1 if n == "n" else v for n, v in zip(names, values, strict=True)]
        values[:] = [v.requires_grad_() for v in values]
    resets = option in ("reset", "reset_state", "all", "all but zoneout")
    arguments = {}
    if rows == "lengths":
        arguments["lengths"] = torch.tensor([T, 2, 4], device=device)
    if resets:
        mask = torch.rand(T, B, generator=generator) < 0.4
        mask[0, 0] = mask[3, 1] = True  # the first step, and one beyond a row's length
        mask = (mask.T if batch_first else mask).to(device)
        with_state = option != "reset"
        state = tuple(fresh) if S > 1 else fresh[0]
        arguments["reset"] = (mask, state) if with_state else mask
    if rows == "packed":
        lengths = torch.tensor([T, 2, 4])
        fed = torch.nn.utils.rnn.pack_padded_sequence(
            input, lengths, batch_first, enforce_sorted=False
        )
    else:
        fed = input
    torch.manual_seed(9)
    output, final = rnn(fed, tuple(states) if S > 1 else states[0], **arguments)
    output = output.data if rows == "packed" else output
    outputs = [output, *(final if S > 1 else (final,))]
    leaves = [input, *states, *rnn.parameters()]
    if resets and option != "reset":
        leaves += fresh
    gradients = torch.autograd.grad(outputs, leaves, [draw(*o.shape) for o in outputs])
    return [t.detach().double().cpu() for t in (*outputs, *gradients)]


CASES = [
    (option, batch_first, rows)
    for option in OPTIONS
    for batch_first, rows in ((False, "all"), (True, "lengths"), (False, "packed"))
    if not (rows == "packed" and option in ("reset", "reset_state", "all"))
    and option != "all but zoneout"
]


def assert_as_the_reference(module, option, batch_first, rows, **where):
    """The fused loop against float64.

    Twice the reference's own worst error in float32, and eight roundings for another order.
    """
    exact = run(module, option, "reference", torch.float64, batch_first, rows, **where)
    plain = run(module, option, "reference", torch.float32, batch_first, rows, **where)
    fused = run(module, option, "triton", torch.float32, batch_first, rows, **where)

    def worst(values):
        pairs = zip(values, exact, strict=True)
        return max(((v - e).abs().max() / e.abs().max().clamp(min=1e-30)).item() for v, e in pairs)

    limit = 2 * worst(plain) + 8 * torch.finfo(torch.float32).eps
    assert worst(fused) <= limit, (worst(fused), limit)
