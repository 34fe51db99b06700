"""What the benchmarks of training share: synthetic batches, and a run's own optimiser steps.

Batches are made by data.py's own masks and classes, so shapes, masked positions and filler are a
run's; what they hold is noise. A step is what training.train does between two batches: schedule,
seed, forward and backward of each micro-batch, clipping, AdamW.
Letters: B rows, F log-mel frames (10 ms), T encoder frames (40 ms), U text tokens, D model width.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules

import conformer  # noqa: E402
import data  # noqa: E402
import pretrain  # noqa: E402
import training  # noqa: E402
from conformer import SlamConfig  # noqa: E402
from fast import make_micro_step  # noqa: E402

Lens = np.ndarray  # (B,) int64

# ---------------------------------------------------------------------------------------- batches


def lens_of(B: int, longest: int, padding: float) -> Lens:
    """(B,) lengths, evenly spaced up to `longest`, so that a share `padding` of B x longest is
    none of theirs. One row alone is the longest."""
    shares = np.linspace(1.0, 1.0 - 2 * padding, B)
    return np.maximum(2, np.rint(longest * shares)).astype(np.int64)


def speech_batch(
    B: int, frames: int, padding: float = 0.0, share: float = data.SPEECH_MASK, seed: int = 0
) -> data.SpeechBatch:
    """B rows of noise of up to `frames` log-mel frames, masked as speech is."""
    generator = torch.Generator().manual_seed(seed)
    lens = lens_of(B, frames, padding).tolist()
    features = [torch.randn(n, conformer.N_MELS, generator=generator) for n in lens]
    rngs = [data.row_rng(seed, 0, row, data.SPEECH_MASKING) for row in range(B)]
    return data._speech_batch(features, rngs, share, frames)


def _texts(B: int, tokens: int, vocab_size: int, padding: float, seed: int) -> list[np.ndarray]:
    """B rows of [CLS] and random tokens."""
    rng = np.random.default_rng([seed, B, tokens])
    rows = [rng.integers(data.N_SPECIAL, vocab_size, n) for n in lens_of(B, tokens, padding)]
    return [np.concatenate([[conformer.CLS_ID], row[1:]]) for row in rows]


def text_batch(
    B: int,
    tokens: int,
    vocab_size: int,
    padding: float = 0.0,
    share: float = data.TEXT_MASK,
    seed: int = 0,
) -> data.TextBatch:
    """B rows of up to `tokens` random tokens, masked as text is."""
    clean = _texts(B, tokens, vocab_size, padding, seed)
    rngs = [data.row_rng(seed, 0, row, data.TEXT_MASKING) for row in range(B)]
    return data._text_batch(clean, rngs, share, tokens, vocab_size)


def pair_batch(
    B: int, frames: int, tokens: int, vocab_size: int, padding: float = 0.0, seed: int = 0
) -> data.PairBatch:
    """B rows of noise with random transcripts, and as many foreign ones, masked as pairs are."""
    text = text_batch(B, tokens, vocab_size, padding, data.TLM_TEXT_MASK, seed + 1)
    foreign = text_batch(B, tokens, vocab_size, padding, data.TLM_TEXT_MASK, seed + 2)
    clean = (_texts(B, tokens, vocab_size, padding, seed + more) for more in (1, 2))
    clean, clean_foreign = (torch.from_numpy(data.padded(rows, tokens)) for rows in clean)
    speech = speech_batch(B, frames, padding, data.TLM_SPEECH_MASK, seed + 1)
    return data.PairBatch(speech, text, foreign.tokens, foreign.lens, clean, clean_foreign)


def joint_batch(
    rows: int, frames: int, row_tokens: int, vocab_size: int, padding: float, seed: int = 0
) -> data.Batch:
    """All three streams: `rows` rows of speech, as many of text, half as many pairs.

    A pair has a token for each 160 ms of speech, as English has with 32,000 pieces.
    """
    pairs = max(1, rows // 2), frames, max(4, frames // 16)
    return data.Batch(
        speech=speech_batch(rows, frames, padding, seed=seed),
        text=text_batch(rows, row_tokens, vocab_size, padding, seed=seed),
        pairs=pair_batch(*pairs, vocab_size, padding, seed=seed),
    )


# -------------------------------------------------------------------------------------------- steps


def alone() -> training.Ranks:
    """One process, on the CUDA device if there is one."""
    return training.Ranks(0, 0, 1, torch.device("cuda:0" if torch.cuda.is_available() else "cpu"))


def build(
    config: SlamConfig, objectives: pretrain.Objectives, device: torch.device, seed: int = 0
) -> pretrain.SlamPretraining:
    """A model made on its device, where a large one is made in no time."""
    torch.manual_seed(seed)
    with torch.device(device):
        return pretrain.SlamPretraining(config, objectives).to(device).train()


class Steps:
    """Optimiser steps of a model, as training.train does them.

    Args: model          on the device of `ranks`.
          dtype, fast    as the flags of a run.
          reduce_dtype   of gradients between ranks.
    """

    def __init__(
        self,
        model: pretrain.SlamPretraining,
        ranks: training.Ranks,
        *,
        dtype: str = "fp32",
        fast: str = "none",
        checkpointing: bool = False,
        reduce_dtype: str = "fp32",
    ) -> None:
        self.model, self.ranks, config = model, ranks, model.config
        args = argparse.Namespace(
            fast=fast, activation_checkpointing=checkpointing, fp32_matmul="auto"
        )
        training.make_fast(model, args, ranks, torch.get_float32_matmul_precision())
        self.micro_step = make_micro_step(
            fast, model, ranks.device, dtype, ranks.world_size, reduce_dtype
        )
        rates = dict.fromkeys(pretrain.TARGET_PARTS, training.Rate(config.target_lr_scale))
        self.optimizer = training.make_optimizer(model, 0.01, rates)
        self.rates = argparse.Namespace(lr=config.lr, warmup_steps=config.warmup_steps)
        self.parameters, self.number = list(model.parameters()), 0

    def scales(self, batches: list[data.Batch]) -> dict[str, Tensor]:
        """What the losses of this step's micro-batches are multiplied by."""
        own = [sum(c) for c in zip(*(self.model.counts(batch).values() for batch in batches))]
        counts = self.ranks.sum(torch.tensor(own, dtype=torch.float64, device=self.ranks.device))
        named = dict(zip(self.model.loss_names, counts))
        weights = {"diversity": pretrain.DIVERSITY_WEIGHT}
        return training.loss_scales(named, weights, self.ranks.world_size)

    def gradients(
        self, batches: list[data.Batch], scales: dict[str, Tensor], *, reduce: bool = True
    ) -> dict[str, Any]:
        """Forward and backward of micro-batches, their gradients added up -> the last's losses.

        Args: reduce  sum them over ranks at the last micro-batch; False leaves each its own.
        """
        for k, batch in enumerate(batches):
            training.seed_micro_batch(0, self.number, k * self.ranks.world_size + self.ranks.rank)
            losses, _ = self.micro_step(batch, scales, last=reduce and k == len(batches) - 1)
        if reduce:
            self.micro_step.reduce()
        return losses

    def zero_grad(self) -> None:
        """Forget the gradients, the way that the micro-step can bear."""
        self.micro_step.zero_grad(self.optimizer)

    def step(
        self, batches: list[data.Batch], scales: dict[str, Tensor], *, reduce: bool = True
    ) -> dict[str, Any]:
        """A whole optimiser step -> the last micro-batch's losses."""
        training.set_rates(self.optimizer, self.number, self.rates)
        losses = self.gradients(batches, scales, reduce=reduce)
        training.optimizer_step(self.optimizer, self.parameters, self.model.config.grad_clip)
        self.zero_grad()
        self.model.step_done()
        self.number += 1
        return losses


