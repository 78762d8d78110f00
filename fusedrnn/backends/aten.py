"""torch's own kernels: cuDNN on a GPU, oneDNN or native code on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrnn import cells, packing
from fusedrnn.backends import reference, stretch
from fusedrnn.call import (
    LOOP_FEATURES,
    STATES_COMPILED,
    TRANSFORMED,
    Call,
    Masks,
    Operands,
    Spec,
    adds_input,
    autocast_dtype,
    directions,
    in_turn,
    joined,
    operands_of,
    weights_per_direction,
)

Results = TypeVar("Results")


def refuses(call: Call) -> str | None:
    """Why torch's operators cannot run the call, or None."""
    if lacking := lacks(call.spec):
        return lacking
    has = {"reset"} if stretch.serves(call.spec, call.device) else set()
    features = [LOOP_FEATURES[f] for f in call.loop_features if f in LOOP_FEATURES.keys() - has]
    if features:
        return f"torch's kernels do not have {' and '.join(features)}"
    if "states" in call.loop_features and torch.compiler.is_compiling():
        return STATES_COMPILED
    if call.transformed:
        return TRANSFORMED
    return None


def lacks(spec: Spec) -> str | None:
    """What torch does not have of such a stack, or None."""
    if cells.get(spec.cell).aten is None:
        return f"torch has no {spec.cell}"
    return "torch's operators have no heads" if spec.num_heads > 1 else None


def whole(spec: Spec) -> bool:
    """Whether torch has one operator for such a stack, noise aside."""
    return lacks(spec) is None and not (spec.reversed_layers or spec.residual or spec.hidden_sizes)


def stretched(spec: Spec, device: torch.device, masks: Masks) -> bool:
    """Whether `stretch` runs the call, layer by layer."""
    if masks.lengths is masks.batch_sizes is masks.reset is None:
        return False
    return stretch.serves(spec, device)


def output_dtypes(
    spec: Spec, input: Tensor, state: Sequence[Tensor], masks: Masks
) -> list[torch.dtype]:
    """The dtypes of the final states (the output has that of h) that torch's operators give.

    Without autocast, the input's. With it, oneDNN's LSTM and the plain RNN compute in the low
    precision; other loops mix it with the state, and so keep a wider state's dtype.
    """
    if not spec.autocast:
        return [input.dtype] * len(state)
    low = getattr(torch, spec.autocast)
    mixed = [torch.promote_types(low, s.dtype) for s in state]
    if spec.cell == "gru":
        return mixed
    padded = masks.lengths is masks.batch_sizes is None
    if spec.cell == "lstm" and (spec.proj_size or not padded):
        return [low if spec.proj_size else mixed[1], mixed[1]]
    return [low] * len(state)


def forward(spec: Spec, operands: Operands, masks: Masks) -> tuple[Tensor, ...]:
    """A stack of layers through torch's operators: (output, *final states)."""
    low = autocast_dtype(operands.input)
    if low is None or operands.input.device.type != "cpu":
        return _forward(spec, operands, masks)
    spec = spec._replace(autocast=str(low).removeprefix("torch."))
    dtypes = output_dtypes(spec, operands.input, operands.state, masks)
    # For float16 torch has no LSTM on a CPU, and loops many times as slow as those for float32;
    # oneDNN's LSTM in bfloat16 is found missing on some processors when it is called. A tracer
    # crashes at such an error, and what it writes may run on another processor.
    avoided = low == torch.float16 or (spec.cell == "lstm" and stretch.is_tracing())
    results = None if avoided else if_possible(lambda: _forward(spec, operands, masks))
    if results is None:
        with torch.autocast("cpu", enabled=False):
            results = _forward(spec, rounded(spec, operands, low), masks)
    output, *final = results
    return output.to(dtypes[0]), *(s.to(d) for s, d in zip(final, dtypes, strict=True))


def if_possible(run: Callable[[], Results]) -> Results | None:
    """What `run` returns; None, where oneDNN has no kernel for it on this processor."""
    try:
        return run()
    except RuntimeError as error:
        if "could not create a primitive" not in str(error):
            raise
        return None


