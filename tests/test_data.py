"""Properties of data.py: what is in a row, a mask, a plan, a batch, whoever asks for it."""

import argparse
import copy
import json
import os
import pickle
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

import corpora
import data
import training
from conformer import CLS_ID, MASK_ID, N_MELS, N_SPECIAL, PAD_ID, SEP_ID, n_frames, subsampled_lens
from importers import librispeech_manifest
from losses import Loss

WORDS = "the a red old cat dog ship house sees likes finds and two three under near big".split()


def sentences(n: int, seed: int = 0, shortest: int = 2, longest: int = 14) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(shortest, longest + 1))) for _ in range(n)]


def write_wave(
    path: Path, seconds: float, rate: int = 16000, seed: int = 0, channels: int = 1, **kind
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (round(seconds * rate),) if channels == 1 else (round(seconds * rate), channels)
    wave = 0.1 * np.random.default_rng(seed).standard_normal(shape)
    soundfile.write(path, wave, rate, **kind)
    return path


def write_manifest(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tokenizer() -> data.Tokenizer:
    return data.Tokenizer.train(sentences(400), 200)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> data.Manifest:
    """60 utterances of 0.5 to 3 s with texts of about five words a second."""
    root = tmp_path_factory.mktemp("audio")
    rng, rows = np.random.default_rng(1), []
    for i, seconds in enumerate(rng.uniform(0.5, 3.0, 60).round(3)):
        write_wave(root / f"{i}.flac", seconds, seed=i)
        text = " ".join(rng.choice(WORDS, max(1, round(5 * seconds)))).upper()
        rows.append({"audio_filepath": f"{i}.flac", "duration": seconds, "text": text, "id": i})
    return data.Manifest.read([write_manifest(root / "train.jsonl", rows)])


@pytest.fixture(scope="module")
def text_rows(tmp_path_factory, tokenizer) -> data.TextRows:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(
        "\n".join(line + ("\n" if i % 7 == 6 else "") for i, line in enumerate(sentences(300, 2)))
    )
    return data.TextRows.pack(data.TextCorpus.open([path], tokenizer), 48, seed=5)


def make_pretrain_data(
    manifest, text_rows, tokenizer, micro_batches=2, seed=5
) -> data.PretrainData:
    speech = data.SpeechRows(manifest, 2.0, seed)
    pairs = data.PairRows(manifest, tokenizer, 3.0, seed)

    def plan(rows, units, stream):
        return data.BatchPlan(
            rows.lengths, units, micro_batches=micro_batches, seed=seed, stream=stream
        )

    return data.PretrainData(
        (speech, plan(speech, 2000, 0)),
        (text_rows, plan(text_rows, 400, 1)),
        (pairs, plan(pairs, 2000, 2)),
    )


def tensors_of(batch: data.Batch) -> dict[str, torch.Tensor]:
    found = {}

    def walk(name, value):
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, training.TensorBatch):
            for key, part in vars(value).items():
                walk(f"{name}.{key}", part)

    walk("batch", batch)
    return found


def assert_same(a: data.Batch, b: data.Batch) -> None:
    a, b = tensors_of(a), tensors_of(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---------------------------------------------------------------------------------------- manifests


def test_manifest_keeps_every_field_and_resolves_paths(tmp_path):
    rows = [
        {"audio_filepath": "sub/a.flac", "duration": 1.5, "text": "Hi", "speaker": "7"},
        {"audio_filepath": "/abs/b.flac", "duration": 2, "offset": 3.5},
    ]
    path = write_manifest(tmp_path / "m.jsonl", rows)
    path.write_text("\n" + path.read_text() + "  \n")  # blank lines are nothing
    m = data.Manifest.read([path])
    assert (
        len(m) == 2 and m.durations.tolist() == [1.5, 2.0] and m.has_text.tolist() == [True, False]
    )
    assert m.row(0) == {**rows[0], "audio_filepath": str(tmp_path / "sub/a.flac")}
    assert m.row(1) == rows[1] and m.text(0) == "Hi" and m.text(1) == ""
    assert m.where(1) == f"{path}:3"
    assert m.filtered(np.array([False, True])).row(0) == rows[1]


def test_several_manifests_are_concatenated_each_with_its_own_folder(tmp_path):
    for name in "xy":
        (tmp_path / name).mkdir()
        write_manifest(
            tmp_path / name / "m.jsonl", [{"audio_filepath": "a.wav", "duration": 1}] * 2
        )
    m = data.Manifest.read([tmp_path / "x/m.jsonl", tmp_path / "y/m.jsonl"])
    assert [m.row(i)["audio_filepath"] for i in range(4)] == [
        str(tmp_path / n / "a.wav") for n in "xxyy"
    ]
    assert m.where(3) == f"{tmp_path}/y/m.jsonl:2"


@pytest.mark.parametrize(
    "line, message",
    [
        ("{not json", "m.jsonl:2: not a JSON line"),
        ("[1, 2]", "m.jsonl:2: not a JSON object"),
        ('{"duration": 1}', 'm.jsonl:2: no "audio_filepath"'),
        ('{"audio_filepath": "a.wav"}', 'm.jsonl:2: no "duration"'),
        ('{"audio_filepath": "", "duration": 1}', "not a path"),
        ('{"audio_filepath": 3, "duration": 1}', "not a path"),
        ('{"audio_filepath": "a.wav", "duration": 0}', "duration is not a positive"),
        ('{"audio_filepath": "a.wav", "duration": -1}', "duration is not a positive"),
        ('{"audio_filepath": "a.wav", "duration": NaN}', "duration is not a positive"),
        ('{"audio_filepath": "a.wav", "duration": Infinity}', "duration is not a positive"),
        (
            '{"audio_filepath": "a.wav", "duration": 1' + 400 * "0" + "}",
            "duration is not a positive",
        ),
        ('{"audio_filepath": "a.wav", "duration": "1"}', "duration is not a positive"),
        ('{"audio_filepath": "a.wav", "duration": true}', "duration is not a positive"),
        ('{"audio_filepath": "a.wav", "duration": 1, "offset": -2}', "offset is not"),
        ('{"audio_filepath": "a.wav", "duration": 1, "text": null}', "text is not a string"),
        ('{"audio_filepath": "a.wav", "duration": 1, "text": "\\ud800"}', "surrogate"),
        ('{"audio_filepath": "a\\u0000.wav", "duration": 1}', "NUL"),
        ('{"audio_filepath": "http://x.org/a.wav", "duration": 1}', "URL"),
        ('{"audio_filepath": "s3://x/a.wav", "duration": 1}', "URL"),
        ('{"audio_filepath": "flac -dc a.flac |", "duration": 1}', "flac -dc a.flac > clip.wav"),
        ('{"audio_filepath": "| cat a.wav", "duration": 1}', "pipe"),
        ('{"audio_filepath": "../a.wav", "duration": 1}', "'..'"),
        ('{"audio_filepath": "/x/../a.wav", "duration": 1}', "'..'"),
        ("[" * 100_000, "m.jsonl:2: not a JSON line"),
        ("\xff\xfe", "m.jsonl:2: not a JSON line"),
    ],
)
def test_each_manifest_fault_names_file_and_line(tmp_path, line, message):
    good = '{"audio_filepath": "a.wav", "duration": 1}\n'
    (tmp_path / "m.jsonl").write_bytes((good + line + "\n" + good).encode("latin-1"))
    with pytest.raises(ValueError) as caught:
        data.Manifest.read([tmp_path / "m.jsonl"])
    assert message in str(caught.value) and "m.jsonl:2" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_missing_and_empty_manifests_and_missing_text_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no.jsonl: no such file"):
        data.Manifest.read([tmp_path / "no.jsonl"])
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="empty.jsonl: no rows"):
        data.Manifest.read([tmp_path / "empty.jsonl"])
    path = write_manifest(tmp_path / "m.jsonl", [{"audio_filepath": "a.wav", "duration": 1}])
    assert len(data.Manifest.read([path])) == 1
    with pytest.raises(ValueError, match='m.jsonl:1: no "text"'):
        data.Manifest.read([path], text_required=True)


def test_frames_of_all_rows_are_those_of_each_duration(tmp_path):
    samples = [1, 399, 400, 401, 559, 560, 561, 16000, 35 * 16000 - 1, 1600 * 10**6]
    rows = [{"audio_filepath": "a.wav", "duration": n / 16000} for n in samples]
    m = data.Manifest.read([write_manifest(tmp_path / "m.jsonl", rows)])
    assert data.row_frames(m).tolist() == [n_frames(n) for n in samples]
    assert data.row_frames(m).dtype == np.int64


# -------------------------------------------------------------------------------------------- audio


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "opus", "mp3"])
def test_every_format_reads_whole_and_from_an_offset(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    t = np.arange(32000) / 16000
    chirp = 0.5 * np.sin(2 * np.pi * (300 + 200 * t) * t)
    kind = {
        "ogg": {"format": "OGG", "subtype": "VORBIS"},
        "opus": {"format": "OGG", "subtype": "OPUS"},
    }
    try:
        soundfile.write(path, chirp, 16000, **kind.get(suffix, {}))
    except (ValueError, RuntimeError, TypeError):
        pytest.skip(f"this libsndfile cannot write {suffix}")
    whole = data.read_audio(path)
    assert whole.dtype == np.float32 and whole.ndim == 1 and abs(len(whole) - 32000) < 2000
    part = data.read_audio(path, 0.5, 0.25)
    assert len(part) == 4000
    assert np.corrcoef(part, whole[8000:12000])[0, 1] > 0.99
    if suffix in ("wav", "flac"):
        assert np.abs(whole - chirp).max() < 1e-4 and np.array_equal(part, whole[8000:12000])


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_other_rates_are_resampled(tmp_path, rate):
    t = np.arange(2 * rate) / rate
    soundfile.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * t), rate, subtype="FLOAT")
    wave = data.read_audio(tmp_path / "a.wav")
    assert abs(len(wave) - 32000) <= 1
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(wave)) / 16000)
    assert np.abs(wave - expected)[1000:-1000].max() < 1e-3
    assert abs(len(data.read_audio(tmp_path / "a.wav", 0.5, 1.0)) - 16000) <= 1


