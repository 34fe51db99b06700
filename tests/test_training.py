"""Properties of training.py: a step's arithmetic, what a crash leaves behind, what the log says."""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

import training
from losses import Loss

ALONE = training.Ranks(0, 0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    """The loop installs its own handlers; pytest wants its own back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


# ----------------------------------------------------------------------------------- a toy to train


class Rows:
    """A batch of regression rows x (n, 3), y (n,)."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x, y

    def to(self, device: torch.device, non_blocking: bool = False) -> "Rows":
        return self


class Toy(nn.Module):
    """Linear regression in float64; `poison` lists the optimiser steps whose loss is not finite."""

    loss_names = ("fit",)

    def __init__(self, poison: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 1).double()
        self.poison, self.steps = poison, 0

    def step_done(self) -> None:
        self.steps += 1

    def counts(self, batch: Rows) -> dict[str, float]:
        return {"fit": float(len(batch.x))}

    def work(self, batch: Rows) -> dict[str, float]:
        return {"rows": float(len(batch.x)), "flops": 18.0 * len(batch.x)}

    def forward(self, batch: Rows) -> tuple[dict[str, Loss], dict[str, torch.Tensor]]:
        error = (self.linear(batch.x)[:, 0] - batch.y).square().sum()
        error = error * (math.nan if self.steps in self.poison else 1.0)
        return {"fit": Loss(error, torch.tensor(float(len(batch.x))))}, {}


def rows(n: int, seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(n, k, generator=generator, dtype=torch.float64) for k in (3, 1))
    return Rows(x, x.sum(1) + noise[:, 0])


def options(**changes: object) -> argparse.Namespace:
    known = dict(
        max_steps=6, micro_batches=1, lr=0.1, warmup_steps=2, grad_clip=5.0, seed=0, dtype="fp64",
        log_every=1, save_every=100, eval_every=0, max_bad_steps=20, loss_weights={},
        fast="none", reduce_dtype="fp32",
    )  # fmt: skip
    return argparse.Namespace(**known | changes)


def train_toy(model: Toy, batches: list[Rows], ranks: training.Ranks = ALONE, **changes: object):
    """-> (number of the signal that stopped it, [(step, metrics)], [saved steps], optimizer)."""
    logged, saved, args = [], [], options(**changes)
    optimizer = training.make_optimizer(model, 0.01)
    stopped_by = training.train(
        model, iter(batches), args, ranks, 0, optimizer=optimizer,
        on_log=lambda step, metrics: logged.append((step, metrics)), on_save=saved.append,
    )  # fmt: skip
    return stopped_by, logged, saved, optimizer


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------ schedule, optimiser


@pytest.mark.parametrize(
    "updates, rate", [(20_000, 3e-4), (40_000, 6e-4), (160_000, 3e-4), (1, 1.5e-8)]
)
def test_learning_rate_rises_linearly_and_falls_with_the_inverse_root(updates, rate):
    assert training.inverse_sqrt(updates - 1, 6e-4, 40_000) == pytest.approx(rate, rel=1e-12)


def test_learning_rate_peaks_once_and_a_warmup_of_zero_is_allowed():
    rates = [training.inverse_sqrt(step, 1.0, 10) for step in range(40)]
    assert max(rates) == rates[9] == 1.0
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)
    assert training.inverse_sqrt(0, 1.0, 0) == 1.0


def test_optimiser_holds_every_parameter_once_and_decays_matrices_only():
    model = nn.Sequential(nn.Conv1d(3, 4, 2), nn.LayerNorm(4), nn.Linear(4, 2), nn.Embedding(7, 4))
    groups = training.make_optimizer(model, 0.01).param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    for group in groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.01 if p.dim() >= 2 else 0.0)
        assert group["betas"] == (0.9, 0.98) and group["eps"] == 1e-9


