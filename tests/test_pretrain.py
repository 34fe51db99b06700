"""Properties of whole pre-training runs on a little noise: ranks, resume, stages, messages."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import whole_runs
from torch import Tensor
from whole_runs import (
    assert_same_tensors,
    dev_metrics_of,
    finish,
    metrics_of,
    micro_size,
    start,
    timeless,
)

import conformer
import data
import demo
import pretrain
import training

ROOT = Path(pretrain.__file__).parent
ALONE = training.Ranks(0, 0, 1, torch.device("cpu"))
WORDS = (
    "the a red old cat dog ship house sees likes finds and two three under over near big".split()
)
MICRO = dict(
    speech_layers=1, mm_layers=2, d_model=32, d_ff=64, n_heads=2, conv_kernel=5,
    subsample_channels=4, norm_groups=8, n_codes=16, code_dim=16, lr=5e-3, warmup_steps=3,
    dropout=0.1, max_steps=2, batch_s=6.0, batch_paired_s=5.0, batch_tokens=240, row_tokens=48,
)  # fmt: skip
MICRO_MAIN = """
import dataclasses, os, sys
open(__file__ + "." + os.environ.get("RANK", "0") + ".pid", "w").write(str(os.getpid()))
sys.path.insert(0, {root!r})
import conformer
conformer.SIZES["tiny"] = dataclasses.replace(conformer.SIZES["tiny"], **{micro!r})
import pretrain
if __name__ == "__main__":
    pretrain.main()
