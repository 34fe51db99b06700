"""Properties of evaluate.py: scores against other people's code, files that are checked, rows that
are answered once; and using a model on audio and text."""

import json
import pickle
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jiwer
import numpy as np
import pytest
import small_tasks
import soundfile
import torch
from small_tasks import GERMAN, WORDS, micro_tiny, options, spoken
from whole_runs import error_of, run_here

import data
import demo
import evaluate
import finetune
import training
from conformer import CLS_ID, SEP_ID
from corpora import GLUE, Manifest, SpokenToken, Tokenizer, read_textnorm
from decoders import HeadConfig
from evaluate import KEEP, NEXT, NORMALISERS, SILENT, TaskSet, TaskTokenizers

ALONE = training.Ranks(0, 0, 1, torch.device("cpu"))
HEAD = HeadConfig("ctc")
pytestmark = pytest.mark.usefixtures("micro_tasks")


LEARN = "--log-every 200 --save-every 200 --eval-every 0 --lr 1e-2 --decoder-lr 1e-2 --augment 0 "
LEARN += "--dropout 0 --warmup-steps 20 --decoder-warmup-steps 20 --batch-s 4 --batch-tokens 130 "
LEARN += "--max-steps "


@pytest.fixture(scope="module")
def runs(paths, tmp_path_factory):
    """Folder of a task's run, made when it is asked for. asr, sst2 and textnorm have learned."""
    made: dict[str, Path] = {}
    more = {"asr": f"--head ctc {LEARN} 180", "sst2": LEARN + "50", "textnorm": LEARN + "130"}

    def run_of(task: str) -> Path:
        if task not in made:
            made[task] = tmp_path_factory.mktemp("runs") / task
            with micro_tiny():
                run_here(finetune.main, options(paths, task, made[task], more.get(task, "")))
        return made[task]

    return run_of


def run_evaluate(*arguments: object) -> str:
    return run_here(evaluate.main, arguments)


# ------------------------------------------------------------------------------------ word errors


def random_texts(rng: np.random.Generator, n: int) -> list[str]:
    """Some of them empty."""
    return [" ".join(rng.choice(list("abcde"), rng.integers(0, 7))) for _ in range(n)]


@pytest.mark.parametrize("seed", range(5))
def test_word_errors_are_jiwers_also_where_texts_are_empty(seed):
    rng = np.random.default_rng(seed)
    references, answers = random_texts(rng, 40), random_texts(rng, 40)
    assert "" in references and "" in answers
    scores = evaluate.word_errors(references, answers, "case")
    theirs = jiwer.process_words(references, answers)
    assert scores["wer"] == pytest.approx(theirs.wer, rel=1e-12)
    for kind in ("substitutions", "deletions", "insertions"):
        assert scores[kind] == getattr(theirs, kind) > 0
    assert scores["words"] == sum(len(text.split()) for text in references)
    assert scores["normaliser"] == "case"


@pytest.mark.parametrize(
    "reference, answer, expected",
    [
        ("a b c", "a b c", (0, 0, 0, 3)),
        ("a b c", "a x c", (1, 0, 0, 3)),
        ("a b c", "a c", (0, 1, 0, 3)),
        ("a b c", "a b x c", (0, 0, 1, 3)),
        ("a b c", "", (0, 3, 0, 3)),
        ("", "a b", (0, 0, 2, 0)),
        ("", "", (0, 0, 0, 0)),
        ("GO DO YOU HEAR", "go do you hear", (0, 0, 0, 4)),
    ],
)
def test_each_kind_of_error_is_counted(reference, answer, expected):
    scores = evaluate.word_errors([reference], [answer], "case")
    kinds = ("substitutions", "deletions", "insertions", "words")
    assert tuple(scores[kind] for kind in kinds) == expected
    assert scores["wer"] == sum(expected[:3]) / max(expected[3], 1)


def test_the_rate_of_a_set_is_all_errors_over_all_words_not_a_mean_of_rates():
    scores = evaluate.word_errors(["a", "a b c d e f g h i"], ["b", "a b c d e f g h i"], "case")
    assert scores["wer"] == 1 / 10


NORMALISED = {
    "case": [
        ("Hello,  World!", "hello, world!"),
        ("DON'T\tSTOP", "don't stop"),
        ("twenty-one", "twenty-one"),
        ("", ""),
    ],
    "words": [
        ("Hello,  World!", "hello world"),
        ("Don't — stop", "don't stop"),
        ("It’s a twenty-one/two", "it's a twenty one two"),
        ("a_b (c) [d] \u00e9t\u00e9 5", "ab c d \u00e9t\u00e9 5"),
        ("...", ""),
    ],
    "conversation": [
        ("Uh, I [laughter] mean <noise> (cough) yes.", "i mean yes"),
        ("HMM mm-hm, umbrella", "umbrella"),
        ("er, uhm, ah, eh", ""),
        ("that's uh-huh fine", "that's huh fine"),
    ],
}


@pytest.mark.parametrize("name", NORMALISERS)
def test_normalisers_by_a_table_of_pairs(name):
    for text, expected in NORMALISED[name]:
        assert NORMALISERS[name](text) == expected, text
        assert NORMALISERS[name](expected) == expected, "not done in one go"
    assert evaluate.word_errors(["Uh, yes."], ["yes"], name)["wer"] == (
        {"case": 2 / 2, "words": 1 / 2, "conversation": 0}[name]
    )


# -------------------------------------------------------------------------------------------- BLEU


