"""RNN-T: the loss against enumeration of all paths, the searches against brute force."""

import checks
import pytest
import torch
import torch.nn.functional as F
from checks import rnnt_batch, rnnt_by_paths, rnnt_path_sum, small_transducer

import losses
import rnnt
from losses import BLANK_ID, label_smoothed
from rnnt import Transducer


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def loss_and_gradient(logits: torch.Tensor, *rest) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.detach().requires_grad_()
    loss = losses.rnnt(logits, *rest).sum
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient


# ----------------------------------------------------------------------------------------- the loss


def test_loss_and_gradient_equal_the_sum_over_all_paths():
    checks.check_rnnt_equals_the_sum_over_paths(losses)


def test_padding_has_no_effect_and_no_gradient():
    checks.check_rnnt_ignores_padding(losses)


@pytest.mark.parametrize("blank", [0, 2, 4])
def test_gradient_equals_finite_differences(blank):
    logits, *rest = rnnt_batch(blank)
    assert torch.autograd.gradcheck(
        lambda x: 2.5 * losses.rnnt(x, *rest, blank).sum, logits.requires_grad_()
    )


def test_without_tokens_the_loss_is_that_of_all_blanks():
    logits = torch.randn(2, 5, 1, 4, dtype=torch.float64)
    loss = losses.rnnt(logits, torch.tensor([5, 3]), torch.zeros(2, 0).long(), torch.tensor([0, 0]))
    blanks = -logits.log_softmax(-1)[:, :, 0, BLANK_ID]
    assert torch.isclose(loss.sum, blanks[0].sum() + blanks[1, :3].sum()) and float(loss.count) == 0


def test_the_batch_is_the_sum_of_its_rows():
    logits, lens, targets, target_lens = rnnt_batch(0)
    together, gradient = loss_and_gradient(logits, lens, targets, target_lens)
    alone = []
    for b, (t, u) in enumerate(zip(lens.tolist(), target_lens.tolist(), strict=True)):
        row = logits[b : b + 1, :t, : u + 1], lens[b : b + 1], targets[b : b + 1, :u]
        loss, own = loss_and_gradient(*row, target_lens[b : b + 1])
        torch.testing.assert_close(gradient[b, :t, : u + 1], own[0])
        alone.append(loss)
    torch.testing.assert_close(together, sum(alone))


def test_logits_need_no_softmax_and_bear_one():
    """A softmax forgets a constant added to a cell; so two softmaxes are one."""
    logits, *rest = rnnt_batch(0)
    plain = losses.rnnt(logits, *rest).sum
    shifted = logits + 10 * torch.randn(*logits.shape[:3], 1, dtype=torch.float64)
    torch.testing.assert_close(losses.rnnt(shifted, *rest).sum, plain)
    torch.testing.assert_close(losses.rnnt(logits.log_softmax(-1), *rest).sum, plain)


def test_gradient_of_each_cell_sums_to_zero_and_of_the_first_blank_column_to_the_frames():
    """What a cell's softmax gives, its two steps take; every path takes T_b blanks."""
    logits, lens, targets, target_lens = rnnt_batch(0)
    _, gradient = loss_and_gradient(logits, lens, targets, target_lens)
    assert float(gradient.sum(-1).abs().max()) < 1e-12
    log_probs = torch.stack([logits.log_softmax(-1)[..., 0], torch.zeros(6, 4, 4)], -1)
    _, taken = losses._path_posteriors(log_probs, lens, target_lens)
    torch.testing.assert_close(taken[..., 0].sum((1, 2)), lens.double())
    torch.testing.assert_close(taken[..., 1].sum((1, 2)), target_lens.double())


def test_a_filler_row_costs_nothing():
    logits, lens, targets, target_lens = rnnt_batch(0)
    filled = lens.clone(), target_lens.clone()
    filled[0][1], filled[1][1] = 0, 0
    loss, gradient = loss_and_gradient(logits, filled[0], targets, filled[1])
    rest = torch.tensor([0, 2, 3, 4, 5])
    expected, _ = loss_and_gradient(logits[rest], lens[rest], targets[rest], target_lens[rest])
    torch.testing.assert_close(loss, expected)
    assert bool((gradient[1] == 0).all())


@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e6, 1e30])
def test_extreme_logits_are_finite(scale):
    logits, *rest = rnnt_batch(0)
    loss, gradient = loss_and_gradient((scale * logits).float(), *rest)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()
    assert float(gradient.abs().max()) <= 1 + 1e-5


