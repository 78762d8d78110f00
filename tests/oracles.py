"""The cells once more, in float64 NumPy, from the equations of the papers.

Written apart from `fusedrnn.cells`, one sequence at a time and with no batch, padding or mask,
so that a mistake there is not repeated here: a row with a length is a shorter sequence, a row
with resets is several sequences.
"""

import numpy as np


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def layer_norm(x, eps, heads=1):
    """x [gates, H], normalised over all gates and units of a head."""
    parts = x.reshape(len(x), heads, -1)
    mean = parts.mean((0, 2), keepdims=True)
    return ((parts - mean) / np.sqrt(parts.var((0, 2), keepdims=True) + eps)).reshape(x.shape)


# step(x, product, state, params): x [gates, H] from the input; product(h) [gates, H], what the
# recurrent weights and their biases make of h, in product.heads heads.


def lstm_step(x, product, state, params):
    """Gers et al. 2000, eqs. 1-6: input, forget and output gate, cell."""
    h, cell = state
    a_input, a_forget, a_cell, a_output = x + product(h)
    cell = sigmoid(a_forget) * cell + sigmoid(a_input) * np.tanh(a_cell)
    return sigmoid(a_output) * np.tanh(cell), cell


def gru_step(x, product, state, params):
    """Cho et al. 2014, eqs. 5-8, with the reset gate after the recurrent product."""
    (previous,) = state
    h = product(previous)
    reset, update = sigmoid(x[0] + h[0]), sigmoid(x[1] + h[1])
    candidate = np.tanh(x[2] + reset * h[2])
    return (update * previous + (1.0 - update) * candidate,)


def gru_reset_before_step(x, product, state, params):
    """Cho et al. 2014, eqs. 5-8."""
    (previous,) = state
    reset, update, _ = sigmoid(x + product(previous))
    candidate = np.tanh(x[2] + product(reset * previous)[2])
    return (update * previous + (1.0 - update) * candidate,)


def peephole_lstm_step(x, product, state, params):
    """Gers & Schmidhuber 2000: the output gate sees the new cell, the others the old."""
    h, cell = state
    a = x + product(h)
    to_input, to_forget, to_output = params
    kept = sigmoid(a[1] + to_forget * cell) * cell
    cell = kept + sigmoid(a[0] + to_input * cell) * np.tanh(a[2])
    return sigmoid(a[3] + to_output * cell) * np.tanh(cell), cell


def coupled_lstm_step(x, product, state, params):
    """Greff et al. 2017, "CIFG": i = 1 - f."""
    h, cell = state
    a_forget, a_cell, a_output = x + product(h)
    cell = sigmoid(a_forget) * cell + (1.0 - sigmoid(a_forget)) * np.tanh(a_cell)
    return sigmoid(a_output) * np.tanh(cell), cell


def multiplicative_lstm_step(x, product, state, params):
    """Krause et al. 2016: an LSTM that sees (W_mx x) * (W_mh h) for h."""
    h, cell = state
    intermediate = x[0] * product(h)[0]
    i, f, g, o = (x + product(intermediate))[1:]
    cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(cell), cell


def mgu_step(x, product, state, params):
    """Zhou et al. 2016."""
    (previous,) = state
    forget = sigmoid(x[0] + product(previous)[0])
    candidate = np.tanh(x[1] + product(forget * previous)[1])
    return ((1.0 - forget) * previous + forget * candidate,)


def ugrnn_step(x, product, state, params):
    """Collins et al. 2016."""
    (previous,) = state
    a_update, a_candidate = x + product(previous)
    update = sigmoid(a_update)
    return (update * previous + (1.0 - update) * np.tanh(a_candidate),)


def ligru_step(x, product, state, params):
    """Ravanelli et al. 2018, without batch normalisation."""
    (previous,) = state
    a_update, a_candidate = x + product(previous)
    update = sigmoid(a_update)
    return (update * previous + (1.0 - update) * np.maximum(a_candidate, 0.0),)


def layer_norm_lstm_step(x, product, state, params):
    """Ba et al. 2016; x was normalised by `sequence`."""
    h, cell = state
    a = x + layer_norm(product(h), 1e-5, product.heads) * np.stack(params[:4])
    cell = sigmoid(a[1]) * cell + sigmoid(a[0]) * np.tanh(a[2])
    normal = layer_norm(cell[None], 1e-5, product.heads)[0]
    return sigmoid(a[3]) * np.tanh(normal * params[4] + params[5]), cell


def layer_norm_gru_step(x, product, state, params):
    """DreamerV2's and V3's GRUCell: the reset gate acts on the normalised candidate, and the update
    gate has a bias of -1."""
    (previous,) = state
    normal = layer_norm(x + product(previous), 1e-3, product.heads)
    reset, update, candidate = normal * np.stack(params[:3]) + np.stack(params[3:])
    update = sigmoid(update - 1.0)
    return (update * np.tanh(sigmoid(reset) * candidate) + (1.0 - update) * previous,)


def peephole_lstm_full_step(x, product, state, params):
    """Graves 2013, eqs. 7-11: matrices from the cells to the gates."""
    h, cell = state
    a = x + product(h)
    (to_input, _), (to_forget, _), (to_output, _) = product.dense
    kept = sigmoid(a[1] + to_forget @ cell) * cell
    cell = kept + sigmoid(a[0] + to_input @ cell) * np.tanh(a[2])
    return sigmoid(a[3] + to_output @ cell) * np.tanh(cell), cell


