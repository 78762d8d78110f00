import pytest

from bench import shapes
from bench.backends import WHAT
from bench.shapes import Shape
from fusedrnn import modules
from fusedrnn.cells import REGISTRY


def test_the_plan_begins_with_the_goals():
    plan = shapes.gpu_plan()
    assert plan[0].shape == Shape("lstm", "fp16", 1024, 16, 768, 768, name="hardest point")
    order = [p.tier for p in plan]
    tiers = ("headline", "sample", "workloads", "loops", "planes", "grid")
    first = {tier: order.index(tier) for tier in tiers}
    assert list(first) == sorted(first, key=first.get)


def test_the_plan_holds_the_whole_grid_once():
    keys = [p.shape.key for p in shapes.gpu_plan()]
    assert len(keys) == len(set(keys))
    assert {s.key for s in shapes.grid()} <= set(keys)
    assert sum(1 for _ in shapes.grid()) == 3 * 4 * 3 * 7 * 7 * 3 * 2 * 2


def test_a_cut_off_grid_is_a_sample_of_it():
    rest = [p.shape for p in shapes.gpu_plan() if p.tier == "grid"][:300]
    for name, values in (("cell", shapes.CELLS), ("dtype", shapes.DTYPES), ("B", shapes.B_GRID)):
        assert {getattr(s, name) for s in rest} == set(values)


def test_a_cut_off_sample_has_some_of_everything_that_the_goals_are_about():
    """Geometric means of each dtype, and GRU, both directions, stacks and packed rows."""
    found = [p.shape for p in shapes.gpu_plan() if p.tier == "sample"]
    assert len(found) > 0.9 * shapes.SAMPLE  # but for what is a headline already
    for first in (found[:48], found):
        n = len(first)
        for dtype in ("bf16", "fp16", "fp32-tf32"):
            assert sum(s.dtype == dtype for s in first) > n / 6
        for cell in shapes.CELLS:
            assert sum(s.cell == cell for s in first) > n / 6
        assert n / 4 < sum(s.bidirectional for s in first) < 3 * n / 4
        assert n / 4 < sum(bool(s.lengths) for s in first) < 3 * n / 4
        assert sum(s.layers > 1 for s in first) > n / 3
    assert all(shapes.in_grid(s) for s in found)


def test_the_slow_loops_are_at_few_points():
    slow = {p.tier for p in shapes.gpu_plan() for b in p.backends if b.startswith("reference")}
    assert slow == {"loops"}


def test_every_backend_is_in_some_plan():
    named = {b for p in shapes.gpu_plan() + shapes.cpu_plan() for b in p.backends}
    assert named <= set(WHAT)
    assert set(WHAT) - named == {"aten"}  # a way to ask for it; auto takes it where it is needed


def test_keys_differ_where_the_work_does():
    base = Shape("lstm", "bf16", 64, 8, 32, 32)
    others = [
        Shape("gru", "bf16", 64, 8, 32, 32), Shape("lstm", "fp16", 64, 8, 32, 32),
        Shape("lstm", "bf16", 64, 8, 16, 32), Shape("lstm", "bf16", 64, 8, 32, 32, 2),
        Shape("lstm", "bf16", 64, 8, 32, 32, 1, True),
        Shape("lstm", "bf16", 64, 8, 32, 32, lengths="text"),
        Shape("lstm", "bf16", 64, 8, 32, 32, resets=True),
    ]  # fmt: skip
    assert len({s.key for s in (base, *others)}) == 8
    assert Shape("lstm", "bf16", 64, 8, 32, 32, name="a name").key == base.key


@pytest.mark.parametrize("distribution", ["text", "speech", "uniform"])
def test_lengths(distribution):
    lengths = shapes.length_list(distribution, 100, 200)
    assert lengths == sorted(lengths, reverse=True) == shapes.length_list(distribution, 100, 200)
    assert lengths[0] == 100
    assert min(lengths) >= 1
    assert lengths != shapes.length_list(distribution, 100, 200, seed=1)