def test_named_parts_learn_at_their_own_rate():
    model = Toy()
    slow = {"linear.bias": training.Rate(0.1)}
    optimizer, begin = training.make_optimizer(model, 0.0, slow), weights(model)
    training.train(
        model, iter([rows(4, 0), rows(4, 1)]), options(max_steps=2), ALONE, 0,
        optimizer=optimizer, on_log=lambda step, metrics: None, on_save=lambda step: None,
    )  # fmt: skip
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert [rates[id(p)] for p in model.parameters()] == pytest.approx([0.1, 0.01])
    moved = [float((p - old).abs().max()) for p, old in zip(weights(model), begin)]
    assert moved[0] > 0.1 > 5 * moved[1]  # Adam's first steps are about as long as the rate


def test_a_part_may_have_a_warmup_of_its_own():
    """Fine-tuning: the new decoder is at its peak before the encoder is (METHOD.md 7)."""
    model, rates = Toy(), {"linear.bias": training.Rate(2.0, warmup_steps=2)}
    optimizer = training.make_optimizer(model, 0.0, rates)
    seen = []
    for n_steps in (1, 2, 8):
        training.train(
            model, iter([rows(4, 0)] * n_steps), options(max_steps=n_steps, warmup_steps=8), ALONE,
            0, optimizer=optimizer, on_log=lambda *_: None, on_save=lambda *_: None,
        )  # fmt: skip
        lrs = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        seen += [lrs[id(p)] for p in model.parameters()]
    peak = options().lr
    expected = [peak / 8, peak, peak / 4, 2 * peak, peak, 2 * peak * (2 / 8) ** 0.5]
    assert seen == pytest.approx(expected)


def test_a_part_may_have_a_peak_of_its_own_and_no_warmup_and_is_logged():
    """Also where --lr is 0: the encoder is frozen and the new head learns."""
    model, rates = Toy(), {"linear.bias": training.Rate(warmup_steps=0, peak=0.3, name="head")}
    optimizer, begin, logged = training.make_optimizer(model, 0.0, rates), weights(model), []
    training.train(
        model, iter([rows(4, 0)] * 3), options(max_steps=3, lr=0.0, warmup_steps=8, log_every=1),
        ALONE, 0, optimizer=optimizer, on_log=lambda step, metrics: logged.append(metrics),
        on_save=lambda *_: None,
    )  # fmt: skip
    assert [row["lr"] for row in logged] == [0, 0, 0]
    expected = [0.3, 0.3 / 2**0.5, 0.3 / 3**0.5]
    assert [row["lr/head"] for row in logged] == pytest.approx(expected)
    frozen, moved = (float((p - old).abs().max()) for p, old in zip(weights(model), begin))
    assert frozen == 0 and moved > 0.1


def test_moments_are_taken_from_a_checkpoint_and_rates_from_the_command_line():
    model = Toy()
    old, new = (training.make_optimizer(model, decay) for decay in (0.1, 0.3))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    old.step()
    training.load_optimizer(new, old.state_dict())
    assert sorted(group["weight_decay"] for group in new.param_groups) == [0.0, 0.3]
    for parameter in model.parameters():
        assert torch.equal(new.state[parameter]["exp_avg"], old.state[parameter]["exp_avg"])


def test_clipping_scales_all_gradients_to_the_norm_and_leaves_small_ones_alone():
    for norm, expected in ((50.0, 5.0), (0.5, 0.5)):
        model = Toy()
        for p in model.parameters():
            p.grad = torch.ones_like(p) * norm / math.sqrt(4)
        optimizer = training.make_optimizer(model, 0.0)
        seen, skipped = training.optimizer_step(optimizer, list(model.parameters()), 5.0)
        after = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        assert float(seen) == pytest.approx(norm) and float(skipped) == 0
        assert float(after) == pytest.approx(expected, rel=1e-6)