@pytest.mark.parametrize("language", ["de", "ja", "zh-cn"])
def test_bleu_is_that_of_sacrebleus_command_line(tmp_path, language):
    """Score and signature, on the columns of the answers file that we write."""
    texts = {
        "de": ("Das Haus, es ist groß.", "Das Haus, es ist gro\u00df!", "Sie geht nach Hause."),
        "ja": ("猫が好きです。", "猫は好きです。", "私は家に帰ります。"),
        "zh-cn": ("我喜欢猫。", "我喜欢狗。", "她回家了,很晚。"),
    }[language]
    references = [texts[0], texts[2], texts[0] + " " + texts[2], texts[2]]
    answers = [texts[1], texts[2], texts[0] + " " + texts[1], ""]
    ids = [*map(str, range(4))]
    evaluate.write_answers(tmp_path / "answers.tsv", TaskSet(ids, references, None), answers)
    lines = (tmp_path / "answers.tsv").read_text().splitlines()[1:]
    for name, column in (("reference", 1), ("answer", 2)):
        text = "".join(line.split("\t")[column] + "\n" for line in lines)
        (tmp_path / name).write_text(text)
    tokenizer = {"de": "13a", "ja": "char", "zh-cn": "zh"}[language]
    command = [sys.executable, "-m", "sacrebleu", "reference", "-i", "answer", "-m", "bleu",
               "--tokenize", tokenizer, "--width", "12"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout)
    ours = evaluate.bleu(references, answers, language)
    assert ours["bleu"] == pytest.approx(theirs["score"], abs=1e-9) and 20 < ours["bleu"] < 99
    assert ours["signature"] == theirs["signature"]
    assert f"tok:{tokenizer}|" in ours["signature"] and "case:mixed" in ours["signature"]


def test_case_and_punctuation_count_in_bleu():
    reference = ["Das ist ein großes Haus."]
    assert evaluate.bleu(reference, reference, "de")["bleu"] == pytest.approx(100)
    assert evaluate.bleu(reference, ["das ist ein großes haus."], "de")["bleu"] < 60


def test_several_languages_have_a_score_each_and_their_mean(monkeypatch):
    head = HeadConfig("attention", tags=("de", "ca", "tr"))
    references, tags = ["eins zwei drei vier", "u dos tres quatre", "eins zwei drei"], [0, 1, 0]
    answers = ["eins zwei drei vier", "nada", "eins zwei drei"]
    task_set = TaskSet(["a", "b", "c"], references, None, tags=tags)
    scores = evaluate.score("st", task_set, answers, head, "case")
    assert list(scores["by_language"]) == ["de", "ca"] and scores["examples"] == 3
    for language, chosen in (("de", [0, 2]), ("ca", [1])):
        alone = evaluate.bleu(
            *([its[i] for i in chosen] for its in (references, answers)), language
        )
        assert scores["by_language"][language] == alone
    values = [scores["by_language"][language]["bleu"] for language in ("de", "ca")]
    assert values[0] == pytest.approx(100) and scores["bleu"] == pytest.approx(sum(values) / 2)


# ------------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize(
    "references, answers, accuracy, f1",
    [
        ("1100", "1100", 1.0, 1.0),
        ("1100", "1010", 0.5, 0.5),
        ("1110", "1000", 0.5, 0.5),  # precision 1, recall 1/3
        ("0000", "0000", 1.0, 0.0),
        ("0001", "1110", 0.0, 0.0),
        ("1111", ["1", "", "", ""], 0.25, 0.4),  # what was not read is wrong
    ],
)
def test_accuracy_and_f1_by_hand(references, answers, accuracy, f1):
    scores = evaluate.label_scores(list(references), list(answers), "1")
    assert scores == {"accuracy": accuracy, "f1": pytest.approx(f1)}
    assert evaluate.label_scores(list(references), list(answers), None) == {"accuracy": accuracy}


def test_accuracy_and_f1_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for labels, positive in ((["0", "1"], "1"), (["entailment", "neutral", "x"], None)):
        for _ in range(5):
            references, answers = (rng.choice(labels, 50).tolist() for _ in range(2))
            scores = evaluate.label_scores(references, answers, positive)
            assert scores["accuracy"] == metrics.accuracy_score(references, answers)
            if positive:
                theirs = metrics.f1_score(references, answers, pos_label=positive)
                assert scores["f1"] == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("task", GLUE)
def test_f1_is_of_qqps_duplicates_and_of_no_other_task(task):
    labels = GLUE[task].labels
    task_set = TaskSet(["a", "b", "c"], [labels[0], labels[0], labels[1]], None)
    answers = [labels[0], labels[1], labels[1]]
    scores = evaluate.score(task, task_set, answers, HeadConfig("classifier"), "case")
    expected = {"examples": 3, "accuracy": 2 / 3}
    assert scores == (expected | {"f1": pytest.approx(2 / 3)} if task == "qqp" else expected)


# ----------------------------------------------------------------------------- text normalisation

BREAKFAST = [
    SpokenToken("PLAIN", "Breakfast", "<self>"),
    SpokenToken("PLAIN", "costs", "<self>"),
    SpokenToken("MONEY", "$40", "forty  dollars"),  # two spaces: no answer could have them
    SpokenToken("PUNCT", ".", "sil"),
]
RIGHT = NEXT.join((KEEP, KEEP, "forty dollars", SILENT))


def test_a_sentence_is_one_string_and_every_token_has_its_part():
    assert evaluate.sentence_target(BREAKFAST) == RIGHT == "<self>|<self>|forty dollars|<sil>"


@pytest.mark.parametrize(
    "answer, wrong",
    [
        (RIGHT, {}),
        ("<self> | <self>|forty  dollars |<sil>", {}),
        ("<self>|<self>|four dollars|<sil>", {"MONEY": 1}),
        ("<self>|costs|forty dollars|<self>", {"PUNCT": 1}),  # `costs` sounds like itself
        ("Breakfast|cost|forty dollars|<sil>", {"PLAIN": 1}),
        ("<self>|<self>|forty dollars", {"PLAIN": 2, "MONEY": 1, "PUNCT": 1}),  # a part is missing
        (RIGHT + "|<sil>", {"PLAIN": 2, "MONEY": 1, "PUNCT": 1}),
        ("", {"PLAIN": 2, "MONEY": 1, "PUNCT": 1}),
    ],
)
def test_errors_belong_to_tokens_and_their_classes(answer, wrong):
    scores = evaluate.normalisation_errors([BREAKFAST, BREAKFAST], [answer, RIGHT])
    assert scores["ser"] == bool(wrong) / 2 and scores["sentences"] == 2
    assert scores["token_error_rate"] == sum(wrong.values()) / 8
    counts = {"MONEY": 2, "PLAIN": 4, "PUNCT": 2}
    assert scores["wrong_by_class"] == {k: [wrong.get(k, 0), n] for k, n in counts.items()}


