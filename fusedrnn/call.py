"""A call's facts, gathered once and passed whole: what is static, and its tensors."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrnn import cells

# What a time loop may have to do besides the cell, by the names in `Call.loop_features`.
LOOP_FEATURES = {
    "reset": "resets inside a sequence",
    "reset_state": "resets to a given state",
    "recurrent_dropout": "recurrent dropout",
    "zoneout": "zoneout",
    "clip_gradient": "gradient clipping inside the loop",
}
# What several backends refuse. ("states" are had in other ways beside every backend's loop.)
STATES_COMPILED = "torch.compile sees the states of all steps only in plain torch operators"
TRANSFORMED = "torch.func transforms and forward-mode AD need plain torch operators"


class Spec(NamedTuple):
    """What is static about a call of a stack: plain values, which a custom op takes one by one.

    Attributes:
        cell: a name in `fusedrnn.cells.REGISTRY`.
        input_size, hidden_size, num_layers: I, H, L. proj_size: P, or 0. num_heads: of a layer,
            each with H / num_heads units that no other head's reach.
        backend: the one that was asked for, or None; once chosen, the one that runs.
        save: what the fused backward reads, "gates" or "states", or an op's with torch's kernels,
            "workspace"; None if there will be none, and no states are asked for.
        autocast: the dtype, as "bfloat16", in which an op is to run the aten backend, or None.
        clip: bound of the gradient of each h_t inside the loop; 0 for none.
        trained_from: the lowest layer that a gradient gets to.
        reversed_layers: as bits, the layers of one direction that run backwards in time.
        residual: whether a layer's input is added to its output, where they have one size.
        hidden_sizes: of each layer, if they differ, or None. hidden_size is the largest then, and
            the units of a smaller layer are the first of those of its states. An op has one size.
    """

    cell: str
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    bidirectional: bool = False
    proj_size: int = 0
    num_heads: int = 1
    training: bool = False
    backend: str | None = None
    save: str | None = "gates"
    autocast: str | None = None
    clip: float = 0.0
    trained_from: int = 0
    reversed_layers: int = 0
    residual: bool = False
    hidden_sizes: tuple[int, ...] | None = None


def directions(spec: Spec) -> int:
    """D."""
    return 2 if spec.bidirectional else 1


def reverses(spec: Spec, layer: int = 0) -> tuple[bool, ...]:
    """Of each direction of that layer, whether it runs backwards in time."""
    return (False, True) if spec.bidirectional else (bool(spec.reversed_layers >> layer & 1),)


def adds_input(spec: Spec, layer: int = 0) -> bool:
    """Whether that layer's input, before its noise, is added to its output."""
    return spec.residual and output_features(spec, layer - 1) == output_features(spec, layer)


def output_features(spec: Spec, layer: int) -> int:
    """The features of that layer's output; before the first layer, of the input."""
    if layer < 0:
        return spec.input_size
    return directions(spec) * (spec.proj_size or size_of(spec, layer))


def size_of(spec: Spec, layer: int) -> int:
    """H of that layer."""
    return spec.hidden_sizes[layer] if spec.hidden_sizes else spec.hidden_size


def cell_of(spec: Spec) -> cells.Cell:
    """The cell as it runs: with a stage more, where h is projected."""
    return cells.get(spec.cell, projected=spec.proj_size > 0)


def units_of(spec: Spec) -> int:
    """Units of the widest stage of a layer."""
    return cells.get(spec.cell).units(spec.hidden_size)


def heads_of(spec: Spec) -> int:
    """Heads that have weights of their own: what is diagonal already has one."""
    return 1 if cells.get(spec.cell).diagonal else spec.num_heads


def widths(spec: Spec) -> tuple[int, ...]:
    """The features of each of the cell's S states: h may be projected."""
    others = len(cells.get(spec.cell).states) - 1
    return (spec.proj_size or spec.hidden_size, *(spec.hidden_size,) * others)


def weights_per_direction(spec: Spec) -> int:
    """How many parameters a layer and direction has."""
    cell = cells.get(spec.cell)
    own = len(cell.own_shapes(1, spec.bias)) if cell.dense else len(cell.own)
    return 2 + 2 * spec.bias + bool(spec.proj_size) + own


