"""Files on disk: manifests, audio, tokenizers, text, tasks.

A manifest is JSON lines in the NeMo convention (`audio_filepath`, `offset`, `duration`, `text`,
further fields kept). Text is plain lines, a blank one between documents, tokenised once into a
memory-mapped file. How distributed corpora become manifests is in importers.py; what batches are
made of all this is data.py's business.

Public:  Manifest, read_audio, audio_source, read_part, AudioError, Tokenizer, TextCorpus,
         read_lines, read_text, write_text, read_table, check_manifest, Report; GLUE, read_glue,
         read_textnorm, textnorm_files, textnorm_sentences, TextExample, SpokenToken.
Letters: N wave samples, V vocabulary, n rows.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
import mmap
import os
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import soundfile
import soxr

from conformer import (
    CLS_ID,
    MASK_ID,
    PAD_ID,
    SAMPLE_RATE,
    SEP_ID,
    UNK_ID,
    n_frames,
    subsampled_lens,
)
from training import write_atomically

AUDIO_SUFFIXES = (".flac", ".wav", ".ogg", ".opus", ".mp3", ".sph")
JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
# Every tokenizer has these, even if its text spells numbers out: text normalisation reads them.
REQUIRED_CHARACTERS = "0123456789.,;:!?'\"-$%&/()"
MIN_ENC_FRAMES = 2  # shorter audio cannot have one frame masked and one visible
MAX_S = 1e8  # three years: a duration or offset beyond is a mistake
NO_CHARACTER = re.compile("[\0\ud800-\udfff]")  # JSON can spell these, files and tokenizers cannot
MISSING_S = 0.1  # audio may be so much shorter than its row says: rounding, and an MP3's last frame
MAPPED_BYTES = 1 << 26  # manifests from this size on are mapped, and their index is kept on disk
INDEX_VERSION, INDEX_HEADER = 1, 4096  # the latter in bytes, so that columns begin at a page
TAR_MEMBER = re.compile(r"(.+\.tar):(\d+):(\d+)", re.DOTALL | re.ASCII)  # shard, first byte, bytes
SEEK_LEAD = 9216  # samples decoded ahead of the wanted ones: an MP3 frame needs the ones before it


def paths_of(comma_list: str | None) -> list[Path]:
    """`a.jsonl,b.jsonl` -> [Path, Path]."""
    return [Path(part) for part in (comma_list or "").split(",") if part]


# ---------------------------------------------------------------------------------------- manifests


def row_fault(row: object, text_required: bool) -> tuple[str, str] | None:
    """What is wrong with one manifest row: (reason, what was found), or None when it may be used.

    Paths must be local: a manifest is data, and data never runs a command or opens a connection.
    """
    if isinstance(row, Exception):
        return "not a JSON line", str(row)
    if not isinstance(row, dict):
        return "not a JSON object", repr(row)[:80]
    for key in ("audio_filepath", "duration", "text"):
        if key not in row and (key != "text" or text_required):
            return f'no "{key}"', f"keys are {sorted(row)}"
    path, text = row["audio_filepath"], row.get("text", "")
    if not isinstance(path, str) or not path.strip():
        return "audio_filepath is not a path", repr(path)
    if path.strip().startswith("|") or path.strip().endswith("|"):
        advice = f"convert it first: {path.strip().strip('|').strip()} > clip.wav"
        return "audio_filepath is a pipe, and pipes are never run", advice
    if "://" in path:
        return "audio_filepath is a URL, download it first", path
    if ".." in path.split("/"):
        return "audio_filepath leaves its folder by '..', give an absolute path", path
    duration, offset = row["duration"], row.get("offset", 0.0)
    if type(duration) not in (int, float) or not 0 < duration < MAX_S:
        return "duration is not a positive number of seconds", repr(duration)[:80]
    if type(offset) not in (int, float) or not 0 <= offset < MAX_S:
        return "offset is not a number of seconds from 0 on", repr(offset)[:80]
    if not isinstance(text, str):
        return "text is not a string", repr(text)[:80]
    if NO_CHARACTER.search(path + text):
        return "path or text holds half a surrogate pair or NUL", ascii(path + text)[:80]
    return None


def parse_rows(lines: Iterable[bytes]) -> Iterator[tuple[int, int, int, object]]:
    """(line number, first byte, end, parsed JSON or the error met) of each non-blank line."""
    start = 0
    for number, line in enumerate(lines, 1):
        stop = start + len(line)
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                row = error
            yield number, start, stop, row
        start = stop


def read_bytes(path: Path, what: str) -> bytes:
    """The whole file. Raises FileNotFoundError naming what it should have been."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{what} {path}: no such file")
    return Path(path).read_bytes()


