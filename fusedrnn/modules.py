"""The modules that replace torch.nn's, name for name.

They derive from torch.nn.RNNBase, which owns the parameters, their initialisation, pickling
and flattening; only the forward pass is ours. (torch.compile refuses instances of nn.LSTM,
nn.GRU and nn.RNN themselves.) Parameters are looked up by name at every call, so functional_call,
parametrizations and re-assigned parameters need no further care.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import cells, dispatch, functional, regularizers, streaming
from fusedrnn.regularizers import Regularizers
from fusedrnn.scripting import Scriptable, ScriptableLSTM, ScriptableSequence, forward_of

# torch's own classes, kept here: a program may put ours in their place in torch.nn.
TORCH_CLASSES: dict[str, type[nn.Module]] = {
    name: getattr(nn, name) for name in ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
}


def _shown_as(**differences) -> Callable:
    """Gives an `__init__(self, *args, **kwargs)` the signature that it documents.

    `help` reads it, and torch.nn.utils.skip_init, which looks for `device`. It is RNNBase's
    with `differences`: a name with None is left out, one with a value follows num_layers.
    """
    own = inspect.signature(nn.RNNBase.__init__).parameters.values()
    shown = []
    for parameter in own:
        if parameter.name != "mode" and differences.get(parameter.name, "") is not None:
            shown.append(parameter)
        if parameter.name == "num_layers":
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
            added = [(name, value) for name, value in differences.items() if value is not None]
            shown += [inspect.Parameter(name, kind, default=value) for name, value in added]
    shown.append(inspect.Parameter("ours", inspect.Parameter.VAR_KEYWORD))

    def decorate(init):
        init.__signature__ = inspect.Signature(shown)
        return init

    return decorate


class RecurrentModule(ScriptableSequence):
    """What LSTM, GRU and RNN share. `backend` and `save` are ours; all else is torch's.

    Attributes:
        regularizers: None, or a `fusedrnn.Regularizers`; its fields are keyword arguments of
            the constructors too.
        backend: None or "auto", or the backend that this module is to use; see
            `fusedrnn.use_backend`.
        save: "gates", or "states" to recompute the gates in backward and save memory.
    """

    # Class attributes, so that modules pickled by torch, or turned into ours, have them too.
    backend: str | None = None
    save: str = "gates"
    regularizers: Regularizers | None = None

    def __init__(self, mode: str, *args, backend: str | None = None, save: str = "gates", **kwargs):
        if save not in functional.SAVE:
            raise ValueError(f"save must be one of {functional.SAVE}, got {save!r}")
        own = regularizers.make(kwargs)
        super().__init__(mode, *args, **kwargs)
        if not isinstance(self.bidirectional, bool):
            raise TypeError(f"bidirectional should be of type bool, got: {self.bidirectional!r}")
        if own is not None:
            self.regularizers = own
            own.zoneout_rates(len(cells.get(self.mode.lower()).states))
            if self.proj_size and "zoneout" in own.inside_loop(training=True):
                raise ValueError(f"zoneout: expected no projection, got proj_size={self.proj_size}")
        _set_backend(self, backend)
        if save != "gates":
            self.save = save

    def forward(self, input, hx=None, *, lengths=None, reset=None):
        """Runs the layers over a whole sequence.

        Args:
            input: [T, B, I], or [B, T, I] with batch_first, or [T, I], or a PackedSequence.
            hx: the initial state as torch.nn takes it, or None for zeros.
            lengths: [B] integers on any device: time steps of each row of padded input.
            reset: bool [T, B] ([B, T] with batch_first): zero the row's state before that step,
                in the reverse direction on the way back from it. Or (mask, hx): set it to hx,
                in which 1 may stand for B.
        Returns:
            output and final state, as torch.nn returns them.
        Raises:
            RuntimeError, ValueError, TypeError: the argument, what was expected, what came.
        """
        packed = isinstance(input, PackedSequence)
        if packed:
            data, batch_sizes, sorted_indices, unsorted_indices = input
        else:
            data, batch_sizes, sorted_indices, unsorted_indices = input, None, None, None
        own = self._parameters  # by far the fastest way to most of them
        weights: list[Any] = [
            own[name] if name in own else getattr(self, name) for name in self._flat_weights_names
        ]
        states = self._check(data, hx, batch_sizes, weights[0])
        if sorted_indices is not None and states is not None:
            states = tuple(s.index_select(1, sorted_indices) for s in states)
        output, final = functional.run(
            self.mode.lower(),
            data,
            states,
            weights,
            hidden_size=self.hidden_size,
            bias=self.bias,
            num_layers=self.num_layers,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            proj_size=self.proj_size,
            batch_sizes=batch_sizes,
            lengths=lengths,
            reset=reset,
            backend=self.backend,
            save=self.save,
            regularizers=self.regularizers,
        )
        if unsorted_indices is not None:
            final = tuple(f.index_select(1, unsorted_indices) for f in final)
        if packed:
            output = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return output, final[0] if len(final) == 1 else final

    def _check(self, data, hx, batch_sizes, weight) -> tuple[Tensor, ...] | None:
        """Raises what torch.nn raises; returns hx as a tuple of states."""
        if hx is not None and len(cells.get(self.mode.lower()).states) == 1:
            hx = (hx,)
        functional.check_input(
            type(self).__name__, self.mode.lower(), data, hx, batch_sizes, weight.dtype,
            self.input_size, self.hidden_size, self.num_layers * (2 if self.bidirectional else 1),
            self.batch_first, self.proj_size,
        )  # fmt: skip
        return None if hx is None else tuple(hx)

    def step(self, x: Tensor, state=None):
        """One time step, for decoding and rollouts: output, state = module.step(x, state).

        Args:
            x: [B, I] or [I].
            state: None at the start, then what the last step returned; as hx.
        Returns:
            output [B, H] or [H], state. They equal those of the sequence call.
        Raises:
            ValueError, RuntimeError: see `fusedrnn.streaming.step`.
        """
        return streaming.step(self, x, state)

    def stream(self, state=None, *, detach: bool = True) -> streaming.Stream:
        """A `fusedrnn.Stream`, which carries the state from one chunk to the next."""
        return streaming.Stream(self, state, detach=detach)

    def extra_repr(self) -> str:
        own = self.regularizers
        return super().extra_repr() + (f", {own}" if own is not None else "")


class LSTM(ScriptableLSTM, RecurrentModule):
    r"""Long short-term memory over a sequence; replaces torch.nn.LSTM.

        i_t = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)
        f_t = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)
        g_t = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
        o_t = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho)
        c_t = f_t * c_{t-1} + i_t * g_t
        h_t = o_t * tanh(c_t),  or W_hr (o_t * tanh(c_t)) with a projection

    Args:
        input_size: I, features of the input.
        hidden_size: H, units of a layer and direction.
        num_layers: L. Default: 1.
        bias: whether the layers have b_ih and b_hh. Default: True.
        batch_first: [B, T, I] instead of [T, B, I]. Default: False.
        dropout: probability of dropout after each layer but the last, in training. Default: 0.
        bidirectional: D = 2 directions instead of 1. Default: False.
        proj_size: P > 0 projects h_t to P features. Default: 0.
        device, dtype: of the parameters.
        backend: "auto", "triton", "aten" or "reference". Default: None, see use_backend.
        save: "gates", or "states" to recompute the gates in backward. Default: "gates".
        input_dropout, recurrent_dropout, weight_drop, zoneout, clip_gradient, generator: see
            fusedrnn.Regularizers. By keyword; off by default.

    Inputs: input, (h_0, c_0), and by keyword lengths, reset
        input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence.
        h_0: [L * D, B, P or H], c_0: [L * D, B, H]; without B for unbatched input; zeros if
            left out.
        lengths: [B] integers on any device; rows end there.
        reset: bool [T, B]; True zeroes the row's state before that time step; or (mask, hx).

    Outputs: output, (h_n, c_n)
        output: [T, B, D * (P or H)], in the input's layout.
        h_n, c_n: as h_0, c_0, at the end of each row.

    Attributes:
        weight_ih_l[k]: [4 * H, I], for k > 0 [4 * H, D * (P or H)]; rows i, f, g, o.
        weight_hh_l[k]: [4 * H, P or H].
        bias_ih_l[k], bias_hh_l[k]: [4 * H].
        weight_hr_l[k]: [P, H], with a projection.
        The reverse direction's end in _reverse. All start uniform in +-1/sqrt(H).

    Raises:
        RuntimeError, ValueError, TypeError: the argument, what was expected, what came.

    Numerics: accumulates in float32; states are stored in the input's dtype.

    Source: Hochreiter & Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735; projection: Sak,
    Senior & Beaufays 2014, arXiv:1402.1128; gate order as torch.nn.LSTM.

    Example::

        >>> rnn = fusedrnn.LSTM(10, 20, 2)
        >>> output, (h_n, c_n) = rnn(torch.randn(5, 3, 10))
    """

    @_shown_as()
    def __init__(self, *args, **kwargs):
        super().__init__("LSTM", *args, **kwargs)

    # nn.LSTM has these two, and code that subclasses it calls them.
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # pyright: ignore
    permute_hidden = nn.LSTM.permute_hidden  # pyright: ignore


class GRU(RecurrentModule):
    r"""Gated recurrent unit over a sequence; replaces torch.nn.GRU.

        r_t = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
        z_t = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
        n_t = tanh(W_in x_t + b_in + r_t * (W_hn h_{t-1} + b_hn))
        h_t = (1 - z_t) * n_t + z_t * h_{t-1}

    Args:
        input_size: I, features of the input.
        hidden_size: H, units of a layer and direction.
        num_layers: L. Default: 1.
        bias: whether the layers have b_ih and b_hh. Default: True.
        batch_first: [B, T, I] instead of [T, B, I]. Default: False.
        dropout: probability of dropout after each layer but the last, in training. Default: 0.
        bidirectional: D = 2 directions instead of 1. Default: False.
        device, dtype: of the parameters.
        backend: "auto", "triton", "aten" or "reference". Default: None, see use_backend.
        save: "gates", or "states" to recompute the gates in backward. Default: "gates".
        input_dropout, recurrent_dropout, weight_drop, zoneout, clip_gradient, generator: see
            fusedrnn.Regularizers. By keyword; off by default.

    Inputs: input, h_0, and by keyword lengths, reset
        input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence.
        h_0: [L * D, B, H]; without B for unbatched input; zeros if left out.
        lengths: [B] integers on any device; rows end there.
        reset: bool [T, B]; True zeroes the row's state before that time step; or (mask, hx).

    Outputs: output, h_n
        output: [T, B, D * H], in the input's layout.
        h_n: as h_0, at the end of each row.

    Attributes:
        weight_ih_l[k]: [3 * H, I], for k > 0 [3 * H, D * H]; rows r, z, n.
        weight_hh_l[k]: [3 * H, H].
        bias_ih_l[k], bias_hh_l[k]: [3 * H].
        The reverse direction's end in _reverse. All start uniform in +-1/sqrt(H).

    Raises:
        RuntimeError, ValueError, TypeError: the argument, what was expected, what came.

    Numerics: accumulates in float32; states are stored in the input's dtype.

    Source: Cho et al. 2014, arXiv:1406.1078, reset after the product; order as torch.nn.GRU.

    Example::

        >>> rnn = fusedrnn.GRU(10, 20, bidirectional=True)
        >>> output, h_n = rnn(torch.randn(5, 3, 10))
    """

    @_shown_as(proj_size=None)
    def __init__(self, *args, **kwargs):
        if "proj_size" in kwargs:
            raise ValueError("proj_size: only LSTM has projections, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)


class RNN(RecurrentModule):
    r"""Simple recurrent network over a sequence; replaces torch.nn.RNN.

        h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)        or relu

    Args:
        input_size: I, features of the input.
        hidden_size: H, units of a layer and direction.
        num_layers: L. Default: 1.
        nonlinearity: "tanh" or "relu". Default: "tanh".
        bias: whether the layers have b_ih and b_hh. Default: True.
        batch_first: [B, T, I] instead of [T, B, I]. Default: False.
        dropout: probability of dropout after each layer but the last, in training. Default: 0.
        bidirectional: D = 2 directions instead of 1. Default: False.
        device, dtype: of the parameters.
        backend: "auto", "triton", "aten" or "reference". Default: None, see use_backend.
        save: "gates", or "states" to recompute the gates in backward. Default: "gates".
        input_dropout, recurrent_dropout, weight_drop, zoneout, clip_gradient, generator: see
            fusedrnn.Regularizers. By keyword; off by default.

    Inputs: input, h_0, and by keyword lengths, reset
        input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence.
        h_0: [L * D, B, H]; without B for unbatched input; zeros if left out.
        lengths: [B] integers on any device; rows end there.
        reset: bool [T, B]; True zeroes the row's state before that time step; or (mask, hx).

    Outputs: output, h_n
        output: [T, B, D * H], in the input's layout.
        h_n: as h_0, at the end of each row.

    Attributes:
        weight_ih_l[k]: [H, I], for k > 0 [H, D * H].
        weight_hh_l[k]: [H, H].
        bias_ih_l[k], bias_hh_l[k]: [H].
        The reverse direction's end in _reverse. All start uniform in +-1/sqrt(H).

    Raises:
        RuntimeError, ValueError, TypeError: the argument, what was expected, what came.

    Numerics: accumulates in float32; states are stored in the input's dtype.

    Source: Elman 1990, doi:10.1207/s15516709cog1402_1.

    Example::

        >>> rnn = fusedrnn.RNN(10, 20, nonlinearity="relu")
        >>> output, h_n = rnn(torch.randn(5, 3, 10))
    """

    @_shown_as(proj_size=None, nonlinearity="tanh")
    def __init__(self, *args, **kwargs):
        if "proj_size" in kwargs:
            raise ValueError("proj_size: only LSTM has projections, not RNN or GRU")
        if len(args) > 3:
            self.nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {self.nonlinearity!r}")
        super().__init__(f"RNN_{self.nonlinearity.upper()}", *args, **kwargs)


class CellModule(Scriptable):
    """What LSTMCell, GRUCell and RNNCell put before torch.nn's class of that name.

    torch's own cell runs the step, unless a backend of ours is forced or torch.func transforms
    the call, for which torch's has no rule: then it is a sequence of one step.
    """

    backend: str | None = None
    cell_name: str
    input_size: int
    hidden_size: int

    def __init__(self, *args, backend: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        _set_backend(self, backend)

    def forward(self, input, hx=None):
        """One step; see the class."""
        name = dispatch.forced_backend(self.backend)
        if name == "aten" or (name == "auto" and not functional.transformed()):
            return super().forward(input, hx)  # pyright: ignore[reportAttributeAccessIssue]
        states = hx if isinstance(hx, (tuple, list)) or hx is None else (hx,)
        final = _cell_step(self, input, states)
        return final[0] if len(final) == 1 else final


class LSTMCell(CellModule, nn.LSTMCell):
    """One step of an LSTM; replaces torch.nn.LSTMCell. Equations as in `fusedrnn.LSTM`.

    Args:
        input_size, hidden_size, bias, device, dtype: as torch.nn.LSTMCell.
        backend: "auto", "triton", "aten" or "reference". Default: None, see use_backend.

    Inputs: input [B, I] or [I], (h, c) each [B, H] or [H], zeros if left out.
    Outputs: (h, c).
    Raises:
        RuntimeError, ValueError: the argument, what was expected, what came.
    Source: Hochreiter & Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735.
    """

    cell_name = "lstm"
    forward__0 = forward_of(nn.LSTMCell)

    def __init__(
        self, input_size, hidden_size, bias=True, device=None, dtype=None, *, backend=None
    ):
        super().__init__(input_size, hidden_size, bias, device, dtype, backend=backend)


class GRUCell(CellModule, nn.GRUCell):
    """One step of a GRU; replaces torch.nn.GRUCell. Equations as in `fusedrnn.GRU`.

    Args:
        input_size, hidden_size, bias, device, dtype: as torch.nn.GRUCell.
        backend: "auto", "triton", "aten" or "reference". Default: None, see use_backend.

    Inputs: input [B, I] or [I], h [B, H] or [H], zeros if left out.
    Outputs: h.
    Raises:
        RuntimeError, ValueError: the argument, what was expected, what came.
    Source: Cho et al. 2014, arXiv:1406.1078, reset after the product.
    """

    cell_name = "gru"
    forward__0 = forward_of(nn.GRUCell)

    def __init__(
        self, input_size, hidden_size, bias=True, device=None, dtype=None, *, backend=None
    ):
        super().__init__(input_size, hidden_size, bias, device, dtype, backend=backend)


class RNNCell(CellModule, nn.RNNCell):
    """One step of a simple RNN; replaces torch.nn.RNNCell. Equations as in `fusedrnn.RNN`.

    Args:
        input_size, hidden_size, bias, nonlinearity, device, dtype: as torch.nn.RNNCell.
        backend: "auto", "triton", "aten" or "reference". Default: None, see use_backend.

    Inputs: input [B, I] or [I], h [B, H] or [H], zeros if left out.
    Outputs: h.
    Raises:
        RuntimeError, ValueError: the argument, what was expected, what came.
    Source: Elman 1990, doi:10.1207/s15516709cog1402_1.
    """

    forward__0 = forward_of(nn.RNNCell)

    def __init__(
        self,
        input_size,
        hidden_size,
        bias=True,
        nonlinearity="tanh",
        device=None,
        dtype=None,
        *,
        backend=None,
    ):
        super().__init__(
            input_size, hidden_size, bias, nonlinearity, device, dtype, backend=backend
        )

    @property
    def cell_name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"rnn_{self.nonlinearity}"


def _cell_step(module, input: Tensor, hx) -> tuple[Tensor, ...]:
    """One step as a sequence of one step: input [B, I] or [I], hx S tensors [B, H] or [H]."""
    name = type(module).__name__
    if input.dim() not in (1, 2):
        raise ValueError(f"{name}: input: expected 1-D or 2-D, got {input.dim()}-D")
    if input.shape[-1] != module.input_size:
        raise RuntimeError(
            f"{name}: input: expected size(-1) to be input_size={module.input_size}, "
            f"got shape {tuple(input.shape)}"
        )
    shape = (*input.shape[:-1], module.hidden_size)
    for state in hx or ():
        if state.dim() not in (1, 2):
            raise ValueError(f"{name}: hx: expected 1-D or 2-D, got {state.dim()}-D")
        if state.shape != shape:
            raise RuntimeError(f"{name}: hx: expected shape {shape}, got {tuple(state.shape)}")
    weights = [module.weight_ih, module.weight_hh]
    if module.bias:
        weights += [module.bias_ih, module.bias_hh]
    _output, final = functional.run(
        module.cell_name,
        input.unsqueeze(0),
        None if hx is None else tuple(s.unsqueeze(0) for s in hx),
        weights,
        hidden_size=module.hidden_size,
        bias=module.bias,
        backend=module.backend,
    )
    return tuple(f.squeeze(0) for f in final)


def _set_backend(module, backend: str | None) -> None:
    if backend is not None:
        module.backend = dispatch.check_name(backend, "backend")
