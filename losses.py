"""Every objective, of pre-training and of fine-tuning, as a pure function of tensors.

SLAM sections 3.2 and 3.3. Each returns sums over positions and their count, in fp32, and nobody
divides here: batches, micro-batches and ranks hold different counts, so the training loop divides
once, by the count of the whole step. Masked positions come as M rows gathered from the batch, m
for each of its B rows; `weight` is 0 for the filler that pads them to a static size.

Public:  Loss, sample_negatives, contrastive, diversity, code_prediction, token_prediction,
         speech_text_matching, ctc, ctc_fits, classification, label_smoothed, rnnt.
Letters: M positions, masked ones (M = B m) or a target's tokens, K negatives, D width,
         G codebooks, V codes or vocabulary, B rows, T encoder frames, U tokens, N diagonals of a
         lattice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

CONTRASTIVE_TEMPERATURE = 0.1  # wav2vec 2.0
N_NEGATIVES = 100  # K, wav2vec 2.0
BLANK_ID = 0  # CTC's and RNN-T's blank is the padding id, the one that no transcript contains


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

    def detached(self) -> Loss:
        """The same numbers without gradient."""
        return Loss(*(value if value is None else value.detach() for value in self))


def _wide(x: Tensor) -> Tensor:
    """fp32 at least: losses are computed outside of bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ------------------------------------------------------------------------------------------- speech


def sample_negatives(weight: Tensor, n_negatives: int) -> tuple[Tensor, Tensor]:
    """Draw distractors for the contrastive loss from the other masked frames of the same utterance.

    A distractor is a step of 1 to size-1 frames from the positive, around the end of the
    utterance's `size` masked frames: uniform over the others, never the positive.

    Args:    weight (B, m) 1 for a masked frame, 0 for the filler at each row's end;
             n_negatives K, drawn with replacement.
    Returns: (B, m, K) int64 places among the m of the same row; (B, m) bool, False where the
             utterance has no other masked frame (or for filler), whose places must not be read.
    Source:  wav2vec 2.0 section 3.2, w2v-BERT section 3.2.
    """
    B, m = weight.shape
    real = weight > 0
    size = real.sum(1)[:, None, None]  # (B, 1, 1)
    draw = torch.rand(B, m, n_negatives, device=weight.device, dtype=torch.float64)
    step = 1 + (draw * (size - 1).clamp(min=1)).long()  # (B, m, K) in 1..size-1
    place = torch.arange(m, device=weight.device)[:, None]
    negatives = (place + step) % size.clamp(min=1)
    usable = real & (size[:, 0] > 1)
    return negatives.masked_fill(~usable[..., None], 0), usable


def contrastive(
    context: Tensor, target: Tensor, negatives: Tensor, usable: Tensor, codes: Tensor | None
) -> Loss:
    """Tell the true target of a masked frame from K targets of other masked frames.

    The others are of the same utterance. A distractor that holds the same codes as the positive is
    struck out: it could not be told apart, and left in it would make a collapsed codebook look like
    success. A frame without any distractor left counts for nothing. Ties are wrong.

    Args:    context, target (M, D), row after row; negatives (B, m, K) int64 places in the same
             row; usable (B, m) bool; codes (M, G) int64 drawn by the quantizer, or None when the
             targets have no codebook.
    Returns: Loss; its chance is the mean of 1 / (1 + distractors left).
    Source:  wav2vec 2.0 equation 3; striking out, as in its code (fairseq).
    """
    with torch.autocast(context.device.type, enabled=False):
        rows = negatives.shape[:2]  # (B, m)
        context = F.normalize(_wide(context), dim=-1).unflatten(0, rows)  # (B, m, D)
        target = F.normalize(_wide(target), dim=-1).unflatten(0, rows)
        # All pairs of an utterance once, then K of them picked: (B, m, m) numbers instead of the
        # (B, m, K, D) of gathered vectors.
        similarity = context @ target.transpose(1, 2) / CONTRASTIVE_TEMPERATURE  # (B, m, m)
        positive = similarity.diagonal(dim1=1, dim2=2)[..., None]  # (B, m, 1)
        distractors = similarity.gather(2, negatives)  # (B, m, K)
        struck = ~usable[..., None].expand_as(negatives)
        if codes is not None:
            codes = codes.unflatten(0, rows)  # (B, m, G)
            equal = (codes[:, :, None] == codes[:, None]).all(-1)  # (B, m, m)
            struck = struck | equal.gather(2, negatives)
        distractors = distractors.masked_fill(struck, -torch.inf)
        left = (~struck).sum(-1).to(similarity.dtype)  # (B, m)
        counted = (left > 0).to(similarity.dtype)
        loss = torch.cat([positive, distractors], dim=-1).logsumexp(-1) - positive[..., 0]
        correct = (distractors < positive).all(-1).to(counted.dtype) * counted
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


