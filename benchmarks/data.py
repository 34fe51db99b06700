"""Loading data at size: manifests of millions of rows, reading audio, padding of the batch plan.

    python benchmarks/data.py [--parts manifest,reading,padding] [--rows 10] [--rounds 3]
                              [--manifest real.jsonl] [--json data.json]

manifest: a synthetic one of so many million rows, in a process each: the first reading, a start
with the index that it left, and one that resumes at step 100,000. Files are put out of the page
cache before, where the system allows it. Peak memory is what the kernel says of the process; the
part of it that maps files is shared by all processes and may be dropped at any time.
reading: FLAC at 16 kHz to padded waveforms, and to batches of log-mel with their masks, beside a
bare loop of soundfile over the same files, taking turns; log-mel apart, and kaldi-native-fbank's
where it is installed. Per core means per second of processor time, of all processes together, so
other jobs on the machine matter less than to the clock.
padding: what share of a pass over all rows is padding; of --manifest's durations, too.
Letters: B rows, N wave samples, n rows of a manifest.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

START = time.perf_counter()  # of this process, but for the interpreter: heavy imports count

import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import torch  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules

import conformer  # noqa: E402
import data  # noqa: E402

RATE = conformer.SAMPLE_RATE
MAX_AUDIO_S = 35.0
STEP_S = 320.0  # seconds of audio a step
RESUME_STEP = 100_000
N_FILES, READING_STEPS, READING_STEP_S = 64, 96, 100.0  # files, steps and their size to read
ROW_TOKENS, STEP_TOKENS = 512, 65_536

Figures = dict[str, dict[str, float]]  # of what: name to value


# LibriSpeech's three training sets: utterances, and seconds at QUANTILES. As lhotse's `describe`
# gives them for the corpus at speeds 0.9, 1 and 1.1 together, in icefall's LibriSpeech recipe: the
# corpus itself is a little narrower.
QUANTILES = (0, 0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 1)
LIBRISPEECH = (
    (28539, (1.3, 1.9, 2.2, 2.5, 4.2, 6.4, 11.4, 13.8, 15.3, 16.7, 17.3, 18.1, 18.4, 18.8, 27.2)),
    (104014, (1.0, 1.8, 2.2, 2.5, 4.2, 6.2, 11.2, 13.7, 15.3, 16.6, 17.3, 18.1, 18.4, 18.8, 33.0)),
    (148688, (0.8, 1.7, 2.1, 2.3, 3.5, 5.0, 9.8, 13.4, 15.1, 16.5, 17.2, 18.1, 18.4, 18.9, 31.0)),
)


def durations_like_librispeech(n: int, rng: np.random.Generator) -> np.ndarray:
    """(n,) float64 seconds: mean 12.3, from 0.8 to 33, between the quantiles uniform."""
    sizes = np.array([size for size, _ in LIBRISPEECH])
    of_set = rng.choice(len(sizes), n, p=sizes / sizes.sum())
    drawn = rng.random(n)
    per_set = [np.interp(drawn, QUANTILES, seconds) for _, seconds in LIBRISPEECH]
    return np.choose(of_set, per_set).round(3)


def synthetic_voice(seconds: float, rng: np.random.Generator) -> np.ndarray:
    """(N,) float32: a buzz that comes and goes, with noise, so that FLAC has something to do."""
    t = np.arange(round(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(110 + 40 * np.sin(2 * np.pi * 0.5 * t + rng.random())) / RATE
    voice = sum(np.sin(k * phase) / k for k in range(1, 12))
    loud = np.clip(np.sin(2 * np.pi * 1.7 * t + 6 * rng.random()), 0, 1)
    return (0.1 * loud * voice + 0.003 * rng.standard_normal(len(t))).astype(np.float32)


# ---------------------------------------------------------------------------- manifest


def write_manifest(path: Path, n_rows: int, seed: int = 0) -> None:
    """Rows with names as long as Libri-Light's. They all point to a few files of 36 s beside it."""
    rng, folder = np.random.default_rng(seed), "large/12345/some_old_novel_0910_librivox_64kb_mp3"
    (path.parent / folder).mkdir(parents=True, exist_ok=True)
    for k in range(8):
        name = path.parent / folder / f"somenovel_0{k}_author_64kb.flac"
        soundfile.write(name, synthetic_voice(36, rng), RATE)
    with path.open("w", encoding="ascii") as sink:
        for start in range(0, n_rows, 100_000):
            seconds = durations_like_librispeech(min(100_000, n_rows - start), rng).tolist()
            sink.writelines(
                f'{{"audio_filepath": "{folder}/somenovel_0{i % 8}_author_64kb.flac", '
                f'"id": "somenovel_{start + i:08d}", "speaker": "12345", "duration": {s}}}\n'
                for i, s in enumerate(seconds)
            )
        sink.flush()
        os.fsync(sink.fileno())


