"""The relatives of LSTM, GRU and RNN that torch.nn does not have, as modules."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from fusedrnn import arguments
from fusedrnn.cells import layer_norm_gru, layer_norm_lstm, mlp_transition
from fusedrnn.modules import Recurrent
from fusedrnn.types import HiddenSize, ModuleOptions, Nonlinearity, Peephole, State

TwoStates = tuple[Tensor, Tensor]
FourStates = tuple[Tensor, Tensor, Tensor, Tensor]


class Relative(Recurrent[State]):
    """What cells without options of their own share: `Recurrent`, with the cell of the class."""

    cell_name: str

    def __init__(
        self,
        input_size: int,
        hidden_size: HiddenSize,
        num_layers: int = 1,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__(self.cell_name, input_size, hidden_size, num_layers, **options)


class PeepholeLSTM(Recurrent[TwoStates]):
    r"""Long short-term memory whose gates see the cell state.

        i_t = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi + w_ci * c_{t-1})
        f_t = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf + w_cf * c_{t-1})
        g_t = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
        c_t = f_t * c_{t-1} + i_t * g_t
        o_t = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho + w_co * c_t)
        h_t = o_t * tanh(c_t)

    Args:
        input_size: I, features of the input.
        hidden_size: H, units of a layer and direction; or a tuple, one of each layer.
        num_layers: L. Default: 1.
        peephole: "diagonal", a gate sees its own unit's cell state; or "full", those of all units,
            so that w_ci, w_cf and w_co are matrices. Default: "diagonal".
        options: the further arguments of `fusedrnn.Recurrent`, by name.

    Attributes:
        weight_ih_l[k]: [4 * H, I], for k > 0 [4 * H, D * H]; rows i, f, g, o.
        weight_hh_l[k]: [4 * H, H]. bias_ih_l[k], bias_hh_l[k]: [4 * H].
        weight_ci_l[k], weight_cf_l[k], weight_co_l[k]: [H], or [H, H].
        (With heads, in which those matrices are blocks as weight_hh's are, with projections, which
        full peepholes do not have, and how they start: `fusedrnn.Recurrent`.)

    Inputs, outputs, raises: as `fusedrnn.LSTM`.

    Source: Gers & Schmidhuber 2000, doi:10.1109/IJCNN.2000.861302; with matrices: Graves 2013,
    arXiv:1308.0850, equations 7 to 11, before it says that they are diagonal.

    Example::

        >>> rnn = fusedrnn.PeepholeLSTM(10, 20, num_layers=2)
        >>> output, (h_n, c_n) = rnn(torch.randn(5, 3, 10))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: HiddenSize,
        num_layers: int = 1,
        *,
        peephole: Peephole = "diagonal",
        **options: Unpack[ModuleOptions],
    ) -> None:
        if peephole not in ("diagonal", "full"):
            raise ValueError(f"peephole: expected 'diagonal' or 'full', got {peephole!r}")
        cell = "peephole_lstm" if peephole == "diagonal" else "peephole_lstm_full"
        super().__init__(cell, input_size, hidden_size, num_layers, **options)

    def extra_repr(self) -> str:
        """What repr shows of the module."""
        return super().extra_repr() + ", peephole='full'" * self.mode.endswith("FULL")


class CoupledLSTM(Relative[TwoStates]):
    r"""Long short-term memory with one gate for forgetting and for writing.

        f_t = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)
        g_t = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
        o_t = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho)
        c_t = f_t * c_{t-1} + (1 - f_t) * g_t
        h_t = o_t * tanh(c_t)

    Args:
        input_size: I, features of the input.
        hidden_size: H, units of a layer and direction; or a tuple, one of each layer.
        num_layers: L. Default: 1.
        options: the further arguments of `fusedrnn.Recurrent`, by name.

    Attributes:
        weight_ih_l[k]: [3 * H, I], for k > 0 [3 * H, D * H]; rows f, g, o.
        weight_hh_l[k]: [3 * H, H]. bias_ih_l[k], bias_hh_l[k]: [3 * H].
        (With heads, and how they start: `fusedrnn.Recurrent`.)

    Inputs, outputs, raises: as `fusedrnn.LSTM`.

    Source: Greff et al. 2017, doi:10.1109/TNNLS.2016.2582924 ("CIFG").

    Example::

        >>> rnn = fusedrnn.CoupledLSTM(10, 20, num_layers=2)
        >>> output, (h_n, c_n) = rnn(torch.randn(5, 3, 10))
    """

    cell_name = "coupled_lstm"


