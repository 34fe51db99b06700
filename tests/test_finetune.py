"""Properties of whole fine-tuning runs on a few rows: starts, ranks, resume, best and mean weights,
messages."""

import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import small_tasks
import torch
from small_tasks import MICRO, MICRO_HEADS, ROOT, micro_tiny, options
from whole_runs import (
    assert_same_tensors,
    dev_metrics_of,
    error_of,
    finish,
    metrics_of,
    run_here,
    start,
    timeless,
)

import conformer
import corpora
import demo
import evaluate
import finetune
import pretrain
import training

ALONE = training.Ranks(0, 0, 1, torch.device("cpu"))
pytestmark = pytest.mark.usefixtures("micro_tasks")


@pytest.fixture(scope="module")
def pretrained(paths, tmp_path_factory) -> Path:
    """A joint pre-training run of one step."""
    out_dir = tmp_path_factory.mktemp("pretrained")
    sentences = out_dir / "text.txt"
    rng = np.random.default_rng(0)
    sentences.write_text("".join(small_tasks.sentence(rng, 6) + "\n" for _ in range(60)))
    command = ["--speech", paths["asr"], "--text", sentences, "--tokenizer", paths["tokenizer"],
               "--align", "none", "--max-steps", 1, "--batch-s", 4, "--batch-tokens", 100,
               "--row-tokens", 40, "--out-dir", out_dir]  # fmt: skip
    with micro_tiny():
        run_here(pretrain.main, command)
    return out_dir


def tune(paths, task: str, out_dir: Path, *more: object) -> str:
    return run_here(finetune.main, options(paths, task, out_dir, *more))


def error(paths, capsys, task: str, out_dir: Path, *more: object) -> str:
    return error_of(finetune.main, capsys, options(paths, task, out_dir, *more))


def checkpoint(out_dir: Path, name: str | None = None) -> dict:
    return training.load_checkpoint(out_dir / "ckpt" / name if name else out_dir)


# ------------------------------------------------------------------------------------ every task

TASKS = {
    "asr ctc": ("asr", "--head ctc", "ctc", "wer"),
    "asr rnnt": ("asr", "--head rnnt", "rnnt", "wer"),
    "st": ("st", "", "attention", "bleu"),
    "mnli": ("mnli", "", "classifier", "accuracy"),
    "qnli": ("qnli", "", "classifier", "accuracy"),
    "qqp": ("qqp", "", "classifier", "accuracy"),
    "sst2": ("sst2", "", "classifier", "accuracy"),
    "textnorm": ("textnorm", "", "attention", "ser"),
}


@pytest.mark.parametrize("name", TASKS)
def test_each_task_runs_and_leaves_scores_best_weights_and_answers(paths, tmp_path, name):
    task, more, kind, key = TASKS[name]
    printed = tune(paths, task, tmp_path, more, "--augment 1 --dropout 0.1")
    logged, held_out = metrics_of(tmp_path), dev_metrics_of(tmp_path)
    assert [row["step"] for row in logged] == [row["step"] for row in held_out] == [1, 2]
    for row in logged:
        assert math.isfinite(row[f"loss/{kind}"]) and row["grad_norm"] > 0
        assert row["skipped_steps"] == 0 and row[f"count/{kind}"] > 0
    assert all(math.isfinite(row[f"dev/{key}"]) for row in held_out)
    if task == "qqp":
        assert "dev/f1" in held_out[0]
    best, values = checkpoint(tmp_path, "best.pt"), [row[f"dev/{key}"] for row in held_out]
    assert best["dev"] == (max if key in ("bleu", "accuracy") else min)(values)
    assert best["step"] == 1 + values.index(best["dev"]) and best["task"] == task
    head = best["head"]
    assert head["kind"] == kind
    assert head["tags"] == (["de", "ca"] if task == "st" else [""])
    assert head["labels"] == list(corpora.GLUE[task].labels if task in corpora.GLUE else ())
    assert (best["target_tokenizer"] is None) == (task in corpora.GLUE)
    lines = (tmp_path / "dev.answers.tsv").read_text().splitlines()
    n_dev = {"asr": 6, "st": 9, "textnorm": 9}.get(task, 13)
    assert lines[0] == "id\treference\tanswer" and len(lines) == 1 + n_dev
    assert f"best held-out {key}" in printed and (tmp_path / "curves.png").exists()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["args"]["task"] == task and config["config"]["d_model"] == MICRO["d_model"]


def test_best_weights_have_the_score_that_is_said_of_them(paths, tmp_path):
    """After steps that made it worse: a rate that destroys."""
    tune(paths, "mnli", tmp_path, "--max-steps 12 --eval-every 2 --save-every 50 --lr 0.5 --seed 2",
         "--decoder-lr 0.5 --warmup-steps 8 --decoder-warmup-steps 8")  # fmt: skip
    values = [row["dev/accuracy"] for row in dev_metrics_of(tmp_path)]
    best = checkpoint(tmp_path, "best.pt")
    assert best["dev"] == max(values) > values[-1]
    run_here(evaluate.main, ["--checkpoint", tmp_path, "--data", f"d={paths['mnli_dev']}"])
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["sets"]["d"]["accuracy"] == best["dev"]
    assert (tmp_path / "d.answers.tsv").read_text() == (tmp_path / "dev.answers.tsv").read_text()


