"""From torch tensors to one launch: allocation, plan, grid, and what a time-out leaves behind."""

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrnn.call import Weights
from fusedrnn.cells import Cell, Dense, Mean, Projection
from fusedrnn.kernels import layout, sync, tune
from fusedrnn.kernels.bind import bind
from fusedrnn.kernels.matmul import first_of, round_of
from fusedrnn.kernels.plan import (
    INTERPRETER,
    PASSES,
    Device,
    Plan,
    plan_scan,
    stage_sizes,
)
from fusedrnn.kernels.scan_backward import scan_backward_gluon, scan_backward_kernel
from fusedrnn.kernels.scan_forward import scan_forward_gluon, scan_forward_kernel
from fusedrnn.kernels.state_ops import StateOps
from fusedrnn.kernels.with_gluon import gluon, wgmma_backward
from fusedrnn.packing import Rows

SAVE = ("gates", "states", None)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PRECISIONS = ("ieee", "tf32")
OLDEST_CAPABILITY = (8, 0)
NO_STATE_OPS = StateOps()


def scan_forward(
    cell: Cell, x_gates: Tensor, directions: list[Weights], state: tuple[Tensor, ...], *,
    rows: Rows, save: str | None, input_precision: str, heads: int = 1,
    state_ops: StateOps = NO_STATE_OPS, plan: Plan | None = None,
    exchanges: Iterator[sync.Exchange] | None = None, final: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Runs a layer's time loop, all directions, in one launch.

    Args:
        x_gates: [N, D, G, H], the input projection with its bias, H being the units of the widest
            stage, and 0 beyond those of the first; float16, bfloat16 or float32.
        directions: the weights of each of D directions, of the dtype of x_gates; w_hh, b_hh, w_hr,
            params and dense are read, matrices in place where their rows are multiples of 8 long.
        state: h [D, B, P], where it is projected, else [D, B, H]; S - 1 others [D, B, H].
        save: what backward will need: "gates" (the cell's saved values, what its stages multiply,
            and the states), "states" (the states alone), or None.
        input_precision: of products of float32: "ieee" or "tf32".
        heads: of a direction, see `fusedrnn.call.Weights`.
        state_ops: resets, zoneout and the like.
        plan: tiling; by default the one that `plan_scan` makes for the device.
        exchanges: of `workspaces`, for this plan; by default of this layer alone.
        final: where the final states go, contiguous; by default to new tensors.
    Returns:
        output [N, D, P] (0 where a padded row is over), the S final states,
        saved [N, D, K, H], published [N, D, products - 1, H] (what every stage but the first
        multiplies, rounded and masked) and states [N, D, S - 1, H], or None where not saved or
        empty.
    Raises:
        ValueError: an argument that does not fit, or a problem for which there is no plan.
        RuntimeError: the device cannot hold the grid, or an earlier launch timed out.
    """
    if x_gates.dim() != 4:
        raise ValueError(f"x_gates must have shape (N, D, G, H), got {tuple(x_gates.shape)}")
    N, D, _, H = x_gates.shape
    G, P = len(cell.gates), state[0].shape[-1] if state else H
    state = _contiguous(state)
    _check_choice("save", save, SAVE)
    _check("x_gates", x_gates, (N, D, G, H), x_gates)
    _check_layer(
        cell, (N, D, H, P, heads), directions, state, rows, state_ops, input_precision, x_gates
    )
    if plan is None:
        plan = plan_for(cell, "forward", x_gates, rows.B, H, D, input_precision, P=P, heads=heads)
    output = x_gates.new_empty(N, D, P)
    if final is None:
        final = tuple([torch.empty_like(s) for s in state])
    saved = states = published = None
    if save == "gates" and cell.saved:
        saved = x_gates.new_empty(N, D, len(cell.saved), H)
    if save == "gates" and len(cell.weighted) > 1:
        published = x_gates.new_empty(N, D, len(cell.weighted) - 1, H)
    if save is not None and len(state) > 1:
        states = x_gates.new_empty(N, D, len(state) - 1, H)
    biases = tuple([_bias(cell, w, H) for w in directions if w.b_hh is not None])
    _launch(
        scan_forward_kernel, cell, plan, rows, (D, H, P, heads), input_precision, exchanges,
        like=x_gates, x_gates_ptr=x_gates,
        w_ptrs=_matrices(cell, directions, heads, transposed=False), b_hh_ptrs=biases or None,
        param_ptrs=_params(directions), state_ptrs=state, output_ptr=output, final_ptrs=final,
        saved_ptr=saved, published_ptr=published, states_ptr=states, ops=state_ops,
        bodies=_bodies(cell, "forward"),
    )  # fmt: skip
    return output, final, saved, published, states


def scan_backward(
    cell: Cell, d_output: Tensor, d_final: tuple[Tensor, ...], directions: list[Weights],
    state: tuple[Tensor, ...], output: Tensor, states: Tensor | None,
    saved_or_gates: Tensor | tuple[Tensor, Tensor] | None, *,
    rows: Rows, save: str, input_precision: str, heads: int = 1,
    state_ops: StateOps = NO_STATE_OPS, plan: Plan | None = None,
    exchanges: Iterator[sync.Exchange] | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]:  # fmt: skip
    """Runs a layer's time loop backward, all directions, in one launch.

    Args:
        d_output: [N, D, P]. d_final: S tensors, as the states.
        directions, state, rows, input_precision, heads, state_ops: as given to `scan_forward`;
            b_hh is not read, being part of `saved` or of h_gates. Zoneout needs save="states":
            what is stored then is not what the cell computed.
        output, states: as `scan_forward` returned them.
        saved_or_gates: with save="gates", what `scan_forward` returned as `saved`; with
            save="states", (x_gates, h_gates), [N, D, G, H] and [N, D, sums, H], of all steps, b_hh
            included; a cell's means stand behind its h_gates, [N, D, sums + means, H].
    Returns:
        dx_gates [N, D, G, H], dh_gates [N, D, sums, H] (the same where additive), the gradients
        of the S initial states and after them of `state_ops.reset_state`, those of the cell's
        parameters [D, H], float32, and that of what a projection received, [N, D, P], or None.
    Raises:
        ValueError, RuntimeError: as `scan_forward`.
    """
    zoneout = state_ops.zoneout is not None
    _check_choice("save", save, SAVE[1:2] if zoneout else SAVE[:2])
    N, D, P = output.shape
    w_hh = directions[0].w_hh
    H = P if cell.diagonal else w_hh.numel() // (w_hh.shape[-1] * len(cell.gates))
    H = cell.units(P) if cell.widest else H
    G, S = len(cell.gates), len(cell.states)
    state, d_final, d_output = _contiguous(state), _contiguous(d_final), d_output.contiguous()
    _check_layer(
        cell, (N, D, H, P, heads), directions, state, rows, state_ops, input_precision, output
    )
    recompute = save == "states" and (bool(cell.saved) or zoneout)
    kept: tuple[tuple[str, Tensor | None], ...] = ()
    if recompute:
        kept = tuple(zip(("x_gates", "h_gates"), saved_or_gates, strict=True))  # type: ignore[arg-type]
    elif cell.saved:
        kept = (("saved_or_gates", saved_or_gates),)  # type: ignore[assignment]
    means = sum([stage.products for stage in cell.stages if isinstance(stage.receives, Mean)])
    planes = (G, len(cell.sums) + means) if recompute else (len(cell.saved),)
    _check("output", output, (N, D, P), output)
    _check("d_output", d_output, (N, D, P), output)
    _check_states("d_final", d_final, cell, (D, rows.B, H, P), output)
    for (name, tensor), count in zip(kept, planes, strict=False):
        _check(name, tensor, (N, D, count, H), output)
    if S > 1:
        _check("states", states, (N, D, S - 1, H), output)
    if plan is None:
        plan = plan_for(cell, "backward", d_output, rows.B, H, D, input_precision, P=P, heads=heads)
    dx_gates = d_output.new_empty(N, D, G, H)
    dh_gates = dx_gates if cell.additive else d_output.new_empty(N, D, len(cell.sums), H)
    d_state = tuple(torch.empty_like(s) for s in (*state, *state_ops.reset_state))
    batch_tiles = -(-rows.B // plan.block_b)
    d_params = tuple(
        torch.empty(batch_tiles, D, H, dtype=torch.float32, device=output.device)
        for _ in cell.params
    )
    d_projected = torch.empty_like(output) if directions[0].w_hr is not None else None
    _launch(
        scan_backward_kernel, cell, plan, rows, (D, H, P, heads), input_precision, exchanges,
        like=d_output, d_output_ptr=d_output, d_final_ptrs=d_final,
        w_ptrs=_matrices(cell, directions, heads, transposed=True),
        param_ptrs=_params(directions), state_ptrs=state, output_ptr=output, states_ptr=states,
        kept_ptrs=tuple([tensor for _, tensor in kept]),
        dx_gates_ptr=dx_gates, dh_gates_ptr=None if cell.additive else dh_gates,
        d_projected_ptr=d_projected, d_state_ptrs=d_state[:S], d_param_ptrs=d_params,
        d_reset_state_ptrs=d_state[S:], ops=state_ops,
        forward_bodies=_bodies(cell, "forward") if recompute else (),
        bodies=_bodies(cell, "backward"), KEPT=planes,
    )  # fmt: skip
    return dx_gates, dh_gates, d_state, tuple(d.sum(0) for d in d_params), d_projected


def check(device: torch.device | str = "cuda") -> None:
    """Waits for a device's launches, and raises RuntimeError where one of them timed out."""
    device = torch.device(device)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.synchronize(device)
    _raise_if_timed_out(_error_word(device))


def workspaces(
    cell: Cell, plan: Plan, pass_: str, rows: Rows, like: Tensor, *,
    H: int, D: int, P: int, heads: int, layers: int,
) -> Iterator[sync.Exchange]:  # fmt: skip
    """What so many layers of one pass exchange through, for each of their launches in turn."""
    if not plan.exchanged:
        return iter(())
    parts = _parts(plan, rows.B, H // heads, D * heads)
    stages = stage_sizes(cell, pass_, H // heads, P // heads)
    # What is published for each stage, in turn: backward, for the last one after the first.
    turns = stages if pass_ == "forward" else (stages[0], *stages[:0:-1])
    first = first_of(stages)
    programs, *tiles_and_lanes = parts[0][0]
    launches, groups = layers * len(parts), math.prod(tiles_and_lanes)
    error = _error_word(like.device)
    if plan.schedule == "wgmma_scatter":
        return sync.part_workspaces(
            launches, groups=groups, slot_size=wgmma_backward.part_slot_size(plan),
            dtype=like.dtype, device=like.device, error=error,
        )  # fmt: skip
    return sync.workspaces(
        launches, groups=groups, programs=programs,
        planes=[0] * (first - 1) + [stage.planes for stage in turns],
        steps=rows.T * round_of(stages) + first,  # h_0 is published too
        chunks=plan.chunks, block_b=plan.block_b, block_h=plan.block_h, block_k=plan.block_k,
        dtype=like.dtype, device=like.device, error=error,
        in_rows=plan.schedule == "wgmma",
    )  # fmt: skip


def _launch(
    kernel, cell: Cell, plan: Plan, rows: Rows, sizes: tuple[int, int, int, int], precision: str,
    exchanges: Iterator[sync.Exchange] | None, *, like: Tensor, **arguments,
) -> None:  # fmt: skip
    """Launches `kernel`: once, or for one part of the batch and the lanes after the other.

    Args:
        sizes: D, H, P and heads.
        like: a tensor of the sequence's dtype and device.
    """
    device, (D, H, P, heads) = like.device, sizes
    pass_ = "forward" if kernel is scan_forward_kernel else "backward"
    if plan.warp_groups:
        kernel = scan_forward_gluon if pass_ == "forward" else scan_backward_gluon
    error = _error_word(device)
    _raise_if_timed_out(error)
    constants = _constants(cell, plan, pass_, sizes, precision, device_of(device))
    if exchanges is None:
        exchanges = workspaces(cell, plan, pass_, rows, like, H=H, D=D, P=P, heads=heads, layers=1)
    # Triton launches on the current device and its stream, wherever the tensors are.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for grid, first_b, first_lane in _parts(plan, rows.B, H // heads, D * heads):
            if plan.exchanged:
                _check_grid(grid, plan, device)
            compiled = kernel[grid](
                **arguments, exchange=next(exchanges, None), offsets_ptr=rows.offsets,
                lengths_ptr=rows.lengths, T=rows.T, B=rows.B, first_b=first_b,
                first_lane=first_lane, reverse=int(rows.reverse), stride_t=rows.stride_t,
                stride_b=rows.stride_b, **constants,
            )  # fmt: skip
            if plan.exchanged and compiled is not None:  # None: interpreted
                layout.check(compiled)
    if device.type != "cuda":
        _raise_if_timed_out(error)


@functools.lru_cache(maxsize=4096)
def _parts(
    plan: Plan, B: int, H: int, lanes: int
) -> tuple[tuple[tuple[int, int, int], int, int], ...]:
    """Of each launch, the grid, the first element of the batch, and the first lane; the first
    launch is the largest."""
    step_b, step_lane = plan.batch_per_launch or max(B, 1), plan.lanes_per_launch or lanes
    owners = plan.programs(H)
    return tuple(
        ((owners, -(-min(step_b, B - b) // plan.block_b), min(step_lane, lanes - lane)), b, lane)
        for lane in range(0, lanes, step_lane)
        for b in range(0, B, step_b)
    )


@functools.lru_cache(maxsize=4096)
def _constants(
    cell: Cell, plan: Plan, pass_: str, sizes: tuple[int, int, int, int], precision: str,
    device: Device,
) -> dict[str, Any]:  # fmt: skip
    """What a kernel is compiled for, and the compiler's options."""
    D, H, P, heads = sizes
    return {
        "STAGES": stage_sizes(cell, pass_, H // heads, P // heads), "G": len(cell.gates), "H": H,
        "P": P, "D": D, "HEADS": heads, "PRECISION": precision, "PLAN": plan.of_kernel(),
        **plan.options(device),
    }  # fmt: skip


@functools.cache
def _bodies(cell: Cell, pass_: str) -> tuple[Any, ...]:
    return tuple(bind(getattr(stage, pass_)) for stage in cell.stages)


def _matrices(
    cell: Cell, directions: list[Weights], heads: int, *, transposed: bool
) -> tuple[tuple[Tensor, ...], ...]:
    """For each stage, what `matmul.matrices_of` takes of each direction."""
    if cell.diagonal:
        return (tuple([w.w_hh.contiguous() for w in directions]),)
    count = heads * len(cell.gates)
    linear = tuple([_in_rows(w.w_hh, count, transposed) for w in directions])
    projected = tuple([_in_rows(w.w_hr, 1, transposed) for w in directions if w.w_hr is not None])
    found, own = [], zip(*(w.dense for w in directions), strict=True)
    for stage in cell.stages:
        if isinstance(stage.receives, Dense):
            count = heads * len(stage.sums)
            found.append(tuple([_in_rows(matrix, count, transposed) for matrix, _ in next(own)]))
        else:
            found.append(projected if isinstance(stage.receives, Projection) else linear)
    return tuple(found)


def _bias(cell: Cell, weights: Weights, H: int) -> Tensor:
    """[sums * H]: the biases of what all stages receive, 0 where there is none."""
    assert weights.b_hh is not None
    if not cell.dense:
        return weights.b_hh.contiguous()
    biases = [(weights.b_hh, len(cell.gates))]
    for stage, (_matrix, bias) in zip(cell.dense, weights.dense, strict=True):
        sums = len(stage.sums)
        biases.append((weights.b_hh.new_zeros(sums * H) if bias is None else bias, sums))
    parts = [bias.detach().view(count, -1) for bias, count in biases]
    return torch.cat([F.pad(part, (0, H - part.shape[1])) for part in parts]).flatten()


def _in_rows(stacked: Tensor, count: int, transposed: bool) -> Tensor:
    """`stacked`, `count` matrices [units, K] one under the other, each transposed if so, with rows
    that begin at multiples of 16 bytes: a copy only where it is not so already."""
    matrices = stacked
    if transposed:
        matrices = stacked.detach().reshape(count, -1, stacked.shape[-1]).mT
    if matrices.shape[-1] % 8:
        matrices = F.pad(matrices.detach(), (0, -matrices.shape[-1] % 8))
    return matrices.contiguous()


def _params(directions: list[Weights]) -> tuple[tuple[Tensor, ...], ...]:
    """For each of the cell's P parameters, those of D directions."""
    if not directions[0].params:
        return ()
    return tuple(zip(*(_contiguous(w.params) for w in directions), strict=True))


@functools.cache
def device_of(device: torch.device) -> Device:
    """What the plan has to know of a device; the CPU stands for the interpreter."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    return Device(
        capability=(properties.major, properties.minor),
        multiprocessors=properties.multi_processor_count,
        shared_per_program=properties.shared_memory_per_block_optin,
        shared_per_multiprocessor=properties.shared_memory_per_multiprocessor,
        backend="hip" if torch.version.hip else "cuda",
        gluon=gluon is not None,
    )


def plan_for(
    cell: Cell, pass_: str, like: Tensor, B: int, H: int, D: int, precision: str, *,
    P: int = 0, heads: int = 1,
) -> Plan:  # fmt: skip
    """The plan for tensors of the dtype and device of `like`, tuned where that is switched on."""
    device = device_of(like.device)
    P = P if P != H else 0  # what is not projected is one plan, and one time
    times = None
    if tune.enabled():
        times = tune.step_times(
            cell, pass_, like.dtype, H=H // heads, P=P, D=D * heads,
            device=like.device, properties=device, input_precision=precision,
            passes=(scan_forward, scan_backward),
        )  # fmt: skip
    return plan_scan(
        cell, pass_, like.dtype, B=B, H=H // heads, D=D * heads, P=P,
        device=device, input_precision=precision, step_times=times,
    )  # fmt: skip


def refusal(
    cell: Cell, dtype: torch.dtype, H: int, D: int, device: torch.device, P: int = 0
) -> str | None:
    """Why the kernels do not run such a layer on that device, or None."""
    major, minor = device_of(device).capability
    if device_of(device).backend == "cuda" and (major, minor) < OLDEST_CAPABILITY:
        return (
            f"the kernels are made for compute capability {'.'.join(map(str, OLDEST_CAPABILITY))} "
            f"and newer, {device} has {major}.{minor}"
        )
    try:
        for pass_ in PASSES:
            plan_scan(cell, pass_, dtype, B=1, H=H, D=D, P=P, device=device_of(device))
    except ValueError as error:
        return str(error)
    return None


@functools.cache
def _error_word(device: torch.device) -> Tensor:
    """The word in which a launch reports a time-out. It lies in pinned host memory, which the
    next call can read without waiting for the device."""
    with torch.inference_mode(False):  # an inference tensor could not be set outside that mode
        return torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")


def _raise_if_timed_out(error: Tensor) -> None:
    try:
        sync.raise_if_timed_out(error)
    except RuntimeError:
        error.zero_()  # once told, the next call starts in good health
        raise


def _check_grid(grid: tuple[int, int, int], plan: Plan, device: torch.device) -> None:
    """A grid that does not fit would wait for programs that cannot start."""
    programs = grid[0] * grid[1] * grid[2]
    room = device_of(device).multiprocessors * plan.programs_per_sm
    if device.type == "cuda" and programs > room:
        raise RuntimeError(
            f"the grid {grid} has {programs} programs that must run at the same time, "
            f"{device} holds {room} of them; plan: {plan}"
        )


def _contiguous(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple([t.contiguous() for t in tensors])


def _check_choice(name: str, value, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _check_layer(
    cell: Cell, sizes, directions, state, rows: Rows, ops: StateOps, input_precision, like: Tensor
) -> None:
    """What both passes take."""
    N, D, H, P, heads = sizes
    G, S, B = len(cell.gates), len(cell.states), rows.B
    _check_choice("input_precision", input_precision, PRECISIONS)
    _check_choice("the dtype of a sequence", like.dtype, DTYPES)
    if len(directions) != D:
        raise ValueError(f"directions must be {D}, got {len(directions)}")
    if rows.reverse and D == 2:
        raise ValueError("rows.reverse must be False with two directions, got True")
    if rows.offsets is None and N != rows.T * B:
        raise ValueError(f"rows must be T * B = {rows.T} * {B}, got {N}")
    if rows.offsets is not None and rows.lengths is None:
        raise ValueError("rows.lengths must be given with rows.offsets")
    _check_states("state", state, cell, (D, B, H, P), like)
    if ops.reset_state:
        _check_states("state_ops.reset_state", ops.reset_state, cell, (D, B, H, P), like)
    gate_rows = cell.gate_units(H) * G
    matrix = (gate_rows, P) if heads == 1 else (heads, gate_rows // heads, H // heads)
    matrix = (gate_rows,) if cell.diagonal else matrix
    projection = (P, H) if isinstance(cell.stages[-1].receives, Projection) else None
    biased = any([w.b_hh is not None for w in directions])
    for d, w in enumerate(directions):  # of which copies are made where they are not contiguous
        _check(f"directions[{d}].w_hh", w.w_hh, matrix, like, contiguous=False)
        if projection is not None:
            _check(f"directions[{d}].w_hr", w.w_hr, projection, like, contiguous=False)
        if biased:
            _check(f"directions[{d}].b_hh", w.b_hh, (gate_rows,), like, contiguous=False)
        if len(w.dense) != len(cell.dense):
            raise ValueError(f"directions[{d}].dense must be {len(cell.dense)}, got {len(w.dense)}")
        for stage, (own, bias), (units, k) in zip(
            cell.dense, w.dense, cell.dense_sizes(P), strict=True
        ):
            rows_of = len(stage.sums) * units
            shape = (rows_of, k) if heads == 1 else (heads, rows_of // heads, k // heads)
            _check(f"directions[{d}].dense", own, shape, like, contiguous=False)
            if bias is not None:
                _check(f"directions[{d}].dense", bias, (rows_of,), like, contiguous=False)
        _check_each(f"directions[{d}].params", w.params, cell.params, (H,), like, contiguous=False)
    _check_given("rows.offsets", rows.offsets, (rows.T,), like, torch.int64)
    _check_given("rows.lengths", rows.lengths, (B,), like, torch.int64)
    _check_given("state_ops.reset", ops.reset, (N, D), like, torch.int8)
    _check_given("state_ops.h_mask", ops.h_mask, (D, B, P), like, like.dtype)
    shares = ops.zoneout is not None and ops.zoneout.dim() == 1
    shape, dtype = ((S,), torch.float32) if shares else ((N, D, S, H), torch.int8)
    _check_given("state_ops.zoneout", ops.zoneout, shape, like, dtype)


def _check_states(name: str, states, cell: Cell, sizes, like: Tensor) -> None:
    """One tensor for each of the cell's states, h of P features and the others of H."""
    D, B, H, P = sizes
    _check_each(name, states[:1], cell.states[:1], (D, B, P), like)
    _check_each(name, states[1:], cell.states[1:], (D, B, H), like)


def _check_each(
    name: str, tensors, names, shape: tuple[int, ...], like: Tensor, contiguous: bool = True
) -> None:
    """One tensor for each of `names`, all of one shape."""
    if len(tensors) != len(names):
        raise ValueError(f"{name} must be {len(names)} tensors {names}, got {len(tensors)}")
    for of, tensor in zip(names, tensors, strict=True):
        _check(f"{name} ({of})", tensor, shape, like, contiguous=contiguous)


def _check_given(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype
) -> None:
    if tensor is not None:
        _check(name, tensor, shape, like, dtype)


def _check(
    name: str,
    tensor: Tensor | None,
    shape: tuple[int, ...],
    like: Tensor,
    dtype: torch.dtype | None = None,
    contiguous: bool = True,
) -> None:
    """Kernels address memory by these shapes: nothing else may pass. The dtype is by default that
    of `like`, beside which all tensors lie."""
    dtype = dtype or like.dtype
    if (
        tensor is None
        or tensor.shape != shape
        or tensor.dtype != dtype
        or tensor.device != like.device
        or (contiguous and not tensor.is_contiguous())
    ):
        got = "None"
        if tensor is not None:
            got = f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device} with "
            got += f"strides {tensor.stride()}"
        layout = "contiguous " if contiguous else ""
        raise ValueError(
            f"{name} must be {layout}{dtype} of shape {shape} on {like.device}, got {got}"
        )
