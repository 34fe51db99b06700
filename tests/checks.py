"""Properties that the tests of the modules share with test_broken_copies.py, where each must fail.

Every check_* takes the module it questions, so that it can be asked of a deliberately broken copy,
and raises AssertionError when the property does not hold. Small models and batches made by hand
stand beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import signal
from collections.abc import Iterable
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor, nn

import conformer
import data
from conformer import CLS_ID, MASK_ID, N_MELS, N_SPECIAL, PAD_ID, SEP_ID
from losses import BLANK_ID, Loss
from training import Rate

MICRO = dict(
    vocab_size=40, speech_layers=2, mm_layers=2, d_model=32, d_ff=48, n_heads=2, conv_kernel=5,
    subsample_channels=4, norm_groups=8, dropout=0.0, n_codes=8, code_dim=16,
)  # fmt: skip


def micro_config(**changes: object) -> conformer.SlamConfig:
    """A model of a few thousand parameters, without dropout."""
    return conformer.SlamConfig(**{**MICRO, **changes})


def ruffled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter away from 0 and 1, so that no bias or scale can hide a fault."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.1 * noise.to(parameter.dtype)
    return model


def apart(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the root mean square of what is expected."""
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.square().mean().sqrt())


# -------------------------------------------------------------------------------- batches by hand


def _span_masks(lens: Tensor, length: int, start: int, share: float) -> Tensor:
    """(B, length) bool: one run a row, from `start`, of about `share` of the row."""
    place = torch.arange(length)[None]
    return (place >= start) & (place < start + (share * lens.double()).long()[:, None])


def flat_index(masked: Tensor, n_filler: int) -> tuple[Tensor, Tensor]:
    """(B, T) bool -> flat places of the True ones, equally many a row; and their weights.

    The row with most of them has n_filler fillers, the others more.
    """
    T, sizes = masked.shape[1], masked.sum(1)
    m = int(sizes.max()) + n_filler
    # By a stable sort, places of True come first.
    places = (~masked).to(torch.int8).argsort(dim=1, stable=True)
    places = torch.cat([places, places.new_zeros(len(masked), m)], dim=1)[:, :m]  # (B, m)
    weight = conformer.valid_mask(sizes, m)
    index = places * weight + T * torch.arange(len(masked))[:, None]
    return index.flatten(), weight.flatten().float()


def speech_batch(
    frames: tuple[int, ...] = (72, 50), seed: int = 0, start: int = 3, share: float = 0.4
):
    """Random features; one masked run a row; three fillers or more."""
    generator = torch.Generator().manual_seed(seed)
    lens = torch.tensor(frames)
    features = 2 * torch.randn(len(frames), max(frames), N_MELS, generator=generator) - 1
    features = features * conformer.valid_mask(lens, max(frames))[..., None]
    enc_lens = conformer.subsampled_lens(lens)
    masked = _span_masks(enc_lens, int(enc_lens.max()), start, share)
    return data.SpeechBatch(features, lens, masked, *flat_index(masked, 3))


def text_batch(lens: tuple[int, ...] = (12, 9), vocab_size: int = 40, first: int = N_SPECIAL):
    """[CLS] and tokens that are all different; a masked run, all of it [MASK]; fillers."""
    n, longest = torch.tensor(lens), max(lens)
    clean = torch.full((len(lens), longest), PAD_ID)
    for b, length in enumerate(lens):
        clean[b, 0] = CLS_ID
        clean[b, 1:length] = first + torch.arange(length - 1) + b * (longest - 1)
    assert int(clean.max()) < vocab_size, int(clean.max())
    masked = _span_masks(n, longest, 2, 0.4)
    index, weight = flat_index(masked, 3)
    targets = torch.where(weight > 0, clean.flatten()[index], PAD_ID)
    return data.TextBatch(clean.masked_fill(masked, MASK_ID), n, index, weight, targets), clean


def pair_batch(frames: tuple[int, ...] = (60, 44), lens: tuple[int, ...] = (8, 6)):
    """Two pairs; the negatives are the same texts in the other order, of other lengths."""
    text, clean = text_batch(lens)
    speech = speech_batch(frames, seed=1, start=2, share=0.6)
    order = torch.arange(len(lens)).flip(0)
    return data.PairBatch(speech, text, text.tokens[order], text.lens[order], clean, clean[order])


def batch() -> data.Batch:
    """One micro-batch of all three streams."""
    return data.Batch(speech_batch(), text_batch()[0], pair_batch())


# ---------------------------------------------------------------------------------------- padding


def _junk_beyond(x: Tensor, lens: Tensor, length: int, junk: float = 1e3) -> Tensor:
    """Lengthen (B, L, ...) to `length` and put junk wherever a row has ended."""
    out = torch.full((x.shape[0], length, *x.shape[2:]), junk, dtype=x.dtype)
    out[:, : x.shape[1]] = x
    return out.masked_fill(~conformer.valid_mask(lens, length)[..., None], junk)


