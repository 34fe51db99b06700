"""Audio in tar shards: packed and read in place, imported, and what is broken in each way."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

import corpora
import data
import shards
from corpora import Manifest, read_audio


def wave(seconds: float, seed: int = 0, rate: int = 16000, channels: int = 1) -> np.ndarray:
    shape = (round(seconds * rate), channels)
    return np.squeeze(0.1 * np.random.default_rng(seed).standard_normal(shape))


def encoded(seconds: float, seed: int = 0, rate: int = 16000, kind: str = "FLAC", **how) -> bytes:
    sink = io.BytesIO()
    soundfile.write(sink, wave(seconds, seed, rate), rate, format=kind, **how)
    return sink.getvalue()


def write_tar(path: Path, files: dict[str, bytes], kind: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, kind) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def run(capsys, *command: object) -> tuple[int, str, str]:
    """`python data.py ...` -> exit status, what it printed, its error."""
    capsys.readouterr()
    status = data.main([*map(str, command)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def error_of(capsys, *command: object) -> str:
    status, _, error = run(capsys, *command)
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Whole files of several formats and parts of long ones; two rows cannot be read."""
    root = tmp_path / "c"
    root.mkdir()
    soundfile.write(root / "a.flac", wave(1.2, 1), 16000)
    soundfile.write(root / "b.wav", wave(1.0, 2, 8000, 2), 8000, subtype="PCM_24")
    soundfile.write(root / "c.mp3", wave(3.0, 3, 22050), 22050)
    soundfile.write(root / "d.ogg", wave(1.1, 4), 16000)
    soundfile.write(root / "loud.wav", 9 * wave(2.0, 5), 16000, subtype="FLOAT")
    soundfile.write(root / "long.flac", wave(6.0, 6, 44100, 2), 44100, subtype="PCM_24")
    (root / "no.wav").write_text("no audio")
    rows = [
        {"audio_filepath": "a.flac", "duration": 1.2, "text": "ONE \u00fc", "id": "x/a", "n": [1]},
        {"audio_filepath": "b.wav", "duration": 1.0, "offset": 0.0, "speaker": 7},
        {"audio_filepath": "no.wav", "duration": 1.0},
        {"audio_filepath": "c.mp3", "duration": 3.0, "text": "three"},
        {"audio_filepath": "c.mp3", "duration": 0.75, "offset": 1.3, "text": "part"},
        {"audio_filepath": "d.ogg", "duration": 1.1},
        {"audio_filepath": "loud.wav", "duration": 0.5, "offset": 0.5},
        {"audio_filepath": "long.flac", "duration": 1.31, "offset": 2.123},
        {"audio_filepath": "long.flac", "duration": 2.0, "offset": 0.0, "text": "beginning"},
        {"audio_filepath": "long.flac", "duration": 2.0, "offset": 5.0},
        {"audio_filepath": str(root / "long.flac"), "duration": 1.0, "offset": 5.0},
    ]
    path = root / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


BAD = (2, 9)  # rows of the corpus that cannot be packed


# ------------------------------------------------------------------------------ manifest to shards


def test_packed_rows_sound_as_before_and_keep_their_fields(corpus, tmp_path, capsys):
    status, printed, _ = run(capsys, "shards", corpus, tmp_path / "s", "--shard-mib", "0.3")
    assert (
        status == 0 and "9 rows" in printed and f"{tmp_path / 's' / 'm.jsonl'}: 3 shards" in printed
    )
    assert f"rejected 1: cannot decode audio (first: {corpus}:3: " in printed
    assert f"rejected 1: ends before its row does (first: {corpus}:10: " in printed
    before, after = Manifest.read([corpus]), Manifest.read([tmp_path / "s" / "m.jsonl"])
    good = [i for i in range(len(before)) if i not in BAD]
    for i, row in zip(good, map(after.row, range(len(after))), strict=True):
        its = before.row(i)
        expected = read_audio(its["audio_filepath"], its.get("offset", 0.0), its["duration"])
        found = read_audio(row["audio_filepath"], 0.0, row["duration"])
        lossy = its["audio_filepath"].endswith("mp3") and "offset" in its
        assert len(found) == len(expected)
        assert np.abs(found - expected).max() <= (2e-7 if lossy else 0), its
        del its["audio_filepath"], row["audio_filepath"]
        its.pop("offset", None)
        assert row == its
    names = sorted(path.name for path in (tmp_path / "s").iterdir())
    assert names == ["m-000000.tar", "m-000001.tar", "m-000002.tar", "m.jsonl"]


