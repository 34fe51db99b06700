"""losses.rnnt beside warprnnt-numba: the same loss and gradient, and what each costs on a CPU.

    python benchmarks/rnnt.py [--shape 8,200,50,1024] [--rounds 7] [--threads 1] [--json rnnt.json]

Agreement is on small random batches with padding, the blank first or last: both in float64, then
each in fp32 against theirs in float64. Cost is that of loss and gradient at --shape without
padding: time in one process, taking turns; memory in a process each. On a CPU theirs is interpreted
Python, cell by cell (its compiled code is for CUDA), so being faster than it means little. The
third column is the yardstick: torch's log-softmax of the same logits and its gradient alone.
Exit code 1 when they disagree, 2 when the package is missing.
Letters: B rows, T frames, U tokens, V vocabulary with the blank.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules

import losses  # noqa: E402

# What differences may be, relative to the loss, or to the RMS of the gradient where it is not 0:
ALLOWED_FP64, ALLOWED_FP32 = 1e-9, 1e-4
SIZES = [(4, 12, 6, 9), (3, 5, 11, 30), (2, 60, 25, 300), (5, 7, 1, 4), (1, 1, 3, 5)]  # B, T, U, V

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # logits, lens, targets, target_lens


def ours(batch: Batch, blank: int) -> tuple[float, Tensor]:
    """Loss summed over rows, and its gradient by the logits."""
    logits = batch[0].detach().requires_grad_()
    loss = losses.rnnt(logits, *batch[1:], blank).sum
    loss.backward()
    return float(loss.detach()), logits.grad


def theirs(batch: Batch, blank: int) -> tuple[float, Tensor]:
    """The same by warprnnt-numba, whose ids and lengths are int32."""
    from warprnnt_numba import RNNTLossNumba

    logits = batch[0].detach().requires_grad_()
    lens, targets, target_lens = (x.int() for x in batch[1:])
    loss = RNNTLossNumba(blank=blank, reduction="none")(logits, targets, lens, target_lens).sum()
    loss.backward()
    return float(loss.detach()), logits.grad


def log_softmax(batch: Batch, blank: int) -> tuple[float, Tensor]:
    """No loss at all: log-probabilities of all cells, and a gradient through them."""
    logits = batch[0].detach().requires_grad_()
    log_probs = logits.log_softmax(-1)
    log_probs.backward(log_probs.detach())
    return 0.0, logits.grad


FUNCTIONS: dict[str, Callable[[Batch, int], tuple[float, Tensor]]] = {
    "ours": ours, "theirs": theirs, "log-softmax alone": log_softmax,
}  # fmt: skip


def random_batch(
    B: int, T: int, U: int, V: int, blank: int, padded: bool, scale: float = 1.0
) -> Batch:
    """logits, lens, targets, target_lens. The first row is of full length, as theirs demands."""
    logits = torch.randn(B, T, U + 1, V).mul_(scale)  # in place: memory_growth begins at the peak
    lens, target_lens = torch.full((B,), T), torch.full((B,), U)
    if padded:
        lens[1:] = torch.randint(1, T + 1, (B - 1,))
        target_lens[1:] = torch.randint(0, U + 1, (B - 1,))
    targets = torch.randint(0, V - 1, (B, U))
    return logits, lens, targets + (targets >= blank), target_lens


# ---------------------------------------------------------------------------------------- agreement


def apart(found: tuple[float, Tensor], expected: tuple[float, Tensor]) -> float:
    """The larger of two differences: of the losses, and of the gradients relative to their RMS."""
    (loss, gradient), (other, reference) = found, expected
    rms = reference[reference != 0].square().mean().sqrt()
    of_gradient = float((gradient.double() - reference).abs().max() / rms)
    return max(abs(loss - other) / other, of_gradient)


def agreement() -> list[dict[str, object]]:
    """One row a size, a blank and a scale of the logits: how far the two are apart."""
    torch.manual_seed(0)
    rows = []
    for size, scale in itertools.product(SIZES, (1.0, 5.0)):
        for blank in (0, size[3] - 1):
            batch = random_batch(*size, blank, padded=True, scale=scale)
            wide = (batch[0].double(), *batch[1:])
            reference = theirs(wide, blank)
            rows.append({
                "size": size, "blank": blank, "scale": scale, "loss": reference[0],
                "both in fp64": apart(ours(wide, blank), reference),
                "ours in fp32": apart(ours(batch, blank), reference),
                "theirs in fp32": apart(theirs(batch, blank), reference),
            })  # fmt: skip
    return rows


# --------------------------------------------------------------------------------------------- cost


def seconds(shape: list[int], rounds: int, threads: int) -> dict[str, list[float]]:
    """Wall time of loss and gradient; the first call of each, which may compile, is left out.

    Threads are set before each call: the first call of theirs, in a process, sets torch's to all
    cores. Theirs then is as it is; ours and the yardstick keep to what was asked for.
    """
    torch.manual_seed(0)
    batch, taken = random_batch(*shape, blank=0, padded=False), {name: [] for name in FUNCTIONS}
    for turn in range(rounds + 1):
        for name, function in FUNCTIONS.items():
            torch.set_num_threads(threads)
            start = time.perf_counter()
            function(batch, 0)
            if turn:
                assert torch.get_num_threads() == threads, f"{name} changed the threads"
                taken[name].append(time.perf_counter() - start)
    return taken


def peak_mb() -> float:
    """The most memory that this process ever held. Linux counts KiB, macOS bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def memory_growth(name: str, shape: list[int]) -> float:
    """MiB that loss and gradient need beside the logits; this process must do nothing else."""
    small = random_batch(2, 5, 3, 7, blank=0, padded=False)
    FUNCTIONS[name](small, 0)  # loads and compiles what it needs
    batch = random_batch(*shape, blank=0, padded=False)
    before = peak_mb()
    FUNCTIONS[name](batch, 0)
    return peak_mb() - before


