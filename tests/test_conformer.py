"""Properties of conformer.py: lengths, log-mel, padding that never matters, extraction."""

import dataclasses

import checks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks import apart, micro_config, ruffled

import conformer
import data
from conformer import (
    CLS_ID,
    N_MELS,
    SIZES,
    MaskedGroupNorm,
    SlamConfig,
    SlamEncoder,
    exact_div,
    join,
    log_mel,
    n_frames,
    subsampled_lens,
)
from pretrain import Objectives, SlamPretraining


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# -------------------------------------------------------------------------- constants and lengths


def test_exact_div_refuses_to_round():
    assert exact_div(1600, 4) == 400
    with pytest.raises(ValueError, match="7 is not divisible by 2"):
        exact_div(7, 2)


def test_time_constants_agree_with_each_other():
    assert conformer.HOP_SAMPLES * conformer.FRAMES_PER_S == conformer.SAMPLE_RATE == 16_000
    assert conformer.ENC_FRAMES_PER_S * conformer.SUBSAMPLING == conformer.FRAMES_PER_S == 100


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"d_model": 100}, "n_heads"),
        ({"d_model": 48, "n_heads": 4}, "norm_groups"),
        ({"n_codebooks": 3}, "n_codebooks"),
        ({"conv_kernel": 4}, "odd"),
        ({"codebook_init": "zeros"}, "codebook_init"),
    ],
)
def test_impossible_sizes_are_refused_by_name(changes, word):
    with pytest.raises(ValueError, match=word):
        SlamConfig(**changes)


def test_unknown_size_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="--size huge.*tiny, small, base, xl"):
        conformer.sized("huge")
    assert conformer.sized("tiny", n_codes=7) == dataclasses.replace(SIZES["tiny"], n_codes=7)


def test_n_frames_counts_whole_windows():
    for n in (0, 1, 399, 400, 401, 559, 560, 719, 720, 16_000, 16_081):
        windows = sum(1 for start in range(0, n, 160) if start + 400 <= n)
        assert n_frames(n) == windows
        assert n_frames(torch.tensor([n])).tolist() == n_frames(np.array([n])).tolist() == [windows]
        if windows:
            assert log_mel(torch.randn(n)).shape == (windows, N_MELS)


def test_subsampled_lens_is_the_length_that_the_convolutions_give():
    subsampling = conformer.ConvSubsampling(micro_config())
    frames = torch.arange(1, 65)
    for n in frames.tolist():
        out, lens = subsampling(torch.randn(1, n, N_MELS), torch.tensor([n]))
        assert out.shape[1] == subsampled_lens(n) == int(lens), n
    assert subsampled_lens(frames).tolist() == [subsampled_lens(n) for n in frames.tolist()]


def test_subsampled_padding_is_exactly_zero():
    checks.check_subsampled_padding_is_zero(conformer, micro_config())


# ---------------------------------------------------------------------------------------- log-mel


def kaldi_fbank(wave: np.ndarray) -> np.ndarray:
    """Kaldi's compute-fbank-feats, 80 bins, dither 0, float64, a frame and a filter at a time."""
    wave = np.asarray(wave, np.float64) * 32768
    window = np.array([(0.5 - 0.5 * np.cos(2 * np.pi * i / 399)) ** 0.85 for i in range(400)])

    def mel(hz):
        return 1127 * np.log(1 + hz / 700)

    step = (mel(8000) - mel(20)) / 81
    rows = []
    for start in range(0, len(wave) - 399, 160):
        frame = wave[start : start + 400] - wave[start : start + 400].mean()
        emphasised = np.array([frame[i] - 0.97 * frame[max(i - 1, 0)] for i in range(400)])
        spectrum = np.abs(np.fft.fft(emphasised * window, 512)) ** 2
        energies = []
        for bin_ in range(80):
            left = mel(20) + bin_ * step
            energy = 0.0
            for k in range(256):
                place = (
                    mel(k * 16000 / 512) - left
                ) / step  # 0 at the left edge, 1 at the centre, 2 at the right
                energy += max(0.0, min(place, 2 - place)) * spectrum[k]
            energies.append(np.log(max(energy, np.finfo(np.float32).eps)))
        rows.append(energies)
    return np.array(rows)