def _rows_equal_alone(run, x: Tensor, lens: Tensor, tolerance: float) -> None:
    """run(x, lens) -> (B, L, D): each row of the junk-padded batch equals that row alone."""
    together = run(_junk_beyond(x, lens, x.shape[1] + 9), lens)
    assert torch.isfinite(together).all()
    for b, n in enumerate(lens.tolist()):
        alone = run(x[b : b + 1, :n], lens[b : b + 1])
        difference = apart(together[b, : alone.shape[1]], alone[0])
        assert difference < tolerance, f"row {b} of {n}: {difference:.2e} away from itself alone"


@torch.no_grad()
def check_stack_ignores_padding(
    module: ModuleType, config, dtype=torch.float32, tolerance=1e-5, train=False
):
    """Conformer blocks: a row has one output, alone or in a batch whose padding holds 1e3."""
    torch.manual_seed(0)
    stack = (
        ruffled(module.ConformerStack(config, config.speech_layers + config.mm_layers))
        .to(dtype)
        .train(train)
    )
    x = torch.randn(4, 21, config.d_model, dtype=dtype)
    _rows_equal_alone(stack, x, torch.tensor([21, 1, 8, 2]), tolerance)


@torch.no_grad()
def check_speech_ignores_padding(
    module: ModuleType, config, dtype=torch.float32, tolerance=1e-5, train=False
):
    """Log-mel to the top of the stack, with 1e3 in the padding before and after convolving."""
    torch.manual_seed(1)  # over seeds 5e-6 to 12e-6: rounding of two frames, through 12 blocks
    encoder = ruffled(module.SlamEncoder(config)).to(dtype).train(train)
    encoder.speech.feature_mean.fill_(0.5)

    def run(features: Tensor, frame_lens: Tensor) -> Tensor:
        conv, lens = encoder.speech.subsample(features, frame_lens)
        conv = _junk_beyond(conv, lens, conv.shape[1])
        context, states = encoder.speech.encode(conv, lens)
        return torch.cat([context, states, encoder.multimodal(states, lens)], dim=2)

    features = torch.randn(4, 61, N_MELS, dtype=dtype)
    frame_lens = torch.tensor([61, 5, 34, 1])
    together = run(_junk_beyond(features, frame_lens, 83), frame_lens)
    for b, n in enumerate(frame_lens.tolist()):
        alone = run(features[b : b + 1, :n], frame_lens[b : b + 1])
        difference = apart(together[b, : alone.shape[1]], alone[0])
        assert (
            difference < tolerance
        ), f"row {b} of {n} frames: {difference:.2e} away from itself alone"


@torch.no_grad()
def check_pairs_ignore_padding(
    module: ModuleType, config, dtype=torch.float32, tolerance=1e-5, train=False
):
    """A joined pair has one output, whatever padding its speech and its text came with."""
    torch.manual_seed(0)
    text_side = ruffled(module.TextEmbedder(config)).to(dtype).train(train)
    stack = ruffled(module.ConformerStack(config, config.mm_layers)).to(dtype).train(train)
    speech, tokens = torch.randn(3, 13, config.d_model, dtype=dtype), torch.randint(5, 40, (3, 9))
    speech_lens, text_lens = torch.tensor([13, 2, 7]), torch.tensor([4, 9, 1])
    wide = _junk_beyond(speech, speech_lens, 13 + 6)
    more_tokens = torch.randint(5, 40, (3, 9 + 4))  # padding is any token at all
    more_tokens[:, :9] = tokens.where(conformer.valid_mask(text_lens, 9), more_tokens[:, :9])
    joined, lens = module.join(wide, speech_lens, text_side(more_tokens), text_lens)
    together = stack(joined, lens)
    for b, (t, u) in enumerate(zip(speech_lens.tolist(), text_lens.tolist(), strict=True)):
        alone = torch.cat([speech[b : b + 1, :t], text_side(tokens[b : b + 1, :u])], dim=1)
        assert int(lens[b]) == t + u
        assert torch.equal(
            joined[b, : t + u], alone[0]
        ), "the text starts right after the last valid speech frame"
        difference = apart(together[b, : t + u], stack(alone, torch.tensor([t + u]))[0])
        assert (
            difference < tolerance
        ), f"pair {b} of {t}+{u}: {difference:.2e} away from itself alone"


@torch.no_grad()
def check_subsampled_padding_is_zero(module: ModuleType, config) -> None:
    """After the convolutions padding is exactly 0 and the last valid frame is what it is alone."""
    torch.manual_seed(0)
    subsampling = ruffled(module.ConvSubsampling(config))
    lens = torch.arange(1, 65)
    features = torch.randn(64, 64, N_MELS)
    out, out_lens = subsampling(_junk_beyond(features, lens, 64), lens)
    assert out.shape[1] == 16 and torch.equal(out_lens, module.subsampled_lens(lens))
    for b, n in enumerate(out_lens.tolist()):
        alone, _ = subsampling(features[b : b + 1, : b + 1], lens[b : b + 1])
        assert alone.shape[1] == n, f"{b + 1} frames become {alone.shape[1]}, not {n}"
        assert bool((out[b, n:] == 0).all()), f"{b + 1} frames: padding is not 0"
        assert apart(out[b, :n], alone[0]) < 1e-5, f"{b + 1} frames differ from themselves alone"


