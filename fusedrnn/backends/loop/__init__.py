"""A time loop for the CPU: any registered cell, forward and backward, one layer at a time.

Forward: one matrix product for the input; then per step one for each stage of the cell, and its
body, into memory that backward reads. Rows are packed, longest first, so that the batch shrinks
and nothing is masked (`order`).

Backward: a backward body is linear in the gradient that it is given. On unit vectors, and for
many steps at once, it therefore yields the Jacobian of a stage: of every unit of a row, how what it
hands down depends on what it receives. What is left for a step is to multiply, which takes few and
large operators instead of a body's many and small ones, and one matrix product. The gradients of
the weights are one product each, of all steps.
"""

import torch
from torch import Tensor

from fusedrnn import arguments
from fusedrnn.backends import stages
from fusedrnn.backends.loop.jacobian import restored, run_backward
from fusedrnn.backends.loop.layer import layer_of, parts_of
from fusedrnn.backends.loop.steps import run_forward
from fusedrnn.backends.reference import compute_dtype
from fusedrnn.call import (
    STATES_COMPILED,
    TRANSFORMED,
    Call,
    Masks,
    Operands,
    Spec,
    cell_of,
    directions,
    split_weights,
)

# Where the loop is faster than torch's operators, which differentiate these cells step by step, and
# go through packed rows step by step: from so many steps on, since a call of the loop takes half a
# millisecond more; and, for plain rows, below so large a B * H, where matrix products become all
# there is.
FASTER_FROM = {"gru": 12, "rnn_tanh": 24, "rnn_relu": 24}
EQUAL = 1 << 15
# Where the loop trains an LSTM with resets faster than oneDNN does: a row is reset in more than
# that part of its steps, and B * H is so large; below it oneDNN is faster even at twice the steps.
MANY, LARGE = 0.4, 1 << 13
WIDE = (torch.float32, torch.float64)  # others the loop computes in float32


def refuses(call: Call) -> str | None:
    """Why the loop cannot run the call, or None."""
    if call.device.type != "cpu":
        return f"the loop is for tensors on the cpu, not on {call.device.type}"
    if call.transformed:
        return TRANSFORMED
    if _traced():
        return "torch.jit.trace needs plain torch operators"
    if "states" in call.loop_features and torch.compiler.is_compiling():
        return STATES_COMPILED
    if not call.packed and (call.B == 0 or call.T == 0):  # compiled, packed rows do not tell
        return f"there is no step to run (T={call.T}, B={call.B})"
    return None


def is_faster(call: Call) -> bool:
    """Whether the loop is faster than torch's operator, where both can run the call.

    torch's GRU and RNN are differentiated step by step, with a gradient of the weights in each;
    its LSTM is oneDNN's, forward and backward. The mode of the module decides, not whether this
    call has a gradient: what a checkpoint runs again is to have the same bits. Each reset of the
    row that has most costs oneDNN's LSTM a step, which in the end is more than the loop costs.
    """
    if call.spec.cell == "lstm":
        if not call.most_resets or _in_operators():  # 0, too, where B and T are symbols
            return False
        if call.dtype not in WIDE:
            return False
        return call.most_resets > MANY * call.T and call.B * call.spec.hidden_size >= LARGE
    packs = call.lengths or call.packed
    return faster_than_torch(call.spec, call.dtype, call.T, call.B, packs=packs)


def faster_than_torch(spec: Spec, dtype: torch.dtype, T: int, B: int, *, packs: bool) -> bool:
    """`is_faster`, of a GRU or RNN; `packs`: torch would run it as packed rows."""
    if spec.cell not in FASTER_FROM or not (spec.training or packs):
        return False
    if dtype not in WIDE or _in_operators():
        return False
    if torch.compiler.is_compiling():  # torch's operator would run again for its gradients
        return spec.training
    return FASTER_FROM[spec.cell] <= T and (packs or B * spec.hidden_size < EQUAL)


