"""fusedrnn.convert: the same numbers in, the same numbers and gradients out.

Every layout is compared with a forward pass written here from the library's documentation, and
with the library itself where it is installed: values, final states, and the gradients of the input,
of the initial states and of every array of the library.
"""

import os
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tolerances import GRADIENTS32, GRADIENTS64, VALUES32, VALUES64

import fusedrnn
from fusedrnn import convert, functional

os.environ.setdefault("KERAS_BACKEND", "torch")

T, B, I, H = 5, 3, 6, 4
STATES = {"lstm": 2, "slstm": 4}  # of the others 1


def random(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype) * 0.5


def compare(theirs, ours, *tensors, tolerances=(VALUES64, GRADIENTS64)):
    """Both functions of the same tensors: outputs and, for one cotangent, every gradient."""
    found = []
    cotangents = None
    for function in (theirs, ours):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        outputs = function(*leaves)
        cotangents = cotangents or [torch.randn_like(o) for o in outputs]
        found.append((outputs, torch.autograd.grad(outputs, leaves, cotangents)))
    for kind, tolerance in enumerate(tolerances):
        assert len(found[0][kind]) == len(found[1][kind])
        for expected, actual in zip(found[0][kind], found[1][kind], strict=True):
            torch.testing.assert_close(actual, expected, **tolerance)
    assert all(gradient.abs().max() > 0 for gradient in found[0][1])


def run(cell, weights, x, states):
    """Ours: x [B, T, I], states each [D, B, H]; the output and the final states."""
    biased = "bias_ih" in weights[0]
    weights = [w for own in weights for w in own.values()]
    width, heads = states[0].shape[-1], weights[1].shape[0] if weights[1].dim() == 3 else 1
    output, final = functional.recurrent(
        cell, x, tuple(states), weights, hidden_size=width, num_heads=heads, batch_first=True,
        bias=biased, bidirectional=states[0].shape[0] == 2,
    )  # fmt: skip
    return [output, *final]