@pytest.mark.parametrize("V", [5, 70_000, 300_000])
def test_any_number_of_cells_a_slice(V):
    """All cells in one slice, three cells, one."""
    logits, lens, target_lens = torch.randn(2, 2, 3, V), torch.tensor([2, 1]), torch.tensor([2, 1])
    targets = torch.randint(1, V, (2, 2))
    loss, gradient = loss_and_gradient(logits, lens, targets, target_lens)
    wide = logits.double().requires_grad_()
    expected = rnnt_by_paths(wide, lens, targets, target_lens, 0)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected, wide)[0],
                               rtol=1e-5, atol=1e-6)  # fmt: skip


def test_fp32_gradients_of_long_lattices_keep_their_digits():
    """The sums over the lattice are float64: in fp32, 1e-5 would be lost here already."""
    logits, targets = 5 * torch.randn(1, 150, 61, 8), torch.randint(1, 8, (1, 60))
    lens = torch.tensor([150]), torch.tensor([60])
    _, gradient = loss_and_gradient(logits, lens[0], targets, lens[1])
    _, exact = loss_and_gradient(logits.double(), lens[0], targets, lens[1])
    assert float((gradient - exact).abs().max()) < 2e-6


def test_bf16_logits_are_computed_in_fp32_and_get_a_bf16_gradient():
    logits, *rest = rnnt_batch(0)
    logits = logits.bfloat16()
    exact, exact_gradient = loss_and_gradient(logits.float(), *rest)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradient = loss_and_gradient(logits, *rest)
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    assert torch.equal(loss, exact) and torch.equal(gradient, exact_gradient.bfloat16())


def test_float64_is_kept_and_other_layouts_are_read():
    logits, *rest = rnnt_batch(0)
    loss, gradient = loss_and_gradient(logits, *rest)
    assert loss.dtype == gradient.dtype == torch.float64
    other = logits.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert not other.is_contiguous()
    again, other_gradient = loss_and_gradient(other, *rest)
    assert torch.equal(loss, again) and torch.equal(gradient, other_gradient)


@pytest.mark.parametrize("blank", [0, 8])
def test_equals_warprnnt(blank):
    package = pytest.importorskip("warprnnt_numba")
    logits, targets = torch.randn(2, 9, 5, 9, dtype=torch.float64), torch.randint(0, 8, (2, 4))
    batch = torch.tensor([9, 6]), targets + (targets >= blank), torch.tensor([4, 2])
    loss, gradient = loss_and_gradient(logits, *batch, blank)
    theirs = package.RNNTLossNumba(blank=blank, reduction="sum")
    lens, targets, target_lens = (x.int() for x in batch)
    n_threads = torch.get_num_threads()
    expected = theirs(logits.requires_grad_(), targets, lens, target_lens)
    torch.set_num_threads(n_threads)  # its first call takes all cores, for later tests too
    expected.backward()
    torch.testing.assert_close(loss, expected.detach()[0])
    torch.testing.assert_close(gradient, logits.grad)


# ---------------------------------------------------------------------------------- label smoothing


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_label_smoothing_equals_its_formula_and_torch(smoothing):
    logits, targets = torch.randn(7, 9, dtype=torch.float64), torch.randint(0, 9, (7,))
    logits[:3] += 6 * F.one_hot(targets[:3], 9)
    weight = torch.tensor([1.0] * 5 + [0.0] * 2)
    loss = label_smoothed(logits, targets, weight, smoothing)
    nll = -logits.log_softmax(-1)
    rows = (1 - smoothing) * nll[range(7), targets] + smoothing * nll.mean(1)
    torch.testing.assert_close(loss.sum, rows[:5].sum())
    of_torch = F.cross_entropy(logits[:5], targets[:5], label_smoothing=smoothing, reduction="sum")
    torch.testing.assert_close(loss.sum, of_torch)
    assert float(loss.count) == 5
    assert float(loss.correct) == int((logits[:5].argmax(1) == targets[:5]).sum()) >= 3


def test_filler_of_label_smoothing_has_no_gradient():
    logits = torch.randn(4, 6, requires_grad=True)
    weight = torch.tensor([1.0, 1.0, 0.0, 0.0])
    label_smoothed(logits, torch.tensor([1, 2, 0, 0]), weight, 0.1).sum.backward()
    assert float(logits.grad[2:].abs().max()) == 0 < float(logits.grad[:2].abs().min())


# ------------------------------------------------------------------------------------- the network