def memory_growth_elsewhere(name: str, args: argparse.Namespace) -> float:
    """memory_growth in a process of its own."""
    shape = ",".join(map(str, args.shape))
    command = [sys.executable, __file__, "--shape", shape, "--threads", str(args.threads)]
    done = subprocess.run([*command, "--memory-of", name], check=True, capture_output=True)
    return float(done.stdout)


# --------------------------------------------------------------------------------------------- main


def sizes(text: str) -> list[int]:
    """'8,200,50,1024' -> [8, 200, 50, 1024]."""
    numbers = [int(part) for part in text.split(",")]
    if len(numbers) != 4 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not B,T,U,V")
    return numbers


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="losses.rnnt beside warprnnt-numba, on CPU.")
    parser.add_argument("--shape", type=sizes, default=[8, 200, 50, 1024], metavar="B,T,U,V")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--json", type=Path, help="also write all figures here, as JSON")
    parser.add_argument("--memory-of", choices=FUNCTIONS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Prints the figures. Returns the exit code."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(memory_growth(args.memory_of, args.shape))
        return 0
    if args.json and not args.json.parent.is_dir():
        print(f"error: --json {args.json}: there is no folder {args.json.parent}", file=sys.stderr)
        return 2
    try:
        package = f"warprnnt-numba {version('warprnnt-numba')}"
    except ImportError as error:
        print(f"error: {error}: pip install -r benchmarks/requirements.txt", file=sys.stderr)
        return 2
    # Before this process grows: a child's peak begins at what its parent holds.
    memory = {name: memory_growth_elsewhere(name, args) for name in FUNCTIONS}
    rows = agreement()
    worst = {key: max(row[key] for row in rows) for key in rows[0] if "fp" in key}
    passed = worst["both in fp64"] <= ALLOWED_FP64 and worst["ours in fp32"] <= ALLOWED_FP32
    taken = seconds(args.shape, args.rounds, args.threads)
    print(f"losses.rnnt beside {package}, torch {torch.__version__}, {args.threads} thread(s)")
    print(f"agreement on {len(rows)} batches, allowed {ALLOWED_FP64:.0e} in fp64 and for ours "
          f"{ALLOWED_FP32:.0e} in fp32: {'ok' if passed else 'NO'}")  # fmt: skip
    for key, difference in worst.items():
        print(f"  {key:<15} {difference:.1e}" + " from theirs in fp64" * key.endswith("fp32"))
    print_cost(args.shape, taken, memory)
    if args.json:
        figures = {"package": package, "torch": torch.__version__, "shape": args.shape}
        figures |= {"threads": args.threads, "agreement": rows, "seconds": taken}
        args.json.write_text(json.dumps(figures | {"memory_mib": memory}, indent=1) + "\n")
    return 0 if passed else 1


def print_cost(shape: list[int], taken: dict[str, list[float]], memory: dict[str, float]) -> None:
    """A line for each contender, with what ours needs relative to it."""
    B, T, U, V = shape
    logits_mib = B * T * (U + 1) * V * 4 / 2**20
    print(f"loss and gradient at B={B} T={T} U={U} V={V}, beside logits of {logits_mib:.0f} MiB")
    median = {name: statistics.median(times) for name, times in taken.items()}
    for name in FUNCTIONS:
        line = f"  {name:<18} {median[name]:7.3f} s {memory[name]:6.0f} MiB"
        ratios = median["ours"] / median[name], memory["ours"] / memory[name]
        print(line + ("" if name == "ours" else "   ours / this: {:.2f}, {:.2f}".format(*ratios)))


if __name__ == "__main__":
    sys.exit(main())
