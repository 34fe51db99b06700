"""Properties of losses.py, against slow references; and what each loss may reach in the model."""

import dataclasses
import itertools
import math

import checks
import pytest
import torch
import torch.nn.functional as F
from checks import flat_index, micro_config, pair_batch, speech_batch, text_batch

import data
import losses
import quantizer
import training
from conformer import MASK_ID, PAD_ID
from losses import (
    Loss,
    code_prediction,
    contrastive,
    ctc,
    ctc_fits,
    diversity,
    sample_negatives,
    speech_text_matching,
    token_prediction,
)
from pretrain import Objectives, SlamPretraining
from quantizer import GumbelQuantizer


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def numbers(loss: Loss) -> torch.Tensor:
    """All that a loss holds, in one row."""
    return torch.cat([value.detach().flatten().double() for value in loss if value is not None])


def close(tensor: torch.Tensor, expected: float, tolerance: float = 1e-5) -> bool:
    return math.isclose(float(tensor.detach()), expected, rel_tol=tolerance, abs_tol=tolerance)


# -------------------------------------------------------------------------------------- negatives


def test_negatives_are_other_masked_frames_of_the_same_row():
    checks.check_negatives(losses)


def test_negatives_are_uniform_over_the_others():
    """Chi-square with 4 degrees of freedom: 23.5 has a probability of 1 in 10,000."""
    torch.manual_seed(1)
    weight = torch.arange(8) < torch.tensor([3, 6, 2])[:, None]
    negatives, _ = sample_negatives(weight.float(), 20_000)
    for place in range(6):
        counts = negatives[1, place].bincount(minlength=8)
        assert int(counts[place]) == 0 and not counts[6:].any()
        others = counts[:6][torch.arange(6) != place].double()
        assert float(((others - 4000) ** 2 / 4000).sum()) < 23.5


def test_rows_of_one_or_no_masked_frame_are_unusable_and_cost_nothing():
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    negatives, usable = sample_negatives(weight, 10)
    assert not usable.any() and int(negatives.min()) >= 0 and int(negatives.max()) < 2
    context = torch.randn(6, 4, requires_grad=True)
    loss = contrastive(context, torch.randn(6, 4), negatives, usable, None)
    loss.sum.backward()
    assert float(loss.sum.detach()) == 0 and float(loss.count) == 0
    assert torch.equal(context.grad, torch.zeros(6, 4))


def test_rows_of_which_none_can_be_masked_cost_nothing():
    """A bucket of rows of one encoder frame has m = 0."""
    negatives, usable = sample_negatives(torch.zeros(3, 0), 10)
    context = torch.randn(0, 4, requires_grad=True)
    loss = contrastive(context, torch.randn(0, 4), negatives, usable, None)
    loss.sum.backward()
    assert float(loss.sum.detach()) == 0 and float(loss.count) == 0


# ------------------------------------------------------------------------------------ contrastive


def slow_contrastive(context, target, negatives, usable, codes):
    """One frame and one distractor at a time: (sum, count, correct, blind_correct, blind_sum)."""
    totals, (B, size, _) = [0.0] * 5, negatives.shape
    for b, place in itertools.product(range(B), range(size)):
        if not usable[b, place]:
            continue
        m, others = b * size + place, (b * size + negatives[b, place]).tolist()
        kept = [n for n in others if codes is None or not torch.equal(codes[n], codes[m])]
        if not kept:
            continue
        logits = [
            float(F.cosine_similarity(context[m], target[n], dim=0)) / 0.1 for n in [m, *kept]
        ]
        totals[0] += math.log(sum(math.exp(x) for x in logits)) - logits[0]
        totals[1] += 1
        totals[2] += all(x < logits[0] for x in logits[1:])
        totals[3] += 1 / len(logits)
        totals[4] += math.log(len(logits))
    return totals


