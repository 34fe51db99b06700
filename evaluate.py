"""Decode and score: word error rate, BLEU, accuracy, sentence error rate; and use a model on files.

SLAM (Bapna et al. 2021) section 4: recognition, translation, GLUE and text normalisation.

    python evaluate.py --task asr                                         # runs/asr on the demo
    python evaluate.py --checkpoint runs/asr --data test.jsonl            # scores.json, answers.tsv
    python evaluate.py --checkpoint runs/asr --audio talk.mp3             # of any length
    python evaluate.py --checkpoint runs/sst2 --text "what a charming film"

No score without what it was computed from: answers go to a TSV file beside their references, and
`--answers` scores such a file again; one with a line missing or twice is refused. Several ranks
share the rows, and no row counts twice.

Public:  Task, TASKS, TaskSet, SpeechTaskRows, TextTaskRows, read_task_set, FineTuned,
         load_fine_tuned, answer_all, NORMALISERS, score, word_errors, bleu, label_scores,
         normalisation_errors, transcribe.
Letters: B rows, F log-mel frames, U tokens, n rows of a set, N wave samples.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
import pretrain
import training
from conformer import (
    CLS_ID,
    FRAMES_PER_S,
    N_MELS,
    SAMPLE_RATE,
    SEP_ID,
    SlamConfig,
    log_mel,
    subsampled_lens,
)
from corpora import (
    GLUE,
    Manifest,
    SpokenToken,
    TextExample,
    Tokenizer,
    paths_of,
    read_audio,
    read_bytes,
    read_glue,
    read_textnorm,
)
from decoders import HeadConfig, TaskBatch, TaskModel
from training import Ranks


class Task(NamedTuple):
    """What a task reads and how well it is done."""

    modality: str  # speech or text
    heads: tuple[str, ...]  # that may answer it, the default first
    score: str  # name of the figure that ranks models
    higher_is_better: bool


TASKS = {
    "asr": Task("speech", ("rnnt", "ctc"), "wer", False),
    "st": Task("speech", ("attention",), "bleu", True),
    **{name: Task("text", ("classifier",), "accuracy", True) for name in GLUE},
    "textnorm": Task("text", ("attention",), "ser", False),
}

# ---------------------------------------------------------------------------- what a task is given


class TaskSet(NamedTuple):
    """A set of examples: what a model reads of them, and what they are scored by.

    The rows are those that a model can read. An example that is not among them is not forgotten:
    its answer is empty, and counts as an error.
    """

    ids: list[str]  # of all examples, all different
    references: list[str]
    rows: SpeechTaskRows | TextTaskRows
    tags: list[int] | None = None  # of translation: which of the head's languages each is in
    sentences: list[list[SpokenToken]] | None = None  # of text normalisation
    malformed: dict[str, int] = {}  # lines of the files that are no examples: reason to number


class TokenRows:
    """Token lists end to end in one array, which forked loader processes share: rows[i] is (U,).

    Attributes: lens (n,) int64.
    """

    def __init__(self, rows: Iterable[Sequence[int]]) -> None:
        tokens, stops = array("i"), array("q", [0])
        for row in rows:
            tokens.extend(row)
            stops.append(len(tokens))
        self._tokens, self._stops = np.array(tokens, np.int32), np.array(stops, np.int64)
        self.lens = np.diff(self._stops)

    def __len__(self) -> int:
        return len(self.lens)

    def __getitem__(self, i: int) -> np.ndarray:
        if i >= len(self):
            raise IndexError(i)  # which ends a loop
        return self._tokens[self._stops[i] : self._stops[i + 1]]


class SpeechTaskRows:
    """Utterances and the texts that they are to become.

    Attributes: kept         (n,) int64, which examples of the manifest these rows are.
                lengths      (n,) int64 log-mel frames.
                target_lens  (n,) int64 tokens.
                left_out     reason to number of examples that cannot be used.
    """

    def __init__(
        self,
        manifest: Manifest,
        targets: TokenRows,
        tags: list[int],
        faults: dict[str, np.ndarray],
        *,
        seed: int,
        augment: float | None,
        on_device: bool = False,
    ) -> None:
        """Choose the rows.

        Args:   targets  tokens; tags, which of the head's tags each has; one a manifest row.
                faults   reason to (n,) bool, which rows of the manifest cannot be used.
                augment  strength of SpecAugment, which hides other parts in each epoch; None for
                         rows that are not trained on.
                on_device  batches hold data.Waveforms: log-mel is made where they are moved to.
        Raises: ValueError when none is usable.
        """
        self.seed, self.augment, self.on_device = seed, augment, on_device
        keep, self.left_out = data.usable(manifest, faults)
        self.manifest, self.kept = manifest.filtered(keep), np.flatnonzero(keep)
        self.lengths = data.row_frames(self.manifest)
        self.target_lens = targets.lens[self.kept]
        self._targets, self._tags = targets, np.array(tags, np.int64)

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def wave(self, i: int, epoch: int) -> Tensor:
        """(N,) samples of at most lengths[i] frames, the same in every epoch."""
        seconds, most = self.manifest.durations[i], self.lengths[i]
        return data.read_wave(self.manifest, i, 0.0, seconds, most)

    def features(self, i: int, epoch: int) -> Tensor:
        """(F, 80) log-mel of wave(i)."""
        return log_mel(self.wave(i, epoch))

    def collate(
        self,
        rows: np.ndarray,
        epochs: np.ndarray,
        bucket_len: int,
        target_len: int | None = None,
        stand_ins: data.StandIns | None = None,
    ) -> TaskBatch:
        """Rows as they are in these epochs, in bucket_len frames and target_len tokens."""
        hidden: dict[str, Tensor] = {}
        fits = self.target_lens <= (math.inf if target_len is None else target_len)
        read = self.wave if self.on_device else self.features
        rows, found = data.read_rows(read, rows, epochs, stand_ins, fits.__getitem__)
        features, lens = data.padded_features(found, bucket_len)
        if self.augment:
            hidden["hidden_frames"] = torch.zeros(len(rows), bucket_len, dtype=torch.bool)
            hidden["hidden_bins"] = torch.zeros(len(rows), N_MELS, dtype=torch.bool)
            for b, (row, epoch, n) in enumerate(zip(rows, epochs, lens.tolist())):
                rng = data.row_rng(self.seed, epoch, row, data.SPEC_AUGMENT)
                frames, bins = map(torch.from_numpy, data.spec_augment(rng, n, self.augment))
                hidden["hidden_frames"][b, :n], hidden["hidden_bins"][b] = frames, bins
        chosen = self.kept[rows]
        targets, target_lens = _padded([self._targets[i] for i in chosen], target_len)
        return TaskBatch(
            lens, features, **hidden, targets=targets, target_lens=target_lens,
            tags=torch.from_numpy(self._tags[chosen]),
            faults=stand_ins and (stand_ins.faults or None),
        )  # fmt: skip


class TextTaskRows:
    """Token sequences to be classified or rewritten; attributes as in SpeechTaskRows."""

    def __init__(
        self,
        inputs: list[list[int]],
        *,
        labels: list[int] | None = None,
        targets: list[list[int]] | None = None,
        max_tokens: int,
    ) -> None:
        """Choose the rows.

        Args:   inputs  token lists that begin with [CLS]; labels, or targets: their answers.
        Raises: ValueError when none is usable.
        """
        self._inputs, lengths = TokenRows(inputs), np.array([len(row) for row in inputs], np.int64)
        self._labels = None if labels is None else np.array(labels, np.int64)
        self._targets = None if targets is None else TokenRows(targets)
        self.kept = np.flatnonzero(lengths <= max_tokens)
        n_long, reason = len(inputs) - len(self.kept), f"longer than --max-tokens {max_tokens}"
        self.left_out = {reason: n_long} if n_long else {}
        if not len(self.kept):
            raise ValueError(f"0 of {len(inputs)} rows usable: all are {reason}")
        self.lengths = lengths[self.kept]
        none = np.zeros(len(self.kept), np.int64)
        self.target_lens = none if targets is None else self._targets.lens[self.kept]

    @property
    def fingerprint(self) -> str:
        parts = (self._inputs, self._labels, self._targets)
        lists = [None if part is None else [each.tolist() for each in part] for part in parts]
        everything = json.dumps(lists)
        return hashlib.sha256(everything.encode()).hexdigest()[:16]

    def collate(
        self, rows: np.ndarray, epochs: np.ndarray, bucket_len: int, target_len: int | None = None
    ) -> TaskBatch:
        """Rows in bucket_len tokens; nothing of them is random."""
        chosen = self.kept[rows]
        tokens, lens = _padded([self._inputs[i] for i in chosen], bucket_len)
        if self._labels is not None:
            return TaskBatch(lens, tokens=tokens, labels=torch.from_numpy(self._labels[chosen]))
        targets, target_lens = _padded([self._targets[i] for i in chosen], target_len)
        tags = torch.zeros(len(chosen), dtype=torch.int64)
        return TaskBatch(lens, tokens=tokens, targets=targets, target_lens=target_lens, tags=tags)


def _padded(rows: Sequence[Sequence[int]], width: int | None) -> tuple[Tensor, Tensor]:
    """Token lists -> (B, U) int64, PAD after their ends, U the longest if not given; (B,) lens."""
    arrays = [np.array(row, np.int64) for row in rows]
    longest = max(map(len, arrays), default=0)
    padded = data.padded(arrays, longest if width is None else width)
    return torch.from_numpy(padded), torch.tensor([len(row) for row in arrays])


# ----------------------------------------------------------------------------------- reading a set


class TaskTokenizers(NamedTuple):
    """The encoder's tokenizer, for what is read; the target's, for what is written."""

    source: Tokenizer | None
    target: Tokenizer | None


def read_task_set(
    task: str,
    comma_list: str,
    tokenizers: TaskTokenizers,
    head: HeadConfig,
    *,
    max_audio_s: float,
    max_tokens: int,
    seed: int = 0,
    augment: float | None = None,
    on_device: bool = False,
) -> TaskSet:
    """Read files in the form in which the task's data are distributed, comma separated.

    Recognition and translation: manifests of data.py. GLUE: TSV files. Text normalisation: files
    or a folder of Google's.

    Args:   augment    strength of SpecAugment in a training set; None for a set to be scored.
            on_device  whether log-mel is left to the device.
    Raises: FileNotFoundError; ValueError naming file and row.
    """
    paths = paths_of(comma_list)
    if TASKS[task].modality == "speech":
        manifest = Manifest.read(paths, text_required=task == "asr")
        references, tags = spoken_references(manifest, head.tags)
        targets = TokenRows(map(tokenizers.target.encode, references))
        faults = {f"longer than --max-audio-s {max_audio_s:g}": manifest.durations > max_audio_s}
        if augment is not None:
            faults |= _faults_of_training(manifest, targets, head)
        how = {"seed": seed, "augment": augment, "on_device": on_device}
        rows = SpeechTaskRows(manifest, targets, tags, faults, **how)
        return TaskSet(_ids_of(manifest), references, rows, tags=tags)
    if task == "textnorm":
        return _read_sentences(paths, tokenizers, None if augment is None else max_tokens)
    examples, report = read_glue(task, paths)
    without = sum(example.label is None for example in examples)
    if without and (augment is not None or without < len(examples)):
        raise ValueError(f"{comma_list}: {without} rows have no label; is it a test file?")
    inputs = [pair_input(e.texts, tokenizers.source, max_tokens) for e in examples]
    known = {label: i for i, label in enumerate(head.labels)} | {None: -1}
    labels = [known[example.label] for example in examples]
    rows = TextTaskRows(inputs, labels=labels, max_tokens=max_tokens)
    references = [example.label or "" for example in examples]
    return TaskSet(_glue_ids(examples), references, rows, malformed=report.counts())


def _read_sentences(
    paths: list[Path], tokenizers: TaskTokenizers, max_tokens: int | None
) -> TaskSet:
    """Text normalisation; without max_tokens nothing is too long."""
    sentences, report = read_textnorm(paths)
    references = [*map(sentence_target, sentences)]
    inputs = [sentence_input(sentence, tokenizers.source) for sentence in sentences]
    targets = [tokenizers.target.encode(reference) for reference in references]
    most = max(map(len, inputs)) if max_tokens is None else max_tokens
    rows = TextTaskRows(inputs, targets=targets, max_tokens=most)
    ids, malformed = [*map(str, range(len(inputs)))], report.counts()
    return TaskSet(ids, references, rows, sentences=sentences, malformed=malformed)


def _faults_of_training(
    manifest: Manifest, targets: TokenRows, head: HeadConfig
) -> dict[str, np.ndarray]:
    """What keeps a row from being trained on, though it can be scored: reason to (n,) bool."""
    lens = targets.lens
    faults = {"without text": lens == 0}
    if head.kind == "ctc":
        repeats = np.array([(each[1:] == each[:-1]).sum() for each in targets], np.int64)
        too_few = subsampled_lens(data.row_frames(manifest)) < lens + repeats
        faults["with fewer frames than CTC needs for the text"] = too_few
    return faults


def spoken_references(manifest: Manifest, tags: tuple[str, ...]) -> tuple[list[str], list[int]]:
    """What each row should become: its transcript, or its translation and the language's tag.

    Raises: ValueError naming the row that has no translation into one of the languages.
    """
    references, its_tags = [], []
    for i in range(len(manifest)):
        row = manifest.row(i)
        if tags == ("",):
            references.append(row["text"])
            its_tags.append(0)
            continue
        language = row.get("target_lang")
        if not isinstance(row.get("translation"), str) or language not in tags:
            found = f"translation into {language!r}" if "translation" in row else "no translation"
            raise ValueError(f"{manifest.where(i)}: {found}; expected {','.join(tags)} (--targets)")
        references.append(row["translation"])
        its_tags.append(tags.index(language))
    return references, its_tags


def _ids_of(manifest: Manifest) -> list[str]:
    """The rows' own ids, or where they lack them or repeat, `manifest:line`."""
    ids = [manifest.row(i).get("id") for i in range(len(manifest))]
    times = Counter(name for name in ids if isinstance(name, str))
    places = manifest.places()
    return [
        name if isinstance(name, str) and times[name] == 1 else place
        for name, place in zip(ids, places, strict=True)
    ]


