"""Tar shards: many utterances in one file, for disks on which small files are slow.

A shard is a plain tar in WebDataset's convention: files of one sample share their name up to its
first dot, `KEY.flac` with `KEY.txt` (the transcript) or `KEY.json` (fields of the manifest's row).
Nothing is ever taken out of a shard. A row of a manifest says where its audio lies in it,

    {"audio_filepath": "train-000001.tar:1536:81234", "duration": 3.2, ...}

by first byte and size, as fairseq does with zip files: any row is one seek and one read, in any
order (corpora.audio_source). Between importers.py, whose way to write manifests is used, and
data.py, which has the command line.

Public:  shards_manifest, write_shards.
"""

from __future__ import annotations

import glob
import io
import json
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from corpora import (
    AUDIO_SUFFIXES,
    MISSING_S,
    NO_CHARACTER,
    AudioError,
    Manifest,
    Report,
    audio_source,
    one_line,
    parse_rows,
    read_part,
)
from importers import WORKERS, write_manifest
from training import write_atomically

SAMPLE_FILE = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)  # key, all suffixes
COMPRESSED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz)$")
MOST_TEXT = 1 << 20  # bytes of a .txt or .json; what is longer is no transcript

# ------------------------------------------------------------------------------- shards to manifest


def shards_manifest(root: Path | str, out: Path | str, *, workers: int = WORKERS) -> Report:
    """Manifest of tar files in WebDataset's convention: KEY.flac with KEY.txt or KEY.json.

    Any audio that is read elsewhere; of a .json all fields but path, offset and duration are kept.
    Samples of a shard that is broken or cut short are used up to there, and it is counted.

    Args:    root  a folder with .tar files, at any depth, or a pattern of them.
    Raises:  FileNotFoundError; ValueError where nothing is usable.
    """
    paths, report = _shards_of(str(root)), Report()

    def candidates() -> Iterator[dict]:
        left = iter(paths)
        with ThreadPoolExecutor(workers) as pool:
            while block := list(islice(left, 4 * workers)):
                for rows, faults in pool.map(scan_shard, block):
                    for fault in faults:
                        report.reject(*fault)
                    yield from rows

    return write_manifest(out, candidates(), report, workers)


def _shards_of(root: str) -> list[Path]:
    """Shards in a folder or of a pattern, compressed ones among them, which are then counted."""
    if Path(root).is_dir():
        found = [path for path in Path(root).rglob("*") if path.is_file()]
        found = [its for its in found if its.suffix == ".tar" or COMPRESSED.search(its.name)]
    else:
        found = [Path(path) for path in glob.glob(root, recursive=True)]
    if not found:
        raise FileNotFoundError(
            f"{root}: no .tar there; expected a folder of them, or a pattern with * in quotes"
        )
    return sorted(path.resolve() for path in found)


def scan_shard(path: Path) -> tuple[list[dict], list[tuple[str, str]]]:
    """Rows of one shard, their durations not known yet; (reason, example) of what is wrong in it.

    Reads the headers and the texts; audio is passed over.
    """
    if path.suffix != ".tar":
        return [], [("not named .tar; unpack compressed ones, they are read in place", str(path))]
    samples: dict[str, dict] = {}
    faults: list[tuple[str, str]] = []
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if fault := _add_member(samples, tar, member):
                    faults.append((fault, f"{path}: {member.name}"))
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("does not end with a block of zeros")
    except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError) as error:
        reason = "shard is broken, or cut short" if samples else "no tar file, or a compressed one"
        faults.append((reason, f"{path}: {one_line(error)}"))
    rows = []
    for key, sample in samples.items():
        fault = sample.pop("fault", None) or ("" if "audio" in sample else "sample without audio")
        row = {"audio_filepath": f"{path}:{sample.pop('audio', '')}", "id": key} | sample
        if not fault and NO_CHARACTER.search(json.dumps(row, ensure_ascii=False)):
            fault = "name or fields hold half a surrogate pair"
        if fault:
            faults.append((fault, f"{path}: {key}"))
        else:
            rows.append(row)
    return rows, faults