def test_log_mel_equals_a_slow_kaldi():
    rng = np.random.default_rng(0)
    t = np.arange(2000) / 16000
    wave = 0.3 * np.sin(2 * np.pi * 440 * t) + 0.05 * rng.standard_normal(2000) + 0.1
    ours = log_mel(torch.from_numpy(wave).float()).double().numpy()
    assert ours.shape == (11, 80)
    np.testing.assert_allclose(ours, kaldi_fbank(wave), atol=1e-3)


def test_log_mel_of_silence_is_the_floor_and_of_a_tone_peaks_at_the_tone():
    floor = float(np.log(np.finfo(np.float32).eps))
    assert torch.allclose(log_mel(torch.zeros(800)), torch.full((3, 80), floor))
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(16000) / 16000)
    centres = 700 * (
        np.exp((np.linspace(*(1127 * np.log1p(np.array([20, 8000]) / 700)), 82)[1:-1]) / 1127) - 1
    )
    assert set(log_mel(tone).argmax(1).tolist()) == {int(np.abs(centres - 1000).argmin())}
    louder = log_mel(tone) - log_mel(tone / 2)
    assert torch.allclose(louder[:, 20:40], torch.full((98, 20), float(np.log(4))), atol=1e-2)


def test_log_mel_of_a_batch_equals_singles():
    waves = 0.1 * torch.randn(3, 1234)
    together = log_mel(waves)
    for wave, features in zip(waves, together, strict=True):
        assert torch.allclose(log_mel(wave), features, atol=1e-5)


def test_log_mel_of_a_padded_batch_equals_each_row_alone_whatever_the_padding_holds():
    lens = torch.tensor([4000, 399, 400, 3999, 1234, 0])
    waves = 0.1 * torch.randn(6, 4000)
    waves[torch.arange(4000) >= lens[:, None]] = torch.nan
    together = log_mel(waves, lens)
    assert together.shape == (6, 23, N_MELS)
    for wave, features, n in zip(waves, together, lens.tolist(), strict=True):
        if n >= 400:
            assert torch.allclose(log_mel(wave[:n]), features[: n_frames(n)], atol=1e-5)
        assert not features[n_frames(n) :].any()


def test_log_mel_made_in_blocks_is_that_made_at_once(monkeypatch):
    wave = 0.1 * torch.randn(2, 160 * 40 + 399)
    monkeypatch.setattr(conformer, "CPU_FRAMES", 10**9)
    whole = log_mel(wave)
    for size in (1, 7, 20, 39, 40, 41):
        monkeypatch.setattr(conformer, "CPU_FRAMES", size)
        assert torch.allclose(log_mel(wave), whole, atol=1e-5), size


def test_log_mel_is_float32_under_autocast():
    wave = 0.1 * torch.randn(2, 1234)
    with torch.autocast("cpu", torch.bfloat16):
        inside = log_mel(wave)
    assert inside.dtype == torch.float32 and torch.equal(inside, log_mel(wave))


def test_log_mel_copies_nothing_from_the_host_after_its_first_call(monkeypatch):
    """On a device a copy would wait, and a CUDA graph could not hold it: tables are made once."""
    log_mel(torch.zeros(800))

    def refused(*args):
        raise AssertionError("a table was made again")

    monkeypatch.setattr(conformer, "_povey_window", refused)
    monkeypatch.setattr(conformer, "_mel_filters", refused)
    moves = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: moves.append(args))
    log_mel(torch.zeros(800))
    assert moves == []
    monkeypatch.undo()
    assert {table.device.type for table in conformer._tables(torch.device("meta"))} == {"meta"}