# -------------------------------------------------------------------------------------- quantizer


def check_vectors_are_codebook_rows(module: ModuleType, n_codebooks: int = 1) -> None:
    """Forward takes exactly one entry a group; backward reaches the logits' weights."""
    torch.manual_seed(0)
    quantizer = module.GumbelQuantizer(12, n_codebooks, 7, 6, (2.0, 0.9, 0.5))
    features, weight = torch.randn(9, 12), torch.ones(9)
    for training in (True, False):
        q = quantizer.train(training)(features, weight)
        rows = torch.stack(
            [quantizer.codebook[g][q.drawn[:, g]] for g in range(n_codebooks)], dim=1
        )
        assert torch.equal(q.vectors, rows.flatten(1)), "a vector is not a codebook row"
        if not training:
            assert torch.equal(q.drawn, q.ids)
    q = quantizer.train()(features, weight)
    q.vectors.square().sum().backward()
    for name in ("logits.weight", "logits.bias", "codebook", "norm.weight"):
        gradient = quantizer.get_parameter(name).grad
        assert (
            gradient is not None and float(gradient.abs().max()) > 0
        ), f"no gradient reaches {name}"


def check_temperature_counts_optimiser_steps(module: ModuleType) -> None:
    """After n optimiser steps of 5 forward passes each: max(start x factor^n, floor).

    A checkpoint keeps it.
    """
    start, factor, floor = 2.0, 0.9, 0.5
    quantizer = module.GumbelQuantizer(12, 1, 7, 6, (start, factor, floor))
    for n in range(20):
        expected = max(start * factor**n, floor)
        assert abs(float(quantizer.temperature) - expected) < 1e-12, (
            n,
            float(quantizer.temperature),
        )
        for training in (True, True, True, True, False):
            quantizer.train(training)(torch.randn(3, 12), torch.ones(3))
        quantizer.step += 1
        resumed = module.GumbelQuantizer(12, 1, 7, 6, (start, factor, floor))
        resumed.load_state_dict(quantizer.state_dict())
        assert float(resumed.temperature) == float(quantizer.temperature)


def check_ids_are_free_of_noise(module: ModuleType) -> None:
    """The ids to predict are the same under any seed, equal name()'s, and carry no gradient."""
    torch.manual_seed(0)
    quantizer = module.GumbelQuantizer(12, 2, 7, 6, (2.0, 0.9, 0.5)).train()
    features, drawn = torch.randn(50, 12, requires_grad=True), []
    for seed in range(3):
        torch.manual_seed(seed)
        q = quantizer(features, torch.ones(50))
        assert torch.equal(q.ids, quantizer.name(features)), "noise chose the ids"
        assert not q.ids.requires_grad and q.ids.dtype == torch.int64
        drawn.append(q.drawn)
    assert not torch.equal(drawn[0], drawn[1]), "the drawn entries should differ between seeds"


# ----------------------------------------------------------------------------------------- losses


def check_negatives(module: ModuleType, n_negatives: int = 200) -> None:
    """Mapped back to (row, frame), distractors are other masked frames of the same row.

    Rows that have no other say so.
    """
    torch.manual_seed(0)
    B, T = 5, 12
    masked = torch.zeros(B, T, dtype=torch.bool)
    for b, frames in enumerate(([1, 2, 5, 6, 11], [4], [0, 3, 7], [], [2, 3, 8, 9, 10, 11])):
        masked[b, frames] = True
    index, weight = flat_index(masked, 1)
    weight = weight.view(B, -1)
    at = index.view(B, -1) % T  # (B, m) frames
    negatives, usable = module.sample_negatives(weight, n_negatives)
    assert negatives.shape == (*weight.shape, n_negatives) and negatives.dtype == torch.int64
    assert usable.sum(1).tolist() == [5, 0, 3, 0, 6] and torch.equal(usable, usable & (weight > 0))
    assert 0 <= int(negatives.min()) and int(negatives.max()) < weight.shape[1]
    for row, place in usable.nonzero().tolist():
        drawn = negatives[row, place]
        assert bool((weight[row, drawn] == 1).all()), "filler was drawn"
        frames, frame = at[row, drawn], int(at[row, place])
        assert bool((frames != frame).all()), "the positive was drawn as a distractor"
        others = set(masked[row].nonzero()[:, 0].tolist()) - {frame}
        assert set(frames.tolist()) == others, "not every other masked frame is ever drawn"


