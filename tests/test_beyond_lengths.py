"""lengths= without packing: equal to pack, run, unpack.

Through torch's operators in every bit, since both give them the same rows. The reference loop
multiplies padded rows, in another order and number, so that BLAS may round otherwise.
"""

import functools

import numpy as np
import pytest
import torch
from tolerances import GRADIENTS32, VALUES32, VALUES64
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn
from fusedrnn import packing

T, B, I, H = 7, 5, 3, 4
LENGTHS = {
    "unsorted": [3, 7, 1, 5, 2],
    "sorted": [7, 6, 4, 2, 1],
    "short": [2, 3, 1, 3, 2],  # none reaches T
    "equal": [7, 7, 7, 7, 7],
}
MODULES = {
    "lstm": fusedrnn.LSTM,
    "lstm-projected": functools.partial(fusedrnn.LSTM, proj_size=2),
    "gru": fusedrnn.GRU,
    "rnn": fusedrnn.RNN,
}
LAYOUTS = {
    "plain": {},
    "2x2": {"num_layers": 2, "bidirectional": True},
    "batch_first": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}
each_module = pytest.mark.parametrize("name", MODULES)
each_backend = pytest.mark.parametrize("backend", ["aten", "reference"])
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def states(result):
    return result[1] if isinstance(result[1], tuple) else (result[1],)


def assert_same(backend, found, expected):
    exact = {"rtol": 0, "atol": 0} if backend == "aten" else {}
    torch.testing.assert_close(found, expected, **exact)


def make(name, layout, backend, **kwargs):
    """A module, an input with something in the padding, and an initial state."""
    module = MODULES[name](I, H, **LAYOUTS[layout], backend=backend, **kwargs)
    x = torch.randn(B, T, I) if module.batch_first else torch.randn(T, B, I)
    layers = module.num_layers * (2 if module.bidirectional else 1)
    hx = torch.randn(layers, B, module.proj_size or H)
    if isinstance(module, fusedrnn.LSTM):
        hx = (hx, torch.randn(layers, B, H))
    return module, x, hx


@each_layout
@each_backend
@pytest.mark.parametrize("lengths", LENGTHS)
@each_module
def test_equal_to_packing(name, lengths, backend, layout):
    module, x, hx = make(name, layout, backend)
    lengths = torch.tensor(LENGTHS[lengths])
    x.requires_grad_()
    output, *final = (r := module(x, hx, lengths=lengths))[0], *states(r)
    packed = pack_padded_sequence(x, lengths, module.batch_first, enforce_sorted=False)
    data, last = module(packed, hx)
    unpacked, _ = pad_packed_sequence(data, module.batch_first, total_length=T)
    assert_same(backend, output, unpacked)
    for one, other in zip(final, states((None, last)), strict=True):
        assert_same(backend, one, other)

    d_output = torch.randn_like(output)
    wanted = [x, *module.parameters()]
    found = torch.autograd.grad([output, *final], wanted, [d_output, *final], retain_graph=True)
    expected = torch.autograd.grad(
        [unpacked, *states((None, last))], wanted, [d_output, *states((None, last))]
    )
    for one, other in zip(found, expected, strict=True):
        # The graph is another (indexing, not unpacking), and adds in another order.
        torch.testing.assert_close(one, other, **GRADIENTS32)


