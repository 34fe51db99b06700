"""What speech is trained on, beside transformers': quantizer, negatives, contrastive loss, masks.

    python benchmarks/targets.py [--shapes 8,250,1,1024,512 8,400,2,320,256] [--rounds 3]
                                 [--threads 2] [--json targets.json]

Both sides get the same masks, of data.span_mask, and random features of 512; gradients go to
features, contexts and weights. "transformers" is what Wav2Vec2ForPreTraining.forward does after its
encoder, on all frames; "on masked frames" feeds the same functions the masked frames alone, as
fairseq does. Negatives and span masks are timed beside _sample_negative_indices and
_compute_mask_indices. Peak memory is that of `all` in a process of its own, beyond its inputs.
transformers needs 9 GB for the first shape. Exit code 2 when a package is missing.
Letters: B rows, T frames, M masked ones, C features, G codebooks, V codes, D code_dim, K negatives.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timing
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules

import conformer  # noqa: E402
import data  # noqa: E402
import losses  # noqa: E402
import pretrain  # noqa: E402
import quantizer  # noqa: E402

C, K = 512, losses.N_NEGATIVES
DIVERSITY = 0.1
OURS, ALL_FRAMES, MASKED_FRAMES = "ours", "transformers", "transformers, on masked frames"
PARTS = ("quantizer", "contrastive", "all")  # all: with negatives and diversity, one backward


class Shape(NamedTuple):
    """Of a batch and of its codes."""

    B: int
    T: int
    G: int
    V: int
    D: int


class Inputs(NamedTuple):
    """What all sides get."""

    features: Tensor  # (B, T, C), with gradient
    context: Tensor  # (B, T, D), with gradient
    batch: data.SpeechBatch  # for its masks


def make_inputs(shape: Shape) -> Inputs:
    """Random features under masks of data.py."""
    torch.manual_seed(0)
    B, T, _, _, D = shape
    rngs = [data.row_rng(0, 0, row, data.SPEECH_MASKING) for row in range(B)]
    length = T * conformer.SUBSAMPLING
    silence = [torch.zeros(length, conformer.N_MELS)] * B
    batch = data._speech_batch(silence, rngs, data.SPEECH_MASK, length)
    return Inputs(
        torch.randn(B, T, C).requires_grad_(), torch.randn(B, T, D).requires_grad_(), batch
    )


def masked_only(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Features (M, C) and contexts (M, D) of the masked frames."""
    at = inputs.batch.masked_index
    return pretrain.pick(inputs.features, at), pretrain.pick(inputs.context, at)


class Ours:
    """GumbelQuantizer and losses."""

    def __init__(self, shape: Shape, inputs: Inputs) -> None:
        self.shape, self.inputs, batch = shape, inputs, inputs.batch
        self.module = quantizer.GumbelQuantizer(C, *shape[2:], (2.0, 0.999995, 0.1))
        self.weight = batch.masked_weight
        with torch.no_grad():
            self.ready = self.quantize()
        self.drawn = self.negatives()

    def quantize(self) -> quantizer.Quantized:
        return self.module(masked_only(self.inputs)[0], self.weight)

    def negatives(self) -> tuple[Tensor, Tensor]:
        return losses.sample_negatives(self.weight.view(self.shape.B, -1), K)

    def loss(self, codes: quantizer.Quantized, drawn: tuple[Tensor, Tensor]) -> Tensor:
        context = masked_only(self.inputs)[1]
        return losses.contrastive(context, codes.vectors, *drawn, codes.drawn).sum

    def diversity(self, codes: quantizer.Quantized) -> Tensor:
        n_entries = self.shape.G * self.shape.V
        return losses.diversity(codes.soft_perplexity, n_entries, self.weight).sum

    def vectors(self, codes: quantizer.Quantized) -> tuple[Tensor, Tensor]:
        return codes.vectors, codes.soft_perplexity

    def fresh(self) -> quantizer.Quantized:
        """Codes as they were, and a place for the gradient of their vectors."""
        return self.ready._replace(vectors=self.ready.vectors.detach().requires_grad_())


