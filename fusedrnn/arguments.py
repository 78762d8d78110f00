"""The checks of a user's tensors: every message names the argument, what was expected, what came.

Kernels read as far as the shapes say, whatever lies there: `fusedrnn.kernels.launch` checks once
more what gets to them, since a module's parameters can be replaced.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedrnn import cells, packing
from fusedrnn.call import Spec, directions, heads_of, output_features, size_of, widths
from fusedrnn.types import Direction, HiddenSize, Lengths

Shape = tuple[int, ...]


def weight_shapes(spec: Spec) -> list[Shape]:
    """The shapes of all parameters, in torch's order."""
    cell, D = cells.get(spec.cell), directions(spec)
    heads, P = heads_of(spec), spec.proj_size
    shapes: list[Shape] = []
    for layer in range(spec.num_layers):
        H = size_of(spec, layer)
        rows, width = len(cell.gates) * cell.gate_units(H), P or H
        recurrent = (rows, width) if heads == 1 else (heads, rows // heads, width // heads)
        own: list[Shape] = [(rows, output_features(spec, layer - 1))]
        own += [(rows,) if cell.diagonal else recurrent]
        own += [(rows,), (rows,)] if spec.bias else []
        own += [(P, H)] if P else []
        for shape in cell.own_shapes(H, spec.bias).values():
            in_heads = heads > 1 and len(shape) == 2
            own += [(heads, *(size // heads for size in shape)) if in_heads else shape]
        shapes += own * D
    return shapes


def check_sizes(**sizes: object) -> None:
    """Raises TypeError for what is no integer."""
    for name, size in sizes.items():
        if not isinstance(size, (numbers.Integral, torch.SymInt)):
            raise TypeError(f"{name}: expected an int, got {size!r}")


def check_layers(cell: str, hidden_size: int, proj_size: int, num_heads: int) -> None:
    """Raises for a projection that the cell cannot have, and for heads that H does not divide
    into."""
    if proj_size and not cells.get(cell).projects:
        able = [name for name, other in cells.REGISTRY.items() if other.projects]
        raise ValueError(
            f"proj_size: expected 0, since only {', '.join(able)} can project, "
            f"got {proj_size} for {cell}"
        )
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads: expected an int, got {num_heads!r}")
    if num_heads < 1 or hidden_size % num_heads:
        raise ValueError(
            f"num_heads: expected a divisor of hidden_size={hidden_size}, got {num_heads}"
        )
    if num_heads > 1 and cells.get(cell).widest:
        raise ValueError(f"num_heads: expected 1 for {cell}, got {num_heads}")
    if num_heads > 1 and proj_size:
        raise ValueError(f"num_heads: expected 1 beside proj_size={proj_size}, got {num_heads}")


def ints_of(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    """`sizes` as Python's; raises for what is no integer."""
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, (numbers.Integral, torch.SymInt)):
            raise TypeError(f"{name}: expected ints, got {sizes!r}")
    return tuple([size if isinstance(size, torch.SymInt) else int(size) for size in sizes])


def sizes_of(
    hidden_size: HiddenSize, num_layers: int, proj_size: int
) -> tuple[int, tuple[int, ...]]:
    """`Spec.hidden_size` and `Spec.hidden_sizes`; raises for sizes that are not one for each layer,
    or beside a projection."""
    if not isinstance(hidden_size, Sequence) or isinstance(hidden_size, str):
        one: Any = hidden_size  # the caller says what else it should be
        return one, ()
    sizes = ints_of("hidden_size", hidden_size)
    if len(sizes) != num_layers or min(sizes, default=0) < 1:
        raise ValueError(
            f"hidden_size: expected an int, or a positive one for each of num_layers={num_layers} "
            f"layers, got {hidden_size!r}"
        )
    if proj_size > 0:
        raise ValueError(
            f"hidden_size: expected an int beside proj_size={proj_size}, got {hidden_size!r}"
        )
    return max(sizes), sizes if len(set(sizes)) > 1 else ()


def check_direction(direction: Direction, num_layers: int, bidirectional: bool) -> int:
    """`Spec.reversed_layers`; raises for what is no direction, or none of such layers."""
    if isinstance(direction, str) and direction == "forward":
        return 0
    told = "expected 'forward', 'reverse', 'alternate', or one of the first two for each layer"
    words: Any = (direction,) * num_layers
    if not isinstance(direction, str):
        if not isinstance(direction, Sequence) or len(direction) != num_layers:
            raise ValueError(f"direction: {told} (num_layers={num_layers}), got {direction!r}")
        words = direction
    elif direction == "alternate":
        words = [("forward", "reverse")[layer % 2] for layer in range(num_layers)]
    for word in words:
        if word not in ("forward", "reverse"):
            raise ValueError(f"direction: {told}, got {direction!r}")
    if bidirectional:
        raise ValueError(
            f"direction: expected 'forward' beside bidirectional=True, got {direction!r}"
        )
    return sum([(word == "reverse") << layer for layer, word in enumerate(words)])


def check_weights(spec: Spec, weights: Sequence[Tensor]) -> None:
    """Raises for weights that are not those of the layers and directions of `spec`."""
    for index, weight in enumerate(weights):
        if not isinstance(weight, Tensor):
            got = type(weight).__name__
            raise TypeError(f"{spec.cell}: weights[{index}]: expected a Tensor, got {got}")
    layers = spec.num_layers * directions(spec)
    count = layers * len(weight_shapes(spec._replace(num_layers=1, bidirectional=False)))
    if len(weights) != count:
        raise RuntimeError(
            f"{spec.cell}: weights: expected {count} tensors for {layers} layer(s) and "
            f"direction(s) with bias={spec.bias} and proj_size={spec.proj_size}, "
            f"got {len(weights)}"
        )
    heads = f" and num_heads={spec.num_heads}" if spec.num_heads > 1 else ""
    for index, (weight, shape) in enumerate(zip(weights, weight_shapes(spec), strict=True)):
        name = f"{spec.cell}: weights[{index}]"
        if weight.shape != shape:
            raise RuntimeError(
                f"{name}: expected shape {shape} for hidden_size={spec.hidden_size}{heads}, "
                f"got {tuple(weight.shape)}"
            )
        same = weight.dtype == weights[0].dtype or torch._C._is_any_autocast_enabled()
        if not (weight.is_floating_point() and same):
            raise ValueError(
                f"{name}: expected one floating-point dtype for all, got {weight.dtype} beside "
                f"{weights[0].dtype}"
            )
        if weight.device != weights[0].device:
            raise RuntimeError(
                f"{name}: expected {weights[0].device}, where weights[0] is, got {weight.device}"
            )


def check_input(
    name: str, spec: Spec, input: Tensor, batch_sizes: Tensor | None, dtype: torch.dtype
) -> None:
    """Raises for a sequence that the weights, of `dtype`, do not fit; `name` is the caller's."""
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
        raise (ValueError if batch_sizes is None else RuntimeError)(
            f"{name}: input: expected {' or '.join(f'{d}-D' for d in dims)}, "
            f"got {input.dim()}-D of shape {tuple(input.shape)}"
        )
    check_dtype(f"{name}: input", input, dtype)
    check_features(f"{name}: input", spec, input)
    time_dim = 1 if spec.batch_first and input.dim() == 3 else 0
    if batch_sizes is None and input.shape[time_dim] == 0:
        raise RuntimeError(
            f"{name}: input: expected at least one time step, got shape {tuple(input.shape)}"
        )


def check_step(
    name: str,
    spec: Spec,
    x: Tensor,
    states: Sequence[Tensor] | None,
    dtype: torch.dtype,
    argument_names: tuple[str, str],
    leading: Shape = (),
) -> None:
    """Raises for a single step, x [B, I] or [I], and states before it, [*leading, B, H] or
    [*leading, H], that weights of `dtype` do not fit; `argument_names` are those of x and the
    states at `name`, the caller."""
    x_name, states_name = (f"{name}: {argument}" for argument in argument_names)
    if not isinstance(x, Tensor):
        raise TypeError(f"{x_name}: expected a Tensor [B, I] or [I], got {type(x).__name__}")
    if x.dim() not in (1, 2):
        raise ValueError(f"{x_name}: expected [B, I] or [I], got shape {tuple(x.shape)}")
    check_features(x_name, spec, x)
    names = cells.get(spec.cell).states
    if states is not None:
        for state in () if leading else states:
            if isinstance(state, Tensor) and state.dim() not in (1, 2):  # as torch.nn's cells
                raise ValueError(f"{states_name}: expected 1-D or 2-D, got {state.dim()}-D")
        shapes = [(*leading, *x.shape[:-1])]
        check_state_shapes(states_name, names, states, shapes, widths(spec), x, "input")
    check_dtype(x_name, x, dtype)
    if states is not None:
        check_state_kinds(states_name, names, states, x, "input")


def check_features(name: str, spec: Spec, input: Tensor) -> None:
    """Raises for a last dimension that is not I."""
    if input.shape[-1] != spec.input_size:
        raise RuntimeError(
            f"{name}: expected size(-1) to be input_size={spec.input_size}, "
            f"got shape {tuple(input.shape)}"
        )


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


def check_state_shapes(
    argument: str,
    names: Sequence[str],
    states: object,
    leading: Sequence[Shape],
    features: Sequence[int],
    like: Tensor,
    like_name: str,
) -> None:
    """Raises for what is not one tensor for each of `names`, in the shapes that `like` demands.

    Args:
        leading: the shapes that they may have, without the features. features: those of each.
        like: a tensor beside which they stand, which messages call `like_name`.
    """
    if not isinstance(states, (tuple, list)) or len(states) != len(names):
        listed = isinstance(states, (tuple, list))
        got = f"{len(states)} of them" if listed else type(states).__name__
        raise TypeError(f"{argument}: expected the {len(names)} tensors {tuple(names)}, got {got}")
    for name, state, width in zip(names, states, features, strict=True):
        if not isinstance(state, Tensor):
            got = type(state).__name__
            raise TypeError(f"{argument} ({name}): expected a Tensor, got {got}")
        shapes = [(*shape, width) for shape in leading]
        if state.shape not in shapes:
            raise RuntimeError(
                f"{argument} ({name}): expected shape {' or '.join(map(str, shapes))} for "
                f"{like_name} {tuple(like.shape)}, got {tuple(state.shape)}"
            )


def check_state_kinds(
    argument: str, names: Sequence[str], states: Sequence[Tensor], like: Tensor, like_name: str
) -> None:
    """Raises for states that have not the dtype and device of `like`."""
    autocast = torch._C._is_any_autocast_enabled()  # which casts them with the input
    for name, state in zip(names, states, strict=True):
        if state.device != like.device or (state.dtype != like.dtype and not autocast):
            raise RuntimeError(
                f"{argument} ({name}): expected {like.dtype} on {like.device} as the {like_name}, "
                f"got {state.dtype} on {state.device}"
            )


def check_hx(
    name: str, spec: Spec, hx: object, input: Tensor, batch_sizes: Tensor | None
) -> tuple[Tensor, ...]:
    """The initial states of a sequence as a tuple; raises for those that do not belong to it."""
    layers = spec.num_layers * directions(spec)
    if batch_sizes is not None:
        leading: Shape = (layers, int(batch_sizes[0]))
    elif input.dim() == 2:
        leading = (layers,)
    else:
        leading = (layers, input.shape[0 if spec.batch_first else 1])
    names = [f"{state}_0" for state in cells.get(spec.cell).states]
    check_state_shapes(f"{name}: hx", names, hx, [leading], widths(spec), input, "input")
    states: Any = hx
    check_state_kinds(f"{name}: hx", names, states, input, "input")
    return tuple(states)


def check_reset_state(
    reset_state: object, spec: Spec, h_0: Tensor, unbatched: bool
) -> tuple[Tensor, ...]:
    """The states that a reset sets, each [L * D, B, *], from such ones, or of which B is 1, or
    without B where the input has none. `h_0` is [L * D, B, *]."""
    layers, B = h_0.shape[:2]
    leading: list[Shape] = [(layers, B), (layers, 1)] if B != 1 else [(layers, 1)]
    leading += [(layers,)] if unbatched else []
    states: Any = reset_state if isinstance(reset_state, (tuple, list)) else (reset_state,)
    names = cells.get(spec.cell).states
    check_state_shapes("reset", names, states, leading, widths(spec), h_0, "h_0")
    check_state_kinds("reset", names, states, h_0, "h_0")
    states = tuple(s.unsqueeze(1) if s.dim() == 2 else s for s in states)
    return tuple(s.expand(layers, B, s.shape[-1]) for s in states)


def check_reset(
    reset: object, T: int, B: int, spec: Spec, input: Tensor, unbatched: bool
) -> Tensor:
    """A mask of resets, [T, B] or [B, T], beside its input; raises for anything else."""
    shape = (T,) if unbatched else (B, T) if spec.batch_first else (T, B)
    if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
        got = reset.dtype if isinstance(reset, Tensor) else type(reset).__name__
        raise TypeError(f"reset: expected a bool tensor {shape}, got {got}")
    if reset.shape != shape:
        raise RuntimeError(f"reset: expected shape {shape}, got {tuple(reset.shape)}")
    reset = reset.to(input.device)
    return reset.unsqueeze(0 if spec.batch_first else 1) if unbatched else reset


def check_lengths(lengths: Lengths, T: int, B: int, spec: Spec, unbatched: bool) -> Tensor:
    """Lengths [B] of rows; raises for others. Those on a device are not looked at."""
    batch_first = spec.batch_first
    lengths = packing.as_lengths(lengths, T, B, batch_first=batch_first, unbatched=unbatched)
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed():
        packing.check_length_values(lengths, T)
    return lengths


def listed(weights: Iterable[Tensor]) -> list[Tensor]:
    """`weights` as a list; raises for what is no iterable."""
    if not isinstance(weights, Iterable):
        raise TypeError(f"weights: expected an iterable of Tensors, got {type(weights).__name__}")
    return list(weights)


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is at work on this call."""
    if torch._C._are_functorch_transforms_active():  # which torch.compile can look at, too
        return True
    return not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0
