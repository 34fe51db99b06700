"""Properties of decoders.py: searches against brute force, the cache against no cache, padding."""

import dataclasses
import itertools
import math

import checks
import pytest
import torch
import torch.nn.functional as F
from checks import (
    collapsed,
    decoder_inputs,
    label_scores,
    micro_config,
    small_decoder,
    with_fixed_answers,
)
from torch import Tensor

import decoders
import losses as L
from conformer import PAD_ID, SEP_ID
from decoders import (
    Attention,
    Classifier,
    HeadConfig,
    Hypothesis,
    TaskBatch,
    TaskModel,
    TransformerDecoder,
    ctc_align,
    ctc_greedy,
    ctc_prefix_beam,
    length_penalised,
)
from losses import BLANK_ID


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random_log_probs(*shape: int) -> Tensor:
    return (2 * torch.randn(*shape, dtype=torch.float64)).log_softmax(-1)


def path_logits(path: list[int], V: int = 4) -> Tensor:
    """(1, T, V) log-probabilities of which this path is the most probable."""
    return (3.0 * F.one_hot(torch.tensor([path]), V)).log_softmax(-1)


# --------------------------------------------------------------------------------------------- CTC


def test_greedy_merges_runs_and_then_removes_blanks():
    log_probs, lens = random_log_probs(50, 12, 4), torch.randint(0, 13, (50,))
    expected = [
        list(collapsed(row[:n].argmax(-1).tolist())) for row, n in zip(log_probs, lens, strict=True)
    ]
    assert ctc_greedy(log_probs, lens) == expected
    assert any(a == b for row in expected for a, b in itertools.pairwise(row))


@pytest.mark.parametrize(
    "path, labels",
    [([1, 1, 2], [1, 2]), ([1, 0, 1], [1, 1]), ([0, 0, 3], [3]), ([0, 0, 0], []), ([2], [2])],
)
def test_a_blank_keeps_equal_labels_apart(path, labels):
    log_probs, lens = path_logits(path), torch.tensor([len(path)])
    assert ctc_greedy(log_probs, lens) == [labels]
    assert ctc_prefix_beam(log_probs, lens, 8)[0][0].tokens == labels


def test_an_exhaustive_prefix_beam_equals_brute_force():
    checks.check_prefix_beam_sums_over_alignments(decoders)
    checks.check_prefix_beam_sums_over_alignments(decoders, T=4, V=4)


def test_the_most_probable_labels_need_not_be_on_the_most_probable_path():
    """Two frames, blank 0.6, label 0.4: blanks alone have 0.36, the label by three paths 0.64."""
    log_probs, lens = torch.tensor([[[0.6, 0.4]] * 2]).log(), torch.tensor([2])
    assert ctc_greedy(log_probs, lens) == [[]]
    best, second = ctc_prefix_beam(log_probs, lens, 4)[0]
    assert best.tokens == [1] and math.isclose(math.exp(best.score), 0.64, rel_tol=1e-6)
    assert second.tokens == [] and math.isclose(math.exp(second.score), 0.36, rel_tol=1e-6)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_narrow_prefix_beam_scores_no_sequence_above_its_probability(width):
    log_probs = random_log_probs(4, 6, 3)
    found = ctc_prefix_beam(log_probs, torch.full((4,), 6), width)
    for row, n_best in zip(log_probs, found, strict=True):
        expected = label_scores(row)
        assert len(n_best) == len({tuple(h.tokens) for h in n_best}) == width
        assert all(h.score <= expected[tuple(h.tokens)] + 1e-9 for h in n_best)


