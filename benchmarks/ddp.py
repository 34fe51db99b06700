"""How well a step spreads over processes: weak and strong scaling, and what reduction costs.

    python benchmarks/ddp.py [--processes 2] [--size small] [--rounds 7] [--json ddp.json]

Starts itself under torchrun: gloo on a CPU, where each process has --threads threads, NCCL on CUDA,
where each has a device. All cases take turns in the same processes, barrier to barrier, so that a
ratio is of neighbours in time: one process works while the others wait, or all do. A case is whole
optimiser steps (forward, backward, clipping, AdamW) on joint batches of speech, text and pairs.
    weak    a micro-batch a process: W processes do W times the work of one in, ideally, its time
    strong  the same step of W micro-batches: one process does them one after the other
Time in reduction is what a step takes beyond the same step without it (no_sync). That one process
is slower beside another one without any reduction is the machine's sharing of caches and memory.
Last, training.train itself runs alone and on all ranks, and its own log is compared.
Exit code 2 when there are too few devices.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import steps  # first: it finds the modules
import timing
import torch

import conformer
import data
import fast
import pretrain
import training

ALONE, ALONE_ALL, UNREDUCED = "alone", "alone, all micro-batches", "all, not reduced"
REDUCED = {"fp32": "all, fp32", "bf16": "all, bf16"}  # what gradients travel in

# ------------------------------------------------------------------------------------ the processes


def batches_of(args: argparse.Namespace, seeds: range) -> list[data.Batch]:
    """Micro-batches of one shape."""
    shape = (args.rows, conformer.SUBSAMPLING * args.frames, args.row_tokens)
    vocab_size = conformer.sized(args.size).vocab_size
    return [steps.joint_batch(*shape, vocab_size, args.padding, seed) for seed in seeds]


def cases_of(
    args: argparse.Namespace, ranks: training.Ranks, batches: list[data.Batch]
) -> dict[str, Callable[[], object]]:
    """Each case begins and ends at a barrier; where one process works the others are at the next.

    Every case has a model of its own: what was wrapped for ranks cannot be unwrapped.
    """
    config = conformer.sized(args.size, dropout=args.dropout)
    model = steps.build(config, pretrain.Objectives(), ranks.device)
    alone = training.Ranks(0, ranks.local_rank, 1, ranks.device)
    single = steps.Steps(copy.deepcopy(model), alone, dtype=args.dtype)
    spread = {
        kind: steps.Steps(copy.deepcopy(model), ranks, dtype=args.dtype, reduce_dtype=kind)
        for kind in REDUCED
    }
    own = [batches[ranks.rank]]
    own_scales, one = spread["fp32"].scales(own), single.scales(batches[:1])
    every = single.scales(batches)

    def met(work: Callable[[], object], only_first: bool = False) -> Callable[[], None]:
        def case() -> None:
            ranks.wait()
            if ranks.rank == 0 or not only_first:
                work()
                timing.synchronise()
            ranks.wait()

        return case

    cases = {
        ALONE: met(lambda: single.step(batches[:1], one), only_first=True),
        ALONE_ALL: met(lambda: single.step(batches, every), only_first=True),
        UNREDUCED: met(lambda: spread["fp32"].step(own, own_scales, reduce=False)),
    }
    for kind, name in REDUCED.items():
        stepper = spread[kind]
        cases[name] = met(lambda stepper=stepper: stepper.step(own, own_scales))
    return cases


def by_train(args: argparse.Namespace, ranks: training.Ranks, batch: data.Batch) -> float:
    """Milliseconds of a step in training.train's log, after as many to warm up."""
    flags = ["--size", args.size, "--dtype", args.dtype, "--micro-batches", str(ranks.world_size)]
    flags += ["--max-steps", str(2 * args.rounds), "--log-every", str(args.rounds)]
    return steps.train(flags, batch, ranks)["step_ms"]


def work_here(args: argparse.Namespace) -> None:
    """What each process does; the first writes what was found to --worker."""
    torch.set_num_threads(args.threads)
    ranks = training.setup_ranks()
    try:
        chosen = fast.choose_matmul("auto", ranks.device)[0] if ranks.rank == 0 else None
        torch.set_float32_matmul_precision(ranks.union({"it": chosen} if chosen else {})["it"])
        batches = batches_of(args, range(ranks.world_size))
        cases = cases_of(args, ranks, [batch.to(ranks.device) for batch in batches])
        figures = {"seconds": timing.taking_turns(cases, args.rounds, warm_up=2)}
        del cases
        ranks.wait()
        if ranks.rank == 0:
            alone = training.Ranks(0, ranks.local_rank, 1, ranks.device)
            figures["train_alone_ms"] = by_train(args, alone, batches[0])
        ranks.wait()
        figures["train_all_ms"] = by_train(args, ranks, batches[ranks.rank])
        if ranks.rank == 0:
            args.worker.write_text(json.dumps(figures))
    finally:
        training.leave_ranks(ranks)