def test_without_held_out_data_it_trains_too_and_the_last_weights_are_used(paths, tmp_path):
    arguments = options(paths, "sst2", tmp_path)
    place = arguments.index("--dev")
    del arguments[place : place + 2]
    run_here(finetune.main, arguments)
    assert [row["step"] for row in metrics_of(tmp_path)] == [1, 2] and not dev_metrics_of(tmp_path)
    assert not (tmp_path / "ckpt" / "best.pt").exists()
    tuned = evaluate.load_fine_tuned(tmp_path, ALONE.device)
    assert_same_tensors(tuned.model.state_dict(), checkpoint(tmp_path)["model"])


def test_the_target_tokenizer_is_of_the_targets_and_their_case(paths, tmp_path):
    for task, text_case, text in (("asr", "lower", "red cat"), ("st", "exact", "Katze rot")):
        tune(paths, task, tmp_path / task, "--max-steps 1")
        stored = checkpoint(tmp_path / task)["target_tokenizer"]
        tokenizer = corpora.Tokenizer(bytes(stored.tolist()))
        assert tokenizer.text_case == text_case
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("vaixell")) == "vaixell", "one for all languages"


# ------------------------------------------------------------------------------------------- starts


def encoder_of(its: dict) -> dict:
    return {name: value for name, value in its["model"].items() if name.startswith("encoder.")}


STILL = "--lr 0 --decoder-lr 0 --max-steps 1"  # a run that shows what it began with


@pytest.mark.parametrize("task", ["asr", "sst2"])
def test_init_takes_every_tensor_of_the_encoder_and_none_is_random(
    paths, pretrained, tmp_path, task
):
    printed = tune(paths, task, tmp_path / "a", STILL, "--init", pretrained)
    began, whole = checkpoint(tmp_path / "a"), training.load_checkpoint(pretrained)["model"]
    own = encoder_of(began)
    assert own and f"init: {len(own)} tensors of the encoder taken" in printed
    for name, value in own.items():
        assert torch.equal(value, whole[name]), name
    left = {name.split(".")[1] for name in whole if name.startswith("encoder.")} - {
        name.split(".")[1] for name in own
    }
    assert left == {"text" if task == "asr" else "speech"}
    assert torch.equal(began["tokenizer"], training.load_checkpoint(pretrained)["tokenizer"])
    # Also from the encoder of another task, whose head is not taken.
    printed = tune(paths, task, tmp_path / "b", "--max-steps 2 --lr 1e-2 --warmup-steps 0",
                   "--init", tmp_path / "a")  # fmt: skip
    tune(paths, task, tmp_path / "c", STILL, "--init", tmp_path / "b", "--seed 5")
    assert_same_tensors(
        encoder_of(checkpoint(tmp_path / "c")), encoder_of(checkpoint(tmp_path / "b", "best.pt"))
    )
    heads = [checkpoint(tmp_path / n)["model"] for n in "bc"]
    name = next(name for name in heads[0] if name.startswith("head.") and "weight" in name)
    assert not torch.equal(heads[0][name], heads[1][name])


def test_init_none_is_the_same_model_from_scratch_with_its_own_statistics(
    paths, pretrained, tmp_path
):
    tune(paths, "asr", tmp_path / "init", STILL, "--init", pretrained)
    tune(paths, "asr", tmp_path / "none", STILL)
    one, two = checkpoint(tmp_path / "init"), checkpoint(tmp_path / "none")
    assert {k: v.shape for k, v in one["model"].items()} == {
        k: v.shape for k, v in two["model"].items()
    }
    mean = two["model"]["encoder.speech.feature_mean"]
    manifest = corpora.Manifest.read([paths["asr"]])
    keep = np.array([row != 5 for row in range(len(manifest))])  # not the one that is too short
    files = [manifest.row(i)["audio_filepath"] for i in np.flatnonzero(keep)]
    mels = [conformer.log_mel(torch.from_numpy(corpora.read_audio(file))) for file in files]
    assert torch.allclose(mean, torch.cat(mels).mean(0), atol=0.05)
    weight = "encoder.multimodal.blocks.0"
    names = [name for name in one["model"] if name.startswith(weight) and name.endswith("weight")]
    assert names and any(not torch.equal(one["model"][n], two["model"][n]) for n in names)


def test_wrong_starts_are_one_line(paths, pretrained, tmp_path, capsys, monkeypatch):
    def of(task: str, *more: object) -> str:
        return error(paths, capsys, task, tmp_path / "run", *more)

    garbage, foreign = tmp_path / "garbage.pt", tmp_path / "foreign.pt"
    garbage.write_bytes(b"nothing of the kind")
    torch.save({"state_dict": {}}, foreign)
    assert "is the file whole" in of("asr", "--init", garbage)
    wrong = of("asr", "--init", foreign)
    assert "is not a checkpoint of pretrain.py or finetune.py but nothing of ours" in wrong
    tune(paths, "asr", tmp_path / "asr", "--max-steps 1")
    missing = of("sst2", "--init", tmp_path / "asr")
    assert "--init: the checkpoint has no encoder.text" in missing
    assert "trained without text" in missing
    monkeypatch.chdir(tmp_path)
    arguments = options(paths, "sst2", tmp_path / "run")
    place = arguments.index("--init")
    del arguments[place : place + 2]
    printed = error_of(finetune.main, capsys, arguments)
    assert "runs/demo" in printed and "pretrain.py" in printed and "--init none" in printed
    other = tmp_path / "other.model"
    corpora.Tokenizer.train(["quite other words than those"] * 9, 60).save(other)
    assert "is not the one that the checkpoint was trained with" in of(
        "sst2", "--init", pretrained, "--tokenizer", other
    )
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------- rates