def test_logits_of_a_row_do_not_depend_on_the_batch():
    """Frames of 1e3 and ids outside the vocabulary stand in the padding."""
    model = small_transducer(rnnt, V=7)
    states, targets = torch.randn(3, 6, 4, dtype=torch.float64), torch.randint(1, 7, (3, 4))
    lens, target_lens = torch.tensor([6, 1, 4]), torch.tensor([2, 4, 0])
    for b in range(3):
        states[b, lens[b] :], targets[b, target_lens[b] :] = 1e3, -1
    together = model(states, lens, targets, target_lens)
    assert together.shape == (3, 6, 5, 7) and torch.isfinite(together).all()
    for b, (t, u) in enumerate(zip(lens.tolist(), target_lens.tolist(), strict=True)):
        row = slice(b, b + 1)
        alone = model(states[row, :t], lens[row], targets[row, :u], target_lens[row])
        torch.testing.assert_close(together[b, :t, : u + 1], alone[0])


def test_every_parameter_has_a_gradient():
    model = Transducer(7, 4, dim=6, n_layers=2, joint_dim=5, dropout=0.1)
    lens, target_lens = torch.tensor([6, 3]), torch.tensor([3, 2])
    targets = torch.randint(1, 7, (2, 3))
    logits = model(torch.randn(2, 6, 4), lens, targets, target_lens)
    losses.rnnt(logits, lens, targets, target_lens).sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name


def test_the_papers_size():
    """METHOD's sums: prediction network 7.2M, joint network with its inputs 1.7M or so."""
    model = Transducer(1024, 1024, dim=640, n_layers=2, joint_dim=640, dropout=0.1)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in
             model.named_children()}  # fmt: skip
    assert sizes["embedding"] + sizes["lstm"] == 1024 * 640 + 2 * 4 * 640 * (2 * 640 + 2)
    assert sum(sizes.values()) == pytest.approx(9.4e6, rel=0.01)


def test_four_sequences_are_learned_by_heart():
    model = Transducer(9, 8, dim=24, n_layers=1, joint_dim=24, dropout=0.0)
    states, lens = torch.randn(4, 6, 8), torch.tensor([6, 4, 6, 3])
    sequences = [[1, 2, 3], [4, 4, 5, 6], [7], [8, 1, 8, 8]]  # the last has more ids than frames
    target_lens = torch.tensor([len(ids) for ids in sequences])
    targets = torch.tensor([ids + [0] * (4 - len(ids)) for ids in sequences])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(120):
        optimizer.zero_grad()
        loss = losses.rnnt(model(states, lens, targets, target_lens), lens, targets, target_lens)
        (loss.sum / loss.count).backward()
        optimizer.step()
    assert model.eval().greedy(states, lens) == sequences
    best = [row[0] for row in model.beam(states, lens, width=4, u_max=6)]
    assert [hypothesis.tokens for hypothesis in best] == sequences


# ----------------------------------------------------------------------------------------- searches


def test_recognition_begins_as_training_does():
    checks.check_recognition_begins_as_training_does(losses, rnnt)


def test_a_beam_that_holds_everything_finds_the_best_of_all():
    checks.check_beam_finds_the_best_of_all(rnnt)


LIMIT = 40  # tokens in all; a row that writes fewer met no limit


def noisy_speech(n_rows: int, noise: float):
    """States (B, 8, 6), lens, targets, target_lens: frames that each show a token or silence.

    Frames of a token are 1 to 5 in its place; id 0 is silence. Noise makes them ambiguous.
    """
    ids = torch.randint(0, 6, (n_rows, 8))
    lens = torch.randint(3, 9, (n_rows,))
    spoken = [[i for i in row[:n] if i] for row, n in zip(ids.tolist(), lens.tolist(), strict=True)]
    targets = torch.tensor([row + [0] * (8 - len(row)) for row in spoken])
    states = F.one_hot(ids, 6) + noise * torch.randn(n_rows, 8, 6)
    return states, lens, targets, torch.tensor([len(row) for row in spoken])


