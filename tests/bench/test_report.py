import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from made_results import results_of, rows_of

from bench import report, run, shapes
from bench.run import FOLDER
from bench.shapes import Shape
from bench.timing import ROOT


@pytest.fixture
def folder(tmp_path):
    """A GPU's plane and curves, with one loss and one wrong result."""
    rows = []
    for n, shape in enumerate(shapes.plane("gru", "bf16")):
        rows += rows_of(shape, torch_nn=10.0, auto=12.5 if n == 9 else 2.0 + n / 10)
    for shape in shapes.curves(shapes.GPU_BASE, shapes.GPU_CURVES):
        rows += rows_of(shape, tier="curves", torch_nn=1.0 * shape.T, auto=0.5 * shape.T)
    rows += rows_of(replace(shapes.hardest(), T=64), tier="headline", torch_nn=2.0, auto=None)
    run.save(results_of(rows), tmp_path / "some-gpu" / "20260102-abc.json")
    return tmp_path


def test_losses_come_first(folder):
    text, _ = report.build(folder)
    table = text.split("### Slowest first")[1].split("###")[0]
    assert "Of 70 points, 1 are slower than torch.nn beyond noise, and 0 cannot be" in table
    speedups = [float(x) for x in re.findall(r"\| (\d+\.\d\d)x \(", table)]
    assert speedups[0] == 0.80
    assert speedups == sorted(speedups)


def test_a_wrong_result_is_named_and_not_averaged(folder):
    text, _ = report.build(folder)
    assert "### Without a time" in text
    assert "wrong: output is off by 1" in text
    assert "| bf16 | forward + backward | 63 |" in text  # 49 of the plane, 14 of the curves


def test_the_loops_stand_beside_everyone(tmp_path):
    rows = rows_of(shapes.hardest(), tier="headline", torch_nn=2.0, auto=1.0)
    for shape in shapes.loops():
        rows += rows_of(shape, tier="loops", torch_nn=2.0, auto=1.0, reference=777.0)
    run.save(results_of(rows), tmp_path / "some-gpu" / "20260102-abc.json")
    table = report.build(tmp_path)[0].split("### Everyone")[1]
    assert "| shape | pass | torch_nn | auto | reference |" in table
    assert table.count("777") == 2


def test_a_loss_that_noise_could_be_is_none(tmp_path):
    """Every stretch but three says slower: its interval contains 1."""
    noisy = [[1e-3]] * 3 + [[2e-3]] * 17
    rows = rows_of(shapes.hardest(), torch_nn=1.0, auto=noisy)
    assert rows[1]["ratio"] == 0.5
    run.save(results_of(rows), tmp_path / "some-gpu" / "a.json")
    text, _ = report.build(tmp_path)
    assert "Of 1 points, 0 are slower than torch.nn beyond noise, and 1 cannot be told" in text
    assert "0.50x (0.50 to 1.00), cannot be told apart" in text


def test_the_same_kernels_have_an_overhead_and_no_speed_up(folder):
    rows = rows_of(replace(shapes.hardest(), T=32), torch_nn=1.0, auto=1.004)
    rows[1]["ran_on"] = "aten"
    run.save(results_of(rows, date="2026-02-02T03:04:05Z"), folder / "some-gpu" / "b.json")
    text, _ = report.build(folder)
    assert "Of 70 points" in text
    table = text.split("### The same kernels of torch")[1].split("###")[0]
    assert "+4.0 us (+4.0 to +4.0)" in table
    assert "x (" not in table
    assert "At 1 points both ran the same kernels of torch" in text


def test_a_heat_map_shows_what_is_missing():
    rows = [{"ratio": r, "ratio_low": 0.9 * r, "ratio_high": 1.1 * r} for r in (2.0, 0.5)]
    drawn = report.heat_map("t", {(8, 64): rows[0], (1, 32): rows[1]})
    assert ">2.00<" in drawn
    assert drawn.count(">-<") == 2