def mlp_transition_step(x, product, state, params):
    """Linear layers with leaky rectifiers of slope 0.01 between them, none behind the last."""
    a = (x + product(state[0]))[0]
    for weight, bias in product.dense:
        a = weight @ np.maximum(a, 0.01 * a) + (0.0 if bias is None else bias)
    return (a,)


def slstm_step(x, product, state, params):
    """Beck et al. 2024, without a bound for what their stabiliser keeps finite."""
    h, cell, normalizer, stabilizer = state
    a_input, a_forget, a_cell, a_output = x + product(h)
    log_forget = -np.log1p(np.exp(-a_forget)) + stabilizer
    new = np.where(normalizer == 0.0, a_input, np.maximum(log_forget, a_input))
    forget = np.minimum(np.exp(log_forget - new), 1.0)
    cell = forget * cell + np.exp(a_input - new) * np.tanh(a_cell)
    normalizer = forget * normalizer + np.exp(a_input - new)
    return sigmoid(a_output) * cell / normalizer, cell, normalizer, new


def tanh_step(x, product, state, params):
    """Elman 1990."""
    return (np.tanh(x[0] + product(state[0])[0]),)


def relu_step(x, product, state, params):
    """Le, Jaitly & Hinton 2015."""
    return (np.maximum(x[0] + product(state[0])[0], 0.0),)


STEPS = {
    "lstm": (4, lstm_step),
    "gru": (3, gru_step),
    "gru_reset_before": (3, gru_reset_before_step),
    "rnn_tanh": (1, tanh_step),
    "rnn_relu": (1, relu_step),
    "coupled_lstm": (3, coupled_lstm_step),
    "indrnn_relu": (1, relu_step),
    "indrnn_tanh": (1, tanh_step),
    "layer_norm_gru": (3, layer_norm_gru_step),
    "layer_norm_lstm": (4, layer_norm_lstm_step),
    "ligru": (2, ligru_step),
    "mgu": (2, mgu_step),
    "mlp_transition": (1, mlp_transition_step),
    "multiplicative_lstm": (5, multiplicative_lstm_step),
    "peephole_lstm": (4, peephole_lstm_step),
    "peephole_lstm_full": (4, peephole_lstm_full_step),
    "slstm": (4, slstm_step),
    "ugrnn": (2, ugrnn_step),
}


def sequence(cell, x, state, w, reverse=False):
    """One sequence in one direction.

    Args:
        x: [T, I].
        state: S arrays [H] (the first [P] with a projection).
        w: a namespace with w_ih, w_hh ([heads, gates * H / heads, H / heads] with heads, [gates *
            H] where a unit sees itself alone), b_ih, b_hh, w_hr, w_norm (these four or None; w_norm
            scales W_ih x, normalised), params, and dense: a pair (weight, bias or None) for each
            other matrix of the cell's.
    Returns:
        outputs [T, H], the final states.
    """
    gates, step = STEPS[cell]
    outputs = [None] * len(x)

    def product(h):
        if w.w_hh.ndim == 1:
            sums = w.w_hh.reshape(gates, -1) * h
        elif w.w_hh.ndim == 2:
            sums = (w.w_hh @ h).reshape(gates, -1)
        else:
            parts = [own @ part for own, part in zip(w.w_hh, np.split(h, len(w.w_hh)), strict=True)]
            sums = np.concatenate([part.reshape(gates, -1) for part in parts], axis=1)
        return sums if w.b_hh is None else sums + w.b_hh.reshape(gates, -1)

    product.dense = w.dense
    product.heads = len(w.w_hh) if w.w_hh.ndim == 3 else 1
    for t in range(len(x) - 1, -1, -1) if reverse else range(len(x)):
        from_input = w.w_ih @ x[t]
        if w.w_norm is not None:
            from_input = layer_norm(from_input[None], 1e-5)[0] * w.w_norm
        from_input = from_input + (0 if w.b_ih is None else w.b_ih)
        state = step(from_input.reshape(gates, -1), product, state, w.params)
        if w.w_hr is not None:
            state = (w.w_hr @ state[0], *state[1:])
        outputs[t] = state[0]
    return np.stack(outputs) if outputs else np.zeros((0, len(state[0]))), state


def layer(cell, x, state, directions, lengths=None, resets=None):
    """One layer: x [T, B, I], states [D, B, H]; returns output [T, B, D * H] and the states.

    resets: [T, B] bool; a True begins a new sequence at that step, from zeros.
    """
    T, B = x.shape[:2]
    output = None
    finals = [np.array(s, copy=True) for s in state]
    for b in range(B):
        length = T if lengths is None else int(lengths[b])
        starts = [] if resets is None else [t for t in range(1, length) if resets[t, b]]
        pieces = list(zip([0, *starts], [*starts, length], strict=True)) if length else []
        for d, w in enumerate(directions):
            own = tuple(s[d, b] for s in state)
            if d == 0 and resets is not None and length and resets[0, b]:
                own = tuple(np.zeros_like(s) for s in own)
            rows = np.zeros((T, own[0].shape[0]))
            for first, last in reversed(pieces) if d else pieces:
                begin = own
                if first != 0 if d == 0 else last != length:
                    begin = tuple(np.zeros_like(s) for s in own)
                rows[first:last], final = sequence(cell, x[first:last, b], begin, w, d == 1)
            if pieces:
                for target, value in zip(finals, final, strict=True):
                    target[d, b] = value
            if output is None:
                output = np.zeros((T, B, len(directions), rows.shape[1]))
            output[:, b, d] = rows
    return output.reshape(T, B, -1), tuple(finals)
