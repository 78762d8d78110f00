"""The cells once more, in float64 NumPy, from the equations of the papers.

Written apart from `fusedrnn.cells`, one sequence at a time and with no batch, padding or mask,
so that a mistake there is not repeated here: a row with a length is a shorter sequence, a row
with resets is several sequences.
"""

import numpy as np


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def lstm_step(x, h, state, params):
    """Gers et al. 2000, eqs. 1-6: input, forget and output gate, cell."""
    _, cell = state
    a_input, a_forget, a_cell, a_output = x + h
    cell = sigmoid(a_forget) * cell + sigmoid(a_input) * np.tanh(a_cell)
    return sigmoid(a_output) * np.tanh(cell), cell


def gru_step(x, h, state, params):
    """Cho et al. 2014, eqs. 5-8, with the reset gate after the recurrent product."""
    (previous,) = state
    reset, update = sigmoid(x[0] + h[0]), sigmoid(x[1] + h[1])
    candidate = np.tanh(x[2] + reset * h[2])
    return (update * previous + (1.0 - update) * candidate,)


def tanh_step(x, h, state, params):
    """Elman 1990."""
    return (np.tanh(x[0] + h[0]),)


def relu_step(x, h, state, params):
    """Le, Jaitly & Hinton 2015."""
    return (np.maximum(x[0] + h[0], 0.0),)


STEPS = {
    "lstm": (4, lstm_step),
    "gru": (3, gru_step),
    "rnn_tanh": (1, tanh_step),
    "rnn_relu": (1, relu_step),
}


def sequence(cell, x, state, w, reverse=False):
    """One sequence in one direction.

    Args:
        x: [T, I].
        state: S arrays [H] (the first [P] with a projection).
        w: a namespace with w_ih, w_hh, b_ih, b_hh, w_hr (the last three or None) and params.
    Returns:
        outputs [T, H], the final states.
    """
    gates, step = STEPS[cell]
    outputs = [None] * len(x)
    for t in range(len(x) - 1, -1, -1) if reverse else range(len(x)):
        from_input = w.w_ih @ x[t] + (0 if w.b_ih is None else w.b_ih)
        from_state = w.w_hh @ state[0] + (0 if w.b_hh is None else w.b_hh)
        state = step(from_input.reshape(gates, -1), from_state.reshape(gates, -1), state, w.params)
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