def test_encoder_and_head_have_rates_and_warmups_of_their_own(paths, tmp_path):
    tune(paths, "sst2", tmp_path, "--max-steps 6 --lr 2e-3 --warmup-steps 4",
         "--decoder-lr 1e-2 --decoder-warmup-steps 2")  # fmt: skip
    logged = metrics_of(tmp_path)
    for key, peak, warmup in (("lr", 2e-3, 4), ("lr/head", 1e-2, 2)):
        expected = [training.inverse_sqrt(step, peak, warmup) for step in range(6)]
        assert [row[key] for row in logged] == pytest.approx(expected)
    groups = checkpoint(tmp_path)["optimizer"]["param_groups"]
    last = {group["lr"] for group in groups}
    assert last == {logged[-1]["lr"], logged[-1]["lr/head"]}


@pytest.mark.parametrize("frozen", ["encoder.", "head."])
def test_a_rate_of_0_freezes_one_part_and_not_the_other(paths, tmp_path, frozen):
    tune(paths, "sst2", tmp_path / "began", STILL)
    rates = "--lr 0 --decoder-lr 1e-2" if frozen == "encoder." else "--lr 1e-2 --decoder-lr 0"
    tune(paths, "sst2", tmp_path / "end", rates, "--warmup-steps 0 --decoder-warmup-steps 0")
    began, end = (checkpoint(tmp_path / name)["model"] for name in ("began", "end"))
    moved = {name for name in began if not torch.equal(began[name], end[name])}
    assert moved == {name for name in began if not name.startswith(frozen)}


# ---------------------------------------------------------------------------------- stop and resume

N_STEPS = 9
WHOLE = f"--max-steps {N_STEPS} --save-every 2 --eval-every 3 --augment 1 --dropout 0.1 "
WHOLE += "--lr 1e-2 --warmup-steps 4 --decoder-warmup-steps 2 --decoder-lr 1e-2"


@pytest.fixture(scope="module")
def whole(paths, tmp_path_factory) -> Path:
    """A run that was never interrupted."""
    out_dir = tmp_path_factory.mktemp("whole")
    with micro_tiny():
        tune(paths, "asr", out_dir, WHOLE)
    return out_dir


def assert_same_end(left: Path, right: Path) -> None:
    """The same weights, moments, losses, scores and best weights, bit for bit."""
    a, b = checkpoint(left), checkpoint(right)
    assert a["step"] == b["step"] == N_STEPS
    assert_same_tensors(a["model"], b["model"])
    for number, state in a["optimizer"]["state"].items():
        assert_same_tensors(state, b["optimizer"]["state"][number])
    logs = [
        [timeless(row) for row in training.read_metrics(folder / "metrics.jsonl")]
        for folder in (left, right)
    ]
    assert logs[0] == logs[1]
    best = [checkpoint(folder, "best.pt") for folder in (left, right)]
    assert best[0]["step"] == best[1]["step"] and best[0]["dev"] == best[1]["dev"]
    assert_same_tensors(best[0]["model"], best[1]["model"])
    for name in ("dev.answers.tsv", "ckpt/held_out.json"):
        assert (left / name).read_text() == (right / name).read_text()


class Pulled(Exception):
    """The plug was pulled."""


@pytest.mark.parametrize("at_step", [5, 6, 7, N_STEPS])
def test_an_interrupted_run_resumes_bit_for_bit(paths, whole, tmp_path, monkeypatch, at_step):
    """Cut off in its evaluation, or when it logs a step: between saving and whatever follows."""
    write = training.MetricsLog.write

    def pull(self, step, metrics):
        if step == at_step and (at_step != N_STEPS or "dev/wer" in metrics):
            raise Pulled
        write(self, step, metrics)

    with monkeypatch.context() as patch, pytest.raises(Pulled):
        patch.setattr(training.MetricsLog, "write", pull)
        tune(paths, "asr", tmp_path, WHOLE)
    printed = tune(paths, "asr", tmp_path, WHOLE)
    if at_step < N_STEPS:
        assert f"resumed {tmp_path}/ckpt/step_000000{(at_step - 1) // 2 * 2}.pt" in printed
        assert "new" not in printed.split("resumed")[0].split("tensors")[-1]
        assert_same_end(whole, tmp_path)
    else:
        assert f"this run has made its {N_STEPS} steps" in printed


def test_a_run_that_was_killed_in_its_last_evaluation_is_evaluated_when_it_comes_back(
    paths, whole, tmp_path, monkeypatch
):
    """It had made all its steps, so nothing would ever have chosen its best weights."""
    with monkeypatch.context() as patch, pytest.raises(Pulled):

        def pull(*_):
            raise Pulled

        patch.setattr(evaluate, "answer_all", pull)
        tune(paths, "asr", tmp_path, WHOLE, "--eval-every 0")
    assert not (tmp_path / "ckpt" / "best.pt").exists()
    printed = tune(paths, "asr", tmp_path, WHOLE, "--eval-every 0")
    assert "has made its 9 steps" in printed and "best held-out wer" in printed
    assert_same_tensors(checkpoint(tmp_path, "best.pt")["model"], checkpoint(whole)["model"])
    assert checkpoint(tmp_path, "best.pt")["dev"] == dev_metrics_of(whole)[-1]["dev/wer"]


def test_a_run_that_was_killed_in_an_evaluation_makes_it_when_it_comes_back(
    paths, whole, tmp_path, monkeypatch
):
    """Its weights were saved before: without it, best.pt would be chosen among fewer."""
    decode, calls = evaluate.answer_all, []

    def pull_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise Pulled
        return decode(*arguments)

    more = "--save-every 3"  # as --eval-every
    with monkeypatch.context() as patch, pytest.raises(Pulled):
        patch.setattr(evaluate, "answer_all", pull_at_the_second)
        tune(paths, "asr", tmp_path, WHOLE, more)
    tune(paths, "asr", tmp_path, WHOLE, more)
    assert dev_metrics_of(tmp_path) == dev_metrics_of(whole)
    assert_same_tensors(
        checkpoint(tmp_path, "best.pt")["model"], checkpoint(whole, "best.pt")["model"]
    )