def forget(folder: Path) -> None:
    """Put a folder's files out of the page cache, so that reading them waits for the disk."""
    if hasattr(os, "posix_fadvise"):
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory_mib() -> dict[str, float]:
    """Of this process: its peak, and at this moment what is its own and what maps files."""
    found = {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else ():
        key, _, value = line.partition(":")
        if key in ("RssAnon", "RssFile"):
            found[{"RssAnon": "own_mib", "RssFile": "mapped_mib"}[key]] = (
                int(value.split()[0]) / 1024
            )
    return found


def start_up(path: Path, step: int) -> dict[str, float]:
    """What pre-training does before its first step, up to a batch: seconds of each part."""
    times, last = {"import_s": time.perf_counter() - START}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        times[name], last = time.perf_counter() - last, time.perf_counter()

    manifest = data.Manifest.read([path])
    lap("manifest_s")
    rows = data.SpeechRows(manifest, MAX_AUDIO_S, 0)
    lap("rows_s")
    rows.fingerprint
    lap("fingerprint_s")
    units = int(conformer.FRAMES_PER_S * STEP_S)
    plan = data.BatchPlan(rows.lengths, units, micro_batches=1, seed=0, stream=1)
    lap("plan_s")
    loader = DataLoader(
        data.PretrainData(speech=(rows, plan)), batch_size=None, sampler=[(step, 0)], num_workers=1
    )
    before = memory_mib()
    next(iter(loader))
    lap("batch_s")
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return times | {"first_batch_s": time.perf_counter() - START, **before, "worker_mib": worker}


def measure_manifest(n_rows: int, folder: Path) -> Figures:
    """Cold, indexed, resumed: each in a process of its own."""
    path, found = folder / "train.jsonl", {}
    write_manifest(path, n_rows)
    for name, step in (("no index", 0), ("indexed", 0), ("indexed, resumed", RESUME_STEP)):
        forget(folder)
        command = [sys.executable, __file__, "--child", str(path), str(step)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout)
    size = path.stat().st_size / 2**20
    print(f"\nmanifest of {n_rows:,} rows, {size:,.0f} MiB")
    print_table(found)
    return found


# ----------------------------------------------------------------------------- reading


class Waves(Dataset):
    """Batches of waveforms by step: what a batch costs without features and masks."""

    def __init__(self, manifest: data.Manifest, plan: data.BatchPlan) -> None:
        self.manifest, self.plan = manifest, plan

    def __getitem__(self, step: int) -> torch.Tensor:
        """(B, N) float32, zero after each row's end."""
        chosen, _, longest = self.plan.micro_batch(step, 0)  # frames
        most = conformer.WINDOW_SAMPLES + longest * conformer.HOP_SAMPLES  # samples, at least
        waves = torch.zeros(len(chosen), most)
        for wave, i in zip(waves, chosen.tolist()):
            row = self.manifest.row(i)
            samples = data.read_audio(row["audio_filepath"], 0.0, row["duration"])
            wave[: len(samples)] = torch.from_numpy(samples)
        return waves


def make_corpus(folder: Path) -> data.Manifest:
    """FLAC files of durations like LibriSpeech's, and their manifest."""
    rng, lines = np.random.default_rng(0), []
    folder.mkdir(parents=True)
    for k, seconds in enumerate(durations_like_librispeech(N_FILES, rng).tolist()):
        wave = synthetic_voice(seconds, rng)
        soundfile.write(folder / f"{k}.flac", wave, RATE)
        row = {"audio_filepath": f"{k}.flac", "duration": len(wave) / RATE}
        lines.append(json.dumps(row) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))
    return data.Manifest.read([folder / "train.jsonl"])


def cpu_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    times = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(its.ru_utime + its.ru_stime for its in times)


def drain(dataset: Dataset, sampler: list, workers: int) -> None:
    """Read all batches; the workers have ended then."""
    for _ in DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=workers):
        pass