# What is known of each row, a number a row. Text: 0 where the row has none, 1 a blank one, 2 words.
COLUMNS = {
    "durations": np.dtype(np.float64),  # seconds
    "start": np.dtype(np.int64),  # first byte of the row in its file
    "size": np.dtype(np.int32),  # bytes
    "line": np.dtype(np.int32),  # from 1
    "text_kind": np.dtype(np.int8),
}


def _scan(path: Path, lines: Iterable[bytes]) -> dict[str, np.ndarray]:
    """The columns of a manifest's rows. Raises ValueError for the first bad row, or without any."""
    columns = {name: array(kind.char) for name, kind in COLUMNS.items()}
    durations, starts, sizes, numbers, kinds = columns.values()
    for number, start, stop, row in parse_rows(lines):
        if fault := row_fault(row, False):
            raise ValueError(f"{path}:{number}: {fault[0]} ({fault[1]})")
        durations.append(row["duration"])
        starts.append(start)
        sizes.append(stop - start)
        numbers.append(number)
        kinds.append(1 + bool(row["text"].strip()) if "text" in row else 0)
    if not durations:
        raise ValueError(f"manifest {path}: no rows; make one with data.py manifest")
    return {name: np.frombuffer(columns[name], kind) for name, kind in COLUMNS.items()}


def _load_index(path: Path, state: list[int]) -> tuple[str, dict[str, np.ndarray]] | None:
    """Hash and columns, mapped, of the manifest in this state; None if the index is not of it."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(INDEX_HEADER))
        n_rows, row_bytes = header["rows"], sum(kind.itemsize for kind in COLUMNS.values())
        whole = path.stat().st_size == INDEX_HEADER + n_rows * row_bytes
        if header["state"] != state or not whole:
            return None
        columns, offset = {}, INDEX_HEADER
        for name, kind in COLUMNS.items():
            columns[name] = np.asarray(np.memmap(path, kind, "r", offset, (n_rows,)))
            offset += n_rows * kind.itemsize
        return header["sha256"], columns
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not one of ours
        return None


def _index(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """Hash and columns of a large manifest; kept beside it, so that the next start is quick.

    The index goes by the manifest's size and time. Where it cannot be written, it is done without.
    Raises: ValueError for the first bad row.
    """
    index, its = path.with_name(path.name + ".index"), path.stat()
    state = [INDEX_VERSION, its.st_size, its.st_mtime_ns]
    if found := _load_index(index, state):
        return found
    digest = hashlib.sha256()
    with path.open("rb") as lines:
        columns = _scan(path, lines)
        lines.seek(0)
        while block := lines.read(1 << 20):
            digest.update(block)

    def write(sink: io.BufferedWriter) -> None:
        header = {"state": state, "sha256": digest.hexdigest(), "rows": len(columns["start"])}
        sink.write(json.dumps(header).encode().ljust(INDEX_HEADER))
        for column in columns.values():
            sink.write(column.data)

    try:
        write_atomically(index, write)
    except OSError:  # a folder that may only be read
        return digest.hexdigest(), columns
    return _load_index(index, state) or (digest.hexdigest(), columns)


class ManifestFile(NamedTuple):
    """A manifest on disk."""

    path: Path
    buffer: bytes | mmap.mmap
    sha256: str

    @classmethod
    def open(cls, path: Path) -> tuple[ManifestFile, dict[str, np.ndarray]]:
        """The file and its rows' columns. Raises FileNotFoundError; ValueError for a bad row."""
        if not path.is_file() or path.stat().st_size < MAPPED_BYTES:
            buffer = read_bytes(path, "manifest")
            columns = _scan(path, io.BytesIO(buffer))
            return cls(path, buffer, hashlib.sha256(buffer).hexdigest()), columns
        sha256, columns = _index(path)
        return cls(path, _mapped(path), sha256), columns

    def __reduce__(self) -> tuple:
        """A process that was not forked maps a large one for itself."""
        if isinstance(self.buffer, bytes):
            return ManifestFile, tuple(self)
        return _reopened, (self.path, self.sha256)


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _reopened(path: Path, sha256: str) -> ManifestFile:
    return ManifestFile(path, _mapped(path), sha256)


