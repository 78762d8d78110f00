"""Lengths, packed rows and resets of an LSTM through torch's plain operator, against the loop."""

import copy

import pytest
import torch
from tolerances import GRADIENTS64, VALUES64, assert_same
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fusedrnn
from fusedrnn.backends import reference, stretch

T, B, I, H = 7, 4, 3, 5
LENGTHS = {"full": None, "some": [7, 3, 0, 5], "short": [2, 1, 0, 4], "none": [0, 0, 0, 0]}
RESETS = {"never": 0.0, "some": 0.3, "always": 1.0}
LAYERS = {
    "one": {},
    "reverse": {"direction": "reverse"},
    "2x2": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "residual": {"num_layers": 2, "residual": True, "batch_first": True},
    "no bias": {"num_layers": 2, "bias": False, "direction": ["reverse", "forward"]},
}
every_layers = pytest.mark.parametrize("layers", LAYERS)


def pair(layers, **options):
    """The same module through aten and through the reference."""
    ours = fusedrnn.LSTM(I, H, **LAYERS[layers], backend="aten", **options)
    loop = copy.deepcopy(ours)
    loop.backend = "reference"
    return ours, loop


def tensors(module, dtype=torch.float64):
    """An input and a state."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    shape = (B, T, I) if module.batch_first else (T, B, I)
    leaves = [torch.randn(*size, dtype=dtype) for size in (shape, *[(rows, B, H)] * 2)]
    return [leaf.requires_grad_() for leaf in leaves]


def results(module, x, h, c, *, packed=None, **options):
    """Outputs and the gradients of all leaves; `packed` are lengths to pack the input by."""
    given = x
    if packed is not None:
        given = pack_padded_sequence(x, packed, module.batch_first, enforce_sorted=False)
    output, final = module(given, (h, c), **options)
    outputs = [output if packed is None else output.data, *final]
    generator = torch.Generator().manual_seed(1)
    d_outputs = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
    return outputs, torch.autograd.grad(outputs, [x, h, c, *module.parameters()], d_outputs)


def random_reset(module, often=0.3):
    return torch.rand((B, T) if module.batch_first else (T, B)) < often


def assert_equal(found, expected):
    torch.testing.assert_close(found[0], expected[0], **VALUES64)
    torch.testing.assert_close(found[1], expected[1], **GRADIENTS64)


@every_layers
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("resets", RESETS)
def test_equal_to_the_loop(layers, lengths, resets):
    ours, loop = pair(layers, dtype=torch.float64)
    leaves, options = tensors(ours), {}
    if LENGTHS[lengths] is not None:
        options["lengths"] = torch.tensor(LENGTHS[lengths])
    if resets != "never" or not options:
        options["reset"] = random_reset(ours, RESETS[resets])
    assert_equal(results(ours, *leaves, **options), results(loop, *leaves, **options))


@every_layers
def test_packed(layers):
    ours, loop = pair(layers, dtype=torch.float64)
    leaves, lengths = tensors(ours), torch.tensor([3, 7, 1, 5])
    assert_equal(results(ours, *leaves, packed=lengths), results(loop, *leaves, packed=lengths))


def test_the_operator_runs_the_steps_that_are_told(monkeypatch):
    """And the loop none: all of the above would hold, too, if it ran everything."""
    ran, lstm = [], torch.lstm
    monkeypatch.setattr(torch, "lstm", lambda x, *rest: ran.append(len(x)) or lstm(x, *rest))
    monkeypatch.delattr(reference, "scan")
    module = fusedrnn.LSTM(I, H)
    x, lengths, reset = torch.randn(T, B, I), torch.tensor([4, 6, 0, 2]), random_reset(module)
    module(x, lengths=lengths, reset=reset)
    most = max(n + int(reset[1:n, b].sum()) for b, n in enumerate(lengths.tolist()))
    assert ran == [most] == [int(stretch.ends(T, B, lengths, reset).max())]


@every_layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_the_padding_and_bits_that_repeat(layers, dtype):
    ours, _ = pair(layers, dtype=dtype)
    x, h, c = tensors(ours, dtype)
    lengths, reset = torch.tensor([7, 3, 0, 5]), random_reset(ours)
    over = torch.arange(T)[:, None] >= lengths
    filled = torch.where((over.T if ours.batch_first else over)[..., None], torch.nan, x)
    again = x.masked_fill(filled.isnan(), 0)
    expected = results(ours, again.detach().requires_grad_(), h, c, lengths=lengths, reset=reset)
    for _ in range(2):
        found = results(ours, filled.detach().requires_grad_(), h, c, lengths=lengths, reset=reset)
        for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
            assert_same(one, other, layers)


POISON = {
    "first state": lambda module, x, h, c: (h[0, 1].fill_(torch.nan), c[0, 1].fill_(torch.inf)),
    "later state": lambda module, x, h, c: x[2, 1].fill_(torch.nan),
    "cell state": lambda module, x, h, c: c[0].fill_(torch.inf),
    "empty row": lambda module, x, h, c: (h[0, 0].fill_(torch.nan), c[0, 0].fill_(torch.inf)),
    "weight": lambda module, x, h, c: module.weight_ih_l0[0, 0].fill_(torch.inf),
    "huge": lambda module, x, h, c: h[0].fill_(1e300),
}


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("before", [0, 3, None])
def test_a_reset_clears_what_is_not_finite(poison, before):
    """As in the loop: NaN where it has NaN, and nowhere else, in the gradients too."""
    ours, loop = pair("one", dtype=torch.float64)
    x, h, c = tensors(ours)
    with torch.no_grad():
        POISON[poison](ours, x, h, c)
        loop.load_state_dict(ours.state_dict())
    options = {"lengths": torch.tensor([0, 7, 5, 4])}
    if before is not None:
        options["reset"] = (torch.arange(T) == before)[:, None].expand(T, B)
    found, expected = results(ours, x, h, c, **options), results(loop, x, h, c, **options)
    for one, other, near in zip(found, expected, (VALUES64, GRADIENTS64), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, **near)
    if poison == "later state" and before == 3:
        assert found[0][0][2, 1].isnan().all()
        assert found[0][0][3:].isfinite().all()


def test_derivatives_of_the_second_order():
    module = fusedrnn.LSTM(I, 2, backend="aten", dtype=torch.float64)
    x = torch.randn(4, 2, I, dtype=torch.float64, requires_grad=True)
    reset = torch.tensor([[0, 1], [0, 0], [1, 0], [0, 1]]).bool()

    def call(x, *weights):
        given = dict(zip(dict(module.named_parameters()), weights, strict=True))
        options = {"reset": reset, "lengths": torch.tensor([4, 3])}
        return torch.func.functional_call(module, given, (x,), options)[0]

    assert torch.autograd.gradgradcheck(call, (x, *module.parameters()))


@pytest.mark.parametrize("kind", ["lengths", "reset"])
def test_compiled(kind):
    module = fusedrnn.LSTM(I, H, 2, bidirectional=True, dtype=torch.float64)
    leaves = tensors(module)
    given = {"lengths": torch.tensor([7, 3, 0, 5]), "reset": random_reset(module)}
    options = {kind: given[kind]}
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = results(module, *leaves, **options)
    with torch.random.fork_rng():
        output, final = compiled(leaves[0], tuple(leaves[1:]), **options)
    torch.testing.assert_close([output, *final], expected[0], **VALUES64)
    assert fusedrnn.explain(module, leaves[0], **options).backend == "aten"


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_autocast(kind, low):
    """float16 gives what float32 gives from rounded values, rounded; bfloat16 is torch's own."""
    module = getattr(fusedrnn, kind)(I, H, bidirectional=True)
    rounded = copy.deepcopy(module).to(low).float()
    x, lengths = torch.randn(T, B, I), torch.tensor([7, 3, 0, 5])
    options = {"lengths": lengths}
    if kind == "LSTM":
        options["reset"] = random_reset(module)
    with torch.autocast("cpu", dtype=low):
        found = tree_leaves(module(x, **options))
    for value, exact in zip(found, tree_leaves(rounded(x.to(low).float(), **options)), strict=True):
        if low == torch.float16:
            assert_same(value, exact.to(value.dtype), kind)
        else:  # h is rounded at each of T steps and read by gates: half an ulp of 1, each
            torch.testing.assert_close(value.float(), exact, rtol=0, atol=T * torch.finfo(low).eps)


@pytest.mark.parametrize("given", ["lengths", "reset"])
def test_a_batch_without_rows(given):
    module = fusedrnn.LSTM(3, 4, bidirectional=True)
    options = {
        "lengths": {"lengths": torch.zeros(0, dtype=torch.int64)},
        "reset": {"reset": torch.zeros(5, 0, dtype=torch.bool)},
    }[given]
    x = torch.randn(5, 0, 3, requires_grad=True)
    output, (h_n, c_n) = module(x, **options)
    assert (output.shape, h_n.shape, c_n.shape) == ((5, 0, 8), (2, 0, 4), (2, 0, 4))
    output.sum().backward()
    assert x.grad.shape == x.shape