def _glue_ids(examples: list[TextExample]) -> list[str]:
    """Ids of the file; of several files with the same ids, the place as well."""
    if len({example.id for example in examples}) == len(examples):
        return [example.id for example in examples]
    return [f"{example.id}#{place}" for place, example in enumerate(examples)]


def pair_input(
    texts: Sequence[str], tokenizer: Tokenizer, max_tokens: int | None = None
) -> list[int]:
    """`[CLS] a [SEP]`, or `[CLS] a [SEP] b [SEP]`.

    What is over max_tokens is cut off the end of the longest text, token by token, as for BERT.
    """
    parts = [tokenizer.encode(text) for text in texts]
    while max_tokens and any(parts) and 1 + sum(len(part) + 1 for part in parts) > max_tokens:
        max(parts, key=len).pop()
    return [CLS_ID, *(i for part in parts for i in (*part, SEP_ID))]


# How text normalisation is put as a sequence. The model reads written tokens, each closed by [SEP],
# and writes for each what it is read out as. UNSPECIFIED IN PAPER. In this form a token that stays
# costs one symbol and keeps its case, and every error belongs to a token, whose class is known.
KEEP, SILENT, NEXT = "<self>", "<sil>", "|"
NORMALISATION_SYMBOLS = (KEEP, SILENT, NEXT)