def test_stereo_is_mixed_down_by_the_mean(tmp_path):
    both = np.stack([np.full(8000, 0.5), np.full(8000, -0.25)], 1)
    soundfile.write(tmp_path / "a.wav", both, 16000, subtype="FLOAT")
    assert np.allclose(data.read_audio(tmp_path / "a.wav"), 0.125)


def test_unusable_audio_is_one_clear_line(tmp_path):
    with pytest.raises(corpora.AudioError, match="no.wav: no such audio file"):
        data.read_audio(tmp_path / "no.wav")
    (tmp_path / "bad.flac").write_bytes(b"not audio at all")
    with pytest.raises(ValueError, match="bad.flac: cannot decode audio"):
        data.read_audio(tmp_path / "bad.flac")
    write_wave(tmp_path / "short.wav", 1.0)
    with pytest.raises(ValueError, match="short.wav: no audio from 2 s on"):
        data.read_audio(tmp_path / "short.wav", 2.0, 1.0)
    soundfile.write(tmp_path / "nan.wav", np.full(1000, np.nan), 16000, subtype="FLOAT")
    with pytest.raises(ValueError, match="nan.wav: holds NaN"):
        data.read_audio(tmp_path / "nan.wav")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    with pytest.raises(ValueError, match="empty.wav: no audio"):
        data.read_audio(tmp_path / "empty.wav")


# ---------------------------------------------------------------------------------------- tokenizer


def test_special_ids_are_fixed_and_no_text_produces_them(tokenizer):
    pieces = [tokenizer._processor.id_to_piece(i) for i in range(N_SPECIAL)]
    assert pieces[2:] == ["[CLS]", "[SEP]", "[MASK]"]
    lines = ["[MASK] [CLS][SEP] is text", "<s> </s> <pad> [PAD] <unk>"] + sentences(100)
    for case in ("lower", "keep"):
        trained = data.Tokenizer.train(lines, 200, case)
        ids = sum((trained.encode(line) for line in [*lines, "[PAD][UNK][CLS][SEP][MASK]"]), [])
        assert not set(ids) & {PAD_ID, CLS_ID, SEP_ID, MASK_ID}
        assert max(ids) < trained.vocab_size


def test_round_trip_keeps_text_and_its_case_rule(tmp_path):
    lines = ["Die Katze sieht, dass es regnet.", "Ärger über Öl!"] * 20
    for case, expected in (("lower", lines[0].lower()), ("keep", lines[0])):
        trained = data.Tokenizer.train(lines, 80, case)
        trained.save(tmp_path / "t.model")
        loaded = data.Tokenizer.load(tmp_path / "t.model")
        assert loaded.text_case == case and loaded.fingerprint == trained.fingerprint
        assert loaded.decode(loaded.encode(lines[0])) == expected
        assert (
            loaded.decode([CLS_ID, *loaded.encode(lines[0]), SEP_ID, MASK_ID]).strip() == expected
        )
        assert pickle.loads(pickle.dumps(loaded)).encode(lines) == trained.encode(lines)


def test_training_a_tokenizer_is_deterministic_and_case_is_in_the_fingerprint():
    lines = sentences(200)
    first, again, kept = (
        data.Tokenizer.train(lines, 100, case) for case in ("lower", "lower", "keep")
    )
    assert first.model_bytes == again.model_bytes and first.fingerprint != kept.fingerprint