class MultiplicativeLSTM(Relative[TwoStates]):
    r"""Long short-term memory that sees a product of input and state instead of the state.

        m_t = (W_im x_t + b_im) * (W_hm h_{t-1} + b_hm)
        i_t = sigmoid(W_ii x_t + b_ii + W_hi m_t + b_hi)
        f_t = sigmoid(W_if x_t + b_if + W_hf m_t + b_hf)
        g_t = tanh(W_ig x_t + b_ig + W_hg m_t + b_hg)
        o_t = sigmoid(W_io x_t + b_io + W_ho m_t + b_ho)
        c_t = f_t * c_{t-1} + i_t * g_t
        h_t = o_t * tanh(c_t)

    Args:
        input_size: I, features of the input.
        hidden_size: H, units of a layer and direction; or a tuple, one of each layer.
        num_layers: L. Default: 1.
        options: the further arguments of `fusedrnn.Recurrent`, by name.

    Attributes:
        weight_ih_l[k]: [5 * H, I], for k > 0 [5 * H, D * H]; rows m, i, f, g, o.
        weight_hh_l[k]: [5 * H, H]. bias_ih_l[k], bias_hh_l[k]: [5 * H].
        (With heads, and how they start: `fusedrnn.Recurrent`.)

    Inputs, outputs, raises: as `fusedrnn.LSTM`.

    Source: Krause et al. 2016, arXiv:1609.07959.

    Example::

        >>> rnn = fusedrnn.MultiplicativeLSTM(10, 20, batch_first=True)
        >>> output, (h_n, c_n) = rnn(torch.randn(5, 3, 10))
    """

    cell_name = "multiplicative_lstm"