# -------------------------------------------------------------------------- sums over micro-batches


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradient_of_uneven_micro_batches_is_that_of_one_big_batch(world_size):
    """Two micro-batches of 2 and 9 rows, on one rank (gradients add) or on two (DDP averages)."""
    small, large = rows(2, 1), rows(9, 2)
    whole = Rows(torch.cat([small.x, large.x]), torch.cat([small.y, large.y]))

    def gradient(batches, scale_of):
        model = Toy()
        for batch in batches:
            losses, _ = model(batch)
            (losses["fit"].sum * scale_of).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    count = {"fit": torch.tensor(11.0, dtype=torch.float64)}
    scale = training.loss_scales(count, {"fit": 0.7}, world_size)["fit"]
    together = gradient([small, large], scale) / world_size
    reference = gradient([whole], 0.7 / 11)
    assert float((together - reference).norm() / reference.norm()) < 1e-12


def test_a_loss_without_any_position_is_scaled_by_a_finite_number():
    scales = training.loss_scales(
        {"stm": torch.tensor(0.0), "ctc": torch.tensor(4.0)}, {"ctc": 2.0}, 2
    )
    assert float(scales["stm"]) == 2.0 and float(scales["ctc"]) == 1.0


def test_training_with_accumulation_walks_the_same_way_as_one_batch_a_step():
    parts = [(rows(2, 2 * s), rows(9, 2 * s + 1)) for s in range(6)]
    whole = [Rows(torch.cat([a.x, b.x]), torch.cat([a.y, b.y])) for a, b in parts]
    one, two = Toy(), Toy()
    _, logged_one, _, _ = train_toy(one, whole)
    _, logged_two, _, _ = train_toy(
        two, [batch for pair in parts for batch in pair], micro_batches=2
    )
    for (_, a), (_, b) in zip(logged_one, logged_two, strict=True):
        assert a["loss/fit"] == pytest.approx(b["loss/fit"], rel=1e-10)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-10)
    for a, b, start in zip(weights(one), weights(two), weights(Toy())):
        assert torch.allclose(a, b, rtol=1e-9, atol=0) and not torch.equal(a, start)


def test_a_log_line_holds_the_mean_over_all_positions_since_the_last_one():
    batches = [rows(n, n) for n in (2, 9, 4, 5)]
    _, fine, _, _ = train_toy(Toy(), batches, max_steps=4)
    _, coarse, _, _ = train_toy(Toy(), batches, max_steps=4, log_every=2)
    assert [step for step, _ in coarse] == [2, 4]
    expected = (2 * fine[0][1]["loss/fit"] + 9 * fine[1][1]["loss/fit"]) / 11
    assert coarse[0][1]["loss/fit"] == pytest.approx(expected, rel=1e-12)
    assert coarse[0][1]["count/fit"] == 11


def test_means_leaves_out_losses_without_positions_and_measures_codes():
    zero, counts = torch.zeros(()), torch.tensor([[4.0, 4.0, 0.0, 0.0]])
    out = training.means({"count/stm": zero, "sum/stm": zero, "code_counts": counts})
    assert "loss/stm" not in out and out["count/stm"] == 0
    assert out["ppl/code"] == pytest.approx(2.0) and out["codes_used"] == 0.5


def test_held_out_sums_do_not_change_the_model_or_its_gradients():
    model, before = Toy(), weights(Toy())
    sums = training.evaluate_sums(model, [rows(2, 1), rows(9, 2)], options(), ALONE)
    assert float(sums["count/fit"]) == 11 and not model.training
    assert_equal(weights(model), before)
    assert all(p.grad is None for p in model.parameters())


# --------------------------------------------------------------------------------------- randomness


def test_micro_batch_seed_is_reproducible_and_differs_by_seed_step_and_number():
    def draw(*numbers):
        training.seed_micro_batch(*numbers)
        return tuple(torch.rand(4).tolist())

    places = [(seed, step, k) for seed in range(3) for step in range(5) for k in range(4)]
    first = [draw(*place) for place in places]
    assert [draw(*place) for place in reversed(places)] == first[::-1]
    assert len(set(first)) == len(places)