@pytest.mark.parametrize("G", [None, 1, 2])
def test_contrastive_equals_a_slow_loop(G):
    torch.manual_seed(0)
    weight = (torch.arange(12) < torch.tensor([9, 1, 12, 11, 4])[:, None]).float()
    target = torch.randn(60, 8, dtype=torch.float64)
    context = target + torch.randn(60, 8, dtype=torch.float64)
    codes = None if G is None else torch.randint(0, 3, (60, G))
    negatives, usable = sample_negatives(weight, 6)
    loss = contrastive(context, target, negatives, usable, codes)
    for value, expected in zip(
        loss[:5], slow_contrastive(context, target, negatives, usable, codes), strict=True
    ):
        assert close(value, expected, 1e-9)
    assert (
        0 < float(loss.correct) < float(loss.count) == 36 if G is None else float(loss.count) <= 36
    )


def test_contrastive_gradient_equals_finite_differences():
    torch.manual_seed(0)
    negatives, usable = sample_negatives(torch.ones(1, 5), 4)
    codes = torch.tensor([[0], [1], [0], [2], [3]])
    context, target = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda c, t: contrastive(c, t, negatives, usable, codes).sum, (context, target)
    )


def test_distractors_with_the_positives_codes_are_struck_out():
    checks.check_equal_codes_are_struck_out(losses)


def test_one_of_two_equal_codebooks_does_not_strike_out():
    negatives, usable = torch.tensor([[[1], [0]]]), torch.ones(1, 2, dtype=torch.bool)
    context, target = torch.randn(2, 4), torch.randn(2, 4)
    half = contrastive(context, target, negatives, usable, torch.tensor([[0, 1], [0, 2]]))
    whole = contrastive(context, target, negatives, usable, torch.tensor([[0, 1], [0, 1]]))
    assert float(half.count) == 2 and float(whole.count) == 0


def test_ties_are_wrong():
    """A constant context against constant targets is no success."""
    negatives, usable = torch.tensor([[[1, 2], [2, 0], [0, 1]]]), torch.ones(1, 3, dtype=torch.bool)
    loss = contrastive(
        torch.ones(3, 4), torch.ones(3, 4), negatives, usable, torch.arange(3)[:, None]
    )
    assert float(loss.correct) == 0 and float(loss.count) == 3 and close(loss.sum, 3 * math.log(3))


def test_contrastive_chance_is_that_of_a_guess_among_those_left():
    torch.manual_seed(0)
    context, target = torch.randn(2, 2000, 16).unbind(0)
    negatives, usable = sample_negatives(torch.ones(1, 2000), 9)
    loss = contrastive(context, target, negatives, usable, None)
    assert close(loss.blind_correct, 200) and close(loss.blind_sum, 2000 * math.log(10))
    assert abs(float(loss.correct) - 200) < 5 * math.sqrt(2000 * 0.1 * 0.9)
    perfect = contrastive(target, target, negatives, usable, None)
    assert float(perfect.correct) == 2000


def test_contrastive_does_not_care_for_length_only_for_direction():
    context, target = torch.randn(4, 6), torch.randn(4, 6)
    negatives, usable = sample_negatives(torch.ones(1, 4), 5)
    a = contrastive(context, target, negatives, usable, None)
    b = contrastive(100 * context, 0.01 * target, negatives, usable, None)
    assert close(a.sum, float(b.sum), 1e-4)


# ----------------------------------------------------------------------- diversity, codes, tokens


def test_diversity_is_zero_at_equality_and_near_one_at_collapse():
    weight = torch.tensor([1.0] * 5 + [0.0] * 2)
    for G, V in ((1, 1024), (2, 8)):
        even, collapsed = (diversity(torch.tensor(float(p)), G * V, weight) for p in (G * V, G))
        assert float(even.sum) == 0 and float(even.count) == 5
        assert close(collapsed.sum, 5 * (V - 1) / V)
    assert close(diversity(torch.tensor(256.0), 1024, weight).sum, 5 * 0.75)


def test_the_same_frames_twice_double_the_diversity_sum():
    checks.check_diversity_grows_with_the_frames(losses, quantizer)


