"""Distributed corpora into manifests: each as it is published, with what is wrong there.

An importer walks a corpus' own files and yields candidates; write_manifest measures their audio in
parallel, checks them, and writes those that can be used. What was left out is counted by reason.
Nothing is copied or converted. Between corpora.py, which has the manifest and the readers, and
data.py, which has the command line.

Public:  IMPORTERS, one `NAME_manifest(root, out, ...)` for each of librispeech, commonvoice,
         covost, librilight, tedlium, ami, kaldi, fairseq, nemo, directory; write_manifest,
         cut_at_gaps, stm_text.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from xml.etree import ElementTree

import soundfile

from corpora import (
    AUDIO_SUFFIXES,
    MISSING_S,
    NO_CHARACTER,
    AudioError,
    Report,
    audio_source,
    parse_rows,
    paths_of,
    read_bytes,
    read_lines,
    read_table,
    row_fault,
)
from training import write_atomically

WORKERS = 8  # files measured at a time: it is the disk that is waited for
BLOCK = 1000  # files between two entries in OUT.partial

# Utterances of each split as its publishers count them.
LIBRISPEECH_SIZES = {
    "train-clean-100": 28539, "train-clean-360": 104014, "train-other-500": 148688,
    "dev-clean": 2703, "dev-other": 2864, "test-clean": 2620, "test-other": 2939,
}  # fmt: skip
# CoVoST 2: train, dev, test of each pair; from English they are the same for all targets.
COVOST_SIZES = {
    "en": (289430, 15531, 15531), "fr": (207374, 14760, 14760), "de": (127834, 13511, 13511),
    "es": (79015, 13221, 13221), "ca": (95854, 12730, 12730), "it": (31698, 8940, 8951),
    "ru": (12112, 6110, 6300), "zh-cn": (7085, 4843, 4898), "pt": (9158, 3318, 4023),
    "fa": (53949, 3445, 3445), "et": (1782, 1576, 1571), "mn": (2067, 1761, 1759),
    "nl": (7108, 1699, 1699), "tr": (3966, 1624, 1629), "ar": (2283, 1758, 1695),
    "sv-se": (2160, 1349, 1595), "lv": (2337, 1125, 1629), "sl": (1843, 509, 360),
    "ta": (1358, 384, 786), "ja": (1119, 635, 684), "id": (1243, 792, 844), "cy": (1241, 690, 690),
}  # fmt: skip
# AMI's "full corpus ASR" partition; all other meetings are for training.
AMI_DEV = ("ES2011", "IS1008", "TS3004", "IB4001", "IB4002", "IB4003", "IB4004", "IB4010", "IB4011")
AMI_TEST = ("ES2004", "IS1009", "TS3003", "EN2002")

# -------------------------------------------------------------------------------- writing manifests


class Lengths:
    """Seconds of audio files. Those measured are kept in a file, so that an import can go on.

    One that was interrupted, and is started again, measures only what it has not. Delete the file
    if audio was changed in between.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.known = path, {}
        if path.is_file():
            entries = (row for *_, row in parse_rows(io.BytesIO(path.read_bytes())))
            whole = (entry for entry in entries if isinstance(entry, list) and len(entry) == 2)
            self.known = dict(whole)

    def measure(self, path: str) -> float | str:
        """Seconds, or what is wrong with the file."""
        if path in self.known:
            return self.known[path]
        try:
            info = soundfile.info(audio_source(path))
            return info.frames / info.samplerate
        except AudioError as error:
            return error.reason
        except (RuntimeError, OSError, TypeError, UnicodeError):
            return "cannot decode audio"

    def keep(self, found: dict[str, float | str]) -> None:
        """Remember what was measured; files with a fault may be mended, they are tried again."""
        good = {path: seconds for path, seconds in found.items() if isinstance(seconds, float)}
        new = {path: seconds for path, seconds in good.items() if path not in self.known}
        if new:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="ascii") as sink:
                sink.writelines(json.dumps([path, seconds]) + "\n" for path, seconds in new.items())


