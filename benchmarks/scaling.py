"""How time and memory of a whole pre-training step grow with batch, length and depth.

    python benchmarks/scaling.py [--rounds 5] [--threads 2] [--plot scaling.png] [--json FILE]

One stream at a time: speech (contrastive, diversity, masked codes) and text (span-masked LM), with
AdamW, at the width of `small`. Batch, length and depth are doubled while the other two stay. Times:
all cases in one process, taking turns, medians. Memory: each case in a process of its own, its peak
beyond that of a step with one row of 8 positions, which holds weights, gradients and moments; so it
is activations. On a CUDA device it is the allocator's.
Exponents are slopes in log-log: 1 is linear. A time is compared with the model's own FLOP count,
which for the length holds a linear part and attention's square.
Letters: B rows, T encoder frames (40 ms), U text tokens, D model width.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import steps  # first: it finds the modules
import timing
import torch

import conformer
import data
import fast
import pretrain

STREAMS, AXES = ("speech", "text"), ("batch", "length", "depth")
OBJECTIVES = {name: pretrain.Objectives((name,), align=()) for name in STREAMS}


@dataclass(frozen=True)
class Case:
    """One model and one batch."""

    stream: str = "speech"
    batch: int = 4  # B
    length: int = 128  # T or U
    depth: int = 4  # blocks that a position goes through
    checkpointing: bool = False

    @property
    def name(self) -> str:
        return ",".join(str(value) for value in asdict(self).values())

    @classmethod
    def named(cls, name: str) -> Case:
        """The case of a name."""
        stream, batch, length, depth, checkpointing = name.split(",")
        return cls(stream, int(batch), int(length), int(depth), checkpointing == "True")


def sweeps(doublings: int) -> dict[tuple[str, str, bool], list[Case]]:
    """{(stream, axis, checkpointing): cases in which only the axis doubles, from 1/4 of Case's}."""
    made = {}
    for stream in STREAMS:
        for axis in AXES:
            for checkpointing in (False, True) if axis == "depth" else (False,):
                plain = Case(stream, checkpointing=checkpointing)
                start = max(2 if axis == "depth" else 1, getattr(plain, axis) // 4)
                n_doublings = min(doublings, 3) if axis == "depth" else doublings
                sizes = [start * 2**i for i in range(n_doublings + 1)]
                made[stream, axis, checkpointing] = [replace(plain, **{axis: n}) for n in sizes]
    return made


def stepper_of(case: Case) -> steps.Steps:
    """The optimiser steps of a new model."""
    speech_layers = case.depth // 2 if case.stream == "speech" else 0
    layers = {"speech_layers": speech_layers, "mm_layers": case.depth - speech_layers}
    config, ranks = conformer.sized("small", dropout=0.0, **layers), steps.alone()
    model = steps.build(config, OBJECTIVES[case.stream], ranks.device)
    return steps.Steps(model, ranks)


def batch_of(case: Case) -> data.Batch:
    """The case's batch, on the device."""
    if case.stream == "speech":
        frames = conformer.SUBSAMPLING * case.length
        batch = data.Batch(speech=steps.speech_batch(case.batch, frames))
    else:
        vocab_size = conformer.sized("small").vocab_size
        batch = data.Batch(text=steps.text_batch(case.batch, case.length, vocab_size))
    return batch.to(steps.alone().device)


def runner(case: Case, stepper: steps.Steps) -> tuple[Callable[[], object], float]:
    """A whole step to call, and its model FLOPs; the model may be shared with other cases."""
    batch = batch_of(case)
    scales, flops = stepper.scales([batch]), stepper.model.work(batch)["flops"]
    stacks = [m for m in stepper.model.modules() if isinstance(m, conformer.ConformerStack)]

    def step() -> None:
        for stack in stacks:
            stack.checkpointing = case.checkpointing
        stepper.step([batch], scales)

    return step, flops


# ------------------------------------------------------------------------------------------- memory


def memory_of(case: Case) -> dict[str, float]:
    """MiB by which a step of the case passes the peak of a step of the smallest batch, and that.

    This process must do nothing else. The smallest step has held weights, gradients and moments,
    and whatever libraries take once.
    """
    stepper = stepper_of(case)
    small, _ = runner(replace(case, batch=1, length=8), stepper)
    step, _ = runner(case, stepper)
    small()
    before = fast.peak_memory_mib(stepper.ranks.device)
    step()
    after = fast.peak_memory_mib(stepper.ranks.device)
    return {"before": before, "added": after - before}


# ------------------------------------------------------------------------------------------- tables


def of_cases(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds, FLOPs and MiB of each case by its name."""
    cases = {case.name: case for its in sweeps(args.doublings).values() for case in its}
    memory = {}
    for name in cases:  # before this process grows: a child's peak begins at what its parent holds
        more = ["--memory-of", name, "--threads", args.threads]
        memory[name] = timing.in_a_process(__file__, *more)
    figures, calls, models = {}, {}, {}  # one model a stream and depth
    for name, case in cases.items():
        model = (case.stream, case.depth)
        models[model] = models.get(model) or stepper_of(case)
        calls[name], flops = runner(case, models[model])
        figures[name] = {"flops": flops, "memory_mib": memory[name]["added"]}
        figures[name]["model_mib"] = memory[name]["before"]
    for name, taken in timing.taking_turns(calls, args.rounds).items():
        figures[name] |= {"s": statistics.median(taken), "rounds_s": taken}
    return figures


def sweep_table(cases: list[Case], axis: str, figures: dict[str, dict]) -> list[dict[str, object]]:
    """A row a size: time, time by FLOPs, memory."""
    rows = []
    for case in cases:
        its = figures[case.name]
        rows.append({
            axis: getattr(case, axis), "ms": 1e3 * its["s"], "GFLOP": its["flops"] / 1e9,
            "GFLOP/s": its["flops"] / its["s"] / 1e9, "MiB": its["memory_mib"],
        })  # fmt: skip
    return rows


def exponents(cases: list[Case], axis: str, figures: dict[str, dict]) -> dict[str, float]:
    """How time, FLOPs and memory grow: over all sizes, and over the last doubling."""
    sizes, found = [float(getattr(case, axis)) for case in cases], {}
    for key, label in (("s", "time"), ("flops", "FLOPs"), ("memory_mib", "memory")):
        values = [max(figures[case.name][key], 1e-9) for case in cases]
        found[label] = steps.exponent(sizes, values)
        found[f"{label}, last doubling"] = steps.exponent(sizes[-2:], values[-2:])
    return found


def draw(path: Path, figures: dict[str, dict], doublings: int) -> None:
    """Time and memory against each axis, log-log, with the line of equal growth dotted."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(AXES), figsize=(11, 6.5))
    for (stream, axis, checkpointing), cases in sweeps(doublings).items():
        sizes, column = [getattr(case, axis) for case in cases], AXES.index(axis)
        colour, label = f"C{STREAMS.index(stream)}", stream + ", checkpointing" * checkpointing
        for row, (key, unit) in enumerate((("s", "s"), ("memory_mib", "MiB"))):
            panel, values = axes[row, column], [figures[case.name][key] for case in cases]
            panel.loglog(sizes, values, colour + ("s--" if checkpointing else "o-"), label=label)
            if stream == "speech" and not checkpointing:
                line = [values[-1] * n / sizes[-1] for n in sizes]
                panel.loglog(sizes, line, "k:", linewidth=0.8, label="linear")
                flops = [figures[case.name]["flops"] for case in cases]
                if axis == "length" and key == "s":
                    line = [values[-1] * n / flops[-1] for n in flops]
                    panel.loglog(sizes, line, "k-.", linewidth=0.8, label="by FLOPs")
            panel.set(xlabel=axis, ylabel=unit)
            panel.set_xticks(sizes, [str(n) for n in sizes])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


# --------------------------------------------------------------------------------------------- main


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Growth of a step with batch, length and depth.")
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="timed steps of each case (default %(default)s)")
    add("--threads", type=int, default=2, help="of torch (default %(default)s)")
    add("--doublings", type=int, default=4, help="sizes of an axis, less one (default %(default)s)")
    add("--json", type=Path, help="also write all figures here, as JSON")
    add("--plot", type=Path, help="also draw them here, as PNG")
    add("--memory-of", type=Case.named, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Prints the figures."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    fast.choose_matmul("auto", steps.alone().device)
    if args.memory_of:
        print(json.dumps(memory_of(args.memory_of)))
        return 0
    figures, rows = of_cases(args), []
    for (stream, axis, checkpointing), cases in sweeps(args.doublings).items():
        plain = Case(stream)
        fixed = ", ".join(f"{name} {getattr(plain, name)}" for name in AXES if name != axis)
        more = ", checkpointing" * checkpointing
        print(f"\n{stream}{more}: {axis} doubles; {fixed}\n")
        print(timing.table(sweep_table(cases, axis, figures)))
        found = exponents(cases, axis, figures)
        about = {"stream": stream, "axis": axis, "checkpointing": "yes" if checkpointing else "no"}
        rows.append(about | found)
    print("\nexponents (1 is linear)\n")
    print(timing.table(rows))
    timing.write_json(args.json, {"cases": figures, "exponents": rows})
    if args.plot:
        draw(args.plot, figures, args.doublings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
