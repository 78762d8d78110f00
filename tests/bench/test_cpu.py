import shutil

import pytest
import torch
from made_results import results_of

import fusedrnn
from bench import cpu, report, run
from bench.cpu import ROWS, SIZES, STEP_SIZES, TINY, Row
from bench.timing import CPU_SETTINGS, Device

BY_NAME = {row.name: row for row in ROWS}


def row_of(name, size, figure="ratio", ran_on="aten", error=None, **values):
    row = {"row": name, "size": list(size), "figure": figure, "ran_on": ran_on, "error": error}
    return row | {"ratio": None, "above_us": None, "goal": cpu.goal(BY_NAME[name], size)} | values


def test_goals():
    assert len(BY_NAME) == len(ROWS)
    assert set(cpu.GOALS) <= set(BY_NAME)
    for name, goals in cpu.GOALS.items():
        sizes = STEP_SIZES if name.endswith("step()") else SIZES
        assert tuple(cpu.goal(BY_NAME[name], size) for size in sizes) == goals
    assert cpu.goal(Row("rnn", "zoneout"), SIZES[3]) == 1.3
    assert cpu.goal(Row("lstm", "lengths"), SIZES[1]) == 1.25
    assert cpu.goal(Row("lstm", "lengths", "inference"), SIZES[1]) is None
    assert cpu.goal(Row("lstm"), TINY) is None


def test_figures_are_of_low_quantiles():
    theirs = [2e-3, 9.0, 1e-3, 9.0, 9.0]
    own = [4e-3, 3e-3, 5e-3, 9.0, 9.0]
    found = cpu.figures(theirs, own)
    assert found == {
        "ratio": 2.0, "above_us": 2000.0, "ratio_p50": round(5e-3 / 9, 7), "ms": 4.0,
        "ms_torch_nn": 2.0, "turns": 5,
    }  # fmt: skip


def test_both_have_as_many_turns():
    calls = {"theirs": 0, "own": 0}

    def call(name):
        def function(input, hx):
            calls[name] += 1

        module = torch.nn.Identity()
        return cpu.Call(module, function, torch.zeros(()))

    theirs, own = cpu.take_turns((call("theirs"), call("own")), seconds=0.0)
    assert len(theirs) == len(own) == cpu.LEAST_TURNS
    assert calls["theirs"] > calls["own"] > 100  # repeated in a turn, first to see how often
    assert calls["own"] % cpu.LEAST_TURNS == 0


def test_table():
    small, large = SIZES[0], SIZES[3]
    rows = [
        row_of("gru", small, ratio=0.5),
        row_of("gru", large, ratio=1.2, ran_on="reference"),
        row_of("gru inference", small, ratio=1.0),
        row_of("rnn", small, error="ArithmeticError: off by 1"),
        row_of("lstm step()", STEP_SIZES[0], "above_us", above_us=5.96),
    ]
    assert cpu.table(rows) == [
        "| ours / torch.nn (goal) | T50 B8 I32 H64 | T128 B256 I128 H128 | ran on |",
        "|---|---|---|---|",
        "| gru | 0.50 (0.5) | **1.20** (1.03, missed) | aten, reference |",
        "| gru inference | 1.00 | - | aten |",
        "| rnn | error | - | aten |",
        "",
        "| us above torch's operator (goal) | T1 B1 I64 H64 | ran on |",
        "|---|---|---|",
        "| lstm step() | 6.0 (6) | aten |",
        "",
        "- rnn, T50 B8 I32 H64: ArithmeticError: off by 1",
    ]


def test_the_report_has_a_table_for_each_file(tmp_path):
    for name in ("a", "b"):
        content = results_of([], "cpu", "cpu X") | {"cpu": [row_of("gru", SIZES[0], ratio=0.25)]}
        content["environment"]["ATEN_CPU_CAPABILITY"] = "avx2"
        run.save(content, tmp_path / "cpu-x" / f"{name}.json")
        assert run.load(tmp_path / "cpu-x" / f"{name}.json") == content
    text, _ = report.build(tmp_path)
    assert text.count("### On a CPU, and the goals") == 2
    assert text.count("| gru | 0.25 (0.5) | aten |") == 2
    assert "ATEN_CPU_CAPABILITY avx2" in text


def test_files_of_other_settings_are_not_extended(monkeypatch):
    for name in CPU_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    before = run.begin(Device())
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    with pytest.raises(ValueError, match="another ONEDNN_MAX_CPU_ISA: None, here AVX2"):
        run.begin(Device(), before)


def test_a_fast_wrong_result_has_no_figure(monkeypatch):
    """Such as a module that forgets its lengths."""

    def forgets(self, input, hx=None, lengths=None, **options):
        return forward(self, input, hx, **options)

    forward = fusedrnn.GRU.forward
    monkeypatch.setattr(fusedrnn.GRU, "forward", forgets)
    row = cpu.measure(Row("gru", "lengths"), TINY, 0.0)
    assert row["error"].startswith("ArithmeticError: off by")
    assert row["ratio"] is None
    assert cpu.deviation([torch.ones(2)], [torch.ones(2, 1)]) == float("inf")
    assert cpu.deviation([torch.full((2,), torch.nan)], [torch.ones(2)]) == float("inf")


def test_every_row_once(tmp_path, monkeypatch, capsys):
    """All but the compiled ones, which are left out for want of a compiler; then one row anew."""
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "g++" else which(name))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(cpu, "LEAST", 1e-5)
    path = tmp_path / "cpu-x" / "a.json"
    assert cpu.main(["--tiny", "--budget", "0", "--out", str(path)]) == 0
    assert "2 compiled rows left out" in capsys.readouterr().out
    first = run.load(path)
    wanted = [row.name for row in ROWS if row.how not in ("compiled", "step()")]
    wanted += [row.name for _ in STEP_SIZES for row in ROWS if row.how == "step()"]
    assert [row["row"] for row in first["cpu"]] == wanted
    for row in first["cpu"]:
        assert row["error"] is None
        assert row["deviation"] <= row["tolerance"]
        assert row[row["figure"]] is not None
        assert row["turns"] >= cpu.LEAST_TURNS
        assert row["ran_on"]
    assert cpu.main(["--tiny", "--rows", "^gru T", "--budget", "0", "--out", str(path)]) == 0
    after = run.load(path)["cpu"]
    assert [row["row"] for row in after] == wanted
    assert [row["row"] for row, old in zip(after, first["cpu"], strict=True) if row != old] == [
        "gru"
    ]
