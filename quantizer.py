"""Targets for the speech objectives: a Gumbel-softmax codebook, and w2v-conformer's linear.

wav2vec 2.0 section 2 and w2v-BERT section 3.1.2. The quantizer reads *unmasked* convolution
features at the masked frames and answers twice: with a code vector that the contrastive loss
compares contexts with, and with an id that masked code prediction has to name.

Public:  GumbelQuantizer, Quantized, LinearTarget.
Letters: M masked frames, C features, G codebooks, V entries in each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


class Quantized(NamedTuple):
    """What the quantizer says of M frames."""

    # (M, code_dim) float32: one codebook row a group, concatenated; gradient reaches the logits
    vectors: Tensor
    # (M, G) int64: noise-free argmax, the target of masked code prediction; no gradient
    ids: Tensor
    # (M, G) int64: the entries that `vectors` holds; with noise in training, equal to ids in eval
    drawn: Tensor
    # () float32 with gradient, 1..V for each group, summed over groups: for the diversity loss
    soft_perplexity: Tensor
    hard_counts: Tensor  # (G, V) float32: how often each entry is the noise-free argmax


def gumbel_like(logits: Tensor) -> Tensor:
    """Standard Gumbel noise: the largest of logits + noise is a draw from their softmax."""
    uniform = torch.rand_like(logits).clamp_min_(torch.finfo(logits.dtype).tiny)  # may be exactly 0
    return uniform.log_().neg_().log_().neg_()


def _entries(codebook: Tensor, drawn: Tensor) -> Tensor:
    """codebook (G, V, d), drawn (M, G) int64 -> (M, G, d)."""
    return codebook[torch.arange(codebook.shape[0], device=drawn.device), drawn]


class _StraightThrough(torch.autograd.Function):
    """The entries that were drawn, though backward takes them for soft @ codebook.

    That is, `soft` gets the gradient that a one-hot choice in its place would have, and an entry
    that of the frames which drew it. Written as (one_hot + soft - soft.detach()) @ codebook it
    comes to the same, at the price of more (M, G, V) tensors and a product with nearly all zeros.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, soft: Tensor, codebook: Tensor, drawn: Tensor) -> Tensor:
        """soft (M, G, V), codebook (G, V, d), drawn (M, G) int64 -> (M, G, d)."""
        ctx.save_for_backward(codebook, drawn)
        return _entries(codebook, drawn)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """grad (M, G, d)."""
        codebook, drawn = ctx.saved_tensors
        G, V, _ = codebook.shape
        of_soft = torch.einsum("mgd,gvd->mgv", grad, codebook)
        of_codebook = torch.zeros_like(codebook)
        entries = drawn + V * torch.arange(G, device=drawn.device)  # (M, G) of G V
        of_codebook.flatten(0, 1).index_add_(0, entries.flatten(), grad.flatten(0, 1))
        return of_soft, of_codebook, None


class GumbelQuantizer(nn.Module):
    """Straight-through Gumbel-softmax over G codebooks of V entries.

    Forward takes exactly one entry a group (one-hot times codebook, never a mixture); backward
    pretends that the one-hot was the softmax. The temperature falls by a factor at each *optimiser
    step*: the training loop adds 1 to `step` after each, so accumulation, evaluation and
    recomputation never count, and the step is a buffer that checkpoints carry.
    """

    def __init__(
        self,
        dim: int,
        n_codebooks: int,
        n_codes: int,
        code_dim: int,
        temperature: tuple[float, float, float],
        codebook_init: str = "uniform",
    ) -> None:
        """Make the codebooks.

        Args: dim            C.
              temperature    (start, factor per step, floor).
              codebook_init  "uniform" U(0, 1) or "normal" N(0, 1).
        """
        super().__init__()
        self.n_codebooks, self.n_codes = n_codebooks, n_codes
        self.temperature_schedule = temperature
        self.norm = nn.LayerNorm(dim)
        self.logits = nn.Linear(dim, n_codebooks * n_codes)
        draw = {"uniform": torch.rand, "normal": torch.randn}[codebook_init]
        self.codebook = nn.Parameter(draw(n_codebooks, n_codes, code_dim // n_codebooks))
        nn.init.normal_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @property
    def temperature(self) -> Tensor:
        """() float64: start x factor^step, not below the floor."""
        start, factor, floor = self.temperature_schedule
        return (start * factor ** self.step.double()).clamp(min=floor)

    def code_logits(self, features: Tensor) -> Tensor:
        """(M, C) -> (M, G, V) in the codebook's precision, though C may come from bf16."""
        with torch.autocast(features.device.type, enabled=False):
            logits = self.logits(self.norm(features.to(self.codebook.dtype)))
            return logits.view(-1, self.n_codebooks, self.n_codes)

    @torch.no_grad()
    def name(self, features: Tensor) -> Tensor:
        """The ids of M frames and nothing else, (M, C) -> (M, G) int64: noise-free, no gradient."""
        return self.code_logits(features).argmax(-1)

    def forward(self, features: Tensor, weight: Tensor) -> Quantized:
        """Quantize M frames.

        Args: features (M, C) unmasked convolution features at the masked frames; weight (M,) 1 for
              a frame, 0 for filler.
        """
        V = self.n_codes
        with torch.autocast(features.device.type, enabled=False):
            logits = self.code_logits(features)  # (M, G, V)
            ids = logits.argmax(-1)  # (M, G)
            if self.training:
                soft = (logits + gumbel_like(logits)) / self.temperature.to(logits.dtype)
                soft = soft.softmax(-1)
                drawn = soft.argmax(-1)
                vectors = _StraightThrough.apply(soft, self.codebook, drawn)  # (M, G, d)
            else:
                drawn, vectors = ids, _entries(self.codebook, ids)
            vectors = vectors.flatten(1)  # (M, code_dim)
            # Diversity counts every masked frame once, by the plain softmax, without noise or
            # temperature.
            each = weight[:, None, None]
            mean = (logits.softmax(-1) * each).sum(0) / weight.sum().clamp(min=1)  # (G, V)
            hard = (F.one_hot(ids, V).to(logits.dtype) * each).sum(0)  # (G, V)
        return Quantized(vectors, ids, drawn, perplexity(mean).sum(), hard.detach())


def perplexity(probabilities: Tensor) -> Tensor:
    """exp(entropy) over the last dimension: (..., V) -> (...).

    1 when one entry has it all, V when all are equal.
    """
    # A probability of exactly 0 would have an infinite gradient.
    tiny = torch.finfo(probabilities.dtype).tiny
    return torch.exp(-(probabilities * probabilities.clamp_min(tiny).log()).sum(-1))


class LinearTarget(nn.Module):
    """The contrastive target of "w2v-conformer": a linear of the unmasked features, no codebook.

    Zhang et al. 2020 (arXiv 2010.10504): wav2vec 2.0's loss, a linear layer for the quantizer.
    """

    def __init__(self, dim: int, code_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, code_dim)

    def forward(self, features: Tensor) -> Tensor:
        """(M, C) -> (M, code_dim) float32."""
        with torch.autocast(features.device.type, enabled=False):
            return self.project(self.norm(features.to(self.project.weight.dtype)))