def sentence_input(sentence: Iterable[SpokenToken], tokenizer: Tokenizer) -> list[int]:
    """`[CLS] token [SEP] token [SEP] ...`."""
    return pair_input([token.written for token in sentence], tokenizer)


def _said(token: SpokenToken) -> str:
    """What a token becomes, with single spaces; it must not hold what parts tokens."""
    spoken = {"<self>": KEEP, "sil": SILENT}.get(token.spoken, token.spoken)
    return " ".join(spoken.replace(NEXT, " ").split())


def sentence_target(sentence: Iterable[SpokenToken]) -> str:
    """`<self>|forty dollars|<sil>`: what each token becomes, in one string."""
    return NEXT.join(map(_said, sentence))


# --------------------------------------------------------------------------------- decoding a set


class FineTuned(NamedTuple):
    """All that is needed to use a fine-tuned model."""

    task: str
    model: TaskModel
    tokenizers: TaskTokenizers
    longest_s: float  # the longest audio that it was trained on, in seconds
    max_tokens: int
    where: str  # file and step


def load_fine_tuned(path: Path, device: torch.device) -> FineTuned:
    """The model of a fine-tuning checkpoint, in eval mode; of a run's folder its best.

    Raises: ValueError, FileNotFoundError.
    """
    found = training.find_weights(path)
    checkpoint = training.load_checkpoint_of(("finetune.py",), found)
    head = dict(checkpoint["head"])
    head |= {name: tuple(head[name]) for name in ("labels", "tags")}
    task, config = checkpoint["task"], SlamConfig(**checkpoint["config"])
    model = TaskModel(config, TASKS[task].modality, HeadConfig(**head))
    model.load_state_dict(checkpoint["model"])
    stored = (checkpoint[name] for name in ("tokenizer", "target_tokenizer"))
    tokenizers = (None if part is None else Tokenizer(bytes(part.tolist())) for part in stored)
    limits = checkpoint["longest_s"], checkpoint["max_tokens"]
    where = f"{found}, step {checkpoint['step']}"
    return FineTuned(task, model.to(device).eval(), TaskTokenizers(*tokenizers), *limits, where)


