"""A call from the door to a backend: its facts are gathered, its noise is drawn, and it runs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedrnn import arguments, cells, dispatch, onnx, op, states
from fusedrnn.arguments import transformed
from fusedrnn.backends import aten, loop, onednn, reference, stretch
from fusedrnn.call import (
    Call,
    Masks,
    Operands,
    Spec,
    adds_input,
    autocast_dtype,
    directions,
    operands_of,
    weights_per_direction,
    widths,
)
from fusedrnn.regularizers import (
    NO_REGULARIZERS,
    Noise,
    Regularizers,
    draw_masks,
    drop_weights,
)
from fusedrnn.types import Lengths

TracerWarning: type[Warning] = torch.jit.TracerWarning  # pyright: ignore[reportPrivateImportUsage]
is_tracing: Callable[[], bool] = torch.jit.is_tracing  # pyright: ignore[reportPrivateImportUsage]
ResetArgument = Tensor | tuple[Tensor, Tensor | tuple[Tensor, ...]] | None


class Given(NamedTuple):
    """What a caller gave, of which the input, the states and the weights were checked; see
    `fusedrnn.functional.recurrent`."""

    spec: Spec
    input: Tensor
    hx: tuple[Tensor, ...] | None
    weights: list[Tensor]
    batch_sizes: Tensor | None = None
    lengths: Lengths | None = None
    reset: ResetArgument = None
    regularizers: Regularizers | None = None
    return_states: bool = False


def run(given: Given) -> tuple[Any, ...]:
    """The call.

    Returns:
        output, the S final states, and with `return_states` the states of all layers and steps, by
        name, [L * D, T, B, H] ([L * D, B, T, H] with batch_first), 0 where a row is over.
    """
    spec, input, hx, weights, batch_sizes, lengths, _, regularizers, return_states = given
    unbatched = batch_sizes is None and input.dim() == 2
    to_onnx = (torch.compiler.is_compiling() or is_tracing()) and onnx.plain_export()
    if _is_exported(given) if to_onnx else is_torchs_own(given):
        input, hx, _T, _B = batched(spec, input, hx, batch_sizes)
        final: Any
        if not to_onnx and is_one_step(given):
            time = 1 if spec.batch_first else 0
            output, *final = aten.one_step(spec, input.squeeze(time), hx, weights)
            output = output.unsqueeze(time)
        else:
            output, *final = _torchs_own(spec, input, hx, weights, batch_sizes)
        return _as_given(spec, unbatched, output, tuple(final))
    if to_onnx and lengths is not None and not torch.compiler.is_compiling():
        raise NotImplementedError(onnx.USE_EXPORT)
    call, operands, masks = gather(given)
    backend = "reference" if to_onnx else dispatch.select(call)
    spec, operands, masks = settle(call, backend, operands, masks, regularizers)
    if backend == "reference" and is_tracing() and not torch.compiler.is_compiling():
        told = f"{spec.cell}: its time loop is traced step by step: the trace holds for T={call.T}"
        warnings.warn(told, TracerWarning, stacklevel=2)
    # What autocast has made of the operands is computed as elsewhere, in float32 inside the loop.
    cast = call.autocast and backend != "aten"
    with torch.autocast(input.device.type, enabled=False) if cast else contextlib.nullcontext():
        if return_states:
            (output, *final), planes = states.run(spec, operands, masks, call)
        else:
            output, *final = op.execute(spec, operands, masks, call)
    output, final = _as_given(spec, unbatched, output, tuple(final))
    if not return_states:
        return output, final
    if unbatched:
        planes = {name: s.squeeze(2) for name, s in planes.items()}
    elif spec.batch_first and batch_sizes is None:
        planes = {name: s.transpose(1, 2) for name, s in planes.items()}
    return output, final, planes


def _is_whole(given: Given) -> bool:
    """Whether torch has one operator for the call, noise aside."""
    plain = given.lengths is given.reset is None and not given.return_states
    return plain and aten.whole(given.spec)


def _is_exported(given: Given) -> bool:
    """Whether the ONNX exporters can write the call: they know torch's operator."""
    regularizers, training = given.regularizers, given.spec.training
    noise = regularizers is not None and regularizers.changes_output(training=training)
    return _is_whole(given) and not noise


def is_torchs_own(given: Given) -> bool:
    """Whether a call without lengths and resets goes to torch's operator as it is: what
    `dispatch.select` says to it. The general way would cost a small layer a tenth of its time."""
    return (
        given.input.device.type == "cpu"
        and given.regularizers is None
        and _is_whole(given)
        and not torch.compiler.is_compiling()
        and autocast_dtype(given.input) is None
        and not transformed()
        and not (given.batch_sizes is not None and stretch.serves(given.spec, given.input.device))
        and _by_torch(given)
    )


