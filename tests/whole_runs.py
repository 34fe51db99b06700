"""What tests of whole runs share: a smaller `tiny`, runs here and in processes, their ends."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch

import conformer
import decoders
import training


@contextlib.contextmanager
def micro_size(tiny: Mapping, heads: Mapping | None = None) -> Iterator[None]:
    """`tiny` smaller still in this process, on one thread as in the others; then all as before."""
    threads = torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    small = dataclasses.replace(conformer.SIZES["tiny"], **tiny)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(conformer.SIZES, "tiny", small)
        if heads is not None:
            patch.setitem(decoders.HEAD_SIZES, "tiny", heads)
        yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_here(main, arguments: Sequence[object]) -> str:
    """A run of an entry point in this process -> what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main([str(part) for part in arguments])
    return printed.getvalue()


def error_of(main, capsys, arguments: Sequence[object]) -> str:
    """The single line on stderr of a run that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(part) for part in arguments])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2, printed
    one_line = printed.startswith("error: ") and printed.count("\n") == 1
    assert one_line and "Traceback" not in printed, printed
    return printed


def start(script: Path, arguments: list[str], n_ranks: int = 1) -> subprocess.Popen:
    """A run in processes of its own, alone or under torchrun."""
    launcher = [sys.executable]
    if n_ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
    return subprocess.Popen(
        [*launcher, str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """Wait for the end -> what it printed."""
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == code, printed
    return printed


def metrics_of(out_dir: Path) -> list[dict]:
    """Training lines."""
    return [row for row in training.read_metrics(out_dir / "metrics.jsonl") if "lr" in row]


def timeless(row: dict) -> dict:
    """A line of metrics without what the clock and the machine decide."""
    measured = ("_ms", "_per_s", "mfu", "peak_mib", "compilations")
    return {key: value for key, value in row.items() if not key.endswith(measured)}


def dev_metrics_of(out_dir: Path) -> list[dict]:
    return [row for row in training.read_metrics(out_dir / "metrics.jsonl") if "lr" not in row]


def assert_same_tensors(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
