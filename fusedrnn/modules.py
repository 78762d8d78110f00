"""The modules that replace torch.nn's, name for name, and Recurrent, which they derive from.

Recurrent derives from torch.nn.RNNBase, which owns the parameters, their initialisation, pickling
and flattening; only the forward pass is ours. (torch.compile refuses instances of nn.LSTM,
nn.GRU and nn.RNN themselves.) Parameters are looked up by name at every call, so functional_call,
parametrizations and re-assigned parameters need no further care.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.types import Device
from torch.utils._pytree import tree_map

from fusedrnn import (
    arguments,
    cells,
    dispatch,
    functional,
    opacus,
    packing,
    regularizers,
    stack,
    streaming,
)
from fusedrnn.backends import aten
from fusedrnn.call import Spec
from fusedrnn.regularizers import Regularizers
from fusedrnn.scripting import Scriptable, ScriptableLSTM, ScriptableSequence, forward_of
from fusedrnn.types import Backend, Direction, HiddenSize, Lengths, Nonlinearity, Reset, Save, State

# torch's own classes, kept here: a program may put ours in their place in torch.nn.
TORCH_CLASSES: dict[str, type[nn.Module]] = {
    name: getattr(nn, name) for name in ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
}


def torch_class(cell: str) -> type[nn.Module]:
    """torch.nn's module for a cell that torch has."""
    return TORCH_CLASSES[str(cells.get(cell).aten).partition("_")[0].upper()]


if TYPE_CHECKING:
    _Function = TypeVar("_Function")

    def _typed_as(function: _Function) -> Callable[[Callable[..., Any]], _Function]:
        """What is decorated has the type of `function`, with all its overloads."""
        ...