class LayerNormLSTM(Recurrent[TwoStates]):
    r"""Long short-term memory with layer normalisation inside the loop.

        a_t = LN(W_ih x_t) * w_ih + LN(W_hh h_{t-1}) * w_hh + b_ih + b_hh        over all 4 * H
        c_t = sigmoid(a_f) * c_{t-1} + sigmoid(a_i) * tanh(a_g)
        h_t = sigmoid(a_o) * tanh(LN(c_t) * w_c + b_c)

    LN(y) = (y - mean(y)) / sqrt(var(y) + eps). With heads, W_hh h and c_t are normalised in each.

    Args:
        input_size: I, features of the input.
        hidden_size: H, units of a layer and direction; or a tuple, one of each layer.
        num_layers: L. Default: 1.
        eps: is added to every variance. Default: 1e-5.
        options: the further arguments of `fusedrnn.Recurrent`, by name.

    Attributes:
        weight_ih_l[k]: [4 * H, I], for k > 0 [4 * H, D * H]; rows i, f, g, o.
        weight_hh_l[k]: [4 * H, H]. bias_ih_l[k], bias_hh_l[k]: [4 * H].
        weight_ln_ih_l[k], weight_ln_hh_l[k]: [4 * H]; start as ones.
        weight_ln_c_l[k], bias_ln_c_l[k]: [H]; start as ones and zeros.
        (With heads, and how they start: `fusedrnn.Recurrent`.)

    Inputs, outputs, raises: as `fusedrnn.LSTM`.

    Source: Ba, Kiros & Hinton 2016, arXiv:1607.06450.

    Example::

        >>> rnn = fusedrnn.LayerNormLSTM(10, 20, bidirectional=True)
        >>> output, (h_n, c_n) = rnn(torch.randn(5, 3, 10))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: HiddenSize,
        num_layers: int = 1,
        *,
        eps: float = 1e-5,
        **options: Unpack[ModuleOptions],
    ) -> None:
        cell = layer_norm_lstm.layer_norm_lstm(eps=_positive("eps", eps))
        super().__init__(cell, input_size, hidden_size, num_layers, **options)


class SLSTM(Relative[FourStates]):
    r"""Long short-term memory with exponential gates, a normaliser and a stabiliser.

        a_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
        l_t = log(sigmoid(a_f)) + m_{t-1}
        m_t = max(l_t, a_i), or a_i where n_{t-1} = 0
        i_t = exp(a_i - m_t),  f_t = min(exp(l_t - m_t), 1)
        c_t = f_t * c_{t-1} + i_t * tanh(a_z)
        n_t = f_t * n_{t-1} + i_t
        h_t = sigmoid(a_o) * c_t / n_t

    Args:
        input_size: I, features of the input.
        hidden_size: H, units of a layer and direction; or a tuple, one of each layer.
        num_layers: L. Default: 1.
        options: the further arguments of `fusedrnn.Recurrent`, by name.

    Attributes:
        weight_ih_l[k]: [4 * H, I], for k > 0 [4 * H, D * H]; rows i, f, z, o.
        weight_hh_l[k]: [4 * H, H]. bias_ih_l[k], bias_hh_l[k]: [4 * H].
        (With heads, and how they start: `fusedrnn.Recurrent`.)

    Inputs, outputs, raises: as `fusedrnn.LSTM`, with (h, c, n, m) in the place of (h, c).

    Source: Beck et al. 2024, arXiv:2405.04517.

    Example::

        >>> rnn = fusedrnn.SLSTM(10, 20, num_heads=4)
        >>> output, (h_n, c_n, n_n, m_n) = rnn(torch.randn(5, 3, 10))
    """

    cell_name = "slstm"


class LayerNormGRU(Recurrent[Tensor]):
    r"""Gated recurrent unit with all gates normalised together, as DreamerV2 and DreamerV3 have it.

        a_t = LN(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh) * w + b        over all 3 * H
        r_t = sigmoid(a_r),  z_t = sigmoid(a_z + update_bias)
        n_t = tanh(r_t * a_n)
        h_t = z_t * n_t + (1 - z_t) * h_{t-1}

    LN(y) = (y - mean(y)) / sqrt(var(y) + eps), with heads in each of them.

    Args:
        input_size: I, features of the input.
        hidden_size: H, units of a layer and direction; or a tuple, one of each layer.
        num_layers: L. Default: 1.
        eps: is added to the variance. Default: 1e-3.
        update_bias: is added to what the update gate is the sigmoid of. Default: -1.
        options: the further arguments of `fusedrnn.Recurrent`, by name.

    Attributes:
        weight_ih_l[k]: [3 * H, I], for k > 0 [3 * H, D * H]; rows r, z, n.
        weight_hh_l[k]: [3 * H, H]. bias_ih_l[k], bias_hh_l[k]: [3 * H].
        weight_ln_l[k], bias_ln_l[k]: [3 * H]; start as ones and zeros.
        (With heads, and how they start: `fusedrnn.Recurrent`.)

    Inputs, outputs, raises: as `fusedrnn.GRU`.

    Source: Hafner et al. 2021, arXiv:2010.02193; normalisation: Ba, Kiros & Hinton 2016,
    arXiv:1607.06450.

    Example::

        >>> rnn = fusedrnn.LayerNormGRU(10, 20)
        >>> output, h_n = rnn(torch.randn(5, 3, 10))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: HiddenSize,
        num_layers: int = 1,
        *,
        eps: float = 1e-3,
        update_bias: float = -1.0,
        **options: Unpack[ModuleOptions],
    ) -> None:
        options_of_cell = {
            "eps": _positive("eps", eps),
            "update_bias": _number("update_bias", update_bias),
        }
        cell = layer_norm_gru.layer_norm_gru(**options_of_cell)
        super().__init__(cell, input_size, hidden_size, num_layers, **options)