def _by_torch(given: Given) -> bool:
    """Whether torch's operator is forced, or is the fastest."""
    spec, input, forced = given.spec, given.input, dispatch.forced_backend(given.spec.backend)
    if forced != "auto":
        return forced == "aten"
    packs = given.batch_sizes is not None
    return not loop.faster_than_torch(spec, input.dtype, *_steps_and_rows(given), packs=packs)


def _steps_and_rows(given: Given) -> tuple[int, int]:
    """T and B."""
    if given.batch_sizes is not None:
        return given.batch_sizes.numel(), int(given.batch_sizes[0])
    if given.input.dim() == 2:
        return len(given.input), 1
    first, second = given.input.shape[:2]
    return (second, first) if given.spec.batch_first else (first, second)


def is_one_step(given: Given) -> bool:
    """Whether a call that `is_torchs_own` is one of a single step and faster `by_cells`."""
    spec, input = given.spec, given.input
    if spec.proj_size or given.batch_sizes is not None:
        return False
    return by_cells(spec.cell, input.dtype, *_steps_and_rows(given), spec.training)


def by_cells(cell: str, dtype: torch.dtype, T: int, B: int, training: bool) -> bool:
    """Whether such a call is faster by torch's operators for a single step.

    As measured: oneDNN's LSTM, the one for float32, prepares its weights in each call, which takes
    longer than a step of a few rows, and longer than any step with its backward. Other loops of
    torch's prepare nothing. (A trace shall hold for any T; and as in `loop.is_faster` the mode of
    the module decides, not whether there is a gradient.)
    """
    if cell != "lstm" or dtype != torch.float32 or is_tracing():
        return False
    return T == 1 and (B <= 32 or training)


def _torchs_own(spec: Spec, input, hx, weights, batch_sizes) -> tuple[Tensor, ...]:
    function = getattr(torch, str(cells.get(spec.cell).aten))
    options = (spec.bias, spec.num_layers, spec.dropout, spec.training, spec.bidirectional)
    state = hx if len(hx) > 1 else hx[0]
    if batch_sizes is not None:
        return function(input, batch_sizes, state, weights, *options)
    return function(input, state, weights, *options, spec.batch_first)