def write_manifest(
    out: Path | str, candidates: Iterable[dict], report: Report, workers: int = WORKERS
) -> Report:
    """Measure the audio of each candidate and write the good ones, in order.

    A candidate is a manifest's row with an absolute path. With "offset" and "duration" it is a part
    of its file; without, all of it. Paths below the manifest's folder are written relative to it.
    Raises: ValueError where nothing is usable.
    """
    out = Path(out)
    folder, lengths = out.resolve().parent, Lengths(out.with_name(out.name + ".partial"))

    def write(sink: io.BufferedWriter) -> None:
        files = groupby(candidates, itemgetter("audio_filepath"))
        files = ((path, list(rows)) for path, rows in files)
        with ThreadPoolExecutor(workers) as pool:
            while block := list(islice(files, BLOCK)):
                paths = [path for path, _ in block]
                found = dict(zip(paths, pool.map(lengths.measure, paths)))
                for path, rows in block:
                    for row in rows:
                        if fault := _fault(row, found[path]):
                            place = f" from {row['offset']:g} s on" if "offset" in row else ""
                            report.reject(fault, f"{path}{place}")
                            continue
                        row = _finished(row, found[path], folder)
                        report.accept(row)
                        sink.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                lengths.keep(found)
        report.demand_rows(f"manifest {out}")

    write_atomically(out, write)
    lengths.path.unlink(missing_ok=True)
    return report


def _fault(row: dict, seconds: float | str) -> str | None:
    """What is wrong with a candidate whose file lasts so long, or None."""
    if NO_CHARACTER.search(row["audio_filepath"]):
        return "name is not UTF-8, or holds NUL"
    if isinstance(seconds, str):
        return seconds
    if seconds <= 0:
        return "no samples"
    offset = row.get("offset", 0.0)
    duration = row.get("duration", seconds - offset)
    if duration <= 0:
        return "segment of no length"
    if offset + duration > seconds + MISSING_S:
        return "segment ends after its audio"
    fault = row_fault(row | {"duration": duration}, False)
    return fault[0] if fault else None


def _finished(row: dict, seconds: float, folder: Path) -> dict:
    """A candidate with its duration, and its path relative to the manifest if that is above it."""
    path, left = Path(row["audio_filepath"]), seconds - row.get("offset", 0.0)
    path = path.relative_to(folder) if path.is_relative_to(folder) else path
    duration = round(min(row.get("duration", left), left), 4)
    return row | {"audio_filepath": str(path), "duration": duration}


def _folder(root: Path | str, what: str, inner: str = "") -> Path:
    """The folder, or the one of that name in it. Raises FileNotFoundError."""
    root = Path(root).resolve()
    root = root / inner if inner and (root / inner).is_dir() else root
    if not root.is_dir():
        raise FileNotFoundError(f"{what} {root}: no such folder")
    return root


def _chosen(found: Iterable[str], splits: Iterable[str] | None, root: Path) -> list[str]:
    """Splits that are asked for, or all. Raises FileNotFoundError for one that is not there."""
    found = sorted(found)
    chosen = found if splits is None else list(splits)
    if missing := [name for name in chosen if name not in found]:
        raise FileNotFoundError(
            f"{root}: no split {missing[0]}; found {', '.join(found) or 'none'} (--splits)"
        )
    return chosen


def _compare(report: Report, published: dict[str, int]) -> None:
    """Say how many utterances each split has, and how many it should have."""
    for split, expected in published.items():
        found = report.of_split[split]
        if found:
            right = "as published" if found == expected else f"published are {expected}"
            report.notes.append(f"{split}: {found} utterances, {right}")


# ------------------------------------------------------------------------------ one file a sentence


