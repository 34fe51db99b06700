"""What the benchmarks of speed share: cases that take turns, ratios, tables and JSON.

A time says little by itself on a machine with neighbours; a ratio of two that were taken turn and
turn about says something. So all cases of a table run in one process, in a new random order each
round, and what is reported is the median over rounds of the ratio *within* a round.
"""

from __future__ import annotations

import json
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Times = dict[str, list[float]]  # seconds of each case, one a round


def synchronise() -> None:
    """Wait until the device has done what it was given; a CPU has."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def taking_turns(
    cases: dict[str, Callable[[], object]], rounds: int, warm_up: int = 1, seed: int = 0
) -> Times:
    """Seconds of each case in each round. A warm-up is not timed."""
    for case in cases.values():
        for _ in range(warm_up):
            case()
    rng, taken = random.Random(seed), {name: [] for name in cases}
    for _ in range(rounds):
        for name in rng.sample(list(cases), len(cases)):
            synchronise()
            start = time.perf_counter()
            cases[name]()
            synchronise()
            taken[name].append(time.perf_counter() - start)
    return taken


def ratios(taken: Times, reference: str) -> dict[str, float]:
    """Median over rounds of each case's time relative to the reference's in the same round."""
    return {
        name: statistics.median(a / b for a, b in zip(times, taken[reference]))
        for name, times in taken.items()
    }


def medians(taken: Times) -> dict[str, float]:
    """Seconds."""
    return {name: statistics.median(times) for name, times in taken.items()}


def peak_mib() -> float:
    """The most memory that this process ever held, in MiB. Linux counts KiB, macOS bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def in_a_process(script: str, *arguments: object) -> Any:
    """Run a script by itself and return the JSON that its last line of output is.

    A peak of memory is a process' own: what one case needs is asked in a process of its own.
    """
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


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
