"""The functional interface: any cell over a sequence, from weights that the caller owns.

`recurrent` takes any cell; `lstm`, `gru` and `rnn` are the same thing under the names of the
cells. The modules of `fusedrnn.modules`, which own their weights, go to `fusedrnn.stack` directly.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any, Literal, TypedDict, overload

from torch import Tensor
from typing_extensions import Unpack

from fusedrnn import arguments, cells, packing, stack
from fusedrnn.call import Spec
from fusedrnn.regularizers import Regularizers
from fusedrnn.types import Backend, Direction, HiddenSize, Lengths, Nonlinearity, Save

SAVE: tuple[Save, ...] = ("gates", "states")


class Options(TypedDict, total=False):
    """The keyword arguments that `lstm`, `gru` and `rnn` share; see `recurrent`."""

    bias: bool
    num_layers: int
    dropout: float
    training: bool
    bidirectional: bool
    batch_first: bool
    proj_size: int
    num_heads: int
    direction: Direction
    residual: bool
    batch_sizes: Tensor | None
    lengths: Lengths | None
    reset: Tensor | tuple[Tensor, Tensor | tuple[Tensor, ...]] | None
    backend: Backend | None
    save: Save
    regularizers: Regularizers | None


@overload
def recurrent(
    cell: str,
    input: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: Iterable[Tensor],
    *,
    hidden_size: HiddenSize,
    return_states: Literal[False] = False,
    **options: Unpack[Options],
) -> tuple[Tensor, tuple[Tensor, ...]]: ...
@overload
def recurrent(
    cell: str,
    input: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: Iterable[Tensor],
    *,
    hidden_size: HiddenSize,
    return_states: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Tensor]]: ...
def recurrent(
    cell: str,
    input: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: Iterable[Tensor],
    *,
    hidden_size: HiddenSize,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    proj_size: int = 0,
    num_heads: int = 1,
    direction: Direction = "forward",
    residual: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Lengths | None = None,
    reset: Tensor | tuple[Tensor, Tensor | tuple[Tensor, ...]] | None = None,
    backend: Backend | None = None,
    save: Save = "gates",
    regularizers: Regularizers | None = None,
    return_states: bool = False,
) -> Any:
    """Any registered cell over a whole sequence.

    Args:
        cell: a name in `fusedrnn.cells.REGISTRY`.
        input: [T, B, I], or [B, T, I] with batch_first, or [T, I] unbatched, or packed rows
            [N, I] with `batch_sizes`; float32, bfloat16, float16 or float64, any strides.
        hx: the cell's S initial states, each [L * D, B, H] ([L * D, H] unbatched), or None for
            zeros.
        weights: the parameters of layer 0 forward, layer 0 reverse, layer 1 forward, ...,
            each in the order weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, the cell's own.
        hidden_size: H; or a tuple, one of each layer. Then H is the largest where states are
            concerned, and of them a smaller layer has the first units; the others are 0.
        bias, num_layers, bidirectional, batch_first: as torch.nn's modules.
        proj_size: P; h has this size instead of H. (Only for a cell that `projects`.)
        num_heads: divides H among so many heads, which see only their own part of h_{t-1}: each
            weight_hh is [num_heads, G * H / num_heads, H / num_heads], the blocks of the gates
            inside a head. Unit u of head k is k * H / num_heads + u everywhere else.
        direction: "forward"; "reverse", every row from its last time step to its first;
            "alternate", forward first; or one of the first two for each layer.
        residual: adds a layer's input, without its dropout, to the layer's output, where they have
            one size.
        batch_sizes: [T] int64 on the CPU: rows of each time step of packed input.
        dropout: probability, between layers, while `training`.
        lengths: [B] integers on any device, or a list or NumPy array of them: time steps of each
            row of padded input; or a bool mask [T, B] ([B, T] with batch_first), true where a step
            is real, which means waiting where it lies on a GPU. Later outputs are 0, final states
            are those at the row's own end, and the reverse direction starts there. A row of
            length 0 keeps its state. On a GPU, where looking would mean waiting, a length beyond T
            counts as T and a negative one as 0.
        reset: bool [T, B] ([B, T] with batch_first): sets a row's state to 0 before that step.
            Or (mask, states): sets it to these, each [L * D, B or 1, H].
        backend: "auto", "triton", "aten", "loop", "reference" or None (see `fusedrnn.dispatch`).
        save: what the fused backward reads: "gates" (fast) or "states" (less memory).
        regularizers: see `fusedrnn.Regularizers`.
    Returns:
        output [T, B, D * H] in the layout of the input; the S final states [L * D, B, H].
    Raises:
        RuntimeError: a shape, or a forced backend that cannot run the call.
        ValueError: a number of dimensions, a dtype, a name, or an empty sequence.
    Numerics: accumulates in float32; states are stored in the input's dtype. Under autocast as
        torch.nn's modules.
    """
    layout = {"bias": bias, "bidirectional": bidirectional, "batch_first": batch_first}
    layout["residual"] = residual
    for option, value in layout.items():
        if not isinstance(value, bool):
            raise TypeError(f"{cell}: {option}: expected a bool, got {value!r}")
    arguments.check_sizes(num_layers=num_layers, proj_size=proj_size)
    if num_layers < 1:
        raise ValueError(f"{cell}: num_layers: expected at least 1, got {num_layers}")
    H, sizes = arguments.sizes_of(hidden_size, num_layers, proj_size)
    arguments.check_sizes(hidden_size=H)
    if not isinstance(dropout, numbers.Real) or not 0 <= dropout <= 1:
        raise ValueError(f"{cell}: dropout: expected a probability, from 0 to 1, got {dropout!r}")
    if save not in SAVE:
        raise ValueError(f"save: expected one of {SAVE}, got {save!r}")
    for size in sizes or (H,):
        arguments.check_layers(cell, size, proj_size, num_heads)
    reversed_layers = arguments.check_direction(direction, num_layers, bidirectional)
    weights = arguments.listed(weights)
    first = weights[0] if weights else None  # what is wrong with it, check_weights says
    input_size = first.shape[-1] if isinstance(first, Tensor) and first.dim() else 0
    spec = Spec(
        cell, input_size, H, num_layers, bias, batch_first, float(dropout),
        bidirectional, proj_size, num_heads, training, backend, save,
        reversed_layers=reversed_layers, residual=residual, hidden_sizes=sizes or None,
    )  # fmt: skip
    arguments.check_weights(spec, weights)
    if batch_sizes is not None:
        packing.check_batch_sizes(batch_sizes, input)
    arguments.check_input(cell, spec, input, batch_sizes, weights[0].dtype)
    if hx is not None:
        hx = arguments.check_hx(cell, spec, hx, input, batch_sizes)
    given = (input, hx, weights, batch_sizes, lengths, reset, regularizers, return_states)
    return stack.run(stack.Given(spec, *given))


@overload
def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Iterable[Tensor],
    *,
    return_states: Literal[False] = False,
    **options: Unpack[Options],
) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...
@overload
def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Iterable[Tensor],
    *,
    return_states: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, tuple[Tensor, Tensor], dict[str, Tensor]]: ...
def lstm(input: Tensor, hx: Any, weights: Iterable[Tensor], **options: Any) -> Any:
    """Long short-term memory over a sequence, any layers and directions.

        c_t = f_t * c_{t-1} + i_t * g_t        h_t = o_t * tanh(c_t)

    Args:
        input: [T, B, I].
        hx: (h_0, c_0), each [L * D, B, H], or None for zeros.
        weights: per layer and direction weight_ih [4H, I], weight_hh [4H, H], bias_ih [4H],
            bias_hh [4H].
        options: as `recurrent`; hidden_size is read off the weights.
    Returns:
        output [T, B, D * H], (h_n, c_n) each [L * D, B, H].
    Raises:
        RuntimeError, ValueError: as `recurrent`.
    Numerics: accumulates in float32; states are stored in the input's dtype.
    Source: Hochreiter & Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735; gate order i, f, g, o.
    """
    return recurrent("lstm", input, hx, **_with_size("lstm", weights, options))


@overload
def gru(
    input: Tensor,
    hx: Tensor | None,
    weights: Iterable[Tensor],
    *,
    return_states: Literal[False] = False,
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...
@overload
def gru(
    input: Tensor,
    hx: Tensor | None,
    weights: Iterable[Tensor],
    *,
    return_states: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor, dict[str, Tensor]]: ...
def gru(input: Tensor, hx: Tensor | None, weights: Iterable[Tensor], **options: Any) -> Any:
    """Gated recurrent unit over a sequence, any layers and directions.

        h_t = (1 - z_t) * n_t + z_t * h_{t-1}

    Args:
        input: [T, B, I].
        hx: h_0 [L * D, B, H], or None for zeros.
        weights: per layer and direction weight_ih [3H, I], weight_hh [3H, H], bias_ih [3H],
            bias_hh [3H].
        options: as `recurrent`; hidden_size is read off the weights.
    Returns:
        output [T, B, D * H], h_n [L * D, B, H].
    Raises:
        RuntimeError, ValueError: as `recurrent`.
    Numerics: accumulates in float32; states are stored in the input's dtype.
    Source: Cho et al. 2014, arXiv:1406.1078, reset after the product; gate order r, z, n.
    """
    state = None if hx is None else (hx,)
    output, (h_n,), *states = recurrent("gru", input, state, **_with_size("gru", weights, options))
    return output, h_n, *states


@overload
def rnn(
    input: Tensor,
    hx: Tensor | None,
    weights: Iterable[Tensor],
    *,
    nonlinearity: Nonlinearity = "tanh",
    return_states: Literal[False] = False,
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...
@overload
def rnn(
    input: Tensor,
    hx: Tensor | None,
    weights: Iterable[Tensor],
    *,
    nonlinearity: Nonlinearity = "tanh",
    return_states: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor, dict[str, Tensor]]: ...
def rnn(
    input: Tensor,
    hx: Tensor | None,
    weights: Iterable[Tensor],
    *,
    nonlinearity: Nonlinearity = "tanh",
    **options: Any,
) -> Any:
    """Simple recurrent network over a sequence, any layers and directions.

        h_t = tanh(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh)        or relu

    Args:
        input: [T, B, I].
        hx: h_0 [L * D, B, H], or None for zeros.
        weights: per layer and direction weight_ih [H, I], weight_hh [H, H], bias_ih [H],
            bias_hh [H].
        nonlinearity: "tanh" or "relu".
        options: as `recurrent`; hidden_size is read off the weights.
    Returns:
        output [T, B, D * H], h_n [L * D, B, H].
    Raises:
        RuntimeError, ValueError: as `recurrent`.
    Numerics: accumulates in float32; states are stored in the input's dtype.
    Source: Elman 1990, doi:10.1207/s15516709cog1402_1.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
    state = None if hx is None else (hx,)
    cell = f"rnn_{nonlinearity}"
    output, (h_n,), *states = recurrent(cell, input, state, **_with_size(cell, weights, options))
    return output, h_n, *states


def _with_size(cell: str, weights: Iterable[Tensor], options: dict[str, Any]) -> dict[str, Any]:
    """`options` and hidden_size; refuses unknown options in the caller's name."""
    known = {*Options.__annotations__, "hidden_size", "return_states"}
    if unknown := set(options) - known:
        raise TypeError(f"{cell}: unexpected options {sorted(unknown)}, may be {sorted(known)}")
    weights = arguments.listed(weights)
    first = weights[0] if weights else None  # what is wrong with it, check_weights says
    rows = first.shape[0] if isinstance(first, Tensor) and first.dim() else 0
    return {"weights": weights, "hidden_size": rows // len(cells.get(cell).gates), **options}
