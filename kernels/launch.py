"""From torch tensors to one launch: allocation, plan, grid, and what a time-out leaves behind."""

import contextlib
import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fusedrnn.cells import Cell
from fusedrnn.kernels import layout, sync, tune
from fusedrnn.kernels.bind import bind
from fusedrnn.kernels.plan import INTERPRETER, PASSES, Device, Plan, plan_scan
from fusedrnn.kernels.scan_backward import scan_backward_kernel
from fusedrnn.kernels.scan_forward import scan_forward_kernel
from fusedrnn.packing import Rows

SAVE = ("gates", "states", None)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PRECISIONS = ("ieee", "tf32")
OLDEST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Extras:
    """What happens to the states between steps, if anything does; see `extras` and
    `fusedrnn.regularizers`.

    Attributes:
        reset: [N, D] int8, not 0 where a state starts over before the step, in the direction's
            own order of time.
        fresh: what it starts from: S tensors [D, B, H], or () for zeros.
        h_mask: [D, B, H], multiplies h before the recurrent product.
        zoneout: [N, D, S, H] int8, 1 where a unit keeps its state; or [S] float32, the share of
            its previous value that every state keeps.
        clip: bound of the gradient of every h_t; 0 for none.
    """

    reset: Tensor | None = None
    fresh: tuple[Tensor, ...] = ()
    h_mask: Tensor | None = None
    zoneout: Tensor | None = None
    clip: float = 0.0

    def arguments(self) -> dict[str, object]:
        """What both kernels take of them."""
        kind = None
        if self.zoneout is not None:
            kind = "expected" if self.zoneout.dim() == 1 else "drawn"
        return {
            "reset_ptr": self.reset,
            "fresh_ptrs": self.fresh,
            "h_mask_ptr": self.h_mask,
            "zoneout_ptr": self.zoneout,
            "ZONEOUT": kind,
        }


NO_EXTRAS = Extras()


def scan_forward(
    cell: Cell,
    x_gates: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    state: tuple[Tensor, ...],
    params: tuple[Tensor, ...] = (),
    *,
    rows: Rows,
    save: str | None,
    input_precision: str,
    extras: Extras = NO_EXTRAS,
    plan: Plan | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None, Tensor | None]:
    """Runs a layer's time loop, all directions, in one launch.

    Args:
        x_gates: [N, D, G, H], the input projection with its bias; float16, bfloat16 or float32.
        w_hh: [D, G * H, H]. b_hh: [D, G * H] or None. All of the dtype of x_gates.
        state: S tensors [D, B, H]. params: P tensors [D, H].
        save: what backward will need: "gates" (the cell's saved values and the states), "states"
            (the states alone), or None.
        input_precision: of products of float32: "ieee" or "tf32".
        extras: resets, zoneout and the like.
        plan: tiling; by default the one that `plan_scan` makes for the device.
    Returns:
        output [N, D, H] (0 where a padded row is over), the S final states [D, B, H],
        saved [N, D, K, H] and states [N, D, S - 1, H], or None where not saved or empty.
    Raises:
        ValueError: an argument that does not fit, or a problem for which there is no plan.
        RuntimeError: the device cannot hold the grid, or an earlier launch timed out.
    """
    _check_choice("save", save, SAVE)
    _check_choice("input_precision", input_precision, PRECISIONS)
    N, D, G, H = _check_x_gates(cell, x_gates)
    _check_layer(cell, w_hh, b_hh, state, params, rows, (D, G, H), x_gates)
    _check_extras(extras, cell, rows, (N, D, H), x_gates)
    if plan is None:
        plan = _plan(cell, "forward", x_gates, rows.B, H, D, input_precision)
    output = x_gates.new_empty(N, D, H)
    final = tuple(torch.empty_like(s, memory_format=torch.contiguous_format) for s in state)
    saved = states = None
    if save == "gates" and cell.saved:
        saved = x_gates.new_empty(N, D, len(cell.saved), H)
    if save is not None and len(state) > 1:
        states = x_gates.new_empty(N, D, len(state) - 1, H)
    _launch(
        scan_forward_kernel,
        plan,
        rows,
        steps=rows.T + 1,  # h_0 is published too
        planes=1,
        like=x_gates,
        x_gates_ptr=x_gates,
        w_ptr=_rows_of_units(w_hh.view(D, G, H, H)),
        b_hh_ptr=None if b_hh is None else b_hh.contiguous(),
        state_ptrs=_contiguous(state),
        param_ptrs=_contiguous(params),
        output_ptr=output,
        final_ptrs=final,
        saved_ptr=saved,
        states_ptr=states,
        **extras.arguments(),
        CELL=bind(cell.forward),
        G=G,
        H=H,
        D=D,
        PRECISION=input_precision,
    )
    return output, final, saved, states


