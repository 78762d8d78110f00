# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""A user's program. `make lint` checks its types, tests/test_types.py what comes at run time.

Where a comment silences pyright, the line is a mistake that pyright must report: a silence that
nothing needs is an error too.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from typing_extensions import assert_type

import fusedrnn
import fusedrnn.cells
from fusedrnn.types import Backend, Save

Pair = tuple[Tensor, Tensor]
x = torch.randn(5, 3, 4)


class Tagger(nn.Module):
    def __init__(self, tags: int, backend: Backend | None = None, save: Save = "gates") -> None:
        super().__init__()
        self.rnn = fusedrnn.LSTM(
            4, 6, 2, bidirectional=True, dropout=0.1, forget_bias=1.0, weight_drop=0.5,
            zoneout=(0.1, 0.2), clip_gradient=1.0, backend=backend, save=save,
        )  # fmt: skip
        self.head = nn.Linear(12, tags)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        output, (h_n, c_n) = self.rnn(words, lengths=lengths)
        assert_type(h_n, Tensor)
        assert_type(c_n, Tensor)
        return self.head(output)


def modules() -> None:
    assert_type(Tagger(7).forward(x, torch.tensor([5, 2, 4])), Tensor)
    lstm, gru = fusedrnn.LSTM(4, 6), fusedrnn.GRU(4, 6, recurrent_dropout=0.2)
    rnn = fusedrnn.RNN(4, 6, nonlinearity="relu", device="cpu", dtype=torch.float32)
    assert_type(lstm(x), tuple[Tensor, Pair])
    assert_type(lstm.forward(x, (torch.zeros(1, 3, 6), torch.zeros(1, 3, 6)))[1], Pair)
    assert_type(gru(x, torch.zeros(1, 3, 6)), Pair)
    assert_type(rnn(x, reset=(torch.zeros(5, 3).bool(), torch.zeros(1, 1, 6))), Pair)
    packed = pack_sequence([x[:, 0], x[:2, 1]])
    assert_type(lstm(packed), tuple[PackedSequence, Pair])
    assert_type(gru(packed), tuple[PackedSequence, Tensor])
    assert_type(fusedrnn.GRU(4, 6, num_heads=2)(x), Pair)
    own = fusedrnn.Recurrent("gru_reset_before", 4, 6, num_heads=2)
    assert_type(own(x), tuple[Tensor, Any])  # which state a cell has, its name does not tell
    told: fusedrnn.Recurrent[Tensor] = fusedrnn.Recurrent(fusedrnn.cells.get("gru"), 4, 6)
    assert_type(told(x), Pair)
    assert_type(told.stream()(x), Tensor)
    assert_type(fusedrnn.LSTMCell(4, 6)(x[0]), Pair)
    assert_type(fusedrnn.GRUCell(4, 6)(x[0], torch.zeros(3, 6)), Tensor)
    assert_type(fusedrnn.RNNCell(4, 6, nonlinearity="relu")(x[0]), Tensor)


def steps_and_streams() -> None:
    lstm, gru = fusedrnn.LSTM(4, 6).eval(), fusedrnn.GRU(4, 6).eval()
    output, state = lstm.step(x[0])
    assert_type(output, Tensor)
    assert_type(lstm.step(x[1], state), tuple[Tensor, Pair])
    assert_type(gru.step(x[0], torch.zeros(1, 3, 6)), Pair)
    stream = lstm.stream()
    assert_type(stream(x, reset=torch.zeros(5, 3).bool()), Tensor)
    assert_type(stream.state, Pair | None)
    assert_type(fusedrnn.Stream(gru).step(x[0]), Tensor)