@each_backend
@each_module
def test_each_row_is_the_row_alone(name, backend):
    """The oracle that knows no packing: cut the row, run it, look at its own end."""
    module, x, hx = make(name, "2x2", backend)
    lengths = torch.tensor([3, 7, 1, 5, 2])
    result = module(x, hx, lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        row_hx = tuple(h[:, b : b + 1] for h in states((None, hx)))
        row_hx = row_hx if len(row_hx) > 1 else row_hx[0]
        alone = module(x[:n, b : b + 1], row_hx)
        torch.testing.assert_close(result[0][:n, b], alone[0][:, 0], **VALUES32)
        assert torch.equal(result[0][n:, b], torch.zeros_like(result[0][n:, b]))
        for one, other in zip(states(result), states(alone), strict=True):
            torch.testing.assert_close(one[:, b], other[:, 0], **VALUES32)


@each_layout
@each_backend
@each_module
@pytest.mark.parametrize("lengths", [[0, 7, 0, 2, 0], [0, 0, 0, 0, 0]], ids=["some", "all"])
def test_rows_of_length_zero_keep_their_state(name, backend, layout, lengths):
    module, x, hx = make(name, layout, backend)
    result = module(x, hx, lengths=torch.tensor(lengths))
    output = result[0] if module.batch_first else result[0].transpose(0, 1)
    empty = torch.tensor(lengths) == 0
    assert not output[empty].any()
    for final, first in zip(states(result), states((None, hx)), strict=True):
        assert torch.equal(final[:, empty], first[:, empty])
    if not empty.all():
        rows = (~empty).nonzero()[:, 0]
        part = tuple(h[:, rows] for h in states((None, hx)))
        alone = module(
            x.index_select(0 if module.batch_first else 1, rows),
            part if len(part) > 1 else part[0],
            lengths=torch.tensor(lengths)[rows],
        )
        rest = alone[0] if module.batch_first else alone[0].transpose(0, 1)
        torch.testing.assert_close(output[rows], rest, **VALUES32)


@each_backend
def test_gradient_of_an_empty_row_goes_to_its_state(backend):
    module, x, hx = make("gru", "plain", backend)
    hx.requires_grad_()
    x.requires_grad_()
    _, final = module(x, hx, lengths=torch.tensor([0, 7, 0, 2, 0]))
    d_x, d_hx = torch.autograd.grad(final.sum(), [x, hx])
    assert torch.equal(d_hx[:, [0, 2, 4]], torch.ones(1, 3, H))
    assert not d_x[:, [0, 2, 4]].any()
    assert not d_x[2:, 3].any()
    assert d_x[:2, 3].all()


@each_backend
@each_layout
def test_padding_is_never_read(backend, layout):
    module, x, hx = make("lstm", layout, backend)
    lengths = torch.tensor([3, 7, 1, 5, 0])
    clean = module(x, hx, lengths=lengths)
    time = torch.arange(T)
    padding = time[None, :] >= lengths[:, None]
    x = x.masked_fill((padding if module.batch_first else padding.T)[:, :, None], float("nan"))
    dirty = module(x, hx, lengths=lengths)
    assert torch.equal(clean[0], dirty[0])
    assert all(map(torch.equal, states(clean), states(dirty)))


@each_backend
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int8])
def test_small_dtypes_of_long_input(backend, dtype):
    module = fusedrnn.GRU(I, H, backend=backend)
    x, lengths = torch.randn(300, 2, I), torch.tensor([120, 3])
    assert torch.equal(module(x, lengths=lengths.to(dtype))[0], module(x, lengths=lengths)[0])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.int16])
def test_integer_dtypes(dtype):
    module, x, _ = make("gru", "plain", None)
    lengths = torch.tensor([3, 7, 1, 5, 2])
    assert torch.equal(module(x, lengths=lengths.to(dtype))[0], module(x, lengths=lengths)[0])


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(backend, dtype):
    module, x, _ = make("lstm", "2x2", backend, dtype=dtype)
    x = x.to(dtype)
    lengths = torch.tensor([3, 4, 1, 5, 2])
    output, (h_n, _) = module(x, lengths=lengths)
    assert output.dtype == h_n.dtype == dtype
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    unpacked, _ = pad_packed_sequence(module(packed)[0], total_length=T)
    # In another order of the rows, which a product in float64 may round otherwise.
    torch.testing.assert_close(output, unpacked, **VALUES64 if dtype == torch.float64 else VALUES32)


