"""Regularisers of recurrent networks: what is drawn, when, and from which generator.

All noise is drawn before the time loop, as tensors; the loop itself is deterministic. So a
backward pass, a second derivative, activation checkpointing and every backend see one mask.

Activation checkpointing repeats a call in the backward pass. It restores torch's global generator
first, so noise from that generator is the same, but it does not restore a user's generator. A draw
from a user's generator that a checkpoint may repeat therefore also takes a number from torch's
global generator, as a ticket, and keeps the user's generator's state under it. The repeated call
draws the same ticket and finds the state.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrnn.call import (
    LayerMasks,
    Operands,
    Spec,
    directions,
    output_features,
    weights_per_direction,
)


@dataclass(frozen=True)
class Regularizers:
    """The regularisers of a module; the same names are keyword arguments of the modules.

        x_t  -> x_t * m_x / (1 - p)          input_dropout, one m_x for all time steps
        h_gates = (h_{t-1} * m_h / (1 - p)) @ W_hh^T + b_hh
                                             recurrent_dropout, one m_h for all time steps
        W_hh -> W_hh * m_w / (1 - p)         weight_drop, one m_w for a whole call
        s_t  -> d * s_{t-1} + (1 - d) * s_t  zoneout of a state s (h, c), d drawn in every step

    In training m ~ Bernoulli(1 - p) and d ~ Bernoulli(p). In evaluation there is no dropout,
    and zoneout takes d at its expectation p.

    Attributes:
        input_dropout: p of the features of each layer's input, for all its time steps alike;
            layer 0 included (Gal & Ghahramani 2016). The modules' `dropout`, as torch's, draws
            for every step anew, and not for layer 0.
        recurrent_dropout: p of the units of h_{t-1} where it enters the gates (Gal &
            Ghahramani 2016, weights tied: one mask for all gates). What reaches h_t or c_t
            pointwise is not dropped; of r * h_{t-1} in gru_reset_before, the same units are.
            Semeniuta et al. 2016, who drop the candidate g_t instead, is not implemented.
        weight_drop: p of the elements of every W_hh (Merity et al. 2018). It happens outside
            the loop, and so on every backend.
        zoneout: p of keeping a unit's previous state; one number for all states, or one for
            each (h, then c). An LSTM's h_t is computed from the c_t before its zoneout
            (Krueger et al. 2017).
        clip_gradient: c > 0 clips the gradient that reaches h_t, from its output and from step
            t + 1 together, to [-c, c] in every step of the backward loop. (Graves 2013 clips the
            gradient of the gates instead, one product earlier.) The gradient of c_t is not
            clipped: f <= 1 keeps it from exploding. None: no clipping. The forward pass is
            untouched, and gradients are then on purpose not those of the function.
        generator: of all noise, `dropout` included, on the module's device; None is torch's
            global one, which `torch.manual_seed` seeds, and from which then no number is taken,
            except where a call may have to be repeated: inside a checkpoint or a compiled
            function, and under no_grad.
    Raises:
        ValueError: a probability outside [0, 1), or a clip_gradient that is not positive.
    Source: Gal & Ghahramani 2016, arXiv:1512.05287; Merity, Keskar & Socher 2018,
        arXiv:1708.02182; Krueger et al. 2017, arXiv:1606.01305; Graves 2013, arXiv:1308.0850.
    """

    input_dropout: float = 0.0
    recurrent_dropout: float = 0.0
    weight_drop: float = 0.0
    zoneout: float | tuple[float, ...] = 0.0
    clip_gradient: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        for name in ("input_dropout", "recurrent_dropout", "weight_drop"):
            object.__setattr__(self, name, _probability(name, getattr(self, name)))
        if isinstance(self.zoneout, (tuple, list)):
            zoneout = tuple(_probability("zoneout", p) for p in self.zoneout)
        else:
            zoneout = _probability("zoneout", self.zoneout)
        object.__setattr__(self, "zoneout", zoneout)
        clip = self.clip_gradient
        if clip is not None and not (_is_number(clip) and clip > 0):
            raise ValueError(f"clip_gradient: expected a positive number or None, got {clip!r}")
        if clip is not None:
            object.__setattr__(self, "clip_gradient", float(clip))
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(
                f"generator: expected a torch.Generator, got {type(self.generator).__name__}"
            )
        object.__setattr__(self, "_handle", _handle_of(self.generator))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or a pickle, in which a handle, if there is one, means nothing."""
        self.__dict__.update(state)
        object.__setattr__(self, "_handle", _handle_of(self.generator))

    def zoneout_rates(self, states: int) -> tuple[float, ...]:
        """One probability for each of the cell's states. Raises ValueError on another number."""
        if not isinstance(self.zoneout, tuple):
            return (self.zoneout,) * states
        if len(self.zoneout) != states:
            raise ValueError(
                f"zoneout: expected one probability or {states}, one for each state of the cell, "
                f"got {self.zoneout}"
            )
        return self.zoneout

    def loop_features(self, *, training: bool) -> tuple[str, ...]:
        """What a backend must do in its time loop: names in `fusedrnn.call.LOOP_FEATURES`."""
        names = []
        if training and self.recurrent_dropout:
            names.append("recurrent_dropout")
        if any(self.zoneout) if isinstance(self.zoneout, tuple) else self.zoneout:
            names.append("zoneout")
        if self.clip_gradient is not None:
            names.append("clip_gradient")
        return tuple(names)

    def changes_output(self, *, training: bool) -> bool:
        """Whether a call gives another output than one without regularisers."""
        if training:
            return self.stochastic()
        return any(self.zoneout) if isinstance(self.zoneout, tuple) else bool(self.zoneout)

    def needed(self, *, training: bool) -> str | None:
        """None where a forward pass is as without regularisers, as in evaluation but for zoneout;
        else what is missing without them, and what to do about it."""
        if not training and not self.changes_output(training=False):
            return None
        return f"{self} (set regularizers = None to drop them; only zoneout acts in eval mode too)"

    def stochastic(self) -> bool:
        """Whether a call in training mode draws anything."""
        zoneout = any(self.zoneout) if isinstance(self.zoneout, tuple) else self.zoneout
        return bool(self.input_dropout or self.recurrent_dropout or self.weight_drop or zoneout)

    def __str__(self) -> str:
        return ", ".join(
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        )