def classification(logits: Tensor, labels: Tensor) -> Loss:
    """Cross-entropy of a fine-tuning task's labels; the blind guess knows how often each is right.

    Args: logits (B, V); labels (B,) int64.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = _wide(logits)
        total = F.cross_entropy(logits, labels, reduction="sum")
        correct = (logits.argmax(-1) == labels).to(logits.dtype).sum()
        answers = F.one_hot(labels, logits.shape[1]).to(logits.dtype).sum(0, keepdim=True)  # (1, V)
        return Loss(total, answers.sum(), correct, answers=answers)


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


# -------------------------------------------------------------------------------------- fine-tuning


def label_smoothed(logits: Tensor, targets: Tensor, weight: Tensor, smoothing: float) -> Loss:
    """Cross-entropy against a target that keeps 1 - smoothing and gives the rest to all V alike.

    (1 - smoothing) x the target's -log p, plus smoothing x the mean of -log p over the vocabulary.

    Args:   logits (M, V); targets (M,) int64; weight (M,) 1, or 0 for filler; smoothing in [0, 1).
    Source: Vaswani et al. 2017, section 5.4.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits, weight = _wide(logits), _wide(weight)
        rows = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        correct = (logits.argmax(-1) == targets).to(weight.dtype) * weight
        return Loss((rows * weight).sum(), weight.sum(), correct.sum())


@torch.compiler.disable  # its loop over diagonals would be unrolled, once for every shape
def rnnt(
    logits: Tensor,
    logit_lens: Tensor,
    targets: Tensor,
    target_lens: Tensor,
    blank: int = BLANK_ID,
) -> Loss:
    """RNN transducer: -log of the probability of the transcript, summed over all alignments.

    An alignment of row b is a path through a lattice of T_b frames and U_b + 1 places. It starts in
    cell (0, 0). From cell (t, u), which stands at frame t with u tokens written, it either writes
    token u and goes to (t, u+1), or takes the blank and goes to (t+1, u). It ends with the blank of
    (T_b - 1, U_b). Tokens take no time, so a row may have more of them than frames. A path's
    probability is the product of its steps'; each cell has a softmax of its own.

    Args:    logits (B, T, U+1, V), not soft-maxed, in any float type; logit_lens (B,) int64, T_b;
             targets (B, U) int64 without blanks; target_lens (B,) int64, U_b; blank its id.
             Beyond a row's lengths logits may hold any finite numbers, targets any ids.
    Returns: Loss, summed over rows and counted in tokens. A filler row has T_b = U_b = 0 and costs
             nothing; else T_b is at least 1.
    Source:  Graves 2012 (arXiv 1211.3711), sections 2.4 and 2.5.
    """
    B, T, width, V = logits.shape
    assert targets.shape == (B, width - 1), f"{tuple(logits.shape)} and {tuple(targets.shape)}"
    written = torch.arange(width, device=logits.device) < target_lens[:, None]
    token = F.pad(targets, (0, 1), value=blank).where(written, blank)  # (B, U+1)
    token = token[:, None].expand(B, T, width)
    ids = torch.stack([torch.full_like(token, blank), token], dim=-1)  # (B, T, U+1, 2)
    with torch.autocast(logits.device.type, enabled=False):
        rows = _PathSum.apply(logits, ids, logit_lens, target_lens)
    return Loss(rows.sum(), target_lens.sum().to(rows.dtype))


# ---------------------------------------------------------------------------------- RNN-T's lattice