@each_backend
def test_unbatched(backend):
    module, x, _ = make("gru", "2x2", backend)
    for length in (torch.tensor([4]), torch.tensor(4)):
        output, h_n = module(x[:, 0], lengths=length)
        cut, last = module(x[:4, 0])
        torch.testing.assert_close(output[:4], cut)
        torch.testing.assert_close(h_n, last)
        assert not output[4:].any()


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (["3", "7"], TypeError, r"lengths: expected 5 integers or a bool mask.*got list"),
        (5, RuntimeError, r"lengths: expected shape \(5,\), got \(\)"),
        ([3, 7, 1, 5, 2.5], TypeError, r"lengths: expected integers or a bool mask, got .*float32"),
        (torch.ones(B), TypeError, r"lengths: expected integers .*, got torch.float32"),
        (torch.ones(B).bool(), RuntimeError, r"lengths: .*mask of shape \(7, 5\), .*got \(5,\)"),
        (torch.ones(4, dtype=torch.int64), RuntimeError, r"lengths: .*\(5,\), got \(4,\)"),
        (torch.ones(B, 1, dtype=torch.int64), RuntimeError, r"lengths: .*\(5,\), got \(5, 1\)"),
        (torch.tensor([8, 1, 1, 1, 1]), ValueError, r"lengths: .*T=7, got values from 1 to 8"),
        (torch.tensor([3, -1, 1, 1, 1]), ValueError, r"lengths: .*T=7, got values from -1 to 3"),
    ],
)
def test_misuse(lengths, error, message):
    module, x, _ = make("lstm", "plain", None)
    with pytest.raises(error, match=message):
        module(x, lengths=lengths)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_sent_to_lengths(layout):
    module, *_ = make("gru", "batch_first", None)
    parts = [torch.randn(n, I) for n in (3, 7, 5)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    with pytest.raises(TypeError, match=r"input: .* lengths=, or a PackedSequence, got a nested"):
        module(nested)
    padded = torch.nested.to_padded_tensor(nested, 0.0)
    assert module(padded, lengths=torch.tensor([3, 7, 5]))[0].shape == (3, 7, 2 * H)


def test_misuse_with_a_packed_sequence():
    module, x, _ = make("lstm", "plain", None)
    packed = pack_padded_sequence(x, torch.tensor([7, 6, 4, 2, 1]))
    with pytest.raises(ValueError, match="lengths: a PackedSequence has its own"):
        module(packed, lengths=torch.tensor([7, 6, 4, 2, 1]))


@each_module
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_shapes_on_the_meta_device(name, backend, device):
    module, x, _ = make(name, "batch_first", backend)
    lengths = torch.tensor([3, 7, 0, 5, 2])
    real = module(x, lengths=lengths)
    result = module.to("meta")(x.to("meta"), lengths=lengths.to(device))
    for one, other in zip((result[0], *states(result)), (real[0], *states(real)), strict=True):
        assert one.device.type == "meta"
        assert one.shape == other.shape
    result[0].sum().backward()
    assert module.weight_hh_l0.grad.shape == module.weight_hh_l0.shape


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("layout", ["plain", "batch_first"])
def test_misuse_of_what_was_compiled(layout, backend):
    module, x, _ = make("gru", layout, backend)
    good = {"lengths": torch.tensor([3, 7, 0, 5, 2])}
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(module, (x,), good).module()
    for run in (compiled, exported):
        torch.testing.assert_close(run(x, **good), module(x, **good))
        for wrong, message in (
            ([8, 1, 1, 1, 1], "T=7, got values from 1 to 8"),
            ([3, -1, 1, 1, 1], "T=7, got values from -1 to 3"),
        ):
            with pytest.raises(ValueError, match=f"lengths: .*{message}"):
                run(x, lengths=torch.tensor(wrong))


@pytest.mark.parametrize("batch_first", [False, True])
def test_no_row_ends_outside_the_tensor(batch_first):
    """On a GPU the values are not looked at, and become addresses."""
    shape = (B, T, I) if batch_first else (T, B, I)
    lengths = torch.tensor([3, 9, -2, 0, 7], dtype=torch.int32)
    rows = packing.rows_of(torch.zeros(shape), batch_first, lengths, None)
    assert (rows.T, rows.B) == (T, B)
    assert rows.lengths.tolist() == [3, 7, 0, 0, 7]
    h = torch.randn(T * B, 2, H)
    within = packing.rows_of(torch.zeros(shape), batch_first, lengths.clamp(0, T), None)
    h_0 = torch.zeros(2, B, H)
    assert torch.equal(packing.previous_h(h, h_0, rows), packing.previous_h(h, h_0, within))


def test_values_break_no_graph():
    module, x, _ = make("lstm", "2x2", None)
    lengths = torch.tensor([3, 0, 1, 5, 2])
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, lengths=lengths)[0], module(x, lengths=lengths)[0])


