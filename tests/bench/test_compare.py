import pytest
from made_results import results_of, rows_of

from bench import compare, results
from bench.shapes import Shape

FIRST = Shape("lstm", "bf16", 64, 8, 128, 128)
SECOND = Shape("gru", "bf16", 64, 8, 128, 128)


def files(before, after):
    make = [results_of([*rows_of(FIRST, **b), *rows_of(SECOND, **s)]) for b, s in (before, after)]
    return make[0], make[1]


def test_the_slowest_change_comes_first():
    a, b = files(
        ({"torch_nn": 4, "auto": 2}, {"torch_nn": 4, "auto": 2}),
        ({"torch_nn": 4, "auto": 3}, {"torch_nn": 4, "auto": 1}),
    )
    found = compare.changes(a, b)
    assert [c.factor for c in found] == [1.5, 1, 1, 0.5]
    lines, regressed = compare.report(a, b, "ms", 1.05)
    assert regressed
    assert "+50.0%" in "\n".join(lines)
    assert not compare.report(b, b, "ms", 1.05)[1]


def test_noise_is_no_regression():
    a, b = files(
        ({"torch_nn": 4, "auto": 2}, {"torch_nn": 4, "auto": 2}),
        ({"torch_nn": 4, "auto": 2.3}, {"torch_nn": 4, "auto": 2}),
    )
    assert compare.changes(a, b)[0].factor == pytest.approx(1.15)
    assert not compare.report(a, b, "ms", 1.05)[1]  # p10 of B is below p90 of A
    noisy = [[1e-3]] * 3 + [[2e-3]] * 17  # its ratio's interval reaches from 1 to 2
    a, b = files(({"torch_nn": 2, "auto": 1.0}, {"torch_nn": 4, "auto": 2}),
                 ({"torch_nn": 2, "auto": noisy}, {"torch_nn": 4, "auto": 2}))  # fmt: skip
    assert compare.changes(a, b, "ratio")[0].factor == pytest.approx(2)
    assert not compare.report(a, b, "ratio", 1.05)[1]


def test_by_ratio_a_slower_machine_is_no_regression():
    a, b = files(
        ({"torch_nn": 4, "auto": 2}, {"torch_nn": 4, "auto": 2}),
        ({"torch_nn": 8, "auto": 4}, {"torch_nn": 4, "auto": 2}),
    )
    assert compare.report(a, b, "ms", 1.05)[1]
    assert not compare.report(a, b, "ratio", 1.05)[1]
    with pytest.raises(ValueError, match="'ms' or 'ratio'"):
        compare.changes(a, b, "time")


def test_a_result_that_became_wrong_is_a_regression():
    a, b = files(
        ({"torch_nn": 4, "auto": 2}, {"torch_nn": 4, "auto": 2}),
        ({"torch_nn": 4, "auto": None}, {"torch_nn": 4, "auto": 2}),
    )
    lines, regressed = compare.report(a, b, "ms", 1.05)
    assert regressed
    assert "wrong" in lines[-1]


def test_the_command(tmp_path, capsys):
    a, b = files(
        ({"torch_nn": 4, "auto": 2}, {"torch_nn": 4, "auto": 2}),
        ({"torch_nn": 4, "auto": 9}, {"torch_nn": 4, "auto": 2}),
    )
    paths = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    results.save(a, tmp_path / "a.json")
    results.save(b, tmp_path / "b.json")
    assert compare.main(paths) == 1
    assert compare.main([paths[0], paths[0]]) == 0
    b["environment"]["device"] = "another"
    results.save(b, tmp_path / "b.json")
    with pytest.raises(SystemExit):
        compare.main(paths)
    assert "different machines" in capsys.readouterr().err
