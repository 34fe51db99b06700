"""Fine-tune a pre-trained encoder for one task.

SLAM (Bapna et al. 2021) section 4. `python finetune.py --task asr` goes on from `runs/demo`, which
`python pretrain.py` has made, on the demo's transcribed speech. Real data are named by --train and
--dev, in the form in which they are distributed (evaluate.py reads them).

    asr                       speech recognition by a transducer, or --head ctc
    st                        speech translation by a Transformer decoder, --targets de,ca,ar,tr
    mnli qnli qqp sst2        classification of sentences and pairs on [CLS]
    textnorm                  reading written text out, by a Transformer decoder

All of the encoder is trained on, at a lower rate than the new head. `--init none` trains the same
model from scratch: the baseline that pre-training is measured against.

Public:  Recipe, RECIPES, average_weights. Everything else serves main().
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

import data
import evaluate
import pretrain
import training
from conformer import FRAMES_PER_S, SIZES, SUBSAMPLING, SlamConfig, sized
from corpora import GLUE, Manifest, Tokenizer, paths_of, read_textnorm
from decoders import HEAD_SIZES, HeadConfig, TaskBatch, TaskModel
from evaluate import TASKS, TaskSet, TaskTokenizers
from training import Rate, Ranks

ME = "finetune.py"  # in checkpoints


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a task is fine-tuned. The defaults are w2v-BERT's for recognition (METHOD.md 7)."""

    head: str = ""  # "": the first that the task may have
    max_steps: int = 20_000  # UNSPECIFIED IN PAPER
    lr: float = 3e-4  # the encoder's peak
    warmup_steps: int = 5_000
    decoder_lr: float = 1e-3  # the head's peak
    decoder_warmup_steps: int = 1_500
    grad_clip: float = 20.0
    dropout: float = 0.1
    augment: float = 1.0  # strength of SpecAugment
    batch_s: float = 3_200.0  # seconds of audio a step: about 256 utterances
    batch_tokens: int = 16_384  # text tokens a step. UNSPECIFIED IN PAPER
    target_vocab: int = 1_024  # pieces of the target's tokenizer


# UNSPECIFIED IN PAPER: everything about GLUE and text normalisation, and translation's schedule.
GLUE_RECIPE = Recipe(
    max_steps=10_000, lr=1e-4, warmup_steps=1_000, decoder_lr=1e-4, decoder_warmup_steps=1_000
)
RECIPES = {
    "asr": Recipe(),
    "st": Recipe(target_vocab=8_192),
    **dict.fromkeys(GLUE, GLUE_RECIPE),
    "textnorm": Recipe(batch_tokens=65_536, target_vocab=4_096),
}
# What differs at `tiny`, which has minutes, and two hours of speech: small steps, high rates, targets
# of letters, a third of SpecAugment, and CTC: a transducer needs longer. The head learns first: with
# both at the same rate and warm-up, an encoder that is moved by a head that knows nothing yet did
# not leave CTC's plateau in 1,300 steps (EXPERIMENTS.md, "Recognition").
TINY = dict(
    grad_clip=5.0, lr=2e-3, warmup_steps=1000, decoder_lr=4e-3, decoder_warmup_steps=50,
    dropout=0.0, augment=0.3, batch_s=16.0, batch_tokens=2048,
)  # fmt: skip
TINY_RECIPES = {
    "asr": TINY | dict(head="ctc", max_steps=2500, target_vocab=64),
    "st": TINY | dict(max_steps=2000, target_vocab=600),
    **dict.fromkeys(GLUE, TINY | dict(max_steps=300, warmup_steps=100, decoder_lr=2e-3)),
    "textnorm": TINY | dict(max_steps=500, warmup_steps=200, target_vocab=100),
}


def recipe_of(task: str, size: str) -> Recipe:
    """The recipe of a task at a size."""
    changes = TINY_RECIPES[task] if size == "tiny" else {}
    return dataclasses.replace(RECIPES[task], **changes)


# ------------------------------------------------------------------------------------------- data


