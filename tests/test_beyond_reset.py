"""reset=: equal to splitting the sequence where it says, and running every part alone.

The oracle runs the parts through torch.nn, which knows no resets.
"""

import itertools

import pytest
import torch
from tolerances import GRADIENTS64, VALUES64
from torch import nn

import fusedrnn
from fusedrnn import op
from fusedrnn.call import Masks, Operands, Spec

T, B, I, H = 9, 4, 3, 4
MODULES = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}
LAYOUTS = {
    "plain": {},
    "two layers": {"num_layers": 2},
    "2x2": {"num_layers": 2, "bidirectional": True},
    "batch_first": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}
# Rows: none; at the very first and last step; two in a row; many.
STARTS = [[], [0, 8], [3, 4], [1, 2, 5, 8]]
each_module = pytest.mark.parametrize("name", MODULES)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def states(hx):
    return hx if isinstance(hx, tuple) else (hx,)


def joined(parts):
    return parts if len(parts) > 1 else parts[0]


def make(name, layout):
    """Our module, torch's with the same weights, an input, a mask, and two sets of states."""
    options = {**LAYOUTS[layout], "dtype": torch.float64}
    ours = getattr(fusedrnn, MODULES[name])(I, H, **options)
    torchs = getattr(nn, MODULES[name])(I, H, **options)
    torchs.load_state_dict(ours.state_dict())
    mask = torch.zeros(T, B, dtype=torch.bool)
    for b, starts in enumerate(STARTS):
        mask[starts, b] = True
    x = torch.randn(T, B, I, dtype=torch.float64)
    if ours.batch_first:
        mask, x = mask.T.contiguous(), x.transpose(0, 1).contiguous()
    layers = ours.num_layers * (2 if ours.bidirectional else 1)

    def state():
        shape = (2 if name == "lstm" else 1, layers, B, H)
        return tuple(torch.randn(shape, dtype=torch.float64).unbind())

    return ours, torchs, x, mask, state(), state()


def split_and_run(module, x, hx, fresh, lengths=None):
    """Every row and part alone: [T, B, D * H] outputs, and final states."""
    time_major = x.transpose(0, 1) if module.batch_first else x
    D = 2 if module.bidirectional else 1
    outputs, finals = [], []
    for b, starts in enumerate(STARTS):
        end = T if lengths is None else lengths[b]
        cuts = [0, *(s for s in starts if 0 < s < end), end]
        pieces, ends = [], []
        for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
            first = []
            for h, f in zip(hx, fresh, strict=True):
                h, f = (s[:, b : b + 1].unflatten(0, (-1, D)) for s in (h, f))
                forward = h[:, :1] if i == 0 and 0 not in starts else f[:, :1]
                reverse = h[:, 1:] if i == len(cuts) - 2 else f[:, 1:]
                first.append(torch.cat([forward, reverse], 1).flatten(0, 1).contiguous())
            part = time_major[start:stop, b : b + 1]
            part = part.transpose(0, 1) if module.batch_first else part
            output, last = module(part, joined(tuple(first)))
            pieces.append(output.transpose(0, 1) if module.batch_first else output)
            ends.append(states(last))
        missing = T - end
        pieces.append(pieces[0].new_zeros(missing, 1, pieces[0].shape[-1]))
        outputs.append(torch.cat(pieces))
        final = []
        for s in range(len(hx)):
            forward = ends[-1][s].unflatten(0, (-1, D))[:, :1]
            reverse = ends[0][s].unflatten(0, (-1, D))[:, 1:]
            final.append(torch.cat([forward, reverse], 1).flatten(0, 1))
        finals.append(final)
    output = torch.cat(outputs, 1)
    output = output.transpose(0, 1) if module.batch_first else output
    return output, tuple(torch.cat(parts, 1) for parts in zip(*finals, strict=True))


def assert_same(found, expected):
    output, final = found
    torch.testing.assert_close(output, expected[0], **VALUES64)
    for one, other in zip(states(final), expected[1], strict=True):
        torch.testing.assert_close(one, other, **VALUES64)


