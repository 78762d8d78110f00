"""Regularisers of recurrent networks: what is drawn, when, and from which generator.

All noise is drawn before the time loop, as tensors; the loop itself is deterministic. So a
backward pass, a second derivative, activation checkpointing and every backend see one mask.
"""

from dataclasses import dataclass, fields
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor


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
            pointwise is not dropped. Semeniuta et al. 2016, who drop the candidate g_t instead,
            is not implemented.
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
        generator: of the noise, on the module's device; None is torch's global one, which
            `torch.manual_seed` seeds.
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

    def inside_loop(self, *, training: bool) -> tuple[str, ...]:
        """What a backend must do in its time loop: names that `dispatch` knows."""
        names = []
        if training and self.recurrent_dropout:
            names.append("recurrent_dropout")
        if any(self.zoneout) if isinstance(self.zoneout, tuple) else self.zoneout:
            names.append("zoneout")
        if self.clip_gradient is not None:
            names.append("clip_gradient")
        return tuple(names)

    def needed(self, *, training: bool) -> str | None:
        """None where a forward pass is as without regularisers, as in evaluation but for zoneout;
        else what is missing without them, and what to do about it."""
        if not training and "zoneout" not in self.inside_loop(training=False):
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


def make(given: dict) -> Regularizers | None:
    """Takes the regularisers out of a constructor's keyword arguments; None if there are none."""
    own = {f.name: given.pop(f.name) for f in fields(Regularizers) if f.name in given}
    made = Regularizers(**own)
    return None if made == Regularizers(generator=made.generator) else made


def scaled_mask(shape, p: float, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """0 with probability p, else 1 / (1 - p), in the dtype of `like`."""
    uniform = torch.rand(shape, device=like.device, generator=generator)
    return (uniform >= p).to(like.dtype) * (1 / (1 - p))


def drop_weight(w_hh: Tensor, own: Regularizers) -> Tensor:
    """W_hh of one call in training."""
    if own.generator is None:
        return F.dropout(w_hh, own.weight_drop, training=True)
    return w_hh * scaled_mask(w_hh.shape, own.weight_drop, w_hh, own.generator)


def draw_h_mask(own: Regularizers, h_0: Tensor) -> Tensor:
    """[D, B, H], by which h_{t-1} is multiplied before the recurrent product."""
    return scaled_mask(h_0.shape, own.recurrent_dropout, h_0, own.generator)


def draw_input_mask(own: Regularizers, input: Tensor, batch_sizes, batch_first: bool) -> Tensor:
    """What multiplies a layer's input: the same in all time steps of a row."""
    width = input.shape[-1]
    if batch_sizes is not None:
        mask = scaled_mask((int(batch_sizes[0]), width), own.input_dropout, input, own.generator)
        return torch.cat([mask[:n] for n in batch_sizes.tolist()])
    shape = (input.shape[0], 1, width) if batch_first else (1, input.shape[1], width)
    return scaled_mask(shape, own.input_dropout, input, own.generator)


def zoneout_of(
    own: Regularizers, rows: tuple[int, ...], state: tuple[Tensor, ...], *, training: bool
) -> Tensor:
    """What the time loop needs for zoneout, in one tensor.

    Args:
        rows: (T, B), (B, T) or (N,), as the input's.
        state: S tensors [D, B, H].
    Returns:
        bool [*rows, D, S, H], True where a unit keeps its state; or in evaluation [S], the
        probabilities.
    """
    rates = own.zoneout_rates(len(state))
    device, wide = state[0].device, torch.promote_types(state[0].dtype, torch.float32)
    # Filled on the device: a copy from the host would wait for it, and break graph capture.
    p = torch.cat([torch.full((1,), rate, dtype=wide, device=device) for rate in rates])
    if not training:
        return p
    D, H = state[0].shape[0], state[0].shape[-1]
    shape = (*rows, D, len(state), H)
    return torch.rand(shape, device=device, generator=own.generator) < p[:, None]


class ClipGradient(torch.autograd.Function):
    """The identity, whose backward clips. Differentiable again, and under torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, limit: float) -> Tensor:
        return tensor.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.limit = inputs[1]

    @staticmethod
    def backward(ctx, d_output):  # pyright: ignore[reportIncompatibleMethodOverride]
        return d_output.clamp(-ctx.limit, ctx.limit), None

    @staticmethod
    def jvp(ctx, tangent, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        return tangent.clone()