def functions() -> None:
    weights = list(fusedrnn.LSTM(4, 6).parameters())
    output = fusedrnn.functional.lstm(x, None, weights, backend="reference", dropout=0.1)
    assert_type(output, tuple[Tensor, Pair])
    weights = list(fusedrnn.RNN(4, 6).parameters())
    assert_type(fusedrnn.functional.rnn(x, None, weights, nonlinearity="tanh"), Pair)
    with fusedrnn.use_backend("reference"):
        assert_type(fusedrnn.explain(fusedrnn.GRU(4, 6), x).backend, str)
    assert_type(fusedrnn.replace_modules(nn.Sequential(nn.GRU(4, 6))).swapped, dict[str, str])
    assert_type(fusedrnn.gradient_flow.sensitivity(fusedrnn.GRU(4, 6), x, at=[-1]), Tensor)


def lengths_and_states(wanted: bool = True) -> None:
    """What a batch of sequences may come with, and what a call may return besides."""
    lstm, gru = fusedrnn.LSTM(4, 6), fusedrnn.GRU(4, 6)
    assert_type(lstm(x, lengths=[5, 2, 4]), tuple[Tensor, Pair])
    assert_type(gru(x, lengths=torch.tensor([5, 2, 4]).numpy()), Pair)
    assert_type(gru(x, lengths=torch.ones(5, 3).bool()), Pair)
    output, h_n, states = gru(x, return_states=True)
    assert_type((output, h_n, states), tuple[Tensor, Tensor, dict[str, Tensor]])
    assert_type(lstm(x, return_states=True), tuple[Tensor, Pair, dict[str, Tensor]])
    weights = list(gru.parameters())
    output, h_n, states = fusedrnn.functional.gru(x, None, weights, return_states=True)
    assert_type(states, dict[str, Tensor])
    either = gru(x, return_states=wanted)
    assert_type(either, tuple[Tensor, Tensor] | tuple[Tensor, Tensor, dict[str, Tensor]])


def mistakes() -> None:
    """Never called."""
    fusedrnn.LSTM("128", 6)  # pyright: ignore[reportArgumentType]
    fusedrnn.LSTM(128, None)  # pyright: ignore[reportArgumentType]
    fusedrnn.LSTM(4, 6, num_layers="two")  # pyright: ignore[reportArgumentType]
    fusedrnn.LSTM(4, 6, bogus=3)  # pyright: ignore[reportCallIssue]
    fusedrnn.LSTM(4, 6, backend="gpu")  # pyright: ignore[reportArgumentType]
    fusedrnn.GRU(4, 6, save="all")  # pyright: ignore[reportArgumentType]
    fusedrnn.GRU(4, 6, proj_size=2)  # pyright: ignore[reportArgumentType]
    fusedrnn.GRU(4, 6, num_heads="two")  # pyright: ignore[reportArgumentType]
    fusedrnn.Recurrent(4, 6)  # pyright: ignore[reportCallIssue]
    fusedrnn.Recurrent("rnn_relu", 4, 6, nonlinearity="relu")  # pyright: ignore[reportCallIssue]
    fusedrnn.GRU(4, 6, forget_bias=1.0)  # pyright: ignore[reportCallIssue]
    fusedrnn.RNN(4, 6, nonlinearity="sin")  # pyright: ignore[reportArgumentType]
    fusedrnn.RNNCell(4, 6, nonlinearity="sin")  # pyright: ignore[reportArgumentType]
    fusedrnn.use_backend("gpu")  # pyright: ignore[reportArgumentType]
    fusedrnn.GRU(4, 6)(x, (x, x))  # pyright: ignore[reportArgumentType, reportCallIssue]
    fusedrnn.LSTM(4, 6)(x, x)  # pyright: ignore[reportArgumentType, reportCallIssue]
    fusedrnn.LSTM(4, 6)(x, length=x)  # pyright: ignore[reportCallIssue]
    fusedrnn.LSTM(4, 6).step(x, x)  # pyright: ignore[reportArgumentType]
    fusedrnn.functional.gru(x, None, [], bogus=1)  # pyright: ignore[reportCallIssue]
    c_n: Tensor = fusedrnn.LSTM(4, 6)(x)[1]  # pyright: ignore[reportAssignmentType]
    pair: Pair = fusedrnn.GRU(4, 6)(x)[1]  # pyright: ignore[reportAssignmentType]
    print(c_n, pair)