class Weights(NamedTuple):
    """The parameters of one layer and direction, in torch's order.

    Where the cell normalises W_ih x, b_ih is the sum of both biases.
    """

    w_ih: Tensor  # [G * H, I]
    # [G * H, H]; [G * H, P] with a projection to P; [heads, G * H/heads, H/heads]; diagonal [G * H]
    w_hh: Tensor
    b_ih: Tensor | None  # [G * H]
    b_hh: Tensor | None  # [G * H]
    w_hr: Tensor | None  # [P, H]
    params: tuple[Tensor, ...]  # the vectors of the cell's own, each [H]
    w_norm: Tensor | None = None  # [G * H], of the cell's `input_norm`
    # Of each Dense stage, its matrices, one under the other, [sums * units, K], in every head, and
    # its biases.
    dense: tuple[tuple[Tensor, Tensor | None], ...] = ()


def split_weights(spec: Spec, flat: Sequence[Tensor]) -> list[Weights]:
    """A flat list of parameters as one `Weights` for each layer and direction."""
    cell, size, groups = cells.get(spec.cell), weights_per_direction(spec), []
    for start in range(0, len(flat), size):
        rest = list(flat[start : start + size])
        w_ih, w_hh, rest = rest[0], rest[1], rest[2:]
        b_ih, b_hh, rest = (rest[0], rest[1], rest[2:]) if spec.bias else (None, None, rest)
        w_hr, rest = (rest[0], rest[1:]) if spec.proj_size else (None, rest)
        rest, matrices = rest[: len(cell.own)], rest[len(cell.own) :]
        params = [
            part for own, t in zip(cell.own, rest, strict=True) for part in t.chunk(own.vectors)
        ]
        w_norm = None
        if cell.input_norm is not None:
            w_norm, params = rest[0], params[cell.own[0].vectors :]
            b_ih, b_hh = None if b_ih is None or b_hh is None else b_ih + b_hh, None
        dense = _dense(cell, spec.bias, matrices)
        groups.append(Weights(w_ih, w_hh, b_ih, b_hh, w_hr, tuple(params), w_norm, dense))
    return groups


def _dense(
    cell: cells.Cell, bias: bool, matrices: list[Tensor]
) -> tuple[tuple[Tensor, Tensor | None], ...]:
    """`Weights.dense`, from the parameters in order."""
    found, given = [], iter(matrices)
    for stage in cell.dense:
        receives: Any = stage.receives
        weights = [next(given) for _ in receives.weights]
        biases = [next(given) for _ in receives.biases if bias]
        found.append((_joined(weights, -2), _joined(biases, 0) if biases else None))
    return tuple(found)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class Operands(NamedTuple):
    """The tensors of a call that may have a gradient."""

    input: Tensor  # [T, B, I], [B, T, I] with batch_first, or packed [N, I]
    state: tuple[Tensor, ...]  # S x [L * D, B, H]
    reset_state: tuple[Tensor, ...]  # what a reset sets: as `state`, or () for zeros
    weights: tuple[Tensor, ...]  # layer 0 forward, layer 0 reverse, layer 1 forward, ...

    def flat(self) -> tuple[Tensor, ...]:
        """All of them, one behind the other."""
        return (self.input, *self.state, *self.reset_state, *self.weights)