def test_weights_are_not_chosen_by_a_file_without_labels(paths, tmp_path, capsys):
    header, *rows = paths["sst2_dev"].read_text().splitlines()
    unlabelled = tmp_path / "test.tsv"
    unlabelled.write_text(
        "index\tsentence\n"
        + "".join(f"{i}\t{row.split(chr(9))[0]}\n" for i, row in enumerate(rows))
    )
    printed = error(paths, capsys, "sst2", tmp_path / "run", "--dev", unlabelled)
    assert "has no labels to choose the best weights by" in printed


MICRO_MAIN = """
import dataclasses, os, sys
open(__file__ + "." + os.environ.get("RANK", "0") + ".pid", "w").write(str(os.getpid()))
sys.path.insert(0, {root!r})
import conformer, decoders, finetune
conformer.SIZES["tiny"] = dataclasses.replace(conformer.SIZES["tiny"], **{micro!r})
decoders.HEAD_SIZES["tiny"] = {heads!r}
if __name__ == "__main__":
    finetune.main()
"""


@pytest.fixture(scope="module")
def micro_main(tmp_path_factory) -> Path:
    """finetune.py with the smaller `tiny`, as a program."""
    path = tmp_path_factory.mktemp("main") / "micro_finetune.py"
    path.write_text(MICRO_MAIN.format(root=str(ROOT), micro=MICRO, heads=MICRO_HEADS))
    return path


