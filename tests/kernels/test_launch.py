"""What surrounds a launch: the device it goes to, the error word, what is refused."""

import pytest
import torch

import fusedrnn
from fusedrnn.call import Weights
from fusedrnn.cells import REGISTRY
from fusedrnn.kernels import StateOps, launch
from fusedrnn.kernels.fragments import pitch
from fusedrnn.kernels.plan import INTERPRETER, Device, plan_scan
from fusedrnn.packing import Rows, rows_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def new_error_words():
    launch._error_word.cache_clear()
    yield
    launch._error_word.cache_clear()


def test_a_first_call_in_inference_mode_spoils_nothing():
    rnn = fusedrnn.GRU(3, 4, backend="triton")
    input = torch.randn(2, 1, 3)
    with torch.inference_mode():
        expected = rnn(input)[0].clone()
    assert torch.equal(rnn(input)[0], expected)
    launch._error_word(CPU).fill_(3)
    for mode in (torch.no_grad(), torch.inference_mode()):
        launch._error_word(CPU).fill_(3)
        with mode, pytest.raises(RuntimeError, match="timed out at step 3"):
            rnn(input)
        assert torch.equal(rnn(input)[0], expected)  # told once


def test_check_looks_at_the_word_that_launches_write(monkeypatch):
    """`cuda` is the current device, under whose index launches keep their word."""
    words = {torch.device("cuda", i): torch.zeros(1, dtype=torch.int32) for i in range(2)}
    monkeypatch.setattr(launch, "_error_word", words.__getitem__)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    launch.check()
    words[torch.device("cuda", 1)].fill_(7)
    launch.check("cuda:0")
    with pytest.raises(RuntimeError, match="timed out at step 7"):
        launch.check("cuda")
    launch.check()
    assert [d.index for d in waited] == [1, 0, 1, 1]


def test_a_time_out_that_comes_while_a_call_looks_is_kept():
    class Word:
        """Reads as 0, and is set by the device right after."""

        value = 0

        def item(self):
            found, self.value = self.value, 5
            return found

        def zero_(self):
            self.value = 0

    word = Word()
    launch._raise_if_timed_out(word)
    with pytest.raises(RuntimeError, match="step 5"):
        launch._raise_if_timed_out(word)


@pytest.mark.parametrize("B", [1, 2, 3])
def test_what_says_where_packed_rows_are_is_aligned(B):
    """Triton compiles for pointers that are multiples of 16 bytes, and once more for others."""
    batch_sizes = torch.tensor([B, 1])
    rows = rows_of(torch.zeros(B + 1, 4), False, None, batch_sizes)
    assert rows.offsets.tolist() == [0, B]
    assert rows.lengths.tolist() == [2] + [1] * (B - 1)
    assert rows.offsets.data_ptr() % 16 == rows.lengths.data_ptr() % 16 == 0


class Tensor:
    """As much of a tensor as a launch looks at."""

    dtype = torch.float32

    def __init__(self, device):
        self.device = device


def test_the_launch_goes_to_the_device_of_its_tensors(monkeypatch):
    """Triton takes the current device, whatever the pointers say."""
    current, launched = [0], []

    class Guard:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda **_: launched.append((grid, current[-1]))

    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(launch, "_error_word", lambda _: torch.zeros(1, dtype=torch.int32))
    monkeypatch.setattr(launch, "device_of", lambda _: INTERPRETER)
    cell = REGISTRY["gru"]
    plan = plan_scan(cell, "forward", torch.float32, B=4, H=16, D=1, device=INTERPRETER)
    assert not plan.exchanged
    like = Tensor(torch.device("cuda", 1))
    launch._launch(Kernel(), cell, plan, Rows(3, 4, 4, 1), (1, 16, 16, 1), "ieee", None, like=like)
    assert [index for _, index in launched] == [1]
    assert current == [0]


def test_gpus_older_than_the_kernels_are_refused(monkeypatch):
    for capability, refused in (((7, 5), True), ((8, 0), False), ((9, 0), False)):
        where = Device(capability, 108, 163 << 10, 164 << 10)
        monkeypatch.setattr(launch, "device_of", lambda device, where=where: where)
        told = launch.refusal(REGISTRY["lstm"], torch.float32, 64, 1, torch.device("cuda", 0))
        assert (told is not None) == refused
        if refused:
            assert "compute capability 8.0 and newer, cuda:0 has 7.5" in told


def arguments(**changes):
    """Of `scan_forward`: a GRU of two directions, T = 2, B = 3, H = 4."""
    cell = REGISTRY["gru"]
    weights = Weights(CPU, torch.ones(12, 4), None, torch.ones(12), None, ())
    return {
        "cell": cell,
        "x_gates": torch.ones(6, 2, 3, 4),
        "directions": [weights] * 2,
        "state": (torch.ones(2, 3, 4),),
        "rows": Rows(2, 3, 3, 1),
        "save": "gates",
        "input_precision": "ieee",
    } | changes


def with_weights(**changes):
    return arguments()["directions"][0]._replace(**changes)


