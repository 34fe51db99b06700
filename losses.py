"""Every objective of pre-training, as a pure function of tensors.

SLAM sections 3.2 and 3.3. Each returns sums over masked positions and their count, in fp32, and
nobody divides here: batches, micro-batches and ranks hold different counts, so the training loop
divides once, by the count of the whole step. Masked positions come as M rows gathered from the
batch; `weight` is 0 for the filler that pads M to a static size.

Public:  Loss, sample_negatives, contrastive, diversity, code_prediction, token_prediction,
         speech_text_matching, ctc, ctc_fits.
Letters: M masked positions, K negatives, D width, G codebooks, V codes or vocabulary, B rows,
         T encoder frames, U tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CONTRASTIVE_TEMPERATURE = 0.1  # wav2vec 2.0
N_NEGATIVES = 100  # K, wav2vec 2.0
BLANK_ID = 0  # CTC's blank is the padding id, the one that no transcript contains


class Loss(NamedTuple):
    """Sums over positions, float32 (float64 in a float64 run), () where nothing else is said.

    Divide by `count` to get means. The blind guess is a model that has learned nothing but how
    often each answer is right. Where that is known beforehand its sums stand here; where it is not,
    as for codes that move, `answers` is summed over the steps of a log line first.
    """

    sum: Tensor  # of the loss, with gradient
    count: Tensor  # positions that `sum` runs over
    # how many of them the model's best answer gets right; None: no such question
    correct: Tensor | None = None
    blind_correct: Tensor | None = None  # how many a blind guess gets right, in expectation
    blind_sum: Tensor | None = None  # the loss that a blind guess has
    answers: Tensor | None = None  # (G, V) how often each answer was the right one


def _wide(x: Tensor) -> Tensor:
    """fp32 at least: losses are computed outside of bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ------------------------------------------------------------------------------------------- speech


def sample_negatives(
    row: Tensor, weight: Tensor, n_negatives: int, n_rows: int
) -> tuple[Tensor, Tensor]:
    """Draw distractors for the contrastive loss from the other masked frames of the same utterance.

    The M masked frames stand row-major, so those of utterance b are one run: `start[b]`, `size[b]`
    long. A distractor is a step of 1 to size-1 frames from the positive, around the run's end:
    uniform over the others, never the positive.

    Args:    row (M,) int64, the utterance of each masked frame, ascending, filler last;
             weight (M,) 1 or 0 for filler; n_negatives K, drawn with replacement; n_rows B.
    Returns: (M, K) int64 indices into the M frames; (M,) bool, False where the utterance has no
             other masked frame (or for filler), whose indices must not be read.
    Source:  wav2vec 2.0 section 3.2, w2v-BERT section 3.2.
    """
    M = row.shape[0]
    real = weight > 0
    size = torch.zeros(n_rows, dtype=torch.int64, device=row.device)  # (B,)
    size.index_add_(0, row, real.long())
    start = size.cumsum(0) - size  # (B,)
    size, start = size[row], start[row]  # (M,)
    others = (size - 1).clamp(min=1)
    draw = torch.rand(M, n_negatives, device=row.device, dtype=torch.float64)
    step = 1 + (draw * others[:, None]).long()  # (M, K) in 1..size-1
    place = torch.arange(M, device=row.device) - start
    negatives = start[:, None] + (place[:, None] + step) % size.clamp(min=1)[:, None]
    usable = real & (size > 1)
    return negatives.masked_fill(~usable[:, None], 0), usable


def contrastive(
    context: Tensor, target: Tensor, negatives: Tensor, usable: Tensor, codes: Tensor | None
) -> Loss:
    """Tell the true target of a masked frame from K targets of other masked frames.

    The others are of the same utterance. A distractor that holds the same codes as the positive is
    struck out: it could not be told apart, and left in it would make a collapsed codebook look like
    success. A frame without any distractor left counts for nothing. Ties are wrong.

    Args:    context, target (M, D); negatives (M, K) int64 into the M frames; usable (M,) bool;
             codes (M, G) int64 drawn by the quantizer, or None when the targets have no codebook.
    Returns: Loss; its chance is the mean of 1 / (1 + distractors left).
    Source:  wav2vec 2.0 equation 3; striking out, as in its code (fairseq).
    """
    with torch.autocast(context.device.type, enabled=False):
        context, target = F.normalize(_wide(context), dim=-1), F.normalize(_wide(target), dim=-1)
        # All pairs once, then K of them picked: (M, M) numbers instead of the (M, K, D) of gathered
        # vectors.
        similarity = context @ target.T / CONTRASTIVE_TEMPERATURE  # (M, M)
        positive = similarity.diagonal()[:, None]  # (M, 1)
        distractors = similarity.gather(1, negatives)  # (M, K)
        struck = ~usable[:, None].expand_as(negatives)
        if codes is not None:
            struck = struck | (codes[negatives] == codes[:, None]).all(-1)
        distractors = distractors.masked_fill(struck, -torch.inf)
        left = (~struck).sum(1).to(similarity.dtype)  # (M,)
        counted = (left > 0).to(similarity.dtype)
        loss = torch.cat([positive, distractors], dim=1).logsumexp(1) - positive[:, 0]  # (M,)
        correct = (distractors < positive).all(1).to(counted.dtype) * counted
        return Loss(
            (loss * counted).sum(),
            counted.sum(),
            correct.sum(),
            (counted / (1 + left)).sum(),
            (counted * torch.log1p(left)).sum(),
        )