def check_distractors_are_of_the_same_utterance(module: ModuleType) -> None:
    """What another utterance holds changes nothing."""
    torch.manual_seed(0)
    context, target = torch.randn(2, 8, 6)
    usable = torch.tensor([[True] * 4, [False] * 4])
    negatives, _ = module.sample_negatives(torch.ones(2, 4), 5)
    alone = module.contrastive(context[:4], target[:4], negatives[:1], usable[:1], None)
    for other in (target[4:], 100 * torch.randn(4, 6)):
        both = torch.cat([target[:4], other])
        loss = module.contrastive(context, both, negatives, usable, None)
        assert abs(float(loss.sum) - float(alone.sum)) < 1e-5, "another utterance is read"


def check_equal_codes_are_struck_out(module: ModuleType) -> None:
    """A distractor with the positive's codes cannot count: equal codes have count 0 and loss 0."""
    torch.manual_seed(0)
    context, target = torch.randn(4, 6), torch.randn(1, 6).expand(4, 6)
    negatives = torch.tensor([[[1, 2], [2, 3], [3, 0], [0, 1]]])
    usable = torch.ones(1, 4, dtype=torch.bool)
    collapsed = module.contrastive(
        context, target, negatives, usable, torch.zeros(4, 1, dtype=torch.int64)
    )
    assert float(collapsed.count) == 0 and float(collapsed.sum) == 0
    assert float(collapsed.correct) == 0 and float(collapsed.blind_correct) == 0
    # Frame 1 repeats frame 0's code: frame 0 keeps distractor 2 alone.
    target = torch.randn(4, 6)
    target[1] = target[0]
    kept = module.contrastive(
        context, target, negatives, usable, torch.tensor([[0], [0], [1], [2]])
    )
    cosine = torch.nn.functional.cosine_similarity(context[0], target[[0, 2]]) / 0.1
    first = torch.tensor([[True, False, False, False]])
    only = module.contrastive(context, target, negatives, first, torch.tensor([[0], [0], [1], [2]]))
    assert abs(float(only.sum) - float(cosine.logsumexp(0) - cosine[0])) < 1e-5
    assert abs(float(kept.blind_correct) - (1 / 2 + 3 * 1 / 3)) < 1e-6


@torch.no_grad()
def check_diversity_grows_with_the_frames(losses: ModuleType, quantizer: ModuleType) -> None:
    """The same frames twice: twice the sum, as for the losses that it is added to."""
    torch.manual_seed(0)
    module = quantizer.GumbelQuantizer(12, 2, 7, 6, (2.0, 0.9, 0.5))
    features, weight, sums = torch.randn(10, 12), torch.ones(10), []
    for times in (1, 2):
        q = module(features.repeat(times, 1), weight.repeat(times))
        sums.append(
            losses.diversity(q.soft_perplexity, q.hard_counts.numel(), weight.repeat(times))
        )
    assert float(sums[0].sum) > 0
    assert abs(float(sums[1].sum) - 2 * float(sums[0].sum)) < 1e-4
    assert float(sums[1].count) == 2 * float(sums[0].count) == 20


# ------------------------------------------------------------------------------------------ RNN-T


def rnnt_path_sum(logits: Tensor, target: list[int], blank: int) -> Tensor:
    """-log of the summed probability of every path, one path at a time: logits (T, U+1, V) -> ().

    A path is which of its first T + U - 1 steps write a token; its last step is a blank.
    """
    T, U = logits.shape[0], logits.shape[1] - 1
    log_probs, paths = logits.log_softmax(-1), []
    for writes in itertools.combinations(range(T + U - 1), U):
        t, u, path = 0, 0, logits.new_zeros(())
        for step in range(T + U):
            if step in writes:
                path, u = path + log_probs[t, u, target[u]], u + 1
            else:
                path, t = path + log_probs[t, u, blank], t + 1
        paths.append(path)
    return -torch.stack(paths).logsumexp(0)


def rnnt_batch(blank: int, V: int = 5) -> tuple[Tensor, ...]:
    """Logits, lens, targets, target_lens: rows with more frames than tokens, fewer, as many."""
    generator = torch.Generator().manual_seed(0)
    lens, target_lens = torch.tensor([4, 1, 3, 1, 2, 4]), torch.tensor([2, 3, 3, 1, 0, 0])
    logits = 2 * torch.randn(6, 4, 4, V, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, V - 1, (6, 3), generator=generator)
    return logits, lens, targets + (targets >= blank), target_lens


def rnnt_by_paths(logits: Tensor, lens: Tensor, targets: Tensor, target_lens: Tensor, blank: int):
    """() the sum over rows of rnnt_path_sum."""
    rows = zip(logits, lens.tolist(), targets.tolist(), target_lens.tolist(), strict=True)
    return sum(rnnt_path_sum(x[:t, : u + 1], ids[:u], blank) for x, t, ids, u in rows)