def test_a_token_whose_spoken_form_holds_the_separator_spoils_nothing():
    """It was an error of lengths that ended the evaluation."""
    sentence = [SpokenToken("VERBATIM", "|", "a | b"), SpokenToken("PLAIN", "x", "<self>")]
    assert evaluate.sentence_target(sentence) == "a b|<self>"
    assert evaluate.normalisation_errors([sentence], ["a b|<self>"])["ser"] == 0
    assert evaluate.normalisation_errors([sentence], ["a | b|<self>"])["ser"] == 1


def test_an_answer_is_read_out():
    written = [token.written for token in BREAKFAST]
    assert evaluate.read_out(written, RIGHT) == "Breakfast costs forty dollars"
    assert evaluate.read_out(written, "<self>|cost") == "Breakfast cost $40 ."
    assert evaluate.read_out(written, RIGHT + "|and more") == "Breakfast costs forty dollars"


def test_a_target_tokenizer_gives_back_what_it_was_trained_on():
    texts = [RIGHT, "<self>|Nineteen eighty four|<sil>|<sil>", "one|two|<self>"] * 20
    symbols = evaluate.NORMALISATION_SYMBOLS
    tokenizer = Tokenizer.train(texts, 60, "keep", symbols=symbols)
    for text in texts[:3]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode(RIGHT)
    assert sum(len(tokenizer.decode([i])) == len("<self>") for i in ids) == 2


# ----------------------------------------------------------------------------------- answer files


@pytest.fixture
def answered(tmp_path) -> tuple[Path, list[str]]:
    """A file of three answers, one of them empty, one with what would break a line."""
    ids, references = ["u1", "u2", "a\tb"], ["so it is", 'he said "no"', "x\ny"]
    path = tmp_path / "set.answers.tsv"
    evaluate.write_answers(path, TaskSet(ids, references, None), ['"quoted', "", "p\tq\r\nr\u2028"])
    return path, ids


def test_answers_come_back_as_they_were_written(answered):
    path, ids = answered
    assert path.read_text() == (
        "id\treference\tanswer\n"
        'u1\tso it is\t"quoted\n'
        'u2\the said "no"\t\n'
        "a b\tx y\tp q r\u2028\n"
    )
    assert evaluate.read_answers(path, ids) == ['"quoted', "", "p q r\u2028"]
    assert evaluate.read_answers(path, ids[::-1]) == ["p q r\u2028", "", '"quoted']
    windows = path.read_bytes().replace(b"\n", b"\r\n")
    path.write_bytes(windows)
    assert evaluate.read_answers(path, ids) == ['"quoted', "", "p q r\u2028"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda lines: [*lines[:2], *lines[3:]], "1 without an answer, the first is u2"),
        (lambda lines: lines[:1], "3 without an answer, the first is u1"),
        (lambda lines: [*lines, lines[1]], "answers.tsv:5: u1 is there twice"),
        (lambda lines: [*lines, "u9\tx\ty"], "u9 is not in the set that is scored"),
        (lambda lines: [*lines[:2], "u2\tno answer"], "answers.tsv:3: 2 cells; expected id, ref"),
        (lambda lines: [*lines, "u4\tx\ty\tz"], "answers.tsv:5: 4 cells"),
        (lambda lines: [*lines[:2], "", *lines[2:]], "answers.tsv:3: 1 cells"),
    ],
)
def test_a_file_of_answers_that_is_not_whole_is_refused(answered, change, message):
    path, ids = answered
    lines = path.read_text().removesuffix("\n").split("\n")
    path.write_text("".join(line + "\n" for line in change(lines)))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        evaluate.read_answers(path, ids)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_file_of_answers_that_cannot_be_read_is_named(answered, tmp_path):
    path, ids = answered
    path.write_bytes(path.read_bytes() + b"\xff")
    with pytest.raises(ValueError, match="answers.tsv: not UTF-8"):
        evaluate.read_answers(path, ids)
    with pytest.raises(FileNotFoundError, match="absent.tsv: no such file"):
        evaluate.read_answers(tmp_path / "absent.tsv", ids)


# ------------------------------------------------------------------------------------- submissions


def test_submissions_have_glues_names_header_and_counts(tmp_path):
    """Lines of the official files, header included (GLUE's own check)."""
    lines = {"MNLI-m.tsv": 9797, "MNLI-mm.tsv": 9848, "QNLI.tsv": 5464, "QQP.tsv": 390_966,
             "SST-2.tsv": 1822}  # fmt: skip
    assert {name: n + 1 for name, n in evaluate.SUBMISSIONS.values()} == lines
    assert evaluate.submission_of("mnli", [Path("MNLI/test_mismatched.tsv")])[0] == "MNLI-mm.tsv"
    said = evaluate.write_submission(tmp_path / "QNLI.tsv", 2, ["0", "1"], ["entailment", "x"])
    assert (tmp_path / "QNLI.tsv").read_text() == "index\tprediction\n0\tentailment\n1\tx\n"
    assert "2 predictions, as many as GLUE's server expects" in said
    said = evaluate.write_submission(tmp_path / "QNLI.tsv", 5463, ["0"], ["x"])
    assert "1 predictions, NOT the 5463 that GLUE's server expects" in said


@pytest.mark.parametrize("names", [["test_matched.tsv"], ["mine.tsv"], ["test.tsv", "more.tsv"]])
def test_a_file_without_labels_and_of_another_name_is_refused(names):
    with pytest.raises(ValueError, match="has no labels, and is not GLUE's test.tsv either"):
        evaluate.submission_of("qnli", [*map(Path, names)])


# ------------------------------------------------------------------------------------ reading sets


@pytest.fixture(scope="module")
def tokenizers(paths) -> TaskTokenizers:
    target = Tokenizer.train([" ".join(WORDS), *GERMAN.values()] * 20, 60, "keep")
    return TaskTokenizers(Tokenizer.load(paths["tokenizer"]), target)