def rounded(
    spec: Spec, operands: Operands, low: torch.dtype, dtype: torch.dtype = torch.float32
) -> Operands:
    """Values of `low`, in `dtype`. float64 is left alone, as by autocast."""
    flat = [t if t.dtype == torch.float64 else t.to(low).to(dtype) for t in operands.flat()]
    return operands_of(spec, flat)


def _forward(spec: Spec, operands: Operands, masks: Masks) -> tuple[Tensor, ...]:
    """One call for all layers, with torch's dropout between them, unless there is noise of ours, or
    what no operator of torch's has between layers."""
    own = stretched(spec, operands.input.device, masks)
    if not masks.layers and whole(spec) and not own:
        return _run(spec, operands, masks)
    output, finals = in_turn(spec, operands, masks, stretch.layer if own else _run_turned)
    return output, *joined(finals)


def cell_operator(cell: str) -> Callable[..., Any]:
    """torch's operator for a single step of a cell that torch has."""
    return getattr(torch, f"{cells.get(cell).aten}_cell")


def one_step(
    spec: Spec, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """A stack over one time step, x [B, I]: (output [B, D * H], *final states).

    By torch's operators for that, layer by layer: unlike those for sequences they prepare nothing
    for steps to come.
    """
    function, D, size = cell_operator(spec.cell), directions(spec), weights_per_direction(spec)
    finals = []
    for layer in range(spec.num_layers):
        below = x
        if layer and spec.dropout and spec.training:
            x = F.dropout(x, spec.dropout)
        for at in range(layer * D, (layer + 1) * D):
            hx = states[0][at] if len(states) == 1 else [s[at] for s in states]
            final = function(x, hx, *weights[at * size : (at + 1) * size])
            finals.append(final if isinstance(final, tuple) else (final,))
        x = finals[-1][0] if D == 1 else torch.cat([final[0] for final in finals[-D:]], 1)
        if adds_input(spec, layer):
            x = x + below
    if len(finals) == 1:
        h, *rest = finals[0]  # in memory of its own: the output may be changed in place
        return x, h.clone()[None], *[s[None] for s in rest]
    return x, *[torch.stack(parts) for parts in zip(*finals, strict=True)]


def forward_on(spec: Spec, operands: Operands, masks: Masks, call: Call) -> tuple[Tensor, ...]:
    """`forward`, differentiable twice on every device."""
    if call.device.type != "cuda" or not call.needs_grad:
        return forward(spec, operands, masks)
    # cuDNN keeps what backward needs only in training mode; without dropout the mode changes
    # nothing else, so modules in evaluation can be differentiated too.
    dropped = spec.dropout if spec.training and spec.num_layers > 1 else 0.0

    def run(*tensors):
        one = spec._replace(training=True, dropout=dropped)
        return forward(one, operands_of(spec, tensors), masks)

    def again(*tensors):
        if dropped and not masks.layers:
            raise RuntimeError(
                "a second derivative through cuDNN with dropout cannot repeat the dropout mask; "
                "use backend='triton' or backend='reference'"
            )
        return reference.forward(spec, operands_of(spec, tensors), masks)

    return DifferentiableTwice.apply(run, again, *operands.flat())


def _run_turned(spec: Spec, operands: Operands, masks: Masks) -> tuple[Tensor, ...]:
    """A layer that may run backwards in time: forwards, over a sequence that was turned round."""
    if not spec.reversed_layers:
        return _run(spec, operands, masks)
    lengths = None if operands.input.device.type == "meta" else masks.lengths
    rows = packing.rows_of(operands.input, spec.batch_first, lengths, masks.batch_sizes)
    turned = operands._replace(input=packing.turned(operands.input, rows))
    output, *final = _run(spec, turned, masks)
    return packing.turned(output, rows), *final


def _run(spec: Spec, operands: Operands, masks: Masks) -> tuple[Tensor, ...]:
    """The layers of `operands`, by one call of torch's operator."""
    function = getattr(torch, str(cells.get(spec.cell).aten))
    input, state, weights = operands.input, operands.state, list(operands.weights)
    hx = state[0] if len(state) == 1 else state
    options = (spec.bias, spec.num_layers, spec.dropout, spec.training, spec.bidirectional)
    if masks.batch_sizes is not None:
        return function(input, masks.batch_sizes, hx, weights, *options)
    # On the meta device there is no length to look at; the shapes are those of full rows.
    if masks.lengths is None or input.device.type == "meta":
        return function(input, hx, weights, *options, spec.batch_first)
    return _run_padded(function, spec, operands, masks.lengths, options)


def _run_padded(function, spec: Spec, operands: Operands, lengths: Tensor, options):
    """torch packs only rows of at least one step, longest first, with lengths on the CPU: so
    rows are sorted, and empty ones keep their state and get an output of zeros."""
    input, state, weights = operands.input, operands.state, list(operands.weights)
    batch_dim = 0 if spec.batch_first else 1
    T = input.shape[1 - batch_dim]
    sorted_lengths, order = lengths.cpu().clamp(0, T).sort(descending=True, stable=True)
    filled = int((sorted_lengths > 0).sum())
    if filled == 0:
        zeros = input.new_zeros([*input.shape[:2], directions(spec) * state[0].shape[-1]])
        # A function of everything, as autograd sees it, so that backward goes through; and a
        # multiple of the state, not a clone, whose gradient would be an op's very argument.
        never = torch.zeros((), dtype=torch.bool, device=input.device)
        everything = torch.stack([t.sum() for t in (input, *weights)]).sum()
        return torch.where(never, everything, zeros), *(1 * s for s in state)
    order = order.to(input.device)
    rows = order[:filled]
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        input.index_select(batch_dim, rows), sorted_lengths[:filled], spec.batch_first
    )
    first = tuple(s.index_select(1, rows) for s in state)
    hx = first[0] if len(first) == 1 else first
    data, *final = function(packed.data, packed.batch_sizes, hx, weights, *options)
    # Each packed row to its place in [T * B]; pad_packed_sequence copies in place, which loses
    # the gradient under a dispatch mode (a FLOP counter, say), where autograd runs inside an op.
    sizes = packed.batch_sizes
    step = torch.repeat_interleave(torch.arange(sizes.numel(), device=sizes.device), sizes)
    rank = torch.arange(step.numel(), device=sizes.device) - packing.offsets_of(sizes)[step]
    row = rows.cpu()[rank]
    place = row * T + step if spec.batch_first else step * lengths.numel() + row
    output = data.new_zeros([T * lengths.numel(), data.shape[-1]])
    output = output.index_copy(0, place.to(input.device), data).view(*input.shape[:2], -1)
    kept = tuple(s.to(f.dtype) for s, f in zip(state, final, strict=True))
    final = (k.index_copy(1, rows, f) for k, f in zip(kept, final, strict=True))
    return output, *final


class DifferentiableTwice(torch.autograd.Function):
    """A call of cuDNN, whose own backward cannot be differentiated.

    Forward keeps cuDNN's graph for the first derivative; a second derivative starts from
    `again`, the same function in differentiable operators.
    """

    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., Any], again: Callable[..., Any], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
            outputs = run(*inputs)
        ctx.again = again
        # Saved rather than kept, so that autograd frees cuDNN's graph when it frees this node's.
        ctx.save_for_backward(*tensors, *inputs, *outputs)
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        n = len(ctx.needs_input_grad) - 2
        tensors, inputs = ctx.saved_tensors[:n], ctx.saved_tensors[n : 2 * n]
        outputs = ctx.saved_tensors[2 * n :]
        create_graph = torch.is_grad_enabled()
        if create_graph:
            inputs = [t.view_as(t) for t in tensors]
            outputs = ctx.again(*inputs)
        wanted = [t for t in inputs if t.requires_grad]
        found = iter(
            torch.autograd.grad(
                outputs, wanted, d_outputs,
                retain_graph=True, create_graph=create_graph, materialize_grads=True,
            )
        )  # fmt: skip
        return None, None, *(next(found) if t.requires_grad else None for t in inputs)