def check_rnnt_equals_the_sum_over_paths(module: ModuleType) -> None:
    """Loss and gradient are those of enumerating all paths, with the blank first or last."""
    for blank in (0, 4):
        logits, *rest = rnnt_batch(blank)
        logits.requires_grad_()
        loss, expected = module.rnnt(logits, *rest, blank), rnnt_by_paths(logits, *rest, blank)
        assert abs(float((loss.sum - expected).detach())) < 1e-10, "the loss differs"
        assert float(loss.count) == float(rest[2].sum())
        (gradient,) = torch.autograd.grad(loss.sum, logits)
        (slow,) = torch.autograd.grad(expected, logits)
        assert float((gradient - slow).abs().max()) < 1e-10, "the gradient differs"


def check_rnnt_ignores_padding(module: ModuleType) -> None:
    """What stands beyond a row's lengths, 1e30 or any id, has no effect and no gradient."""
    logits, lens, targets, target_lens = rnnt_batch(0)
    inside = conformer.valid_mask(lens, 6)[:, :, None]
    inside = inside & conformer.valid_mask(target_lens + 1, 6)[:, None]  # (B, 6, 6)
    wide = torch.full((6, 6, 6, 5), 1e30, dtype=torch.float64)
    wide[:, :4, :4] = logits
    wide = wide.where(inside[..., None], 1e30 * torch.randn(wide.shape, dtype=torch.float64))
    more = torch.full((6, 5), 10**9)
    more[:, :3] = targets
    more = more.where(conformer.valid_mask(target_lens, 5), 10**9)
    own, padded = logits.clone().requires_grad_(), wide.requires_grad_()
    one = module.rnnt(own, lens, targets, target_lens)
    two = module.rnnt(padded, lens, more, target_lens)
    assert abs(float((one.sum - two.sum).detach())) < 1e-10, "padding changes the loss"
    assert float(one.count) == float(two.count)
    (gradient,) = torch.autograd.grad(two.sum, padded)
    assert bool((gradient[~inside] == 0).all()), "padding has a gradient"
    (expected,) = torch.autograd.grad(one.sum, own)
    assert float((gradient[:, :4, :4] - expected).abs().max()) < 1e-10


def small_transducer(module: ModuleType, seed: int = 0, V: int = 3) -> nn.Module:
    """Float64, in eval mode, with weights large enough for its steps to differ."""
    torch.manual_seed(seed)
    model = module.Transducer(V, 4, dim=6, n_layers=2, joint_dim=6, dropout=0.1).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2
    return model


@torch.no_grad()
def check_beam_finds_the_best_of_all(module: ModuleType) -> None:
    """A beam that holds everything: each transcript of up to 3 tokens, in order of its probability.

    Each transcript is scored by enumerating its paths.
    """
    for seed in range(3):
        model, lens = small_transducer(module, seed), torch.tensor([4, 2, 1])
        states = torch.randn(3, 4, 4, dtype=torch.float64)
        found = model.beam(states, lens, width=40, u_max=3)
        for b, n in enumerate(lens.tolist()):
            expected = {}
            for ids in itertools.chain(*(itertools.product((1, 2), repeat=u) for u in range(4))):
                targets, u = torch.tensor([ids], dtype=torch.int64), torch.tensor([len(ids)])
                logits = model(states[b : b + 1, :n], lens[b : b + 1], targets, u)
                expected[ids] = -float(rnnt_path_sum(logits[0], list(ids), 0))
            order = sorted(expected, key=expected.get, reverse=True)
            assert [tuple(h.tokens) for h in found[b]] == order, "not all, or not in order"
            for hypothesis in found[b]:
                assert abs(hypothesis.score - expected[tuple(hypothesis.tokens)]) < 1e-9