class _PathSum(torch.autograd.Function):
    """-log P of each row, (B,), with its gradient in closed form.

    Draw a path of the transcript from the model: let p be the probability that it takes a cell's
    blank, q that it writes the cell's token there. The gradient by the cell's logits is (p + q)
    times their softmax, minus p at the blank, minus q at the token. Autograd would get the same,
    but keep a softmax of the logits' size. Here it is made a second time, a slice of cells at a
    time, and the gradient is the only tensor as large as the logits.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        logits: Tensor,  # (B, T, U+1, V)
        ids: Tensor,  # (B, T, U+1, 2): the blank, and the token that the cell may write
        logit_lens: Tensor,
        target_lens: Tensor,
    ) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        # Filled in place: small results kept between the slices would leave a CPU's heap full of
        # holes, together as large as the logits.
        log_probs = torch.empty(ids.shape, dtype=wide, device=logits.device)
        for part, two, out in _slices(logits, ids, log_probs):
            out.copy_(_wide(part).log_softmax(-1).gather(1, two))
        log_p, taken = _path_posteriors(log_probs, logit_lens, target_lens)
        ctx.save_for_backward(logits, ids, taken)
        return -log_p

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, ids, taken = ctx.saved_tensors
        taken = taken * upstream[:, None, None, None]  # p and q
        gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        for part, two, p_q, out in _slices(logits, ids, taken, gradient):
            wide = _wide(part).softmax(-1).mul_(p_q.sum(1, keepdim=True))
            out.copy_(wide.scatter_add_(1, two, -p_q))
        return gradient, None, None, None


def _slices(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few cells of (B, T, U+1, V) logits and of others: (cells, V), (cells, ...) views."""
    few = 2**18 if logits.device.type == "cpu" else 2**26  # fits a CPU's cache; fills a GPU
    n = max(1, few // logits.shape[-1])
    return zip(*(x.flatten(0, 2).split(n) for x in (logits, *others)), strict=True)


def _path_posteriors(
    log_probs: Tensor, logit_lens: Tensor, target_lens: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum over all paths of each row, and how often each step is taken.

    Cells with the same n = t + u form diagonal n, and both steps lead to diagonal n + 1: the sums
    run over diagonals, for all rows and all cells of one at once. They are float64, which costs
    little on tensors V times smaller than the logits: differences of long sums would lose digits.

    Args:    log_probs (B, T, U+1, 2), of the blank and of the token of each cell.
    Returns: log P (B,); (B, T, U+1, 2) the probability that a path of the transcript takes that
             step there; both in the type of log_probs.
    """
    B, T, width, _ = log_probs.shape
    frame = torch.arange(T, device=log_probs.device)[:, None]
    place = torch.arange(width, device=log_probs.device)  # u
    ends = target_lens[:, None, None]
    in_row = (frame < logit_lens[:, None, None]) & (place <= ends)  # (B, T, U+1)
    may_take = torch.stack([in_row, in_row & (place < ends)], dim=-1)
    steps = log_probs.double().where(may_take, -torch.inf)

    frame_of = torch.arange(T + width - 1, device=log_probs.device)[:, None] - place  # (N, U+1)
    steps = steps[:, frame_of.clamp(0, T - 1), place]  # (B, N, U+1, 2)
    steps = steps.where(((frame_of >= 0) & (frame_of < T))[..., None], -torch.inf)
    log_p, taken = _sweep(*steps.permute(3, 1, 0, 2), logit_lens + target_lens, target_lens)
    taken = taken.permute(2, 1, 3, 0)[:, frame + place, place]  # (B, T, U+1, 2)
    return log_p.to(log_probs.dtype), taken.to(log_probs.dtype)


def _sweep(
    blank: Tensor, token: Tensor, end_diagonal: Tensor, end_place: Tensor
) -> tuple[Tensor, Tensor]:
    """Forward and backward over the diagonals (Graves 2012, section 2.4).

    Place u of diagonal n goes by its blank to place u of diagonal n + 1, by its token to u + 1.

    Args:    blank, token (N, B, U+1) log-probabilities, -inf where a row has no such step;
             end_diagonal, end_place (B,): where the last blank of each row leads.
    Returns: log P (B,); (2, N, B, U+1) probabilities that a path takes the blank, the token.
    """
    N, B, width = blank.shape
    # One place more than there is, so that the last place's token (-inf) has somewhere to lead.
    alpha = blank.new_full((N + 1, B, width + 1), -torch.inf)  # of coming from the start to here
    beta = torch.full_like(alpha, -torch.inf)  # of coming from here to the end
    alpha[0, :, 0] = 0
    beta[end_diagonal, torch.arange(B, device=blank.device), end_place] = 0
    for n in range(N):
        alpha[n + 1, :, :-1] = alpha[n, :, :-1] + blank[n]
        by_token = alpha[n, :, :-1] + token[n]
        alpha[n + 1, :, 1:] = torch.logaddexp(alpha[n + 1, :, 1:], by_token)
    for n in reversed(range(N)):
        onward = torch.logaddexp(blank[n] + beta[n + 1, :, :-1], token[n] + beta[n + 1, :, 1:])
        beta[n, :, :-1] = torch.logaddexp(beta[n, :, :-1], onward)
    log_p = beta[0, :, 0]
    here = alpha[:-1, :, :-1] - log_p[:, None]
    paths = torch.stack([here + blank + beta[1:, :, :-1], here + token + beta[1:, :, 1:]])
    return log_p, paths.exp()