def test_groups_of_the_goals():
    groups = dict(report.GROUPS)
    gru = Shape("gru", "bf16", 256, 8, 256, 256)
    assert groups["GRU above H=192"](gru)
    assert not groups["GRU above H=192"](replace(gru, H=128, I=128))
    assert not groups["bf16"](replace(gru, T=100))


def test_without_a_gpu_the_readme_says_so(tmp_path):
    rows = rows_of(Shape("lstm", "fp32-exact", 64, 8, 32, 32), torch_nn=1.0, auto=1.0)
    run.save(results_of(rows, "cpu", "cpu X"), tmp_path / "cpu-x" / "a.json")
    assert report.readme_figures(tmp_path) == report.NOT_MEASURED
    assert "not measured yet" in report.build(tmp_path)[0]


def test_with_a_gpu_the_readme_has_its_figures(folder):
    figures = report.readme_figures(folder)
    assert "Some GPU" in figures
    assert "geometric mean" in figures
    assert "everything measured" not in figures


def test_fill_block():
    text = f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n"
    filled = report.fill_block(text, "new")
    assert filled == f"above\n{report.BEGIN}\nnew\n{report.END}\nbelow\n"
    assert report.fill_block(filled, "new") == filled
    for bad in ("nothing", report.END + report.BEGIN, 2 * text):
        with pytest.raises(ValueError, match="expected one line"):
            report.fill_block(bad, "new")


def test_the_same_files_give_the_same_bytes_and_old_pictures_go(folder):
    stale = folder / "out" / "report" / "stale.svg"
    stale.parent.mkdir(parents=True)
    stale.write_text("<svg/>")
    report.write(folder, folder / "out", None)
    text, drawn = report.build(folder)
    assert (folder / "out" / "REPORT.md").read_text() == text
    assert {p.name: p.read_text() for p in stale.parent.glob("*.svg")} == drawn
    assert set(drawn) == {"some-gpu-map-gru-bf16-training-T256.svg", "some-gpu-cost-training.svg"}
    for name, svg in drawn.items():
        assert f"(report/{name})" in text
        assert ElementTree.fromstring(svg).tag.endswith("svg")


def test_what_got_slower():
    def of(auto):
        return results_of(rows_of(shapes.hardest(), torch_nn=1.0, auto=auto))

    (line,) = report.compare(of(0.5), of(0.6))
    assert line.startswith("-17% lstm fp16 T1024")
    assert report.compare(of(0.6), of(0.5)) == []
    assert "wrong: output" in report.compare(of(0.5), of(None))[0]
    noisy = [[0.5e-3]] * 17 + [[1e-3]] * 3
    assert report.compare(of(noisy), of(0.6)) == []


def test_limits_host_time_and_calibration_are_shown(folder, limits):
    host = {
        "call": "lstm",
        "pass": "inference",
        "directions": 1,
        "layers": [1, 2, 4],
        "triton_us": [90, 130, 210],
        "aten_us": [50, 80, 140],
        "torch_nn_us": [40, 80, 160],
    }
    more = {"limits": limits, "host": [host], "calibration": ["Rank correlation 0.9"]}
    content = results_of([], date="2026-03-02T03:04:05Z") | more
    run.save(content, folder / "some-gpu" / "c.json")
    text, _ = report.build(folder)
    assert (
        "| lstm | inference | 1 | 90 | 40 | 50, 80, 140 | 40, 80, 160 | 0.80, 1.00, 1.14 |" in text
    )
    assert "- round trip, us a step by number of programs: 2: 1.00, 96: 1.50" in text
    assert "Rank correlation 0.9" in text


def test_the_committed_report_is_what_the_committed_results_say():
    """`make report` would change nothing; the pictures' bytes depend on matplotlib's version."""
    text, drawn = report.build(FOLDER)
    assert (ROOT / "bench" / "REPORT.md").read_text() == text
    assert {p.name for p in (ROOT / "bench" / "report").glob("*.svg")} == set(drawn)


def test_the_readme_is_what_the_committed_results_say():
    readme = (ROOT / "README.md").read_text()
    assert report.fill_block(readme, report.readme_figures(FOLDER)) == readme