def reciting_transducer(module: ModuleType, sequence: list[int], V: int) -> nn.Module:
    """A transducer whose logits force a sequence of different ids, whatever it hears.

    Its LSTM has no memory: it passes the id on that it read. Each id calls for the one after it,
    the blank for the first, the last for the blank.
    """
    model = module.Transducer(V, 2, dim=V, n_layers=1, joint_dim=V, dropout=0.0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embedding.weight.copy_(10 * torch.eye(V))
        model.lstm.weight_ih_l0[2 * V : 3 * V] = torch.eye(V)
        gates = torch.tensor([30.0, -30.0, 0.0, 30.0])  # in, forget, cell, out
        model.lstm.bias_ih_l0.copy_(gates.repeat_interleave(V))
        model.from_text.weight.copy_(10 * torch.eye(V))
        for read, wanted in itertools.pairwise([0, *sequence, 0]):
            model.out.weight[wanted, read] = 50
    return model


@torch.no_grad()
def check_recognition_begins_as_training_does(losses: ModuleType, module: ModuleType) -> None:
    """A transducer that can only recite: the loss is 0, both searches find what it recites.

    icefall#324: one "token before the first" in training and another in decoding.
    """
    sequence, states, lens = [3, 1, 4, 2], torch.randn(2, 3, 2), torch.tensor([3, 1])
    model, targets = reciting_transducer(module, sequence, 6), torch.tensor([sequence] * 2)
    target_lens = torch.tensor([4, 4])
    logits = model(states, lens, targets, target_lens)
    assert float(losses.rnnt(logits, lens, targets, target_lens).sum) < 1e-3
    assert model.greedy(states, lens) == [sequence] * 2
    for width in (1, 3):
        best = [row[0] for row in model.beam(states, lens, width, u_max=8)]
        assert [hypothesis.tokens for hypothesis in best] == [sequence] * 2
        assert all(abs(hypothesis.score) < 1e-3 for hypothesis in best)


# --------------------------------------------------------------------------------------- decoders


def label_scores(log_probs: Tensor) -> dict[tuple[int, ...], float]:
    """The log-probability of every label sequence of (T, V), by going through all V^T paths."""
    T, V = log_probs.shape
    total = {}
    for path in itertools.product(range(V), repeat=T):
        probability = math.exp(sum(float(log_probs[t, v]) for t, v in enumerate(path)))
        total[collapsed(path)] = total.get(collapsed(path), 0.0) + probability
    return {labels: math.log(probability) for labels, probability in total.items()}


def collapsed(path: Iterable[int]) -> tuple[int, ...]:
    """The labels of a CTC path: runs merged, then blanks removed."""
    return tuple(v for v, _ in itertools.groupby(path) if v != BLANK_ID)


def check_prefix_beam_sums_over_alignments(module: ModuleType, T: int = 5, V: int = 3) -> None:
    """With a beam wide enough for everything: all label sequences, with their full probability."""
    torch.manual_seed(0)
    log_probs = (2 * torch.randn(3, T, V, dtype=torch.float64)).log_softmax(-1)
    lens = torch.tensor([T, T - 1, 1])
    for row, n, hypotheses in zip(
        log_probs, lens, module.ctc_prefix_beam(log_probs, lens, V**T), strict=True
    ):
        expected = label_scores(row[:n])
        assert {tuple(h.tokens) for h in hypotheses} == expected.keys()
        assert len(hypotheses) == len(expected), "a sequence is there twice"
        for tokens, score in hypotheses:
            assert abs(score - expected[tuple(tokens)]) < 1e-9, (tokens, score)
        scores = [h.score for h in hypotheses]
        assert scores == sorted(scores, reverse=True), "not the best first"


def check_alignment_is_the_best_path(module: ModuleType) -> None:
    """Score and spans are those of the best of all paths that collapse to the targets."""
    torch.manual_seed(0)
    for T, targets in ((4, [1, 2]), (5, [1, 1]), (6, [2, 2, 1]), (3, [1, 1]), (3, [2, 1, 2]),
                       (1, [2]), (3, [])):  # fmt: skip
        log_probs = (2 * torch.randn(T, 3, dtype=torch.float64)).log_softmax(-1)
        spans, score = module.ctc_align(log_probs, torch.tensor(targets, dtype=torch.int64))
        paths = itertools.product(range(3), repeat=T)
        best = max(
            sum(float(log_probs[t, v]) for t, v in enumerate(path))
            for path in paths
            if collapsed(path) == tuple(targets)
        )
        assert abs(score - best) < 1e-9, f"{targets} in {T} frames: {score}, not {best}"
        assert spans.shape == (len(targets), 2) and spans.dtype == torch.int64
        path = [BLANK_ID] * T
        for token, (first, last) in zip(targets, spans.tolist(), strict=True):
            assert 0 <= first <= last < T
            path[first : last + 1] = [token] * (last + 1 - first)
        along = sum(float(log_probs[t, v]) for t, v in enumerate(path))
        assert collapsed(path) == tuple(targets) and abs(along - score) < 1e-9


def small_decoder(module: ModuleType, seed: int = 0, sharpness: float = 5.0, **changes: object):
    """A decoder of random weights in float64, eval mode, whose answers are not all alike."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=5, memory_dim=6, dim=8, n_layers=2, n_heads=2, d_ff=12, dropout=0.1)
    decoder = ruffled(module.TransformerDecoder(**{**sizes, "n_tags": 3, **changes}), seed)
    with torch.no_grad():
        decoder.output.weight *= sharpness
    return decoder.double().eval()


def decoder_inputs(lens: tuple[int, ...] = (7, 3, 5), seed: int = 0, memory_dim: int = 6):
    """(memory, memory_lens, tags): random states, another tag for each row."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(lens), max(lens), memory_dim
    memory = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return memory, torch.tensor(lens), torch.arange(len(lens)) % 3


def with_fixed_answers(module: ModuleType, probabilities: dict[int, float]):
    """A decoder that gives each token the same probability at every position."""
    decoder = small_decoder(module)
    with torch.no_grad():
        decoder.output.weight.zero_()
        decoder.output.bias.fill_(-1e4)
        for token, probability in probabilities.items():
            decoder.output.bias[token] = math.log(probability)
    return decoder


@torch.no_grad()
def check_decoder_ignores_memory_padding(module: ModuleType) -> None:
    """A row alone, and in a batch whose padding holds 1e3; a row of no frames reads nothing."""
    decoder, (memory, lens, tags) = small_decoder(module), decoder_inputs((7, 1, 4, 0))
    tokens = torch.randint(0, 5, (4, 6))
    together = decoder(tokens, tags, _junk_beyond(memory, lens, 12), lens)
    assert torch.isfinite(together).all()
    other = decoder(tokens, tags, _junk_beyond(memory, lens, 12, junk=-7.0), lens)
    assert torch.equal(together, other), "what the padding holds matters"
    for b, n in enumerate(lens.tolist()):
        row = slice(b, b + 1)
        alone = decoder(tokens[row], tags[row], memory[row, : max(n, 1)], lens[row])
        difference = apart(together[b], alone[0])
        assert difference < 1e-10, f"row {b} of {n}: {difference:.2e} away from itself alone"


@torch.no_grad()
def sequence_scores(decoder, tokens: Tensor, tag: Tensor, memory: Tensor) -> list[float]:
    """Log-probabilities of (N, U) whole sequences and their ends, by forward, without a cache."""
    N, U = tokens.shape
    memory, lens = memory.expand(N, -1, -1), torch.full((N,), memory.shape[0])
    log_probs = decoder(tokens, tag.expand(N), memory, lens).log_softmax(-1)
    targets = torch.cat([tokens, torch.full((N, 1), SEP_ID)], dim=1)
    return log_probs.gather(2, targets[..., None]).sum((1, 2)).tolist()


def check_beam_scores_are_those_of_forward(module: ModuleType) -> None:
    """A hypothesis that the search returns has the score that forward gives to its tokens."""
    changed_places = 0
    for seed in range(8):
        decoder, (memory, lens, tags) = small_decoder(module, seed), decoder_inputs()
        for b, n_best in enumerate(decoder.beam(memory, lens, tags, 3, 7)):
            changed_places += n_best[0].tokens != decoder.greedy(memory, lens, tags, 7)[b]
            for tokens, score in n_best:
                its_tokens = torch.tensor([tokens], dtype=torch.int64)
                (expected,) = sequence_scores(decoder, its_tokens, tags[b], memory[b, : lens[b]])
                if len(tokens) < 7:  # else it may be one that did not end
                    assert abs(score - expected) < 1e-9, f"{tokens}: {score}, not {expected}"
    assert changed_places, "the best hypothesis was always the first: this shows nothing"


def check_exhaustive_beam_finds_the_best(module: ModuleType, alpha: float = 0.0) -> None:
    """A beam wide enough for everything ranks all sequences as brute force does."""
    decoder, (memory, lens, tags) = small_decoder(module, sharpness=2.0), decoder_inputs((4, 2))
    V, limits = 5, torch.tensor([3, 2])
    found = decoder.beam(memory, lens, tags, 4**3 * V, limits, alpha)
    for b, n_best in enumerate(found):
        expected = {}
        for U in range(int(limits[b]) + 1):
            labels = [v for v in range(V) if v != SEP_ID]
            every = list(itertools.product(labels, repeat=U))
            tokens = torch.tensor(every, dtype=torch.int64).view(len(every), U)
            scores = sequence_scores(decoder, tokens, tags[b], memory[b, : lens[b]])
            expected |= dict(zip(every, scores, strict=True))
        ranked = sorted(
            expected, key=lambda t: expected[t] / ((5 + len(t)) / 6) ** alpha, reverse=True
        )
        assert [tuple(h.tokens) for h in n_best] == ranked
        assert all(abs(h.score - expected[tuple(h.tokens)]) < 1e-9 for h in n_best)


def check_length_penalty_prefers_longer_answers(module: ModuleType) -> None:
    """Token 1 or the end, with the same odds at every position: an empty answer is the likeliest.

    A penalty turns to the longest one. Where token 1 is improbable, that one is only met by a
    search that looks past answers that rank better for the time being.
    """
    for p, limit, alphas in ((0.8, 6, (0.0, 0.5, 0.8, 1.0, 2.0)), (0.2, 40, (0.0, 1.0, 2.0, 3.0))):
        decoder = with_fixed_answers(module, {1: p, SEP_ID: 1 - p})
        lengths = []
        for alpha in alphas:
            tokens, score = decoder.beam(*decoder_inputs((2,)), 2, limit, alpha)[0][0]
            lengths.append(len(tokens))
            expected = len(tokens) * math.log(p) + math.log(1 - p)
            assert abs(score - expected) < 1e-9, "the score is not the plain log-probability"
        assert lengths == sorted(lengths) and lengths[0] == 0 and lengths[-1] == limit, lengths


# -------------------------------------------------------------------------------------- the model


def check_codes_name_unmasked_speech(module: ModuleType) -> None:
    """Whatever is masked, a frame's id is that of the unmasked features, in w2v-BERT and TLM."""
    torch.manual_seed(0)
    model = module.SlamPretraining(micro_config(), module.Objectives())
    seen, name = [], model.quantizer.name
    model.quantizer.register_forward_hook(lambda _, inputs, output: seen.append(output.ids))
    model.quantizer.name = lambda features: seen.append(name(features)) or seen[-1]
    for start, share in ((0, 0.3), (3, 0.4), (5, 0.6)):
        batch = pair_batch()
        speech = batch.speech
        conv, lens = model.encoder.speech.subsample(speech.features, speech.feature_lens)
        names = name(conv.flatten(0, 1))
        assert len(names.unique()) > 2
        masked = _span_masks(lens, speech.masked.shape[1], start, share)
        index, weight = flat_index(masked, 2)
        speech = data.SpeechBatch(speech.features, speech.feature_lens, masked, index, weight)
        seen.clear()
        model.speech_losses(speech)
        model.pair_losses(dataclasses.replace(batch, speech=speech))
        assert len(seen) == 2, "ids are asked for once by w2v-BERT and once by TLM"
        for ids in seen:
            assert torch.equal(ids, names[index]), f"a mask from {start} changes the ids"


# --------------------------------------------------------------------------------------- training


class _Toy(nn.Module):
    """Least squares in float64, as a model that training.train can drive."""

    loss_names = ["squares"]

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))

    def forward(self, batch: _ToyBatch) -> tuple[dict[str, Loss], dict[str, Tensor]]:
        error = batch.x @ self.weight - batch.y
        return {"squares": Loss(error.square().sum(), torch.tensor(float(len(error))))}, {}

    def work(self, batch: _ToyBatch) -> dict[str, float]:
        return {}

    def counts(self, batch: _ToyBatch) -> dict[str, float]:
        return {"squares": float(len(batch.x))}

    def step_done(self) -> None:
        pass