"""

# ---------------------------------------------------------------------------------- corpus and runs


def sentence(rng: np.random.Generator, n_words: int) -> str:
    return " ".join(rng.choice(WORDS, n_words))


def write_corpus(root: Path, n_rows: int, seed: int, loudness: float = 0.1) -> Path:
    """Utterances of 0.4 to 2.2 s, all of different lengths: no two micro-batches are alike."""
    rng, lines = np.random.default_rng(seed), []
    root.mkdir(parents=True)
    for i, seconds in enumerate(np.linspace(0.4, 2.2, n_rows) + rng.uniform(0, 0.02, n_rows)):
        wave = loudness * rng.standard_normal(round(seconds * 16_000))
        soundfile.write(root / f"{i}.wav", wave, 16_000, subtype="FLOAT")
        row = {"audio_filepath": f"{i}.wav", "duration": round(float(seconds), 4)}
        lines.append(
            json.dumps(row | {"text": sentence(rng, rng.integers(1, 4 + round(3 * seconds)))})
            + "\n"
        )
    (root / "rows.jsonl").write_text("".join(lines))
    return root / "rows.jsonl"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> dict[str, Path]:
    """speech, text, paired, their held-out parts, tokenizer; and "other", a louder manifest."""
    root, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    paths = {"speech": write_corpus(root / "train", 24, 1), "dev": write_corpus(root / "dev", 6, 2)}
    paths["other"] = write_corpus(root / "other", 24, 3, loudness=0.5)
    for name, n in (("text", 120), ("dev_text", 20)):
        paths[name] = root / f"{name}.txt"
        lines = [sentence(rng, rng.integers(2, 12)) + "\n" * rng.integers(1, 3) for _ in range(n)]
        paths[name].write_text("".join(lines))
    for name, size in (("tokenizer", 80), ("foreign", 60)):
        paths[name] = root / f"{name}.model"
        data.Tokenizer.train([sentence(rng, 6) for _ in range(200)], size).save(paths[name])
    return paths


def options(corpus: dict[str, Path], out_dir: Path, *more: object) -> list[str]:
    files = {
        "speech": corpus["speech"], "text": corpus["text"], "paired": corpus["speech"],
        "dev-speech": corpus["dev"], "dev-text": corpus["dev_text"], "dev-paired": corpus["dev"],
        "tokenizer": corpus["tokenizer"], "out-dir": out_dir,
    }  # fmt: skip
    flags = [part for name, path in files.items() for part in (f"--{name}", path)]
    flags += ["--fp32-matmul", "highest"]  # on a busy machine the probe might choose otherwise
    return [str(part) for part in (*flags, *more)]


def without(arguments: list[str], *flags: str) -> list[str]:
    kept = list(arguments)
    for flag in flags:
        place = kept.index(flag)
        del kept[place : place + 2]
    return kept


@pytest.fixture(scope="module")
def micro_main(tmp_path_factory) -> Path:
    """pretrain.py with a `tiny` that is smaller still, yet has every part; milliseconds a step."""
    path = tmp_path_factory.mktemp("main") / "micro_pretrain.py"
    path.write_text(MICRO_MAIN.format(root=str(ROOT), micro=MICRO))
    return path


def wait_for_step(process: subprocess.Popen, out_dir: Path, step: int) -> None:
    """Until the run has logged `step` and has a checkpoint."""
    path = out_dir / "metrics.jsonl"
    for _ in range(12_000):
        logged = path.read_text() if path.exists() else ""
        if f'{{"step": {step}, ' in logged and (out_dir / "ckpt" / "latest").exists():
            return
        assert process.poll() is None, f"ended before step {step}: {process.communicate()[0]}"
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached in a minute")


def assert_same_end(left: Path, right: Path) -> None:
    """Two runs ended with the same weights, moments and losses, bit for bit."""
    a, b = training.load_checkpoint(left), training.load_checkpoint(right)
    assert a["step"] == b["step"]
    assert_same_tensors(a["model"], b["model"])
    for number, state in a["optimizer"]["state"].items():
        assert_same_tensors(state, b["optimizer"]["state"][number])
    for one, two in zip(metrics_of(left), metrics_of(right), strict=True):
        assert timeless(one) == timeless(two)


@pytest.fixture
def micro():
    with micro_size(MICRO):
        yield


run_here = functools.partial(whole_runs.run_here, pretrain.main)
error_of = functools.partial(whole_runs.error_of, pretrain.main)


def prepare(corpus: dict[str, Path], *more: object):
    """What a run builds before its first step: (model, dataset, dev rows, args)."""
    args = pretrain.parse_arguments(options(corpus, Path("unused"), "--micro-batches", 2, *more))
    objectives = pretrain.resolve(args, ALONE)
    tokenizer = data.Tokenizer.load(corpus["tokenizer"])
    rows = pretrain.load_rows(args, objectives, tokenizer, dev=False)
    plans = pretrain.make_plans(rows, args)
    dataset = data.PretrainData(**{name: (rows[name], plans[name]) for name in rows})
    torch.manual_seed(0)
    dtype = torch.float64 if args.dtype == "fp64" else torch.float32
    model = pretrain.SlamPretraining(
        conformer.sized(args.size, vocab_size=tokenizer.vocab_size), objectives
    ).to(dtype)
    return model, dataset, pretrain.load_rows(args, objectives, tokenizer, dev=True), args


# -------------------------------------------------------------------------------------------- ranks

N_STEPS, SAVE_EVERY = 24, 5
WHOLE = f"--max-steps {N_STEPS} --save-every {SAVE_EVERY} --log-every 1 --eval-every 10".split()
WHOLE += ["--micro-batches", "2"]
SMALL_BATCHES = "--batch-s 4 --batch-paired-s 4 --batch-tokens 160 --row-tokens 48"


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory) -> tuple[Path, str]:
    """A run of one process, never interrupted: its folder and what it printed."""
    out_dir = tmp_path_factory.mktemp("alone")
    with micro_size(MICRO):
        return out_dir, run_here(options(corpus, out_dir, *WHOLE))


@pytest.fixture(scope="module")
def together(corpus, micro_main, tmp_path_factory) -> tuple[Path, str]:
    """The same run on two ranks."""
    out_dir = tmp_path_factory.mktemp("together")
    return out_dir, finish(start(micro_main, options(corpus, out_dir, *WHOLE), n_ranks=2))


def assert_close_logs(left: list[dict], right: list[dict], tolerance: float, pattern: str) -> None:
    """Every number whose key matches the pattern, relative."""
    compared = set()
    for one, two in zip(left, right, strict=True):
        assert one.keys() == two.keys() and one["step"] == two["step"]
        for key in filter(re.compile(pattern).match, one):
            assert two[key] == pytest.approx(one[key], rel=tolerance), (one["step"], key)
            compared.add(key)
    assert compared


@pytest.mark.parametrize("more", ["", SMALL_BATCHES])
def test_micro_batches_of_a_step_hold_different_counts(corpus, micro, more):
    """Else the tests of ranks below could not tell a mean of means from the mean."""
    model, dataset, _, _ = prepare(corpus, *more.split())
    uneven = {name: 0 for name in model.loss_names}
    for step in range(20):
        first, second = (model.counts(dataset[step, k]) for k in range(2))
        for name in uneven:
            uneven[name] += first[name] != second[name]
    assert uneven.pop("stm") == 0  # as many rows in each
    assert min(uneven.values()) >= 5, uneven


def test_two_ranks_do_what_one_process_does_in_float64(corpus, tmp_path):
    """The program at its own smallest size: every logged loss of 20 steps to 1e-6, relative."""
    more = "--dtype fp64 --max-steps 20 --warmup-steps 4 --log-every 1".split()
    more += SMALL_BATCHES.split()
    program = ROOT / "pretrain.py"
    finish(start(program, options(corpus, tmp_path / "2", *more), n_ranks=2))
    finish(start(program, options(corpus, tmp_path / "1", *more, "--micro-batches", 2)))
    one, two = metrics_of(tmp_path / "1"), metrics_of(tmp_path / "2")
    assert [row["step"] for row in one] == list(range(1, 21))
    assert_close_logs(one, two, 1e-6, r"loss|count|chance|grad_norm|ppl|lr")
    assert_close_logs(
        dev_metrics_of(tmp_path / "1"), dev_metrics_of(tmp_path / "2"), 1e-6, r"dev/(loss|count)"
    )
    a, b = (training.load_checkpoint(tmp_path / n)["model"] for n in "12")
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-7), name
    lowest = min(row["loss/span_lm"] for row in one[-5:])
    assert lowest < one[0]["loss/span_lm"] - 0.4, "the weights did not move"


def test_two_ranks_do_what_one_process_does_in_float32(alone, together):
    one, two = metrics_of(alone[0]), metrics_of(together[0])
    assert_close_logs(one[:1], two[:1], 1e-5, r"loss|grad_norm")
    assert_close_logs(one, two, 1e-3, r"loss")
    assert_close_logs(dev_metrics_of(alone[0]), dev_metrics_of(together[0]), 1e-3, r"dev/loss")


def test_gradients_that_travel_in_bf16_and_activations_made_twice_change_no_more_than_rounding(
    together, corpus, micro_main, tmp_path
):
    """The log's gradient norms show that something was rounded, and no more than that."""
    more = [*WHOLE, "--reduce-dtype", "bf16", "--activation-checkpointing"]
    finish(start(micro_main, options(corpus, tmp_path, *more), n_ranks=2))
    one, two = metrics_of(together[0]), metrics_of(tmp_path)
    assert_close_logs(one[:1], two[:1], 1e-5, r"loss")
    assert_close_logs(one[:1], two[:1], 2e-3, r"grad_norm")
    assert_close_logs(one, two, 5e-2, r"loss/(span_lm|contrastive|stm)")
    assert one[0]["grad_norm"] != two[0]["grad_norm"]


def test_a_run_moves_every_weight(alone, corpus, micro):
    """From the weights that its seed makes."""
    model, _, _, _ = prepare(corpus)
    end = training.load_checkpoint(alone[0])["model"]
    for name, weight in model.named_parameters():
        assert not torch.equal(weight, end[name]), name


