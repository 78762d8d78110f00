"""The functional interface: argument checks, layers and directions.

`recurrent` is any cell over a sequence; `lstm`, `gru` and `rnn` are the same thing under the names
of the cells. The modules of `fusedrnn.modules`, which own their weights and check the rest
themselves, call `run`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from fusedrnn import cells, dispatch, onnx, packing
from fusedrnn import regularizers as regularizers_
from fusedrnn.autograd import (
    AtenStack,
    Config,
    Sequence,
    run_aten,
    run_layer,
    run_reference,
    with_states,
)
from fusedrnn.dispatch import Call
from fusedrnn.regularizers import Regularizers
from fusedrnn.types import Backend, Lengths, Nonlinearity, Save

SAVE: tuple[Save, ...] = ("gates", "states")
is_tracing: Callable[[], bool] = torch.jit.is_tracing  # pyright: ignore[reportPrivateImportUsage]


class Options(TypedDict, total=False):
    """The keyword arguments that `lstm`, `gru` and `rnn` share; see `recurrent`."""

    bias: bool
    num_layers: int
    dropout: float
    training: bool
    bidirectional: bool
    batch_first: bool
    proj_size: int
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
    hidden_size: int,
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
    hidden_size: int,
    return_states: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Tensor]]: ...
def recurrent(
    cell: str,
    input: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: Iterable[Tensor],
    *,
    hidden_size: int,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    proj_size: int = 0,
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
        hidden_size: H.
        bias, num_layers, bidirectional, batch_first: as torch.nn's modules.
        proj_size: P; h has this size instead of H.
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
        backend: "auto", "triton", "aten", "reference" or None (see `fusedrnn.dispatch`).
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
    for option, value in layout.items():
        if not isinstance(value, bool):
            raise TypeError(f"{cell}: {option}: expected a bool, got {value!r}")
    if save not in SAVE:
        raise ValueError(f"save: expected one of {SAVE}, got {save!r}")
    if proj_size and cell != "lstm":
        raise ValueError(f"proj_size: only lstm has projections, got {proj_size} for {cell!r}")
    weights, D = _listed(weights), 2 if bidirectional else 1
    layers = num_layers * D
    check_weights(cell, weights, hidden_size, layers, bias, proj_size, D)
    if batch_sizes is not None:
        packing.check_batch_sizes(batch_sizes, input)
    check_input(
        cell, cell, input, hx, batch_sizes, weights[0].dtype, weights[0].shape[1], hidden_size,
        layers, batch_first, proj_size,
    )  # fmt: skip
    return run(
        cell, input, hx, weights, hidden_size=hidden_size, bias=bias, num_layers=num_layers,
        dropout=dropout, training=training, bidirectional=bidirectional, batch_first=batch_first,
        proj_size=proj_size, batch_sizes=batch_sizes, lengths=lengths, reset=reset,
        backend=backend, save=save, regularizers=regularizers,
        return_states=return_states,
    )  # fmt: skip


def run(
    cell: str,
    input: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: list[Tensor],
    *,
    hidden_size: int,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    proj_size: int = 0,
    batch_sizes: Tensor | None = None,
    lengths: Lengths | None = None,
    reset: Tensor | tuple[Tensor, Tensor | tuple[Tensor, ...]] | None = None,
    backend: Backend | None = None,
    save: Save = "gates",
    regularizers: Regularizers | None = None,
    return_states: bool = False,
    nodes: list[list[tuple[Tensor, ...]]] | None = None,
) -> tuple[Any, ...]:
    """`recurrent`, for callers whose tensors are known to fit.

    Args:
        return_states: whether to return, third, the states of all layers and steps, by name,
            [L * D, T, B, H] ([L * D, B, T, H] with batch_first), 0 where a row is over.
        nodes: takes, for each layer and direction, the list over time of the states, as nodes of
            the graph from which the output is computed; the reference then runs the call.
    """
    compiling = torch.compiler.is_compiling()
    to_onnx = (compiling or is_tracing()) and onnx.plain_export()
    at_once = cells.get(cell).aten is not None and not return_states
    at_once = at_once and lengths is reset is nodes is None
    if at_once and to_onnx:
        # The exporters know torch's operator; a graph has no backend that one could force.
        at_once = regularizers is None or not regularizers.changes_output(training=training)
    elif at_once:
        # What `dispatch.select` says to such a call, and all that it comes to. The general way
        # below would cost a small layer a tenth of its time.
        at_once = (
            input.device.type == "cpu"
            and regularizers is None
            and not compiling
            and dispatch.forced_backend(backend) in ("auto", "aten")
            and autocast_dtype(input) is None
            and not transformed()
        )
    if at_once:
        D = 2 if bidirectional else 1
        batched, hx, _, _ = _batched(
            cell, input, hx, num_layers * D, hidden_size, proj_size, batch_first, batch_sizes
        )
        return _aten_at_once(
            cells.get(cell).aten, batched, hx, weights, batch_sizes, input.dim() == 2, batch_first,
            (bias, num_layers, dropout, training, bidirectional),
        )  # fmt: skip
    if to_onnx and lengths is not None and not compiling:
        raise NotImplementedError(onnx.USE_EXPORT)
    unbatched = batch_sizes is None and input.dim() == 2
    call, input, hx, sequence = prepare(
        cell, input, hx, weights, hidden_size=hidden_size, num_layers=num_layers,
        training=training, bidirectional=bidirectional, batch_first=batch_first,
        proj_size=proj_size, batch_sizes=batch_sizes, lengths=lengths, reset=reset,
        regularizers=regularizers, return_states=return_states,
    )  # fmt: skip
    chosen = "reference" if nodes is not None or to_onnx else dispatch.select(call, backend)
    autocast = call.dtype if autocast_dtype(input) is not None else None
    own = Regularizers() if regularizers is None else regularizers
    noise = regularizers_.Noise(own, input)
    if own.weight_drop and training:
        weights = _drop_weights(weights, len(weights) // (num_layers * call.directions), noise)
    # With a generator of its own, dropout between layers is ours to draw.
    layerwise = return_states or (training and (own.input_dropout or own.generator is not None))
    if chosen == "aten" and not compiling and not layerwise:
        config = Config(cell, bias, bidirectional, proj_size > 0, batch_first, "aten", "", "")
        output, *final = _aten(
            config, input, hx, weights, sequence, num_layers, dropout, training, call.needs_grad
        )
    else:
        cast = autocast is not None and chosen != "aten"
        if cast:
            input, *rest = (_cast(t, call.dtype) for t in (input, *hx, *weights))
            hx, weights = tuple(rest[: len(hx)]), rest[len(hx) :]
            autocast = None
        # With zoneout the stored states are not what the cell computed: that is redone.
        save = "states" if "zoneout" in call.inside else save
        config = Config(
            cell, bias, bidirectional, proj_size > 0, batch_first, chosen,
            save if call.needs_grad else "states" if return_states else "",
            "" if autocast is None else str(autocast).removeprefix("torch."),
            own.clip_gradient or 0.0,
        )  # fmt: skip
        run = run_layer
        if chosen == "reference" and (not compiling or call.transformed or "states" in call.inside):
            run = run_reference
        elif not compiling and chosen == "aten":
            run = functools.partial(_aten, num_layers=1, dropout=0.0, needs_grad=call.needs_grad)
        if nodes is not None:
            run = functools.partial(run_reference, record=nodes)
        # What is cast already is computed as elsewhere, in float32 inside the loop.
        off = torch.autocast(call.device, enabled=False) if cast else contextlib.nullcontext()
        with off:
            output, final, states = _layers(
                config, input, hx, weights, sequence, num_layers, dropout if training else 0.0,
                run, noise, training, return_states,
            )  # fmt: skip
    if unbatched:
        output = output.squeeze(0 if batch_first else 1)
        final = tuple(f.squeeze(1) for f in final)
    if not return_states:
        return output, tuple(final)
    if unbatched:
        states = {name: s.squeeze(2) for name, s in states.items()}
    elif batch_first and batch_sizes is None:
        states = {name: s.transpose(1, 2) for name, s in states.items()}
    return output, tuple(final), states


def prepare(
    cell: str,
    input: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: list[Tensor],
    *,
    hidden_size: int,
    num_layers: int = 1,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    proj_size: int = 0,
    batch_sizes: Tensor | None = None,
    lengths: Lengths | None = None,
    reset: Tensor | tuple[Tensor, Tensor | tuple[Tensor, ...]] | None = None,
    regularizers: Regularizers | None = None,
    return_states: bool = False,
    **_unused: Any,
) -> tuple[Call, Tensor, tuple[Tensor, ...], Sequence]:
    """What a call of `run` is before a backend is chosen: what `dispatch` must know of it, the
    input with a batch dimension, all initial states, then those that resets set, and the rest."""
    D = 2 if bidirectional else 1
    unbatched = batch_sizes is None and input.dim() == 2
    input, hx, T, B = _batched(
        cell, input, hx, num_layers * D, hidden_size, proj_size, batch_first, batch_sizes
    )
    inside: tuple[str, ...] = ()
    if lengths is not None or reset is not None:
        lengths, reset, fresh = _check_sequence(
            lengths, reset, hx, batch_sizes, T, B, batch_first, unbatched
        )
        if reset is not None:
            inside = ("reset", "reset_state") if fresh else ("reset",)
            hx = (*hx, *fresh)
    if regularizers is not None:
        if not isinstance(regularizers, Regularizers):
            kind = type(regularizers).__name__
            raise TypeError(f"regularizers: expected fusedrnn.Regularizers or None, got {kind}")
        inside += regularizers.inside_loop(training=training)
        if proj_size and "zoneout" in inside:
            raise ValueError(f"zoneout: expected no projection, got proj_size={proj_size}")
    if return_states and len(cells.get(cell).states) > 1:
        inside += ("states",)
    needs_grad = torch.is_grad_enabled() and (
        input.requires_grad
        or any(w.requires_grad for w in weights)
        or any(h.requires_grad for h in hx)
    )
    autocast = autocast_dtype(input)
    call = Call(
        cell, input.device.type, autocast or input.dtype, T, B, input.shape[-1], hidden_size,
        num_layers, D, proj_size, batch_sizes is not None, lengths is not None, reset is not None,
        needs_grad, transformed(), input.device.index, inside,
        autocast is not None and input.dtype == torch.float32,
    )  # fmt: skip
    return call, input, hx, Sequence(lengths, batch_sizes, reset)


def _batched(cell, input, hx, layers, hidden_size, proj_size, batch_first, batch_sizes):
    """The input and the initial states, zeros if there are none, with a batch dimension; T, B."""
    if batch_sizes is not None:
        T, B = batch_sizes.numel(), batch_sizes[0]
        B = B if is_tracing() else int(B)  # an int would be a constant of the trace
    else:
        if input.dim() == 2:
            input = input.unsqueeze(0 if batch_first else 1)
            hx = None if hx is None else tuple(h.unsqueeze(1) for h in hx)
        T, B = input.shape[:2]
        if batch_first:
            T, B = B, T
    if hx is None:
        like = {"dtype": input.dtype, "device": input.device}
        h_0 = torch.zeros(layers, B, proj_size or hidden_size, **like)
        others = cells.get(cell).states[1:]
        hx = (h_0, *(torch.zeros(layers, B, hidden_size, **like) for _ in others))
    return input, hx, T, B


def _aten_at_once(name, input, hx, weights, batch_sizes, unbatched, batch_first, options):
    """A whole call of `recurrent` by torch's operator `name`."""
    function = getattr(torch, name)
    state = hx if len(hx) > 1 else hx[0]
    if batch_sizes is not None:
        output, *final = function(input, batch_sizes, state, weights, *options)
        return output, tuple(final)
    output, *final = function(input, state, weights, *options, batch_first)
    if unbatched:
        return output.squeeze(0 if batch_first else 1), tuple([f.squeeze(1) for f in final])
    return output, tuple(final)