@each_layout
@each_module
def test_equal_to_splitting(name, layout):
    ours, torchs, x, mask, hx, _ = make(name, layout)
    zeros = tuple(torch.zeros_like(h) for h in hx)
    assert_same(ours(x, joined(hx), reset=mask), split_and_run(torchs, x, hx, zeros))
    assert_same(ours(x, reset=mask), split_and_run(torchs, x, zeros, zeros))


@each_layout
@each_module
def test_resets_to_a_given_state(name, layout):
    ours, torchs, x, mask, hx, fresh = make(name, layout)
    found = ours(x, joined(hx), reset=(mask, joined(fresh)))
    assert_same(found, split_and_run(torchs, x, hx, fresh))

    one = tuple(f[:, :1] for f in fresh)
    found = ours(x, joined(hx), reset=(mask, joined(one)))
    assert_same(
        found,
        split_and_run(torchs, x, hx, tuple(f.expand_as(h) for f, h in zip(one, hx, strict=True))),
    )


@each_layout
@each_module
def test_gradients_are_those_of_splitting(name, layout):
    ours, torchs, x, mask, hx, fresh = make(name, layout)
    torchs.load_state_dict(ours.state_dict())
    hx = tuple(h.requires_grad_() for h in hx)
    fresh = tuple(f[:, :1].clone().requires_grad_() for f in fresh)
    x.requires_grad_()
    found = ours(x, joined(hx), reset=(mask, joined(fresh)))
    wide = tuple(f.expand_as(h) for f, h in zip(fresh, hx, strict=True))
    expected = split_and_run(torchs, x, hx, wide)
    d_output = torch.randn_like(expected[0])
    d_final = [torch.randn_like(f) for f in expected[1]]
    tensors = [x, *hx, *fresh]
    one = torch.autograd.grad(
        [found[0], *states(found[1])], [*tensors, *ours.parameters()], [d_output, *d_final]
    )
    other = torch.autograd.grad(
        [expected[0], *expected[1]], [*tensors, *torchs.parameters()], [d_output, *d_final]
    )
    for found_grad, exact in zip(one, other, strict=True):
        torch.testing.assert_close(found_grad, exact, **GRADIENTS64)


@each_layout
def test_with_lengths(layout):
    """A reset at or beyond a row's end is of no row: it changes neither output nor final state."""
    ours, torchs, x, mask, hx, fresh = make("lstm", layout)
    lengths = [6, 8, 4, 5]  # the resets at 8, 4, 5 and 8 lie at or beyond the end
    found = ours(x, hx, lengths=torch.tensor(lengths), reset=(mask, fresh))
    assert_same(found, split_and_run(torchs, x, hx, fresh, lengths))


def test_nothing_crosses_a_reset():
    module = fusedrnn.LSTM(I, H, 2, bidirectional=True)
    x = torch.randn(T, 1, I, requires_grad=True)
    mask = torch.zeros(T, 1, dtype=torch.bool)
    mask[4] = True
    output, _ = module(x, reset=mask)
    (before,) = torch.autograd.grad(output[:4].sum(), x, retain_graph=True)
    (after,) = torch.autograd.grad(output[4:].sum(), x)
    assert before[:4].all()
    assert not before[4:].any()
    assert not after[:4].any()
    assert after[4:].all()


def test_unbatched():
    module = fusedrnn.GRU(I, H, 2, dtype=torch.float64)
    x = torch.randn(T, 1, I, dtype=torch.float64)
    mask = torch.arange(T) % 3 == 1
    fresh = torch.randn(2, H, dtype=torch.float64)
    expected = module(x, reset=(mask[:, None], fresh[:, None]))
    found = module(x[:, 0], reset=(mask, fresh))
    torch.testing.assert_close(found[0], expected[0][:, 0])
    torch.testing.assert_close(found[1], expected[1][:, 0])
    found = module(x[:, 0], reset=mask)
    torch.testing.assert_close(found[0], module(x, reset=mask[:, None])[0][:, 0])


