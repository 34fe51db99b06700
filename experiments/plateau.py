"""Which of tiny's departures from the paper's values make masked speech learnable in minutes?

Each is put back alone. Speech only, so that no other loss helps. Usage, from the repository's
root, with the demo made: python experiments/plateau.py [--steps 200] [--only NAME,...]. Prints a
table of held-out figures; EXPERIMENTS.md has ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import conformer
import pretrain
import training

VARIANTS: dict[str, dict[str, float | str]] = {
    "tiny as it is": {},
    "target_lr_scale 1": {"target_lr_scale": 1.0},
    "target_lr_scale 0.1": {"target_lr_scale": 0.1},
    "target_lr_scale 0": {"target_lr_scale": 0.0},
    "codebook_init uniform": {"codebook_init": "uniform"},
    "conv_kernel 5": {"conv_kernel": 5},
    "dropout 0.1": {"dropout": 0.1},
    "n_codes 1024": {"n_codes": 1024},
    "lr 6e-4": {"lr": 6e-4},
}


def main() -> None:
    """Run every variant and print its held-out figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", default=",".join(VARIANTS), help="names, comma separated")
    parser.add_argument("--demo-dir", default="demo_data")
    args = parser.parse_args()
    tiny, table = conformer.SIZES["tiny"], []
    for name in args.only.split(","):
        conformer.SIZES["tiny"] = dataclasses.replace(tiny, **VARIANTS[name])
        with tempfile.TemporaryDirectory() as folder:
            pretrain.main([
                "--modalities", "speech", "--max-steps", str(args.steps), "--log-every", "50",
                "--out-dir", folder, "--demo-dir", args.demo_dir,
            ])  # fmt: skip
            rows = training.read_metrics(Path(folder) / "metrics.jsonl")
        table.append((name, next(row for row in rows if "dev/loss/contrastive" in row)))
    print(
        f"{'':<24}{'contrastive':>12}{'chance':>8}{'acc':>8}"
        f"{'code MLM':>10}{'entropy':>9}{'acc':>8}{'mode':>8}{'codes':>7}"
    )
    for name, row in table:
        d = {key.removeprefix("dev/"): value for key, value in row.items()}
        print(
            f"{name:<24}{d['loss/contrastive']:>12.3f}{d['chance_loss/contrastive']:>8.3f}"
            f"{100 * d['acc/contrastive']:>7.1f}%{d['loss/code_mlm']:>10.3f}"
            f"{d['chance_loss/code_mlm']:>9.3f}{100 * d['acc/code_mlm']:>7.1f}%"
            f"{100 * d['chance/code_mlm']:>7.1f}%{100 * d['codes_used']:>6.0f}%"
        )


if __name__ == "__main__":
    main()
