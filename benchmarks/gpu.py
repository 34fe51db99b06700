"""What the fast path gives on an accelerator: one call, under nine minutes, nothing to prepare.

    python benchmarks/gpu.py [--sizes base,xl] [--modes none,compile,graph] [--rows 32]
                             [--budget-s 500] [--json gpu.json]

peak:    the best matrix product of the device, in bf16 and fp32: what MFU is a share of.
equal:   --fast compile and graph against none, dropout 0: the first gradient by its norm and the
         losses of 20 steps, in fp32 and bf16.
steps:   whole optimiser steps of all three streams (speech, text, pairs with TLM and STM) with
         AdamW: none, compile, graph; at the last size also with activation checkpointing, and the
         largest micro-batch that fits, by doubling.
peers:   the bare encoder, forward and backward, beside Hugging Face's at the same shape, where
         transformers is installed.
MFU is model FLOPs (three times those of the forward pass: conformer.block_flops, speech_flops and
the heads; what is computed twice counts once, padding not at all) over time and peak. Batches are
of one static shape, a tenth of it padding, made by data.py's own classes.
A part that fails says why and the next one follows; parts that no longer fit into --budget-s are
named. The JSON is written after each part. Without CUDA all of it runs at `tiny` on the CPU, to see
that the script works: its figures mean nothing.
Letters: B rows, T encoder frames (40 ms), D model width.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import steps  # first: it finds the modules
import timing
import torch
from torch import Tensor

import conformer
import fast
import pretrain

NOT_REAL = (
    "NOT THE REAL MEASUREMENT: no CUDA device, so `tiny` on a CPU, to see that all of it runs"
)
# bf16 without sparsity, TFLOP/s, as the makers' datasheets have it.
DATASHEET = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "A10": 125}
OBJECTIVES = pretrain.Objectives(("speech", "text"), ("tlm", "stm"))
WARM_UP = 4  # a graph is recorded at a shape's third micro-batch
SPEECH_S, PADDING = 12.0, 0.1

Row = dict[str, object]


def clear() -> None:
    """Give back what the last part held."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def timed(function: Callable[[], object]) -> float:
    """Seconds of a call, with all that it asked of the device."""
    timing.synchronise()
    start = time.perf_counter()
    function()
    timing.synchronise()
    return time.perf_counter() - start


def make_steps(
    size: str, mode: str, dtype: str, *, dropout: float | None = 0.0, checkpointing: bool = False
) -> steps.Steps:
    """A model of that size and its optimiser steps."""
    changes = {} if dropout is None else {"dropout": dropout}
    ranks = steps.alone()
    model = steps.build(conformer.sized(size, **changes), OBJECTIVES, ranks.device)
    return steps.Steps(model, ranks, dtype=dtype, fast=mode, checkpointing=checkpointing)


def make_batch(size: str, rows: int, seed: int = 0):
    """Rows of 12 s, as many of text, half as many pairs."""
    config = conformer.sized(size)
    frames = int(SPEECH_S * conformer.FRAMES_PER_S)
    return steps.joint_batch(rows, frames, config.row_tokens, config.vocab_size, PADDING, seed)


# -------------------------------------------------------------------------------------------- parts


def measure_peak(args: argparse.Namespace) -> list[Row]:
    """TFLOP/s of a matrix product, and the datasheet's where the device is known."""
    device, rows = steps.alone().device, []
    for dtype in ("bf16", "fp32"):
        rows.append({"dtype": dtype, "TFLOP/s": fast.matmul_flops(device, dtype, 20) / 1e12})
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    known = [peak for part, peak in DATASHEET.items() if part in name]
    if known:
        rows.append({"dtype": f"bf16, datasheet of {name}", "TFLOP/s": float(known[0])})
    return rows


def twenty_steps(mode: str, dtype: str, size: str, rows: int) -> tuple[Tensor, list[float]]:
    """The first step's gradient, flat, and the loss of each of 20 steps, by --fast `mode`."""
    stepper, batch = make_steps(size, mode, dtype), make_batch(size, rows)
    batches = [batch.to(stepper.ranks.device)]
    scales, losses = stepper.scales(batches), []
    if mode == "graph":  # so that the first gradient is a replay's
        for _ in range(fast.WARM_UP + 1):
            stepper.gradients(batches, scales)
            stepper.zero_grad()
    stepper.gradients(batches, scales)
    gradient = torch.cat([p.grad.float().flatten() for p in stepper.parameters]).clone()
    stepper.zero_grad()
    for _ in range(20):
        found = stepper.step(batches, scales)
        losses.append(sum(float(loss.sum / loss.count) for loss in found.values()))
    return gradient, losses


