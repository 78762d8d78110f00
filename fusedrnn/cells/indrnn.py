"""Independently recurrent network: a unit sees nothing but itself of the last step.

    h_t = relu(x_h + u * h_{t-1} + b)          or          h_t = tanh(x_h + u * h_{t-1} + b)

The bodies are those of the simple recurrent network; weight_hh is the vector u.

Source: Li et al. 2018, arXiv:1803.04831.
"""

from dataclasses import replace

from fusedrnn.cells._cell import Cell, Linear, register
from fusedrnn.cells.rnn import RNN_RELU, RNN_TANH

INDRNN_RELU = register(
    Cell(
        name="indrnn_relu",
        module="IndRNN",
        states=("h",),
        stages=(replace(RNN_RELU.stages[0], receives=Linear(("h",), diagonal=True)),),
        source="arXiv:1803.04831",
    )
)

INDRNN_TANH = register(
    Cell(
        name="indrnn_tanh",
        module='IndRNN(nonlinearity="tanh")',
        states=("h",),
        stages=(replace(RNN_TANH.stages[0], receives=Linear(("h",), diagonal=True)),),
        source="arXiv:1803.04831",
    )
)