def whole_vocabulary_beam(log_probs: Tensor, width: int) -> dict[tuple[int, ...], float]:
    """Prefix beam search of (T, V) in probabilities, every label tried on every prefix."""
    beam = {(): (1.0, 0.0)}
    for frame in log_probs.exp().tolist():
        grown = {}
        for prefix, (blank, symbol) in beam.items():
            stay = symbol * frame[prefix[-1]] if prefix else 0.0
            gains = [(prefix, (blank + symbol) * frame[BLANK_ID], stay)]
            for label in range(1, len(frame)):
                before = blank if prefix[-1:] == (label,) else blank + symbol
                gains.append(((*prefix, label), 0.0, before * frame[label]))
            for longer, in_blank, in_symbol in gains:
                old = grown.get(longer, (0.0, 0.0))
                grown[longer] = old[0] + in_blank, old[1] + in_symbol
        beam = dict(sorted(grown.items(), key=lambda item: -sum(item[1]))[:width])
    return {prefix: math.log(sum(masses)) for prefix, masses in beam.items()}


@pytest.mark.parametrize("width", [1, 3, 10])
def test_labels_that_are_not_tried_would_not_have_been_kept(width):
    """Of 30 symbols a frame the search tries width + 1: the result is that of trying all."""
    log_probs = random_log_probs(5, 15, 30)
    found = ctc_prefix_beam(log_probs, torch.full((5,), 15), width)
    for row, n_best in zip(log_probs, found, strict=True):
        expected = whole_vocabulary_beam(row, width)
        assert [tuple(h.tokens) for h in n_best] == list(expected)
        torch.testing.assert_close([h.score for h in n_best], list(expected.values()))


def test_a_label_behind_the_last_of_its_prefix_may_be_kept():
    """1 is the likeliest in frame 3, but half of it prolongs a 1 and half begins another."""
    frames = [[0.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.0, 0.4, 0.35, 0.25]]
    n_best = ctc_prefix_beam(torch.tensor([frames]).log(), torch.tensor([3]), 1)
    assert n_best[0][0].tokens == [1, 2]
    assert math.isclose(math.exp(n_best[0][0].score), 0.35, rel_tol=1e-6)


def test_ctc_searches_of_a_padded_batch_equal_those_of_single_rows():
    log_probs, lens = random_log_probs(4, 9, 6), torch.tensor([9, 4, 1, 0])
    padded = log_probs.clone()
    for b, n in enumerate(lens.tolist()):
        padded[b, n:, 5] = 100.0
    alone = [ctc_prefix_beam(log_probs[b : b + 1, :n], lens[b : b + 1], 5)[0]
             for b, n in enumerate(lens.tolist())]  # fmt: skip
    assert ctc_prefix_beam(padded, lens, 5) == alone
    assert alone[3] == [Hypothesis([], 0.0)]
    assert ctc_greedy(padded, lens) == ctc_greedy(log_probs, lens)
    assert ctc_greedy(padded, lens)[3] == []


def test_ctc_searches_take_bf16():
    log_probs, lens = random_log_probs(2, 9, 6).bfloat16(), torch.tensor([9, 4])
    assert ctc_prefix_beam(log_probs, lens, 5) == ctc_prefix_beam(log_probs.float(), lens, 5)
    assert ctc_greedy(log_probs, lens) == ctc_greedy(log_probs.float(), lens)


# ---------------------------------------------------------------------------------- CTC alignment


def test_alignment_is_the_best_of_all_paths():
    checks.check_alignment_is_the_best_path(decoders)


def test_spans_of_a_long_alignment_rise_and_collapse_to_the_targets():
    for U in (1, 7, 30):
        targets = torch.randint(1, 4, (U,))
        log_probs = random_log_probs(2 * U + 5, 4)
        spans, score = ctc_align(log_probs, targets)
        first, last = spans.unbind(1)
        assert (first <= last).all() and (last[:-1] < first[1:]).all()
        path = [BLANK_ID] * len(log_probs)
        for token, (a, b) in zip(targets.tolist(), spans.tolist(), strict=True):
            path[a : b + 1] = [token] * (b + 1 - a)
        assert list(collapsed(path)) == targets.tolist()
        along = sum(float(frame[v]) for frame, v in zip(log_probs, path, strict=True))
        assert math.isclose(score, along, rel_tol=1e-9)


