"""What only a device can show: no hang, the same bits, graphs, streams, sanitizers, refusal."""

import shutil
import subprocess
import sys
import time

import pytest
import torch

import fusedrnn
import fusedrnn.kernels as kernels


def spread_rnn(module: str = "LSTM", H: int = 768, **options):
    return getattr(fusedrnn, module)(64, H, device="cuda", backend="triton", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("H", [96, 768])
def test_ten_thousand_launches_do_not_hang(H, dtype):
    rnn = spread_rnn(H=H).to(dtype)
    input = torch.randn(3, 16, 64, device="cuda", dtype=dtype)
    with torch.no_grad():
        expected, _ = rnn(input)
        for _ in range(10_000):
            output, _ = rnn(input)
    kernels.check()
    assert torch.equal(output, expected)


@pytest.mark.parametrize("save", ["gates", "states"])
@pytest.mark.parametrize("module", ["LSTM", "GRU", "RNN"])
def test_same_bits_from_run_to_run(module, save):
    rnn = spread_rnn(module, H=512, save=save, num_layers=2, bidirectional=True, dropout=0.3)
    input = torch.randn(64, 32, 64, device="cuda")
    results = []
    for _ in range(5):
        torch.manual_seed(0)
        rnn.zero_grad()
        output, _ = rnn(input)
        output.square().sum().backward()
        results.append([output.detach(), *(p.grad.clone() for p in rnn.parameters())])
    for other in results[1:]:
        for first, again in zip(results[0], other, strict=True):
            assert torch.equal(first, again)


@pytest.mark.parametrize("H", [64, 768])
def test_cuda_graph_replay_of_a_training_step(H):
    rnn = spread_rnn("GRU", H=H)
    input = torch.randn(16, 8, 64, device="cuda")

    def step():
        rnn.zero_grad(set_to_none=False)
        output, _ = rnn(input)
        output.square().mean().backward()
        return output

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    input.copy_(torch.randn_like(input))
    graph.replay()
    torch.cuda.synchronize()
    replayed = [captured.clone(), *(p.grad.clone() for p in rnn.parameters())]
    expected = [step(), *(p.grad for p in rnn.parameters())]
    torch.testing.assert_close(replayed, expected, rtol=0, atol=0)


def test_no_call_waits_for_the_device():
    rnn = spread_rnn(H=256)
    input = torch.randn(8, 4, 64, device="cuda", requires_grad=True)
    lengths = torch.tensor([8, 2, 5, 8], device="cuda")
    rnn(input, lengths=lengths)[0].sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rnn(input, lengths=lengths)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_streams_at_once():
    modules = [spread_rnn("LSTM"), spread_rnn("GRU")]
    input = torch.randn(64, 16, 64, device="cuda")
    with torch.no_grad():
        expected = [m(input)[0] for m in modules]
        streams = [torch.cuda.Stream() for _ in modules]
        torch.cuda.synchronize()
        for _ in range(50):
            outputs = []
            for stream, module in zip(streams, modules, strict=True):
                with torch.cuda.stream(stream):
                    outputs.append(module(input)[0])
            torch.cuda.synchronize()
            for output, value in zip(outputs, expected, strict=True):
                assert torch.equal(output, value)
    kernels.check()


def test_on_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices: launches on the second were not verified")
    rnn = spread_rnn("GRU", H=512)
    input = torch.randn(32, 8, 64, device="cuda:0", requires_grad=True)
    expected = torch.autograd.grad(rnn(input)[0].square().sum(), input)[0]
    rnn.to("cuda:1")
    moved = input.detach().to("cuda:1").requires_grad_()
    found = torch.autograd.grad(rnn(moved)[0].square().sum(), moved)[0]
    kernels.check("cuda:1")
    assert torch.equal(found.cpu(), expected.cpu())
    assert torch.cuda.current_device() == 0


def test_serving_before_training():
    """What a first call in inference mode leaves behind must serve the calls after it."""
    kernels.launch._error_word.cache_clear()
    rnn = spread_rnn("GRU", H=256)
    input = torch.randn(4, 2, 64, device="cuda")
    with torch.inference_mode():
        expected = rnn(input)[0].clone()
    output, _ = rnn(input)
    output.sum().backward()
    kernels.check()
    assert torch.equal(output, expected)


SPIN = """
import torch, sys
x = torch.randn(8192, 8192, device="cuda")
print("ready", flush=True)
while True:
    x = (x @ x).clamp(-1, 1)
"""


def test_beside_a_process_that_holds_the_multiprocessors():
    """Right numbers, or an error that says why; never a hang."""
    rnn = spread_rnn(H=1024)
    input = torch.randn(64, 64, 64, device="cuda")
    with torch.no_grad():
        expected, _ = rnn(input)
    other = subprocess.Popen([sys.executable, "-c", SPIN], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == "ready"
        start, refusal, output = time.monotonic(), None, None
        try:
            with torch.no_grad():
                output, _ = rnn(input)
            kernels.check()
        except RuntimeError as error:
            refusal = str(error).lower()
        assert time.monotonic() - start < 60
        if refusal is None:
            assert torch.equal(output, expected)
        else:
            assert "timed out" in refusal or "cooperative" in refusal
    finally:
        other.kill()
        other.wait()
    with torch.no_grad():
        assert torch.equal(rnn(input)[0], expected)


SANITIZED = """
import torch, fusedrnn
for name in ("LSTM", "GRU"):
    rnn = getattr(fusedrnn, name)(16, 160, device="cuda", backend="triton", bidirectional=True)
    x = torch.randn(3, 5, 16, device="cuda", requires_grad=True)
    rnn(x, lengths=torch.tensor([3, 1, 2, 3, 3], device="cuda"))[0].sum().backward()
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed: memory and races were not checked by it")
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable]
    done = subprocess.run([*command, "-c", SANITIZED], capture_output=True, text=True, timeout=240)
    text = done.stdout + done.stderr
    if "Device not supported" in text:
        pytest.skip("compute-sanitizer does not support this device: nothing was checked by it")
    assert done.returncode == 0, text[-3000:]
    assert "ERROR SUMMARY: 0 errors" in text or "RACECHECK SUMMARY: 0" in text, text[-3000:]


def test_memory_saved_by_states():
    """save="states" keeps less between forward and backward than save="gates"."""
    kept = {}
    for save in ("gates", "states"):
        rnn = spread_rnn(H=512, save=save)
        input = torch.randn(128, 32, 64, device="cuda")
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        output, _ = rnn(input)
        kept[save] = torch.cuda.memory_allocated() - before
        del output, _
    H, N = 512, 128 * 32
    assert kept["gates"] - kept["states"] == pytest.approx(N * 4 * H * 4, rel=0.01)