def librispeech_manifest(
    root: Path | str,
    out: Path | str,
    splits: Iterable[str] | None = None,
    *,
    workers: int = WORKERS,
) -> Report:
    """Manifest of SPLIT/SPEAKER/CHAPTER/ID.flac with SPEAKER-CHAPTER.trans.txt, as LibriSpeech has.

    Args:    root    the folder with the splits, or the one that holds LibriSpeech/.
             splits  names of splits; None takes all.
    Raises:  FileNotFoundError for a missing root or split; ValueError where nothing is usable.
    """
    root, report = _folder(root, "LibriSpeech", "LibriSpeech"), Report()
    found = (path.name for path in root.iterdir() if next(path.glob("*/*/*.trans.txt"), None))
    splits = _chosen(found, splits, root)

    def candidates() -> Iterator[dict]:
        for split in splits:
            for chapter in sorted(path for path in (root / split).glob("*/*") if path.is_dir()):
                yield from _chapter_rows(chapter, split, report)

    write_manifest(out, candidates(), report, workers)
    _compare(report, LIBRISPEECH_SIZES)
    return report


def _audio_files(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.suffix.lower() in AUDIO_SUFFIXES)


def _chapter_rows(chapter: Path, split: str, report: Report) -> Iterator[dict]:
    """Rows of one chapter's folder: audio files by id, transcripts from its .trans.txt."""
    audio = {path.stem: path for path in _audio_files(chapter.iterdir())}
    for transcripts in sorted(chapter.glob("*.trans.txt")):
        for line in read_lines(transcripts):
            name, _, text = line.partition(" ")
            path = audio.pop(name, None)
            if name and path is None:
                report.reject("transcript without audio, or a second one", f"{transcripts}: {name}")
            elif name and not text.strip():
                report.reject("empty transcript", f"{transcripts}: {name}")
            elif name:
                row = {"audio_filepath": str(path), "text": text.strip(), "id": name}
                yield {**row, "speaker": chapter.parent.name, "split": split}
    for path in audio.values():
        report.reject("audio without transcript", str(path))


def directory_manifest(root: Path | str, out: Path | str, *, workers: int = WORKERS) -> Report:
    """Manifest of all audio below a folder; the .txt of the same name is its transcript, if any."""
    root = _folder(root, "audio folder")

    def candidates() -> Iterator[dict]:
        for path in _audio_files(root.rglob("*")):
            row = {"audio_filepath": str(path), "id": str(path.relative_to(root).with_suffix(""))}
            transcript = path.with_suffix(".txt")
            if transcript.is_file():
                row["text"] = " ".join(read_lines(transcript)).strip()
            yield row

    return write_manifest(out, candidates(), Report(), workers)


def _clip(root: Path, name: str) -> str:
    """Path of a clip of Common Voice; the oldest releases leave its .mp3 out."""
    folder = root / "clips" if (root / "clips").is_dir() else root
    return str(folder / (name if Path(name).suffix else f"{name}.mp3"))


def commonvoice_manifest(
    root: Path | str,
    out: Path | str,
    splits: Iterable[str] | None = None,
    *,
    workers: int = WORKERS,
) -> Report:
    """Manifest of Common Voice: train.tsv, dev.tsv and test.tsv beside the folder clips/.

    Args:    root    the folder of one language.
             splits  names of other tables: validated, other; None takes train, dev and test.
    Raises:  FileNotFoundError; ValueError for missing columns, or where nothing is usable.
    """
    root, report = _folder(root, "Common Voice"), Report()
    found = [path.stem for path in root.glob("*.tsv")]
    splits = _chosen(found, ("train", "dev", "test") if splits is None else splits, root)

    def candidates() -> Iterator[dict]:
        for split in splits:
            for row in read_table(root / f"{split}.tsv", ("client_id", "path", "sentence"), report):
                if not row["sentence"].strip():
                    report.reject("empty sentence", row["path"])
                    continue
                yield {
                    "audio_filepath": _clip(root, row["path"]),
                    "text": row["sentence"].strip(),
                    "id": row["path"],
                    "speaker": row["client_id"],
                    "split": split,
                }

    return write_manifest(out, candidates(), report, workers)