def test_the_same_frames_twice_double_the_cross_entropies():
    torch.manual_seed(0)
    context, target = torch.randn(2, 6, 8).unbind(0)
    negatives, usable = sample_negatives(torch.ones(2, 3), 5)
    once = contrastive(context, target, negatives, usable, None)
    twice = contrastive(
        context.repeat(2, 1),
        target.repeat(2, 1),
        negatives.repeat(2, 1, 1),
        usable.repeat(2, 1),
        None,
    )
    logits, ids = torch.randn(6, 2, 7), torch.randint(0, 7, (6, 2))
    codes_once = code_prediction(logits, ids, torch.ones(6))
    codes_twice = code_prediction(logits.repeat(2, 1, 1), ids.repeat(2, 1), torch.ones(12))
    tokens, unigram = torch.randint(0, 14, (6,)), torch.randn(14).log_softmax(0)
    text_once = token_prediction(logits.flatten(1), tokens, torch.ones(6), unigram)
    text_twice = token_prediction(
        logits.flatten(1).repeat(2, 1), tokens.repeat(2), torch.ones(12), unigram
    )
    for one, two in ((once, twice), (codes_once, codes_twice), (text_once, text_twice)):
        torch.testing.assert_close(numbers(two), 2 * numbers(one), rtol=1e-5, atol=1e-6)


def test_code_prediction_equals_a_slow_loop():
    torch.manual_seed(0)
    logits, ids = torch.randn(11, 2, 7, dtype=torch.float64), torch.randint(0, 7, (11, 2))
    logits[:4] += 4 * F.one_hot(ids[:4], 7)
    weight = torch.tensor([1.0] * 8 + [0.0] * 3, dtype=torch.float64)
    loss = code_prediction(logits, ids, weight)
    expected = sum(
        float(F.cross_entropy(logits[m, g], ids[m, g])) for m in range(8) for g in range(2)
    )
    correct = sum(float(logits[m, g].argmax() == ids[m, g]) / 2 for m in range(8) for g in range(2))
    for value, reference in zip(loss[:3], (expected, 8, correct), strict=True):
        assert close(value, reference, 1e-9)
    answers = [[ids[:8, g].tolist().count(v) for v in range(7)] for g in range(2)]
    assert loss.answers.tolist() == answers


def test_a_blind_guess_of_codes_knows_their_frequencies_in_all_micro_batches():
    """Eight micro-batches of two frames: each alone has an entropy of at most ln 2."""
    ids = torch.arange(16).remainder(5)[:, None]
    sums = training.Sums()
    for part in ids.split(2):
        loss = code_prediction(torch.zeros(2, 1, 7), part, torch.ones(2))
        sums.add({"code_mlm": loss}, {})
    metrics = training.means(sums.values)
    shares = [4 / 16, 3 / 16, 3 / 16, 3 / 16, 3 / 16]
    assert metrics["chance/code_mlm"] == pytest.approx(max(shares))
    entropy = -sum(share * math.log(share) for share in shares)
    assert metrics["chance_loss/code_mlm"] == pytest.approx(entropy)


def test_token_prediction_equals_a_slow_loop():
    torch.manual_seed(0)
    logits, targets = (
        torch.randn(9, 12, dtype=torch.float64),
        torch.tensor([7, 7, 5, 6, 7, 8, 9, 0, 0]),
    )
    logits[0, 7] += 9
    weight = torch.tensor([1.0] * 7 + [0.0] * 2)
    unigram = (torch.arange(12) == 7).double().add(0.5).log().log_softmax(0)
    loss = token_prediction(logits, targets, weight, unigram)
    expected = sum(float(F.cross_entropy(logits[m], targets[m])) for m in range(7))
    correct = sum(int(logits[m].argmax() == targets[m]) for m in range(7))
    blind = -sum(float(unigram[t]) for t in targets[:7])
    for value, reference in zip(loss[:5], (expected, 7, correct, 3, blind), strict=True):
        assert close(value, reference, 1e-6)


