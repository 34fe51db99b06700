"""Readers of distributed corpora: files laid out as they are published, and what is wrong there."""

import gzip
import json
import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

import corpora
import data
from corpora import SpokenToken, TextExample, read_glue, read_textnorm
from importers import covost_manifest

# ---------------------------------------------------------------------------------------- GLUE

# Headers as GLUE's archives have them.
MNLI_COMMON = (
    "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse "
    "sentence2_parse sentence1 sentence2"
).split()
MNLI_TRAIN = [*MNLI_COMMON, "label1", "gold_label"]
MNLI_DEV = [*MNLI_COMMON, *(f"label{i}" for i in range(1, 6)), "gold_label"]
QNLI = ["index", "question", "sentence", "label"]
QQP = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]


def write_tsv(path: Path, *rows: list[str], end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join("\t".join(row) + end for row in rows).encode())
    return path


def mnli_row(i: int, first: str, second: str, *labels: str) -> list[str]:
    return [str(i), f"{i}n", f"{i}c", "fiction", "( a )", "( b )", "(A)", "(B)", first, second,
            *labels]  # fmt: skip


def test_mnli_has_twelve_columns_to_train_on_sixteen_to_develop_ten_to_test(tmp_path):
    train = write_tsv(
        tmp_path / "train.tsv", MNLI_TRAIN, mnli_row(0, "It rained.", "It was wet.", "x", "neutral")
    )
    votes = ["entailment"] * 4 + ["neutral"]
    dev = write_tsv(
        tmp_path / "dev_matched.tsv",
        MNLI_DEV,
        mnli_row(0, "He said \"no\".", "He said 'no'", *votes, "entailment"),
        mnli_row(1, "a", "b", *votes, "-"),
        mnli_row(2, "c", "d", *votes, "contradiction"),
    )  # fmt: skip
    test = write_tsv(tmp_path / "test_matched.tsv", MNLI_COMMON, mnli_row(0, "a", "b"))
    assert len(MNLI_TRAIN) == 12 and len(MNLI_DEV) == 16 and len(MNLI_COMMON) == 10
    assert read_glue("mnli", [train])[0] == [
        TextExample("0", ("It rained.", "It was wet."), "neutral")
    ]
    examples, report = read_glue("mnli", [dev])
    assert examples == [
        TextExample("0", ('He said "no".', "He said 'no'"), "entailment"),
        TextExample("2", ("c", "d"), "contradiction"),
    ]
    ((reason, count),) = report.counts().items()
    assert count == 1 and "label is not one of entailment, neutral, contradiction" in reason
    assert read_glue("mnli", [test])[0] == [TextExample("0", ("a", "b"), None)]


def test_malformed_rows_of_qqp_are_counted_and_left_out(tmp_path):
    path = write_tsv(
        tmp_path / "train.tsv",
        QQP,
        ["133273", "213221", "213222", 'How is "the life"?', "What's life?", "0"],
        ["402555", "536040", "536041", "How do I control?"],  # the line was broken here
        ["", "0"],
        ["360472", "364011", "490273", "A\u2028B?", "C\x85D?", "1"],  # no line ends in TSV
        ["1", "2", "3", "too", "many", "1", "cells"],
    )
    examples, report = read_glue("qqp", [path])
    assert examples == [
        TextExample("133273", ('How is "the life"?', "What's life?"), "0"),
        TextExample("360472", ("A\u2028B?", "C\x85D?"), "1"),
    ]
    assert report.rows == 2 and report.counts() == {"not 6 cells": 3}
    assert f"{path}:3" in str(report)


def test_a_quote_opens_nothing(tmp_path):
    """A reader of CSV would swallow everything up to the next quote, line ends included."""
    path = write_tsv(
        tmp_path / "dev.tsv",
        QNLI,
        ["0", '"Who', "is it?", "entailment"],
        ["1", "And", 'then"', "not_entailment"],
    )
    examples, report = read_glue("qnli", [path])
    assert [example.texts for example in examples] == [('"Who', "is it?"), ("And", 'then"')]
    assert not report.rejected


