"""What a second process is worth: DistributedDataParallel at one and two ranks.

    python benchmarks/ddp.py [--rounds 9] [--size small] [--json ddp.json]

On a CPU ranks talk over gloo and have a thread each; on CUDA over NCCL, a device each. Weak scaling
gives each rank as many rows as one had alone, strong scaling parts them: efficiency is what a rank
does of audio per second, relative to one alone. The share of reduction is what a step takes longer
than one whose gradients stay at home (no_sync), whose weights then drift apart. Cases of the same
number of ranks take turns in one launch; launches follow each other, so compare ratios between
launches only on a machine that has nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import steps  # first: it finds the modules
import timing
import torch

import conformer
import data
import pretrain
import training

FRAMES, VARIANTS = 800, {"fp32": True, "bf16": True, "no reduction": False}


def worker(args: argparse.Namespace) -> None:
    """Time the variants on this rank; rank 0 prints a JSON line."""
    torch.set_num_threads(args.threads)
    ranks = training.setup_ranks()
    config = conformer.sized(args.size, dropout=0.0)
    batch = data.Batch(speech=steps.speech_batch(args.rows, FRAMES, seed=ranks.rank))
    batches, cases = [batch.to(ranks.device)], {}
    for name, reduce in VARIANTS.items():
        if ranks.world_size == 1 and name != "fp32":
            continue
        model = steps.build(config, pretrain.Objectives(("speech",), ()), ranks.device)
        how = {"dtype": args.dtype, "reduce_dtype": name if name in ("fp32", "bf16") else "fp32"}
        stepper = steps.Steps(model, ranks, **how)
        scales = stepper.scales(batches)
        cases[name] = lambda s=stepper, scales=scales, reduce=reduce: s.step(
            batches, scales, reduce=reduce
        )
    taken = timing.taking_turns(cases, args.rounds)  # the same order on all ranks
    if ranks.rank == 0:
        print(json.dumps({"taken": taken, "audio_s": args.rows * FRAMES / conformer.FRAMES_PER_S}))
    training.leave_ranks(ranks)


def launch(n_ranks: int, rows: int, args: argparse.Namespace) -> dict[str, object]:
    """The figures of a launch of so many ranks with so many rows each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={n_ranks}", __file__, "--worker", "--rows", str(rows)]
    for name in ("rounds", "threads", "size", "dtype"):
        command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(next(x for x in done.stdout.splitlines() if x.startswith("{")))


def row(name: str, n_ranks: int, found: dict, alone: float) -> dict[str, object]:
    """A line of the table; `alone` is the audio per second of one rank."""
    medians = timing.medians(found["taken"])
    rate = found["audio_s"] * n_ranks / medians["fp32"]
    line = {"case": name, "ranks": n_ranks, "step ms": 1e3 * medians["fp32"], "audio s/s": rate}
    line["efficiency"] = rate / n_ranks / (alone or rate)
    against = timing.ratios(found["taken"], "fp32")
    line["reduction's share"] = 1 - against["no reduction"] if n_ranks > 1 else "-"
    line["bf16 reduction, step"] = against["bf16"] if n_ranks > 1 else "-"
    return line


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="DistributedDataParallel at one and two ranks.")
    add = parser.add_argument
    add("--rounds", type=int, default=9, help="timed steps of each case (default %(default)s)")
    add("--threads", type=int, default=1, help="of torch, a rank (default %(default)s)")
    add("--rows", type=int, default=8, help="of 8 s, for one rank (default %(default)s)")
    add("--size", choices=conformer.SIZES, default="small", help="(default %(default)s)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="(default %(default)s)")
    add("--json", type=Path, help="also write all figures here, as JSON")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Prints the figures."""
    args = parse(argv)
    if args.worker:
        worker(args)
        return 0
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        print("error: one CUDA device: two ranks need a device each", file=sys.stderr)
        return 2
    found = {
        "alone": (1, launch(1, args.rows, args)),
        "weak, as many rows each": (2, launch(2, args.rows, args)),
        "strong, half the rows each": (2, launch(2, args.rows // 2, args)),
    }
    alone = found["alone"][1]
    rate = alone["audio_s"] / timing.medians(alone["taken"])["fp32"]
    rows = [row(name, n, its, rate) for name, (n, its) in found.items()]
    print(f"{args.size}, {args.dtype}, {args.rows} rows of 8 s, {args.threads} thread(s) a rank\n")
    print(timing.table(rows))
    timing.write_json(args.json, {"rows": rows, "launches": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