def taking_turns(contenders: dict[str, Callable[[], None]], audio_s: float, rounds: int) -> Figures:
    """Seconds of audio per second of processor time and of the clock, medians over rounds.

    The share is of the first contender's, round by round, by processor time.
    """
    spent = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            cpu, clock = cpu_seconds(), time.perf_counter()
            run()
            if turn:  # the first one warms up
                spent[name].append((cpu_seconds() - cpu, time.perf_counter() - clock))
    base = [cpu for cpu, _ in spent[next(iter(contenders))]]
    return {
        name: {
            "per_core": audio_s / statistics.median(cpu for cpu, _ in its),
            "per_second": audio_s / statistics.median(clock for _, clock in its),
            "share": statistics.median(b / cpu for b, (cpu, _) in zip(base, its)),
        }
        for name, its in spent.items()
    }


def measure_reading(folder: Path, rounds: int) -> Figures:
    """A bare loop, padded waveforms, batches with log-mel and masks, by 0, 1 and 2 workers."""
    torch.set_num_threads(1)
    manifest = make_corpus(folder / "audio")
    rows = data.SpeechRows(manifest, MAX_AUDIO_S, 0)
    units = int(conformer.FRAMES_PER_S * READING_STEP_S)
    plan = data.BatchPlan(rows.lengths, units, micro_batches=1, seed=0, stream=1)
    steps = list(range(READING_STEPS))
    chosen = np.concatenate([plan.micro_batch(step, 0)[0] for step in steps]).tolist()
    paths = [manifest.row(i)["audio_filepath"] for i in chosen]
    waves, batches = Waves(manifest, plan), data.PretrainData(speech=(rows, plan))

    def bare() -> None:
        for path in paths:
            soundfile.read(path, dtype="float32")

    contenders = {"soundfile alone": bare}
    for workers in (0, 1, 2):
        name = f"{workers} worker{'s' * (workers != 1)}"
        contenders[f"padded waveforms, {name}"] = lambda w=workers: drain(waves, steps, w)
        places = [(step, 0) for step in steps]
        contenders[f"log-mel batches, {name}"] = lambda w=workers: drain(batches, places, w)
    audio_s = float(manifest.durations[chosen].sum())
    found = taking_turns(contenders, audio_s, rounds)
    print(f"\nreading {len(chosen)} FLAC files, {audio_s:,.0f} s; seconds of audio per second")
    print_table(found)
    return found | measure_log_mel(
        [soundfile.read(path, dtype="float32")[0] for path in paths], rounds
    )


def measure_log_mel(waves: list[np.ndarray], rounds: int) -> Figures:
    """log_mel of one waveform after the other, beside Kaldi's where it is installed."""
    waves = waves[:N_FILES]  # it is the slower one that takes time
    tensors, lists = [torch.from_numpy(wave) for wave in waves], []

    def ours() -> None:
        for wave in tensors:
            conformer.log_mel(wave)

    def theirs() -> None:
        for wave in lists:
            fbank = knf.OnlineFbank(options)
            fbank.accept_waveform(RATE, wave)
            fbank.input_finished()
            for i in range(fbank.num_frames_ready):
                fbank.get_frame(i)

    contenders = {"log_mel": ours}
    try:
        import kaldi_native_fbank as knf

        lists = [(wave * 32768).tolist() for wave in waves]  # the form it takes; not timed
        options = knf.FbankOptions()
        options.frame_opts.dither, options.mel_opts.num_bins = 0.0, conformer.N_MELS
        contenders = {"kaldi-native-fbank": theirs} | contenders
    except ImportError:
        print("\nkaldi-native-fbank is not installed: log_mel alone")
    audio_s = sum(map(len, waves)) / RATE
    found = taking_turns(contenders, audio_s, rounds)
    print(f"\nlog-mel of {audio_s:,.0f} s, one waveform at a time; seconds of audio per second")
    print_table(found)
    return found


# ----------------------------------------------------------------------------- padding


def text_row_lengths(tokens_per_document: float | None, rng: np.random.Generator) -> np.ndarray:
    """(n,) int64 lengths of rows packed from 500,000 lines, 23 tokens on average, skewed.

    Args: tokens_per_document  on average, skewed, too; None: all lines are one document.
    """
    lines = np.maximum(3, np.rint(rng.lognormal(np.log(19), 0.6, 500_000))).astype(np.int64)
    line_ends = np.cumsum(lines)
    ends = np.array([len(lines)])
    if tokens_per_document:
        n = int(line_ends[-1] / tokens_per_document)
        size = np.rint(rng.lognormal(np.log(tokens_per_document) - 0.5, 1.0, n))
        ends = np.unique(np.append(np.searchsorted(line_ends, np.cumsum(size)) + 1, len(lines)))
        ends = ends[ends <= len(lines)]
    return data._pack_lines(line_ends, ends, ROW_TOKENS)[2]