# ------------------------------------------------------------------------------------ bad gradients


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("good_steps", [0, 2])
def test_a_non_finite_gradient_leaves_weights_and_moments_as_they_were(bad, good_steps):
    model = Toy()
    parameters = list(model.parameters())
    optimizer = training.make_optimizer(model, 0.01)
    for group in optimizer.param_groups:
        group["lr"] = 0.1

    def step(value: float) -> float:
        for p in parameters:
            p.grad = torch.full_like(p, 0.3)
        parameters[0].grad[0, 1] = value
        return float(training.optimizer_step(optimizer, parameters, 5.0)[1])

    for _ in range(good_steps):
        assert step(1.0) == 0.0
    before = weights(model)
    moments = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in parameters]
    assert step(bad) == 1.0
    assert_equal(weights(model), before)
    for p, kept in zip(parameters, moments):
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, kept.get(name, torch.zeros_like(value))), name
    assert step(1.0) == 0.0
    assert not torch.equal(parameters[0], before[0])


def test_skipped_steps_are_counted_in_the_log_and_training_goes_on():
    model = Toy(poison=(1, 3))
    stopped_by, logged, saved, _ = train_toy(model, [rows(4, s) for s in range(6)])
    assert stopped_by == 0 and saved == [6]
    assert [metrics["skipped_steps"] for _, metrics in logged] == [0, 1, 1, 2, 2, 2]
    assert all(torch.isfinite(w).all() for w in weights(model))


def test_too_many_bad_steps_in_a_row_end_the_run_with_what_to_change():
    model = Toy(poison=tuple(range(3, 100)))
    with pytest.raises(FloatingPointError, match=r"4 steps in a row.*--lr") as error:
        train_toy(model, [rows(4, s) for s in range(20)], max_steps=20, max_bad_steps=4)
    assert "\n" not in str(error.value)
    healthy = Toy()
    train_toy(healthy, [rows(4, s) for s in range(3)], max_steps=3)
    assert_equal(weights(model), weights(healthy))


def test_bad_steps_that_are_not_in_a_row_do_not_end_the_run():
    model = Toy(poison=(0, 1, 2, 4, 5, 6, 8, 9, 10))
    stopped_by, logged, _, _ = train_toy(
        model, [rows(4, s) for s in range(12)], max_steps=12, max_bad_steps=4
    )
    assert stopped_by == 0 and logged[-1][1]["skipped_steps"] == 9


# ------------------------------------------------------------------------------------------ signals


def test_sigterm_saves_at_the_next_step_boundary_and_says_how_to_go_on(capsys):
    class Sender(Toy):
        def step_done(self):
            super().step_done()
            if self.steps == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    stopped_by, logged, saved, _ = train_toy(Sender(), [rows(4, s) for s in range(6)])
    assert (
        stopped_by == signal.SIGTERM and saved == [3] and [step for step, _ in logged] == [1, 2, 3]
    )
    assert "3 steps are saved" in capsys.readouterr().out


def test_a_second_interrupt_stops_at_once():
    stop = training.StopSignal()
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.received == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


# ---------------------------------------------------------------------------------------- two ranks


