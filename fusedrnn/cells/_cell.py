"""What a recurrent cell is, and the registry of all that exist."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fusedrnn.cells import vocabulary

REGISTRY: dict[str, "Cell"] = {}


@dataclass(frozen=True)
class Cell:
    """A recurrence, described once, for every backend.

        h_gates_t = h_{t-1} @ weight_hh^T + bias_hh
        state_t, saved_t = forward(x_gates_t, h_gates_t, state_{t-1}, params)

    Both bodies are pointwise in the hidden index: they see tuples of tiles (float32, or
    float64 where the input is) whose elements belong to the same units, so a kernel may call
    them on any tile. They use only the names of `fusedrnn.cells.vocabulary`.

    forward(x_gates, h_gates, state, params) -> new_state, saved
    backward(d_state, saved, prev, new, params) -> dx_gates, dh_gates, d_prev, d_params

    `prev` and `new` are the states before and after the step. `d_prev[0]` holds only what
    reaches h_{t-1} by the pointwise path; the time loop adds `dh_gates @ weight_hh`.

    Attributes:
        name: key of the registry, also the public name of the functional.
        gates: names of the G gates, in the order in which the weights stack them.
        states: names of the S states; the first is `h`, which the next step multiplies by
            `weight_hh`, and which is the output.
        saved: names of the K values that `forward` keeps for `backward`, besides the states.
        params: names of per-unit parameter vectors (peephole weights); often none.
        additive: whether the body reads the gates only as the sums x_gates[k] + h_gates[k].
            Then dx_gates and dh_gates are equal, and are stored once.
        aten: the function of torch that computes this cell, or None.
        source: where the equations come from.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    saved: tuple[str, ...]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    additive: bool
    params: tuple[str, ...] = ()
    aten: str | None = None
    source: str = ""

    def __post_init__(self) -> None:
        for body in (self.forward, self.backward):
            check_body(body)
        if not self.states or self.states[0] != "h":
            raise ValueError(f"cell {self.name!r}: states must start with 'h', got {self.states}")


def check_body(body: Callable[..., Any]) -> None:
    """Raises NameError where a body uses a global name that is not in the vocabulary."""
    unknown = set(body.__code__.co_names) - vocabulary.NAMES
    if unknown:
        raise NameError(
            f"{body.__module__}.{body.__qualname__} uses {sorted(unknown)}; "
            f"the body of a cell may use only {sorted(vocabulary.NAMES)}"
        )


def register(cell: Cell) -> Cell:
    """Adds a cell to the registry. Raises ValueError where the name is taken."""
    if cell.name in REGISTRY:
        raise ValueError(f"cell {cell.name!r} is registered already")
    REGISTRY[cell.name] = cell
    return cell


def get(name: str) -> Cell:
    """The cell of that name. Raises ValueError, with the names there are."""
    try:
        return REGISTRY[name]
    except KeyError:
        raise ValueError(f"cell must be one of {sorted(REGISTRY)}, got {name!r}") from None
