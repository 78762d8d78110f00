import json
from dataclasses import replace

import pytest
from made_results import results_of, rows_of

from bench import dispatch_table, results
from bench.shapes import Shape
from fusedrnn import measured

SHAPE = Shape("lstm", "fp16", 256, 16, 768, 768)


def table_of(tmp_path, *rows, **more):
    results.save(results_of(list(rows), **more), tmp_path / "gpu" / "a.json")
    return dispatch_table.table(results.load_folder(tmp_path))


def test_only_kinds_with_a_loss_are_listed(tmp_path):
    table = table_of(
        tmp_path,
        *rows_of(SHAPE, torch_nn=1.0, auto=2.0),
        *rows_of(replace(SHAPE, B=64), torch_nn=4.0, auto=2.0),
        *rows_of(replace(SHAPE, cell="gru"), torch_nn=4.0, auto=2.0),
    )
    assert table["devices"] == {
        "Some GPU": {"lstm fp16 training": [[256, 16, 768, 0.5], [256, 64, 768, 2.0]]}
    }
    assert table["sources"] == ["gpu/a.json"]


def test_a_loss_that_noise_could_be_is_none(tmp_path):
    noisy = [[1e-3]] * 3 + [[2e-3]] * 17
    assert table_of(tmp_path, *rows_of(SHAPE, torch_nn=1.0, auto=noisy))["devices"] == {}


def test_rows_that_torch_ran_say_nothing_about_our_kernels(tmp_path):
    rows = rows_of(SHAPE, torch_nn=1.0, auto=1.1, triton=2.0)
    rows[1]["ran_on"] = "aten"
    table = table_of(tmp_path, *rows)
    assert table["devices"]["Some GPU"]["lstm fp16 training"] == [[256, 16, 768, 0.5]]


def test_a_cpu_has_no_table(tmp_path):
    rows = rows_of(SHAPE, torch_nn=1.0, auto=2.0)
    assert table_of(tmp_path, *rows, kind="cpu")["devices"] == {}


def test_forward_alone_does_not_decide(tmp_path):
    rows = rows_of(SHAPE, "forward", torch_nn=1.0, auto=2.0)
    assert table_of(tmp_path, *rows)["devices"] == {}


def test_the_nearest_point_decides():
    devices = {"G": {"lstm fp16 training": [[256, 16, 768, 0.8], [256, 64, 768, 1.5]]}}

    def look(device="G", kind="lstm fp16 training", T=256, B=16, H=768):
        return measured._nearest_loss(devices, device, kind, T, B, H)

    assert look() == 0.8
    assert look(T=512, B=20) == 0.8
    assert look(B=64) is None
    assert look(B=128) is None
    assert look(B=32) == 0.8  # as far from both: the worse
    # What is far from all that was measured was not measured.
    assert look(T=1024) == look(H=384) == look(H=1536) == 0.8
    assert look(T=2048) is look(T=32) is look(H=380) is look(B=7) is look(H=1600) is None
    assert look(device="another") is None
    assert look(kind="gru fp16 training") is None


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "lstm bf16 inference"),
        ({"training": True, "layers": 3}, "lstm bf16 training stacked"),
        ({"directions": 2, "packed": True}, "lstm bf16 inference bidirectional packed"),
    ],
)
def test_kinds(options, name):
    defaults = {"training": False, "layers": 1, "directions": 1, "packed": False}
    assert measured.kind("lstm", "bf16", **{**defaults, **options}) == name


def test_write_and_check(tmp_path, capsys):
    table_of(tmp_path, *rows_of(SHAPE, torch_nn=1.0, auto=2.0))
    arguments = ["--results", str(tmp_path), "--out", str(tmp_path / "table.json")]
    assert dispatch_table.main([*arguments, "--check"]) == 1
    assert dispatch_table.main(arguments) == 0
    assert dispatch_table.main([*arguments, "--check"]) == 0
    written = json.loads((tmp_path / "table.json").read_text())
    assert written == dispatch_table.table(results.load_folder(tmp_path))


def test_the_committed_table_is_what_the_results_say():
    """None is committed as long as there are no results of a GPU."""
    content = dispatch_table.table(results.load_folder(results.FOLDER))
    if dispatch_table.OUT.exists() or content["devices"]:
        assert dispatch_table.OUT.read_text() == dispatch_table.dumps(content)
    assert measured.table() == content["devices"]


def test_dtype_names_are_those_of_the_shapes():
    import torch

    from bench.shapes import DTYPES

    pairs = [(torch.bfloat16, "ieee"), (torch.float16, "tf32"), (torch.float32, "tf32"),
             (torch.float32, "ieee")]  # fmt: skip
    assert [measured.dtype_name(*pair) for pair in pairs] == list(DTYPES)