class OneRankPoisoned(Toy):
    """Rank 1 alone has a bad loss at step 1, and alone is told to stop after step 3."""

    def forward(self, batch):
        self.poison = (1,) if dist.get_rank() == 1 else ()
        return super().forward(batch)

    def step_done(self):
        super().step_done()
        if self.steps == 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def two_rank_work(rank: int, folder: str) -> None:
    """What each of two gloo processes does; the results go to a file a rank."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    ranks = training.Ranks(rank, rank, 2, torch.device("cpu"))
    model = OneRankPoisoned()
    batches = [rows(2 if k == 0 else 9, 2 * s + k) for s in range(6) for k in range(2)]
    stopped_by, logged, saved, _ = train_toy(model, batches[rank::2], ranks, micro_batches=2)

    hopeless = Toy(poison=tuple(range(100)) if rank == 1 else ())
    try:
        train_toy(hopeless, [rows(4, s) for s in range(6)], ranks, micro_batches=2, max_bad_steps=3)
        error = ""
    except FloatingPointError as fault:
        error = str(fault)

    held_out = {
        n: training.evaluate_sums(Toy(), [rows(2 + i, i) for i in range(n)], options(), ranks)
        for n in (1, 2, 3)
    }
    torch.save(
        {
            "stopped_by": int(stopped_by), "saved": saved, "weights": weights(model),
            "error": error,
            "skipped": [metrics["skipped_steps"] for _, metrics in logged], "held_out": held_out,
        },
        f"{folder}/{rank}.pt",
    )  # fmt: skip
    training.leave_ranks(ranks)


@pytest.fixture(scope="module")
def both_ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(two_rank_work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_a_bad_gradient_on_one_rank_skips_the_step_on_all(both_ranks):
    for result in both_ranks:
        assert result["skipped"] == [0, 1, 1]
    assert_equal(both_ranks[0]["weights"], both_ranks[1]["weights"])
    assert all(torch.isfinite(w).all() for w in both_ranks[0]["weights"])


def test_a_signal_to_one_rank_stops_all_at_the_same_step(both_ranks):
    assert [result["saved"] for result in both_ranks] == [[3], [3]]
    assert [result["stopped_by"] for result in both_ranks] == [signal.SIGTERM] * 2


def test_bad_steps_in_a_row_end_all_ranks_alike(both_ranks):
    assert both_ranks[0]["error"] == both_ranks[1]["error"] and "--lr" in both_ranks[0]["error"]


@pytest.mark.parametrize("n_batches", [1, 2, 3])
def test_held_out_sums_are_those_of_one_process_even_with_fewer_batches_than_ranks(
    both_ranks, n_batches
):
    batches = [rows(2 + i, i) for i in range(n_batches)]
    alone = training.evaluate_sums(Toy(), batches, options(), ALONE)
    for result in both_ranks:
        for name, value in alone.items():
            assert float(result["held_out"][n_batches][name]) == pytest.approx(
                float(value), rel=1e-12
            )


# -------------------------------------------------------------------------------------- checkpoints


def test_checkpoint_is_plain_tensors_and_remembers_its_step_and_versions(tmp_path):
    contents = {
        "model": {"w": torch.arange(3.0)},
        "config": {"d_model": 4},
        "names": ["a", "b"],
        "nothing": None,
    }
    path = training.save_checkpoint(tmp_path, 7, contents, keep_last=2)
    loaded = torch.load(path, weights_only=True)
    assert loaded["step"] == 7 and loaded["names"] == ["a", "b"] and loaded["nothing"] is None
    assert torch.equal(loaded["model"]["w"], torch.arange(3.0))
    assert loaded["versions"]["torch"] == torch.__version__
    assert torch.equal(training.load_checkpoint(tmp_path)["model"]["w"], torch.arange(3.0))


def test_only_the_newest_checkpoints_are_kept_and_latest_names_the_last(tmp_path):
    for step in (5, 10, 15, 200, 1000):
        training.save_checkpoint(tmp_path, step, {"n": step}, keep_last=2)
    names = sorted(path.name for path in (tmp_path / "ckpt").iterdir())
    assert names == ["latest", "step_0000200.pt", "step_0001000.pt"]
    assert training.load_checkpoint(tmp_path)["n"] == 1000


def test_checkpoints_of_every_so_many_steps_stay_beside_the_newest(tmp_path):
    for step in (5, 10, 15, 20, 25):
        training.save_checkpoint(tmp_path, step, {}, keep_last=1, keep_every=10)
    names = sorted(path.name for path in (tmp_path / "ckpt").glob("*.pt"))
    assert names == ["step_0000010.pt", "step_0000020.pt", "step_0000025.pt"]


@pytest.mark.parametrize(
    "stage", ["in the middle of the file", "before the file's name", "before latest"]
)
def test_a_fault_while_saving_leaves_the_last_checkpoint_in_place(tmp_path, monkeypatch, stage):
    training.save_checkpoint(tmp_path, 1, {"n": 1}, keep_last=1)
    real_save, real_replace = torch.save, os.replace

    def half(contents, file):
        file.write(b"PK half of a file")
        raise OSError("disk full")

    def replace(source, target):
        if stage == "before the file's name" or Path(target).name == "latest":
            raise OSError("pulled the plug")
        real_replace(source, target)

    if stage == "in the middle of the file":
        monkeypatch.setattr(torch, "save", half)
    else:
        monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError):
        training.save_checkpoint(tmp_path, 2, {"n": 2}, keep_last=1)
    assert training.load_checkpoint(tmp_path)["n"] == 1
    monkeypatch.setattr(torch, "save", real_save)
    monkeypatch.setattr(os, "replace", real_replace)
    training.save_checkpoint(tmp_path, 2, {"n": 2}, keep_last=1)
    assert training.load_checkpoint(tmp_path)["n"] == 2


def test_a_kill_while_saving_leaves_the_last_checkpoint_in_place(tmp_path):
    training.save_checkpoint(tmp_path, 1, {"n": torch.ones(1000)}, keep_last=1)
    script = (
        "import os, sys, torch, training\n"
        "from pathlib import Path\n"
        "def half(contents, file):\n"
        "    file.write(bytes(2000)); file.flush(); os.kill(os.getpid(), 9)\n"
        "torch.save = half\n"
        "training.save_checkpoint(Path(sys.argv[1]), 2, {'n': torch.zeros(1000)}, keep_last=1)\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=Path(training.__file__).parent,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL
    assert list((tmp_path / "ckpt").glob("step_0000002.pt.*")), "killed before it began to write"
    loaded = training.load_checkpoint(tmp_path)
    assert loaded["step"] == 1 and torch.equal(loaded["n"], torch.ones(1000))
    training.save_checkpoint(tmp_path, 2, {}, keep_last=1)
    names = sorted(path.name for path in (tmp_path / "ckpt").iterdir())
    assert names == ["latest", "step_0000002.pt"], "what the killed one left is in the way"


def test_find_checkpoint_takes_a_file_or_a_run_and_names_what_is_neither(tmp_path):
    path = training.save_checkpoint(tmp_path / "run", 3, {}, keep_last=1)
    assert training.find_checkpoint(tmp_path / "run") == path
    assert training.find_checkpoint(path) == path
    for missing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=str(missing)):
            training.find_checkpoint(missing)


def test_latest_that_names_a_deleted_file_is_an_error_with_its_path(tmp_path):
    training.save_checkpoint(tmp_path, 3, {}, keep_last=1).unlink()
    with pytest.raises(FileNotFoundError, match="step_0000003.pt"):
        training.load_checkpoint(tmp_path)


class Evil:
    """Unpickling this would write a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("kind", ["empty", "garbage", "cut short", "code"])
