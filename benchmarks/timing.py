"""What the benchmarks of speed share: cases that take turns, ratios, tables and JSON.

A time says little by itself on a machine with neighbours; a ratio of two that were taken turn and
turn about says something. So all cases of a table run in one process, in a new random order each
round, and what is reported is the median over rounds of the ratio *within* a round.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules

import fast  # noqa: E402

Times = dict[Any, list[float]]  # seconds of each case, one a round

# ------------------------------------------------------------------------------------------- times


def synchronise() -> None:
    """Wait until the device has done what it was given; a CPU has."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def taking_turns(
    cases: dict[Any, Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    seed: int = 0,
    brief_s: float = 0.0,
) -> Times:
    """Seconds of each case in each round. A warm-up is not timed.

    A case whose last warm-up took less than brief_s is called once before each turn, too: as in
    training it then finds memory and caches as its own kind left them, and not as a neighbour did
    that filled gigabytes.
    """
    brief = set()
    for name, case in cases.items():
        for _ in range(warm_up):
            start = time.perf_counter()
            case()
        if warm_up and time.perf_counter() - start < brief_s:
            brief.add(name)
    rng, taken = random.Random(seed), {name: [] for name in cases}
    for _ in range(rounds):
        for name in rng.sample(list(cases), len(cases)):
            if name in brief:
                cases[name]()
            synchronise()
            start = time.perf_counter()
            cases[name]()
            synchronise()
            taken[name].append(time.perf_counter() - start)
    return taken


def ratios(taken: Times, reference: Hashable) -> dict[Any, float]:
    """Median over rounds of each case's time relative to the reference's in the same round."""
    return {
        name: statistics.median(a / b for a, b in zip(times, taken[reference]))
        for name, times in taken.items()
    }


def medians(taken: Times) -> dict[Any, float]:
    """Seconds."""
    return {name: statistics.median(times) for name, times in taken.items()}


def peak_mib() -> float:
    """The most memory that this process ever held, in MiB."""
    return fast.peak_memory_mib(torch.device("cpu"))


def in_a_process(script: str, *arguments: object) -> Any:
    """Run a script by itself and return the JSON that its last line of output is.

    A peak of memory is a process' own: what one case needs is asked in a process of its own.
    """
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


# -------------------------------------------------------------------------------- matrix products


@dataclass(frozen=True)
class Setting:
    """What computes the matrix products, which is most of the time of everything here.

    In fp32 torch asks MKL or, from "high" down, oneDNN; which of the two is faster, and whether
    oneDNN then still computes in fp32, depends on the processor.
    """

    precision: str  # torch.set_float32_matmul_precision, or "auto": what the project chooses
    bf16: bool = False  # autocast of the forward pass

    @contextlib.contextmanager
    def products(self) -> Iterator[None]:
        """The setting of fp32 products, put back afterwards."""
        before = torch.get_float32_matmul_precision()
        precision = own_matmul() if self.precision == "auto" else self.precision
        torch.set_float32_matmul_precision(precision)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def autocast(self) -> torch.autocast:
        """Around a forward pass."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.autocast(device, torch.bfloat16, enabled=self.bf16)


@functools.cache
def own_matmul() -> str:
    """The precision that this project chooses on this machine, probed once."""
    before = torch.get_float32_matmul_precision()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return fast.choose_matmul("auto", device)[0]
    finally:
        torch.set_float32_matmul_precision(before)


DEFAULT, EQUAL, BF16, OWN = "fp32", "fp32, medium for all", "bf16 autocast", "fp32, own choice"
SETTINGS = {
    DEFAULT: Setting("highest"),  # torch's default
    EQUAL: Setting("medium"),
    BF16: Setting("highest", bf16=True),
    OWN: Setting("auto"),  # of ours alone, beside peers in the first
}
PRODUCT = 2048  # rows and columns of the matrices that show the peak


def product_cases() -> dict[tuple[str, str], Callable[[], object]]:
    """A product of two matrices in each setting, to take turns with what is measured."""
    cases = {}
    for name, setting in SETTINGS.items():
        a, b = torch.randn(2, PRODUCT, PRODUCT).to(torch.bfloat16 if setting.bf16 else None)

        def case(setting: Setting = setting, a: torch.Tensor = a, b: torch.Tensor = b) -> None:
            with setting.products():
                F.linear(a, b)

        cases[name, "product"] = case
    return cases


def peaks(taken: Times) -> dict[bool, float]:
    """FLOP/s of the fastest of the product cases, in fp32 (False) and in bf16 (True)."""
    fastest: dict[bool, float] = {}
    for name, setting in SETTINGS.items():
        rate = 2 * PRODUCT**3 / statistics.median(taken[name, "product"])
        fastest[setting.bf16] = max(rate, fastest.get(setting.bf16, 0.0))
    return fastest


def product_error(precision: str) -> float:
    """Largest error of a fp32 product against float64, relative to the RMS of its values.

    About 1e-6 where it is computed in fp32, 1e-2 where its factors are rounded to bf16.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 1024, generator=generator) for _ in range(2))
    with Setting(precision).products():
        found = F.linear(a, b).double()
    expected = F.linear(a.double(), b.double())
    return float((found - expected).abs().max() / expected.square().mean().sqrt())


# ------------------------------------------------------------------------- what every script does


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """A command line with what all of the scripts take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="timed rounds (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write all figures here, as JSON")
    return parser


def ready(args: argparse.Namespace, *packages: str) -> bool:
    """Set the threads. False, after one line that says why, where the script cannot run."""
    torch.set_num_threads(args.threads)
    try:
        if args.rounds < 1:
            raise ValueError(f"--rounds {args.rounds}: at least 1")
        if args.json and not args.json.parent.is_dir():
            raise ValueError(f"--json {args.json}: there is no folder {args.json.parent}")
        for package in packages:
            try:
                importlib.import_module(package)
            except ImportError as error:
                advice = "pip install -r benchmarks/requirements.txt"
                raise ValueError(f"{str(error).splitlines()[0]}: {advice}") from None
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    return True


def judged(goals: list[tuple[str, float, str, float]]) -> str:
    """A table of goals: (what, measured, "<=" or ">=", goal)."""
    rows = []
    for what, measured, relation, goal in goals:
        met = measured <= goal if relation == "<=" else measured >= goal
        goal_text, verdict = f"{relation} {goal:g}", "yes" if met else "no"
        rows.append({"goal": what, "asked": goal_text, "measured": measured, "met": verdict})
    return table(rows)


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    about: dict[str, object] = {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(),
    }
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        about["cpu"] = names[0].partition(":")[2].strip() if names else about["cpu"]
    if torch.cuda.is_available():
        about["device"] = torch.cuda.get_device_name()
    return about


def table(rows: list[dict[str, object]]) -> str:
    """Rows with the same keys as a Markdown table; numbers with three significant digits."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return str(value)

    head = list(rows[0])
    cells = [head, *([cell(row[key]) for key in head] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(x.ljust(w) for x, w in zip(line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """All figures of a script, with the machine's, where --json says."""
    if path:
        path.write_text(json.dumps({"machine": machine()} | figures, indent=1) + "\n")