def _is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)  # NumPy's too


def _probability(name: str, p) -> float:
    if not _is_number(p) or not 0 <= p < 1:
        raise ValueError(f"{name}: expected a probability in [0, 1), got {p!r}")
    return float(p)


# Generators by number, by which a compiled graph, which can hold no generator, names them.
_generators: WeakValueDictionary[int, torch.Generator] = WeakValueDictionary()
_handles: WeakKeyDictionary[torch.Generator, int] = WeakKeyDictionary()
_numbers = itertools.count(1)
# Of each generator, what its state was when the ticket was drawn, oldest first.
_states: WeakKeyDictionary[torch.Generator, OrderedDict[int, Tensor]] = WeakKeyDictionary()
MOST_STATES = 4096  # of 5 kB on a CPU


def _handle_of(generator: torch.Generator | None) -> int:
    if generator is None:
        return 0
    if generator not in _handles:
        _handles[generator] = next(_numbers)
        _generators[_handles[generator]] = generator
    return _handles[generator]


NO_REGULARIZERS = Regularizers()


class Noise:
    """The noise of one call: uniform numbers from the generator of its regularisers.

    Args:
        regularizers: of the call.
        after: a tensor of the call. In a graph, each draw has the one before it as an argument,
            and the first has `after`: a compiler keeps the order of what depends on each other.
    """

    def __init__(self, regularizers: Regularizers, after: Tensor | None = None):
        self.regularizers: Regularizers = regularizers
        self.after: Tensor | None = after

    def uniform(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """float32 in [0, 1)."""
        handle = self.regularizers._handle  # pyright: ignore[reportAttributeAccessIssue]
        if handle == 0:
            return torch.rand(shape, device=device)
        if not torch.compiler.is_compiling():
            return _draw(shape, handle, 0, None, device=device)
        drawn: Tensor = draw_op(shape, handle, _new_number(), self.after, device=device)
        self.after = drawn
        return drawn


def _new_number() -> int:
    return next(_numbers)


# In a graph, two draws of one shape would be merged into one if nothing told them apart. As
# torch.compiler.assume_constant_result (see `aten`): each place gets a number when it is traced.
_new_number._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _draw(
    shape: Sequence[int], handle: int, place: int, after: Tensor | None, *, device: torch.device
) -> Tensor:
    generator = _generators.get(handle)
    if generator is None:
        raise RuntimeError("generator: the generator that this was compiled with is gone")
    # Where calls are repeated by other means than checkpoints, there are no tickets.
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if capturing or torch._C._are_functorch_transforms_active():
        return torch.rand(shape, device=device, generator=generator)
    repeats = torch._C._current_graph_task_id() != -1  # autograd is at work: a checkpoint's
    # A checkpoint runs a call first without autograd, or with hooks in place of saved tensors. In
    # a compiled function, which cannot tell, the op's body runs without autograd.
    autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    hooks = autograd._top_saved_tensors_default_hooks(True)
    if torch.is_grad_enabled() and hooks is None and not repeats:
        return torch.rand(shape, device=device, generator=generator)
    states = _states.setdefault(generator, OrderedDict())
    ticket = int(torch.randint(2**63 - 1, (), device="cpu"))
    if not repeats:
        states[ticket] = generator.get_state()
        if len(states) > MOST_STATES:
            states.popitem(last=False)
    elif ticket in states:
        generator = torch.Generator(generator.device).set_state(states[ticket])
    else:
        raise RuntimeError(
            "generator: expected a call in a backward pass to repeat an earlier one "
            f"(checkpoint with preserve_rng_state=True), among the last {MOST_STATES} draws; "
            "this one's masks are not known"
        )
    return torch.rand(shape, device=device, generator=generator)


draw_op: Any = torch.library.custom_op(
    "fusedrnn::draw", _draw, mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)


@draw_op.register_fake
def _(shape, handle, place, after, *, device):
    return torch.empty(shape, device=device)


def scaled_mask(noise: Noise, shape: Sequence[int], p: float, like: Tensor) -> Tensor:
    """0 with probability p, else 1 / (1 - p), in the dtype of `like`."""
    return (noise.uniform(shape, like.device) >= p).to(like.dtype) * (1 / (1 - p))


def draw_masks(
    spec: Spec, noise: Noise, operands: Operands, batch_sizes: Tensor | None
) -> tuple[LayerMasks, ...]:
    """The noise of every layer, drawn in the order in which layers use it; () if there is none."""
    regularizers, input = noise.regularizers, operands.input
    in_loop = regularizers.loop_features(training=spec.training)
    p = spec.dropout if spec.training and spec.num_layers > 1 else 0.0
    input_dropout = spec.training and regularizers.input_dropout > 0
    recurrent, zoneout = "recurrent_dropout" in in_loop, "zoneout" in in_loop
    if not (p or input_dropout or recurrent or zoneout):
        return ()
    D, layers = directions(spec), []
    # Layers of plain operators hand each other the transpose of what they computed.
    transposed = spec.batch_first and batch_sizes is None and spec.backend != "triton"
    transposed = transposed and not torch.compiler.is_compiling()
    for index in range(spec.num_layers):
        width = output_features(spec, index - 1)
        state = tuple([s[index * D : (index + 1) * D] for s in operands.state])
        if spec.hidden_sizes:
            state = tuple([s[..., : spec.hidden_sizes[index]] for s in state])
        rows = input.shape[:-1]
        masks = LayerMasks(
            dropout=kept_by_dropout(noise, (*rows, width), p, input, transposed)
            if p and index
            else None,
            input=draw_input_mask(noise, width, input, batch_sizes, spec.batch_first)
            if input_dropout
            else None,
            h=draw_h_mask(noise, state[0]) if recurrent else None,
            zoneout=zoneout_of(noise, rows, state, training=spec.training) if zoneout else None,
        )
        layers.append(masks)
    return tuple(layers)


def drop_weights(spec: Spec, noise: Noise, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Every W_hh, the second of its layer and direction, with elements dropped."""
    p, size = noise.regularizers.weight_drop, weights_per_direction(spec)
    return tuple([
        dropout(noise, w, p) if index % size == 1 else w
        for index, w in enumerate(weights)
    ])  # fmt: skip


def dropout(noise: Noise, tensor: Tensor, p: float) -> Tensor:
    """torch's dropout."""
    if noise.regularizers.generator is None:
        return F.dropout(tensor, p, training=True)
    return tensor * scaled_mask(noise, tensor.shape, p, tensor)


def kept_by_dropout(
    noise: Noise, shape: Sequence[int], p: float, like: Tensor, time_major: bool = False
) -> Tensor:
    """bool: what torch's dropout keeps of a tensor of that shape and the dtype of `like`. torch
    draws in the order of the memory: in that of time where [B, T, *] is a view of [T, B, *]."""
    if noise.regularizers.generator is not None:
        return noise.uniform(shape, like.device) >= p
    ones = torch.ones(shape, dtype=like.dtype, device=like.device)
    if time_major:
        ones = ones.transpose(0, 1).contiguous().transpose(0, 1)
    return F.dropout(ones, p, training=True) != 0


def draw_h_mask(noise: Noise, h_0: Tensor) -> Tensor:
    """[D, B, H], by which h_{t-1} is multiplied before the recurrent product."""
    return scaled_mask(noise, h_0.shape, noise.regularizers.recurrent_dropout, h_0)


def draw_input_mask(
    noise: Noise, width: int, input: Tensor, batch_sizes: Tensor | None, batch_first: bool
) -> Tensor:
    """What multiplies a layer's input: the same in all time steps of a row."""
    p = noise.regularizers.input_dropout
    if batch_sizes is not None:
        mask = scaled_mask(noise, (int(batch_sizes[0]), width), p, input)
        return torch.cat([mask[:n] for n in batch_sizes.tolist()])
    shape = (input.shape[0], 1, width) if batch_first else (1, input.shape[1], width)
    return scaled_mask(noise, shape, p, input)


def zoneout_of(
    noise: Noise, rows: Sequence[int], state: tuple[Tensor, ...], *, training: bool
) -> Tensor:
    """What the time loop needs for zoneout, in one tensor.

    Args:
        rows: (T, B), (B, T) or (N,), as the input's.
        state: S tensors [D, B, H].
    Returns:
        bool [*rows, D, S, H], True where a unit keeps its state; or in evaluation [S], the
        probabilities.
    """
    rates = noise.regularizers.zoneout_rates(len(state))
    device, wide = state[0].device, torch.promote_types(state[0].dtype, torch.float32)
    # Filled on the device: a copy from the host would wait for it, and break graph capture.
    p = torch.cat([torch.full((1,), rate, dtype=wide, device=device) for rate in rates])
    if not training:
        return p
    D, H = state[0].shape[0], state[0].shape[-1]
    shape = (*rows, D, len(state), H)
    return noise.uniform(shape, device) < p[:, None]


class ClipGradient(torch.autograd.Function):
    """The identity, whose backward clips. Differentiable again, and under torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, limit: float) -> Tensor:
        return tensor.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.limit = inputs[1]

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return d_output.clamp(-ctx.limit, ctx.limit), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tangent.clone()