def use_demo(args: argparse.Namespace, ranks: Ranks) -> None:
    """No data was given: fill in the demo's."""
    files = evaluate.demo_sets(args.task, args.demo_dir, ranks)
    args.train, args.dev = files["train"], files["dev"]
    args.tokenizer = args.tokenizer or Path(files["tokenizer"])


def train_target_tokenizer(args: argparse.Namespace) -> Tokenizer | None:
    """A tokenizer of the training targets; it goes into the checkpoint. None for a classifier.

    Transcripts are lower case, which is how they are scored; the others keep their case.
    """
    paths = paths_of(args.train)
    if args.task in GLUE:
        return None
    if args.task == "textnorm":
        sentences, _ = read_textnorm(paths)
        lines: Iterable[str] = map(evaluate.sentence_target, sentences)
        symbols = evaluate.NORMALISATION_SYMBOLS
    else:
        manifest, field = Manifest.read(paths), "text" if args.task == "asr" else "translation"
        lines = [manifest.row(i).get(field, "") for i in range(len(manifest))]
        symbols = ()
    case = "lower" if args.task == "asr" else "keep"
    return Tokenizer.train(lines, args.target_vocab, case, symbols=symbols)


def read_sets(
    args: argparse.Namespace, tokenizers: TaskTokenizers, head: HeadConfig
) -> tuple[TaskSet, TaskSet | None]:
    """The training set and the held-out one."""
    limits = {"seed": args.seed, "max_audio_s": args.max_audio_s, "max_tokens": args.max_tokens}
    train = evaluate.read_task_set(
        args.task, args.train, tokenizers, head, augment=args.augment, **limits
    )
    if not args.dev:
        return train, None
    limits |= {"max_audio_s": math.inf, "max_tokens": 10 * args.max_tokens}
    return train, evaluate.read_task_set(args.task, args.dev, tokenizers, head, **limits)


def make_plan(train: TaskSet, head: HeadConfig, args: argparse.Namespace) -> data.BatchPlan:
    """The batch plan of the one stream. A transducer's micro-batches are also bounded by memory:
    a lattice has a score for every frame, every place in the target and every symbol."""
    speech = TASKS[args.task].modality == "speech"
    units = int(FRAMES_PER_S * args.batch_s) if speech else args.batch_tokens
    bound: dict[str, Any] = {}
    if head.kind == "rnnt":
        bytes_a_cell = 2 * 4 * head.vocab_size  # fp32 logits and their gradient
        max_cells = int(args.max_lattice_gib * 2**30 / bytes_a_cell)
        widths = train.rows.target_lens + 1
        largest = int((train.rows.lengths / SUBSAMPLING * widths).max())
        if largest > max_cells:
            raise ValueError(
                f"--max-lattice-gib {args.max_lattice_gib:g}: one row alone needs "
                f"{largest * bytes_a_cell / 2**30:.1f}; raise it, or lower --max-audio-s"
            )
        bound = {"widths": widths, "max_area": SUBSAMPLING * max_cells}
    return data.BatchPlan(
        train.rows.lengths, units, micro_batches=args.micro_batches, seed=args.seed, stream=3,
        **bound,
    )  # fmt: skip


class TaskData(Dataset):
    """Micro-batches by (step, k), with one static shape a bucket."""

    def __init__(self, rows: Any, plan: data.BatchPlan) -> None:
        self.rows, self.plan = rows, plan
        self.target_len = plan.bucket_max(rows.target_lens)

    def __getitem__(self, step_and_k: tuple[int, int]) -> TaskBatch:
        chosen, epochs, bucket_len = self.plan.micro_batch(*step_and_k)
        return self.rows.collate(chosen, epochs, bucket_len, self.target_len[bucket_len])


# ------------------------------------------------------------------------------------ checkpoints


