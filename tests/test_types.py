"""Signatures and annotations: what `help` and an IDE show is what the code takes and returns.

What pyright says of tests/typed_program.py, and of the package, is a part of `make lint`.
"""

import dataclasses
import functools
import inspect
import pydoc
import re
import types
import typing

import pytest
import torch
import typed_program
from torch import nn

import fusedrnn
from fusedrnn import dispatch, functional

KINDS = ("LSTM", "GRU", "RNN")
every_kind = pytest.mark.parametrize("kind", KINDS)


def fits(value, kind) -> bool:
    """Whether `value` is of the annotated type `kind`, in every part."""
    if kind is typing.Any:
        return True
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is tuple:
        same = isinstance(value, tuple) and len(value) == len(parts)
        return same and all(fits(v, part) for v, part in zip(value, parts, strict=True))
    if origin is dict:
        return isinstance(value, dict) and all(fits(item, tuple[parts]) for item in value.items())
    return isinstance(value, kind)


@pytest.mark.parametrize(
    "part", ["modules", "steps_and_streams", "functions", "lengths_and_states"]
)
def test_types_that_pyright_sees_are_those_that_come(part, monkeypatch):
    seen = []

    def assert_type(value, kind):
        seen.append(kind)
        assert fits(value, kind), f"{type(value)} is not {kind}"
        return value

    monkeypatch.setattr(typed_program, "assert_type", assert_type)
    getattr(typed_program, part)()
    assert len(seen) >= 4


def test_fits_tells_types_apart():
    pair = (torch.zeros(1), torch.zeros(1))
    assert fits(pair, typed_program.Pair)
    assert fits(None, typed_program.Pair | None)
    assert fits({"h": pair[0]}, dict[str, torch.Tensor])
    for value in (pair[0], (pair[0],), (pair[0], pair), list(pair)):
        assert not fits(value, typed_program.Pair)
    assert not fits({"h": pair}, dict[str, torch.Tensor])


@every_kind
def test_signature_is_torchs_then_ours_by_keyword(kind):
    init = getattr(fusedrnn, kind).__init__
    assert not hasattr(init, "__signature__")  # what is shown is what Python takes
    shown = inspect.signature(getattr(fusedrnn, kind)).parameters
    torchs = dict(inspect.signature(nn.RNNBase).parameters)
    del torchs["mode"]
    names = list(torchs)
    if kind == "RNN":
        names.insert(3, "nonlinearity")
    own = {"LSTM": ["forget_bias"], "GRU": ["reset_after"]}.get(kind, [])
    own += [
        "num_heads",
        "direction",
        "residual",
        "backend",
        "save",
        *(f.name for f in dataclasses.fields(fusedrnn.Regularizers)),
    ]
    assert list(shown) == [*names, *own]
    for name, parameter in shown.items():
        by_keyword = parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert by_keyword == (name in own), name
        assert parameter.annotation is not inspect.Parameter.empty, name
        if name in torchs:
            assert parameter.default == torchs[name].default, name
    for field in dataclasses.fields(fusedrnn.Regularizers):
        assert shown[field.name].default == field.default


@every_kind
def test_help_names_every_argument(kind):
    class_ = getattr(fusedrnn, kind)
    text = pydoc.render_doc(class_, renderer=pydoc.plaintext)
    shown = text.split(f" |  {kind}(")[1].splitlines()[0]
    explained = text.split("Args:")[1].split("Inputs:")[0]
    names = list(inspect.signature(class_).parameters)
    assert {"backend", "save", "zoneout", "generator"} < set(names)
    for name in names:
        assert f"{name}: " in shown, name
        assert re.search(rf"\b{name}(:|, dtype:)", explained), name


def test_literals_are_what_is_accepted():
    assert typing.get_args(fusedrnn.types.Backend) == ("auto", *dispatch.BACKENDS)
    assert typing.get_args(fusedrnn.types.Save) == functional.SAVE
    for nonlinearity in typing.get_args(fusedrnn.types.Nonlinearity):
        assert fusedrnn.RNN(3, 5, nonlinearity=nonlinearity).nonlinearity == nonlinearity


@pytest.mark.parametrize(
    "name",
    [
        f"{kind}.{method}"
        for kind in (*KINDS, "Recurrent")
        for method in ("__init__", "forward", "step", "stream")
    ]
    + [f"{kind}Cell.__init__" for kind in KINDS]
    + ["functional.recurrent", "functional.lstm", "functional.rnn", "explain", "use_backend"]
    + ["Stream.__init__", "Stream.reset", "gradient_flow.sensitivity", "replace_modules"],
)
def test_annotations_can_be_read_at_run_time(name):
    function = functools.reduce(getattr, name.split("."), fusedrnn)
    hints = typing.get_type_hints(inspect.unwrap(function))
    parameters = set(inspect.signature(function).parameters) - {"self"}
    assert set(hints) == {*parameters, "return"}
