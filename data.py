"""Masks, batch plan, batches: everything between rows on disk (corpora.py) and the model.

SLAM reads three streams: speech alone, text alone, and pairs of speech and transcript. Each has its
rows (SpeechRows, TextRows, PairRows), each has an endless plan of batches (BatchPlan), and
PretrainData joins them: item (s, k) is micro-batch k of optimiser step s. Masks are drawn here, in
the workers, so the number of masked positions is known before the forward pass, and every shape is
one of a few.

Nothing here keeps state or touches a global random generator: what row 7 is like in epoch 3 depends
on (seed, 3, 7) alone, never on the number of workers or ranks, nor on what was read before. So a
run resumes with one integer, the step.

Public:  mask_budget, span_mask, mask_text, spec_augment, row_rng, joint_bucket, BatchPlan,
         Waveforms, SpeechBatch, TextBatch, PairBatch, Batch, SpeechRows, TextRows, PairRows,
         StandIns, read_rows, PretrainData, HeldOut, feature_statistics. Commands: manifest, text,
         shards, tokenizer, glue, textnorm, check (their work is done in importers.py, shards.py and
         corpora.py).
Letters: B rows, N wave samples, F log-mel frames (10 ms), T encoder frames (40 ms), U text tokens,
         M masked positions of a batch, V vocabulary, A micro-batches of a step, n rows of a stream.
Paper:   SLAM (Bapna et al. 2021); w2v-BERT (Chung et al. 2021) for the masks of speech; SpanBERT
         (Joshi et al. 2020) for those of text.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from conformer import (
    CLS_ID,
    HOP_SAMPLES,
    MASK_ID,
    N_MELS,
    N_SPECIAL,
    PAD_ID,
    SAMPLE_RATE,
    SEP_ID,
    UNK_ID,
    WINDOW_SAMPLES,
    log_mel,
    n_frames,
    subsampled_lens,
)
from corpora import (
    GLUE,
    MIN_ENC_FRAMES,
    MISSING_S,
    AudioError,
    Manifest,
    Report,
    TextCorpus,
    Tokenizer,
    check_manifest,
    one_line,
    paths_of,
    read_audio,
    read_glue,
    read_text,
    textnorm_files,
    textnorm_sentences,
    too_short,
    write_text,
)
from importers import IMPORTERS, WORKERS
from shards import shards_manifest, write_shards
from training import RowFault, TensorBatch, check_numbers

# w2v-BERT: a span of 10 frames starts anywhere with p = 0.065, which covers 1 - (1 - p)^10 = 49%.
SPEECH_MASK, SPEECH_SPAN = 0.49, 10
# SLAM, span-masked language model.
TEXT_MASK, TEXT_SPAN = 0.15, 5
# SLAM, TLM: both halves of a pair are masked more. UNSPECIFIED IN PAPER: spans; as above.
TLM_SPEECH_MASK, TLM_TEXT_MASK = 0.75, 0.50
# UNSPECIFIED IN PAPER: what replaces a masked token. BERT's rule: [MASK], random, and 10% are kept.
REPLACE_BY_MASK, REPLACE_BY_RANDOM = 0.8, 0.1

# What a random draw is for: the last number of its seed, so that no two purposes share numbers.
# None is 0, since numpy pads a short seed with zeros: [a, b, c] and [a, b, c, 0] are the same seed.
SPEECH_CROP, SPEECH_MASKING, TEXT_MASKING, PAIR_SPEECH_MASKING, PAIR_TEXT_MASKING = 1, 2, 3, 4, 5
STM_NEGATIVE, STM_TEXT_MASKING, PLAN_ORDER, JOINT_ORDER, STATISTICS = 6, 7, 8, 9, 10
SPEC_AUGMENT, STAND_IN = 11, 12

MOST_STAND_INS = 20  # rows tried in place of one that cannot be read
# Combinations of (speech, text, pair) buckets, from the shortest to the longest: so many shapes to
# compile or capture. Of a turn's 32 steps each takes so many: the ends get few, since they span the
# most lengths and so pad the most. benchmarks/data.py has the padding.
JOINT_SHARES = np.array([2, 3, 4, 6, 6, 6, 4, 1])
N_JOINT, TURN = len(JOINT_SHARES), int(JOINT_SHARES.sum())
# Different transcripts to draw an STM negative from, if those within 10% of its length are so many.
MIN_CHOICES = 32

# -------------------------------------------------------------------------------------------- masks


def mask_budget(length: int, share: float) -> int:
    """How many of `length` positions are masked: at least 1, at most all but 1; 0 of 0 or 1."""
    return 0 if length < 2 else min(max(1, round(share * length)), length - 1)


def _draw_spans(rng: np.random.Generator, length: int, share: float, span: int) -> np.ndarray:
    """Which span masks which position: (length,) int64, the number of the span, -1 where none does.

    Exactly mask_budget(length, share) positions are masked. Spans are thrown on one after the
    other, anywhere, until that is met; the one that meets it is cut short. They may overlap, so the
    number of spans does not give what they cover: budget / span of them would leave a row at 54%
    where 75% are asked for. The row is a ring: a span that runs past the end goes on at the start.
    That makes every position equally likely to be masked; laid out straight, and kept inside the
    row, spans would hit its first position ten times less often than one in the middle.
    DEVIATION: w2v-BERT starts spans by coin tosses (p = 0.065), so its count varies around the 49%.
    """
    owner = np.full(length, -1, np.int64)
    budget = mask_budget(length, share)
    if not budget:
        return owner
    span = min(span, budget)
    starts = reached = np.empty(0, np.int64)
    while len(reached) < budget:  # mostly once: it takes about ln(length / visible) * length / span
        more = 2 + int(1.5 * math.log(length / (length - budget)) * length / span)
        starts = np.concatenate([starts, rng.integers(length, size=more)])
        thrown = ((starts[:, None] + np.arange(span)) % length).ravel()  # positions, in order
        when = np.full(length, len(thrown))
        when[thrown[::-1]] = np.arange(len(thrown))[::-1]  # the last write stays: the first throw
        reached = np.flatnonzero(when < len(thrown))
    earliest = reached[np.argsort(when[reached])[:budget]]
    owner[earliest] = when[earliest] // span
    return owner


def span_mask(rng: np.random.Generator, length: int, share: float, span: int) -> np.ndarray:
    """A random mask in spans, as _draw_spans explains: (length,) bool, mask_budget of them True."""
    return _draw_spans(rng, length, share, span) >= 0


def mask_text(
    rng: np.random.Generator, tokens: np.ndarray, share: float, span: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupt spans of tokens for the language model; special ids stay.

    Of the spans 80% become [MASK], 10% random tokens, and 10% stay as they are but are predicted
    all the same: so a token that is not [MASK] may be wrong, and the model must read it, too. The
    share is of the tokens that are not special; spans run over those as if nothing lay between.

    Args:    tokens (U,) int64.
    Returns: corrupted (U,) int64; masked (U,) bool, True where the token is to be predicted.
    """
    places = np.flatnonzero(tokens >= N_SPECIAL)
    owner = _draw_spans(rng, len(places), share, span)
    chance = rng.random(max(1, int(owner.max(initial=-1)) + 1))[owner]  # one number a span
    random_ids = rng.integers(N_SPECIAL, vocab_size, size=len(places))
    replaced = np.where(chance < REPLACE_BY_MASK + REPLACE_BY_RANDOM, random_ids, tokens[places])
    replaced = np.where(chance < REPLACE_BY_MASK, MASK_ID, replaced)
    corrupted, masked = tokens.copy(), np.zeros(len(tokens), bool)
    corrupted[places] = np.where(owner >= 0, replaced, tokens[places])
    masked[places] = owner >= 0
    return corrupted, masked