@dataclasses.dataclass
class Run:
    """All that a run consists of once its arguments have been understood."""

    args: argparse.Namespace
    ranks: Ranks
    model: TaskModel
    optimizer: torch.optim.Optimizer
    train: TaskSet
    dev: TaskSet | None
    plan: data.BatchPlan
    tokenizers: TaskTokenizers
    identity: dict[str, Any]
    start_step: int

    def contents(self) -> dict[str, Any]:
        """What evaluate.py needs to use the model."""
        stored = {}
        for name, tokenizer in zip(("tokenizer", "target_tokenizer"), self.tokenizers):
            model_bytes = list(tokenizer.model_bytes) if tokenizer else None
            stored[name] = torch.tensor(model_bytes, dtype=torch.uint8) if model_bytes else None
        return stored | {
            "entry_point": ME,
            "task": self.args.task,
            "model": self.model.state_dict(),
            "config": dataclasses.asdict(self.model.encoder.config),
            "modalities": list(self.model.encoder.modalities),
            "head": json.loads(json.dumps(dataclasses.asdict(self.model.head_config))),
            "max_audio_s": self.args.max_audio_s,
            "max_tokens": self.args.max_tokens,
            "args": {"micro_batches": self.args.micro_batches, "size": self.args.size},
        }

    def save(self, step: int) -> None:
        """Write what a resumed run needs, on rank 0."""
        if self.ranks.rank == 0:
            contents = {"optimizer": self.optimizer.state_dict(), "run": self.identity}
            training.save_checkpoint(
                self.args.out_dir, step, self.contents() | contents,
                self.args.keep_last, self.args.keep_every,
            )  # fmt: skip

    def dev_scores(self) -> dict[str, Any]:
        """Decode and score the held-out set; its answers are in dev.answers.tsv."""
        search = evaluate.Search(batch_units=self.plan.units_per_micro)
        model, target = self.model, self.tokenizers.target
        answers = evaluate.answer_all(model, self.dev, target, search, self.ranks)
        if self.ranks.rank == 0:
            evaluate.write_answers(self.args.out_dir / "dev.answers.tsv", self.dev, answers)
        how = model.head_config, self.args.normaliser
        return evaluate.score(self.args.task, self.dev, answers, *how)

    def held_out(self, step: int) -> training.Evaluation:
        """Score the held-out set, and keep the weights if they are among the best."""
        scores, its = self.dev_scores(), TASKS[self.args.task]
        enough = False
        if self.ranks.rank == 0:
            enough = self.keep_best(step, scores[its.score], its.higher_is_better)
        flag = torch.tensor(float(enough), device=self.ranks.device)
        figures = {k: float(v) for k, v in scores.items() if isinstance(v, (int, float))}
        return training.Evaluation(
            figures, f"  {json.dumps(scores)}", enough=bool(self.ranks.sum(flag))
        )

    def keep_best(self, step: int, value: float, higher_is_better: bool) -> bool:
        """Keep these weights if they are among the best --average; the best are ckpt/best.pt.

        Returns: True when the best is --patience evaluations old.
        """
        folder = self.args.out_dir / "ckpt"
        record = folder / "scores.json"
        history = json.loads(record.read_text()) if record.exists() else []
        history = [entry for entry in history if entry[0] < step] + [[step, value]]
        ranked = sorted(history, key=lambda e: (-e[1] if higher_is_better else e[1], e[0]))
        kept = {f"dev_{its_step:07d}.pt" for its_step, _ in ranked[: max(1, self.args.average)]}
        contents = self.contents() | {"step": step, "dev": value}
        if f"dev_{step:07d}.pt" in kept:
            path = folder / f"dev_{step:07d}.pt"
            training.write_atomically(path, lambda file: torch.save(contents, file))
        if ranked[0][0] == step:
            training.write_atomically(folder / "best.pt", lambda file: torch.save(contents, file))
        for old in folder.glob("dev_*.pt"):
            if old.name not in kept:
                old.unlink()
        text = json.dumps(history) + "\n"
        training.write_atomically(record, lambda file: file.write(text.encode()))
        since_best = len(history) - 1 - history.index(ranked[0])
        return bool(self.args.patience) and since_best >= self.args.patience


def average_weights(paths: list[Path]) -> dict[str, Tensor]:
    """The mean of several checkpoints' weights; buffers of whole numbers are the last one's."""
    models = [training.load_checkpoint(path)["model"] for path in paths]
    return {
        name: (
            torch.stack([model[name].double() for model in models]).mean(0).to(value.dtype)
            if value.is_floating_point()
            else value
        )
        for name, value in models[-1].items()
    }