LIMITS = {"max_audio_s": 30.0, "max_tokens": 512}


def test_pairs_are_cut_at_their_longest_text_and_never_below_their_marks(tokenizers):
    source = tokenizers.source
    long, short = " ".join(["ship"] * 30), "red cat"
    a, b = source.encode(long), source.encode(short)
    assert evaluate.pair_input([long, short], source) == [CLS_ID, *a, SEP_ID, *b, SEP_ID]
    cut = evaluate.pair_input([long, short], source, 20)
    assert cut == [CLS_ID, *a[: 17 - len(b)], SEP_ID, *b, SEP_ID] and len(cut) == 20
    assert evaluate.pair_input([short], source, 20) == [CLS_ID, *b, SEP_ID]
    assert evaluate.pair_input([long, short], source, 1) == [CLS_ID, SEP_ID, SEP_ID]


def test_ids_are_the_rows_own_or_their_place_where_those_are_missing_or_repeat(tmp_path):
    row = {"audio_filepath": "a.wav", "duration": 1, "text": "x"}
    ids = [{"id": "a"}, {"id": "b"}, {"id": "b"}, {}, {"id": 7}, {"id": ["a"]}]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row | its) + "\n" for its in ids))
    found = evaluate._ids_of(Manifest.read([path]))
    assert found == ["a", *(f"{path}:{line}" for line in range(2, 7))]


def test_files_with_the_same_ids_are_told_apart(paths, tokenizers):
    comma_list = f"{paths['sst2_dev']},{paths['sst2_dev']}"
    head = HeadConfig("classifier", labels=GLUE["sst2"].labels)
    task_set = evaluate.read_task_set("sst2", comma_list, tokenizers, head, **LIMITS)
    assert len(set(task_set.ids)) == 26 and task_set.ids[13] == "0#13"


def test_rows_to_train_on_need_a_text_and_for_ctc_frames_enough(paths, tokenizers, tmp_path):
    manifest = small_tasks.write_speech(tmp_path / "asr", 6, 1)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[0]["text"] = "  "
    rows[1]["text"] = " ".join(WORDS * 3)
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    short, long = "shorter than two encoder frames", "longer than --max-audio-s 1"

    def left_out(kind: str, augment: float | None) -> dict[str, int]:
        task_set = evaluate.read_task_set(
            "asr", str(manifest), tokenizers, HeadConfig(kind), augment=augment,
            max_audio_s=1.0, max_tokens=9,
        )  # fmt: skip
        assert (
            len(task_set.ids) == 7 == len(task_set.rows.kept) + sum(task_set.rows.left_out.values())
        )
        return task_set.rows.left_out

    lengths = Manifest.read([manifest]).durations
    n_long = int((lengths > 1).sum())
    assert 0 < n_long < 4 and lengths[0] < 1 and lengths[1] < 1
    assert left_out("ctc", None) == left_out("rnnt", None) == {short: 1, long: n_long}
    assert left_out("rnnt", 0.0) == {short: 1, long: n_long, "without text": 1}
    too_few = {"with fewer frames than CTC needs for the text": 1}
    assert left_out("ctc", 0.0) == {short: 1, long: n_long, "without text": 1} | too_few


@pytest.mark.parametrize(
    "change, message",
    [
        ({"target_lang": "fr"}, "rows.jsonl:2: translation into 'fr'; expected de,ca (--targets)"),
        ({"translation": None}, "rows.jsonl:2: translation into 'ca'"),
        ("no translation", "rows.jsonl:2: no translation; expected de,ca"),
    ],
)
def test_a_row_without_a_translation_into_the_targets_is_named(
    tmp_path, tokenizers, change, message
):
    manifest = small_tasks.write_speech(tmp_path / "st", 2, 1, ("de", "ca"))
    first, second, *rest = map(json.loads, manifest.read_text().splitlines())
    if isinstance(change, str):
        del second["translation"], second["target_lang"]
    else:
        second |= change
    manifest.write_text("".join(json.dumps(row) + "\n" for row in (first, second, *rest)))
    head = HeadConfig("attention", tags=("de", "ca"))
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate.read_task_set("st", str(manifest), tokenizers, head, **LIMITS)


def test_files_with_and_without_labels_are_not_mixed_nor_trained_on(paths, tokenizers):
    head = HeadConfig("classifier", labels=GLUE["qqp"].labels)
    dev, test = str(paths["qqp_dev"]), str(paths["qqp_test"])
    for files, augment in ((f"{dev},{test}", None), (test, 0.0)):
        with pytest.raises(ValueError, match="7 rows have no label; is it a test file"):
            evaluate.read_task_set("qqp", files, tokenizers, head, augment=augment, **LIMITS)
    assert set(evaluate.read_task_set("qqp", test, tokenizers, head, **LIMITS).references) == {""}


def test_what_spec_augment_hides_depends_on_seed_epoch_and_row_alone(paths, tokenizers):
    def collate(rows: list[int], epochs: list[int], seed: int = 3, augment: float | None = 1.0):
        task_set = evaluate.read_task_set(
            "asr", str(paths["asr"]), tokenizers, HEAD, seed=seed, augment=augment, **LIMITS
        )
        return task_set.rows.collate(np.array(rows), np.array(epochs), 130, 40)

    batch = collate([4, 1, 4], [0, 2, 1])
    again = collate([1, 4], [2, 0])
    for name in ("hidden_frames", "hidden_bins"):
        hidden = getattr(batch, name)
        assert torch.equal(hidden[[1, 0]], getattr(again, name))
        assert not torch.equal(hidden[0], hidden[2]), "the same in two epochs"
        other = getattr(collate([4, 1, 4], [0, 2, 1], seed=4), name)
        assert not torch.equal(hidden, other)
        assert not getattr(collate([4, 1], [0, 2], augment=0.01), name).all(1).any()
    inside = torch.arange(130) < batch.lens[:, None]
    assert batch.hidden_frames.any() and not (batch.hidden_frames & ~inside).any()
    for augment in (0.0, None):
        plain = collate([4, 1, 4], [0, 2, 1], augment=augment)
        assert plain.hidden_frames is None and plain.hidden_bins is None
        assert torch.equal(plain.features, batch.features), "features are hidden by the model"


