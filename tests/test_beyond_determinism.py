"""The same bits from run to run, with and without randomness.

What is promised is in the docstring of `fusedrnn.dispatch`; the GPU suite repeats this there.
"""

import pytest
import torch

import fusedrnn
from fusedrnn import op
from fusedrnn.call import Masks, Operands, Spec

T, B, I, H = 11, 6, 7, 24
ALL = {"input_dropout": 0.3, "recurrent_dropout": 0.3, "weight_drop": 0.3, "zoneout": 0.2}


@pytest.fixture(autouse=True)
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def everything(module, seed, *, lengths=None, reset=None):
    """Output, states and all gradients of one training step."""
    torch.manual_seed(0)
    x = torch.randn(T, B, I, requires_grad=True)
    torch.manual_seed(seed)
    output, final = module(x, lengths=lengths, reset=reset)
    states = final if isinstance(final, tuple) else (final,)
    loss = output.square().sum() + sum(s.sum() for s in states)
    return [output, *states, *torch.autograd.grad(loss, [x, *module.parameters()])]


def assert_same_bits(one, other):
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("extra", [{}, {"dropout": 0.5}, ALL], ids=["plain", "dropout", "all"])
@pytest.mark.parametrize("how", ["padded", "lengths", "reset"])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_bits_repeat(name, how, extra):
    options = {}
    if how == "lengths":
        options = {"lengths": torch.tensor([3, 0, 11, 5, 5, 1])}
    if how == "reset":
        torch.manual_seed(3)
        options = {"reset": torch.rand(T, B) < 0.3}
    torch.manual_seed(1)
    module = getattr(fusedrnn, name)(I, H, 2, bidirectional=True, **extra)
    first = everything(module, 5, **options)
    for _ in range(3):
        assert_same_bits(first, everything(module, 5, **options))
    if extra:
        assert not torch.equal(first[0], everything(module, 6, **options)[0])


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_bits_repeat_through_the_custom_ops(backend):
    torch.manual_seed(1)
    module = fusedrnn.LSTM(I, H, bidirectional=True)
    weights = tuple(module.parameters())
    spec = Spec("lstm", I, H, bidirectional=True, backend=backend)
    x = torch.randn(T, B, I, requires_grad=True)
    hx = tuple(torch.randn(2, B, H) for _ in range(2))

    def run():
        output, *_ = op.run(spec, Operands(x, hx, (), weights), Masks())
        return [output, *torch.autograd.grad(output.square().sum(), [x, *weights])]

    first = run()
    for _ in range(3):
        assert_same_bits(first, run())


def test_a_row_does_not_depend_on_what_stands_in_the_other_rows():
    """In the same batch size: the sums of a row are its own."""
    module = fusedrnn.GRU(I, H, 2, bidirectional=True)
    x = torch.randn(T, B, I)
    other = torch.cat([x[:, :1], torch.randn(T, B - 1, I)], 1)
    for backend in ("aten", "reference"):
        module.backend = backend
        assert torch.equal(module(x)[0][:, 0], module(other)[0][:, 0])