def test_sst2_keeps_its_trailing_blank_numbers_its_rows_and_may_end_lines_as_windows(tmp_path):
    lines = [["sentence", "label"], ["hide new secretions from the parental units ", "0"],
             [" that loves its characters ", "1"]]  # fmt: skip
    expected = [
        TextExample("0", ("hide new secretions from the parental units ",), "0"),
        TextExample("1", (" that loves its characters ",), "1"),
    ]
    for end in ("\n", "\r\n"):
        assert read_glue("sst2", [write_tsv(tmp_path / "train.tsv", *lines, end=end)])[0] == (
            expected
        )
    test = write_tsv(tmp_path / "test.tsv", ["index", "sentence"], ["7", "uneasy mishmash ."])
    assert read_glue("sst2", [test])[0] == [TextExample("7", ("uneasy mishmash .",), None)]


def test_several_files_are_read_one_after_the_other(tmp_path):
    paths = [
        write_tsv(tmp_path / f"{n}.tsv", ["sentence", "label"], [f"film {n}", "1"]) for n in "ab"
    ]
    assert [e.texts for e in read_glue("sst2", paths)[0]] == [("film a",), ("film b",)]


def test_faults_of_glue_files_are_one_line_naming_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.tsv: no such file"):
        read_glue("sst2", [tmp_path / "absent.tsv"])
    path = write_tsv(tmp_path / "dev.tsv", ["text", "label"], ["a film", "1"])
    with pytest.raises(ValueError, match="dev.tsv: no column 'sentence'; the header has"):
        read_glue("sst2", [path])
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="dev.tsv: no column 'sentence'"):
        read_glue("sst2", [path])
    path.write_bytes("sentence\tlabel\nun caf\u00e9\t1\n".encode("latin-1"))
    with pytest.raises(ValueError, match="dev.tsv: not UTF-8"):
        read_glue("sst2", [path])
    write_tsv(path, ["sentence", "label"], ["a film", "2"], ["broken"])
    with pytest.raises(ValueError) as caught:
        read_glue("sst2", [path])
    message = str(caught.value)
    assert "0 usable rows" in message and "label is not one of 0, 1" in message
    assert "not 2 cells" in message and len(message.splitlines()) == 1