# ------------------------------------------------------------------------------------- answering


class Echo(torch.nn.Module):
    """Answers a row of text by its first token after [CLS]; notes what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def decode(self, batch, width, length_penalty):
        self.asked += batch.tokens[:, 1].tolist()
        return [[int(token)] for token in batch.tokens[:, 1]]


class Numbers:
    """A tokenizer whose texts are numbers."""

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))


def numbered_set(lengths: list[int], max_tokens: int) -> TaskSet:
    inputs = [[CLS_ID, 100 + i, *[7] * (n - 2)] for i, n in enumerate(lengths)]
    rows = evaluate.TextTaskRows(inputs, targets=[[1]] * len(inputs), max_tokens=max_tokens)
    return TaskSet([f"r{i}" for i in range(len(inputs))], [""] * len(inputs), rows)


def test_token_rows_are_the_lists_they_were_made_of():
    lists = [[5, 2, 9], [], [70_000], [1, 1]]
    rows = evaluate.TokenRows(iter(lists))
    assert [row.tolist() for row in rows] == lists and rows.lens.tolist() == [3, 0, 1, 2]
    assert [rows[i].tolist() for i in np.array([3, 0])] == [lists[3], lists[0]]
    assert len(evaluate.TokenRows([])) == 0
    many = evaluate.TokenRows([[i] * 5 for i in range(10_000)])
    assert len(pickle.dumps(many)) < 10_000 * (5 * 4 + 2 * 8) + 1000  # arrays, no objects


def test_the_fingerprint_of_text_rows_is_that_of_older_checkpoints():
    """Their runs resume: it may not change with how tokens are held."""
    inputs = [[2, 5, 3], [2, 3]]
    labelled = evaluate.TextTaskRows(inputs, labels=[1, 0], max_tokens=9)
    written = evaluate.TextTaskRows(inputs, targets=[[7], []], max_tokens=9)
    assert (labelled.fingerprint, written.fingerprint) == ("3fc0a711195d2abc", "7adec614d02a49e8")


LENS = [5, 3, 9, 30, 4, 8, 2, 31, 6, 5, 7]  # two of them are too long


@pytest.mark.parametrize("units", [1, 12, 1000])
def test_every_row_is_answered_once_in_order_and_what_is_left_out_by_nothing(units):
    model, task_set = Echo(), numbered_set(LENS, 20)
    search = evaluate.Search(batch_units=units)
    answers = evaluate.answer_all(model, task_set, Numbers(), search, ALONE)
    assert answers == ["" if n > 20 else str(100 + i) for i, n in enumerate(LENS)]
    assert sorted(model.asked) == [100 + i for i, n in enumerate(LENS) if n <= 20]
    assert task_set.rows.left_out == {"longer than --max-tokens 20": 2}


class Together(training.Ranks):
    """Two ranks as two threads; what they exchange goes through lists."""

    barrier, slots = threading.Barrier(2), [None, None]

    def _exchange(self, own):
        self.slots[self.rank] = own
        self.barrier.wait(timeout=20)
        both = [*self.slots]
        self.barrier.wait(timeout=20)
        return both

    def sum(self, values):
        return sum(self._exchange(values.clone()))

    def union(self, own):
        first, second = self._exchange(dict(own))
        return {**first, **second}


def answer_on_two_ranks(model_of, task_set: TaskSet) -> list:
    """Each rank's answers, or the error that it met."""
    results: list = [None, None]

    def work(rank: int) -> None:
        ranks = Together(rank, rank, 2, torch.device("cpu"))
        search = evaluate.Search(batch_units=12)
        try:
            results[rank] = evaluate.answer_all(model_of(rank), task_set, Numbers(), search, ranks)
        except RuntimeError as error:
            results[rank] = str(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_ranks_share_the_rows_and_both_get_all_answers():
    """tests/test_finetune.py has the same under torchrun."""
    models, task_set = [Echo(), Echo()], numbered_set(LENS, 20)
    alone = evaluate.answer_all(Echo(), task_set, Numbers(), evaluate.Search(), ALONE)
    assert answer_on_two_ranks(lambda rank: models[rank], task_set) == [alone, alone]
    assert len(models[0].asked) + len(models[1].asked) == 9 and not (
        set(models[0].asked) & set(models[1].asked)
    )
    assert min(len(model.asked) for model in models) >= 3


def test_a_row_that_is_answered_twice_or_never_is_an_error(monkeypatch):
    """As a sampler would that gives a rank another's batch so that all have equally many."""
    held_out = data.HeldOut

    class Repeating(held_out):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.chosen.insert(1, self.chosen[0])

    class Forgetting(held_out):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.chosen.pop()

    for faulty in (Repeating, Forgetting):
        monkeypatch.setattr(data, "HeldOut", faulty)
        found = answer_on_two_ranks(lambda rank: Echo(), numbered_set(LENS, 20))
        assert found[0] == found[1] and re.fullmatch(r"\d+ answers to 9 rows", found[0]), found


# ------------------------------------------------------------------------------- cutting at pauses


def loud_with_pauses(seconds: float, pauses: list[tuple[float, float]]) -> np.ndarray:
    wave = 0.3 * np.random.default_rng(0).standard_normal(round(seconds * 16_000))
    for start, stop in pauses:
        wave[round(start * 16_000) : round(stop * 16_000)] *= 0.001
    return wave.astype(np.float32)


@pytest.mark.parametrize("seconds", [0.05, 0.9, 2.0, 2.01, 7.3, 33.0])
@pytest.mark.parametrize("max_s", [0.3, 2.0, 5.0])
def test_pieces_cover_a_file_without_gap_or_overlap_and_none_is_too_long(seconds, max_s):
    wave = loud_with_pauses(seconds, [])
    pieces = evaluate.cut_at_pauses(wave, max_s)
    assert pieces[0][0] == 0 and pieces[-1][1] == len(wave)
    assert all(a[1] == b[0] for a, b in zip(pieces, pieces[1:]))
    lengths = [stop - start for start, stop in pieces]
    assert 0 < min(lengths) and max(lengths) <= max_s * 16_000
    assert all(length >= max_s * 16_000 // 2 for length in lengths[:-1])
    assert (len(pieces) == 1) == (seconds <= max_s)


def test_cuts_fall_into_the_pauses():
    pauses = [(1.5, 1.75), (3.0, 3.3), (4.6, 4.85)]
    pieces = evaluate.cut_at_pauses(loud_with_pauses(6.0, pauses), 2.0)
    cuts = [stop / 16_000 for _, stop in pieces[:-1]]
    assert len(cuts) == 3
    for cut, (start, stop) in zip(cuts, pauses, strict=True):
        assert start + 0.07 < cut < stop - 0.07, "not in the middle of the pause"


# ----------------------------------------------------------------------------------- the program


def scores_of(folder: Path) -> dict:
    return json.loads((folder / "scores.json").read_text())


def test_a_run_is_scored_as_it_was_in_training(runs, paths):
    """evaluate.py and the held-out pass of finetune.py: the same answers, the same score."""
    run = runs("asr")
    printed = run_evaluate("--checkpoint", run, "--data", f"dev={paths['asr_dev']}")
    assert (run / "dev.answers.tsv").read_text().count("\n") == 7
    best = training.load_checkpoint(run / "ckpt" / "best.pt")
    scores = scores_of(run)
    assert scores["sets"]["dev"]["wer"] == best["dev"] < 0.9
    assert scores["task"] == "asr" and scores["beam"] == 1 and scores["versions"]["torch"]
    assert scores["sets"]["dev"]["examples"] == 6 and "mean" not in scores
    assert "dev: 1 not read, their answers are empty: shorter than two encoder frames" in printed
    lines = (run / "dev.answers.tsv").read_text().splitlines()
    short = next(line for line in lines if line.startswith("short\t"))
    assert (
        short.endswith("\t") and lines.index(short) == 4
    ), "a row that is not read keeps its place"


def test_what_was_learned_is_answered_by_greedy_search_and_by_beam(runs, paths, tmp_path):
    """The training set, known by heart; the row that cannot be heard is all that is wrong."""
    for beam in (1, 4):
        run_evaluate("--checkpoint", runs("asr"), "--data", paths["asr"], "--beam", beam,
                     "--out-dir", tmp_path, "--batch-s", 3)  # fmt: skip
        scores = scores_of(tmp_path)["sets"]["rows"]
        lines = (tmp_path / "rows.answers.tsv").read_text().splitlines()[1:]
        (short,) = [line for line in lines if line.startswith("short")]
        n = len(short.split("\t")[1].split())
        assert (scores["deletions"], scores["substitutions"], scores["insertions"]) == (n, 0, 0)
        assert scores_of(tmp_path)["beam"] == beam


def test_several_sets_have_a_name_a_normaliser_and_a_mean(runs, paths, tmp_path):
    """SpeechStew's way: one error rate a set, and the mean of the sets, not of the words."""
    printed = run_evaluate(
        "--task", "asr", "--checkpoint", runs("asr") / "ckpt" / "best.pt", "--out-dir", tmp_path,
        "--data", f"one={paths['asr']}@words", "--data", f"{paths['asr_dev']}@conversation",
        "--data", f"both={paths['asr']},{paths['asr_dev']}",
    )  # fmt: skip
    scores = scores_of(tmp_path)
    sets = scores["sets"]
    normalisers = {name: its["normaliser"] for name, its in sets.items()}
    assert normalisers == {"one": "words", "rows": "conversation", "both": "case"}
    assert scores["mean"] == {"wer": pytest.approx(np.mean([its["wer"] for its in sets.values()]))}
    assert sets["both"]["words"] == sets["one"]["words"] + sets["rows"]["words"]
    assert sets["one"]["wer"] != sets["rows"]["wer"]
    assert "mean of 3 sets" in printed
    for name in sets:
        lines = (tmp_path / f"{name}.answers.tsv").read_text().splitlines()
        assert len(lines) == 1 + sets[name]["examples"]


def test_a_file_of_answers_is_scored_without_decoding(runs, paths, tmp_path, monkeypatch):
    run = runs("asr")
    run_evaluate("--checkpoint", run, "--data", paths["asr"], "--out-dir", tmp_path)
    first, answers = scores_of(tmp_path), tmp_path / "rows.answers.tsv"
    monkeypatch.setattr(evaluate, "answer_all", None)
    again = ["--checkpoint", run, "--data", paths["asr"], "--out-dir", tmp_path / "again"]
    run_evaluate(*again, "--answers", answers)
    second = scores_of(tmp_path / "again")
    assert second["sets"] == first["sets"] and second["answers"] == str(answers)
    assert "beam" not in second and not (tmp_path / "again" / "rows.answers.tsv").exists()
    text = answers.read_text().replace("\tred", "\tred red", 1)
    answers.write_text(re.sub(r"(u0\t[^\t]*\t).*", r"\1nothing of the kind", text))
    run_evaluate(*again, "--answers", answers)
    assert scores_of(tmp_path / "again")["sets"]["rows"]["wer"] > first["sets"]["rows"]["wer"]


def test_scores_of_a_checkpoint_file_go_to_its_runs_folder(runs, paths):
    """Not among its checkpoints, where finetune.py keeps its own records."""
    run = runs("asr")
    before = {path.name for path in (run / "ckpt").iterdir()}
    run_evaluate("--checkpoint", run / "ckpt" / "best.pt", "--data", f"again={paths['asr_dev']}")
    assert {path.name for path in (run / "ckpt").iterdir()} == before
    assert "again" in scores_of(run)["sets"] and (run / "again.answers.tsv").exists()
    assert evaluate.folder_of_run(Path("elsewhere/my.pt")) == Path("elsewhere")


@pytest.mark.parametrize("task", ["mnli", "qnli", "qqp", "sst2"])
def test_a_test_file_becomes_a_submission_in_the_order_of_its_rows(runs, paths, tmp_path, task):
    run, path = runs(task), paths[f"{task}_test"]
    printed = run_evaluate("--checkpoint", run, "--data", path, "--out-dir", tmp_path)
    name = {"mnli": "MNLI-m", "qnli": "QNLI", "qqp": "QQP", "sst2": "SST-2"}[task] + ".tsv"
    header, *lines = (tmp_path / name).read_text().splitlines()
    assert header == "index\tprediction"
    assert [line.split("\t")[0] for line in lines] == [*map(str, range(7))]
    assert {line.split("\t")[1] for line in lines} <= set(GLUE[task].labels)
    assert f"{name}: 7 predictions, NOT the" in printed
    assert not (tmp_path / "scores.json").exists()
    odd = path.rename(path.with_name("odd.tsv"))
    try:
        with pytest.raises(SystemExit) as stopped, pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluate, "answer_all", None)  # it is said before anything is decoded
            run_evaluate("--checkpoint", run, "--data", odd, "--out-dir", tmp_path)
        assert stopped.value.code == 2
    finally:
        odd.rename(path)


def test_text_normalisation_is_scored_by_class(runs, paths, tmp_path):
    """The training set, known by heart for the most part."""
    run_evaluate("--checkpoint", runs("textnorm"), "--data", paths["textnorm"].parent,
                 "--out-dir", tmp_path)  # fmt: skip
    scores = scores_of(tmp_path)["sets"]["textnorm"]
    assert scores["ser"] < 0.3 and scores["sentences"] == scores["examples"] == 40
    by_class = scores["wrong_by_class"]
    assert set(by_class) == {"CARDINAL", "PLAIN", "PUNCT"}
    assert by_class["CARDINAL"][1] == by_class["PUNCT"][1] == 40
    n_wrong, n_tokens = (sum(its[i] for its in by_class.values()) for i in (0, 1))
    assert scores["token_error_rate"] == pytest.approx(n_wrong / n_tokens)


def test_translations_have_a_bleu_and_a_signature_for_each_language(runs, paths, tmp_path):
    run_evaluate("--checkpoint", runs("st"), "--data", paths["st_dev"], "--out-dir", tmp_path,
                 "--beam", 2)  # fmt: skip
    scores = scores_of(tmp_path)["sets"]["rows"]
    assert list(scores["by_language"]) == ["de", "ca"] and scores["examples"] == 9
    assert all(its["signature"].startswith("nrefs:1|") for its in scores["by_language"].values())


def test_audio_of_any_length_is_cut_at_pauses_and_joined_again(runs, tmp_path):
    """Eight words with pauses between them, and a model that hears 0.9 s at a time."""
    tuned = evaluate.load_fine_tuned(runs("asr"), ALONE.device)._replace(longest_s=0.9)
    rng, said = np.random.default_rng(1), "cat dog ship house red old cat ship".split()
    silence = 0.003 * rng.standard_normal(3200).astype(np.float32)
    pairs = [spoken(said[i : i + 2], rng) for i in range(0, 8, 2)]
    wave = np.concatenate([part for pair in pairs for part in (pair, silence)])
    soundfile.write(tmp_path / "long.flac", np.stack([wave, wave], 1), 16_000)
    pieces = evaluate.cut_at_pauses(wave, 0.9)
    assert len(pieces) == 4
    for _, stop in pieces[:-1]:
        middle = (stop / 16_000) % 0.6
        assert 0.4 < middle < 0.6, "not between two pairs of words"
    found = evaluate.transcribe(tuned, tmp_path / "long.flac", evaluate.Search())
    one_by_one = []
    for start, stop in pieces:
        soundfile.write(tmp_path / "part.flac", wave[start:stop], 16_000)
        one_by_one.append(evaluate.transcribe(tuned, tmp_path / "part.flac", evaluate.Search()))
    assert found == " ".join(one_by_one) and all(one_by_one)
    assert jiwer.process_words(" ".join(said), found).hits >= 4, found


def test_a_long_file_is_heard_as_well_as_its_clips(runs, paths, tmp_path):
    """It is cut as short as what the model was trained on, though --max-audio-s is 30 s."""
    tuned, rng = evaluate.load_fine_tuned(runs("asr"), ALONE.device), np.random.default_rng(3)
    rows = Manifest.read([paths["asr"]])
    assert tuned.longest_s == pytest.approx(rows.durations.max(), abs=0.03)
    clips = [rng.choice(WORDS, 4).tolist() for _ in range(8)]
    waves = [spoken(clip, rng) for clip in clips]
    silence = 0.003 * rng.standard_normal(8000).astype(np.float32)
    soundfile.write(tmp_path / "all.wav", np.concatenate([p for w in waves for p in (w, silence)]),
                    16_000)  # fmt: skip
    together = evaluate.transcribe(tuned, tmp_path / "all.wav", evaluate.Search())
    alone = []
    for wave in waves:
        soundfile.write(tmp_path / "one.wav", wave, 16_000)
        alone.append(evaluate.transcribe(tuned, tmp_path / "one.wav", evaluate.Search()))
    said = " ".join(word for clip in clips for word in clip)
    wers = [evaluate.word_errors([said], [text], "case")["wer"]
            for text in (together, " ".join(alone))]  # fmt: skip
    assert wers[0] <= wers[1] + 0.1, wers


def test_audio_that_is_too_short_is_an_error(runs, tmp_path, capsys):
    soundfile.write(tmp_path / "short.wav", np.zeros(400, np.float32), 16_000)
    arguments = ["--checkpoint", runs("asr"), "--audio", tmp_path / "short.wav"]
    printed = error_of(evaluate.main, capsys, arguments)
    assert "short.wav: 0.025 s of audio; expected at least" in printed


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The train, at 10:30a.m., is late.", "The train , at 10:30a.m. , is late ."),
        ("See www.x.org (or e.g. that)!", "See www.x.org ( or e.g. that ) !"),
        ("It costs $4.50 in 2012.", "It costs $4.50 in 2012 ."),
        ('He said: "yes".', 'He said : " yes " .'),
        ("", ""),
    ],
)
def test_a_sentence_is_parted_as_googles_files_are(text, expected):
    assert evaluate.written_tokens(text) == expected.split()


