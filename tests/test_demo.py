"""The demo corpus: official layouts, determinism, nothing held out leaks, German and English."""

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile

import demo

SCALE = 0.01  # amounts then stand at their lower bounds


def table(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]


def lines_of(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line]


def contents(root: Path) -> dict[str, bytes]:
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def transcripts(root: Path) -> dict[str, dict[str, str]]:
    """LibriSpeech split -> utterance id -> text."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for path in root.glob("LibriSpeech/*/*/*/*.trans.txt"):
        for line in lines_of(path):
            key, text = line.split(" ", 1)
            found[path.parts[-4]][key] = text
    return found


# Layouts


def test_librispeech_layout(demo_root):
    splits = transcripts(demo_root)
    assert set(splits) == {"train-clean-100", "train-other-500", "dev-clean", "test-clean"}
    for split, texts in splits.items():
        for key, text in texts.items():
            speaker, chapter, number = key.split("-")
            assert re.fullmatch(r"\d{4}", number)
            assert (demo_root / f"LibriSpeech/{split}/{speaker}/{chapter}/{key}.flac").is_file()
            assert re.fullmatch(r"[A-Z']+( [A-Z']+){3,13}", text)
    n_audio = len(list(demo_root.glob("LibriSpeech/**/*.flac")))
    assert n_audio == sum(map(len, splits.values()))
    speakers = lines_of(demo_root / "LibriSpeech/SPEAKERS.TXT")
    assert len(speakers) == 25 and speakers[0].startswith(";ID  |SEX|")


def test_audio_is_16_khz_flac_of_sensible_level_and_length(demo_root):
    paths = sorted(demo_root.rglob("*.flac"))
    for path in paths[::3]:
        audio, rate = soundfile.read(path)
        assert (rate, audio.ndim, soundfile.info(path).subtype) == (16000, 1, "PCM_16")
        assert 1.5 <= len(audio) / rate <= 8
        assert -32 < 20 * np.log10(audio.std()) < -18 and np.abs(audio).max() < 0.99
        quiet = audio[: rate // 20]  # before the speech: the noise floor, not digital silence
        assert -63 < 20 * np.log10(quiet.std()) < -57
    assert len({path.read_bytes() for path in paths}) == len(paths)


def test_covost_layout(demo_root):
    folder = demo_root / "cv-corpus-4/en"
    clips, pairs = table(folder / "validated.tsv"), table(folder / "covost_v2.en_de.tsv")
    assert clips[0][:3] == ["client_id", "path", "sentence"] and pairs[0][1] == "translation"
    assert [row[1] for row in clips[1:]] == [row[0] for row in pairs[1:]]
    assert {row[2] for row in pairs[1:]} == {"train", "train_covost", "dev", "test"}
    split_of_client = defaultdict(set)
    for clip, (path, translation, split) in zip(clips[1:], pairs[1:], strict=True):
        assert len(clip) == 8 and (folder / "clips" / path).is_file()
        assert translation[-1] in ".?!" and translation[0].isupper() and translation != "-."
        split_of_client[clip[0]].add(split.removesuffix("_covost"))
    assert all(len(splits) == 1 for splits in split_of_client.values())


@pytest.mark.parametrize(
    ("file", "n_columns", "texts", "label", "labels"),
    [  # the positions at which the usual readers look
        ("MNLI/train", 12, (8, 9), -1, "entailment neutral contradiction"),
        ("MNLI/dev_matched", 16, (8, 9), -1, "entailment neutral contradiction"),
        ("MNLI/dev_mismatched", 16, (8, 9), -1, "entailment neutral contradiction"),
        ("MNLI/test_matched", 10, (8, 9), None, ""),
        ("MNLI/test_mismatched", 10, (8, 9), None, ""),
        ("QNLI/train", 4, (1, 2), -1, "entailment not_entailment"),
        ("QNLI/dev", 4, (1, 2), -1, "entailment not_entailment"),
        ("QNLI/test", 3, (1, 2), None, ""),
        ("QQP/train", 6, (3, 4), 5, "0 1"),
        ("QQP/dev", 6, (3, 4), 5, "0 1"),
        ("QQP/test", 3, (1, 2), None, ""),
        ("SST-2/train", 2, (0,), 1, "0 1"),
        ("SST-2/dev", 2, (0,), 1, "0 1"),
        ("SST-2/test", 2, (1,), None, ""),
    ],
)
def test_glue_columns(demo_root, file, n_columns, texts, label, labels):
    header, *rows = table(demo_root / "glue" / f"{file}.tsv")
    assert len(rows) >= 6 and {len(row) for row in [header, *rows]} == {n_columns}
    for column in texts:
        assert all(3 < len(row[column].split()) <= 15 for row in rows)
    if label is not None:
        assert {row[label] for row in rows} == set(labels.split())
    else:
        assert not {"label", "gold_label", "is_duplicate"} & set(header)


def test_text_normalisation_format(demo_root):
    folder = demo_root / "textnorm/en_with_types"
    assert {path.name for path in folder.iterdir()} == {
        f"output-{number:05d}-of-00100" for number in (0, 1, 90, 99)
    }
    classes = set()
    for row in table(folder / "output-00000-of-00100"):
        if row == ["<eos>", "<eos>"]:
            continue
        kind, before, after = row
        classes.add(kind)
        assert (after == "<self>") == (kind == "PLAIN") and (after == "sil") == (kind == "PUNCT")
        assert after in ("<self>", "sil") or re.fullmatch(r"[a-z' ]+", after)
        assert re.search(r"\d", before) or kind in ("PLAIN", "PUNCT", "LETTERS")
    assert {"CARDINAL", "ORDINAL", "DATE", "MONEY", "TIME", "MEASURE", "DECIMAL"} <= classes


def test_plain_text_has_documents_and_no_digits(demo_root):
    for split in ("train", "dev"):
        text = (demo_root / f"text/{split}.txt").read_text(encoding="utf-8")
        assert re.fullmatch(r"[A-Za-z' ,.?!\n]+", text)
        documents = text.strip().split("\n\n")
        assert all(5 <= len(document.splitlines()) <= 15 for document in documents)


# What is held out


def test_no_sentence_is_in_two_splits_and_no_held_out_word_is_new(demo_root):
    splits, words = defaultdict(set), defaultdict(set)  # sentence -> splits; stream, split -> words

    def add(stream: str, split: str, sentence: str):
        splits[" ".join(demo.words_of(sentence))].add(split)
        words[stream, split].update(demo.words_of(sentence))

    for split, texts in transcripts(demo_root).items():
        for text in texts.values():
            add("speech", split.split("-")[0], text)
    for split in ("train", "dev"):
        for line in lines_of(demo_root / f"text/{split}.txt"):
            add("text", split, line)
    folder = demo_root / "cv-corpus-4/en"
    for clip, pair in zip(
        table(folder / "validated.tsv")[1:], table(folder / "covost_v2.en_de.tsv")[1:], strict=True
    ):
        add("covost", pair[2].removesuffix("_covost"), clip[2])
    for path in demo_root.glob("glue/*/*.tsv"):
        header, *rows = table(path)
        for column, name in enumerate(header):
            if re.fullmatch(r"(sentence|question)\d?", name):
                for row in rows:
                    add(path.parts[-2], path.stem.split("_")[0], row[column])
    for number, split in {0: "train", 1: "train", 90: "dev", 99: "test"}.items():
        path = demo_root / f"textnorm/en_with_types/output-{number:05d}-of-00100"
        sentence: list[str] = []
        for row in table(path):
            if row[0] == "<eos>":
                add("textnorm", split, " ".join(sentence))
                sentence = []
            else:
                sentence.append(row[1] if row[2] in ("<self>", "sil") else row[2])
    assert [sentence for sentence, owners in splits.items() if len(owners) > 1] == []
    for stream, split in words:
        assert words[stream, split] <= words[stream, "train"]


def test_held_out_voices_are_not_in_training():
    speakers = {voice.speaker for voices in demo.VOICES.values() for voice in voices}
    variants = [voice.name.split("+")[1] for voices in demo.VOICES.values() for voice in voices]
    assert len(speakers) == len(set(variants)) == len(variants) == 24
    n_train = sum(len(v) for split, v in demo.VOICES.items() if split.startswith("train"))
    assert (n_train, len(demo.VOICES["dev-clean"]), len(demo.VOICES["test-clean"])) == (16, 4, 4)


# Making, remaking, reusing


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A corpus that tests may damage."""
    return demo.make_demo(
        tmp_path_factory.mktemp("small") / "corpus", seed=3, scale=SCALE, log=lambda _: None
    )