class _ToyBatch:
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def to(self, device: torch.device, non_blocking: bool = False) -> _ToyBatch:
        return self


class _Stepped(Exception):
    """The gradient that an optimiser would have stepped with; nothing after it is of interest."""


class _StopAtStep:
    """Stands for an optimiser."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.param_groups = model, [Rate()._asdict()]

    def step(self) -> None:
        raise _Stepped(self.model.weight.grad.clone())


def check_two_ranks_equal_one_process(training: ModuleType) -> None:
    """Ranks with 5 and 2 positions: their averaged gradients are that of the mean over all 7.

    The ranks are played one after the other: each gets the other's counts from its all-reduce, and
    the average that DistributedDataParallel would take is taken here.
    """
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(7, 3, generator=generator).double(),
        torch.randn(7, generator=generator).double(),
    )
    parts = [_ToyBatch(x[:5], y[:5]), _ToyBatch(x[5:], y[5:])]

    class Played(training.Ranks):
        def sum(self, values: Tensor) -> Tensor:
            if self.world_size > 1 and values.numel() == 2:  # (count, stop flag)
                values[0] += len(parts[1 - self.rank].x)
            return values

    def gradient(rank: int, world_size: int, batches: list[_ToyBatch]) -> Tensor:
        model = _Toy()
        args = argparse.Namespace(
            micro_batches=max(world_size, len(batches)), max_steps=1, lr=1.0, warmup_steps=1,
            dtype="fp64", grad_clip=1e9, loss_weights={}, log_every=1, eval_every=0,
            save_every=2, max_bad_steps=1, seed=0, fast="none", reduce_dtype="fp32",
        )  # fmt: skip
        try:
            ranks = Played(rank, rank, world_size, torch.device("cpu"))
            optimizer = _StopAtStep(model)
            training.train(
                model, iter(batches), args, ranks, 0, optimizer=optimizer, on_log=None, on_save=None
            )
        except _Stepped as stepped:
            return stepped.args[0]
        raise AssertionError("the optimiser was never asked to step")

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with mock.patch.object(training.fast, "DistributedDataParallel", lambda model, **_: model):
            ranks = torch.stack([gradient(rank, 2, [parts[rank]]) for rank in (0, 1)]).mean(0)
        one = gradient(0, 1, parts)
        whole = gradient(0, 1, [_ToyBatch(x, y)])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    expected = 2 / 7 * x.T @ (x @ _Toy().weight.detach() - y)
    assert apart(whole, expected) < 1e-6  # the scale 1/7 is made in float32
    assert apart(one, whole) < 1e-12, "accumulation differs from one batch"
    assert (
        apart(ranks, whole) < 1e-12
    ), f"two ranks have {ranks.tolist()}, one process {whole.tolist()}"