def test_the_glue_command_counts_rows_labels_and_faults_file_by_file(tmp_path, capsys):
    folder = tmp_path / "QQP"
    rows = [[str(i), "1", "2", "a?", "b?", label] for i, label in enumerate("0010")]
    train = write_tsv(folder / "train.tsv", QQP, *rows, ["4", "1", "2", "a?"], ["5"])
    dev = write_tsv(folder / "dev.tsv", QQP, rows[0], [*rows[1][:5], "x"])
    test = write_tsv(folder / "test.tsv", ["id", "question1", "question2"], ["0", "a?", "b?"])
    expected = [
        f"{dev}: 1 rows: 0 1",
        f"rejected 1: label is not one of 0, 1 (first: {dev}: 1)",
        f"{test}: 1 rows: no labels, as test files have none",
        f"{train}: 4 rows: 0 3, 1 1",
        f"rejected 2: not 6 cells (first: {train}:6)",
    ]
    assert data.main(["glue", "qqp", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == expected
    assert data.main(["glue", "qqp", str(dev), str(test), str(train)]) == 0
    assert capsys.readouterr().out.splitlines() == expected


def test_the_glue_command_fails_in_one_line(tmp_path, capsys):
    bad = write_tsv(tmp_path / "dev.tsv", ["sentence", "label"], ["a film", "2"])
    (tmp_path / "empty").mkdir()
    for path, message in (
        (bad, "0 usable rows"),
        (tmp_path / "no.tsv", "no such file"),
        (tmp_path / "empty", "no .tsv in this folder"),
    ):
        assert data.main(["glue", "sst2", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert message in error and str(path) in error


# ----------------------------------------------------------------------------- text normalisation

GOOGLE = (
    "PLAIN\tBrillantaisia\t<self>\n"
    "PLAIN\tis\t<self>\n"
    "DATE\t2006 \u2013 2011\ttwo thousand six to twenty eleven\n"
    "PUNCT\t.\tsil\n"
    "<eos>\t<eos>\n"
    'PUNCT\t"\tsil\n'
    "MONEY\t$40\tforty dollars\n"
    "<eos>\t<eos>\n"
)


def test_sentences_of_googles_files_end_at_eos(tmp_path):
    (tmp_path / "output-00000-of-00100").write_text(GOOGLE)
    sentences, report = read_textnorm([tmp_path / "output-00000-of-00100"])
    assert sentences == [
        [
            SpokenToken("PLAIN", "Brillantaisia", "<self>"),
            SpokenToken("PLAIN", "is", "<self>"),
            SpokenToken("DATE", "2006 \u2013 2011", "two thousand six to twenty eleven"),
            SpokenToken("PUNCT", ".", "sil"),
        ],
        [SpokenToken("PUNCT", '"', "sil"), SpokenToken("MONEY", "$40", "forty dollars")],
    ]
    assert report.rows == 2 and not report.rejected


def test_of_a_folder_its_output_files_are_read_in_order(tmp_path):
    for number in (1, 0, 99):
        text = f"CARDINAL\t{number}\tnumber {number}\n<eos>\t<eos>\n"
        (tmp_path / f"output-{number:05d}-of-00100").write_text(text)
    (tmp_path / "README").write_text("not data\n")
    sentences, _ = read_textnorm([tmp_path])
    assert [sentence[0].written for sentence in sentences] == ["0", "1", "99"]


def test_faults_of_googles_files_are_counted_or_named(tmp_path):
    path = tmp_path / "output-00000-of-00001"
    path.write_text(GOOGLE + "PLAIN\ttwo cells\nPLAIN\ta\t<self>\n")
    sentences, report = read_textnorm([path])
    assert len(sentences) == 2
    assert report.counts() == {"not class, written, spoken": 1, "sentence without <eos>": 1}
    # A sentence with a gap is none.
    path.write_text("PLAIN\ta\t<self>\nDATE\t2012\t\n<eos>\t<eos>\n" + GOOGLE)
    sentences, report = read_textnorm([path])
    assert len(sentences) == 2 and report.counts() == {"not class, written, spoken": 1}
    with pytest.raises(FileNotFoundError, match="absent: no such file"):
        read_textnorm([tmp_path / "absent"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: 0 usable rows"):
        read_textnorm([tmp_path / "empty"])
    path.write_bytes(b"PLAIN\t\xff\t<self>\n<eos>\t<eos>\n")
    with pytest.raises(ValueError, match="output-00000-of-00001: not UTF-8"):
        read_textnorm([path])


def test_the_textnorm_command_counts_sentences_classes_and_faults(tmp_path, capsys):
    first, second = (tmp_path / f"output-0000{i}-of-00100" for i in range(2))
    first.write_text(GOOGLE)
    second.write_text(GOOGLE + "PLAIN\ttwo cells\n<eos>\t<eos>\n")
    expected = [
        f"{first}: 2 sentences of 6 tokens",
        f"{second}: 2 sentences of 6 tokens",
        f"rejected 1: not class, written, spoken (first: {second}:9)",
        "4 sentences of 12 tokens: PLAIN 4, PUNCT 4, DATE 2, MONEY 2",
    ]
    for files in ([tmp_path], [first, second]):
        assert data.main(["textnorm", *map(str, files)]) == 0
        assert capsys.readouterr().out.splitlines() == expected
    second.write_text("PLAIN\ttwo cells\n<eos>\t<eos>\n")
    (tmp_path / "empty").mkdir()
    for path, message in (
        (second, "0 usable rows"),
        (tmp_path / "no", "no such file"),
        (tmp_path / "empty", "no output-*-of-* in this folder"),
    ):
        assert data.main(["textnorm", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert message in error and str(path) in error


# ---------------------------------------------------------------------------------------- CoVoST 2

VALIDATED = [
    "client_id", "path", "sentence", "up_votes", "down_votes", "age", "gender", "accent",
]  # fmt: skip


@pytest.fixture
def common_voice(tmp_path) -> Path:
    """Five clips as Common Voice 4 has them; the table of translations names six."""
    root = tmp_path / "cv-corpus-4" / "en"
    (root / "clips").mkdir(parents=True)
    rows = []
    for i in range(5):
        if i != 3:  # its audio was not downloaded
            soundfile.write(root / "clips" / f"clip_{i}.wav", [0.1] * (8000 + i), 16_000)
        text = '"Quoted" he said' if i == 0 else f"Sentence {i}."
        rows.append([f"voice{i}", f"clip_{i}.wav", text, "2", "0", "", "", ""])
    write_tsv(root / "validated.tsv", VALIDATED, *rows)
    return root


def translations(root: Path, name: str = "covost_v2.en_de.tsv") -> Path:
    splits = ["train", "train_covost", "dev", "train", "test", "train"]
    texts = ['"Zitat", sagte er', r"Satz \"1\".", "Satz 2.", "Satz 3.", "  ", "Satz 5."]
    rows = [[f"clip_{i}.wav", texts[i], splits[i]] for i in range(6)]
    return write_tsv(root / name, ["path", "translation", "split"], *rows)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_translations_are_joined_with_the_clips_by_path(common_voice, tmp_path):
    out = tmp_path / "all.jsonl"
    report = covost_manifest(common_voice, out, translations(common_voice))
    first, second, _ = rows_of(out)
    assert first == {
        "audio_filepath": "cv-corpus-4/en/clips/clip_0.wav",
        "text": '"Quoted" he said',
        "translation": '"Zitat", sagte er',
        "target_lang": "de",
        "id": "clip_0.wav",
        "speaker": "voice0",
        "split": "train",
        "duration": 0.5,
    }
    assert (second["split"], second["translation"]) == ("train_covost", 'Satz "1".')
    assert report.rows == 3 and report.counts() == {
        "path is not in validated.tsv": 1,
        "empty sentence or translation": 1,
        "no such audio file": 1,
    }


@pytest.mark.parametrize(
    "splits, ids",
    [(["train"], "0"), (["train", "train_covost"], "01"), (["dev"], "2"), (None, "012")],
)
def test_splits_are_those_of_the_table(common_voice, tmp_path, splits, ids):
    out = tmp_path / "some.jsonl"
    covost_manifest(common_voice, out, translations(common_voice), splits)
    assert [row["id"] for row in rows_of(out)] == [f"clip_{i}.wav" for i in ids]


@pytest.mark.parametrize(
    "name, language",
    [("covost_v2.en_ca.tsv", "ca"), ("covost_v2.en_zh-CN.tsv", "zh-cn"), ("my.fr_en.tsv", "en")],
)
def test_the_language_is_in_the_tables_name(common_voice, tmp_path, name, language):
    out = tmp_path / "some.jsonl"
    covost_manifest(common_voice, out, translations(common_voice, name))
    assert {row["target_lang"] for row in rows_of(out)} == {language}


def test_faults_of_covost_are_one_line(common_voice, tmp_path, capsys):
    def error(tsv: Path, *more: str) -> str:
        capsys.readouterr()
        command = ["manifest", "covost", str(common_voice), str(tmp_path / "out.jsonl")]
        assert data.main([*command, "--translations", str(tsv), *more]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and printed.count("\n") == 1
        return printed

    table = translations(common_voice)
    nameless = table.rename(table.with_name("translations.tsv"))
    assert "no target language in its name; expected covost_v2.en_de.tsv" in error(nameless)
    table = nameless.rename(table)
    assert "0 usable rows" in error(table, "--splits", "nowhere")
    assert "absent.en_de.tsv: no such file" in error(tmp_path / "absent.en_de.tsv")
    write_tsv(table, ["path", "split"], ["clip_0.wav", "train"])
    assert "no column 'translation'" in error(table)
    (common_voice / "validated.tsv").unlink()
    assert "validated.tsv: no such file" in error(table)
    assert not (tmp_path / "out.jsonl").exists()


# ------------------------------------------------------------------------------------- text files


def zipped(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()))
    return path


def text_command(capsys, *command: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = data.main(["text", *map(str, command)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_text_of_any_kind_is_joined_with_one_blank_line_between_documents(tmp_path, capsys):
    plain = tmp_path / "a.txt"
    plain.write_text("\ufeff\n\n  one \ntwo\r\n\n\n \t\nthree\n\n", encoding="utf-8")
    lm = zipped(tmp_path / "librispeech-lm-norm.txt.gz", "FOUR\nFIVE")
    shard = [
        {
            "text": "Six.\n\n\nSeven\u2028Eight ",
            "timestamp": "2019-04-25T12:57:54Z",
            "url": "http://x",
        },
        {"text": " \n "},
        {"url": "no text"},
        {"text": None},
        {"text": "half \ud800"},
        ["text"],
        {"text": "Neun \u00fc\x0bzehn"},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in shard) + '\n{"text": "cut in the midd'
    mc4 = zipped(tmp_path / "c4-en.tfrecord-00000-of-00002.json.gz", lines)
    out = tmp_path / "out" / "text.txt"
    status, printed, _ = text_command(capsys, plain, lm, mc4, plain, "--out", out)
    assert status == 0
    documents = "one\ntwo\n\nthree\n", "FOUR\nFIVE\n", "Six.\nSeven\nEight\n", "Neun \u00fc\nzehn\n"
    assert out.read_text(encoding="utf-8") == "\n".join([*documents, documents[0]])
    assert f"{out}: 13 lines in 7 documents" in printed
    assert 'rejected 5: not a JSON object with text in "text"' in printed
    assert f"{mc4}:3" in printed


def test_json_lines_may_have_their_text_in_another_field_and_any_name(tmp_path, capsys):
    path, out = tmp_path / "wiki", tmp_path / "text.txt"
    path.write_text('{"body": "A"}\n{"text": "B"}\n{"body": "C\\nD"}\n')
    status, printed, _ = text_command(capsys, path, "--out", out, "--field", "body")
    assert status == 0 and out.read_text() == "A\n\nC\nD\n"
    assert 'rejected 1: not a JSON object with text in "body"' in printed


def test_text_faults_are_one_line_and_leave_no_file(tmp_path, capsys):
    whole = gzip.compress("some text\n".encode() * 1000)
    (tmp_path / "cut.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "broken.gz").write_bytes(whole[:20] + b"\xff" * 20 + whole[40:])
    (tmp_path / "latin.txt").write_bytes("caf\u00e9\n".encode("latin-1"))
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "no.jsonl").write_text("{}\n")
    for name, words in (
        ("cut.gz", "broken gzip, or cut short"), ("broken.gz", "broken gzip, or cut short"),
        ("latin.txt", "not UTF-8"), ("blank.txt", "0 usable rows"), ("absent.txt", "no such file"),
        ("no.jsonl", "0 usable rows"),
    ):  # fmt: skip
        status, _, error = text_command(capsys, tmp_path / name, "--out", tmp_path / "out.txt")
        assert status == 2 and words in error and error.count("\n") == 1, error
    assert not (tmp_path / "out.txt").exists() and not list(tmp_path.glob("*.tmp"))


def test_text_goes_through_line_by_line(tmp_path, capsys):
    """Memory stays that of a line, whatever the file's size: corpora have hundreds of gigabytes."""
    path = zipped(tmp_path / "long.txt.gz", "a line of some length that is there again\n" * 400_000)
    tracemalloc.start()
    status, printed, _ = text_command(capsys, path, "--out", tmp_path / "text.txt")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert status == 0 and "400000 lines in 1 documents" in printed and peak < 4e6


def test_a_tokenizer_reads_zipped_and_json_text_and_only_a_part_of_much(tmp_path, monkeypatch):
    words = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrs"]
    lines = [" ".join(words[i % 125] for i in range(n, n + 6)) for n in range(3000)]
    zipped(tmp_path / "a.txt.gz", "\n".join(lines))
    rows = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    (tmp_path / "b.jsonl").write_text(rows)
    (tmp_path / "c.txt").write_text("\n".join(lines))
    command = ["tokenizer", "--vocab-size", "150"]
    seen, train = [], corpora.Tokenizer.train

    def watched(lines, *more):
        kept = list(lines)
        seen.append(kept)
        return train(kept, *more)

    monkeypatch.setattr(corpora.Tokenizer, "train", watched)
    models = []
    for name in ("a.txt.gz", "b.jsonl", "c.txt"):
        model = tmp_path / f"{name}.model"
        assert data.main([*command, "--text", str(tmp_path / name), "--out", str(model)]) == 0
        models.append(model.read_bytes())
    assert models[0] == models[1] == models[2] and seen[0] == seen[1] == seen[2] == lines
    texts = ",".join(str(tmp_path / name) for name in ("a.txt.gz", "b.jsonl"))
    few = ["--text", texts, "--out", str(tmp_path / "few.model"), "--max-lines", "200"]
    assert data.main([*command, *few]) == 0
    assert seen[-1] == lines[::30] + lines[::30]


def test_tokens_are_made_of_zipped_text_too(tmp_path):
    lines = ["the cat sees a dog", "a ship finds the house"] * 50
    (tmp_path / "a.txt").write_text("\n".join(lines))
    zipped(tmp_path / "b.txt.gz", "\n".join(lines))
    tokenizer = corpora.Tokenizer.train(lines, 60)
    plain, packed = (
        corpora.TextCorpus.open([tmp_path / name], tokenizer) for name in ("a.txt", "b.txt.gz")
    )
    assert plain.fingerprint == packed.fingerprint
    zipped(tmp_path / "c.json.gz", '{"text": "a cat"}\n')
    with pytest.raises(ValueError, match="c.json.gz: JSON lines; make plain ones .*data.py text"):
        corpora.TextCorpus.open([tmp_path / "c.json.gz"], tokenizer)


# --------------------------------------------------------------------------------------- manifests


def test_places_of_all_rows_are_those_of_each(tmp_path):
    """With blank lines, in two files, and after rows were taken out."""
    row = '{"audio_filepath": "a.wav", "duration": 1}\n'
    (tmp_path / "a.jsonl").write_text("\n" + row + "\n\n" + row)
    (tmp_path / "b.jsonl").write_text(row + row.rstrip())
    manifest = corpora.Manifest.read([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    places = [
        f"{tmp_path}/{place}" for place in ("a.jsonl:2", "a.jsonl:5", "b.jsonl:1", "b.jsonl:2")
    ]
    assert manifest.places() == places == [manifest.where(i) for i in range(4)]
    some = manifest.filtered(manifest.file == 1)
    assert some.places() == places[2:]


def same(a: corpora.Manifest, b: corpora.Manifest) -> bool:
    """Whether two manifests hold the same rows."""
    columns = ("file", *corpora.COLUMNS)
    equal = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in columns)
    rows = [[m.row(i) for i in range(len(m))] for m in (a, b)]
    return equal and rows[0] == rows[1] and a.fingerprint == b.fingerprint


@pytest.fixture
def any_is_large(monkeypatch) -> list:
    """Every manifest is mapped and has an index. The names of those that are scanned."""
    scanned, scan = [], corpora._scan

    def noting(path, lines):
        scanned.append(path.name)
        return scan(path, lines)

    monkeypatch.setattr(corpora, "MAPPED_BYTES", 0)
    monkeypatch.setattr(corpora, "_scan", noting)
    return scanned


ROWS = (
    '\n{"audio_filepath": "a.wav", "duration": 1.25, "offset": 3, "text": "f\u00fcr"}\n'
    '  \n{"duration": 2, "audio_filepath": "/b.wav", "text": " "}\r\n'
    '{"audio_filepath": "c.wav", "duration": 3}'
)


def test_a_large_manifest_is_mapped_and_scanned_once(tmp_path, any_is_large, monkeypatch):
    """It is what it would be in memory, also in a process that was not forked."""
    (tmp_path / "a.jsonl").write_text(ROWS, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(ROWS.replace("wav", "flac"), encoding="utf-8")
    one, two = [tmp_path / "a.jsonl"], [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    first = corpora.Manifest.read(one)
    assert any_is_large == ["a.jsonl"] and (tmp_path / "a.jsonl.index").is_file()
    assert first.has_text.tolist() == [True, False, False]
    assert first.places() == [f"{tmp_path}/a.jsonl:{line}" for line in (2, 4, 5)]
    for paths in (one, two, two):
        mapped = corpora.Manifest.read(paths)
        assert same(pickle.loads(pickle.dumps(mapped)), mapped)
        with monkeypatch.context() as patch:
            patch.setattr(corpora, "MAPPED_BYTES", 1 << 26)
            small = corpora.Manifest.read(paths)
        assert same(small, mapped) and isinstance(small.files[0].buffer, bytes)
        assert same(pickle.loads(pickle.dumps(small)), small)
    assert any_is_large.count("a.jsonl") == 1 + 3  # of which three were small
    assert mapped.filtered(np.ones(6, bool)) is mapped
    assert len(pickle.dumps(mapped)) < 3000  # no bytes of the files


def test_an_index_goes_by_the_manifests_size_and_time(tmp_path, any_is_large):
    path, index = tmp_path / "m.jsonl", tmp_path / "m.jsonl.index"
    path.write_text(ROWS, encoding="utf-8")
    old = corpora.Manifest.read([path])
    os.utime(path, ns=(0, 0))  # another time
    corpora.Manifest.read([path])
    with path.open("a") as sink:  # another size, the same time
        sink.write('\n{"audio_filepath": "d.wav", "duration": 4}')
    os.utime(path, ns=(0, 0))
    new = corpora.Manifest.read([path])
    assert len(any_is_large) == 3 and len(new) == 4 and new.fingerprint != old.fingerprint
    whole = index.read_bytes()
    for damaged in (b"", b"{}", whole[:4000], whole[:-1], whole + b"0", b"\xff" + whole[1:]):
        index.unlink()  # `new` has the old one mapped
        index.write_bytes(damaged)
        del any_is_large[:]
        assert same(corpora.Manifest.read([path]), new) and any_is_large == ["m.jsonl"]
        assert index.read_bytes() == whole
    assert sorted(os.listdir(tmp_path)) == ["m.jsonl", "m.jsonl.index"]


def test_a_large_manifest_has_the_faults_of_a_small_one(tmp_path, any_is_large):
    path = tmp_path / "m.jsonl"
    path.write_text(ROWS, encoding="utf-8")
    for _ in range(2):  # without an index and with one
        with pytest.raises(ValueError, match=r'm.jsonl:5: no "text" \(keys are '):
            corpora.Manifest.read([path], text_required=True)
    bad = tmp_path / "bad.jsonl"
    for text, message in (("\n", "no rows"), (ROWS + "\n{", "bad.jsonl:6: not a JSON line")):
        bad.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            corpora.Manifest.read([bad])
    assert not (tmp_path / "bad.jsonl.index").exists()
    with pytest.raises(FileNotFoundError, match="no.jsonl: no such file"):
        corpora.Manifest.read([tmp_path / "no.jsonl"])
    manifest = corpora.Manifest.read([path])
    with path.open("r+b") as file:  # edited in place
        file.seek(10)
        file.write(b"#" * 60)
    with pytest.raises(ValueError, match="m.jsonl:2: was changed while it was in use"):
        manifest.row(0)
    assert manifest.row(2)["duration"] == 3


def test_an_index_that_cannot_be_written_is_done_without(tmp_path, any_is_large, monkeypatch):
    def refuse(path, write):
        raise PermissionError(path)

    monkeypatch.setattr(corpora, "write_atomically", refuse)
    (tmp_path / "m.jsonl").write_text(ROWS, encoding="utf-8")
    assert len(corpora.Manifest.read([tmp_path / "m.jsonl"])) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["m.jsonl"]
