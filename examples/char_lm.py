"""A character language model, trained twice in lockstep: with torch.nn and with fusedrnn.

    x_t -> embedding -> LSTM (or GRU, RNN) -> linear -> logits of x_{t+1}

Both models start from the same weights and see the same batches, so their losses must agree to
rounding; the program fails where they do not. The text is the source of Python's standard
library, which is on every machine, or any file: `python examples/char_lm.py --text FILE`.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import platform
import random
import statistics
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import fusedrnn

CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}
LEARNING_RATE = {"lstm": 8e-3, "gru": 8e-3, "rnn": 2e-3}
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data"}
LN2 = math.log(2.0)
WARM_UP = 5  # steps left out of the timing: they compile kernels and fill caches
# How far beyond the control run (see `control_distance`) two correct runs may drift. Distances
# of runs that differ by rounding alone spread over about one order of magnitude.
DRIFT_FACTOR = 10.0


# ---------------------------------------------------------------------------------------- text


def read_text(path: Path | None, limit: int) -> tuple[str, str]:
    """A name for the text, and its first `limit` characters."""
    if path is not None:
        return str(path), path.read_text(encoding="utf-8", errors="replace")[:limit]
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        Path(folder, name)
        for folder, subfolders, names in os.walk(root)
        if not (SKIPPED_FOLDERS & set(Path(folder).relative_to(root).parts))
        for name in names
        if name.endswith(".py")
    )
    # A fixed order that mixes the packages, so that the held-out tail resembles the rest.
    random.Random(0).shuffle(files)
    parts: list[str] = []
    size = 0
    for file in files:
        parts.append(file.read_text(encoding="utf-8", errors="replace"))
        size += len(parts[-1])
        if size >= limit:
            break
    name = f"the standard library of Python {platform.python_version()} ({len(parts)} files)"
    return name, "".join(parts)[:limit]


@dataclass
class Vocabulary:
    """The characters a text uses, commonest first; number 0 stands for all rare ones."""

    characters: str

    @classmethod
    def of(cls, text: str, size: int = 256, at_least: int = 10) -> Vocabulary:
        codes, counts = np.unique(code_points(text), return_counts=True)
        order = np.argsort(-counts, kind="stable")[: size - 1]
        return cls("\ufffd" + "".join(chr(codes[i]) for i in order if counts[i] >= at_least))

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> torch.Tensor:
        table = np.zeros(0x110000, dtype=np.int64)
        table[code_points(self.characters)] = np.arange(len(self))
        return torch.from_numpy(table[code_points(text)])

    def decode(self, numbers: list[int]) -> str:
        return "".join(self.characters[n] for n in numbers)


def code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="replace"), dtype=np.uint32)


def streams(numbers: torch.Tensor, batch: int) -> torch.Tensor:
    """[N] -> [N // batch, batch]: each column is one contiguous piece of the text."""
    length = len(numbers) // batch
    return numbers[: length * batch].view(batch, length).t().contiguous()


def baseline_bits(
    train: torch.Tensor, x: torch.Tensor, y: torch.Tensor, size: int
) -> tuple[float, float]:
    """Bits per character of y, given the character x before it, under two counting models.

    unigram  p(y)     = (count(y) + 1) / (N + V)                             add-one
    bigram   p(y | x) = (count(x, y) + V p(y)) / (count(x) + V)              prior: the unigram
    """
    unigram = (torch.bincount(train, minlength=size).double() + 1) / (len(train) + size)
    pairs = torch.bincount(train[:-1] * size + train[1:], minlength=size * size)
    pairs = pairs.view(size, size).double()
    bigram = (pairs + size * unigram) / (pairs.sum(1, keepdim=True) + size)
    return -unigram[y].log2().mean().item(), -bigram[x, y].log2().mean().item()


# --------------------------------------------------------------------------------------- model


class CharModel(nn.Module):
    """Embedding, a recurrent module that the caller brings, and a linear layer."""

    def __init__(self, vocabulary: int, embedding: int, rnn: nn.Module, hidden: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.rnn = rnn
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, numbers_tb: torch.Tensor, hx=None):
        output_tbh, hx = self.rnn(self.embedding(numbers_tb), hx)
        return self.head(output_tbh), hx


def detach(hx):
    return tuple(h.detach() for h in hx) if isinstance(hx, tuple) else hx.detach()


@dataclass
class Run:
    """One model in training: its optimizer, the state it carries, what it measured."""

    name: str
    model: CharModel
    rate: float
    steps: int
    losses: list[float] = field(default_factory=list)  # bits per character
    seconds: list[float] = field(default_factory=list)
    hx: object = None

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), self.rate, betas=(0.9, 0.99))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate_at)

    def rate_at(self, step: int) -> float:
        """Linear warm-up over a tenth of the steps, then half a cosine down to nothing."""
        warm = max(1, self.steps // 10)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        synchronize(x.device)
        start = time.perf_counter()
        logits, hx = self.model(x, self.hx)
        self.hx = detach(hx)  # truncated back-propagation: the state goes on, its graph does not
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item() / LN2)
        synchronize(x.device)
        self.seconds.append(time.perf_counter() - start)

    def rate_of(self, characters: int) -> float:
        """Characters per second: forward, backward and update, by the median step."""
        return characters / statistics.median(self.seconds[WARM_UP:] or self.seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def held_out_bits(model: CharModel, x: torch.Tensor, y: torch.Tensor, time_steps: int) -> float:
    """Bits per character over [N, B] streams, the state carried from chunk to chunk."""
    model.eval()
    total, hx = 0.0, None
    for xs, ys in zip(x.split(time_steps), y.split(time_steps), strict=True):
        logits, hx = model(xs, hx)
        total += F.cross_entropy(logits.flatten(0, 1), ys.flatten(), reduction="sum").item()
    model.train()
    return total / y.numel() / LN2


@torch.no_grad()
def sample(
    model: CharModel, vocabulary: Vocabulary, prompt: str, length: int, temperature: float, seed
) -> str:
    """Text that the model writes after `prompt`, one character at a time."""
    model.eval()
    device = model.head.weight.device
    generator = torch.Generator().manual_seed(seed)
    x, hx, written = vocabulary.encode(prompt).to(device).unsqueeze(1), None, []
    for _ in range(length):
        logits, hx = model(x, hx)
        odds = torch.softmax(logits[-1, 0].float().cpu() / temperature, dim=0)
        odds[0] = 0.0  # a rare character cannot be written
        written.append(int(torch.multinomial(odds, 1, generator=generator)))
        x = torch.tensor([[written[-1]]], device=device)
    model.train()
    return vocabulary.decode(written)


# ---------------------------------------------------------------------- do the two runs agree?


def rounding_unit(device: torch.device) -> float:
    """The relative spacing of the numbers that the recurrent products are computed in."""
    if device.type == "cuda" and torch.backends.cudnn.rnn.fp32_precision == "tf32":
        return 2.0**-10  # TF32, torch's default for cuDNN's recurrent layers
    return torch.finfo(torch.float32).eps


def control_distance(control: Run, losses: list[float], batch_at, unit: float) -> list[float]:
    """How far rounding alone drives a second torch.nn run from the first, up to each step.

    Training amplifies rounding errors, and no formula says by how much. So it is measured: the
    control is the torch.nn model again, from the same weights, on the same batches, with every
    parameter moved up or down by one rounding `unit` (relative) before each step.
    """
    generator = torch.Generator().manual_seed(0)
    distances: list[float] = []
    for step, loss in enumerate(losses):
        with torch.no_grad():
            for p in control.model.parameters():
                signs = torch.randint(0, 2, p.shape, generator=generator) * 2 - 1
                p.mul_(1 + unit * signs.to(p))
        control.step(*batch_at(step))
        distances.append(max(abs(control.losses[-1] - loss), *distances[-1:], 0.0))
    return distances


# -------------------------------------------------------------------------------------- output


def draw(path: Path, title: str, runs: list[Run], bits: dict[str, float], allowed) -> str:
    """Writes the loss curves as a picture. Returns a line that says where, or why not."""
    try:
        import matplotlib
    except ImportError:
        return "no picture: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    blue, orange, gray = "#9ecae1", "#d94801", "#636363"
    steps = range(1, len(runs[0].losses) + 1)
    figure, (top, low) = plt.subplots(
        2, 1, figsize=(9, 6.6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    figure.suptitle(title, fontsize=11)
    for run, color, width, marker in zip(runs, (blue, orange), (4, 0.9), ("o", "x"), strict=True):
        top.plot(steps, run.losses, color=color, lw=width, label=f"{run.name}, training batch")
        top.plot(
            steps[-1], bits[run.name], marker, color=color, ms=13 if marker == "o" else 7, mew=2,
            ls="", zorder=3, clip_on=False, label=f"{run.name}, held out: {bits[run.name]:.2f}",
        )  # fmt: skip
    for name in ("unigram", "bigram"):
        top.axhline(bits[name], color=gray, ls="--", lw=1)
        top.annotate(
            f"{name} model, held out: {bits[name]:.2f}", (1, bits[name]), (-4, 4), color=gray,
            xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", fontsize=9,
        )  # fmt: skip
    top.set_ylabel("bits per character")
    top.set_ylim(0, max(runs[0].losses) * 1.12)
    top.legend(frameon=False, fontsize=9, ncols=2, loc="upper right")

    difference = [abs(a - b) for a, b in zip(runs[0].losses, runs[1].losses, strict=True)]
    if any(difference):
        low.semilogy(steps, [d or math.nan for d in difference], ".", color=orange, ms=3)
        low.semilogy(steps, allowed, color=gray, lw=1, ls="--", label="allowed")
        low.legend(frameon=False, fontsize=9, loc="lower right")
    else:
        low.plot(steps, difference, color=orange, lw=1.2)
        low.set_ylim(-1, 1)
        low.set_yticks([0])
        low.text(0.5, 0.7, "equal at every step", ha="center", transform=low.transAxes)
    low.set_ylabel("difference")
    low.set_xlabel("step")
    for axes in (top, low):
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return f"picture: {path}"


def progress(total: int):
    """A progress bar on a terminal; None, and a line that says so, elsewhere."""
    if not sys.stderr.isatty():
        print("(no terminal: no progress bar, a row every few steps instead)")
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        print("(tqdm is not installed: no progress bar, a row every few steps instead)")
        return None
    return tqdm(total=total, unit="step", dynamic_ncols=True, leave=False)


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--text", type=Path, help="a text file; without it, Python's standard library")
    add("--limit", type=int, default=8_000_000, help="characters of the text to use at most")
    add("--cell", choices=CELLS, default="lstm")
    add("--hidden", type=int, default=256)
    add("--layers", type=int, default=1)
    add("--embedding", type=int, default=64)
    add("--batch", type=int, default=32)
    add("--time", type=int, default=64, help="characters per step and stream")
    add("--steps", type=int, default=600)
    add("--rate", type=float, help="peak learning rate; without it, one that suits the cell")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto is cuda where there is one, else cpu")
    add("--backend", help="force a backend of fusedrnn: triton, aten or reference")
    add("--held-out", type=int, default=131_072, help="characters to evaluate on")
    add("--prompt", help="what the sample starts from")
    add("--sample", type=int, default=400, help="characters to write at the end")
    add("--temperature", type=float, default=0.7)
    add("--out", type=Path, default=Path("out"), help="where the picture and the losses go")
    args = parser.parse_args(argv)
    for name in ("hidden", "layers", "embedding", "batch", "time", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.text is not None and not args.text.is_file():
        parser.error(f"--text must be a file, got {args.text}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = options(argv)
    began = time.perf_counter()
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if args.device == "auto" else args.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    where = gpu or f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, fusedrnn {fusedrnn.__version__}, {where}")

    # The text: a training part, and a tail that is held out.
    source, text = read_text(args.text, args.limit)
    held_size = min(args.held_out, len(text) // 10)
    train_text, held_text = text[: len(text) - held_size], text[len(text) - held_size :]
    vocabulary = Vocabulary.of(train_text)
    train, held = vocabulary.encode(train_text), vocabulary.encode(held_text)
    if len(train) // args.batch <= args.time or held_size // args.batch < 2:
        print(
            f"error: {source} has {len(text):,} characters, too few for --batch {args.batch} "
            f"--time {args.time}",
            file=sys.stderr,
        )
        return 2
    print(f"text: {source}: {len(train):,} characters to train on, {held_size:,} held out,")
    print(f"      {len(vocabulary)} different ones (rare ones count as one)")
    held_tb = streams(held, args.batch)
    bits = dict(
        zip(
            ("unigram", "bigram"),
            baseline_bits(train, held_tb[:-1].flatten(), held_tb[1:].flatten(), len(vocabulary)),
            strict=True,
        )
    )
    held_tb = held_tb.to(device)
    train_tb = streams(train, args.batch).to(device)

    def batch_at(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = step * args.time % (len(train_tb) - args.time)
        piece = train_tb[start : start + args.time + 1]
        return piece[:-1], piece[1:]

    # The models: the same but for the recurrent module; the same weights.
    rate = args.rate or LEARNING_RATE[args.cell]
    forced = {"backend": args.backend} if args.backend else {}
    sizes = (args.embedding, args.hidden, args.layers)

    def new_run(name: str, library, **keywords) -> Run:
        torch.manual_seed(args.seed)
        rnn = getattr(library, CELLS[args.cell])(*sizes, **keywords)
        model = CharModel(len(vocabulary), args.embedding, rnn, args.hidden).to(device)
        return Run(name, model, rate, args.steps)

    theirs = new_run(f"torch.nn.{CELLS[args.cell]}", nn)
    ours = new_run(f"fusedrnn.{CELLS[args.cell]}", fusedrnn, **forced)
    ours.model.load_state_dict(theirs.model.state_dict())
    parameters = sum(p.numel() for p in ours.model.parameters())
    print(f"model: embedding {args.embedding} -> {ours.model.rnn} -> {len(vocabulary)}")
    print(f"       {parameters:,} parameters, batch {args.batch}, {args.time} time steps")
    print("backend of fusedrnn:")
    example = ours.model.embedding(batch_at(0)[0])
    print("  " + str(fusedrnn.explain(ours.model.rnn, example)).replace("\n", "\n  "))

    # Training, in lockstep; who goes first alternates, so that neither finds warmer caches.
    print()
    every = max(1, args.steps // 20)
    bar = progress(args.steps)
    print(f"{'step':>6}  {theirs.name:>14}  {ours.name:>14}  {'difference':>10}   bits per char")
    for step in range(args.steps):
        x, y = batch_at(step)
        for run in (theirs, ours) if step % 2 == 0 else (ours, theirs):
            run.step(x, y)
        a, b = theirs.losses[-1], ours.losses[-1]
        if step == 0 or (step + 1) % every == 0 or step + 1 == args.steps:
            row = f"{step + 1:>6}  {a:>14.6f}  {b:>14.6f}  {b - a:>10.1e}"
            print(row) if bar is None else bar.write(row)
        if bar is not None:
            bar.set_postfix_str(f"torch.nn {a:.3f}  fusedrnn {b:.3f}", refresh=False)
            bar.update()
    if bar is not None:
        bar.close()

    # Speed.
    characters = args.batch * args.time
    speeds = [run.rate_of(characters) for run in (theirs, ours)]
    print("\ntokens (characters) per second: forward, backward and update, median step")
    for run, speed in zip((theirs, ours), speeds, strict=True):
        print(f"  {run.name:<14} {speed:>12,.0f}   first step {run.seconds[0]:.2f} s")
    print(f"  {'ratio':<14} {speeds[1] / speeds[0]:>11.2f}x")

    # Quality.
    for run in (theirs, ours):
        bits[run.name] = held_out_bits(run.model, held_tb[:-1], held_tb[1:], args.time)
    print(f"\nheld out, {held_tb[1:].numel():,} characters {'bits/char':>14} {'perplexity':>11}")
    for name, value in bits.items():
        print(f"  {name:<28} {value:>14.3f} {2**value:>11.2f}")
    gain = bits["bigram"] - bits[ours.name]
    verdict = f"{gain:.2f} bits better than" if gain > 0 else "NOT better (train longer) than"
    print(f"  {ours.name} is {verdict} the bigram model")

    # Agreement.
    difference = [abs(a - b) for a, b in zip(theirs.losses, ours.losses, strict=True)]
    difference = [math.inf if math.isnan(d) else d for d in difference]
    floor = 8 * torch.finfo(torch.float32).eps * max(theirs.losses[0], 1.0)
    allowed = [floor] * args.steps
    print()
    if not any(difference):
        print(f"agreement: the two losses are equal, bit for bit, at all {args.steps} steps")
    else:
        unit = rounding_unit(device)
        print(f"measuring what rounding alone does: {theirs.name} again, moved by {unit:.0e} ...")
        control = new_run("control", nn)  # the same seed, so the weights theirs started from
        distance = control_distance(control, theirs.losses, batch_at, unit)
        allowed = [DRIFT_FACTOR * d + floor for d in distance]
        worst = max(range(args.steps), key=difference.__getitem__)
        print(
            f"agreement: largest difference {difference[worst]:.1e} at step {worst + 1}; "
            f"rounding alone {distance[worst]:.1e}, allowed {allowed[worst]:.1e}"
        )
    apart = [i for i in range(args.steps) if difference[i] > allowed[i]]

    # What stays on disk.
    args.out.mkdir(parents=True, exist_ok=True)
    table = args.out / "char_lm.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "torch_nn_bits", "fusedrnn_bits", "allowed_difference"))
        writer.writerows(
            zip(range(1, args.steps + 1), theirs.losses, ours.losses, allowed, strict=True)
        )
    title = f"Character model on {source}\n{ours.model.rnn}, {where}"
    print(draw(args.out / "char_lm.png", title, [theirs, ours], bits, allowed))
    print(f"every step's loss: {table}")

    if apart:
        i = apart[0]
        print(
            f"error: the losses diverge: {len(apart)} steps, first step {i + 1}: torch.nn "
            f"{theirs.losses[i]!r}, fusedrnn {ours.losses[i]!r}, allowed {allowed[i]:.1e}",
            file=sys.stderr,
        )
        return 1

    prompt = args.prompt or ("def " if args.text is None else held_text[:40])
    written = sample(ours.model, vocabulary, prompt, args.sample, args.temperature, seed=args.seed)
    print(f"\nwritten by the fusedrnn model after {prompt!r}:\n")
    print("    " + (prompt + written).replace("\n", "\n    "))
    print(f"\n{time.perf_counter() - began:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
