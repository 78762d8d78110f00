"""Both time loops as compiled, for one problem after the other, against the recurrence in float64.

A program, run by `test_compiled.py` without the interpreter: python compiled_scan.py NAME ...
runs those problems (see PROBLEMS; with `--without TEXT`, after leaving out the lines of PTX that
have TEXT in them) and prints a JSON line for each:

    {"problem": NAME, "share": {what: the largest error as a share of what is allowed},
     "retries": how often a program asked again for what had not arrived, "seconds": ...}

What the programs exchange is rounded, and what they store is what they exchanged. So each step is
computed from what the kernel stored of the step before: no error comes from a value that two
correct computations round differently.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton.language as tl
from compiled_launch import on_cpu
from scan_cases import Case, Layout, Problem, kernels, loop, problem, shares
from torch import Tensor

from fusedrnn.cells import REGISTRY
from fusedrnn.kernels import scan_backward, scan_forward, sync
from fusedrnn.kernels.plan import Plan, warp_groups, warp_groups_backward

LSTM, GRU, RNN = REGISTRY["lstm"], REGISTRY["gru"], REGISTRY["rnn_tanh"]
RESET_BEFORE = REGISTRY["gru_reset_before"]
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Setting:
    """A problem, and how it is run."""

    case: Case
    block_h: int = 16
    split: int = 2
    resident: int | None = None  # of the chunks; all by default
    ahead: int | None = None  # likewise
    exchanged: bool = True  # else one program owns all units
    precision: str = "tf32"
    capability: tuple[int, int] = (9, 0)
    wgmma: int | None = None  # by warp groups: rows of a tile; backward at least 16

    def plan(self, pass_: str = "backward") -> Plan:
        if self.wgmma and pass_ == "forward":
            return warp_groups(self.case.H, self.wgmma)
        if self.wgmma:
            return warp_groups_backward(self.case.H, max(16, self.wgmma))
        if not self.exchanged:
            block = max(16, 1 << (self.case.H - 1).bit_length())
            return Plan("single_block", 16, block, block, 1, 1, 1, num_warps=4)
        block_k = 16 * self.split
        chunks = -(-self.case.H // self.case.heads // block_k)
        resident = chunks if self.resident is None else self.resident
        return Plan(
            "multi_block" if resident == chunks else "streamed",
            block_b=16,
            block_h=self.block_h,
            block_k=block_k,
            chunks=chunks,
            resident=resident,
            split_k=self.split,
            num_warps=self.split,
            max_registers=255,
            prefetch=self.ahead or chunks,
            pairwise=self.capability >= (9, 0),
        )


# From compute capability 9.0 on a minimum of pairs finds what is missing; 8.0 has another way.
# Resident programs show that the machine executes matrix instructions rightly: Triton lays their
# operands out by itself.
PROBLEMS = {
    "lstm fp16": Setting(Case(LSTM, T=3, B=5, H=32, D=1, dtype=FP16)),
    "lstm bf16, streamed, lengths, 8.0": Setting(
        Case(LSTM, T=3, B=5, H=40, D=1, dtype=BF16, lengths=(3, 1, 2, 3, 2)),
        block_h=8,
        resident=1,
        ahead=1,
        capability=(8, 0),
    ),
    "lstm fp16, wgmma": Setting(Case(LSTM, T=3, B=5, H=144, D=1, dtype=FP16), wgmma=16),
    "lstm bf16, wgmma of 8 rows, packed": Setting(
        Case(LSTM, T=3, B=9, H=40, dtype=BF16, lengths=(3, 3, *[2] * 3, *[1] * 4), layout="packed"),
        wgmma=8,
    ),
    "gru fp16, wgmma of 32 rows, lengths": Setting(
        Case(GRU, T=3, B=33, H=136, D=1, dtype=FP16, lengths=(3, 1, 2) * 11), wgmma=32
    ),
    "lstm fp16, 4 warps": Setting(Case(LSTM, T=2, B=16, H=64, D=1, dtype=FP16), split=4),
    "gru bf16, packed, 4 warps": Setting(
        Case(GRU, T=3, B=4, H=48, dtype=BF16, lengths=(3, 2, 2, 1), layout="packed"), split=4
    ),
    "gru fp32, 8.0": Setting(
        Case(GRU, T=2, B=5, H=32, D=1, dtype=FP32), block_h=8, capability=(8, 0)
    ),
    "rnn fp16": Setting(Case(RNN, T=2, B=3, H=32, D=1, dtype=FP16)),
    "rnn bf16, single block": Setting(Case(RNN, T=2, B=3, H=20, D=1, dtype=BF16), exchanged=False),
    "rnn fp32, single block": Setting(Case(RNN, T=2, B=3, H=20, D=1, dtype=FP32), exchanged=False),
    "rnn fp32, ieee, lengths": Setting(
        Case(RNN, T=3, B=3, H=20, D=2, dtype=FP32, lengths=(3, 1, 2)), precision="ieee"
    ),
    "reset before bf16": Setting(Case(RESET_BEFORE, T=3, B=3, H=32, D=1, dtype=BF16)),
    "means bf16": Setting(Case(REGISTRY["layer_norm_gru"], T=2, B=3, H=32, D=1, dtype=BF16)),
    "projection fp16, lengths": Setting(
        Case(LSTM, T=3, B=3, H=40, P=20, D=1, dtype=FP16, lengths=(3, 1, 2)), block_h=8
    ),
    "gru fp32, ieee, 2 heads": Setting(
        Case(GRU, T=2, B=3, H=64, heads=2, D=1, dtype=FP32), precision="ieee"
    ),
}


def run(setting: Setting, p: Problem, seed: int, without: str | None = None) -> dict[str, Any]:
    """What both kernels return; sequences as [T, B, D, ...], zero where there is no step."""
    case = setting.case
    layout = Layout(case, p.lengths)
    common = {"rows": layout.rows, "input_precision": setting.precision}
    layer = (p.directions(), p.state)
    with on_cpu(setting.capability, seed, without) as machines:
        output, final, saved, _, states = scan_forward(
            case.cell,
            layout.pack(p.x_gates),
            *layer,
            save="gates",
            plan=setting.plan("forward"),
            **common,
        )
        dx_gates, dh_gates, d_state, *_ = scan_backward(
            case.cell, layout.pack(p.d_output), p.d_final, *layer, output, states, saved,
            save="gates", plan=setting.plan(), **common,
        )  # fmt: skip
    sequences = {"output": output, "dx_gates": dx_gates, "dh_gates": dh_gates}
    if saved is not None:
        sequences["saved"] = saved
    if states is not None:
        sequences["states"] = states
    unpacked = {name: layout.unpack(x).double() for name, x in sequences.items()}
    return {**unpacked, "final": final, "d_state": d_state, "retries": retries_of(machines)}


def retries_of(machines) -> list[int]:
    """How often each launch asked again for what had not arrived."""
    return [
        sum(
            count
            for instruction, count in zip(m.code.instructions, m.executed, strict=True)
            if instruction.opcode == "bra" and instruction.operands[0].startswith("AGAIN")
        )
        for m in machines
    ]


def run_and_compare(setting: Setting, p: Problem, seed: int) -> tuple[dict[str, float], list[int]]:
    """Of several stages or heads: all results against the whole recurrence in float64."""
    case = setting.case
    with on_cpu(setting.capability, seed) as machines:
        ours = kernels(case, p, (setting.plan(), setting.plan()), setting.precision)
    exact, plain = loop(case, p, torch.float64), loop(case, p, case.dtype)
    return shares(case, ours, exact, plain), retries_of(machines)


# --- what is expected --------------------------------------------------------------------------

U = 2.0**-24  # what rounding a float32 costs, relatively
# A gate is a few operations on float32 after its sum: exponential, division, two or three others.
# None of them is off by more than two units, and the argument of the exponential by 2 * U times
# itself, which is far below 16.
ACTIVATION = 64 * U
# h as tf32 has lost up to the last of 11 bits; the weights of these problems have been rounded.
# With "ieee" each factor is rounded to 11 bits, and what that leaves, at most 2^-11 of it, loses as
# much as tf32 does. The product of what both leave is left out.
LOST = {"tf32": 2.0**-10, "ieee": 2 * 2.0**-21 + 2.0**-22}


class Worst:
    """The largest share of the allowed error, by what was compared."""

    def __init__(self, dtype: torch.dtype):
        self.found: dict[str, float] = {}
        self.unit = torch.finfo(dtype).eps / 2
        self.least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps

    def compare(self, what: str, stored: Tensor, exact: Tensor, allowed: Tensor | float) -> None:
        """allowed: before the result was rounded, to the nearest, into its dtype."""
        allowed = allowed + (exact.abs() + allowed) * self.unit + self.least
        share = ((stored.double() - exact).abs() / allowed).nan_to_num(nan=torch.inf)
        if share.numel():
            self.found[what] = max(self.found.get(what, 0.0), share.max().item())


def product(left: Tensor, w: Tensor, precision: str, like: torch.dtype) -> tuple[Tensor, Tensor]:
    """left @ w, and how far a sum of float32 in whatever order may be off."""
    size = left.abs() @ w.abs()
    lost = (left.shape[-1] + 3) * U
    if like == torch.float32:
        lost += LOST[precision]
    return left @ w, lost * size


def rounding_of_parts(left: Tensor, w: Tensor, H: int, like: torch.dtype) -> Tensor:
    """How far left @ w may be off where every 16 units of K make a part of it that is rounded. Of
    what a lane hands over, 8 elements, the first may then move by a unit in its last place."""
    info, K = torch.finfo(like), len(w)
    program = torch.arange(K) % H // 16
    total = torch.zeros(len(left), w.shape[1]).double()
    row, unit = torch.arange(len(left))[:, None], torch.arange(w.shape[1])[None, :]
    first = (unit % 16 < 8) & (row % 16 < 8) & (row % 2 == 0)
    for owner in program.unique():
        part = (left[:, program == owner] @ w[program == owner]).abs()
        last_place = part * info.eps + info.smallest_normal * info.eps
        total += last_place * (0.5 + first.double())
    return total


def check(setting: Setting, p: Problem, got: dict[str, Any]) -> dict[str, float]:
    """The largest error of each result, as a share of what is allowed."""
    worst = Worst(setting.case.dtype)
    for d in range(setting.case.D):
        _check_forward(setting, p, got, d, worst)
        _check_backward(setting, p, got, d, worst)
    return worst.found


def _check_forward(setting: Setting, p: Problem, got, d: int, worst: Worst) -> None:
    case = setting.case
    T, B, H, G = case.T, case.B, case.H, len(case.cell.gates)
    w, params = p.w_hh[d].double(), tuple(q[d].double() for q in p.params)
    bias = torch.zeros(G * H) if p.b_hh is None else p.b_hh[d].double()
    state = tuple(s[d].double() for s in p.state)
    exchanged = state[0]
    lost = torch.zeros(B, 1).double()  # the state's error so far, by row
    for t in range(T) if d == 0 else range(T - 1, -1, -1):
        active = (t < p.lengths)[:, None]
        x = p.x_gates[t, :, d].double()
        sums, off = product(exchanged, w.T, setting.precision, case.dtype)
        h_gates = (sums + bias).view(B, G, H)
        off = off.amax(1, keepdim=True) + 3 * U * (x.abs() + h_gates.abs()).amax((1, 2))[:, None]
        (stage,) = case.cell.stages
        new, saved = stage.forward(x.unbind(1), h_gates.unbind(1), state, params)
        # sigmoid is four times flatter than tanh. What multiplies one of its values is a state or
        # the part of a gate that comes from h; 2 is enough for what is at most 1.
        steepness = 2 + (max(s.abs().max() for s in state) + h_gates.abs().max()) / 4
        here = steepness * (off + ACTIVATION)
        lost = torch.where(active, lost + here, lost)
        for k, value in enumerate(saved):
            worst.compare("saved", got["saved"][t, :, d, k][active[:, 0]], value[active[:, 0]],
                          here[active[:, 0]])  # fmt: skip
        state = tuple(torch.where(active, n, s) for n, s in zip(new, state, strict=True))
        for k, value in enumerate(state):
            stored = got["output"][t, :, d] if k == 0 else got["states"][t, :, d, k - 1]
            expected = torch.where(active, value, 0.0) if k == 0 else value
            rows = active[:, 0] if k else torch.ones(B, dtype=torch.bool)
            worst.compare(f"state {k}", stored[rows], expected[rows], lost[rows])
        exchanged = torch.where(active, got["output"][t, :, d], exchanged)
    for k, value in enumerate(state):
        worst.compare(f"final {k}", got["final"][k][d], value, lost)


def _check_backward(setting: Setting, p: Problem, got, d: int, worst: Worst) -> None:
    case = setting.case
    T, B, H, G, S = case.T, case.B, case.H, len(case.cell.gates), len(case.cell.states)
    w, params = p.w_hh[d].double(), tuple(q[d].double() for q in p.params)
    initial = tuple(s[d].double() for s in p.state)
    d_state = tuple(s[d].double() for s in p.d_final)
    exchanged = torch.zeros(B, G * H).double()
    lost = torch.zeros(B, 1).double()

    def states(t: int) -> tuple[Tensor, ...]:
        begun = ((t >= 0) & (t < p.lengths))[:, None]
        t = min(max(t, 0), T - 1)
        stored = [got["output"][t, :, d], *(got["states"][t, :, d, k] for k in range(S - 1))]
        return tuple(torch.where(begun, s, i) for s, i in zip(stored, initial, strict=True))

    def receive():
        sums, off = product(exchanged, w, setting.precision, case.dtype)
        if setting.wgmma:
            off = off + rounding_of_parts(exchanged, w, H, case.dtype)
        back = (d_state[0] + sums, *d_state[1:])
        # A dozen roundings on the way through the cell, each of at most the largest gradient.
        largest = max(s.abs().max() for s in back) + p.d_output.double().abs().max()
        return back, lost + off.amax(1, keepdim=True) + 12 * U * largest

    back = 2 * d - 1
    for t in range(T - 1, -1, -1) if d == 0 else range(T):
        active = (t < p.lengths)[:, None]
        d_state, lost = receive()
        d_new = (d_state[0] + p.d_output[t, :, d].double(), *d_state[1:])
        saved = got["saved"][t, :, d].unbind(1) if "saved" in got else ()
        prev, new = states(t + back), states(t)
        (stage,) = case.cell.stages
        dx, dh, d_prev, _ = stage.backward(d_new, saved, prev, new, params)
        largest = max(v.abs().max() for v in (*prev, *new, *saved))
        largest_d = max(v.abs().max() for v in d_new)
        # Each is a gradient times what is at most 1, and a state or a saved value times 1/4.
        here = (2 + largest) * (lost + ACTIVATION * largest_d)
        for g in range(G):
            for name, exact in (("dx_gates", dx[g]), ("dh_gates", dh[g])):
                stored = got[name][t, :, d, g]
                worst.compare(name, stored, torch.where(active, exact, 0.0), here)
        d_state = tuple(torch.where(active, n, s) for n, s in zip(d_prev, d_state, strict=True))
        lost = torch.where(active, lost + 2 * ACTIVATION * largest_d, lost)
        exchanged = torch.where(active, got["dh_gates"][t, :, d].flatten(1), 0.0)
    d_state, lost = receive()
    for k, value in enumerate(d_state):
        worst.compare(f"d_state {k}", got["d_state"][k][d], value, lost)


def as_tf32(x: Tensor) -> Tensor:
    """float32 with the precision of tf32."""
    return (x.view(torch.int32) & -(1 << 13)).view(torch.float32)


def main(chosen: list[str], without: str | None = None) -> None:
    # So that a few steps have laps among them. With a projection, not all wait for all in each.
    sync.LAP = tl.constexpr(4 if any(PROBLEMS[name].case.P for name in chosen) else 2)
    for name in chosen:
        setting = PROBLEMS[name]
        p = problem(setting.case)
        p.state[0][:, :, ::5] = -0.0  # what the exchange takes for a missing element
        if setting.case.dtype == torch.float32 and setting.precision == "tf32":
            p = replace(p, w_hh=as_tf32(p.w_hh))
        began = time.perf_counter()
        if len(setting.case.whole_cell.stages) == setting.case.heads == 1:
            got = run(setting, p, seed=len(name), without=without)
            share, retries = check(setting, p, got), got["retries"]
        else:
            share, retries = run_and_compare(setting, p, seed=len(name))
        seconds = time.perf_counter() - began
        record = {"problem": name, "share": share, "retries": retries, "seconds": seconds}
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--without"]:
        main(sys.argv[3:], sys.argv[2])
    else:
        main(sys.argv[1:] or list(PROBLEMS))
