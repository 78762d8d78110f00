"""Every cell as a module on the kernels, interpreted, against the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_as_good
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from fusedrnn.cells import REGISTRY, get


def run(module, input, hx, lengths, reset):
    """Outputs, final states and all gradients, from the same random cotangents."""
    generator = torch.Generator().manual_seed(1)
    leaves = [input, *hx, *module.parameters()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    sequence, options = input, {}
    if lengths == "packed":
        counts = torch.arange(input.shape[0], 0, -1).clamp(max=input.shape[0])
        counts = counts.repeat(input.shape[1])[: input.shape[1]].sort(descending=True)[0]
        sequence = pack_padded_sequence(input, counts)
    elif lengths is not None:
        options["lengths"] = lengths
    if reset is not None:
        options["reset"] = reset
    output, final = module(sequence, hx if len(hx) > 1 else hx[0], **options)
    output = output.data if lengths == "packed" else output
    results = [output, *(final if isinstance(final, tuple) else (final,))]
    drawn = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results]
    gradients = torch.autograd.grad(results, leaves, drawn)
    names = [*(f"final {i}" for i in range(len(results) - 1)), "d_input"]
    names += [f"d_hx {i}" for i in range(len(hx))] + [
        f"d_{n}" for n, _ in module.named_parameters()
    ]
    return dict(zip(["output", *names], [*results, *gradients], strict=True))


def check(cell, T, B, I, H, rows, num_layers=1, bidirectional=False, seed=0, **options):
    torch.manual_seed(seed)
    made = fusedrnn.Recurrent(cell, I, H, num_layers, bidirectional=bidirectional, **options)
    layers = num_layers * (1 + bidirectional)
    # A normaliser, which divides, is not near 0.
    states = get(cell).states
    hx = [torch.randn(layers, B, H) for _ in states]
    hx = [h.abs() + 1 if name == "n" else h for name, h in zip(states, hx, strict=True)]
    input = torch.randn(T, B, I)
    lengths = {"packed": "packed", "lengths": torch.randint(0, T + 1, (B,))}.get(rows)
    reset = torch.rand(T, B) < 0.3 if rows == "reset" else None
    found = {}
    for backend, dtype in (
        ("triton", "float32"),
        ("reference", "float32"),
        ("reference", "float64"),
    ):
        wide = getattr(torch, dtype)
        module = made.to(wide)
        module.backend = backend
        given = [t.detach().to(wide) for t in (input, *hx)]
        if "generator" in options:
            options["generator"].manual_seed(seed)
        found[backend, dtype] = run(module, given[0], given[1:], lengths, reset)
    exact = found["reference", "float64"]
    for name in exact:
        ours, plain = found["triton", "float32"][name], found["reference", "float32"][name]
        assert_as_good(ours, plain, exact[name], f"{cell}: {name}")


# Of every cell the quicker way, and of one of each kind the other: all is computed again.
SAVED = [(cell, "gates") for cell in REGISTRY]
SAVED += [(cell, "states") for cell in ("indrnn_tanh", "layer_norm_lstm", "mgu", "slstm")]
SAVED += [("peephole_lstm_full", "states")]


@pytest.mark.parametrize(("cell", "save"), SAVED)
def test_a_layer(cell, save):
    check(cell, 2, 2, 4, 6, "lengths", 1, True, save=save)


@settings(max_examples=8, deadline=None)
@given(
    cell=st.sampled_from(list(REGISTRY)),
    T=st.integers(1, 3),
    B=st.integers(1, 3),
    I=st.integers(1, 5),
    size=st.integers(3, 9),
    num_heads=st.integers(1, 2),
    rows=st.sampled_from(["all", "packed", "lengths", "reset"]),
    save=st.sampled_from(["gates", "states"]),
    way=st.sampled_from(["forward", "reverse", "both"]),
    residual=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 9),
)
def test_drawn(cell, T, B, I, size, num_heads, rows, way, **options):
    options["bidirectional"] = way == "both"
    options["direction"] = "reverse" if way == "reverse" else "forward"
    num_heads = 1 if REGISTRY[cell].widest else num_heads
    check(cell, T, B, I, size * num_heads, rows, num_heads=num_heads, **options)


def test_heads_of_other_matrices():
    check("peephole_lstm_full", 3, 2, 4, 6, "lengths", 2, True, num_heads=2)
    check("peephole_lstm_full", 3, 2, 4, 6, "reset", num_heads=3, save="states", bias=False)


@pytest.mark.parametrize("widths", [(20, 9), (3, 9, 5), (4,)])
@pytest.mark.parametrize("save", ["gates", "states"])
def test_widths_of_stages(widths, save):
    """The widest stage first, within, or last, which is h."""
    cell = f"mlp_transition(layer_sizes={widths}, negative_slope=0.1)"
    options = {"zoneout": 0.3, "recurrent_dropout": 0.4, "generator": torch.Generator()}
    check(cell, 3, 2, 4, 7, "lengths", 2, True, save=save, **options)
    check(cell, 3, 2, 4, 7, "packed", 2, bias=False, save=save)