def test_lengths_are_shaped_as_they_say():
    median = {d: shapes.length_list(d, 1000, 999)[499] for d in ("text", "uniform", "speech")}
    assert 280 < median["text"] < 390
    assert 450 < median["uniform"] < 550
    assert 730 < median["speech"] < 860


def test_steps_in():
    padded = Shape("lstm", "bf16", 64, 8, 32, 32)
    packed = Shape("lstm", "bf16", 64, 8, 32, 32, lengths="text")
    assert shapes.steps_in(padded) == 64 * 8
    assert shapes.steps_in(packed) == sum(shapes.length_list("text", 64, 8)) < 64 * 8


def test_the_workloads_of_real_projects_are_measured_under_their_names():
    """Every one is a cell that exists, and is in the GPU's plan in all passes, early."""
    found = shapes.workloads()
    assert len({s.name for s in found}) == len({s.key for s in found}) == len(found)
    for project in ("bonito-hac", "bonito-sup", "puffer", "sample-factory", "demucs", "pyannote",
                    "piano", "encodec", "rnnoise", "open-unmix"):  # fmt: skip
        assert [s for s in found if s.name.startswith(project)], project
    assert {s.cell for s in found} <= set(REGISTRY)
    assert {s.dtype for s in found} <= set(shapes.DTYPES)
    planned = {p.shape: p for p in shapes.gpu_plan() if p.tier == "workloads"}
    for shape in found:
        assert planned[shape].passes == shapes.PASSES


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # counted by hand: D * G * H * (inputs + H + 2 biases), layer by layer
        ("bonito-sup", 5 * 4 * 1024 * (1024 + 1024 + 2)),
        ("pyannote", 2 * 4 * 128 * (60 + 128 + 2) + 3 * 2 * 4 * 128 * (256 + 128 + 2)),
        ("piano transcription", 2 * 3 * 256 * (768 + 256 + 2) + 2 * 3 * 256 * (512 + 256 + 2)),
        ("open-unmix", 2 * 4 * 256 * (512 + 256 + 2) + 2 * 2 * 4 * 256 * (512 + 256 + 2)),
    ],
)
def test_a_workload_has_as_many_parameters_as_its_project(name, parameters):
    (shape,) = [s for s in shapes.workloads() if s.name == name]
    module = modules.torch_class(shape.cell)(
        shape.I, shape.H, shape.layers, bidirectional=shape.bidirectional, device="meta"
    )
    assert sum(p.numel() for p in module.parameters()) == parameters


def test_the_floor_of_a_call_is_the_longest_of_three(limits):
    base = Shape("lstm", "bf16", 100, 8, 32, 32)
    assert shapes.floor_ms(base, "inference", limits) == pytest.approx(0.002 + 0.1)  # its steps
    assert shapes.floor_ms(base, "training", limits) == pytest.approx(0.002 + 0.2)
    wide = Shape("gru", "bf16", 1, 2**20, 128, 256)
    flops = 2 * 2**20 * 3 * 256 * (128 + 256)
    assert shapes.floor_ms(wide, "inference", limits) == pytest.approx(0.002 + flops / 1e11)
    moved = 2 * (2**25 * (1 + 1) + 1 * (2 + 2))
    thin = Shape("rnn_tanh", "bf16", 1, 2**25, 1, 1)
    assert shapes.floor_ms(thin, "inference", limits) == pytest.approx(0.002 + moved / 1e9)
    assert shapes.floor_ms(base, "inference", None) is None
    assert shapes.floor_ms(base, "inference", {**limits, "flops": {}}) is None


def test_the_tiny_plan_is_small_and_has_every_kind():
    tiny = [p.shape for p in shapes.tiny_plan()]
    assert len(tiny) < 30
    assert max(s.T * s.H for s in tiny) <= 40
    for field in ("bidirectional", "resets", "cell"):
        values = {getattr(p.shape, field) for p in shapes.gpu_plan()}
        assert {getattr(s, field) for s in tiny} == values