@dataclass(frozen=True)
class Manifest:
    """Utterances of JSON-lines manifests, as bytes and arrays, which forked workers share.

    A row on disk has NeMo's keys: {"audio_filepath": "a/b.flac", "duration": 3.2, "offset": 0.0,
    "text": "hello", ...}; seconds; the path absolute or relative to the manifest's folder; offset
    and text may be missing; further keys are kept.

    A small manifest is held in memory. One of MAPPED_BYTES or more stays on disk, with an index
    beside it, `NAME.jsonl.index`: both are mapped, and all processes of a machine share them (the
    columns not if there are several manifests, or rows are left out). It may be replaced while it
    is in use, as write_atomically does, but not edited in place.
    """

    files: tuple[ManifestFile, ...]
    file: np.ndarray  # (n,) int16, which of the files
    durations: np.ndarray  # (n,) float64, seconds
    start: np.ndarray  # (n,) int64, first byte of the row there
    size: np.ndarray  # (n,) int32, bytes
    line: np.ndarray  # (n,) int32, from 1
    text_kind: np.ndarray  # (n,) int8, as COLUMNS has it

    @classmethod
    def read(cls, paths: Iterable[Path | str], *, text_required: bool = False) -> Manifest:
        """Read and check manifests; several are concatenated.

        Raises: FileNotFoundError for a missing manifest; ValueError naming file and line of the
                first bad row, or for a manifest without rows.
        """
        files, parts = zip(*map(ManifestFile.open, map(Path, paths)))
        file = np.repeat(
            np.arange(len(files), dtype=np.int16), [len(its["start"]) for its in parts]
        )
        columns = {name: [its[name] for its in parts] for name in COLUMNS}
        joined = {n: c[0] if len(c) == 1 else np.concatenate(c) for n, c in columns.items()}
        manifest = cls(files, file, **joined)
        if text_required and not manifest.text_kind.all():
            i = int(np.argmin(manifest.text_kind))
            reason, found = row_fault(manifest.row(i), True)
            raise ValueError(f"{manifest.where(i)}: {reason} ({found})")
        return manifest

    def __len__(self) -> int:
        return len(self.durations)

    @property
    def has_text(self) -> np.ndarray:
        """(n,) bool, a text that is not blank."""
        return self.text_kind == 2

    def row(self, i: int) -> dict:
        """Row i as a dict, its audio_filepath resolved against the manifest's folder.

        Raises: ValueError where a large manifest was edited in place.
        """
        its, start = self.files[self.file[i]], int(self.start[i])
        try:
            row = json.loads(its.buffer[start : start + int(self.size[i])])
            row["audio_filepath"] = str(its.path.parent / row["audio_filepath"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.where(i)}: was changed while it was in use") from error
        return row

    def text(self, i: int) -> str:
        return self.row(i).get("text", "")

    def where(self, i: int) -> str:
        """`file:line` of row i, for messages."""
        return f"{self.files[self.file[i]].path}:{self.line[i]}"

    def places(self) -> list[str]:
        """`file:line` of every row."""
        return [self.where(i) for i in range(len(self))]

    @property
    def fingerprint(self) -> str:
        """Hash of all rows as they stand in the files: what a resumed run must find again."""
        return hashlib.sha256("".join(its.sha256 for its in self.files).encode()).hexdigest()[:16]

    def filtered(self, keep: np.ndarray) -> Manifest:
        """The rows where keep (n,) bool is True, in order; the bytes are shared."""
        if keep.all():
            return self
        return replace(self, **{name: getattr(self, name)[keep] for name in ("file", *COLUMNS)})


class AudioError(ValueError):
    """Audio that cannot be used. The message is one line that names the file.

    Attributes: reason  the same of all files with the same fault, for counting;
                where   `file:line` of the manifest's row, once it is known.
    """

    def __init__(self, message: str, reason: str = "cannot be read", where: str = "") -> None:
        super().__init__(f"{where}: {message}" if where else message)
        self.message, self.reason, self.where = message, reason, where


def one_line(name: object) -> str:
    """A file's name with escapes in place of what is no printable character: a line end, say."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name))


def audio_source(path: Path | str) -> Path | str | io.BytesIO:
    """What soundfile opens: the file, or of `SHARD.tar:FIRST:SIZE` those bytes of it, in memory.

    Raises: AudioError where there is no such file, or it ends before those bytes.
    """

    def fault(reason: str) -> AudioError:
        return AudioError(f"{one_line(path)}: {reason}", reason)

    member = TAR_MEMBER.fullmatch(str(path))
    file = member[1] if member else path
    if not os.path.isfile(file):
        if member:
            raise fault("no such shard")
        raise fault("a link to nothing" if os.path.islink(path) else "no such audio file")
    if not member:
        return path
    first, size = int(member[2]), int(member[3])
    with open(file, "rb") as shard:
        if first + size > os.fstat(shard.fileno()).st_size:
            raise fault("its shard is cut short")
        shard.seek(first)
        return io.BytesIO(shard.read(size))


def read_part(
    audio: soundfile.SoundFile, offset: float, duration: float | None, dtype: str = "float32"
) -> np.ndarray:
    """Part of an open file at its own rate: (N, channels) of dtype; arguments as in read_audio."""
    start = round(offset * audio.samplerate)
    wanted = -1 if duration is None else max(1, round(duration * audio.samplerate))
    lead = min(start, SEEK_LEAD)
    audio.seek(min(start - lead, audio.frames))
    samples = audio.read(wanted if wanted < 0 else lead + wanted, dtype, always_2d=True)
    return samples[lead:]


def read_audio(path: Path | str, offset: float = 0.0, duration: float | None = None) -> np.ndarray:
    """Part of an audio file as mono at 16 kHz: channels averaged, other rates resampled (soxr HQ).

    Args:    path              a file, or `SHARD.tar:FIRST:SIZE`: so many bytes of a tar from FIRST.
             offset, duration  seconds; None reads to the end, and no file is read beyond its end.
    Returns: (N,) float32 in [-1, 1].
    Raises:  AudioError where there is no such file, where it cannot be decoded, has nothing from
             offset on, or holds NaN.
    """

    def fault(reason: str, detail: str = "") -> AudioError:
        return AudioError(f"{one_line(path)}: {reason}{detail}", reason)

    try:
        with soundfile.SoundFile(audio_source(path)) as audio:
            rate, samples = audio.samplerate, read_part(audio, offset, duration)
    except (RuntimeError, OSError, TypeError) as error:
        found = one_line(getattr(error, "error_string", error)) or type(error).__name__
        raise fault("cannot decode audio", f" ({found})") from error
    samples = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)  # (N,)
    if not len(samples):
        raise fault("no audio", f" from {offset:g} s on")
    if not np.isfinite(samples).all():
        raise fault("holds NaN or infinite samples")
    if rate != SAMPLE_RATE:
        samples = soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ")
    return samples


# --------------------------------------------------------------------------------------------- text


class Tokenizer:
    """SentencePiece with fixed special ids. The case rule is part of the model's bytes.

    [CLS], [SEP] and [MASK] are control symbols, so no text, not even one that spells "[MASK]", is
    encoded to them. Raises ValueError for bytes that are no such model.
    """

    def __init__(self, model_bytes: bytes) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
            ids = [self._processor.piece_to_id(name) for name in ("[CLS]", "[SEP]", "[MASK]")]
        except RuntimeError as error:
            raise ValueError("not a SentencePiece model") from error
        if ids != [CLS_ID, SEP_ID, MASK_ID]:
            raise ValueError(
                f"ids of [CLS], [SEP], [MASK] are {ids}; train one by data.py tokenizer"
            )
        self.model_bytes = model_bytes
        self.vocab_size: int = self._processor.get_piece_size()
        cases = {"a1": "lower", "A1": "keep"}
        self.text_case = cases.get(self._processor.normalize("A¹").strip(" \u2581"), "exact")
        self.fingerprint = hashlib.sha256(model_bytes).hexdigest()[:16]

    @classmethod
    def train(
        cls,
        lines: Iterable[str],
        vocab_size: int,
        text_case: str = "lower",
        model_type: str = "unigram",
        symbols: Iterable[str] = (),
    ) -> Tokenizer:
        """Train on lines of text; the same lines give the same bytes.

        UNSPECIFIED IN PAPER: model type and letter case. A small corpus may give fewer pieces.

        Args:   text_case  lower; keep; or exact: keep, and no character is replaced by a like one
                           (`½`, `…`, full-width letters), so that decoding gives back all texts.
                symbols    strings that are one piece each wherever they occur.
        Raises: ValueError where there is no text, or too little vocabulary for its characters.
        """
        rules = {"lower": "nmt_nfkc_cf", "keep": "nmt_nfkc", "exact": "identity"}
        sink = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(line for line in map(str.strip, lines) if line),
                model_writer=sink,
                vocab_size=vocab_size,
                model_type=model_type,
                hard_vocab_limit=False,
                normalization_rule_name=rules[text_case],
                pad_id=PAD_ID,
                unk_id=UNK_ID,
                bos_id=-1,
                eos_id=-1,
                control_symbols=["[CLS]", "[SEP]", "[MASK]"],  # take ids 2, 3, 4
                user_defined_symbols=list(symbols),
                required_chars=REQUIRED_CHARACTERS,
                max_sentence_length=16384,  # bytes; longer lines are skipped
                num_threads=1,  # sums in one order: reproducible to the byte
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).split("] ")[-1].split(" Increase")[0].strip()
            reason = reason or "is there any text?"
            raise ValueError(f"no tokenizer of --vocab-size {vocab_size}: {reason}") from error
        return cls(sink.getvalue())

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        model_bytes = read_bytes(Path(path), "tokenizer")
        try:
            return cls(model_bytes)
        except ValueError as error:
            raise ValueError(f"tokenizer {path}: {error}") from error

    def save(self, path: Path | str) -> None:
        write_atomically(Path(path), lambda sink: sink.write(self.model_bytes))

    def encode(self, text: str | list[str]) -> list:
        """Ids of a text, or of each text of a list. Of the special ids only the unknown's."""
        return self._processor.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids])


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file, plain or gzipped, stripped, one at a time.

    Raises: FileNotFoundError; ValueError naming the file where it is not UTF-8, or broken gzip.
    """
    if not path.is_file():
        raise FileNotFoundError(f"text {path}: no such file")
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    try:
        with (gzip.open if zipped else open)(path, "rt", encoding="utf-8-sig") as lines:
            yield from map(str.strip, lines)
    except UnicodeDecodeError as error:
        raise ValueError(f"text {path}: not UTF-8 ({error.reason})") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"text {path}: broken gzip, or cut short ({error})") from error


def read_text(path: Path, field: str | None, report: Report) -> Iterator[str]:
    """Lines of text, stripped, a blank one between documents: of plain text or of JSON lines.

    A JSON line is a document. Lines that hold no text are counted in the report and left out.

    Args:   field  the key of a JSON line's text; None: files named .json or .jsonl have it in
                   "text", and others are plain.
    Raises: as read_lines.
    """
    if field is None and not path.name.lower().endswith(JSON_SUFFIXES):
        yield from read_lines(path)
        return
    field = field or "text"
    for number, line in enumerate(read_lines(path), 1):
        try:
            text = json.loads(line)[field] if line else ""
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            text = error
        if not isinstance(text, str) or NO_CHARACTER.search(text):
            report.reject(f'not a JSON object with text in "{field}"', f"{path}:{number}")
            continue
        yield from filter(None, map(str.strip, text.splitlines()))
        yield ""


def write_text(paths: Iterable[Path], out: Path, field: str | None, report: Report) -> int:
    """Join text files into one of plain lines, one blank line between documents, none elsewhere.

    Args:    field, report  as of read_text; the report's rows are the lines written.
    Returns: the number of documents.
    Raises:  as read_lines; ValueError where there is no text.
    """
    n_documents = 0

    def write(sink: io.BufferedWriter) -> None:
        nonlocal n_documents
        for path in paths:
            begins = True  # so does each file
            for line in read_text(path, field, report):
                if line:
                    gap = "\n" if begins and n_documents else ""
                    n_documents, begins = n_documents + begins, False
                    sink.write(f"{gap}{line}\n".encode())
                    report.rows += 1
                else:
                    begins = True
        report.demand_rows(f"text {out}")

    write_atomically(out, write)
    return n_documents


def _tokenise(source: Path, tokenizer: Tokenizer, tokens_path: Path, dtype: type) -> None:
    """Write the token stream (each line's ids, then [SEP]) and where lines and documents end."""

    def write_tokens(sink: io.BufferedWriter) -> None:
        line_ends, document_ends = array("q"), array("q")  # in tokens; in lines
        counts = np.zeros(tokenizer.vocab_size, np.int64)
        lines, total = read_lines(source), 0
        while texts := list(islice(lines, 10_000)):
            stream: list[int] = []
            for text, ids in zip(texts, tokenizer.encode(texts)):
                if ids:
                    stream += ids
                    stream.append(SEP_ID)
                    line_ends.append(total + len(stream))
                elif not text and line_ends:
                    document_ends.append(len(line_ends))
            total += len(stream)
            counts += np.bincount(np.array(stream, np.int64), minlength=len(counts))
            np.array(stream, dtype).tofile(sink)
        if not total:
            raise ValueError(f"text {source}: no text; expected sentences, one a line")
        document_ends.append(len(line_ends))
        index = {
            "line_ends": line_ends,
            "document_ends": np.unique(document_ends),
            "counts": counts,
        }
        write_atomically(tokens_path.with_suffix(".npz"), lambda sink: np.savez(sink, **index))

    write_atomically(tokens_path, write_tokens)  # gets its name last, when the index is there


@dataclass(frozen=True)
class TextCorpus:
    """Tokenised text on disk: plain lines, in which a blank one ends a document."""

    paths: tuple[Path, ...]  # token files, each with an .npz index beside it
    dtype: type
    vocab_size: int

    @classmethod
    def open(
        cls, paths: Iterable[Path | str], tokenizer: Tokenizer, cache_dir: Path | str | None = None
    ) -> TextCorpus:
        """Tokenise text files to disk, once; later calls find that. Several are concatenated.

        The tokens lie beside each source, or in cache_dir, under a name that changes with the
        tokenizer and with the source's size and time.
        Raises: FileNotFoundError; ValueError for no text, for text that is not UTF-8, for JSON
                lines, or where the tokens cannot be written.
        """
        dtype = np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32
        cached = []
        for source in map(Path, paths):
            if not source.is_file():
                raise FileNotFoundError(f"text {source}: no such file")
            if source.name.lower().endswith(JSON_SUFFIXES):
                advice = f"`python data.py text {source} --out text.txt`"
                raise ValueError(f"text {source}: JSON lines; make plain ones of them: {advice}")
            state = source.stat()
            key = f"{source.resolve()} {state.st_size} {state.st_mtime_ns} {tokenizer.fingerprint}"
            folder = Path(cache_dir) if cache_dir else source.parent
            path = folder / f"{source.name}.{hashlib.sha256(key.encode()).hexdigest()[:16]}.tokens"
            if not (path.is_file() and path.with_suffix(".npz").is_file()):
                try:
                    _tokenise(source, tokenizer, path, dtype)
                except OSError as error:
                    raise ValueError(f"{folder}: cannot write the token cache ({error})") from error
            cached.append(path)
        return cls(tuple(cached), dtype, tokenizer.vocab_size)

    @property
    def fingerprint(self) -> str:
        """Hash of where lines and documents end and of how often each id occurs."""
        digest = hashlib.sha256()
        for path in self.paths:
            index = np.load(path.with_suffix(".npz"))
            for name in ("line_ends", "document_ends", "counts"):
                digest.update(index[name].tobytes())
        return digest.hexdigest()[:16]

    @property
    def counts(self) -> np.ndarray:
        """(V,) int64, how often each id occurs ([SEP] once a line)."""
        return sum(np.load(path.with_suffix(".npz"))["counts"] for path in self.paths)


# ------------------------------------------------------------------------------- reports and tables


@dataclass
class Report:
    """What an import or a check found. rejected: reason to (number of rows, the first of them)."""

    rows: int = 0
    seconds: float = 0.0
    speakers: set[str] = field(default_factory=set)
    of_split: Counter[str] = field(default_factory=Counter)  # rows
    rejected: dict[str, tuple[int, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what else there is to know

    def accept(self, row: dict) -> None:
        self.rows += 1
        self.seconds += row["duration"]
        if "speaker" in row:
            self.speakers.add(str(row["speaker"]))
        if "split" in row:
            self.of_split[str(row["split"])] += 1

    def reject(self, reason: str, example: str) -> None:
        count, first = self.rejected.get(reason, (0, one_line(example)))
        self.rejected[reason] = (count + 1, first)

    def counts(self) -> dict[str, int]:
        """Reason to number of rejected rows."""
        return {reason: count for reason, (count, _) in self.rejected.items()}

    def __str__(self) -> str:
        lines = [f"{self.rows} rows"]
        if self.seconds:
            lines[0] += f", {self.seconds / 3600:.2f} hours"
            lines[0] += f", {len(self.speakers) or 'unknown'} speakers"
        return "\n".join([*lines, *self.left_out(), *self.notes])

    def left_out(self) -> list[str]:
        """A line for each reason."""
        return [
            f"rejected {count}: {reason} (first: {first})"
            for reason, (count, first) in self.rejected.items()
        ]

    def demand_rows(self, what: str) -> None:
        if not self.rows:
            raise ValueError(f"{what}: 0 usable rows; {self}".replace("\n", "; "))


def read_table(
    path: Path, columns: Iterable[str], report: Report, *, escaped: bool = False
) -> Iterator[dict[str, str]]:
    """Rows of a tab-separated file with a header; quotes mean nothing.

    Rows with another number of cells than the header are counted in the report and left out.

    Args:   escaped  a backslash stands before a character that is to be taken as it is.
    Raises: FileNotFoundError; ValueError for a missing column, or where it is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as lines:
            header = next(lines, "").rstrip("\r\n").split("\t")
            if missing := [name for name in columns if name not in header]:
                raise ValueError(f"{path}: no column {missing[0]!r}; the header has {header}")
            for number, line in enumerate(lines, 2):
                cells = line.rstrip("\r\n").split("\t")
                if escaped and "\\" in line:
                    how = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "escapechar": "\\"}
                    cells = next(csv.reader([line.rstrip("\r\n")], **how))
                if len(cells) != len(header):
                    report.reject(f"not {len(header)} cells", f"{path}:{number}")
                else:
                    yield dict(zip(header, cells))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason})") from error


def too_short(seconds: float) -> bool:
    """Whether audio is too short for one encoder frame to be masked and one to be seen."""
    return subsampled_lens(n_frames(round(seconds * SAMPLE_RATE))) < MIN_ENC_FRAMES


def check_manifest(
    path: Path,
    max_audio_s: float = math.inf,
    read: bool = False,
    *,
    workers: int = 8,
    out: Path | None = None,
    texts: list[str] | None = None,
) -> Report:
    """Count good and bad rows of a manifest, where Manifest.read stops at the first bad one.

    Rows that training leaves out are counted with the bad ones.

    Args:   read     decode all audio, so many files at a time as there are workers.
            out      a manifest to write the good rows to, with absolute paths.
            texts    the good rows' transcripts that are not blank are added to it.
    Raises: FileNotFoundError; ValueError where no row is good.
    """
    report, rows = Report(), parse_rows(io.BytesIO(read_bytes(path, "manifest")))

    def fault_of(row: object) -> tuple[str, str] | None:
        fault = row_fault(row, False)
        if not fault and too_short(row["duration"]):
            fault = "shorter than two encoder frames", f"{row['duration']:g} s"
        if not fault and row["duration"] > max_audio_s:
            fault = f"longer than --max-audio-s {max_audio_s:g}", f"{row['duration']:g} s"
        if not fault and read:
            fault = _audio_fault(path.parent / row["audio_filepath"], row)
        return fault

    def check(sink: io.BufferedWriter | None) -> None:
        with ThreadPoolExecutor(workers) as pool:
            while block := list(islice(rows, 1000)):
                faults = pool.map(fault_of, [row for *_, row in block])
                for (number, *_, row), fault in zip(block, faults):
                    if fault:
                        report.reject(fault[0], f"{path}:{number}: {fault[1]}")
                        continue
                    report.accept(row)
                    if texts is not None and row.get("text", "").strip():
                        texts.append(row["text"])
                    if sink:
                        row["audio_filepath"] = os.path.abspath(path.parent / row["audio_filepath"])
                        sink.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        report.demand_rows(f"manifest {path}")

    write_atomically(out, check) if out else check(None)
    return report


def _audio_fault(path: Path, row: dict) -> tuple[str, str] | None:
    try:
        seconds = len(read_audio(path, row.get("offset", 0.0), row["duration"])) / SAMPLE_RATE
    except AudioError as error:
        return f"audio cannot be read: {error.reason}", str(error)
    if seconds < row["duration"] - MISSING_S:
        found = f"{one_line(path)}: {seconds:.2f} s of {row['duration']:g} s"
        return "audio ends before its row does", found
    return None


# ------------------------------------------------------------------------------------- text tasks


class GlueTask(NamedTuple):
    """How a GLUE task's files look."""

    folder: str
    labels: tuple[str, ...]
    texts: tuple[str, ...]  # columns of the sentence, or of both
    label: str  # column of the label; test files have none


GLUE = {
    "mnli": GlueTask(
        "MNLI",
        ("entailment", "neutral", "contradiction"),
        ("sentence1", "sentence2"),
        "gold_label",
    ),
    "qnli": GlueTask("QNLI", ("entailment", "not_entailment"), ("question", "sentence"), "label"),
    "qqp": GlueTask("QQP", ("0", "1"), ("question1", "question2"), "is_duplicate"),
    "sst2": GlueTask("SST-2", ("0", "1"), ("sentence",), "label"),
}


class TextExample(NamedTuple):
    """A sentence or a pair of sentences, and its label where the file has one."""

    id: str
    texts: tuple[str, ...]
    label: str | None


def read_glue(task: str, paths: Iterable[Path | str]) -> tuple[list[TextExample], Report]:
    """Examples of a GLUE task's TSV files as they are distributed.

    Malformed rows, of which QQP has some, and labels that the task does not have ("-" in MNLI) are
    counted in the report and left out. A file without the column of labels is a test file.
    Raises: FileNotFoundError; ValueError for a missing column, or where nothing is usable.
    """
    its, report, examples = GLUE[task], Report(), []
    for path in map(Path, paths):
        for number, row in enumerate(read_table(path, its.texts, report)):
            label = row.get(its.label)
            name = row.get("index", row.get("id", str(number)))
            if label is not None and label not in its.labels:
                report.reject(f"label is not one of {', '.join(its.labels)}", f"{path}: {name}")
            else:
                texts = tuple(row[column] for column in its.texts)
                examples.append(TextExample(name, texts, label))
    report.rows = len(examples)
    report.demand_rows(f"{task} {', '.join(map(str, paths))}")
    return examples, report


class SpokenToken(NamedTuple):
    """A written token and how it is read out; what they call a semiotic class says what it is."""

    semiotic_class: str  # PLAIN, PUNCT, DATE, MONEY, ...
    written: str
    spoken: str  # "<self>": as it is written; "sil": not at all


def textnorm_files(paths: Iterable[Path | str]) -> list[Path]:
    """Google's text normalisation files: of a folder all its output-*-of-*."""
    return [
        file
        for path in map(Path, paths)
        for file in (sorted(path.glob("output-*-of-*")) if path.is_dir() else [path])
    ]


def textnorm_sentences(path: Path, report: Report) -> Iterator[list[SpokenToken]]:
    """Sentences of one file: class, written and spoken form a line, `<eos>` after each sentence.

    Lines that are not so, and the sentences that they are in, are counted in the report and left
    out. Raises as read_lines.
    """
    sentence: list[SpokenToken] = []
    is_whole = True
    for number, line in enumerate(read_lines(path), 1):
        cells = line.split("\t")
        if cells[0] == "<eos>":
            if sentence and is_whole:
                report.rows += 1
                yield sentence
            sentence, is_whole = [], True
        elif len(cells) == 3:
            sentence.append(SpokenToken(*cells))
        else:
            report.reject("not class, written, spoken", f"{path}:{number}")
            is_whole = False  # a sentence with a gap teaches and tests the wrong thing
    if sentence:
        report.reject("sentence without <eos>", str(path))


def read_textnorm(paths: Iterable[Path | str]) -> tuple[list[list[SpokenToken]], Report]:
    """All sentences of Google's text normalisation files, or of the folders of them.

    Raises: FileNotFoundError; ValueError where nothing is usable.
    """
    report, paths = Report(), list(paths)
    files = textnorm_files(paths)
    sentences = [sentence for file in files for sentence in textnorm_sentences(file, report)]
    report.demand_rows(f"text normalisation {', '.join(map(str, paths))}")
    return sentences, report