def _layers(
    config, input, hx, weights, sequence, num_layers, dropout, run, noise, training, return_states
):
    """The stack, layer by layer, with dropout between, and what the regularisers add.

    Returns:
        output, final states, and, if asked for, the cell's states by name, [L * D, T, B, H].
    """
    D = 2 if config.bidirectional else 1
    names = cells.get(config.cell).states
    S = len(names)
    per_layer = len(weights) // num_layers
    finals, planes = [], []
    for layer in range(num_layers):
        state = tuple(s[layer * D : (layer + 1) * D] for s in hx)
        if training and noise.own.input_dropout:
            input = input * regularizers_.draw_input_mask(
                noise, input, sequence.batch_sizes, config.batch_first
            )
        inside = noise.own.inside_loop(training=training)
        if "recurrent_dropout" in inside:
            sequence = sequence._replace(h_mask=regularizers_.draw_h_mask(noise, state[0]))
        if "zoneout" in inside:
            zoneout = regularizers_.zoneout_of(
                noise, input.shape[:-1], state[:S], training=training
            )
            sequence = sequence._replace(zoneout=zoneout)
        mine = tuple(weights[layer * per_layer : (layer + 1) * per_layer])
        if return_states:
            (input, *final), states = with_states(run, config, input, state, mine, sequence)
            planes.append(states)
        else:
            input, *final = run(config, input, state, mine, sequence)
        finals.append(final)
        if dropout and layer + 1 < num_layers:
            input = regularizers_.dropout(noise, input, dropout)
    if num_layers == 1:
        final = tuple(finals[0])
    else:
        final = tuple(torch.cat(parts) for parts in zip(*finals, strict=True))
    columns = zip(names, zip(*planes, strict=True), strict=False)
    return input, final, {name: torch.cat(layers) for name, layers in columns}