class Search(NamedTuple):
    """How answers are searched for."""

    width: int = 1  # 1: greedy
    length_penalty: float = 0.6  # of an attention decoder's beams
    batch_units: int = 16_000  # log-mel frames or tokens decoded at a time, padding counted


def answer_all(
    model: TaskModel, task_set: TaskSet, target: Tokenizer | None, search: Search, ranks: Ranks
) -> list[str]:
    """The model's answer to every example, in order; "" to those that are not among the rows.

    Ranks share the batches; all get all answers.
    Raises: RuntimeError where the ranks together have not answered each row exactly once.
    """
    rows, own = task_set.rows, {}
    units = {"task": search.batch_units}
    batches = data.HeldOut({"task": rows}, units, make=lambda name, batch: batch)
    model.eval()
    for i in range(ranks.rank, len(batches), ranks.world_size):
        found = model.decode(batches[i].to(ranks.device), search.width, search.length_penalty)
        for row, tokens in zip(batches.chosen[i][1].tolist(), found, strict=True):
            own[int(rows.kept[row])] = text_of(model, tokens, target)
    n_answered = torch.tensor(len(own), dtype=torch.float64, device=ranks.device)
    answers, n_answered = ranks.union(own), int(ranks.sum(n_answered))
    if not len(answers) == n_answered == len(rows.kept):
        raise RuntimeError(f"{n_answered} answers to {len(rows.kept)} rows")
    return [answers.get(i, "") for i in range(len(task_set.ids))]


def say_what_is_missing(name: str, task_set: TaskSet, ranks: Ranks) -> None:
    """Log what is in a set's files and will not be read."""
    for reason, count in task_set.malformed.items():
        ranks.log(f"{name}: {count} lines are no examples: {reason}")
    for reason, count in task_set.rows.left_out.items():
        ranks.log(f"{name}: {count} not read, their answers are empty: {reason}")


def text_of(model: TaskModel, tokens: list[int], target: Tokenizer | None) -> str:
    """An answer's tokens, or a classifier's one index, as text."""
    return target.decode(tokens) if target else model.head_config.labels[tokens[0]]


# ------------------------------------------------------------------------------------------ scores


def _case(text: str) -> str:
    return " ".join(text.lower().split())


def _words(text: str) -> str:
    text = re.sub(r"[-–—/]", " ", text.lower()).replace("’", "'")
    return " ".join(re.sub(r"[^\w\s']|_", "", text).split())


def _conversation(text: str) -> str:
    text = re.sub(r"\[[^\]]*\]|<[^>]*>|\([^)]*\)", " ", text)
    hesitations = {"uh", "um", "uhm", "hm", "hmm", "mhm", "mm", "ah", "eh", "er"}
    return " ".join(word for word in _words(text).split() if word not in hesitations)


# What is done to references and answers before words are counted. LibriSpeech needs `case` alone.
NORMALISERS: dict[str, Callable[[str], str]] = {
    "case": _case,  # lower case, single spaces
    "words": _words,  # and no punctuation but apostrophes; hyphens part words
    "conversation": _conversation,  # and no [noise], <noise>, (noise) nor hesitations
}


def word_errors(references: list[str], answers: list[str], normaliser: str) -> dict[str, Any]:
    """Word error rate of a set: all errors over all reference words (jiwer aligns them)."""
    import jiwer

    normalise = NORMALISERS[normaliser]
    counted = jiwer.process_words([*map(normalise, references)], [*map(normalise, answers)])
    errors = counted.substitutions + counted.deletions + counted.insertions
    n_words = counted.hits + counted.substitutions + counted.deletions
    return {
        "wer": errors / max(n_words, 1),
        "substitutions": counted.substitutions,
        "deletions": counted.deletions,
        "insertions": counted.insertions,
        "words": n_words,
        "normaliser": normaliser,
    }