def test_a_planted_alignment_is_found():
    path = [0, 2, 2, 0, 0, 2, 1, 1, 1, 3, 0]
    spans, _ = ctc_align(path_logits(path)[0], torch.tensor([2, 2, 1, 3]))
    assert spans.tolist() == [[1, 2], [5, 5], [6, 8], [9, 9]]


@pytest.mark.parametrize(
    "T, targets, message",
    [
        (2, [1, 2, 3], "3 tokens, 0 of them .* need 3 frames, .* there are 2"),
        (2, [1, 1], "2 tokens, 1 of them equal to the one before, need 3 frames"),
        (0, [], "at least 1; there are 0"),
        (9, [1, 2, 0], "hold the blank, 0"),
    ],
)
def test_what_cannot_be_aligned_is_refused(T, targets, message):
    with pytest.raises(ValueError, match=message):
        ctc_align(torch.zeros(T, 4), torch.tensor(targets, dtype=torch.int64))


# ------------------------------------------------------------------------------ Transformer decoder


def test_memory_padding_never_matters_and_no_memory_is_not_nan():
    checks.check_decoder_ignores_memory_padding(decoders)


@torch.no_grad()
def test_a_token_changes_later_positions_alone():
    """So what stands beyond a row's end changes none of its own positions."""
    decoder, (memory, lens, tags) = small_decoder(decoders), decoder_inputs()
    tokens = torch.randint(0, 5, (3, 6))
    logits = decoder(tokens, tags, memory, lens)
    assert logits.shape == (3, 7, 5)
    for u in range(6):
        changed = tokens.clone()
        changed[:, u] = (tokens[:, u] + 1) % 5
        other = decoder(changed, tags, memory, lens)
        assert torch.equal(other[:, : u + 1], logits[:, : u + 1])
        assert (other[:, u + 1] != logits[:, u + 1]).any(-1).all()


@torch.no_grad()
def test_the_tag_and_the_order_of_tokens_matter():
    """With one layer, which without positions could not tell what came first."""
    decoder, (memory, lens, tags) = small_decoder(decoders, n_layers=1), decoder_inputs()
    tokens = torch.tensor([[1, 2, 4]]).expand(3, -1)
    logits = decoder(tokens, tags, memory, lens)
    other_tag = decoder(tokens, (tags + 1) % 3, memory, lens)
    assert (logits != other_tag).any(-1).all()
    swapped = decoder(tokens[:, [1, 0, 2]], tags, memory, lens)
    assert checks.apart(swapped[:, 3], logits[:, 3]) > 1e-3


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@torch.no_grad()
def test_token_by_token_equals_all_at_once_for_every_prefix(dtype, tolerance):
    """Two hypotheses a row, a tag each row, lengths 0 to 12."""
    decoder = small_decoder(decoders, dim=16, n_heads=4).to(dtype)
    memory, lens, tags = decoder_inputs((7, 3, 0))
    memory, W = memory.to(dtype), 2
    tokens = torch.randint(0, 5, (3, W, 12))
    state, newest = decoder.start(memory, lens, W), (5 + tags)[:, None].expand(3, W)
    for u in range(13):
        log_probs, state = decoder.step(newest, state)
        for w in range(W):
            logits = decoder(tokens[:, w, :u], tags, memory, lens)
            expected = logits[:, u].log_softmax(-1)
            assert checks.apart(log_probs[:, w], expected) < tolerance, (u, w)
        newest = tokens[:, :, min(u, 11)]
    assert log_probs.dtype == dtype


