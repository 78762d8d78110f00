"""One step at a time, and one chunk at a time: decoding, rollouts, truncated backpropagation."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Generic, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import arguments, cells, dispatch, stack
from fusedrnn.backends import aten
from fusedrnn.call import autocast_dtype, widths
from fusedrnn.types import Lengths, Reset, State, Steppable


def step(module: Any, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """One time step of all layers; what `module.step` calls.

    The layers run one by one through torch's operators for a single step, which, unlike those
    for sequences, prepare nothing for steps to come. What these do not have (projections, heads,
    cells that torch lacks, regularisers), a forced backend, autocast or a transform of torch.func
    takes the way of a sequence of one step; a forward pre-hook, which may compute the weights
    (pruning, weight_norm), that of a call of the module.

    Args:
        module: a recurrent module of fusedrnn, whose layers all run forward.
        x: [B, I] or [I].
        state: as the module's hx: [L, B, H] or [L, H], a tuple of these where the cell has several
            states; None for zeros.
    Returns:
        output [B, H] or [H], and the next state.
    Raises:
        ValueError: a layer that runs backwards in time, or x of another number of dimensions or
            dtype.
        TypeError: x, or a state, that is no tensor, or another number of states.
        RuntimeError: a shape, a state's dtype or device; or a regulariser that draws one mask for
            a whole sequence.
    Numerics: equal to the sequence call but for the rounding of another order of summation.
    """
    plain = _plain_step(module, x, state)
    if plain is not None:
        return plain
    name = type(module).__name__
    check_runs_forward(module, f"{name}.step")
    spec = module._spec()
    weights = module._weights()
    states = None
    if state is not None:
        states = tuple(state) if isinstance(state, (tuple, list)) else (state,)
    dtype, leading = weights[0].dtype, (spec.num_layers,)
    arguments.check_step(f"{name}.step", spec, x, states, dtype, ("x", "state"), leading)
    regularizers = module.regularizers
    if regularizers is not None and module.training and regularizers.stochastic():
        raise RuntimeError(
            f"{name}.step: expected a module in evaluation mode (module.eval()), got one in "
            f"training with {regularizers}: its masks belong to whole sequences"
        )
    if module._forward_pre_hooks:
        time = 1 if module.batch_first and x.dim() == 2 else 0
        hx = states[0] if states is not None and len(states) == 1 else states
        output, state = module(x.unsqueeze(time), hx)
        return output.squeeze(time), state
    if states is None:
        shapes = [(spec.num_layers, *x.shape[:-1], width) for width in widths(spec)]
        states = tuple([torch.zeros(s, dtype=x.dtype, device=x.device) for s in shapes])
    backend = dispatch.forced_backend(spec.backend)
    plain = backend == "aten" or (backend == "auto" and not arguments.transformed())
    unbatched = x.dim() == 1
    if unbatched:
        x, states = x.unsqueeze(0), tuple([s.unsqueeze(1) for s in states])
    plain = (
        plain
        and not (spec.proj_size or spec.hidden_sizes)
        and regularizers is None
        and aten.lacks(spec) is None
    )
    if plain and autocast_dtype(x) is None:  # under which they leave another dtype
        output, *final = aten.one_step(spec, x, states, weights)
    else:
        spec = spec._replace(batch_first=False)
        given = stack.Given(spec, x.unsqueeze(0), states, weights, regularizers=regularizers)
        output, final = stack.run(given)
        output = output.squeeze(0)
    if unbatched:
        output, final = output.squeeze(0), [f.squeeze(1) for f in final]
    return output, final[0] if len(final) == 1 else tuple(final)


# What a plain layer has of these attributes.
_options = operator.attrgetter(
    "num_layers", "bidirectional", "direction", "residual", "proj_size", "num_heads",
    "regularizers", "backend", "_forward_pre_hooks",
)  # fmt: skip
_PLAIN = (1, False, "forward", False, 0, 1, None, None, {})


def _plain_step(module: Any, x: Tensor, state: Any) -> tuple[Tensor, Any] | None:
    """`step` as loops call it: a plain layer, x [B, I], and a state that fits. None for all else,
    and for whatever is wrong with these.

    `step` itself takes longer to look at a call than torch to compute a small layer. This is the
    same look at the one case, and it too remembers nothing, so that nothing can be out of date.
    """
    if torch.compiler.is_compiling():  # which looks only once
        return None
    function, count = _CELLS.get(module.mode, (None, 0))
    states = state if count == 2 else (state,)
    if (
        function is None
        or _options(module) != _PLAIN
        or not (isinstance(x, Tensor) and isinstance(states, tuple) and len(states) == count)
        or x.dim() != 2
        or dispatch.forced_backend(None) not in ("auto", "aten")
        or torch._C._is_any_autocast_enabled()
        or arguments.transformed()
    ):
        return None
    (B, features), dtype, device = x.shape, x.dtype, x.device
    weights, shape = module._weights(), (1, B, module.hidden_size)
    if features != module.input_size or dtype != weights[0].dtype:
        return None
    for s in states:
        if not (isinstance(s, Tensor) and s.shape == shape):
            return None
        if s.dtype != dtype or s.device != device:
            return None
    if count == 1:
        h = function(x, state[0], *weights)
        return h, h.clone()[None]  # the output may be changed in place
    h, c = function(x, (state[0][0], state[1][0]), *weights)
    return h, (h.clone()[None], c[None])


def plain_call(module: Any, input: Any, hx: Any) -> tuple[Tensor, Any] | None:
    """A module's call over a single time step, as loops make it too: the same look as `step` takes,
    where the operator for a step is the faster one. None for all else."""
    if torch.compiler.is_compiling() or not isinstance(input, Tensor):
        return None
    if input.dim() != 3 or input.is_nested:
        return None
    time = 1 if module.batch_first else 0
    T, B = input.shape[time], input.shape[1 - time]
    if not stack.by_cells(module.mode.lower(), input.dtype, T, B, module.training):
        return None
    found = _plain_step(module, input.squeeze(time), hx)
    return found and (found[0].unsqueeze(time), found[1])


# torch's operators for a step, and the number of states, by `Recurrent.mode`.
_CELLS: dict[str, tuple[Callable[..., Any], int]] = {
    name.upper(): (aten.cell_operator(name), len(cell.states))
    for name, cell in cells.REGISTRY.items()
    if cell.aten == name
}


def _cast(state: Any, dtype: torch.dtype) -> Any:
    """float32 and less as `dtype`, as under autocast, where a stream's states may be either."""
    if isinstance(state, (tuple, list)):
        return tuple(_cast(s, dtype) for s in state)
    low = (torch.float32, torch.bfloat16, torch.float16)
    same = isinstance(state, Tensor) and state.dtype in low and dtype in low
    return state.to(dtype) if same else state