def _add_member(
    samples: dict[str, dict], tar: tarfile.TarFile, member: tarfile.TarInfo
) -> str | None:
    """Note a member in its sample: "audio" as FIRST:SIZE, fields, text -> what is wrong, or None.

    What makes the sample unusable is in its "fault".
    """
    name = SAMPLE_FILE.fullmatch(member.name)
    kind = "." + name[2].rpartition(".")[2].lower() if name else ""
    if kind not in (*AUDIO_SUFFIXES, ".txt", ".json"):
        return None  # a folder, or what is not of our business
    if not member.isreg() or member.issparse():
        return "a link or a file with holes in a shard"
    sample = samples.setdefault(name[1], {})
    if kind in AUDIO_SUFFIXES:
        if "audio" in sample:
            return "a second audio file of its sample (a key ends at the first dot of a name)"
        sample["audio"] = f"{member.offset_data}:{member.size}"
        return None
    if member.size > MOST_TEXT:
        sample["fault"] = f"{kind} of more than {MOST_TEXT >> 20} MiB"
        return None
    content = tar.extractfile(member).read()
    try:
        text = content.decode("utf-8-sig")
        if kind == ".txt":
            sample["text"] = " ".join(text.split())
        else:
            fields = {k: v for k, v in json.loads(text).items() if k not in OUR_FIELDS}
            samples[name[1]] = fields | sample  # a .txt has the last word
    except (ValueError, AttributeError, RecursionError):
        sample["fault"] = "its .txt is not UTF-8" if kind == ".txt" else "its .json is no object"
    return None


# Of a .json these are not kept: they would be of another file than this one, or are ours.
OUR_FIELDS = ("audio_filepath", "offset", "duration", "audio", "fault")

# ------------------------------------------------------------------------------- manifest to shards


class Sample(NamedTuple):
    """An utterance on its way into a shard."""

    i: int  # row of the manifest
    row: dict  # its fields, without path and offset
    suffix: str
    audio: bytes


def write_shards(
    source: Path, out_dir: Path, shard_mib: float, *, workers: int = WORKERS
) -> tuple[Path, int, Report]:
    """Pack a manifest's audio into out_dir/NAME-000000.tar, ..., and write out_dir/NAME.jsonl.

    A row that is all of its file goes in byte for byte, one that is a part of it as FLAC (as WAV of
    floats if it is louder than FLAC can say), with the samples that it has, at its rate. Rows whose
    audio cannot be used are left out and counted. Each shard has its name when it is whole, and is
    then entered in NAME.jsonl.partial; when started again, packing goes on after the last one.

    Returns: the new manifest, the number of shards, and what was packed.
    Raises:  FileNotFoundError; ValueError where the manifest is there already, where shards are of
             another manifest, or nothing is usable.
    """
    manifest, out, report = Manifest.read([source]), out_dir / source.name, Report()
    if out.exists():
        raise ValueError(f"{out}: is there already; delete it, or name another folder")
    entries = _Entries.find(out, [manifest.fingerprint, shard_mib])
    faults: list[tuple[str, str]] = []
    samples = _samples(manifest, entries.following(), workers, faults)
    sample = next(samples, None)
    while sample is not None:
        name, rows = f"{source.stem}-{len(entries.done):06d}.tar", []

        def write(sink: io.BufferedWriter) -> None:
            nonlocal sample
            with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                while sample is not None and (tar.offset < shard_mib * 2**20 or not rows):
                    rows.append(_put(tar, name, sample))
                    sample = next(samples, None)

        write_atomically(out_dir / name, write)
        following = len(manifest) if sample is None else sample.i
        entries.add({"shard": name, "next": following, "rows": rows, "faults": faults})
        faults.clear()

    def write_rows(sink: io.BufferedWriter) -> None:
        for entry in [*entries.done, {"rows": [], "faults": faults}]:
            for fault in entry["faults"]:
                report.reject(*fault)
            for row in entry["rows"]:
                report.accept(row)
                sink.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        report.demand_rows(f"manifest {source}")

    write_atomically(out, write_rows)
    entries.path.unlink(missing_ok=True)
    return out, len(entries.done), report