def test_two_makes_give_equal_bytes_and_another_seed_does_not(small, tmp_path):
    again = demo.make_demo(tmp_path / "again", seed=3, scale=SCALE, log=lambda _: None)
    assert contents(again) == contents(small)
    other = demo.make_demo(tmp_path / "other", seed=4, scale=SCALE, log=lambda _: None)
    assert (other / "text/train.txt").read_bytes() != (small / "text/train.txt").read_bytes()


def test_a_complete_corpus_is_reused_and_an_incomplete_one_remade(small):
    before, messages = contents(small), []
    demo.make_demo(small, seed=3, scale=SCALE, log=messages.append)
    assert messages == []
    clip = sorted(small.rglob("*.flac"))[5]
    clip.unlink()
    (small / "text/dev.txt").write_text("cut off")
    demo.make_demo(small, seed=3, scale=SCALE, log=messages.append)
    assert len(messages) == 1 and contents(small) == before


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="choose another folder"):
        demo.make_demo(tmp_path, scale=SCALE)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_two_processes_at_once_make_it_once(tmp_path):
    command = [sys.executable, demo.__file__, "--root", str(tmp_path / "d"), "--scale", str(SCALE)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sum("made in" in output for output in outputs) == 1


def test_marker_lists_every_file_and_nothing_else_is_left(small):
    marker = json.loads((small / "demo.json").read_text())
    assert set(marker["files"]) == set(contents(small)) - {"demo.json"}
    assert {path.name for path in small.parent.iterdir()} == {"corpus", ".corpus.lock"}


def test_missing_voice_library_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ValueError, match=r"pip install espeakng-loader==\d") as caught:
        demo.make_demo(tmp_path / "corpus", scale=SCALE)
    assert isinstance(caught.value, demo.VoiceError) and "\n" not in str(caught.value)
    assert demo.main(["--root", str(tmp_path / "corpus"), "--scale", str(SCALE)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "corpus").exists()


def test_failing_voice_library_says_what_to_install(tmp_path, monkeypatch):
    """The library is there but broken, in the worker processes: the reason and the remedy."""
    fake = tmp_path / "fake/espeakng_loader"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text(
        "def get_library_path(): return '/nowhere/libespeak-ng.so'\n"
        "def get_data_path(): return '/nowhere'\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(fake.parent))
    with pytest.raises(demo.VoiceError, match="/nowhere.*pip install espeakng-loader=="):
        demo.make_demo(tmp_path / "corpus", scale=SCALE)


# Voices


def test_samples_do_not_depend_on_what_was_said_before():
    synthesizer, text = demo.Synthesizer(), "The old teacher bought three books."
    for voices in demo.VOICES.values():
        for voice in voices:
            first, rate = synthesizer.say(text, voice)
            synthesizer.say("Who lives in the city?", demo.VOICES["test-clean"][0])
            synthesizer.say("A yellow boat.", voice)
            again, _ = synthesizer.say(text, voice)
            assert rate == 22050 and np.array_equal(first, again), voice.name


def test_voices_differ_and_words_differ():
    synthesizer = demo.Synthesizer()
    voices = [voice for voices in demo.VOICES.values() for voice in voices]
    said = {synthesizer.say("The film was boring.", voice)[0].tobytes() for voice in voices}
    assert len(said) == 24
    assert synthesizer.say("The film was clever.", voices[0])[0].tobytes() not in said


# Grammar

THINGS = {noun.en: noun for noun in demo.OBJECTS}
PEOPLE = {noun.en: noun for noun in demo.PEOPLE}
VERBS = {verb.base: verb for verb in demo.VERBS}


@pytest.mark.parametrize(
    ("change", "en", "de"),
    [
        ({}, "The aunt bought an apple.", "Die Tante hat einen Apfel gekauft."),
        (
            {"negated": True, "quality": ("red", "rot")},
            "The aunt did not buy a red apple.",
            "Die Tante hat keinen roten Apfel gekauft.",
        ),
        (
            {"past": False, "several": True, "count": 21, "trait": ("tired", "müde")},
            "The tired aunts buy twenty one apples.",
            "Die müden Tanten kaufen einundzwanzig Äpfel.",
        ),
        (
            {
                "past": False,
                "negated": True,
                "short": True,
                "place": ("in the city", "in der Stadt"),
            },
            "The aunt doesn't buy an apple in the city.",
            "Die Tante kauft keinen Apfel in der Stadt.",
        ),
        (
            {"time": ("on Monday", "am Montag"), "time_first": True, "quality": ("old", "alt")},
            "On Monday the aunt bought an old apple.",
            "Am Montag hat die Tante einen alten Apfel gekauft.",
        ),
        (
            {"person": PEOPLE["girl"], "trait": ("old", "alt"), "thing": THINGS["boat"]},
            "The old girl bought a boat.",
            "Das alte Mädchen hat ein Boot gekauft.",
        ),
    ],
)
def test_event_agrees_in_english_and_german(change, en, de):
    event = demo.Event(PEOPLE["aunt"], VERBS["buy"], THINGS["apple"])
    sentence = demo.replace(event, **change).statement()
    assert (demo.spoken(sentence.en), sentence.de) == (en, de)


@pytest.mark.parametrize(
    ("ask", "style", "en", "de"),
    [
        ("wo", 0, "Where do the men sell six cows?", "Wo verkaufen die Männer sechs Kühe?"),
        ("wo", 1, "In which place do the men sell six cows?", None),
        ("wo", 2, "Do you know where the men sell six cows?", None),
        ("wer", 0, "Who sells six cows in the city?", "Wer verkauft sechs Kühe in der Stadt?"),
        (
            "wie viele",
            0,
            "How many cows do the men sell in the city?",
            "Wie viele Kühe verkaufen die Männer in der Stadt?",
        ),
    ],
)
def test_questions(ask, style, en, de):
    place = ("in the city", "in der Stadt")
    event = demo.Event(PEOPLE["man"], VERBS["sell"], THINGS["cow"], place=place, count=6)
    question = demo.replace(event, past=False, several=True).question(ask, style)
    assert demo.spoken(question.en) == en and de in (None, question.de)


@pytest.mark.parametrize(
    ("n", "en", "de"),
    [
        (0, "zero", "null"),
        (16, "sixteen", "sechzehn"),
        (21, "twenty one", "einundzwanzig"),
        (30, "thirty", "dreißig"),
        (105, "one hundred five", "einhundertfünf"),
        (9999, "nine thousand nine hundred ninety nine", "neuntausendneunhundertneunundneunzig"),
    ],
)
def test_numbers(n, en, de):
    assert (demo.english_number(n), demo.german_number(n)) == (en, de)


def test_ordinals():
    english = [demo.english_ordinal(n) for n in (1, 2, 3, 5, 9, 12, 20, 31)]
    assert english == "first,second,third,fifth,ninth,twelfth,twentieth,thirty first".split(",")
    german = [demo.german_ordinal(n) for n in (1, 3, 7, 8, 12, 20, 31)]
    assert german == "ersten dritten siebten achten zwölften zwanzigsten einunddreißigsten".split()


def test_written_and_spoken_form_of_one_sentence():
    sentence = (
        "It costs [MONEY|$5.50|five dollars and fifty cents] on [DATE|3 May|the third of May]."
    )
    assert demo.spoken(sentence) == "It costs five dollars and fifty cents on the third of May."
    assert demo.written_tokens(sentence)[2:] == [
        ("MONEY", "$5.50", "five dollars and fifty cents"),
        ("PLAIN", "on", "<self>"),
        ("DATE", "3 May", "the third of may"),
        ("PUNCT", ".", "sil"),
    ]


def test_sentiment_follows_from_the_words():
    """An opinion holds praise or blame, turned round by 'not' and 'never', and by 'but' for what
    stands before it."""
    grammar = demo.Grammar(np.random.default_rng(0))
    good = {row[0] for row in demo.GOOD + demo.LIKED}
    bad = {row[0] for row in demo.BAD + demo.DISLIKED}
    for _ in range(500):
        sentence = grammar.opinion()
        sign, votes = 1, []
        for word in demo.words_of(sentence.en.split(", but")[-1]):
            sign = -1 if word in ("not", "never") else sign
            if word in good | bad:
                votes.append(sign * (1 if word in good else -1))
        assert votes and {vote > 0 for vote in votes} == {sentence.positive}, sentence.en


def test_inference_labels_cannot_be_read_off_the_hypothesis_negation(demo_root):
    """Annotators' 'not means contradiction' must not solve the task: not by far."""
    negated = defaultdict(list)
    grammar = demo.Grammar(np.random.default_rng(0))
    for label in ("entailment", "neutral", "contradiction"):
        for _ in range(300):
            hypothesis = demo.event_inference(grammar, label, diary=False)[1].en
            negated[label].append(bool(re.search(r" not |n't ", hypothesis)))
    shares = [np.mean(values) for values in negated.values()]
    assert max(shares) - min(shares) < 0.25


def test_size_inference_is_arithmetically_right():
    grammar, numbers = demo.Grammar(np.random.default_rng(0)), {}
    for n in range(10_000):
        numbers[demo.english_number(n)] = n
    for label in ("entailment", "contradiction"):
        for _ in range(100):
            premise, hypothesis = demo.size_inference(grammar, label)
            n = numbers[re.search(r" is (.*) meters", premise.en)[1]]
            bound, k = re.search(r" is (more|less) than (.*) meters", hypothesis.en).groups()
            true = n > numbers[k] if bound == "more" else n < numbers[k]
            assert true == (label == "entailment")
