"""Problems for the time loops, and what the answers must be."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fusedrnn.call import Weights
from fusedrnn.cells import Cell, Mean, get
from fusedrnn.kernels import Rows, scan_backward, scan_forward


@dataclass(frozen=True)
class Case:
    cell: Cell
    T: int = 4
    B: int = 5
    H: int = 17
    D: int = 2
    lengths: tuple[int, ...] | None = None
    layout: str = "time_first"  # or "batch_first" or "packed"
    bias: bool = True
    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    save: str = "gates"
    P: int = 0  # what h is projected to
    heads: int = 1
    reverse: bool = False  # a single direction, backwards in time

    def reverses(self, d: int) -> bool:
        return d == 1 or self.reverse

    @property
    def whole_cell(self) -> Cell:
        """The cell with its projection."""
        return get(self.cell.name, projected=True) if self.P else self.cell

    def widths(self) -> tuple[int, ...]:
        """Of the states."""
        return (self.P or self.H, *(self.H for _ in self.cell.states[1:]))


@dataclass
class Problem:
    """Arguments in the case's dtype, sequences as [T, B, D, ...]."""

    x_gates: Tensor
    w_hh: Tensor  # [D, G * H, P or H], [D, heads, G * H / heads, H / heads], diagonal [D, G * H]
    w_hr: Tensor | None  # [D, P, H]
    b_hh: Tensor | None
    state: tuple[Tensor, ...]
    params: tuple[Tensor, ...]
    d_output: Tensor
    d_final: tuple[Tensor, ...]
    lengths: Tensor = field(default_factory=lambda: torch.empty(0))

    def directions(self) -> list[Weights]:
        """What the kernels read of each direction's weights."""
        nothing = [None] * len(self.w_hh)
        b_hh = nothing if self.b_hh is None else self.b_hh
        w_hr = nothing if self.w_hr is None else self.w_hr
        return [
            Weights(w, w, None, b, r, tuple(p[d] for p in self.params))
            for d, (w, b, r) in enumerate(zip(self.w_hh, b_hh, w_hr, strict=True))
        ]

    def leaves(self) -> list[Tensor]:
        """Everything that has a gradient, in the order of `Answer.gradients`."""
        others = [t for t in (self.b_hh, self.w_hr) if t is not None]
        return [self.x_gates, self.w_hh, *others, *self.state, *self.params]

    def dense(self, d: int, G: int) -> Tensor:
        """W_hh of one direction as [G, H, K], zeros between heads, and beside a diagonal."""
        if self.w_hh.dim() == 2:
            return torch.diag_embed(self.w_hh[d].unflatten(0, (G, -1)))
        if self.w_hh.dim() == 3:
            return self.w_hh[d].unflatten(0, (G, -1))
        blocks = [w.unflatten(0, (G, -1)) for w in self.w_hh[d]]
        return torch.stack([torch.block_diag(*(b[g] for b in blocks)) for g in range(G)])


@dataclass
class Answer:
    output: Tensor
    final: tuple[Tensor, ...]
    gradients: list[Tensor]

    def named(self) -> list[tuple[str, Tensor]]:
        final = [(f"final[{i}]", f) for i, f in enumerate(self.final)]
        gradients = [(f"gradient[{i}]", g) for i, g in enumerate(self.gradients)]
        return [("output", self.output), *final, *gradients]