LANGUAGES = re.compile(
    r"[._]([a-z]{2,3}(?:-[a-z]+)?)_([a-z]{2,3}(?:-[a-z]+)?)(?:\.([\w-]+))?\.tsv$", re.IGNORECASE
)


def covost_manifest(
    root: Path | str,
    out: Path | str,
    tsv: Path | str,
    splits: Iterable[str] | None = None,
    *,
    workers: int = WORKERS,
) -> Report:
    """Manifest of CoVoST 2: its table of translations joined with Common Voice's clips by path.

    A row has "text" (the sentence), "translation" and "target_lang". A table that was joined
    already, as CoVoST's own script writes them, has a column `sentence`; then no other is needed.

    Args:    root    Common Voice's folder of the source language, version 4, with validated.tsv and
                     clips/; of joined tables just the folder that their paths begin in.
             tsv     covost_v2.en_de.tsv or alike, or several with commas; the name's ending tells
                     the languages, and of joined tables the split: covost_v2.en_de.dev.tsv.
             splits  of its column `split`; None takes all. `train` alone is Common Voice's own;
                     CoVoST 2 trains on `train,train_covost`.
    Raises:  FileNotFoundError; ValueError for missing columns, or where nothing is usable.
    """
    root, report, tables = _folder(root, "Common Voice"), Report(), paths_of(str(tsv))
    named = {table: LANGUAGES.search(table.name) for table in tables}
    if nameless := [table for table in tables if not named[table]]:
        raise ValueError(
            f"{nameless[0]}: no target language in its name; expected covost_v2.en_de.tsv"
        )
    wanted = None if splits is None else set(splits)

    def candidates() -> Iterator[dict]:
        for table in tables:
            for row in _translated(root, table, named[table][3], report):
                if wanted is None or row.get("split") in wanted:
                    if row["text"] and row["translation"]:
                        yield row | {"target_lang": named[table][2].lower()}
                    else:
                        report.reject("empty sentence or translation", row["id"])

    write_manifest(out, candidates(), report, workers)
    report.of_split["train"] += report.of_split.pop("train_covost", 0)
    sizes = COVOST_SIZES.get(named[tables[0]][1].lower(), ())
    _compare(report, dict(zip(("train", "dev", "test"), sizes)))
    return report


def _translated(root: Path, table: Path, split: str | None, report: Report) -> Iterator[dict]:
    """Rows of a table of translations, of any split, joined with sentences where it has none."""
    with_split, clips = ("path", "translation", "split"), None
    joined = ("path", "sentence", "translation", "client_id")
    if "sentence" not in _header(table):
        columns = ("path", "sentence", "client_id")
        clips = read_table(root / "validated.tsv", columns, report, escaped=True)
        clips = {row["path"]: row for row in clips}
    for row in read_table(table, joined if clips is None else with_split, report, escaped=True):
        clip = row if clips is None else clips.get(row["path"])
        if clip is None:
            report.reject("path is not in validated.tsv", row["path"])
            continue
        its_split = row.get("split", split)
        yield {
            "audio_filepath": _clip(root, row["path"]),
            "text": clip["sentence"].strip(),
            "translation": row["translation"].strip(),
            "id": row["path"],
            "speaker": clip["client_id"],
        } | ({"split": its_split} if its_split else {})


def _header(table: Path) -> list[str]:
    return next(read_lines(table), "").split("\t")


# ------------------------------------------------------------------------- many sentences in a file


def cut_at_gaps(stretches: Iterable[tuple[float, float]], longest_s: float) -> list[list[float]]:
    """Join stretches of speech into segments of at most longest_s, so that cuts lie in the gaps.

    Args:    stretches  (start, end) in seconds, in order.
    Returns: [start, end] of each; longer than longest_s only where speech has no gap.
    """
    segments: list[list[float]] = []
    for start, end in stretches:
        last = segments[-1] if segments else None
        if last and (start <= last[1] or end - last[0] <= longest_s):
            last[1] = max(last[1], end)
        else:
            segments.append([start, end])
    return segments