def test_tokenizer_faults_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="--vocab-size 100"):
        data.Tokenizer.train([], 100)
    with pytest.raises(ValueError, match="--vocab-size 7"):
        data.Tokenizer.train(sentences(100), 7)
    with pytest.raises(FileNotFoundError, match="t.model: no such file"):
        data.Tokenizer.load(tmp_path / "t.model")
    (tmp_path / "t.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        data.Tokenizer.load(tmp_path / "t.model")


# ------------------------------------------------------------------------------------------ packing


def slow_packing(documents: list[list[list[int]]], row_tokens: int) -> list[list[int]]:
    """The rule, line by line: cut what is too long, fill rows within a document."""
    rows = []
    for document in documents:
        row = [CLS_ID]
        for line in document:
            pieces = [line[i : i + row_tokens - 2] for i in range(0, len(line), row_tokens - 2)]
            for piece in pieces:
                if len(row) > 1 and len(row) + len(piece) + 1 > row_tokens:
                    rows.append(row)
                    row = [CLS_ID]
                row = row + piece + [SEP_ID]
        rows.append(row)
    return rows


@pytest.mark.parametrize("row_tokens", [3, 4, 7, 16, 64, 1000])
def test_packing_equals_the_slow_rule_and_keeps_documents_apart(tmp_path, tokenizer, row_tokens):
    rng = np.random.default_rng(3)
    documents = [
        sentences(int(n), seed=i, longest=30) for i, n in enumerate(rng.integers(1, 9, 40))
    ]
    gaps = ["\n" * int(n) for n in rng.integers(1, 4, 40)]  # several blank lines are one boundary
    path = tmp_path / "a.txt"
    path.write_text(
        "\n" + "".join("\n".join(lines) + "\n" + gap for lines, gap in zip(documents, gaps))
    )
    rows = data.TextRows.pack(data.TextCorpus.open([path], tokenizer), row_tokens)
    expected = slow_packing([tokenizer.encode(lines) for lines in documents], row_tokens)
    assert [rows.tokens(i).tolist() for i in range(len(rows))] == expected
    assert (
        rows.lengths.tolist() == [len(row) for row in expected] and rows.lengths.max() <= row_tokens
    )


def test_text_files_are_concatenated_and_counted(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("the cat\nthe dog")
    (tmp_path / "b.txt").write_text("a ship")
    corpus = data.TextCorpus.open([tmp_path / "a.txt", tmp_path / "b.txt"], tokenizer)
    rows = data.TextRows.pack(corpus, 100)
    assert len(rows) == 2  # files are documents of their own
    stream = np.concatenate([rows.tokens(i)[1:] for i in range(2)])
    assert corpus.counts.tolist() == np.bincount(stream, minlength=tokenizer.vocab_size).tolist()


def test_the_token_cache_is_reused_and_follows_source_and_tokenizer(
    tmp_path, tokenizer, monkeypatch
):
    source, calls = tmp_path / "a.txt", []
    source.write_text("\n".join(sentences(20)))
    tokenise = corpora._tokenise
    monkeypatch.setattr(corpora, "_tokenise", lambda *a: (calls.append(a), tokenise(*a)))
    first = data.TextRows.pack(data.TextCorpus.open([source], tokenizer), 32)
    assert isinstance(first._map(0), np.memmap) and first._map(0).dtype == np.uint16
    again = data.TextRows.pack(data.TextCorpus.open([source], tokenizer), 32)
    assert len(calls) == 1 and np.array_equal(first.tokens(0), again.tokens(0))
    data.TextCorpus.open([source], data.Tokenizer.train(sentences(400), 60))
    assert len(calls) == 2
    source.write_text("\n".join(sentences(20, seed=9)))
    changed = data.TextRows.pack(data.TextCorpus.open([source], tokenizer), 32)
    assert len(calls) == 3 and not np.array_equal(first.tokens(0), changed.tokens(0))
    source.write_text(source.read_text()[::-1])  # as long as before
    os.utime(source, (1, 1))
    assert not np.array_equal(
        data.TextRows.pack(data.TextCorpus.open([source], tokenizer), 32).tokens(0),
        changed.tokens(0),
    )
    data.TextCorpus.open([source], tokenizer, tmp_path / "cache")
    assert len(calls) == 5 and len(list((tmp_path / "cache").iterdir())) == 2
    assert not list(tmp_path.rglob("*.tmp*"))


def test_an_interrupted_cache_is_made_again(tmp_path, tokenizer, monkeypatch):
    source = tmp_path / "a.txt"
    source.write_text("\n".join(sentences(20)))
    with monkeypatch.context() as broken:
        broken.setattr(
            training.os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt())
        )
        with pytest.raises(KeyboardInterrupt):
            data.TextCorpus.open([source], tokenizer)
    assert list(tmp_path.iterdir()) == [source]
    assert len(data.TextRows.pack(data.TextCorpus.open([source], tokenizer), 32))


def test_text_faults_are_one_line(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match="a.txt: no such file"):
        data.TextCorpus.open([tmp_path / "a.txt"], tokenizer)
    (tmp_path / "a.txt").write_text("\n  \n")
    with pytest.raises(ValueError, match="a.txt: no text"):
        data.TextCorpus.open([tmp_path / "a.txt"], tokenizer)
    (tmp_path / "a.txt").write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(ValueError, match="a.txt: not UTF-8"):
        data.TextCorpus.open([tmp_path / "a.txt"], tokenizer)
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write the token cache"):
        data.TextCorpus.open([tmp_path / "a.txt"], tokenizer, tmp_path / "file")
    with pytest.raises(ValueError, match="--row-tokens 2"):
        data.TextRows.pack(data.TextCorpus.open([tmp_path / "a.txt"], tokenizer), 2)


# -------------------------------------------------------------------------------------------- masks


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return list(zip(edges[::2], edges[1::2]))


@pytest.mark.parametrize("share", [0.15, 0.49, 0.5, 0.75, 1.0])
def test_budget_is_met_exactly_and_something_stays_visible(share):
    """Also of rows so short that a naive count masks all of them, or none."""
    for length in range(65):
        budget = data.mask_budget(length, share)
        assert budget == 0 if length < 2 else 1 <= budget <= length - 1
        if length >= 10:
            assert abs(budget - share * length) <= 1
        for span in (1, 5, 10):
            for seed in range(4):
                mask = data.span_mask(np.random.default_rng(seed), length, share, span)
                assert mask.shape == (length,) and mask.sum() == budget


def test_the_mask_count_is_a_function_of_the_length():
    assert (
        len({int(data.span_mask(np.random.default_rng(i), 321, 0.49, 10).sum()) for i in range(50)})
        == 1
    )


def test_coverage_is_half_not_six_percent():
    """0.065 is the probability of a start, 0.49 what is covered."""
    share = np.mean(
        [
            data.span_mask(np.random.default_rng(i), 400, data.SPEECH_MASK, 10).mean()
            for i in range(1000)
        ]
    )
    assert 0.47 <= share <= 0.50


def test_realised_shares_are_the_asked_ones():
    """Over rows of mixed lengths: overlapping spans must not eat into the share."""
    for share, tolerance in (
        (data.TEXT_MASK, 0.01),
        (data.TLM_TEXT_MASK, 0.02),
        (data.TLM_SPEECH_MASK, 0.02),
    ):
        masks = [data.span_mask(np.random.default_rng(n), n, share, 5) for n in range(8, 512)]
        assert abs(np.concatenate(masks).mean() - share) <= tolerance


@pytest.mark.parametrize("length", [300, 1500])
@pytest.mark.parametrize("share", [0.49, 0.75])
def test_spans_are_whole_except_one_and_at_the_ends(length, share):
    """Thinning masks to one count for all rows would leave crumbs in the longer ones."""
    for seed in range(200):
        mask = data.span_mask(np.random.default_rng(seed), length, share, 10)
        inner = [stop - start for start, stop in runs(mask) if start > 0 and stop < length]
        assert sum(size < 10 for size in inner) <= 1
        assert abs(mask.mean() - share) < 0.005


def test_every_position_is_equally_likely_to_be_masked():
    n, length = 20_000, 40
    hits = sum(
        data.span_mask(np.random.default_rng(i), length, 0.49, 10).astype(int) for i in range(n)
    )
    p = data.mask_budget(length, 0.49) / length
    assert np.abs(hits / n - p).max() < 4.5 * np.sqrt(p * (1 - p) / n)


def test_masks_follow_the_seed_alone():
    def draw(*key):
        return data.span_mask(data.row_rng(*key), 200, 0.49, 10)

    np.random.seed(0)
    first = draw(1, 2, 3, data.SPEECH_MASKING)
    np.random.seed(1)
    assert np.array_equal(first, draw(1, 2, 3, data.SPEECH_MASKING))
    for other in ((0, 2, 3, 2), (1, 3, 3, 2), (1, 2, 4, 2), (1, 2, 3, data.PAIR_SPEECH_MASKING)):
        assert not np.array_equal(first, draw(*other))


def test_purposes_have_seeds_of_their_own():
    """numpy pads seeds with zeros, so a purpose 0 would share its numbers with a shorter seed."""
    names = "SPEECH_CROP SPEECH_MASKING TEXT_MASKING PAIR_SPEECH_MASKING PAIR_TEXT_MASKING".split()
    names += "STM_NEGATIVE STM_TEXT_MASKING PLAN_ORDER JOINT_ORDER STATISTICS SPEC_AUGMENT".split()
    values = [getattr(data, name) for name in names]
    assert len(set(values)) == len(values) and min(values) > 0


def test_eighty_ten_ten_in_whole_spans():
    """Shares over 1e5 masked tokens; special ids are neither chosen nor produced."""
    vocab, kinds, n_masked = 5000, Counter(), 0
    for i in range(350):
        rng = np.random.default_rng(i)
        tokens = rng.integers(N_SPECIAL, vocab, 600)
        tokens[rng.integers(600, size=30)] = SEP_ID
        tokens[0], tokens[17] = CLS_ID, data.UNK_ID
        before = tokens.copy()
        corrupted, masked = data.mask_text(rng, tokens, 0.5, 5, vocab)
        assert np.array_equal(tokens, before)
        assert masked.sum() == data.mask_budget(int((tokens >= N_SPECIAL).sum()), 0.5)
        assert not masked[tokens < N_SPECIAL].any() and np.array_equal(
            corrupted[~masked], tokens[~masked]
        )
        new, old = corrupted[masked], tokens[masked]
        assert set(np.unique(new[new < N_SPECIAL])) <= {MASK_ID} and new.max() < vocab
        kinds.update(
            np.where(new == MASK_ID, "mask", np.where(new == old, "keep", "random")).tolist()
        )
        n_masked += len(new)
    assert n_masked > 1e5 * 0.95
    for kind, share in (("mask", 0.8), ("random", 0.1), ("keep", 0.1)):
        assert abs(kinds[kind] / n_masked - share) < 0.01


def test_a_span_has_one_fate():
    fates, tokens = Counter(), np.arange(N_SPECIAL, 405)
    for seed in range(100):
        corrupted, masked = data.mask_text(np.random.default_rng(seed), tokens, 0.15, 5, 100_000)
        for start, stop in runs(masked):
            if stop - start == 5 and start > 0 and stop < 400:  # one whole span
                new = corrupted[start:stop]
                kinds = np.where(
                    new == MASK_ID, "mask", np.where(new == tokens[start:stop], "keep", "random")
                )
                assert len(set(kinds)) == 1
                fates[str(kinds[0])] += 1
    assert min(fates[kind] for kind in ("mask", "keep", "random")) > 30


@pytest.mark.parametrize("n_words", range(0, 13))
def test_short_texts_can_be_masked(n_words):
    tokens = np.array([CLS_ID, *range(10, 10 + n_words), SEP_ID])
    corrupted, masked = data.mask_text(np.random.default_rng(n_words), tokens, 0.15, 5, 50)
    assert (
        masked.sum() == data.mask_budget(n_words, 0.15)
        and corrupted[0] == CLS_ID
        and corrupted[-1] == SEP_ID
    )


# -------------------------------------------------------------------------------------- SpecAugment


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_spec_augment_keeps_to_its_bounds_and_uses_them(strength):
    """Two bands of up to 27 bins; ten stretches of up to 5% of the row; both overlap at times."""
    n, widest = 400, round(27 * strength)
    most_bands, most_stretches = 2 * widest, round(10 * strength) * 20
    bands, stretches, bins, frames = [], [], np.zeros(N_MELS), np.zeros(n)
    for seed in range(2000):
        hidden_frames, hidden_bins = data.spec_augment(np.random.default_rng(seed), n, strength)
        assert hidden_frames.shape == (n,) and hidden_bins.shape == (N_MELS,)
        assert hidden_frames.dtype == hidden_bins.dtype == bool
        bands.append([stop - start for start, stop in runs(hidden_bins)])
        stretches.append([stop - start for start, stop in runs(hidden_frames)])
        bins, frames = bins + hidden_bins, frames + hidden_frames
    assert max(map(len, bands)) == 2 and max(map(len, stretches)) == round(10 * strength)
    assert most_bands - 3 <= max(map(sum, bands)) <= most_bands
    assert 0.6 * most_stretches < max(map(sum, stretches)) <= most_stretches
    single = [its[0] for its in bands if len(its) == 1]
    assert widest in single and min(single) == 1
    assert bins.min() > 0 and frames.min() > 0  # also the first and the last


def test_spec_augment_of_strength_0_or_of_a_row_too_short_hides_no_frame():
    for seed in range(50):
        frames, bins = data.spec_augment(np.random.default_rng(seed), 300, 0.0)
        assert not frames.any() and not bins.any()
        for n in (0, 1, 19):
            assert not data.spec_augment(np.random.default_rng(seed), n, 1.0)[0].any()


# -------------------------------------------------------------------------------------------- plans


LENGTHS = np.random.default_rng(0).integers(50, 1600, 1000)


def make_plan(
    lengths=LENGTHS, units=16_000, micro_batches=4, seed=3, stream=1, **more
) -> data.BatchPlan:
    return data.BatchPlan(
        lengths, units, micro_batches=micro_batches, seed=seed, stream=stream, **more
    )


def batches(plan, steps):
    return [plan.micro_batch(s, k) for s in steps for k in range(plan.micro_batches)]


def test_a_batch_asked_for_alone_equals_the_one_reached_in_sequence():
    in_sequence = batches(make_plan(), range(300))
    for s, k in ((299, 3), (0, 0), (17, 2), (250, 1), (298, 0)):  # out of order, on fresh plans
        rows, epochs, bucket_len = make_plan().micro_batch(s, k)
        expected = in_sequence[4 * s + k]
        assert (
            np.array_equal(rows, expected[0])
            and np.array_equal(epochs, expected[1])
            and bucket_len == expected[2]
        )
    assert (
        make_plan().micro_batch(10**9, 3)[1].min() > 10**6
    )  # a far step costs nothing: there is no replay


def test_every_row_is_visited_once_an_epoch():
    plan, seen = make_plan(), Counter()
    for rows, epochs, _ in batches(plan, range(1600)):
        seen.update(zip(rows.tolist(), epochs.tolist()))
    assert set(seen.values()) == {1}
    full = min(
        max(e for r, e in seen if r in set(b.tolist())) for b in plan.rows
    )  # epochs every bucket has left
    assert full >= 10
    assert all((row, epoch) in seen for row in range(len(LENGTHS)) for epoch in range(full))


def test_long_and_short_rows_are_visited_equally_often():
    visits = np.zeros(len(LENGTHS))
    for rows, _, _ in batches(make_plan(), range(8 * 400)):
        np.add.at(visits, rows, 1)
    assert visits.max() / visits.min() < 1.15


def test_epochs_have_different_orders_and_streams_differ():
    plan = make_plan(n_buckets=1)
    first, second = plan._permutation(0, 0), plan._permutation(0, 1)
    assert not np.array_equal(first, second) and np.array_equal(np.sort(first), np.sort(second))
    for other in (make_plan(n_buckets=1, stream=2), make_plan(n_buckets=1, seed=4)):
        assert not np.array_equal(other._permutation(0, 0), first)


def test_the_plan_knows_no_world_size():
    """Ranks of a world of W run k = r, r + W, ...: together they run what one process runs."""
    alone = batches(make_plan(), range(20))
    for world in (1, 2, 4):
        plans = [make_plan() for _ in range(world)]
        for s in range(20):
            for k in range(4):
                assert np.array_equal(plans[k % world].micro_batch(s, k)[0], alone[4 * s + k][0])


def test_a_turn_has_all_joint_buckets_by_their_shares_in_changing_order():
    turns = [[data.joint_bucket(5, s) for s in range(32 * t, 32 * t + 32)] for t in range(20)]
    counts = [[turn.count(j) for j in range(8)] for turn in turns]
    assert counts == 20 * [data.JOINT_SHARES.tolist()] and min(counts[0]) > 0
    assert len({tuple(turn) for turn in turns}) == 20


def test_uneven_shares_pad_less_than_even_ones(monkeypatch):
    """Where most rows are of about one length, with a tail to short ones and few long ones."""
    rng = np.random.default_rng(0)
    most, short = rng.normal(1440, 120, 5000), rng.integers(150, 1300, 5000)
    lengths = np.where(rng.random(5000) < 0.7, most, short).astype(int)
    lengths = np.append(lengths, rng.integers(1900, 3000, 10))
    ours = make_plan(lengths, units=128_000)
    visits = [
        data.JOINT_SHARES[ours.slot_bucket == b].sum() * n / len(rows)
        for b, (n, rows) in enumerate(zip(ours.rows_per_micro, ours.rows))
    ]
    assert max(visits) / min(visits) < 1.2
    monkeypatch.setattr(data, "JOINT_SHARES", np.full(8, 4))
    assert ours.padding_waste() < 0.75 * make_plan(lengths, units=128_000).padding_waste()


def test_at_most_eight_joint_shapes_and_each_bucket_has_one():
    plans = [make_plan(stream=i, units=u) for i, u in enumerate((16_000, 9_000, 5_000))]
    shapes = {
        tuple((len(p.micro_batch(s, k)[0]), p.micro_batch(s, k)[2]) for p in plans)
        for s in range(64)
        for k in (0, 3)
    }
    assert len(shapes) == 8


def test_rows_fit_their_bucket_and_batches_their_budget():
    plan = make_plan()
    for rows, _, bucket_len in batches(plan, range(80)):
        assert LENGTHS[rows].max() <= bucket_len and len(rows) * bucket_len <= 16_000 // 4
    assert 0 < plan.padding_waste() < 0.15
    assert sum(bucket["rows"] for bucket in plan.describe()) == len(LENGTHS)
    assert sum(bucket["steps"] for bucket in plan.describe()) == 1
    values = np.arange(len(LENGTHS))
    assert max(plan.bucket_max(values).values()) == len(LENGTHS) - 1


def test_the_plan_says_what_a_step_really_holds():
    plan = make_plan()
    held = [LENGTHS[rows].sum() for rows, *_ in batches(plan, range(8 * 60))]
    assert 4 * np.mean(held) == pytest.approx(plan.mean_units(), rel=0.01)  # 4 micro-batches a step
    assert 0.7 * 16_000 < plan.mean_units() < 16_000


def transducer_rows(n: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and widths as of speech and transcript: longer speech has more text, mostly."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(50, 1600, n)
    return lengths, 1 + (lengths * rng.uniform(0.02, 0.08, n)).astype(np.int64)


@pytest.mark.parametrize("max_area", [100_000, 600_000, 10**9])
def test_no_micro_batch_exceeds_the_area_but_single_rows(max_area):
    """Area: rows x longest length x widest width, which is what a transducer's lattice takes."""
    lengths, widths = transducer_rows()
    plan = make_plan(lengths, units=64_000, widths=widths, max_area=max_area)
    widest, single, areas = plan.bucket_max(widths), 0, []
    for rows, _, bucket_len in batches(plan, range(80)):
        area = len(rows) * bucket_len * widest[bucket_len]
        assert widths[rows].max() <= widest[bucket_len] and len(rows) * bucket_len <= 64_000 // 4
        assert area <= max_area or len(rows) == 1
        single += area > max_area
        areas.append(area)
    assert single == 0 if max_area > 250_000 else single > 0
    if max_area == 600_000:
        assert np.mean(areas) > 0.5 * max_area, "the room is not used"
    if max_area == 10**9:  # it bounds nothing: the plan is as without
        pairs = zip(batches(plan, [3]), batches(make_plan(lengths, units=64_000), [3]))
        assert all(np.array_equal(one[0], other[0]) for one, other in pairs)


def test_long_and_short_rows_are_visited_equally_often_though_the_area_is_bounded():
    lengths, widths = transducer_rows()
    plan, visits = make_plan(lengths, units=64_000, widths=widths, max_area=600_000), np.zeros(1000)
    for rows, _, _ in batches(plan, range(8 * 200)):
        np.add.at(visits, rows, 1)
    assert visits.max() / visits.min() < 1.3


@pytest.mark.parametrize(
    "lengths",
    [
        [7],
        [5, 5],
        [3, 9],
        [4] * 100,
        list(range(1, 8)),
        [10] * 50 + [500],
        [1, 100_000],
        list(range(1, 30)),
    ],
)
def test_odd_sets_of_lengths_have_a_plan(lengths):
    plan = make_plan(np.array(lengths), units=100, micro_batches=2)
    seen = Counter()
    for rows, epochs, bucket_len in batches(plan, range(400)):
        assert len(rows) and max(lengths[r] for r in rows) <= bucket_len
        seen.update(zip(rows.tolist(), epochs.tolist()))
    assert set(seen.values()) == {1} and {row for row, _ in seen} == set(range(len(lengths)))
    assert (
        len({tuple(plan.micro_batch(s, 0)[2:]) for s in range(data.TURN)})
        == len(plan.rows)
        == len(set(plan.bucket_len))
    )


# ------------------------------------------------------------------------------------------ batches


@pytest.fixture(scope="module")
def stream(manifest, text_rows, tokenizer) -> data.PretrainData:
    return make_pretrain_data(manifest, text_rows, tokenizer)


def test_shapes_are_static_in_each_joint_bucket(stream):
    shapes = {}
    for s in range(24):
        for k in range(2):
            found = tuple(
                (name, tuple(value.shape)) for name, value in tensors_of(stream[s, k]).items()
            )
            shapes.setdefault(data.joint_bucket(5, s), set()).add(found)
    assert len(shapes) == 8 and all(len(kinds) == 1 for kinds in shapes.values())


def test_masks_lie_on_valid_frames_and_flat_indices_say_the_same(stream):
    """Nothing on padding; something visible in every row."""
    for s in range(16):
        batch = stream[s, s % 2]
        for speech, share in (
            (batch.speech, data.SPEECH_MASK),
            (batch.pairs.speech, data.TLM_SPEECH_MASK),
        ):
            lens = subsampled_lens(speech.feature_lens)
            valid = torch.arange(speech.masked.shape[1]) < lens[:, None]
            assert not (speech.masked & ~valid).any() and (valid & ~speech.masked).any(1).all()
            assert speech.masked.sum(1).tolist() == [data.mask_budget(int(n), share) for n in lens]
            (B, T), real = speech.masked.shape, speech.masked_weight > 0
            assert torch.equal(speech.masked_index[real], speech.masked.flatten().nonzero()[:, 0])
            assert (speech.masked_index[~real] % T == 0).all()
            assert torch.equal(speech.masked_weight, real.float())
            row = torch.arange(B).repeat_interleave(data.mask_budget(T, share))
            assert torch.equal(speech.masked_index // T, row), "not equally many places a row"
            padding = torch.arange(speech.features.shape[1]) >= speech.feature_lens[:, None]
            assert not speech.features[padding].any() and speech.features[~padding].any()


def test_text_targets_are_the_original_tokens(stream):
    rows, plan = stream.text
    for s in range(8):
        chosen, epochs, width = plan.micro_batch(s, 0)
        batch = rows.collate(chosen, epochs, width)
        clean = torch.full(batch.tokens.shape, PAD_ID)
        for i, row in enumerate(chosen):
            clean[i, : batch.lens[i]] = torch.from_numpy(rows.tokens(row))
        real = batch.masked_weight > 0
        assert torch.equal(batch.targets[real], clean.flatten()[batch.masked_index[real]])
        assert (batch.targets[real] >= N_SPECIAL).all()
        assert (batch.targets[~real] == PAD_ID).all()
        untouched = torch.ones(batch.tokens.numel(), dtype=torch.bool)
        untouched[batch.masked_index[real]] = False
        assert torch.equal(batch.tokens.flatten()[untouched], clean.flatten()[untouched])


def test_counts_are_what_the_losses_divide_by(stream):
    batch = stream[3, 1]
    counts = batch.counts()
    assert counts["code_mlm"] == counts["diversity"] == float(batch.speech.masked.sum())
    assert counts["span_lm"] == float((batch.text.targets != PAD_ID).sum())
    assert counts["tlm_speech"] == float(batch.pairs.speech.masked.sum())
    assert counts["tlm_text"] == float((batch.pairs.text.targets != PAD_ID).sum())
    assert counts["stm"] == 2 * len(batch.pairs.negative_lens)
    one = data._speech_batch(
        [torch.ones(8, N_MELS), torch.ones(40, N_MELS)], [np.random.default_rng(0)] * 2, 0.49, 40
    )
    assert one.masked.sum(1).tolist() == [1, 5]
    assert data.Batch(speech=one).counts() == {
        "contrastive": 5.0,
        "code_mlm": 6.0,
        "diversity": 6.0,
    }


def test_a_pair_is_its_own_text_and_a_foreign_one(stream, tokenizer):
    rows, plan = stream.pairs
    for s in range(8):
        chosen, epochs, bucket_len = plan.micro_batch(s, 1)
        pairs = stream[s, 1].pairs
        for i, row in enumerate(chosen):
            own, other = pairs.clean_tokens[i, : pairs.text.lens[i]], pairs.clean_negative_tokens[i]
            assert own[0] == CLS_ID and own[1:].tolist() == tokenizer.encode(
                rows.manifest.text(row)
            )
            other = other[: pairs.negative_lens[i]]
            assert other[0] == CLS_ID and not torch.equal(own, other)
            n_tokens = int(pairs.negative_lens[i]) - 1
            n_corrupted = int((pairs.negative_tokens[i, : n_tokens + 1] != other).sum())
            assert n_corrupted <= data.mask_budget(n_tokens, data.TLM_TEXT_MASK)
        assert (pairs.negative_tokens != pairs.clean_negative_tokens).any()


def test_the_number_of_workers_changes_nothing(stream):
    steps = [(s, k) for s in range(6) for k in range(2)]
    direct = [stream[item] for item in steps]
    for workers in (0, 2):
        loaded = list(DataLoader(stream, batch_size=None, sampler=steps, num_workers=workers))
        for one, other in zip(direct, loaded, strict=True):
            assert_same(one, other)


def test_a_pickled_copy_gives_the_same_batches(stream):
    """Workers started afresh get the data pickled: token files are mapped anew, not copied."""
    stream[0, 0]
    content = pickle.dumps(stream)
    assert len(content) < 200_000 and b"memmap" not in content
    assert_same(pickle.loads(content)[5, 1], stream[5, 1])


def test_a_row_does_not_depend_on_its_batch(stream):
    rows, plan = stream.speech
    chosen, epochs, bucket_len = plan.micro_batch(4, 0)
    together = rows.collate(chosen, epochs, bucket_len)
    for i in range(len(chosen)):
        alone = rows.collate(chosen[i : i + 1], epochs[i : i + 1], bucket_len)
        assert torch.equal(alone.features[0], together.features[i])
        assert torch.equal(alone.masked[0], together.masked[i])
    rows, plan = stream.pairs
    chosen, epochs, bucket_len = plan.micro_batch(4, 0)
    together = tensors_of(rows.collate(chosen, epochs, bucket_len, 40))
    for i in range(len(chosen)):
        alone = tensors_of(rows.collate(chosen[i : i + 1], epochs[i : i + 1], bucket_len, 40))
        for name in alone:
            if "masked_" not in name and "targets" not in name:  # these are flat
                assert torch.equal(alone[name][0], together[name][i]), name


def test_batches_move_to_another_device_whole(stream):
    moved = stream[0, 0].to("meta")
    assert {value.device.type for value in tensors_of(moved).values()} == {"meta"}


def waveforms_of(stream: data.PretrainData) -> data.PretrainData:
    """The same stream with its log-mel left to the device."""
    streams = {name: getattr(stream, name) for name in ("speech", "text", "pairs")}
    streams = {name: its and (copy.copy(its[0]), its[1]) for name, its in streams.items()}
    for name in ("speech", "pairs"):
        streams[name][0].on_device = True
    return data.PretrainData(**streams)


def assert_same_but_for_rounding(a: data.Batch, b: data.Batch) -> None:
    """Log-mel to 1e-4 and zero at the same places; all else equal."""
    assert a.faults == b.faults
    a, b = tensors_of(a), tensors_of(b)
    assert a.keys() == b.keys()
    for name in a:
        if name.endswith(".features"):
            assert a[name].shape == b[name].shape and a[name].dtype == b[name].dtype
            assert torch.allclose(a[name], b[name], rtol=0, atol=1e-4)
            assert torch.equal((a[name] == 0).all(-1), (b[name] == 0).all(-1))
        else:
            assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("num_workers", [0, 2])
def test_log_mel_made_on_the_device_is_that_of_the_loader(stream, num_workers):
    """Lengths, masks and padding are the same, and counts are known before the batch is moved."""
    waveforms, steps = waveforms_of(stream), [(s, k) for s in range(6) for k in range(2)]
    how = {"batch_size": None, "sampler": steps, "num_workers": num_workers}
    for step, loaded in zip(steps, DataLoader(waveforms, **how), strict=True):
        expected = stream[step]
        assert isinstance(loaded.speech.features, data.Waveforms)
        assert isinstance(loaded.pairs.speech.features, data.Waveforms)
        assert loaded.counts() == expected.counts()
        assert torch.equal(loaded.speech.feature_lens, expected.speech.feature_lens)
        with torch.autocast("cpu", torch.bfloat16):  # as the training loop moves its batches
            moved = loaded.to("cpu", non_blocking=True)
        assert_same_but_for_rounding(moved, expected)
        assert not moved.speech.features.requires_grad


def test_waveforms_can_be_pinned_with_the_rest(stream, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    batch = waveforms_of(stream)[0, 0]
    copied = batch.pin_memory()
    assert isinstance(copied.speech.features, data.Waveforms)
    assert len(pinned) == len(tensors_of(batch)) > 2
    assert_same(copied, batch)


def test_a_row_that_is_longer_than_its_duration_is_cut_in_frames_on_the_device_too(tmp_path):
    write_wave(tmp_path / "a.wav", 1.0)
    cut = {"audio_filepath": "a.wav", "duration": 0.12996}  # to the sample it has a frame more
    path = write_manifest(tmp_path / "m.jsonl", [cut, cut | {"duration": 0.5}])
    rows = data.SpeechRows(data.Manifest.read([path]), 5.0, 0)
    numbers, longest = np.arange(2), int(rows.lengths.max())
    expected = rows.collate(numbers, 0 * numbers, longest)
    rows.on_device = True
    found = rows.collate(numbers, 0 * numbers, longest)
    assert found.feature_lens.tolist() == rows.lengths.tolist()
    assert_same_but_for_rounding(data.Batch(speech=found.to("cpu")), data.Batch(speech=expected))
    assert [len(rows.wave(i, 0)) for i in range(2)] == [data.n_samples(n) for n in rows.lengths]


def test_streams_may_be_missing(stream):
    for name in ("speech", "text", "pairs"):
        batch = data.PretrainData(**{name: getattr(stream, name)})[2, 0]
        assert [n for n in ("speech", "text", "pairs") if getattr(batch, n) is not None] == [name]
        assert_same(batch, data.Batch(**{name: getattr(stream[2, 0], name)}))


def test_a_held_out_pass_sees_each_row_once(stream):
    every = {name: getattr(stream, name)[0] for name in ("speech", "text", "pairs")}
    held_out = data.HeldOut(every, {"speech": 1000, "text": 150, "pairs": 1000})
    found = list(held_out)
    assert len(found) == len(held_out)
    for one, other in zip(found, held_out, strict=True):
        assert_same(one, other)
    lens = {
        "speech": torch.cat([b.speech.feature_lens for b in found if b.speech]),
        "text": torch.cat([b.text.lens for b in found if b.text]),
        "pairs": torch.cat([b.pairs.speech.feature_lens for b in found if b.pairs]),
    }
    for name, rows in every.items():
        assert torch.equal(lens[name], torch.from_numpy(np.sort(rows.lengths)))
    assert all(
        b.speech.features.shape[0] * b.speech.features.shape[1] <= 1000 for b in found if b.speech
    )
    assert all(b.text.tokens.numel() <= 150 for b in found if b.text)


# --------------------------------------------------------------------------------------------- rows


def ramp_manifest(root: Path, seconds: float, rows: list[dict]) -> data.Manifest:
    """A file whose samples tell where they come from."""
    n = round(seconds * 16000)
    soundfile.write(root / "ramp.wav", np.arange(n) / n, 16000, subtype="FLOAT")
    return data.Manifest.read(
        [write_manifest(root / "m.jsonl", [{"audio_filepath": "ramp.wav", **r} for r in rows])]
    )


def test_long_speech_is_cut_anew_each_epoch_and_weighs_as_much_as_it_lasts(tmp_path, monkeypatch):
    asked = []
    manifest = ramp_manifest(tmp_path, 20, [{"duration": 8.0, "offset": 10.0}, {"duration": 1.0}])
    read = data.read_audio
    monkeypatch.setattr(data, "read_audio", lambda *a: (asked.append(a[1:]), read(*a))[1])
    rows = data.SpeechRows(manifest, 2.0, seed=1)
    assert rows.lengths.tolist() == [n_frames(32000)] * 4 + [n_frames(16000)]
    for part in range(4):  # 8 seconds are four rows, each with a stretch of 1.5 s to begin in
        asked.clear()
        cut = [rows.features(part, epoch) for epoch in range(30)]
        assert all(len(f) == rows.lengths[part] for f in cut)
        assert torch.equal(cut[3], rows.features(part, 3))
        starts = [offset - 10.0 for offset, _ in asked[:30]]
        assert len(set(starts)) == 30 and {seconds for _, seconds in asked} == {2.0}
        assert 1.5 * part <= min(starts) < 1.5 * part + 0.3
        assert 1.5 * part + 1.2 < max(starts) < 1.5 * (part + 1)
    rows.features(4, 0)
    assert asked[-1] == (0.0, 1.0)


def test_long_or_silent_pairs_are_left_out_and_counted(tmp_path, tokenizer):
    kinds = [
        {"duration": 1, "text": "a cat"},
        {"duration": 9, "text": "a dog"},
        {"duration": 1, "text": " "},
    ]
    kinds += [{"duration": 1}, {"duration": 0.05, "text": "two"}, {"duration": 1, "text": "a ship"}]
    rows = data.PairRows(ramp_manifest(tmp_path, 10, kinds), tokenizer, 5.0, seed=0)
    assert [rows.manifest.text(i) for i in range(len(rows.lengths))] == ["a cat", "a ship"]
    assert rows.tokens(1)[1:].tolist() == tokenizer.encode("a ship")
    reasons = {
        "shorter than two encoder frames": 1,
        "longer than --max-audio-s 5": 1,
        "without transcript": 2,
    }
    assert rows.left_out == reasons
    with pytest.raises(ValueError, match=r"0 of 1 rows usable \(1 longer than --max-audio-s 5\)"):
        data.PairRows(ramp_manifest(tmp_path, 10, kinds[1:2]), tokenizer, 5.0, seed=0)
    with pytest.raises(ValueError, match="--max-audio-s 0.02: need two encoder frames"):
        data.SpeechRows(ramp_manifest(tmp_path, 10, kinds), 0.02, seed=0)
    speech = data.SpeechRows(ramp_manifest(tmp_path, 10, kinds), 5.0, seed=0)
    assert speech.left_out == {"shorter than two encoder frames": 1}
    assert len(speech.lengths) == 6  # 9 seconds are two rows of 5


def test_no_row_has_more_frames_than_its_duration_says(tmp_path):
    """Half a sample at 8 kHz is one at 16 kHz, which may be the one that completes a frame."""
    write_wave(tmp_path / "a.wav", 1.0, rate=8000)
    row = {"audio_filepath": "a.wav", "duration": (400 + 160 * 10 - 1) / 16000}
    manifest = data.Manifest.read([write_manifest(tmp_path / "m.jsonl", [row])])
    assert n_frames(len(data.read_audio(tmp_path / "a.wav", 0, row["duration"]))) == 11
    rows = data.SpeechRows(manifest, 5.0, seed=0)
    assert rows.lengths.tolist() == [10] and len(rows.features(0, 0)) == 10


@pytest.mark.parametrize("n_enc", range(2, 13))
def test_very_short_audio_makes_a_batch(tmp_path, n_enc):
    seconds = (160 * (4 * n_enc - 1) + 400) / 16000
    rows = data.SpeechRows(ramp_manifest(tmp_path, 2, [{"duration": seconds}]), 5.0, seed=0)
    batch = rows.collate(np.array([0]), np.array([0]), int(rows.lengths[0]))
    assert batch.masked.shape == (1, n_enc) and 1 <= batch.masked.sum() < n_enc


def test_bad_audio_in_training_names_row_and_file(tmp_path):
    rows = [{"audio_filepath": name, "duration": 1} for name in ("no.wav", "bad.wav", "short.wav")]
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    soundfile.write(tmp_path / "short.wav", np.zeros(500), 16000)
    speech = data.SpeechRows(
        data.Manifest.read([write_manifest(tmp_path / "m.jsonl", rows)]), 5.0, seed=0
    )
    with pytest.raises(corpora.AudioError, match="m.jsonl:1: .*no.wav: no such audio file"):
        speech.features(0, 0)
    with pytest.raises(ValueError, match="m.jsonl:2: .*bad.wav: cannot decode"):
        speech.features(1, 0)
    with pytest.raises(
        ValueError, match="m.jsonl:3: .*short.wav: 0.031 s of audio where the manifest says 1"
    ):
        speech.features(2, 0)


# ------------------------------------------------------------------------------- unreadable audio


def damaged_rows(root: Path, monkeypatch) -> dict[str, tuple[dict, str]]:
    """One row of each kind of damage: name to (row, reason)."""
    write_wave(root / "whole.flac", 2.0)
    write_wave(root / "long.flac", 20.0)
    write_wave(root / "short.wav", 1.0)
    whole = (root / "whole.flac").read_bytes()
    (root / "truncated.flac").write_bytes(whole[: len(whole) // 2])
    (root / "empty.wav").write_bytes(b"")
    (root / "text.wav").write_text("A transcript that somebody gave the wrong name.\n" * 50)
    (root / "line\nend.wav").write_text("no audio")
    soundfile.write(root / "no samples.wav", np.zeros(0), 16000)
    samples = np.zeros(32000)
    samples[20000] = np.nan
    soundfile.write(root / "nan.wav", samples, 16000, subtype="FLOAT")
    (root / "dangling.wav").symlink_to(root / "nothing.wav")
    write_wave(root / "shut.wav", 2.0)
    opens = soundfile.SoundFile

    def sound_file(path, *args):
        if str(path).endswith("shut.wav"):
            raise PermissionError(13, "Permission denied")
        return opens(path, *args)

    monkeypatch.setattr(soundfile, "SoundFile", sound_file)
    cannot, ends = "cannot decode audio", "ends before its row does"
    kinds = {
        "truncated.flac": ({}, cannot),
        "empty.wav": ({}, cannot),
        "text.wav": ({}, cannot),
        "line\nend.wav": ({}, cannot),
        "no samples.wav": ({}, "no audio"),
        "nan.wav": ({}, "holds NaN or infinite samples"),
        "dangling.wav": ({}, "a link to nothing"),
        "absent.wav": ({}, "no such audio file"),
        "shut.wav": ({}, cannot),
        "short.wav": ({}, ends),
        "long.flac": ({"offset": 19.0}, ends),
        "whole.flac": ({"offset": 19.0}, "no audio"),
    }
    return {
        name: ({"audio_filepath": name, "duration": 2.0, **more}, reason)
        for name, (more, reason) in kinds.items()
    }


@pytest.fixture
def damaged(tmp_path, monkeypatch):
    """(manifest, reason by `file:line`): twelve rows that cannot be read among 30 that can, of
    which one has eight channels, one 192 kHz, one lies late in a long file, one has an odd name."""
    bad = damaged_rows(tmp_path, monkeypatch)
    write_wave(tmp_path / "eight.wav", 2.0, channels=8)
    write_wave(tmp_path / "fast.wav", 2.0, rate=192_000)
    write_wave(tmp_path / "odd\n\u00fc\u2028name.wav", 2.0)
    rows = [row | {"text": f"bad {name}"} for name, (row, _) in bad.items()]
    good = [{"audio_filepath": "long.flac", "duration": 1.9 + i / 100} for i in range(26)]
    good += [
        {"audio_filepath": name, "duration": 2.0}
        for name in ("eight.wav", "fast.wav", "odd\n\u00fc\u2028name.wav")
    ]
    good.append({"audio_filepath": "long.flac", "duration": 2.0, "offset": 17.5})
    rows += [row | {"text": text} for row, text in zip(good, sentences(30))]
    path = write_manifest(tmp_path / "m.jsonl", rows)
    reasons = {f"{path}:{i}": reason for i, (_, reason) in enumerate(bad.values(), 1)}
    return data.Manifest.read([path]), reasons


def speech_and_pairs(manifest, tokenizer, seed=3) -> data.PretrainData:
    plan = {"micro_batches": 2, "seed": seed}
    speech = data.SpeechRows(manifest, 5.0, seed)
    pairs = data.PairRows(manifest, tokenizer, 5.0, seed)
    return data.PretrainData(
        speech=(speech, data.BatchPlan(speech.lengths, 3000, stream=0, **plan)),
        pairs=(pairs, data.BatchPlan(pairs.lengths, 3000, stream=2, **plan)),
    )


def test_each_kind_of_damage_is_an_error_where_every_row_counts(damaged):
    """Held-out passes read the rows as they are asked to: a score must not lack any."""
    manifest, reasons = damaged
    rows = data.SpeechRows(manifest, 5.0, 0)
    for i in range(len(manifest)):
        if manifest.where(i) not in reasons:
            assert len(rows.features(i, 0)) == rows.lengths[i]
            continue
        with pytest.raises(corpora.AudioError) as caught:
            rows.features(i, 0)
        assert caught.value.reason == reasons[manifest.where(i)]
        message = str(caught.value)
        name = corpora.one_line(manifest.row(i)["audio_filepath"])
        assert message.startswith(f"{manifest.where(i)}: {name}") and message.isprintable()
    with pytest.raises(corpora.AudioError):
        list(data.HeldOut({"speech": rows}, {"speech": 1000}))


def test_unreadable_rows_are_replaced_by_others_of_their_bucket_and_named(damaged, tokenizer):
    manifest, reasons = damaged
    stream = speech_and_pairs(manifest, tokenizer)
    found: dict[str, dict[str, str]] = {"speech": {}, "pairs": {}}
    for step in range(60):
        for k in range(2):
            batch = stream[step, k]
            for name, (rows, plan) in (("speech", stream.speech), ("pairs", stream.pairs)):
                asked, _, bucket_len = plan.micro_batch(step, k)
                speech = batch.speech if name == "speech" else batch.pairs.speech
                assert len(speech.feature_lens) == len(asked)
                assert subsampled_lens(int(speech.feature_lens.min())) >= 2
                assert int(speech.feature_lens.max()) <= bucket_len == speech.features.shape[1]
                for row, length in zip(asked, speech.feature_lens.tolist()):
                    if rows.manifest.where(row) not in reasons:
                        assert length == rows.lengths[row]  # as if nothing had been the matter
            counts = batch.counts()
            assert counts["tlm_speech"] == batch.pairs.speech.masked.sum()
            assert counts["code_mlm"] == batch.speech.masked.sum()
            for fault in batch.faults or ():
                found[fault.stream][fault.where] = fault.reason
    assert found == {"speech": reasons, "pairs": reasons}
    assert stream.audio_rows == {"speech": 42, "pairs": 42}


def test_stand_ins_are_the_same_where_the_device_makes_log_mel(damaged, tokenizer):
    stream = speech_and_pairs(damaged[0], tokenizer)
    waveforms, faults = waveforms_of(stream), 0
    for step in range(12):
        found, expected = waveforms[step, 0], stream[step, 0]
        assert_same_but_for_rounding(found.to("cpu"), expected)
        faults += len(found.faults or ())
    assert faults > 5


def test_a_stand_in_comes_with_its_own_text(damaged, tokenizer):
    manifest, reasons = damaged
    rows, plan = speech_and_pairs(manifest, tokenizer).pairs
    faults = []
    for bucket, bucket_len in enumerate(plan.bucket_len):
        asked, epochs = plan.rows[bucket].astype(np.int64), np.zeros(len(plan.rows[bucket]), int)
        stand_ins = data.StandIns(plan, bucket_len, "pairs", faults)
        batch = rows.collate(asked, epochs, bucket_len, 60, stand_ins)
        bad = {i for i in asked.tolist() if rows.manifest.where(i) in reasons}
        texts = {i: rows.tokens(i).tolist() for i in range(len(rows.lengths))}
        for i, length, text, of_text in zip(
            asked.tolist(), batch.speech.feature_lens, batch.clean_tokens, batch.text.lens
        ):
            there = [j for j in texts if texts[j] == text[:of_text].tolist()]
            assert there and length in rows.lengths[there]
            assert (i in there) == (i not in bad)
    assert {fault.where for fault in faults} == set(reasons)


def test_stand_ins_are_the_same_whoever_reads_and_whenever(damaged, tokenizer):
    """So two ranks equal one process, loader processes change nothing, and a run resumes."""
    manifest, _ = damaged
    order = [(step, k) for step in range(8) for k in (0, 1)]
    stream = speech_and_pairs(manifest, tokenizer)
    here = {place: stream[place] for place in order}
    assert any(batch.faults for batch in here.values())
    for n_workers, its_order in ((2, order), (0, order[::2]), (0, order[9:])):
        fresh = speech_and_pairs(manifest, tokenizer)
        loader = DataLoader(fresh, batch_size=None, sampler=its_order, num_workers=n_workers)
        for place, batch in zip(its_order, loader):
            assert_same(here[place], batch)
            assert here[place].faults == batch.faults


def test_stand_ins_never_leave_the_bucket_while_it_has_others():
    plan = make_plan(np.arange(1, 801))
    for bucket, bucket_len in enumerate(plan.bucket_len):
        row = int(plan.rows[bucket][3])
        stand_ins = data.StandIns(plan, bucket_len, "speech", [])
        others, own = list(stand_ins.others(row, 0)), set(plan.rows[bucket].tolist()) - {row}
        assert set(others[: len(own)]) == own and others == list(stand_ins.others(row, 0))
        assert sorted(others + [row]) == list(range(plan.rows[bucket].max() + 1))
        assert others != list(stand_ins.others(row, 1))


def test_a_long_recording_that_is_broken_does_not_end_the_run(tmp_path):
    """Its parts have one length, so all that lie beside one of them are broken, too."""
    write_wave(tmp_path / "a.wav", 3.0)
    (tmp_path / "long.wav").write_bytes(b"RIFF")
    rows = [{"audio_filepath": "a.wav", "duration": 2.0}] * 100
    rows.insert(50, {"audio_filepath": "long.wav", "duration": 80.0})
    manifest = data.Manifest.read([write_manifest(tmp_path / "m.jsonl", rows)])
    speech = data.SpeechRows(manifest, 2.0, 0)
    plan = data.BatchPlan(speech.lengths, 3000, micro_batches=1, seed=0, stream=0)
    stream = data.PretrainData(speech=(speech, plan))
    faults = [fault for step in range(20) for fault in stream[step, 0].faults or ()]
    assert len(faults) > 20 and {fault.where for fault in faults} == {f"{tmp_path}/m.jsonl:51"}


def test_a_disk_that_is_not_there_ends_the_run_at_once(tmp_path, tokenizer):
    rows = [{"audio_filepath": f"{i}.wav", "duration": 1 + i / 50} for i in range(200)]
    manifest = data.Manifest.read([write_manifest(tmp_path / "m.jsonl", rows)])
    speech = data.SpeechRows(manifest, 5.0, 0)
    plan = data.BatchPlan(speech.lengths, 3000, micro_batches=1, seed=0, stream=0)
    with pytest.raises(corpora.AudioError, match="no such audio file; nor could the others") as e:
        data.PretrainData(speech=(speech, plan))[0, 0]
    assert str(e.value).isprintable()
    with pytest.raises(ValueError, match="no usable audio in the manifest .*no such audio file"):
        data.feature_statistics(manifest)


def test_feature_statistics_pass_over_what_cannot_be_read(damaged):
    manifest, reasons = damaged
    mean, std = data.feature_statistics(manifest)
    good = manifest.filtered(np.array([p not in reasons for p in manifest.places()]))
    again = data.feature_statistics(good)
    assert np.allclose(mean, again[0], atol=1e-4) and np.allclose(std, again[1], atol=1e-4)


class Listener(torch.nn.Module):
    """The least that training.follow can train on speech."""

    loss_names = ("level",)

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(N_MELS, 1)

    def counts(self, batch):
        return {"level": float(batch.speech.feature_lens.sum())}

    def work(self, batch):
        return {}

    def step_done(self):
        pass

    def forward(self, batch):
        error = self.linear(batch.speech.features).square().sum()
        return {"level": Loss(error, batch.speech.feature_lens.sum())}, {}


@pytest.fixture
def listen(damaged, tokenizer, tmp_path):
    """Train for 30 steps on the damaged set, or from one step to another."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(start_step=0, save=lambda step: None, **changes) -> list[dict]:
        known = dict(
            max_steps=30, micro_batches=2, lr=1e-3, warmup_steps=2, grad_clip=5.0, seed=0,
            dtype="fp32", log_every=10, save_every=100, eval_every=0, max_bad_steps=20,
            loss_weights={}, max_bad_share=0.5, num_workers=0, out_dir=tmp_path / "run",
            fast="none", reduce_dtype="fp32",
        )  # fmt: skip
        args, model = argparse.Namespace(**known | changes), Listener()
        optimizer = training.make_optimizer(model, 0.01)
        training.follow(
            model, speech_and_pairs(damaged[0], tokenizer), args,
            training.Ranks(0, 0, 1, torch.device("cpu")), start_step, optimizer=optimizer,
            about={}, save=save, evaluate=None,
        )  # fmt: skip
        return training.read_metrics(tmp_path / "run" / "metrics.jsonl")

    yield run
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_goes_on_and_names_each_unreadable_file_once(damaged, listen, capsys, num_workers):
    manifest, reasons = damaged
    metrics = listen(num_workers=num_workers)
    assert [row["step"] for row in metrics] == [10, 20, 30]
    assert all(np.isfinite(row["loss/level"]) for row in metrics)
    lines = capsys.readouterr().out.splitlines()
    named = [line for line in lines if line.startswith("cannot be read, another row is used: ")]
    assert len(named) == len(reasons)
    for i in range(len(reasons)):
        name = corpora.one_line(manifest.row(i)["audio_filepath"])
        assert sum(f"{manifest.where(i)}: {name}" in line for line in named) == 1
    summary = [line for line in lines if line.startswith("speech: 12 of 42 rows cannot be read")]
    assert len(summary) == 1 and "(29%): 5 cannot decode audio, 2 " in summary[0]


def named_in(printed: str) -> list[str]:
    """What was said of each row that cannot be read."""
    start = "cannot be read, another row is used: "
    return [line.removeprefix(start) for line in printed.splitlines() if line.startswith(start)]


def test_a_run_that_resumes_names_no_row_again_and_counts_all(listen, capsys, tmp_path):
    """Also those met since the last log line; those from after the resumed step are forgotten."""
    record = tmp_path / "run" / "bad_rows.json"
    at_save = {}

    def save(step):
        at_save[step] = json.loads(record.read_text())

    listen(save_every=1, save=save)
    printed = capsys.readouterr().out
    whole, before = named_in(printed), {message for *_, message in at_save[1]}
    assert 0 < len(before) < len(whole) == 12
    assert all(step == 1 for step, *_ in at_save[1])
    assert at_save[30] == json.loads(record.read_text())
    last = [line for line in printed.splitlines() if "rows cannot be read" in line][-1]
    listen(start_step=1)
    printed = capsys.readouterr().out
    assert not before & {*named_in(printed)}
    assert sorted([*before, *named_in(printed)]) == sorted(whole)
    assert [line for line in printed.splitlines() if "rows cannot be read" in line][-1] == last
    listen(start_step=30, max_steps=34)  # all are known by now
    assert named_in(capsys.readouterr().out) == []
    record.write_text("[[1, 2")
    listen(start_step=1)
    assert len(named_in(capsys.readouterr().out)) == 12


def test_a_run_without_a_record_resumes_and_after_too_many_bad_rows_it_is_gone(
    listen, capsys, tmp_path
):
    """A checkpoint from before there were records; and rows that were mended are not counted."""
    listen(start_step=20)
    assert (tmp_path / "run" / "bad_rows.json").exists() and named_in(capsys.readouterr().out)
    with pytest.raises(ValueError, match="--max-bad-share"):
        listen(max_bad_share=0.01)
    assert not (tmp_path / "run" / "bad_rows.json").exists()


def test_the_record_of_rank_0_is_known_to_all_ranks(tmp_path):
    fault, shared = training.RowFault("speech", "m.jsonl:1", "no audio", "m.jsonl:1: no audio"), {}
    record = tmp_path / "bad_rows.json"
    record.write_text(json.dumps([[3, *fault], [9, *fault._replace(where="m.jsonl:2")]]))

    class Pair(training.Ranks):
        def union(self, own):
            shared.update(own)
            return dict(shared)

    for rank, its in enumerate((record, tmp_path / "of another machine")):
        bad_rows = training.BadRows({"speech": 100}, 0.5, its)
        bad_rows.resume(Pair(rank, rank, 2, torch.device("cpu")), 3)
        assert bad_rows.known == {("speech", "m.jsonl:1"): fault}
    assert json.loads(record.read_text()) == [[3, *fault]]
    assert not (tmp_path / "of another machine").exists()


def test_more_unreadable_rows_than_allowed_end_the_run_with_what_to_do(listen, capsys):
    with pytest.raises(ValueError, match=r"above --max-bad-share 0\.2: mend them") as caught:
        listen(max_bad_share=0.2)
    assert str(caught.value).isprintable() and "rows cannot be read" in str(caught.value)
    with pytest.raises(ValueError, match="--max-bad-share 0: "):
        listen(max_bad_share=0.0)


def test_ranks_agree_on_the_rows_that_cannot_be_read(capsys):
    """Each rank meets others; all must count the same, or only one of them would stop."""
    faults = [
        training.RowFault("speech", f"m.jsonl:{i}", "no audio", f"m.jsonl:{i}: a.wav: no audio")
        for i in range(3)
    ]

    class Pair(training.Ranks):
        def union(self, own):
            return {(f.stream, f.where): f for f in faults}

    both = [training.BadRows({"speech": 100}, 0.02) for _ in range(2)]
    for rank, bad_rows in enumerate(both):
        batch = data.Batch(faults=faults[rank : rank + 2])
        assert list(bad_rows.watch([batch])) == [batch]
        quiet = training.BadRows({"speech": 100}, 0.0)
        quiet.name(Pair(1, 1, 2, torch.device("cpu")), 1)  # names, never stops
        assert len(quiet.known) == 3
        with pytest.raises(ValueError, match=r"speech: 3 of 100 rows cannot be read \(3%\)"):
            bad_rows.agree(Pair(rank, rank, 2, torch.device("cpu")), 1)
    assert both[0].known == both[1].known and len(both[0].known) == 3
    assert capsys.readouterr().out.count("another row is used") == 3  # rank 0 alone prints


def text_pairs(root: Path, texts: list[str], tokenizer) -> data.PairRows:
    rows = [{"duration": 1.0 + 0.01 * i, "text": text} for i, text in enumerate(texts)]
    return data.PairRows(ramp_manifest(root, 1, rows), tokenizer, 1e6, seed=0)


def test_negatives_are_foreign_and_about_as_long(tmp_path, tokenizer):
    """Never the partner, never a duplicate whatever its case or punctuation, within 10%."""
    texts = sentences(400, seed=8, shortest=3, longest=20)
    texts[:100] = texts[100:200]
    texts[200:220] = [text.upper() + "!" for text in texts[300:320]]
    rows = text_pairs(tmp_path, texts, tokenizer)
    assert not rows.widened
    for i in range(len(texts)):
        for epoch in range(10):
            j = rows.stm_negative(data.row_rng(0, epoch, i, data.STM_NEGATIVE), i)
            assert data._transcript_key(texts[i]) != data._transcript_key(texts[j]) and i != j
            assert abs(rows.text_lens[j] - rows.text_lens[i]) <= max(1, 0.1 * rows.text_lens[i])
            assert 1 + rows.text_lens[j] <= rows.text_room[i]


def test_text_length_says_nothing_about_the_match(tmp_path, tokenizer):
    """A rule that sees the two lengths alone stays at chance on pairs it was not fitted to."""
    rows = text_pairs(tmp_path, sentences(2000, seed=8, shortest=3, longest=20), tokenizer)
    n = len(rows.text_lens)
    speech_s = rows.text_lens * np.random.default_rng(0).normal(
        1, 0.1, n
    )  # how long the text takes to say
    epochs = []
    for epoch in range(2):
        negative = [
            rows.stm_negative(data.row_rng(0, epoch, i, data.STM_NEGATIVE), i) for i in range(n)
        ]
        length = np.concatenate([rows.text_lens, rows.text_lens[negative]])
        feature = np.stack([length, length / np.tile(speech_s, 2)])
        epochs.append((feature, np.repeat([1, 0], n)))
    (fit, label), (held, held_label) = epochs
    edges = [np.quantile(f, np.linspace(0, 1, 13)[1:-1]) for f in fit]
    cells = [
        sum(np.digitize(f, e) * 12**i for i, (f, e) in enumerate(zip(x, edges)))
        for x in (fit, held)
    ]
    majority = np.array(
        [label[cells[0] == c].mean() > 0.5 if (cells[0] == c).any() else 0 for c in range(144)]
    )
    assert abs((majority[cells[1]] == held_label).mean() - 0.5) < 0.03


def test_few_transcripts_widen_the_search_and_one_is_an_error(tmp_path, tokenizer):
    rows = text_pairs(
        tmp_path,
        ["a cat", "the red old dog sees two big ships and the house under", "a cat"],
        tokenizer,
    )
    assert rows.widened == 3
    assert rows.stm_negative(np.random.default_rng(0), 0) == 1 and rows.stm_negative(
        np.random.default_rng(0), 1
    ) in (0, 2)
    assert rows.text_room.tolist() == [1 + rows.text_lens.max()] * 3
    with pytest.raises(ValueError, match="at least two different"):
        text_pairs(tmp_path, ["A cat.", "a cat"], tokenizer)


def test_feature_statistics_standardise_the_features(manifest):
    mean, std = data.feature_statistics(manifest)
    frames = np.concatenate(
        [
            data.read_features(manifest, i, 0, seconds, 10**6).numpy()
            for i, seconds in enumerate(manifest.durations)
        ]
    )
    assert mean.shape == std.shape == (N_MELS,) and mean.dtype == std.dtype == np.float32
    assert (
        np.abs((frames.mean(0) - mean) / std).max() < 1e-3
        and np.abs(frames.std(0) / std - 1).max() < 1e-3
    )
    part = data.feature_statistics(manifest, max_seconds=10, seed=1)
    assert np.array_equal(part[0], data.feature_statistics(manifest, max_seconds=10, seed=1)[0])
    assert not np.array_equal(part[0], mean)


# ----------------------------------------------------------------------------------------- commands


@pytest.fixture
def libri(tmp_path) -> Path:
    root = tmp_path / "corpus" / "LibriSpeech"
    for split, suffix in (("train-a", "flac"), ("dev-b", "opus")):
        for speaker in ("10", "11"):
            chapter = root / split / speaker / "7"
            names = [f"{speaker}-7-000{i}" for i in range(3)]
            for i, name in enumerate(names):
                kind = {"format": "OGG", "subtype": "OPUS"} if suffix == "opus" else {}
                write_wave(chapter / f"{name}.{suffix}", 1 + 0.5 * i, seed=i, **kind)
            lines = "".join(f"{name} {text.upper()}\n" for name, text in zip(names, sentences(3)))
            (chapter / f"{speaker}-7.trans.txt").write_text(lines)
    (root / "SPEAKERS.TXT").write_text("; nothing to read here\n")
    return root


def test_librispeech_becomes_a_manifest(libri, tmp_path, capsys):
    out = tmp_path / "corpus" / "all.jsonl"
    assert data.main(["manifest", "librispeech", str(libri), str(out)]) == 0
    assert "12 rows" in capsys.readouterr().out
    m = data.Manifest.read([out], text_required=True)
    row = m.row(0)
    assert (row["id"], row["speaker"], row["split"]) == ("10-7-0000", "10", "dev-b") and Path(
        row["audio_filepath"]
    ).is_file()
    assert not Path(json.loads(out.read_text().splitlines()[0])["audio_filepath"]).is_absolute()
    assert np.allclose(m.durations[:3], [1, 1.5, 2], atol=0.05) and row["text"].isupper()
    report = librispeech_manifest(
        libri.parent, tmp_path / "x" / "some.jsonl", ["train-a"]
    )  # the folder above
    assert (
        report.rows == 6 and report.speakers == {"10", "11"} and report.seconds == pytest.approx(9)
    )
    assert Path(
        json.loads((tmp_path / "x/some.jsonl").read_text().splitlines()[0])["audio_filepath"]
    ).is_absolute()


def test_what_librispeech_lacks_is_reported(libri, tmp_path):
    chapter = libri / "train-a" / "10" / "7"
    (chapter / "10-7-0000.flac").unlink()
    (chapter / "10-7-0001.flac").write_bytes(b"no")
    write_wave(chapter / "10-7-0009.flac", 1)
    with (chapter / "10-7.trans.txt").open("a") as lines:
        lines.write("10-7-0002 TWICE\n")
    report = librispeech_manifest(libri, tmp_path / "m.jsonl", ["train-a"])
    assert report.rows == 4
    assert {reason: count for reason, (count, _) in report.rejected.items()} == {
        "transcript without audio, or a second one": 2,
        "cannot decode audio": 1,
        "audio without transcript": 1,
    }
    assert "10-7-0009.flac" in report.rejected["audio without transcript"][1]


def test_librispeech_faults(libri, tmp_path, capsys):
    command = ["manifest", "librispeech", str(libri), str(tmp_path / "m"), "--splits", "train-z"]
    assert data.main(command) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: ")
        and "train-z" in error
        and "dev-b" in error
        and error.count("\n") == 1
    )
    assert data.main(["manifest", "librispeech", str(tmp_path / "none"), str(tmp_path / "m")]) == 2
    assert data.main(["manifest", "librispeech", str(tmp_path), str(tmp_path / "m")]) == 2
    assert "0 usable rows" in capsys.readouterr().err
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob("*.tmp*"))


def test_any_folder_becomes_a_manifest(tmp_path, capsys):
    write_wave(tmp_path / "d/x/one.wav", 1.0)
    write_wave(tmp_path / "d/two.FLAC", 2.0, rate=8000, format="FLAC")
    (tmp_path / "d/two.txt").write_text("Hello\nthere\n")
    (tmp_path / "d/notes.md").write_text("no audio")
    assert data.main(["manifest", "directory", str(tmp_path / "d"), str(tmp_path / "m.jsonl")]) == 0
    m = data.Manifest.read([tmp_path / "m.jsonl"])
    assert [m.row(i)["id"] for i in range(2)] == ["two", "x/one"] and m.durations.tolist() == [
        2.0,
        1.0,
    ]
    assert m.text(0) == "Hello there" and m.has_text.tolist() == [True, False]
    assert data.main(["manifest", "directory", str(tmp_path / "none"), str(tmp_path / "m2")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_check_counts_what_is_wrong(tmp_path, tokenizer, capsys):
    write_wave(tmp_path / "a.wav", 2.0)
    good = {"audio_filepath": "a.wav", "duration": 2.0, "text": "a cat", "speaker": "s1"}
    rows = [
        good,
        {**good, "duration": 30},
        {**good, "audio_filepath": "no.wav"},
        {**good, "audio_filepath": "http://x/"},
    ]
    path = write_manifest(tmp_path / "m.jsonl", rows)
    tokenizer.save(tmp_path / "t.model")
    assert data.main(["check", str(path), "--tokenizer", str(tmp_path / "t.model")]) == 0
    out = capsys.readouterr().out
    assert "3 rows, 0.01 hours, 1 speakers" in out and "rejected 1: audio_filepath is a URL" in out
    assert "3 transcripts" in out and "unknown 0" in out and f"{path}:4" in out
    assert data.main(["check", str(path), "--read"]) == 0
    out = capsys.readouterr().out
    assert (
        "1 rows" in out
        and "audio cannot be read" in out
        and "audio ends before its row does" in out
    )
    out = tmp_path / "elsewhere" / "good.jsonl"
    assert data.main(["check", str(path), "--read", "--workers", "2", "--out", str(out)]) == 0
    capsys.readouterr()
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {**good, "audio_filepath": f"{tmp_path}/a.wav"}
    ]
    command = ["check", str(path), "--read", "--tokenizer", str(tmp_path / "t.model")]
    assert data.main(command) == 0
    n_tokens = len(tokenizer.encode("a cat"))  # of the one good row
    assert f"1 transcripts: {n_tokens} tokens, longest {n_tokens}" in capsys.readouterr().out
    assert data.main(["check", str(path), "--max-audio-s", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "0 usable rows" in error and error.count("\n") == 1


def test_the_tokenizer_command(tmp_path, capsys):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("\n".join(sentences(200, seed=ord(name))))
    texts = f"{tmp_path}/a.txt,{tmp_path}/b.txt"
    out = tmp_path / "t.model"
    assert (
        data.main(
            [
                "tokenizer",
                "--text",
                texts,
                "--vocab-size",
                "90",
                "--out",
                str(out),
                "--text-case",
                "keep",
            ]
        )
        == 0
    )
    assert (
        data.Tokenizer.load(out).text_case == "keep" and "text case keep" in capsys.readouterr().out
    )
    everything = out.read_bytes()
    assert (
        data.main(
            [
                "tokenizer",
                "--text",
                texts,
                "--vocab-size",
                "90",
                "--out",
                str(out),
                "--max-lines",
                "50",
            ]
        )
        == 0
    )
    assert out.read_bytes() != everything
    assert data.main(["tokenizer", "--text", str(tmp_path / "no.txt"), "--out", str(out)]) == 2
    assert "no.txt: no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        data.main(["--help"])
    assert stopped.value.code == 0