def scan_backward(
    cell: Cell,
    d_output: Tensor,
    d_final: tuple[Tensor, ...],
    w_hh: Tensor,
    b_hh: Tensor | None,
    state: tuple[Tensor, ...],
    params: tuple[Tensor, ...],
    output: Tensor,
    states: Tensor | None,
    saved_or_gates: Tensor | tuple[Tensor, Tensor] | None,
    *,
    rows: Rows,
    save: str,
    input_precision: str,
    extras: Extras = NO_EXTRAS,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Runs a layer's time loop backward, all directions, in one launch.

    Args:
        d_output: [N, D, H]. d_final: S tensors [D, B, H].
        w_hh, b_hh, state, params, rows, input_precision, extras: as given to `scan_forward`;
            b_hh is not read, being part of `saved` or of h_gates. Zoneout needs save="states":
            what is stored then is not what the cell computed.
        output, states: as `scan_forward` returned them.
        saved_or_gates: with save="gates", what `scan_forward` returned as `saved`; with
            save="states", (x_gates, h_gates), each [N, D, G, H], of all steps, b_hh included.
    Returns:
        dx_gates and dh_gates [N, D, G, H] (one tensor where the cell is additive), the gradients
        of the S initial states [D, B, H] and after them of `extras.fresh`, and those of the P
        parameters [D, H], float32.
    Raises:
        ValueError, RuntimeError: as `scan_forward`.
    """
    _check_choice("save", save, SAVE[:2])
    _check_choice("input_precision", input_precision, PRECISIONS)
    N, D, H = output.shape
    G = len(cell.gates)
    _check_layer(cell, w_hh, b_hh, state, params, rows, (D, G, H), output)
    _check_tensors("d_final", d_final, cell.states, (D, rows.B, H), output)
    _check_tensors("d_output", (d_output,), ("d_output",), (N, D, H), output)
    _check_tensor("output", output, (N, D, H), output)
    _check_extras(extras, cell, rows, (N, D, H), output)
    if extras.zoneout is not None:
        _check_choice("save, with zoneout,", save, ("states",))
    if save == "gates" or not (cell.saved or extras.zoneout is not None):
        recompute, kept, planes = None, (), len(cell.saved)
        if cell.saved:
            kept = (_check_tensor("saved_or_gates", saved_or_gates, (N, D, planes, H), output),)
    else:
        recompute, planes = bind(cell.forward), G
        x_gates, h_gates = saved_or_gates  # type: ignore[misc]
        kept = (
            _check_tensor("x_gates", x_gates, (N, D, G, H), output),
            _check_tensor("h_gates", h_gates, (N, D, G, H), output),
        )
    if plan is None:
        plan = _plan(cell, "backward", d_output, rows.B, H, D, input_precision)
    dx_gates = d_output.new_empty(N, D, G, H)
    dh_gates = dx_gates if cell.additive else torch.empty_like(dx_gates)
    d_state = tuple(
        torch.empty_like(s, memory_format=torch.contiguous_format) for s in (*state, *extras.fresh)
    )
    batch_tiles = triton.cdiv(rows.B, plan.block_b)
    d_params = tuple(
        torch.empty(batch_tiles, D, H, dtype=torch.float32, device=p.device) for p in params
    )
    _launch(
        scan_backward_kernel,
        plan,
        rows,
        steps=rows.T + 1,  # zeros are published first
        planes=G,
        like=d_output,
        d_output_ptr=d_output.contiguous(),
        d_final_ptrs=_contiguous(d_final),
        w_ptr=_rows_of_units(w_hh.view(D, G, H, H).transpose(-1, -2)),
        state_ptrs=_contiguous(state),
        param_ptrs=_contiguous(params),
        output_ptr=output,
        states_ptr=states,
        kept_ptrs=kept,
        dx_gates_ptr=dx_gates,
        dh_gates_ptr=None if cell.additive else dh_gates,
        d_state_ptrs=d_state[: len(state)],
        d_param_ptrs=d_params,
        d_fresh_ptrs=d_state[len(state) :],
        clip=extras.clip or None,
        **extras.arguments(),
        CELL_FORWARD=recompute,
        CELL_BACKWARD=bind(cell.backward),
        KEPT=planes,
        G=G,
        H=H,
        D=D,
        PRECISION=input_precision,
    )
    return dx_gates, dh_gates, d_state, tuple(d.sum(0) for d in d_params)


def check(device: torch.device | str = "cuda") -> None:
    """Waits for a device's launches, and raises RuntimeError where one of them timed out."""
    device = torch.device(device)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.synchronize(device)
    _raise_if_timed_out(_error_word(device))


def _launch(kernel, plan: Plan, rows: Rows, *, steps, planes, like, **arguments) -> None:
    """Launches `kernel`: once, or for one slab of the problem after the other.

    Args:
        steps: exchanges between the programs of a group. planes: tiles that they exchange in each.
        like: a tensor of the sequence's dtype and device.
    """
    device = like.device
    H, D = arguments["H"], arguments["D"]
    error = _error_word(device)
    _raise_if_timed_out(error)
    slab_b, slab_d = plan.slab_b or max(rows.B, 1), plan.slab_d or D
    # Triton launches on the current device and its stream, wherever the tensors are.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for first_d in range(0, D, slab_d):
            for first_b in range(0, rows.B, slab_b):
                grid = (
                    triton.cdiv(H, plan.block_h),
                    triton.cdiv(min(slab_b, rows.B - first_b), plan.block_b),
                    min(slab_d, D - first_d),
                )
                if not plan.exchanged:
                    exchange = dict.fromkeys(EXCHANGE)
                else:
                    _check_grid(grid, plan, device)
                    exchange = _exchange(plan, grid, steps, planes, like, error)
                compiled = kernel[grid](
                    **arguments,
                    **exchange,
                    offsets_ptr=rows.offsets,
                    lengths_ptr=rows.lengths,
                    T=rows.T,
                    B=rows.B,
                    first_b=first_b,
                    first_d=first_d,
                    stride_t=rows.stride_t,
                    stride_b=rows.stride_b,
                    PITCH=arguments["w_ptr"].shape[-1],
                    **plan.constants(device_of(device)),
                    **plan.options(device_of(device)),
                )
                if plan.exchanged and compiled is not None:  # None: interpreted
                    layout.check(compiled)
    if device.type != "cuda":
        _raise_if_timed_out(error)


EXCHANGE = (
    "ring_ptr",
    "signal_ptr",
    "error_ptr",
    "ring_stride",
    "signal_stride",
    "spin_limit",
)


def _exchange(plan: Plan, grid, steps: int, planes: int, like: Tensor, error: Tensor) -> dict:
    """What the programs of one launch wait and exchange through, as arguments of the kernel."""
    space = sync.workspace(
        groups=grid[1] * grid[2],
        programs=grid[0],
        steps=steps,
        chunks=plan.chunks,
        planes=planes,
        block_b=plan.block_b,
        block_h=plan.block_h,
        block_k=plan.block_k,
        dtype=like.dtype,
        device=like.device,
        error=error,
    )
    values = (
        space.ring,
        space.signal,
        space.error,
        space.ring_stride,
        space.signal_stride,
        sync.spin_limit(like.device),
    )
    return dict(zip(EXCHANGE, values, strict=True))


def _rows_of_units(w: Tensor) -> Tensor:
    """[D, G, H, H] with rows side by side, filled up with zeros to a multiple of 16 bytes."""
    return torch.nn.functional.pad(w, (0, -w.shape[-1] % 8)).contiguous()


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
    )