def librilight_manifest(
    root: Path | str, out: Path | str, *, segment_s: float = 30.0, workers: int = WORKERS
) -> Report:
    """Manifest of Libri-Light: chapters as .flac, each with a .json that tells where speech is.

    A chapter is cut where nobody speaks, into segments of at most segment_s; silence before, after
    and between segments is left out. There is no text.

    Args:    root  small/, medium/ or large/, or the folder above. The large set does not hold the
                   others: 60,000 hours are all three.
    Raises:  FileNotFoundError; ValueError where nothing is usable.
    """
    if not segment_s > 0:
        raise ValueError(f"--segment-s {segment_s:g}: must be above 0")
    root, report, long = _folder(root, "Libri-Light"), Report(), [0]

    def candidates() -> Iterator[dict]:
        for path in sorted(root.rglob("*.flac")):
            try:
                about = json.loads(path.with_suffix(".json").read_bytes())
                stretches = sorted((float(a), float(b)) for a, b in about["voice_activity"])
            except FileNotFoundError:
                report.reject("no .json beside it", str(path))
                continue
            except (ValueError, TypeError, KeyError) as error:
                report.reject("no voice_activity in its .json", f"{path}: {error!r}")
                continue
            if not stretches:
                report.reject("no speech in it", str(path))
            name = path.relative_to(root).with_suffix("")
            row = {"speaker": str(about.get("speaker", path.parent.parent.name))}
            for number, (start, end) in enumerate(cut_at_gaps(stretches, segment_s)):
                long[0] += end - start > segment_s
                part = {"offset": round(start, 4), "duration": round(end - start, 4)}
                yield {"audio_filepath": str(path), "id": f"{name}-{number:04d}", **part, **row}

    write_manifest(out, candidates(), report, workers)
    if long[0]:
        report.notes.append(f"{long[0]} segments are longer than {segment_s:g} s: no gap to cut at")
    return report


STM_MARKERS = re.compile(r"<[^>\s]*>|\{[^}\s]*\}|\(\S*?\)")
STM_SPLIT_WORD = re.compile(r"(?<=\w) '(?=(?:s|t|m|re|ve|ll|d)\b)")  # "it 's", "don 't"


def stm_text(transcript: str) -> str:
    """A TED-LIUM transcript without markers: <sil>, <unk>, {NOISE}, the (2) of a pronunciation.

    Words that the corpus takes apart at an apostrophe are joined: "it 's" is "it's".
    """
    words = " ".join(STM_MARKERS.sub(" ", transcript).split())
    return STM_SPLIT_WORD.sub("'", words)


def tedlium_manifest(
    root: Path | str,
    out: Path | str,
    splits: Iterable[str] | None = None,
    *,
    workers: int = WORKERS,
) -> Report:
    """Manifest of TED-LIUM: SPLIT/stm/TALK.stm with SPLIT/sph/TALK.sph (NIST SPHERE).

    Stretches that are marked not to be scored and gaps between segments are left out.

    Args:    root    of a release; of release 3 its folder legacy/ is taken, which has the splits.
             splits  of train, dev, test; None takes all.
    Raises:  FileNotFoundError; ValueError where nothing is usable.
    """
    root, report, unknown = _folder(root, "TED-LIUM", "legacy"), Report(), [0]
    found = (path.name for path in root.iterdir() if next(path.glob("stm/*.stm"), None))
    splits = _chosen(found, splits, root)

    def candidates() -> Iterator[dict]:
        for split in splits:
            for stm in sorted((root / split / "stm").glob("*.stm")):
                for row in _stm_rows(stm, report):
                    unknown[0] += row.pop("has_unknown")
                    yield row | {"split": split}

    write_manifest(out, candidates(), report, workers)
    if unknown[0]:
        report.notes.append(f"{unknown[0]} transcripts lack a word that was not understood (<unk>)")
    return report


