"""What surrounds a launch: the device it goes to, the error word, what is refused."""

import pytest
import torch

import fusedrnn
from fusedrnn.cells import REGISTRY
from fusedrnn.kernels import launch
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
    launch._launch(
        Kernel(), plan, Rows(3, 4, 4, 1), planes=1, like=Tensor(torch.device("cuda", 1)), H=16, D=1
    )
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
