"""What a recurrent cell is, and the registry of all that exist."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fusedrnn.cells import vocabulary
from fusedrnn.cells.vocabulary import zeros_like

REGISTRY: dict[str, "Cell"] = {}


@dataclass(frozen=True)
class Linear:
    """The product of values[0] with the rows of weight_hh that belong to `gates`, plus their part
    of bias_hh."""

    gates: tuple[str, ...]


@dataclass(frozen=True)
class Projection:
    """The product of values[0] with weight_hr, [P, H]: one sum, of P units."""


@dataclass(frozen=True, eq=False)
class Stage:
    """What the units of a row compute between two products, each for itself.

        received = values[0] @ W^T + b                    W and b as `receives` says
        values, saved_s = forward(x_gates, received, values, params)

    `values` are the states before the step where the first stage begins, and where the last one
    ends those after it; in between they are whatever the next stage is to read, values[0] being
    what it multiplies.

    Both bodies are pointwise in the hidden index: they see tuples of tiles (float32, or
    float64 where the input is) whose elements belong to the same units, so a kernel may call
    them on any tile. They use only the names of `fusedrnn.cells.vocabulary`.

    forward(x_gates, received, values, params) -> new_values, saved_s
    backward(d_new_values, saved, prev, new, params) -> dx_gates, d_received, d_values, d_params

    In `backward`, `saved` are the saved values of all stages, `prev` and `new` the states before
    and after the whole step. `d_values[0]` holds only what reaches values[0] by the pointwise
    path; the time loop adds `d_received @ W`.

    Attributes:
        receives: a Linear, or a Projection, which has no gates of the input.
        saved: names of the values that `forward` keeps for the backward bodies.
        params: names of the vectors, one value a unit, that the bodies read (peephole weights).
        additive: whether the body reads the gates only as the sums x_gates[k] + received[k].
            Then dx_gates and d_received are equal, and are stored once.
    """

    receives: Linear | Projection
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    additive: bool
    saved: tuple[str, ...] = ()
    params: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for body in (self.forward, self.backward):
            check_body(body)

    @property
    def gates(self) -> tuple[str, ...]:
        """Names of the gates that the input has a part in."""
        return self.receives.gates if isinstance(self.receives, Linear) else ()

    @property
    def products(self) -> int:
        """How many sums a unit receives."""
        return len(self.gates) or 1


class Onnx(NamedTuple):
    """The operator of ONNX that computes a cell.

    Attributes:
        operator: its name. gates: the cell's, in the operator's order.
        activations: of one direction, where they are not the operator's own.
        linear_before_reset: the attribute of ONNX's GRU.
    """

    operator: str
    gates: tuple[str, ...]
    activations: tuple[str, ...] = ()
    linear_before_reset: bool = False


@dataclass(frozen=True, eq=False)
class Cell:
    """A recurrence, described once, for every backend: its stages, one after the other.

    Attributes:
        name: key of the registry, also the public name of the functional.
        states: names of the S states; the first is `h`, which the next step's first stage
            multiplies, and which is the output.
        stages: mostly one. Between two, all units of a row exchange values[0].
        projects: whether the bodies leave h_{t-1} to the products, so that h may be projected.
        aten: the function of torch that computes this cell, or None. onnx: ONNX's operator for it.
        source: where the equations come from.
    """

    name: str
    states: tuple[str, ...]
    stages: tuple[Stage, ...]
    projects: bool = False
    aten: str | None = None
    onnx: Onnx | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if not self.states or self.states[0] != "h":
            raise ValueError(f"cell {self.name!r}: states must start with 'h', got {self.states}")
        if len(self.stages) not in (1, 2, 4):  # the ring of a launch deals its slots out to them
            raise ValueError(f"cell {self.name!r}: expected 1, 2 or 4 stages, got {self.stages}")

    @functools.cached_property
    def gates(self) -> tuple[str, ...]:
        """Names of the G gates of all stages, in the order in which the weights stack them."""
        return tuple(gate for stage in self.stages for gate in stage.gates)

    @functools.cached_property
    def saved(self) -> tuple[str, ...]:
        """Names of the K values that all stages keep for backward, besides the states."""
        return tuple(name for stage in self.stages for name in stage.saved)

    @functools.cached_property
    def params(self) -> tuple[str, ...]:
        """Names of the cell's own parameters, one value a unit each."""
        return tuple(name for stage in self.stages for name in stage.params)

    @functools.cached_property
    def additive(self) -> bool:
        """Whether dx_gates and dh_gates are equal in every stage."""
        return all(stage.additive for stage in self.stages)


def check_body(body: Callable[..., Any]) -> None:
    """Raises NameError where a body uses a global name that is not in the vocabulary."""
    unknown = set(body.__code__.co_names) - vocabulary.NAMES
    if unknown:
        raise NameError(
            f"{body.__module__}.{body.__qualname__} uses {sorted(unknown)}; "
            f"the body of a cell may use only {sorted(vocabulary.NAMES)}"
        )


def register(cell: Cell) -> Cell:
    """Adds a cell to the registry. Raises ValueError where the name is taken, or is not a
    lower-case identifier: `fusedrnn.Recurrent` keeps it in upper case, as torch.nn does."""
    if not cell.name.isidentifier() or cell.name != cell.name.lower():
        raise ValueError(f"cell: expected a lower-case identifier as its name, got {cell.name!r}")
    if cell.name in REGISTRY:
        raise ValueError(f"cell {cell.name!r} is registered already")
    REGISTRY[cell.name] = cell
    return cell


def get(name: str, *, projected: bool = False) -> Cell:
    """The cell of that name, if wanted with its h projected. Raises ValueError, with the names
    there are."""
    try:
        cell = REGISTRY[name]
    except KeyError:
        raise ValueError(f"cell must be one of {sorted(REGISTRY)}, got {name!r}") from None
    return _projected(cell) if projected else cell


def _project(x_gates, received, values, params):
    return (received[0],) + values[1:], ()


def _project_backward(d_values, saved, prev, new, params):
    d_h = d_values[0]
    return (), (d_h,), (zeros_like(d_h),) + d_values[1:], ()


PROJECTION = Stage(Projection(), _project, _project_backward, additive=True)


@functools.cache
def _projected(cell: Cell) -> Cell:
    """The cell with one stage more, which projects what was h. Source: Sak, Senior & Beaufays
    2014, arXiv:1402.1128."""
    return replace(cell, stages=(*cell.stages, PROJECTION))