# ---------------------------------------------------------------------------------- stop and resume


def kill(script: Path, n_ranks: int) -> None:
    """Pull the plug of every rank; nobody gets to save anything."""
    for rank in range(n_ranks):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(Path(f"{script}.{rank}.pid").read_text()), signal.SIGKILL)


def kill_mid_run(script: Path, arguments: list[str], out_dir: Path, n_ranks: int) -> int:
    """Start a run, kill it between two checkpoints -> the step of its last one."""
    process = start(script, arguments, n_ranks)
    wait_for_step(process, out_dir, SAVE_EVERY + 2)
    kill(script, n_ranks)
    process.communicate(timeout=60)
    assert process.returncode != 0
    step = training.load_checkpoint(out_dir)["step"]
    assert SAVE_EVERY <= step < N_STEPS and step % SAVE_EVERY == 0
    return step


def test_a_killed_run_resumes_bit_for_bit(alone, corpus, micro_main, micro, tmp_path):
    command = options(corpus, tmp_path, *WHOLE)
    step = kill_mid_run(micro_main, command, tmp_path, 1)
    printed = run_here(command)
    assert "resumed" in printed and f"step {step}" in printed
    assert_same_end(alone[0], tmp_path)
    assert [row["step"] for row in metrics_of(tmp_path)] == list(range(1, N_STEPS + 1))
    assert [row["step"] for row in dev_metrics_of(tmp_path)] == [10, 20, N_STEPS]


@pytest.fixture(scope="module")
def killed_together(corpus, micro_main, tmp_path_factory) -> tuple[Path, Path, int]:
    """A run on two ranks that was killed: its folder, a copy, the step of its last checkpoint."""
    out_dir, copied = tmp_path_factory.mktemp("killed"), tmp_path_factory.mktemp("copied") / "run"
    step = kill_mid_run(micro_main, options(corpus, out_dir, *WHOLE), out_dir, 2)
    shutil.copytree(out_dir, copied)
    return out_dir, copied, step


def test_a_killed_run_on_two_ranks_resumes_bit_for_bit(
    together, killed_together, corpus, micro_main
):
    out_dir, _, _ = killed_together
    finish(start(micro_main, options(corpus, out_dir, *WHOLE), n_ranks=2))
    assert_same_end(together[0], out_dir)


def test_a_run_resumes_on_another_number_of_ranks_with_its_own_micro_batches(
    together, killed_together, corpus, micro
):
    """--micro-batches is not given: the checkpoint's count is kept, and with it every batch."""
    _, out_dir, step = killed_together
    run_here(without(options(corpus, out_dir, *WHOLE), "--micro-batches"))
    assert json.loads((out_dir / "config.json").read_text())["args"]["micro_batches"] == 2
    one, two = metrics_of(together[0]), metrics_of(out_dir)
    assert_close_logs(one[:step], two[:step], 0, r"loss|grad_norm|count")
    assert_close_logs(one, two, 1e-3, r"loss/")
    assert_close_logs(one, two, 0, r"count/(stm|span_lm|tlm|code_mlm)")


def test_sigterm_saves_exits_with_143_and_resumes_bit_for_bit(
    alone, corpus, micro_main, micro, tmp_path
):
    command = options(corpus, tmp_path, *WHOLE)
    process = start(micro_main, command)
    wait_for_step(process, tmp_path, SAVE_EVERY + 1)
    process.send_signal(signal.SIGTERM)
    printed = finish(process, code=143)
    step = training.load_checkpoint(tmp_path)["step"]
    assert f"{step} steps are saved" in printed and "Traceback" not in printed
    assert SAVE_EVERY < step < N_STEPS and metrics_of(tmp_path)[-1]["step"] == step
    run_here(command)
    assert_same_end(alone[0], tmp_path)


def test_resume_takes_a_checkpoint_of_another_folder(alone, corpus, micro, tmp_path):
    out_dir, _ = alone
    earlier = sorted((out_dir / "ckpt").glob("step_*.pt"))[0]
    assert earlier.name == "step_0000020.pt"
    run_here([*options(corpus, tmp_path, *WHOLE), "--resume", earlier])
    assert [row["step"] for row in metrics_of(tmp_path)] == [21, 22, 23, 24]
    assert_same_tensors(
        training.load_checkpoint(tmp_path)["model"], training.load_checkpoint(out_dir)["model"]
    )


def test_a_finished_run_says_so_and_is_left_as_it_is(alone, corpus, micro):
    out_dir, _ = alone
    kept = {
        path: path.read_bytes()
        for path in (out_dir / "metrics.jsonl", *(out_dir / "ckpt").iterdir())
    }
    printed = run_here(options(corpus, out_dir, *WHOLE))
    assert f"has made its {N_STEPS} steps" in printed
    assert {
        path: path.read_bytes()
        for path in (out_dir / "metrics.jsonl", *(out_dir / "ckpt").iterdir())
    } == kept


def test_a_finished_run_goes_on_when_it_gets_more_steps(alone, corpus, micro, tmp_path):
    shutil.copytree(alone[0], tmp_path / "run")
    run_here([*options(corpus, tmp_path / "run", *WHOLE), "--max-steps", N_STEPS + 2])
    assert [row["step"] for row in metrics_of(tmp_path / "run")][-3:] == [24, 25, 26]


REFUSED = {
    "--seed": 1, "--batch-s": 7, "--batch-paired-s": 7, "--batch-tokens": 300, "--align": "tlm",
    "--micro-batches": 4, "--size": "small", "--max-audio-s": 1.5, "--row-tokens": 20,
}  # fmt: skip
ALLOWED = {
    "--lr": 1e-3, "--warmup-steps": 9, "--weight-decay": 0.1, "--grad-clip": 1.0,
    "--loss-weights": "stm=2", "--dtype": "fp64",
}  # fmt: skip