def test_whole_files_go_in_byte_for_byte_and_plain_tar_finds_them(corpus, tmp_path, capsys):
    assert run(capsys, "shards", corpus, tmp_path / "s")[0] == 0
    with tarfile.open(tmp_path / "s" / "m-000000.tar") as tar:
        content = {member.name: tar.extractfile(member).read() for member in tar}
    assert list(content)[:3] == ["000000000.flac", "000000000.json", "000000001.wav"]
    for name, file in (("000000000.flac", "a.flac"), ("000000003.mp3", "c.mp3"),
                       ("000000005.ogg", "d.ogg")):  # fmt: skip
        assert content[name] == (corpus.parent / file).read_bytes()
    assert {"000000004.flac", "000000006.wav", "000000007.flac"} <= content.keys()
    row = rows_of(tmp_path / "s" / "m.jsonl")[0]
    shard, first, size = row["audio_filepath"].rsplit(":", 2)
    held = (tmp_path / "s" / shard).read_bytes()[int(first) : int(first) + int(size)]
    assert held == content["000000000.flac"]
    assert json.loads(content["000000000.json"]) == {
        "duration": 1.2, "text": "ONE \u00fc", "id": "x/a", "n": [1]
    }  # fmt: skip


def test_imported_shards_give_the_manifest_that_packing_wrote(corpus, tmp_path, capsys):
    run(capsys, "shards", corpus, tmp_path / "s", "--shard-mib", "0.3")
    for root in (tmp_path / "s", tmp_path / "s" / "m-*.tar"):
        out = tmp_path / "s" / "again.jsonl"
        status, printed, _ = run(capsys, "manifest", "shards", root, out)
        assert status == 0 and "9 rows" in printed and "rejected" not in printed
        for row, its in zip(rows_of(out), rows_of(tmp_path / "s" / "m.jsonl"), strict=True):
            assert row.pop("duration") == pytest.approx(its.pop("duration"), abs=0.05)
            assert row.pop("id") and (its.pop("id", None) in (None, "x/a"))
            assert row == its


def test_shards_go_through_check_other_importers_and_are_packed_again(corpus, tmp_path, capsys):
    run(capsys, "shards", corpus, tmp_path / "s", "--shard-mib", "0.3")
    packed, listed = tmp_path / "s" / "m.jsonl", tmp_path / "listed.jsonl"
    out = tmp_path / "checked" / "m.jsonl"
    status, printed, _ = run(capsys, "check", packed, "--read", "--out", out)
    assert status == 0 and "9 rows" in printed and "rejected" not in printed
    status, printed, _ = run(capsys, "manifest", "nemo", out, listed)
    assert status == 0 and "9 rows" in printed and "rejected" not in printed
    status, printed, _ = run(capsys, "shards", listed, tmp_path / "t")
    assert status == 0 and ": 1 shards, 9 rows" in printed
    once, twice = Manifest.read([packed]), Manifest.read([tmp_path / "t" / "listed.jsonl"])
    for i in range(9):
        one, two = (read_audio(m.row(i)["audio_filepath"]) for m in (once, twice))
        assert np.array_equal(one, two)


def test_training_reads_shards(corpus, tmp_path, capsys):
    run(capsys, "shards", corpus, tmp_path / "s", "--shard-mib", "0.3")
    manifest = Manifest.read([tmp_path / "s" / "m.jsonl"])
    rows = data.SpeechRows(manifest, 5.0, 0)
    numbers = np.arange(len(manifest))[::-1]
    batch = rows.collate(numbers, 0 * numbers, int(rows.lengths.max()))
    assert batch.feature_lens.tolist() == rows.lengths[::-1].tolist()
    shard = tmp_path / "s" / "m-000001.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    cut = next(i for i in numbers if "m-000001" in manifest.row(i)["audio_filepath"])
    with pytest.raises(corpora.AudioError) as caught:
        rows.features(cut, 0)
    assert caught.value.reason == "its shard is cut short"
    where = f"{manifest.where(cut)}: {manifest.row(cut)['audio_filepath']}: its shard is cut short"
    assert str(caught.value) == where
    shard.unlink()
    with pytest.raises(corpora.AudioError, match=r"m-000001\.tar:\d+:\d+: no such shard"):
        rows.features(cut, 0)