def diversity(soft_perplexity: Tensor, n_entries: int, weight: Tensor) -> Loss:
    """How far the batch is from using all entries alike.

    (G V - perplexity) / (G V), times the M masked frames. Times M because the contrastive sum runs
    over M frames too: without it the term vanishes in large batches and the codebook collapses. Not
    additive over micro-batches: each has its own statistic.

    Args:    soft_perplexity (), summed over groups; n_entries G x V; weight (M,).
    Source:  wav2vec 2.0 equation 4.
    """
    count = _wide(weight).sum()
    return Loss(count * (n_entries - soft_perplexity) / n_entries, count)


def code_prediction(logits: Tensor, ids: Tensor, weight: Tensor) -> Loss:
    """Masked prediction of the quantizer's ids, from the top of the multimodal stack.

    w2v-BERT equation 2. The blind guess always names the most frequent id, and its loss is the
    entropy of the ids; both follow from `answers` once they are summed: a single micro-batch holds
    too few ids to show their entropy.

    Args: logits (M, G, V); ids (M, G) int64 without gradient; weight (M,).
          Groups are summed in the loss, averaged in accuracy.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits, weight = _wide(logits), _wide(weight)
        M, G, V = logits.shape
        nll = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(M, G)
        correct = (logits.argmax(-1) == ids).to(weight.dtype).mean(-1)
        answers = (F.one_hot(ids, V).to(weight.dtype) * weight[:, None, None]).sum(0)  # (G, V)
        loss, right = (nll.sum(1) * weight).sum(), (correct * weight).sum()
        return Loss(loss, weight.sum(), right, answers=answers)


# ----------------------------------------------------------------------------------- text and pairs


def token_prediction(logits: Tensor, targets: Tensor, weight: Tensor, unigram: Tensor) -> Loss:
    """Masked tokens: the span-masked LM on text, and TLM's text side.

    In TLM the same head reads a joined pair. Chance is always answering the corpus' most frequent
    token; the chance loss is that of answering with the corpus' frequencies.

    Args: logits (M, V); targets (M,) int64; weight (M,); unigram (V,) log-probabilities of the
          training text.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits, weight = _wide(logits), _wide(weight)
        nll = F.cross_entropy(logits, targets, reduction="none")
        return Loss(
            (nll * weight).sum(),
            weight.sum(),
            ((logits.argmax(-1) == targets).to(weight.dtype) * weight).sum(),
            ((targets == unigram.argmax()).to(weight.dtype) * weight).sum(),
            -(unigram[targets] * weight).sum(),
        )


def speech_text_matching(match_logit: Tensor, label: Tensor) -> Loss:
    """Does this text belong to this speech?

    Binary cross-entropy on the joined pair's [CLS] (SLAM 3.3.2).

    Args: match_logit (B,) of joined rows; label (B,) 1 for the true transcript, 0 for another's,
          as many of the one as of the other. A logit of exactly 0 is wrong.
    """
    with torch.autocast(match_logit.device.type, enabled=False):
        match_logit = _wide(match_logit)
        label = label.to(match_logit.dtype)
        total = F.binary_cross_entropy_with_logits(match_logit, label, reduction="sum")
        count = torch.ones_like(label).sum()
        correct = (match_logit * (2 * label - 1) > 0).to(label.dtype).sum()
        return Loss(total, count, correct, count / 2, count * math.log(2))


def ctc(logits: Tensor, speech_lens: Tensor, targets: Tensor, target_lens: Tensor) -> Loss:
    """CTC of the transcript on the speech encoder's output.

    mSLAM's alignment loss, which SLAM lacks. It is read before text is joined: attention could copy
    the text.

    Args:    logits (B, T, V), blank BLANK_ID; speech_lens (B,); targets (B, U) int64 without
             specials; target_lens (B,).
    Returns: Loss, summed over rows and counted in tokens. Rows that ctc_fits refuses have no
             alignment and are left out, so the sum is never infinite.
    Source:  Graves et al. 2006; mSLAM (Bapna et al. 2022) section 3.
    """
    with torch.autocast(logits.device.type, enabled=False):
        log_probs = _wide(logits).log_softmax(-1).transpose(0, 1)  # (T, B, V)
        fits = ctc_fits(speech_lens, targets, target_lens)
        lens = (speech_lens, target_lens)
        rows = F.ctc_loss(log_probs, targets, *lens, BLANK_ID, reduction="none", zero_infinity=True)
        kept = fits.to(rows.dtype)
        return Loss((rows * kept).sum(), (target_lens * kept).sum())


def ctc_fits(speech_lens: Tensor, targets: Tensor, target_lens: Tensor) -> Tensor:
    """(B,) bool: rows with enough frames for CTC, one a token plus one between equal neighbours."""
    U = targets.shape[1]
    inside = torch.arange(1, U, device=targets.device)[None] < target_lens[:, None]
    repeats = ((targets[:, 1:] == targets[:, :-1]) & inside).sum(1)
    return (speech_lens >= target_lens + repeats) & (target_lens > 0)