# sacreBLEU's tokenizers for languages that do not put spaces between words; 13a for all others.
BLEU_TOKENIZERS = {"zh": "zh", "zh-cn": "zh", "ja": "char", "th": "char"}


def bleu(references: list[str], answers: list[str], language: str) -> dict[str, Any]:
    """Corpus BLEU of cased, detokenised text by sacreBLEU, with the signature that goes with it."""
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize=BLEU_TOKENIZERS.get(language, "13a"))
    value = metric.corpus_score(answers, [references]).score
    return {"bleu": value, "signature": str(metric.get_signature())}


def label_scores(references: list[str], answers: list[str], positive: str | None) -> dict[str, Any]:
    """Accuracy, and F1 of the positive label where the task has one."""
    pairs = Counter(zip(references, answers, strict=True))
    right = sum(count for (reference, answer), count in pairs.items() if reference == answer)
    scores: dict[str, Any] = {"accuracy": right / max(len(references), 1)}
    if positive is not None:
        hits = pairs[positive, positive]
        named = sum(count for pair, count in pairs.items() for part in pair if part == positive)
        scores["f1"] = 2 * hits / named if named else 0.0
    return scores


def normalisation_errors(sentences: list[list[SpokenToken]], answers: list[str]) -> dict[str, Any]:
    """Sentence error rate, token error rate, and of each semiotic class how many are wrong.

    A token is right when it sounds right: `<self>` and the word itself are the same answer. A
    sentence is right when every token is. If an answer has too few or too many parts, it cannot be
    known whose they are: all tokens of such a sentence are wrong.
    """
    wrong_sentences, wrong, n_tokens = 0, Counter(), Counter()
    for sentence, answer in zip(sentences, answers, strict=True):
        expected, parts = [*map(_said, sentence)], _parts_of(answer)
        errors = [True] * len(expected)
        if len(parts) == len(expected):
            errors = [
                _sound(token.written, said) != _sound(token.written, part)
                for token, said, part in zip(sentence, expected, parts)
            ]
        wrong_sentences += any(errors)
        for token, is_wrong in zip(sentence, errors, strict=True):
            n_tokens[token.semiotic_class] += 1
            wrong[token.semiotic_class] += is_wrong
    return {
        "ser": wrong_sentences / max(len(sentences), 1),
        "token_error_rate": wrong.total() / max(n_tokens.total(), 1),
        "sentences": len(sentences),
        "wrong_by_class": {name: [wrong[name], count] for name, count in sorted(n_tokens.items())},
    }


def _sound(written: str, part: str) -> str:
    """What is heard of a written token where the answer to it is `part`."""
    return {KEEP: " ".join(written.split()), SILENT: ""}.get(part, part)


def _parts_of(answer: str) -> list[str]:
    """The parts of an answer in text normalisation, with single spaces."""
    return [" ".join(part.split()) for part in answer.split(NEXT)]


def score(
    task: str, task_set: TaskSet, answers: list[str], head: HeadConfig, normaliser: str
) -> dict[str, Any]:
    """All figures of a set, with the number of examples; `TASKS[task].score` is among them.

    A translation model of several languages has one BLEU each, and their mean.
    """
    references, n = task_set.references, {"examples": len(answers)}
    if task == "asr":
        return n | word_errors(references, answers, normaliser)
    if task == "textnorm":
        return n | normalisation_errors(task_set.sentences, answers)
    if task != "st":
        return n | label_scores(references, answers, "1" if task == "qqp" else None)
    tags = np.array(task_set.tags)
    by_language = {}
    for tag, language in enumerate(head.tags):
        if chosen := np.flatnonzero(tags == tag).tolist():
            parts = ([texts[i] for i in chosen] for texts in (references, answers))
            by_language[language] = bleu(*parts, language)
    mean = float(np.mean([scores["bleu"] for scores in by_language.values()]))
    return n | {"bleu": mean, "by_language": by_language}


# ----------------------------------------------------------------------------------- files of a set


def write_answers(path: Path, task_set: TaskSet, answers: list[str]) -> None:
    """answers.tsv: id, reference, answer; tabs and line ends in texts become spaces."""
    rows = zip(task_set.ids, task_set.references, answers, strict=True)
    lines = ["id\treference\tanswer", *("\t".join(map(_one_line, row)) for row in rows)]
    text = "".join(line + "\n" for line in lines)
    training.write_atomically(path, lambda sink: sink.write(text.encode()))


def _one_line(text: str) -> str:
    return re.sub(r"[\t\r\n]+", " ", text)


