"""Weights from other libraries, and back: their gate orders, transposes, biases and heads.

rnn = fusedrnn.convert.from_keras(layer)               # a module with the layer's weights
layer.set_weights(fusedrnn.convert.to_keras(rnn))      # and back, also of torch.nn's modules

from_keras, to_keras            Keras 3: LSTM, GRU, SimpleRNN, and Bidirectional of them
from_onnx, to_onnx              ONNX: the operators LSTM, GRU and RNN
from_haste, to_haste            haste_pytorch: LSTM, GRU
from_flashrnn, to_flashrnn      flashrnn: lstm, gru, elman, slstm
from_xlstm                      xlstm and TiRex: the cell of an sLSTM
from_dreamer, to_dreamer        DreamerV2 and DreamerV3: the layer-normed GRU
read, write, LAYOUTS            all of these on plain tensors

A layer and its directions are the unit: of a stack, convert each layer. None of these libraries is
imported here. What no module of ours could compute is refused with a ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedrnn import cells, modules, variants
from fusedrnn.call import adds_input, reverses


class Part(NamedTuple):
    """How a library keeps one array.

    Attributes:
        name: what the library calls it.
        axes: its dimensions, from letters: G gates, K heads, U units of a head, P units of a head
            of h_{t-1}, I features of the input, S the sides of a bias (input, then recurrent).
            "I GU" is [I, G * U]: where letters stand together, the last one runs fastest.
        gates: their order, in the names of our cell; with S all of the input's come first. In a
            bias "x.n" is the input's alone and "h.n" the recurrent one; "n" is their sum.
    """

    name: str
    axes: str
    gates: str


Layout = dict[str, Part]  # by our names; "bias" stands for bias_ih and bias_hh


def _sides(gates: Iterable[str]) -> str:
    return " ".join(f"{side}.{gate}" for side in "xh" for gate in gates)


def _columns(gates: str, two_biases: bool = False) -> Layout:
    """Kernels that stand to the right of their vectors."""
    bias = ("S GKU", _sides(gates.split())) if two_biases else ("GKU", gates)
    return {
        "weight_ih": Part("kernel", "I GKU", gates),
        "weight_hh": Part("recurrent_kernel", "P GKU", gates),
        "bias": Part("bias", *bias),
    }


def _headed(kernel: str, recurrent: str = "", bias: str = "") -> Layout:
    """FlashRNN's, whose caller multiplies the input with a weight of its own."""
    return {
        "weight_ih": Part("weight", "GKU I", kernel),
        "weight_hh": Part("R", "G K U P", recurrent or kernel),
        "bias": Part("b", "G K U", bias or kernel),
    }


# Sources: keras 3.15 (layers/rnn/lstm.py, gru.py, simple_rnn.py), whose c and h are our g and n;
# haste_pytorch 0.5 (lstm.py, gru.py); flashrnn 1.0.8 (FlashRNNConfig, vanilla/); xlstm 2.0
# (blocks/slstm/cell.py); dreamerv3 1.5 and dreamerv2 2.2 (nets.py), whose cand and update are our
# n and z. No sign changes: each z means what it means in our cell of that name.
LAYOUTS: dict[tuple[str, str], Layout] = {
    ("keras", "lstm"): _columns("i f g o"),
    ("keras", "gru"): _columns("z r n", two_biases=True),  # reset_after=True
    ("keras", "gru_reset_before"): _columns("z r n"),
    ("keras", "rnn_tanh"): _columns("h"),
    ("keras", "rnn_relu"): _columns("h"),
    ("haste", "lstm"): _columns("i g f o"),
    ("haste", "gru"): _columns("z r n", two_biases=True),  # bias and recurrent_bias, stacked
    ("flashrnn", "lstm"): _headed("i f g o"),
    ("flashrnn", "gru"): _headed("r z n", "n r z", "h.n r z x.n"),
    ("flashrnn", "rnn_tanh"): _headed("h"),
    ("flashrnn", "slstm"): _headed("i f z o"),
    ("xlstm", "slstm"): {
        "weight_ih": Part("weight", "GKU I", "i f z o"),
        "weight_hh": Part("recurrent_kernel", "K P G U", "i f z o"),
        "bias": Part("bias", "K G U", "i f z o"),
    },
    ("dreamer", "layer_norm_gru"): {
        **_columns("r n z"),
        "weight_ln": Part("scale", "GKU", "r n z"),
        "bias_ln": Part("offset", "GKU", "r n z"),
    },
    # ("onnx", cell) is there, too, for every cell that names an operator of ONNX.
}