def test_mel_bands_leave_out_nothing_of_the_filters():
    filters = conformer._mel_filters(conformer.N_FFT)
    inside = torch.zeros_like(filters)
    for bins, mels in conformer._mel_bands():
        inside[bins, mels] += 1
    assert inside.max() == 1 and not filters[inside == 0].any()
    assert inside.mean() < 0.3


def test_log_mel_has_a_gradient():
    wave = (0.1 * torch.randn(720)).requires_grad_()
    log_mel(wave).sum().backward()
    step = torch.zeros(720)
    step[300] = 1e-3
    with torch.no_grad():
        change = (log_mel(wave + step).double() - log_mel(wave - step).double()).sum()
    assert wave.grad[300] == pytest.approx(float(change) / 2e-3, rel=0.05)


def test_log_mel_refuses_less_than_a_window():
    with pytest.raises(ValueError, match="399 samples is shorter"):
        log_mel(torch.zeros(399))


# ---------------------------------------------------------------------------------------- padding

PRECISIONS = {
    "tiny": (SIZES["tiny"], torch.float32, 1e-5),
    "small": (SIZES["small"], torch.float32, 1e-5),
    "deep": (micro_config(speech_layers=8, mm_layers=16), torch.float64, 1e-10),
}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", PRECISIONS)
def test_padding_does_not_change_speech(name, train):
    config, dtype, tolerance = PRECISIONS[name]
    checks.check_speech_ignores_padding(
        conformer, dataclasses.replace(config, dropout=0.0), dtype, tolerance, train
    )


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", PRECISIONS)
def test_padding_does_not_change_joined_pairs(name, train):
    config, dtype, tolerance = PRECISIONS[name]
    checks.check_pairs_ignore_padding(
        conformer, dataclasses.replace(config, dropout=0.0), dtype, tolerance, train
    )


@pytest.mark.parametrize("name", PRECISIONS)
def test_padding_does_not_change_blocks(name):
    config, dtype, tolerance = PRECISIONS[name]
    checks.check_stack_ignores_padding(
        conformer, dataclasses.replace(config, dropout=0.0), dtype, tolerance
    )


@torch.no_grad()
def test_padding_does_not_change_text():
    torch.manual_seed(0)
    encoder = ruffled(SlamEncoder(micro_config(), ("text",))).eval()
    lens, tokens = torch.tensor([9, 3, 1]), torch.randint(5, 40, (3, 9))
    together = encoder.multimodal(
        encoder.text(torch.cat([tokens, torch.randint(0, 40, (3, 5))], 1)), lens
    )
    for b, n in enumerate(lens.tolist()):
        alone = encoder.multimodal(encoder.text(tokens[b : b + 1, :n]), lens[b : b + 1])
        assert apart(together[b, :n], alone[0]) < 1e-5


def test_order_of_rows_does_not_matter():
    torch.manual_seed(0)
    stack = ruffled(conformer.ConformerStack(micro_config(), 3)).eval()
    x, lens, order = torch.randn(4, 11, 32), torch.tensor([11, 4, 7, 1]), torch.tensor([2, 0, 3, 1])
    out, shuffled = stack(x, lens), stack(x[order], lens[order])
    for place, b in enumerate(order.tolist()):
        assert apart(shuffled[place, : lens[b]], out[b, : lens[b]]) < 1e-5


@pytest.mark.parametrize("train", [False, True])
def test_a_row_of_padding_alone_is_finite_and_so_are_its_gradients(train):
    torch.manual_seed(0)
    encoder = ruffled(SlamEncoder(micro_config())).train(train)
    conv, lens = encoder.speech.subsample(torch.randn(2, 30, N_MELS), torch.tensor([30, 0]))
    _, states = encoder.speech.encode(conv, lens)
    joined, lens = join(
        states, lens, encoder.text(torch.zeros(2, 4, dtype=torch.int64)), torch.tensor([4, 0])
    )
    out = encoder.multimodal(joined, lens)
    assert torch.isfinite(out).all()
    out.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())


