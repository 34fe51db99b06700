"""Properties of whole pre-training runs: ranks, resume, stages, switches, messages. Runs on a corpus of a few tones."""

import copy
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

import conformer
import data
import demo
import losses
import pretrain
import training

ROOT = Path(pretrain.__file__).parent
ALONE = training.Ranks(0, 0, 1, torch.device("cpu"))
WORDS = "the a red old cat dog ship house sees likes finds and two three under over near big".split()
MICRO = dict(
    speech_layers=1, mm_layers=2, d_model=32, d_ff=64, n_heads=2, conv_kernel=5, subsample_channels=4, norm_groups=8,
    n_codes=16, code_dim=16, lr=5e-3, warmup_steps=3, max_steps=2, batch_s=6.0, batch_paired_s=5.0, batch_tokens=240,
    row_tokens=48,
)  # fmt: skip
MICRO_MAIN = """
import dataclasses, sys
sys.path.insert(0, {root!r})
import conformer
conformer.SIZES["tiny"] = dataclasses.replace(conformer.SIZES["tiny"], **{micro!r})
import pretrain
if __name__ == "__main__":
    pretrain.main()
"""

# ---------------------------------------------------------------------------------------------- corpus and runs


def sentence(rng: np.random.Generator, n_words: int) -> str:
    return " ".join(rng.choice(WORDS, n_words))


def write_corpus(root: Path, n_rows: int, seed: int, loudness: float = 0.1) -> Path:
    """Utterances of 0.4 to 2.2 s, all of different lengths, so that no two micro-batches are alike."""
    rng, lines = np.random.default_rng(seed), []
    root.mkdir(parents=True)
    for i, seconds in enumerate(np.linspace(0.4, 2.2, n_rows) + rng.uniform(0, 0.02, n_rows)):
        wave = loudness * rng.standard_normal(round(seconds * 16_000))
        soundfile.write(root / f"{i}.wav", wave, 16_000, subtype="FLOAT")
        row = {"audio_filepath": f"{i}.wav", "duration": round(float(seconds), 4)}
        lines.append(json.dumps(row | {"text": sentence(rng, 1 + round(3 * seconds))}) + "\n")
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
        "speech": corpus["speech"], "text": corpus["text"], "paired": corpus["speech"], "dev-speech": corpus["dev"],
        "dev-text": corpus["dev_text"], "dev-paired": corpus["dev"], "tokenizer": corpus["tokenizer"], "out-dir": out_dir,
    }  # fmt: skip
    return [str(part) for name, path in files.items() for part in (f"--{name}", path)] + [str(part) for part in more]


@pytest.fixture(scope="module")
def micro_main(tmp_path_factory) -> Path:
    """pretrain.py with a `tiny` that is smaller still: every part of the model, milliseconds a step."""
    path = tmp_path_factory.mktemp("main") / "micro_pretrain.py"
    path.write_text(MICRO_MAIN.format(root=str(ROOT), micro=MICRO))
    return path