def run_processes(args: argparse.Namespace, argv: list[str]) -> dict:
    """Start them, and return what the first has written."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(args.processes), __file__, *argv]
        subprocess.run([*command, "--worker", answer], check=True)
        return json.loads(answer.read_text())


# ------------------------------------------------------------------------------------------- tables


def scaling_rows(taken: timing.Times, work: list[dict[str, float]]) -> list[dict[str, object]]:
    """Weak and strong scaling, each beside one process that does its share or all of it.

    Args: work  of each micro-batch.
    """
    W, ms = len(work), {name: 1e3 * s for name, s in timing.medians(taken).items()}
    rows = []
    for kind, reference, ideal in (("weak", ALONE, 1.0), ("strong", ALONE_ALL, 1.0 / W)):
        relative = timing.ratios(taken, reference)
        for name in (reference, UNREDUCED, *REDUCED.values()):
            alone = name in (ALONE, ALONE_ALL)
            done = work[:1] if name == ALONE else work
            rate = {unit: sum(w[unit] for w in done) / ms[name] * 1e3 for unit in done[0]}
            rows.append({
                "scaling": kind, "processes": 1 if alone else W, "gradients": name,
                "ms": ms[name], "tokens/s": rate["tokens"], "audio s/s": rate["audio_s"],
                "efficiency": 1.0 if alone else ideal / relative[name],
            })  # fmt: skip
    return rows


def reduction_rows(taken: timing.Times) -> list[dict[str, object]]:
    """Share of a step that is spent in reducing gradients, by what they travel in."""
    rows = []
    for kind, name in REDUCED.items():
        share = 1 - timing.ratios(taken, name)[UNREDUCED]
        rows.append({"gradients travel in": kind, "share of the step": share})
    return rows


# --------------------------------------------------------------------------------------------- main


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="A training step over several processes.")
    add = parser.add_argument
    add("--processes", type=int, default=2, help="W, as many devices on CUDA (%(default)s)")
    add("--size", choices=conformer.SIZES, default="small", help="(default %(default)s)")
    add("--dropout", type=float, default=0.0, help="but in training.train (default %(default)s)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="(default %(default)s)")
    add("--rows", type=int, default=4, help="of speech and of text in a micro-batch (%(default)s)")
    add("--frames", type=int, default=125, help="encoder frames of a row, 40 ms (%(default)s)")
    add("--row-tokens", type=int, default=128, help="of a row of text (default %(default)s)")
    add("--padding", type=float, default=0.09, help="share of padding (default %(default)s)")
    add("--rounds", type=int, default=7, help="timed steps of each case (default %(default)s)")
    add("--threads", type=int, default=1, help="of each process (default %(default)s)")
    add("--json", type=Path, help="also write all figures here, as JSON")
    add("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Prints the figures. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.worker:
        work_here(args)
        return 0
    if torch.cuda.is_available() and torch.cuda.device_count() < args.processes:
        n = torch.cuda.device_count()
        print(f"error: --processes {args.processes}: there are {n} devices", file=sys.stderr)
        return 2
    figures = run_processes(args, argv)
    taken, seeds = figures["seconds"], range(args.processes)
    with torch.device("meta"):
        model = pretrain.SlamPretraining(conformer.sized(args.size), pretrain.Objectives())
    work = [model.work(batch) for batch in batches_of(args, seeds)]
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.size}, {n_parameters / 1e6:.1f} M parameters, {args.dtype}, a micro-batch of "
          f"{work[0]['audio_s']:.0f} s and {work[0]['tokens']:.0f} tokens, "
          f"{args.threads} thread(s) a process\n")  # fmt: skip
    rows, reduction = scaling_rows(taken, work), reduction_rows(taken)
    print(timing.table(rows) + "\n\n" + timing.table(reduction))
    alone, spread = figures["train_alone_ms"], figures["train_all_ms"]
    print(f"\ntraining.train's own log: {alone:.0f} ms alone, {spread:.0f} ms on {args.processes} "
          f"ranks with a micro-batch each: weak efficiency {alone / spread:.2f}")  # fmt: skip
    timing.write_json(args.json, figures | {"scaling": rows, "reduction": reduction})
    return 0


if __name__ == "__main__":
    sys.exit(main())