def test_filler_changes_no_sum_and_gets_no_gradient():
    torch.manual_seed(0)
    weight = torch.tensor([1.0] * 5 + [0.0] * 4)
    ids, unigram = torch.randint(0, 7, (9, 1)), torch.zeros(7).log_softmax(0)
    logits = torch.randn(9, 1, 7)
    other = torch.cat([logits[:5], 100 * torch.randn(4, 1, 7)]).requires_grad_()
    other_ids = torch.cat([ids[:5], torch.randint(0, 7, (4, 1))])
    for one, two in (
        (code_prediction(logits, ids, weight), code_prediction(other, other_ids, weight)),
        (
            token_prediction(logits[:, 0], ids[:, 0], weight, unigram),
            token_prediction(other[:, 0], other_ids[:, 0], weight, unigram),
        ),
    ):
        torch.testing.assert_close(numbers(two), numbers(one), rtol=1e-5, atol=1e-6)
        (gradient,) = torch.autograd.grad(two.sum, other)
        assert float(gradient[5:].abs().max()) == 0 and float(gradient[:5].abs().min()) > 0


# ------------------------------------------------------------------------------------------ pairs


def test_matching_is_binary_cross_entropy_and_a_logit_of_zero_is_wrong():
    logit, label = torch.tensor([2.0, -1.0, 0.0, 0.5, -3.0, 0.0]), torch.tensor([1, 1, 1, 0, 0, 0])
    loss = speech_text_matching(logit, label)
    p = [1 / (1 + math.exp(-x)) for x in logit.tolist()]
    expected = -sum(math.log(q if y else 1 - q) for q, y in zip(p, label.tolist(), strict=True))
    assert close(loss.sum, expected) and float(loss.count) == 6 and float(loss.correct) == 2
    assert close(loss.blind_correct, 3) and close(loss.blind_sum, 6 * math.log(2))


def brute_force_ctc(log_probs: torch.Tensor, target: list[int]) -> float:
    """-log of the summed probability of every path of (T, V) that collapses to the target."""
    T, V = log_probs.shape
    total = 0.0
    for path in itertools.product(range(V), repeat=T):
        collapsed = [v for i, v in enumerate(path) if v and (i == 0 or path[i - 1] != v)]
        if collapsed == target:
            total += math.exp(sum(float(log_probs[t, v]) for t, v in enumerate(path)))
    return -math.log(total)


def test_ctc_equals_the_sum_over_all_paths():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 4, dtype=torch.float64)
    targets, target_lens = torch.tensor([[1, 2, 0], [3, 3, 0], [2, 1, 3]]), torch.tensor([2, 2, 3])
    lens = torch.tensor([5, 4, 3])
    loss = ctc(logits, lens, targets, target_lens)
    expected = sum(
        brute_force_ctc(logits[b, : lens[b]].log_softmax(-1), targets[b, : target_lens[b]].tolist())
        for b in range(3)
    )
    assert close(loss.sum, expected, 1e-9) and float(loss.count) == 7


def test_ctc_of_a_padded_batch_is_the_sum_of_its_rows_and_rows_that_do_not_fit_are_left_out():
    torch.manual_seed(0)
    logits = torch.randn(4, 9, 6, requires_grad=True)
    lens, target_lens = torch.tensor([9, 3, 2, 6]), torch.tensor([4, 3, 3, 0])
    targets = torch.randint(1, 6, (4, 4))
    targets[1, :3] = torch.tensor([1, 2, 3])
    loss = ctc(logits, lens, targets, target_lens)
    rows = []
    for b in (0, 1):
        T, U = lens[b], target_lens[b]
        log_probs = logits[b, :T].log_softmax(-1)  # (T, V): torch takes a row without a batch
        rows.append(F.ctc_loss(log_probs, targets[b, :U], T, U, reduction="sum"))
    assert close(loss.sum, float(sum(rows).detach()), 1e-5) and float(loss.count) == 7
    loss.sum.backward()
    assert torch.isfinite(logits.grad).all()
    assert float(logits.grad[2:].abs().max()) == 0 and float(logits.grad[1, 3:].abs().max()) == 0


def test_ctc_needs_a_frame_a_token_and_one_more_between_equal_neighbours():
    targets = torch.tensor([[1, 2, 3, 0], [1, 1, 2, 2], [1, 1, 0, 0], [4, 4, 4, 4]])
    lens = torch.tensor(
        [3, 4, 2, 4]
    )  # the zeros, and equal tokens beyond a row's end, are no repeats
    needed = torch.tensor([3, 6, 3, 7])
    assert ctc_fits(needed, targets, lens).all()
    assert not ctc_fits(needed - 1, targets, lens).any()
    assert ctc_fits(torch.tensor([2]), torch.tensor([[1, 2, 2, 2]]), torch.tensor([2])).all()
    assert not ctc_fits(torch.tensor([9]), torch.tensor([[1, 2]]), torch.tensor([0])).any()


