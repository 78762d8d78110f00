"""Whole modules on the device against cuDNN and float64, at the sizes that people train."""

import os

import pytest
import torch
from layer_checks import Case, assert_as_good_as_torch
from tolerances import GRADIENTS32

import fusedrnn

LOW = (torch.bfloat16, torch.float16)
MODULES = ("LSTM", "GRU", "RNN")


def test_the_kernels_are_compiled_and_chosen():
    assert os.environ.get("TRITON_INTERPRET", "0") != "1"
    rnn = fusedrnn.LSTM(64, 128, device="cuda")
    explanation = fusedrnn.explain(rnn, torch.randn(4, 8, 64, device="cuda"))
    assert explanation.backend == "triton"


PRECISIONS = {
    "fp32": {"dtype": torch.float32},
    "tf32": {"dtype": torch.float32, "tf32": True},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
}


@pytest.mark.parametrize("H", [64, 128, 192, 256, 300, 512, 768, 1024, 1500])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("module", MODULES)
def test_hidden_sizes(module, precision, H):
    case = Case(module, T=33, B=16, I=96, H=H, **PRECISIONS[precision])
    assert_as_good_as_torch(case, "cuda")


@pytest.mark.parametrize("B", [1, 5, 17, 64, 128, 257])
@pytest.mark.parametrize("H", [64, 512, 1024])
@pytest.mark.parametrize("module", MODULES)
def test_batch_sizes(module, H, B):
    assert_as_good_as_torch(Case(module, T=20, B=B, I=64, H=H, dtype=torch.bfloat16), "cuda")


@pytest.mark.parametrize("H", [1, 2, 17, 31, 33, 100, 129, 2048])
@pytest.mark.parametrize("module", MODULES)
def test_odd_hidden_sizes(module, H):
    assert_as_good_as_torch(Case(module, T=9, B=3, I=7, H=H), "cuda")


OPTIONS = {
    "plain": {},
    "stack": {"num_layers": 3},
    "bidirectional": {"num_layers": 2, "bidirectional": True},
    "batch_first": {"batch_first": True, "bidirectional": True, "bias": False},
}


@pytest.mark.parametrize("rows", ["all", "packed", "lengths"])
@pytest.mark.parametrize("save", ["gates", "states"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("H", "P"), [(33, 7), (512, 128), (1024, 320)])
def test_projection(H, P, precision, save, rows):
    options = {"proj_size": P, "bidirectional": True}
    where = {"T": 33, "B": 16, "I": 64, "H": H, **PRECISIONS[precision]}
    assert_as_good_as_torch(Case("LSTM", save=save, rows=rows, options=options, **where), "cuda")


@pytest.mark.parametrize("rows", ["all", "packed", "lengths"])
@pytest.mark.parametrize("save", ["gates", "states"])
@pytest.mark.parametrize("H", [64, 300, 768])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("module", MODULES)
def test_options(module, options, H, save, rows):
    case = Case(module, T=25, B=9, I=40, H=H, options=options, save=save, rows=rows)
    assert_as_good_as_torch(case, "cuda")


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("H", [128, 768])
@pytest.mark.parametrize("module", MODULES)
def test_long_sequences(module, H, dtype):
    assert_as_good_as_torch(Case(module, T=1024, B=16, I=64, H=H, dtype=dtype), "cuda")


def test_more_time_steps_than_cudnn_takes():
    rnn = fusedrnn.GRU(4, 32, device="cuda", backend="triton")
    input = torch.randn(70_000, 2, 4, device="cuda", requires_grad=True)
    output, h_n = rnn(input)
    output.square().mean().backward()
    # Exactly the same as in pieces: the state is all that a step needs of its past.
    with torch.no_grad():
        state, pieces = None, []
        for piece in input.split(10_000):
            part, state = rnn(piece, state)
            pieces.append(part)
    torch.testing.assert_close(torch.cat(pieces), output, **GRADIENTS32)
    torch.testing.assert_close(state, h_n, **GRADIENTS32)
    assert input.grad is not None
    assert input.grad.isfinite().all()


def test_offsets_beyond_two_to_the_31():
    T, B, H = 4_200, 128, 1024  # x_gates has T * B * 4 * H = 2.2e9 elements
    free, _ = torch.cuda.mem_get_info()
    if free < 40e9:
        pytest.skip(f"needs 40 GB of device memory, {free / 1e9:.0f} GB are free")
    rnn = fusedrnn.LSTM(16, H, device="cuda", dtype=torch.bfloat16, backend="triton")
    input = torch.randn(T, B, 16, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        output, _ = rnn(input)
        half, state = rnn(input[: T // 2])
        rest, _ = rnn(input[T // 2 :], state)
    # bfloat16 keeps c to 8 bits where the sequence is cut: two roundings of tanh's range.
    torch.testing.assert_close(output[: T // 2], half, rtol=0, atol=0)
    torch.testing.assert_close(output[T // 2 :], rest, rtol=0, atol=2**-6)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("module", MODULES)
def test_autocast_as_cudnn(module, dtype):
    ours = getattr(fusedrnn, module)(32, 256, device="cuda", backend="triton")
    theirs = getattr(torch.nn, module)(32, 256, device="cuda")
    theirs.load_state_dict(ours.state_dict())
    input = torch.randn(12, 8, 32, device="cuda")
    with torch.autocast("cuda", dtype=dtype):
        mine, its = ours(input)[0], theirs(input)[0]
    assert mine.dtype == its.dtype
    torch.testing.assert_close(mine, its, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", ["triton", "aten"])
@pytest.mark.parametrize("module", MODULES)
def test_eval_mode_and_second_derivatives(module, backend):
    rnn = getattr(fusedrnn, module)(8, 64, device="cuda", backend=backend).eval()
    input = torch.randn(5, 3, 8, device="cuda", requires_grad=True)
    (gradient,) = torch.autograd.grad(rnn(input)[0].sin().sum(), input, create_graph=True)
    gradient.square().sum().backward()
    same = input.detach().requires_grad_()
    with fusedrnn.use_backend("reference"):
        rnn.backend = None
        (expected,) = torch.autograd.grad(rnn(same)[0].sin().sum(), same, create_graph=True)
    expected.square().sum().backward()
    torch.testing.assert_close(input.grad, same.grad, rtol=1e-2, atol=1e-3)  # tf32


@pytest.mark.parametrize("module", MODULES)
def test_compile_and_export_see_one_node(module):
    rnn = getattr(fusedrnn, module)(8, 64, num_layers=2, device="cuda", backend="triton")
    compiled = torch.compile(rnn, fullgraph=True, dynamic=True)
    for T, B in ((4, 3), (9, 5)):
        input = torch.randn(T, B, 8, device="cuda", requires_grad=True)
        eager, got = rnn(input)[0], compiled(input)[0]
        torch.testing.assert_close(got, eager)
        cotangent = torch.randn_like(eager)
        leaves = [input, *rnn.parameters()]
        torch.testing.assert_close(
            torch.autograd.grad(got, leaves, cotangent),
            torch.autograd.grad(eager, leaves, cotangent),
        )
