"""Plumbing that every entry point shares.

Ranks, randomness, schedule, optimiser, the step loop, checkpoints, logs.

No objective and no data format lives here. A model is anything whose `forward(batch)` returns
{name: Loss} and statistics, and whose `counts(batch)` says beforehand what each loss is divided by.

One optimiser step is A micro-batches (`--micro-batches`), numbered k = 0..A-1 over all ranks. Rank
r of W runs k = r, r+W, ...; a single process runs them all. So W ranks and one process with the
same A do the same step.

Public: Ranks, setup_ranks, seed_micro_batch, inverse_sqrt, Rate, make_optimizer, set_rates,
        load_optimizer, loss_scales, TensorBatch, RowFault, BadRows, train, evaluate_sums, means,
        save_checkpoint, find_checkpoint, find_weights, load_checkpoint, load_checkpoint_of,
        MetricsLog, check_alarms, follow, run_entry_point, find_start, check_same_run, speed,
        make_fast, StopSignal, add_arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import fast

CODEBOOK_ALARM = 0.05  # of V: a hard perplexity below this share is called a collapse
DATA_WAIT_ALARM = 0.2  # of the step's time
CHANCE_ALARM = 0.01  # a loss within this share of its chance level has learned nothing

# ----------------------------------------------------------------------------- ranks and randomness


@dataclass(frozen=True)
class Ranks:
    """Who this process is among the W that torchrun started; (0, 0, 1) when started alone."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    def log(self, message: str) -> None:
        """Print on rank 0, above the progress bar if there is one."""
        if self.rank == 0:
            tqdm.write(message)
            sys.stdout.flush()

    def sum(self, values: Tensor) -> Tensor:
        """All-reduce in place: the sum over ranks."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def union(self, own: dict[str, Any]) -> dict[str, Any]:
        """The items of all ranks' dicts of small plain values."""
        every = [own] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(every, own)
        return {key: value for each in every for key, value in each.items()}

    def wait(self) -> None:
        """A barrier, when there is anybody to wait for."""
        if self.world_size > 1:
            dist.barrier()


def setup_ranks() -> Ranks:
    """Join torchrun's process group (NCCL on CUDA, gloo on CPU), or run alone without RANK."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return Ranks(0, 0, 1, device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(dist.get_rank(), local_rank, dist.get_world_size(), device)


def leave_ranks(ranks: Ranks) -> None:
    """Leave the process group, if there is one.

    A thread of gloo's that still has to let go of a tensor when Python ends aborts the process. So
    the model's wrapper, which holds the group, is collected first (its threads then end with the
    group), and where a traceback holds it, the threads get a moment.
    """
    if ranks.world_size > 1:
        gc.collect()
        dist.destroy_process_group()
        time.sleep(0.1)


def seed_micro_batch(seed: int, step: int, k: int) -> None:
    """Set torch's global seed from (seed, step, k).

    Dropout, Gumbel noise, mask fill and negatives follow from it. So no generator state is ever
    saved, and a micro-batch draws the same numbers on whichever rank it runs.
    """
    state = np.random.SeedSequence([seed, step, k]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> 1))


# ---------------------------------------------------------------------------------------- optimiser


def inverse_sqrt(step: int, peak: float, warmup_steps: int) -> float:
    """Learning rate of a 0-based step, by the Transformer schedule (Vaswani et al. 2017, 5.3).

    Linear warm-up to `peak`, then peak x sqrt(warmup / step).
    """
    step += 1
    warmup_steps = max(warmup_steps, 1)
    return peak * min(step / warmup_steps, math.sqrt(warmup_steps / step))


class Rate(NamedTuple):
    """The learning rate of a part of the model."""

    scale: float = 1.0  # peak relative to --lr
    warmup_steps: int | None = None  # None: --warmup-steps
    peak: float | None = None  # a peak of its own, whatever --lr is
    name: str | None = None  # the log has it as lr/name


def make_optimizer(
    model: nn.Module, weight_decay: float, rates: dict[str, Rate] | None = None
) -> torch.optim.AdamW:
    """AdamW with decay on matrices only: biases, norms and scalars have one dimension.

    UNSPECIFIED IN PAPER: betas and eps, here those of the Conformer paper (section 3.2).

    Args: rates {prefix of parameter names: Rate}; other parameters have Rate(). With Adam this is
          what scaling a gradient would be with SGD: Adam divides a constant factor out again.
    """
    groups: dict[tuple[Rate, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        of_part = (rate for prefix, rate in (rates or {}).items() if name.startswith(prefix))
        decay = weight_decay if parameter.dim() >= 2 else 0.0
        groups.setdefault((next(of_part, Rate()), decay), []).append(parameter)
    options = [
        {"params": parameters, "weight_decay": decay} | rate._asdict()
        for (rate, decay), parameters in groups.items()
    ]
    return torch.optim.AdamW(options, lr=0.0, betas=(0.9, 0.98), eps=1e-9, fused=True)


def set_rates(
    optimizer: torch.optim.Optimizer, step: int, args: argparse.Namespace
) -> dict[str, float]:
    """Set the learning rate of every group for a step -> those to be logged: lr, and lr/name."""
    logged = {"lr": inverse_sqrt(step, args.lr, args.warmup_steps)}
    for group in optimizer.param_groups:
        peak, warmup_steps = group["peak"], group["warmup_steps"]
        peak = args.lr * group["scale"] if peak is None else peak
        warmup_steps = args.warmup_steps if warmup_steps is None else warmup_steps
        group["lr"] = inverse_sqrt(step, peak, warmup_steps)
        if group["name"]:
            logged[f"lr/{group['name']}"] = group["lr"]
    return logged


def load_optimizer(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Take the moments of a checkpoint; rates and decay stay what the command line says now."""
    now = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(stored)
    for group, its in zip(optimizer.param_groups, now, strict=True):
        group.update(its)


