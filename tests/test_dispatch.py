"""Which backend runs a call: who may choose, who may refuse, and what is said about it."""

import asyncio
import importlib
import importlib.machinery
import importlib.metadata
import itertools
import logging
import os
import subprocess
import sys
import threading
import types

import pytest
import torch
from calls import call_of
from torch._subclasses.fake_tensor import FakeTensorMode

import fusedrnn
from fusedrnn import cells, dispatch, stack
from fusedrnn.backends import aten, loop, reference, triton

KINDS = ("LSTM", "GRU", "RNN")


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    """The tests of the kernels switch it on for their whole process."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def ran(monkeypatch):
    """The backends that calls went to, in order."""
    seen = []

    def spy(name, where, what):
        original = getattr(where, what)

        def wrapped(*args, **kwargs):
            seen.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(where, what, wrapped)

    spy("aten", stack, "_torchs_own")
    spy("aten", aten, "forward")
    spy("loop", loop, "forward")
    spy("reference", reference, "forward")
    return seen


def run(module, **options):
    return module(torch.randn(5, 2, 3), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cpu_gets_torchs_kernels(kind, ran):
    module = getattr(fusedrnn, kind)(3, 4)
    run(module)
    assert ran == ["aten"]
    assert fusedrnn.explain(module, torch.randn(5, 2, 3)).backend == "aten"


def test_the_shortcut_agrees_with_select():
    """`stack.run` decides plain CPU calls itself; `select` must say the same."""
    for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        for packed in (False, True):
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                for asked in (None, "auto", "aten", "loop", "reference"):
                    call = call_of(cell, dtype=dtype, packed=packed, backend=asked)
                    given = stack.Given(call.spec, torch.zeros(5, 2, 3), None, [])
                    shortcut = stack.is_torchs_own(given)
                    assert (dispatch.select(call) == "aten") == shortcut
    for T, B, batch_first in itertools.product((11, 12, 23, 24), (2, 1 << 13), (False, True)):
        for cell in ("lstm", "gru", "rnn_tanh"):
            options = {"training": True, "batch_first": batch_first}
            call = call_of(cell, **options)._replace(T=T, B=B)
            shape = (B, T, 3) if batch_first else (T, B, 3)
            given = stack.Given(call.spec, torch.empty(shape, dtype=call.dtype), None, [])
            assert (dispatch.select(call) == "aten") == stack.is_torchs_own(given)


def test_what_aten_lacks_goes_to_the_loop(ran):
    module = fusedrnn.GRU(3, 4)
    reset = torch.zeros(5, 2, dtype=torch.bool)
    run(module, reset=reset)
    assert ran == ["loop"]
    explanation = fusedrnn.explain(module, torch.randn(5, 2, 3), reset=reset)
    assert explanation.backend == "loop"
    assert "reset" in explanation.passed_over["aten"]


def test_forced_by_the_module(ran):
    run(fusedrnn.LSTM(3, 4, backend="reference"))
    module = fusedrnn.LSTM(3, 4)
    module.backend = "reference"
    run(module)
    assert ran == ["reference"] * 2


def test_forced_by_the_context(ran):
    module = fusedrnn.GRU(3, 4)
    with fusedrnn.use_backend("reference"):
        run(module)
        with fusedrnn.use_backend("aten"):
            run(module)
        run(module)
    run(module)
    assert ran == ["reference", "aten", "reference", "aten"]


def test_the_context_ends_with_an_exception(ran):
    with pytest.raises(KeyError), fusedrnn.use_backend("reference"):
        raise KeyError
    run(fusedrnn.RNN(3, 4))
    assert ran == ["aten"]


def test_threads_do_not_see_each_others_blocks(ran):
    """Blocks that overlap, and end in the order in which they began."""
    module = fusedrnn.GRU(3, 4)
    turn = threading.Barrier(3, timeout=30)
    told = {}

    def work(name):
        with fusedrnn.use_backend(name):
            turn.wait()
            told[name] = fusedrnn.explain(module, torch.randn(5, 2, 3)).backend
            turn.wait()
            if name == "aten":
                turn.wait()  # the other's block has ended by then
                told["still"] = fusedrnn.explain(module, torch.randn(5, 2, 3)).because
        if name == "reference":
            told["after"] = fusedrnn.explain(module, torch.randn(5, 2, 3)).because
            turn.wait()

    threads = [threading.Thread(target=work, args=(n,)) for n in ("reference", "aten")]
    for thread in threads:
        thread.start()
    turn.wait()
    outside = fusedrnn.explain(module, torch.randn(5, 2, 3)).because
    turn.wait()
    turn.wait()
    for thread in threads:
        thread.join()
    assert told["reference"] == "reference"
    assert told["aten"] == "aten"
    assert "forced" in told["still"]
    assert "forced" not in told["after"] + outside
    assert "forced" not in fusedrnn.explain(module, torch.randn(5, 2, 3)).because


def test_tasks_do_not_see_each_others_blocks():
    module = fusedrnn.GRU(3, 4)

    async def task(name, seconds):
        with fusedrnn.use_backend(name):
            await asyncio.sleep(seconds)
            return fusedrnn.explain(module, torch.randn(5, 2, 3)).backend

    async def main():
        told = await asyncio.gather(task("reference", 0.01), task("aten", 0.02))
        return told, fusedrnn.explain(module, torch.randn(5, 2, 3)).because

    told, after = asyncio.run(main())
    assert told == ["reference", "aten"]
    assert "forced" not in after
    assert "forced" not in fusedrnn.explain(module, torch.randn(5, 2, 3)).because


WRONG = {
    "1-D": (torch.randn(3), {}),
    "4-D": (torch.randn(1, 5, 2, 3), {}),
    "nothing": (None, {}),
    "features": (torch.randn(5, 2, 9), {}),
    "integers": (torch.ones(5, 2, 3, dtype=torch.int64), {}),
    "no steps": (torch.randn(0, 2, 3), {}),
    "lengths": (torch.randn(5, 2, 3), {"lengths": torch.tensor([6, 1])}),
    "reset": (torch.randn(5, 2, 3), {"reset": torch.zeros(2, 5, dtype=torch.bool)}),
    "state": (torch.randn(5, 2, 3), {"hx": torch.randn(1, 3, 4)}),
}


@pytest.mark.parametrize("case", WRONG)
def test_explain_raises_what_the_call_raises(case):
    input, options = WRONG[case]
    module = fusedrnn.GRU(3, 4)
    with pytest.raises((TypeError, ValueError, RuntimeError)) as of_call:
        module(input, **options)
    with pytest.raises(of_call.type) as of_explain:
        fusedrnn.explain(module, input, **options)
    assert str(of_explain.value) == str(of_call.value)


@pytest.mark.parametrize("input", [torch.randn(2, 2, 3), torch.randn(2, 4), None])
def test_explain_of_a_cell_raises(input):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=r"input: expected .*got"):
        fusedrnn.explain(fusedrnn.GRUCell(3, 4), input)


def test_explain_of_something_else():
    for other in ("x", None, torch.nn.LSTM(3, 4)):
        with pytest.raises(TypeError, match="module: expected one of fusedrnn's modules, got"):
            fusedrnn.explain(other, torch.randn(5, 2, 3))


@pytest.mark.parametrize("training", [True, False])
def test_explain_draws_nothing(training):
    options = dict(recurrent_dropout=0.2, weight_drop=0.2, input_dropout=0.2, zoneout=0.2)
    module = fusedrnn.LSTM(3, 4, 2, dropout=0.5, **options).train(training)
    before = torch.get_rng_state()
    assert fusedrnn.explain(module, torch.randn(5, 2, 3, generator=torch.Generator())).backend
    assert torch.equal(torch.get_rng_state(), before)


def test_the_modules_own_comes_first(ran):
    with fusedrnn.use_backend("reference"):
        run(fusedrnn.LSTM(3, 4, backend="aten"))
        run(fusedrnn.LSTM(3, 4, backend="auto"))
    assert ran == ["aten", "aten"]


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(kind, ran):
    cell = getattr(fusedrnn, kind)(3, 4)
    input = torch.randn(2, 3)
    expected = cell(input)
    assert ran == []  # torch's own cell
    assert fusedrnn.explain(cell, input).backend == "aten"
    with fusedrnn.use_backend("reference"):
        torch.testing.assert_close(cell(input), expected)
        assert fusedrnn.explain(cell, input).backend == "reference"
    assert ran == ["reference"]


def test_a_cell_on_a_gpu_is_torchs_own(imaginary_gpu):
    """As CellModule.forward has it; one step is no work for the fused loop."""
    with FakeTensorMode():
        input = torch.empty(2, 3, device="cuda")
        assert fusedrnn.explain(fusedrnn.LSTMCell(3, 4), input).backend == "aten"
        forced = fusedrnn.LSTMCell(3, 4, backend="reference")
        assert fusedrnn.explain(forced, input).backend == "reference"


PRINT = """
import torch, fusedrnn
module = fusedrnn.LSTM(3, 4)
print(fusedrnn.explain(module, torch.randn(5, 2, 3)).backend)
with fusedrnn.use_backend("aten"):
    print(fusedrnn.explain(module, torch.randn(5, 2, 3)).backend)