def _stm_rows(stm: Path, report: Report) -> Iterator[dict]:
    """Segments of one talk: `talk channel speaker start end <label> words`, `;;` for comments."""
    for number, line in enumerate(read_lines(stm), 1):
        if not line or line.startswith(";;"):
            continue
        cells, place = line.split(None, 5), f"{stm}:{number}"
        try:
            start, end = float(cells[3]), float(cells[4])
        except (IndexError, ValueError):
            report.reject("not talk, channel, speaker, start, end", place)
            continue
        words = cells[5] if len(cells) == 6 else ""
        text = stm_text(words)
        if "ignore_time_segment_in_scoring" in words:
            report.reject("ignore_time_segment_in_scoring", place)
        elif cells[2] == "inter_segment_gap":
            report.reject("inter_segment_gap", place)
        elif not text:
            report.reject("no words", place)
        else:
            yield {
                "audio_filepath": str(stm.parent.parent / "sph" / f"{cells[0]}.sph"),
                "offset": start,
                "duration": round(end - start, 4),
                "text": text,
                "id": f"{cells[0]}-{start:09.2f}-{end:09.2f}",
                "speaker": cells[2],
                "has_unknown": "<unk>" in words,
            }


NITE = "{http://nite.sourceforge.net/}"
NITE_RANGE = re.compile(r"#id\(([^)]+)\)(?:\.\.id\(([^)]+)\))?")


def ami_manifest(
    root: Path | str,
    out: Path | str,
    splits: Iterable[str] | None = None,
    *,
    annotations: Path | str | None = None,
    microphone: str = "ihm",
    workers: int = WORKERS,
) -> Report:
    """Manifest of the AMI meetings: segments of the manual annotations, of one microphone.

    Audio is MEETING/audio/MEETING.Headset-0.wav and so on, or MEETING.Array1-01.wav. Punctuation is
    left out, as are laughs and gaps; letters that are spelled, L_C_D_, are words of their own.

    Args:    root         the folder of the meetings, or the one that holds amicorpus/.
             splits       of train, dev, test, by the "full corpus ASR" partition; None takes all.
             annotations  the folder with words/ and segments/; None looks in root and in
                          root/ami_public_manual_1.6.2.
             microphone   ihm, each speaker's own headset; sdm, the first of the table's array.
    Raises:  FileNotFoundError; ValueError where nothing is usable.
    """
    assert microphone in ("ihm", "sdm"), microphone
    given, report = Path(root).resolve(), Report()
    root = _folder(root, "AMI", "amicorpus")
    notes = _folder(annotations or given, "AMI annotations", "ami_public_manual_1.6.2")
    if not (notes / "segments").is_dir():
        raise FileNotFoundError(f"{notes}: no folder segments (--annotations)")
    wanted, people = None if splits is None else set(splits), _ami_people(notes)

    def candidates() -> Iterator[dict]:
        for path in sorted((notes / "segments").glob("*.segments.xml")):
            meeting, agent = path.name.split(".")[:2]
            split = _ami_split(meeting)
            if wanted is not None and split not in wanted:
                continue
            channel, speaker = people.get((meeting, agent), (None, f"{meeting}.{agent}"))
            for row in _ami_segments(notes, path, report):
                own = row.pop("channel") or channel
                name = "Array1-01" if microphone == "sdm" else f"Headset-{own}"
                audio = str(root / meeting / "audio" / f"{meeting}.{name}.wav")
                yield {"audio_filepath": audio, **row, "speaker": speaker, "split": split}

    return write_manifest(out, candidates(), report, workers)


def _ami_split(meeting: str) -> str:
    if meeting.startswith(AMI_DEV):
        return "dev"
    return "test" if meeting.startswith(AMI_TEST) else "train"


def _xml(path: Path) -> ElementTree.Element:
    """Raises FileNotFoundError; ValueError where it is no XML."""
    try:
        return ElementTree.fromstring(read_bytes(path, "annotation"))
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: not XML ({error})") from error


