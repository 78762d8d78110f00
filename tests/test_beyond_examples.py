"""The examples of what torch.nn cannot do run, and print what their texts promise."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rollouts(capsys):
    load("rollouts").main()
    assert "stream: state (1, 8, 32)" in capsys.readouterr().out


def test_own_cell(capsys):
    load("own_cell").main(["--steps", "3"])
    out = capsys.readouterr().out
    assert out.startswith("def _backward(")
    assert "step 3: loss 0." in out


def test_derivatives(capsys):
    load("derivatives").main()
    assert "per-sample gradients of weight_hh_l0: (4, 32, 8)" in capsys.readouterr().out


def test_regularizers(capsys):
    load("regularizers").main(["--epochs", "2"])
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_gradient_flow(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "flow.png"
    load("gradient_flow").main(["--steps", "12", "--hidden", "4", "--out", str(picture)])
    assert picture.stat().st_size > 10_000
    assert "RNN, relu, W_hh = 1    1.0e+00" in capsys.readouterr().out


def test_launches(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "launches.svg"
    load("launches").main(["--out", str(picture)])
    assert picture.read_text().count("<!-- step ") == 10


def test_onnx_export(capsys):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    load("onnx_export").main()
    difference = float(capsys.readouterr().out.splitlines()[-1].split(":")[-1])
    assert difference < 1e-5