class Recurrent(ScriptableSequence, Generic[State]):
    r"""Any registered cell over a sequence, as a module in the form of torch.nn's.

    LSTM, GRU and RNN are this class under torch.nn's names, with torch.nn's arguments.

    Args:
        cell: a name in `fusedrnn.cells.REGISTRY`, or the registered `fusedrnn.cells.Cell` itself.
        input_size: I, features of the input.
        hidden_size: H, units of a layer and direction; or a tuple, one of each layer. H is then the
            largest in the states, of which a smaller layer has the first units; the others are 0.
        num_layers: L. Default: 1.
        bias: whether the layers have b_ih and b_hh. Default: True.
        batch_first: [B, T, I] instead of [T, B, I]. Default: False.
        dropout: probability of dropout after each layer but the last, in training. Default: 0.
        bidirectional: D = 2 directions instead of 1. Default: False.
        proj_size: P > 0 projects h_t to P features, if the cell `projects`. Default: 0.
        device, dtype: of the parameters.
        num_heads: divides H among so many heads, which see only their own part of h_{t-1}.
            Default: 1.
        direction: "forward"; "reverse", every row from its last time step to its first;
            "alternate", forward first; or a tuple with one of the first two for each layer.
            Default: "forward".
        residual: adds a layer's input, without its dropout, to its output, where they have one
            size. Default: False.
        backend: "auto", "triton", "aten", "loop" or "reference". Default: None, see use_backend.
        save: "gates", or "states" to recompute the gates in backward. Default: "gates".
        input_dropout, recurrent_dropout, weight_drop, zoneout, clip_gradient, generator: see
            fusedrnn.Regularizers. Default: none.

    Inputs: input, hx, lengths, reset, return_states
        input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence.
        hx: h_0 [L * D, B, H], or a tuple where the cell has several states; without B for
            unbatched input; zeros if left out.
        (The others: forward.)

    Outputs: output, the final state
        output: [T, B, D * H], in the input's layout. The final state: as hx.

    Attributes:
        mode: the cell's name in upper case.
        weight_ih_l[k]: [G * H, I], for k > 0 [G * H, D * H]; G gates in the order of `cell.gates`.
        weight_hh_l[k]: [G * H, H], or [num_heads, G * H / num_heads, H / num_heads], the blocks of
            the gates inside a head. Unit u of head k is k * H / num_heads + u everywhere else. Of a
            diagonal cell, [G * H].
        bias_ih_l[k], bias_hh_l[k]: [G * H]. weight_hr_l[k]: [P, H], with a projection.
        [param]_l[k]: [H], or a multiple, of each of the cell's own parameters.
        The reverse direction's end in _reverse. All start uniform in +-1/sqrt(H), but for scales
            and shifts of normalisation, which start as ones and zeros, a diagonal weight_hh,
            uniform in [0, 1], and the matrices of an MLPTransitionRNN.
        regularizers: None, or a `fusedrnn.Regularizers`.
        direction, residual, backend, save: as given.
        hidden_size: H. hidden_sizes: of each layer, where they differ, else ().

    Raises:
        RuntimeError, ValueError, TypeError: the argument, what was expected, what came.

    Numerics: accumulates in float32; states are stored in the input's dtype.

    Source: that of the cell; heads: Beck et al. 2024, arXiv:2405.04517 (block-diagonal memory
    mixing).

    Example::

        >>> rnn = fusedrnn.Recurrent("gru_reset_before", 10, 20, num_heads=4)
        >>> output, h_n = rnn(torch.randn(5, 3, 10))
    """

    # Class attributes, so that modules pickled by torch, or turned into ours, have them too.
    backend: Backend | None = None
    save: Save = "gates"
    regularizers: Regularizers | None = None
    num_heads: int = 1
    direction: Direction = "forward"
    residual: bool = False
    hidden_sizes: tuple[int, ...] = ()

    def __init__(
        self,
        cell: str | cells.Cell,
        input_size: int,
        hidden_size: HiddenSize,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        num_heads: int = 1,
        direction: Direction = "forward",
        residual: bool = False,
        backend: Backend | None = None,
        save: Save = "gates",
        input_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_drop: float = 0.0,
        zoneout: float | tuple[float, ...] = 0.0,
        clip_gradient: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        name = cell.name if isinstance(cell, cells.Cell) else cell
        known = cells.get(name)
        if known is not cell and isinstance(cell, cells.Cell):
            raise ValueError(f"cell: expected the one that is registered as {name!r}, got another")
        if save not in functional.SAVE:
            raise ValueError(f"save must be one of {functional.SAVE}, got {save!r}")
        arguments.check_sizes(num_layers=num_layers, proj_size=proj_size)
        made = Regularizers(
            input_dropout, recurrent_dropout, weight_drop, zoneout, clip_gradient, generator
        )
        # torch.nn knows its own cells. The others' parameters are made below; here they are checked
        # as an RNN's, on a device where that takes neither memory nor random numbers.
        H, sizes = arguments.sizes_of(hidden_size, num_layers, proj_size)
        torchs = known.aten == name and num_heads == 1 and not sizes
        super().__init__(
            name.upper() if torchs else "RNN_TANH", input_size, H, num_layers, bias,
            batch_first, dropout, bidirectional, proj_size, device if torchs else "meta", dtype,
        )  # fmt: skip
        if not isinstance(bidirectional, bool):
            raise TypeError(f"bidirectional should be of type bool, got: {bidirectional!r}")
        if not isinstance(residual, bool):
            raise TypeError(f"residual: expected a bool, got {residual!r}")
        arguments.check_direction(direction, num_layers, bidirectional)
        for size in sizes or (H,):
            arguments.check_layers(name, size, proj_size, num_heads)
        if made != regularizers.NO_REGULARIZERS:
            self.regularizers = made
            made.zoneout_rates(len(known.states))
            if proj_size and "zoneout" in made.loop_features(training=True):
                raise ValueError(f"zoneout: expected no projection, got proj_size={proj_size}")
        _set_backend(self, backend)
        if save != "gates":
            self.save = save
        if num_heads > 1:
            self.num_heads = num_heads
        if direction != "forward":
            self.direction = direction if isinstance(direction, str) else tuple(direction)
        if residual:
            self.residual = True
        if sizes:
            self.hidden_sizes = sizes
        if not torchs:
            self.mode: str = name.upper()
            self._make_parameters(device, dtype)

    def _make_parameters(self, device: Device, dtype: torch.dtype | None) -> None:
        """Parameters of any cell, under torch.nn's names, in the place of those there are."""
        spec = self._spec()
        kinds = ["weight_ih", "weight_hh"] + ["bias_ih", "bias_hh"] * spec.bias
        own = cells.get(spec.cell).own_shapes(1, spec.bias)
        kinds += ["weight_hr"] * bool(spec.proj_size) + [*own]
        ends = [f"_l{k}{end}" for k in range(spec.num_layers) for end in ("", "_reverse")]
        ends = ends if spec.bidirectional else ends[::2]
        all_weights = [[kind + end for kind in kinds] for end in ends]
        names = [name for group in all_weights for name in group]
        self._parameters.clear()  # they are to be in the order of their names
        for name, shape in zip(names, arguments.weight_shapes(spec), strict=True):
            setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self._all_weights, self._flat_weights_names = all_weights, names
        self._init_flat_weights()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises all parameters: uniform in +-1/sqrt(H), but for those of which the cell says
        where they start; a diagonal weight_hh uniform in [0, 1], within which nothing explodes; and
        matrices of a stage's own, and their biases, in +-1/sqrt(columns)."""
        super().reset_parameters()
        cell, D = cells.get(self.mode.lower()), 2 if self.bidirectional else 1
        sizes = self.hidden_sizes or (self.hidden_size,) * self.num_layers
        starts = {own.name: own.start for own in cell.own if own.start is not None}
        groups: Any = self._all_weights
        for index, group in enumerate(groups):
            H = sizes[index // D]
            columns = cell.columns(H)
            for name in group:
                kind = name.removesuffix("_reverse").rpartition("_l")[0]
                parameter = getattr(self, name)
                if kind in starts:
                    nn.init.constant_(parameter, starts[kind])
                elif cell.diagonal and kind == "weight_hh":
                    nn.init.uniform_(parameter)
                elif self.hidden_sizes or kind in columns:
                    bound = columns.get(kind, H) ** -0.5
                    nn.init.uniform_(parameter, -bound, bound)

    def _torch_lacks(self) -> str | None:
        cell = self.mode.lower()
        lacking = None if cells.get(cell).aten in (None, cell) else f"torch.nn has no {cell}"
        spec = self._spec()
        if lacking is None and not aten.whole(spec):
            lacking = "torch has one size and one direction for all layers, and adds no input"
        return aten.lacks(spec) or lacking

    def flatten_parameters(self) -> None:
        """As torch.nn's, for cuDNN, where that knows the cell, without heads and layers of several
        sizes."""
        cell = self.mode.lower()
        if cells.get(cell).aten == cell and self.num_heads == 1 and not self.hidden_sizes:
            super().flatten_parameters()

    @overload
    def forward(
        self,
        input: Tensor,
        hx: State | None = None,
        lengths: Lengths | None = None,
        reset: Reset[State] | None = None,
        return_states: Literal[False] = False,
    ) -> tuple[Tensor, State]: ...
    @overload
    def forward(
        self,
        input: Tensor,
        hx: State | None = None,
        lengths: Lengths | None = None,
        reset: Reset[State] | None = None,
        *,
        return_states: Literal[True],
    ) -> tuple[Tensor, State, dict[str, Tensor]]: ...
    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: State | None = None,
        *,
        return_states: Literal[False] = False,
    ) -> tuple[PackedSequence, State]: ...
    @overload
    def forward(
        self, input: PackedSequence, hx: State | None = None, *, return_states: Literal[True]
    ) -> tuple[PackedSequence, State, dict[str, Tensor]]: ...
    def forward(
        self,
        input: Any,
        hx: Any = None,
        lengths: Any = None,
        reset: Any = None,
        return_states: bool = False,
    ) -> Any:
        """Runs the layers over a whole sequence.

        Args:
            input: [T, B, I], or [B, T, I] with batch_first, or [T, I], or a PackedSequence.
            hx: the initial state as torch.nn takes it, or None for zeros.
            lengths: [B] integers on any device, or a list or NumPy array of them: time steps of
                each row of padded input; or a bool mask [T, B] ([B, T] with batch_first), true
                where a step is real.
            reset: bool [T, B] ([B, T] with batch_first): zero the row's state before that step,
                in the reverse direction on the way back from it. Or (mask, hx): set it to hx,
                in which 1 may stand for B.
            return_states: also return the states of all layers and time steps.
        Returns:
            output and final state, as torch.nn returns them. With return_states, third, a
            dictionary from "h" (and "c") to tensors [L * D, T, B, H] ([L * D, B, T, H] with
            batch_first; [L * D, T, H] unbatched; [L * D, T, B, H] for a PackedSequence, in the
            order of its batch), 0 where a row is over. They are part of the graph.
        Raises:
            RuntimeError, ValueError, TypeError: the argument, what was expected, what came.
        """
        if lengths is reset is None and not return_states:
            plain = streaming.plain_call(self, input, hx)
            if plain is not None:
                return plain
        output, final, *states = stack.run(self._given(input, hx, lengths, reset, return_states))
        final = final[0] if len(final) == 1 else final
        if not isinstance(input, PackedSequence):
            return (output, final, *states)
        if input.unsorted_indices is not None:
            order = input.unsorted_indices
            final = tree_map(lambda f: f.index_select(1, order), final)
            states = tree_map(lambda s: s.index_select(2, order), states)
        return (input._replace(data=output), final, *states)

    if TYPE_CHECKING:
        # torch.nn.Module declares a call as Callable[..., Any]. It takes what forward takes.
        @_typed_as(forward)
        def __call__(self) -> None: ...

    def _spec(self) -> Spec:
        return Spec(
            self.mode.lower(), self.input_size, self.hidden_size, self.num_layers, self.bias,
            self.batch_first, self.dropout, self.bidirectional, self.proj_size, self.num_heads,
            self.training, self.backend, self.save,
            reversed_layers=arguments.check_direction(
                self.direction, self.num_layers, self.bidirectional
            ),
            residual=self.residual, hidden_sizes=self.hidden_sizes or None,
        )  # fmt: skip

    def _weights(self) -> list[Any]:
        """The parameters, or what hooks and parametrizations have put in their places."""
        parameters: Any = self._parameters  # by far the fastest way to most of them
        names: Any = self._flat_weights_names
        try:
            return [parameters[n] for n in names]
        except KeyError:
            return [getattr(self, n) for n in names]

    def _given(self, input, hx, lengths=None, reset=None, return_states=False) -> stack.Given:
        """The call, checked. Raises what torch.nn raises."""
        spec, weights, name = self._spec(), self._weights(), type(self).__name__
        batch_sizes = order = None
        if isinstance(input, PackedSequence):
            input, batch_sizes, order, _ = input
            packing.check_batch_sizes(batch_sizes, input)
        arguments.check_input(name, spec, input, batch_sizes, weights[0].dtype)
        if hx is not None:
            hx = (hx,) if len(cells.get(spec.cell).states) == 1 else hx
            hx = arguments.check_hx(name, spec, hx, input, batch_sizes)
            if order is not None:
                packing.check_order("sorted_indices", order, hx[0])
                hx = tuple(s.index_select(1, order) for s in hx)
        rest = (batch_sizes, lengths, reset, self.regularizers, return_states)
        return stack.Given(spec, input, hx, weights, *rest)

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
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

    def stream(self, state: State | None = None, *, detach: bool = True) -> streaming.Stream[State]:
        """A `fusedrnn.Stream`, which carries the state from one chunk to the next."""
        return streaming.Stream(self, state, detach=detach)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """As torch.nn.Module's. Tools that look at each module call it first: Opacus is told."""
        opacus.tell({ours: TORCH_CLASSES[ours.__name__] for ours in (LSTM, GRU, RNN)})
        return super().parameters(recurse)

    def extra_repr(self) -> str:
        """What repr shows of the module."""
        mode = self.mode.lower()
        cell = f"{mode!r}, " if type(self).__init__ is Recurrent.__init__ else ""
        options = "" if cell or "(" not in mode else ", " + mode.partition("(")[2][:-1]
        heads = "" if self.num_heads == 1 else f", num_heads={self.num_heads}"
        shown = "" if self.regularizers is None else f", {self.regularizers}"
        way = "" if self.direction == "forward" else f", direction={self.direction!r}"
        way += ", residual=True" if self.residual else ""
        sizes = super().extra_repr()
        if self.hidden_sizes:
            sizes = sizes.replace(f", {self.hidden_size}", f", {self.hidden_sizes}", 1)
        return cell + sizes + options + heads + way + shown


class LSTM(ScriptableLSTM, Recurrent[tuple[Tensor, Tensor]]):
    r"""Long short-term memory over a sequence; replaces torch.nn.LSTM.

        i_t = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)
        f_t = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)
        g_t = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
        o_t = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho)
        c_t = f_t * c_{t-1} + i_t * g_t
        h_t = o_t * tanh(c_t),  or W_hr (o_t * tanh(c_t)) with a projection

    Args:
        input_size: I, features of the input.
        hidden_size: H, units of a layer and direction; or a tuple, one of each layer. H is then the
            largest in the states, of which a smaller layer has the first units; the others are 0.
        num_layers: L. Default: 1.
        bias: whether the layers have b_ih and b_hh. Default: True.
        batch_first: [B, T, I] instead of [T, B, I]. Default: False.
        dropout: probability of dropout after each layer but the last, in training. Default: 0.
        bidirectional: D = 2 directions instead of 1. Default: False.
        proj_size: P > 0 projects h_t to P features. Default: 0.
        device, dtype: of the parameters.
        forget_bias: where the forget gate's part of every b_ih starts; 1 or 2 helps to learn long
            dependencies. b_hh, which adds to it, starts as ever, within +-1/sqrt(H). Default:
            None, as torch.nn.LSTM.
        num_heads: divides H among so many heads, which see only their own part of h_{t-1}; torch
            has no such thing. Default: 1.
        direction: "forward"; "reverse", every row from its last time step to its first;
            "alternate", forward first; or a tuple with one of the first two for each layer.
            Default: "forward".
        residual: adds a layer's input, without its dropout, to its output, where they have one
            size. Default: False.
        backend: "auto", "triton", "aten", "loop" or "reference". Default: None, see use_backend.
        save: "gates", or "states" to recompute the gates in backward. Default: "gates".
        input_dropout: probability, of the features of each layer's input, the same for all time
            steps. Default: 0.
        recurrent_dropout: probability, of the units of h_{t-1} where it enters the gates, the
            same for all time steps. Default: 0.
        weight_drop: probability, of the elements of W_hh. Default: 0.
        zoneout: probability that a unit keeps its previous state, or a pair, for h and for c.
            Default: 0.
        clip_gradient: the gradient of h_t is clipped to +- this in every step of the backward
            loop. Default: None.
        generator: a torch.Generator for the noise of these. Default: None, torch's global one.
        (Exactly, with their sources: fusedrnn.Regularizers.)

    Inputs: input, (h_0, c_0), lengths, reset, return_states
        input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence.
        h_0: [L * D, B, P or H], c_0: [L * D, B, H]; without B for unbatched input; zeros if
            left out.
        lengths: [B] integers on any device, a list, or a bool mask; rows end there.
        reset: bool [T, B]; True zeroes the row's state before that time step; or (mask, hx).
        return_states: return also a dictionary of the states of all layers and steps.
        (All of them in detail: forward.)

    Outputs: output, (h_n, c_n)
        output: [T, B, D * (P or H)], in the input's layout.
        h_n, c_n: as h_0, c_0, at the end of each row. With both directions, those of layer l are
            h_n[2 * l] and h_n[2 * l + 1]: h_n.unflatten(0, (L, 2)) is [L, 2, B, P or H].

    Attributes:
        weight_ih_l[k]: [4 * H, I], for k > 0 [4 * H, D * (P or H)]; rows i, f, g, o.
        weight_hh_l[k]: [4 * H, P or H]; with heads [num_heads, 4 * H / num_heads, H / num_heads],
            the rows i, f, g, o of each head. Unit u of head k is k * H / num_heads + u in all else.
        bias_ih_l[k], bias_hh_l[k]: [4 * H].
        weight_hr_l[k]: [P, H], with a projection.
        The reverse direction's end in _reverse. All start uniform in +-1/sqrt(H).

    Raises:
        RuntimeError, ValueError, TypeError: the argument, what was expected, what came.

    Numerics: accumulates in float32; states are stored in the input's dtype.

    Source: Hochreiter & Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735; projection: Sak,
    Senior & Beaufays 2014, arXiv:1402.1128; forget_bias: Gers, Schmidhuber & Cummins 2000,
    doi:10.1162/089976600300015015, and Jozefowicz, Zaremba & Sutskever 2015; gate order as
    torch.nn.LSTM.

    Example::

        >>> rnn = fusedrnn.LSTM(10, 20, 2)
        >>> output, (h_n, c_n) = rnn(torch.randn(5, 3, 10))
    """

    forget_bias: float | None = None  # for modules of torch's, too

    def __init__(
        self,
        input_size: int,
        hidden_size: HiddenSize,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        forget_bias: float | None = None,
        num_heads: int = 1,
        direction: Direction = "forward",
        residual: bool = False,
        backend: Backend | None = None,
        save: Save = "gates",
        input_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_drop: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        clip_gradient: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if forget_bias is not None:
            if isinstance(forget_bias, bool) or not isinstance(forget_bias, numbers.Real):
                got = type(forget_bias).__name__
                raise TypeError(f"forget_bias: expected a number or None, got {got}")
            if not math.isfinite(forget_bias):
                raise ValueError(f"forget_bias: expected a finite number, got {forget_bias}")
            if not bias:
                raise ValueError(f"forget_bias: expected bias=True beside it, got bias={bias}")
            self.forget_bias = float(forget_bias)  # before torch's constructor initialises
        super().__init__(
            "lstm", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            proj_size, device, dtype, num_heads=num_heads, direction=direction, residual=residual,
            backend=backend, save=save,
            input_dropout=input_dropout, recurrent_dropout=recurrent_dropout,
            weight_drop=weight_drop, zoneout=zoneout, clip_gradient=clip_gradient,
            generator=generator,
        )  # fmt: skip

    def reset_parameters(self) -> None:
        """Initialises all parameters as torch.nn.LSTM does, then b_ih by `forget_bias`."""
        super().reset_parameters()
        if self.forget_bias is not None:
            for name in self._flat_weights_names:
                if name.startswith("bias_ih"):
                    nn.init.constant_(getattr(self, name).chunk(4)[1], self.forget_bias)

    def extra_repr(self) -> str:
        """What repr shows of the module."""
        shown = "" if self.forget_bias is None else f", forget_bias={self.forget_bias}"
        return super().extra_repr() + shown

    # nn.LSTM has these, and code that subclasses it calls them.
    get_expected_cell_size: Callable[..., tuple[int, int, int]] = nn.LSTM.get_expected_cell_size
    check_forward_args: Callable[..., None] = nn.LSTM.check_forward_args
    permute_hidden: Callable[..., tuple[Tensor, Tensor]] = nn.LSTM.permute_hidden


class GRU(Recurrent[Tensor]):
    r"""Gated recurrent unit over a sequence; replaces torch.nn.GRU.

        r_t = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
        z_t = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
        n_t = tanh(W_in x_t + b_in + r_t * (W_hn h_{t-1} + b_hn))
        h_t = (1 - z_t) * n_t + z_t * h_{t-1}

    With reset_after=False, n_t = tanh(W_in x_t + b_in + W_hn (r_t * h_{t-1}) + b_hn).

    Args:
        input_size: I, features of the input.
        hidden_size: H, units of a layer and direction; or a tuple, one of each layer. H is then the
            largest in the states, of which a smaller layer has the first units; the others are 0.
        num_layers: L. Default: 1.
        bias: whether the layers have b_ih and b_hh. Default: True.
        batch_first: [B, T, I] instead of [T, B, I]. Default: False.
        dropout: probability of dropout after each layer but the last, in training. Default: 0.
        bidirectional: D = 2 directions instead of 1. Default: False.
        proj_size: 0, which torch.nn takes by position; only LSTM has projections.
        device, dtype: of the parameters.
        reset_after: whether r_t multiplies what W_hn made of h_{t-1}, as torch and cuDNN have it,
            or h_{t-1} itself, as the paper. Default: True.
        num_heads: divides H among so many heads, which see only their own part of h_{t-1}; torch
            has no such thing. Default: 1.
        direction: "forward"; "reverse", every row from its last time step to its first;
            "alternate", forward first; or a tuple with one of the first two for each layer.
            Default: "forward".
        residual: adds a layer's input, without its dropout, to its output, where they have one
            size. Default: False.
        backend: "auto", "triton", "aten", "loop" or "reference". Default: None, see use_backend.
        save: "gates", or "states" to recompute the gates in backward. Default: "gates".
        input_dropout: probability, of the features of each layer's input, the same for all time
            steps. Default: 0.
        recurrent_dropout: probability, of the units of h_{t-1} where it enters the gates, the
            same for all time steps. Default: 0.
        weight_drop: probability, of the elements of W_hh. Default: 0.
        zoneout: probability that a unit keeps its previous state. Default: 0.
        clip_gradient: the gradient of h_t is clipped to +- this in every step of the backward
            loop. Default: None.
        generator: a torch.Generator for the noise of these. Default: None, torch's global one.
        (Exactly, with their sources: fusedrnn.Regularizers.)

    Inputs: input, h_0, lengths, reset, return_states
        input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence.
        h_0: [L * D, B, H]; without B for unbatched input; zeros if left out.
        lengths: [B] integers on any device, a list, or a bool mask; rows end there.
        reset: bool [T, B]; True zeroes the row's state before that time step; or (mask, hx).
        return_states: return also a dictionary of the states of all layers and steps.
        (All of them in detail: forward.)

    Outputs: output, h_n
        output: [T, B, D * H], in the input's layout.
        h_n: as h_0, at the end of each row. With both directions, those of layer l are h_n[2 * l]
            and h_n[2 * l + 1]: h_n.unflatten(0, (L, 2)) is [L, 2, B, H].

    Attributes:
        weight_ih_l[k]: [3 * H, I], for k > 0 [3 * H, D * H]; rows r, z, n.
        weight_hh_l[k]: [3 * H, H]; with heads [num_heads, 3 * H / num_heads, H / num_heads], the
            rows r, z, n of each head. Unit u of head k is k * H / num_heads + u in all else.
        bias_ih_l[k], bias_hh_l[k]: [3 * H].
        The reverse direction's end in _reverse. All start uniform in +-1/sqrt(H).

    Raises:
        RuntimeError, ValueError, TypeError: the argument, what was expected, what came.

    Numerics: accumulates in float32; states are stored in the input's dtype.

    Source: Cho et al. 2014, arXiv:1406.1078, by default in the form of torch.nn.GRU, whose order of
    gates it has.

    Example::

        >>> rnn = fusedrnn.GRU(10, 20, bidirectional=True)
        >>> output, h_n = rnn(torch.randn(5, 3, 10))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: HiddenSize,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: Literal[0] = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
        num_heads: int = 1,
        direction: Direction = "forward",
        residual: bool = False,
        backend: Backend | None = None,
        save: Save = "gates",
        input_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_drop: float = 0.0,
        zoneout: float = 0.0,
        clip_gradient: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(reset_after, bool):
            raise TypeError(f"reset_after: expected a bool, got {reset_after!r}")
        cell = "gru" if reset_after else "gru_reset_before"
        super().__init__(
            cell, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            proj_size, device, dtype, num_heads=num_heads, direction=direction, residual=residual,
            backend=backend, save=save,
            input_dropout=input_dropout, recurrent_dropout=recurrent_dropout,
            weight_drop=weight_drop, zoneout=zoneout, clip_gradient=clip_gradient,
            generator=generator,
        )  # fmt: skip


class RNN(Recurrent[Tensor]):
    r"""Simple recurrent network over a sequence; replaces torch.nn.RNN.

        h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)        or relu

    Args:
        input_size: I, features of the input.
        hidden_size: H, units of a layer and direction; or a tuple, one of each layer. H is then the
            largest in the states, of which a smaller layer has the first units; the others are 0.
        num_layers: L. Default: 1.
        nonlinearity: "tanh" or "relu". Default: "tanh".
        bias: whether the layers have b_ih and b_hh. Default: True.
        batch_first: [B, T, I] instead of [T, B, I]. Default: False.
        dropout: probability of dropout after each layer but the last, in training. Default: 0.
        bidirectional: D = 2 directions instead of 1. Default: False.
        proj_size: 0, which torch.nn takes by position; only LSTM has projections.
        device, dtype: of the parameters.
        num_heads: divides H among so many heads, which see only their own part of h_{t-1}; torch
            has no such thing. Default: 1.
        direction: "forward"; "reverse", every row from its last time step to its first;
            "alternate", forward first; or a tuple with one of the first two for each layer.
            Default: "forward".
        residual: adds a layer's input, without its dropout, to its output, where they have one
            size. Default: False.
        backend: "auto", "triton", "aten", "loop" or "reference". Default: None, see use_backend.
        save: "gates", or "states" to recompute the gates in backward. Default: "gates".
        input_dropout: probability, of the features of each layer's input, the same for all time
            steps. Default: 0.
        recurrent_dropout: probability, of the units of h_{t-1} where it enters the gates, the
            same for all time steps. Default: 0.
        weight_drop: probability, of the elements of W_hh. Default: 0.
        zoneout: probability that a unit keeps its previous state. Default: 0.
        clip_gradient: the gradient of h_t is clipped to +- this in every step of the backward
            loop. Default: None.
        generator: a torch.Generator for the noise of these. Default: None, torch's global one.
        (Exactly, with their sources: fusedrnn.Regularizers.)

    Inputs: input, h_0, lengths, reset, return_states
        input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence.
        h_0: [L * D, B, H]; without B for unbatched input; zeros if left out.
        lengths: [B] integers on any device, a list, or a bool mask; rows end there.
        reset: bool [T, B]; True zeroes the row's state before that time step; or (mask, hx).
        return_states: return also a dictionary of the states of all layers and steps.
        (All of them in detail: forward.)

    Outputs: output, h_n
        output: [T, B, D * H], in the input's layout.
        h_n: as h_0, at the end of each row. With both directions, those of layer l are h_n[2 * l]
            and h_n[2 * l + 1]: h_n.unflatten(0, (L, 2)) is [L, 2, B, H].

    Attributes:
        weight_ih_l[k]: [H, I], for k > 0 [H, D * H].
        weight_hh_l[k]: [H, H]; with heads [num_heads, H / num_heads, H / num_heads]: unit u of
            head k is k * H / num_heads + u in all else.
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

    def __init__(
        self,
        input_size: int,
        hidden_size: HiddenSize,
        num_layers: int = 1,
        nonlinearity: Nonlinearity = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: Literal[0] = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        num_heads: int = 1,
        direction: Direction = "forward",
        residual: bool = False,
        backend: Backend | None = None,
        save: Save = "gates",
        input_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_drop: float = 0.0,
        zoneout: float = 0.0,
        clip_gradient: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
        self.nonlinearity: Nonlinearity = nonlinearity
        super().__init__(
            f"rnn_{nonlinearity}", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, proj_size, device, dtype, num_heads=num_heads, direction=direction,
            residual=residual, backend=backend, save=save, input_dropout=input_dropout,
            recurrent_dropout=recurrent_dropout, weight_drop=weight_drop, zoneout=zoneout,
            clip_gradient=clip_gradient, generator=generator,
        )  # fmt: skip


class CellModule(Scriptable, nn.RNNCellBase, Generic[State]):
    """What LSTMCell, GRUCell and RNNCell put before torch.nn's class of that name.

    torch's own cell runs the step, unless a backend of ours is forced or torch.func transforms
    the call, for which torch's has no rule: then it is a sequence of one step.
    """

    backend: Backend | None = None
    cell_name: str

    def __init__(self, *args: Any, backend: Backend | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _set_backend(self, backend)

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        """One step; see the class."""
        name = dispatch.forced_backend(self.backend)
        if name == "aten" or (name == "auto" and not arguments.transformed()):
            return super().forward(input, hx)
        _output, final = stack.run(self._given(input, hx))
        final: Any = tuple(f.squeeze(0) for f in final)
        return final[0] if len(final) == 1 else final

    if TYPE_CHECKING:

        @_typed_as(forward)
        def __call__(self) -> None: ...

    def _given(self, input, hx) -> stack.Given:
        """One step as a sequence of one step, checked."""
        module: Any = self
        spec = Spec(
            self.cell_name, self.input_size, self.hidden_size, bias=module.bias,
            backend=self.backend,
        )  # fmt: skip
        if hx is not None:
            hx = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        name, dtype = type(self).__name__, module.weight_ih.dtype
        arguments.check_step(name, spec, input, hx, dtype, ("input", "hx"))
        weights = [module.weight_ih, module.weight_hh]
        if module.bias:
            weights += [module.bias_ih, module.bias_hh]
        hx = None if hx is None else tuple([s.unsqueeze(0) for s in hx])
        return stack.Given(spec, input.unsqueeze(0), hx, weights)


class LSTMCell(CellModule[tuple[Tensor, Tensor]], nn.LSTMCell):
    """One step of an LSTM; replaces torch.nn.LSTMCell. Equations as in `fusedrnn.LSTM`.

    Args:
        input_size, hidden_size, bias, device, dtype: as torch.nn.LSTMCell.
        backend: "auto", "triton", "aten", "loop" or "reference". Default: None, see use_backend.

    Inputs: input [B, I] or [I], (h, c) each [B, H] or [H], zeros if left out.
    Outputs: (h, c).
    Raises:
        RuntimeError, ValueError: the argument, what was expected, what came.
    Source: Hochreiter & Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735.
    """

    cell_name = "lstm"
    forward__0: Callable[..., Any] = forward_of(nn.LSTMCell)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype, backend=backend)


class GRUCell(CellModule[Tensor], nn.GRUCell):
    """One step of a GRU; replaces torch.nn.GRUCell. Equations as in `fusedrnn.GRU`.

    Args:
        input_size, hidden_size, bias, device, dtype: as torch.nn.GRUCell.
        backend: "auto", "triton", "aten", "loop" or "reference". Default: None, see use_backend.

    Inputs: input [B, I] or [I], h [B, H] or [H], zeros if left out.
    Outputs: h.
    Raises:
        RuntimeError, ValueError: the argument, what was expected, what came.
    Source: Cho et al. 2014, arXiv:1406.1078, reset after the product.
    """

    cell_name = "gru"
    forward__0: Callable[..., Any] = forward_of(nn.GRUCell)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype, backend=backend)


class RNNCell(CellModule[Tensor], nn.RNNCell):
    """One step of a simple RNN; replaces torch.nn.RNNCell. Equations as in `fusedrnn.RNN`.

    Args:
        input_size, hidden_size, bias, nonlinearity, device, dtype: as torch.nn.RNNCell.
        backend: "auto", "triton", "aten", "loop" or "reference". Default: None, see use_backend.

    Inputs: input [B, I] or [I], h [B, H] or [H], zeros if left out.
    Outputs: h.
    Raises:
        RuntimeError, ValueError: the argument, what was expected, what came.
    Source: Elman 1990, doi:10.1207/s15516709cog1402_1.
    """

    forward__0: Callable[..., Any] = forward_of(nn.RNNCell)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: Nonlinearity = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(
            input_size, hidden_size, bias, nonlinearity, device, dtype, backend=backend
        )

    @property
    def cell_name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"rnn_{self.nonlinearity}"


def _set_backend(module, backend: str | None) -> None:
    if backend is not None:
        module.backend = dispatch.check_name(backend, "backend")