class Theirs:
    """Wav2Vec2GumbelVectorQuantizer and the steps of Wav2Vec2ForPreTraining.forward after it."""

    def __init__(self, shape: Shape, inputs: Inputs, on_masked: bool = False) -> None:
        from transformers import Wav2Vec2Config
        from transformers.models.wav2vec2 import modeling_wav2vec2 as hf

        self.hf, self.shape, self.inputs, self.on_masked = hf, shape, inputs, on_masked
        self.masked = inputs.batch.masked  # (B, T)
        config = Wav2Vec2Config(
            num_codevector_groups=shape.G, num_codevectors_per_group=shape.V,
            codevector_dim=shape.D,
        )  # fmt: skip
        self.module = hf.Wav2Vec2GumbelVectorQuantizer(config)
        torch.nn.init.uniform_(self.module.codevectors)
        with torch.no_grad():
            self.ready = self.quantize()
        self.drawn = self.negatives()

    def quantize(self) -> tuple[Tensor, Tensor]:
        """Vectors (B, T, D), or (1, M, D), and perplexity."""
        if self.on_masked:
            return self.module(masked_only(self.inputs)[0][None])
        return self.module(self.inputs.features, self.masked)

    def negatives(self) -> Tensor:
        """(B, T, K) into B*T frames, or (1, M, K) into M."""
        masked = self.masked.numpy()
        sampled = self.hf._sample_negative_indices(masked.shape, K, masked)
        if self.on_masked:
            place = masked.ravel().cumsum() - 1  # frame of B*T -> its number among masked ones
            sampled = place[sampled[masked]][None]
        return torch.from_numpy(sampled).long()

    def loss(self, codes: tuple[Tensor, Tensor], drawn: Tensor) -> Tensor:
        """Steps 3 to 6 of theirs, line by line."""
        quantized, (B, T, D) = codes[0], codes[0].shape
        context = masked_only(self.inputs)[1][None] if self.on_masked else self.inputs.context
        others = quantized.view(-1, D)[drawn.view(-1)].view(B, T, -1, D).permute(2, 0, 1, 3)
        model, temperature = self.hf.Wav2Vec2ForPreTraining, losses.CONTRASTIVE_TEMPERATURE
        logits = model.compute_contrastive_logits(quantized[None], others, context, temperature)
        equal = (quantized == others).all(-1)
        if equal.any():
            logits[1:][equal] = float("-inf")
        logits = logits.transpose(0, 2).reshape(-1, logits.size(0))
        masked = torch.ones(B, T, dtype=torch.int64) if self.on_masked else self.masked.long()
        target = ((1 - masked) * -100).transpose(0, 1).flatten()
        return F.cross_entropy(logits.float(), target, reduction="sum")

    def diversity(self, codes: tuple[Tensor, Tensor]) -> Tensor:
        n_entries = self.shape.G * self.shape.V
        return (n_entries - codes[1]) / n_entries * self.masked.sum()

    def vectors(self, codes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return codes

    def fresh(self) -> tuple[Tensor, Tensor]:
        return self.ready[0].detach().requires_grad_(), self.ready[1]


def sides(shape: Shape, inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """How each is made."""
    return {
        ALL_FRAMES: lambda: Theirs(shape, inputs),
        MASKED_FRAMES: lambda: Theirs(shape, inputs, on_masked=True),
        OURS: lambda: Ours(shape, inputs),
    }


def case(side: Any, part: str) -> Callable[[], float]:
    """A part, forward and backward; returns the loss, or 0 where there is none."""

    def call() -> float:
        side.module.zero_grad(set_to_none=True)
        side.inputs.features.grad = side.inputs.context.grad = None
        if part == "quantizer":
            vectors, perplexity = side.vectors(side.quantize())
            torch.autograd.backward([vectors, perplexity], [torch.ones_like(vectors), None])
            return 0.0
        codes = side.fresh() if part == "contrastive" else side.quantize()
        loss = side.loss(codes, side.drawn if part == "contrastive" else side.negatives())
        total = loss if part == "contrastive" else loss + DIVERSITY * side.diversity(codes)
        total.backward()
        return float(loss.detach())

    return call


def seconds(shape: Shape, rounds: int) -> tuple[timing.Times, dict[str, float]]:
    """{(part, side): seconds}, and each side's contrastive loss a masked frame, to be alike."""
    inputs = make_inputs(shape)
    made = {name: make() for name, make in sides(shape, inputs).items()}
    cases = {(part, name): case(side, part) for name, side in made.items() for part in PARTS}
    cases |= {("negatives", name): side.negatives for name, side in made.items()}
    n_masked = float(inputs.batch.masked_weight.sum())
    found = {name: cases["contrastive", name]() / n_masked for name in made}
    return timing.taking_turns(cases, rounds, brief_s=0.5), found


def mask_seconds(rounds: int, B: int = 64, T: int = 1000) -> timing.Times:
    """Span masks of a batch."""
    from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

    def ours() -> list[np.ndarray]:
        rngs = (data.row_rng(0, 0, row, data.SPEECH_MASKING) for row in range(B))
        return [data.span_mask(rng, T, data.SPEECH_MASK, data.SPEECH_SPAN) for rng in rngs]

    def theirs() -> np.ndarray:
        return _compute_mask_indices((B, T), 0.65, data.SPEECH_SPAN, min_masks=2)

    return timing.taking_turns({ALL_FRAMES: theirs, OURS: ours}, rounds, warm_up=3)


def memory(name: str, shape: Shape) -> float:
    """MiB that `all` needs beside its inputs; this process must do nothing else."""
    small = Shape(2, 40, *shape[2:4], shape.G)
    case(sides(small, make_inputs(small))[name](), "all")()  # loads what it needs
    inputs = make_inputs(shape)
    before = timing.peak_mib()
    case(sides(shape, inputs)[name](), "all")()
    return timing.peak_mib() - before


def rows(taken: timing.Times, peaks: dict[str, float]) -> list[dict[str, object]]:
    """A line for each side: milliseconds of each part, ratio to transformers, memory."""
    lines = []
    for name in (ALL_FRAMES, MASKED_FRAMES, OURS):
        line: dict[str, object] = {"": name}
        for part in (*PARTS[:2], "negatives", PARTS[2]):
            ratio = timing.ratios(taken, (part, ALL_FRAMES))[part, name]
            line[part] = f"{1e3 * timing.medians(taken)[part, name]:.3g} ms, {ratio:.2g}"
        lines.append(line | {"peak MiB": peaks[name]})
    return lines


def goals(taken: timing.Times) -> list[tuple[str, float, str, float]]:
    """Of the first shape."""
    whole, part = (timing.ratios(taken, ("all", x)) for x in (ALL_FRAMES, MASKED_FRAMES))
    return [
        ("4: all / transformers", whole["all", OURS], "<=", 0.01),
        ("4: all / transformers, on masked frames", part["all", OURS], "<=", 0.03),
    ]


def shape_of(text: str) -> Shape:
    """'8,250,1,1024,512' -> Shape."""
    numbers = [int(part) for part in text.split(",")]
    if len(numbers) != 5 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not B,T,G,V,D")
    return Shape(*numbers)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = timing.parser("Quantizer, negatives, contrastive loss and masks.", rounds=3)
    shapes = [Shape(8, 250, 1, 1024, 512), Shape(8, 400, 2, 320, 256)]
    add = parser.add_argument
    add("--shapes", type=shape_of, nargs="+", default=shapes, metavar="B,T,G,V,D")
    add("--memory-of", choices=(ALL_FRAMES, MASKED_FRAMES, OURS), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Prints the figures. Returns the exit code."""
    args = parse(argv)
    if not timing.ready(args, "transformers"):
        return 2
    if args.memory_of:
        print(json.dumps(memory(args.memory_of, args.shapes[0])))
        return 0
    # Before this process grows: a child's peak begins at what its parent holds.
    peaks = {}
    for shape in args.shapes:
        options = ("--shapes", ",".join(map(str, shape)), "--threads", args.threads, "--memory-of")
        names = (ALL_FRAMES, MASKED_FRAMES, OURS)
        peaks[shape] = {x: timing.in_a_process(__file__, *options, x) for x in names}
    found = {}
    for shape in args.shapes:
        taken, loss = seconds(shape, args.rounds)
        letters = " ".join(f"{letter}{value}" for letter, value in shape._asdict().items())
        alike = ", ".join(f"{value:.3f}" for value in loss.values())
        print(f"\n{letters}, forward and backward; contrastive loss a masked frame: {alike}\n")
        print(timing.table(rows(taken, peaks[shape])))
        asked = goals(taken) if shape == (8, 250, 1, 1024, 512) else []
        print("\n" + timing.judged(asked) if asked else "")
        times = {f"{part} | {name}": values for (part, name), values in taken.items()}
        found[letters] = {"seconds": times, "peak_mib": peaks[shape], "goals": asked, "loss": loss}
    masks = mask_seconds(max(args.rounds, 20))
    ratio = timing.ratios(masks, ALL_FRAMES)[OURS]
    each = ", ".join(
        f"{name} {1e3 * taken:.2f} ms" for name, taken in timing.medians(masks).items()
    )
    print(f"\nspan masks, B64 T1000: {each}; ratio {ratio:.2f}")
    timing.write_json(args.json, {"shapes": found, "mask_seconds": masks})
    return 0


if __name__ == "__main__":
    sys.exit(main())