def optimizer_step(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], max_norm: float
) -> tuple[Tensor, Tensor]:
    """Clip to `max_norm` and step, unless a gradient is not finite.

    The decision is made on the device by the fused optimiser (`found_inf`, as torch.amp.GradScaler
    uses it): moments and weights stay as they were, and the host never waits. Gradients are already
    summed over ranks, so all ranks decide alike.

    Returns: (gradient norm before clipping (), 1.0 if the step was skipped else 0.0 ()).
    """
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    skipped = (~torch.isfinite(norm)).to(torch.float32)
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    optimizer.found_inf = skipped
    optimizer.step()
    return norm, skipped


def loss_scales(
    counts: dict[str, Tensor], weights: dict[str, float], world_size: int
) -> dict[str, Tensor]:
    """What each loss *sum* is multiplied by before backward.

    scale = weight x W / (count over all ranks and micro-batches). Gradients of micro-batches add up
    and DDP averages over the W ranks, so this is the gradient of the mean over the whole step's
    positions, however unevenly they fell.
    """
    return {
        name: weights.get(name, 1.0) * world_size / count.clamp(min=1)
        for name, count in counts.items()
    }


# ----------------------------------------------------------------------------------------- the loop


class TensorBatch:
    """What every batch can do: move all its tensors. A dataclass of tensors derives from this."""

    def _map(self, change: Callable[[Any], Any]) -> Any:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed = {k: change(v) for k, v in values.items() if isinstance(v, (Tensor, TensorBatch))}
        return dataclasses.replace(self, **changed)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Any:
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Any:
        return self._map(lambda value: value.pin_memory())

    def clone(self) -> Any:
        return self._map(lambda value: value.clone())

    def tensors(self) -> Iterator[Tensor]:
        """All tensors, in a fixed order."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (Tensor, TensorBatch)):
                yield from [value] if isinstance(value, Tensor) else value.tensors()


class RowFault(NamedTuple):
    """A row of training data that could not be read; another took its place."""

    stream: str  # one of the dataset's audio_rows
    where: str  # file and line
    reason: str  # the same of all rows with the same fault
    message: str  # one line that names the file


class BadRows:
    """All rows of a run that could not be read: named once, and not to be too many.

    Which rows those are is agreed on by all ranks when they log, so that they all go on or all
    stop. Rows are counted, not readings: the share is of the rows there are.

    Args: audio_rows  number of rows of each stream, {} where none can be unreadable.
          max_share   of a stream's rows.
          record      a JSON file that rank 0 keeps of them: [step, *RowFault] of each. So a run
                      that resumes knows them. It goes when there are too many: they will be mended.
    """

    def __init__(
        self, audio_rows: dict[str, int], max_share: float, record: Path | None = None
    ) -> None:
        self.audio_rows, self.max_share, self.record = audio_rows, max_share, record
        self._new: dict[tuple[str, str], RowFault] = {}
        self.known: dict[tuple[str, str], RowFault] = {}
        self._steps: dict[tuple[str, str], int] = {}  # when each was named
        self._to_sum_up: set[str] = set()  # streams that had something new since agree()

    def resume(self, ranks: Ranks, start_step: int) -> None:
        """Take up what the record has from before start_step; the rest will be met again.

        To be called on all ranks. A record that cannot be read costs only that rows are named anew.
        """
        kept: dict[tuple[str, str], list] = {}
        if self.record and ranks.rank == 0:
            with contextlib.suppress(OSError, ValueError, TypeError):
                entries = json.loads(self.record.read_text(encoding="utf-8"))
                kept = {(its[1], its[2]): its for its in entries if its[0] <= start_step}
        for key, (step, *fault) in ranks.union(kept).items():
            if key[0] in self.audio_rows:
                self.known[key], self._steps[key] = RowFault(*fault), step
        self._write(ranks)

    def _write(self, ranks: Ranks) -> None:
        if self.record and ranks.rank == 0 and (self.known or self.record.exists()):
            text = json.dumps(
                [[self._steps[key], *self.known[key]] for key in self.known], indent=0
            )
            write_atomically(self.record, lambda file: file.write(text.encode()))

    def watch(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches; what could not be read for them is noted."""
        for batch in batches:
            for fault in getattr(batch, "faults", None) or ():
                self._new.setdefault((fault.stream, fault.where), fault)
            yield batch

    def name(self, ranks: Ranks, step: int) -> None:
        """Share with all ranks what is new after so many steps, and print it.

        To be called on all ranks.
        """
        if not self.audio_rows:
            return
        found = {key: fault for key, fault in self._new.items() if key not in self.known}
        new = [fault for key, fault in ranks.union(found).items() if key not in self.known]
        named = {fault.where for fault in self.known.values()}
        for fault in sorted(new):
            if fault.where not in named:
                ranks.log(f"cannot be read, another row is used: {fault.message}")
            named.add(fault.where)
            self.known[fault.stream, fault.where] = fault
            self._steps[fault.stream, fault.where] = step
        self._new = {}
        self._to_sum_up |= {fault.stream for fault in new}
        if new:
            self._write(ranks)

    def agree(self, ranks: Ranks, step: int) -> None:
        """Name what is new, and stop if it is too much. To be called on all ranks.

        Raises: ValueError on all ranks where a stream has too many of them.
        """
        self.name(ranks, step)
        streams, self._to_sum_up = sorted(self._to_sum_up), set()
        for stream in streams:
            summary, share = self.summary(stream)
            ranks.log(summary)
            if share > self.max_share:
                if self.record and ranks.rank == 0:
                    self.record.unlink(missing_ok=True)
                raise ValueError(
                    f"{summary}, above --max-bad-share {self.max_share:g}: mend them, take them "
                    "out (data.py check --read --out), or raise it"
                )

    def summary(self, stream: str) -> tuple[str, float]:
        """What is known of a stream in one line, and the share of its rows that are bad."""
        reasons = Counter(fault.reason for fault in self.known.values() if fault.stream == stream)
        n_bad, n_rows = reasons.total(), self.audio_rows[stream]
        counted = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
        about = f"{stream}: {n_bad} of {n_rows} rows cannot be read ({100 * n_bad / n_rows:.2g}%)"
        return f"{about}: {counted}", n_bad / n_rows