def test_joined_text_starts_right_after_the_last_valid_frame():
    speech = torch.arange(10.0).view(2, 5, 1)
    text = torch.arange(100.0, 106.0).view(2, 3, 1)
    joined, lens = join(speech, torch.tensor([2, 5]), text, torch.tensor([3, 1]))
    assert joined[..., 0].tolist() == [
        [0, 1, 100, 101, 102, 0, 0, 0],
        [5, 6, 7, 8, 9, 103, 0, 0],
    ]
    assert lens.tolist() == [5, 6]
    empty, lens = join(speech, torch.tensor([0, 5]), text, torch.tensor([2, 0]))
    assert empty[..., 0].tolist() == [[100, 101, 0, 0, 0, 0, 0, 0], [5, 6, 7, 8, 9, 0, 0, 0]]


# ------------------------------------------------------------------------------- parts of a block


def randomised_norm(n_groups: int, dim: int) -> MaskedGroupNorm:
    torch.manual_seed(0)
    return ruffled(MaskedGroupNorm(n_groups, dim)).requires_grad_(False)


def test_masked_group_norm_without_padding_is_group_norm():
    norm, x = randomised_norm(4, 32), torch.randn(3, 17, 32)
    ours = norm(x, torch.ones(3, 17, dtype=torch.bool))
    theirs = F.group_norm(x.transpose(1, 2), 4, norm.weight, norm.bias, eps=1e-3).transpose(1, 2)
    assert apart(ours, theirs) < 1e-5


@pytest.mark.parametrize("mean, tolerance", [(0.0, 1e-5), (1e3, 1e-3), (1e4, 1e-2)])
def test_masked_group_norm_equals_float64_where_the_mean_is_far_above_the_deviation(
    mean, tolerance
):
    """E[x^2] - E[x]^2 in float32 would be wrong in its first digit at a mean of 1000 deviations."""
    norm, x, lens = randomised_norm(4, 32), (mean + torch.randn(3, 40, 32)), [40, 13, 1]
    valid = torch.arange(40)[None] < torch.tensor(lens)[:, None]
    ours = norm(x, valid)
    for b, n in enumerate(lens):
        row = x[b : b + 1, :n].double().transpose(1, 2)
        exact = F.group_norm(row, 4, norm.weight.double(), norm.bias.double(), eps=1e-3).transpose(
            1, 2
        )
        assert apart(ours[b, :n].double(), exact[0]) < tolerance


def test_masked_group_norm_of_bf16_is_computed_in_float32():
    norm, x = randomised_norm(4, 32), (30 + torch.randn(2, 50, 32)).bfloat16()
    valid = torch.ones(2, 50, dtype=torch.bool)
    out = norm(x, valid)
    assert out.dtype == torch.bfloat16 and apart(out.float(), norm(x.float(), valid)) < 2e-2


@pytest.mark.parametrize("p_drop", [0.0, 0.3])
def test_attention_spelled_out_is_torchs(p_drop):
    """Values and gradients in float64; with dropout the mean over many draws."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 7, 4, dtype=torch.float64, requires_grad=True).unbind()
    keys = (torch.arange(7) < torch.tensor([7, 4])[:, None])[:, None, None]
    ours = conformer._attention(q, k, v, keys, 0.0)
    torchs = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
    assert apart(ours, torchs) < 1e-12
    pull = torch.randn_like(ours)
    for one, two in zip(*(torch.autograd.grad(o, (q, k, v), pull) for o in (ours, torchs))):
        assert apart(one, two) < 1e-12
    draws = torch.stack([conformer._attention(q, k, v, keys, p_drop) for _ in range(4000)])
    assert apart(draws.mean(0), torchs) < 0.1
    assert bool(draws.std(0).any()) == (p_drop > 0)


def test_a_block_in_bf16_is_near_itself_in_fp32_and_reads_no_padding():
    """On a CPU bf16 has an attention of its own."""
    torch.manual_seed(0)
    block, x = ruffled(conformer.ConformerBlock(micro_config())).eval(), torch.randn(2, 9, 32)
    valid = conformer.valid_mask(torch.tensor([9, 5]), 9)
    junk = torch.where(valid[..., None], x, 1e3)
    with torch.autocast("cpu", torch.bfloat16):
        in_bf16, with_junk = block(x, valid), block(junk, valid)
    assert torch.equal(in_bf16[valid], with_junk[valid])
    assert apart(in_bf16[valid].float(), block(x, valid)[valid]) < 5e-2


def test_the_second_half_of_the_pointwise_projection_is_the_gate():
    """As torch's GLU has it; Lingvo gates with the first half."""
    torch.manual_seed(0)
    config = micro_config()
    module, x = conformer.ConvModule(config).eval(), torch.randn(2, 9, 32)
    valid, seen = torch.ones(2, 9, dtype=torch.bool), []
    module.depthwise.register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].squeeze(-1).transpose(1, 2))
    )
    module(x, valid)
    value, gate = module.pointwise_in(module.norm(x)).chunk(2, dim=-1)
    assert torch.allclose(seen[0], value * gate.sigmoid(), atol=1e-6)
    assert not torch.allclose(seen[0], value.sigmoid() * gate, atol=1e-2)