def read_answers(path: Path, ids: list[str]) -> list[str]:
    """The answers of a TSV file in the order of `ids`.

    Raises: FileNotFoundError; ValueError when an id is missing, foreign or there twice.
    """
    found: dict[str, str] = {}
    try:
        lines = read_bytes(path, "answers").decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason})") from error
    for number, line in enumerate(lines, 1):
        cells = line.removesuffix("\r").split("\t")
        if number == 1 and cells[0] == "id":
            continue
        if len(cells) != 3:
            raise ValueError(f"{path}:{number}: {len(cells)} cells; expected id, reference, answer")
        if cells[0] in found:
            raise ValueError(f"{path}:{number}: {cells[0]} is there twice")
        found[cells[0]] = cells[2]
    ids = [*map(_one_line, ids)]
    if missing := [name for name in ids if name not in found]:
        raise ValueError(f"{path}: {len(missing)} without an answer, the first is {missing[0]}")
    if len(found) > len(ids):
        foreign = next(iter(found.keys() - set(ids)))
        raise ValueError(f"{path}: {foreign} is not in the set that is scored")
    return [found[name] for name in ids]


# Names of GLUE's submission files, and how many predictions its server expects.
SUBMISSIONS = {
    ("mnli", "test_matched"): ("MNLI-m.tsv", 9796),
    ("mnli", "test_mismatched"): ("MNLI-mm.tsv", 9847),
    ("qnli", "test"): ("QNLI.tsv", 5463),
    ("qqp", "test"): ("QQP.tsv", 390_965),
    ("sst2", "test"): ("SST-2.tsv", 1821),
}


def submission_of(task: str, paths: list[Path]) -> tuple[str, int]:
    """Name and size of the submission that belongs to a file without labels.

    Raises: ValueError where it is not one of GLUE's test files, or more than one.
    """
    if len(paths) != 1 or (task, paths[0].stem) not in SUBMISSIONS:
        names = " or ".join(f"{stem}.tsv" for name, stem in SUBMISSIONS if name == task)
        files = ",".join(map(str, paths))
        raise ValueError(f"--data {files}: has no labels, and is not GLUE's {names} either")
    return SUBMISSIONS[task, paths[0].stem]


def write_submission(path: Path, expected: int, ids: list[str], answers: list[str]) -> str:
    """Write a GLUE test file's predictions as the server wants them -> a line about it."""
    lines = ["index\tprediction", *(f"{i}\t{a}" for i, a in zip(ids, answers, strict=True))]
    text = "".join(line + "\n" for line in lines)
    training.write_atomically(path, lambda sink: sink.write(text.encode()))
    verdict = f"NOT the {expected} that GLUE's server expects"
    verdict = "as many as GLUE's server expects" if len(answers) == expected else verdict
    return f"{path}: {len(answers)} predictions, {verdict}"


# --------------------------------------------------------------------------------- audio and text

PAUSE_S = 0.2  # what is searched for: the quietest stretch of this length


