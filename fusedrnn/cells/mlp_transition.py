"""Simple recurrent network whose step is a perceptron of several layers.

    a_1 = leaky_relu(x_m + W_hh h_{t-1} + b_hh)
    a_k = leaky_relu(weight_mlp[k-1] a_{k-1} + bias_mlp[k-1])      for k = 2 ... n
    h_t = weight_mlp[n] a_n + bias_mlp[n]

A stage for each matrix, with as many units as it has rows.

Source: Pascanu et al. 2014, arXiv:1312.6026, whose DT-RNN this is, with a linear last layer.
"""

from fusedrnn.cells._cell import Cell, Dense, Linear, Stage, family
from fusedrnn.cells.vocabulary import where, zeros_like


def _take(x_gates, sums, values, params):
    return (sums[0],), ()


def _take_backward(d_values, saved, prev, new, params):
    return (), (d_values[0],), (zeros_like(d_values[0]),), ()


@family
def mlp_transition(layer_sizes=(100, 100), negative_slope=0.01) -> Cell:
    """The cell; layer_sizes are the units of a_1 to a_n, negative_slope is at least 0."""

    def enter(x_gates, h_gates, state, params):
        a = x_gates[0] + h_gates[0]
        a = where(a > 0, a, a * negative_slope)
        return (a,), (a,)

    def enter_backward(d_values, saved, prev, new, params):
        d = where(saved[0] > 0, d_values[0], d_values[0] * negative_slope)
        return (d,), (d,), (zeros_like(d),), ()

    def hidden(number: int, width: int) -> Stage:
        def pass_on(x_gates, sums, values, params):
            a = where(sums[0] > 0, sums[0], sums[0] * negative_slope)
            return (a,), (a,)

        def pass_on_backward(d_values, saved, prev, new, params):
            d = where(saved[number] > 0, d_values[0], d_values[0] * negative_slope)
            return (), (d,), (zeros_like(d),), ()

        receives = Dense((f"weight_mlp{number}",), (f"bias_mlp{number}",), width)
        saved = (f"a_{number + 1}",)
        return Stage(receives, pass_on, pass_on_backward, additive=True, saved=saved)

    n = len(layer_sizes)
    first = Linear(("m",), width=layer_sizes[0])
    last = Dense((f"weight_mlp{n}",), (f"bias_mlp{n}",))
    return Cell(
        name="mlp_transition",
        module="MLPTransitionRNN",
        states=("h",),
        stages=(
            Stage(first, enter, enter_backward, additive=True, saved=("a_1",)),
            *(hidden(number, layer_sizes[number]) for number in range(1, n)),
            Stage(last, _take, _take_backward, additive=True),
        ),
        source="arXiv:1312.6026",
    )
