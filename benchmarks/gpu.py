"""What an accelerator makes of a whole pre-training step: one call, under nine minutes.

    python benchmarks/gpu.py [--sizes base,xl] [--modes none,compile,graph] [--budget-s 500]
                             [--parts NAME,...] [--rounds 10] [--json gpu.json]

A step is speech, text and pairs (w2v-BERT, span-masked LM, TLM, STM), forward, backward, clipping
and AdamW, on one batch of static shape that data.py's classes hold. Eager (`none`), compiled blocks
(`compile`) and CUDA graphs (`graph`) are the modes of --fast. Parts:
    peak           the best matrix product of this device, in each dtype
    steps          time, MFU, speed and memory of each size in each mode; dropout as the size has
                   it, and 0
    equal          20 steps of each mode beside eager: losses and gradient
    train          the same step in training.train itself, by its own log
    peers          the encoder beside transformers' at the same shape, if that is installed
    checkpointing  steps with activation checkpointing
    largest        the micro-batch doubled until memory or time ends
Each part runs in a process of its own with a time limit. What fails says why and the rest goes on;
what no longer fits into --budget-s is skipped and says so; --json is written after every part.
MFU is model FLOPs a second over the measured peak and, where the device is known, its datasheet's.
Model FLOPs are of real positions, 3 times the forward pass: a block has per position
8 D d_ff + 14 D^2 + 2 D K + 4 L D (conformer.block_flops); SlamPretraining.work adds the rest.
Without CUDA everything runs at `tiny` on the CPU, to try the script out: no measurement.
Letters: B rows, T encoder frames, L positions of a row, D model width, H heads, K kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import steps  # first: it finds the modules
import timing
import torch
from torch import Tensor, nn

import conformer
import data
import fast
import pretrain

NOT_REAL = "NOT THE REAL MEASUREMENT: no CUDA device here; this only tries the script out on a CPU."
# bf16, dense, as the makers say, of those sold in one speed.
DATASHEET_FLOPS = {"H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "A100": 312e12}
ROWS = {"tiny": 2, "small": 16, "base": 32, "xl": 8}  # of speech and of text, twice those of pairs
WARM_UP = 5  # steps of a shape: two as usual, one recorded, and replays
SAME_LOSS, SAME_GRADIENT = 1e-3, 1e-2  # in bf16: what fast may differ from eager in
LEAST_S = {"peak": 10, "steps": 25, "equal": 40, "train": 25}  # others 30: less is not begun with
MOST_S, MOST_S_ON_CPU = 150, 60  # of a part
FORMULA = (
    "MFU: model FLOPs / time / peak. Model FLOPs: SlamPretraining.work, of real positions; 3 times "
    "the forward pass, in which a block has 8 D d_ff + 14 D^2 + 2 D K + 4 L D a position."
)
Row = dict[str, Any]


def datasheet_flops(device_name: str) -> float | None:
    """bf16 FLOP/s that the device's maker states; None where not known."""
    if "NVL" in device_name:  # slower than their namesakes
        return None
    return next((f for name, f in DATASHEET_FLOPS.items() if name in device_name), None)


def release() -> None:
    """Give back what a case has left on the device, and forget what was compiled for it."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def reason(error: BaseException) -> str:
    """An error in one line that fits a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300].replace("|", "/")


# -------------------------------------------------------------------------------------------- steps


def batch_of(args: argparse.Namespace, size: str, rows: int) -> data.Batch:
    """The joint batch of a size."""
    config = conformer.sized(size)
    tokens = min(args.row_tokens, config.row_tokens)
    frames = conformer.SUBSAMPLING * args.frames
    return steps.joint_batch(rows, frames, tokens, config.vocab_size, args.padding)


def stepper_of(size: str, mode: str, dtype: str, dropout: float, checkpointing: bool = False):
    """Optimiser steps of a new model."""
    ranks = steps.alone()
    config = conformer.sized(size, dropout=dropout)
    model = steps.build(config, pretrain.Objectives(), ranks.device)
    return steps.Steps(model, ranks, dtype=dtype, fast=mode, checkpointing=checkpointing)