def _aten(
    config, input, hx, weights, sequence, num_layers, dropout, training=False, needs_grad=False
):
    """The whole stack through torch's own operator."""
    if input.device.type != "cuda" or not needs_grad:
        return run_aten(
            config, input, hx, weights, sequence,
            num_layers=num_layers, dropout=dropout, training=training,
        )  # fmt: skip
    S = len(hx)

    # cuDNN keeps what backward needs only in training mode; without dropout the mode changes
    # nothing else, so eval-mode modules can be differentiated too.
    def run(input, *tensors):
        return run_aten(
            config, input, tensors[:S], tensors[S:], sequence,
            num_layers=num_layers, dropout=dropout if training else 0.0, training=True,
        )  # fmt: skip

    def again(input, *tensors):
        if dropout and training and num_layers > 1:
            raise RuntimeError(
                "a second derivative through cuDNN with dropout cannot repeat the dropout mask; "
                "use backend='triton' or backend='reference'"
            )
        output, final, _ = _layers(
            config, input, tensors[:S], tensors[S:], sequence, num_layers, 0.0, run_reference,
            regularizers_.Noise(Regularizers()), False, False,
        )  # fmt: skip
        return output, *final

    return AtenStack.apply(run, again, input, *hx, *weights)


def _check_sequence(lengths, reset, hx, batch_sizes, T, B, batch_first, unbatched):
    """Raises what is wrong with them; returns lengths, the mask of resets, and the states that
    it sets, as hx."""
    if batch_sizes is not None:
        name = "lengths" if lengths is not None else "reset"
        raise ValueError(f"{name}: a PackedSequence has its own lengths; pass padded input instead")
    if lengths is not None:
        lengths = packing.as_lengths(lengths, T, B, batch_first=batch_first, unbatched=unbatched)
        if lengths.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed():
            packing.check_length_values(lengths, T)
    fresh = ()
    if isinstance(reset, (tuple, list)):
        if len(reset) != 2:
            raise TypeError(f"reset: expected a mask or (mask, states), got {len(reset)} values")
        reset, fresh = reset
        fresh = check_fresh(fresh, hx, unbatched)
    if reset is not None:
        shape = (T,) if unbatched else (B, T) if batch_first else (T, B)
        if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
            kind = reset.dtype if isinstance(reset, Tensor) else type(reset).__name__
            raise TypeError(f"reset: expected a bool tensor {shape}, got {kind}")
        if reset.shape != shape:
            raise RuntimeError(f"reset: expected shape {shape}, got {tuple(reset.shape)}")
        reset = reset.to(hx[0].device)
        if unbatched:
            reset = reset.unsqueeze(0 if batch_first else 1)
    return lengths, reset, fresh