def cut_at_pauses(wave: np.ndarray, max_s: float) -> list[tuple[int, int]]:
    """(first sample, end) of pieces of at most max_s seconds, parted where it is quietest.

    Each piece is at least half as long as it may be; the last, if there are several, a quarter.
    """
    most = int(max_s * SAMPLE_RATE)
    window = min(int(PAUSE_S * SAMPLE_RATE), most // 4)
    energy = np.concatenate([[0.0], np.cumsum(wave.astype(np.float64) ** 2)])
    pieces, start = [], 0
    while len(wave) - start > most:
        first = start + most // 2
        last = min(start + most, len(wave) - most // 4) - window
        loudness = energy[first + window : last + window] - energy[first:last]
        cut = first + int(loudness.argmin()) + window // 2  # in the middle of the pause
        pieces.append((start, cut))
        start = cut
    return [*pieces, (start, len(wave))]


def transcribe(tuned: FineTuned, path: Path, search: Search, tag: int = 0) -> str:
    """Recognise or translate a file of any length, cut at pauses and joined again.

    No piece is longer than what the model was trained on: a translator of sentences says nothing
    sensible of a paragraph.

    Raises: FileNotFoundError; ValueError when it cannot be read, or is too short.
    """
    wave, device = read_audio(path), next(tuned.model.parameters()).device
    if data.too_short(len(wave) / SAMPLE_RATE):
        found = f"{len(wave) / SAMPLE_RATE:.3f} s of audio"
        raise ValueError(f"{path}: {found}; expected at least two frames of the encoder, 0.1 s")
    said = []
    for start, end in cut_at_pauses(wave, tuned.longest_s):
        if data.too_short((end - start) / SAMPLE_RATE):
            continue
        features = log_mel(torch.from_numpy(wave[start:end]))[None]  # (1, F, 80)
        lens, tags = torch.tensor([features.shape[1]]), torch.tensor([tag])
        batch = TaskBatch(lens, features, tags=tags).to(device)
        (tokens,) = tuned.model.decode(batch, search.width, search.length_penalty)
        said.append(tuned.tokenizers.target.decode(tokens))
    return " ".join(" ".join(said).split())


def answer_text(tuned: FineTuned, text: str, search: Search) -> str:
    """Classify a sentence (or two with a tab between), or read a written sentence out."""
    device = next(tuned.model.parameters()).device
    source = tuned.tokenizers.source
    if tuned.task == "textnorm":
        written = written_tokens(text)
        ids = pair_input(written, source)
    else:
        texts, expected = text.split("\t"), len(GLUE[tuned.task].texts)
        if len(texts) != expected:
            raise ValueError(
                f"--text: {len(texts)} sentences; {tuned.task} reads {expected}, a tab between"
            )
        ids = pair_input(texts, source, tuned.max_tokens)
    tokens, lens = _padded([ids], None)
    batch = TaskBatch(lens, tokens=tokens, tags=torch.zeros_like(lens)).to(device)
    (found,) = tuned.model.decode(batch, search.width, search.length_penalty)
    answer = text_of(tuned.model, found, tuned.tokenizers.target)
    return read_out(written, answer) if tuned.task == "textnorm" else answer


def written_tokens(text: str) -> list[str]:
    """Part a sentence as Google's files do: punctuation is a token of its own where it ends or
    begins a word, and part of the token inside (`10:30a.m.`, `www.x.org`, `$4.50`)."""
    tokens = []
    for word in text.split():
        core = word.lstrip('([{"“')
        tokens += word[: len(word) - len(core)]
        after: list[str] = []
        # A full stop ends a sentence, unless the word has others in it, as an abbreviation does.
        while core and (core[-1] in ')]}"”,;:!?' or re.fullmatch(r"[^.]+\.|.*\d\.", core)):
            core, after = core[:-1], [core[-1], *after]
        tokens += [core, *after] if core else after
    return tokens


def read_out(written: list[str], answer: str) -> str:
    """The spoken sentence that an answer stands for."""
    parts = _parts_of(answer)
    parts += [KEEP] * (len(written) - len(parts))  # an answer that ends too soon changes no more
    return " ".join(filter(None, map(_sound, written, parts)))


# ------------------------------------------------------------------------------------- entry point


def demo_sets(task: str, root: Path, ranks: Ranks) -> dict[str, str]:
    """The demo's files of a task, made if need be: train, dev, test, and the tokenizer.

    GLUE's test files have no labels, here as there: what can be scored is its dev set.
    """
    files = pretrain.demo_files(root, ranks)
    tokenizer = {"tokenizer": files["tokenizer"]}
    if task == "asr":
        return tokenizer | {"train": files["speech"], "dev": files["dev"], "test": files["test"]}
    if task == "st":
        return tokenizer | {name: files[f"st_{name}"] for name in ("train", "dev", "test")}
    if task == "textnorm":
        folder = root / "textnorm" / "en_with_types"
        parts = {"train": (0, 1), "dev": (90,), "test": (99,)}
        return tokenizer | {
            name: ",".join(str(folder / f"output-{number:05d}-of-00100") for number in numbers)
            for name, numbers in parts.items()
        }
    folder = root / "glue" / GLUE[task].folder
    dev = str(folder / ("dev_matched.tsv" if task == "mnli" else "dev.tsv"))
    return tokenizer | {"train": str(folder / "train.tsv"), "dev": dev, "test": dev}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Score a fine-tuned model, or use it on files.")
    add = parser.add_argument
    add("--task", choices=TASKS, help="what the checkpoint must be for (default: as it says)")
    add("--checkpoint", type=Path, help="a .pt file or a run's folder (default: runs/TASK)")
    add(
        "--data",
        metavar="[NAME=]FILES[@NORMALISER],...",
        action="append",
        default=[],
        help="a set to score: manifests, GLUE's TSV or Google's files; may be given several times "
        "(default: the demo's)",
    )
    add("--demo-dir", type=Path, default=Path("demo_data"), help="(default: %(default)s)")
    add("--answers", type=Path, help="score this answers.tsv of the one --data instead of decoding")
    add("--audio", type=Path, nargs="+", default=[], help="recognise or translate these files")
    add("--text", action="append", default=[], help="answer this text; a tab parts two sentences")
    add("--target", help="language to translate --audio into (default: the model's first)")
    add("--normaliser", choices=NORMALISERS, default="case", help="of words (default: case)")
    add("--beam", type=int, default=1, help="beam width; 1 is greedy (default: %(default)s)")
    add(
        "--length-penalty",
        type=float,
        default=0.6,
        help="of an attention decoder's beams (%(default)s)",
    )
    add("--batch-s", type=float, default=160.0, help="seconds decoded at a time (%(default)s)")
    add("--batch-tokens", type=int, default=8192, help="text tokens at a time (%(default)s)")
    add("--out-dir", type=Path, help="for scores.json and answers (default: the run's folder)")
    return parser.parse_args(argv)


def parse_set(text: str, normaliser: str) -> tuple[str, str, str]:
    """`ami=ami.jsonl@conversation` -> (name, files, normaliser); without a name, the file's."""
    if all(path.exists() for path in paths_of(text)):  # `=` and `@` are part of the name
        return paths_of(text)[0].stem, text, normaliser
    name, files, named_normaliser = re.fullmatch(
        r"(?:([^=/]*)=)?(.*?)(?:@([^@/]*))?", text
    ).groups()
    normaliser = named_normaliser or normaliser
    if normaliser not in NORMALISERS:
        known = ", ".join(NORMALISERS)
        raise ValueError(f"--data {text}: no normaliser {normaliser!r}; there are {known}")
    if not paths_of(files):
        raise ValueError(f"--data {text}: names no file")
    return name or paths_of(files)[0].stem, files, normaliser


def answers_of_set(
    tuned: FineTuned, name: str, task_set: TaskSet, args: argparse.Namespace, ranks: Ranks
) -> list[str]:
    """Read the answers, or decode and write them."""
    say_what_is_missing(name, task_set, ranks)
    if args.answers:
        return read_answers(args.answers, task_set.ids)
    is_speech = TASKS[tuned.task].modality == "speech"
    units = int(FRAMES_PER_S * args.batch_s) if is_speech else args.batch_tokens
    search = Search(args.beam, args.length_penalty, units)
    answers = answer_all(tuned.model, task_set, tuned.tokenizers.target, search, ranks)
    if ranks.rank == 0:
        write_answers(args.out_dir / f"{name}.answers.tsv", task_set, answers)
    return answers


def score_sets(
    tuned: FineTuned, args: argparse.Namespace, ranks: Ranks
) -> dict[str, dict[str, Any]]:
    """Decode and score every --data -> {name: scores}; sets without labels become submissions."""
    # Nothing that can be read is left out of a score, however long it is.
    limits = {"max_audio_s": math.inf, "max_tokens": tuned.max_tokens}
    limits["on_device"] = training.resolve_log_mel("auto", ranks.device) == "device"
    head, results = tuned.model.head_config, {}
    sets = [parse_set(text, args.normaliser) for text in args.data]
    if repeated := [name for name, times in Counter(its[0] for its in sets).items() if times > 1]:
        raise ValueError(f"--data: two sets are named {repeated[0]}; give NAME=FILES")
    for name, files, normaliser in sets:
        task_set = read_task_set(tuned.task, files, tuned.tokenizers, head, **limits)
        if tuned.task in GLUE and not any(task_set.references):
            file_name, expected = submission_of(tuned.task, paths_of(files))
            answers = answers_of_set(tuned, name, task_set, args, ranks)
            if ranks.rank == 0:
                path = args.out_dir / file_name
                ranks.log(write_submission(path, expected, task_set.ids, answers))
            continue
        answers = answers_of_set(tuned, name, task_set, args, ranks)
        results[name] = score(tuned.task, task_set, answers, head, normaliser)
        ranks.log(f"{name}: {json.dumps(results[name])}")
        results[name] |= {"files": files, "rows_hash": task_set.rows.fingerprint}
    return results


def write_scores(
    results: dict[str, dict[str, Any]], tuned: FineTuned, args: argparse.Namespace, ranks: Ranks
) -> None:
    """Write scores.json; with several sets, also the mean of their scores.

    SpeechStew is reported so: one word error rate a set, and the mean of the sets.
    """
    about: dict[str, Any] = {"task": args.task, "checkpoint": tuned.where}
    if args.answers:
        about["answers"] = str(args.answers)
    else:
        about["beam"] = args.beam
        if tuned.model.head_config.kind == "attention":
            about["length_penalty"] = args.length_penalty
    about["sets"] = results
    if len(results) > 1:
        key = TASKS[args.task].score
        about["mean"] = {key: float(np.mean([scores[key] for scores in results.values()]))}
        ranks.log(f"mean of {len(results)} sets: {json.dumps(about['mean'])}")
    if ranks.rank == 0:
        text = json.dumps(about | {"versions": training.versions()}, indent=2) + "\n"
        path = args.out_dir / "scores.json"
        training.write_atomically(path, lambda sink: sink.write(text.encode()))
        ranks.log(f"scores: {path}")


def folder_of_run(checkpoint: Path) -> Path:
    """Where the answers and scores of a checkpoint belong: its run's folder."""
    if checkpoint.is_dir():
        return checkpoint
    return checkpoint.parent.parent if checkpoint.parent.name == "ckpt" else checkpoint.parent


def run(args: argparse.Namespace, ranks: Ranks) -> int:
    """Do what the command line asks for. Raises ValueError, FileNotFoundError."""
    training.check_numbers(
        args, from_1=("beam", "batch_tokens"), from_0=("length_penalty",), above_0=("batch_s",)
    )
    if not (args.checkpoint or args.task):
        raise ValueError("give --checkpoint, or --task for the run in runs/TASK")
    args.checkpoint = args.checkpoint or Path("runs") / args.task
    tuned = load_fine_tuned(args.checkpoint, ranks.device)
    if args.task and args.task != tuned.task:
        raise ValueError(f"--task {args.task}: {args.checkpoint} was fine-tuned for {tuned.task}")
    args.task, args.out_dir = tuned.task, args.out_dir or folder_of_run(args.checkpoint)
    modality, tags = TASKS[tuned.task].modality, tuned.model.head_config.tags
    if not (args.data or args.audio or args.text):
        args.data = [f"test={demo_sets(tuned.task, args.demo_dir, ranks)['test']}"]
    if args.answers and len(args.data) != 1:
        raise ValueError("--answers is scored against one --data")
    for flag, given, reads in (("--audio", args.audio, "speech"), ("--text", args.text, "text")):
        if given and modality != reads:
            raise ValueError(f"{flag}: {tuned.task} reads {modality}, not {reads}")
    if args.target and args.target not in tags:
        writes = (
            f"the model translates into {', '.join(tags)}" if tags != ("",) else "no translator"
        )
        raise ValueError(f"--target {args.target}: {writes}")
    search = Search(args.beam, args.length_penalty)
    if results := score_sets(tuned, args, ranks):
        write_scores(results, tuned, args, ranks)
    tag = tags.index(args.target) if args.target else 0
    for path in args.audio:
        ranks.log(f"{path}\t{transcribe(tuned, path, search, tag)}")
    for text in args.text:
        ranks.log(f"{text}\t{answer_text(tuned, text, search)}")
    return 0


def main(argv: list[str] | None = None) -> None:
    """Parse, run, and turn a user's mistake into one line."""
    args = parse_arguments(argv)
    training.run_entry_point(lambda ranks: run(args, ranks))


if __name__ == "__main__":
    main()