@pytest.fixture(scope="module")
def unsure() -> Transducer:
    """A transducer trained for a second on noisy speech: it writes, stops, and is often unsure."""
    torch.manual_seed(0)
    model = Transducer(6, 6, dim=16, n_layers=1, joint_dim=16, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(100):
        states, lens, targets, target_lens = noisy_speech(16, noise=0.5)
        optimizer.zero_grad()
        logits = model(states, lens, targets, target_lens)
        loss = losses.rnnt(logits, lens, targets, target_lens)
        (loss.sum / loss.count).backward()
        optimizer.step()
    return model.double().eval()


def searched(model: Transducer, n_rows: int, width: int):
    """(states (1, T, D), greedy's ids, the beam's hypotheses) of rows that met no limit."""
    states, lens, _, _ = noisy_speech(n_rows, noise=0.7)
    states = states.double()
    greedy = model.greedy(states, lens, max_symbols=LIMIT)
    beam = model.beam(states, lens, width, u_max=LIMIT)
    rows = zip(states, lens.tolist(), greedy, beam, strict=True)
    return [(x[None, :n], ids, found) for x, n, ids, found in rows if len(ids) < LIMIT]


@torch.no_grad()
def log_probability(model, states: torch.Tensor, ids: list[int]) -> float:
    """Of a transcript, over all its alignments."""
    lens, target_lens = torch.tensor([states.shape[1]]), torch.tensor([len(ids)])
    targets = torch.tensor([ids], dtype=torch.int64)
    logits = model(states, lens, targets, target_lens)
    return -float(losses.rnnt(logits, lens, targets, target_lens).sum)


def test_a_beam_of_one_is_greedy_search(unsure):
    rows = searched(unsure, 200, width=1)
    lengths = [len(greedy) for _, greedy, _ in rows]
    assert len(rows) > 190 and sum(n >= 3 for n in lengths) > 100, "rows that show little"
    for _, greedy, beam in rows:
        assert [hypothesis.tokens for hypothesis in beam] == [greedy]


def test_a_beam_is_at_least_as_likely_as_greedy_on_average(unsure):
    of_beam, of_greedy, n_changed = [], [], 0
    for states, greedy, beam in searched(unsure, 100, width=4):
        n_changed += beam[0].tokens != greedy
        of_greedy.append(log_probability(unsure, states, greedy))
        of_beam.append(log_probability(unsure, states, beam[0].tokens))
        assert beam[0].score <= of_beam[-1] + 1e-9, "more than all alignments together"
    assert n_changed > 10, "the beam has found nothing else"
    assert sum(of_beam) / len(of_beam) > sum(of_greedy) / len(of_greedy)


def test_hypotheses_differ_and_stand_in_order(unsure):
    for _, _, beam in searched(unsure, 20, width=4):
        assert len(beam) == 4 == len({tuple(hypothesis.tokens) for hypothesis in beam})
        scores = [hypothesis.score for hypothesis in beam]
        assert scores == sorted(scores, reverse=True)
        assert all(type(h.tokens) is list and BLANK_ID not in h.tokens for h in beam)


def test_of_equal_scores_the_shorter_comes_first():
    found = rnnt._sorted([(1, 2), (), (3,), (4,)], [-1.0, -1.0, -0.5, -float("inf")])
    assert found == [([3], -0.5), ([], -1.0), ([1, 2], -1.0)]


def test_searches_do_not_depend_on_the_batch(unsure):
    states, lens, _, _ = noisy_speech(12, noise=0.7)
    states = states.double()
    for b in range(12):
        states[b, lens[b] :] = 1e3
    greedy, beam = unsure.greedy(states, lens), unsure.beam(states, lens, 4)
    for b, n in enumerate(lens.tolist()):
        row = states[b : b + 1, :n], lens[b : b + 1]
        assert unsure.greedy(*row) == [greedy[b]]
        (alone,) = unsure.beam(*row, 4)
        assert [h.tokens for h in alone] == [h.tokens for h in beam[b]]
        for one, other in zip(alone, beam[b], strict=True):
            assert abs(one.score - other.score) < 1e-9


def test_a_transducer_that_never_stops_is_stopped():
    model = small_transducer(rnnt)
    with torch.no_grad():
        model.out.bias[BLANK_ID] -= 1e3
    states, lens = torch.randn(2, 5, 4).double(), torch.tensor([5, 2])
    assert [len(ids) for ids in model.greedy(states, lens, max_symbols=3)] == [15, 6]
    for u_max, longest in ((None, [16 + 15, 16 + 6]), (3, [3, 3]), (0, [0, 0])):
        beam = model.beam(states, lens, 2, u_max=u_max)
        assert [max(len(h.tokens) for h in row) for row in beam] == longest


def test_a_row_without_frames_has_an_empty_transcript():
    model, states = small_transducer(rnnt), torch.randn(2, 3, 4).double()
    lens = torch.tensor([3, 0])
    assert model.greedy(states, lens)[1] == []
    assert model.beam(states, lens, 3)[1] == [([], 0.0)]


def test_one_path_is_what_it_says():
    """The reference itself: one frame and one token have one path, written out."""
    logits = torch.randn(1, 2, 4, dtype=torch.float64)
    log_probs = logits.log_softmax(-1)
    expected = -(log_probs[0, 0, 3] + log_probs[0, 1, 0])
    torch.testing.assert_close(rnnt_path_sum(logits, [3], 0), expected)