def check_fresh(
    fresh: Tensor | tuple[Tensor, ...], hx: tuple[Tensor, ...], unbatched: bool
) -> tuple[Tensor, ...]:
    """The states that a reset sets, in the shapes of hx."""
    states = tuple(fresh) if isinstance(fresh, (tuple, list)) else (fresh,)
    if len(states) != len(hx):
        raise TypeError(f"reset: expected {len(hx)} state(s), got {len(states)}")
    expanded = []
    for state, like in zip(states, hx, strict=True):
        layers, B, width = like.shape
        if not isinstance(state, Tensor):
            raise TypeError(f"reset: expected states that are tensors, got {type(state).__name__}")
        if unbatched and state.shape == (layers, width):
            state = state.unsqueeze(1)
        if state.shape not in ((layers, B, width), (layers, 1, width)):
            raise RuntimeError(
                f"reset: expected a state of shape {(layers, B, width)} or "
                f"{(layers, 1, width)}, got {tuple(state.shape)}"
            )
        autocast = torch._C._is_any_autocast_enabled()  # which casts them with hx
        if state.device != like.device or (state.dtype != like.dtype and not autocast):
            raise RuntimeError(
                f"reset: expected a state of {like.dtype} on {like.device}, "
                f"got {state.dtype} on {state.device}"
            )
        expanded.append(state.expand(layers, B, width))
    return tuple(expanded)