def problem(case: Case, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(case.dtype)

    T, B, H, D, G = case.T, case.B, case.H, case.D, len(case.cell.gates)
    lengths = torch.tensor(case.lengths if case.lengths is not None else [T] * B)
    reached = (torch.arange(T)[:, None] < lengths)[:, :, None]
    widths, heads = case.widths(), case.heads
    w_hh = (G * H, widths[0]) if heads == 1 else (heads, G * H // heads, H // heads)
    w_hh = (G * H,) if case.cell.diagonal else w_hh
    return Problem(
        x_gates=draw(T, B, D, G, H, scale=case.scale),
        w_hh=draw(D, *w_hh, scale=case.scale / w_hh[-1] ** 0.5),
        b_hh=draw(D, G * H) if case.bias else None,
        # (A normaliser, which divides, is not near 0.)
        state=tuple(
            draw(D, B, width).abs() + 1 if name == "n" else draw(D, B, width)
            for name, width in zip(case.cell.states, widths, strict=True)
        ),
        params=tuple(draw(D, H) for _ in case.cell.params),
        d_output=draw(T, B, D, widths[0]) * reached[..., None],  # of padding nobody has one
        d_final=tuple(draw(D, B, width) for width in widths),
        w_hr=draw(D, case.P, H, scale=H**-0.5) if case.P else None,
        lengths=lengths,
    )


def loop(case: Case, p: Problem, dtype: torch.dtype) -> Answer:
    """The recurrence in plain torch, differentiated by autograd: knows no cell.backward."""
    p = Problem(
        **{
            name: tuple(t.to(dtype) for t in value)
            if isinstance(value, tuple)
            else value.to(dtype)
            if value is not None and name != "lengths"
            else value
            for name, value in vars(p).items()
        }
    )
    leaves = [leaf.requires_grad_() for leaf in p.leaves()]
    T, D = case.T, case.D
    outputs: list[list] = [[None] * D for _ in range(T)]
    finals = []
    for d in range(D):
        state = tuple(s[d] for s in p.state)
        params = tuple(q[d] for q in p.params)
        for t in range(T - 1, -1, -1) if case.reverses(d) else range(T):
            x = p.x_gates[t, :, d].unbind(1)
            new, _, _ = run_stages(case, p, d, x, state, params)
            active = (t < p.lengths)[:, None]
            state = tuple(torch.where(active, n, s) for n, s in zip(new, state, strict=True))
            outputs[t][d] = torch.where(active, state[0], torch.zeros_like(state[0]))
        finals.append(state)
    output = torch.stack([torch.stack(o, 1) for o in outputs])
    final = tuple(torch.stack(f) for f in zip(*finals, strict=True))
    gradients = torch.autograd.grad(
        (output, *final), leaves, (p.d_output, *p.d_final), allow_unused=True
    )
    gradients = [
        torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True)
    ]
    return Answer(output.detach(), tuple(f.detach() for f in final), gradients)


def run_stages(case: Case, p: Problem, d: int, x_gates, state, params):
    """One step of one direction: the new states, what all stages received, the means last, and what
    they multiplied."""
    values, first, used = state, 0, 0
    received, means, factors = [], [], []
    matrices = p.dense(d, len(case.cell.gates))
    for stage in case.whole_cell.stages:
        gates = slice(first, first + len(stage.gates))
        if isinstance(stage.receives, Mean):
            parts = [v.unflatten(-1, (case.heads, -1)) for v in values[: stage.products]]
            sums = [p.mean(-1, keepdim=True).expand_as(p).flatten(-2) for p in parts]
            means += sums
        elif stage.gates:
            sums = [values[0] @ w.T for w in matrices[gates]]
            if p.b_hh is not None:
                biases = p.b_hh[d].unflatten(0, (len(matrices), -1))[gates]
                sums = [a + b for a, b in zip(sums, biases, strict=True)]
            received += sums
        else:
            sums = [values[0] @ p.w_hr[d].T]
        if stage in case.whole_cell.weighted:
            factors.append(values[0])
        own = params[used : used + len(stage.params)]
        values, _ = stage.forward(tuple(x_gates[gates]), tuple(sums), values, own)
        first, used = first + len(stage.gates), used + len(stage.params)
    return values, received + means, factors


class Layout:
    """Moves [T, B, ...] to rows [N, ...] and back."""

    def __init__(self, case: Case, lengths: Tensor):
        T, B = case.T, case.B
        self.case = case
        t, b = torch.meshgrid(torch.arange(T), torch.arange(B), indexing="ij")
        given = lengths if case.lengths is not None else None
        if case.layout == "packed":
            counts = (torch.arange(T)[:, None] < lengths).sum(1)
            offsets = counts.cumsum(0) - counts
            self.index = (offsets[:, None] + b)[t < lengths]
            self.reached = t < lengths
            self.rows = Rows(T, B, 0, 0, offsets, lengths, case.reverse)
        else:
            strides = (B, 1) if case.layout == "time_first" else (1, T)
            self.index = (t * strides[0] + b * strides[1]).flatten()
            self.reached = torch.ones(T, B, dtype=torch.bool)
            self.rows = Rows(T, B, *strides, None, given, case.reverse)

    def pack(self, x: Tensor) -> Tensor:
        rows = x.new_empty(len(self.index), *x.shape[2:])
        rows[self.index] = x[self.reached]
        return rows

    def unpack(self, rows: Tensor) -> Tensor:
        x = rows.new_zeros(self.case.T, self.case.B, *rows.shape[1:])
        x[self.reached] = rows[self.index]
        return x


def kernels(case: Case, p: Problem, plans=(None, None), precision: str = "ieee") -> Answer:
    """The same by the kernels; the products that the host does are done here."""
    cell = case.whole_cell
    layout = Layout(case, p.lengths)
    x_gates = layout.pack(p.x_gates)
    common = {"rows": layout.rows, "input_precision": precision, "heads": case.heads}
    output, final, saved, published, states = scan_forward(
        cell, x_gates, p.directions(), p.state, save=case.save, plan=plans[0], **common
    )
    stored = [layout.unpack(output), *([] if states is None else layout.unpack(states).unbind(3))]
    prev = [previous(case, p, x, i).float() for i, x in enumerate(stored)]  # [T, B, D, *]
    factors = [[prev[0][:, :, d]] for d in range(case.D)]  # what each stage multiplied
    if case.save == "states":
        assert saved is published is None
        wide = Problem(**{name: as_float(value) for name, value in vars(p).items()})
        h_gates = [None] * case.D
        for d in range(case.D):
            state, x = tuple(q[:, :, d] for q in prev), wide.x_gates[:, :, d].unbind(2)
            params = tuple(q[d] for q in wide.params)
            _, received, factors[d] = run_stages(case, wide, d, x, state, params)
            h_gates[d] = torch.stack(received, 2)
        saved = (x_gates, layout.pack(torch.stack(h_gates, 2).to(case.dtype)))
    elif published is not None:
        for d in range(case.D):
            factors[d] += layout.unpack(published)[:, :, d].float().unbind(2)
    dx_gates, dh_gates, d_state, d_params, d_projected = scan_backward(
        cell,
        layout.pack(p.d_output),
        p.d_final,
        p.directions(),
        p.state,
        output,
        states,
        saved,
        save=case.save,
        plan=plans[1],
        **common,
    )
    assert (dx_gates is dh_gates) == cell.additive
    dh = layout.unpack(dh_gates).float()  # [T, B, D, G, H]
    d_w_hh = torch.stack([weight_gradient(case, dh[:, :, d], factors[d]) for d in range(case.D)])
    others = [] if p.b_hh is None else [dh.sum((0, 1)).flatten(1)]
    if d_projected is not None:
        d_projected, last = layout.unpack(d_projected).float(), [f[-1] for f in factors]
        last = torch.stack(last, 2) * (d_projected != 0).any(-1, keepdim=True)
        others.append(torch.einsum("tbdp,tbdh->dph", d_projected, last))
    d_x = layout.unpack(dx_gates)
    return Answer(layout.unpack(output), final, [d_x, d_w_hh, *others, *d_state, *d_params])


def as_float(value):
    if isinstance(value, tuple):
        return tuple(map(as_float, value))
    return value if value is None or not value.is_floating_point() else value.float()


def weight_gradient(case: Case, dh: Tensor, factors: list[Tensor]) -> Tensor:
    """Of one direction's W_hh, from dh [T, B, G, H] and what the stages multiplied."""
    parts, first = [], 0
    for stage, factor in zip(case.whole_cell.weighted, factors, strict=True):
        if stage.gates:
            d_gates = dh[:, :, first : first + len(stage.gates)]
            parts.append(torch.einsum("tbgh,tbk->ghk", d_gates, factor))
            first += len(stage.gates)
    dense = torch.cat(parts)  # [G, H, K]
    if case.cell.diagonal:
        return dense.diagonal(dim1=1, dim2=2).flatten()
    if case.heads == 1:
        return dense.flatten(0, 1)
    size = case.H // case.heads
    heads = [slice(k * size, (k + 1) * size) for k in range(case.heads)]
    return torch.stack([dense[:, k, k].flatten(0, 1) for k in heads])


def previous(case: Case, p: Problem, stored: Tensor, index: int = 0) -> Tensor:
    """A state before every step, [T, B, D, *]: as stored one step earlier, or the initial one."""
    before = torch.empty_like(stored)
    for d in range(case.D):
        for b in range(case.B):
            length = int(p.lengths[b])
            before[length:, b, d] = 0
            steps = list(range(length))[:: -1 if case.reverses(d) else 1]
            for i, t in enumerate(steps):
                before[t, b, d] = p.state[index][d, b] if i == 0 else stored[steps[i - 1], b, d]
    return before


# The unit in which each dtype rounds what it stores.
EPS = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def shares(case: Case, ours: Answer, exact: Answer, plain: Answer) -> dict[str, float]:
    """Our largest errors, by result, as a share of what is allowed: twice that of the plain loop in
    the same dtype, and a floor, for where the plain loop happens to be more exact than it must be:
    four roundings of the largest element, and the random walk of a float32 sum over H products in
    another order. Four times with float32, of which a product is three, that lose about four
    roundings together."""
    times = 4 if case.dtype == torch.float32 else 2
    rounding = 4 * EPS[case.dtype] + case.H**0.5 * 2**-24
    found = {}
    for (name, a), (_, b), (_, c) in zip(ours.named(), exact.named(), plain.named(), strict=True):
        assert a.shape == b.shape, name
        allowed = times * (c.double() - b).abs().max() + rounding * b.abs().max()
        error = (a.double() - b).abs().max()
        found[name] = (error / allowed).item() if error != 0 else 0.0
    return found


def assert_close(case: Case, ours: Answer, exact: Answer, plain: Answer) -> None:
    too_far = {name: s for name, s in shares(case, ours, exact, plain).items() if not s <= 1}
    assert not too_far, f"errors as shares of what is allowed: {too_far}"