class MGU(Relative[Tensor]):
    r"""Minimal gated unit: one gate both forgets and resets.

        f_t = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)
        n_t = tanh(W_in x_t + b_in + W_hn (f_t * h_{t-1}) + b_hn)
        h_t = (1 - f_t) * h_{t-1} + f_t * n_t

    Args:
        input_size: I, features of the input.
        hidden_size: H, units of a layer and direction; or a tuple, one of each layer.
        num_layers: L. Default: 1.
        options: the further arguments of `fusedrnn.Recurrent`, by name.

    Attributes:
        weight_ih_l[k]: [2 * H, I], for k > 0 [2 * H, D * H]; rows f, n.
        weight_hh_l[k]: [2 * H, H]. bias_ih_l[k], bias_hh_l[k]: [2 * H].
        (With heads, and how they start: `fusedrnn.Recurrent`.)

    Inputs, outputs, raises: as `fusedrnn.GRU`.

    Source: Zhou et al. 2016, arXiv:1603.09420.

    Example::

        >>> rnn = fusedrnn.MGU(10, 20)
        >>> output, h_n = rnn(torch.randn(5, 3, 10))
    """

    cell_name = "mgu"


class UGRNN(Relative[Tensor]):
    r"""Update gate recurrent network: the least that has a gate.

        u_t = sigmoid(W_iu x_t + b_iu + W_hu h_{t-1} + b_hu)
        n_t = tanh(W_in x_t + b_in + W_hn h_{t-1} + b_hn)
        h_t = u_t * h_{t-1} + (1 - u_t) * n_t

    Args:
        input_size: I, features of the input.
        hidden_size: H, units of a layer and direction; or a tuple, one of each layer.
        num_layers: L. Default: 1.
        options: the further arguments of `fusedrnn.Recurrent`, by name.

    Attributes:
        weight_ih_l[k]: [2 * H, I], for k > 0 [2 * H, D * H]; rows u, n.
        weight_hh_l[k]: [2 * H, H]. bias_ih_l[k], bias_hh_l[k]: [2 * H].
        (With heads, and how they start: `fusedrnn.Recurrent`.)

    Inputs, outputs, raises: as `fusedrnn.GRU`.

    Source: Collins, Sohl-Dickstein & Sussillo 2016, arXiv:1611.09913.

    Example::

        >>> rnn = fusedrnn.UGRNN(10, 20)
        >>> output, h_n = rnn(torch.randn(5, 3, 10))
    """

    cell_name = "ugrnn"


class LiGRU(Relative[Tensor]):
    r"""Light gated recurrent unit: no reset gate, and a rectified candidate.

        z_t = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
        n_t = relu(W_in x_t + b_in + W_hn h_{t-1} + b_hn)
        h_t = z_t * h_{t-1} + (1 - z_t) * n_t

    Args:
        input_size: I, features of the input.
        hidden_size: H, units of a layer and direction; or a tuple, one of each layer.
        num_layers: L. Default: 1.
        options: the further arguments of `fusedrnn.Recurrent`, by name.

    Attributes:
        weight_ih_l[k]: [2 * H, I], for k > 0 [2 * H, D * H]; rows z, n.
        weight_hh_l[k]: [2 * H, H]. bias_ih_l[k], bias_hh_l[k]: [2 * H].
        (With heads, and how they start: `fusedrnn.Recurrent`.)

    Inputs, outputs, raises: as `fusedrnn.GRU`.

    Source: Ravanelli et al. 2018, arXiv:1803.10225, without batch normalisation.

    Example::

        >>> rnn = fusedrnn.LiGRU(10, 20, bidirectional=True)
        >>> output, h_n = rnn(torch.randn(5, 3, 10))
    """

    cell_name = "ligru"