def operands_of(spec: Spec, flat: Sequence[Tensor]) -> Operands:
    """What `Operands.flat` took apart."""
    S = len(cells.get(spec.cell).states)
    first_weight = len(flat) - spec.num_layers * directions(spec) * weights_per_direction(spec)
    state, reset_state = flat[1 : 1 + S], flat[1 + S : first_weight]
    return Operands(flat[0], tuple(state), tuple(reset_state), tuple(flat[first_weight:]))


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives a call with such an input, or None: it leaves float64 alone."""
    device = input.device.type
    if device == "meta" or input.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


class LayerMasks(NamedTuple):
    """The noise of one layer, of which the first two act on its input."""

    dropout: Tensor | None = None  # bool, in the shape of the input: what is kept, and scaled
    input: Tensor | None = None  # broadcasts over the time steps of a row
    h: Tensor | None = None  # [D, B, H], multiplies h_{t-1} before the recurrent product
    zoneout: Tensor | None = None  # bool [*rows, D, S, H]: keep the state; or [S] floats


NO_MASKS = LayerMasks()


class Masks(NamedTuple):
    """The tensors of a call without a gradient: which steps exist, where sequences begin, noise."""

    lengths: Tensor | None = None  # [B], for padded input
    batch_sizes: Tensor | None = None  # [T] on the CPU, for packed input
    reset: Tensor | None = None  # [T, B] bool, or [B, T] with batch_first
    layers: tuple[LayerMasks, ...] = ()  # () where there is no noise

    def flat(self) -> list[Tensor | None]:
        """All of them, one behind the other."""
        noise = [mask for masks in self.layers for mask in masks]
        return [self.lengths, self.batch_sizes, self.reset, *noise]

    def of_layer(self, layer: int) -> LayerMasks:
        """The noise of that layer."""
        return self.layers[layer] if self.layers else NO_MASKS


def masks_of(flat: Sequence[Tensor | None]) -> Masks:
    """What `Masks.flat` took apart."""
    size = len(NO_MASKS)
    layers = [LayerMasks(*flat[at : at + size]) for at in range(3, len(flat), size)]
    return Masks(flat[0], flat[1], flat[2], tuple(layers))


def one_layer(
    spec: Spec, operands: Operands, masks: Masks, layer: int
) -> tuple[Spec, Operands, Masks]:
    """The call of that layer alone. The input stays the stack's, before the layer's masks."""
    D, size = directions(spec), weights_per_direction(spec) * directions(spec)
    part: Any = slice(layer * D, (layer + 1) * D)
    if spec.hidden_sizes:
        part = (part, ..., slice(spec.hidden_sizes[layer]))
    operands = Operands(
        operands.input,
        tuple([s[part] for s in operands.state]),
        tuple([s[part] for s in operands.reset_state]),
        operands.weights[layer * size : (layer + 1) * size],
    )
    masks = masks._replace(layers=(masks.of_layer(layer),) if masks.layers else ())
    one = spec._replace(
        num_layers=1, input_size=output_features(spec, layer - 1), trained_from=0,
        reversed_layers=spec.reversed_layers >> layer & 1, hidden_sizes=None,
        hidden_size=size_of(spec, layer),
    )  # fmt: skip
    return one, operands, masks


def in_turn(
    spec: Spec, operands: Operands, masks: Masks, run: Callable[[Spec, Operands, Masks], Any]
) -> tuple[Tensor, list[tuple[Any, ...]]]:
    """A stack, of which `run` computes one layer after the other: the output, and of each layer the
    rest of what `run` returned."""
    input, rests = operands.input, []
    for index in range(spec.num_layers):
        one, here, noise = one_layer(spec, operands, masks, index)
        here = here._replace(input=masked_input(spec, input, masks.of_layer(index)))
        within = tuple([m._replace(dropout=None, input=None) for m in noise.layers])
        one = one._replace(dropout=0.0, residual=False)
        output, *rest = run(one, here, noise._replace(layers=within))
        # Under autocast torch's operators return another dtype than they are given.
        input = output + input.to(output.dtype) if adds_input(spec, index) else output
        rests.append(tuple(rest))
    return input, rests


def joined(finals: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The S states [L * D, *, H] from those of each layer, with zeros where one has fewer units."""
    if len(finals) == 1:
        return finals[0]
    states = []
    for parts in zip(*finals, strict=True):
        H = max([s.shape[-1] for s in parts])
        full = [s if s.shape[-1] == H else F.pad(s, (0, H - s.shape[-1])) for s in parts]
        states.append(torch.cat(full))
    return tuple(states)


def masked_input(spec: Spec, input: Tensor, masks: LayerMasks, *, backward: bool = False) -> Tensor:
    """What enters a layer, from the stack's input or the output of the layer below; `backward`, the
    gradient of that output from the gradient of what enters."""
    if masks.input is not None and backward:
        input = input * masks.input.to(input.dtype)
    if masks.dropout is not None:
        input = input * masks.dropout * (1 / (1 - spec.dropout) if spec.dropout < 1 else 0.0)
    if masks.input is not None and not backward:
        input = input * masks.input.to(input.dtype)
    return input


class Call(NamedTuple):
    """What a backend needs to know of a call to say whether it can run it.

    Attributes:
        dtype: in which it is computed: the input's, or under autocast that of autocast.
        loop_features: what a time loop has to do besides the cell: names in LOOP_FEATURES, and
            "states", all of them at all steps.
        autocast: whether autocast is at work on such an input.
        most_resets: of a row, where an LSTM on a CPU is trained, and they can be looked at; else 0.
    """

    spec: Spec
    device: torch.device
    dtype: torch.dtype
    T: int
    B: int
    packed: bool = False
    lengths: bool = False
    reset: bool = False
    needs_grad: bool = False
    transformed: bool = False
    loop_features: tuple[str, ...] = ()
    return_states: bool = False
    autocast: bool = False
    input_dtype: torch.dtype = torch.float32
    most_resets: int = 0