def start(script: Path, arguments: list[str], n_ranks: int = 1) -> subprocess.Popen:
    """A run in processes of its own, alone or under torchrun."""
    launcher = [sys.executable]
    if n_ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks)]
    return subprocess.Popen(
        [*launcher, str(script), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """Wait for the end -> what it printed."""
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == code, printed
    return printed


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


def metrics_of(out_dir: Path) -> list[dict]:
    """Training lines."""
    return [row for row in training.read_metrics(out_dir / "metrics.jsonl") if "lr" in row]


def dev_metrics_of(out_dir: Path) -> list[dict]:
    return [row for row in training.read_metrics(out_dir / "metrics.jsonl") if "lr" not in row]


def assert_same_tensors(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def assert_same_end(left: Path, right: Path) -> None:
    """Two runs ended with the same weights, moments and losses, bit for bit."""
    a, b = training.load_checkpoint(left), training.load_checkpoint(right)
    assert a["step"] == b["step"]
    assert_same_tensors(a["model"], b["model"])
    for number, state in a["optimizer"]["state"].items():
        assert_same_tensors(state, b["optimizer"]["state"][number])
    for one, two in zip(metrics_of(left), metrics_of(right), strict=True):
        assert {k: v for k, v in one.items() if not k.endswith("_ms")} == {
            k: v for k, v in two.items() if not k.endswith("_ms")
        }


@pytest.fixture
def micro(monkeypatch):
    """The smaller `tiny` in this process; signal handlers are put back."""
    monkeypatch.setitem(conformer.SIZES, "tiny", dataclasses.replace(conformer.SIZES["tiny"], **MICRO))
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


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
    model = pretrain.SlamPretraining(conformer.sized(args.size, vocab_size=tokenizer.vocab_size), objectives).to(dtype)
    return model, dataset, pretrain.load_rows(args, objectives, tokenizer, dev=True), args


# ---------------------------------------------------------------------------------------------- ranks

N_STEPS, SAVE_EVERY = 24, 5
WHOLE = ("--max-steps", N_STEPS, "--save-every", SAVE_EVERY, "--log-every", 1, "--micro-batches", 2, "--eval-every", 10)


@pytest.fixture(scope="module")
def alone(corpus, micro_main, tmp_path_factory) -> tuple[Path, str]:
    """A run of one process, never interrupted: its folder and what it printed."""
    out_dir = tmp_path_factory.mktemp("alone")
    return out_dir, finish(start(micro_main, options(corpus, out_dir, *WHOLE)))


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


def test_micro_batches_of_a_step_hold_different_counts(corpus, micro):
    """Else the tests of ranks below could not tell a mean of means from the mean."""
    model, dataset, _, _ = prepare(corpus)
    uneven = {name: 0 for name in model.objectives}
    for step in range(20):
        first, second = (model.counts(dataset[step, k]) for k in range(2))
        for name in uneven:
            uneven[name] += first[name] != second[name]
    assert uneven.pop("stm") == 0  # as many rows in each
    assert min(uneven.values()) >= 8, uneven


def test_two_ranks_do_what_one_process_does_in_float64(corpus, tmp_path):
    """The program itself at its own smallest size: every logged loss of 20 steps to 1e-6, relative."""
    more = ("--dtype", "fp64", "--max-steps", 20, "--warmup-steps", 4, "--log-every", 1, "--save-every", 1000)
    more += ("--batch-s", 5, "--batch-paired-s", 4, "--batch-tokens", 240, "--row-tokens", 48)
    finish(start(ROOT / "pretrain.py", options(corpus, tmp_path / "2", *more), n_ranks=2))
    finish(start(ROOT / "pretrain.py", options(corpus, tmp_path / "1", *more, "--micro-batches", 2)))
    one, two = metrics_of(tmp_path / "1"), metrics_of(tmp_path / "2")
    assert [row["step"] for row in one] == list(range(1, 21))
    assert_close_logs(one, two, 1e-6, r"loss|count|chance|grad_norm|ppl|lr")
    assert_close_logs(dev_metrics_of(tmp_path / "1"), dev_metrics_of(tmp_path / "2"), 1e-6, r"dev/(loss|count)")
    a, b = (training.load_checkpoint(tmp_path / n)["model"] for n in "12")
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-7), name
    assert max(row["lr"] for row in one) > 1e-3
    assert one[-1]["loss/span_lm"] < one[0]["loss/span_lm"] - 0.5, "the weights did not move"


def test_two_ranks_do_what_one_process_does_in_float32(alone, together):
    one, two = metrics_of(alone[0]), metrics_of(together[0])
    assert_close_logs(one[:1], two[:1], 1e-5, r"loss|grad_norm")
    assert_close_logs(one, two, 1e-3, r"loss")
    assert_close_logs(dev_metrics_of(alone[0]), dev_metrics_of(together[0]), 1e-3, r"dev/loss")


def test_a_run_moves_every_weight(alone, corpus, micro):
    """From the weights that its seed makes."""
    model, _, _, _ = prepare(corpus)
    end = training.load_checkpoint(alone[0])["model"]
    for name, weight in model.named_parameters():
        assert not torch.equal(weight, end[name]), name