@pytest.mark.parametrize("flag", REFUSED)
def test_resuming_with_another_plan_is_refused_by_name(alone, corpus, micro, capsys, flag):
    out_dir, _ = alone
    assert flag in error_of(capsys, [*options(corpus, out_dir, *WHOLE), flag, REFUSED[flag]])


@pytest.mark.parametrize("flag", ALLOWED)
def test_what_heals_a_sick_run_may_change_on_resume_and_is_said(
    alone, corpus, micro, tmp_path, flag
):
    """The error about gradients that are not finite advises --lr and --dtype."""
    shutil.copytree(alone[0], tmp_path / "run")
    command = [*options(corpus, tmp_path / "run", *WHOLE), "--max-steps", N_STEPS + 1]
    printed = run_here([*command, flag, ALLOWED[flag]])
    (line,) = [line for line in printed.splitlines() if "from now on" in line]
    assert line.strip().startswith(f"{flag} was ") and str(ALLOWED[flag]).split("=")[-1] in line
    assert metrics_of(tmp_path / "run")[-1]["step"] == N_STEPS + 1


def test_resuming_on_other_data_or_another_tokenizer_is_refused(alone, corpus, micro, capsys):
    """Also where the rows are as many and as long."""
    command = options(corpus, alone[0], *WHOLE)
    assert "the data" in error_of(capsys, [*command, "--speech", corpus["other"]])
    assert "--tokenizer" in error_of(capsys, [*command, "--tokenizer", corpus["foreign"]])


# -------------------------------------------------------------------------------- what a run leaves


def test_every_step_is_logged_once_with_all_its_numbers(alone):
    logged = metrics_of(alone[0])
    assert [row["step"] for row in logged] == list(range(1, N_STEPS + 1))
    names = ["contrastive", "code_mlm", "span_lm", "tlm_text", "tlm_speech", "stm"]
    keys = "loss loss/diversity ppl/code ppl/code_soft lr grad_norm skipped_steps step_ms".split()
    keys = {*keys, "step", "data_wait_ms", "audio_s_per_s", "tokens_per_s", "mfu", "peak_mib"}
    keys |= {f"{kind}/{name}" for name in names for kind in ("loss", "acc", "chance")}
    for row in logged:
        assert keys <= row.keys()
        assert all(math.isfinite(row[key]) for key in keys)
        total = sum(row[f"loss/{name}"] for name in names) + 0.1 * row["loss/diversity"]
        assert row["loss"] == pytest.approx(total, rel=1e-6)
        assert all(0 <= row[f"{kind}/{name}"] <= 1 for kind in ("acc", "chance") for name in names)
        assert 1 <= row["ppl/code"] <= MICRO["n_codes"]
        assert row["mfu"] > 0 and row["audio_s_per_s"] > 0
        # Of the process, in which other tests may have compiled; an eager run adds none.
        assert row["compilations"] == logged[0]["compilations"]
    rates = [
        training.inverse_sqrt(step, MICRO["lr"], MICRO["warmup_steps"]) for step in range(N_STEPS)
    ]
    assert [row["lr"] for row in logged] == pytest.approx(rates)
    held_out = dev_metrics_of(alone[0])
    assert [row["step"] for row in held_out] == [10, 20, N_STEPS]
    for row in held_out:
        assert {f"dev/loss/{name}" for name in names} | {"dev/acc/retrieval"} <= row.keys()


