"""The demo, examples/char_lm.py: its counting models, its check of agreement, its outputs."""

import csv
import importlib.util
import itertools
import math
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import fusedrnn

SOURCE = Path(__file__).parents[1] / "examples" / "char_lm.py"


@pytest.fixture(scope="module")
def char_lm():
    spec = importlib.util.spec_from_file_location("char_lm", SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["char_lm"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    yield module
    del sys.modules["char_lm"]


@pytest.fixture
def small(char_lm, tmp_path):
    """Runs the demo on its own source, small; takes more arguments, returns the exit status."""

    def run(*more: str) -> int:
        arguments = ["--text", SOURCE, "--hidden", 12, "--embedding", 8, "--batch", 4, "--time", 16]
        arguments += ["--steps", 6, "--sample", 20, "--out", tmp_path, "--device", "cpu", *more]
        return char_lm.main([str(a) for a in arguments])

    return run


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_shows_everything_it_promises(small, capsys, tmp_path, cell):
    assert small("--cell", cell, "--layers", 2) == 0
    shown = capsys.readouterr().out
    name = cell.upper()
    for promised in (
        f"fusedrnn {fusedrnn.__version__}",
        "runs on  loop" if cell == "gru" else "runs on  aten",
        "not on   triton",
        f"torch.nn.{name}",
        f"fusedrnn.{name}",
        "tokens (characters) per second",
        "unigram",
        "bigram",
        "agreement: ",
        "written by the fusedrnn model",
        "no terminal: no progress bar",
    ):
        assert promised in shown
    rows = list(csv.DictReader((tmp_path / "char_lm.csv").open()))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert abs(float(row["torch_nn_bits"]) - float(row["fusedrnn_bits"])) <= float(
            row["allowed_difference"]
        )
    assert (tmp_path / "char_lm.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_another_backend_agrees_within_what_rounding_does(small, capsys):
    assert small("--backend", "reference", "--steps", 12) == 0
    assert "runs on  reference: forced" in capsys.readouterr().out


def skewed(gradient):
    """The gradient, off by one part in a hundred in every second unit."""
    factor = torch.ones(gradient.shape[-1])
    factor[::2] = 1.01
    return gradient * factor


@pytest.mark.parametrize("wrong", [lambda g: g.roll(1, 0), skewed, lambda g: g * math.nan])
def test_a_wrong_gradient_fails(small, capsys, monkeypatch, wrong):
    class WrongLSTM(fusedrnn.LSTM):
        def forward(self, input, hx=None):
            output, hx = super().forward(input, hx)
            if output.requires_grad:
                output.register_hook(wrong)
            return output, hx

    monkeypatch.setattr(fusedrnn, "LSTM", WrongLSTM)
    assert small("--steps", 12) == 1
    assert "the losses diverge" in capsys.readouterr().err


def test_a_wrong_output_fails(small, monkeypatch):
    class WrongLSTM(fusedrnn.LSTM):
        def forward(self, input, hx=None):
            output, hx = super().forward(input, hx)
            return output * 1.001, hx

    monkeypatch.setattr(fusedrnn, "LSTM", WrongLSTM)
    assert small() == 1


def test_learns_what_a_bigram_cannot_know(char_lm, tmp_path, capsys):
    # After an "a" comes "b" or "c" in turn: one bit for a bigram, none with a memory.
    text = tmp_path / "text"
    text.write_text("abac" * 2000)
    arguments = ["--text", text, "--hidden", 16, "--embedding", 8, "--batch", 8, "--time", 16]
    arguments += ["--steps", 80, "--rate", 0.03, "--out", tmp_path, "--sample", 30]
    assert char_lm.main([str(a) for a in [*arguments, "--device", "cpu"]]) == 0
    shown = capsys.readouterr().out
    bits = {words[0]: float(words[1]) for words in map(str.split, shown.splitlines())
            if words and words[0] in ("unigram", "bigram", "fusedrnn.LSTM") and "." in words[1]
            and "," not in words[1]}  # fmt: skip
    assert bits["unigram"] == pytest.approx(1.5, abs=0.01)
    assert bits["bigram"] == pytest.approx(0.5, abs=0.02)
    assert bits["fusedrnn.LSTM"] < 0.1
    assert "bits better than the bigram model" in shown
    assert "abacabac" in shown.rsplit("written by", 1)[1]


def test_baselines_are_the_counts_they_say(char_lm):
    train, held = "abracadabra, abracadabra", "cabbage, bar"
    vocabulary = char_lm.Vocabulary.of(train, at_least=1)
    size = len(vocabulary)
    assert size == len(set(train)) + 1
    train_ids, held_ids = vocabulary.encode(train), vocabulary.encode(held)
    unigram, bigram = char_lm.baseline_bits(train_ids, held_ids[:-1], held_ids[1:], size)

    known = [c if c in train else "?" for c in held]
    ones, pairs = Counter(train), Counter(itertools.pairwise(train))
    before = Counter(train[:-1])
    p = {c: (ones[c] + 1) / (len(train) + size) for c in [*ones, "?"]}
    assert sum(p.values()) == pytest.approx(1)
    following = list(itertools.pairwise(known))
    expected = -sum(math.log2(p[y]) for _, y in following) / len(following)
    assert unigram == pytest.approx(expected)
    expected = -sum(
        math.log2((pairs[x, y] + size * p[y]) / (before[x] + size)) for x, y in following
    ) / len(following)
    assert bigram == pytest.approx(expected)


def test_streams_are_contiguous_text(char_lm):
    streams = char_lm.streams(torch.arange(23), 4)
    assert streams.tolist() == torch.arange(20).view(4, 5).t().tolist()


def test_standard_library_is_found_and_always_the_same(char_lm):
    name, text = char_lm.read_text(None, 200_000)
    assert "standard library" in name
    assert len(text) == 200_000
    assert text.count("def ") > 100
    assert char_lm.read_text(None, 200_000) == (name, text)


def test_says_what_is_wrong_with_its_arguments(small, char_lm, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        char_lm.main(["--text", str(tmp_path / "absent")])
    assert stop.value.code == 2
    assert "--text must be a file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        small("--hidden", 0)
    assert stop.value.code == 2
    assert "--hidden must be at least 1, got 0" in capsys.readouterr().err
    assert small("--limit", 300, "--time", 100) == 2
    assert "too few for --batch 4 --time 100" in capsys.readouterr().err


def test_runs_without_matplotlib_and_says_so(small, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert small() == 0
    assert "no picture: matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "char_lm.png").exists()
