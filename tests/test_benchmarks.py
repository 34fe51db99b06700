"""The benchmarks' own arithmetic, and that they say what they miss; nobody's speed."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPTS = ["encoder", "targets", "step"]


@pytest.fixture(scope="module")
def load():
    """A file of benchmarks/ as a module, found as when it runs as a script."""
    sys.path.insert(0, str(FOLDER))

    def module(name: str):
        if name == "timing":
            return importlib.import_module("timing")
        spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return found

    yield module
    sys.path.remove(str(FOLDER))
    sys.modules.pop("timing", None)


@pytest.fixture(scope="module")
def timing(load):
    return load("timing")


# ------------------------------------------------------------------------------------------- times


def test_each_round_has_each_case_once_in_an_order_of_its_own(timing):
    called = []
    cases = {name: lambda name=name: called.append(name) for name in "abcde"}
    taken = timing.taking_turns(cases, rounds=6, warm_up=2, seed=3)
    assert called[:10] == [name for name in "abcde" for _ in range(2)]
    rounds = [tuple(called[10 + 5 * i : 15 + 5 * i]) for i in range(6)]
    assert len(called) == 40 and all(sorted(order) == list("abcde") for order in rounds)
    assert len(set(rounds)) > 1
    assert {name: len(times) for name, times in taken.items()} == dict.fromkeys("abcde", 6)

    first = list(called)
    called.clear()
    timing.taking_turns(cases, rounds=6, warm_up=2, seed=3)
    assert called == first
    called.clear()
    timing.taking_turns(cases, rounds=6, warm_up=2, seed=4)
    assert called != first


def test_the_warm_up_is_not_timed_and_a_slow_case_is_slow(timing):
    import time

    waits = iter([0.2, 0.01, 0.01])
    taken = timing.taking_turns({"x": lambda: time.sleep(next(waits))}, rounds=2, warm_up=1)
    assert all(0.01 <= seconds < 0.15 for seconds in taken["x"])


def test_a_brief_case_runs_once_more_before_its_clock_starts(timing):
    import time

    waits, slow = iter([0.0, 0.2, 0.01, 0.2, 0.01]), []
    cases = {"brief": lambda: time.sleep(next(waits)), "slow": lambda: slow.append(time.sleep(0.1))}
    taken = timing.taking_turns(cases, rounds=2, warm_up=1, brief_s=0.05)
    assert all(0.01 <= seconds < 0.15 for seconds in taken["brief"])
    assert len(slow) == 3, "a warm-up and two rounds"


def test_a_ratio_is_the_median_of_ratios_within_rounds(timing):
    """Of medians it would be 2 / 2 = 1: a neighbour slowed both down in the last round."""
    taken = {"reference": [1.0, 2.0, 10.0], ("fp32", "x"): [0.5, 4.0, 2.0]}
    assert timing.ratios(taken, "reference") == {"reference": 1.0, ("fp32", "x"): 0.5}
    assert timing.medians(taken) == {"reference": 2.0, ("fp32", "x"): 2.0}


def test_the_peak_is_the_faster_product_of_each_format(timing):
    flop = 2 * timing.PRODUCT**3
    seconds = {timing.DEFAULT: 2.0, timing.EQUAL: 1.0, timing.OWN: 4.0, timing.BF16: 0.5}
    taken = {(name, "product"): [s, s, 100.0] for name, s in seconds.items()}
    assert timing.peaks(taken) == {False: flop / 1.0, True: flop / 0.5}


# ---------------------------------------------------------------------------------------- products


def test_a_setting_is_put_back_after_an_error_too(timing):
    before = torch.get_float32_matmul_precision()
    other = "medium" if before != "medium" else "high"
    with pytest.raises(RuntimeError), timing.Setting(other).products():
        assert torch.get_float32_matmul_precision() == other
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == before


def test_the_own_choice_is_that_of_the_project_and_leaves_no_trace(timing, monkeypatch):
    before, asked = torch.get_float32_matmul_precision(), []

    def choose(choice, device):
        asked.append(choice)
        torch.set_float32_matmul_precision("high")
        return "high", ""

    monkeypatch.setattr(timing.fast, "choose_matmul", choose)
    timing.own_matmul.cache_clear()
    for _ in range(2):
        with timing.SETTINGS[timing.OWN].products():
            assert torch.get_float32_matmul_precision() == "high"
        assert torch.get_float32_matmul_precision() == before
    timing.own_matmul.cache_clear()
    assert asked == ["auto"]  # probed once


def test_autocast_is_on_where_the_setting_says_so(timing):
    x = torch.randn(4, 4)
    for name, setting in timing.SETTINGS.items():
        with setting.autocast():
            assert (x @ x).dtype == (torch.bfloat16 if name == timing.BF16 else torch.float32)


def test_the_error_of_a_product_tells_fp32_from_bf16(timing, monkeypatch):
    assert 0 < timing.product_error("highest") < 1e-5
    linear = timing.F.linear

    def rounded(a, b):
        return linear(a.bfloat16().to(a.dtype), b.bfloat16().to(b.dtype))

    narrow = argparse.Namespace(
        linear=lambda a, b: rounded(a, b) if a.dtype == torch.float32 else linear(a, b)
    )
    monkeypatch.setattr(timing, "F", narrow)
    assert timing.product_error("highest") > 1e-3


# ------------------------------------------------------------------------------------------ output


def test_a_table_is_aligned_and_has_three_digits(timing):
    rows = [{"case": "a", "ms": 1234.56, "x": 0.123456}, {"case": "longer", "ms": 2.0, "x": ""}]
    assert timing.table(rows).splitlines() == [
        "| case   | ms    | x     |",
        "|--------|-------|-------|",
        "| a      | 1,235 | 0.123 |",
        "| longer | 2     |       |",
    ]


def test_goals_are_judged_in_their_direction(timing):
    goals = [("a", 0.5, "<=", 0.55), ("b", 0.5, ">=", 0.67), ("c", 4.0, ">=", 4.0)]
    last = [line.split("|")[-2].strip() for line in timing.judged(goals).splitlines()[2:]]
    assert last == ["yes", "no", "yes"]


def test_json_names_the_machine(timing, tmp_path):
    timing.write_json(tmp_path / "a.json", {"figure": [1, 2]})
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["figure"] == [1, 2] and found["machine"]["torch"] == torch.__version__
    timing.write_json(None, {"figure": 1})


def test_a_process_of_its_own_gives_its_last_line(timing, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import json, sys\nprint('noise')\nprint(json.dumps(sys.argv[1:]))\n")
    assert timing.in_a_process(str(script), "a", 3) == ["a", "3"]


# ----------------------------------------------------------------------------------------- scripts


def script(name: str, *arguments: str, path: Path) -> subprocess.CompletedProcess:
    """Run a benchmark by itself, with a folder before all installed packages."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(path)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_missing_package_is_said_in_one_line(name, tmp_path):
    (tmp_path / "transformers.py").write_text("raise ImportError(\"No module named 'x'\\nmore\")\n")
    done = script(name, path=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    advice = "pip install -r benchmarks/requirements.txt"
    assert done.stderr == f"error: No module named 'x': {advice}\n"


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_command_lines_have_what_all_have(name, load, tmp_path, capsys):
    module = load(name)
    args = module.parse(["--rounds", "2", "--threads", "1", "--json", str(tmp_path / "a.json")])
    assert (args.rounds, args.threads, args.json) == (2, 1, tmp_path / "a.json")
    with pytest.raises(SystemExit) as left:
        module.parse(["--help"])
    assert left.value.code == 0 and "--json" in capsys.readouterr().out


def test_what_cannot_run_is_refused_before_it_is_measured(timing, tmp_path, capsys):
    threads = torch.get_num_threads()
    nowhere = tmp_path / "none" / "a.json"
    for rounds, where, said in ((0, None, "--rounds 0"), (1, nowhere, "there is no folder")):
        args = argparse.Namespace(rounds=rounds, threads=threads, json=where)
        assert not timing.ready(args)
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert timing.ready(argparse.Namespace(rounds=1, threads=threads, json=None), "json")


def test_flops_of_a_layer_are_those_counted_by_hand(load):
    encoder = load("encoder")
    small = encoder.Shape(8, 400, 256, 4, 5)
    assert encoder.model_flops(small, 1) == pytest.approx(32.9e9, rel=2e-3)
    assert encoder.model_flops(encoder.Shape(4, 800, 512, 8, 5), 2) == pytest.approx(
        263e9, rel=2e-3
    )


def test_flops_of_a_layer_are_those_torch_counts(load):
    """All but attention, which the counter does not see on a CPU, and the depthwise convolution."""
    from torch.utils.flop_counter import FlopCounterMode

    encoder = load("encoder")
    shape = encoder.Shape(2, 20, 64, 4, 5)
    B, T, D, _, K = shape
    stack = encoder.own_encoder(shape, 1)
    x = torch.randn(B, T, D, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        stack(x, torch.tensor([T, T])).sum().backward()
    products = sum(
        count for op, count in counter.get_flop_counts()["Global"].items() if "mm" in str(op)
    )
    attention, depthwise = 3 * 4 * B * T**2 * D, 3 * 2 * B * T * D * K
    assert products == encoder.model_flops(shape, 1) - attention - depthwise


def test_a_step_of_ours_trains(load, monkeypatch, timing):
    """The benchmark's step is one of training: weights move, codes count steps, text learns."""
    step = load("step")
    for name, value in {"D": 32, "LAYERS": 2, "HEADS": 2, "TEXTS": 4, "TOKENS": 16}.items():
        monkeypatch.setattr(step, name, value)
    for name, value in {"VOCABULARY": 50, "ROWS": 2, "SECONDS": 1, "RATE": 1e-2}.items():
        monkeypatch.setattr(step, name, value)
    run, setting = step.own_text(), timing.SETTINGS[timing.DEFAULT]
    found = [run(setting) for _ in range(12)]
    assert found[-1] < 0.9 * found[0]
    made = []
    own_model = step.own_model
    monkeypatch.setattr(step, "own_model", lambda *a: made.append(own_model(*a)) or made[0])
    run = step.own_speech(5, from_waveform=True)
    before = {name: p.detach().clone() for name, p in made[0].named_parameters()}
    for name in (timing.DEFAULT, timing.BF16):
        run(timing.SETTINGS[name])
    assert int(made[0].quantizer.step) == 2
    still = [name for name, p in made[0].named_parameters() if torch.equal(p, before[name])]
    assert still == []


def test_masks_of_the_text_batch_and_labels_agree(load):
    step = load("step")
    batch, labels = step.text_batch()
    text = batch.text
    assert (labels != -100).sum() == text.masked_weight.sum() > 0
    real = text.masked_weight > 0
    assert torch.equal(labels.flatten()[text.masked_index[real]], text.targets[real])


def test_the_peer_on_masked_frames_has_the_loss_of_the_peer_on_all(load):
    """Same codes and same negatives: what is left out had no share in the loss."""
    pytest.importorskip("transformers")
    import numpy as np

    targets = load("targets")
    shape = targets.Shape(2, 30, 2, 7, 8)
    inputs = targets.make_inputs(shape)
    whole, part = targets.Theirs(shape, inputs), targets.Theirs(shape, inputs, on_masked=True)
    np.random.seed(1)
    for_whole = whole.negatives()
    np.random.seed(1)
    for_part = part.negatives()
    vectors, perplexity = whole.ready
    of_masked = vectors[inputs.batch.masked][None], perplexity
    found, expected = part.loss(of_masked, for_part), whole.loss(whole.ready, for_whole)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert torch.equal(part.diversity(of_masked), whole.diversity(whole.ready))