class StopSignal:
    """SIGTERM and SIGINT ask for a stop at the next step boundary.

    A second SIGINT interrupts at once.
    """

    def __init__(self) -> None:
        self.received = 0
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = number


def leave_signals_to_the_loop(worker: int) -> None:
    """In a loader process: a terminal signals the whole group, but only the loop may stop a run."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Sums:
    """Running sums of losses and statistics since the last log line, kept on the device."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def add(self, losses: dict[str, Any], statistics: dict[str, Tensor]) -> None:
        """Add one micro-batch: {name: Loss} and {name: tensor that adds up}."""
        for name, loss in losses.items():
            for field, value in zip(loss._fields, loss):
                if value is not None:
                    self._add(f"{field}/{name}", value)
        for name, value in statistics.items():
            self._add(name, value)

    def _add(self, key: str, value: Tensor) -> None:
        value = value.detach().to(torch.float64, copy=True)  # a replay may write over it
        self.values[key] = self.values[key] + value if key in self.values else value

    def reduced(self, ranks: Ranks) -> dict[str, Tensor]:
        """Summed over ranks, on the CPU, with one all-reduce.

        A rank that added nothing under a key counts as zero.
        """
        shapes = {key: tuple(value.shape) for key, value in self.values.items()}
        shapes = ranks.union(shapes)
        if not shapes:
            return {}
        keys = sorted(shapes)
        zero = torch.zeros((), dtype=torch.float64, device=ranks.device)
        own = [self.values.get(key, zero.expand(shapes[key])).reshape(-1) for key in keys]
        flat = ranks.sum(torch.cat(own)).cpu()
        parts = flat.split([math.prod(shapes[key]) for key in keys])
        return {key: part.view(shapes[key]) for key, part in zip(keys, parts)}


def means(sums: dict[str, Tensor]) -> dict[str, float]:
    """Sums -> what is logged.

    loss/x, acc/x, chance/x (accuracy of a blind guess), chance_loss/x, count/x, ppl/code... A loss
    whose count is 0 is left out: there is no number to print.
    """
    labels = {
        "sum": "loss",
        "correct": "acc",
        "blind_correct": "chance",
        "blind_sum": "chance_loss",
    }
    out: dict[str, float] = {}
    for key in [k for k in sums if k.startswith("count/")]:
        name, count = key[len("count/") :], float(sums[key])
        out[key] = count
        if count == 0:
            continue
        for field, label in labels.items():
            if f"{field}/{name}" in sums:
                out[f"{label}/{name}"] = float(sums[f"{field}/{name}"]) / count
        if f"answers/{name}" in sums:  # always the most frequent one; their entropy
            share, entropy = _frequencies(sums[f"answers/{name}"])
            out[f"chance/{name}"] = float(share.amax(-1).mean())
            out[f"chance_loss/{name}"] = float(entropy.sum())
    if "code_counts" in sums:
        share, entropy = _frequencies(sums["code_counts"])
        out["ppl/code"] = float(entropy.exp().mean())
        out["codes_used"] = float((share > 0).double().mean())
    if "soft_perplexity" in sums:
        out["ppl/code_soft"] = float(sums["soft_perplexity"] / sums["soft_perplexity_n"])
    return out


def _frequencies(counts: Tensor) -> tuple[Tensor, Tensor]:
    """(G, V) counts -> each entry's share of its group (G, V), and the groups' entropies (G,)."""
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return share, -torch.xlogy(share, share).sum(-1)


