"""The cells once more, in float64 NumPy, from the equations of the papers.

Written apart from `fusedrnn.cells`, one sequence at a time and with no batch, padding or mask,
so that a mistake there is not repeated here: a row with a length is a shorter sequence, a row
with resets is several sequences.
"""

import numpy as np


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


# step(x, product, state, params): x [gates, H] from the input; product(h) [gates, H], what the
# recurrent weights and their biases make of h.


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
}


def sequence(cell, x, state, w, reverse=False):
    """One sequence in one direction.

    Args:
        x: [T, I].
        state: S arrays [H] (the first [P] with a projection).
        w: a namespace with w_ih, w_hh ([heads, gates * H / heads, H / heads] with heads), b_ih,
            b_hh, w_hr (the last three or None) and params.
    Returns:
        outputs [T, H], the final states.
    """
    gates, step = STEPS[cell]
    outputs = [None] * len(x)

    def product(h):
        if w.w_hh.ndim == 2:
            sums = (w.w_hh @ h).reshape(gates, -1)
        else:
            parts = [own @ part for own, part in zip(w.w_hh, np.split(h, len(w.w_hh)), strict=True)]
            sums = np.concatenate([part.reshape(gates, -1) for part in parts], axis=1)
        return sums if w.b_hh is None else sums + w.b_hh.reshape(gates, -1)

    for t in range(len(x) - 1, -1, -1) if reverse else range(len(x)):
        from_input = w.w_ih @ x[t] + (0 if w.b_ih is None else w.b_ih)
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