def test_audio_is_printed_with_its_name_and_the_target_is_chosen(runs, paths):
    wave = paths["st"].parent / "0.wav"
    lines = run_evaluate("--checkpoint", runs("asr"), "--audio", wave, wave).splitlines()
    assert len(lines) == 2 and lines[0] == lines[1] and lines[0].startswith(f"{wave}\t")
    printed = [
        run_evaluate("--checkpoint", runs("st"), "--audio", wave, "--target", target)
        for target in ("de", "ca")
    ]
    assert all(its.startswith(f"{wave}\t") for its in printed)
    assert run_evaluate("--checkpoint", runs("st"), "--audio", wave) == printed[0]


def test_text_is_answered(runs, paths):
    """What was learned: a `cat` makes a film good; and training sentences, read out."""
    sst2, textnorm = runs("sst2"), runs("textnorm")
    texts = ("ship house cat", "ship house dog")
    printed = run_evaluate("--checkpoint", sst2, "--text", texts[0], "--text", texts[1])
    assert printed == f"{texts[0]}\t1\n{texts[1]}\t0\n"
    right = 0
    for sentence in read_textnorm([paths["textnorm"]])[0][:10]:
        text = " ".join(token.written for token in sentence).replace(" .", ".")
        said = [token.written if token.spoken == "<self>" else token.spoken for token in sentence]
        printed = run_evaluate("--checkpoint", textnorm, "--text", text)
        right += printed == f"{text}\t{' '.join(said[:-1])}\n"
    assert right >= 7
    pair = "red cat\told dog"
    printed = run_evaluate("--checkpoint", runs("mnli"), "--text", pair)
    assert printed.startswith(f"{pair}\t") and printed.split("\t")[2].strip() in GLUE["mnli"].labels