def _in_operators() -> bool:
    """Whether somebody wants to see torch's operator: an exporter, a tracer, a dispatch mode."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return _traced() or torch._C._len_torch_dispatch_stack() > 0


def _traced() -> bool:
    """Whether torch.jit.trace is at work, and no other compiler."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def forward(spec: Spec, operands: Operands, masks: Masks) -> list[Tensor]:
    """One layer: [output, *final states, *what `backward` needs, as `kept_like` has it]."""
    arguments.check_weights(spec, operands.weights)  # of a module, where they may be replaced
    outputs, finals, kept = [], [], []
    with torch._C._AutoDispatchBelowAutograd():  # a tenth of the time of a small step
        for d in range(directions(spec)):
            layer = layer_of(spec, operands, masks, d)
            x = layer.order.rows_of(operands.input).to(compute_dtype(layer.dtype))
            stored = run_forward(layer, x, operands.input)
            order = layer.order
            states = [s[: order.B + order.N] for s in stored.states]
            outputs.append(order.sequence_of(states[0][order.B :].to(layer.dtype)))
            finals.append([order.unsorted(order.last_states(s)) for s in states])
            if spec.save == "gates":
                kept += [stored.x_gates, *stored.sums]
            if spec.save:
                kept += stored.states
        final = [torch.stack(s).to(operands.input.dtype) for s in zip(*finals, strict=True)]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    return [output, *final, *kept]


def kept_like(spec: Spec, operands: Operands) -> list[Tensor]:
    """Empty tensors like those that `forward` keeps for `backward`."""
    cell, input, kept = cell_of(spec), operands.input, []
    total, wide = input.numel() // input.shape[-1], compute_dtype(input.dtype)
    for d in range(directions(spec) if spec.save else 0):
        weights = split_weights(spec, operands.weights)[d]
        if spec.save == "gates":
            parts = parts_of(cell, weights)
            kept.append((total, len(cell.gates), parts[0].units))
            kept += [
                (total, part.stage.products, part.units)
                for part in parts
                if part.weight is not None and not part.adds
            ]
        kept += [(s.shape[1] + total, s.shape[2]) for s in operands.state]
    return [input.new_empty(shape, dtype=wide) for shape in kept]


def backward(
    spec: Spec,
    d_outputs: list[Tensor],
    operands: Operands,
    masks: Masks,
    kept: list[Tensor],
    *,
    d_input_wanted: bool,
) -> list[Tensor]:
    """The gradients of `operands.flat()`, from those of the output and of the final states.

    Where that of the input is not wanted it is left empty: one large matrix product less.
    """
    D, input = directions(spec), operands.input
    d_inputs, d_states, d_resets, d_weights = [], [], [], []
    with torch._C._AutoDispatchBelowAutograd():
        for d, d_output in enumerate(d_outputs[0].chunk(D, -1)):
            layer = layer_of(spec, operands, masks, d)
            order = layer.order
            x = order.rows_of(input).to(compute_dtype(layer.dtype))
            size = len(kept) // D
            stored = restored(layer, x, spec.save, kept[d * size : (d + 1) * size])
            d_final = [order.sorted(f[d]).to(x.dtype) for f in d_outputs[1:]]
            found = run_backward(layer, stored, order.rows_of(d_output), d_final, spec.clip)
            d_sums, d_norm = [d.flatten(1) for d in found.d_x_gates], None
            if layer.cell.input_norm is not None:
                d_of_norm, (d_norm,) = stages.input_norm_backward(
                    layer.cell, torch.cat(d_sums, 1)[:, None], x, [layer.weights]
                )
                d_sums = [d_of_norm[:, 0]]
            if d_input_wanted:
                of_parts = layer.weights.w_ih.split_with_sizes([d.shape[1] for d in d_sums])
                d_x = d_sums[0] @ of_parts[0]
                for d_sum, w_ih in zip(d_sums[1:], of_parts[1:], strict=True):
                    d_x.addmm_(d_sum, w_ih)
                d_inputs.append(order.sequence_of(d_x))
            d_states.append([order.unsorted(s) for s in found.d_state])
            d_resets.append([order.unsorted(s) for s in found.d_reset_state])
            d_weights += stages.d_parameters(
                layer.cell, x, d_sums, d_norm, found.d_x_gates, found.d_received, found.factors,
                found.d_params, heads=layer.heads, bias=spec.bias,
            )  # fmt: skip
        d_input = sum(d_inputs[1:], d_inputs[0]) if d_input_wanted else input.new_empty([0])
        both = [torch.stack(s) for ds in (d_states, d_resets) for s in zip(*ds, strict=True)]
    gradients = [d_input, *both, *d_weights]
    return [g if g.dtype == input.dtype else g.to(input.dtype) for g in gradients]