def check_runs_forward(module: Any, name: str) -> None:
    """Raises for a module of which some layer runs backwards in time."""
    if module.bidirectional or module._spec().reversed_layers:
        got = "bidirectional=True" if module.bidirectional else f"direction={module.direction!r}"
        raise ValueError(
            f"{name}: expected a module whose layers run forward, got {got}: the "
            f"reverse direction needs the end of the sequence first"
        )


class Stream(Generic[State]):
    """A module that goes on where it stopped: carries the state from chunk to chunk.

    Chunk by chunk equals one long pass forward. Backward stops at the beginning of each chunk,
    since the state is detached there: truncated backpropagation through time (Williams & Peng
    1990).

    Args:
        module: a recurrent module of fusedrnn, whose layers all run forward.
        state: where to begin, as hx; None for zeros.
        detach: False lets gradients cross from chunk to chunk.
    Attributes:
        state: the state after the last chunk, as hx, or None before the first. Save it and set
            it to go back.
    Raises:
        TypeError, ValueError: not a module of fusedrnn, or a layer that runs backwards in time.

    Example::

        >>> stream = rnn.stream()
        >>> for chunk, first in chunks:              # [T, B, I]; bool [T, B], where episodes begin
        ...     loss = criterion(stream(chunk, reset=first))
        ...     loss.backward()
    """

    def __init__(
        self, module: Steppable[State], state: State | None = None, *, detach: bool = True
    ) -> None:
        if not hasattr(module, "regularizers"):
            got = type(module).__name__
            raise TypeError(
                f"module: expected an LSTM, GRU, RNN or Recurrent of fusedrnn, got {got}"
            )
        check_runs_forward(module, f"{type(module).__name__}.stream")
        parts = state if isinstance(state, (tuple, list)) else (state,)
        if state is not None and not all(isinstance(part, Tensor) for part in parts):
            got = ", ".join(type(part).__name__ for part in parts)
            raise TypeError(f"state: expected the Tensors of hx or None, got {got}")
        self.module: Any = module
        self.detach = detach
        self.state: State | None = state

    @overload
    def __call__(
        self,
        input: Tensor,
        *,
        lengths: Lengths | None = None,
        reset: Reset[State] | None = None,
    ) -> Tensor: ...
    @overload
    def __call__(self, input: PackedSequence) -> PackedSequence: ...
    def __call__(self, input: Any, *, lengths: Any = None, reset: Any = None) -> Any:
        """The next chunk, as the module takes it; returns its output."""
        state = self._cut(self.state)
        output, state = self.module(input, state, lengths=lengths, reset=reset)
        self.state = self._cut(state)  # now, not at the next chunk: a graph holds memory
        return output

    def step(self, x: Tensor) -> Tensor:
        """The next time step: x [B, I] -> output [B, H]."""
        output, state = step(self.module, x, self._cut(self.state))
        self.state = self._cut(state)
        return output

    def reset(self, rows: Tensor | None = None, state: State | None = None) -> None:
        """Begins anew before the next chunk: episodes that ended with the last one.

        Args:
            rows: bool [B] ([] for unbatched chunks); None for all.
            state: what they begin with, as hx, in which 1 may stand for B; None for zeros.
        Raises:
            TypeError, RuntimeError: rows that are not bool [B], or a state that does not fit.
        """
        if rows is not None and not (isinstance(rows, Tensor) and rows.dtype == torch.bool):
            got = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
            raise TypeError(f"reset: rows: expected a bool tensor [B], got {got}")
        if state is None and (rows is None or self.state is None):
            self.state = None  # so the next chunk may have another B
            return
        if self.state is None:
            raise RuntimeError("reset: state: expected a stream that has begun, got none yet")
        states = self.state if isinstance(self.state, (tuple, list)) else (self.state,)
        unbatched = states[0].dim() == 2
        states = tuple(s.unsqueeze(1) for s in states) if unbatched else states
        shape = () if unbatched else (states[0].shape[1],)
        if rows is None:
            rows = torch.ones(shape, dtype=torch.bool, device=states[0].device)
        if rows.shape != shape:
            raise RuntimeError(f"reset: rows: expected shape {shape}, got {tuple(rows.shape)}")
        rows = rows.to(states[0].device)[..., None]
        if state is None:
            begin = tuple(torch.zeros_like(s) for s in states)
        else:
            state = _cast(state, states[0].dtype)
            spec = self.module._spec()
            begin = arguments.check_reset_state(state, spec, states[0], unbatched)
        new: Any = tuple(torch.where(rows, f, s) for f, s in zip(begin, states, strict=True))
        new = tuple(s.squeeze(1) for s in new) if unbatched else new
        self.state = self._cut(new[0] if len(new) == 1 else new)

    def _cut(self, state: Any) -> Any:
        """`state` without its graph, unless gradients are to cross."""
        if state is None or not self.detach or not torch.is_grad_enabled():
            return state
        if isinstance(state, (tuple, list)):
            return tuple(s.detach() for s in state)
        return state.detach()