def _plan(cell: Cell, which: str, like: Tensor, B: int, H: int, D: int, precision: str) -> Plan:
    device = device_of(like.device)
    times = None
    if tune.enabled():
        times = tune.step_times(
            cell, which, like.dtype, H=H, D=D,
            device=like.device, properties=device, input_precision=precision,
            passes=(scan_forward, scan_backward),
        )  # fmt: skip
    return plan_scan(
        cell,
        which,
        like.dtype,
        B=B,
        H=H,
        D=D,
        device=device,
        input_precision=precision,
        step_times=times,
    )


def refusal(cell: Cell, dtype: torch.dtype, H: int, D: int, device: torch.device) -> str | None:
    """Why the kernels do not run such a layer on that device, or None."""
    major, minor = device_of(device).capability
    if device_of(device).backend == "cuda" and (major, minor) < OLDEST_CAPABILITY:
        return (
            f"the kernels are made for compute capability {'.'.join(map(str, OLDEST_CAPABILITY))} "
            f"and newer, {device} has {major}.{minor}"
        )
    try:
        for which in PASSES:
            plan_scan(cell, which, dtype, B=1, H=H, D=D, device=device_of(device))
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
    room = device_of(device).multiprocessors * plan.programs_each
    if device.type == "cuda" and programs > room:
        raise RuntimeError(
            f"the grid {grid} has {programs} programs that must run at the same time, "
            f"{device} holds {room} of them; plan: {plan}"
        )