def train(
    model: nn.Module,
    micro_batches: Iterator[Any],
    args: argparse.Namespace,
    ranks: Ranks,
    start_step: int,
    *,
    optimizer: torch.optim.Optimizer,
    on_log: Callable[[int, dict[str, float]], None],
    on_save: Callable[[int], None],
    on_eval: Callable[[int], bool] | None = None,
) -> int:
    """The loop: from `start_step` to args.max_steps, one optimiser step at a time.

    Args:    model          forward(batch) -> ({name: Loss}, {name: Tensor}); `counts(batch)` ->
                            {name: number} in the order of `loss_names`; `work(batch)` -> {unit:
                            number}, what is processed; `step_done()`, called after each step.
             micro_batches  this rank's batches in plan order: A/W of them a step.
             on_log(step, metrics), on_save(step), on_eval(step): called on every rank, after the
                            step. The last one may answer True, on all ranks alike: enough.
    Returns: 0 at the end, or the number of the signal that stopped it (on_save has been called).
    Raises:  FloatingPointError after args.max_bad_steps steps in a row with non-finite gradients,
             on all ranks alike.
    """
    stop, parameters = StopSignal(), [p for p in model.parameters() if p.requires_grad]
    where = (model, ranks.device, args.dtype, ranks.world_size, args.reduce_dtype)
    micro_step = fast.make_micro_step(args.fast, *where)
    peak_flops = ranks.world_size * fast.matmul_flops(ranks.device, args.dtype)
    local = range(ranks.rank, args.micro_batches, ranks.world_size)
    sums, window_start, window_steps, data_wait = Sums(), time.perf_counter(), 0, 0.0
    work: Counter[str] = Counter()  # of the steps since the last log line
    bad_steps = skipped_total = torch.zeros((), device=ranks.device)
    model.train()
    for step in range(start_step, args.max_steps):
        began = time.perf_counter()
        batches = [next(micro_batches) for _ in local]
        data_wait += time.perf_counter() - began

        # One small all-reduce: the step's loss counts and whether anybody was told to stop.
        own = [sum(counts) for counts in zip(*(model.counts(batch).values() for batch in batches))]
        own.append(float(bool(stop.received)))
        total = ranks.sum(torch.tensor(own, dtype=torch.float64, device=ranks.device)).tolist()
        if total[-1]:
            on_save(step)
            advice = "the same command goes on from there"
            ranks.log(f"stopped by a signal: {step} steps are saved, {advice}")
            return stop.received or signal.SIGTERM  # another rank's, if not this one's
        counts = {
            n: torch.tensor(c, dtype=torch.float64, device=ranks.device)
            for n, c in zip(model.loss_names, total)
        }
        scales = loss_scales(counts, args.loss_weights, ranks.world_size)

        rates = set_rates(optimizer, step, args)
        for k, batch in zip(local, batches):
            work.update(model.work(batch))
            seed_micro_batch(args.seed, step, k)
            sums.add(*micro_step(batch, scales, last=k == local[-1]))
        micro_step.reduce()
        grad_norm, skipped = optimizer_step(optimizer, parameters, args.grad_clip)
        micro_step.zero_grad(optimizer)
        model.step_done()
        bad_steps, skipped_total = (bad_steps + 1) * skipped, skipped_total + skipped
        window_steps += 1

        done = step + 1
        if done % args.log_every == 0 or done == args.max_steps:
            metrics = means(sums.reduced(ranks))
            elapsed = time.perf_counter() - window_start
            weight = {name: args.loss_weights.get(name, 1.0) for name in model.loss_names}
            metrics["loss"] = sum(w * metrics.get(f"loss/{n}", 0.0) for n, w in weight.items())
            metrics |= rates | {"grad_norm": float(grad_norm)}
            metrics["skipped_steps"] = float(skipped_total)
            metrics["step_ms"] = 1e3 * elapsed / window_steps
            metrics["data_wait_ms"] = 1e3 * data_wait / window_steps
            metrics |= speed(work, elapsed, peak_flops, ranks)
            on_log(done, metrics)
            if float(bad_steps) >= args.max_bad_steps:
                raise FloatingPointError(
                    f"gradients were not finite for {int(bad_steps)} steps in a row "
                    f"up to step {done}: lower --lr, or try --dtype fp32; "
                    "the last checkpoint is from before"
                )
            sums, work, window_steps, data_wait = Sums(), Counter(), 0, 0.0
        if done % args.save_every == 0 or done == args.max_steps:
            on_save(done)
        due = done == args.max_steps or (args.eval_every and done % args.eval_every == 0)
        if on_eval is not None and due:
            enough = on_eval(done)
            model.train()
            if enough:
                on_save(done)
                return 0
        if window_steps == 0:
            window_start = time.perf_counter()  # evaluation and saving are not part of step_ms
    return 0


def speed(
    work: dict[str, float], seconds: float, peak_flops: float, ranks: Ranks
) -> dict[str, float]:
    """What is logged of a run's speed: audio_s_per_s, tokens_per_s, mfu, peak_mib, compilations.

    MFU, model FLOP utilisation, is the operations that the model needs on what is not padding, per
    second, over those of the best matrix product that this device makes (measured when the run
    started, in its dtype). Needed is what the definition of the model says: 3 times the forward
    pass (conformer.block_flops and the heads), whether or not something is computed twice.

    Args: work  of this rank, in `seconds`; all ranks have the same units.
    """
    units = sorted(work)
    done = torch.tensor([work[u] for u in units], dtype=torch.float64, device=ranks.device)
    rates = {u: amount / seconds for u, amount in zip(units, ranks.sum(done).tolist())}
    out = {"mfu": rates.pop("flops") / peak_flops} if "flops" in rates else {}
    out |= {f"{unit}_per_s": rate for unit, rate in rates.items()}
    out["peak_mib"] = fast.peak_memory_mib(ranks.device)
    return out | {"compilations": float(fast.compilations())}


@torch.no_grad()
def evaluate_sums(
    model: nn.Module, batches: Sequence[Any], args: argparse.Namespace, ranks: Ranks
) -> dict[str, Tensor]:
    """Sums of every loss over held-out batches, in eval mode.

    Batch i is read and run by rank i mod W, so nothing counts twice.
    """
    model.eval()
    sums = Sums()
    for i in range(ranks.rank, len(batches), ranks.world_size):
        seed_micro_batch(args.seed, 0, i)
        with fast.autocast(ranks.device, args.dtype):
            sums.add(*model(batches[i].to(ranks.device)))
    return sums.reduced(ranks)