def _drop_weights(weights, per_direction: int, noise) -> list[Tensor]:
    """Every W_hh, the second of its layer and direction, with elements dropped."""
    return [
        regularizers_.dropout(noise, w, noise.own.weight_drop) if i % per_direction == 1 else w
        for i, w in enumerate(weights)
    ]


def weight_shapes(
    cell: str, input_size: int, hidden_size: int, layers: int, bias: bool, proj_size: int, D: int
) -> list[tuple[int, ...]]:
    """The shapes of the parameters of `layers` layers and directions, in torch's order."""
    kind = cells.get(cell)
    rows, width = len(kind.gates) * hidden_size, proj_size or hidden_size
    shapes: list[tuple[int, ...]] = []
    for index in range(layers):
        shapes += [(rows, input_size if index < D else D * width), (rows, width)]
        shapes += [(rows,), (rows,)] if bias else []
        shapes += [(proj_size, hidden_size)] if proj_size else []
        shapes += [(hidden_size,)] * len(kind.params)
    return shapes


def check_weights(
    cell: str,
    weights: list[Tensor],
    hidden_size: int,
    layers: int,
    bias: bool,
    proj_size: int,
    D: int,
) -> None:
    """Raises for weights that are not those of `layers` layers and directions, D of them at once:
    kernels read as far as the shapes say, whatever lies there."""
    for index, weight in enumerate(weights):
        if not isinstance(weight, Tensor):
            raise TypeError(
                f"{cell}: weights[{index}]: expected a Tensor, got {type(weight).__name__}"
            )
    input_size = weights[0].shape[-1] if len(weights) and weights[0].dim() else 0
    count = layers * len(weight_shapes(cell, input_size, hidden_size, 1, bias, proj_size, D))
    if len(weights) != count:
        raise RuntimeError(
            f"{cell}: weights: expected {count} tensors for {layers} layer(s) and "
            f"direction(s) with bias={bias} and proj_size={proj_size}, got {len(weights)}"
        )
    shapes = weight_shapes(cell, input_size, hidden_size, layers, bias, proj_size, D)
    first, autocast = weights[0], torch._C._is_any_autocast_enabled()
    for index, (weight, shape) in enumerate(zip(weights, shapes, strict=True)):
        if weight.shape != shape:
            raise RuntimeError(
                f"{cell}: weights[{index}]: expected shape {shape} for hidden_size={hidden_size}, "
                f"got {tuple(weight.shape)}"
            )
        if not weight.is_floating_point() or (weight.dtype != first.dtype and not autocast):
            raise ValueError(
                f"{cell}: weights[{index}]: expected one floating-point dtype for all, got "
                f"{weight.dtype} beside {first.dtype}"
            )
        if weight.device != first.device:
            raise RuntimeError(
                f"{cell}: weights[{index}]: expected {first.device}, where weights[0] is, "
                f"got {weight.device}"
            )