def measure(stepper: steps.Steps, batch: data.Batch, rounds: int) -> Row:
    """Time and memory of steps on one batch, after what compiling and recording took."""
    device = stepper.ranks.device
    batch, work = batch.to(device), stepper.model.work(batch)
    scales, compiled = stepper.scales([batch]), fast.compilations()
    each = 4 if device.type == "cuda" else 1  # steps at a time: the host may run ahead, as it does

    def some() -> None:
        for _ in range(each):
            stepper.step([batch], scales)

    timing.synchronise()
    start = time.perf_counter()
    warm_up = WARM_UP if device.type == "cuda" else 2
    for _ in range(warm_up):
        stepper.step([batch], scales)
    timing.synchronise()
    first, after = time.perf_counter() - start, fast.compilations()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = timing.taking_turns({"step": some}, rounds, warm_up=0)["step"]
    seconds = statistics.median(taken) / each
    row = {
        "ms": 1e3 * seconds, "fastest ms": 1e3 * min(taken) / each,
        "TFLOP/s": work["flops"] / seconds / 1e12, "TFLOP a step": work["flops"] / 1e12,
        "tokens/s": work["tokens"] / seconds, "audio h/h": work["audio_s"] / seconds,
        "peak GiB": fast.peak_memory_mib(device) / 1024,
        "set-up s": max(0.0, first - warm_up * seconds),
        "graphs": after - compiled, "recompiled": fast.compilations() - after,
    }  # fmt: skip
    if device.type == "cuda":
        row["reserved GiB"] = torch.cuda.max_memory_reserved(device) / 2**30
    return row


def attempt(about: Row, make: Callable[[], Row]) -> Row:
    """What a case gives, or why it failed; its memory is given back."""
    try:
        found = make()
    except Exception as error:  # whatever it is, the other cases go on
        found = {"failed": reason(error)}
    release()  # outside of the handler, whose traceback holds the model
    return about | found


def step_rows(args: argparse.Namespace, size: str, mode: str) -> Iterator[Row]:
    """Part `steps`."""
    batch, own = batch_of(args, size, args.rows or ROWS[size]), conformer.sized(size).dropout
    cases = list(dict.fromkeys([(args.dtype, own), (args.dtype, 0.0)]))
    if mode == "none" and size == args.sizes[0] and args.dtype != "fp32":
        cases.append(("fp32", own))
    for dtype, dropout in cases:
        about = {"size": size, "mode": mode, "dtype": dtype, "dropout": dropout, "checkp.": "no"}
        about["rows"] = len(batch.speech.feature_lens)
        made = (size, mode, dtype, dropout)
        yield attempt(about, lambda: measure(stepper_of(*made), batch, args.rounds))


def checkpointing_rows(args: argparse.Namespace, size: str) -> Iterator[Row]:
    """Part `checkpointing`: steps as in `steps`, whose rows are those without."""
    batch, own = batch_of(args, size, args.rows or ROWS[size]), conformer.sized(size).dropout
    for mode in args.modes:
        dropout = 0.0 if mode == "graph" else own  # a graph cannot draw it twice alike
        about = {"size": size, "mode": mode, "dtype": args.dtype, "dropout": dropout}
        about |= {"checkp.": "yes", "rows": len(batch.speech.feature_lens)}
        made = (size, mode, args.dtype, dropout, True)
        yield attempt(about, lambda: measure(stepper_of(*made), batch, args.rounds))


def largest_rows(args: argparse.Namespace, size: str, mode: str) -> Iterator[Row]:
    """Part `largest`: a row a size of micro-batch, until one does not fit or time is up.

    On a CPU two doublings are enough: there is no telling what a machine out of memory ends.
    """
    rows, start = args.rows or ROWS[size], time.perf_counter()
    on_cpu = not torch.cuda.is_available()
    for doublings in range(1, 3 if on_cpu else 20):
        n = rows * 2**doublings
        about = {"size": size, "mode": mode, "dtype": args.dtype, "checkp.": "no", "rows": n}
        about["dropout"] = conformer.sized(size).dropout
        made = (size, mode, args.dtype, about["dropout"])
        began = time.perf_counter()
        row = attempt(about, lambda: measure(stepper_of(*made), batch_of(args, size, n), 2))
        yield row
        took, left = time.perf_counter() - began, args.limit_s - (time.perf_counter() - start)
        if "failed" in row:
            return
        if left < 3 * took:
            yield about | {"rows": 2 * n, "failed": f"not tried: {left:.0f} s left"}
            return