FORMS = {
    "list": list,
    "tuple": tuple,
    "numpy": np.array,
    "numpy of 16 bits": lambda n: np.array(n, dtype=np.int16),
    "mask": lambda n: torch.arange(T)[:, None] < torch.tensor(n),
    "numpy mask": lambda n: np.arange(T)[:, None] < np.array(n),
    "nested list of bools": lambda n: [[t < length for length in n] for t in range(T)],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_every_form(form, backend):
    module, x, _ = make("gru", "2x2", backend)
    lengths = [3, 0, 1, 7, 2]
    expected = module(x, lengths=torch.tensor(lengths))
    torch.testing.assert_close(module(x, lengths=FORMS[form](lengths)), expected, rtol=0, atol=0)


def test_masks_in_other_layouts():
    module, x, _ = make("gru", "batch_first", None)
    mask = torch.arange(T) < torch.tensor([3, 0, 1, 7, 2])[:, None]
    expected = module(x, lengths=mask.sum(1))
    torch.testing.assert_close(module(x, lengths=mask), expected, rtol=0, atol=0)
    torch.testing.assert_close(
        module(x[0], lengths=mask[0]), module(x[0], lengths=torch.tensor(3)), rtol=0, atol=0
    )
    for one in (3, np.int64(3), np.array(3), [3]):
        torch.testing.assert_close(
            module(x[0], lengths=one), module(x[0], lengths=torch.tensor(3)), rtol=0, atol=0
        )
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    # By another backend.
    torch.testing.assert_close(compiled(x, lengths=mask), expected, **VALUES32)


@pytest.mark.parametrize("start", [False, True])
def test_a_mask_with_holes_is_refused(start):
    module, x, _ = make("gru", "plain", None)
    mask = torch.ones(T, B, dtype=torch.bool)
    mask[0 if start else 4, 2] = False
    at = 0 if start else 4
    with pytest.raises(ValueError, match=rf"lengths: .*row 2 step {at} is false and step {at + 1}"):
        module(x, lengths=mask)


NOT_NUMBERS = [float("-inf"), float("inf"), float("nan")]
WAYS = {
    "auto": {},
    "reference": {"backend": "reference"},
    "resets": {"reset": True},
    "recurrent dropout": {"recurrent_dropout": 0.2},
    "zoneout": {"zoneout": 0.2},
    "clipping": {"clip_gradient": 1.0},
    "weight drop": {"weight_drop": 0.2},
    "input dropout": {"input_dropout": 0.2},
    "states": {"return_states": True},
}


@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_padding_reaches_nothing(kind, way, value):
    """Whatever lies beyond a row's length: results and all gradients are those of zeros there. So
    are those of upstream gradients there, and of the state of a row that has no step."""
    options = dict(WAYS[way])
    reset = options.pop("reset", False)
    extra = {"return_states": True} if options.pop("return_states", False) else {}
    module = getattr(fusedrnn, kind)(I, H, 2, bidirectional=True, **options)
    lengths = torch.tensor([3, 7, 0, 5, 2])
    over = torch.arange(T)[:, None] >= lengths
    if reset:
        extra["reset"] = torch.rand(T, B) < 0.3
    states = [torch.randn(4, B, H) for _ in range(2 if kind == "LSTM" else 1)]

    def run(filling):
        x = torch.randn(T, B, I, generator=torch.Generator().manual_seed(1))
        x[over] = filling
        hx = [s.clone() for s in states]
        for s in hx:
            s[:, 2] = filling  # of a row without steps
        leaves = [t.requires_grad_() for t in (x, *hx)]
        torch.manual_seed(5)
        output, final, *planes = module(
            x, tuple(hx) if kind == "LSTM" else hx[0], lengths=lengths, **extra
        )
        final = final if kind == "LSTM" else (final,)
        results = [output, *final, *(planes[0].values() if planes else ())]
        cotangents = [
            torch.randn(r.shape, generator=torch.Generator().manual_seed(2)) for r in results
        ]
        cotangents[0][over] = filling
        results += torch.autograd.grad(results, [*leaves, *module.parameters()], cotangents)
        rows = [r for r in range(B) if r != 2]  # row 2 keeps its state, whatever it is
        return [r[:, rows] if r.shape[:2] == (4, B) else r for r in results]

    for found, expected in zip(run(value), run(0.0), strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected, **GRADIENTS32)