def test_every_parameter_of_the_decoder_gets_a_gradient():
    decoder, (memory, lens, tags) = small_decoder(decoders), decoder_inputs()
    memory.requires_grad_()
    tokens = torch.randint(0, 5, (3, 6))
    decoder.train()(tokens, tags, memory, lens).log_softmax(-1)[..., 2].sum().backward()
    without = [n for n, p in decoder.named_parameters() if not float(p.grad.abs().max())]
    assert without == []
    for b, n in enumerate(lens.tolist()):
        assert (memory.grad[b, :n].abs().sum(1) > 0).all() and not memory.grad[b, n:].any()


def test_slams_translation_decoder_has_the_size_that_is_computed_for_it():
    """12.6M in matrices (METHOD, section 7), counted with states of 384 and one embedding.

    Ours has two: the output is untied.
    """
    decoder = TransformerDecoder(
        8192, 384, dim=384, n_layers=4, n_heads=4, d_ff=1536, dropout=0.1, n_tags=4
    )
    matrices = sum(p.numel() for p in decoder.parameters() if p.dim() == 2)
    assert round((matrices - decoder.output.weight.numel()) / 1e6, 1) == 12.6


def test_a_fresh_embedding_is_of_the_size_of_its_positions():
    """Mean square 1, and 1/2 of a sine: without scaling the embedding would be lost below it."""
    decoder, seen = (
        TransformerDecoder(500, 8, dim=64, n_layers=1, n_heads=2, d_ff=8, dropout=0.0),
        [],
    )
    decoder.layers[0].self_norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    memory, lens, tags = decoder_inputs(memory_dim=8)
    decoder(torch.randint(0, 500, (3, 99)), torch.zeros_like(tags), memory.float(), lens)
    assert abs(float(seen[0].detach().square().mean()) - 1.5) < 0.1


def test_attention_weights_are_dropped_in_training_alone():
    attention, x = Attention(8, 8, 2, 0.5), torch.randn(2, 5, 8)
    kept = attention.keys_values(x)
    assert not torch.equal(attention(x, kept), attention(x, kept))
    attention.eval()
    assert torch.equal(attention(x, kept), attention(x, kept))


def test_a_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="decoder width 10 must be divisible by 4 heads"):
        Attention(10, 10, 4, 0.0)


# ----------------------------------------------------------------------- searches of the decoder


@torch.no_grad()
def slow_greedy(decoder, memory: Tensor, tag: Tensor, limit: int) -> list[int]:
    """One row (T, D), without cache: forward on all tokens so far, again and again."""
    tokens = []
    while len(tokens) < limit:
        so_far = torch.tensor([tokens], dtype=torch.int64)
        logits = decoder(so_far, tag[None], memory[None], torch.tensor([len(memory)]))
        newest = int(logits[0, -1].argmax())
        if newest == SEP_ID:
            break
        tokens.append(newest)
    return tokens


def test_greedy_equals_a_slow_loop_and_width_one_equals_greedy():
    lengths = set()
    for seed in range(15):
        decoder, (memory, lens, tags) = small_decoder(decoders, seed), decoder_inputs(seed=seed)
        limits = torch.tensor([6, 0, 9])
        found = decoder.greedy(memory, lens, tags, limits)
        for b in range(3):
            assert found[b] == slow_greedy(decoder, memory[b, : lens[b]], tags[b], int(limits[b]))
        beam = decoder.beam(memory, lens, tags, 1, limits)
        assert [[h.tokens for h in n_best] for n_best in beam] == [[t] for t in found]
        lengths |= {len(t) for t in found}
    assert len(lengths) > 3, "all random answers are of one length: this shows little"


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_an_exhaustive_beam_equals_brute_force(alpha):
    checks.check_exhaustive_beam_finds_the_best(decoders, alpha)