def train(flags: list[str], batch: data.Batch, ranks: training.Ranks) -> dict[str, float]:
    """training.train itself on one batch over and over -> its last log line.

    Args: flags  of pretrain.py, with --max-steps and --log-every; batch  of this rank.
    """
    args = pretrain.parse_arguments(flags)
    objectives, logged = pretrain.resolve(args, ranks), {}
    args.save_every = args.max_steps + 1
    model = build(conformer.sized(args.size), objectives, ranks.device, args.seed)
    rates = dict.fromkeys(pretrain.TARGET_PARTS, training.Rate(model.config.target_lr_scale))
    optimizer = training.make_optimizer(model, args.weight_decay, rates)
    training.make_fast(model, args, ranks, torch.get_float32_matmul_precision())
    training.train(
        model, itertools.repeat(batch), args, ranks, 0, optimizer=optimizer,
        on_log=lambda step, metrics: logged.update(metrics), on_save=lambda step: None,
    )  # fmt: skip
    return logged


# --------------------------------------------------------------------------------------- arithmetic


def exponent(sizes: list[float], values: list[float]) -> float:
    """The power p of value ~ size^p that fits best: the least-squares slope of their logarithms.

    Raises: ValueError for fewer than two different sizes, or for what has no logarithm.
    """
    if len(set(sizes)) < 2 or len(sizes) != len(values) or min(*sizes, *values) <= 0:
        raise ValueError(f"no slope through sizes {sizes} and values {values}")
    x, y = ([math.log(value) for value in row] for row in (sizes, values))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum(
        (a - mean_x) ** 2 for a in x
    )
