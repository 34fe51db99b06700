"""Does pre-training help when only a tenth of the demo's speech is transcribed or translated?

For each seed another tenth of the utterances keeps its labels. Pre-training hears all training
speech, reads the text, and sees those pairs alone; the same encoder is then fine-tuned on them,
once from pre-training and once from scratch, with equal steps. Voices and sentences of the test
sets are in no stream. Prints each run's test score, and the mean difference with its 95% interval
(Student's t over the seeds; runs of a seed are compared in pairs).

    python experiments/labels.py --seeds 0,1,2 --json labels.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate  # noqa: E402
import finetune  # noqa: E402
import pretrain  # noqa: E402
import training  # noqa: E402

STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5% quantiles for n values
SETS = {"asr": ("speech", "dev", "test", "wer"), "st": ("st_train", "st_dev", "st_test", "bleu")}


def share_of(manifest: Path, share: float, seed: int, out: Path) -> None:
    """Write a random share of a manifest's rows; paths in it are made absolute."""
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    chosen = np.random.default_rng(seed).permutation(len(rows))[: round(share * len(rows))]
    with out.open("w") as sink:
        for i in sorted(chosen):
            audio = (manifest.resolve().parent / rows[i]["audio_filepath"]).as_posix()
            sink.write(json.dumps(rows[i] | {"audio_filepath": audio}) + "\n")


def one_seed(args: argparse.Namespace, files: dict[str, str], seed: int, folder: Path) -> dict:
    """{task: {init: test score}} of one seed."""
    for name in ("speech", "st_train"):
        share_of(Path(files[name]), args.share, seed, folder / f"{name}.jsonl")
    pretrain.main([
        "--speech", f"{files['speech']},{files['st_train']}", "--text", files["text"],
        "--paired", f"{folder}/speech.jsonl", "--tokenizer", files["tokenizer"],
        "--dev-speech", files["dev"], "--dev-text", files["dev_text"],
        "--dev-paired", files["dev"], "--out-dir", f"{folder}/pretrained", "--seed", str(seed),
        *args.pretrain.split(),
    ])  # fmt: skip
    scores: dict[str, dict[str, float]] = {}
    for task in args.tasks.split(","):
        train, dev, test, key = SETS[task]
        for init in ("pretrained", "none"):
            run = folder / f"{task}_{init}"
            finetune.main([
                "--task", task, "--train", f"{folder}/{train}.jsonl", "--dev", files[dev],
                "--init", "none" if init == "none" else f"{folder}/pretrained",
                "--out-dir", str(run), "--seed", str(seed), *args.finetune.split(),
            ])  # fmt: skip
            command = ["--checkpoint", str(run), "--data", f"test={files[test]}"]
            ranks = training.Ranks(0, 0, 1, torch.device("cpu"))
            evaluate.run(evaluate.parse_arguments(command), ranks)
            result = json.loads((run / "scores.json").read_text())["sets"]["test"]
            scores.setdefault(task, {})[init] = result[key]
    return scores


def main() -> None:
    """Run every seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--share", type=float, default=0.1, help="of labelled utterances")
    parser.add_argument("--tasks", default="asr,st")
    parser.add_argument("--pretrain", default="", help="further options of pretrain.py")
    parser.add_argument("--finetune", default="", help="further options of finetune.py")
    parser.add_argument("--demo-dir", type=Path, default=Path("demo_data"))
    parser.add_argument("--work-dir", type=Path, help="keep the runs here")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    ranks = training.Ranks(0, 0, 1, torch.device("cpu"))
    files = pretrain.demo_files(args.demo_dir, ranks)
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        for seed in map(int, args.seeds.split(",")):
            folder = (args.work_dir or Path(temporary)) / str(seed)
            folder.mkdir(parents=True, exist_ok=True)
            results[seed] = one_seed(args, files, seed, folder)
            if args.json:
                args.json.write_text(json.dumps(results, indent=1) + "\n")
    for task in args.tasks.split(","):
        pairs = [(its[task]["none"], its[task]["pretrained"]) for its in results.values()]
        gains = [b - a for a, b in pairs]
        print(f"{task} {SETS[task][3]}: from scratch, pre-trained, difference")
        for seed, (a, b) in zip(results, pairs, strict=True):
            print(f"  seed {seed}: {a:.4f}  {b:.4f}  {b - a:+.4f}")
        if len(gains) > 1:
            half = STUDENT_T[len(gains)] * statistics.stdev(gains) / len(gains) ** 0.5
            print(f"  mean difference {statistics.mean(gains):+.4f} +- {half:.4f} (95%)")


if __name__ == "__main__":
    main()
