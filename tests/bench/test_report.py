import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from made_results import results_of, rows_of

from bench import pictures, report, results, shapes
from bench.device import ROOT
from bench.shapes import Shape


@pytest.fixture
def folder(tmp_path):
    """A GPU's plane and curves, with one loss and one wrong result."""
    rows = []
    for n, shape in enumerate(shapes.plane("gru", "bf16")):
        rows += rows_of(shape, torch_nn=10.0, auto=12.5 if n == 9 else 2.0 + n / 10)
    for shape in shapes.curves(shapes.GPU_BASE, shapes.GPU_CURVES):
        rows += rows_of(shape, tier="curves", torch_nn=1.0 * shape.T, auto=0.5 * shape.T)
    rows += rows_of(replace(shapes.hardest(), T=64), tier="headline", torch_nn=2.0, auto=None)
    results.save(results_of(rows), tmp_path / "some-gpu" / "20260102-abc.json")
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
    results.save(results_of(rows), tmp_path / "some-gpu" / "20260102-abc.json")
    table = report.build(tmp_path)[0].split("### Everyone")[1]
    assert "| shape | pass | torch_nn | auto | reference |" in table
    assert table.count("777") == 2


def test_the_same_files_give_the_same_bytes(folder):
    assert report.build(folder) == report.build(folder)
    written = report.write(folder, folder / "out", None)
    assert written
    assert report.write(folder, folder / "out", None) == []


def test_old_pictures_go(folder):
    stale = folder / "out" / "report" / "stale.svg"
    stale.parent.mkdir(parents=True)
    stale.write_text("<svg/>")
    report.write(folder, folder / "out", None)
    assert not stale.exists()


def test_every_picture_is_named_and_parses(folder):
    text, drawn = report.build(folder)
    assert {"some-gpu-map-gru-bf16-training-T256.svg", "some-gpu-cost-step-training.svg"} <= set(
        drawn
    )
    for name, svg in drawn.items():
        assert f"(report/{name})" in text
        root = ElementTree.fromstring(svg)
        width, height = float(root.get("width")), float(root.get("height"))
        for element in root:
            for key in ("x", "cx"):
                if element.get(key):
                    assert 0 <= float(element.get(key)) <= width
            for key in ("y", "cy"):
                if element.get(key):
                    assert 0 <= float(element.get(key)) <= height


def test_a_loss_that_noise_could_be_is_none(tmp_path):
    """Every stretch but three says slower: its interval contains 1."""
    noisy = [[1e-3]] * 3 + [[2e-3]] * 17
    rows = rows_of(shapes.hardest(), torch_nn=1.0, auto=noisy)
    assert rows[1]["ratio"] == 0.5
    results.save(results_of(rows), tmp_path / "some-gpu" / "a.json")
    text, _ = report.build(tmp_path)
    assert "Of 1 points, 0 are slower than torch.nn beyond noise, and 1 cannot be told" in text
    assert "0.50x (0.50 to 1.00), cannot be told apart" in text


def test_the_same_kernels_have_an_overhead_and_no_speed_up(folder):
    rows = rows_of(replace(shapes.hardest(), T=32), torch_nn=1.0, auto=1.004)
    rows[1]["ran_on"] = "aten"
    results.save(results_of(rows, date="2026-02-02T03:04:05Z"), folder / "some-gpu" / "b.json")
    text, _ = report.build(folder)
    assert "Of 70 points" in text
    table = text.split("### The same kernels of torch")[1].split("###")[0]
    assert "+4.0 us (+4.0 to +4.0)" in table
    assert "x (" not in table
    assert "At 1 points both ran the same kernels of torch" in text


def test_a_heat_map_has_no_colour_for_what_cannot_be_told_apart():
    draw = lambda unclear: pictures.heat_map("t", "", "B", "H", [1], [64], {(1, 64): 0.5}, unclear)  # noqa: E731
    assert pictures.ratio_colour(0.5) in draw(())
    assert pictures.ratio_colour(0.5) not in draw({(1, 64)})
    assert ">0.50<" in draw({(1, 64)})


def test_a_heat_map_shows_what_is_missing():
    drawn = pictures.heat_map("t", "n", "B", "H", [1, 8], [64], {(8, 64): 2.0})
    assert ">2.00<" in drawn
    assert ">-<" in drawn


def test_colours_say_who_is_faster():
    assert pictures.ratio_colour(1.0) == "#ffffff"
    assert pictures.ratio_colour(4.0) == pictures.ratio_colour(9.0) == "#0072b2"
    assert pictures.ratio_colour(0.5) == "#c82814"


def test_the_geometric_mean():
    assert report.geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert report.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_groups_of_the_goals():
    groups = dict(report.GROUPS)
    gru = Shape("gru", "bf16", 256, 8, 256, 256)
    assert groups["GRU above H=192"](gru)
    assert not groups["GRU above H=192"](replace(gru, H=128, I=128))
    assert not groups["bf16"](replace(gru, T=100))


def test_without_a_gpu_the_readme_says_so(tmp_path):
    rows = rows_of(Shape("lstm", "fp32-exact", 64, 8, 32, 32), torch_nn=1.0, auto=1.0)
    results.save(results_of(rows, "cpu", "cpu X"), tmp_path / "cpu-x" / "a.json")
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


def test_the_committed_report_is_what_the_committed_results_say():
    """`make report` would change nothing."""
    text, drawn = report.build(results.FOLDER)
    assert (ROOT / "bench" / "REPORT.md").read_text() == text
    found = {p.name: p.read_text() for p in (ROOT / "bench" / "report").glob("*.svg")}
    assert found == drawn


def test_the_readme_is_what_the_committed_results_say():
    readme = (ROOT / "README.md").read_text()
    assert report.fill_block(readme, report.readme_figures(results.FOLDER)) == readme


def test_committed_results_are_good():
    found = results.load_folder(results.FOLDER)
    assert found
    for runs in found.values():
        for run in runs:
            assert (
                results.dumps({k: v for k, v in run.items() if k != "path"})
                == (results.FOLDER / run["path"]).read_text()
            )