def test_block_is_half_step_attention_convolution_half_step_norm():
    torch.manual_seed(0)
    block, x = ruffled(conformer.ConformerBlock(micro_config())).eval(), torch.randn(2, 9, 32)
    valid = torch.ones(2, 9, dtype=torch.bool)

    def feed_forward(ff, x):
        hidden = F.linear(
            F.layer_norm(x, (32,), ff.norm.weight, ff.norm.bias), ff.up.weight, ff.up.bias
        )
        return F.linear(hidden * hidden.sigmoid(), ff.down.weight, ff.down.bias)

    def attend(at, x):  # a head and a row at a time
        normed, rows = at.norm(x), []
        for row in normed:
            q, k, v = at.query(row), at.key(row), at.value(row)
            heads = [
                (q[:, h] @ k[:, h].T / 4.0).softmax(-1) @ v[:, h]
                for h in (slice(0, 16), slice(16, 32))
            ]
            rows.append(at.out(torch.cat(heads, 1)))
        return torch.stack(rows)

    def convolve(conv, x):
        x = conv.pointwise_in(conv.norm(x))
        x = x[..., :32] * x[..., 32:].sigmoid()
        kernel = conv.depthwise.weight[..., 0]  # (D, 1, K)
        x = F.conv1d(x.transpose(1, 2), kernel, padding=2, groups=32)
        x = F.group_norm(x, 8, conv.group_norm.weight, conv.group_norm.bias, 1e-3).transpose(1, 2)
        return conv.pointwise_out(x * x.sigmoid())

    y = x + 0.5 * feed_forward(block.ff_in, x)
    y = y + attend(block.attention, y)
    y = y + convolve(block.conv, y)
    y = block.norm(y + 0.5 * feed_forward(block.ff_out, y))
    assert apart(block(x, valid), y) < 1e-5


def test_sinusoids_hold_sines_then_cosines_of_geometric_rates():
    table = conformer.sinusoids(50, 8)
    rates = 10_000.0 ** (-torch.arange(4) / 3)
    for u in (0, 1, 49):
        assert torch.allclose(
            table[u], torch.cat([(u * rates).sin(), (u * rates).cos()]), atol=1e-5
        )


def test_closing_linear_comes_after_the_contrastive_context():
    torch.manual_seed(0)
    speech = conformer.SpeechEncoder(micro_config()).eval()
    conv, lens = speech.subsample(torch.randn(1, 40, N_MELS), torch.tensor([40]))
    layers = []
    context, output = speech.encode(conv, lens, layers)
    assert torch.equal(context, layers[-1]) and len(layers) == 2
    assert torch.equal(output, speech.closing(context))


