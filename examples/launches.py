"""Draws README's picture: a time loop as many launches, and as one.

    python examples/launches.py [--out examples/launches.svg]

It is a schematic. Its lengths are not measurements.
"""

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"launch": "#8d99ae", "W_hh": "#e07a5f", "product": "#3d6fb6", "exchange": "#f2cc8f"}
LAUNCH, WEIGHTS, PRODUCT, EXCHANGE = 2.2, 1.1, 0.8, 0.25


def box(axes, row: float, start: float, width: float, color: str, text: str = "") -> float:
    """A box in a row; returns where it ends."""
    axes.barh(row, width, 0.8, start, color=COLORS[color], edgecolor="white", linewidth=0.8)
    shade = "black" if color == "exchange" else "white"
    axes.text(start + width / 2, row, text, ha="center", va="center", color=shade, fontsize=8)
    return start + width


def many_launches(axes, steps: int) -> None:
    """Each step is launched, waits for its launch, and reads the weights again."""
    for t in range(steps):
        launched = box(axes, 4, t * LAUNCH, LAUNCH, "launch", "launch")
        end = box(axes, 3, launched, WEIGHTS, "W_hh", "read W_hh")
        box(axes, 3, end, PRODUCT, "product", f"step {t + 1}")


def one_launch(axes, steps: int) -> float:
    """The programs of one launch keep their weights, and exchange h after every step."""
    launched = box(axes, 1, 0, LAUNCH, "launch", "launch")
    end = box(axes, 0, launched, WEIGHTS, "W_hh", "read W_hh")
    for t in range(steps):
        end = box(axes, 0, end, PRODUCT, "product", f"step {t + 1}")
        end = box(axes, 0, end, EXCHANGE, "exchange", "h")
    return end


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="examples/launches.svg")
    args = parser.parse_args(arguments)
    matplotlib.rcParams["svg.hashsalt"] = "launches"  # the same bytes every time
    steps = 5
    figure, axes = plt.subplots(figsize=(9.5, 3.3), layout="constrained")
    many_launches(axes, steps)
    end = one_launch(axes, steps)
    for row, text in (
        (4.75, "One launch per time step"),
        (1.75, "fusedrnn: one launch for all time steps"),
    ):
        axes.text(0, row, text, fontsize=11, fontweight="bold")
    axes.text(end + 0.2, 0, "h: the programs exchange\ntheir new states", va="center", fontsize=9)
    note = (
        "Schematic of one layer's time loop, where W_hh fits on the chip; lengths are not measured."
    )
    axes.text(0, -1.1, note, fontsize=8)
    axes.set_yticks([4, 3, 1, 0], ["CPU", "GPU", "CPU", "GPU"])
    axes.set(xlim=(-0.1, (steps + 1) * LAUNCH), ylim=(-1.5, 5.4), xticks=[])
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)
    figure.savefig(args.out, metadata={"Date": None} if args.out.endswith(".svg") else None)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