def randomise(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(random(*parameter.shape))
    return module


def final(output):
    """The states of a module's output, as a list."""
    return [output[0], *(output[1] if isinstance(output[1], tuple) else output[1:])]


# ---------------------------------------------------------------------------------------- Keras

KERAS = {
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
    "gru_reset_before": ("GRU", {"reset_after": False}),
    "rnn_tanh": ("SimpleRNN", {}),
    "rnn_relu": ("SimpleRNN", {"activation": "relu"}),
}


@pytest.fixture(scope="module")
def keras():
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "torch":
        pytest.skip(f"the gradients need Keras on torch, it is on {keras.backend.backend()}")
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    yield keras
    keras.config.set_floatx(before)


def keras_layer(keras, cell, bidirectional=False, width=I, **options):
    kind, own = KERAS[cell]
    options = {"return_sequences": True, "return_state": True, **options}
    layer = getattr(keras.layers, kind)(H, **own, **options)
    layer = keras.layers.Bidirectional(layer) if bidirectional else layer
    layer.build((None, None, width))
    layer.set_weights([random(*w.shape).numpy() for w in layer.get_weights()])
    return layer


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", KERAS)
def test_keras(keras, cell, bias, bidirectional):
    layer = keras_layer(keras, cell, bidirectional, use_bias=bias)
    D, S = 1 + bidirectional, STATES.get(cell, 1)
    arrays = [torch.from_numpy(a) for a in layer.get_weights()]
    size = len(arrays) // D
    x, states = random(B, T, I), [random(D, B, H) for _ in range(S)]

    def theirs(x, *rest):
        # Keras wants the states of the one direction, then those of the other.
        initial = [s[d] for d in range(D) for s in rest[:S]]
        seeds = [variable.value for variable in layer.non_trainable_variables]
        output, *last = layer.stateless_call(list(rest[S:]), seeds, x, initial_state=initial)[0]
        return [output, *(torch.stack(last[s::S]) for s in range(S))]

    def ours(x, *rest):
        own = rest[S:]
        weights = [convert.read("keras", cell, *own[d * size : d * size + size]) for d in range(D)]
        return run(cell, weights, x, rest[:S])

    # Keras's loop over any cell, unlike those of LSTM and GRU, multiplies float64 in float32.
    own_loop = cell in ("lstm", "gru")
    tolerances = (VALUES64, GRADIENTS64) if own_loop else (VALUES32, GRADIENTS32)
    compare(theirs, ours, x, *states, *arrays, tolerances=tolerances)
    module = convert.from_keras(layer)
    expected = theirs(x, *states, *arrays)
    actual = final(module(x, tuple(states) if S > 1 else states[0]))
    torch.testing.assert_close(actual, expected, **tolerances[0])
    for array, same in zip(layer.get_weights(), convert.to_keras(module), strict=True):
        np.testing.assert_array_equal(array, same)
    assert (module.bias, module.batch_first, module.training) == (bias, True, True)

    # Back: weights whose two biases differ, those of the second layer of two.
    deep = fusedrnn.Recurrent(
        cell, I, H, 2, bias, batch_first=True, bidirectional=bidirectional, dtype=torch.float64
    )
    randomise(deep)
    other = keras_layer(keras, cell, bidirectional, width=D * H, use_bias=bias)
    other.set_weights(convert.to_keras(deep, 1))
    x = random(B, T, D * H)
    weights = [w for name, w in deep.named_parameters() if "_l1" in name]
    options = {"bias": bias, "batch_first": True, "bidirectional": bidirectional}
    expected, _ = functional.recurrent(cell, x, None, weights, hidden_size=H, **options)
    torch.testing.assert_close(other(x)[0], expected, **tolerances[0])


def test_keras_dropout_and_shapes(keras):
    layer = keras_layer(keras, "gru", dropout=0.25, recurrent_dropout=0.5)
    own = convert.from_keras(layer).regularizers
    assert (own.input_dropout, own.recurrent_dropout) == (0.25, 0.5)
    stateful = keras.layers.LSTM(H, stateful=True, dtype="float32")
    stateful.build((B, T, I))
    assert convert.from_keras(stateful).weight_ih_l0.dtype == torch.float32
    shapes = [a.shape for a in convert.to_keras(torch.nn.GRU(I, H, bidirectional=True))]
    assert shapes == [(I, 3 * H), (H, 3 * H), (2, 3 * H)] * 2


def test_keras_refuses(keras):
    layers = keras.layers
    wrong = {
        "activation: expected one of .'tanh'., got 'relu'": layers.LSTM(H, activation="relu"),
        "recurrent_activation: expected one of .'sigmoid'., got 'hard_sigmoid'": layers.GRU(
            H, recurrent_activation="hard_sigmoid"
        ),
        "go_backwards=False, got True": layers.SimpleRNN(H, go_backwards=True),
        "got 'linear'": layers.SimpleRNN(H, activation=None),
        "activation: expected one of .'tanh', 'relu'., got <": layers.SimpleRNN(
            H, activation=layers.LeakyReLU()
        ),
        "merge_mode 'concat', got 'sum'": layers.Bidirectional(layers.GRU(H), merge_mode="sum"),
        "two directions alike": layers.Bidirectional(
            layers.GRU(H), backward_layer=layers.GRU(H, reset_after=False, go_backwards=True)
        ),
    }
    for message, layer in wrong.items():
        layer.build((None, None, I))
        with pytest.raises(ValueError, match=message):
            convert.from_keras(layer)
    with pytest.raises(ValueError, match="expected one that is built"):
        convert.from_keras(layers.LSTM(H))
    for layer in (layers.Dense(3), layers.RNN(layers.LSTMCell(3)), torch.nn.LSTM(3, 4)):
        with pytest.raises(TypeError, match="layer: expected an LSTM, GRU, SimpleRNN or"):
            convert.from_keras(layer)


@pytest.mark.parametrize(
    ("cell", "options"),
    [
        ("lstm", {}),
        ("lstm", {"return_sequences": False, "use_bias": False}),
        ("gru", {"go_backwards": True}),
        ("gru", {"go_backwards": True, "return_sequences": False, "return_state": False}),
        ("gru_reset_before", {"dropout": 0.5}),
        ("gru_reset_before", {"recurrent_dropout": 0.5, "dropout": 0.5}),
        ("rnn_tanh", {"dropout": 0.5, "stateful": True}),
        ("rnn_relu", {"mask": True}),
    ],
)
def test_replaced_inside_keras(keras, cell, options, monkeypatch):
    """The layer with its own loop and with ours: two calls in training, in float32."""
    kind, own = KERAS[cell]
    own = {"return_sequences": True, "return_state": True, "seed": 3, **own, **options}
    given = {"training": True}
    if own.pop("mask", False):
        given["mask"] = torch.rand(B, T) < 0.7
    falls_back = "mask" in given or "recurrent_dropout" in own
    calls, found, recurrent = [], [], functional.recurrent

    def counted(*args, **kwargs):
        calls.append(args[0])
        return recurrent(*args, **kwargs)

    monkeypatch.setattr(functional, "recurrent", counted)
    arrays = None
    x = random(B, T, I, dtype=torch.float32)
    for replaced in (False, True):
        layer = getattr(keras.layers, kind)(H, dtype="float32", **own)
        model = keras.Sequential([keras.Input((T, I), B), layer])
        arrays = arrays or [random(*w.shape).numpy() for w in layer.cell.get_weights()]
        layer.cell.set_weights(arrays)
        if replaced:
            report = fusedrnn.replace_modules(model)
            assert (len(report.swapped), report.left) == (1, {})
            assert "keras.layers." in str(report)
            assert fusedrnn.replace_modules(model).swapped == {}
        inputs = x.clone().requires_grad_()
        outputs = [o for _ in range(2) for o in keras.tree.flatten(layer(inputs, **given))]
        weights = [variable.value for variable in layer.cell.trainable_variables]
        torch.manual_seed(1)
        cotangents = [torch.randn(o.shape) for o in outputs]
        found.append((outputs, torch.autograd.grad(outputs, [inputs, *weights], cotangents)))
        assert calls == [cell] * (2 if replaced and not falls_back else 0)
    for expected, actual, tolerance in zip(*found, (VALUES32, GRADIENTS32), strict=True):
        torch.testing.assert_close(actual, expected, **tolerance)
    assert len(fusedrnn.restore_modules(model).swapped) == 1
    calls.clear()
    layer(x)
    assert calls == []


def test_replaced_in_a_keras_model(keras, tmp_path):
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((None, I)),
            layers.Bidirectional(layers.LSTM(H, return_sequences=True)),
            layers.GRU(H, return_sequences=True, activation="selu"),
            layers.SimpleRNN(H),
        ]
    )
    x = random(B, T, I)
    expected = model(x)
    cudnn = model.layers[0].forward_layer.use_cudnn
    report = fusedrnn.replace_modules(model)
    assert len(report.swapped) == 3
    (why,) = report.left.values()
    assert "activation: expected one of ['tanh'], got 'selu'" in why
    assert not model.layers[0].forward_layer.use_cudnn
    torch.testing.assert_close(model(x), expected, **VALUES32)
    model.compile("sgd", "mse")
    model.fit(x.numpy(), np.zeros((B, H)), verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    torch.testing.assert_close(again(x), model(x), **VALUES32)
    assert len(fusedrnn.restore_modules(model).swapped) == 3
    assert model.layers[0].forward_layer.use_cudnn == cudnn


# ----------------------------------------------------------------------------------------- ONNX


WAYS = {"forward": {}, "reverse": {"direction": "alternate"}, "both": {"bidirectional": True}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", KERAS)
def test_onnx(cell, bias, way):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    bidirectional = way == "both"
    D, S = 1 + bidirectional, STATES.get(cell, 1)
    module = fusedrnn.Recurrent(cell, I, H, 2, bias=bias, **WAYS[way])
    module = randomise(module)
    node = convert.to_onnx(module, layer=1)
    op_type, W, R, given, attributes = node
    again = convert.from_onnx(*node)
    x = random(T, B, D * H, dtype=torch.float32)
    states = [random(D, B, H, dtype=torch.float32) for _ in range(S)]

    def value(name, shape):
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    constants = {"W": W, "R": R, **({"B": given} if bias else {})}
    names = ["x", "W", "R", "B" if bias else "", "", *[f"s{k}" for k in range(S)]]
    outputs = ["output", *[f"f{k}" for k in range(S)]]
    node = onnx.helper.make_node(op_type, names, outputs, **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [value("x", x.shape), *(value(f"s{k}", s.shape) for k, s in enumerate(states))],
        [value(name, None) for name in outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8
    )
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    feed = {"x": x.numpy(), **{f"s{k}": s.numpy() for k, s in enumerate(states)}}
    output, *last = map(torch.from_numpy, session.run(None, feed))
    expected = [output.transpose(1, 2).reshape(T, B, D * H), *last]
    assert (again.bias, again.bidirectional, again.batch_first) == (bias, bidirectional, False)
    actual = final(again(x, tuple(states) if S > 1 else states[0]))
    torch.testing.assert_close(actual, expected, **VALUES32)
    weights = [w for name, w in module.named_parameters() if "_l1" in name]
    options = {"bias": bias, "hidden_size": H, "bidirectional": bidirectional}
    options["direction"] = "reverse" if way == "reverse" else "forward"
    output, _ = functional.recurrent(cell, x, tuple(states), weights, **options)
    torch.testing.assert_close(output, expected[0], **VALUES32)
    # A program reads the attributes as get_attribute_value returns them, strings as bytes.
    read = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    same = convert.from_onnx(op_type, W, R, given, read)
    assert repr(same) == repr(again)
    pairs = zip(again.parameters(), same.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_onnx_refuses():
    W, R = np.zeros((1, 4 * H, I)), np.zeros((1, 4 * H, H))
    wrong = {
        "direction: expected one of .*, got 'back'": {"direction": "back"},
        "attributes: expected no clip, got {'clip': 3.0}": {"clip": 3.0},
        "got {'input_forget': 1}": {"input_forget": 1},
        "got ..'Sigmoid', 'Relu', 'Tanh'., False.": {"activations": [b"Sigmoid", b"Relu", b"Tanh"]},
        "W, R, B: expected 2 in front for 'bidirectional'": {"direction": b"bidirectional"},
    }
    for message, attributes in wrong.items():
        with pytest.raises(ValueError, match=message):
            convert.from_onnx("LSTM", W, R, None, attributes)
    with pytest.raises(ValueError, match=r"op_type: expected one of .*, got 'Gemm'"):
        convert.from_onnx("Gemm", W, R)
    with pytest.raises(
        ValueError, match=r"W: expected shape \(20, 6\) for hidden_size=5, got \(16, 6\)"
    ):
        convert.from_onnx("LSTM", W, np.zeros((1, 4 * H, 5)))
    attributes = {"layout": 1, "activations": [b"sigmoid", b"tanh", b"TANH"]}  # in any case
    assert convert.from_onnx("LSTM", W, R, attributes=attributes).batch_first
    assert convert.to_onnx(fusedrnn.GRU(3, 4, batch_first=True))[4] == {
        "hidden_size": 4, "direction": "forward", "linear_before_reset": 1, "layout": 1,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------- haste


def haste_lstm(x, h, c, kernel, recurrent_kernel, bias):
    """haste's README and the docstring of its LSTM: gates i, g, f, o, one bias."""
    outputs = []
    for x_t in x.unbind(1):
        i, g, f, o = (x_t @ kernel + h @ recurrent_kernel + bias).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return [torch.stack(outputs, 1), h[None], c[None]]


def haste_gru(x, h, kernel, recurrent_kernel, bias, recurrent_bias):
    """The docstring of haste's GRU: gates z, r, h; 1406.1078v1, the reset after the product."""
    outputs = []
    for x_t in x.unbind(1):
        x_z, x_r, x_n = (x_t @ kernel + bias).chunk(3, -1)
        h_z, h_r, h_n = (h @ recurrent_kernel + recurrent_bias).chunk(3, -1)
        z, r = (x_z + h_z).sigmoid(), (x_r + h_r).sigmoid()
        h = z * h + (1 - z) * (x_n + r * h_n).tanh()
        outputs.append(h)
    return [torch.stack(outputs, 1), h[None]]


def haste_layer(cell, installed, **options):
    """haste's own layer, or an object with the same attributes."""
    G = {"lstm": 4, "gru": 3}[cell]
    if installed:
        haste = pytest.importorskip("haste_pytorch")
        layer = getattr(haste, cell.upper())(I, H, batch_first=True, **options).double()
        return randomise(layer)
    shapes = {"kernel": (I, G * H), "recurrent_kernel": (H, G * H), "bias": (G * H,)}
    shapes |= {"recurrent_bias": (G * H,)} if cell == "gru" else {}
    layer = type(cell.upper(), (types.SimpleNamespace,), {})(
        batch_first=True, **{"zoneout": 0.0, "dropout": 0.0, **options}
    )
    layer.state_dict = lambda: {name: getattr(layer, name) for name in shapes}
    vars(layer).update({name: random(*shape) for name, shape in shapes.items()})
    return layer


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_haste(cell, installed):
    layer, S = haste_layer(cell, installed), STATES.get(cell, 1)
    arrays = {name: tensor.detach() for name, tensor in layer.state_dict().items()}
    x, states = random(B, T, I), [random(1, B, H) for _ in range(S)]

    def theirs(x, *rest):
        if not installed:
            return {"lstm": haste_lstm, "gru": haste_gru}[cell](
                x, *(s[0] for s in rest[:S]), *rest[S:]
            )
        state = tuple(rest[:S]) if S > 1 else rest[0]
        own = dict(zip(arrays, rest[S:], strict=True))
        return final(torch.func.functional_call(layer, own, (x, state)))

    def ours(x, *rest):
        kernel, recurrent, *bias = rest[S:]
        bias = bias[0] if len(bias) == 1 else torch.stack(bias)
        return run(cell, [convert.read("haste", cell, kernel, recurrent, bias)], x, rest[:S])

    compare(theirs, ours, x, *states, *arrays.values())
    module = convert.from_haste(layer)
    back = convert.to_haste(module)
    assert list(back) == list(arrays)
    assert all(torch.equal(back[name], arrays[name]) for name in arrays)
    expected = theirs(x, *states, *arrays.values())
    actual = final(module(x, tuple(states) if S > 1 else states[0]))
    torch.testing.assert_close(actual, expected, **VALUES64)
    # Weights whose two biases differ, the other way.
    deep = randomise(getattr(torch.nn, cell.upper())(I, H, batch_first=True).double())
    expected = theirs(x, *states, *convert.to_haste(deep).values())
    actual = final(deep(x, tuple(states) if S > 1 else states[0]))
    torch.testing.assert_close(actual, expected, **VALUES64)


def test_haste_regularisers_and_refusals():
    own = convert.from_haste(haste_layer("lstm", False, zoneout=0.1, dropout=0.25)).regularizers
    assert (own.zoneout, own.weight_drop) == ((0.1, 0.0), 0.25)
    assert convert.from_haste(haste_layer("gru", False, zoneout=0.1)).regularizers.zoneout == 0.1
    with pytest.raises(TypeError, match=r"layer: expected an LSTM or GRU of haste, got torch.nn"):
        convert.from_haste(torch.nn.LSTM(3, 4))
    with pytest.raises(ValueError, match="to whose output nothing is added, got LSTM"):
        convert.to_onnx(fusedrnn.LSTM(4, 4, residual=True))
    with pytest.raises(ValueError, match=r"expected forward layers for haste, got LSTM\(3, 4, dir"):
        convert.to_haste(fusedrnn.LSTM(3, 4, direction="reverse"))
    with pytest.raises(ValueError, match="expected bidirectional=False for haste, got True"):
        convert.to_haste(torch.nn.LSTM(3, 4, bidirectional=True))
    with pytest.raises(ValueError, match="num_heads: expected 1, since haste has no heads, got 2"):
        convert.to_haste(fusedrnn.LSTM(3, 4, num_heads=2))
    with pytest.raises(ValueError, match=r"cell: expected one .*\['gru', 'lstm'\], got 'rnn_tanh'"):
        convert.to_haste(torch.nn.RNN(3, 4))
    bare = fusedrnn.GRU(3, 4, bias=False)
    assert convert.to_haste(bare)["recurrent_bias"].abs().max() == 0


# ------------------------------------------------------------------------------ FlashRNN, xLSTM


def slstm(x_gates, product, states):
    """One step of an sLSTM: Beck et al. 2024, arXiv:2405.04517, eqs. 8-17, gates i, f, z, o.

    x_gates, product: [4, ...]. A state that is all zeros is a beginning, with m = i.
    """
    i, f, z, o = x_gates + product
    _h, c, n, m = states
    forget = F.logsigmoid(f) + m
    m = i if bool((n == 0).all()) else torch.maximum(forget, i)
    i, f = (i - m).exp(), (forget - m).exp()
    c, n = f * c + i * z.tanh(), f * n + i
    return o.sigmoid() * c / n, c, n, m


def flashrnn_written(Wx, R, b, states, function):
    """FlashRNN, arXiv:2412.07752: Wx [B, T, G, heads, D], states [S, B, heads, D].

    A GRU has four biases, of g (the recurrent product alone), r, z, and n (the input alone).
    """
    outputs = []
    for x in Wx.unbind(1):
        product = torch.einsum("ghdp,bhp->gbhd", R, states[0])
        x, bias = x.transpose(0, 1), b[:, None]
        if function == "gru":
            g, r, z = product[0] + bias[0], product[1] + bias[1], product[2] + bias[2]
            r, z = (x[0] + r).sigmoid(), (x[1] + z).sigmoid()
            n = (x[2] + bias[3] + r * g).tanh()
            states = [z * states[0] + (1 - z) * n]
        elif function == "elman":
            states = [(x + bias + product)[0].tanh()]
        elif function == "slstm":
            states = slstm(x + bias, product, states)
        else:
            i, f, z, o = x + bias + product
            c = f.sigmoid() * states[1] + i.sigmoid() * z.tanh()
            states = [o.sigmoid() * c.tanh(), c]
        outputs.append(states[0])
    return torch.stack(outputs, 1), torch.stack(list(states))


FLASHRNN = {"lstm": (4, 4, 2), "gru": (3, 4, 1), "elman": (1, 1, 1), "slstm": (4, 4, 4)}
HEADS = 2


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("function", FLASHRNN)
def test_flashrnn(function, installed):
    flashrnn = pytest.importorskip("flashrnn") if installed else None
    (G, biases, S), D = FLASHRNN[function], H // HEADS
    cell = convert._FLASHRNN[function]
    x, states = random(B, T, I), [random(B, H) for _ in range(S)]
    if function == "slstm":
        states[2] = states[2].abs() + 1  # the normaliser is never below 1 in a run from zeros
    arrays = random(G * H, I), random(G, HEADS, D, D), random(biases, HEADS, D)

    def theirs(x, *rest):
        weight, R, b = rest[S:]
        Wx = (x @ weight.T).view(B, T, G, HEADS, D)
        states = torch.stack(rest[:S]).view(S, B, HEADS, D)
        if not installed:
            output, last = flashrnn_written(Wx, R, b, states, function)
            return [output.reshape(B, T, H), *last.reshape(S, B, H)]
        output, last = flashrnn.flashrnn(
            Wx, R, b, states[:, :, None], function, backend="vanilla", dtype="float32"
        )  # dtype is that of kernels; vanilla computes in the tensors' own
        return [output[0].reshape(B, T, H), *last.reshape(S, B, H)]

    def ours(x, *rest):
        weights = convert.read("flashrnn", cell, *rest[S:])
        output, *last = run(cell, [weights], x, [s[None] for s in rest[:S]])
        return [output, *(s[0] for s in last)]

    compare(theirs, ours, x, *states, *arrays)
    module = convert.from_flashrnn(function, *arrays)
    assert (module.num_heads, module.batch_first) == (HEADS, True)
    again = convert.to_flashrnn(module)
    own = randomise(module)  # weights whose two biases differ
    expected = theirs(x, *states, *convert.to_flashrnn(own))
    actual = final(own(x, tuple(s[None] for s in states) if S > 1 else states[0][None]))
    torch.testing.assert_close(actual[0], expected[0], **VALUES64)
    assert all(torch.equal(a, b) for a, b in zip(arrays, again, strict=True))


def xlstm_layer(installed, convolved):
    """xlstm's own layer, or one of TiRex's form: the same modules, the cell in one layout."""
    if installed:
        layers = pytest.importorskip("xlstm.blocks.slstm.layer")
        config = layers.sLSTMLayerConfig(
            embedding_dim=H, num_heads=HEADS, conv1d_kernel_size=3 if convolved else 0,
            backend="vanilla", dtype="float32", recurrent_weight_init="standard",
        )  # fmt: skip
        return randomise(layers.sLSTMLayer(config).double())
    layer, D = torch.nn.Module(), H // HEADS
    for name in ("igate", "fgate", "zgate", "ogate"):
        gate = torch.nn.Module()
        gate.weight = torch.nn.Parameter(random(HEADS, D, D))
        setattr(layer, name, gate)
    layer.slstm_cell = torch.nn.Module()
    layer.slstm_cell._recurrent_kernel_ = torch.nn.Parameter(random(HEADS, D, 4 * D))
    layer.slstm_cell._bias_ = torch.nn.Parameter(random(HEADS * 4 * D))
    return layer


def xlstm_written(layer, x):
    """TiRex's documented shapes: the kernel [heads, D, 4 * D], the bias [heads, 4, D]."""
    D, cell = H // HEADS, layer.slstm_cell
    kernel = cell._recurrent_kernel_.view(HEADS, D, 4, D)
    bias = cell._bias_.view(HEADS, 4, D).transpose(0, 1).reshape(4, 1, H)
    names = ("fgate", "igate", "zgate", "ogate")  # in the order of the gates i, f, z, o
    states, outputs = [x.new_zeros(B, H)] * 4, []
    for x_t in x.unbind(1):
        parts = x_t.view(B, HEADS, D)
        inputs = [torch.einsum("bhd,hod->bho", parts, getattr(layer, n).weight) for n in names]
        product = torch.einsum("bhp,hpgu->gbhu", states[0].view(B, HEADS, D), kernel)
        x_gates = torch.stack(inputs).reshape(4, B, H) + bias
        states = slstm(x_gates, product.reshape(4, B, H), states)
        outputs.append(states[0])
    return torch.stack(outputs, 1)


def what_is_normed(layer, x):
    """The output of xlstm's cell: what its layer's group norm is given."""
    seen = []
    handle = layer.group_norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    layer(x)
    handle.remove()
    return seen[0].transpose(1, 2).reshape(B, T, H)


@pytest.mark.parametrize(("installed", "convolved"), [(False, False), (True, False), (True, True)])
def test_xlstm(installed, convolved):
    layer = xlstm_layer(installed, convolved)
    x = random(B, T, H).requires_grad_()
    weights = convert._xlstm_weights(layer)
    joined = torch.cat([layer.conv_act_fn(layer.conv1d(x)), x], -1) if convolved else x
    actual = run("slstm", [weights], joined, [x.new_zeros(1, B, H)] * 4)[0]
    module = convert.from_xlstm(layer)
    assert (type(module).__name__, module.num_heads) == ("SLSTM", HEADS)
    torch.testing.assert_close(module(joined)[0], actual, **VALUES64)
    expected = what_is_normed(layer, x) if installed else xlstm_written(layer, x)
    torch.testing.assert_close(actual, expected, **VALUES64)
    leaves = [x, *(p for name, p in layer.named_parameters() if "norm" not in name)]
    cotangent = torch.randn_like(expected)
    gradients = [torch.autograd.grad(o, leaves, cotangent) for o in (actual, expected)]
    torch.testing.assert_close(*gradients, **GRADIENTS64)

    cell = layer.slstm_cell
    assert weights["weight_hh"].shape == (HEADS, 4 * H // HEADS, H // HEADS)
    _, kernel, bias = convert.write("xlstm", "slstm", weights)
    if installed:
        assert torch.equal(kernel, cell.recurrent_kernel.clone())
        assert torch.equal(bias, cell.bias.clone())
    else:
        assert torch.equal(kernel.flatten(2), cell._recurrent_kernel_)
        assert torch.equal(bias.flatten(), cell._bias_)


def test_xlstm_refuses():
    with pytest.raises(TypeError, match=r"layer: expected an sLSTMLayer, got torch.nn"):
        convert.from_xlstm(torch.nn.LSTM(3, 4))


# -------------------------------------------------------------------------------------- Dreamer


def dreamer(x, h, kernel, scale, offset, bias, state_first):
    """dreamerv3 1.5, nets.py, and dreamerv2 2.2, common/nets.py, in the words of their papers."""
    outputs = []
    for x_t in x.unbind(1):
        joined = torch.cat([h, x_t] if state_first else [x_t, h], -1)
        normed = F.layer_norm(joined @ kernel + bias, (3 * H,), scale, offset, 1e-3)
        reset, candidate, update = normed.chunk(3, -1)
        candidate, update = (reset.sigmoid() * candidate).tanh(), (update - 1).sigmoid()
        h = update * candidate + (1 - update) * h
        outputs.append(h)
    return [torch.stack(outputs, 1)]


@pytest.mark.parametrize("state_first", [True, False])
def test_dreamer(state_first):
    arrays = random(I + H, 3 * H), random(3 * H), random(3 * H), random(3 * H)

    def theirs(x, h, *rest):
        return dreamer(x, h, *rest, state_first)

    def ours(x, h, *rest):
        weights = convert._dreamer_weights(*rest, state_first=state_first)
        return run("layer_norm_gru", [weights], x, [h[None]])[:1]

    compare(theirs, ours, random(B, T, I), random(B, H), *arrays)
    module = convert.from_dreamer(*arrays, state_first=state_first)
    again = convert.to_dreamer(module, state_first=state_first)
    assert all(torch.equal(a, b) for a, b in zip(arrays, again, strict=True))
    assert not convert.from_dreamer(*arrays[:3], state_first=state_first).bias
    with pytest.raises(ValueError, match=r"LayerNormGRU with its defaults, got layer_norm"):
        convert.to_dreamer(fusedrnn.LayerNormGRU(I, H, eps=0.1))
    with pytest.raises(ValueError, match=r"kernel: expected shape \[H \+ I, 3 \* H\], got"):
        convert.from_dreamer(arrays[0].T, *arrays[1:])


# ----------------------------------------------------------------------------------- everything


def test_arguments():
    good = [np.zeros((I, 4 * H)), np.zeros((H, 4 * H)), np.zeros(4 * H)]
    assert list(convert.read("keras", "lstm", *good[:2])) == ["weight_ih", "weight_hh"]
    wrong = {
        r"^kernel: expected shape \(16, 16\) for hidden_size=4, got \(16, 6\)": (0, good[0].T),
        r"^kernel: expected 2-D, got shape \(16,\)": (0, good[2]),
        r"^recurrent_kernel: expected 2-D, got shape \(16,\)": (1, good[2]),
        r"^kernel: expected shape \(6, 64\) for hidden_size=16, got \(6, 16\)": (1, good[1].T),
        r"^bias: expected shape \(16,\) for hidden_size=4, got \(12,\)": (2, np.zeros(3 * H)),
    }
    for message, (position, array) in wrong.items():
        arrays = [array if k == position else a for k, a in enumerate(good)]
        with pytest.raises(ValueError, match=message):
            convert.read("keras", "lstm", *arrays)
    with pytest.raises(TypeError, match="kernel: expected an array or a Tensor, got list"):
        convert.read("keras", "lstm", [[1.0]], *good[1:])
    with pytest.raises(
        TypeError, match="arrays: expected kernel, recurrent_kernel, bias, got 4 of them"
    ):
        convert.read("keras", "lstm", *good, good[2])
    with pytest.raises(ValueError, match=r"cell: expected one that keras has, .*, got 'slstm'"):
        convert.read("keras", "slstm", *good)
    with pytest.raises(TypeError, match="module: expected an LSTM, GRU, RNN or Recurrent, got"):
        convert.to_keras(torch.nn.LSTMCell(3, 4))
    with pytest.raises(ValueError, match="layer: expected 0 to 1, got 2"):
        convert.to_keras(fusedrnn.LSTM(3, 4, 2), 2)
    with pytest.raises(ValueError, match="module: expected no projection, got proj_size=2"):
        convert.to_onnx(fusedrnn.LSTM(3, 4, proj_size=2))
    with pytest.raises(ValueError, match=r"function: expected one of .*, got 'mlstm'"):
        convert.from_flashrnn("mlstm", *good)


def test_the_arrays_are_copies(recwarn):
    arrays = [random(I, 4 * H).numpy(), random(H, 4 * H).numpy(), random(4 * H).numpy()]
    weights = convert.read("keras", "lstm", *arrays)
    arrays[0][:] = 0
    assert weights["weight_ih"].abs().min() > 0
    arrays[0].flags.writeable = False  # as those of an ONNX model are
    convert.read("keras", "lstm", *arrays)
    assert not recwarn.list
    module = fusedrnn.LSTM(I, H)
    convert.to_keras(module)[0][:] = 0
    assert module.weight_ih_l0.abs().max() > 0