def check_input(
    name: str,
    cell: str,
    input: Tensor,
    hx: tuple[Tensor, ...] | None,
    batch_sizes: Tensor | None,
    dtype: torch.dtype,
    input_size: int,
    hidden_size: int,
    layers: int,
    batch_first: bool,
    proj_size: int,
) -> None:
    """Raises for an input, or initial states, that the weights (`dtype`, sizes, `layers` layers
    and directions) do not fit; the messages begin with `name`."""
    if not isinstance(input, Tensor):
        raise TypeError(
            f"{name}: input: expected a Tensor or PackedSequence, got {type(input).__name__}"
        )
    if input.is_nested:
        raise TypeError(
            f"{name}: input: expected a padded Tensor with lengths=, or a PackedSequence, got a "
            "nested tensor (torch.nested.to_padded_tensor pads it)"
        )
    dims = (2, 3) if batch_sizes is None else (2,)
    if input.dim() not in dims:
        kind = ValueError if batch_sizes is None else RuntimeError
        raise kind(
            f"{name}: input: expected {' or '.join(f'{d}-D' for d in dims)}, "
            f"got {input.dim()}-D of shape {tuple(input.shape)}"
        )
    check_dtype(f"{name}: input", input, dtype)
    if input.shape[-1] != input_size:
        raise RuntimeError(
            f"{name}: input: expected size(-1) to be input_size={input_size}, "
            f"got shape {tuple(input.shape)}"
        )
    unbatched = batch_sizes is None and input.dim() == 2
    time_dim = 1 if batch_first and not unbatched else 0
    if batch_sizes is None and input.shape[time_dim] == 0:
        raise RuntimeError(
            f"{name}: input: expected at least one time step, got shape {tuple(input.shape)}"
        )
    if hx is None:
        return

    names = cells.get(cell).states
    if not isinstance(hx, (tuple, list)) or len(hx) != len(names):
        got = f"{len(hx)} of them" if isinstance(hx, (tuple, list)) else type(hx).__name__
        raise TypeError(f"{name}: hx: expected the {len(names)} tensors {names}, got {got}")
    if unbatched:
        shape: tuple[int, ...] = (layers,)
    elif batch_sizes is not None:
        shape = (layers, int(batch_sizes[0]))
    else:
        shape = (layers, input.shape[0] if batch_first else input.shape[1])
    for state_name, state in zip(names, hx, strict=True):
        width = proj_size if proj_size and state_name == "h" else hidden_size
        check_shape(f"{name}: hx ({state_name}_0)", state, (*shape, width), input)
        check_kind(f"{name}: hx ({state_name}_0)", state, input)