def test_packing_that_was_interrupted_goes_on_and_ends_the_same(
    corpus, tmp_path, capsys, monkeypatch
):
    arguments = "--shard-mib", "0.1", "--workers", "1"
    whole, out = tmp_path / "whole", tmp_path / "s"
    printed = run(capsys, "shards", corpus, whole, *arguments)[1]
    put, read, left = shards._put, shards._audio_of, [6]

    def interrupted(tar, name, sample):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return put(tar, name, sample)

    monkeypatch.setattr(shards, "_put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.main(["shards", str(corpus), str(out), *arguments])
    assert not (out / "m.jsonl").exists() and not list(out.glob("*.tmp"))
    done = len(list(out.glob("*.tar")))
    assert done >= 1
    with (out / "m.jsonl.partial").open("a") as partial:
        partial.write('{"shard": "m-0000')
    asked = []
    monkeypatch.setattr(shards, "_put", put)
    monkeypatch.setattr(shards, "_audio_of", lambda row: (asked.append(row), read(row))[1])
    assert run(capsys, "shards", corpus, out, *arguments)[1] == printed.replace(
        str(whole), str(out)
    )
    assert 0 < len(asked) < 11
    assert sorted(path.name for path in out.iterdir()) == sorted(p.name for p in whole.iterdir())
    for path in whole.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_packing_refuses_to_mix_or_to_overwrite(corpus, tmp_path, capsys, monkeypatch):
    out = tmp_path / "s"
    assert "--shard-mib 0" in error_of(capsys, "shards", corpus, out, "--shard-mib", "0")
    message = error_of(capsys, "shards", corpus, corpus.parent)
    assert f"{corpus}: is there already" in message
    out.mkdir()
    (out / "m.jsonl.partial").write_text('["of another", 256.0]\n')
    message = error_of(capsys, "shards", corpus, out)
    assert "m.jsonl.partial: is of another manifest or --shard-mib; delete it" in message
    assert "no such file" in error_of(capsys, "shards", tmp_path / "none.jsonl", out)
    (tmp_path / "bad.jsonl").write_text('{"audio_filepath": "none.wav", "duration": 1}\n')
    message = error_of(capsys, "shards", tmp_path / "bad.jsonl", out)
    assert "0 usable rows" in message and "rejected 1: no such audio file" in message
    assert not list(out.glob("*.tar"))


# ------------------------------------------------------------------------------ shards to manifest


def test_texts_fields_and_formats_of_foreign_shards_are_read(tmp_path, capsys):
    files = {
        "./a/1.flac": encoded(1.0, 1),
        "./a/1.txt": "\ufeffhello  world\n".encode(),
        "./a/1.json": json.dumps(
            {"text": "not this", "speaker": "s", "offset": 3, "duration": 9, "audio": 1}
        ).encode(),
        "./2.json": b'{"text": "from json", "id": "own"}',  # before its audio, apart from it
        "./3.MP3": encoded(1.5, 3, kind="MP3"),
        "./2.wav": encoded(1.0, 2, kind="WAV"),
        "./3.cls": b"7",
        "./._4.flac": b"of a Macintosh",
        "n" * 150 + ".ogg": encoded(1.0, 5, kind="OGG"),  # a header of several blocks
    }
    write_tar(tmp_path / "d" / "b" / "x.tar", files)
    write_tar(tmp_path / "d" / "a.tar", {"0.flac": encoded(0.5)})
    status, printed, _ = run(capsys, "manifest", "shards", tmp_path / "d", tmp_path / "m.jsonl")
    assert status == 0 and "5 rows" in printed and "rejected" not in printed, printed
    rows = rows_of(tmp_path / "m.jsonl")
    assert [row["id"] for row in rows] == ["0", "./a/1", "own", "./3", "n" * 150]
    assert [row.get("text") for row in rows] == [None, "hello world", "from json", None, None]
    assert rows[1].items() >= {"speaker": "s", "duration": 1.0}.items() and "offset" not in rows[1]
    assert all(row["audio_filepath"].startswith(("d/a.tar:", "d/b/x.tar:")) for row in rows)
    manifest = Manifest.read([tmp_path / "m.jsonl"])
    for i, name in enumerate(["./a/1.flac", "./2.wav", "./3.MP3", "n" * 150 + ".ogg"], 1):
        expected, _ = soundfile.read(io.BytesIO(files[name]), dtype="float32")
        assert np.array_equal(read_audio(manifest.row(i)["audio_filepath"]), expected)


def test_what_is_wrong_in_shards_is_counted_and_the_rest_is_used(tmp_path, capsys):
    flac, folder = encoded(1.0), tmp_path / "d"
    surrogate = b'{"text": "\\ud800"}'
    files = {
        "good.flac": flac,
        "alone.txt": b"no audio to it",
        "broken.flac": b"no audio",
        "empty.wav": b"",
        "two.flac": flac, "two.more.flac": flac,
        "latin.flac": flac, "latin.txt": b"\xfc",
        "list.flac": flac, "list.json": b"[1]",
        "half.flac": flac, "half.json": surrogate,
        "number.flac": flac, "number.json": b'{"text": 3}',
        "huge.flac": flac, "huge.txt": b"x" * (shards.MOST_TEXT + 1),
    }  # fmt: skip
    write_tar(folder / "a.tar", files)
    with tarfile.open(folder / "a.tar", "a") as tar:
        link = tarfile.TarInfo("link.flac")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    whole = write_tar(folder / "cut.tar", {"c1.flac": flac, "c2.flac": flac}).read_bytes()
    second = 1024 + -(-len(flac) // 512) * 512
    (folder / "cut.tar").write_bytes(whole[: second + 700])
    (folder / "cut between.tar").write_bytes(whole[: second - 512])
    damaged = bytearray(whole)
    damaged[second - 512 : second - 400] = b"\xff" * 112
    (folder / "damaged.tar").write_bytes(damaged)
    (folder / "no.tar").write_bytes(b"no tar at all" * 100)
    (folder / "empty.tar").write_bytes(b"")
    write_tar(folder / "gz.tar", {"g.flac": flac}, "w:gz")
    write_tar(folder / "gz.tar.gz", {"g.flac": flac}, "w:gz")
    out = tmp_path / "m.jsonl"
    report = shards.shards_manifest(folder, out, workers=2)
    assert [row["id"] for row in rows_of(out)] == ["good", "two", "c1", "c1", "c1"]
    assert report.counts() == {
        "a link or a file with holes in a shard": 1,
        "a second audio file of its sample (a key ends at the first dot of a name)": 1,
        "sample without audio": 1,
        "its .txt is not UTF-8": 1,
        "its .json is no object": 1,
        "name or fields hold half a surrogate pair": 1,
        ".txt of more than 1 MiB": 1,
        "cannot decode audio": 2,
        "text is not a string": 1,
        "shard is broken, or cut short": 3,
        "its shard is cut short": 1,
        "no tar file, or a compressed one": 3,
        "not named .tar; unpack compressed ones, they are read in place": 1,
    }
    status, printed, _ = run(capsys, "manifest", "shards", folder, out)
    assert status == 0 and printed.isascii() and printed.count("\n") == 14
    assert f"rejected 1: its .txt is not UTF-8 (first: {folder}/a.tar: latin)" in printed


def test_no_shards_or_none_usable_is_one_line(tmp_path, capsys):
    (tmp_path / "d").mkdir()
    for root in (tmp_path / "d", tmp_path / "none", tmp_path / "d" / "x-{0..3}.tar"):
        message = error_of(capsys, "manifest", "shards", root, tmp_path / "m.jsonl")
        assert f"{root}: no .tar there; expected" in message
    write_tar(tmp_path / "d" / "x.tar", {"a.txt": b"x"})
    message = error_of(capsys, "manifest", "shards", tmp_path / "d", tmp_path / "m.jsonl")
    assert "0 usable rows" in message and "sample without audio" in message


def test_no_damage_to_a_shard_ends_an_import(tmp_path):
    """Bytes of headers turned at random, and cuts: rows or reasons, never an error."""
    files = {f"{i}.{kind}": content for i in range(3) for kind, content in
             (("wav", encoded(0.2, i, kind="WAV")), ("txt", b"text"))}  # fmt: skip
    whole = write_tar(tmp_path / "x.tar", {**files, "n" * 150 + ".txt": b"long"}).read_bytes()
    rng, path = np.random.default_rng(0), tmp_path / "y.tar"
    found = {"rows": 0, "faults": 0}
    for _ in range(300):
        damaged = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.3 else whole)
        headers = np.flatnonzero(
            [damaged[i + 257 : i + 262] == b"ustar" for i in range(0, len(damaged), 512)]
        )
        for header in rng.choice(headers, 2) if len(headers) else ():
            damaged[512 * header + rng.integers(0, min(512, len(damaged) - 512 * header))] = (
                rng.integers(256)
            )
        path.write_bytes(damaged)
        rows, faults = shards.scan_shard(path)
        found["rows"] += len(rows)
        found["faults"] += len(faults)
        for row in rows:
            try:
                read_audio(row["audio_filepath"])
            except corpora.AudioError as error:
                assert str(error).isprintable()
    assert found["rows"] > 30 and found["faults"] > 30


def test_a_number_beyond_any_file_is_a_fault_of_its_row(tmp_path):
    write_tar(tmp_path / "x.tar", {"a.wav": encoded(0.2, kind="WAV")})
    for place in (f"0:{10**18}", f"{10**30}:1", "99999999:0"):
        with pytest.raises(corpora.AudioError, match="its shard is cut short"):
            read_audio(f"{tmp_path}/x.tar:{place}")