@pytest.mark.parametrize("compiled", [False, True])
def test_custom_op(compiled):
    """What a compiled graph, and a backend that adopts resets, is called through."""
    ours, _, x, mask, hx, fresh = make("lstm", "plain")
    weights = tuple(ours.parameters())
    spec = Spec("lstm", I, H, backend="reference")

    def run(*tensors):
        operands = Operands(tensors[0], tensors[1:3], tensors[3:5], tensors[5:])
        return op.run(spec, operands, Masks(reset=mask))

    if compiled:
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    tensors = [t.requires_grad_() for t in (x, *hx, *fresh)]
    found = run(*tensors, *weights)
    expected = ours(x, hx, reset=(mask, fresh))
    assert len(found) == 3
    torch.testing.assert_close(found[0], expected[0], **VALUES64)
    one = torch.autograd.grad(found[0].square().sum(), [*tensors, *weights])
    other = torch.autograd.grad(expected[0].square().sum(), [*tensors, *weights])
    for found_grad, exact in zip(one, other, strict=True):
        torch.testing.assert_close(found_grad, exact, **GRADIENTS64)


MASK = torch.zeros(T, B, dtype=torch.bool)
STATE = torch.zeros(1, B, H)


@pytest.mark.parametrize(
    ("reset", "error", "message"),
    [
        (MASK.int(), TypeError, r"reset: expected a bool tensor \(9, 4\), got torch.int32"),
        ([True] * T, TypeError, r"reset: expected a mask or \(mask, states\), got 9 values"),
        ("start", TypeError, r"reset: expected a bool tensor \(9, 4\), got str"),
        (
            (None, (STATE, STATE)),
            TypeError,
            r"reset: expected a bool tensor \(9, 4\), got NoneType",
        ),
        (MASK.T, RuntimeError, r"reset: expected shape \(9, 4\), got \(4, 9\)"),
        ((MASK, STATE), TypeError, r"reset: expected the 2 tensors \('h', 'c'\), got 1"),
        (
            (MASK, (STATE, STATE[:, :2])),
            RuntimeError,
            r"reset \(c\): .*\(1, 4, 4\) or \(1, 1, 4\) .*, got \(1, 2, 4\)",
        ),
        (
            (MASK, (STATE, STATE.double())),
            RuntimeError,
            r"reset \(c\): expected torch.float32 on cpu as the h_0, got torch.float64 on cpu",
        ),
        ((MASK, (STATE, 0)), TypeError, r"reset \(c\): expected a Tensor, got int"),
    ],
)
def test_misuse(reset, error, message):
    with pytest.raises(error, match=message):
        fusedrnn.LSTM(I, H)(torch.randn(T, B, I), reset=reset)


def test_misuse_with_a_packed_sequence():
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(T, B, I), torch.tensor([9, 8, 7, 1]))
    with pytest.raises(ValueError, match="reset: a PackedSequence"):
        fusedrnn.LSTM(I, H)(packed, reset=MASK)


def test_a_backend_without_resets_refuses_rather_than_ignores():
    x = torch.randn(T, B, I)
    with pytest.raises(RuntimeError, match=r"'aten' .* resets inside a sequence"):
        fusedrnn.GRU(I, H, backend="aten")(x, reset=MASK)
    explanation = fusedrnn.explain(fusedrnn.GRU(I, H), x, reset=(MASK, STATE))
    assert explanation.backend == "loop"
    assert "resets to a given state" in explanation.passed_over["aten"]
    assert "reset" in str(explanation)


def test_under_autocast_a_state_is_cast_as_hx_is():
    module = fusedrnn.GRU(I, H)
    x, h_0 = torch.randn(T, B, I, dtype=torch.bfloat16), torch.randn(1, 1, H)
    mask = torch.zeros(T, B, dtype=torch.bool)
    mask[0] = True
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(x, reset=(mask, h_0))[0]
        expected = module(x, h_0.expand(1, B, H).contiguous(), reset=torch.zeros_like(mask))[0]
    assert torch.equal(found, expected)
