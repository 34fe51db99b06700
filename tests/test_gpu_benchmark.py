"""The benchmark of an accelerator goes through on a CPU, and says that this is no measurement."""

import json
import sys
from pathlib import Path

import pytest
import torch

# At the end: benchmarks/ has a data.py of its own.
sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import ddp  # noqa: E402
import gpu  # noqa: E402
import scaling  # noqa: E402
import steps  # noqa: E402

on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there it is a measurement")
SMALLEST = ["--size", "tiny", "--rows", "1", "--frames", "12", "--row-tokens", "12"]
SMALLEST += ["--rounds", "1", "--equal-steps", "2", "--threads", "1"]


@pytest.fixture
def torch_as_it_was():
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@on_a_cpu
def test_all_of_it_goes_through_on_a_cpu_and_says_what_it_is_not(tmp_path, capsys, torch_as_it_was):
    out = tmp_path / "gpu.json"
    argv = [*SMALLEST, "--modes", "none,graph", "--here", "--json", str(out)]
    assert gpu.main(argv) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[0] == printed[-1] == gpu.NOT_REAL
    figures = json.loads(out.read_text())
    assert figures["real_measurement"] is False and figures["warning"] == gpu.NOT_REAL
    parts = figures["parts"]
    assert {name.split("/")[0] for name in parts} == set(gpu.MAKERS)
    step = parts["steps/tiny/none"][0]
    assert {"ms", "MFU", "tokens/s", "audio h/h", "peak GiB", "set-up s", "recompiled"} <= set(step)
    assert step["ms"] > 0 and 0 < step["MFU"] < 1 and step["of datasheet"] == "not known"
    assert "no CUDA device" in parts["steps/tiny/graph"][0]["failed"]
    assert parts["equal/tiny"][0]["gradient"] == 0  # eager beside eager
    assert [row["rows"] for row in parts["largest/tiny/none"]] == [2, 4]
    assert parts["train/tiny/none"][0]["ms"] > 0
    assert "ms" in parts["peers/tiny"][0]  # ours; transformers may be missing


@on_a_cpu
def test_a_part_that_fails_or_takes_too_long_says_so():
    failed = gpu.in_a_process("steps/huge/none", SMALLEST, 60.0)
    assert [row["failed"] for row in failed] == ["ValueError: --size huge: unknown; choose one of "
                                                 "tiny, small, base, xl"]  # fmt: skip
    assert gpu.in_a_process("peak", SMALLEST, 0.1) == [{"failed": "stopped after 0 s"}]


def test_what_no_longer_fits_into_the_budget_is_skipped(capsys, tmp_path, torch_as_it_was):
    out = tmp_path / "gpu.json"
    argv = [*SMALLEST, "--parts", "peak", "--budget-s", "1", "--json", str(out)]
    assert gpu.main(argv) == 0
    assert "skipped: 1 s left" in json.loads(out.read_text())["parts"]["peak"][0]["failed"]


@pytest.mark.parametrize("name, flops", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12), ("NVIDIA H200 NVL", None),
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 PCIe", None), ("cpu", None),
])  # fmt: skip
def test_the_datasheet_of_a_device_is_known_by_its_name(name, flops):
    assert gpu.datasheet_flops(name) == flops


def test_the_exponent_of_a_power_is_that_power_and_noise_does_not_bend_it():
    sizes = [1.0, 2.0, 4.0, 8.0]
    for power in (0.0, 0.5, 1.0, 2.0):
        assert steps.exponent(sizes, [3 * n**power for n in sizes]) == pytest.approx(power)
    assert steps.exponent(sizes, [1.1, 1.8, 4.4, 7.2]) == pytest.approx(0.95, abs=0.05)
    # x + x^2 lies between the two, and nearer to 2 at the end
    values = [n + n**2 for n in sizes]
    assert 1 < steps.exponent(sizes, values) < steps.exponent(sizes[-2:], values[-2:]) < 2


@pytest.mark.parametrize("sizes, values", [([1, 1], [1, 2]), ([1], [1]), ([1, 2], [0, 1])])
def test_no_exponent_where_there_is_no_slope(sizes, values):
    with pytest.raises(ValueError, match="no slope"):
        steps.exponent(sizes, values)


def test_only_the_axis_doubles_and_a_case_is_found_by_its_name():
    for (stream, axis, checkpointing), cases in scaling.sweeps(3).items():
        sizes = [getattr(case, axis) for case in cases]
        assert [b / a for a, b in zip(sizes, sizes[1:])] == [2, 2, 2]
        others = {tuple(getattr(c, name) for name in scaling.AXES if name != axis) for c in cases}
        assert len(others) == 1
        assert all(scaling.Case.named(case.name) == case for case in cases)


def test_padding_is_the_share_that_was_asked_for():
    lens = steps.lens_of(8, 1000, 0.09)
    assert lens.max() == 1000 and 1 - lens.sum() / 8000 == pytest.approx(0.09, abs=1e-3)


def test_efficiency_is_1_where_two_processes_do_twice_the_work_in_the_same_time():
    taken = {ddp.ALONE: [1.0], ddp.ALONE_ALL: [2.0], ddp.UNREDUCED: [1.0]}
    taken |= {ddp.REDUCED["fp32"]: [1.25], ddp.REDUCED["bf16"]: [1.0]}
    rows = ddp.scaling_rows(taken, [{"tokens": 10.0, "audio_s": 5.0}] * 2)
    efficiency = {(row["scaling"], row["gradients"]): row["efficiency"] for row in rows}
    assert efficiency["weak", "all, bf16"] == efficiency["strong", "all, bf16"] == 1
    assert efficiency["weak", "all, fp32"] == efficiency["strong", "all, fp32"] == 0.8
    assert {row["tokens/s"] for row in rows if row["gradients"] == "all, bf16"} == {20.0}
    assert ddp.reduction_rows(taken)[0]["share of the step"] == pytest.approx(0.2)
