"""What a recurrent cell is, and the registry of all that exist."""

import dis
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from fusedrnn.cells import vocabulary
from fusedrnn.cells.vocabulary import zeros_like

REGISTRY: dict[str, "Cell"] = {}
_PROJECTED: dict[str, "Cell"] = {}  # those that can be, with their h projected


@dataclass(frozen=True)
class Linear:
    """The product of values[0] with the rows of weight_hh that belong to `gates`, plus their part
    of bias_hh."""

    gates: tuple[str, ...]


@dataclass(frozen=True)
class Projection:
    """The product of values[0] with weight_hr, [P, H]: one sum, of P units."""


@dataclass(frozen=True)
class Mean:
    """The means of values[0], ..., values[count - 1] over all units of a head."""

    count: int = 1


@dataclass(frozen=True, eq=False)
class Stage:
    """What the units of a row compute between two exchanges, each for itself.

        received = values[0] @ W^T + b                    W and b as `receives` says, or a mean
        values, saved_s = forward(x_gates, received, values, params)

    `values` are the states before the step where the first stage begins, and where the last one
    ends those after it; in between they are whatever the next stage is to read, values[0] being
    what it multiplies, or the first of them what it takes the means of.

    Both bodies are pointwise in the hidden index: they see tuples of tiles (float32, or
    float64 where the input is) whose elements belong to the same units, so a kernel may call
    them on any tile. They use only the names of `fusedrnn.cells.vocabulary`.

    forward(x_gates, received, values, params) -> new_values, saved_s
    backward(d_new_values, saved, prev, new, params) -> dx_gates, d_received, d_values, d_params

    In `backward`, `saved` are the saved values of all stages, `prev` and `new` the states before
    and after the whole step. `d_values[0]` holds only what reaches values[0] by the pointwise
    path; the time loop adds `d_received @ W`. Of a mean, d_received is the unit's own part, and the
    loop adds the mean of all units' to each.

    Attributes:
        receives: a Linear, or a Projection or a Mean, which have no gates of the input.
        saved: names of the values that `forward` keeps for the backward bodies.
        params: names of the vectors, one value a unit, that the bodies read (peephole weights).
        additive: whether the body reads the gates only as the sums x_gates[k] + received[k].
            Then dx_gates and d_received are equal, and are stored once.
    """

    receives: Linear | Projection | Mean
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
        """How many sums or means a unit receives."""
        return self.receives.count if isinstance(self.receives, Mean) else len(self.gates) or 1

    @property
    def exchanged(self) -> int:
        """How many of the values before it go round, from values[0] on."""
        return self.products if isinstance(self.receives, Mean) else 1


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
        stages: mostly one, the first a Linear. Between two, all units of a row exchange values[0].
        projects: whether the bodies leave h_{t-1} to the products, so that h may be projected.
        aten: the function of torch that computes this cell, or None. onnx: ONNX's operator for it.
        source: where the equations come from.
        gates: names of the G gates of all stages, in the order in which the weights stack them.
        saved: names of the K values that all stages keep for backward, besides the states.
        params: names of the cell's own parameters, one value a unit each.
        weighted: the stages that multiply values[0] with weights.
        additive: whether dx_gates and dh_gates are equal in every stage.
    """

    name: str
    states: tuple[str, ...]
    stages: tuple[Stage, ...]
    projects: bool = False
    aten: str | None = None
    onnx: Onnx | None = None
    source: str = ""
    # Worked out at once: torch.compile cannot look into a functools.cached_property.
    gates: tuple[str, ...] = field(init=False)
    saved: tuple[str, ...] = field(init=False)
    params: tuple[str, ...] = field(init=False)
    weighted: tuple[Stage, ...] = field(init=False)
    additive: bool = field(init=False)

    def __post_init__(self) -> None:
        if not self.states or self.states[0] != "h":
            raise ValueError(f"cell {self.name!r}: states must start with 'h', got {self.states}")
        if len(set(self.states)) < len(self.states):
            raise ValueError(f"cell {self.name!r}: states must differ, got {self.states}")
        if len(self.stages) not in (1, 2, 4):  # the ring of a launch deals its slots out to them
            raise ValueError(f"cell {self.name!r}: expected 1, 2 or 4 stages, got {self.stages}")
        if not self.stages[0].gates:
            raise ValueError(f"cell {self.name!r}: expected a first stage of Linear gates")

        def over(attribute: str) -> tuple[str, ...]:
            return tuple(name for stage in self.stages for name in getattr(stage, attribute))

        weighted = tuple(s for s in self.stages if not isinstance(s.receives, Mean))
        for name in ("gates", "saved", "params"):
            object.__setattr__(self, name, over(name))
        object.__setattr__(self, "weighted", weighted)
        object.__setattr__(self, "additive", all(stage.additive for stage in self.stages))


def check_body(body: Callable[..., Any]) -> None:
    """Raises NameError where a body uses a global name that is not in the vocabulary, or any
    attribute, such as a tensor's method."""
    read = [(i.opname, i.argval) for i in dis.get_instructions(body)]
    names = {n for operation, n in read if operation in ("LOAD_GLOBAL", "IMPORT_NAME")}
    attributes = {f".{n}" for operation, n in read if operation in ("LOAD_ATTR", "LOAD_METHOD")}
    unknown = [*sorted(names - vocabulary.NAMES), *sorted(attributes)]
    if unknown:
        raise NameError(
            f"{body.__module__}.{body.__qualname__} uses {unknown}; "
            f"the body of a cell may use only {sorted(vocabulary.NAMES)}"
        )


def _project(x_gates, received, values, params):
    return (received[0],) + values[1:], ()


def _project_backward(d_values, saved, prev, new, params):
    d_h = d_values[0]
    return (), (d_h,), (zeros_like(d_h),) + d_values[1:], ()


PROJECTION = Stage(Projection(), _project, _project_backward, additive=True)


def register(cell: Cell) -> Cell:
    """Adds a cell to the registry. Raises ValueError where the name is taken, or is not a
    lower-case identifier: `fusedrnn.Recurrent` keeps it in upper case, as torch.nn does."""
    if not cell.name.isidentifier() or cell.name != cell.name.lower():
        raise ValueError(f"cell: expected a lower-case identifier as its name, got {cell.name!r}")
    if cell.name in REGISTRY:
        raise ValueError(f"cell {cell.name!r} is registered already")
    REGISTRY[cell.name] = cell
    if cell.projects:
        _PROJECTED[cell.name] = replace(cell, stages=(*cell.stages, PROJECTION))
    return cell


def get(name: str, *, projected: bool = False) -> Cell:
    """The cell of that name; `projected`, with one stage more, which projects what was h (Sak,
    Senior & Beaufays 2014, arXiv:1402.1128). Raises ValueError, with the names there are."""
    table = _PROJECTED if projected else REGISTRY
    cell = table.get(name) if isinstance(name, str) else None
    if cell is None:
        raise ValueError(f"cell must be one of {sorted(table)}, got {name!r}")
    return cell
