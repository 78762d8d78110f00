"""The simple recurrent network, with tanh or relu.

    h_t = tanh(x_h + h_h)          or          h_t = relu(x_h + h_h)

Source: Elman 1990, doi:10.1207/s15516709cog1402_1; relu: Le, Jaitly & Hinton 2015,
arXiv:1504.00941.
"""

from fusedrnn.cells._cell import Cell, Linear, Onnx, Stage, register
from fusedrnn.cells.vocabulary import relu, tanh, where, zeros_like


def _forward_tanh(x_gates, h_gates, state, params):
    return (tanh(x_gates[0] + h_gates[0]),), ()


def _backward_tanh(d_state, saved, prev, new, params):
    h = new[0]
    d_gates = (d_state[0] * (1 - h * h),)
    return d_gates, d_gates, (zeros_like(h),), ()


def _forward_relu(x_gates, h_gates, state, params):
    return (relu(x_gates[0] + h_gates[0]),), ()


def _backward_relu(d_state, saved, prev, new, params):
    h = new[0]
    zeros = zeros_like(h)
    # As in torch, the derivative at 0 is 0, and NaN, which fails the comparison, is passed on.
    d_gates = (where(h <= 0, zeros, d_state[0]),)
    return d_gates, d_gates, (zeros,), ()


RNN_TANH = register(
    Cell(
        name="rnn_tanh",
        module="RNN",
        states=("h",),
        stages=(Stage(Linear(("h",)), _forward_tanh, _backward_tanh, additive=True),),
        aten="rnn_tanh",
        onnx=Onnx("RNN", ("h",)),
        source="doi:10.1207/s15516709cog1402_1",
    )
)

RNN_RELU = register(
    Cell(
        name="rnn_relu",
        module='RNN(nonlinearity="relu")',
        states=("h",),
        stages=(Stage(Linear(("h",)), _forward_relu, _backward_relu, additive=True),),
        aten="rnn_relu",
        onnx=Onnx("RNN", ("h",), activations=("Relu",)),
        source="arXiv:1504.00941",
    )
)