# --------------------------------------------------------------------------- the other measurements


def peak_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Part `peak`."""
    device = steps.alone().device
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    for dtype in dict.fromkeys([args.dtype, "fp32"]):
        row = {"device": name, "dtype": dtype, "n": fast.PROBE_SIZE[device.type]}
        row["TFLOP/s"] = fast.matmul_flops(device, dtype, rounds=30) / 1e12
        stated = datasheet_flops(name) if dtype == "bf16" else None
        yield row | {"datasheet": stated / 1e12 if stated else "not known"}


def losses_and_gradient(
    args: argparse.Namespace, size: str, mode: str, dtype: str
) -> tuple[list[dict[str, float]], list[Tensor]]:
    """Losses of each step of a short run without dropout, and the first gradient.

    The gradient is that of a replay where there are any: so it is made WARM_UP times before.
    """
    stepper = stepper_of(size, mode, dtype, dropout=0.0)
    stepper.rates.warmup_steps = 10  # so that weights really move
    batch = batch_of(args, size, args.rows or ROWS[size]).to(stepper.ranks.device)
    scales, losses = stepper.scales([batch]), []
    for _ in range(WARM_UP if mode == "graph" else 1):
        stepper.zero_grad()
        stepper.gradients([batch], scales)
    gradient = [parameter.grad.clone() for parameter in stepper.parameters]
    stepper.zero_grad()
    for _ in range(args.equal_steps):
        found = stepper.step([batch], scales)
        losses.append({name: float(loss.sum / loss.count) for name, loss in found.items()})
    return losses, gradient


def norm(tensors: Iterator[Tensor]) -> float:
    """Euclidean, over all of them."""
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt())


def equal_rows(args: argparse.Namespace, size: str) -> Iterator[Row]:
    """Part `equal`: each mode beside eager; beside them eager once more and, for the scale of
    rounding, eager in fp32."""
    losses, gradient = losses_and_gradient(args, size, "none", args.dtype)
    cases = [("none", args.dtype)] + [("none", "fp32")] * (args.dtype != "fp32")
    cases += [(mode, args.dtype) for mode in args.modes if mode != "none"]

    def beside(mode: str, dtype: str) -> Row:
        other, its = losses_and_gradient(args, size, mode, dtype)
        apart = [max(abs(a[n] - b[n]) / abs(b[n]) for n in b) for a, b in zip(other, losses)]
        difference = norm(a - b for a, b in zip(its, gradient)) / norm(iter(gradient))
        row = {"first loss": apart[0], f"losses of {len(apart)} steps": max(apart)}
        within = apart[0] <= SAME_LOSS and difference <= SAME_GRADIENT
        verdict = ("yes" if within else "no") if dtype == args.dtype else "a yardstick"
        return row | {"gradient": difference, "within 1e-3, 1e-2": verdict}

    for mode, dtype in cases:
        about = {"size": size, "mode": mode, "dtype": dtype}
        yield attempt(about, lambda: beside(mode, dtype))


def train_rows(args: argparse.Namespace, size: str, mode: str) -> Iterator[Row]:
    """Part `train`: training.train, by what its log says once everything is compiled."""
    ranks, n_steps = steps.alone(), max(WARM_UP, 2 * args.rounds)

    def run() -> Row:
        flags = ["--size", size, "--dtype", args.dtype, "--fast", mode, "--micro-batches", "1"]
        flags += ["--max-steps", str(2 * n_steps), "--log-every", str(n_steps)]
        batch = batch_of(args, size, args.rows or ROWS[size])
        batch = batch.pin_memory() if ranks.device.type == "cuda" else batch
        metrics = steps.train(flags, batch, ranks)
        row = {"ms": metrics["step_ms"], "mfu in the log": metrics["mfu"]}
        row |= {"tokens/s": metrics["tokens_per_s"], "audio h/h": metrics["audio_s_per_s"]}
        return row | {"peak GiB": metrics["peak_mib"] / 1024, "graphs": metrics["compilations"]}

    yield attempt({"size": size, "mode": mode, "dtype": args.dtype}, run)


# -------------------------------------------------------------------------------------------- peers


class Peer(nn.Module):
    """An encoder of transformers, called as ours is."""

    def __init__(self, positions: str, D: int, H: int, K: int, n_layers: int) -> None:
        super().__init__()
        from transformers import Wav2Vec2BertConfig, Wav2Vec2ConformerConfig
        from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertEncoder
        from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer as theirs

        of_bert = positions == "relative_key"
        config = (Wav2Vec2BertConfig if of_bert else Wav2Vec2ConformerConfig)(
            hidden_size=D, intermediate_size=4 * D, num_attention_heads=H, hidden_act="swish",
            num_hidden_layers=n_layers, conv_depthwise_kernel_size=K, layerdrop=0.0,
            position_embeddings_type=positions, attn_implementation="sdpa", hidden_dropout=0.0,
            activation_dropout=0.0, attention_dropout=0.0, conformer_conv_dropout=0.0,
        )  # fmt: skip
        self.encoder = (Wav2Vec2BertEncoder if of_bert else theirs.Wav2Vec2ConformerEncoder)(config)

    def forward(self, x: Tensor, lens: Tensor) -> Tensor:
        """(B, T, D), (B,) -> (B, T, D)."""
        mask = conformer.valid_mask(lens, x.shape[1])
        return self.encoder(x.clone(), attention_mask=mask).last_hidden_state  # it writes into x


PEERS = {
    "transformers, Conformer, relative": "relative",
    "transformers, Conformer, rotary": "rotary",
    "transformers, Wav2Vec2-BERT": "relative_key",
}


def encoder_of(name: str, config: conformer.SlamConfig, n_layers: int, mode: str) -> nn.Module:
    """Ours or a peer, its layers compiled one by one."""
    with torch.device(steps.alone().device):
        if name == "ours":
            encoder = conformer.ConformerStack(config, n_layers)
            fast.compile_blocks(encoder, mode)
            return encoder.train()
        encoder = Peer(PEERS[name], config.d_model, config.n_heads, config.conv_kernel, n_layers)
    for layer in encoder.encoder.layers if mode == "compile" else ():
        layer.compile(dynamic=False)
    return encoder.train()


def peer_rows(args: argparse.Namespace, size: str) -> Iterator[Row]:
    """Part `peers`: forward and backward of --peer-layers layers without dropout."""
    config, device = conformer.sized(size, dropout=0.0), steps.alone().device
    B, T, D = 2 * (args.rows or ROWS[size]), args.frames, config.d_model
    lens = torch.from_numpy(steps.lens_of(B, T, args.padding)).to(device)
    x, upstream = torch.randn(2, B, T, D, device=device)
    x.requires_grad_()

    def run(name: str, mode: str) -> Row:
        encoder = encoder_of(name, config, args.peer_layers, mode)

        def case() -> None:
            encoder.zero_grad(set_to_none=True)
            x.grad = None
            with fast.autocast(device, args.dtype):
                out = encoder(x, lens)
            out.backward(upstream.to(out.dtype))

        taken = timing.taking_turns({"layers": case}, args.rounds, warm_up=3)["layers"]
        ms = 1e3 * statistics.median(taken)
        flops = 3 * args.peer_layers * conformer.block_flops(config, lens.cpu())
        all_layers = config.speech_layers + config.mm_layers
        return {"ms": ms, f"ms, scaled to {all_layers} layers": ms * all_layers / args.peer_layers,
                "TFLOP/s by our count": flops / ms / 1e9}  # fmt: skip

    for mode in (mode for mode in args.modes if mode != "graph"):
        for name in ("ours", *PEERS):
            about = {"encoder": name, "mode": mode, "dtype": args.dtype}
            about["B x T x D, layers"] = f"{B} x {T} x {D}, {args.peer_layers}"
            yield attempt(about, lambda: run(name, mode))


# ----------------------------------------------------------------------- parts, and their processes


MAKERS: dict[str, Callable[..., Iterator[Row]]] = {
    "peak": peak_rows, "steps": step_rows, "equal": equal_rows, "train": train_rows,
    "peers": peer_rows, "checkpointing": checkpointing_rows, "largest": largest_rows,
}  # fmt: skip


def why_not(mode: str) -> str:
    """Why this machine cannot have a mode of --fast; empty where it can."""
    try:
        fast.check_fast(mode, steps.alone().device, pretrain.Objectives().loss_names)
    except ValueError as error:
        return str(error)
    return ""


def parts_of(args: argparse.Namespace) -> list[str]:
    """Their names, kind/size/mode, those first that matter most."""
    first, last = args.sizes[0], args.sizes[-1]
    possible = [mode for mode in args.modes if not why_not(mode)] or ["none"]
    names = ["peak"] + [f"steps/{size}/{mode}" for size in args.sizes for mode in args.modes]
    names += [f"equal/{first}", f"train/{last}/{possible[-1]}", f"peers/{last}"]
    names += [f"checkpointing/{last}", f"largest/{last}/none"]
    names += [f"largest/{last}/compile"] * ("compile" in args.modes)
    return [name for name in names if name.split("/")[0] in args.parts]


def rows_of(part: str, args: argparse.Namespace) -> Iterator[Row]:
    """Run a part in this process."""
    kind, *of = part.split("/")
    torch.set_num_threads(args.threads)
    fast.choose_matmul("auto", steps.alone().device)
    try:
        yield from MAKERS[kind](args, *of)
    except Exception as error:  # outside of its cases
        yield {"failed": reason(error)}


def in_a_process(part: str, argv: list[str], limit_s: float) -> list[Row]:
    """Run a part in a process of its own, which ends after limit_s: what it found until then."""
    command = [sys.executable, __file__, *argv, "--part", part, "--limit-s", f"{limit_s:.0f}"]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)
        try:
            code, why = child.wait(limit_s), ""
        except subprocess.TimeoutExpired:
            code, why = -signal.SIGKILL, f"stopped after {limit_s:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # it, and what it started
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        out.seek(0), err.seek(0)
        lines, last_words = out.read().splitlines(), err.read().strip().splitlines()[-1:]
    rows = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    if code:
        why = why or f"ended with exit code {code}: {' '.join(last_words)}"[:200]
        rows.append({"failed": why})
    return rows


def run_parts(args: argparse.Namespace, argv: list[str]) -> dict[str, list[Row]]:
    """All rows by part, as far as --budget-s reaches; written and printed as they come."""
    deadline, found = time.perf_counter() + args.budget_s, {}
    most = MOST_S if torch.cuda.is_available() else MOST_S_ON_CPU
    for part in parts_of(args):
        began, least = time.perf_counter(), LEAST_S.get(part.split("/")[0], 30)
        left = deadline - began
        barred = why_not(part.split("/")[-1])
        if barred:
            found[part] = [{"failed": barred}]
        elif left < least:
            found[part] = [{"failed": f"skipped: {left:.0f} s left of --budget-s"}]
        elif args.here:
            found[part] = list(rows_of(part, args))
        else:
            found[part] = in_a_process(part, argv, min(most, left))
        took, failed = time.perf_counter() - began, [r for r in found[part] if "failed" in r]
        print(f"{part}: {len(found[part]) - len(failed)} measured, {took:.0f} s", flush=True)
        for row in failed:
            print(f"    {row.get('mode', '')} {row['failed']}", flush=True)
        add_mfu(found)
        write(args, found)
    return found


def add_mfu(found: dict[str, list[Row]]) -> None:
    """Put model FLOPs a second over the peak of the same dtype, where both were measured."""
    peaks = {row["dtype"]: row for row in found.get("peak", []) if "TFLOP/s" in row}
    for part, rows in found.items():
        for row in rows if part != "peak" else ():
            peak = peaks.get(row.get("dtype"))
            rate = row.get("TFLOP/s", row.get("TFLOP/s by our count"))
            if peak and rate:
                row["MFU"] = rate / peak["TFLOP/s"]
                stated = peak["datasheet"]
                row["of datasheet"] = rate / stated if isinstance(stated, float) else "not known"


def write(args: argparse.Namespace, found: dict[str, list[Row]]) -> None:
    """All figures so far."""
    figures = {"real_measurement": torch.cuda.is_available()}
    if not figures["real_measurement"]:
        figures["warning"] = NOT_REAL
    shape = {"frames": args.frames, "row_tokens": args.row_tokens, "padding": args.padding}
    timing.write_json(args.json, figures | {"shape": shape, "parts": found})


# ------------------------------------------------------------------------------------------- tables


def cut(row: Row) -> Row:
    """A row whose reason is short enough for a table; the line of its part had all of it."""
    return row | {"failed": str(row.get("failed", ""))[:60]}


def print_tables(found: dict[str, list[Row]]) -> None:
    """A table a kind of part; rows that failed say why."""
    kinds = itertools.groupby(found, key=lambda part: part.split("/")[0])
    for kind, its_parts in kinds:
        rows = []
        for part in its_parts:  # what failed as a whole has no size and mode of its own
            of = dict(zip(("size", "mode"), part.split("/")[1:]))
            rows += [of | row for row in found[part]]
        columns = list(dict.fromkeys(key for row in rows for key in row if key != "failed"))
        if any("failed" in row for row in rows):
            columns, rows = columns + ["failed"], [cut(row) for row in rows]
        print(f"\n{kind}\n")
        print(timing.table([{key: row.get(key, "") for key in columns} for row in rows]))
    if relative := ratios(found):
        print("\nspeed relative to eager, same size, dtype and dropout\n")
        print(timing.table(relative))


def ratios(found: dict[str, list[Row]]) -> list[Row]:
    """How many times as fast as eager each mode is."""
    rows = [r for part, its in found.items() if part.startswith("steps/") for r in its]
    rows, key = [r for r in rows if "ms" in r], ("size", "dtype", "dropout")
    eager = {tuple(r[k] for k in key): r["ms"] for r in rows if r["mode"] == "none"}
    out = []
    for row in rows:
        case = tuple(row[k] for k in key)
        if row["mode"] != "none" and case in eager:
            about = dict(zip(key, case)) | {"mode": row["mode"]}
            out.append(about | {"times as fast": eager[case] / row["ms"]})
    return out


# --------------------------------------------------------------------------------------------- main


def names(text: str) -> list[str]:
    """'a,b' -> ['a', 'b']."""
    return text.split(",")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; what is left open depends on whether there is a CUDA device."""
    parser = argparse.ArgumentParser(description="A whole pre-training step on an accelerator.")
    add, cuda = parser.add_argument, torch.cuda.is_available()
    add("--sizes", "--size", type=names, default=["base", "xl"] if cuda else ["tiny"])
    modes = ["none", "compile", "graph"]
    add("--modes", type=names, default=modes, help="of --fast (default: all)")
    add("--parts", type=names, default=list(MAKERS), help="default: all")
    add("--dtype", choices=("bf16", "fp32"), default="bf16" if cuda else "fp32")
    add("--rows", type=int, help="of speech and text; half as many pairs (default: the size's)")
    add("--frames", type=int, default=400 if cuda else 50, help="encoder frames of a row, 40 ms")
    add("--row-tokens", type=int, default=512 if cuda else 64, help="of a row of text")
    add("--padding", type=float, default=0.09, help="share (default %(default)s, as planned)")
    add("--peer-layers", type=int, default=6 if cuda else 2, help="of the encoders side by side")
    add("--equal-steps", type=int, default=20, help="steps beside eager (default %(default)s)")
    add("--rounds", type=int, default=10 if cuda else 2, help="timed (default %(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="of torch, on the host")
    budget = 500.0 if cuda else 160.0
    add("--budget-s", type=float, default=budget, help="seconds in all (default %(default)g)")
    add("--json", type=Path, help="also write all figures here, as JSON, after every part")
    add("--here", action="store_true", help="all parts in this process: nothing can be stopped")
    add("--part", help=argparse.SUPPRESS)
    add("--limit-s", type=float, default=MOST_S, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Prints the figures. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    unknown = [part for part in args.parts if part not in MAKERS]
    unknown += [size for size in args.sizes if size not in conformer.SIZES]
    if unknown:
        print(f"error: {unknown[0]}: unknown part or size", file=sys.stderr)
        return 2
    if args.part:
        for row in rows_of(args.part, args):
            print(json.dumps(row), flush=True)
        return 0
    real = torch.cuda.is_available()
    print("A whole pre-training step on this accelerator" if real else NOT_REAL)
    about = ", ".join(f"{key} {value}" for key, value in timing.machine().items())
    print(about, flush=True)
    print(FORMULA, flush=True)
    found = run_parts(args, argv)
    print_tables(found)
    if not real:
        print(f"\n{NOT_REAL}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