def _contiguous(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.contiguous() for t in tensors)


def _check_choice(name: str, value, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _check_x_gates(cell: Cell, x_gates: Tensor) -> tuple[int, int, int, int]:
    if x_gates.dtype not in DTYPES:
        raise ValueError(f"x_gates must have a dtype of {DTYPES}, got {x_gates.dtype}")
    if x_gates.dim() != 4 or x_gates.shape[2] != len(cell.gates):
        raise ValueError(
            f"x_gates must have shape (N, D, {len(cell.gates)}, H) for the cell {cell.name!r}, "
            f"got {tuple(x_gates.shape)}"
        )
    _check_tensor("x_gates", x_gates, tuple(x_gates.shape), x_gates)
    N, D, G, H = x_gates.shape
    return N, D, G, H


def _check_layer(cell: Cell, w_hh, b_hh, state, params, rows: Rows, sizes, like: Tensor) -> None:
    D, G, H = sizes
    _check_tensors("w_hh", (w_hh,), ("w_hh",), (D, G * H, H), like)
    if b_hh is not None:
        _check_tensors("b_hh", (b_hh,), ("b_hh",), (D, G * H), like)
    _check_tensors("state", state, cell.states, (D, rows.B, H), like)
    _check_tensors("params", params, cell.params, (D, H), like)
    if rows.offsets is None and like.shape[0] != rows.T * rows.B:
        raise ValueError(f"rows must be T * B = {rows.T} * {rows.B}, got {like.shape[0]}")
    if rows.offsets is not None and rows.lengths is None:
        raise ValueError("rows.lengths must be given with rows.offsets")
    for name, expected in (("offsets", rows.T), ("lengths", rows.B)):
        index = getattr(rows, name)
        if index is not None and (index.dtype != torch.int64 or index.shape != (expected,)):
            raise ValueError(
                f"rows.{name} must be int64 of shape ({expected},), "
                f"got {index.dtype} of shape {tuple(index.shape)}"
            )


def _check_extras(extras: Extras, cell: Cell, rows: Rows, sizes, like: Tensor) -> None:
    N, D, H = sizes
    S = len(cell.states)
    if extras.fresh:
        _check_tensors("extras.fresh", extras.fresh, cell.states, (D, rows.B, H), like)
    if extras.h_mask is not None:
        _check_tensor("extras.h_mask", extras.h_mask, (D, rows.B, H), like)
    flags = {"reset": (extras.reset, (N, D)), "zoneout": (extras.zoneout, (N, D, S, H))}
    if extras.zoneout is not None and extras.zoneout.dim() == 1:
        _check_flags("zoneout", flags.pop("zoneout")[0], (S,), torch.float32)
    for name, (tensor, shape) in flags.items():
        if tensor is not None:
            _check_flags(name, tensor, shape, torch.int8)


def _check_flags(name: str, tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"extras.{name} must be {dtype} of shape {shape}, contiguous, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )


def _check_tensors(name: str, tensors, names, shape: tuple[int, ...], like: Tensor) -> None:
    """One tensor for each of `names`, of that shape, of the dtype and device of `like`."""
    if len(tensors) != len(names):
        raise ValueError(f"{name} must be {len(names)} tensors {names}, got {len(tensors)}")
    for tensor in tensors:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != like.dtype or tensor.device != like.device:
            raise ValueError(
                f"{name} must be {like.dtype} on {like.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The same for one large tensor, which must also be contiguous: no silent copy of those."""
    _check_tensors(name, (tensor,), (name,), shape, like)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    return tensor