LONG = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"save": ""}, r"save must be one of \('gates', 'states', None\), got ''"),
        ({"input_precision": "bf16"}, "input_precision must be one of .* got 'bf16'"),
        ({"x_gates": torch.ones(6, 3, 4)}, r"x_gates must have shape \(N, D, G, H\), got"),
        ({"x_gates": torch.ones(6, 2, 4, 4)}, r"x_gates must be .* \(6, 2, 3, 4\) .* got"),
        ({"x_gates": torch.ones(6, 2, 4, 3).mT}, "x_gates must be contiguous .* got .* strides"),
        ({"x_gates": torch.ones(6, 2, 3, 4).double()}, "must be one of .* got torch.float64"),
        ({"directions": [with_weights()]}, "directions must be 2, got 1"),
        ({"directions": [with_weights(w_hh=torch.ones(12, 5))] * 2}, r"\[0\].w_hh .* \(12, 5\)"),
        (
            {"directions": [with_weights(), with_weights(b_hh=None)]},
            r"directions\[1\].b_hh must be .* got None",
        ),
        ({"directions": [with_weights(params=(LONG,))] * 2}, r"\.params must be 0 tensors"),
        ({"state": ()}, r"state must be 1 tensors \('h',\), got 0"),
        ({"state": (torch.ones(2, 4, 4),)}, r"state \(h\) must be .* \(2, 3, 4\) .* \(2, 4, 4\)"),
        ({"state": (torch.ones(2, 3, 4).half(),)}, "state .*float32 .* got torch.float16"),
        ({"state": (torch.ones(2, 3, 4, device="meta"),)}, "state .* on cpu, got .* on meta"),
        ({"rows": Rows(2, 3, 3, 1, reverse=True)}, "rows.reverse must be False"),
        ({"rows": Rows(3, 3, 3, 1)}, r"rows must be T \* B = 3 \* 3, got 6"),
        ({"rows": Rows(2, 3, 0, 0, LONG[:2])}, "rows.lengths must be given with rows.offsets"),
        ({"rows": Rows(2, 3, 3, 1, None, LONG.int())}, "rows.lengths must be .*int64 .*int32"),
        ({"state_ops": StateOps(reset=LONG)}, r"state_ops.reset must be .*int8 .* \(6, 2\)"),
        ({"state_ops": StateOps(reset_state=(LONG,))}, r"reset_state \(h\) must be .*float32"),
        ({"state_ops": StateOps(h_mask=LONG)}, r"h_mask must be .*float32 of shape \(2, 3, 4\)"),
        ({"state_ops": StateOps(zoneout=torch.ones(2))}, r"zoneout must be .*float32 .* \(1,\)"),
        ({"state_ops": StateOps(zoneout=torch.ones(6, 2))}, r"zoneout must be .* \(6, 2, 1, 4\)"),
    ],
)
def test_no_kernel_is_given_what_it_would_overrun(changes, message):
    with pytest.raises(ValueError, match=message):
        launch.scan_forward(**arguments(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"save": None}, r"save must be one of \('gates', 'states'\), got None"),
        ({"state_ops": StateOps(zoneout=torch.ones(1))}, r"save .* \('states',\), got 'gates'"),
        ({"output": torch.ones(6, 4, 2).mT}, "output must be contiguous"),
        ({"d_output": torch.ones(5, 2, 4)}, r"d_output must be .* \(6, 2, 4\) .* \(5, 2, 4\)"),
        ({"d_final": ()}, "d_final must be 1 tensors"),
        ({"saved_or_gates": None}, "saved_or_gates must be .* got None"),
        ({"saved_or_gates": torch.ones(6, 2, 3, 4)}, r"saved_or_gates must be .* \(6, 2, 4, 4\)"),
        (
            {"save": "states", "saved_or_gates": (torch.ones(6, 2, 3, 4), torch.ones(6, 2, 4, 4))},
            r"h_gates must be .* \(6, 2, 3, 4\)",
        ),
    ],
)
def test_backward_is_given_what_forward_returned(changes, message):
    given = arguments(
        d_output=torch.ones(6, 2, 4),
        d_final=(torch.ones(2, 3, 4),),
        output=torch.ones(6, 2, 4),
        states=None,
        saved_or_gates=torch.ones(6, 2, 4, 4),
    )
    del given["x_gates"]
    with pytest.raises(ValueError, match=message):
        launch.scan_backward(**(given | changes))


@pytest.mark.parametrize("H", [8, 12])
def test_forward_copies_weights_only_to_align_their_rows(H):
    w = torch.randn(3 * H, H)
    directions = [Weights(w, w, None, None, None, ())]
    ((found,),) = launch._matrices(REGISTRY["gru"], directions, 1, transposed=False)
    assert (found.data_ptr() == w.data_ptr()) == (H % 8 == 0)
    found = found.view(3, H, -1)
    assert torch.equal(found[..., :H], w.view(3, H, H))
    assert found.stride() == (H * pitch(H), pitch(H), 1)
    assert not found[..., H:].any()
    ((back,),) = launch._matrices(REGISTRY["gru"], directions, 1, transposed=True)
    assert back.is_contiguous()
    assert torch.equal(back[..., :H], w.view(3, H, H).mT)
    assert not back[..., H:].any()