# -------------------------------------------------------------------------------------- checkpoints


def find_checkpoint(path: Path) -> Path:
    """A .pt file as it is, or a run's folder -> the file that its ckpt/latest names.

    Raises: FileNotFoundError when there is neither.
    """
    if path.is_file():
        return path
    latest = path / "ckpt" / "latest"
    if not latest.exists():
        raise FileNotFoundError(
            f"{path}: neither a checkpoint file nor a run's folder with ckpt/latest"
        )
    return latest.parent / latest.read_text().strip()


def find_weights(path: Path) -> Path:
    """As find_checkpoint, but of a fine-tuning run's folder the best: its last may be worse."""
    best = path / "ckpt" / "best.pt"
    return best if best.exists() else find_checkpoint(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Tensors and plain containers on the CPU; nothing in the file is ever run.

    Raises: ValueError, FileNotFoundError.
    """
    path = find_checkpoint(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # of many kinds; each means that this is no checkpoint of ours
        raise ValueError(
            f"{path}: cannot be read as a checkpoint ({type(error).__name__}); is the file whole?"
        ) from error


def load_checkpoint_of(makers: tuple[str, ...], path: Path) -> dict[str, Any]:
    """As load_checkpoint, of a file that one of these entry points has written.

    Raises: also ValueError where another one has, or none of ours.
    """
    checkpoint = load_checkpoint(path)
    made_by = checkpoint.get("entry_point") if isinstance(checkpoint, dict) else None
    if made_by not in makers:
        found = f"one of {made_by}" if made_by else "nothing of ours"
        raise ValueError(f"{path}: is not a checkpoint of {' or '.join(makers)} but {found}")
    return checkpoint


def write_atomically(path: Path, write: Callable[[Any], object]) -> None:
    """Write a binary file so that its name holds all of it or what it held before, never half.

    A temporary sibling is written, flushed to the disk and renamed; a failed write leaves nothing
    behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(
    out_dir: Path, step: int, contents: dict[str, Any], keep_last: int, keep_every: int = 0
) -> Path:
    """Write ckpt/step_0001000.pt and point ckpt/latest at it.

    Kept are the newest `keep_last` and, unless it is 0, those of every `keep_every` steps.
    """
    path = out_dir / "ckpt" / f"step_{step:07d}.pt"
    contents = contents | {"step": step, "versions": versions()}
    write_atomically(path, lambda file: torch.save(contents, file))
    write_atomically(path.parent / "latest", lambda file: file.write(path.name.encode()))
    for leftover in path.parent.glob("*.tmp"):  # of a save that was killed
        leftover.unlink()
    for old in sorted(path.parent.glob("step_*.pt"))[:-keep_last]:
        milestone = keep_every and int(old.stem.removeprefix("step_")) % keep_every == 0
        if old != path and not milestone:
            old.unlink()
    return path


def versions() -> dict[str, str]:
    """What a run should remember about the software it ran on."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git on this machine
        git = ""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # its own class, which weights_only would refuse
        "numpy": np.__version__,
        "git": git or "unknown",
    }


# ---------------------------------------------------------------------------------- logs and alarms


class MetricsLog:
    """metrics.jsonl: one object a line, appended.

    On resume, lines after the resumed step are dropped first.
    """

    def __init__(self, out_dir: Path, resumed_step: int) -> None:
        self.path = out_dir / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= resumed_step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_atomically(self.path, lambda file: file.write(text.encode()))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Numbers that are not finite become null, so that every line is JSON."""
        row = {"step": step} | {k: (v if math.isfinite(v) else None) for k, v in metrics.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows of a metrics.jsonl; a last line that was cut short by a crash is ignored."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


def progress_bar(max_steps: int, start_step: int, ranks: Ranks) -> Callable[[int, str], None]:
    """How a log line is shown: above a bar on a terminal, as a plain line otherwise."""
    if not sys.stderr.isatty():
        return lambda step, line: ranks.log(line)
    hidden = ranks.rank != 0
    bar = tqdm(total=max_steps, initial=start_step, unit="step", disable=hidden, dynamic_ncols=True)

    def show(step: int, line: str) -> None:
        bar.update(step - bar.n)
        ranks.log(line)
        if step == max_steps:
            bar.close()

    return show


def progress_line(
    step: int, args: argparse.Namespace, metrics: dict[str, float], loss_names: list[str]
) -> str:
    """One plain line: each loss with its accuracy, codes, rate, speed."""
    parts = [f"step {step:>5}/{args.max_steps}"]
    for name in loss_names:
        if f"loss/{name}" in metrics:
            accuracy = f" ({100 * metrics[f'acc/{name}']:.1f}%)" if f"acc/{name}" in metrics else ""
            parts.append(f"{name} {metrics[f'loss/{name}']:.3f}{accuracy}")
    if "ppl/code" in metrics:
        parts.append(f"ppl {metrics['ppl/code']:.0f}")
    parts.append(f"lr {metrics['lr']:.1e}")
    parts += [f"grad {metrics['grad_norm']:.2f}", f"{metrics['step_ms']:.0f} ms"]
    return "  ".join(parts)


def summary_table(metrics: dict[str, float], names: Iterable[str]) -> str:
    """Objective, loss against its chance level, accuracy against that of a blind guess.

    The last line is the share of codes in use.
    """
    lines = [f"  {'objective':<24}{'loss':>9}{'chance':>9}{'accuracy':>11}{'chance':>9}"]

    def cell(key: str, percent: bool, width: int) -> str:
        value = metrics.get(key)
        text = "" if value is None else (f"{100 * value:.2f}%" if percent else f"{value:.3f}")
        return f"{text:>{width}}"

    for name in names:
        if f"loss/{name}" in metrics or f"acc/{name}" in metrics:
            cells = [cell(f"loss/{name}", False, 9), cell(f"chance_loss/{name}", False, 9)]
            cells += [cell(f"acc/{name}", True, 11), cell(f"chance/{name}", True, 9)]
            lines.append(f"  {name:<24}" + "".join(cells))
    if "codes_used" in metrics:
        used = f"{100 * metrics['codes_used']:.1f}%"
        lines.append(f"  codes in use {used}, perplexity {metrics['ppl/code']:.1f}")
    return "\n".join(lines)


def draw_curves(out_dir: Path, loss_names: list[str]) -> Path:
    """curves.png from metrics.jsonl, a panel an objective.

    Training and held-out loss against the chance level.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(out_dir / "metrics.jsonl")
    panels = [name for name in loss_names if any(f"loss/{name}" in row for row in rows)]
    panels += ["ppl/code"] if any("ppl/code" in row for row in rows) else []
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    size = (3.4 * columns, 2.6 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False)
    for axis, name in zip(axes.flat, panels):
        keys = [("ppl/code" if name == "ppl/code" else f"loss/{name}", "train", "C0-")]
        if name != "ppl/code":
            keys.append((f"chance_loss/{name}", "chance", "C1:"))
            keys.append((f"dev/loss/{name}", "held out", "C2o"))
        for key, label, style in keys:
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                axis.plot(*zip(*points), style, label=label, markersize=3)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out_dir / "curves.png", dpi=120)
    plt.close(figure)
    return out_dir / "curves.png"


def check_alarms(
    metrics: dict[str, float], step: int, warmup_steps: int, n_codes: int | None
) -> dict[str, str]:
    """What is going wrong with a run: {short name: sentence for the log}; empty if nothing is."""
    alarms = {}
    for name, value in metrics.items():
        if name.startswith("loss") and not math.isfinite(value):
            alarms[f"not finite {name}"] = f"{name} is not finite"
    if metrics.get("skipped_steps", 0) > 0:
        n_skipped = int(metrics["skipped_steps"])
        alarms[f"skipped {n_skipped}"] = (
            f"{n_skipped} steps skipped so far: their gradients were not finite"
        )
    if step > warmup_steps:
        for name in [k[len("chance_loss/") :] for k in metrics if k.startswith("chance_loss/")]:
            loss, chance = metrics[f"loss/{name}"], metrics[f"chance_loss/{name}"]
            if chance > 0 and loss > (1 - CHANCE_ALARM) * chance:
                alarms[f"chance {name}"] = (
                    f"loss/{name} {loss:.3f} is at its chance level {chance:.3f} after warm-up"
                )
    if n_codes and metrics.get("ppl/code", n_codes) < CODEBOOK_ALARM * n_codes:
        alarms["collapse"] = (
            f"codebook collapse: perplexity {metrics['ppl/code']:.1f} of {n_codes} codes"
        )
    if metrics.get("data_wait_ms", 0) > DATA_WAIT_ALARM * metrics.get("step_ms", math.inf):
        wait, whole = metrics["data_wait_ms"], metrics["step_ms"]
        alarms["data"] = f"{wait:.0f} of {whole:.0f} ms a step wait for data: raise --num-workers"
    return alarms


# ---------------------------------------------------------------------- a run and what it leaves


class Evaluation(NamedTuple):
    """What a held-out pass found."""

    metrics: dict[str, float]
    table: str  # for the reader
    enough: bool = False  # training may end here


def follow(
    model: nn.Module,
    dataset: Dataset,
    args: argparse.Namespace,
    ranks: Ranks,
    start_step: int,
    *,
    optimizer: torch.optim.Optimizer,
    about: dict[str, Any],
    save: Callable[[int], None],
    evaluate: Callable[[int], Evaluation] | None,
    evaluate_first: bool = False,
) -> int:
    """Train, and log, evaluate and save on the way: all that a run leaves in its folder.

    Args:    dataset       item (step, k) is micro-batch k of optimiser step `step`. Rows that could
                           not be read are in its `faults`, and of how many in `audio_rows`, if any.
             about         goes into config.json, beside the command line.
             save(step)    writes a checkpoint; evaluate(step) is called on all ranks.
             evaluate_first  evaluate start_step before going on: the run was killed there.
    Returns: 0, or the number of the signal that stopped it.
    Raises:  ValueError for more unreadable rows than --max-bad-share.
    """
    log = None
    if ranks.rank == 0:
        args.out_dir.mkdir(parents=True, exist_ok=True)
        plain = {k: (str(v) if isinstance(v, Path) else v) for k, v in vars(args).items()}
        about = {"argv": sys.argv, "args": plain, "versions": versions()} | about
        (args.out_dir / "config.json").write_text(json.dumps(about, indent=2) + "\n")
        log = MetricsLog(args.out_dir, start_step)
    show = progress_bar(args.max_steps, start_step, ranks)
    n_codes = model.config.n_codes if hasattr(model, "quantizer") else None
    ringing: set[str] = set()

    record = args.out_dir / "bad_rows.json"
    bad_rows = BadRows(getattr(dataset, "audio_rows", {}), args.max_bad_share, record)
    bad_rows.resume(ranks, start_step)

    def on_log(step: int, metrics: dict[str, float]) -> None:
        bad_rows.agree(ranks, step)
        if ranks.rank == 0:
            log.write(step, metrics)
            show(step, progress_line(step, args, metrics, model.loss_names))
            alarms = check_alarms(metrics, step, args.warmup_steps, n_codes)
            for name in alarms.keys() - ringing:  # once, until it has been silent for a log line
                ranks.log(f"ALARM step {step}: {alarms[name]}")
            ringing.clear()
            ringing.update(alarms)

    def on_save(step: int) -> None:
        bad_rows.name(ranks, step)  # a run that resumes from here does not meet them again
        save(step)

    def on_eval(step: int) -> bool:
        with fast.uncompiled(args.fast):
            found = evaluate(step)
        if ranks.rank == 0:
            log.write(step, {f"dev/{k}": v for k, v in found.metrics.items()})
            ranks.log(f"held out, step {step}\n{found.table}")
        return found.enough

    if evaluate_first:
        on_eval(start_step)
    own = range(ranks.rank, args.micro_batches, ranks.world_size)
    order = ((step, k) for step in range(start_step, args.max_steps) for k in own)
    loader = DataLoader(
        dataset, batch_size=None, sampler=order, num_workers=args.num_workers,
        pin_memory=ranks.device.type == "cuda", worker_init_fn=leave_signals_to_the_loop,
    )  # fmt: skip
    stopped_by = train(
        model, bad_rows.watch(loader), args, ranks, start_step,
        optimizer=optimizer, on_log=on_log, on_save=on_save, on_eval=evaluate and on_eval,
    )  # fmt: skip
    if not stopped_by and ranks.rank == 0:
        ranks.log(f"curves: {draw_curves(args.out_dir, model.loss_names)}")
    return stopped_by


def run_entry_point(run: Callable[[Ranks], int]) -> None:
    """Join the ranks, run, and turn a user's mistake into one line and exit code 2.

    Args: run  what an entry point does; returns 0, or the number of the signal that stopped it.
    """
    ranks = setup_ranks()
    try:
        if stopped_by := run(ranks):
            # As if the signal had ended it, so that scripts do not go on.
            raise SystemExit(128 + stopped_by)
    except (ValueError, OSError, FloatingPointError) as error:
        # An error of a loader process arrives with that process's traceback before the one line.
        last_line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        print(f"error: {last_line}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        leave_ranks(ranks)


def check_numbers(args: argparse.Namespace, **names: Iterable[str]) -> None:
    """Refuse numbers that cannot be: options `from_1`, `from_0`, `above_0`, `share`s or `part`s.

    Raises: ValueError naming the flag.
    """
    rules = {
        "from_1": (lambda value: value >= 1, "must be at least 1"),
        "from_0": (lambda value: value >= 0, "must not be negative"),
        "above_0": (lambda value: 0 < value < math.inf, "must be above 0"),
        "share": (lambda value: 0 < value < 1, "expected a share between 0 and 1"),
        "part": (lambda value: 0 <= value <= 1, "expected a share from 0 to 1"),
    }
    for rule, its_names in names.items():
        fits, expected = rules[rule]
        for name in its_names:
            value = getattr(args, name)
            if value is not None and not fits(value):
                raise ValueError(f"--{name.replace('_', '-')} {value}: {expected}")


def find_start(
    args: argparse.Namespace, entry_point: str, init_from: tuple[str, ...]
) -> tuple[dict[str, Any] | None, dict[str, Any] | None, Path | None]:
    """(checkpoint to resume, checkpoint to initialise from, its path).

    A run found in --out-dir wins over --resume and --init, so that the same command goes on. Only a
    run of the same entry point can be resumed.

    Raises: FileNotFoundError; ValueError for a checkpoint of another entry point than allowed.
    """
    resumed = args.out_dir if (args.out_dir / "ckpt" / "latest").exists() else args.resume
    path = resumed or args.init
    if path is None:
        return None, None, None
    if resumed:
        path = find_checkpoint(path)
        return load_checkpoint_of((entry_point,), path), None, path
    path = find_weights(path)
    return None, load_checkpoint_of(init_from, path), path


def resolve_micro_batches(
    args: argparse.Namespace, ranks: Ranks, checkpoint: dict[str, Any] | None
) -> None:
    """A: as given, else as the resumed run had it, else one a rank.

    It must be a multiple of the number of ranks.
    """
    stored = checkpoint["args"]["micro_batches"] if checkpoint else None
    args.micro_batches = args.micro_batches or stored or ranks.world_size
    if stored and stored != args.micro_batches:
        raise ValueError(
            f"--micro-batches {args.micro_batches}: the run to resume has {stored}, "
            "which its batch plan depends on"
        )
    if args.micro_batches % ranks.world_size:
        several = f"a multiple of the {ranks.world_size} ranks"
        raise ValueError(f"--micro-batches {args.micro_batches} must be {several}")


def check_same_run(
    stored: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]], path: Path
) -> list[str]:
    """Compare a checkpoint's run with this one.

    Returns: a sentence for each setting that was changed and may be.
    Raises:  ValueError for the first thing that differs and may not.
    """
    for name, value in now["same"].items():
        if stored["same"].get(name) != value:
            raise ValueError(
                f"{path}: cannot be resumed, {name} was {stored['same'].get(name)} and now is "
                f"{value}; repeat the old options, or start a new run with another --out-dir"
            )
    return [
        f"{name} was {stored['may change'].get(name)} until here and is {value} from now on"
        for name, value in now["may change"].items()
        if stored["may change"].get(name) != value
    ]


# -------------------------------------------------------------------------- fast path and arguments


def make_fast(model: nn.Module, args: argparse.Namespace, ranks: Ranks, stored: str | None) -> None:
    """Set up what --fast, --activation-checkpointing and --fp32-matmul say, before training.

    Args:   stored  the kind of matrix products that the resumed run had: its numbers go on.
    Raises: ValueError where this machine cannot.
    """
    recomputes = args.activation_checkpointing and any(
        isinstance(part, nn.Dropout) and part.p > 0 for part in model.modules()
    )
    fast.check_fast(args.fast, ranks.device, model.loss_names, recomputes)
    fast.compile_blocks(model, args.fast)
    fast.checkpoint_blocks(model, args.activation_checkpointing)
    if args.fp32_matmul == "auto" and stored:
        args.fp32_matmul = stored
    chosen, why = fast.choose_matmul(args.fp32_matmul, ranks.device)
    args.fp32_matmul = ranks.union({"chosen": chosen} if ranks.rank == 0 else {})["chosen"]
    torch.set_float32_matmul_precision(args.fp32_matmul)
    if why:
        ranks.log(why)


def parse_weights(text: str, known: Iterable[str]) -> dict[str, float]:
    """`name=w,name=w` -> {name: w}. Raises ValueError for a name that no loss of the run has."""
    weights, known = {}, list(known)
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            weights[name] = float(value)
            if not math.isfinite(weights[name]):
                raise ValueError
        except ValueError:
            raise ValueError(f"--loss-weights {part}: expected name=number") from None
        if name not in known:
            raise ValueError(
                f"--loss-weights {name}: this run has no such loss; it has {', '.join(known)}"
            )
    return weights


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """`auto` -> bf16 on CUDA, fp32 elsewhere."""
    return dtype if dtype != "auto" else ("bf16" if device.type == "cuda" else "fp32")


def resolve_log_mel(where: str, device: torch.device) -> str:
    """`auto` -> loader on a CPU, device elsewhere."""
    return where if where != "auto" else ("loader" if device.type == "cpu" else "device")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every training entry point has."""
    add = parser.add_argument_group("optimisation").add_argument
    add("--max-steps", type=int, help="optimiser steps in all (default: the size's)")
    add("--lr", type=float, help="peak learning rate (default: the size's)")
    add(
        "--warmup-steps", type=int, help="steps of linear warm-up to the peak (default: the size's)"
    )
    add(
        "--weight-decay",
        type=float,
        default=0.01,
        help="AdamW decay of matrices (default: %(default)s)",
    )
    add("--grad-clip", type=float, help="largest gradient norm (default: the size's)")
    add(
        "--micro-batches",
        type=int,
        help="micro-batches a step over all ranks (default: number of ranks)",
    )
    add("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    add = parser.add_argument_group("runtime").add_argument
    add(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp64"),
        default="auto",
        help="auto: bf16 on CUDA, else fp32",
    )
    add(
        "--fast",
        choices=("none", "compile", "graph"),
        default="none",
        help="fast path (default: %(default)s)",
    )
    add(
        "--activation-checkpointing",
        action="store_true",
        help="keep only what enters each block, and compute its inside again for the gradient",
    )
    add(
        "--fp32-matmul",
        choices=("auto", "highest", "high", "medium"),
        default="auto",
        help="torch.set_float32_matmul_precision; auto: on a CPU the faster of two exact ones, "
        "else highest",
    )
    add(
        "--reduce-dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="type in which gradients travel between ranks (default: %(default)s)",
    )
    add(
        "--log-mel",
        choices=("auto", "loader", "device"),
        default="auto",
        help="who makes log-mel of the audio (auto: the loader on a CPU, else the device)",
    )
    add("--num-workers", type=int, default=0, help="loader processes a rank (default: %(default)s)")
    add(
        "--max-bad-steps",
        type=int,
        default=20,
        help="non-finite steps in a row that end the run (%(default)s)",
    )
    add(
        "--max-bad-share",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of rows with unreadable audio that ends the run; fewer are replaced and named "
        "(default: %(default)s)",
    )
    add = parser.add_argument_group("output").add_argument
    add(
        "--save-every",
        type=int,
        default=1000,
        help="steps between checkpoints (default: %(default)s)",
    )
    add("--log-every", type=int, default=20, help="steps between log lines (default: %(default)s)")
    add(
        "--eval-every",
        type=int,
        help="steps between held-out evaluations, 0: only at the end "
        "(default: in pre-training 0, in fine-tuning a fifth of --max-steps)",
    )
    add("--keep-last", type=int, default=2, help="checkpoints kept on disk (default: %(default)s)")
    add(
        "--keep-every",
        type=int,
        default=0,
        help="also keep every checkpoint of a multiple of so many steps (0: none)",
    )
    add(
        "--init",
        type=Path,
        metavar="CHECKPOINT",
        help="start from these weights: a .pt file or a run's folder",
    )
    add(
        "--resume",
        type=Path,
        metavar="CHECKPOINT",
        help="go on from here; a run found in --out-dir goes on anyway",
    )
    add(
        "--dry-run",
        action="store_true",
        help="print parameters, chance levels and batch plan, then exit",
    )
