"""Problems for the time loops, and what the answers must be."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fusedrnn.call import Weights
from fusedrnn.cells import Cell
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


@dataclass
class Problem:
    """Arguments in the case's dtype, sequences as [T, B, D, ...]."""

    x_gates: Tensor
    w_hh: Tensor
    b_hh: Tensor | None
    state: tuple[Tensor, ...]
    params: tuple[Tensor, ...]
    d_output: Tensor
    d_final: tuple[Tensor, ...]
    lengths: Tensor = field(default_factory=lambda: torch.empty(0))

    def directions(self) -> list[Weights]:
        """What the kernels read of each direction's weights."""
        biases = [None] * len(self.w_hh) if self.b_hh is None else self.b_hh
        return [
            Weights(w, w, None, b, None, tuple(p[d] for p in self.params))
            for d, (w, b) in enumerate(zip(self.w_hh, biases, strict=True))
        ]

    def leaves(self) -> list[Tensor]:
        """Everything that has a gradient, in the order of `Answer.gradients`."""
        bias = [] if self.b_hh is None else [self.b_hh]
        return [self.x_gates, self.w_hh, *bias, *self.state, *self.params]


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
    return Problem(
        x_gates=draw(T, B, D, G, H, scale=case.scale),
        w_hh=draw(D, G * H, H, scale=case.scale / H**0.5),
        b_hh=draw(D, G * H) if case.bias else None,
        state=tuple(draw(D, B, H) for _ in case.cell.states),
        params=tuple(draw(D, H) for _ in case.cell.params),
        d_output=draw(T, B, D, H) * reached[..., None],  # nobody's gradient comes from padding
        d_final=tuple(draw(D, B, H) for _ in case.cell.states),
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
    T, B, H, D, G = case.T, case.B, case.H, case.D, len(case.cell.gates)
    outputs: list[list] = [[None] * D for _ in range(T)]
    finals = []
    for d in range(D):
        state = tuple(s[d] for s in p.state)
        params = tuple(q[d] for q in p.params)
        for t in range(T) if d == 0 else range(T - 1, -1, -1):
            h_gates = state[0] @ p.w_hh[d].T
            if p.b_hh is not None:
                h_gates = h_gates + p.b_hh[d]
            h_gates = h_gates.view(B, G, H).unbind(1)
            new, _ = case.cell.forward(p.x_gates[t, :, d].unbind(1), h_gates, state, params)
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
            self.rows = Rows(T, B, 0, 0, offsets, lengths)
        else:
            strides = (B, 1) if case.layout == "time_first" else (1, T)
            self.index = (t * strides[0] + b * strides[1]).flatten()
            self.reached = torch.ones(T, B, dtype=torch.bool)
            self.rows = Rows(T, B, *strides, None, given)

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
    cell, H, G = case.cell, case.H, len(case.cell.gates)
    layout = Layout(case, p.lengths)
    x_gates = layout.pack(p.x_gates)
    common = {"rows": layout.rows, "input_precision": precision}
    output, final, saved, states = scan_forward(
        cell, x_gates, p.directions(), p.state, save=case.save, plan=plans[0], **common
    )
    h_prev = previous(case, p, layout.unpack(output))  # [T, B, D, H]
    if case.save == "states":
        assert saved is None
        h_gates = torch.einsum("tbdh,dgh->tbdg", h_prev.float(), p.w_hh.float())
        if p.b_hh is not None:
            h_gates = h_gates + p.b_hh.float()
        h_gates = h_gates.unflatten(-1, (G, H)).to(case.dtype)
        saved = (x_gates, layout.pack(h_gates))
    dx_gates, dh_gates, d_state, d_params = scan_backward(
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
    dh = layout.unpack(dh_gates).float().flatten(-2)
    d_w_hh = torch.einsum("tbdg,tbdh->dgh", dh, h_prev.float())
    d_b_hh = [] if p.b_hh is None else [dh.sum((0, 1))]
    d_x = layout.unpack(dx_gates)
    return Answer(layout.unpack(output), final, [d_x, d_w_hh, *d_b_hh, *d_state, *d_params])


def previous(case: Case, p: Problem, output: Tensor) -> Tensor:
    """h before every step, [T, B, D, H]: the output one step earlier, or the initial state."""
    before = torch.empty_like(output)
    for d in range(case.D):
        for b in range(case.B):
            length = int(p.lengths[b])
            before[length:, b, d] = 0
            steps = list(range(length)) if d == 0 else list(range(length - 1, -1, -1))
            for i, t in enumerate(steps):
                before[t, b, d] = p.state[0][d, b] if i == 0 else output[steps[i - 1], b, d]
    return before


# The unit in which each dtype rounds what it stores.
EPS = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def assert_close(case: Case, ours: Answer, exact: Answer, plain: Answer) -> None:
    """Our largest error is at most twice that of the plain loop in the same dtype, and a floor,
    for where the plain loop happens to be more exact than it must be: four roundings of the
    largest element, and the random walk of a float32 sum over H products in another order. Four
    times with float32, of which a product is three, that lose about four roundings together."""
    times = 4 if case.dtype == torch.float32 else 2
    rounding = 4 * EPS[case.dtype] + case.H**0.5 * 2**-24
    for (name, a), (_, b), (_, c) in zip(ours.named(), exact.named(), plain.named(), strict=True):
        assert a.shape == b.shape, name
        error = (a.double() - b).abs().max().item()
        allowed = times * (c.double() - b).abs().max().item()
        floor = rounding * b.abs().max().item()
        assert error <= allowed + floor, (
            f"{name}: error {error:.3g}, allowed {allowed:.3g} + {floor:.3g}"
        )