def _ami_people(notes: Path) -> dict[tuple[str, str], tuple[str | None, str]]:
    """(meeting, agent) -> (channel, name of the person), from meetings.xml where it is there."""
    path, people = notes / "corpusResources" / "meetings.xml", {}
    for meeting in _xml(path).iter("meeting") if path.is_file() else ():
        for speaker in meeting.iter("speaker"):
            agent = speaker.get("nxt_agent", "")
            name = speaker.get("global_name", f"{meeting.get('observation')}.{agent}")
            people[meeting.get("observation", ""), agent] = speaker.get("channel"), name
    return people


def _ami_segments(notes: Path, path: Path, report: Report) -> Iterator[dict]:
    """One speaker's segments of one meeting, with the words that they point to."""
    words_path = notes / "words" / path.name.replace(".segments.", ".words.")
    if not words_path.is_file():
        report.reject("segments without words", str(path))
        return
    words = list(_xml(words_path))
    places = {word.get(f"{NITE}id"): i for i, word in enumerate(words)}
    for segment in _xml(path).iter("segment"):
        name = segment.get(f"{NITE}id", "")
        try:
            start, end = (float(segment.get(f"transcriber_{key}", "")) for key in ("start", "end"))
            spans = [
                (places[first], places[last or first])
                for child in segment
                for first, last in NITE_RANGE.findall(child.get("href", ""))
            ]
        except (ValueError, KeyError) as error:
            report.reject("no times or no words to a segment", f"{path}: {name}: {error}")
            continue
        said = [
            (word.text or "").replace("_", " ").strip()
            for first, last in spans
            for word in words[first : last + 1]
            if word.tag == "w" and word.get("punc") != "true"
        ]
        if text := " ".join(" ".join(said).split()):
            row = {"offset": start, "duration": round(end - start, 4), "text": text, "id": name}
            yield row | {"channel": segment.get("channel")}
        else:
            report.reject("no words", f"{path}: {name}")


# ----------------------------------------------------------------------------- other systems' lists


def _keyed(path: Path) -> Iterator[tuple[str, str, str]]:
    """(place, key, rest) of each line of a Kaldi table."""
    for number, line in enumerate(read_lines(path), 1):
        if line:
            key, *rest = line.split(None, 1)
            yield f"{path}:{number}", key, rest[0] if rest else ""


def kaldi_manifest(root: Path | str, out: Path | str, *, workers: int = WORKERS) -> Report:
    """Manifest of a Kaldi data folder: wav.scp, and segments, text and utt2spk where they are.

    For the corpora that are bought from the LDC (WSJ, Switchboard, Fisher): Kaldi's own recipes
    prepare them. Paths are taken from where the command runs, as Kaldi does, else from the folder.
    Raises:  FileNotFoundError; ValueError for a pipe, or where nothing is usable.
    """
    root, report = _folder(root, "Kaldi folder"), Report()
    audio = dict(_kaldi_audio(root, report))
    tables = {
        name: {key: rest for _, key, rest in _keyed(root / name)}
        for name in ("segments", "text", "utt2spk")
        if (root / name).is_file()
    }
    texts, speakers = tables.get("text"), tables.get("utt2spk", {})
    parts = tables.get("segments", {key: key for key in audio})

    def candidates() -> Iterator[dict]:
        for name, part in parts.items():
            recording, *times = part.split()
            try:
                start, end = map(float, times) if times else (0.0, -1.0)
            except ValueError:
                report.reject("not utterance, recording, start, end", f"{root}/segments: {name}")
                continue
            if recording not in audio:
                report.reject("recording is not in wav.scp", f"{name}: {recording}")
            elif texts is not None and not texts.get(name, ""):
                report.reject("no transcript", name)
            else:
                row = {"audio_filepath": audio[recording], "id": name}
                row |= {"offset": start} if start else {}
                row |= {"duration": round(end - start, 4)} if end >= 0 else {}  # -1: to the end
                row |= {"text": texts[name]} if texts is not None else {}
                yield row | ({"speaker": speakers[name]} if name in speakers else {})

    return write_manifest(out, candidates(), report, workers)