# ------------------------------------------------------------------------- precision, zero counts


def every_loss(x: dict[str, torch.Tensor]) -> dict[str, losses.Loss]:
    """All losses of one set of random inputs."""
    return {
        "contrastive": contrastive(
            x["context"], x["target"], x["negatives"], x["usable"], x["ids"]
        ),
        "code": code_prediction(x["code_logits"], x["ids"], x["weight"]),
        "token": token_prediction(x["token_logits"], x["tokens"], x["weight"], x["unigram"]),
        "stm": speech_text_matching(x["match"], x["label"]),
        "ctc": ctc(x["ctc_logits"], x["lens"], x["targets"], x["target_lens"]),
        "diversity": diversity(x["perplexity"], 9, x["weight"]),
    }


def random_inputs(seed: int, scale: float) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    weight = torch.tensor([1.0] * 9 + [1.0] * 7 + [0.0] * 2)  # the second row has 7
    negatives, usable = sample_negatives(weight.view(2, 9), 8)
    return {
        "context": scale * torch.randn(18, 24), "target": scale * torch.randn(18, 24),
        "negatives": negatives, "usable": usable, "weight": weight,
        "ids": torch.randint(0, 9, (18, 1)),
        "code_logits": scale * torch.randn(18, 1, 9), "token_logits": scale * torch.randn(18, 20),
        "tokens": torch.randint(0, 20, (18,)), "unigram": torch.randn(20).log_softmax(0),
        "match": scale * torch.randn(8), "label": torch.randint(0, 2, (8,)),
        "ctc_logits": scale * torch.randn(2, 12, 7), "lens": torch.tensor([12, 9]),
        "targets": torch.randint(1, 7, (2, 4)), "target_lens": torch.tensor([4, 3]),
        "perplexity": 1 + 8 * torch.rand(()),
    }  # fmt: skip


def test_bf16_losses_are_finite_and_near_fp32_two_hundred_times():
    """bf16 keeps 8 bits: what is left of 1% is rounding of the inputs, not of the losses."""
    moved = ("context", "target", "code_logits", "token_logits", "match", "ctc_logits")
    for seed in range(200):
        exact = random_inputs(seed, scale=(0.1, 1.0, 3.0, 10.0)[seed % 4])
        half = {k: v.bfloat16().requires_grad_() if k in moved else v for k, v in exact.items()}
        with torch.autocast("cpu", torch.bfloat16):
            got = every_loss(half)
        sum(loss.sum for loss in got.values()).backward()
        assert all(torch.isfinite(half[k].grad).all() for k in moved), seed
        for name, loss in every_loss(exact).items():
            assert got[name].sum.dtype == torch.float32, name
            assert close(got[name].count, float(loss.count)), name
            mean = max(
                float(loss.sum), float(loss.count)
            )  # relative to the loss, or to one nat a position
            assert abs(float(got[name].sum.detach()) - float(loss.sum)) < 1e-2 * mean, (seed, name)


@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e6])
def test_losses_of_extreme_inputs_are_finite(scale):
    x = random_inputs(0, scale)
    for name in ("context", "target", "code_logits", "token_logits", "match", "ctc_logits"):
        x[name].requires_grad_()
    for name, loss in every_loss(x).items():
        assert torch.isfinite(loss.sum), name
    sum(loss.sum for name, loss in every_loss(x).items()).backward()
    assert all(torch.isfinite(v.grad).all() for v in x.values() if v.grad is not None)


def test_float64_inputs_are_not_rounded_to_float32():
    x = {k: v.double() if v.is_floating_point() else v for k, v in random_inputs(0, 1.0).items()}
    for name, loss in every_loss(x).items():
        assert loss.sum.dtype == torch.float64, name


