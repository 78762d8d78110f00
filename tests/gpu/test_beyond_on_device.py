"""What nn.LSTM cannot do, repeated on the device."""

import pytest
import torch
from layer_checks import precision
from state_ops_checks import CASES, assert_as_the_reference
from tolerances import GRADIENTS32
from torch import func, nn

import fusedrnn
from fusedrnn.cells import REGISTRY

MODULES = ("LSTM", "GRU", "RNN")
DEVICE = "cuda"


@pytest.mark.parametrize("H", [17, 300])
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(("option", "batch_first", "rows"), CASES)
def test_inside_the_loop(module, option, batch_first, rows, H):
    with precision(tf32=False):
        assert_as_the_reference(module, option, batch_first, rows, device=DEVICE, H=H)


@pytest.mark.parametrize("H", [18, 300, 768])
@pytest.mark.parametrize(
    ("module", "option"),
    [
        *((m, "all") for m in ("reset before", "heads", "means", "alternating", "narrowing")),
        ("projected", "all but zoneout"),
    ],
)
@pytest.mark.parametrize(("batch_first", "rows"), [(False, "all"), (True, "lengths")])
def test_stages_and_heads(batch_first, rows, module, option, H):
    with precision(tf32=False):
        assert_as_the_reference(module, option, batch_first, rows, device=DEVICE, H=H)


@pytest.mark.parametrize("cell", REGISTRY)
@pytest.mark.parametrize("H", [18, 512])
def test_every_cell(cell, H):
    with precision(tf32=False):
        assert_as_the_reference(cell, "all", False, "lengths", device=DEVICE, H=H)


@pytest.mark.parametrize("module", MODULES)
def test_step_and_stream_equal_one_long_pass(module):
    rnn = getattr(fusedrnn, module)(8, 64, num_layers=2, device=DEVICE).eval()
    input = torch.randn(12, 3, 8, device=DEVICE)
    with torch.no_grad(), precision(tf32=False):
        expected, _ = rnn(input)
        state, steps = None, []
        for x in input:
            output, state = rnn.step(x, state)
            steps.append(output)
        stream = rnn.stream()
        chunks = [stream(chunk) for chunk in input.split(5)]
    torch.testing.assert_close(torch.stack(steps), expected, **GRADIENTS32)
    torch.testing.assert_close(torch.cat(chunks), expected, **GRADIENTS32)


@pytest.mark.parametrize("module", MODULES)
def test_per_sample_gradients_and_jvp(module):
    rnn = getattr(fusedrnn, module)(4, 16, device=DEVICE)
    input = torch.randn(5, 3, 4, device=DEVICE)
    weights = {name: p.detach() for name, p in rnn.named_parameters()}

    def loss(weights, row):
        return func.functional_call(rnn, weights, (row,))[0].square().mean()

    found = func.vmap(func.grad(loss), in_dims=(None, 1))(weights, input)
    for b in range(3):
        single = torch.autograd.grad(rnn(input[:, b])[0].square().mean(), list(rnn.parameters()))
        for (name, _), gradient in zip(rnn.named_parameters(), single, strict=True):
            torch.testing.assert_close(found[name][b], gradient, rtol=1e-2, atol=1e-4)  # tf32
    _, tangent = func.jvp(lambda x: rnn(x)[0], (input,), (torch.ones_like(input),))
    assert tangent.isfinite().all()


def test_checkpoint_and_data_parallel():
    rnn = fusedrnn.GRU(8, 64, num_layers=2, dropout=0.5, device=DEVICE)
    input = torch.randn(6, 4, 8, device=DEVICE, requires_grad=True)
    torch.manual_seed(0)
    expected = torch.autograd.grad(rnn(input)[0].sum(), input)
    torch.manual_seed(0)
    output = torch.utils.checkpoint.checkpoint(lambda x: rnn(x)[0], input, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), input), expected)
    if DEVICE == "cuda":
        rnn.eval()
        torch.testing.assert_close(nn.DataParallel(rnn, dim=1)(input)[0], rnn(input)[0])