def measure_equal(args: argparse.Namespace) -> list[Row]:
    """How far the fast modes are from none."""
    rows, size = [], args.sizes[0]
    for dtype, of_gradient, of_loss in (("fp32", 1e-5, 1e-5), ("bf16", 1e-2, 1e-3)):
        clear()
        gradient, losses = twenty_steps("none", dtype, size, args.equal_rows)
        for mode in [mode for mode in args.modes if mode != "none"]:
            clear()
            before = fast.compilations()
            its, its_losses = twenty_steps(mode, dtype, size, args.equal_rows)
            apart = float((its - gradient).norm() / gradient.norm())
            loss = max(abs(a - b) / abs(b) for a, b in zip(its_losses, losses))
            rows.append({
                "mode": mode, "dtype": dtype, "gradient": apart, "allowed": of_gradient,
                "loss, 20 steps": loss, "allowed ": of_loss,
                "ok": "yes" if apart <= of_gradient and loss <= of_loss else "NO",
                "compilations": fast.compilations() - before,
            })  # fmt: skip
    return rows


def measure_step(
    size: str, mode: str, dtype: str, rows: int, peaks: dict[str, float], rounds: int, **how: object
) -> Row:
    """One line of the table of steps."""
    clear()
    compiled = fast.compilations()
    stepper, batch = make_steps(size, mode, dtype, **how), make_batch(size, rows)
    work = stepper.model.work(batch)
    batches = [batch.to(stepper.ranks.device)]
    scales = stepper.scales(batches)
    first = sum(timed(lambda: stepper.step(batches, scales)) for _ in range(WARM_UP))
    seconds = statistics.median(timed(lambda: stepper.step(batches, scales)) for _ in range(rounds))
    return {
        "size": size, "mode": mode, "dtype": dtype, "rows": rows,
        "checkpointing": "yes" if how.get("checkpointing") else "no",
        "dropout": stepper.model.config.dropout, "ms": 1e3 * seconds,
        "MFU": work["flops"] / seconds / peaks[dtype], "TFLOP/s": work["flops"] / seconds / 1e12,
        "tokens/s": work["tokens"] / seconds, "audio h/h": work["audio_s"] / seconds,
        "MiB": fast.peak_memory_mib(stepper.ranks.device),
        "warm-up s": first, "compilations": fast.compilations() - compiled,
    }  # fmt: skip


def largest(size: str, mode: str, peaks: dict[str, float], rows: int, **how: object) -> Row:
    """The step of the most rows that fit, by doubling from `rows`; at most 16 times as many."""
    best: Row | None = None
    for n in (rows * 2**i for i in range(5)):
        try:
            best = measure_step(size, mode, "bf16", n, peaks, 3, **how)
        except torch.OutOfMemoryError:
            break
    if best is None:
        raise ValueError(f"{rows} rows do not fit")
    return best


