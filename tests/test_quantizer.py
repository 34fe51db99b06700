"""Properties of quantizer.py: codebook rows forward, softmax backward, filler ignored."""

import math

import checks
import pytest
import torch

import quantizer
from quantizer import GumbelQuantizer, LinearTarget, perplexity

SCHEDULE = (2.0, 0.9, 0.5)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small(G: int = 1, V: int = 7, dim: int = 12, code_dim: int = 6) -> GumbelQuantizer:
    torch.manual_seed(0)
    return GumbelQuantizer(dim, G, V, code_dim, SCHEDULE)


def with_logits(logits: torch.Tensor) -> GumbelQuantizer:
    """A quantizer whose logits are these (G, V), whatever the features."""
    G, V = logits.shape
    module = small(G, V)
    with torch.no_grad():
        module.logits.weight.zero_()
        module.logits.bias.copy_(logits.flatten())
    return module


@pytest.mark.parametrize("G", [1, 2, 3])
def test_vectors_are_codebook_rows_and_gradient_reaches_the_logits(G):
    checks.check_vectors_are_codebook_rows(quantizer, G)


def test_gradient_is_that_of_the_softmax_mixture():
    """Backward is as if the vectors were softmax((logits + noise) / temperature) @ codebook."""
    module, features = small(2).train(), torch.randn(9, 12)
    pull = torch.randn(9, 6)
    torch.manual_seed(5)
    (module(features, torch.ones(9)).vectors * pull).sum().backward()
    straight = module.logits.weight.grad.clone()
    module.zero_grad()
    torch.manual_seed(5)
    logits = module.logits(module.norm(features)).view(9, 2, 7)
    noise = quantizer.gumbel_like(logits)
    soft = ((logits + noise) / 2.0).softmax(-1)
    (torch.einsum("mgv,gvd->mgd", soft, module.codebook).flatten(1) * pull).sum().backward()
    assert torch.allclose(straight, module.logits.weight.grad, atol=1e-5)


def test_used_codebook_rows_alone_get_a_gradient():
    module = small().train()
    q = module(torch.randn(3, 12), torch.ones(3))
    q.vectors.sum().backward()
    moved = module.codebook.grad[0].abs().sum(1) > 0
    assert moved.nonzero()[:, 0].tolist() == sorted(set(q.drawn[:, 0].tolist()))


def test_eval_draws_the_ids_and_training_draws_by_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    module = with_logits(logits)
    features = torch.randn(30_000, 12)
    q = module.eval()(features, torch.ones(len(features)))
    assert torch.equal(q.drawn, q.ids) and set(q.ids.flatten().tolist()) == {2}
    share = module.train()(features, torch.ones(len(features))).drawn.flatten().bincount() / len(
        features
    )
    assert torch.allclose(share, logits[0].softmax(0), atol=0.01)


def test_ids_are_free_of_noise_and_of_gradient():
    checks.check_ids_are_free_of_noise(quantizer)


def test_temperature_counts_optimiser_steps_and_survives_a_checkpoint():
    checks.check_temperature_counts_optimiser_steps(quantizer)


def test_temperature_of_the_paper_after_a_million_steps():
    module = GumbelQuantizer(12, 1, 7, 6, (2.0, 0.999995, 0.1))
    for step in (0, 1, 100_000, 500_000, 1_000_000):
        module.step.fill_(step)
        assert math.isclose(float(module.temperature), max(2 * 0.999995**step, 0.1), rel_tol=1e-9)
    assert float(module.temperature) == 0.1


@pytest.mark.parametrize("G, V", [(1, 16), (2, 8)])
@torch.no_grad()
def test_equal_logits_give_perplexity_gv_and_certain_ones_g(G, V):
    features, weight = torch.randn(20, 12), torch.ones(20)
    for logits, expected in ((torch.zeros(G, V), G * V), (1e4 * torch.eye(V)[:G], G)):
        for train in (True, False):
            q = with_logits(logits).train(train)(features, weight)
            assert math.isclose(float(q.soft_perplexity), expected, rel_tol=1e-5)


@torch.no_grad()
def test_perplexity_is_that_of_the_batch_mean_not_the_mean_of_perplexities():
    """Every frame certain of a code of its own: the batch uses all codes."""
    module = GumbelQuantizer(4, 1, 4, 6, SCHEDULE)
    with torch.no_grad():
        module.logits.weight.copy_(1e3 * torch.eye(4))
    q = module(torch.eye(4).repeat(5, 1), torch.ones(20))
    assert math.isclose(float(q.soft_perplexity), 4, rel_tol=1e-4)
    assert q.hard_counts.tolist() == [[5, 5, 5, 5]]


def test_hard_counts_count_the_noise_free_ids():
    module, features = small(2, 5), torch.randn(40, 12)
    for train in (True, False):
        q = module.train(train)(features, torch.ones(40))
        expected = torch.stack([q.ids[:, g].bincount(minlength=5) for g in range(2)])
        assert torch.equal(q.hard_counts, expected.float())
        assert not q.hard_counts.requires_grad