class _Entries:
    """The shards that are done, one a line in NAME.jsonl.partial, after a line about the source."""

    def __init__(self, path: Path, done: list[dict]) -> None:
        self.path, self.done = path, done

    @classmethod
    def find(cls, out: Path, about: list) -> _Entries:
        """Those of an interrupted run, or none.

        Raises: ValueError where it packed something else.
        """
        path, done = out.with_name(out.name + ".partial"), []
        if path.is_file():
            lines = [row for *_, row in parse_rows(io.BytesIO(path.read_bytes()))]
            if lines[:1] != [about]:
                raise ValueError(
                    f"{path}: is of another manifest or --shard-mib; delete it and its shards, or "
                    "name another folder"
                )
            for entry in lines[1:]:  # up to a line that was cut, or a shard that is gone
                if not isinstance(entry, dict) or not (out.parent / entry["shard"]).is_file():
                    break
                done.append(entry)
        text = "".join(json.dumps(line) + "\n" for line in [about, *done])
        write_atomically(path, lambda sink: sink.write(text.encode()))
        return cls(path, done)

    def following(self) -> int:
        """The row of the manifest that comes next."""
        return self.done[-1]["next"] if self.done else 0

    def add(self, entry: dict) -> None:
        line = json.dumps(entry)
        with self.path.open("a", encoding="ascii") as sink:
            sink.write(line + "\n")
        self.done.append(json.loads(line))


def _samples(
    manifest: Manifest, start: int, workers: int, faults: list[tuple[str, str]]
) -> Iterator[Sample]:
    """Rows from start on in order, read by several threads; what cannot be read goes to faults."""

    def read(i: int) -> Sample | AudioError:
        row = manifest.row(i)
        try:
            suffix, audio = _audio_of(row)
        except AudioError as error:
            return AudioError(error.message, error.reason, manifest.where(i))
        fields = {k: v for k, v in row.items() if k not in ("audio_filepath", "offset")}
        return Sample(i, fields, suffix, audio)

    with ThreadPoolExecutor(workers) as pool:
        for first in range(start, len(manifest), 2 * workers):
            for found in pool.map(read, range(first, min(first + 2 * workers, len(manifest)))):
                if isinstance(found, AudioError):
                    faults.append((found.reason, str(found)))
                else:
                    yield found


def _put(tar: tarfile.TarFile, name: str, sample: Sample) -> dict:
    """Write a sample's two files -> its row in the new manifest."""
    key, first = f"{sample.i:09d}", tar.offset + tarfile.BLOCKSIZE  # after a header of one block
    fields = json.dumps(sample.row, ensure_ascii=False).encode()
    for suffix, content in ((sample.suffix, sample.audio), (".json", fields)):
        member = tarfile.TarInfo(key + suffix)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return {"audio_filepath": f"{name}:{first}:{len(sample.audio)}"} | sample.row


SUFFIXES = {"WAVEX": ".wav", "RF64": ".wav", "NIST": ".sph", "MPEG": ".mp3"}  # else as the format
# How samples of these kinds are read and stored, so that none changes; all others are floats.
WHOLE_NUMBERS = {
    **dict.fromkeys(("PCM_16", "PCM_S8", "PCM_U8", "ULAW", "ALAW"), ("int16", "PCM_16")),
    "PCM_24": ("int32", "PCM_24"),
}


def _audio_of(row: dict) -> tuple[str, bytes]:
    """Suffix and content of the audio file of one row alone. Raises AudioError."""
    path, offset, duration = row["audio_filepath"], row.get("offset", 0.0), row["duration"]
    try:
        source = audio_source(path)
        with soundfile.SoundFile(source) as audio:
            seconds = audio.frames / audio.samplerate
            if seconds < offset + duration - MISSING_S:
                found = f"{one_line(path)}: {seconds:.3f} s of audio"
                raise AudioError(f"{found}, its row is longer", "ends before its row does")
            if not offset and seconds <= duration + MISSING_S:
                suffix = SUFFIXES.get(audio.format, f".{audio.format.lower()}")
                is_file = not isinstance(source, io.BytesIO)
                return suffix, Path(path).read_bytes() if is_file else source.getvalue()
            dtype, subtype = WHOLE_NUMBERS.get(audio.subtype, ("float32", "PCM_24"))
            samples, kind = read_part(audio, offset, duration, dtype), "FLAC"
            if dtype == "float32" and not np.abs(samples).max(initial=0.0) < 1:
                kind, subtype = "WAV", "FLOAT"
            sink = io.BytesIO()
            soundfile.write(sink, samples, audio.samplerate, subtype, format=kind)
            return f".{kind.lower()}", sink.getvalue()
    except (RuntimeError, OSError, TypeError) as error:
        found = one_line(getattr(error, "error_string", error)) or type(error).__name__
        raise AudioError(f"{one_line(path)}: {found}", "cannot decode audio") from error
