"""The fused kernels of `fusedrnn.kernels`, and the matrix products beside their time loops."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import operator
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrnn import cells, packing
from fusedrnn.backends import stages
from fusedrnn.call import (
    STATES_COMPILED,
    TRANSFORMED,
    Call,
    LayerMasks,
    Masks,
    Operands,
    Spec,
    Weights,
    adds_input,
    cell_of,
    directions,
    heads_of,
    joined,
    masked_input,
    reverses,
    split_weights,
    units_of,
    widths,
)
from fusedrnn.cells import Mean

OLDEST_TRITON = (3, 6)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Triton's interpreter multiplies the bit patterns of bfloat16, as if they were integers.
INTERPRETED_DTYPES = (torch.float32, torch.float16)


def triton_version() -> str | None:
    """The version of the triton that Python would import, or None if that has none."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        # Distributions of other names hold a package triton too: triton-windows, ROCm's, XPU's.
        return getattr(importlib.import_module("triton"), "__version__", None)


def _missing() -> str | None:
    """Why Triton cannot be used in this process at all, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    version = triton_version()
    if version is None:
        return "the package named triton here is not the compiler: it has no version"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"triton {version} is too old, {oldest} or newer is needed"
    return None


# Found out once, at import, so that torch.compile need not trace the search.
MISSING = _missing()


def interpreted() -> bool:
    """Whether Triton's interpreter, which runs kernels on a CPU, is switched on."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def refuses(call: Call) -> str | None:
    """Why the kernels cannot run the call, or None."""
    device = call.device.type
    if MISSING:
        return MISSING
    if call.transformed:
        return TRANSFORMED
    if device == "cpu" and not interpreted():
        return "the tensors are on the cpu (TRITON_INTERPRET=1 would interpret the kernels there)"
    if device not in ("cpu", "cuda"):
        return f"the kernels run on cuda devices, not on {device}"
    if call.dtype not in DTYPES:
        return f"the kernels compute float32, bfloat16 and float16, not {call.dtype}"
    if device == "cpu" and call.dtype not in INTERPRETED_DTYPES:
        return f"Triton's interpreter computes {call.dtype} wrongly"
    if "states" in call.loop_features and torch.compiler.is_compiling():
        return STATES_COMPILED
    if call.B == 0 or call.T == 0:
        return f"there is nothing to launch (T={call.T}, B={call.B})"
    if device == "cuda":
        spec, index = call.spec, call.device.index or 0
        # Numbers, where torch.compile has symbols.
        heads = operator.index(heads_of(spec))
        H, P = (operator.index(n) // heads for n in (units_of(spec), widths(spec)[0]))
        return _no_plan(spec.cell, call.dtype, H, P, directions(spec) * heads, index)
    return None


def _no_plan(cell: str, dtype: torch.dtype, H: int, P: int, D: int, index: int) -> str | None:
    """Why the kernels cannot run such a layer on that CUDA device, or None."""
    if torch.version.hip:
        return "the waits of the kernels are not proven on AMD GPUs"
    from fusedrnn.kernels import refusal

    device = torch.device("cuda", index)
    known = cells.get(cell)
    if P < H and not known.widest:
        known = cells.get(cell, projected=True)
    return refusal(known, dtype, H, D, device, P if P < H else 0)


# torch.compile calls this and takes the answer for a constant, as with the decorator
# torch.compiler.assume_constant_result, which would import all of torch._dynamo to set this.
_no_plan._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


_cudnn_rnn: Any = torch.backends.cudnn.rnn  # found once: each look-up goes through Python


def fp32_precision() -> str:
    """ "tf32" or "ieee": what torch's switch for cuDNN's recurrent kernels asks of float32."""
    return "tf32" if _cudnn_rnn.fp32_precision == "tf32" else "ieee"


class _Pass(NamedTuple):
    """What the layers of one pass of a stack share; and of each, its rows, states and weights."""

    precision: str
    plan: Any
    exchanges: Iterator[Any]
    rows: list[packing.Rows]
    reset: list[Tensor | None]
    state: list[tuple[Tensor, ...]]
    reset_state: list[tuple[Tensor, ...]]
    weights: list[list[Weights]]


def _begin(spec: Spec, operands: Operands, masks: Masks, pass_: str, layers: int) -> _Pass:
    """A pass that runs so many layers of the stack."""
    import fusedrnn.kernels as kernels

    cell, input, precision = cell_of(spec), operands.input, fp32_precision()
    rows = packing.rows_of(input, spec.batch_first, masks.lengths, masks.batch_sizes)
    L, D, H = spec.num_layers, directions(spec), units_of(spec)
    rest = {"P": widths(spec)[0], "heads": heads_of(spec)}
    plan = kernels.plan_for(cell, pass_, input, rows.B, H, D, precision, **rest)
    exchanges = kernels.workspaces(cell, plan, pass_, rows, input, H=H, D=D, layers=layers, **rest)
    weights = split_weights(spec, operands.weights)
    ways = [rows] * L
    if spec.reversed_layers:
        back = replace(rows, reverse=True)
        ways = [back if reverses(spec, index)[0] else rows for index in range(L)]
    reset = {way.reverse: way for way in ways}
    reset = {reverse: _reset_flags(spec, masks, way) for reverse, way in reset.items()}
    return _Pass(
        precision, plan, exchanges, ways, [reset[way.reverse] for way in ways],
        _by_layer(L, operands.state), _by_layer(L, operands.reset_state),
        [weights[first : first + D] for first in range(0, L * D, D)],
    )  # fmt: skip


def forward(spec: Spec, operands: Operands, masks: Masks) -> list[Tensor]:
    """[output, *final states, *what `backward` needs, as `kept_shapes` lists it]."""
    import fusedrnn.kernels as kernels

    cell, input, L = cell_of(spec), operands.input, spec.num_layers
    given = _begin(spec, operands, masks, "forward", L)
    finals = tuple([s.new_empty(s.shape) for s in operands.state])
    shape, kept = (*input.shape[:-1], directions(spec) * widths(spec)[0]), []
    for index, final in enumerate(_by_layer(L, finals)):
        noise, save, weights = masks.of_layer(index), _save_of(spec, index), given.weights[index]
        if index > 0 and save:
            kept.append(input)
        entering = masked_input(spec, input, noise)
        with matmul_precision(input, given.precision):
            x_gates = _input_gates(spec, entering.reshape(-1, input.shape[-1]), weights)
        output, _, *saved = kernels.scan_forward(
            cell, x_gates, weights, given.state[index], rows=given.rows[index], save=save,
            input_precision=given.precision, heads=heads_of(spec),
            state_ops=_state_ops(spec, given, index, noise, x_gates.shape[0]),
            plan=given.plan, exchanges=given.exchanges, final=final,
        )  # fmt: skip
        output = output.view(shape)
        if adds_input(spec, index):
            if save:
                kept.append(output)
            output = output + input
        input = output
        kept += [t for t in saved if t is not None]
    return [input, *finals, *kept]


def _by_layer(L: int, states: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """The states [L * D, *] of a stack, those of each layer [D, *]."""
    if L == 1 or not states:
        return [states] * L
    return list(zip(*(s.view(L, -1, *s.shape[1:]).unbind() for s in states), strict=True))


def kept_shapes(spec: Spec, input: Tensor) -> list[list[tuple[int, ...]]]:
    """Of each layer, the shapes of what `forward` keeps for `backward`: the output of the layer
    below, its own h where its input is added to that, what the cell saved, what its stages but the
    first multiplied, and its states but h, as far as there are such."""
    cell, D, H = cell_of(spec), directions(spec), units_of(spec)
    N = input.numel() // input.shape[-1]
    shapes = []
    for index in range(spec.num_layers):
        save = _save_of(spec, index)
        layer: list[tuple[int, ...]] = []
        if save:
            sequences = (index > 0) + adds_input(spec, index)
            layer += [(*input.shape[:-1], D * widths(spec)[0])] * sequences
        if save == "gates" and cell.saved:
            layer.append((N, D, len(cell.saved), H))
        if save == "gates" and len(cell.weighted) > 1:
            layer.append((N, D, len(cell.weighted) - 1, H))
        if save and len(cell.states) > 1:
            layer.append((N, D, len(cell.states) - 1, H))
        shapes.append(layer)
    return shapes


def _save_of(spec: Spec, layer: int) -> str | None:
    """What that layer keeps for backward: nothing, where no gradient gets to it."""
    return spec.save if layer >= spec.trained_from else None


def backward(
    spec: Spec,
    d_outputs: list[Tensor],
    operands: Operands,
    masks: Masks,
    output: Tensor,
    kept: list[Tensor],
    *,
    d_input_wanted: bool,
) -> list[Tensor]:
    """The gradients of `operands.flat()`, from those of the output and of the final states.

    Where that of the input is not wanted it is left empty: one large matrix product less. So are
    those of the layers below `spec.trained_from`, and then those of the states.
    """
    input, L = operands.input, spec.num_layers
    given = _begin(spec, operands, masks, "backward", L - spec.trained_from)
    d_finals = _by_layer(L, tuple(d_outputs[1:]))
    d_output, d_states, d_weights = d_outputs[0], [], []
    for index, shapes in reversed(list(enumerate(kept_shapes(spec, input)))):
        if index < spec.trained_from:
            break
        noise, first = masks.of_layer(index), len(kept) - len(shapes)
        kept, of_layer = kept[:first], kept[first:]
        below = of_layer.pop(0) if index > 0 else input
        h = of_layer.pop(0) if adds_input(spec, index) else output
        wanted = index > spec.trained_from or (index == 0 and d_input_wanted)
        d_input, d_state, gradients = _layer_backward(
            spec, given, index, masked_input(spec, below, noise), noise, d_output,
            d_finals[index], h, of_layer, d_input_wanted=wanted,
        )  # fmt: skip
        output = below
        d_input = masked_input(spec, d_input, noise, backward=True) if wanted else d_input
        d_output = d_input + d_output if wanted and adds_input(spec, index) else d_input
        d_states.insert(0, d_state)
        d_weights = [*gradients, *d_weights]
    gradients = [d_output, *joined(d_states), *d_weights]
    if spec.trained_from == 0:
        return gradients
    below = len(operands.flat()) - len(d_weights)
    return [d_output.new_empty([0]) for _ in range(below)] + d_weights


def _layer_backward(
    spec: Spec, given: _Pass, index: int, input: Tensor, noise: LayerMasks, d_output, d_final,
    output, kept, *, d_input_wanted,
):  # fmt: skip
    """The gradients of one layer: of its input (here with its masks), its states, its weights."""
    import fusedrnn.kernels as kernels

    cell, heads, P = cell_of(spec), heads_of(spec), widths(spec)[0]
    weights, rows, precision = given.weights[index], given.rows[index], given.precision
    D = len(weights)
    input_ni = input.reshape(-1, input.shape[-1])
    output_ndh = output.reshape(-1, D, P)
    gates = spec.save == "gates"
    saved = kept.pop(0) if gates and cell.saved else None
    published = kept.pop(0) if gates and len(cell.weighted) > 1 else None
    states = kept.pop(0) if len(cell.states) > 1 else None
    recompute = not gates and (bool(cell.saved) or noise.zoneout is not None)
    # The states that each step began from: h, and the others where a stage is computed again.
    stored = [output_ndh]
    if recompute and len(cell.stages) > 1 and states is not None:
        stored += states.unbind(2)
    prev = [_previous(state, given, index, s) for s, state in enumerate(stored)]
    if rows.lengths is not None and rows.offsets is None:
        # The gradients of steps that do not exist are 0, but 0 * inf is NaN in the products.
        over = packing.rows_over(rows, rows.lengths)
        input_ni = input_ni.masked_fill(over[:, None], 0)
        prev = [p.masked_fill_(over[:, None, None], 0) for p in prev]
    h_mask = None if noise.h is None else packing.by_row(noise.h, rows, input_ni.shape[0])
    with matmul_precision(input, precision):
        values = saved
        if recompute:
            x_gates = _input_gates(spec, input_ni, weights)
            h_gates, factors = _recurrent_gates(spec, x_gates, prev, weights, h_mask)
            values = (x_gates, h_gates)
        else:
            stacked = [prev[0] if h_mask is None else prev[0] * h_mask]
            if published is not None:
                stacked += published.unbind(2)
            factors = list(zip(*(factor.unbind(1) for factor in stacked), strict=True))
        dx_gates, dh_gates, d_state, d_params, d_projected = kernels.scan_backward(
            cell, d_output.reshape(-1, D, P), d_final, weights, given.state[index], output_ndh,
            states, values, rows=rows, save=str(spec.save), input_precision=precision,
            heads=heads, state_ops=_state_ops(spec, given, index, noise, len(input_ni)),
            plan=given.plan, exchanges=given.exchanges,
        )  # fmt: skip
        dx_gates = dx_gates[..., : cell.gate_units(dx_gates.shape[-1])]
        d_sums, d_norms = dx_gates.flatten(2), []
        if cell.input_norm is not None:
            d_sums, d_norms = stages.input_norm_backward(cell, d_sums, input_ni, weights)
        d_input = input.new_empty([0])
        if d_input_wanted:
            d_input = (d_sums.flatten(1) @ _joined_weights(weights)[0]).view(input.shape)
        gradients: list[Tensor] = []
        for d in range(D):
            dx, received, multiplied, first = dx_gates[:, d], [], [], 0
            dense = iter(cell.dense_sizes(spec.hidden_size))
            for stage, factor in zip(cell.weighted, factors[d], strict=True):
                # Units beyond a stage's own are 0.
                units, k = next(dense) if stage in cell.dense else (dx.shape[-1], factor.shape[-1])
                sums = dh_gates[:, d, first : first + len(stage.sums), :units]
                if d_projected is not None and not stage.sums:
                    sums = d_projected[:, d, None]
                received.append(sums)
                multiplied.append(factor[:, :k])
                first += len(stage.sums)
            gradients += stages.d_parameters(
                cell, input_ni, [d_sums[:, d]], d_norms[d] if d_norms else None, [dx], received,
                multiplied, [p[d] for p in d_params], heads=heads, bias=spec.bias,
            )  # fmt: skip
    return d_input, d_state, gradients


def _previous(stored: Tensor, given: _Pass, index: int, s: int) -> Tensor:
    """[N, D, *]: the state s that each step of a layer began from, from what is stored of all."""
    rows, reset = given.rows[index], given.reset[index]
    prev = packing.previous_h(stored, given.state[index][s], rows)
    if reset is not None:
        reset_state = given.reset_state[index][s : s + 1]
        prev = packing.started_over(prev, reset, reset_state, rows)
    return prev


def _reset_flags(spec: Spec, masks: Masks, rows: packing.Rows) -> Tensor | None:
    if masks.reset is None:
        return None
    return packing.starts_by_row(masks.reset, rows, spec.batch_first, directions(spec))


def _state_ops(spec: Spec, given: _Pass, index: int, noise: LayerMasks, N: int):
    """Resets, masks and zoneout of a layer as the kernels take them."""
    import fusedrnn.kernels as kernels

    zoneout = noise.zoneout
    if zoneout is not None and zoneout.dim() > 1:
        S = len(cell_of(spec).states)
        zoneout = zoneout.reshape(N, directions(spec), S, -1).view(torch.int8)
        zoneout = _to_units(spec, zoneout)
    reset_state = tuple([s.contiguous() for s in given.reset_state[index]])
    return kernels.StateOps(given.reset[index], reset_state, noise.h, zoneout, spec.clip or None)


def _to_units(spec: Spec, tensor: Tensor) -> Tensor:
    """`tensor` [*, H], with zeros for units that only wider stages have."""
    missing = units_of(spec) - tensor.shape[-1]
    return F.pad(tensor, (0, missing)) if missing else tensor


def _input_gates(spec: Spec, input_ni: Tensor, weights: list[Weights]) -> Tensor:
    """x_gates [N, D, G, H]: the input projection of all time steps and both directions."""
    cell = cell_of(spec)
    if cell.input_norm is not None:
        x_gates = torch.stack([stages.input_gates(cell, input_ni, w) for w in weights], dim=1)
    else:
        w_ih, b_ih = _joined_weights(weights)
        x_gates = F.linear(input_ni, w_ih, b_ih)
    x_gates = x_gates.view(input_ni.shape[0], len(weights), len(cell.gates), -1)
    return _to_units(spec, x_gates)


def _joined_weights(weights: list[Weights]) -> tuple[Tensor, Tensor | None]:
    """W_ih and b_ih of all directions, one under the other.

    Two products, each into its part of x_gates, would copy no weights. But torch adds a bias to
    such a part in a pass of its own, and x_gates has many more rows than the weights.
    """
    if len(weights) == 1:
        return weights[0].w_ih, weights[0].b_ih
    biases = [w.b_ih for w in weights if w.b_ih is not None]
    return torch.cat([w.w_ih for w in weights]), torch.cat(biases) if biases else None


def _recurrent_gates(
    spec: Spec, x_gates: Tensor, prev: list[Tensor], weights: list[Weights], h_mask: Tensor | None
) -> tuple[Tensor, list[list[Tensor]]]:
    """What all stages received but a projection, [N, D, sums + means, H], the means behind the
    sums, of all time steps at once, from the states before each of them; and of each direction what
    every stage multiplied, [N, K]."""
    cell, h_gates, factors = cell_of(spec), [], []
    for d, w in enumerate(weights):
        several = len(cell.stages) > 1
        entered = x_gates[:, d, :, : cell.gate_units(x_gates.shape[-1])]
        x = stages.shared_out(cell, "gates", entered.float().unbind(1) if several else ())
        params = stages.shared_out(cell, "params", [p.float() for p in w.params])
        matrices = stages.stage_weights(cell, w)
        heads = len(w.w_hh) if w.w_hh.dim() == 3 else 1
        values, gates, means, multiplied = tuple([p[:, d] for p in prev]), [], [], []
        for s, stage in enumerate(cell.stages):
            given = [v.to(x_gates.dtype) for v in values[: stage.exchanged]]
            if isinstance(stage.receives, Mean):
                received = stages.means([g.float() for g in given], heads)
                means += [r.to(x_gates.dtype) for r in received]
            else:
                factor = given[0]
                if h_mask is not None and stage.gates:
                    factor = factor * h_mask[:, d]
                multiplied.append(factor)
                if not stage.sums:  # a projection: h was stored
                    break
                received = stages.product(factor, *matrices[s], stage.products)
                gates += received
            if s + 1 < len(cell.stages):
                sums, wide = ([t.float() for t in part] for part in (received, values))
                values, _saved = stage.forward(x[s], tuple(sums), tuple(wide), params[s])
        h_gates.append(torch.stack([_to_units(spec, g) for g in (*gates, *means)], dim=1))
        factors.append(multiplied)
    return torch.stack(h_gates, dim=1), factors


def matmul_precision(input: Tensor, precision: str) -> AbstractContextManager[None]:
    """Runs the matrix products beside the loop in the precision of the loop, as cuDNN does."""
    if input.device.type != "cuda" or input.dtype != torch.float32:
        return nullcontext()
    return _set_matmul_precision(precision)


@contextmanager
def _set_matmul_precision(precision: str) -> Iterator[None]:
    settings = torch.backends.cuda.matmul
    with _matmul_switch:
        before = settings.fp32_precision
        settings.fp32_precision = precision
        try:
            yield
        finally:
            settings.fp32_precision = before


# The switch is the process's: a thread (DataParallel has one per device) must not find, and later
# restore, what another had set for its own products. Held while they are launched, not while run.
_matmul_switch = threading.Lock()