"""


@pytest.mark.parametrize("name", ["reference", "", "nonsense"])
def test_the_environment(name):
    env = {**os.environ, "FUSEDRNN_BACKEND": name}
    done = subprocess.run([sys.executable, "-c", PRINT], env=env, capture_output=True, text=True)
    if name == "nonsense":
        assert done.returncode != 0
        assert "FUSEDRNN_BACKEND must be one of" in done.stderr
        assert "'nonsense'" in done.stderr
    else:
        assert done.stdout.split() == [name or "aten", "aten"], done.stderr


def test_unknown_names():
    with pytest.raises(ValueError, match=r"backend must be one of .*'aten'.*, got 'cudnn'"):
        fusedrnn.LSTM(3, 4, backend="cudnn")
    with (
        pytest.raises(ValueError, match=r"use_backend\(backend\) must be .* got None"),
        fusedrnn.use_backend(None),
    ):
        pass


STATE = (torch.zeros(1, 2, 4),) * 2
REFUSED = [
    ("triton", {}, "the tensors are on the cpu"),
    ("aten", {"reset": (torch.zeros(5, 2, dtype=torch.bool), STATE)}, "do not have .*reset"),
]


@pytest.mark.parametrize(("backend", "options", "why"), REFUSED)
def test_a_forced_backend_that_cannot_says_why(backend, options, why):
    module = fusedrnn.LSTM(3, 4, backend=backend)
    with pytest.raises(RuntimeError, match=f"backend '{backend}' was asked for .*{why}"):
        run(module, **options)
    with pytest.raises(RuntimeError, match=why):
        fusedrnn.explain(module, torch.randn(5, 2, 3), **options)


def test_a_forced_backend_is_never_left_in_silence(monkeypatch):
    """Every refusal that dispatch knows turns a forced call into an error."""
    for name in fusedrnn.BACKENDS:
        monkeypatch.setitem(dispatch.REFUSES, name, lambda call: "of a reason")
        with pytest.raises(RuntimeError, match=f"'{name}' was asked for .*: of a reason"):
            dispatch.select(call_of(backend=name))


CUDA = {"device": "cuda"}
TRITON_REFUSES = [
    ({"dtype": torch.float64}, "not torch.float64", "aten"),
    ({"B": 0}, "B=0", "aten"),
    ({"transformed": True}, "torch.func", "reference"),
    ({"device": "mps"}, "not on mps", "aten"),
]


@pytest.mark.parametrize(("change", "why", "instead"), TRITON_REFUSES)
def test_a_gpu_falls_back_and_says_so_once(
    change, why, instead, monkeypatch, caplog, imaginary_gpu
):
    monkeypatch.setattr(triton, "MISSING", None)
    dispatch._warn_once.cache_clear()
    call = call_of(**{**CUDA, **change})
    with caplog.at_level(logging.WARNING, logger="fusedrnn"):
        assert dispatch.select(call) == instead
        assert dispatch.select(call) == instead
    assert len(caplog.records) == (call.device.type == "cuda")
    explanation = dispatch.explain_call(call)
    assert explanation.backend == instead
    assert why in explanation.passed_over["triton"]
    dispatch._warn_once.cache_clear()


def test_a_gpu_gets_the_fused_kernels(monkeypatch, caplog, imaginary_gpu):
    monkeypatch.setattr(triton, "MISSING", None)
    for cell in cells.REGISTRY:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            call = call_of(cell, **CUDA, dtype=dtype)
            assert dispatch.select(call) == "triton"
    assert not caplog.records


def test_a_hidden_size_that_a_compiler_has_as_a_symbol(monkeypatch):
    """functional.* read H off the weights, whose shapes torch.compile makes symbols."""
    from fusedrnn import kernels

    monkeypatch.setattr(triton, "MISSING", None)
    monkeypatch.setattr(kernels, "refusal", lambda cell, dtype, H, D, device, P: None)

    gpu = call_of(**CUDA)

    def refused(weight):
        return triton.refuses(gpu._replace(spec=gpu.spec._replace(hidden_size=weight.shape[0])))

    compiled = torch.compile(refused, fullgraph=True, dynamic=True, backend="eager")
    assert compiled(torch.zeros(8, 3)) is compiled(torch.zeros(12, 3)) is None


def test_a_layer_without_a_plan_goes_to_aten(monkeypatch):
    from fusedrnn.kernels import launch
    from fusedrnn.kernels.plan import Device

    small = Device((9, 0), 8, 99 * 1024, 100 * 1024)
    monkeypatch.setattr(launch, "device_of", lambda device: small)
    monkeypatch.setattr(triton, "MISSING", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "Imaginary GPU")
    call = call_of(**CUDA)
    assert dispatch.select(call) == "triton"
    explanation = dispatch.explain_call(call_of(**CUDA, hidden_size=50_000))
    assert explanation.backend == "aten"
    assert "no plan for forward of 'lstm' with H = 50000" in explanation.passed_over["triton"]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "AMD" in str(triton.refuses(call))


@pytest.fixture
def no_metadata(monkeypatch):
    """As if the triton that is there belonged to no distribution called triton."""

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_a_triton_of_another_distribution(no_metadata):
    """triton-windows and others install a package triton and no distribution of that name."""
    assert triton.triton_version() == importlib.import_module("triton").__version__
    assert triton._missing() is None


def test_a_folder_called_triton(no_metadata, monkeypatch):
    """Without Triton, a folder of that name beside a program is what Python finds."""
    folder = types.ModuleType("triton")
    folder.__spec__ = importlib.machinery.ModuleSpec("triton", None)
    monkeypatch.setitem(sys.modules, "triton", folder)
    assert triton._missing() == (
        "the package named triton here is not the compiler: it has no version"
    )


@pytest.mark.parametrize("missing", ["triton is not installed", "triton 3.1.0 is too old"])
def test_without_triton(missing, monkeypatch, imaginary_gpu):
    monkeypatch.setattr(triton, "MISSING", missing)
    dispatch._warn_once.cache_clear()
    explanation = dispatch.explain_call(call_of(**CUDA))
    assert explanation.backend == "aten"
    assert explanation.passed_over["triton"] == missing
    dispatch._warn_once.cache_clear()


def test_explain_prints_all_of_it():
    module = fusedrnn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2, batch_first=True)
    explanation = fusedrnn.explain(module, torch.randn(7, 5, 3))
    assert explanation.call.T == 5
    assert explanation.call.B == 7
    assert set(explanation.passed_over) == {"triton", "loop", "reference"}
    text = str(explanation)
    for part in (
        "lstm: 2 layer(s) x 2 direction(s), T=5 B=7 I=3 H=4 P=2, float32 on cpu (needs_grad)",
        "runs on  aten: torch's own kernels",
        "not on   triton: the tensors are on the cpu",
        "not on   reference: aten is faster",
    ):
        assert part in text


def test_explain_of_other_inputs():
    module = fusedrnn.GRU(3, 4, backend="reference")
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(5, 2, 3), [5, 2])
    explanation = fusedrnn.explain(module, packed)
    assert (explanation.call.T, explanation.call.B, explanation.call.packed) == (5, 2, True)
    assert explanation.because.startswith("forced")
    assert explanation.passed_over["aten"] == "reference is forced"
    unbatched = fusedrnn.explain(module, torch.randn(5, 3)).call
    assert (unbatched.T, unbatched.B) == (5, 1)
    with torch.no_grad():
        assert not fusedrnn.explain(module, torch.randn(5, 3)).call.needs_grad
    with pytest.raises(TypeError, match=r"got LSTM; use replace_modules"):
        fusedrnn.explain(torch.nn.LSTM(3, 4), torch.randn(5, 2, 3))


def test_the_interpreter_does_not_compute_bfloat16(monkeypatch):
    """Its own dot multiplies bit patterns; only the tests of the kernels repair it."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton, "MISSING", None)
    monkeypatch.setattr(triton, "INTERPRETED_DTYPES", (torch.float32, torch.float16))
    module = fusedrnn.LSTM(3, 4, backend="triton", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"interpreter computes torch\.bfloat16 wrongly"):
        module(torch.randn(5, 2, 3, dtype=torch.bfloat16))


def test_the_interpreter_runs_only_when_forced(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton, "MISSING", None)
    explanation = dispatch.explain_call(call_of())
    assert explanation.backend == "aten"
    assert "interpreter" in explanation.passed_over["triton"]
    assert dispatch.select(call_of(backend="triton")) == "triton"
