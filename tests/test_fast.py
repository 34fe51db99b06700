"""The fast path is held to the plain one; what is logged of speed is held to its definition."""

import copy
import dataclasses
import math
import shutil

import checks
import pytest
import torch
from checks import micro_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import fast
import pretrain
import training
from conformer import ConformerStack, SlamConfig, block_flops
from losses import Loss

CPU = torch.device("cpu")
ALL = pretrain.Objectives(("speech", "text"), ("tlm", "stm"))


def make_model(
    objectives: pretrain.Objectives = ALL, **changes: object
) -> pretrain.SlamPretraining:
    torch.manual_seed(0)
    return pretrain.SlamPretraining(micro_config(**changes), objectives).train()


def two_shapes() -> list[data.Batch]:
    other = data.Batch(checks.speech_batch((40, 36, 30), seed=5), checks.text_batch((9, 7, 5))[0],
                       checks.pair_batch((52, 40), (7, 5)))  # fmt: skip
    return [checks.batch(), other]


def run_steps(
    model: pretrain.SlamPretraining, mode: str, n_steps: int, dtype: str = "fp32", **how: object
) -> tuple[list[dict[str, float]], list[torch.Tensor]]:
    """Each step has both shapes in two micro-batches -> losses of each, gradients of the first."""
    make = fast.GraphedMicroStep if mode == "graph" else fast.MicroStep
    micro_step = make(model, CPU, dtype, **how)
    optimizer = training.make_optimizer(model, 0.0)
    for group in optimizer.param_groups:
        group["lr"] = 3e-4
    losses, first = [], []
    for step in range(n_steps):
        for k, batch in enumerate(two_shapes()):
            if model.objectives.modalities == ("text",):
                batch = data.Batch(text=batch.text)
            training.seed_micro_batch(0, step, k)
            scales = {name: torch.tensor(1 / n) for name, n in model.counts(batch).items()}
            found, _ = micro_step(batch, scales)
            losses.append({name: float(loss.sum / loss.count) for name, loss in found.items()})
        parameters = list(model.parameters())
        first = first or [p.grad.clone() for p in parameters]
        training.optimizer_step(optimizer, parameters, 5.0)
        micro_step.zero_grad(optimizer)
        model.step_done()
    return losses, first