def test_a_finished_run_leaves_curves_a_table_and_a_checkpoint_to_extract_from(alone):
    out_dir, printed = alone
    assert (out_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "curves.png" in printed
    table = printed[printed.rindex("held out") :]
    for name in ("contrastive", "span_lm", "tlm_speech", "stm", "retrieval", "codes in use"):
        assert name in table
    config = json.loads((out_dir / "config.json").read_text())
    assert config["config"]["d_model"] == MICRO["d_model"] and config["args"]["seed"] == 0
    names = sorted(path.name for path in (out_dir / "ckpt").iterdir())
    assert names == ["latest", "step_0000020.pt", f"step_{N_STEPS:07d}.pt"]
    layers = conformer.SlamEncoder.from_checkpoint(out_dir).extract(text="the red cat")
    assert len(layers) == MICRO["mm_layers"] and torch.isfinite(layers[-1]).all()


# ----------------------------------------------------------------------------------------- switches

MODES = {
    "joint": [],
    "text": ["--modalities", "text"],
    "speech": ["--modalities", "speech"],
    "contrastive speech": ["--modalities", "speech", "--speech-objective", "contrastive"],
    "contrastive speech and text": ["--speech-objective", "contrastive"],
    "no alignment": ["--align", "none"],
    "tlm": ["--align", "tlm"],
    "ctc": ["--align", "tlm,stm,ctc"],
    "stm unmasked": ["--stm-unmasked"],
}
SPEECH, ALIGN = ["contrastive", "diversity", "code_mlm"], ["tlm_text", "tlm_speech"]
LOSSES = {
    "joint": [*SPEECH, "span_lm", *ALIGN, "stm"],
    "text": ["span_lm"],
    "speech": SPEECH,
    "contrastive speech": ["contrastive"],
    "contrastive speech and text": ["contrastive", "span_lm"],
    "no alignment": [*SPEECH, "span_lm"],
    "tlm": [*SPEECH, "span_lm", *ALIGN],
    "ctc": [*SPEECH, "span_lm", *ALIGN, "stm", "ctc"],
    "stm unmasked": [*SPEECH, "span_lm", *ALIGN, "stm"],
}


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_trains_its_losses_and_no_others(corpus, micro, tmp_path, mode):
    printed = run_here(
        [*options(corpus, tmp_path, "--max-steps", 2, "--log-every", 1), *MODES[mode]]
    )
    logged, held_out = metrics_of(tmp_path), dev_metrics_of(tmp_path)
    assert [row["step"] for row in logged] == [1, 2]
    for row in logged:
        assert {key for key in row if key.startswith("loss/")} == {
            f"loss/{name}" for name in LOSSES[mode]
        }
        assert math.isfinite(row["loss"]) and row["grad_norm"] > 0 and row["skipped_steps"] == 0
    assert {key for key in held_out[-1] if key.startswith("dev/loss/")} == {
        f"dev/loss/{n}" for n in LOSSES[mode]
    }
    assert "curves" in printed


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_builds_just_what_it_trains(corpus, micro, mode):
    """Every parameter gets a gradient that is not all zero, and no parameter is without one."""
    model, dataset, _, _ = prepare(corpus, *MODES[mode])
    model.train()
    batch = dataset[0, 0]
    scales = training.loss_scales(
        {n: torch.tensor(c) for n, c in model.counts(batch).items()}, {}, 1
    )
    out, _ = model(batch)
    assert sorted(out) == sorted(LOSSES[mode]) == sorted(model.loss_names)
    sum(loss.sum * scales[name] for name, loss in out.items()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.any() and torch.isfinite(p.grad).all(), name


@pytest.mark.parametrize("mode", MODES)
def test_counts_known_before_the_forward_pass_are_those_of_the_losses(corpus, micro, mode):
    """Contrastive alone may lose more: frames all of whose distractors hold their own code."""
    model, dataset, _, _ = prepare(corpus, *MODES[mode])
    for step in range(8):
        batch = dataset[step, 1]
        out, _ = model(batch)
        for name, count in model.counts(batch).items():
            assert float(out[name].count) == count or (
                name == "contrastive" and float(out[name].count) < count
            ), name


def test_a_run_without_held_out_data_trains_too(corpus, micro, tmp_path):
    arguments = options(corpus, tmp_path, "--max-steps", 1, "--log-every", 1)
    run_here(without(arguments, "--dev-speech", "--dev-text", "--dev-paired"))
    assert len(metrics_of(tmp_path)) == 1 and dev_metrics_of(tmp_path) == []


def test_loader_processes_change_nothing(alone, corpus, micro, tmp_path):
    """The first steps with two loader processes are those without, bit for bit."""
    run_here([*options(corpus, tmp_path, *WHOLE), "--max-steps", 3, "--num-workers", 2])
    assert_close_logs(metrics_of(alone[0])[:3], metrics_of(tmp_path), 0, r"loss|grad_norm|count")


def test_log_mel_on_the_device_trains_and_scores_as_from_the_loader(
    alone, corpus, micro, tmp_path, monkeypatch
):
    """On a CPU as elsewhere; `auto` is the loader there, so that old runs go on as they were."""
    moved, made = [], data.Waveforms.to
    monkeypatch.setattr(
        data.Waveforms, "to", lambda self, *args, **how: moved.append(1) or made(self, *args, **how)
    )
    run_here([*options(corpus, tmp_path, *WHOLE), "--max-steps", 3, "--log-mel", "device"])
    assert len(moved) > 2 * 2 * 3  # two micro-batches of two streams in three steps, held-out ones
    keys = r"loss|grad_norm|count"
    assert_close_logs(metrics_of(alone[0])[:3], metrics_of(tmp_path), 1e-3, keys)
    run_here([*options(corpus, tmp_path / "b", *WHOLE), "--max-steps", 3, "--log-mel", "loader"])
    assert_close_logs(
        dev_metrics_of(tmp_path / "b"), dev_metrics_of(tmp_path), 1e-2, r"dev/(loss|count)"
    )
    assert_close_logs(metrics_of(alone[0])[:3], metrics_of(tmp_path / "b"), 0, keys)


# ------------------------------------------------------------------------------------------- stages


def test_stages_carry_weights_and_the_temperature_but_no_optimiser_state(corpus, micro, tmp_path):
    """1 (no alignment) -> 2 (joint) -> 3 (speech only) -> 2: what is not read is kept."""

    def stage(name: str, before: str | None, *more: object) -> dict:
        command = options(corpus, tmp_path / name, "--log-every", 1, *more)
        run_here([*command, *(["--init", tmp_path / before] if before else [])])
        return training.load_checkpoint(tmp_path / name)

    still = ("--lr", 0, "--max-steps", 1)  # a stage that shows what it began with
    one = stage("1", None, "--align", "none", "--max-steps", 3)
    began = stage("2 began", "1", *still)
    for name, weight in one["model"].items():
        if name != "quantizer.step":
            assert torch.equal(began["model"][name], weight), name
    assert {name.split(".")[0] for name in began["model"].keys() - one["model"].keys()} == {
        "match_head"
    }

    # Other audio: normalisation, were it estimated again, would differ.
    two = stage("2", "1", "--max-steps", 2, "--speech", corpus["other"])
    for name in ("encoder.speech.feature_mean", "encoder.speech.feature_std"):
        assert torch.equal(two["model"][name], one["model"][name])
    assert not torch.equal(two["model"]["text_head.weight"], one["model"]["text_head.weight"])

    three = stage("3", "2", "--modalities", "speech", "--max-steps", 2, "--weight-decay", 0.5)
    of_text = ("encoder.text", "text_head", "match_head")
    text = {name for name in two["model"] if name.startswith(of_text)}
    assert three["carried"].keys() == text and len(text) >= 7
    assert_same_tensors(three["carried"], {name: two["model"][name] for name in text})
    assert three["model"].keys() == two["model"].keys() - text
    assert three["modalities"] == ["speech"] and torch.equal(three["tokenizer"], two["tokenizer"])

    again = stage("2 again", "3", *still)
    assert_same_tensors({name: again["model"][name] for name in text}, three["carried"])
    for name in three["model"].keys() - {"quantizer.step"}:
        assert torch.equal(again["model"][name], three["model"][name]), name
    assert not again["carried"]

    steps = [int(stage["model"]["quantizer.step"]) for stage in (one, two, three, again)]
    assert steps == [3, 5, 7, 8]
    for stage_end, own_steps in ((two, 2), (three, 2), (again, 1)):
        states = stage_end["optimizer"]["state"].values()
        assert {int(state["step"]) for state in states} == {own_steps}
    buffers = ("quantizer.step", "encoder.speech.feature_")
    n_trained = sum(1 for name in three["model"] if not name.startswith(buffers))
    assert len(three["optimizer"]["state"]) == n_trained


def test_speech_after_text_alone_is_normalised_by_its_own_audio(corpus, micro, tmp_path):
    """The text stage has no statistics to carry, so they must be estimated, not left at 0 and 1."""
    run_here(options(corpus, tmp_path / "text", "--modalities", "text", "--max-steps", 1))
    stage = ("--modalities", "speech", "--max-steps", 1)
    run_here(options(corpus, tmp_path / "after", *stage, "--init", tmp_path / "text"))
    run_here(options(corpus, tmp_path / "alone", *stage))
    after, alone = (training.load_checkpoint(tmp_path / n)["model"] for n in ("after", "alone"))
    for name in ("encoder.speech.feature_mean", "encoder.speech.feature_std"):
        assert torch.equal(after[name], alone[name])
    assert after["encoder.speech.feature_mean"].abs().max() > 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_saves_though_loader_processes_get_it_too(
    corpus, micro_main, tmp_path, number
):
    """A terminal's Ctrl-C reaches the workers as well; they must not die under the loop."""
    many = ("--max-steps", 100_000, "--save-every", 5, "--log-every", 5, "--num-workers", 2)
    process = start(micro_main, options(corpus, tmp_path / "run", *many))
    wait_for_step(process, tmp_path / "run", 10)
    os.killpg(process.pid, number)
    assert "stopped by a signal" in finish(process, code=128 + number)


@pytest.mark.parametrize(
    "flag, value",
    [("--batch-s", 0), ("--grad-clip", -1), ("--seed", -1), ("--loss-weights", "stm=nan")],
)
def test_numbers_that_cannot_be_are_refused_by_name(corpus, micro, capsys, tmp_path, flag, value):
    with pytest.raises(SystemExit):
        run_here(options(corpus, tmp_path / "run", flag, value))
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {flag}") and printed.count("\n") == 1


def test_carried_weights_survive_a_resume(corpus, micro, tmp_path):
    run_here(options(corpus, tmp_path / "joint", "--max-steps", 1))
    command = options(
        corpus, tmp_path / "speech", "--modalities", "speech", "--init", tmp_path / "joint"
    )
    run_here([*command, "--max-steps", 1])
    first = training.load_checkpoint(tmp_path / "speech")
    run_here([*command, "--max-steps", 2])
    second = training.load_checkpoint(tmp_path / "speech")
    assert second["step"] == 2 and int(second["model"]["quantizer.step"]) == 3
    assert first["carried"]
    assert_same_tensors(first["carried"], second["carried"])


def test_init_from_another_size_or_tokenizer_names_the_flag(alone, corpus, micro, capsys, tmp_path):
    command = [*options(corpus, tmp_path, "--max-steps", 1), "--init", alone[0]]
    assert "--size" in error_of(capsys, [*command, "--size", "small"])
    assert "--tokenizer" in error_of(capsys, [*command, "--tokenizer", corpus["foreign"]])


# ---------------------------------------------------------------------------- arithmetic of a batch


def faint(self, conv, masked, lens):
    """Masked frames become zero: nothing random, so a row is the same in any batch."""
    return conv * ~masked[..., None]


def rows_of_masks(index: Tensor, length: int, rows: list[int], *others: Tensor) -> list[Tensor]:
    """Flat places (M,) of some rows, and what goes with them."""
    m = len(index) // (1 + int(index.max()) // length)  # filler points to its row, too
    its = torch.cat([torch.arange(row * m, (row + 1) * m) for row in rows])
    first = length * torch.arange(len(rows)).repeat_interleave(m)
    return [index[its] % length + first, *(other[its] for other in others)]


def rows_of_text(text: data.TextBatch, rows: list[int]) -> data.TextBatch:
    """Some rows of a batch, in any order and number, each with its own masks."""
    others = text.masked_weight, text.targets
    masks = rows_of_masks(text.masked_index, text.tokens.shape[1], rows, *others)
    return data.TextBatch(text.tokens[rows], text.lens[rows], *masks)


def rows_of_speech(speech: data.SpeechBatch, rows: list[int]) -> data.SpeechBatch:
    masks = rows_of_masks(speech.masked_index, speech.masked.shape[1], rows, speech.masked_weight)
    return data.SpeechBatch(
        speech.features[rows], speech.feature_lens[rows], speech.masked[rows], *masks
    )


def rows_of_pairs(pairs: data.PairBatch, rows: list[int]) -> data.PairBatch:
    others = ("negative_tokens", "negative_lens", "clean_tokens", "clean_negative_tokens")
    parts = {name: getattr(pairs, name)[rows] for name in others}
    return data.PairBatch(
        rows_of_speech(pairs.speech, rows), rows_of_text(pairs.text, rows), **parts
    )


def rows_of(batch: data.Batch, rows: dict[str, list[int]]) -> data.Batch:
    kinds = {"speech": rows_of_speech, "text": rows_of_text, "pairs": rows_of_pairs}
    return data.Batch(
        **{name: kinds[name](getattr(batch, name), its) for name, its in rows.items()}
    )


def row_numbers(batch: data.Batch) -> dict[str, list[int]]:
    lens = {
        "speech": batch.speech.feature_lens,
        "text": batch.text.lens,
        "pairs": batch.pairs.text.lens,
    }
    return {name: list(range(len(its))) for name, its in lens.items()}


@pytest.fixture
def still_model(corpus, micro, monkeypatch):
    """(float64 model in eval mode with nothing random at its masks, batch of several rows)."""
    monkeypatch.setattr(pretrain.SlamPretraining, "mask_fill", faint)
    more = "--align tlm,stm,ctc --dtype fp64 --batch-s 16 --batch-paired-s 16 --batch-tokens 600"
    model, dataset, _, _ = prepare(corpus, *more.split())
    batches = (dataset[step, 0] for step in range(8))
    batch = next(its for its in batches if min(map(len, row_numbers(its).values())) >= 4)
    return model.eval(), batch


TOKEN_LOSSES = ("code_mlm", "span_lm", "tlm_text", "tlm_speech", "stm", "ctc")


@torch.no_grad()
def test_losses_of_a_batch_are_the_sums_over_its_parts(still_model):
    model, batch = still_model
    rows = row_numbers(batch).items()
    parts = [{name: its[:2] for name, its in rows}, {name: its[2:] for name, its in rows}]
    whole, _ = model(batch)
    first, second = (model(rows_of(batch, part))[0] for part in parts)
    for name in TOKEN_LOSSES:
        assert float(first[name].count) > 0
        assert float(whole[name].count) == float(first[name].count + second[name].count), name
        total = float(first[name].sum + second[name].sum)
        assert float(whole[name].sum) == pytest.approx(total, rel=1e-9), name


@torch.no_grad()
@pytest.mark.parametrize("doubled", ["text", "pairs", "speech"])
def test_doubling_one_stream_leaves_the_mean_of_every_loss(still_model, doubled):
    model, batch = still_model
    rows = row_numbers(batch)
    once, _ = model(rows_of(batch, rows))
    twice, _ = model(rows_of(batch, rows | {doubled: rows[doubled] * 2}))
    grown = set()
    for name in (*TOKEN_LOSSES, "diversity"):
        means = [float(loss[name].sum / loss[name].count) for loss in (once, twice)]
        assert means[1] == pytest.approx(means[0], rel=1e-9), name
        if float(twice[name].count) == 2 * float(once[name].count):
            grown.add(name)
    streams = {
        "text": {"span_lm"},
        "speech": {"code_mlm", "diversity"},
        "pairs": {*ALIGN, "stm", "ctc"},
    }
    assert grown == streams[doubled]


def test_wrong_speech_keeps_texts_and_their_masks_and_changes_the_speech(corpus, micro):
    model, _, dev_rows, _ = prepare(corpus)
    (right,) = data.HeldOut({"pairs": dev_rows["pairs"]}, {"pairs": 9999})
    wrong = pretrain.with_wrong_speech("pairs", right.pairs)
    for name, value in vars(right.pairs.text).items():
        assert torch.equal(getattr(wrong.pairs.text, name), value), name
    before, after = right.pairs.speech, wrong.pairs.speech
    for row in range(6):
        assert torch.equal(after.features[row], before.features[row - 1])
        assert not torch.equal(after.features[row], before.features[row])
        assert after.feature_lens[row] == before.feature_lens[row - 1]
    named = torch.zeros_like(after.masked).flatten()
    named[after.masked_index[after.masked_weight > 0]] = True
    assert torch.equal(named.view_as(after.masked), after.masked)
    a, b = (model.eval()(batch)[0]["tlm_text"] for batch in (right, wrong))
    assert float(a.count) == float(b.count) and float(a.sum.detach()) != float(b.sum.detach())


def test_evaluation_probes_alignment_and_is_the_same_each_time(corpus, micro):
    model, _, dev_rows, args = prepare(corpus)
    first, second = (pretrain.evaluate(model, dev_rows, args, ALONE) for _ in range(2))
    assert first == second
    assert first["count/retrieval"] == 6 and first["chance/retrieval"] == pytest.approx(1 / 6)
    assert {"acc/retrieval", "acc/tlm_text_wrong_speech", "acc/stm"} <= first.keys()
    assert all(0 <= value <= 1 for name, value in first.items() if name.startswith("acc/"))
    n_tokens = sum(
        data.mask_budget(int(n), data.TLM_TEXT_MASK) for n in dev_rows["pairs"].text_lens
    )
    assert first["count/tlm_text"] == n_tokens and first["count/stm"] == 2 * 6


@pytest.mark.parametrize("favourite", [0, 3, 99])
def test_retrieval_counts_queries_whose_own_text_scores_highest(
    corpus, micro, monkeypatch, favourite
):
    """A model that always prefers one candidate finds one of six; so does a constant score."""
    model, _, dev_rows, args = prepare(corpus)
    monkeypatch.setattr(
        model, "match_logit", lambda top, start: (torch.arange(len(start)) == favourite).float()
    )
    found = pretrain.retrieval(model, dev_rows["pairs"], args, ALONE)
    assert found["acc/retrieval"] == pytest.approx(1 / 6)


# ------------------------------------------------------------------------------------- command line


def test_a_users_mistake_is_one_line_that_says_what_to_do(corpus, micro, capsys, tmp_path):
    command = options(corpus, tmp_path / "run", "--max-steps", 1)

    def error(*more: object) -> str:
        return error_of(capsys, [*command, *more])

    assert "nowhere.jsonl" in error("--speech", tmp_path / "nowhere.jsonl")
    assert "nowhere.txt" in error("--text", tmp_path / "nowhere.txt")
    for bad in ("stm", "ctc", "stm,tlm", "tlm,xyz"):
        assert "--align" in error("--align", bad)
    assert "--modalities" in error("--modalities", "speech,video")
    for one in ("speech", "text"):
        assert "--align none" in error("--modalities", one, "--align", "tlm,stm")
    assert "--align none" in error("--speech-objective", "contrastive", "--align", "tlm")
    assert "--loss-weights" in error("--loss-weights", "stmm=1")
    assert "--fast graph" in error("--fast", "graph") or torch.cuda.is_available()
    assert "--tokenizer is missing" in error_of(capsys, without(command, "--tokenizer"))
    assert "--paired is missing" in error_of(capsys, without(command, "--paired"))
    assert "--speech is missing" in error_of(capsys, without(command, "--speech"))
    for flag in ("--log-every", "--save-every", "--max-steps", "--micro-batches"):
        assert flag in error(flag, -1)
    assert not (tmp_path / "run" / "ckpt").exists()


def test_manifests_without_usable_rows_say_why(corpus, micro, capsys, tmp_path):
    command = options(corpus, tmp_path / "run", "--max-steps", 1)
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"audio_filepath": "a.wav", "duration": 0.01, "text": "a"}) + "\n")
    printed = error_of(capsys, [*command, "--speech", short])
    assert "0 of 1 rows usable" in printed and "shorter" in printed
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert "no rows" in error_of(capsys, [*command, "--speech", empty])
    assert "--max-audio-s" in error_of(capsys, [*command, "--max-audio-s", 0.3])


