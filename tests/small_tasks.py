"""Tasks of a few rows, written as their data are distributed, and models that learn in seconds."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
from whole_runs import micro_size

import corpora
import finetune

ROOT = Path(finetune.__file__).parent
WORDS = "red old cat dog ship house sees likes finds two three big".split()
GERMAN = dict(zip(WORDS, "rot alt Katze Hund Schiff Haus sieht mag findet zwei drei groß".split()))
CATALAN = dict(zip(WORDS, "roig vell gat gos vaixell casa veu li troba dos tres gran".split()))
MICRO = dict(
    speech_layers=1, mm_layers=1, d_model=32, d_ff=64, n_heads=2, conv_kernel=5,
    subsample_channels=4, norm_groups=8, n_codes=16, code_dim=16, dropout=0.0,
)  # fmt: skip
MICRO_HEADS = dict(
    rnnt_layers=1, rnnt_dim=32, joint_dim=32, decoder_layers=1, decoder_dim=32, decoder_ff=64,
)  # fmt: skip


def micro_tiny() -> contextlib.AbstractContextManager:
    """`tiny` and its heads smaller still."""
    return micro_size(MICRO, MICRO_HEADS)


# ------------------------------------------------------------------------------------------- speech


def spoken(words: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """Each word is a chord of its own for 0.2 s, on a little noise: (N,) samples."""
    time = np.arange(3200) / 16_000
    waves = []
    for word in words:
        n = WORDS.index(word)
        tones = np.sin(2 * np.pi * (300 + 250 * n) * time), np.sin(
            2 * np.pi * (4000 - 170 * n) * time
        )
        waves.append(0.2 * np.hanning(3200) * sum(tones))
    wave = np.concatenate(waves)
    return (wave + 0.003 * rng.standard_normal(len(wave))).astype(np.float32)


def write_speech(
    root: Path, n: int, seed: int, languages: Sequence[str] = (), words: Sequence[str] = WORDS
) -> Path:
    """A manifest of n utterances of 2 to 6 words.

    With languages, each utterance is there once for every language, with its translation. One row
    that is too short to be read stands in the middle; its id is "short".
    """
    rng, lines = np.random.default_rng(seed), []
    root.mkdir(parents=True)
    for i in range(n):
        said = rng.choice(words, rng.integers(2, 7)).tolist()
        wave = spoken(said, rng)
        soundfile.write(root / f"{i}.wav", wave, 16_000, subtype="FLOAT")
        row = {"audio_filepath": f"{i}.wav", "duration": len(wave) / 16_000,
               "text": " ".join(said).upper(), "id": f"u{i}"}  # fmt: skip
        for language in languages or [None]:
            more = {}
            if language:
                table = {"de": GERMAN, "ca": CATALAN}[language]
                translated = " ".join(table[word] for word in said)
                more = {
                    "translation": translated,
                    "target_lang": language,
                    "id": f"u{i}-{language}",
                }
            lines.append(row | more)
        if i == n // 2:
            lines.append(lines[-1] | {"duration": 0.01, "id": "short"})
    path = root / "rows.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path


# --------------------------------------------------------------------------------------------- text


def sentence(rng: np.random.Generator, n_words: int) -> str:
    return " ".join(rng.choice(WORDS, n_words))


def write_tokenizer(path: Path) -> Path:
    """The encoder's tokenizer."""
    rng = np.random.default_rng(9)
    corpora.Tokenizer.train([sentence(rng, 6) for _ in range(200)], 80).save(path)
    return path


def write_tsv(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_glue(root: Path, task: str, n: int, seed: int, *, labelled: bool = True) -> Path:
    """n rows: a sentence is of class 1 where it has a `cat`; of pairs, where the second has it.

    File and columns as distributed, but for MNLI's parses. A test file has no labels.
    """
    rng, its = np.random.default_rng(seed), corpora.GLUE[task]
    matched = "_matched" if task == "mnli" else ""
    path = root / its.folder / (f"dev{matched}.tsv" if labelled else f"test{matched}.tsv")
    rows = [["index", "genre", *its.texts, its.label][: None if labelled else -1]]
    for i in range(n):
        texts = [sentence(rng, rng.integers(3, 6)) for _ in its.texts]
        texts[-1] = texts[-1].replace("cat", "dog")
        label = i % len(its.labels)
        texts[-1] += ["", " cat", " ship ship"][label]
        rows.append([str(i), "fiction", *texts, its.labels[label]][: None if labelled else -1])
    return write_tsv(path, rows)


def write_textnorm(path: Path, n: int, seed: int) -> Path:
    """n sentences in Google's layout: words stay, numbers are read out, the full stop is silent."""
    rng, lines = np.random.default_rng(seed), []
    numbers = {"1": "one", "2": "two", "3": "three", "40": "forty"}
    for _ in range(n):
        for word in rng.choice(WORDS, rng.integers(1, 3)):
            lines.append(f"PLAIN\t{word}\t<self>")
        number = str(rng.choice([*numbers]))
        lines += [f"CARDINAL\t{number}\t{numbers[number]}", "PUNCT\t.\tsil", "<eos>\t<eos>"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


# ---------------------------------------------------------------------------------------- all of it


def write_all(root: Path) -> dict[str, Path]:
    """Every task's training and held-out files by name, and the tokenizer."""
    paths = {
        "tokenizer": write_tokenizer(root / "tokenizer.model"),
        "asr": write_speech(root / "asr", 10, 1, words=WORDS[:6]),
        "asr_dev": write_speech(root / "asr_dev", 5, 2, words=WORDS[:6]),
        "st": write_speech(root / "st", 8, 3, ("de", "ca")),
        "st_dev": write_speech(root / "st_dev", 4, 4, ("de", "ca")),
        "textnorm": write_textnorm(root / "textnorm" / "output-00000-of-00100", 40, 5),
        "textnorm_dev": write_textnorm(root / "textnorm_dev" / "output-00090-of-00100", 9, 6),
    }
    for task in corpora.GLUE:
        paths[task] = write_glue(root / "train", task, 40, 7)
        paths[f"{task}_dev"] = write_glue(root / "dev", task, 13, 8)
        paths[f"{task}_test"] = write_glue(root / "test", task, 7, 9, labelled=False)
    return paths


QUICK = "--max-steps 2 --log-every 1 --save-every 1 --batch-s 6 --batch-tokens 120 --init none"


def options(paths: dict[str, Path], task: str, out_dir: Path, *more: object) -> list[str]:
    """Arguments of finetune.py on these files, two steps from scratch; later flags win."""
    files = ["--train", paths[task], "--dev", paths[f"{task}_dev"], "--out-dir", out_dir]
    files += ["--tokenizer", paths["tokenizer"]]
    files += ["--fp32-matmul", "highest"]  # on a busy machine the probe might choose otherwise
    targets = ["--targets", "de,ca"] if task == "st" else []
    more = [part for word in more for part in (word.split() if isinstance(word, str) else [word])]
    return [str(part) for part in ("--task", task, *files, *targets, *QUICK.split(), *more)]