# SpecAugment as in the Conformer paper (section 3.2) and praxis: two bands of up to 27 mel bins,
# ten stretches of up to 5% of the utterance each.
BANDS, WIDEST_BAND, STRETCHES, LONGEST_STRETCH = 2, 27, 10, 0.05


def spec_augment(
    rng: np.random.Generator, n_frames: int, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """What an utterance hides from the model in fine-tuning (Park et al. 2019).

    Args:    strength  1 for all of the above; a part of it narrows the bands and thins the
                       stretches out.
    Returns: hidden frames (F,) bool; hidden mel bins (80,) bool.
    """

    def hide(size: int, n_times: int, most: int) -> np.ndarray:
        hidden = np.zeros(size, bool)
        for width in rng.integers(0, most + 1, size=n_times):
            start = rng.integers(0, size - width + 1)
            hidden[start : start + width] = True
        return hidden

    frames = hide(n_frames, round(strength * STRETCHES), int(LONGEST_STRETCH * n_frames))
    return frames, hide(N_MELS, BANDS, round(strength * WIDEST_BAND))


def row_rng(seed: int, epoch: int, row: int, purpose: int) -> np.random.Generator:
    """The random numbers of one row in one epoch for one purpose."""
    return np.random.default_rng([seed, int(epoch), int(row), purpose])


# --------------------------------------------------------------------------------------- batch plan


@lru_cache(maxsize=64)
def _joint_order(seed: int, turn: int) -> np.ndarray:
    """(TURN,) which combination each step of a turn uses."""
    in_order = np.repeat(np.arange(N_JOINT), JOINT_SHARES)
    return np.random.default_rng([seed, turn, JOINT_ORDER]).permutation(in_order)


def joint_bucket(seed: int, step: int) -> int:
    """Which combination of buckets a step uses: each as often as its share in every TURN steps."""
    return int(_joint_order(seed, step // TURN)[step % TURN])


class BatchPlan:
    """Which rows are in micro-batch k of step s, for ever, by a formula: resuming replays nothing.

    Rows are sorted by length and cut into buckets. A micro-batch takes its rows from one bucket and
    is padded to the bucket's longest row, so there are only a few shapes. Within a bucket batches
    walk through one random permutation after the other; what is left of one runs on into the next.
    The buckets are cut so that the steps of a pass over each are to its share of all steps
    (JOINT_SHARES) as those of any other: then long and short rows are visited equally often.

    For example, rows of 1 to 8 s, steps of 32 s in A = 2 micro-batches of 16 s: one bucket ends at
    8 s and its micro-batches are 16 // 8 = 2 rows, another ends at 2 s and has 8. Each turn of 32
    steps uses all eight buckets by their shares, in an order that is new each time. Say that step
    150 has the 8 s bucket and that four steps before it had: they took 4 x 2 micro-batches x 2 rows
    = 16 rows of this bucket's permutation, so micro-batch k = 1 of step 150 begins at 16 + 1 x 2 =
    row 18 of it.

    Args: lengths         (n,) int, of any unit.
          units_per_step  size of a step in that unit, padding counted, over all its micro-batches;
                          a bucket whose longest row does not fit gets micro-batches of one row.
          micro_batches   A, micro-batches of a step.
          stream          a number that sets this stream's order apart from that of others.
          widths          (n,) int, what else a row's memory grows with: of a transducer's lattice
                          its target. A micro-batch holds at most max_area of rows x longest length
                          x widest width, but at least one row.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        units_per_step: int,
        *,
        n_buckets: int = N_JOINT,
        micro_batches: int,
        seed: int,
        stream: int,
        widths: np.ndarray | None = None,
        max_area: int = 0,
    ) -> None:
        assert len(lengths) and np.min(lengths) > 0 and n_buckets in (1, 2, 4, 8), n_buckets
        self.seed, self.stream, self.micro_batches = seed, stream, micro_batches
        self.units_per_micro = units_per_step // micro_batches
        order = np.argsort(lengths, kind="stable")
        lengths = np.asarray(lengths, np.int64)[order]

        def n_fit(start: int, stop: int) -> int:
            """How many rows a micro-batch has in a bucket of sorted rows start to stop."""
            longest = int(lengths[stop - 1])
            n_rows = self.units_per_micro // longest
            if widths is not None:
                widest = max(1, int(widths[order[start:stop]].max()))
                n_rows = min(n_rows, max_area // (longest * widest))
            return max(1, n_rows)

        stops = self._cut(len(lengths), n_buckets, n_fit)
        while len(stops) < n_buckets:  # a few rows do not fill them all
            n_buckets //= 2  # one has the shares of two
            stops = self._cut(len(lengths), n_buckets, n_fit)
        # Buckets of one length are one bucket, which keeps its share of the steps.
        longest, merged = np.unique(lengths[np.array(stops) - 1], return_inverse=True)
        self.bucket_len = longest.tolist()
        repeats = N_JOINT // n_buckets
        self.slot_bucket = np.repeat(merged, repeats)  # (N_JOINT,) joint index to bucket
        ends = [stops[np.flatnonzero(merged == b)[-1]] for b in range(len(self.bucket_len))]
        self.rows = [rows.astype(np.int32) for rows in np.split(order, ends[:-1])]
        self.real_units = [int(part.sum()) for part in np.split(lengths, ends[:-1])]
        self.rows_per_micro = [n_fit(*part) for part in zip([0, *ends], ends)]
        self._permutations: dict[int, dict[int, np.ndarray]] = {}

    @staticmethod
    def _cut(n: int, n_buckets: int, n_fit: Callable[[int, int], int]) -> list[int]:
        """Where buckets of n rows end, so that a pass over all takes the fewest turns.

        May give fewer buckets than asked where there are few rows.
        """
        shares = JOINT_SHARES.reshape(n_buckets, -1).sum(1)  # micro-batches of a turn

        def cut(most: float) -> list[int]:
            """Buckets as long as `most` turns can hold; more rows never need fewer."""
            stops = [0]
            while stops[-1] < n and len(stops) <= n_buckets:
                start, room = stops[-1], most * shares[len(stops) - 1]
                ends = range(start + 1, n + 1)
                n_rows = bisect_right(ends, room, key=lambda end: (end - start) / n_fit(start, end))
                stops.append(start + max(1, n_rows))
            return stops[1:]

        low, high = 0.0, float(n)  # the latter fits any rows into one bucket
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if cut(middle)[-1] == n else (middle, high)
        return cut(high)

    def bucket(self, step: int) -> int:
        """The bucket of a step."""
        return int(self.slot_bucket[joint_bucket(self.seed, step)])

    def _visits(self, step: int, bucket: int) -> int:
        """How many steps before this one used the bucket."""
        own = self.slot_bucket == bucket
        turn, place = divmod(step, TURN)
        before = own[_joint_order(self.seed, turn)[:place]].sum()
        return turn * int(JOINT_SHARES[own].sum()) + int(before)

    def _permutation(self, bucket: int, epoch: int) -> np.ndarray:
        kept = self._permutations.setdefault(bucket, {})
        if epoch not in kept:
            while len(kept) >= 2:  # a batch may end one epoch and begin the next
                kept.pop(min(kept))
            rng = np.random.default_rng([self.seed, self.stream, bucket, epoch, PLAN_ORDER])
            kept[epoch] = rng.permutation(self.rows[bucket])
        return kept[epoch]

    def micro_batch(self, step: int, k: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Rows of a micro-batch (B,) int64, their epochs (B,) int64, and the length to pad to."""
        assert 0 <= k < self.micro_batches, (k, self.micro_batches)
        bucket = self.bucket(step)
        n_rows, size = self.rows_per_micro[bucket], len(self.rows[bucket])
        first = (self._visits(step, bucket) * self.micro_batches + k) * n_rows
        epochs, places = np.divmod(np.arange(first, first + n_rows), size)
        rows = np.empty(n_rows, np.int64)
        for epoch in np.unique(epochs):
            rows[epochs == epoch] = self._permutation(bucket, int(epoch))[places[epochs == epoch]]
        return rows, epochs, self.bucket_len[bucket]

    def bucket_max(self, values: np.ndarray) -> dict[int, int]:
        """The largest of values (n,) among each bucket's rows, by the bucket's padded length."""
        return {size: int(values[rows].max()) for size, rows in zip(self.bucket_len, self.rows)}

    def describe(self) -> list[dict[str, float]]:
        """Padded length, rows, rows per micro-batch, share of steps, padding: for each bucket."""
        buckets = zip(self.bucket_len, self.rows, self.rows_per_micro, self.real_units)
        return [
            {
                "longest": longest,
                "rows": len(rows),
                "rows_per_micro": rows_per_micro,
                "steps": int(JOINT_SHARES[self.slot_bucket == b].sum()) / TURN,
                "padding": 1 - real / (len(rows) * longest),
            }
            for b, (longest, rows, rows_per_micro, real) in enumerate(buckets)
        ]

    def padding_waste(self) -> float:
        """Share of padding in one pass over all rows."""
        padded = sum(len(rows) * longest for rows, longest in zip(self.rows, self.bucket_len))
        return 1 - sum(self.real_units) / padded

    def mean_units(self) -> float:
        """What a step's rows hold on average, padding not counted."""
        per_row = np.array(self.real_units) / [len(rows) for rows in self.rows]
        of_bucket = self.micro_batches * np.array(self.rows_per_micro) * per_row
        return float(np.average(of_bucket[self.slot_bucket], weights=JOINT_SHARES))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_permutations": {}}


# ------------------------------------------------------------------------------------------ batches


@dataclass(frozen=True)
class Waveforms(TensorBatch):
    """Audio that stands where a batch's log-mel will be: the device makes it, not the loader.

    to(device) gives the features, so that a batch that has been moved holds them whoever made them,
    and the model does not know of this.
    """

    samples: Tensor  # (B, N) float32 at 16 kHz, zero after each row's end
    lens: Tensor  # (B,) int64 samples

    @torch.no_grad()
    def to(self, device: torch.device | str, non_blocking: bool = False) -> Tensor:
        """(B, F, 80) float32 log-mel on the device, zero after each row's end."""
        moved = super().to(device, non_blocking)
        return log_mel(moved.samples, moved.lens)

    def roll(self, shift: int, dim: int) -> Waveforms:
        """As Tensor.roll; of the rows alone."""
        assert dim == 0, dim
        return self._map(lambda value: value.roll(shift, dim))


@dataclass(frozen=True)
class SpeechBatch(TensorBatch):
    """Utterances. Features are raw: the model standardises them.

    Masked frames are listed m for each row, M = B m, where m is the most that a row of the bucket
    can have: so the shape is fixed. Rows with fewer end with filler, of weight 0.
    """

    features: Tensor | Waveforms  # (B, F, 80) float32 log-mel, zero after each row's end
    feature_lens: Tensor  # (B,) int64
    masked: Tensor  # (B, T) bool, never on padding
    masked_index: Tensor  # (M,) int64 into the B*T frames; filler points to its row's first
    masked_weight: Tensor  # (M,) float32, 1, and 0 for filler


@dataclass(frozen=True)
class TextBatch(TensorBatch):
    """Rows of text with the tokens to predict."""

    tokens: Tensor  # (B, U) int64, corrupted, PAD after each row's end
    lens: Tensor  # (B,) int64
    masked_index: Tensor  # (M,) int64 into the B*U tokens, likewise
    masked_weight: Tensor  # (M,) float32, 1, and 0 for filler
    targets: Tensor  # (M,) int64 original tokens, PAD for filler


@dataclass(frozen=True)
class PairBatch(TensorBatch):
    """Speech with its transcript, and for each row a transcript that is not its own (STM)."""

    speech: SpeechBatch
    text: TextBatch  # [CLS] transcript
    negative_tokens: Tensor  # (B, U) int64, corrupted at the same share
    negative_lens: Tensor  # (B,) int64
    clean_tokens: Tensor  # (B, U) int64
    clean_negative_tokens: Tensor  # (B, U) int64


@dataclass(frozen=True)
class Batch(TensorBatch):
    """One micro-batch: any of the three streams."""

    speech: SpeechBatch | None = None
    text: TextBatch | None = None
    pairs: PairBatch | None = None
    faults: list[RowFault] | None = None  # rows that could not be read and were replaced

    def counts(self) -> dict[str, float]:
        """What each loss that has data is divided by: predicted positions, or decisions."""
        counts = {}
        if self.speech is not None:
            per_row = self.speech.masked.sum(1)
            with_negatives = per_row >= 2  # one masked frame alone has none
            counts["contrastive"] = float(per_row[with_negatives].sum())
            counts["code_mlm"] = counts["diversity"] = float(per_row.sum())
        if self.text is not None:
            counts["span_lm"] = float(self.text.masked_weight.sum())
        if self.pairs is not None:
            counts["tlm_text"] = float(self.pairs.text.masked_weight.sum())
            counts["tlm_speech"] = float(self.pairs.speech.masked_weight.sum())
            counts["stm"] = 2.0 * len(self.pairs.negative_lens)
        return counts


def _flat_masked(masked: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Flat positions of the True ones, m a row: (B m,) int64; their weights (B m,) float32."""
    B, T = masked.shape
    index, weight = np.zeros((B, m), np.int64), np.zeros((B, m), np.float32)
    for b, row in enumerate(masked):
        places = np.flatnonzero(row)
        index[b, : len(places)], weight[b, : len(places)] = places, 1.0
    return (index + T * np.arange(B)[:, None]).ravel(), weight.ravel()


def padded(rows: list[np.ndarray], width: int) -> np.ndarray:
    """(B, U) int64 of token rows, PAD after their ends."""
    tokens = np.full((len(rows), width), PAD_ID, np.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens


def _lens(rows: list[np.ndarray]) -> Tensor:
    return torch.tensor([len(row) for row in rows], dtype=torch.int64)


def _text_batch(
    clean: list[np.ndarray],
    rngs: list[np.random.Generator],
    share: float,
    width: int,
    vocab_size: int,
) -> TextBatch:
    """Mask rows of tokens, each with its own random numbers, and pad them to width."""
    pairs = [mask_text(rng, row, share, TEXT_SPAN, vocab_size) for rng, row in zip(rngs, clean)]
    masked = padded([mask for _, mask in pairs], width) == 1  # (B, U)
    room = width - 1  # [CLS] is never masked
    index, weight = _flat_masked(masked, mask_budget(room, share))
    targets = np.where(weight > 0, padded(clean, width).ravel()[index], PAD_ID)
    tokens = torch.from_numpy(padded([corrupted for corrupted, _ in pairs], width))
    return TextBatch(tokens, _lens(clean), *map(torch.from_numpy, (index, weight, targets)))


def n_samples(frames: int) -> int:
    """The least samples that have so many log-mel frames; frames from 1 on."""
    return WINDOW_SAMPLES + (frames - 1) * HOP_SAMPLES


def padded_features(rows: list[Tensor], bucket_len: int) -> tuple[Tensor | Waveforms, Tensor]:
    """Pad rows of log-mel (F, 80), or of samples (N,) whose log-mel the device will make.

    Returns: (B, bucket_len, 80) float32, or Waveforms that become it; frames of each row (B,).
    """
    lens = _lens(rows)
    if rows[0].dim() == 2:
        features = torch.zeros(len(rows), bucket_len, N_MELS)
    else:
        features = torch.zeros(len(rows), n_samples(bucket_len))
    for i, row in enumerate(rows):
        features[i, : len(row)] = row
    if features.dim() == 3:
        return features, lens
    return Waveforms(features, lens), n_frames(lens)


def _speech_batch(
    rows: list[Tensor], rngs: list[np.random.Generator], share: float, bucket_len: int
) -> SpeechBatch:
    """Pad rows of features (F, 80) or samples (N,), and mask the encoder frames they become."""
    n_enc = subsampled_lens(bucket_len)
    features, lens = padded_features(rows, bucket_len)
    masked = np.zeros((len(rows), n_enc), bool)  # (B, T)
    for i, (n_valid, rng) in enumerate(zip(subsampled_lens(lens).tolist(), rngs)):
        masked[i, :n_valid] = span_mask(rng, n_valid, share, SPEECH_SPAN)
    flat = _flat_masked(masked, mask_budget(n_enc, share))
    return SpeechBatch(features, lens, *map(torch.from_numpy, (masked, *flat)))


# --------------------------------------------------------------------------------------------- rows


def row_frames(manifest: Manifest) -> np.ndarray:
    """(n,) int64 log-mel frames of each row by its duration."""
    samples = np.rint(manifest.durations * SAMPLE_RATE).astype(np.int64)
    return n_frames(samples)


def read_wave(manifest: Manifest, i: int, start: float, seconds: float, at_most: int) -> Tensor:
    """(N,) samples of a part of row i, for at most so many frames.

    Raises: AudioError naming row and file.
    """
    row = manifest.row(i)
    try:
        wave = read_audio(row["audio_filepath"], row.get("offset", 0.0) + start, seconds)
    except AudioError as error:
        raise AudioError(error.message, error.reason, manifest.where(i)) from error
    found_s = len(wave) / SAMPLE_RATE
    if found_s < seconds - MISSING_S or too_short(found_s):
        found = f"{found_s:.3f} s of audio where the manifest says {seconds:g}"
        message = f"{one_line(row['audio_filepath'])}: {found}"
        raise AudioError(message, "ends before its row does", manifest.where(i))
    return torch.from_numpy(wave[: n_samples(int(at_most))])


def read_features(manifest: Manifest, i: int, start: float, seconds: float, at_most: int) -> Tensor:
    """(F, 80) log-mel of a part of row i, F at most at_most. Raises as read_wave."""
    return log_mel(read_wave(manifest, i, start, seconds, at_most))


class StandIns:
    """In training: what takes the place of rows whose audio cannot be read, and what was wrong.

    A row that cannot be read is replaced as a whole, with its text, by a random row of its bucket,
    and if that cannot be read either, by another one. So shapes stay those of the bucket, no row of
    a batch is empty, which masks and norms would not bear, and losses are divided by the counts of
    what was really read. Which row it is follows from (seed, epoch, row) and the files alone, not
    from ranks, loader processes or what was read before: a resumed run meets the same.

    Neighbours in length would be the simpler choice, but the parts of one long recording are
    neighbours, and all broken together.

    Args: plan, bucket_len  as they made the batch.
          stream            the name of the rows in their faults.
          faults            what cannot be read is added here.
    """

    def __init__(
        self, plan: BatchPlan, bucket_len: int, stream: str, faults: list[RowFault]
    ) -> None:
        self.plan, self.bucket_len, self.stream, self.faults = plan, bucket_len, stream, faults

    def others(self, row: int, epoch: int) -> Iterator[int]:
        """Rows that are no longer than the bucket: first its own, then those of shorter buckets."""
        rng = row_rng(self.plan.seed, epoch, row, STAND_IN)
        bucket = self.plan.bucket_len.index(self.bucket_len)
        for rows in reversed(self.plan.rows[: bucket + 1]):
            yield from (other for other in rng.permutation(rows).tolist() if other != row)


def read_rows(
    read: Callable[[int, int], Tensor],
    rows: np.ndarray,
    epochs: np.ndarray,
    stand_ins: StandIns | None,
    fits: Callable[[int], bool] = lambda row: True,
) -> tuple[np.ndarray, list[Tensor]]:
    """The features of rows, or their samples, and which rows they are of in the end.

    Args:    read       (row, epoch) -> (F, 80) or (N,).
             stand_ins  None: a row that cannot be read is an error, as it should be in evaluation.
             fits       whether a stand-in fits the batch by what else it holds.
    Returns: rows (B,) int64, some replaced; what was read of each.
    Raises:  AudioError; with stand-ins only after MOST_STAND_INS in a row could not be read.
    """
    if stand_ins is None:
        return rows, [read(row, epoch) for row, epoch in zip(rows, epochs)]
    chosen, found = rows.copy(), []
    for b, (row, epoch) in enumerate(zip(rows.tolist(), epochs)):
        candidates = chain([row], filter(fits, stand_ins.others(row, epoch)))
        for tried in islice(candidates, 1 + MOST_STAND_INS):
            try:
                found.append(read(tried, epoch))
            except AudioError as error:
                last = error
                about = (error.where, error.reason, str(error))
                stand_ins.faults.append(RowFault(stand_ins.stream, *about))
            else:
                chosen[b] = tried
                break
        else:
            raise AudioError(f"{last}; nor could the others that fit its place be read")
    return chosen, found


def usable(
    manifest: Manifest, faults: dict[str, np.ndarray] | None = None
) -> tuple[np.ndarray, dict[str, int]]:
    """(n,) bool, rows without a fault, and the others counted by their first fault.

    Args:   faults  reason to (n,) bool; too short a row is a fault anyway.
    Raises: ValueError when none is left.
    """
    short = subsampled_lens(row_frames(manifest)) < MIN_ENC_FRAMES
    keep, left_out = np.ones(len(manifest), bool), {}
    for reason, bad in ({"shorter than two encoder frames": short} | (faults or {})).items():
        if n_bad := int((keep & bad).sum()):
            left_out[reason] = n_bad
        keep &= ~bad
    if not keep.any():
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        names = ", ".join(str(file.path) for file in manifest.files)
        raise ValueError(f"manifest {names}: 0 of {len(manifest)} rows usable ({reasons})")
    return keep, left_out


class SpeechRows:
    """Speech alone. A row is an utterance, or a part of one that is longer than max_audio_s.

    An utterance of d seconds is round(d / max_audio_s) rows, so an hour weighs as much in one file
    as in a thousand. Each row reads max_audio_s from a stretch of its own, in each epoch from
    another place there.

    Args:       on_device  batches hold Waveforms: log-mel is made where they are moved to.
    Attributes: lengths (n,) int64 log-mel frames; left_out, reason to number of utterances.
    """

    def __init__(
        self, manifest: Manifest, max_audio_s: float, seed: int, *, on_device: bool = False
    ) -> None:
        most = n_frames(round(max_audio_s * SAMPLE_RATE))
        if too_short(max_audio_s):
            raise ValueError(f"--max-audio-s {max_audio_s:g}: need two encoder frames (0.1 s)")
        keep, self.left_out = usable(manifest)
        self.manifest, self.max_audio_s, self.seed = manifest.filtered(keep), max_audio_s, seed
        self.on_device = on_device
        parts = np.maximum(1, np.rint(self.manifest.durations / max_audio_s)).astype(np.int32)
        self._utterance = np.repeat(np.arange(len(parts), dtype=np.int32), parts)  # (n,)
        first = np.repeat(np.cumsum(parts) - parts, parts)  # row of its utterance
        self._part = (np.arange(len(first)) - first).astype(np.int32)  # (n,)
        self._parts = parts  # of each utterance
        self.lengths = np.minimum(row_frames(self.manifest), most)[self._utterance]

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def wave(self, row: int, epoch: int) -> Tensor:
        """(N,) samples of a row as it is in that epoch, of at most lengths[row] frames."""
        i = int(self._utterance[row])
        seconds = min(self.manifest.durations[i], self.max_audio_s)
        stretch = (self.manifest.durations[i] - seconds) / self._parts[i]  # a row may begin in it
        shift = row_rng(self.seed, epoch, row, SPEECH_CROP).random() if stretch else 0.0
        start = (self._part[row] + shift) * stretch
        return read_wave(self.manifest, i, start, seconds, self.lengths[row])

    def features(self, row: int, epoch: int) -> Tensor:
        """(F, 80) log-mel of wave(row, epoch)."""
        return log_mel(self.wave(row, epoch))

    def collate(
        self,
        rows: np.ndarray,
        epochs: np.ndarray,
        bucket_len: int,
        stand_ins: StandIns | None = None,
    ) -> SpeechBatch:
        read = self.wave if self.on_device else self.features
        rows, found = read_rows(read, rows, epochs, stand_ins)
        rngs = [row_rng(self.seed, epoch, row, SPEECH_MASKING) for row, epoch in zip(rows, epochs)]
        return _speech_batch(found, rngs, SPEECH_MASK, bucket_len)


def _pack_lines(
    line_ends: np.ndarray, document_ends: np.ndarray, row_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pack lines greedily: (start, stop) in the token stream and length of each row.

    A line that is too long is cut. All pieces but its last fill a row each, so no row has a [SEP]
    inside a line. Where the row after one that begins at piece i begins is looked up for all i at
    once; Python then only hops from row to row, which matters with forty million lines.
    """
    content = row_tokens - 2
    starts = np.concatenate([[0], line_ends[:-1]])
    n_pieces = np.maximum(1, -(-(line_ends - starts - 1) // content))
    first = np.cumsum(n_pieces) - n_pieces  # (lines,) index of each line's first piece
    line = np.repeat(np.arange(len(line_ends)), n_pieces)
    start = starts[line] + (np.arange(len(line)) - first[line]) * content
    is_last = np.append(line[1:] != line[:-1], True)
    stop = np.where(is_last, line_ends[line], start + content)
    cost = np.concatenate([[0], np.cumsum(np.where(is_last, stop - start, content + 1))])
    document_stop = np.append(first, len(line))[document_ends]  # first piece after each document
    document = np.searchsorted(document_ends, line, side="right")
    following = np.searchsorted(cost, cost[:-1] + row_tokens - 1, side="right") - 1
    following = np.minimum(following, document_stop[document])
    rows, piece = array("q"), 0
    while piece < len(line):
        rows.append(piece)
        piece = int(following[piece])
    chosen = np.array(rows, np.int64)
    last = following[chosen] - 1
    return start[chosen], stop[last], 1 + cost[last + 1] - cost[chosen]


@dataclass
class TextRows:
    """Text alone, packed into rows. Each process maps the token files for itself."""

    corpus: TextCorpus
    seed: int
    file: np.ndarray  # (n,) int32
    start: np.ndarray  # (n,) int64 into the file's token stream
    stop: np.ndarray  # (n,) int64
    lengths: np.ndarray  # (n,) int64 tokens, [CLS] and the closing [SEP] counted
    _maps: dict[int, np.ndarray] = field(init=False, default_factory=dict)

    @classmethod
    def pack(cls, corpus: TextCorpus, row_tokens: int, seed: int = 0) -> TextRows:
        """Rows of at most row_tokens: [CLS] line [SEP] line [SEP] ..., all of one document."""
        if row_tokens < 3:
            raise ValueError(f"--row-tokens {row_tokens}: [CLS], one token and [SEP] need 3")
        packed = []
        for number, path in enumerate(corpus.paths):
            index = np.load(path.with_suffix(".npz"))
            rows = _pack_lines(index["line_ends"], index["document_ends"], row_tokens)
            packed.append((np.full(len(rows[0]), number, np.int32), *rows))
        return cls(corpus, seed, *(np.concatenate(column) for column in zip(*packed)))

    def __len__(self) -> int:
        return len(self.start)

    @property
    def fingerprint(self) -> str:
        return self.corpus.fingerprint

    def _map(self, file: int) -> np.ndarray:
        if file not in self._maps:
            self._maps[file] = np.memmap(self.corpus.paths[file], self.corpus.dtype, mode="r")
        return self._maps[file]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": {}}

    def tokens(self, i: int) -> np.ndarray:
        """(U,) int64: [CLS] line [SEP] line [SEP] ..."""
        stream = self._map(self.file[i])[self.start[i] : self.stop[i]]
        closing = [] if stream[-1] == SEP_ID else [SEP_ID]  # a piece of a line that was cut
        return np.concatenate([[CLS_ID], stream, closing]).astype(np.int64)

    def collate(self, rows: np.ndarray, epochs: np.ndarray, bucket_len: int) -> TextBatch:
        rngs = [row_rng(self.seed, epoch, row, TEXT_MASKING) for row, epoch in zip(rows, epochs)]
        clean = [self.tokens(row) for row in rows]
        return _text_batch(clean, rngs, TEXT_MASK, bucket_len, self.corpus.vocab_size)


def _transcript_key(text: str) -> str:
    """What makes two transcripts the same to the ear: their words, without case or punctuation."""
    return " ".join(re.findall(r"[\w']+", text.casefold()))


class PairRows:
    """Speech with transcripts. Too long rows are left out: a part would not match its text.

    Args:       on_device  as of SpeechRows.
    Attributes: lengths    (n,) int64 log-mel frames.
                text_lens  (n,) int64 tokens of the transcript.
                text_room  (n,) int64 tokens of [CLS] and the longest text a row may meet, its own
                           or a negative.
                left_out   reason to number of rows.
                widened    number of rows whose STM negatives may differ by more than 10% in length.
    Raises:     ValueError where no row is usable or all transcripts are the same.
    """

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: Tokenizer,
        max_audio_s: float,
        seed: int,
        *,
        speech_mask: float = TLM_SPEECH_MASK,
        text_mask: float = TLM_TEXT_MASK,
        on_device: bool = False,
    ) -> None:
        self.vocab_size, self.seed, self.on_device = tokenizer.vocab_size, seed, on_device
        self.speech_mask, self.text_mask = speech_mask, text_mask
        numbers: dict[str, int] = {}
        tokens, stops, transcript = array("i"), array("q"), array("q")
        for i in range(len(manifest)):
            text = manifest.text(i)
            tokens.extend(tokenizer.encode(text))
            stops.append(len(tokens))
            transcript.append(numbers.setdefault(_transcript_key(text), len(numbers)))
        text_lens = np.diff(np.array(stops, np.int64), prepend=0)
        faults = {
            f"longer than --max-audio-s {max_audio_s:g}": manifest.durations > max_audio_s,
            "without transcript": text_lens == 0,
        }
        keep, self.left_out = usable(manifest, faults)
        self.manifest = manifest.filtered(keep)
        self.lengths = row_frames(self.manifest)
        self._tokens, self._stops = np.array(tokens, np.int32), np.array(stops, np.int64)[keep]
        self.text_lens = text_lens[keep]
        self._transcript = np.array(transcript, np.int64)[keep]  # (n,) equal for equal transcripts
        self._find_windows()

    def _find_windows(self) -> None:
        """Where each row's STM negatives are drawn from: a range of the rows sorted by text length.

        That range begins with the texts of just its own length, and grows token by token up to 10%
        only as long as they are few: so the length of a text says as little as can be about whether
        it belongs to the speech. If even 10% hold no other text, it grows until there is one.
        UNSPECIFIED IN PAPER: how STM's negatives are made.
        """
        self._by_length = np.argsort(self.text_lens, kind="stable")
        ordered, different = self.text_lens[self._by_length], self._transcript[self._by_length]
        if len(np.unique(different)) < 2:
            raise ValueError(
                "pairs with one transcript only; matching needs at least two different"
            )
        sizes, of_size = np.unique(self.text_lens, return_inverse=True)
        windows, self.widened = np.empty((len(sizes), 3), np.int64), 0
        for j, size in enumerate(sizes.tolist()):
            reach, limit = 0, max(1, size // 10)
            while True:
                first, last = np.searchsorted(ordered, [size - reach, size + reach + 1])
                n_choices = len(np.unique(different[first:last]))
                if n_choices >= MIN_CHOICES or (reach >= limit and n_choices >= 2):
                    break
                reach = reach + 1 if reach < limit else 2 * reach
            self.widened += int((of_size == j).sum()) if reach > limit else 0
            windows[j] = first, last, 1 + ordered[last - 1]
        self._first, self._last, self.text_room = windows[of_size].T.copy()

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def stm_negative(self, rng: np.random.Generator, i: int) -> int:
        """A row whose transcript differs from row i's and is about as long."""
        while True:
            drawn = self._by_length[rng.integers(self._first[i], self._last[i], size=64)]
            other = drawn[self._transcript[drawn] != self._transcript[i]]
            if len(other):
                return int(other[0])

    def wave(self, i: int, epoch: int = 0) -> Tensor:
        """(N,) samples of at most lengths[i] frames, the same in every epoch."""
        return read_wave(self.manifest, i, 0.0, self.manifest.durations[i], self.lengths[i])

    def features(self, i: int, epoch: int = 0) -> Tensor:
        """(F, 80) log-mel of wave(i)."""
        return log_mel(self.wave(i, epoch))

    def tokens(self, i: int) -> np.ndarray:
        """(U,) int64: [CLS] and the transcript."""
        stop = self._stops[i]
        text = self._tokens[stop - self.text_lens[i] : stop]
        return np.concatenate([[CLS_ID], text]).astype(np.int64)

    def collate(
        self,
        rows: np.ndarray,
        epochs: np.ndarray,
        bucket_len: int,
        text_len: int | None = None,
        stand_ins: StandIns | None = None,
    ) -> PairBatch:
        """A batch of bucket_len frames and text_len tokens, or as many as these rows may need.

        TLM masks both halves and predicts both. STM joins the same masked speech once with its own
        text and once with a foreign one, masked alike, so that the masks do not tell them apart.
        """
        width = int(self.text_room[rows].max()) if text_len is None else text_len
        fits = self.text_room <= width
        read = self.wave if self.on_device else self.features
        rows, found = read_rows(read, rows, epochs, stand_ins, fits.__getitem__)

        def rngs(purpose: int) -> list[np.random.Generator]:
            return [row_rng(self.seed, epoch, row, purpose) for row, epoch in zip(rows, epochs)]

        def text_batch(clean: list[np.ndarray], purpose: int) -> TextBatch:
            return _text_batch(clean, rngs(purpose), self.text_mask, width, self.vocab_size)

        clean = [self.tokens(row) for row in rows]
        foreign = [self.stm_negative(rng, row) for rng, row in zip(rngs(STM_NEGATIVE), rows)]
        negative = [self.tokens(row) for row in foreign]
        corrupted = text_batch(negative, STM_TEXT_MASKING)
        return PairBatch(
            speech=_speech_batch(found, rngs(PAIR_SPEECH_MASKING), self.speech_mask, bucket_len),
            text=text_batch(clean, PAIR_TEXT_MASKING),
            negative_tokens=corrupted.tokens,
            negative_lens=corrupted.lens,
            clean_tokens=torch.from_numpy(padded(clean, width)),
            clean_negative_tokens=torch.from_numpy(padded(negative, width)),
        )


# ------------------------------------------------------------------------------------------ streams


class PretrainData(Dataset):
    """Micro-batches by (step, k): for DataLoader(data, batch_size=None, sampler=[(0, 0), ...]).

    Each stream is a pair (rows, their BatchPlan) or None; all plans share seed and micro-batches.
    """

    def __init__(
        self,
        speech: tuple[SpeechRows, BatchPlan] | None = None,
        text: tuple[TextRows, BatchPlan] | None = None,
        pairs: tuple[PairRows, BatchPlan] | None = None,
    ) -> None:
        self.speech, self.text, self.pairs = speech, text, pairs
        plans = [stream[1] for stream in (speech, text, pairs) if stream]
        assert len({(plan.seed, plan.micro_batches) for plan in plans}) == 1, plans
        self.pair_text_len = pairs[1].bucket_max(pairs[0].text_room) if pairs else {}

    def __getitem__(self, step_and_k: tuple[int, int]) -> Batch:
        streams, faults = {}, []
        for name in ("speech", "text", "pairs"):
            if stream := getattr(self, name):
                rows, plan = stream
                chosen, epochs, bucket_len = plan.micro_batch(*step_and_k)
                more = {"text_len": self.pair_text_len[bucket_len]} if name == "pairs" else {}
                if name != "text":
                    more["stand_ins"] = StandIns(plan, bucket_len, name, faults)
                streams[name] = rows.collate(chosen, epochs, bucket_len, **more)
        return Batch(**streams, faults=faults or None)

    @property
    def audio_rows(self) -> dict[str, int]:
        """Number of utterances of each stream that has audio."""
        streams = {"speech": self.speech, "pairs": self.pairs}
        return {name: len(its[0].manifest) for name, its in streams.items() if its}


def _of_one_stream(name: str, part: Any) -> Batch:
    return Batch(**{name: part})


class HeldOut(Dataset):
    """Every held-out row once, in order of length, as in epoch 0: the same batches at every pass.

    Batches hold one stream each. They are read when they are asked for, so ranks that share a pass
    each read their own.

    Args: rows      by stream, whatever has lengths (n,) and collate(rows, epochs, longest).
          units     by stream, the size of a batch, padding counted: log-mel frames or tokens. Rows
                    that are longer are alone.
          at_least  batches of fewer rows are left out.
          make      (stream, what collate gave) -> batch.
    """

    def __init__(
        self,
        rows: dict[str, Any],
        units: dict[str, int],
        *,
        at_least: int = 1,
        make: Callable[[str, Any], Any] = _of_one_stream,
    ) -> None:
        self.rows, self.make = rows, make
        self.chosen: list[tuple[str, np.ndarray]] = []  # of each batch: stream and rows (B,)
        for name, its in rows.items():
            order, most, start = np.argsort(its.lengths, kind="stable"), units[name], 0
            while start < len(order):
                stop = start + 1
                while stop < len(order) and (stop + 1 - start) * its.lengths[order[stop]] <= most:
                    stop += 1
                if stop - start >= at_least:
                    self.chosen.append((name, order[start:stop]))
                start = stop

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> Any:
        name, chosen = self.chosen[i]  # IndexError past the end: so a pass is a plain for loop
        longest = int(self.rows[name].lengths[chosen[-1]])
        return self.make(name, self.rows[name].collate(chosen, np.zeros_like(chosen), longest))


def feature_statistics(
    manifest: Manifest, max_seconds: float = 3600, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each log-mel bin over max_seconds of random rows, 30 s of each at most.

    Returns: mean (80,), std (80,) float32; std at least 0.01, for bins of digital silence.
    """
    count, total, squares, seconds = 0, np.zeros(N_MELS), np.zeros(N_MELS), 0.0
    last: object = "all is shorter than two encoder frames"
    for i in np.random.default_rng([seed, STATISTICS]).permutation(len(manifest)):
        part = min(manifest.durations[i], 30.0)
        if too_short(part):
            continue
        if count and seconds + part > max_seconds:
            break
        try:
            log_mels = read_features(manifest, i, 0.0, part, sys.maxsize)
        except AudioError as error:  # training will name it
            last = error
            continue
        features = log_mels.double().numpy()  # (F, 80)
        count, seconds = count + len(features), seconds + part
        total, squares = total + features.sum(0), squares + (features**2).sum(0)
    if not count:
        raise ValueError(f"feature statistics: no usable audio in the manifest ({last})")
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-4))
    return mean.astype(np.float32), std.astype(np.float32)


# ------------------------------------------------------------------------------------------ command


def _run_text(args: argparse.Namespace) -> None:
    report = Report()
    n_documents = write_text(map(Path, args.files), Path(args.out), args.field, report)
    summary = f"{report.rows} lines in {n_documents} documents"
    print("\n".join([f"{args.out}: {summary}", *report.left_out()]))


def _run_tokenizer(args: argparse.Namespace) -> None:
    def lines() -> Iterator[str]:
        paths = paths_of(args.text)
        return filter(
            None, (line for path in paths for line in read_text(path, args.field, Report()))
        )

    step = 1
    if args.max_lines:  # evenly spaced, so that every part of the corpus is heard
        step = max(1, math.ceil(sum(1 for _ in lines()) / args.max_lines))
    tokenizer = Tokenizer.train(islice(lines(), 0, None, step), args.vocab_size, args.text_case)
    tokenizer.save(args.out)
    about = f"text case {tokenizer.text_case}, fingerprint {tokenizer.fingerprint}"
    print(f"{args.out}: {tokenizer.vocab_size} pieces, {about}")


def _run_manifest(args: argparse.Namespace) -> None:
    names = ["workers", *LAYOUT_OPTIONS.get(args.layout, {})]
    options = {name: getattr(args, name) for name in names}
    if options.get("splits"):
        options["splits"] = options["splits"].split(",")
    check_numbers(args, from_1=("workers",))
    report = LAYOUTS[args.layout](args.root, args.out, **options)
    Manifest.read([args.out])  # leaves the index of a large one beside it
    print(f"{args.out}: {report}")


def _run_shards(args: argparse.Namespace) -> None:
    check_numbers(args, from_1=("workers",), above_0=("shard_mib",))
    manifest, n_shards, report = write_shards(
        args.manifest, args.out_dir, args.shard_mib, workers=args.workers
    )
    print(f"{manifest}: {n_shards} shards, {report}")


def _run_check(args: argparse.Namespace) -> None:
    check_numbers(args, from_1=("workers",))
    tokenizer, texts = args.tokenizer and Tokenizer.load(args.tokenizer), []
    its = {"workers": args.workers, "out": args.out, "texts": texts if tokenizer else None}
    report = check_manifest(Path(args.manifest), args.max_audio_s, args.read, **its)
    print(f"{args.manifest}: {report}")
    if tokenizer:
        ids = tokenizer.encode(texts)
        lens, unknown = [len(row) for row in ids], sum(row.count(UNK_ID) for row in ids)
        sizes = f"{sum(lens)} tokens, longest {max(lens, default=0)}, unknown {unknown}"
        print(f"{len(texts)} transcripts: {sizes}")


def _counted(counts: Counter[str]) -> str:
    """`b 3, a 1`, the most frequent first."""
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def _run_glue(args: argparse.Namespace) -> None:
    for path in map(Path, args.files):
        files = sorted(path.glob("*.tsv")) if path.is_dir() else [path]
        if not files:
            raise FileNotFoundError(f"{path}: no .tsv in this folder")
        for file in files:
            examples, report = read_glue(args.task, [file])
            labels = Counter(example.label for example in examples if example.label is not None)
            about = _counted(labels) or "no labels, as test files have none"
            print("\n".join([f"{file}: {len(examples)} rows: {about}", *report.left_out()]))


def _run_textnorm(args: argparse.Namespace) -> None:
    files, classes, total = textnorm_files(args.files), Counter(), 0
    for file in files:
        report, own = Report(), Counter()
        for sentence in textnorm_sentences(file, report):
            own.update(token.semiotic_class for token in sentence)
        report.demand_rows(f"text normalisation {file}")
        summary = f"{report.rows} sentences of {own.total()} tokens"
        print("\n".join([f"{file}: {summary}", *report.left_out()]))
        classes, total = classes + own, total + report.rows
    if not files:
        raise FileNotFoundError(f"{', '.join(args.files)}: no output-*-of-* in this folder")
    print(f"{total} sentences of {classes.total()} tokens: {_counted(classes)}")


FIELD_HELP = 'key of the text in JSON lines (default: "text" in files named .json or .jsonl)'
MANIFEST_HELP = (
    "Of the seven parts of SpeechStew, LibriSpeech, Common Voice, TED-LIUM and AMI are free; WSJ, "
    "Switchboard/Fisher and Broadcast News are sold by the LDC: prepare them with Kaldi, then use "
    "`kaldi`. An import that was interrupted goes on where OUT.partial ends."
)
LAYOUTS = IMPORTERS | {"shards": shards_manifest}
# What each layout's importer takes beside root, out and workers: its parameter to the flag's how.
SPLITS = {"splits": {"help": "comma separated (default all)"}}
LAYOUT_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "librispeech": SPLITS,
    "commonvoice": {"splits": {"help": "tables, comma separated (default train,dev,test)"}},
    "covost": {
        "tsv": {
            "required": True,
            "help": "covost_v2.en_de.tsv, or joined tables, comma separated",
        },
        "splits": {"help": "comma separated; train,train_covost is CoVoST's (default all)"},
    },
    "librilight": {
        "segment_s": {
            "type": float,
            "default": 30.0,
            "help": "longest segment in seconds, cut where nobody speaks (default %(default)s)",
        }
    },
    "tedlium": SPLITS,
    "ami": SPLITS
    | {
        "annotations": {
            "help": "folder with words/ and segments/ (default: ROOT/ami_public_manual_1.6.2)"
        },
        "microphone": {
            "choices": ("ihm", "sdm"),
            "default": "ihm",
            "help": "headsets, or the first of the table's array (default %(default)s)",
        },
    },
}


def build_parser() -> argparse.ArgumentParser:
    """The command line of data.py: manifest, shards, text, tokenizer, glue, textnorm, check."""
    parser = argparse.ArgumentParser(prog="data.py", description="Prepare and check training data.")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("tokenizer", help="train a SentencePiece tokenizer")
    add = command.add_argument
    add("--text", required=True, help="text files, comma separated; one sentence a line")
    add("--vocab-size", type=int, default=32000, help="pieces (default 32000, as in the paper)")
    add("--out", required=True, help="model file to write")
    add("--text-case", choices=("lower", "keep"), default="lower", help="(default lower)")
    add("--field", help=FIELD_HELP)
    add(
        "--max-lines",
        type=int,
        default=1_000_000,
        help="use about so many lines, evenly spaced over all; 0: all, which must fit into memory "
        "(default %(default)s)",
    )
    command.set_defaults(run=_run_tokenizer)

    command = commands.add_parser("text", help="join text files into one, documents kept apart")
    command.add_argument("files", nargs="+", help="plain or gzipped lines, or JSON lines")
    command.add_argument("--out", required=True, help="text file to write")
    command.add_argument("--field", help=FIELD_HELP)
    command.set_defaults(run=_run_text)

    command = commands.add_parser("glue", help="count rows, labels and what is wrong")
    command.add_argument("task", choices=sorted(GLUE))
    command.add_argument("files", nargs="+", help="GLUE's .tsv files, or the folder of them")
    command.set_defaults(run=_run_glue)

    command = commands.add_parser("textnorm", help="count sentences, classes and what is wrong")
    command.add_argument("files", nargs="+", help="Google's output-*-of-* files, or their folder")
    command.set_defaults(run=_run_textnorm)

    layouts = commands.add_parser(
        "manifest", help="write the manifest of a corpus", description=MANIFEST_HELP
    )
    layouts = layouts.add_subparsers(dest="layout", required=True)
    for layout, importer in LAYOUTS.items():
        about = (importer.__doc__ or "").split("\n")[0]
        command = layouts.add_parser(layout, help=about, description=about)
        lists = {"fairseq": "the .tsv", "nemo": "the manifest", "kaldi": "the data folder",
                 "shards": "folder of .tar files, or a pattern, as 'x/train-*.tar'"}  # fmt: skip
        command.add_argument("root", help=lists.get(layout, "folder of the corpus"))
        command.add_argument("out", help="manifest to write (.jsonl)")
        for name, how in LAYOUT_OPTIONS.get(layout, {}).items():
            flag = "--translations" if name == "tsv" else f"--{name.replace('_', '-')}"
            command.add_argument(flag, dest=name, **how)
        about = "files measured at a time (default %(default)s)"
        command.add_argument("--workers", type=int, default=WORKERS, help=about)
        command.set_defaults(run=_run_manifest)

    command = commands.add_parser(
        "shards",
        help="pack a manifest's audio into tar files, for network disks",
        description="Pack a manifest's audio into plain tar files (WebDataset's convention) and "
        "write the manifest of them. What was interrupted goes on when it is started again.",
    )
    add = command.add_argument
    add("manifest", type=Path)
    add("out_dir", type=Path, help="folder for the shards and the new manifest, of the same name")
    add("--shard-mib", type=float, default=256.0, help="size of a shard (default %(default)s)")
    add("--workers", type=int, default=WORKERS, help="files at a time (default %(default)s)")
    command.set_defaults(run=_run_shards)

    command = commands.add_parser("check", help="count rows, hours, speakers and what is wrong")
    add = command.add_argument
    add("manifest")
    add("--tokenizer", help="also count the good rows' tokens with this model")
    add("--max-audio-s", type=float, default=math.inf, help="reject longer rows (default none)")
    add("--read", action="store_true", help="decode every file")
    add("--workers", type=int, default=WORKERS, help="files at a time (default %(default)s)")
    add("--out", type=Path, help="write the good rows to this manifest, with absolute paths")
    command.set_defaults(run=_run_check)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; a user's mistake is one line and exit status 2."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