# ------------------------------------------------------------------------------- starting a run


def resolve(args: argparse.Namespace, ranks: Ranks, initial: dict[str, Any] | None) -> HeadConfig:
    """Fill in what depends on task and size -> the head, but for its tokenizer's size.

    Raises: ValueError for what cannot be.
    """
    its = TASKS[args.task]
    args.size = args.size or (initial["args"]["size"] if initial else "tiny")
    for name, value in dataclasses.asdict(recipe_of(args.task, args.size)).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    training.check_numbers(
        args,
        from_1=("max_steps", "micro_batches", "log_every", "save_every", "keep_last",
                "max_bad_steps", "batch_tokens", "target_vocab", "max_tokens"),
        from_0=("lr", "decoder_lr", "seed", "num_workers", "warmup_steps", "decoder_warmup_steps",
                "weight_decay", "eval_every", "keep_every", "average", "patience"),
        above_0=("grad_clip", "batch_s", "max_audio_s", "max_lattice_gib"),
    )  # fmt: skip
    if not 0 <= args.augment <= 1:
        raise ValueError(f"--augment {args.augment}: expected a share from 0 to 1")
    if not 0 <= args.dropout < 1:
        raise ValueError(f"--dropout {args.dropout}: expected a share from 0 to below 1")
    args.head = args.head or its.heads[0]
    if args.head not in its.heads:
        raise ValueError(f"--head {args.head}: {args.task} has {' or '.join(its.heads)}")
    args.dtype = training.resolve_dtype(args.dtype, ranks.device)
    args.eval_every = args.eval_every or max(1, args.max_steps // 5)
    args.out_dir = args.out_dir or Path("runs") / args.task
    args.loss_weights = {}
    return HeadConfig(
        args.head,
        labels=GLUE[args.task].labels if args.task in GLUE else (),
        tags=tuple(args.targets.split(",")) if args.task == "st" else ("",),
        dropout=args.dropout,
        **HEAD_SIZES[args.size],
    )


def find_tokenizers(
    args: argparse.Namespace, checkpoint: dict[str, Any] | None, resumed: bool
) -> TaskTokenizers:
    """The encoder's tokenizer is the checkpoint's or --tokenizer; the target's is trained once."""

    def stored(name: str) -> Tokenizer | None:
        part = checkpoint.get(name) if checkpoint else None
        return None if part is None else Tokenizer(bytes(part.tolist()))

    source = stored("tokenizer")
    if source is None and args.tokenizer:
        source = Tokenizer.load(args.tokenizer)
    if source is None and TASKS[args.task].modality == "text":
        raise ValueError(f"--tokenizer is missing: {args.task} reads text")
    target = stored("target_tokenizer") if resumed else train_target_tokenizer(args)
    return TaskTokenizers(source, target)


def build(
    args: argparse.Namespace,
    ranks: Ranks,
    head: HeadConfig,
    tokenizers: TaskTokenizers,
    initial: dict[str, Any] | None,
) -> TaskModel:
    """The model: its encoder from a pre-training checkpoint, or from scratch; its head new."""
    modality = TASKS[args.task].modality
    if initial:
        config = SlamConfig(**initial["config"])
    else:
        vocabulary = {"vocab_size": tokenizers.source.vocab_size} if tokenizers.source else {}
        config = sized(args.size, **vocabulary)
    torch.manual_seed(args.seed)
    model = TaskModel(dataclasses.replace(config, dropout=args.dropout), modality, head)
    model.to(ranks.device, torch.float64 if args.dtype == "fp64" else torch.float32)
    if not initial:
        return model
    weights = initial.get("carried", {}) | initial["model"]
    own = {name: value for name, value in model.state_dict().items() if name.startswith("encoder.")}
    if missing := sorted(own.keys() - weights.keys()):
        part = missing[0].split(".")[1]
        raise ValueError(
            f"--init: the checkpoint has no {missing[0]}: it was pre-trained without {part}"
        )
    model.load_state_dict({name: weights[name] for name in own}, strict=False)
    ranks.log(f"init: {len(own)} tensors of the encoder taken, the {head.kind} head is new")
    return model


def prepare(args: argparse.Namespace, ranks: Ranks) -> Run | None:
    """From the command line to a run that can start; None when there is nothing to run."""
    args.out_dir = args.out_dir or Path("runs") / args.task
    args.init = None if str(args.init) == "none" else args.init
    resumed, initial, path = training.find_start(args, ME, ("pretrain.py", ME))
    head = resolve(args, ranks, resumed or initial)
    training.resolve_micro_batches(args, ranks, resumed)
    if not args.train and not args.dev:
        use_demo(args, ranks)
    if not args.train:
        raise ValueError("--train is missing: give it beside --dev, or neither for the demo")
    tokenizers = find_tokenizers(args, resumed or initial, bool(resumed))
    vocab_size = tokenizers.target.vocab_size if tokenizers.target else 0
    head = dataclasses.replace(head, vocab_size=vocab_size)
    train, dev = read_sets(args, tokenizers, head)
    plan = make_plan(train, head, args)
    for reason, count in train.rows.left_out.items():
        ranks.log(f"{args.train}: {count} rows left out: {reason}")
    model = build(args, ranks, head, tokenizers, resumed or initial)
    ranks.log(describe(model, plan, args))
    if args.dry_run:
        return None
    identity, start_step = identity_of(args, model, train), 0
    if not (resumed or initial) and model.modality == "speech":
        mean, std = data.feature_statistics(train.rows.manifest, seed=args.seed)
        model.encoder.speech.feature_mean.copy_(torch.from_numpy(mean))
        model.encoder.speech.feature_std.copy_(torch.from_numpy(std))
    rate = Rate(args.decoder_lr / args.lr if args.lr else 1.0, args.decoder_warmup_steps)
    optimizer = training.make_optimizer(model, args.weight_decay, {"head": rate})
    if resumed:
        changed = training.check_same_run(resumed["run"], identity, path)
        start_step = resumed["step"]
        if start_step >= args.max_steps:
            ranks.log(f"{path}: this run has made its {args.max_steps} steps; raise --max-steps")
            return None
        model.load_state_dict(resumed["model"])
        training.load_optimizer(optimizer, resumed["optimizer"])
        ranks.log("\n  ".join([f"resumed {path} at step {start_step}", *changed]))
    training.make_fast(model, args.fast, ranks.device)
    return Run(args, ranks, model, optimizer, train, dev, plan, tokenizers, identity, start_step)


def identity_of(
    args: argparse.Namespace, model: TaskModel, train: TaskSet
) -> dict[str, dict[str, Any]]:
    """What a run is: as in pretrain.py."""
    same = {
        "--task, --head, --targets and their sizes": dataclasses.asdict(model.head_config),
        "--size and --dropout": dataclasses.asdict(model.encoder.config),
        "--augment": args.augment,
        "--seed": args.seed,
        "--batch-s, --batch-tokens": [args.batch_s, args.batch_tokens],
        "--max-audio-s, --max-tokens": [args.max_audio_s, args.max_tokens],
        "--max-lattice-gib": args.max_lattice_gib,
        "the data (rows and hash)": [len(train.rows.lengths), train.rows.fingerprint],
    }
    may_change = {
        f"--{name.replace('_', '-')}": getattr(args, name)
        for name in ("lr", "decoder_lr", "warmup_steps", "decoder_warmup_steps", "weight_decay",
                     "grad_clip", "dtype")
    }  # fmt: skip
    return json.loads(json.dumps({"same": same, "may change": may_change}))


def describe(model: TaskModel, plan: data.BatchPlan, args: argparse.Namespace) -> str:
    """What a run is, before it starts."""
    sizes = [sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.head)]
    encoder, head = (f"{n / 1e6:.2f} M" for n in sizes)
    lines = [f"{args.task}: encoder {encoder}, {model.head_config.kind} head {head} parameters"]
    peaks = f"encoder {args.lr:g} after {args.warmup_steps} steps, head {args.decoder_lr:g} after"
    lines.append(f"  peak rates: {peaks} {args.decoder_warmup_steps}; {args.max_steps} steps")
    lines.append(pretrain.plan_table({model.modality: plan}))
    return "\n".join(lines)