def test_a_count_of_zero_gives_a_zero_connected_to_the_graph():
    x = random_inputs(0, 1.0)
    x |= {
        "usable": torch.zeros(2, 9, dtype=torch.bool), "weight": torch.zeros(18),
        "lens": torch.tensor([1, 2]),
        "match": torch.zeros(0), "label": torch.zeros(0, dtype=torch.int64),
    }  # fmt: skip
    for name in (
        "context",
        "target",
        "code_logits",
        "token_logits",
        "match",
        "ctc_logits",
        "perplexity",
    ):
        x[name].requires_grad_()
    for name, loss in every_loss(x).items():
        assert not numbers(loss).any(), (name, loss)
        assert loss.sum.requires_grad, f"{name} is cut off from the graph"
        loss.sum.backward()
    for name in (
        "context",
        "target",
        "code_logits",
        "token_logits",
        "match",
        "ctc_logits",
        "perplexity",
    ):
        assert x[name].grad is not None and not float(x[name].grad.abs().sum()), name


def test_equal_codes_everywhere_are_zero_and_connected():
    context = torch.randn(6, 4, requires_grad=True)
    negatives, usable = sample_negatives(torch.ones(1, 6), 5)
    loss = contrastive(
        context, torch.randn(6, 4), negatives, usable, torch.zeros(6, 1, dtype=torch.int64)
    )
    loss.sum.backward()
    assert float(loss.count) == 0 and torch.equal(context.grad, torch.zeros(6, 4))


# --------------------------------------------------------------------------------------- collapse


def test_a_collapsing_codebook_lowers_the_perplexity_and_raises_the_alarm():
    """A biased code takes all frames: perplexity 1, nothing to contrast, and the log names it."""
    torch.manual_seed(0)
    V = 64
    module, features, weight = (
        GumbelQuantizer(24, 1, V, 8, (2.0, 0.9, 0.5)),
        torch.randn(400, 24),
        torch.ones(400),
    )
    seen = {}
    negatives, usable = sample_negatives(weight.view(8, 50), 20)
    for bias in (0.0, 5.0, 10.0, 1e4):
        with torch.no_grad():
            module.logits.bias[3] = bias
        q = module(features, weight)
        metrics = training.means({"code_counts": q.hard_counts.double()})
        alarms = [
            a
            for a in training.check_alarms(metrics, 1, 100, V).values()
            if "codebook collapse" in a
        ]
        loss = contrastive(torch.randn(400, 8), q.vectors, negatives, usable, q.drawn)
        seen[bias] = (
            metrics["ppl/code"],
            float(q.soft_perplexity.detach()),
            bool(alarms),
            float(loss.count),
        )
    hard, soft, alarm, count = zip(*seen.values(), strict=True)
    assert list(hard) == sorted(hard, reverse=True) and list(soft) == sorted(soft, reverse=True)
    assert (
        hard[0] > 0.5 * V and math.isclose(hard[-1], 1) and math.isclose(soft[-1], 1, rel_tol=1e-4)
    )
    assert not alarm[0] and alarm[-1]
    assert count[0] == 400 and count[-1] == 0


# ------------------------------------------------------------------------------ what reaches what


def pretraining(align=("tlm", "stm", "ctc"), **changes) -> SlamPretraining:
    torch.manual_seed(0)
    return SlamPretraining(micro_config(**changes), Objectives(align=align)).train()


PARTS = {
    "convolutions": "encoder.speech.subsampling.",
    "speech blocks": "encoder.speech.stack.",
    "closing linear": "encoder.speech.closing.",
    "embedding": "encoder.text.",
    "multimodal blocks": "encoder.multimodal.",
    "codebook": "quantizer.codebook",
    "code logits": "quantizer.logits.",
    "context projection": "context_project.",
    "code head": "code_head.",
    "text head": "text_head.",
    "match head": "match_head.",
    "ctc head": "ctc_head.",
}
SPEECH = {"convolutions", "speech blocks"}
REACHED = {
    "contrastive": SPEECH | {"codebook", "code logits", "context projection"},
    "diversity": {"convolutions", "code logits"},
    "code_mlm": SPEECH | {"closing linear", "multimodal blocks", "code head"},
    "span_lm": {"embedding", "multimodal blocks", "text head"},
    "tlm_text": SPEECH | {"closing linear", "embedding", "multimodal blocks", "text head"},
    "tlm_speech": SPEECH | {"closing linear", "embedding", "multimodal blocks", "code head"},
    "stm": SPEECH | {"closing linear", "embedding", "multimodal blocks", "match head"},
    "ctc": SPEECH | {"closing linear", "ctc head"},
}