@pytest.mark.parametrize("module", MODULES)
def test_bits_repeat_under_deterministic_algorithms(module, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        rnn = getattr(fusedrnn, module)(8, 300, device=DEVICE, recurrent_dropout=0.3, zoneout=0.1)
        input = torch.randn(9, 5, 8, device=DEVICE)
        runs = []
        for _ in range(3):
            torch.manual_seed(1)
            rnn.zero_grad()
            output, _ = rnn(input)
            output.square().sum().backward()
            runs.append([output.detach(), *(p.grad.clone() for p in rnn.parameters())])
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        for first, again in zip(runs[0], run, strict=True):
            assert torch.equal(first, again)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("H", [64, 300])
def test_bad_values_stay_in_their_row(H, value):
    rnn = fusedrnn.LSTM(8, H, device=DEVICE)
    input = torch.randn(5, 4, 8, device=DEVICE)
    dirty = input.clone()
    dirty[1, 2] = value
    others = [0, 1, 3]
    torch.testing.assert_close(rnn(dirty)[0][:, others], rnn(input)[0][:, others])


def test_overflow_of_float16_as_cudnn():
    ours = fusedrnn.RNN(4, 64, nonlinearity="relu", device=DEVICE, dtype=torch.float16)
    theirs = nn.RNN(4, 64, nonlinearity="relu", device=DEVICE, dtype=torch.float16)
    theirs.load_state_dict(ours.state_dict())
    input = torch.full((40, 2, 4), 6e4, device=DEVICE, dtype=torch.float16)
    assert torch.equal(ours(input)[0].isfinite().all(-1), theirs(input)[0].isfinite().all(-1))


def test_out_of_memory_leaves_the_module_usable():
    rnn = fusedrnn.LSTM(8, 64, device=DEVICE)
    input = torch.randn(3, 2, 8, device=DEVICE)
    expected, _ = rnn(input)
    with pytest.raises(torch.OutOfMemoryError):
        rnn(torch.empty(1, device=DEVICE).expand(2**20, 2**20, 8))
    torch.testing.assert_close(rnn(input)[0], expected)


@pytest.mark.parametrize("value", [float("-inf"), float("nan")])
@pytest.mark.parametrize("backend", ["triton", "aten"])
@pytest.mark.parametrize("module", MODULES)
def test_padding_reaches_nothing(module, backend, value):
    rnn = getattr(fusedrnn, module)(8, 64, 2, bidirectional=True, backend=backend, device=DEVICE)
    input = torch.randn(9, 4, 8, device=DEVICE)
    lengths = torch.tensor([9, 0, 3, 6], device=DEVICE)
    over = torch.arange(9, device=DEVICE)[:, None] >= lengths

    def run(filling):
        leaf = input.masked_fill(over[..., None], filling).requires_grad_()
        output = rnn(leaf, lengths=lengths)[0]
        return [output, *torch.autograd.grad(output.sum(), [leaf, *rnn.parameters()])]

    for found, expected in zip(run(value), run(0.0), strict=True):
        torch.testing.assert_close(found, expected, **GRADIENTS32)


@pytest.mark.parametrize("module", MODULES)
def test_states_of_all_steps(module):
    def run(backend):
        torch.manual_seed(0)
        rnn = getattr(fusedrnn, module)(8, 64, 2, backend=backend, device=DEVICE)
        states = rnn(torch.randn(9, 4, 8, device=DEVICE), return_states=True)[2]
        return [
            states,
            torch.autograd.grad(sum(s.sum() for s in states.values()), rnn.parameters()),
        ]

    with precision(tf32=False):
        expected = run("reference")
        for backend in ("triton", "aten"):
            torch.testing.assert_close(run(backend), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_generator_repeats_in_checkpoints(reentrant):
    own = torch.Generator(DEVICE)
    rnn = fusedrnn.GRU(8, 64, 2, recurrent_dropout=0.5, dropout=0.5, generator=own, device=DEVICE)
    input = torch.randn(6, 4, 8, device=DEVICE, requires_grad=True)

    def gradient(run):
        own.manual_seed(1)
        input.grad = None
        run(input).square().sum().backward()
        return input.grad.clone()

    def inside(x):
        return torch.utils.checkpoint.checkpoint(call, x, use_reentrant=reentrant)

    call = lambda x: rnn(x)[0]  # noqa: E731
    torch.testing.assert_close(gradient(inside), gradient(call))