def test_scores_are_those_of_forward():
    checks.check_beam_scores_are_those_of_forward(decoders)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_searching_a_batch_equals_searching_row_by_row(alpha):
    """Rows of other lengths, limits and tags, one of them without memory; the best come first."""
    for seed in range(5):
        decoder, (memory, lens, tags) = small_decoder(decoders, seed), decoder_inputs((7, 3, 5, 0))
        limits = torch.tensor([5, 8, 2, 6])
        together = decoder.beam(memory, lens, tags, 3, limits, alpha)
        greedy = decoder.greedy(memory, lens, tags, limits)
        for b, n in enumerate(lens.tolist()):
            row = slice(b, b + 1)
            inputs = memory[row, : max(n, 1)], lens[row], tags[row]
            (alone,) = decoder.beam(*inputs, 3, int(limits[b]), alpha)
            assert [h.tokens for h in together[b]] == [h.tokens for h in alone]
            for one, other in zip(together[b], alone, strict=True):
                assert math.isclose(one.score, other.score, rel_tol=1e-9)
            assert decoder.greedy(*inputs, int(limits[b])) == [greedy[b]]
            ranks = [length_penalised(h.score, len(h.tokens), alpha) for h in together[b]]
            assert ranks == sorted(ranks, reverse=True) and 1 <= len(ranks) <= 3
            assert len({tuple(h.tokens) for h in together[b]}) == len(ranks)
            assert max(len(h.tokens) for h in together[b]) <= limits[b]


def test_what_does_not_end_is_returned_where_nothing_ends():
    inputs, limits = decoder_inputs((2, 2)), torch.tensor([3, 0])
    never = with_fixed_answers(decoders, {1: 0.7, 2: 0.3})
    first, second = never.beam(*inputs, 2, limits)
    assert [h.tokens for h in first] == [[1, 1, 1], [1, 1, 2]]
    assert math.isclose(first[0].score, 3 * math.log(0.7), rel_tol=1e-9)
    assert second == [Hypothesis([], 0.0)]
    assert never.greedy(*inputs, limits) == [[1, 1, 1], []]


def test_what_does_not_end_is_left_out_where_something_ends():
    """With 0.1 for the end, three unended tokens are always more probable than ended ones."""
    rarely = with_fixed_answers(decoders, {1: 0.9, SEP_ID: 0.1})
    n_best = rarely.beam(*decoder_inputs((2,)), 2, 3)[0]
    assert len(n_best) == 2
    for tokens, score in n_best:
        expected = len(tokens) * math.log(0.9) + math.log(0.1)
        assert math.isclose(score, expected, rel_tol=1e-9), "no end is in this score"


def test_the_length_penalty_prefers_longer_answers_as_it_grows():
    checks.check_length_penalty_prefers_longer_answers(decoders)
    assert length_penalised(-3.0, 1, 0.7) == -3.0 and length_penalised(-3.0, 7, 1.0) == -1.5
    with pytest.raises(ValueError, match="length penalty -1 is negative"):
        small_decoder(decoders).beam(*decoder_inputs(), 2, 6, -1)


def test_the_search_stops_when_nothing_better_can_come():
    decoder, inputs = with_fixed_answers(decoders, {1: 0.01, SEP_ID: 0.99}), decoder_inputs((2, 3))
    steps = []
    decoder.norm.register_forward_hook(lambda *_: steps.append(1))
    found = decoder.beam(*inputs, 2, 500)
    assert [h.tokens for h in found[0]] == [[], [1]] and len(steps) == 2