@pytest.fixture(scope="module")
def flow():
    """{loss: {part: (least, most) gradient over the part's parameters}} of one micro-batch."""
    model = pretraining()
    out, _ = model(checks.batch())
    assert set(out) == set(model.loss_names) == set(REACHED)
    table = {}
    for name, loss in out.items():
        model.zero_grad()
        loss.sum.backward(retain_graph=True)
        table[name] = {}
        for part, prefix in PARTS.items():
            largest = [
                0.0 if p.grad is None else float(p.grad.abs().max())
                for n, p in model.named_parameters()
                if n.startswith(prefix)
            ]
            assert largest, f"no parameter is called {prefix}"
            table[name][part] = (min(largest), max(largest))
    return table


@pytest.mark.parametrize("name", REACHED)
def test_gradient_reaches_what_a_loss_is_about_and_nothing_else(flow, name):
    wanted = REACHED[name]
    assert {part for part, (_, most) in flow[name].items() if most > 0} == wanted
    assert {
        part for part, (least, _) in flow[name].items() if least > 0
    } == wanted, "a part is reached in part"


def test_targets_of_code_prediction_give_the_quantizer_no_gradient(flow):
    for name in ("code_mlm", "tlm_speech"):
        assert flow[name]["code logits"] == flow[name]["codebook"] == (0.0, 0.0)


def test_every_parameter_gets_a_gradient_from_the_sum_of_all_losses():
    model = pretraining()
    sum(loss.sum for loss in model(checks.batch())[0].values()).backward()
    assert [
        n for n, p in model.named_parameters() if p.grad is None or not float(p.grad.abs().max())
    ] == []


def test_speech_ids_do_not_depend_on_the_mask():
    import pretrain

    checks.check_codes_name_unmasked_speech(pretrain)


def test_masked_features_are_replaced_and_the_others_kept():
    model, speech = pretraining(), speech_batch()
    conv, lens = model.encoder.speech.subsample(speech.features, speech.feature_lens)
    conv = conv.detach().requires_grad_()
    filled = model.mask_fill(conv, speech.masked, lens)
    assert torch.equal(filled[~speech.masked], conv[~speech.masked])
    filled.sum().backward()
    assert (
        float(conv.grad[speech.masked].abs().max()) == 0
    ), "gradient passes through a masked feature"
    assert bool((conv.grad[~speech.masked] == 1).all())
    for b, n in enumerate(lens.tolist()):
        asked = 0.1 * float(conv[b, :n].detach().std())
        assert abs(float(filled[b][speech.masked[b]].detach().std()) / asked - 1) < 0.2


def test_what_was_under_a_mask_is_not_visible():
    """Exchanging masked features for one another (their deviation stays) changes no output."""
    model, speech = pretraining().eval(), speech_batch()
    conv, lens = model.encoder.speech.subsample(speech.features, speech.feature_lens)
    hidden = conv.clone()
    for b in range(len(lens)):
        hidden[b, speech.masked[b]] = conv[b, speech.masked[b]].flip(0)
    visible = conv.clone()
    visible[:, 0] = conv[:, 1]  # unmasked: must be seen, or the test shows nothing
    outputs = []
    for features in (conv, hidden, visible):
        torch.manual_seed(0)
        context, states = model.encoder.speech.encode(
            model.mask_fill(features, speech.masked, lens), lens
        )
        outputs.append(torch.cat([context, states, model.encoder.multimodal(states, lens)], 2))
    assert checks.apart(outputs[1], outputs[0]) < 1e-5
    assert checks.apart(outputs[2], outputs[0]) > 1e-2