def test_an_unreadable_checkpoint_is_one_line_and_runs_nothing(tmp_path, kind):
    path, trap = tmp_path / "some.pt", tmp_path / "trap"
    torch.save(
        {"w": torch.ones(1000)} | ({"evil": Evil(str(trap))} if kind == "code" else {}), path
    )
    if kind == "cut short":
        path.write_bytes(path.read_bytes()[:-900])
    elif kind != "code":
        path.write_bytes(b"" if kind == "empty" else b"no checkpoint at all")
    with pytest.raises(ValueError, match=f"{path}: cannot be read as a checkpoint") as error:
        training.load_checkpoint(path)
    assert "\n" not in str(error.value)
    assert not trap.exists()


# ------------------------------------------------------------------------------- metrics and alarms


def test_metrics_after_the_resumed_step_and_a_half_written_line_are_dropped(tmp_path):
    log = training.MetricsLog(tmp_path, 0)
    for step in range(1, 6):
        log.write(step, {"loss": step / 7})
    with open(log.path, "a") as file:
        file.write('{"step": 6, "lo')
    again = training.MetricsLog(tmp_path, 3)
    again.write(4, {"loss": 0.5})
    rows_read = training.read_metrics(log.path)
    assert [row["step"] for row in rows_read] == [1, 2, 3, 4]
    assert rows_read[2]["loss"] == 3 / 7 and rows_read[3]["loss"] == 0.5