def finish(run: Run) -> None:
    """Report the best held-out score; average the best weights if that was asked for."""
    folder, key = run.args.out_dir / "ckpt", TASKS[run.args.task].score
    if run.dev is None:
        return
    run.ranks.wait()  # for rank 0's files
    best = training.load_checkpoint(folder / "best.pt")
    run.ranks.log(f"best held-out {key} {best['dev']:.4f} at step {best['step']}: ckpt/best.pt")
    paths = sorted(folder.glob("dev_*.pt"))
    if run.args.average > 1 and len(paths) > 1:
        run.model.load_state_dict(average_weights(paths))
        value, path = run.dev_scores()[key], folder / "average.pt"
        if run.ranks.rank == 0:
            contents = run.contents() | {"step": best["step"], "dev": value}
            training.write_atomically(path, lambda file: torch.save(contents, file))
        run.ranks.log(f"mean of the {len(paths)} best weights: {key} {value:.4f}: ckpt/average.pt")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line; defaults that belong to task and size stay None until they are known."""
    parser = argparse.ArgumentParser(
        description="Fine-tune SLAM. With no data arguments: on the embedded demo corpus."
    )
    parser.add_argument("--task", choices=TASKS, required=True)
    add = parser.add_argument_group("data").add_argument
    add("--train", metavar="FILES", help="manifests, GLUE's TSV or Google's files, comma separated")
    add("--dev", metavar="FILES", help="held-out set; the best weights are chosen by it")
    add("--targets", default="de", help="target languages of st, comma separated (%(default)s)")
    add("--tokenizer", type=Path, help="the encoder's, for --init none (default: the demo's)")
    add("--target-vocab", type=int, help="pieces of the target tokenizer (default: the task's)")
    add("--demo-dir", type=Path, default=Path("demo_data"), help="(default: %(default)s)")
    add("--max-audio-s", type=float, default=30.0, help="longer rows are left out (%(default)s)")
    add("--max-tokens", type=int, default=512, help="longer texts are left out (%(default)s)")
    add("--batch-s", type=float, help="seconds of audio a step, all ranks")
    add("--batch-tokens", type=int, help="text tokens a step, all ranks")
    add("--max-lattice-gib", type=float, default=4.0, help="of a transducer (%(default)s)")
    add = parser.add_argument_group("model and optimisation").add_argument
    add("--size", choices=SIZES, help="the recipe's, and the model's with --init none")
    add("--head", choices=("rnnt", "ctc"), help="of asr (default: rnnt)")
    add("--dropout", type=float, help="in encoder and head (default: the task's)")
    add("--augment", type=float, help="strength of SpecAugment, 0 to 1 (default: the task's)")
    add("--decoder-lr", type=float, help="peak rate of the head (--lr is the encoder's)")
    add("--decoder-warmup-steps", type=int, help="of the head (--warmup-steps: the encoder's)")
    add("--normaliser", choices=evaluate.NORMALISERS, default="case", help="of words (%(default)s)")
    add("--patience", type=int, default=0, help="evaluations without a better one (0: no limit)")
    add("--average", type=int, default=0, help="in the end, average the N best weights (0: not)")
    add("--out-dir", type=Path, help="(default: runs/TASK)")
    training.add_arguments(parser)
    parser.set_defaults(init=Path("runs/demo"), save_every=200)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """The entry point."""
    args = parse_arguments(argv)

    def fine_tune(ranks: Ranks) -> int:
        run = prepare(args, ranks)
        if run is None:
            return 0
        stopped_by = training.follow(
            run.model, TaskData(run.train.rows, run.plan), args, ranks, run.start_step,
            optimizer=run.optimizer, save=run.save,
            evaluate=run.held_out if run.dev else None,
            about={"config": dataclasses.asdict(run.model.encoder.config)},
        )  # fmt: skip
        if not stopped_by:
            finish(run)
        return stopped_by

    training.run_entry_point(fine_tune)


if __name__ == "__main__":
    main()