def least_padding(lengths: np.ndarray, n_shapes: int, n_edges: int = 150) -> float:
    """Share of padding of the best cut into so many lengths, were buckets free in their steps.

    By dynamic programming over some 300 candidate lengths.
    """
    ordered = np.sort(lengths)
    places = np.linspace(0, len(ordered) - 1, n_edges).astype(int)
    even = np.linspace(ordered[0], ordered[-1], n_edges)
    edges = np.unique(np.append(ordered[places], np.rint(even))).astype(np.int64)
    below = np.append(0, np.searchsorted(ordered, edges, side="right"))  # rows up to each edge
    cost = np.full(len(below), np.inf)  # of all rows up to there
    cost[0] = 0
    for _ in range(n_shapes):
        longer = [np.min(cost[: j + 1] + (below[j + 1] - below[: j + 1]) * edges[j])
                  for j in range(len(edges))]  # fmt: skip
        cost = np.append(0, longer)
    return 1 - ordered.sum() / cost[-1]


def measure_padding(manifest: Path | None) -> Figures:
    """Padding of each plan, the least that so many shapes could have, and their number."""
    rng = np.random.default_rng(0)

    def frames(seconds: np.ndarray) -> np.ndarray:
        return np.array([conformer.n_frames(round(s * RATE)) for s in seconds.tolist()], np.int64)

    speech, text = int(conformer.FRAMES_PER_S * STEP_S), STEP_TOKENS
    corpora = {
        "speech like LibriSpeech's": (frames(durations_like_librispeech(281_241, rng)), speech),
        "text, one document": (text_row_lengths(None, rng), text),
        "text, documents of 400 tokens": (text_row_lengths(400, rng), text),
        "text, documents of 1,500 tokens": (text_row_lengths(1500, rng), text),
    }
    if manifest:
        rows = data.SpeechRows(data.Manifest.read([manifest]), MAX_AUDIO_S, 0)
        corpora[manifest.name] = (rows.lengths, speech)
    found = {}
    for name, (lengths, units) in corpora.items():
        plan = data.BatchPlan(lengths, units, micro_batches=1, seed=0, stream=1)
        found[name] = {
            "rows": len(lengths),
            "mean": float(lengths.mean()),
            "padding %": 100 * plan.padding_waste(),
            "least %": 100 * least_padding(lengths, len(plan.bucket_len)),
            "shapes": len(plan.bucket_len),
        }
    print("\npadding of the batch plan; lengths in frames of 10 ms, or tokens")
    print_table(found)
    return found


# ----------------------------------------------------------------------------- command


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """A line each, with the values' names above."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    print(" " * 34 + "".join(f"{name:>15}" for name in names))
    for what, row in rows.items():
        cells = (f"{row[name]:>15,.2f}" if name in row else " " * 15 for name in names)
        print(f"{what:<34}" + "".join(cells))


def main(argv: list[str] | None = None) -> int:
    """Measure the parts that are asked for; print a table each."""
    if argv is None and sys.argv[1:2] == ["--child"]:
        print(json.dumps(start_up(Path(sys.argv[2]), int(sys.argv[3]))))
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--parts", default="manifest,reading,padding", help="(default %(default)s)")
    add("--rows", type=float, default=10, help="of the manifest, in millions (default %(default)s)")
    add("--rounds", type=int, default=3, help="of reading (default %(default)s)")
    add("--manifest", type=Path, help="a real one whose padding is of interest")
    add("--json", type=Path, help="file to write all figures to")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        measures = {
            "manifest": lambda: measure_manifest(int(1e6 * args.rows), Path(folder)),
            "reading": lambda: measure_reading(Path(folder), args.rounds),
            "padding": lambda: measure_padding(args.manifest),
        }
        parts = args.parts.split(",")
        if unknown := set(parts) - set(measures):
            parser.error(f"--parts {unknown.pop()}: expected some of {', '.join(measures)}")
        found = {part: measures[part]() for part in parts}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