def test_a_killed_run_resumes_bit_for_bit(paths, whole, micro_main, tmp_path):
    command = options(paths, "asr", tmp_path, WHOLE)
    process = start(micro_main, command)
    log = tmp_path / "metrics.jsonl"
    for _ in range(12_000):
        if log.exists() and '{"step": 5, ' in log.read_text():
            break
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    os.kill(int(Path(f"{micro_main}.0.pid").read_text()), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert "resumed" in run_here(finetune.main, command)
    assert_same_end(whole, tmp_path)


def test_sigterm_saves_and_the_run_goes_on_from_there(paths, whole, tmp_path, monkeypatch):
    save, steps = training.save_checkpoint, []

    def stop_after_4(out_dir, step, *rest):
        steps.append(step)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return save(out_dir, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(training, "save_checkpoint", stop_after_4)
        tune(paths, "asr", tmp_path, WHOLE)
    assert stopped.value.code == 128 + signal.SIGTERM and steps[-1] in (4, 5)
    tune(paths, "asr", tmp_path, WHOLE)
    assert_same_end(whole, tmp_path)


def test_a_finished_run_says_so_and_keeps_its_weights(paths, whole):
    kept = {p: p.read_bytes() for p in (whole / "ckpt").iterdir()}
    kept[whole / "metrics.jsonl"] = (whole / "metrics.jsonl").read_bytes()
    printed = tune(paths, "asr", whole, WHOLE)
    assert f"has made its {N_STEPS} steps; raise --max-steps" in printed
    assert "best held-out wer" in printed
    assert {path: path.read_bytes() for path in kept} == kept
    assert kept.keys() - {whole / "metrics.jsonl"} == set((whole / "ckpt").iterdir())


@pytest.mark.parametrize("flag, value", [("--lr", 1e-3), ("--decoder-warmup-steps", 7)])
def test_what_heals_a_sick_run_may_change_on_resume_and_is_said(
    paths, whole, tmp_path, flag, value
):
    shutil.copytree(whole, tmp_path / "run")
    printed = tune(paths, "asr", tmp_path / "run", WHOLE, flag, value, "--max-steps 10")
    (line,) = [line for line in printed.splitlines() if "from now on" in line]
    assert line.strip().startswith(f"{flag} was ") and str(value) in line
    assert metrics_of(tmp_path / "run")[-1]["step"] == 10


REFUSED = {"--augment": 0.5, "--seed": 1, "--batch-s": 7, "--head": "rnnt", "--micro-batches": 2,
           "--max-audio-s": 9, "--dropout": 0.2, "--normaliser": "words"}  # fmt: skip


@pytest.mark.parametrize("flag", REFUSED)
def test_another_run_in_the_same_folder_is_refused_by_name(paths, whole, capsys, flag):
    assert flag in error(paths, capsys, "asr", whole, WHOLE, flag, REFUSED[flag])


def test_other_targets_data_or_tasks_are_refused_on_resume(paths, whole, capsys, tmp_path):
    tune(paths, "st", tmp_path / "st")
    again = "--max-steps 3"
    assert "--targets" in error(paths, capsys, "st", tmp_path / "st", again, "--targets ca,de")
    assert "run of --task st" in error(paths, capsys, "sst2", tmp_path / "st", again)
    assert "the data" in error(paths, capsys, "asr", whole, WHOLE, "--train", paths["asr_dev"])
    tune(paths, "qqp", tmp_path / "qqp")  # sst2 has labels of the same names
    assert "run of --task qqp" in error(paths, capsys, "sst2", tmp_path / "qqp", again)


# -------------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize("head", ["rnnt"])
def test_two_ranks_do_what_one_process_does_in_float64(paths, micro_main, tmp_path, head):
    """Every logged loss to 1e-6, and every held-out row answered once: the same file."""
    more = f"--dtype fp64 --max-steps 8 --eval-every 4 --save-every 8 --head {head} --augment 1 "
    more += "--dropout 0.1 --lr 3e-2 --decoder-lr 3e-2 --warmup-steps 2 --decoder-warmup-steps 2 "
    more += "--batch-s 5 --average 2"
    process = start(micro_main, options(paths, "asr", tmp_path / "2", more), n_ranks=2)
    tune(paths, "asr", tmp_path / "1", more, "--micro-batches 2")
    printed = finish(process)
    assert "mean of the 2 best weights" in printed
    one, two = (training.read_metrics(tmp_path / n / "metrics.jsonl") for n in "12")
    assert [row["step"] for row in one] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in timeless(a):
            assert b[key] == pytest.approx(a[key], rel=1e-6, abs=1e-9), (a["step"], key)
    assert metrics_of(tmp_path / "1")[-1]["loss"] < 0.8 * one[0]["loss"], "nothing was learned"
    for name in ("dev.answers.tsv", "average.answers.tsv"):
        text = (tmp_path / "1" / name).read_text()
        assert text == (tmp_path / "2" / name).read_text() and text.count("\n") == 7
    for name in ("best.pt", "average.pt", "step_0000008.pt"):
        a, b = (checkpoint(tmp_path / n, name)["model"] for n in "12")
        for key in a:
            assert torch.allclose(a[key], b[key], rtol=1e-4, atol=1e-7), (name, key)


def test_micro_batches_of_a_step_hold_different_counts(paths, tmp_path, monkeypatch):
    """Else the test above could not tell a mean of means from the mean."""
    arguments = options(paths, "asr", tmp_path, "--head rnnt --batch-s 5 --micro-batches 2")
    run = finetune.prepare(finetune.parse_arguments(arguments), ALONE)
    rows = finetune.TaskData(run.train.rows, run.plan)
    counts = [[run.model.counts(rows[step, k])["rnnt"] for k in (0, 1)] for step in range(8)]
    assert sum(a != b for a, b in counts) >= 4


# ------------------------------------------------------------------------- best and mean of weights


def tensors(value: float) -> dict:
    return {"model": {"w": torch.full((2,), value), "n": torch.tensor(int(value))}}


def steps_kept(folder: Path) -> list[int]:
    return sorted(int(path.stem[4:]) for path in folder.glob("dev_*.pt"))


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_the_best_weights_are_kept_and_the_others_are_not(tmp_path, higher_is_better):
    scores = [5.0, 3.0, 4.0, 3.0, 1.0, 9.0]
    values = [-s if higher_is_better else s for s in scores]
    best = finetune.BestWeights(tmp_path, 2, higher_is_better, 0)
    seen = []
    for step, value in enumerate(values, 1):
        is_best = best.add(step, value, tensors(step))
        named = torch.load(tmp_path / "best.pt", weights_only=True)
        assert is_best == (named["step"] == step)
        assert float(named["model"]["w"][0]) == named["step"]
        seen.append((is_best, named["step"], steps_kept(tmp_path), best.since_best()))
    assert seen == [
        (True, 1, [1], 0), (True, 2, [1, 2], 0), (False, 2, [2, 3], 1), (False, 2, [2, 4], 2),
        (True, 5, [2, 5], 0), (False, 5, [2, 5], 1),
    ]  # fmt: skip
    assert named["dev"] == values[4]
    assert json.loads((tmp_path / "held_out.json").read_text()) == [
        [step, value] for step, value in enumerate(values, 1)
    ]


def test_a_resumed_run_forgets_the_scores_after_its_checkpoint(tmp_path):
    """Those steps come again, perhaps with another rate: their weights must not stay the best."""
    best = finetune.BestWeights(tmp_path, 2, False, 0)
    for step, value in ((2, 5.0), (4, 6.0), (6, 1.0)):
        best.add(step, value, tensors(step))
    assert steps_kept(tmp_path) == [2, 6]
    best = finetune.BestWeights(tmp_path, 2, False, 5)
    assert [step for step, _ in best.scores] == [2, 4] and steps_kept(tmp_path) == [2]
    assert torch.load(tmp_path / "best.pt", weights_only=True)["step"] == 2
    assert not best.add(6, 5.5, tensors(6.5))
    assert torch.load(tmp_path / "best.pt", weights_only=True)["step"] == 2
    assert steps_kept(tmp_path) == [2, 6]
    # All weights that are left are after the checkpoint: the next evaluation is the best there is.
    best = finetune.BestWeights(tmp_path, 1, False, 1)
    assert best.scores == [] and not (tmp_path / "best.pt").exists()
    assert best.since_best() == 0
    assert best.add(2, 7.0, tensors(2)) and steps_kept(tmp_path) == [2]
    # The best weights were overwritten by better ones that are now forgotten.
    best.add(4, 3.0, tensors(4))
    best = finetune.BestWeights(tmp_path, 1, False, 3)
    assert best.scores == [[2, 7.0]] and not (tmp_path / "best.pt").exists()
    assert best.add(4, 8.0, tensors(4)) and best.since_best() == 1
    assert torch.load(tmp_path / "best.pt", weights_only=True)["dev"] == 8.0


def test_an_average_is_the_mean_of_weights_and_the_last_of_counters(tmp_path):
    contents = [
        {"model": {"w": torch.tensor(values), "h": torch.ones(1, dtype=torch.float16),
                   "n": torch.tensor(n)}}
        for n, values in enumerate(([1.0, 2.0], [3.0, 7.0], [8.0, 0.0]))
    ]  # fmt: skip
    files = [tmp_path / f"{n}.pt" for n in range(3)]
    for path, its in zip(files, contents, strict=True):
        torch.save(its, path)
    mean = finetune.average_weights(files)
    assert mean["w"].tolist() == [4.0, 3.0] and mean["w"].dtype == torch.float32
    assert mean["h"].dtype == torch.float16 and mean["h"].tolist() == [1.0]
    assert mean["n"].dtype == torch.int64 and int(mean["n"]) == 2


@pytest.mark.parametrize("of", ["best", "last"])
def test_the_mean_of_the_best_or_last_weights_is_written_and_scored(paths, tmp_path, of):
    printed = tune(
        paths, "mnli", tmp_path, "--max-steps 6 --eval-every 1 --save-every 2 --lr 5e-2",
        "--decoder-lr 5e-2 --keep-last 1 --average 3 --average-of", of,
    )  # fmt: skip
    folder = tmp_path / "ckpt"
    kept = sorted(folder.glob("dev_*.pt" if of == "best" else "step_*.pt"))
    if of == "best":
        values = [row["dev/accuracy"] for row in dev_metrics_of(tmp_path)]
        order = sorted(range(1, 7), key=lambda step: (-values[step - 1], step))
        assert steps_kept(folder) == sorted(order[:3])
    else:
        assert [path.stem for path in kept] == [f"step_000000{n}" for n in (2, 4, 6)]
        assert len(steps_kept(folder)) == 1
    models = [training.load_checkpoint(path)["model"] for path in kept]
    average = checkpoint(tmp_path, "average.pt")
    for name, value in average["model"].items():
        expected = sum(model[name].double() for model in models) / 3
        assert torch.allclose(value.double(), expected, atol=1e-7), name
    assert average["averaged"] == [path.name for path in kept]
    assert f"mean of the 3 {of} weights: held-out accuracy {average['dev']:.4f}" in printed
    evaluated = ["--checkpoint", folder / "average.pt", "--data", f"a={paths['mnli_dev']}"]
    run_here(evaluate.main, evaluated)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["sets"]["a"]["accuracy"] == average["dev"]
    text = (tmp_path / "average.answers.tsv").read_text()
    assert (tmp_path / "a.answers.tsv").read_text() == text


def test_the_last_weights_are_averaged_without_held_out_data_too(paths, tmp_path):
    arguments = options(paths, "sst2", tmp_path, "--max-steps 3 --average 2 --average-of last")
    place = arguments.index("--dev")
    del arguments[place : place + 2]
    assert "mean of the 2 last weights: ckpt/average.pt" in run_here(finetune.main, arguments)
    assert checkpoint(tmp_path, "average.pt")["averaged"] == ["step_0000002.pt", "step_0000003.pt"]
    assert not (tmp_path / "average.answers.tsv").exists()


def planned_scores(monkeypatch, values: list[float]) -> None:
    """The held-out accuracies of the evaluations to come."""
    coming = iter(values)
    monkeypatch.setattr(evaluate, "score", lambda *_: {"accuracy": next(coming)})


def test_patience_ends_a_run_that_grows_no_better_and_it_stays_ended(paths, tmp_path, monkeypatch):
    """The same command again must not train on until the next evaluation."""
    more = "--max-steps 20 --eval-every 2 --save-every 20 --patience 2"
    planned_scores(monkeypatch, [0.1, 0.5, 0.4, 0.6, 0.6, 0.2, 0.9])
    printed = tune(paths, "sst2", tmp_path, more)
    assert [row["dev/accuracy"] for row in dev_metrics_of(tmp_path)] == [
        0.1,
        0.5,
        0.4,
        0.6,
        0.6,
        0.2,
    ]
    assert metrics_of(tmp_path)[-1]["step"] == 12 == checkpoint(tmp_path)["step"]
    assert "best held-out accuracy 0.6000 at step 8" in printed
    again = tune(paths, "sst2", tmp_path, more)
    assert "has made its 12 steps; raise --max-steps or --patience" in again
    assert metrics_of(tmp_path)[-1]["step"] == 12
    planned_scores(monkeypatch, [0.9, 0.9, 0.9, 0.9])
    tune(paths, "sst2", tmp_path, more, "--patience 3 --max-steps 14")
    assert checkpoint(tmp_path, "best.pt")["step"] == 14


# ------------------------------------------------------------------------------------ lattice bound


def test_a_transducers_micro_batches_are_bounded_by_their_lattices(paths, tmp_path, capsys):
    """Cells x 4 bytes x twice the vocabulary and three times the joint network's width."""

    def bytes_of_a_cell(run: finetune.Run) -> int:
        head = run.model.head_config
        return 4 * (2 * head.vocab_size + 3 * head.joint_dim)

    def largest(gib: float | None) -> tuple[float, finetune.Run]:
        bound = ["--max-lattice-gib", gib] if gib else []
        arguments = options(paths, "asr", tmp_path, "--head rnnt --batch-s 20", *bound)
        run = finetune.prepare(finetune.parse_arguments(arguments), ALONE)
        rows, sizes = finetune.TaskData(run.train.rows, run.plan), []
        for step in range(8):
            batch = rows[step, 0]
            frames = conformer.subsampled_lens(batch.features.shape[1])
            cells = len(batch.lens) * frames * (batch.targets.shape[1] + 1)
            sizes.append(cells * bytes_of_a_cell(run) / 2**30)
        return max(sizes), run

    free, run = largest(None)
    one_row = max(
        (length / 4) * (width + 1) for length, width in
        run.plan.bucket_max(run.train.rows.target_lens).items()
    ) * bytes_of_a_cell(run) / 2**30  # fmt: skip
    bound = 2.5 * one_row
    assert bound < free
    bounded, run = largest(bound)
    assert 0.3 * bound < bounded <= 1.1 * bound  # a row's last encoder frame may be half a frame
    message = error(paths, capsys, "asr", tmp_path / "e", "--head rnnt --max-lattice-gib 1e-5")
    assert "--max-lattice-gib 1e-05: one row alone needs " in message
    assert "raise it, or lower --max-audio-s" in message
    assert "ctc" in tune(
        paths, "asr", tmp_path / "ctc", "--head ctc --max-lattice-gib 1e-5 --dry-run"
    )


# -------------------------------------------------------------------------------- unreadable audio


def damaged_speech(root: Path) -> tuple[Path, set[str]]:
    """24 utterances, three of which cannot be read -> manifest, ids of those."""
    manifest = small_tasks.write_speech(root, 24, 5)
    (root / "3.wav").write_bytes(b"")
    (root / "11.wav").unlink()
    (root / "17.wav").write_text("no audio")
    return manifest, {"u3", "u11", "u17"}


@pytest.mark.parametrize("head", ["ctc", "rnnt"])
def test_unreadable_utterances_are_replaced_with_their_targets(paths, tmp_path, head):
    manifest, bad = damaged_speech(tmp_path / "asr")
    arguments = options(paths | {"asr": manifest}, "asr", tmp_path / "run", "--head", head)
    run = finetune.prepare(finetune.parse_arguments(arguments), ALONE)
    rows, batches = run.train.rows, finetune.TaskData(run.train.rows, run.plan)
    assert batches.audio_rows == {"train": len(rows.manifest)}
    targets = {i: rows._targets[rows.kept[i]].tolist() for i in range(len(rows.kept))}
    named = set()
    for step in range(24):
        batch = batches[step, 0]
        asked = run.plan.micro_batch(step, 0)[0].tolist()
        named |= {fault.where for fault in batch.faults or ()}
        for b, row in enumerate(asked):
            target = batch.targets[b, : batch.target_lens[b]].tolist()
            there = [
                i for i in targets if targets[i] == target and rows.lengths[i] == batch.lens[b]
            ]
            unread = rows.manifest.row(row)["id"] in bad
            assert there and (unread or row in there)
            assert not unread or any(rows.manifest.row(i)["id"] not in bad for i in there)
    wheres = {rows.manifest.where(i) for i in targets if rows.manifest.row(i)["id"] in bad}
    assert named == wheres and len(named) == 3


def test_log_mel_on_the_device_gives_the_same_batches_and_losses(paths, tmp_path):
    """With SpecAugment and a row that cannot be read."""
    manifest, bad = damaged_speech(tmp_path / "asr")
    files, batches = paths | {"asr": manifest}, {}
    for where in ("loader", "device"):
        more = f"--head ctc --augment 1 --max-bad-share 1 --log-mel {where}"
        arguments = options(files, "asr", tmp_path / where, more)
        run = finetune.prepare(finetune.parse_arguments(arguments), ALONE)
        its = finetune.TaskData(run.train.rows, run.plan)
        batches[where] = [its[step, 0] for step in range(12)]
        tune(files, "asr", tmp_path / where, more)
    for loaded, left in zip(batches["loader"], batches["device"], strict=True):
        assert not isinstance(left.features, torch.Tensor) and left.faults == loaded.faults
        assert run.model.counts(left) == run.model.counts(loaded)
        moved = left.to("cpu")
        assert torch.allclose(moved.features, loaded.features, rtol=0, atol=1e-4)
        for name in ("lens", "hidden_frames", "hidden_bins", "targets", "target_lens", "tags"):
            assert torch.equal(getattr(moved, name), getattr(loaded, name)), name
        assert loaded.hidden_frames.any() and loaded.hidden_bins.any()
    assert any(loaded.faults for loaded in batches["loader"])
    one, other = (metrics_of(tmp_path / where) for where in ("loader", "device"))
    for row, its in zip(one, other, strict=True):
        assert row["loss/ctc"] == pytest.approx(its["loss/ctc"], rel=1e-4)
        assert row["count/ctc"] == its["count/ctc"]
    one, other = (dev_metrics_of(tmp_path / where) for where in ("loader", "device"))
    assert [row["dev/wer"] for row in one] == [row["dev/wer"] for row in other]


def test_unreadable_utterances_end_a_run_only_above_their_share_and_in_what_is_scored(
    paths, tmp_path, capsys
):
    manifest, bad = damaged_speech(tmp_path / "asr")
    files, steps = paths | {"asr": manifest}, "--head ctc --max-steps 30 --log-every 10"
    printed = tune(files, "asr", tmp_path / "run", steps, "--eval-every 30 --max-bad-share 0.2")
    assert printed.count("cannot be read, another row is used: ") == 3
    assert "train: 3 of 24 rows cannot be read (12%)" in printed
    message = error(files, capsys, "asr", tmp_path / "e", steps)
    assert "above --max-bad-share 0.01" in message and "check --read" in message
    for share in ("-0.1", "1.5"):
        message = error(files, capsys, "asr", tmp_path / "e", f"--max-bad-share={share}")
        assert f"--max-bad-share {share}: expected a share from 0 to 1" in message
    held_out = paths | {"asr_dev": manifest}
    message = error(held_out, capsys, "asr", tmp_path / "d", "--head ctc --max-steps 1")
    assert "rows.jsonl:" in message and "another row" not in message


def test_rows_of_text_have_no_audio_to_be_unreadable(paths, tmp_path):
    run = finetune.prepare(finetune.parse_arguments(options(paths, "sst2", tmp_path)), ALONE)
    batches = finetune.TaskData(run.train.rows, run.plan)
    assert batches.audio_rows == {} and batches[0, 0].faults is None


# ------------------------------------------------------------------------------------- command line


def test_a_dry_run_prints_the_plan_and_trains_nothing(paths, pretrained, tmp_path):
    printed = tune(paths, "st", tmp_path / "run", "--dry-run", "--init", pretrained)
    for part in ("st: encoder", "attention head", "peak rates", "16 rows", "a micro-batch"):
        assert part in printed, part
    assert "1 rows left out: shorter than two encoder frames" in printed
    assert "1 not read, their answers are empty" in printed
    assert not (tmp_path / "run").exists()


def test_each_task_and_size_has_its_recipe(paths, tmp_path):
    """w2v-BERT's rates at `xl` (METHOD.md 7); at `tiny` those of a run of minutes."""
    recipe = finetune.recipe_of("asr", "xl")
    assert (recipe.lr, recipe.warmup_steps) == (3e-4, 5_000)
    assert (recipe.decoder_lr, recipe.decoder_warmup_steps) == (1e-3, 1_500)
    assert recipe.target_vocab == 1024 and recipe.augment == 1.0
    assert finetune.recipe_of("st", "base").target_vocab == 8_192
    for task in evaluate.TASKS:
        assert finetune.recipe_of(task, "tiny") != finetune.recipe_of(task, "small")

    def resolved(*flags: object):
        args = finetune.parse_arguments([*map(str, flags)])
        args.out_dir = tmp_path
        finetune.resolve(args, ALONE, None)
        return args, finetune.head_of(args)

    args, head = resolved("--task", "asr", "--lr", 0.5, "--size", "small")
    assert (args.lr, args.decoder_lr, head.kind) == (0.5, 1e-3, "rnnt")
    assert (args.eval_every, resolved("--task", "asr", "--eval-every", 0)[0].eval_every) == (
        4000,
        0,
    )
    args, head = resolved("--task", "asr")
    assert head.kind == "ctc" and args.size == "tiny"
    assert head.rnnt_dim == MICRO_HEADS["rnnt_dim"] and head.dropout == args.dropout == 0.0


def test_a_users_mistake_is_one_line_that_says_what_to_do(paths, tmp_path, capsys, monkeypatch):
    def of(task: str, *more: object) -> str:
        return error(paths, capsys, task, tmp_path / "run", *more)

    assert "nowhere.jsonl: no such file" in of("asr", "--train nowhere.jsonl")
    assert "no column 'sentence1'" in of("mnli", "--train", paths["sst2"])
    assert "--head ctc: st has attention" in of("st", "--head ctc")
    for targets in ("de,de", "de,,ca", ""):
        message = of("st", f"--targets={targets}")
        assert f"--targets {targets!r}: expected languages" in message
    assert "into 'ca'; expected de (--targets)" in of("st", "--targets de")
    missing = of("st", "--train", paths["asr"])
    assert "rows.jsonl:1: no translation; expected de,ca (--targets)" in missing
    assert "--target-vocab 6" in of("asr", "--target-vocab 6")
    for flag in ("--augment", "--dropout"):
        assert f"{flag} 1.5: expected a share" in of("asr", flag, 1.5)
    for flag in ("--patience", "--average", "--decoder-lr", "--decoder-warmup-steps"):
        assert f"{flag} -1" in of("asr", flag, -1).replace("-1.0", "-1")
    for flag in ("--max-tokens", "--target-vocab", "--batch-tokens", "--max-lattice-gib"):
        assert f"{flag} 0" in of("asr", flag, 0)
    assert "7 rows have no label" in of("qqp", "--train", paths["qqp_test"])
    assert "0 of 11 rows usable" in of("asr", "--max-audio-s 0.2")
    arguments = options(paths, "sst2", tmp_path / "run")
    for flag, message in (("--tokenizer", "--tokenizer is missing: sst2 reads text"),
                          ("--train", "--train is missing: give it beside --dev")):  # fmt: skip
        place = arguments.index(flag)
        fewer = arguments[:place] + arguments[place + 2 :]
        assert message in error_of(finetune.main, capsys, fewer)
    assert not (tmp_path / "run").exists()


def test_the_program_prints_help_and_needs_a_task(tmp_path, capsys):
    for arguments, code in ((["--help"], 0), ([], 2)):
        with pytest.raises(SystemExit) as stopped:
            finetune.main(arguments)
        assert stopped.value.code == code
    printed = capsys.readouterr()
    assert "--average-of" in printed.out and "--task" in printed.err


@pytest.mark.parametrize("task", ["asr", "st", "mnli", "textnorm"])
def test_without_data_arguments_the_demo_is_tuned_on(demo_root, tmp_path, monkeypatch, task):
    """Files are found and read; from scratch and from a checkpoint, whose tokenizer is another."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "make_demo", lambda root, **_: None)
    root = shutil.copytree(demo_root, tmp_path / "demo_data")
    printed = run_here(finetune.main, ["--task", task, "--init", "none", "--dry-run",
                                       "--demo-dir", root])  # fmt: skip
    assert f"{task}: encoder" in printed and "a micro-batch" in printed
    assert not (tmp_path / "runs").exists()


def test_the_demos_tokenizer_is_not_asked_of_a_checkpoint_that_has_another(
    demo_root, pretrained, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "make_demo", lambda root, **_: None)
    root = shutil.copytree(demo_root, tmp_path / "demo_data")
    printed = run_here(finetune.main, ["--task", "sst2", "--init", pretrained, "--dry-run",
                                       "--demo-dir", root])  # fmt: skip
    assert "tensors of the encoder taken" in printed