def test_without_data_the_demos_test_set_is_scored(runs, demo_root, tmp_path, monkeypatch):
    """Its recognition set: the run is found by its task, and nothing of training is scored."""
    root = shutil.copytree(demo_root, tmp_path / "demo_data")
    shutil.copytree(runs("asr"), tmp_path / "runs" / "asr")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "make_demo", lambda root, **_: None)
    printed = run_evaluate("--task", "asr", "--demo-dir", root)
    assert printed.startswith("test: ")
    rows = json.loads((tmp_path / "runs/asr/scores.json").read_text())["sets"]["test"]
    assert rows["examples"] == len((root / "manifests/test.jsonl").read_text().splitlines())


def test_a_users_mistake_is_one_line_that_says_what_to_do(runs, paths, tmp_path, capsys):
    def error(task: str, *more: object) -> str:
        return error_of(evaluate.main, capsys, ["--checkpoint", runs(task), *more])

    dev, sst2 = paths["asr_dev"], paths["sst2_dev"]
    printed = error_of(evaluate.main, capsys, [])
    assert "give --checkpoint, or --task for the run in runs/TASK" in printed
    assert "--task st" in error("asr", "--task", "st", "--data", dev)
    assert "nowhere.jsonl: no such file" in error("asr", "--data", "nowhere.jsonl")
    assert "no normaliser 'loud'; there are case, words" in error("asr", "--data", f"{dev}@loud")
    assert "names no file" in error("asr", "--data", "name=@words")
    assert "two sets are named rows" in error("asr", "--data", dev, "--data", paths["asr"])
    two = ("--data", f"a={dev}", "--data", f"b={dev}")
    assert "--answers is scored against one --data" in error("asr", "--answers", "x.tsv", *two)
    assert "x.tsv: no such file" in error("asr", "--answers", "x.tsv", "--data", dev)
    assert "--audio: sst2 reads text, not speech" in error("sst2", "--audio", "a.wav")
    assert "--text: asr reads speech, not text" in error("asr", "--text", "a")
    assert "mnli reads 2, a tab between" in error("mnli", "--text", "one sentence")
    assert "a.wav: no such audio file" in error("asr", "--audio", "a.wav")
    assert "translates into de, ca" in error("st", "--target", "fr", "--data", dev)
    assert "no translation; expected de,ca" in error("st", "--data", dev)
    assert "no column 'sentence1'" in error("mnli", "--data", sst2)
    for flag in ("--beam", "--batch-s", "--batch-tokens"):
        assert f"{flag} 0" in error("asr", flag, 0, "--data", dev)
    assert "--length-penalty -1" in error("asr", "--length-penalty", -1, "--data", dev)