def test_features_are_standardised_before_padding_is_zeroed():
    torch.manual_seed(0)
    speech = conformer.SpeechEncoder(micro_config()).eval()
    features, lens = 5 + 3 * torch.randn(2, 40, N_MELS), torch.tensor([40, 21])
    plain, _ = speech.subsample((features - 5) / 3, lens)
    speech.feature_mean.fill_(5.0)
    speech.feature_std.fill_(3.0)
    assert torch.allclose(speech.subsample(features, lens)[0], plain, atol=1e-5)


# ------------------------------------------------------------------------------------------ sizes


def millions(*modules) -> float:
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e6


def test_xl_has_the_papers_parameters():
    with torch.device("meta"):
        encoder = SlamEncoder(SIZES["xl"])
    stacks = (encoder.speech.stack, encoder.multimodal)
    assert sum(len(stack.blocks) for stack in stacks) == 24
    assert f"{millions(*stacks):.1f}" == "579.6"
    assert f"{millions(*stacks, encoder.text):.1f}" == "612.4"
    assert abs(millions(encoder.speech.stack) - 193.2) < 0.1
    assert abs(millions(encoder.multimodal) - 386.4) < 0.1


@pytest.mark.parametrize(
    "size, least, most", [("tiny", 1, 3), ("small", 20, 30), ("base", 90, 115), ("xl", 600, 660)]
)
def test_sizes_hold_what_they_say(size, least, most):
    with torch.device("meta"):
        assert least < millions(SlamPretraining(SIZES[size], Objectives())) < most


@torch.no_grad()
def test_every_parameter_changes_the_output():
    torch.manual_seed(0)
    encoder = ruffled(SlamEncoder(micro_config())).eval()
    features, frame_lens = torch.randn(1, 40, N_MELS), torch.tensor([40])
    tokens, token_lens = torch.arange(40)[None], torch.tensor([40])

    def run():
        conv, lens = encoder.speech.subsample(features, frame_lens)
        _, states = encoder.speech.encode(conv, lens)
        return encoder.multimodal(*join(states, lens, encoder.text(tokens), token_lens))

    before = run()
    for name, parameter in encoder.named_parameters():
        kept = parameter.clone()
        parameter += 0.3 * torch.randn_like(parameter)
        assert apart(run(), before) > 1e-4, f"{name} does not matter"
        parameter.copy_(kept)
    assert torch.equal(run(), before)


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    encoder = SlamEncoder(SIZES["tiny"])
    conv, lens = encoder.speech.subsample(torch.randn(2, 60, N_MELS), torch.tensor([60, 33]))
    _, states = encoder.speech.encode(conv, lens)
    text = encoder.text(torch.randint(0, SIZES["tiny"].vocab_size, (2, 9)))
    out = encoder.multimodal(*join(states, lens, text, torch.tensor([9, 4])))
    (out * torch.randn_like(out)).sum().backward()
    without = [
        n
        for n, p in encoder.named_parameters()
        if p.grad is None or not float(p.grad.abs().max()) > 0
    ]
    assert without == []


# ------------------------------------------------------------------- features out of a checkpoint

SENTENCES = ["the old cat sees a ship", "two dogs find the house", "a ship likes the red dog"] * 10


def write_checkpoint(path, modalities=("speech", "text"), tokenizer=None, **changes):
    """What pretrain.py saves, as far as the encoder reads it; and the model."""
    torch.manual_seed(0)
    config = micro_config(**({"vocab_size": tokenizer.vocab_size} if tokenizer else {}))
    model = SlamPretraining(
        config, Objectives(modalities, ("tlm", "stm") if len(modalities) == 2 else ())
    )
    stored = torch.tensor(list(tokenizer.model_bytes), dtype=torch.uint8) if tokenizer else None
    contents = {
        "model": model.state_dict(), "config": dataclasses.asdict(config),
        "modalities": list(modalities), "tokenizer": stored, "step": 3,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**contents, **changes}, path)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return data.Tokenizer.train(SENTENCES, 60)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("run")
    model = write_checkpoint(root / "ckpt" / "step_0000003.pt", tokenizer=tokenizer)
    model.encoder.speech.feature_mean.fill_(1.5)
    (root / "ckpt" / "latest").write_text("step_0000003.pt")
    return root, model.eval()


