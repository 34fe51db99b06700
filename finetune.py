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

Public:  Recipe, RECIPES, BestWeights, average_weights. Everything else serves main().
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Iterable
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
from training import Ranks, Rate

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
# What differs at `tiny`, which has minutes and two hours of speech: small steps, high rates, a
# third of SpecAugment, targets of letters, and CTC (a transducer needs longer). The head learns
# first: with both at the same rate and warm-up, an encoder that is moved by a head that knows
# nothing yet did not leave CTC's plateau in 1,300 steps (EXPERIMENTS.md, "Recognition").
TINY = dict(
    grad_clip=5.0, lr=2e-3, warmup_steps=1000, decoder_lr=4e-3, decoder_warmup_steps=50,
    dropout=0.0, augment=0.3, batch_s=16.0, batch_tokens=2048,
)  # fmt: skip
TINY_GLUE = TINY | dict(max_steps=900, lr=1e-3, warmup_steps=200, decoder_lr=1e-3,
                        decoder_warmup_steps=200, batch_tokens=1024)  # fmt: skip
TINY_RECIPES = {
    "asr": TINY | dict(head="ctc", max_steps=2500, target_vocab=64),
    "st": TINY | dict(max_steps=2000, target_vocab=600),
    **dict.fromkeys(GLUE, TINY_GLUE),
    "sst2": TINY_GLUE | dict(max_steps=300),
    "textnorm": TINY | dict(max_steps=800, lr=1e-3, warmup_steps=200, target_vocab=100),
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
    if not args.init:  # else the checkpoint has it
        args.tokenizer = args.tokenizer or Path(files["tokenizer"])


def train_target_tokenizer(args: argparse.Namespace, head: HeadConfig) -> Tokenizer | None:
    """A tokenizer of the training targets; it goes into the checkpoint. None for a classifier.

    Transcripts are lower case, which is how they are scored; the others are exact: what is not kept
    can never be answered.
    """
    paths, symbols = paths_of(args.train), ()
    if args.task in GLUE:
        return None
    if args.task == "textnorm":
        sentences, _ = read_textnorm(paths)
        lines: Iterable[str] = map(evaluate.sentence_target, sentences)
        symbols = evaluate.NORMALISATION_SYMBOLS
    else:
        manifest = Manifest.read(paths, text_required=args.task == "asr")
        lines, _ = evaluate.spoken_references(manifest, head.tags)
    case = "lower" if args.task == "asr" else "exact"
    try:
        return Tokenizer.train(lines, args.target_vocab, case, symbols=symbols)
    except ValueError as error:
        message = str(error).replace("--vocab-size", "--target-vocab")
        raise ValueError(f"{args.train}: {message}") from error


def read_sets(
    args: argparse.Namespace, tokenizers: TaskTokenizers, head: HeadConfig
) -> tuple[TaskSet, TaskSet | None]:
    """The training set and the held-out one."""
    limits = {"seed": args.seed, "max_audio_s": args.max_audio_s, "max_tokens": args.max_tokens,
              "on_device": args.log_mel == "device"}  # fmt: skip
    train = evaluate.read_task_set(
        args.task, args.train, tokenizers, head, augment=args.augment, **limits
    )
    if not args.dev:
        return train, None
    limits["max_audio_s"] = math.inf  # as evaluate.py will score it
    dev = evaluate.read_task_set(args.task, args.dev, tokenizers, head, **limits)
    if not any(dev.references):
        raise ValueError(f"--dev {args.dev}: has no labels to choose the best weights by")
    return train, dev


def make_plan(train: TaskSet, head: HeadConfig, args: argparse.Namespace) -> data.BatchPlan:
    """The batch plan of the one stream. A transducer's micro-batches are also bounded by memory:
    a lattice has a cell for every frame and every place in the target, and in each cell the joint
    network's width and a score for every symbol, several times over.

    Raises: ValueError where the bound is too low for a single row.
    """
    rows, speech = train.rows, TASKS[args.task].modality == "speech"
    units = int(FRAMES_PER_S * args.batch_s) if speech else args.batch_tokens
    how = {"micro_batches": args.micro_batches, "seed": args.seed, "stream": 3}
    if head.kind != "rnnt":
        return data.BatchPlan(rows.lengths, units, **how)
    # fp32: the logits and their gradient; of the joint its sum, tanh and gradient
    gib_a_cell = 4 * (2 * head.vocab_size + 3 * head.joint_dim) / 2**30
    max_area = int(SUBSAMPLING * args.max_lattice_gib / gib_a_cell)  # log-mel frames x places
    widths = rows.target_lens + 1
    plan = data.BatchPlan(rows.lengths, units, widths=widths, max_area=max_area, **how)
    # A row alone is padded, too: to the longest and the widest of its bucket.
    largest = max(length * width for length, width in plan.bucket_max(widths).items())
    if largest > max_area:
        raise ValueError(
            f"--max-lattice-gib {args.max_lattice_gib:g}: one row alone needs "
            f"{largest / SUBSAMPLING * gib_a_cell:.2g}; raise it, or lower --max-audio-s"
        )
    return plan


class TaskData(Dataset):
    """Micro-batches by (step, k), with one static shape a bucket."""

    def __init__(self, rows: Any, plan: data.BatchPlan) -> None:
        self.rows, self.plan = rows, plan
        self.target_len = plan.bucket_max(rows.target_lens)

    def __getitem__(self, step_and_k: tuple[int, int]) -> TaskBatch:
        chosen, epochs, bucket_len = self.plan.micro_batch(*step_and_k)
        its, most = self.rows, self.target_len[bucket_len]
        if not self.audio_rows:
            return its.collate(chosen, epochs, bucket_len, most)
        stand_ins = data.StandIns(self.plan, bucket_len, "train", [])
        return its.collate(chosen, epochs, bucket_len, most, stand_ins)

    @property
    def audio_rows(self) -> dict[str, int]:
        """Number of utterances, if that is what the rows are."""
        speech = isinstance(self.rows, evaluate.SpeechTaskRows)
        return {"train": len(self.rows.manifest)} if speech else {}


# ------------------------------------------------------------------------------------ checkpoints


class BestWeights:
    """The held-out scores of a run, and the weights of the best of them, in its folder ckpt/.

    dev_0000100.pt and so on are the best n_kept, best.pt is a copy of the best of all, and
    held_out.json lists [step, score]. Only rank 0 has one.
    """

    @classmethod
    def of_run(cls, args: argparse.Namespace, start_step: int) -> BestWeights:
        """As the command line wants them."""
        n_kept = max(1, args.average) if args.average_of == "best" else 1
        higher_is_better = TASKS[args.task].higher_is_better
        return cls(args.out_dir / "ckpt", n_kept, higher_is_better, start_step)

    def __init__(self, folder: Path, n_kept: int, higher_is_better: bool, start_step: int) -> None:
        """Go on at start_step. What the run did after it, it will do again: that is forgotten."""
        self.folder, self.n_kept, self.sign = folder, n_kept, -1 if higher_is_better else 1
        self._record, self._copied = folder / "held_out.json", None
        known = json.loads(self._record.read_text()) if self._record.exists() else []
        self.scores: list[list[float]] = [entry for entry in known if entry[0] <= start_step]
        if len(self.scores) < len(known):
            self._tidy()

    def _path(self, step: int) -> Path:
        return self.folder / f"dev_{step:07d}.pt"

    def _kept(self) -> list[int]:
        """Steps whose weights are there, the best first, and of equals the earlier."""
        there = [(self.sign * v, step) for step, v in self.scores if self._path(step).exists()]
        return [step for _, step in sorted(there)]

    def _tidy(self) -> None:
        """Bring the files in line with the scores."""
        kept = self._kept()[: self.n_kept]
        for path in set(self.folder.glob("dev_*.pt")) - {self._path(step) for step in kept}:
            path.unlink()
        best = self.folder / "best.pt"
        if not kept:
            best.unlink(missing_ok=True)
        elif kept[0] != self._copied:
            weights = self._path(kept[0]).read_bytes()
            training.write_atomically(best, lambda file: file.write(weights))
            self._copied = kept[0]
        text = json.dumps(self.scores) + "\n"
        training.write_atomically(self._record, lambda file: file.write(text.encode()))

    def add(self, step: int, value: float, contents: dict[str, Any]) -> bool:
        """Keep these weights if they are among the best. Returns: whether they are the best."""
        self.scores = [entry for entry in self.scores if entry[0] < step] + [[step, value]]
        contents = contents | {"step": step, "dev": value}
        training.write_atomically(self._path(step), lambda file: torch.save(contents, file))
        self._tidy()
        return self._copied == step

    def since_best(self) -> int:
        """How many evaluations there were after the best one."""
        values = [self.sign * value for _, value in self.scores]
        return len(values) - 1 - values.index(min(values)) if values else 0


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
    start_step: int = 0
    best: BestWeights | None = None  # of rank 0

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
            "longest_s": float(self.train.rows.lengths.max()) / FRAMES_PER_S,
            "max_tokens": self.args.max_tokens,
            "args": {
                name: getattr(self.args, name) for name in ("micro_batches", "size", "fp32_matmul")
            },
        }

    def save(self, step: int) -> None:
        """Write what a resumed run needs, on rank 0."""
        if self.ranks.rank == 0:
            contents = {"optimizer": self.optimizer.state_dict(), "run": self.identity}
            training.save_checkpoint(
                self.args.out_dir, step, self.contents() | contents,
                self.args.keep_last, self.args.keep_every,
            )  # fmt: skip

    def dev_scores(self) -> tuple[dict[str, Any], list[str]]:
        """Decode the held-out set -> its scores and the answers."""
        search = evaluate.Search(batch_units=self.plan.units_per_micro)
        model, target = self.model, self.tokenizers.target
        answers = evaluate.answer_all(model, self.dev, target, search, self.ranks)
        how = model.head_config, self.args.normaliser
        return evaluate.score(self.args.task, self.dev, answers, *how), answers

    def held_out(self, step: int) -> training.Evaluation:
        """Score the held-out set. If it is the best so far, its answers are in dev.answers.tsv."""
        scores, answers = self.dev_scores()
        if self.ranks.rank == 0:
            value = scores[TASKS[self.args.task].score]
            if self.best.add(step, value, self.contents()):
                evaluate.write_answers(self.args.out_dir / "dev.answers.tsv", self.dev, answers)
        figures = {k: float(v) for k, v in scores.items() if isinstance(v, (int, float))}
        return training.Evaluation(figures, f"  {json.dumps(scores)}", enough=self.is_enough())

    def is_enough(self) -> bool:
        """Whether the best score is --patience evaluations old; all ranks learn it from rank 0."""
        patience = self.args.patience
        return self._tell(bool(patience and self.best and self.best.since_best() >= patience))

    def owes_score(self) -> bool:
        """Whether the run was killed after it saved its weights and before it scored them."""
        step, every = self.start_step, self.args.eval_every
        if not self.dev or not step or (step < self.args.max_steps and (not every or step % every)):
            return False
        scores = self.best.scores if self.best else []
        return not self._tell(bool(scores and scores[-1][0] == step))

    def _tell(self, answer: bool) -> bool:
        return bool(self.ranks.sum(torch.tensor(float(answer), device=self.ranks.device)))

    def resume(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Go on from a checkpoint of this run. Raises ValueError where it is of another."""
        changed = training.check_same_run(checkpoint["run"], self.identity, path)
        self.start_step = checkpoint["step"]
        self.model.load_state_dict(checkpoint["model"])
        training.load_optimizer(self.optimizer, checkpoint["optimizer"])
        self.ranks.log("\n  ".join([f"resumed {path} at step {self.start_step}", *changed]))


def average_weights(paths: list[Path]) -> dict[str, Tensor]:
    """The mean of several checkpoints' weights; buffers of whole numbers are the last one's."""
    total: dict[str, Tensor] = {}
    for path in paths:  # one after the other: there may be no room for all
        weights = training.load_checkpoint(path)["model"]
        for name, value in weights.items():
            total[name] = total.get(name, 0) + value.double()
    return {
        name: (total[name] / len(paths) if value.is_floating_point() else value).to(value.dtype)
        for name, value in weights.items()
    }


# ------------------------------------------------------------------------------- starting a run


def resolve(args: argparse.Namespace, ranks: Ranks, start: dict[str, Any] | None) -> None:
    """Fill in what depends on the task, the size and the checkpoint to start from.

    Raises: ValueError for numbers that cannot be.
    """
    args.size = args.size or (start["args"]["size"] if start else "tiny")
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
        part=("augment", "max_bad_share"),
    )  # fmt: skip
    if not 0 <= args.dropout < 1:
        raise ValueError(f"--dropout {args.dropout}: expected a share from 0 to below 1")
    args.dtype = training.resolve_dtype(args.dtype, ranks.device)
    args.log_mel = training.resolve_log_mel(args.log_mel, ranks.device)
    if args.eval_every is None:
        args.eval_every = max(1, args.max_steps // 5)
    if args.average_of == "last":
        args.keep_last = max(args.keep_last, args.average)
    args.loss_weights = {}


def head_of(args: argparse.Namespace) -> HeadConfig:
    """The head, but for the size of its tokenizer.

    Raises: ValueError for a head or languages that cannot be.
    """
    heads, languages = TASKS[args.task].heads, tuple(args.targets.split(","))
    args.head = args.head or heads[0]
    if args.head not in heads:
        raise ValueError(f"--head {args.head}: {args.task} has {' or '.join(heads)}")
    if len(set(languages)) < len(languages) or "" in languages:
        raise ValueError(f"--targets {args.targets!r}: expected languages, each once, as de,ca")
    return HeadConfig(
        args.head,
        labels=GLUE[args.task].labels if args.task in GLUE else (),
        tags=languages if args.task == "st" else ("",),
        dropout=args.dropout,
        **HEAD_SIZES[args.size],
    )


def find_tokenizers(
    args: argparse.Namespace,
    head: HeadConfig,
    checkpoint: dict[str, Any] | None,
    resumed: bool,
    log: Callable[[str], None],
) -> TaskTokenizers:
    """The encoder's tokenizer is the checkpoint's or --tokenizer; the target's is trained once.

    Raises: ValueError where the first is missing, or both are there and differ.
    """

    def stored(name: str) -> Tokenizer | None:
        part = checkpoint.get(name) if checkpoint else None
        return None if part is None else Tokenizer(bytes(part.tolist()))

    kept, given = stored("tokenizer"), args.tokenizer and Tokenizer.load(args.tokenizer)
    if kept and given and kept.fingerprint != given.fingerprint:
        raise ValueError(
            f"--tokenizer {args.tokenizer}: is not the one that the checkpoint was trained with; "
            "leave the flag out"
        )
    source = kept or given or None
    if args.task == "textnorm" and source and source.text_case == "lower":
        log("the encoder's tokenizer is lower case: `US` and `us` read alike (data.py tokenizer "
            "--text-case keep makes another)")  # fmt: skip
    if source is None and TASKS[args.task].modality == "text":
        raise ValueError(f"--tokenizer is missing: {args.task} reads text")
    target = stored("target_tokenizer") if resumed else train_target_tokenizer(args, head)
    return TaskTokenizers(source, target)


def find_start(
    args: argparse.Namespace,
) -> tuple[dict[str, Any] | None, dict[str, Any] | None, Path | None]:
    """As training.find_start; the start that is missing by default is explained.

    Raises: also ValueError where the run to resume is of another task.
    """
    args.init = None if str(args.init) == "none" else args.init
    try:
        resumed, initial, path = training.find_start(args, ME, ("pretrain.py", ME))
    except FileNotFoundError as error:
        advice = "" if args.resume else "; `python pretrain.py` makes one, --init none needs none"
        raise FileNotFoundError(f"{error}{advice}") from error
    if resumed and resumed["task"] != args.task:
        raise ValueError(f"{path}: cannot be resumed, it is a run of --task {resumed['task']}")
    return resumed, initial, path


def build(
    args: argparse.Namespace,
    head: HeadConfig,
    tokenizers: TaskTokenizers,
    checkpoint: dict[str, Any] | None,
) -> TaskModel:
    """The model with random weights, its encoder as large as the checkpoint's if there is one."""
    if checkpoint:
        config = SlamConfig(**checkpoint["config"])
    else:
        vocabulary = {"vocab_size": tokenizers.source.vocab_size} if tokenizers.source else {}
        config = sized(args.size, **vocabulary)
    torch.manual_seed(args.seed)
    config = dataclasses.replace(config, dropout=args.dropout)
    return TaskModel(config, TASKS[args.task].modality, head)


def initialise(model: TaskModel, initial: dict[str, Any]) -> str:
    """Take the encoder's weights from another run -> a line about it.

    Raises: ValueError where the other run had no such encoder.
    """
    weights = initial.get("carried", {}) | initial["model"]
    own = [name for name in model.state_dict() if name.startswith("encoder.")]
    if missing := [name for name in own if name not in weights]:
        raise ValueError(
            f"--init: the checkpoint has no {missing[0]}: it was trained without {model.modality}"
        )
    model.load_state_dict({name: weights[name] for name in own}, strict=False)
    head = model.head_config.kind
    return f"init: {len(own)} tensors of the encoder taken, the {head} head is new"


def estimate_statistics(model: TaskModel, train: TaskSet, seed: int) -> None:
    """Standardise speech by the training set's own statistics: there are no others."""
    mean, std = data.feature_statistics(train.rows.manifest, seed=seed)
    model.encoder.speech.feature_mean.copy_(torch.from_numpy(mean))
    model.encoder.speech.feature_std.copy_(torch.from_numpy(std))


def prepare(args: argparse.Namespace, ranks: Ranks) -> Run | None:
    """From the command line to a run that can start; None for --dry-run."""
    args.out_dir = args.out_dir or Path("runs") / args.task
    resumed, initial, path = find_start(args)
    resolve(args, ranks, resumed or initial)
    head = head_of(args)
    training.resolve_micro_batches(args, ranks, resumed)
    if not args.train and not args.dev:
        use_demo(args, ranks)
    if not args.train:
        raise ValueError("--train is missing: give it beside --dev, or neither for the demo")
    tokenizers = find_tokenizers(args, head, resumed or initial, bool(resumed), ranks.log)
    vocab_size = tokenizers.target.vocab_size if tokenizers.target else 0
    head = dataclasses.replace(head, vocab_size=vocab_size)
    train, dev = read_sets(args, tokenizers, head)
    plan = make_plan(train, head, args)
    for reason, count in (train.malformed | train.rows.left_out).items():
        ranks.log(f"{args.train}: {count} rows left out: {reason}")
    if dev:
        evaluate.say_what_is_missing(args.dev, dev, ranks)
    model = build(args, head, tokenizers, resumed or initial)
    model.to(ranks.device, torch.float64 if args.dtype == "fp64" else torch.float32)
    if initial:
        ranks.log(initialise(model, initial))
    ranks.log(describe(model, plan, args))
    if args.dry_run:
        return None
    rate = Rate(warmup_steps=args.decoder_warmup_steps, peak=args.decoder_lr, name="head")
    optimizer = training.make_optimizer(model, args.weight_decay, {"head": rate})
    identity = identity_of(args, model, train, dev)
    run = Run(args, ranks, model, optimizer, train, dev, plan, tokenizers, identity)
    if resumed:
        run.resume(resumed, path)
    elif not initial and model.modality == "speech":
        estimate_statistics(model, train, args.seed)
    if ranks.rank == 0:
        run.best = BestWeights.of_run(args, run.start_step)
    training.make_fast(model, args, ranks, resumed and resumed["args"].get("fp32_matmul"))
    return run


def identity_of(
    args: argparse.Namespace, model: TaskModel, train: TaskSet, dev: TaskSet | None
) -> dict[str, dict[str, Any]]:
    """What a run is: as in pretrain.py."""
    head = dataclasses.asdict(model.head_config)
    same = {
        "--dropout": head.pop("dropout"),
        "--task, --head, --targets and their sizes": head,
        "--size": dataclasses.asdict(model.encoder.config),
        "--augment": args.augment,
        "--seed": args.seed,
        "--batch-s, --batch-tokens": [args.batch_s, args.batch_tokens],
        "--max-audio-s, --max-tokens": [args.max_audio_s, args.max_tokens],
        "--max-lattice-gib": args.max_lattice_gib,
        "--target-vocab": args.target_vocab,
        "--normaliser": args.normaliser,
        "the data (rows and hash)": [len(train.rows.lengths), train.rows.fingerprint],
        "the held-out data (hash)": dev and dev.rows.fingerprint,
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
    """Report the best held-out score; average weights if that was asked for."""
    args, ranks, folder = run.args, run.ranks, run.args.out_dir / "ckpt"
    ranks.wait()  # for rank 0's files
    key, contents, figure = TASKS[args.task].score, run.contents(), ""
    if run.dev:
        best = training.load_checkpoint(folder / "best.pt")
        ranks.log(f"best held-out {key} {best['dev']:.4f} at step {best['step']}: ckpt/best.pt")
    kind = "dev" if args.average_of == "best" else "step"
    paths = sorted(folder.glob(f"{kind}_*.pt"))[-args.average :]
    if args.average < 2 or len(paths) < 2:
        return
    run.model.load_state_dict(average_weights(paths))
    contents |= {"model": run.model.state_dict(), "averaged": [path.name for path in paths]}
    contents["step"] = int(paths[-1].stem.split("_")[-1])
    if run.dev:
        scores, answers = run.dev_scores()
        contents["dev"], figure = scores[key], f"held-out {key} {scores[key]:.4f}, "
    if ranks.rank == 0:
        training.write_atomically(folder / "average.pt", lambda file: torch.save(contents, file))
        if run.dev:
            evaluate.write_answers(args.out_dir / "average.answers.tsv", run.dev, answers)
    ranks.log(f"mean of the {len(paths)} {args.average_of} weights: {figure}ckpt/average.pt")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line; defaults that belong to task and size stay None until they are known."""
    parser = argparse.ArgumentParser(
        description="Fine-tune SLAM from --init (default: runs/demo; none: from scratch). "
        "With no data arguments: on the embedded demo corpus."
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
    add(
        "--max-lattice-gib",
        type=float,
        default=4.0,
        help="memory of a transducer's lattices and their gradients, a micro-batch (%(default)s)",
    )
    add = parser.add_argument_group("model and optimisation").add_argument
    add("--size", choices=SIZES, help="the recipe's, and the model's with --init none")
    add("--head", choices=("rnnt", "ctc"), help="of asr (default: rnnt, at size tiny ctc)")
    add("--dropout", type=float, help="in encoder and head (default: the task's)")
    add("--augment", type=float, help="strength of SpecAugment, 0 to 1 (default: the task's)")
    add("--decoder-lr", type=float, help="peak rate of the head (--lr is the encoder's)")
    add("--decoder-warmup-steps", type=int, help="of the head (--warmup-steps: the encoder's)")
    add("--normaliser", choices=evaluate.NORMALISERS, default="case", help="of words (%(default)s)")
    add("--patience", type=int, default=0, help="evaluations without a better one (0: no limit)")
    add("--average", type=int, default=0, help="weights to average in the end (0: none)")
    add(
        "--average-of",
        choices=("best", "last"),
        default="best",
        help="best: by held-out score; last: of the saved checkpoints (default: %(default)s)",
    )
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
        is_done, owes_score = run.start_step >= args.max_steps or run.is_enough(), run.owes_score()
        if is_done:
            advice = "raise --max-steps or --patience, or choose another --out-dir"
            ranks.log(f"{args.out_dir}: this run has made its {run.start_step} steps; {advice}")
        if owes_score or not is_done:
            stopped_by = training.follow(
                run.model, TaskData(run.train.rows, run.plan), args, ranks, run.start_step,
                optimizer=run.optimizer, save=run.save,
                evaluate=run.held_out if run.dev else None, evaluate_first=owes_score,
                about={"config": dataclasses.asdict(run.model.encoder.config)},
            )  # fmt: skip
            if stopped_by:
                return stopped_by
        finish(run)
        return 0

    training.run_entry_point(fine_tune)


if __name__ == "__main__":
    main()