@pytest.mark.parametrize("flag", ["--init", "--resume"])
def test_what_is_no_checkpoint_is_refused_by_name(corpus, micro, capsys, tmp_path, flag):
    command = options(corpus, tmp_path / "run", "--max-steps", 1)
    garbage, foreign = tmp_path / "garbage.pt", tmp_path / "foreign.pt"
    garbage.write_bytes(b"nothing of the kind")
    torch.save({"state_dict": {"w": torch.ones(2)}}, foreign)
    for path in (garbage, foreign, tmp_path / "absent.pt", tmp_path):
        assert str(path) in error_of(capsys, [*command, flag, path])


def test_micro_batches_must_be_a_multiple_of_the_ranks(corpus):
    args = pretrain.parse_arguments(["--micro-batches", "3"])
    with pytest.raises(ValueError, match="--micro-batches 3.*multiple of the 2 ranks"):
        training.resolve_micro_batches(args, dataclasses.replace(ALONE, world_size=2), None)
    args = pretrain.parse_arguments([])
    training.resolve_micro_batches(args, dataclasses.replace(ALONE, world_size=2), None)
    assert args.micro_batches == 2


def test_the_program_prints_help_and_errors_without_a_trace(tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(ROOT / "pretrain.py"), *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    shown = run("--help")
    assert (
        shown.returncode == 0 and "--speech" in shown.stdout and "--micro-batches" in shown.stdout
    )
    wrong = run("--modalities", "speech", "--align", "tlm")
    assert wrong.returncode == 2 and wrong.stdout == "" and wrong.stderr.count("\n") == 1
    assert wrong.stderr.startswith("error: --align tlm needs")
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_xl_prints_the_papers_size_and_makes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = run_here(["--size", "xl", "--dry-run"])
    blocks = re.search(r"24 Conformer blocks\s+([\d.]+) M", printed)
    both = re.search(r"blocks and embedding\s+([\d.]+) M", printed)
    assert float(blocks[1]) == pytest.approx(579.6, abs=0.06)
    assert float(both[1]) == pytest.approx(612.4, abs=0.06)
    assert list(tmp_path.iterdir()) == []


def test_dry_run_with_data_prints_the_plan_and_trains_nothing(corpus, micro, tmp_path):
    printed = run_here(options(corpus, tmp_path / "run", "--dry-run"))
    assert (
        "speech: 24 rows" in printed and "a micro-batch" in printed and "loss at chance" in printed
    )
    assert not (tmp_path / "run").exists()


def test_a_folder_of_audio_goes_through_the_importers_into_a_run(corpus, micro, capsys, tmp_path):
    """The documented way for one's own data: manifest, tokenizer, run."""
    folder, rng = tmp_path / "audio", np.random.default_rng(5)
    folder.mkdir()
    for i in range(8):
        samples = 0.1 * rng.standard_normal((round(22_050 * (0.8 + 0.1 * i)), 2))
        soundfile.write(folder / f"{i}.wav", samples, 22_050)
        (folder / f"{i}.txt").write_text(sentence(rng, 3 + i % 3) + "\n")
    manifest, tokenizer = tmp_path / "all.jsonl", tmp_path / "own.model"
    assert data.main(["manifest", "directory", str(folder), str(manifest)]) == 0
    spoken = ["tokenizer", "--text", str(corpus["text"]), "--vocab-size", "70", "--out"]
    assert data.main([*spoken, str(tokenizer)]) == 0
    assert data.main(["check", str(manifest), "--tokenizer", str(tokenizer)]) == 0
    capsys.readouterr()
    run_here([
        "--speech", manifest, "--paired", manifest, "--text", corpus["text"],
        "--tokenizer", tokenizer, "--out-dir", tmp_path / "run", "--max-steps", 2, "--log-every", 1,
    ])  # fmt: skip
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1, 2]


def test_without_data_arguments_the_demo_is_made_and_trained_on(
    demo_root, micro, monkeypatch, tmp_path
):
    """On a copy of the small demo: manifests and tokenizer are made once, and then reused."""
    shutil.copytree(demo_root, tmp_path / "demo_data")
    scale = json.loads((demo_root / "demo.json").read_text())["scale"]
    monkeypatch.setattr(demo, "make_demo", functools.partial(demo.make_demo, scale=scale))
    monkeypatch.chdir(tmp_path)
    printed = run_here(["--max-steps", 1, "--log-every", 1, "--align", "none"])
    logged = metrics_of(tmp_path / "runs" / "demo")
    assert {"loss/contrastive", "loss/span_lm"} <= logged[0].keys()
    assert "retrieval" not in printed
    prepared = tmp_path / "demo_data" / "manifests"
    before = {path: path.stat().st_mtime_ns for path in prepared.iterdir()}
    assert len(before) == 8
    run_here(["--max-steps", 1, "--out-dir", "again", "--align", "none", "--modalities", "text"])
    assert {path: path.stat().st_mtime_ns for path in prepared.iterdir()} == before