def peer_encoders(config: conformer.SlamConfig) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Encoders of transformers at our shape: (states (B, T, D), valid (B, T) bool) -> states."""
    from transformers import Wav2Vec2BertConfig, Wav2Vec2ConformerConfig
    from transformers.models.wav2vec2_bert import modeling_wav2vec2_bert as bert
    from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer as plain

    shape = {
        "hidden_size": config.d_model, "num_attention_heads": config.n_heads,
        "intermediate_size": config.d_ff, "conv_depthwise_kernel_size": config.conv_kernel,
        "num_hidden_layers": config.speech_layers + config.mm_layers, "layerdrop": 0.0,
        "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
        "conformer_conv_dropout": 0.0,
    }  # fmt: skip
    made = {
        f"Wav2Vec2-Conformer, {kind}": plain.Wav2Vec2ConformerEncoder(
            Wav2Vec2ConformerConfig(position_embeddings_type=kind, **shape)
        )
        for kind in ("relative", "rotary")
    }
    made["Wav2Vec2-BERT"] = bert.Wav2Vec2BertEncoder(Wav2Vec2BertConfig(**shape))

    def caller(encoder: torch.nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        encoder.train().to(steps.alone().device)
        return lambda x, valid: encoder(x, attention_mask=valid)[0]

    return {name: caller(encoder) for name, encoder in made.items()}


def measure_peers(args: argparse.Namespace, size: str, peaks: dict[str, float]) -> list[Row]:
    """Forward and backward of bare encoders in bf16, one after the other."""
    config, device, rows = conformer.sized(size, dropout=0.0), steps.alone().device, []
    depth = config.speech_layers + config.mm_layers
    T = int(SPEECH_S * conformer.ENC_FRAMES_PER_S)
    lens = torch.from_numpy(steps.lens_of(args.rows, T, PADDING)).to(device)
    valid = conformer.valid_mask(lens, T)
    flops = 3 * depth * conformer.block_flops(config, lens)

    def measure(name: str, encoder: Callable[[Tensor, Tensor], Tensor]) -> None:
        x = torch.randn(args.rows, T, config.d_model, device=device, requires_grad=True)

        def once() -> None:
            with fast.autocast(device, "bf16"):
                y = encoder(x, valid)
            y.float().square().mean().backward()

        for _ in range(WARM_UP):
            once()
        seconds = statistics.median(timed(once) for _ in range(args.rounds))
        share = flops / seconds / peaks["bf16"]
        rows.append({"encoder": name, "ms": 1e3 * seconds, "MFU by our FLOPs": share,
                     "MiB": fast.peak_memory_mib(device)})  # fmt: skip

    for mode in [mode for mode in args.modes if mode != "graph"]:
        clear()
        stack = conformer.ConformerStack(config, depth).train().to(device)
        fast.compile_blocks(stack, mode)
        measure(f"ours, {mode}", lambda x, valid, stack=stack: stack(x, lens))
        del stack
    for name, encoder in peer_encoders(config).items():
        clear()
        measure(name, encoder)
    return rows


# --------------------------------------------------------------------------------------------- main


class Report:
    """What has been measured: printed, and written, part by part."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.began, self.parts = args, time.perf_counter(), {}

    def part(self, name: str, measure: Callable[[], list[Row] | Row]) -> list[Row]:
        """Measure a part unless the time is up; a failure is its only row."""
        if time.perf_counter() - self.began > self.args.budget_s:
            found: list[Row] = [{"skipped": f"--budget-s {self.args.budget_s:g} is over"}]
        else:
            try:
                rows = measure()
                found = rows if isinstance(rows, list) else [rows]
            except Exception as error:  # of any kind: the rest is still worth having
                lines = str(error).strip().splitlines() or [""]
                found = [{"failed": f"{type(error).__name__}: {lines[0][:200]}"}]
        self.parts[name] = found
        print(f"\n{name}\n\n{timing.table(found)}", flush=True)
        real = {"real_measurement": torch.cuda.is_available(), "parts": self.parts}
        timing.write_json(self.args.json, real)
        return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; on a CPU smaller defaults."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="The fast path on an accelerator.")
    add = parser.add_argument
    add("--sizes", default="base,xl" if cuda else "tiny", help="(default %(default)s)")
    add("--modes", default="none,compile,graph", help="(default %(default)s)")
    rows, rounds = (32, 10) if cuda else (2, 2)
    add("--rows", type=int, default=rows, help="of 12 s in a micro-batch (default %(default)s)")
    add("--rounds", type=int, default=rounds, help="timed steps (default %(default)s)")
    add("--equal-rows", type=int, default=8 if cuda else 2, help="(default %(default)s)")
    add("--budget-s", type=float, default=500, help="begin no part after (default %(default)s)")
    add("--threads", type=int, default=2, help="of a CPU (default %(default)s)")
    add("--json", type=Path, help="also write all figures here, after each part")
    args = parser.parse_args(argv)
    args.sizes, args.modes = args.sizes.split(","), args.modes.split(",")
    return args


def main(argv: list[str] | None = None) -> int:
    """Prints the figures."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    cuda = torch.cuda.is_available()
    for name in args.sizes:
        conformer.sized(name)
    if not cuda:
        print(NOT_REAL)
    print(", ".join(f"{key} {value}" for key, value in timing.machine().items()))
    report = Report(args)
    found = report.part("peak", lambda: measure_peak(args))
    peaks = {str(row["dtype"]): 1e12 * float(row["TFLOP/s"]) for row in found if "TFLOP/s" in row}
    last = args.sizes[-1]
    for size in args.sizes:
        for mode in args.modes:
            report.part(
                f"step: {size}, {mode}",
                lambda: measure_step(size, mode, "bf16", args.rows, peaks, args.rounds),
            )
    report.part(
        f"step: {last}, with its dropout",
        lambda: measure_step(
            last, args.modes[-1 if cuda else 0], "bf16", args.rows, peaks, args.rounds, dropout=None
        ),
    )
    report.part("equal", lambda: measure_equal(args))
    report.part(f"peers: {last}", lambda: measure_peers(args, last, peaks))
    kept = {"checkpointing": True}
    report.part(
        f"step: {last}, checkpointing",
        lambda: measure_step(last, "none", "bf16", args.rows, peaks, args.rounds, **kept),
    )
    if cuda:
        mode = "compile" if "compile" in args.modes else "none"
        report.part(f"largest: {last}", lambda: largest(last, mode, peaks, args.rows))
        report.part(
            f"largest: {last}, checkpointing", lambda: largest(last, mode, peaks, args.rows, **kept)
        )
        report.part(
            f"step: {args.sizes[0]}, fp32",
            lambda: measure_step(args.sizes[0], "none", "fp32", args.rows, peaks, args.rounds),
        )
    print(f"\n{time.perf_counter() - report.began:.0f} s in all")
    if not cuda:
        print(NOT_REAL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