def _as_given(
    spec: Spec, unbatched: bool, output: Tensor, final: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The results without a batch dimension, where the input had none."""
    if not unbatched:
        return output, final
    return output.squeeze(0 if spec.batch_first else 1), tuple([f.squeeze(1) for f in final])


def batched(
    spec: Spec, input: Tensor, hx: tuple[Tensor, ...] | None, batch_sizes: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...], int, int]:
    """The input and the initial states, zeros if there are none, with a batch dimension; T, B."""
    if batch_sizes is not None:
        T = batch_sizes.numel()
        B: Any = batch_sizes[0]
        B = B if is_tracing() else int(B)  # an int would be a constant of the trace
    else:
        if input.dim() == 2:
            input = input.unsqueeze(0 if spec.batch_first else 1)
            hx = None if hx is None else tuple([h.unsqueeze(1) for h in hx])
        T, B = input.shape[:2]
        if spec.batch_first:
            T, B = B, T
    if hx is None:
        layers = spec.num_layers * directions(spec)
        like = {"dtype": input.dtype, "device": input.device}
        hx = tuple([torch.zeros(layers, B, width, **like) for width in widths(spec)])
    return input, hx, T, B


def gather(given: Given) -> tuple[Call, Operands, Masks]:
    """What a call of `run` is before a backend is chosen, and before any noise is drawn. Raises
    for lengths, resets and regularisers that do not belong to it."""
    spec, input, hx, weights, batch_sizes, lengths, reset, regularizers, return_states = given
    unbatched = batch_sizes is None and input.dim() == 2
    input, hx, T, B = batched(spec, input, hx, batch_sizes)
    features: tuple[str, ...] = ()
    reset_state: tuple[Tensor, ...] = ()
    if batch_sizes is not None and not (lengths is reset is None):
        name = "lengths" if lengths is not None else "reset"
        raise ValueError(f"{name}: a PackedSequence has its own lengths; pass padded input instead")
    if lengths is not None:
        lengths = arguments.check_lengths(lengths, T, B, spec, unbatched)
    if isinstance(reset, (tuple, list)):
        if len(reset) != 2:
            raise TypeError(f"reset: expected a mask or (mask, states), got {len(reset)} values")
        reset, sets = reset
        reset_state = arguments.check_reset_state(sets, spec, hx[0], unbatched)
    if reset is not None or reset_state:
        reset = arguments.check_reset(reset, T, B, spec, input, unbatched)
        features = ("reset", "reset_state") if reset_state else ("reset",)
    if regularizers is not None:
        if not isinstance(regularizers, Regularizers):
            got = type(regularizers).__name__
            raise TypeError(f"regularizers: expected fusedrnn.Regularizers or None, got {got}")
        features += regularizers.loop_features(training=spec.training)
        if spec.proj_size and "zoneout" in features:
            raise ValueError(f"zoneout: expected no projection, got proj_size={spec.proj_size}")
    if return_states and len(hx) > 1:
        features += ("states",)
    operands = Operands(input, hx, reset_state, tuple(weights))
    needs_grad = torch.is_grad_enabled() and any([t.requires_grad for t in operands.flat()])
    autocast = autocast_dtype(input)
    call = Call(
        spec, input.device, autocast or input.dtype, T, B, batch_sizes is not None,
        lengths is not None, reset is not None, needs_grad, transformed(), features,
        return_states, autocast is not None, input.dtype, _most_resets(spec, reset),
    )  # fmt: skip
    return call, operands, Masks(lengths, batch_sizes, reset)


def _most_resets(spec: Spec, reset: Tensor | None) -> int:
    """`Call.most_resets`."""
    if reset is None or not (spec.cell == "lstm" and spec.training) or reset.numel() == 0:
        return 0
    looked_at = reset.device.type == "cpu" and not torch.compiler.is_compiling()
    if not looked_at or transformed() or is_tracing() or op.watched([reset]):
        return 0
    return int(reset.sum(1 if spec.batch_first else 0).max())


def settle(
    call: Call,
    backend: str,
    operands: Operands,
    masks: Masks,
    regularizers: Regularizers | None,
) -> tuple[Spec, Operands, Masks]:
    """The call as `backend` is to run it, with all its noise drawn."""
    spec, compiling = call.spec, torch.compiler.is_compiling()
    spec = spec._replace(backend=backend)
    if adds_input(spec) and masks.lengths is not None:  # where a row is over the sum is 0, too
        operands = operands._replace(input=_up_to(masks.lengths, operands.input, spec.batch_first))
    regularizers = regularizers or NO_REGULARIZERS
    noise = Noise(regularizers, operands.input)
    if regularizers.weight_drop and spec.training:
        operands = operands._replace(weights=drop_weights(spec, noise, operands.weights))
    if call.autocast and backend != "aten":
        cast = [_cast(t, call.dtype) for t in operands.flat()]
        operands = operands_of(spec, cast)
    # torch's operator for a whole stack draws its own dropout, from torch's generator.
    drawn = spec.training and (regularizers.input_dropout or regularizers.generator is not None)
    whole = backend == "aten" and not call.return_states and aten.whole(spec)
    if compiling or drawn or not whole or aten.stretched(spec, call.device, masks):
        masks = masks._replace(layers=draw_masks(spec, noise, operands, masks.batch_sizes))
    # With zoneout the states that a kernel stores are not what the cell computed: that is redone.
    redone = backend == "triton" and "zoneout" in call.loop_features
    save = "states" if redone else spec.save
    if backend == "aten" and onednn.keeps_workspace(call):
        save = "workspace"
    autocast = call.autocast and backend == "aten" and compiling
    spec = spec._replace(
        save=save if call.needs_grad else "states" if call.return_states else None,
        autocast=str(call.dtype).removeprefix("torch.") if autocast else None,
        clip=regularizers.clip_gradient or 0.0,
        trained_from=_trained_from(spec, operands),
    )
    return spec, operands, masks


def _up_to(lengths: Tensor, input: Tensor, batch_first: bool) -> Tensor:
    """The padded input, 0 where a row is over."""
    T = input.shape[1 if batch_first else 0]
    here = reference.active_rows(lengths.to(input.device), T)
    here = here.T if batch_first else here
    return torch.where(here[:, :, None], input, torch.zeros_like(input))


def _trained_from(spec: Spec, operands: Operands) -> int:
    """The lowest layer that a gradient gets to: those below it may be frozen."""
    rest = (operands.input, *operands.state, *operands.reset_state)
    if spec.num_layers > 1 and not any([t.requires_grad for t in rest]):
        per_layer = directions(spec) * weights_per_direction(spec)
        for index, weight in enumerate(operands.weights):
            if weight.requires_grad:
                return index // per_layer
    return 0


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast casts: float64 is left alone."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)