def test_what_is_no_fine_tuned_model_is_refused_by_name(runs, tmp_path, capsys):
    garbage, foreign = tmp_path / "garbage.pt", tmp_path / "foreign.pt"
    garbage.write_bytes(b"nothing of the kind")
    torch.save({"entry_point": "pretrain.py", "model": {}}, foreign)
    torch.save([1, 2], tmp_path / "list.pt")
    for path, message in (
        (garbage, "is the file whole"),
        (foreign, "is not a checkpoint of finetune.py but one of pretrain.py"),
        (tmp_path / "list.pt", "nothing of ours"),
        (tmp_path, "neither a checkpoint file nor a run's folder"),
    ):
        printed = error_of(evaluate.main, capsys, ["--checkpoint", path, "--text", "a"])
        assert str(path) in printed and message in printed


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a/b.jsonl", ("b", "a/b.jsonl", "case")),
        ("ami=a/b.jsonl@words", ("ami", "a/b.jsonl", "words")),
        ("a.jsonl,b.jsonl@words", ("a", "a.jsonl,b.jsonl", "words")),
        ("x=/data/user@host/c=d/b.jsonl", ("x", "/data/user@host/c=d/b.jsonl", "case")),
        ("/data/c=d/b.jsonl", ("b", "/data/c=d/b.jsonl", "case")),
        ("wsj=a=b.jsonl", ("wsj", "a=b.jsonl", "case")),
    ],
)
def test_a_set_is_named_by_its_flag_and_paths_may_hold_what_parts_it(text, expected):
    assert evaluate.parse_set(text, "case") == expected