class IndRNN(Recurrent[Tensor]):
    r"""Independently recurrent network: a unit sees nothing but itself of the last step.

        h_t = relu(W_ih x_t + b_ih + w_hh * h_{t-1} + b_hh)        or tanh

    Args:
        input_size: I, features of the input.
        hidden_size: H, units of a layer and direction; or a tuple, one of each layer.
        num_layers: L. Default: 1.
        nonlinearity: "relu" or "tanh". Default: "relu".
        options: the further arguments of `fusedrnn.Recurrent`, by name.

    Attributes:
        weight_ih_l[k]: [H, I], for k > 0 [H, D * H].
        weight_hh_l[k]: [H], with any number of heads; starts uniform in [0, 1].
        bias_ih_l[k], bias_hh_l[k]: [H].
        (With heads, and how they start: `fusedrnn.Recurrent`.)

    Inputs, outputs, raises: as `fusedrnn.RNN`.

    Source: Li et al. 2018, arXiv:1803.04831.

    Example::

        >>> rnn = fusedrnn.IndRNN(10, 20, num_layers=6)
        >>> output, h_n = rnn(torch.randn(5, 3, 10))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: HiddenSize,
        num_layers: int = 1,
        nonlinearity: Nonlinearity = "relu",
        **options: Unpack[ModuleOptions],
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
        self.nonlinearity: Nonlinearity = nonlinearity
        super().__init__(f"indrnn_{nonlinearity}", input_size, hidden_size, num_layers, **options)


class MLPTransitionRNN(Recurrent[Tensor]):
    r"""Simple recurrent network whose step is a perceptron of several layers.

        a_1 = leaky_relu(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
        a_k = leaky_relu(weight_mlp[k-1] a_{k-1} + bias_mlp[k-1])      for k = 2 ... n
        h_t = weight_mlp[n] a_n + bias_mlp[n]

    Args:
        input_size: I, features of the input.
        hidden_size: H, units of a layer and direction; or a tuple, one of each layer.
        num_layers: L. Default: 1.
        layer_sizes: the n hidden layers' units, of one to five. Default: (100, 100).
        negative_slope: of leaky_relu; 0 makes it relu. Default: 0.01.
        options: the further arguments of `fusedrnn.Recurrent`, by name.

    Attributes:
        weight_ih_l[k]: [layer_sizes[0], I], for k > 0 [layer_sizes[0], D * H].
        weight_hh_l[k]: [layer_sizes[0], H]. bias_ih_l[k], bias_hh_l[k]: [layer_sizes[0]].
        weight_mlp1_l[k], ...: [layer_sizes[1], layer_sizes[0]], ..., [H, layer_sizes[-1]], and
            bias_mlp1_l[k], ...: [layer_sizes[1]], ..., [H], all uniform in +-1/sqrt(columns), as
            torch.nn.Linear's.
        (Without heads and projections; how the others start: `fusedrnn.Recurrent`.)

    Inputs, outputs, raises: as `fusedrnn.RNN`.

    Source: Pascanu et al. 2014, arXiv:1312.6026 (DT-RNN), here with a linear last layer.

    Example::

        >>> rnn = fusedrnn.MLPTransitionRNN(10, 20, layer_sizes=(64, 32))
        >>> output, h_n = rnn(torch.randn(5, 3, 10))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: HiddenSize,
        num_layers: int = 1,
        *,
        layer_sizes: Sequence[int] = (100, 100),
        negative_slope: float = 0.01,
        **options: Unpack[ModuleOptions],
    ) -> None:
        if not isinstance(layer_sizes, Sequence) or isinstance(layer_sizes, str):
            raise TypeError(f"layer_sizes: expected a tuple of ints, got {layer_sizes!r}")
        sizes = arguments.ints_of("layer_sizes", layer_sizes)
        if not 1 <= len(layer_sizes) <= 5 or min(layer_sizes) < 1:
            raise ValueError(f"layer_sizes: expected 1 to 5 positive ints, got {layer_sizes!r}")
        if (slope := _number("negative_slope", negative_slope)) < 0:
            raise ValueError(f"negative_slope: expected at least 0, got {negative_slope}")
        cell = mlp_transition.mlp_transition(layer_sizes=sizes, negative_slope=slope)
        super().__init__(cell, input_size, hidden_size, num_layers, **options)


def _number(name: str, value: Any) -> float:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return float(value)


def _positive(name: str, value: Any) -> float:
    if _number(name, value) <= 0:
        raise ValueError(f"{name}: expected a number above 0, got {value!r}")
    return float(value)