def test_a_decoder_learns_six_sequences_by_heart_and_both_searches_return_them():
    decoder = TransformerDecoder(
        12, 8, dim=32, n_layers=2, n_heads=2, d_ff=64, dropout=0.0, n_tags=2
    )
    memory, lens = torch.randn(6, 5, 8), torch.tensor([5, 3, 4, 5, 2, 1])
    memory[1] = memory[0]  # rows 0 and 1 differ in the tag and the length alone
    tags, token_lens = torch.tensor([0, 1, 0, 1, 0, 1]), torch.tensor([7, 5, 1, 0, 6, 3])
    tokens = torch.randint(5, 12, (6, 7))
    targets = F.pad(tokens, (0, 1)).masked_fill(torch.arange(8) > token_lens[:, None], PAD_ID)
    targets[torch.arange(6), token_lens] = SEP_ID
    tokens = targets[:, :-1].masked_fill(torch.arange(7) >= token_lens[:, None], PAD_ID)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    for _ in range(150):
        logits = decoder(tokens, tags, memory, lens)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD_ID)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05
    learned = [row[:n].tolist() for row, n in zip(tokens, token_lens, strict=True)]
    decoder.eval()
    assert decoder.greedy(memory, lens, tags, 20) == learned
    for alpha in (0.0, 0.6):
        n_best = decoder.beam(memory, lens, tags, 4, 20, alpha)
        assert [hypotheses[0].tokens for hypotheses in n_best] == learned
        assert all(hypotheses[0].score > math.log(0.5) for hypotheses in n_best)
    assert decoder.beam(memory, lens, tags, 1, 20)[0][0].tokens == learned[0]


def test_searching_under_bf16_autocast_gives_finite_scores():
    decoder, (memory, lens, tags) = small_decoder(decoders).float(), decoder_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        for n_best in decoder.beam(memory.float(), lens, tags, 3, 6):
            assert n_best and all(math.isfinite(h.score) for h in n_best)
        assert len(decoder.greedy(memory.float(), lens, tags, 6)) == 3


# ------------------------------------------------------------------------------------------- [CLS]