def _kaldi_audio(root: Path, report: Report) -> Iterator[tuple[str, str]]:
    """(recording, path) of wav.scp. Raises ValueError for a pipe: a list of files runs nothing."""
    for place, key, source in _keyed(root / "wav.scp"):
        if source.startswith("|") or source.endswith("|"):
            raise ValueError(
                f"{place}: {key} is a pipe, and pipes are never run; run it yourself, "
                f"`{source.strip('| ')} > {key}.wav`, and write that file's path there"
            )
        if re.search(r"\.ark:\d+$", source):
            report.reject("inside a Kaldi archive (wav-copy takes it out)", f"{place}: {source}")
            continue
        path = Path(source)
        yield key, os.path.abspath(path if path.is_file() else root / path)


def fairseq_manifest(root: Path | str, out: Path | str, *, workers: int = WORKERS) -> Report:
    """Manifest of a fairseq list: a folder's name, then `path TAB number of samples` a line.

    Transcripts are taken line by line from the .wrd beside it, or from the .ltr, letters with "|"
    after each word.

    Args:    root  the .tsv.
    Raises:  FileNotFoundError; ValueError where lines do not match, or nothing is usable.
    """
    tsv, report = Path(root), Report()
    lines = list(read_lines(tsv))
    lines = lines[: len(lines) - (lines[-1:] == [""])]
    folder, rows, texts = Path(lines[0] if lines else ""), lines[1:], _fairseq_texts(tsv)
    if texts is not None and len(texts) != len(rows):
        raise ValueError(f"{tsv}: {len(rows)} files, but {len(texts)} transcripts beside it")

    def candidates() -> Iterator[dict]:
        for i, line in enumerate(rows):
            name, _, n_samples = line.partition("\t")
            if not n_samples.isdigit():
                report.reject("not path, number of samples", f"{tsv}:{i + 2}")
            elif texts is not None and not texts[i]:
                report.reject("empty transcript", f"{tsv}:{i + 2}")
            else:
                path = os.path.abspath(tsv.parent / folder / name)
                row = {"audio_filepath": path, "id": str(Path(name).with_suffix(""))}
                yield row | ({"text": texts[i]} if texts is not None else {})

    return write_manifest(out, candidates(), report, workers)


def _fairseq_texts(tsv: Path) -> list[str] | None:
    """Transcripts beside a list, or None."""
    if (words := tsv.with_suffix(".wrd")).is_file():
        return list(read_lines(words))
    if (letters := tsv.with_suffix(".ltr")).is_file():
        lines = (line.replace(" ", "").replace("|", " ") for line in read_lines(letters))
        return [line.strip() for line in lines]
    return None


def nemo_manifest(root: Path | str, out: Path | str, *, workers: int = WORKERS) -> Report:
    """A NeMo manifest as it is, less the rows that cannot be used; every key is kept.

    Args:    root  the .jsonl; relative paths begin in its folder.
    Raises:  FileNotFoundError; ValueError where nothing is usable.
    """
    path, report = Path(root).resolve(), Report()
    if Path(out).resolve() == path:
        raise ValueError(f"{path}: would be overwritten; give another name to write to")

    def candidates() -> Iterator[dict]:
        for number, _, _, row in parse_rows(io.BytesIO(read_bytes(path, "manifest"))):
            if fault := row_fault(row, False):
                report.reject(fault[0], f"{path}:{number}: {fault[1]}")
            else:
                yield row | {"audio_filepath": str(path.parent / row["audio_filepath"])}

    return write_manifest(out, candidates(), report, workers)


IMPORTERS = {
    "librispeech": librispeech_manifest,
    "commonvoice": commonvoice_manifest,
    "covost": covost_manifest,
    "librilight": librilight_manifest,
    "tedlium": tedlium_manifest,
    "ami": ami_manifest,
    "kaldi": kaldi_manifest,
    "fairseq": fairseq_manifest,
    "nemo": nemo_manifest,
    "directory": directory_manifest,
}
