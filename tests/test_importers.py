"""Importers of corpora: folders laid out as they are published, and what is odd in each."""

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile

import data
import importers
from corpora import Manifest, read_audio


def write_wave(path: Path, seconds: float, rate: int = 16000, **kind) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.1 * np.random.default_rng(len(path.name)).standard_normal(round(seconds * rate))
    soundfile.write(path, wave, rate, **kind)
    return path


def write_text(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def write_sphere(path: Path, seconds: float, order: str = "01", rate: int = 16000) -> np.ndarray:
    """A NIST SPHERE file: 1024 bytes of header as ASCII, then the samples. Returns them."""
    samples = (3000 * np.sin(np.arange(round(seconds * rate)) / 9)).astype(np.int16)
    fields = [
        "sample_count -i %d" % len(samples),
        "sample_n_bytes -i 2",
        "channel_count -i 1",
        f"sample_byte_format -s2 {order}",
        f"sample_rate -i {rate}",
        "sample_coding -s3 pcm",
        "sample_sig_bits -i 16",
        "end_head",
    ]
    header = ("NIST_1A\n   1024\n" + "\n".join(fields) + "\n").encode("ascii").ljust(1024, b" ")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + samples.astype("<i2" if order == "01" else ">i2").tobytes())
    return samples


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(capsys, *command: object) -> tuple[int, str, str]:
    """`python data.py manifest ...` -> exit status, what it printed, its error."""
    capsys.readouterr()
    status = data.main(["manifest", *map(str, command)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


# -------------------------------------------------------------------------------- all importers


def test_the_help_says_which_parts_of_speechstew_are_free(capsys):
    with pytest.raises(SystemExit):
        data.main(["manifest", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "LibriSpeech, Common Voice, TED-LIUM and AMI are free" in text
    assert "WSJ, Switchboard/Fisher and Broadcast News are sold by the LDC" in text
    for name in importers.IMPORTERS:
        with pytest.raises(SystemExit):
            data.main(["manifest", name, "--help"])
        assert "--workers" in capsys.readouterr().out


def test_an_interrupted_import_measures_only_what_it_has_not(tmp_path, monkeypatch):
    for i in range(7):
        write_wave(tmp_path / "d" / f"{i}.wav", 0.5 + i / 10)
    (tmp_path / "d" / "8.wav").write_bytes(b"no")
    out, info, asked = tmp_path / "m.jsonl", soundfile.info, []
    monkeypatch.setattr(importers, "BLOCK", 3)

    def interrupted(path):
        asked.append(Path(path).name)
        if path.endswith("4.wav"):
            raise KeyboardInterrupt
        return info(path)

    with monkeypatch.context() as broken:
        broken.setattr(soundfile, "info", interrupted)
        with pytest.raises(KeyboardInterrupt):
            importers.directory_manifest(tmp_path / "d", out, workers=1)
    assert not out.exists() and (tmp_path / "m.jsonl.partial").is_file()
    with (tmp_path / "m.jsonl.partial").open("a") as partial:
        partial.write('["/cut in the midd')
    asked.clear()
    monkeypatch.setattr(
        soundfile, "info", lambda path: (asked.append(Path(path).name), info(path))[1]
    )
    report = importers.directory_manifest(tmp_path / "d", out, workers=1)
    assert sorted(asked) == ["3.wav", "4.wav", "5.wav", "6.wav", "8.wav"]
    assert report.rows == 7 and report.counts() == {"cannot decode audio": 1}
    assert [row["duration"] for row in rows_of(out)] == [0.5 + i / 10 for i in range(7)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "m.jsonl"]


def test_files_are_measured_by_as_many_workers_as_asked_and_written_in_order(tmp_path, monkeypatch):
    for i in range(6):
        write_wave(tmp_path / "d" / f"{i}.wav", 0.5)
    info, together = soundfile.info, threading.Barrier(3, timeout=20)
    monkeypatch.setattr(soundfile, "info", lambda path: (together.wait(), info(path))[1])
    importers.directory_manifest(tmp_path / "d", tmp_path / "m.jsonl", workers=3)
    assert [row["id"] for row in rows_of(tmp_path / "m.jsonl")] == list("012345")


def test_odd_names_are_kept_or_left_out_and_named_on_one_line(tmp_path, capsys):
    write_wave(tmp_path / "d" / "two\nlines.wav", 1.0)
    write_wave(tmp_path / "d" / "\u00fcber.wav", 1.0)
    latin = os.fsencode(tmp_path / "d") + b"/\xfcber.wav"
    try:
        with open(latin, "wb") as file:
            file.write((tmp_path / "d" / "\u00fcber.wav").read_bytes())
    except OSError:
        pytest.skip("this file system has no names but UTF-8")
    status, printed, _ = run(capsys, "directory", tmp_path / "d", tmp_path / "m.jsonl")
    assert status == 0 and "2 rows" in printed and "rejected 1: name is not UTF-8" in printed
    assert printed.splitlines()[1].isprintable()
    manifest = Manifest.read([tmp_path / "m.jsonl"])
    assert {manifest.row(i)["id"] for i in range(2)} == {"two\nlines", "\u00fcber"}
    assert all(len(read_audio(manifest.row(i)["audio_filepath"])) == 16000 for i in range(2))


def test_nothing_usable_and_a_number_that_cannot_be_are_errors_of_one_line(tmp_path, capsys):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.wav").write_bytes(b"")
    for command, words in (
        (("directory", tmp_path / "d"), "0 usable rows"),
        (("directory", tmp_path / "none"), "no such folder"),
        (("librilight", tmp_path / "d", "--segment-s", "0"), "--segment-s 0"),
        (("directory", tmp_path / "d", "--workers", "0"), "--workers 0"),
    ):
        name, root, *more = command
        status, _, error = run(capsys, name, root, tmp_path / "m.jsonl", *more)
        assert status == 2 and words in error and error.count("\n") == 1, error
    assert not (tmp_path / "m.jsonl").exists()


def test_librispeech_counts_are_compared_with_the_published_ones(tmp_path, capsys):
    chapter = tmp_path / "LibriSpeech" / "dev-clean" / "84" / "121123"
    write_wave(chapter / "84-121123-0000.flac", 1.0)
    write_text(chapter / "84-121123.trans.txt", "84-121123-0000 GO DO YOU HEAR\n")
    status, printed, _ = run(capsys, "librispeech", tmp_path, tmp_path / "m.jsonl")
    assert status == 0 and "dev-clean: 1 utterances, published are 2703" in printed


# ------------------------------------------------------------------------ Common Voice, CoVoST 2

COLUMNS = "client_id path sentence up_votes down_votes age gender accent".split()


def common_voice_table(path: Path, clips: list[tuple[str, str]]) -> Path:
    rows = [COLUMNS] + [["ab12", clip, text, "2", "0", "", "", ""] for clip, text in clips]
    return write_text(path, "".join("\t".join(row) + "\n" for row in rows))


@pytest.fixture
def common_voice(tmp_path) -> Path:
    """A language of Common Voice, with a clip of no bytes, as version 4 has."""
    root = tmp_path / "cv-corpus-4" / "en"
    for i in range(4):
        write_wave(root / "clips" / f"common_voice_en_{i}.mp3", 1.0 + i, 48000, format="MP3")
    (root / "clips" / "common_voice_en_9.mp3").write_bytes(b"")
    name = "common_voice_en_{}.mp3".format
    common_voice_table(
        root / "train.tsv", [(name(0), '"Yes", he said.'), (name(9), "A"), (name(1), " ")]
    )
    common_voice_table(root / "dev.tsv", [(name(2), "Two\\three")])
    common_voice_table(root / "test.tsv", [("common_voice_en_3", "Old paths lack .mp3")])
    clips = [(name(i), f"Sentence {i}") for i in range(4)]
    common_voice_table(root / "validated.tsv", [*clips, (name(0), 'A \\"b\\" c')])
    common_voice_table(root / "other.tsv", [(name(1), "Not yet voted on")])
    return root


def test_common_voice_is_read_table_by_table(common_voice, tmp_path, capsys):
    out = tmp_path / "cv.jsonl"
    status, printed, _ = run(capsys, "commonvoice", common_voice, out)
    assert status == 0 and "3 rows" in printed and "1 speakers" in printed
    assert "rejected 1: cannot decode audio" in printed and "common_voice_en_9.mp3" in printed
    assert "rejected 1: empty sentence" in printed
    train, dev, test = rows_of(out)
    assert (train["text"], train["split"], train["speaker"]) == ('"Yes", he said.', "train", "ab12")
    assert dev["text"] == "Two\\three" and abs(dev["duration"] - 3) < 0.1
    assert test["audio_filepath"].endswith("clips/common_voice_en_3.mp3")
    run(capsys, "commonvoice", common_voice, out, "--splits", "other")
    assert [row["text"] for row in rows_of(out)] == ["Not yet voted on"]
    status, _, error = run(capsys, "commonvoice", common_voice, out, "--splits", "no")
    assert status == 2 and "no split no; found dev, other, test, train, validated" in error


def test_covost_tables_have_backslashes_before_what_is_meant_as_it_is(common_voice, tmp_path):
    name = "common_voice_en_{}.mp3".format
    table = write_text(
        tmp_path / "covost_v2.en_de.tsv",
        f'path\ttranslation\tsplit\n{name(0)}\tA \\\\ und \\"b\\"\ttest\n'
        f"{name(1)}\tEin\\\tTab\ttest\n",
    )
    report = importers.covost_manifest(common_voice, tmp_path / "m.jsonl", table)
    first, second = rows_of(tmp_path / "m.jsonl")
    assert first["translation"] == 'A \\ und "b"' and first["text"] == 'A "b" c'
    assert second["translation"] == "Ein\tTab"
    assert report.notes == ["test: 2 utterances, published are 15531"]


def test_covost_tables_that_were_joined_already_need_no_other(tmp_path, capsys):
    root = tmp_path / "speech"
    for split in ("dev", "test"):
        write_wave(root / split / "7" / "a.opus", 1.0, format="OGG", subtype="OPUS")
        lines = f"{split}/7/a.opus\tWhat's it for?\tWof\u00fcr ist das?\tbass\n"
        lines += f"{split}/7/a.opus\tNothing\t\tbass\n"
        header = "path\tsentence\ttranslation\tclient_id\n"
        write_text(root / f"covost_en_de.{split}.tsv", header + lines)
    tables = f"{root}/covost_en_de.dev.tsv,{root}/covost_en_de.test.tsv"
    out = tmp_path / "m.jsonl"
    status, printed, _ = run(capsys, "covost", root, out, "--translations", tables)
    assert status == 0 and "2 rows" in printed
    assert "rejected 2: empty sentence or translation" in printed
    row = rows_of(out)[0]
    assert row["audio_filepath"] == "speech/dev/7/a.opus" and row["split"] == "dev"
    assert (row["text"], row["translation"]) == ("What's it for?", "Wof\u00fcr ist das?")
    assert (row["target_lang"], row["speaker"]) == ("de", "bass")
    run(capsys, "covost", root, out, "--translations", tables, "--splits", "test")
    assert [row["split"] for row in rows_of(out)] == ["test"]


# ------------------------------------------------------------------------------------ Libri-Light


def test_cuts_lie_in_gaps_and_segments_are_as_long_as_they_may():
    stretches = [(0.5, 3.0), (3.5, 9.0), (9.2, 10.0), (12.0, 40.0), (41.0, 42.0), (42.0, 43.0)]
    segments = importers.cut_at_gaps(stretches, 10.0)
    assert segments == [[0.5, 10.0], [12.0, 40.0], [41.0, 43.0]]
    assert importers.cut_at_gaps(stretches, 1e9) == [[0.5, 43.0]]
    assert importers.cut_at_gaps([(0, 2), (1, 5), (6, 7)], 1) == [[0, 5], [6, 7]]  # no gap at 1
    rng = np.random.default_rng(0)
    edges = np.sort(rng.uniform(0, 600, 200)).reshape(-1, 2)
    segments = importers.cut_at_gaps(edges.tolist(), 30.0)
    starts, ends = {a for a, _ in edges.tolist()}, {b for _, b in edges.tolist()}
    assert all(a in starts and b in ends and b - a <= 30 for a, b in segments)
    assert all(b < c for (_, b), (c, _) in zip(segments, segments[1:]))
    covered = sum(1 for a, b in edges.tolist() for c, d in segments if c <= a and b <= d)
    assert covered == len(edges)


def test_librilight_is_cut_where_nobody_speaks(tmp_path, capsys):
    root = tmp_path / "librilight"
    book = root / "small" / "100" / "sea_fairies_0812_librivox_64kb_mp3"
    for i, voice in enumerate(([[0.4, 2.0], [2.5, 3.9], [4.2, 5.0]], [[0.0, 4.5]], [], "none")):
        audio = write_wave(book / f"{i:02}_sea_fairies_64kb.flac", 5.0)
        about = {"speaker": "100", "book_meta": {"id": "2512"}, "snr": 9.3}
        about |= {"voice_activity": voice} if voice != "none" else {}
        audio.with_suffix(".json").write_text(json.dumps(about))
    write_wave(book / "09_no_json_64kb.flac", 1.0)
    status, printed, _ = run(capsys, "librilight", root, tmp_path / "m.jsonl", "--segment-s", "4")
    rows = rows_of(tmp_path / "m.jsonl")
    assert status == 0 and [(row["offset"], row["duration"]) for row in rows] == [
        (0.4, 3.5), (4.2, 0.8), (0.0, 4.5),
    ]  # fmt: skip
    assert rows[1]["id"].startswith("small/100/") and rows[1]["id"].endswith("64kb-0001")
    assert {row["speaker"] for row in rows} == {"100"} and "text" not in rows[0]
    assert "1 segments are longer than 4 s" in printed
    for reason in ("no .json beside it", "no voice_activity in its .json", "no speech in it"):
        assert f"rejected 1: {reason}" in printed


# --------------------------------------------------------------------------------------- TED-LIUM

STM = """;; CATEGORY "0" "" ""
;; LABEL "O" "Overall" "Overall"
AaronHuey_2010X 1 inter_segment_gap 0 0.50 <o,f0,>
AaronHuey_2010X 1 AaronHuey_2010X 0.50 2.00 <o,f0,male> i 'm here {NOISE} today to(2) show <sil> you
AaronHuey_2010X 1 AaronHuey_2010X 2.00 2.50 <o,f0,male> ignore_time_segment_in_scoring
AaronHuey_2010X 1 AaronHuey_2010X 2.50 4.00 <F0_M> it 's <unk> isn 't {COUGH} it
AaronHuey_2010X 1 AaronHuey_2010X 4.00 4.50 <o,f0,male> {SMACK} <sil>
AaronHuey_2010X 1 AaronHuey_2010X 4.50 9.00 <o,f0,male> after the end
"""


@pytest.mark.parametrize(
    "raw, clean",
    [
        ("i 'm sure that 's it", "i'm sure that's it"),
        ("the(2) {BREATH} '60s get 'em they 'll they 're", "the '60s get 'em they'll they're"),
        ("one <sil> two {UH} three", "one two three"),
        ("so it is (AlGore-10.5-12.3-F0_M-S0)", "so it is"),
        ("<unk> {NOISE}", ""),
    ],
)
def test_ted_lium_transcripts_lose_their_markers(raw, clean):
    assert importers.stm_text(raw) == clean


@pytest.mark.parametrize("inner", ["", "legacy"])
def test_ted_lium_is_read_from_stm_and_sphere(tmp_path, capsys, inner):
    release = tmp_path / "TEDLIUM_release-3"
    write_text(release / inner / "dev" / "stm" / "AaronHuey_2010X.stm", STM)
    samples = write_sphere(release / inner / "dev" / "sph" / "AaronHuey_2010X.sph", 5.0, "10")
    if inner:  # release 3 has all talks a second time
        write_text(release / "data" / "stm" / "AaronHuey_2010X.stm", STM)
    out = tmp_path / "m.jsonl"
    status, printed, _ = run(capsys, "tedlium", release, out)
    first, second = rows_of(out)
    assert status == 0 and first["text"] == "i'm here today to show you"
    assert second["text"] == "it's isn't it" and first["split"] == "dev"
    assert (first["offset"], first["duration"], second["duration"]) == (0.5, 1.5, 1.5)
    for reason in (
        "inter_segment_gap", "ignore_time_segment_in_scoring", "no words",
        "segment ends after its audio",
    ):  # fmt: skip
        assert f"rejected 1: {reason}" in printed, reason
    assert "1 transcripts lack a word" in printed
    row = Manifest.read([out]).row(0)
    wave = read_audio(row["audio_filepath"], row["offset"], row["duration"])
    assert np.array_equal(np.round(wave * 32768), samples[8000:32000])


@pytest.mark.parametrize("order", ["01", "10"])
def test_sphere_of_either_byte_order_is_read(tmp_path, order):
    samples = write_sphere(tmp_path / "a.sph", 0.5, order)
    assert np.array_equal(np.round(read_audio(tmp_path / "a.sph") * 32768), samples)


# -------------------------------------------------------------------------------------------- AMI

NITE = 'xmlns:nite="http://nite.sourceforge.net/"'
XML = '<?xml version="1.0" encoding="ISO-8859-1" standalone="yes"?>\n'


@pytest.fixture
def ami(tmp_path) -> Path:
    """Two meetings with two speakers; annotations as in ami_public_manual_1.6.2."""
    notes = tmp_path / "ami_public_manual_1.6.2"
    people = ""
    for meeting in ("ES2002a", "ES2011b"):
        people += f'<meeting nite:id="m_{meeting}" observation="{meeting}" duration="6.0">\n'
        for channel, agent in enumerate("AB"):
            people += (
                f'<speaker nite:id="{meeting}_{agent}" nxt_agent="{agent}" channel="{channel}" '
                f'global_name="MEE00{channel}" role="PM"/>\n'
            )
            stem, audio = f"{meeting}.{agent}", tmp_path / "amicorpus" / meeting / "audio"
            write_wave(audio / f"{meeting}.Headset-{channel}.wav", 6.0)
            words = (
                f'<w nite:id="{stem}.words0" starttime="1.0" endtime="1.2">Caf\u00e9</w>\n'
                f'<w nite:id="{stem}.words1" starttime="1.2" endtime="1.2" punc="true">,</w>\n'
                f'<vocalsound nite:id="{stem}.words2" starttime="1.3" endtime="1.4" type="x"/>\n'
                f'<w nite:id="{stem}.words3" starttime="1.5" endtime="1.7">that&#39;s</w>\n'
                f'<w nite:id="{stem}.words4" starttime="1.8" endtime="2.0">L_C_D_</w>\n'
                f'<gap nite:id="{stem}.words5" starttime="2.0" endtime="2.0"/>\n'
            )
            words = f'<nite:root nite:id="{stem}.words" {NITE}>\n{words}</nite:root>\n'
            write_text(notes / "words" / f"{stem}.words.xml", XML + words, "latin-1")
            spans = [
                ("1.0", "2.0", "words0)..id({0}.words4"),
                ("3.0", "4.0", "words3"),
                ("4.0", "4.5", "words2"),
                ("5.0", "4.0", "words0"),
                ("5", "6", "words99"),
            ]
            segments = "".join(
                f'<segment nite:id="{stem}.sync.{i}" channel="{channel}" '
                f'transcriber_start="{start}" transcriber_end="{end}">\n<nite:child '
                f'href="{stem}.words.xml#id({stem}.{span.format(stem)})"/>\n</segment>\n'
                for i, (start, end, span) in enumerate(spans)
            )  # fmt: skip
            segments = f'<nite:root nite:id="{stem}.segs" {NITE}>\n{segments}</nite:root>\n'
            write_text(notes / "segments" / f"{stem}.segments.xml", XML + segments, "latin-1")
        write_wave(audio / f"{meeting}.Array1-01.wav", 6.0)
        people += "</meeting>\n"
    people = f'<nite:root nite:id="meetings" {NITE}>\n{people}</nite:root>\n'
    write_text(notes / "corpusResources" / "meetings.xml", XML + people, "latin-1")
    return tmp_path


def test_ami_segments_are_those_of_the_transcripts_on_each_headset(ami, capsys):
    out = ami / "ihm.jsonl"
    status, printed, _ = run(capsys, "ami", ami, out)
    rows = rows_of(out)
    assert status == 0 and len(rows) == 8 and "2 speakers" in printed
    assert rows[0] == {
        "audio_filepath": "amicorpus/ES2002a/audio/ES2002a.Headset-0.wav",
        "offset": 1.0,
        "duration": 1.0,
        "text": "Caf\u00e9 that's L C D",
        "id": "ES2002a.A.sync.0",
        "speaker": "MEE000",
        "split": "train",
    }
    assert rows[1]["text"] == "that's" and rows[2]["audio_filepath"].endswith("Headset-1.wav")
    assert {row["split"] for row in rows} == {"train", "dev"}
    for reason in ("no words", "segment of no length", "no times or no words to a segment"):
        assert f"rejected 4: {reason}" in printed, printed


def test_ami_has_one_distant_microphone_for_all_and_splits_by_meeting(ami, capsys):
    out = ami / "sdm.jsonl"
    run(capsys, "ami", ami / "amicorpus", out, "--microphone", "sdm", "--splits", "dev",
        "--annotations", ami / "ami_public_manual_1.6.2")  # fmt: skip
    rows = rows_of(out)
    assert {row["audio_filepath"] for row in rows} == {
        "amicorpus/ES2011b/audio/ES2011b.Array1-01.wav"
    }
    assert len(rows) == 4 and {row["speaker"] for row in rows} == {"MEE000", "MEE001"}
    status, _, error = run(capsys, "ami", ami / "amicorpus", out)
    assert status == 2 and "no folder segments (--annotations)" in error
    write_text(ami / "ami_public_manual_1.6.2/segments/ES2002a.A.segments.xml", "<cut")
    status, _, error = run(capsys, "ami", ami, out)
    assert status == 2 and "not XML" in error and error.count("\n") == 1
    names = ["ES2004a", "IS1009d", "TS3003b", "EN2002c", "IB4010", "TS3004a", "ES2003a", "IN1001"]
    splits = ["test"] * 4 + ["dev"] * 2 + ["train"] * 2
    assert [importers._ami_split(name) for name in names] == splits


# --------------------------------------------------------------------------- Kaldi, fairseq, NeMo


@pytest.fixture
def kaldi(tmp_path) -> Path:
    root = tmp_path / "data" / "train"
    write_wave(tmp_path / "audio" / "r1.wav", 4.0)
    write_sphere(root / "wav" / "r2.sph", 3.0)
    write_text(root / "wav.scp", f"r1 {tmp_path}/audio/r1.wav\nr2\twav/r2.sph\nr3 feats.ark:17\n")
    write_text(root / "segments", "a-1 r1 0.5 2.0\na-2 r1 2.00 -1\nb-1 r2 0 1.5\nb-2 r2 1 9\n"
               "c-1 r3 0 1\nd-1 r1 0\ne-1 r1 0 1\n")  # fmt: skip
    write_text(
        root / "text", "a-1 HELLO THERE\na-2 AND YOU\nb-1 Stra\u00dfe\nb-2 LATE\nc-1 X\ne-1\n"
    )
    write_text(root / "utt2spk", "a-1 a\na-2 a\nb-1 b\n")
    return root


def test_kaldi_folders_are_read_with_or_without_their_optional_tables(kaldi, tmp_path, capsys):
    out = tmp_path / "m.jsonl"
    status, printed, _ = run(capsys, "kaldi", kaldi, out)
    first, second, third = rows_of(out)
    assert status == 0 and (first["offset"], first["duration"]) == (0.5, 1.5)
    assert (second["offset"], second["duration"], second["text"]) == (2.0, 2.0, "AND YOU")
    assert third["audio_filepath"] == "data/train/wav/r2.sph" and third["speaker"] == "b"
    assert third["text"] == "Stra\u00dfe" and "offset" not in third
    for reason in (
        "inside a Kaldi archive", "recording is not in wav.scp", "no transcript",
        "not utterance, recording, start, end", "segment ends after its audio",
    ):  # fmt: skip
        assert f"rejected 1: {reason}" in printed, reason
    for name in ("segments", "text", "utt2spk"):
        (kaldi / name).unlink()
    run(capsys, "kaldi", kaldi, out)
    assert [(row["id"], row["duration"]) for row in rows_of(out)] == [("r1", 4.0), ("r2", 3.0)]


def test_kaldi_pipes_are_refused_with_what_to_run(kaldi, tmp_path, capsys):
    """A manifest is data: whoever wrote it must not choose what this machine runs."""
    marker = tmp_path / "was run"
    with (kaldi / "wav.scp").open("a") as table:
        table.write(f"r4 touch '{marker}' && sph2pipe -f wav -p -c 1 r4.sph |\n")
    status, _, error = run(capsys, "kaldi", kaldi, tmp_path / "m.jsonl")
    assert status == 2 and error.count("\n") == 1 and "wav.scp:4: r4 is a pipe" in error
    assert "sph2pipe -f wav -p -c 1 r4.sph > r4.wav" in error
    assert not marker.exists() and not (tmp_path / "m.jsonl").exists()


def test_fairseq_lists_are_read_with_words_or_letters_beside_them(tmp_path, capsys):
    for name in "ab":
        write_wave(tmp_path / "LibriSpeech" / "x" / f"{name}.flac", 1.0)
    lines = f"{tmp_path}/LibriSpeech\nx/a.flac\t16000\nx/b.flac\t16000\nx/c.flac\nx/d.flac\t9\n"
    tsv, out = write_text(tmp_path / "train.tsv", lines), tmp_path / "m.jsonl"
    status, printed, _ = run(capsys, "fairseq", tsv, out)
    assert status == 0 and [row["id"] for row in rows_of(out)] == ["x/a", "x/b"]
    assert "text" not in rows_of(out)[0]
    assert "rejected 1: not path, number of samples" in printed
    assert "rejected 1: no such audio file" in printed
    write_text(tmp_path / "train.ltr", "H I | Y O U |\nN O |\n\nX |\n")
    run(capsys, "fairseq", tsv, out)
    assert [row["text"] for row in rows_of(out)] == ["HI YOU", "NO"]
    write_text(tmp_path / "train.wrd", "Hi you\nNo\n\nX\n")
    run(capsys, "fairseq", tsv, out)
    assert [row["text"] for row in rows_of(out)] == ["Hi you", "No"]
    write_text(tmp_path / "train.wrd", "Hi you\n")
    status, _, error = run(capsys, "fairseq", tsv, out)
    assert status == 2 and "4 files, but 1 transcripts beside it" in error


def test_nemo_manifests_are_checked_and_keep_their_keys(tmp_path, capsys):
    write_wave(tmp_path / "in" / "a.wav", 2.0)
    good = {"audio_filepath": "a.wav", "duration": 1.0, "offset": 0.5, "text": "hi", "lang": "en"}
    rows = [good, good | {"duration": 3.0}, good | {"audio_filepath": "b.wav"},
            good | {"audio_filepath": "s3://x/a.wav"}, {"audio_filepath": "a.wav"}]  # fmt: skip
    source = write_text(
        tmp_path / "in/m.jsonl", "".join(json.dumps(r) + "\n" for r in rows) + "{\n"
    )
    out = tmp_path / "out" / "m.jsonl"
    status, printed, _ = run(capsys, "nemo", source, out)
    assert status == 0 and rows_of(out) == [good | {"audio_filepath": f"{tmp_path}/in/a.wav"}]
    for reason in (
        "segment ends after its audio", "no such audio file", "audio_filepath is a URL",
        'no "duration"', "not a JSON line",
    ):  # fmt: skip
        assert f"rejected 1: {reason}" in printed, reason
    status, _, error = run(capsys, "nemo", source, source)
    assert status == 2 and "would be overwritten" in error
