"""What is measured: the grid, the named workloads, the cost curves, and in which order.

A full grid has tens of thousands of points, more than any time box holds. So every plan is an
order: what decides most comes first, and the rest of the grid follows in a fixed shuffle, so
that a run cut off anywhere leaves an unbiased sample of it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

from fusedrnn import cells

PASSES = ("forward", "training", "inference")
DTYPES = ("bf16", "fp16", "fp32-tf32", "fp32-exact")
CELLS = ("lstm", "gru", "rnn_tanh")

T_GRID = (64, 256, 1024)
B_GRID = (1, 8, 16, 32, 64, 128, 256)
H_GRID = (64, 128, 256, 300, 512, 768, 1024)
LAYERS_GRID = (1, 2, 4)
SAMPLE = 200
WORKLOADS = json.loads((Path(__file__).parent / "workloads.json").read_text())
PLANE_T = 256  # the heat maps are planes H x B at this length


@dataclass(frozen=True)
class Shape:
    """One problem. `lengths` names a distribution for packed input, "" is padded to full length.

    `name` is for people and does not change what is computed.
    """

    cell: str
    dtype: str
    T: int
    B: int
    I: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    lengths: str = ""
    resets: bool = False
    name: str = ""

    @property
    def gates(self) -> int:
        return len(cells.get(self.cell).gates)

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def precision(self) -> tuple[str, str]:
        """The dtype and the precision of products, by the names of bench/aot.py."""
        dtype, _, precision = self.dtype.partition("-")
        return dtype, "ieee" if precision == "exact" else "tf32"

    @property
    def key(self) -> str:
        """What is computed, in one line; the identity of a result."""
        parts = [self.cell, self.dtype, f"T{self.T}", f"B{self.B}", f"I{self.I}", f"H{self.H}"]
        parts += [f"L{self.layers}"] if self.layers > 1 else []
        parts += ["bi"] if self.bidirectional else []
        parts += [f"packed-{self.lengths}"] if self.lengths else []
        parts += ["resets"] if self.resets else []
        return " ".join(parts)

    def fields(self) -> dict:
        """As a results row has it."""
        row = asdict(self)
        lengths = row.pop("lengths")
        return {**row, "packed": bool(lengths), "lengths": lengths}

    def tiny(self) -> Shape:
        """The same code paths in almost no time."""
        return replace(self, T=min(self.T, 5), B=min(self.B, 3), I=min(self.I, 6), H=min(self.H, 8))


def of_row(row: dict) -> Shape:
    """The shape that a results row was measured on."""
    names = Shape.__dataclass_fields__
    return Shape(**{name: row[name] for name in names if name in row})


@dataclass(frozen=True)
class Point:
    """A shape to measure, in which passes and against whom."""

    shape: Shape
    tier: str
    backends: tuple[str, ...]
    passes: tuple[str, ...] = PASSES


KERNELS = (
    "torch_nn", "auto", "triton", "triton_states", "triton_graph", "torch_nn_graph",
    "flashrnn", "flashrnn_alternating", "haste",
)  # fmt: skip
LOOPS = ("torch_nn", "auto", "reference", "reference_graph", "reference_compile")
CLOSE = ("torch_nn", "auto", "triton", "triton_states", "torch_nn_graph")
TWO = ("torch_nn", "auto", "triton")
CURVE = ("torch_nn", "auto", "triton_states")


def length_list(distribution: str, T: int, B: int, seed: int = 0) -> list[int]:
    """B sequence lengths, longest first, the longest being T.

    "text": log-normal, as sentences are (median a third of the longest, sigma 0.6).
    "speech": most utterances near the longest, a tail of short ones, as in read speech.
    "uniform": every length from 1 to T.

    Raises:
        ValueError: another name.
    """
    random_ = random.Random(f"{distribution} {T} {B} {seed}")
    draw = {
        "text": lambda: T / 3 * random_.lognormvariate(0, 0.6),
        "speech": lambda: T * random_.betavariate(4, 1.2),
        "uniform": lambda: T * random_.random(),
    }
    if distribution not in draw:
        raise ValueError(f"distribution must be one of {sorted(draw)}, got {distribution!r}")
    lengths = [min(max(round(draw[distribution]()), 1), T) for _ in range(B)]
    lengths[0] = T
    return sorted(lengths, reverse=True)


def steps_in(shape: Shape) -> int:
    """Time steps that exist, summed over the rows."""
    if not shape.lengths:
        return shape.T * shape.B
    return sum(length_list(shape.lengths, shape.T, shape.B))


def floor_ms(shape: Shape, pass_: str, limits: dict | None) -> float | None:
    """What a call takes at least by a machine's `limits` (bench/floor.py): one launch, and the
    longest of its matrix products at the full rate, of moving inputs, weights and outputs once,
    and of its time steps, layer after layer, at a round trip each. A backward pass has twice the
    products and as many steps; None where the rate of the dtype is not known."""
    if not limits or shape.dtype not in limits["flops"]:
        return None
    D, G, H = shape.directions, shape.gates, shape.H
    rows, passes = steps_in(shape), 2 if pass_ == "training" else 1
    width = shape.I + (shape.layers - 1) * D * H + shape.layers * H
    flops = 2.0 * rows * D * G * H * width * (2 * passes - 1)
    moved = passes * (4 if "fp32" in shape.dtype else 2)
    moved *= rows * (shape.I + D * H) + D * G * H * (width + 2 * shape.layers)
    bandwidth = limits["l2"] if moved <= limits["l2_bytes"] else limits["dram"]
    loop = passes * shape.T * shape.layers * min(limits["roundtrip"].values(), default=0.0)
    longest = max(flops / limits["flops"][shape.dtype], moved / bandwidth, loop)
    return 1e3 * (limits["launch"] + longest)


def hardest(dtype: str = "fp16") -> Shape:
    """The point where cuDNN is at its best."""
    return Shape("lstm", dtype, 1024, 16, 768, 768, name="hardest point")


def headline() -> list[Shape]:
    """What the goals of the project are about, one shape each."""
    base = GPU_BASE
    return [
        hardest("fp16"), hardest("bf16"), replace(base, cell="gru"), base,
        replace(base, bidirectional=True), replace(base, layers=4), replace(base, lengths="text"),
        replace(base, dtype="fp32-tf32"), Shape("gru", "fp16", 1024, 16, 768, 768),
        Shape("gru", "fp32-tf32", 256, 16, 1024, 1024), replace(base, dtype="fp32-exact"),
    ]  # fmt: skip


def sample() -> list[Shape]:
    """A part of the grid, shuffled: what people train most, in every dtype with tensor cores, with
    as much of stacks, both directions and packed rows as of the rest."""
    shapes = [
        s for s in grid()
        if s.dtype != "fp32-exact" and s.T <= 256 and s.B <= 64 and s.H in (256, 512, 1024)
    ]  # fmt: skip
    random.Random(1).shuffle(shapes)
    return shapes[:SAMPLE]


def loops() -> list[Shape]:
    """Where the loops of plain operators are measured: they launch a dozen kernels a step."""
    return [replace(GPU_BASE, cell=cell, T=128) for cell in ("lstm", "gru")]


def networks(dtype: str) -> list[Shape]:
    """Networks of the kinds that people run."""
    return [Shape(dtype=dtype, **network) for network in WORKLOADS["networks"]]


def workloads() -> list[Shape]:
    """Layers of real projects, in the dtype that each trains or runs in; where that is float32, as
    torch computes it by default, with tf32.

    Sizes are those of the file that `source` names, unless it says otherwise. Where layers
    alternate in direction (bonito), each is a layer of one direction. Left out, because no cell
    here computes them: dreamerv3 (GRU of 8 blocks with a norm of its gates) and dreamerv3-torch
    (GRU with a layer norm of its gates); tirex (sLSTM, exponential gates, 4 heads); PufferLib 4
    (MinGRU); the factorised LSTM of dorado's hac v6.
    """
    return [of_row(project) for project in WORKLOADS["projects"]]


def plane(cell: str, dtype: str) -> list[Shape]:
    """H x B at one length and one layer: a heat map."""
    return [Shape(cell, dtype, PLANE_T, B, H, H) for H, B in product(H_GRID, B_GRID)]


def grid() -> Iterator[Shape]:
    """Everything, input as wide as the hidden state."""
    for cell, dtype, T, B, H, layers, both, lengths in product(
        CELLS, DTYPES, T_GRID, B_GRID, H_GRID, LAYERS_GRID, (False, True), ("", "text")
    ):
        yield Shape(cell, dtype, T, B, H, H, layers, both, lengths)


def in_grid(shape: Shape) -> bool:
    """Whether `grid` has this shape."""
    return (
        not shape.resets
        and shape.I == shape.H
        and shape.T in T_GRID
        and shape.B in B_GRID
        and shape.H in H_GRID
        and shape.layers in LAYERS_GRID
        and shape.lengths in ("", "text")
    )


GPU_BASE = Shape("lstm", "bf16", 256, 32, 512, 512)
CPU_BASE = Shape("lstm", "fp32-exact", 64, 16, 128, 128)
GPU_CURVES = {
    "T": (32, 64, 128, 256, 512, 1024, 2048),
    "B": (1, 4, 16, 64, 256),
    "H": (64, 128, 256, 512, 768, 1024, 1536),
    "layers": (1, 2, 4, 8),
}
CPU_CURVES = {"T": (16, 64, 256), "B": (1, 16, 64), "H": (32, 128, 256)}


def curve(base: Shape, axis: str, values: tuple[int, ...]) -> list[Shape]:
    """`base` with one dimension varied; I follows H."""
    return [replace(base, **({"I": v, "H": v} if axis == "H" else {axis: v})) for v in values]


def curves(base: Shape, values: dict[str, tuple[int, ...]]) -> list[Shape]:
    return [shape for axis in values for shape in curve(base, axis, values[axis])]


def gpu_plan() -> list[Point]:
    """The full run: goals, a sample of the grid, workloads, planes, curves, then the rest of the
    grid, shuffled. The goals are means over the grid, so the sample comes early."""
    points = [Point(s, "headline", KERNELS) for s in headline()]
    points += [Point(s, "sample", TWO, ("training", "inference")) for s in sample()]
    points += [Point(s, "workloads", CLOSE) for s in workloads()]
    for dtype in ("bf16", "fp32-tf32"):
        points += [Point(s, "workloads", CLOSE) for s in networks(dtype)]
    points += [Point(s, "loops", LOOPS, ("training", "inference")) for s in loops()]
    shuffle = random.Random(0).shuffle
    for dtype in ("bf16", "fp16", "fp32-tf32", "fp32-exact"):
        for cell in CELLS:
            shapes = plane(cell, dtype)
            shuffle(shapes)
            points += [Point(s, "planes", TWO) for s in shapes]
    at = next(i for i, p in enumerate(points) if p.tier == "planes") + 2 * 49
    points[at:at] = [
        Point(s, "curves", CURVE, ("training", "inference")) for s in curves(GPU_BASE, GPU_CURVES)
    ]
    rest = list(grid())
    shuffle(rest)
    points += [Point(s, "grid", TWO, ("training", "inference")) for s in rest]
    return _without_repeats(points)


def cpu_plan() -> list[Point]:
    """What a CPU measures well in two minutes. Nearly everywhere both run torch's own kernels, so
    it is about what the module around them costs, from the shortest call to long ones."""
    two, passes = ("torch_nn", "auto"), ("training", "inference")
    dtype = "fp32-exact"
    points = [
        Point(Shape("lstm", dtype, 1, 1, 64, 64, name="decoding, one step"), "workloads", two),
        Point(Shape("lstm", dtype, 64, 16, 64, 64, resets=True, name="RL rollout, 1x64, resets"),
              "workloads", two),
        Point(CPU_BASE, "headline", (*two, "reference")),
        Point(replace(CPU_BASE, cell="gru"), "headline", two),
        Point(Shape("lstm", dtype, 64, 16, 100, 64, 1, True, "text",
                    name="tagging BiLSTM, 1x64"), "workloads", two),
        Point(Shape("lstm", dtype, 96, 16, 7, 128, 2, name="time series, 2x128"), "workloads", two),
    ]  # fmt: skip
    points += [Point(s, "curves", two) for s in curves(CPU_BASE, CPU_CURVES)]
    return _without_repeats([replace(p, passes=passes) for p in points])


def tiny_plan() -> list[Point]:
    """Every kind of point of both plans once, at a size that takes milliseconds."""
    seen: dict[tuple, Point] = {}
    for point in (*cpu_plan(), *gpu_plan()):
        s = replace(point.shape.tiny(), dtype="fp32-exact", layers=min(point.shape.layers, 2))
        kind = (s.cell, s.layers, s.bidirectional, s.lengths, s.resets, s.T == 1, point.backends)
        if point.tier in ("headline", "workloads", "loops"):
            seen.setdefault(kind, replace(point, shape=s))
    return _without_repeats(list(seen.values()))


def _without_repeats(points: list[Point]) -> list[Point]:
    """Every shape once, where it first comes, with the backends and passes of all its places."""
    first: dict[str, Point] = {}
    for point in points:
        earlier = first.setdefault(point.shape.key, point)
        backends = (*earlier.backends, *(b for b in point.backends if b not in earlier.backends))
        passes = tuple(p for p in PASSES if p in earlier.passes or p in point.passes)
        first[point.shape.key] = replace(earlier, backends=backends, passes=passes)
    return list(first.values())