def _layout(library: str, cell: str) -> Layout:
    onnx = cells.get(cell).onnx if library == "onnx" and cell in cells.REGISTRY else None
    if onnx is not None:
        gates = " ".join(onnx.gates)
        return {
            "weight_ih": Part("W", "GKU I", gates),
            "weight_hh": Part("R", "GKU P", gates),
            "bias": Part("B", "SGKU", _sides(onnx.gates)),
        }
    if (library, cell) not in LAYOUTS:
        known = sorted(own for name, own in LAYOUTS if name == library)
        raise ValueError(f"cell: expected one that {library} has, {known}, got {cell!r}")
    return LAYOUTS[library, cell]


def _our_layout(cell: str, keys: Iterable[str], heads: int) -> Layout:
    gates = " ".join(cells.get(cell).gates)
    parts = {key: Part(key, "GKU", gates) for key in keys}
    parts["weight_ih"] = Part("weight_ih", "GKU I", gates)
    parts["weight_hh"] = Part("weight_hh", "K GU P" if heads > 1 else "GKU P", gates)
    return {**parts, "bias": Part("bias", "S GKU", _sides(gates.split()))}


def _shape(part: Part, axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    gates = len(part.gates.split()) // (2 if "S" in part.axes else 1)
    sizes = {**sizes, "S": 2, "G": gates}
    return tuple(math.prod(sizes[axis] for axis in group) for group in axes.split())


def _sizes(parts: Layout, arrays: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes of K, U, P and I. Raises ValueError where the arrays do not have them."""
    sizes = {"K": 1}
    for key, array in arrays.items():
        axes, shape = parts[key].axes.split(), tuple(array.shape)
        if len(axes) != len(shape):
            raise ValueError(f"{parts[key].name}: expected {len(axes)}-D, got shape {shape}")
        sizes |= {a: n for a, n in zip(axes, shape, strict=True) if a in ("I", "K", "P")}
    sizes["U"] = sizes["P"]
    for key, array in arrays.items():
        expected, hidden = _shape(parts[key], parts[key].axes, sizes), sizes["K"] * sizes["U"]
        if array.shape != expected:
            raise ValueError(
                f"{parts[key].name}: expected shape {expected} for hidden_size={hidden}, "
                f"got {tuple(array.shape)}"
            )
    return sizes


def _orders(part: Part) -> tuple[str, str]:
    """The letters of its axes as they are, and with the gates in front, as `part.gates` has them:
    S, G, K, U, and I or P."""
    letters = part.axes.replace(" ", "")
    return letters, "".join(sorted(letters, key="SGKUIP".index))


def _move(arrays: Mapping[str, Tensor], old: Layout, new: Layout, sizes: Any) -> dict[str, Tensor]:
    """Arrays of one layout as those of another."""
    moved = {}
    for key, array in arrays.items():
        letters, order = _orders(old[key])
        array = array.reshape(_shape(old[key], " ".join(letters), sizes))
        array = array.permute([letters.index(axis) for axis in order])
        rows = array.flatten(0, 1) if "S" in order else array
        blocks = dict(zip(old[key].gates.split(), rows.unbind(), strict=True))
        if key == "bias":
            for gate, block in list(blocks.items()):
                if "." not in gate:
                    blocks |= {f"x.{gate}": block, f"h.{gate}": torch.zeros_like(block)}
            for gate in {name[2:] for name in blocks if "." in name}:
                blocks[gate] = blocks[f"x.{gate}"] + blocks[f"h.{gate}"]
        letters, order = _orders(new[key])
        array = torch.stack([blocks[gate] for gate in new[key].gates.split()])
        array = array.reshape(_shape(new[key], " ".join(order), sizes))
        array = array.permute([order.index(axis) for axis in letters])
        moved[key] = array.reshape(_shape(new[key], new[key].axes, sizes))
    return moved


def _tensor(name: str, array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array
    if not hasattr(array, "__array__"):
        raise TypeError(f"{name}: expected an array or a Tensor, got {type(array).__name__}")
    return torch.tensor(array.__array__())  # from_numpy would warn of what is read-only


def read(library: str, cell: str, *arrays: Any) -> dict[str, Tensor]:
    """The weights of one layer and direction, from a library's arrays into our layout.

    Args:
        library, cell: a key of LAYOUTS, or "onnx" and a cell that names an operator of ONNX.
        arrays: tensors or NumPy arrays, as LAYOUTS[library, cell] describes them and in its
            order. The bias may be None, or left out at the end.
    Returns:
        weight_ih [G * H, I]; weight_hh [G * H, H], or [heads, G * H / heads, H / heads]; with a
        bias bias_ih and bias_hh [G * H]; what else the cell has: a module's parameters without
        _l0. Differentiable. A bias that the library keeps once is bias_ih.
    Raises:
        ValueError, TypeError: the argument, what was expected, what came.
    """
    parts = _layout(library, cell)
    if not len(parts) - 1 <= len(arrays) <= len(parts):
        names = ", ".join(part.name for part in parts.values())
        raise TypeError(f"arrays: expected {names}, got {len(arrays)} of them")
    given = {
        key: _tensor(part.name, array)
        for (key, part), array in zip(parts.items(), arrays, strict=False)
        if array is not None or key != "bias"
    }
    sizes = _sizes(parts, given)
    moved = _move(given, parts, _our_layout(cell, parts, sizes["K"]), sizes)
    biases = dict(zip(("bias_ih", "bias_hh"), moved.pop("bias", ()), strict=False))
    kernels = {key: moved.pop(key) for key in ("weight_ih", "weight_hh")}
    return {**kernels, **biases, **moved}


def write(library: str, cell: str, weights: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The inverse of `read`: a library's arrays from one layer and direction of ours.

    Args:
        library, cell: as `read`. weights: what `read` returns; without biases the bias is 0.
    Returns:
        the arrays of LAYOUTS[library, cell] in its order, differentiable.
    Raises:
        ValueError: for heads that the library does not have, and as `read`.
    """
    parts = _layout(library, cell)
    heads = weights["weight_hh"].shape[0] if weights["weight_hh"].dim() == 3 else 1
    if heads > 1 and "K" not in parts["weight_hh"].axes.split():
        raise ValueError(f"num_heads: expected 1, since {library} has no heads, got {heads}")
    zeros = weights["weight_ih"].new_zeros(weights["weight_ih"].shape[0])
    bias = torch.stack([weights.get(name, zeros) for name in ("bias_ih", "bias_hh")])
    given = {key: bias if key == "bias" else weights[key] for key in parts}
    ours = _our_layout(cell, parts, heads)
    return tuple(_move(given, ours, parts, _sizes(ours, given)).values())


def _module(cell: str, directions: list[dict[str, Tensor]], **options: Any) -> modules.Recurrent:
    """A module of one layer with these weights."""
    weight, recurrent = directions[0]["weight_ih"], directions[0]["weight_hh"]
    heads = recurrent.shape[0] if recurrent.dim() == 3 else 1
    named: dict[str, Any] = {
        "lstm": modules.LSTM,
        "gru": modules.GRU,
        "rnn_tanh": modules.RNN,
        "rnn_relu": partial(modules.RNN, nonlinearity="relu"),
        "gru_reset_before": partial(modules.GRU, reset_after=False),
        "slstm": variants.SLSTM,
        "layer_norm_gru": variants.LayerNormGRU,
    }
    module = named[cell](
        weight.shape[1], recurrent.shape[-1] * heads, bias="bias_ih" in directions[0],
        bidirectional=len(directions) == 2, device=weight.device, dtype=weight.dtype,
        num_heads=heads, **options,
    )  # fmt: skip
    ends = zip(("_l0", "_l0_reverse"), directions, strict=False)
    module.load_state_dict({key + end: w for end, own in ends for key, w in own.items()})
    return module


def _weights_of(
    module: nn.RNNBase, layer: int, library: str
) -> tuple[str, list[dict[str, Tensor]]]:
    """A module's cell, and the weights of one of its layers, a dictionary for each direction."""
    if not isinstance(module, nn.RNNBase):
        raise TypeError(f"module: expected an LSTM, GRU, RNN or Recurrent, got {type(module)}")
    if module.proj_size:
        raise ValueError(f"module: expected no projection, got proj_size={module.proj_size}")
    if layer not in range(module.num_layers):
        raise ValueError(f"layer: expected 0 to {module.num_layers - 1}, got {layer!r}")
    if module.bidirectional and library not in ("keras", "onnx"):
        raise ValueError(f"module: expected bidirectional=False for {library}, got True")
    if library != "onnx" and _runs_reversed(module, layer):
        raise ValueError(f"module: expected forward layers for {library}, got {module}")
    if isinstance(module, modules.Recurrent) and adds_input(module._spec(), layer):
        raise ValueError(f"module: expected a layer to whose output nothing is added, got {module}")
    names = [name.removesuffix("_l0") for name in module._all_weights[0]]
    ends = [f"_l{layer}", f"_l{layer}_reverse"][: 1 + module.bidirectional]
    weights = [{name: getattr(module, name + end).detach() for name in names} for end in ends]
    return module.mode.lower(), weights


def _runs_reversed(module: nn.RNNBase, layer: int) -> bool:
    return isinstance(module, modules.Recurrent) and reverses(module._spec(), layer) == (True,)


def _named(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__name__}"


_KERAS: dict[str, dict[str, str]] = {  # a layer's cells, by its activation
    "LSTM": {"tanh": "lstm"},
    "GRU": {"tanh": "gru"},
    "SimpleRNN": {"tanh": "rnn_tanh", "relu": "rnn_relu"},
}


def keras_cell(layer: Any) -> str:
    """The name of our cell that a layer of Keras 3 computes. Raises as `from_keras`."""
    by_activation = _KERAS.get(type(layer).__name__)
    if by_activation is None or not hasattr(layer, "cell"):
        raise TypeError(
            "layer: expected an LSTM, GRU, SimpleRNN or Bidirectional of Keras, "
            f"got {_named(layer)}"
        )
    expected = {"activation": list(by_activation), "recurrent_activation": ["sigmoid"]}
    for name in expected if hasattr(layer, "recurrent_activation") else ("activation",):
        got = getattr(getattr(layer, name), "__name__", getattr(layer, name))
        if got not in expected[name]:
            raise ValueError(f"layer: {name}: expected one of {expected[name]}, got {got!r}")
    if not layer.built:
        raise ValueError("layer: expected one that is built, and so has weights")
    cell = by_activation[layer.activation.__name__]
    return "gru_reset_before" if cell == "gru" and not layer.reset_after else cell


def from_keras(layer: Any) -> modules.Recurrent:
    """A module with the weights of a layer of Keras 3, whatever its backend.

    Args:
        layer: a built keras.layers.LSTM, GRU or SimpleRNN, or a Bidirectional of them with
            merge_mode "concat". Source: keras.io/api/layers/recurrent_layers.
    Returns:
        an LSTM, a GRU or an RNN, with batch_first=True. dropout and recurrent_dropout become
        input_dropout and recurrent_dropout, which draw one mask for all gates; Keras's LSTM and
        GRU with recurrent_dropout draw one for each.
    Raises:
        TypeError: another layer. ValueError: other activations, a single layer that goes
        backwards, another merge_mode, directions that differ, no weights yet.
    """
    layers = [layer]
    if hasattr(layer, "merge_mode"):
        if layer.merge_mode != "concat":
            raise ValueError(f"layer: expected merge_mode 'concat', got {layer.merge_mode!r}")
        layers = [layer.forward_layer, layer.backward_layer]
    directions, kinds = [], []
    for own, backwards in zip(layers, (False, True), strict=False):
        cell = keras_cell(own)
        if own.go_backwards != backwards:
            raise ValueError(f"layer: expected go_backwards={backwards}, got {own.go_backwards}")
        given = [own.cell.kernel, own.cell.recurrent_kernel, *[own.cell.bias] * own.use_bias]
        directions.append(read("keras", cell, *(variable.numpy() for variable in given)))
        kinds.append((cell, own.units, own.use_bias, own.dropout, own.recurrent_dropout))
    if len(set(kinds)) > 1:
        raise ValueError(f"layer: expected two directions alike, got {kinds[0]} and {kinds[1]}")
    dropout = {"input_dropout": layers[0].dropout, "recurrent_dropout": layers[0].recurrent_dropout}
    return _module(kinds[0][0], directions, batch_first=True, **dropout)


def to_keras(module: nn.RNNBase, layer: int = 0) -> list[Any]:
    """One layer's weights as NumPy arrays, for `set_weights` of a layer of Keras.

    Args:
        module: an LSTM, GRU or RNN, or one of torch.nn.
        layer: which of its layers.
    Returns:
        kernel [I, G * H], recurrent_kernel [H, G * H], and with a bias [4 * H], of a GRU
        [2, 3 * H] or with reset_after=False [3 * H], of a SimpleRNN [H]. Those of the reverse
        direction follow, as a Bidirectional layer takes them.
    Raises:
        TypeError, ValueError: the argument, what was expected, what came.
    """
    cell, directions = _weights_of(module, layer, "keras")
    count = 3 if "bias_ih" in directions[0] else 2
    arrays = [array for own in directions for array in write("keras", cell, own)[:count]]
    return [array.cpu().numpy() for array in arrays]


_ONNX_ACTIVATIONS = {
    "LSTM": ["Sigmoid", "Tanh", "Tanh"],
    "GRU": ["Sigmoid", "Tanh"],
    "RNN": ["Tanh"],
}


def from_onnx(
    op_type: str, W: Any, R: Any, B: Any = None, attributes: Mapping[str, Any] | None = None
) -> modules.Recurrent:
    """A module with the weights of a node LSTM, GRU or RNN of ONNX.

    Args:
        op_type: the node's. W: [D, G * H, I], R: [D, G * H, H], B: [D, 2 * G * H] or None: its
            second to fourth input, tensors or NumPy arrays. Source: onnx.ai/onnx/operators.
        attributes: {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    Returns:
        an LSTM, GRU or RNN, with batch_first=True for layout 1.
    Raises:
        TypeError, ValueError: the argument, or the attribute that no cell of ours has.
    """
    if op_type not in _ONNX_ACTIVATIONS:
        raise ValueError(f"op_type: expected one of {[*_ONNX_ACTIVATIONS]}, got {op_type!r}")
    given = {k: v.decode() if isinstance(v, bytes) else v for k, v in (attributes or {}).items()}
    given.pop("hidden_size", None)  # R has it
    layout, direction = given.pop("layout", 0), given.pop("direction", "forward")
    ways = ("forward", "reverse", "bidirectional")
    if direction not in ways:
        raise ValueError(f"direction: expected one of {ways}, got {direction!r}")
    usual, D = _ONNX_ACTIVATIONS[op_type], 1 + (direction == "bidirectional")
    names = [a.decode() if isinstance(a, bytes) else a for a in given.pop("activations", usual * D)]
    wanted = ([name.title() for name in names], bool(given.pop("linear_before_reset", 0)))
    if left := {name: value for name, value in given.items() if value}:
        raise ValueError(f"attributes: expected no {', '.join(left)}, got {left}")
    known = {
        cell.name: (list(cell.onnx.activations or usual) * D, cell.onnx.linear_before_reset)
        for cell in cells.REGISTRY.values()
        if cell.onnx is not None and cell.onnx.operator == op_type
    }
    name = next((name for name, own in known.items() if own == wanted), None)
    if name is None:
        raise ValueError(
            "attributes: expected activations and linear_before_reset as one of "
            f"{list(known.values())}, got {wanted}"
        )
    stacks = [_tensor(*pair) for pair in zip("WRB", (W, R, B), strict=True) if pair[1] is not None]
    if any(stack.dim() == 0 or len(stack) != D for stack in stacks):
        shapes = [tuple(stack.shape) for stack in stacks]
        raise ValueError(f"W, R, B: expected {D} in front for {direction!r}, got shapes {shapes}")
    directions = [read("onnx", name, *(stack[d] for stack in stacks)) for d in range(D)]
    way = "forward" if D == 2 else direction
    return _module(name, directions, batch_first=bool(layout), direction=way)


def to_onnx(module: nn.RNNBase, layer: int = 0) -> tuple[str, Any, Any, Any, dict[str, Any]]:
    """One layer as a node of ONNX: from_onnx(*to_onnx(module)) is the layer again.

    `fusedrnn.onnx.export` writes whole models, without layout 1, which onnxruntime refuses.

    Args:
        module: an LSTM, GRU or RNN, or one of torch.nn.
        layer: which of its layers.
    Returns:
        the arguments of `from_onnx`, with NumPy arrays. With batch_first the layout is 1.
    Raises:
        TypeError, ValueError: the argument, what was expected, what came.
    """
    cell, directions = _weights_of(module, layer, "onnx")
    written = zip(*(write("onnx", cell, own) for own in directions), strict=True)
    W, R, B = (torch.stack(arrays).cpu().numpy() for arrays in written)
    onnx: Any = cells.get(cell).onnx
    attributes: dict[str, Any] = {"hidden_size": R.shape[2], "layout": int(module.batch_first)}
    one_way = "reverse" if _runs_reversed(module, layer) else "forward"
    attributes["direction"] = "bidirectional" if len(directions) == 2 else one_way
    if onnx.activations:
        attributes["activations"] = list(onnx.activations) * len(directions)
    if onnx.linear_before_reset:
        attributes["linear_before_reset"] = 1
    return onnx.operator, W, R, B if module.bias else None, attributes


def from_haste(layer: Any) -> modules.Recurrent:
    """A module with the weights of a haste_pytorch.LSTM or GRU.

    Args:
        layer: the layer. Source: its docstrings, github.com/lmnt-com/haste.
    Returns:
        an LSTM or a GRU. dropout, which is of the recurrent weights, becomes weight_drop; zoneout
        stays, in an LSTM of h alone.
    Raises:
        TypeError: another layer.
    """
    cell = {"LSTM": "lstm", "GRU": "gru"}.get(type(layer).__name__)
    if cell is None or not hasattr(layer, "recurrent_kernel"):
        raise TypeError(f"layer: expected an LSTM or GRU of haste, got {_named(layer)}")
    bias = layer.bias if cell == "lstm" else torch.stack([layer.bias, layer.recurrent_bias])
    weights = read("haste", cell, layer.kernel, layer.recurrent_kernel, bias)
    zoneout = (layer.zoneout, 0.0) if cell == "lstm" and layer.zoneout else layer.zoneout
    options = {"batch_first": layer.batch_first, "weight_drop": layer.dropout, "zoneout": zoneout}
    return _module(cell, [weights], **options)


def to_haste(module: nn.RNNBase, layer: int = 0) -> dict[str, Tensor]:
    """One layer's weights, for `load_state_dict` of a haste_pytorch.LSTM or GRU.

    Args:
        module: an LSTM or GRU of one direction, also of torch.nn. layer: which of its layers.
    Returns:
        kernel [I, G * H], recurrent_kernel [H, G * H], bias [G * H], of a GRU recurrent_bias.
    Raises:
        TypeError, ValueError: the argument, what was expected, what came.
    """
    cell, (weights,) = _weights_of(module, layer, "haste")
    kernel, recurrent, bias = write("haste", cell, weights)
    biases = {"bias": bias} if bias.dim() == 1 else {"bias": bias[0], "recurrent_bias": bias[1]}
    return {"kernel": kernel, "recurrent_kernel": recurrent, **biases}


_FLASHRNN = {"lstm": "lstm", "gru": "gru", "elman": "rnn_tanh", "slstm": "slstm"}


def from_flashrnn(function: str, weight: Any, R: Any, b: Any) -> modules.Recurrent:
    """A module with the weights of flashrnn.flashrnn(Wx, R, b, function=function).

    Args:
        function: "lstm", "gru", "elman" or "slstm".
        weight: [G * H, I], of the linear layer whose output, seen as [B, T, G, heads, D], is Wx.
            A bias of that layer adds to bias_ih_l0 as it is.
        R: [G, heads, D, D], outputs before inputs. b: [G, heads, D], of a GRU with four gates.
            Source: FlashRNNConfig, recurrent_shape "GHDP" and bias_shape "GHD".
    Returns:
        a module with batch_first=True and num_heads.
    Raises:
        ValueError, TypeError: the argument, what was expected, what came.
    """
    if function not in _FLASHRNN:
        raise ValueError(f"function: expected one of {[*_FLASHRNN]}, got {function!r}")
    cell = _FLASHRNN[function]
    return _module(cell, [read("flashrnn", cell, weight, R, b)], batch_first=True)


def to_flashrnn(module: nn.RNNBase, layer: int = 0) -> tuple[Tensor, ...]:
    """One layer's weights for flashrnn.flashrnn: weight, R and b of `from_flashrnn`.

    Args:
        module: an LSTM, GRU or RNN of one direction, also of torch.nn. layer: which of its layers.
    Raises:
        TypeError, ValueError: the argument, what was expected, what came.
    """
    cell, (weights,) = _weights_of(module, layer, "flashrnn")
    return write("flashrnn", cell, weights)


def from_xlstm(layer: nn.Module) -> modules.Recurrent:
    """An SLSTM with the weights of an sLSTMLayer of xlstm, or of TiRex.

    Args:
        layer: it has igate, fgate, zgate, ogate and slstm_cell. Its fgate feeds the cell's gate i
            and its igate the gate f: xlstm 2.0, blocks/slstm/layer.py.
    Returns:
        a module with batch_first=True and the layer's heads, of input [B, T, H]; after a
        convolution [B, T, 2 * H], torch.cat([layer.conv_act_fn(layer.conv1d(x)), x], -1). The group
        norm that follows is not in it.
    Raises:
        TypeError: another module.
    """
    weights = {name: w.detach() for name, w in _xlstm_weights(layer).items()}
    return _module("slstm", [weights], batch_first=True)


def _xlstm_weights(layer: nn.Module) -> dict[str, Tensor]:
    """As `read`, differentiable; weight_ih is zero between heads."""
    own: Any = layer
    if not hasattr(own, "slstm_cell"):
        raise TypeError(f"layer: expected an sLSTMLayer, got {_named(layer)}")
    linear = [own.fgate.weight, own.igate.weight, own.zgate.weight, own.ogate.weight]
    blocks = torch.stack(linear)  # [4, heads, D, D], outputs before inputs
    _, heads, D, _ = blocks.shape
    dense = torch.diag_embed(blocks.permute(0, 2, 3, 1)).permute(0, 3, 1, 4, 2)
    weight = dense.reshape(4, heads * D, heads * D)
    if hasattr(own, "conv1d"):  # i and f see what it makes of x, z and o see x
        zeros = torch.zeros_like(weight[:2])
        weight = torch.cat([torch.cat([weight[:2], zeros]), torch.cat([zeros, weight[2:]])], -1)
    kernel, bias = own.slstm_cell._recurrent_kernel_, own.slstm_cell._bias_
    if hasattr(own.slstm_cell, "recurrent_kernel"):  # xlstm's backends keep the two differently
        kernel, bias = own.slstm_cell.recurrent_kernel.clone(), own.slstm_cell.bias.clone()
    kernel, bias = kernel.reshape(heads, D, 4, D), bias.reshape(heads, 4, D)
    return read("xlstm", "slstm", weight.flatten(0, 1), kernel, bias)


def from_dreamer(
    kernel: Any, scale: Any, offset: Any, bias: Any = None, *, state_first: bool = True
) -> modules.Recurrent:
    """A LayerNormGRU with the weights of the GRU of a Dreamer world model.

        y = norm(W_ih x_t + W_hh h_{t-1} + b) over all 3 * H, with eps 1e-3
        r = sigmoid(y_r)     z = sigmoid(y_z - 1)     n = tanh(r * y_n)
        h_t = z * n + (1 - z) * h_{t-1}

    Args:
        kernel: [H + I, 3 * H]; with state_first=False, as DreamerV2 has it, [I + H, 3 * H].
        scale, offset: [3 * H], of the norm. bias: [3 * H], of the product, or None.
        state_first: whether the rows of h_{t-1} come before those of the input.
    Returns:
        a module with batch_first=True.
    Raises:
        ValueError, TypeError: the argument, what was expected, what came.
    Source: Hafner et al. 2023, arXiv:2301.04104; 2021, arXiv:2010.02193.
    """
    weights = _dreamer_weights(kernel, scale, offset, bias, state_first=state_first)
    return _module("layer_norm_gru", [weights], batch_first=True)


def _dreamer_weights(
    kernel: Any, scale: Any, offset: Any, bias: Any, *, state_first: bool
) -> dict[str, Tensor]:
    """As `read`, differentiable."""
    kernel = _tensor("kernel", kernel)
    if kernel.dim() != 2 or kernel.shape[1] % 3 or 3 * kernel.shape[0] <= kernel.shape[1]:
        raise ValueError(f"kernel: expected shape [H + I, 3 * H], got {tuple(kernel.shape)}")
    H = kernel.shape[1] // 3
    state, input = (kernel[:H], kernel[H:]) if state_first else (kernel[-H:], kernel[:-H])
    return read("dreamer", "layer_norm_gru", input, state, bias, scale, offset)


def to_dreamer(
    module: nn.RNNBase, layer: int = 0, *, state_first: bool = True
) -> tuple[Tensor, ...]:
    """One layer's weights as those of Dreamer's GRU: kernel, scale, offset, bias of `from_dreamer`.

    Args:
        module: a LayerNormGRU of one direction. layer: which of its layers.
        state_first: see `from_dreamer`.
    Raises:
        TypeError, ValueError: the argument, what was expected, what came.
    """
    cell, (weights,) = _weights_of(module, layer, "dreamer")
    if cell != "layer_norm_gru":
        raise ValueError(f"module: expected a LayerNormGRU with its defaults, got {cell}")
    input, state, bias, scale, offset = write("dreamer", "layer_norm_gru", weights)
    kernel = torch.cat([state, input] if state_first else [input, state])
    return kernel, scale, offset, bias