def test_a_run_folder_and_its_file_give_the_trained_encoder(run_dir):
    root, model = run_dir
    for path in (root, str(root), root / "ckpt" / "step_0000003.pt"):
        encoder = SlamEncoder.from_checkpoint(path)
        assert not encoder.training
        for name, parameter in model.encoder.named_parameters():
            assert torch.equal(encoder.get_parameter(name), parameter), name


def test_feature_normalisation_comes_with_the_checkpoint(tmp_path):
    model = write_checkpoint(tmp_path / "a.pt", ("speech",))
    weights = {**model.state_dict(), "encoder.speech.feature_mean": torch.full((N_MELS,), 4.0)}
    write_checkpoint(tmp_path / "a.pt", ("speech",), model=weights)
    assert float(SlamEncoder.from_checkpoint(tmp_path / "a.pt").speech.feature_mean.mean()) == 4.0


def test_extract_gives_every_layer_of_speech_text_and_pair(run_dir, tokenizer):
    encoder = SlamEncoder.from_checkpoint(run_dir[0])
    wave, sentence = 0.1 * torch.randn(8000), "the red cat"
    T, U, D = subsampled_lens(n_frames(8000)), 1 + len(tokenizer.encode(sentence)), 32
    speech, text = encoder.extract(waveform=wave), encoder.extract(text=sentence)
    pair = encoder.extract(waveform=wave, text=sentence)
    assert [tuple(x.shape) for x in speech] == [(T, D)] * 4
    assert [tuple(x.shape) for x in text] == [(U, D)] * 2
    assert [tuple(x.shape) for x in pair] == [(T, D)] * 2 + [(T + U, D)] * 2
    assert torch.equal(pair[0], speech[0]) and not torch.allclose(pair[-1][:T], speech[-1])

    tokens = torch.tensor([[CLS_ID, *tokenizer.encode(sentence)]])
    expected = encoder.multimodal(encoder.text(tokens), torch.tensor([U]))[0]
    assert apart(text[-1], expected.detach()) < 1e-6
    assert not any(x.requires_grad for x in speech + text + pair)


def test_extract_refuses_what_the_encoder_was_not_trained_for(tmp_path, run_dir, tokenizer):
    write_checkpoint(tmp_path / "speech.pt", ("speech",))
    write_checkpoint(tmp_path / "text.pt", ("text",), tokenizer)
    speech, text = (
        SlamEncoder.from_checkpoint(tmp_path / f"{name}.pt") for name in ("speech", "text")
    )
    assert (
        len(speech.extract(waveform=torch.zeros(800))) == 4 and len(text.extract(text="cat")) == 2
    )
    with pytest.raises(ValueError, match="--modalities speech: no text"):
        speech.extract(text="cat")
    with pytest.raises(ValueError, match="--modalities text: no speech"):
        text.extract(waveform=torch.zeros(800))
    with pytest.raises(ValueError, match="nothing to encode"):
        SlamEncoder.from_checkpoint(run_dir[0]).extract()
    with pytest.raises(ValueError, match="no tokenizer"):
        SlamEncoder(micro_config()).extract(text="cat")


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pt"):
        SlamEncoder.from_checkpoint(tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError, match="latest"):
        SlamEncoder.from_checkpoint(tmp_path)
    contents = {
        "weights.pt": {"weights": torch.zeros(1)},
        "tensor.pt": torch.zeros(2),
        "list.pt": ["model"],
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "noise.pt").write_bytes(b"not a checkpoint at all")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in [*contents, "noise.pt", "empty.pt"]:
        with pytest.raises(ValueError, match=name) as caught:
            SlamEncoder.from_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value), name


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"model": Trap(), "config": {}, "modalities": []}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match="trap.pt"):
        SlamEncoder.from_checkpoint(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()