def test_a_new_run_begins_an_empty_log_and_numbers_that_are_not_finite_stay_json(tmp_path):
    training.MetricsLog(tmp_path, 0).write(1, {"loss": 1.0})
    log = training.MetricsLog(tmp_path, 0)
    log.write(1, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.1})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = log.path.read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse) for line in lines] == [
        {"step": 1, "loss": None, "grad_norm": None, "lr": 0.1}
    ]


HEALTHY = {
    "loss": 3.0, "loss/stm": 0.3, "chance_loss/stm": 0.69, "acc/stm": 0.9, "ppl/code": 100.0,
    "skipped_steps": 0.0, "step_ms": 100.0, "data_wait_ms": 5.0, "loss/diversity": 0.4,
}  # fmt: skip


def test_a_healthy_run_raises_no_alarm():
    assert training.check_alarms(HEALTHY, 500, 100, 256) == {}
    assert training.check_alarms({}, 500, 100, None) == {}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"loss/stm": math.nan}, "loss/stm is not finite"),
        ({"loss": math.inf}, "loss is not finite"),
        ({"skipped_steps": 3.0}, "3 steps skipped"),
        ({"loss/stm": 0.689}, "loss/stm 0.689 is at its chance level 0.690"),
        ({"ppl/code": 12.0}, "codebook collapse: perplexity 12.0 of 256"),
        ({"data_wait_ms": 30.0}, "--num-workers"),
    ],
)
def test_each_alarm_fires_alone(change, words):
    alarms = list(training.check_alarms(HEALTHY | change, 500, 100, 256).values())
    assert len(alarms) == 1 and words in alarms[0]


def test_chance_level_is_no_alarm_during_warmup_and_collapse_none_without_codebook():
    assert training.check_alarms(HEALTHY | {"loss/stm": 0.69}, 100, 100, 256) == {}
    assert training.check_alarms(HEALTHY | {"ppl/code": 1.0}, 500, 100, None) == {}


# ----------------------------------------------------------------------------- arguments, fast path


def test_loss_weights_are_read_by_name():
    assert training.parse_weights("", ["a"]) == {}
    assert training.parse_weights("a=2,b=0.5", ["a", "b"]) == {"a": 2.0, "b": 0.5}


@pytest.mark.parametrize(
    "text, words", [("c=1", "c.*has a, b"), ("a", "name=number"), ("a=x", "a=x"), ("=1", "no such")]
)
def test_loss_weights_that_match_nothing_are_refused(text, words):
    with pytest.raises(ValueError, match=f"--loss-weights.*{words}"):
        training.parse_weights(text, ["a", "b"])


def test_dtype_auto_is_bf16_on_cuda_and_fp32_elsewhere():
    assert training.resolve_dtype("auto", torch.device("cuda")) == "bf16"
    assert training.resolve_dtype("auto", torch.device("cpu")) == "fp32"
    assert training.resolve_dtype("fp64", torch.device("cuda")) == "fp64"


def test_importing_changes_no_signal_handler_and_makes_no_process_group():
    code = (
        "import signal; a = signal.getsignal(15); import training; assert signal.getsignal(15) == a"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(training.__file__).parent, check=True)