def test_the_classifier_learns_to_tell_states_apart():
    classifier, states, labels = Classifier(8, 3, dropout=0.1), torch.randn(9, 8), torch.arange(9)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=0.1)
    for _ in range(60):
        loss = F.cross_entropy(classifier(states), labels % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logits = classifier.eval()(states)
    assert logits.shape == (9, 3) and torch.equal(logits.argmax(-1), labels % 3)
    assert torch.equal(logits, classifier(states)), "dropout in eval mode"


# ------------------------------------------------------------------------------------ task models

HEADS = {
    "ctc": ("speech", HeadConfig("ctc", 12)),
    "rnnt": ("speech", HeadConfig("rnnt", 12, rnnt_layers=1, rnnt_dim=16, joint_dim=16)),
    "translation": ("speech", HeadConfig("attention", 12, tags=("de", "ca"))),
    "rewriting": ("text", HeadConfig("attention", 12)),
    "classifier": ("text", HeadConfig("classifier", labels=("yes", "no", "perhaps"))),
}
SMALL_DECODER = dict(decoder_layers=1, decoder_dim=16, decoder_ff=32, decoder_heads=2, dropout=0.0)


def task_model(name: str, dtype: torch.dtype = torch.float64) -> TaskModel:
    """A task's model of a few thousand parameters, in eval mode and without dropout."""
    modality, head = HEADS[name]
    config = micro_config(speech_layers=1, mm_layers=1)
    model = TaskModel(config, modality, dataclasses.replace(head, **SMALL_DECODER))
    model = checks.ruffled(model).to(dtype).eval()
    if modality == "speech":
        model.encoder.speech.feature_mean.normal_()
        model.encoder.speech.feature_std.uniform_(1, 2)
    return model


def task_batch(name: str) -> TaskBatch:
    """Three rows of different lengths with targets of 4, 2 and 3 tokens, or with labels.

    Speech is noise, and each token has a sound of its own that is heard when it is its turn.
    """
    modality, head = HEADS[name]
    targets, lens = torch.randint(5, 12, (3, 4)), torch.tensor([4, 2, 3])
    targets = targets.masked_fill(torch.arange(4) >= lens[:, None], PAD_ID)
    answers = dict(targets=targets, target_lens=lens, tags=torch.tensor([0, 1, 0]) % len(head.tags))
    if name == "classifier":
        answers = dict(labels=torch.tensor([2, 0, 2]))
    if modality == "speech":
        speech, sound = checks.speech_batch((70, 44, 59)), 4 * torch.randn(12, 80)
        for b, (n_frames, n) in enumerate(zip(speech.feature_lens.tolist(), lens.tolist())):
            heard = targets[b, torch.arange(n_frames) * n // n_frames]
            speech.features[b, :n_frames] += sound[heard]
        return TaskBatch(speech.feature_lens, speech.features, **answers)
    text, clean = checks.text_batch((9, 6, 11))
    return TaskBatch(text.lens, tokens=clean, **answers)


def rows_of(batch: TaskBatch, rows: list[int]) -> TaskBatch:
    """Some rows, padded no further than they need."""
    parts = {k: v[rows] for k, v in vars(batch).items() if v is not None}
    longest = int(parts["lens"].max())
    for name, width in (("features", longest), ("tokens", longest), ("hidden_frames", longest)):
        if name in parts:
            parts[name] = parts[name][:, :width]
    if "targets" in parts:
        parts["targets"] = parts["targets"][:, : int(parts["target_lens"].max())]
    return TaskBatch(**parts)


def padded_with_junk(batch: TaskBatch) -> TaskBatch:
    """The same rows in 13 more frames or tokens and 3 more target tokens; all padding is junk."""
    changes = {}
    for name, more, junk in (("features", 13, 1e3), ("tokens", 13, 7), ("targets", 3, 7)):
        if (x := getattr(batch, name)) is not None:
            lens = batch.target_lens if name == "targets" else batch.lens
            wide = torch.full((x.shape[0], x.shape[1] + more, *x.shape[2:]), junk, dtype=x.dtype)
            wide[:, : x.shape[1]] = x
            inside = torch.arange(wide.shape[1]) < lens[:, None]
            changes[name] = wide.where(inside.view(*inside.shape, *[1] * (x.dim() - 2)), junk)
    return dataclasses.replace(batch, **changes)


@pytest.mark.parametrize("name", HEADS)
def test_a_task_model_has_one_finite_loss_that_reaches_every_parameter(name):
    model, batch = task_model(name), task_batch(name)
    losses, statistics = model.train()(batch)
    assert list(losses) == model.loss_names == [HEADS[name][1].kind] and statistics == {}
    loss = losses[model.loss_names[0]]
    loss.sum.backward()
    assert math.isfinite(loss.sum.detach()) and float(loss.sum.detach()) > 0
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize(
    "name, count",
    [("ctc", 9), ("rnnt", 9), ("translation", 12), ("rewriting", 12), ("classifier", 3)],
)
def test_counts_known_beforehand_are_those_of_the_loss(name, count):
    """Target tokens, with the end where it is predicted; examples of a classifier."""
    model, batch = task_model(name), task_batch(name)
    (loss,) = model(batch)[0].values()
    assert (
        model.counts(batch)
        == {HEADS[name][1].kind: float(loss.count)}
        == {HEADS[name][1].kind: count}
    )


def test_ctc_counts_no_row_that_has_fewer_frames_than_it_needs():
    """11 encoder frames: 2 tokens fit; 15: 9 tokens with 8 repeats do not."""
    model, batch = task_model("ctc"), task_batch("ctc")
    targets = torch.nn.functional.pad(batch.targets, (0, 5))
    targets[2], lens = 7, torch.tensor([4, 2, 9])
    batch = dataclasses.replace(batch, targets=targets, target_lens=lens)
    (loss,) = model(batch)[0].values()
    assert model.counts(batch) == {"ctc": 6.0} and float(loss.count) == 6
    (without,) = model(rows_of(batch, [0, 1]))[0].values()
    assert float(loss.sum.detach()) == pytest.approx(float(without.sum.detach()), rel=1e-9)


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_a_rows_loss_and_answer_are_the_same_alone_and_in_a_batch_padded_with_junk(name):
    model, batch = task_model(name), task_batch(name)
    (together,) = model(padded_with_junk(batch))[0].values()
    alone = [next(iter(model(rows_of(batch, [b]))[0].values())) for b in range(3)]
    assert float(together.sum) == pytest.approx(sum(float(loss.sum) for loss in alone), rel=1e-9)
    assert len({round(float(loss.sum), 6) for loss in alone}) == 3
    for width in (1, 3):
        answers = model.decode(padded_with_junk(batch), width)
        assert answers == [model.decode(rows_of(batch, [b]), width)[0] for b in range(3)]


def test_the_decoder_is_asked_for_every_token_and_then_for_the_end(monkeypatch):
    asked, label_smoothed = {}, L.label_smoothed

    def listen(logits, targets, weight, smoothing):
        asked.update(targets=targets.view(3, 5), weight=weight.view(3, 5), smoothing=smoothing)
        return label_smoothed(logits, targets, weight, smoothing)

    monkeypatch.setattr(L, "label_smoothed", listen)
    model, batch = task_model("translation"), task_batch("translation")
    model(batch)
    for b, n in enumerate((4, 2, 3)):
        expected = [*batch.targets[b, :n].tolist(), SEP_ID]
        assert asked["targets"][b, : n + 1].tolist() == expected
        assert asked["weight"][b].tolist() == [1.0] * (n + 1) + [0.0] * (4 - n)
    assert asked["smoothing"] == model.head_config.label_smoothing == 0.1


@torch.no_grad()
def test_the_tag_says_which_language_is_written():
    model, batch = task_model("translation"), task_batch("translation")
    other = dataclasses.replace(batch, tags=1 - batch.tags)
    (a,), (b,) = (model(its)[0].values() for its in (batch, other))
    assert abs(float(a.sum - b.sum)) > 1e-3


@torch.no_grad()
def test_what_spec_augment_hides_is_the_mean():
    """Hiding is the same as putting the mean of the training speech there by hand."""
    model, batch = task_model("ctc"), task_batch("ctc")
    frames, bins = torch.rand(3, 70) < 0.2, torch.rand(3, 80) < 0.2
    hidden = dataclasses.replace(batch, hidden_frames=frames, hidden_bins=bins)
    features = batch.features.double()
    for b in range(3):
        for f in frames[b].nonzero()[:, 0].tolist():
            features[b, f] = model.encoder.speech.feature_mean
        for m in bins[b].nonzero()[:, 0].tolist():
            features[b, :, m] = model.encoder.speech.feature_mean[m]
    by_hand = dataclasses.replace(batch, features=features)
    found, lens = model.states(hidden)
    expected, _ = model.states(by_hand)
    assert torch.equal(found, expected) and lens.tolist() == [18, 11, 15]
    assert checks.apart(found, model.states(batch)[0]) > 1e-2
    nothing = dataclasses.replace(
        batch, hidden_frames=torch.zeros_like(frames), hidden_bins=torch.zeros_like(bins)
    )
    assert torch.equal(model.states(nothing)[0], model.states(batch)[0])


@pytest.mark.parametrize("name", HEADS)
def test_a_task_model_learns_three_rows_by_heart_and_every_search_answers_so(name):
    model, batch = task_model(name, torch.float32), task_batch(name)
    searches = ((1, 0.0), (4, 0.0), (4, 0.6))
    if name == "classifier":  # other labels than it would guess now
        learned = [[(label + 1) % 3] for (label,) in model.decode(batch)]
        batch = dataclasses.replace(batch, labels=torch.tensor(learned)[:, 0])
    else:
        pairs = zip(batch.targets.tolist(), batch.target_lens.tolist(), strict=True)
        learned = [row[:n] for row, n in pairs]
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(1, 601):  # mostly fewer: it stops when all is known
        (loss,) = model.train()(batch)[0].values()
        optimizer.zero_grad()
        (loss.sum / loss.count).backward()
        optimizer.step()
        model.eval()
        if step % 20 == 0 and all(model.decode(batch, *s) == learned for s in searches):
            return
    raise AssertionError(f"{[model.decode(batch, *s) for s in searches]}, not {learned}")