def check_step(
    name: str,
    cell: str,
    x: Tensor,
    states: tuple[Tensor, ...] | None,
    arguments: tuple[str, str],
    dtype: torch.dtype,
    input_size: int,
    widths: tuple[int, int],
    leading: tuple[int, ...] = (),
) -> None:
    """Raises for an input x, [B, I] or [I], and states, [*leading, B, H] or [*leading, H], that do
    not fit a step of weights of `dtype`; `widths` are those of h and of the other states, and
    `arguments` is what the caller calls x and the states."""
    of_x, of_states = (f"{name}: {argument}" for argument in arguments)
    if not isinstance(x, Tensor):
        raise TypeError(f"{of_x}: expected a Tensor [B, I] or [I], got {type(x).__name__}")
    if x.dim() not in (1, 2):
        raise ValueError(f"{of_x}: expected [B, I] or [I], got shape {tuple(x.shape)}")
    if x.shape[-1] != input_size:
        raise RuntimeError(
            f"{of_x}: expected size(-1) to be input_size={input_size}, got shape {tuple(x.shape)}"
        )
    names = cells.get(cell).states
    if states is not None and len(states) != len(names):
        raise TypeError(
            f"{of_states}: expected the {len(names)} tensors {names}, got {len(states)}"
        )
    for n, state in enumerate(states or ()):
        if not leading and isinstance(state, Tensor) and state.dim() not in (1, 2):
            raise ValueError(
                f"{of_states} ({names[n]}): expected 1-D or 2-D, got {state.dim()}-D"
            )  # as torch.nn's cells
        shape = (*leading, *x.shape[:-1], widths[min(n, 1)])
        check_shape(f"{of_states} ({names[n]})", state, shape, x)
    check_dtype(of_x, x, dtype)
    for n, state in enumerate(states or ()):
        check_kind(f"{of_states} ({names[n]})", state, x)


def check_dtype(name: str, input: Tensor, dtype: torch.dtype) -> None:
    """Raises for an input whose dtype is not that of the weights, nor made so by autocast."""
    autocast = torch._C._is_any_autocast_enabled()
    if input.dtype != dtype and not (autocast and input.is_floating_point()):
        or_model = f", or convert model: model.to({input.dtype})"
        raise ValueError(
            f"{name}: expected {dtype}, got {input.dtype}: RNN input dtype ({input.dtype}) does "
            f"not match weight dtype ({dtype}). Convert input: input.to({dtype})"
            + (or_model if input.is_floating_point() else "")
        )


def check_shape(name: str, state: Tensor, shape: tuple[int, ...], input: Tensor) -> None:
    """Raises for a state that has not that shape."""
    if not isinstance(state, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(state).__name__}")
    if state.shape != shape:
        raise RuntimeError(
            f"{name}: expected shape {shape} for input {tuple(input.shape)}, "
            f"got {tuple(state.shape)}"
        )


def check_kind(name: str, state: Tensor, input: Tensor) -> None:
    """Raises for a state that has not the dtype and device of the input."""
    autocast = torch._C._is_any_autocast_enabled()
    if state.device != input.device or (state.dtype != input.dtype and not autocast):
        raise RuntimeError(
            f"{name}: expected {input.dtype} on {input.device} as the input, "
            f"got {state.dtype} on {state.device}"
        )


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is at work on this call."""
    if torch._C._are_functorch_transforms_active():  # which torch.compile can look at, too
        return True
    return not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives a call with such an input, or None: it leaves float64 alone."""
    kind = input.device.type
    if kind == "meta" or input.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast casts: float64 is left alone."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


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
    return recurrent("lstm", input, hx, **_with_size("lstm", weights, 4, options))


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
    output, (h_n,), *states = recurrent(
        "gru", input, state, **_with_size("gru", weights, 3, options)
    )
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
    output, (h_n,), *states = recurrent(
        f"rnn_{nonlinearity}", input, state, **_with_size("rnn", weights, 1, options)
    )
    return output, h_n, *states


def _listed(weights: Iterable[Tensor]) -> list[Tensor]:
    if not isinstance(weights, Iterable):
        raise TypeError(f"weights: expected an iterable of Tensors, got {type(weights).__name__}")
    return list(weights)


def _with_size(
    name: str, weights: Iterable[Tensor], gates: int, options: dict[str, Any]
) -> dict[str, Any]:
    """`options` and hidden_size; an option that there is not is refused in the caller's name."""
    known = {*Options.__annotations__, "hidden_size", "return_states"}
    if unknown := set(options) - known:
        raise TypeError(f"{name}: unexpected options {sorted(unknown)}, may be {sorted(known)}")
    weights = _listed(weights)
    first = weights[0] if weights else None  # what is wrong with it, check_weights says
    rows = first.shape[0] if isinstance(first, Tensor) and first.dim() else 0
    return {"weights": weights, "hidden_size": rows // gates, **options}