def apart(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Norm of the difference of two gradients over the norm of the second."""
    difference = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(ours, theirs)))
    return difference / math.sqrt(sum(float(b.square().sum()) for b in theirs))


# ------------------------------------------------------------------------------------------ compile


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs a C++ compiler")
@pytest.mark.parametrize(
    "dtype, of_gradient, of_loss", [("fp32", 1e-5, 1e-5), ("bf16", 1e-2, 1e-3)]
)
def test_compiled_steps_are_the_eager_ones_and_a_shape_is_compiled_once(
    dtype, of_gradient, of_loss
):
    """Text alone, whose two shapes take seconds to compile; benchmarks/gpu.py does it with all.

    The gradient of the first step by its norm; losses over 20 steps relative to their size.
    """
    before = fast.compilations()
    plain, quick = (make_model(pretrain.Objectives(("text",), ())) for _ in range(2))
    fast.compile_blocks(quick, "compile")
    assert list(quick.state_dict()) == list(plain.state_dict())
    expected, gradients = run_steps(plain, "none", 20, dtype)
    found, its_gradients = run_steps(quick, "compile", 20, dtype)
    assert apart(its_gradients, gradients) < of_gradient
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["span_lm"] == pytest.approx(theirs["span_lm"], rel=of_loss)
    assert fast.compilations() - before == 2
    with fast.uncompiled("compile"), torch.no_grad():  # as held-out batches of other shapes are
        quick.eval()(data.Batch(text=checks.text_batch((6, 4))[0]))
    assert fast.compilations() - before == 2


def test_what_fast_cannot_do_is_one_clear_line(monkeypatch):
    with pytest.raises(ValueError, match="--fast graph.*no CUDA.*--fast none"):
        fast.check_fast("graph", CPU, ["span_lm"])
    cuda = torch.device("cuda")
    with pytest.raises(ValueError, match="--fast graph.*CTC.*--fast compile"):
        fast.check_fast("graph", cuda, ["span_lm", "ctc"])
    with pytest.raises(ValueError, match="--fast graph.*dropout"):
        fast.check_fast("graph", cuda, ["span_lm"], recomputes_noise=True)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"--fast compile needs a C\+\+ compiler.*--fast none"):
        fast.check_fast("compile", CPU, ["span_lm"])
    fast.check_fast("compile", cuda, ["ctc"])
    fast.check_fast("none", CPU, ["ctc"])


def test_none_compiles_nothing(monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: pytest.fail("compiled"))
    fast.compile_blocks(make_model(), "none")


# -------------------------------------------------------------------------------------------- graph


class Recorder:
    """Plays a CUDA graph on a CPU: recording computes nothing, replaying refills fixed memory."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.recorded, self.replayed = model, 0, 0

    def __call__(self, function):
        gradients = [p.grad.clone() for p in self.model.parameters()]
        with torch.random.fork_rng(devices=[]):
            out = function()
        for parameter, gradient in zip(self.model.parameters(), gradients):
            parameter.grad.copy_(gradient)
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            losses, statistics = function()
            for name, loss in losses.items():
                for fixed, new in zip(out[0][name], loss):
                    if fixed is not None:
                        fixed.copy_(new)
            for name, value in statistics.items():
                out[1][name].copy_(value)

        return replay, out


def test_replayed_steps_are_the_eager_ones_bit_for_bit_with_noise():
    """Two shapes by turns, two micro-batches a step: inputs copied in, gradients added in place."""
    plain, replayed = make_model(dropout=0.1), make_model(dropout=0.1)
    recorder = Recorder(replayed)
    expected, gradients = run_steps(plain, "none", 6)
    found, its_gradients = run_steps(replayed, "graph", 6, record=recorder)
    assert found == expected
    assert all(map(torch.equal, its_gradients, gradients))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(replayed.state_dict()[name], tensor), name
    assert recorder.recorded == 2 and recorder.replayed == 2 * (6 - fast.WARM_UP)


def rolled_rows(part):
    """The same shapes, other contents."""
    return part.roll(1, 0) if isinstance(part, torch.Tensor) else part._map(rolled_rows)


def test_a_replay_never_writes_into_the_batch_it_was_recorded_with():
    model, batches = make_model(), two_shapes()[:1] * 5
    before = copy.deepcopy(batches[0])
    micro_step = fast.GraphedMicroStep(model, CPU, record=Recorder(model))
    scales = {name: torch.tensor(1.0) for name in model.loss_names}
    rolled = rolled_rows(batches[0])
    for batch in [*batches, rolled]:
        micro_step(batch, scales)
    for ours, theirs in zip(batches[0].tensors(), before.tensors(), strict=True):
        assert torch.equal(ours, theirs)


def test_sums_keep_what_a_replay_writes_over():
    """Losses of a float64 model are float64 already: they must be copied all the same."""
    total, sums = torch.tensor(2.0, dtype=torch.float64), training.Sums()
    sums.add({"x": Loss(total, torch.ones(()))}, {})
    total.fill_(100.0)
    assert float(sums.values["sum/x"]) == 2.0


@pytest.mark.parametrize("reduce_dtype, tolerance", [("fp32", 1e-7), ("bf16", 4e-3)])
def test_gradients_of_graphs_are_averaged_over_ranks_in_buckets(
    monkeypatch, reduce_dtype, tolerance
):
    """Played ranks: the other one's gradient is three times ours, so the mean is twice ours."""
    calls = []

    def all_reduce(flat: torch.Tensor) -> None:
        calls.append(flat.dtype)
        flat.mul_(4)

    monkeypatch.setattr(fast.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(fast.dist, "broadcast", lambda tensor, source: None)
    monkeypatch.setattr(fast, "BUCKET", 2000)
    model = make_model()
    micro_step = fast.GraphedMicroStep(model, CPU, world_size=2, reduce_dtype=reduce_dtype)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.grad.normal_()
    before = [p.grad.clone() for p in model.parameters()]
    micro_step.reduce()
    after = [p.grad for p in model.parameters()]
    assert apart(after, [2 * gradient for gradient in before]) < tolerance
    n_numbers = sum(p.numel() for p in model.parameters())
    assert 2 < len(calls) <= n_numbers / 2000 + 1 and set(calls) == {fast.DTYPES[reduce_dtype]}


# ---------------------------------------------------------------------------------- checkpointing


def test_activation_checkpointing_changes_no_gradient_and_keeps_less():
    """Bit for bit, with dropout: the second time draws what the first did."""
    kept = {}

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = make_model(dropout=0.1, mm_layers=3)
        fast.checkpoint_blocks(model, checkpointing)
        sizes = []

        def note(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            losses, _ = model(checks.batch())
        kept[checkpointing] = sum(sizes)
        sum(loss.sum for loss in losses.values()).backward()
        return [p.grad for p in model.parameters()]

    assert all(map(torch.equal, gradients(True), gradients(False)))
    assert kept[True] < 0.5 * kept[False]


# ---------------------------------------------------------------------------------- matrix products


@pytest.mark.parametrize(
    "gain, error, chosen",
    [(2.0, 1e-6, "medium"), (1.1, 1e-6, "highest"), (2.0, 1e-2, "highest"), (0.5, 1e-6, "highest")],
)
def test_a_matrix_product_is_switched_only_where_it_is_faster_and_exact(
    monkeypatch, gain, error, chosen
):
    def flops(device: torch.device, dtype: str, rounds: int = 7) -> float:
        return gain if torch.get_float32_matmul_precision() == "medium" else 1.0

    monkeypatch.setattr(fast, "matmul_flops", flops)
    monkeypatch.setattr(fast, "_matmul_error", lambda device: error)
    try:
        found, why = fast.choose_matmul("auto", CPU)
        assert found == chosen == torch.get_float32_matmul_precision()
        assert (f"{gain:.2f}" in why and chosen in why) == (chosen == "medium")
        assert fast.choose_matmul("high", CPU) == ("high", "")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_probe_of_matrix_products_finds_fp32_exact_and_bf16_not():
    assert 0 < fast._matmul_error(CPU) < fast.EXACT
    with torch.autocast("cpu", torch.bfloat16):
        assert fast._matmul_error(CPU) > fast.EXACT
    assert fast.matmul_flops(CPU, "fp32", rounds=1) > 1e8


# ------------------------------------------------------------------------------------ FLOPs and MFU


def test_flops_of_a_block_are_those_that_torch_counts():
    config = micro_config(conv_kernel=7)
    stack = ConformerStack(config, 2)
    lens = torch.tensor([11, 11, 11])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stack(torch.randn(3, 11, config.d_model), lens)
    assert counter.get_total_flops() == pytest.approx(2 * block_flops(config, lens), rel=1e-9)
    short = block_flops(config, torch.tensor([11])) + block_flops(config, torch.tensor([5]))
    assert block_flops(config, torch.tensor([11, 5])) == pytest.approx(short)


@pytest.mark.parametrize("align", [(), ("tlm",), ("tlm", "stm"), ("tlm", "stm", "ctc")])
@pytest.mark.parametrize("stm_unmasked", [False, True])
def test_flops_of_a_micro_batch_are_about_those_that_torch_counts(align, stm_unmasked):
    """Forward, without padding. Only similarities of the contrastive loss are left out."""
    if stm_unmasked and "stm" not in align:
        pytest.skip("a switch of STM")
    wide = dict(d_model=96, d_ff=384, n_codes=16, vocab_size=48, subsample_channels=8)
    model = pretrain.SlamPretraining(
        micro_config(**wide),
        pretrain.Objectives(("speech", "text"), align, stm_unmasked=stm_unmasked),
    ).train()
    pairs = checks.pair_batch((80, 80), (8, 8)) if align else None
    batch = data.Batch(checks.speech_batch((80, 80)), checks.text_batch((12, 12), 48)[0], pairs)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch)
    assert model.work(batch)["flops"] == pytest.approx(3 * counter.get_total_flops(), rel=0.01)


def test_work_counts_no_padding():
    model, batch = make_model(), checks.batch()
    work = model.work(batch)
    assert work["audio_s"] == pytest.approx((72 + 50 + 60 + 44) / 100)
    assert work["tokens"] == 12 + 9 + 8 + 6
    longer = dataclasses.replace(
        batch.speech, features=torch.nn.functional.pad(batch.speech.features, (0, 0, 0, 40))
    )
    assert model.work(dataclasses.replace(batch, speech=longer)) == work


def test_speed_divides_by_seconds_and_by_the_peak_of_all_ranks():
    class Two(training.Ranks):
        def sum(self, values: torch.Tensor) -> torch.Tensor:
            return values.mul_(2)

    work = {"audio_s": 30.0, "flops": 4e9}
    found = training.speed(work, 2.0, peak_flops=8e9, ranks=Two(0, 0, 2, CPU))
    assert found["audio_s_per_s"] == 30.0 and found["mfu"] == pytest.approx(0.5)
    assert found["peak_mib"] > 10 and "flops_per_s" not in found
    assert "mfu" not in training.speed({"tokens": 4.0}, 2.0, 1.0, training.Ranks(0, 0, 1, CPU))


def test_a_size_of_the_paper_has_the_flops_that_are_quoted_for_it():
    """579 M parameters in 24 blocks: about 6 FLOPs a parameter and position, and attention."""
    lens = torch.tensor([500])
    per_position = 3 * 24 * block_flops(SlamConfig(), lens) / 500
    assert per_position == pytest.approx(6 * 579.62e6 + 3 * 24 * 4 * 500 * 1024, rel=0.01)