@pytest.mark.parametrize("name", ["span_lm", "tlm_text"])
def test_masked_tokens_do_not_leak_through_their_embedding(name):
    """The embedding of a masked token that is visible nowhere has no gradient and no influence."""
    model, text, pairs = pretraining(("tlm",)), text_batch()[0], pair_batch()
    batch, part = (
        (data.Batch(text=text), text)
        if name == "span_lm"
        else (data.Batch(pairs=pairs), pairs.text)
    )
    hidden = part.targets[part.masked_weight > 0].tolist()
    shown = {int(t) for row, n in zip(part.tokens, part.lens, strict=True) for t in row[:n]}
    assert hidden and not set(hidden) & shown

    def loss():
        torch.manual_seed(0)
        return model(batch)[0][name].sum

    loss().backward()
    gradient = model.encoder.text.embedding.weight.grad.abs().sum(1)
    assert float(gradient[hidden].max()) == 0
    assert min(float(gradient[t]) for t in shown) > 0 and MASK_ID in shown
    assert float(gradient[PAD_ID]) == 0
    before = float(loss().detach())
    with torch.no_grad():
        model.encoder.text.embedding.weight[hidden] += 1.0
    assert float(loss().detach()) == before


def test_text_loss_is_taken_on_masked_positions_alone():
    model, (text, _) = pretraining(("tlm",)), text_batch()
    seen = []
    model.text_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    loss = model.text_losses(text)["span_lm"]
    top = model.encoder.multimodal(model.encoder.text(text.tokens), text.lens)
    where = (text.tokens == MASK_ID).flatten()
    assert float(loss.count) == int(where.sum())
    assert torch.allclose(seen[0][text.masked_weight > 0], top.flatten(0, 1)[where], atol=1e-5)


def test_matching_negatives_give_no_other_loss():
    model, pairs = pretraining(), pair_batch()
    other = dataclasses.replace(
        pairs,
        negative_tokens=pairs.negative_tokens.roll(3, 1),
        clean_negative_tokens=pairs.clean_negative_tokens.roll(3, 1),
    )
    results = []
    for its in (pairs, other):
        torch.manual_seed(0)
        results.append(model(data.Batch(pairs=its))[0])
    assert not torch.equal(results[0]["stm"].sum, results[1]["stm"].sum)
    for name in ("tlm_text", "tlm_speech", "ctc"):
        assert close(results[1][name].sum, float(results[0][name].sum.detach()), 1e-6)
        assert torch.equal(results[0][name].count, results[1][name].count)


def test_joined_text_is_read_where_it_stands():
    """tlm_text of a batch equals that of its rows alone, whose text starts at other places."""
    model, pairs = pretraining(("tlm",)).eval(), pair_batch()
    whole = model.tlm_losses(pairs, *_joined(model, pairs))["tlm_text"]
    total = 0.0
    for b, (frames, n) in enumerate(
        zip(pairs.speech.feature_lens.tolist(), pairs.text.lens.tolist(), strict=True)
    ):
        T = (frames + 3) // 4
        masked = pairs.speech.masked[b : b + 1, :T]
        features = pairs.speech.features[b : b + 1, :frames]
        speech = data.SpeechBatch(features, torch.tensor([frames]), masked, *flat_index(masked, 0))
        tokens, clean = pairs.text.tokens[b : b + 1, :n], pairs.clean_tokens[b : b + 1, :n]
        index, weight = flat_index(tokens == MASK_ID, 0)
        text = data.TextBatch(tokens, torch.tensor([n]), index, weight, clean.flatten()[index])
        alone = dataclasses.replace(pairs, speech=speech, text=text)
        total += float(model.tlm_losses(alone, *_joined(model, alone))["tlm_text"].sum.detach())
    assert close(whole.sum, total, 1e-5)


def _joined(model, pairs):
    """(conv, top, text_start) of pairs, with masked frames set to 0 so that no noise is drawn."""
    conv, lens = model.encoder.speech.subsample(pairs.speech.features, pairs.speech.feature_lens)
    _, states = model.encoder.speech.encode(
        conv.masked_fill(pairs.speech.masked[..., None], 0), lens
    )
    return conv, *model.encode_pairs(states, lens, pairs.text.tokens, pairs.text.lens)