def test_filler_changes_no_statistic():
    module, features = small(2), torch.randn(10, 12)
    plain = module.eval()(features, torch.ones(10))
    filler = torch.cat([features, 50 * torch.randn(6, 12)])
    padded = module(filler, torch.cat([torch.ones(10), torch.zeros(6)]))
    assert torch.equal(padded.hard_counts, plain.hard_counts)
    assert torch.allclose(padded.soft_perplexity, plain.soft_perplexity, rtol=1e-6)
    (gradient,) = torch.autograd.grad(padded.soft_perplexity, module.logits.weight)
    (expected,) = torch.autograd.grad(plain.soft_perplexity, module.logits.weight)
    assert torch.allclose(gradient, expected, atol=1e-6)


def test_nothing_but_filler_is_finite():
    module = small().train()
    q = module(torch.randn(4, 12), torch.zeros(4))
    (q.soft_perplexity + q.vectors.sum()).backward()
    assert float(q.hard_counts.sum()) == 0 and bool(q.soft_perplexity.isfinite())
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


@pytest.mark.parametrize("extreme", [1e2, 1e4, 1e8])
def test_gradients_are_finite_where_codes_have_probability_exactly_zero(extreme):
    logits = torch.zeros(2, 7)
    logits[0, 3], logits[1, 5] = extreme, extreme
    module = with_logits(logits).train()
    q = module(torch.randn(6, 12), torch.ones(6))
    assert float((logits[0].softmax(0) == 0).sum()) == (6 if extreme > 1e2 else 0)
    (q.soft_perplexity + q.vectors.square().sum()).backward()
    assert math.isclose(float(q.soft_perplexity.detach()), 2, rel_tol=1e-5)
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_perplexity_has_a_finite_gradient_at_zero_and_is_maximal_at_equality():
    p = torch.tensor([[1.0, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0]], requires_grad=True)
    values = perplexity(p)
    assert torch.allclose(values, torch.tensor([1.0, 4.0, 2.0]))
    values.sum().backward()
    assert torch.isfinite(p.grad).all()


def test_bf16_autocast_is_finite_a_thousand_times_and_changes_no_code():
    module = small(2, 9).train()
    weight = torch.ones(5)
    for seed in range(1000):
        torch.manual_seed(seed)
        features = (10.0 ** (seed % 5 - 2) * torch.randn(5, 12)).bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            q = module(features, weight)
        assert q.vectors.dtype == torch.float32 and torch.isfinite(q.vectors).all()
        assert torch.equal(q.ids, module.name(features.float())), "bf16 arithmetic chose the codes"
        if seed % 10 == 0:
            (q.vectors.sum() + q.soft_perplexity).backward()
            assert torch.isfinite(features.grad).all()
            assert all(torch.isfinite(p.grad).all() for p in module.parameters())
            module.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_uniform_sample_of_exactly_zero_is_no_infinite_noise(monkeypatch, dtype):
    module = small().train().to(dtype)
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)
    assert torch.isfinite(quantizer.gumbel_like(torch.zeros(3, dtype=dtype))).all()
    q = module(torch.randn(4, 12), torch.ones(4))
    q.vectors.sum().backward()
    assert torch.isfinite(q.vectors).all() and torch.isfinite(module.logits.weight.grad).all()


def test_noise_is_standard_gumbel():
    """Its distribution function is exp(-exp(-x)); Kolmogorov-Smirnov at a probability of 1e-4."""
    n = 200_000
    noise = quantizer.gumbel_like(torch.zeros(n)).double().sort().values
    expected, found = torch.exp(-torch.exp(-noise)), (torch.arange(n) + 0.5) / n
    assert float((expected - found).abs().max()) < 2.23 / n**0.5


@torch.no_grad()
def test_codebooks_start_as_in_wav2vec():
    torch.manual_seed(0)
    module = GumbelQuantizer(64, 1, 256, 64, SCHEDULE)
    assert (
        abs(float(module.logits.weight.std()) - 1) < 0.05
        and float(module.logits.bias.abs().max()) == 0
    )
    assert 0 <= float(module.codebook.min()) and float(module.codebook.max()) <= 1
    assert abs(float(module.codebook.mean()) - 0.5) < 0.02
    normal = GumbelQuantizer(64, 1, 256, 64, SCHEDULE, "normal").codebook
    assert abs(float(normal.mean())) < 0.05 and abs(float(normal.std()) - 1) < 0.05


def test_xl_quantizer_has_the_counted_parameters():
    with torch.device("meta"):
        module = GumbelQuantizer(640, 1, 1024, 1024, SCHEDULE)
    linear_and_codebook = sum(p.numel() for n, p in module.named_parameters() if "norm" not in n)
    assert linear_and_codebook == 640 * 1024 + 1024 + 1024 * 1024  # 1.70 M


def test_linear_target_is_a_linear_of_the_normed_features():
    torch.manual_seed(0)
    module, features = LinearTarget(12, 6), 3 + 5 * torch.randn(8, 12)
    centred = features - features.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    expected = normed @ module.project.weight.T + module.project.bias
    assert torch.allclose(module(features), expected, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(
            module(features), expected, atol=1e-5
        ), "bf16 must not round the targets"
    module(features).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
