"""Numeric parity with third-party code: our numbers beside kaldi-native-fbank's and transformers'.

Whatever a public package computes as well is fed the same inputs, weights and random draws, and
compared. Where the method differs on purpose, the comparison goes up to the difference, and a note
under the check says what it is.

    python benchmarks/parity.py [--audio a.flac b.wav] [--json parity.json]

Prints one line a check. Exit code 1 when a difference exceeds its tolerance, 2 when packages or
files are missing.
Letters: B batch, T frames, L positions, D width, M masked frames, G codebooks, V codes,
         K negatives.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules

import conformer  # noqa: E402
import data  # noqa: E402
import losses  # noqa: E402
import quantizer  # noqa: E402
import training  # noqa: E402

Array = Tensor | np.ndarray | float

WIDTH = 59  # of the table's first column

# What `relative` may be. Arithmetic that differs by the order of its sums alone:
FP32, FP64 = 1e-5, 1e-12
LOG_MEL = 1e-4  # of log energies around 10 to 20
# Means over 2,000 random rows. Long rows: sampling error. Short ones: their spans begin only where
# they fit, which leaves the ends bare and the middle fuller; ours treat all positions alike.
MASK_LONG, MASK_SHORT = 0.02, 0.05


@dataclass(frozen=True)
class Check:
    """One comparison. `relative` is the largest difference over the RMS of their values."""

    name: str
    third_party: str
    max_abs: float
    relative: float
    tolerance: float  # of `relative`; 0: equal to the last bit
    note: str = ""

    @property
    def passed(self) -> bool:
        """False for NaN as well."""
        return self.relative <= self.tolerance


def compared(
    name: str, third_party: str, ours: Array, theirs: Array, tolerance: float, note: str = ""
) -> Check:
    """The Check of two tensors or of two numbers. Raises ValueError when their shapes differ."""
    a, b = (torch.as_tensor(x).detach().double() for x in (ours, theirs))
    if a.shape != b.shape:
        raise ValueError(f"{name}: ours has shape {tuple(a.shape)}, theirs {tuple(b.shape)}")
    max_abs, rms = (a - b).abs().max().item(), b.square().mean().sqrt().item()
    return Check(name, third_party, max_abs, max_abs / rms if rms else max_abs, tolerance, note)


def hugging(what: str) -> str:
    """The third-party column of a transformers function."""
    return f"transformers {version('transformers')} {what}"


# ----------------------------------------------------------------------------- log-mel


def signals(audio: list[Path]) -> list[tuple[str, np.ndarray]]:
    """What the log-mel checks hear: names and (N,) float32 in [-1, 1].

    Noise fills all bins, a voice leaves many nearly empty. Raises ValueError, FileNotFoundError.
    """
    rng = np.random.default_rng(0)
    seconds = np.arange(3 * conformer.SAMPLE_RATE) / conformer.SAMPLE_RATE
    noise = rng.standard_normal(len(seconds))
    pitch = 120 + 20 * np.sin(2 * np.pi * 0.7 * seconds)
    phase = 2 * np.pi * np.cumsum(pitch) / conformer.SAMPLE_RATE
    voice = sum(np.sin(k * phase) / k for k in range(1, 40)) + 1e-3 * noise  # up to 5 kHz
    made = {"noise": 0.1 * noise, "faint noise": 1e-4 * noise, "voice": 0.2 * voice}
    made["silence"] = 0 * noise
    found = [(name, wave.astype(np.float32)) for name, wave in made.items()]
    for path in audio:
        wave = data.read_audio(path)
        if len(wave) < conformer.WINDOW_SAMPLES:
            raise ValueError(f"{path}: {len(wave)} samples are less than one 25 ms window")
        found.append((path.name, wave))
    return found


def kaldi_fbank(wave: np.ndarray) -> Tensor:
    """(N,) float32 -> (F, 80) by Kaldi's C++ code, dither 0."""
    import kaldi_native_fbank as knf

    options = knf.FbankOptions()
    options.frame_opts.dither = 0.0
    options.mel_opts.num_bins = conformer.N_MELS
    fbank = knf.OnlineFbank(options)
    fbank.accept_waveform(conformer.SAMPLE_RATE, (wave * 32768).tolist())
    fbank.input_finished()
    return torch.from_numpy(np.stack([fbank.get_frame(i) for i in range(fbank.num_frames_ready)]))


def check_log_mel(heard: list[tuple[str, np.ndarray]]) -> Iterator[Check]:
    """Each signal against three implementations, which differ among each other too."""
    from transformers import SeamlessM4TFeatureExtractor, Speech2TextFeatureExtractor

    seamless, speech2text = SeamlessM4TFeatureExtractor(), Speech2TextFeatureExtractor()
    path = "numpy" if hasattr(speech2text, "mel_filters") else "torchaudio"
    kaldi = f"kaldi-native-fbank {version('kaldi-native-fbank')} OnlineFbank"
    for name, wave in heard:
        ours, by_kaldi = conformer.log_mel(torch.from_numpy(wave)), kaldi_fbank(wave)
        by_seamless = torch.from_numpy(seamless._extract_fbank_features(wave))
        by_speech2text = torch.from_numpy(np.asarray(speech2text._extract_fbank_features(wave)))
        yield compared(f"log-mel, {name}", kaldi, ours, by_kaldi, LOG_MEL)
        own = (by_kaldi - by_seamless).abs().max().item()
        note = f"theirs and Kaldi's differ by {own:.1e}"
        theirs = hugging("SeamlessM4TFeatureExtractor")
        yield compared(f"log-mel, {name}", theirs, ours, by_seamless, LOG_MEL, note)
        theirs = hugging(f"Speech2TextFeatureExtractor ({path})")
        yield compared(f"log-mel, {name}", theirs, ours, by_speech2text, LOG_MEL)


# ----------------------------------------------------------------------------- Conformer block


def copied_blocks(dtype: torch.dtype) -> tuple[conformer.ConformerBlock, nn.Module]:
    """Our block and theirs with the same random weights.

    Theirs has a key bias, which changes no softmax: zero. Ours has biases on the pointwise
    convolutions: zero. Their BatchNorm is replaced by torch's GroupNorm, 32 groups, our eps.
    """
    from transformers import Wav2Vec2ConformerConfig
    from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer as hf

    D, D_ff, H, kernel = 256, 1024, 4, 5
    ours = conformer.ConformerBlock(
        conformer.SlamConfig(d_model=D, d_ff=D_ff, n_heads=H, conv_kernel=kernel, dropout=0.0)
    )
    config = Wav2Vec2ConformerConfig(
        hidden_size=D, intermediate_size=D_ff, num_attention_heads=H, hidden_act="swish",
        conv_depthwise_kernel_size=kernel, position_embeddings_type=None,
        attn_implementation="eager", hidden_dropout=0.0, activation_dropout=0.0,
        attention_dropout=0.0, conformer_conv_dropout=0.0,
    )  # fmt: skip
    theirs = hf.Wav2Vec2ConformerEncoderLayer(config)
    theirs.conv_module.batch_norm = nn.GroupNorm(32, D, eps=1e-3)
    for p in ours.parameters():  # biases and norms too: at 0 and 1 they would hide a mistake
        if p.dim() < 2:
            nn.init.normal_(p, mean=p.mean().item(), std=0.2)
    pairs = {
        "ff_in.norm": "ffn1_layer_norm",
        "ff_in.up": "ffn1.intermediate_dense",
        "ff_in.down": "ffn1.output_dense",
        "attention.norm": "self_attn_layer_norm",
        "attention.query": "self_attn.linear_q",
        "attention.key": "self_attn.linear_k",
        "attention.value": "self_attn.linear_v",
        "attention.out": "self_attn.linear_out",
        "conv.norm": "conv_module.layer_norm",
        "conv.pointwise_in": "conv_module.pointwise_conv1",
        "conv.depthwise": "conv_module.depthwise_conv",
        "conv.group_norm": "conv_module.batch_norm",
        "conv.pointwise_out": "conv_module.pointwise_conv2",
        "ff_out.norm": "ffn2_layer_norm",
        "ff_out.up": "ffn2.intermediate_dense",
        "ff_out.down": "ffn2.output_dense",
        "norm": "final_layer_norm",
    }
    left = {name for name, _ in ours.named_parameters()}
    with torch.no_grad():
        for mine, other in pairs.items():
            source, target = ours.get_submodule(mine), theirs.get_submodule(other)
            # Convolutions have one or two more dimensions of size 1 than linears.
            target.weight.copy_(source.weight.view(target.weight.shape))
            left -= {f"{mine}.weight", f"{mine}.bias"}
            if target.bias is None and source.bias is not None:
                source.bias.zero_()
            elif target.bias is not None:
                target.bias.copy_(0 if source.bias is None else source.bias)
    if left:
        raise ValueError(f"weights that were not copied: {sorted(left)}")
    return ours.to(dtype).eval(), theirs.to(dtype).eval()


def check_conformer() -> Iterator[Check]:
    """Feed-forward, attention, convolution; the block and its gradient; padded against alone."""
    layer = hugging("Wav2Vec2ConformerEncoderLayer")
    for dtype, label, allowed in ((torch.float32, "fp32", FP32), (torch.float64, "fp64", FP64)):
        torch.manual_seed(1)
        ours, theirs = copied_blocks(dtype)
        B, L, D = 3, 57, ours.norm.weight.shape[0]
        x = torch.randn(B, L, D, dtype=dtype)
        lens = torch.tensor([57, 40, 9])
        padded, full = conformer.valid_mask(lens, L), torch.ones(B, L, dtype=torch.bool)

        ff = theirs.ffn1(theirs.ffn1_layer_norm(x))
        yield compared(f"feed-forward, {label}", f"{layer}.ffn1", ours.ff_in(x), ff, allowed)

        bias = torch.zeros(B, 1, 1, L, dtype=dtype).masked_fill(~padded[:, None, None], -torch.inf)
        attended, _ = theirs.self_attn(theirs.self_attn_layer_norm(x), attention_mask=bias)
        mine = ours.attention(x, padded)
        note = "keys masked beyond 57, 40 and 9 positions; their key bias is zero"
        name = f"{layer}.self_attn"
        yield compared(f"attention, {label}", name, mine, attended, allowed, note)

        seen: dict[str, Tensor] = {}  # what enters the norms
        norms = {"ours": ours.conv.group_norm, "theirs": theirs.conv_module.batch_norm}
        hooks = [
            norm.register_forward_pre_hook(
                lambda _, args, whose=whose, seen=seen: seen.update({whose: args[0]})
            )
            for whose, norm in norms.items()
        ]
        mine, other = ours.conv(x, full), theirs.conv_module(x)
        for hook in hooks:
            hook.remove()
        note = "pointwise, GLU (the second half gates), depthwise"
        name, up_to = f"{layer}.conv_module", seen["theirs"].transpose(1, 2)
        check = f"convolution up to the norm, {label}"
        yield compared(check, name, seen["ours"], up_to, allowed, note)
        note = "their BatchNorm replaced by torch's GroupNorm(32, eps 1e-3)"
        yield compared(f"convolution, {label}", name, mine, other, allowed, note)

        own_x, other_x = x.clone().requires_grad_(), x.clone().requires_grad_()
        mine, other = ours(own_x, full), theirs(other_x)
        yield compared(f"block, {label}", layer, mine, other, allowed, note)
        upstream = torch.randn_like(x)
        mine.backward(upstream)
        other.backward(upstream)
        check = f"block, input gradient, {label}"
        yield compared(check, layer, own_x.grad, other_x.grad, allowed, note)

        junk = torch.where(padded[..., None], x, torch.full_like(x, 1e3))
        alone = [theirs(x[b : b + 1, :n])[0] for b, n in enumerate(lens.tolist())]
        mine = ours(junk, padded)[padded]  # (57 + 40 + 9, D)
        note = "ours in one batch, padding filled with 1e3; theirs one row at a time"
        yield compared(f"block, padded, {label}", layer, mine, torch.cat(alone), allowed, note)


# ----------------------------------------------------------------------------- quantizer


def check_quantizer(G: int, V: int, code_dim: int) -> Iterator[Check]:
    """Codes, vectors, perplexities, gradients: same weights and, in training, the same noise."""
    from transformers import Wav2Vec2Config
    from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2GumbelVectorQuantizer

    torch.manual_seed(2)
    B, T, C = 2, 40, 64
    ours = quantizer.GumbelQuantizer(C, G, V, code_dim, (2.0, 0.999995, 0.1))
    nn.init.normal_(
        ours.logits.weight, std=0.3
    )  # logits of the noise's size: neither decides alone
    nn.init.normal_(ours.logits.bias)
    theirs = Wav2Vec2GumbelVectorQuantizer(
        Wav2Vec2Config(
            conv_dim=(C,), conv_kernel=(3,), conv_stride=(2,), num_feat_extract_layers=1,
            num_codevector_groups=G, num_codevectors_per_group=V, codevector_dim=code_dim,
        )
    )  # fmt: skip
    with torch.no_grad():
        theirs.codevectors.copy_(ours.codebook.reshape(theirs.codevectors.shape))
        theirs.weight_proj.weight.copy_(ours.logits.weight)
        theirs.weight_proj.bias.copy_(ours.logits.bias)
    features = torch.randn(B, T, C)
    normed = ours.norm(
        features
    ).detach()  # theirs has no LayerNorm of its own, but in its front end
    weight = conformer.valid_mask(torch.tensor([T, 25]), T)
    rows = ours.codebook.detach()

    def codes(vectors: Tensor) -> Tensor:
        """(B, T, code_dim) -> (M, G): which codebook row each vector is."""
        parts = vectors.detach().view(B * T, G, -1).transpose(0, 1)  # (G, M, code_dim/G)
        return torch.cdist(parts, rows).argmin(-1).T

    def their_noise(logits: Tensor) -> Tensor:
        """As torch's gumbel_softmax draws it, so that one seed gives both the same."""
        return -torch.empty_like(logits).exponential_().log()

    name, size = hugging("Wav2Vec2GumbelVectorQuantizer"), f"{G} x {V}"
    for mode in ("eval", "train"):
        ours.train(mode == "train")
        theirs.train(mode == "train")
        torch.manual_seed(3)
        with mock.patch.object(quantizer, "gumbel_like", their_noise):
            mine = ours(features.view(B * T, C), weight.flatten().float())
        torch.manual_seed(3)
        vectors, perplexity = theirs(normed, weight)
        label = f"quantizer {size}, {mode}"
        moved = int((mine.drawn != mine.ids).sum())
        note = f"same noise, temperature 2; it moved {moved} of {mine.ids.numel()} codes"
        note = note if mode == "train" else ""
        yield compared(f"{label}, codes", name, mine.drawn, codes(vectors), 0.0, note)
        yield compared(f"{label}, vectors", name, mine.vectors.view(B, T, -1), vectors, FP32)
        if mode == "eval":
            share = mine.hard_counts / mine.hard_counts.sum(-1, keepdim=True)
            own = quantizer.perplexity(share).sum()
            note = "hard, over frames of weight 1; without a mask theirs averages over all frames"
        else:
            own = mine.soft_perplexity
            note = "soft, without noise; in eval our diversity loss stays soft, theirs turns hard"
        note = f"{float(own.detach()):.3f} of {G * V}; {note}"
        yield compared(f"{label}, perplexity", name, own, perplexity, FP32, note)
    upstream = torch.randn(B, T, code_dim)
    ((mine.vectors.view(B, T, -1) * upstream).sum() + mine.soft_perplexity).backward()
    ((vectors * upstream).sum() + perplexity).backward()
    note = "straight-through and diversity together"
    check = f"quantizer {size}, gradient of the logits' weight"
    own, other = ours.logits.weight.grad, theirs.weight_proj.weight.grad
    yield compared(check, name, own, other, FP32, note)
    check = f"quantizer {size}, gradient of the codebook"
    own, other = ours.codebook.grad, theirs.codevectors.grad.view(ours.codebook.shape)
    yield compared(check, name, own, other, FP32)


# ----------------------------------------------------------------------------- contrastive loss


def check_contrastive() -> Iterator[Check]:
    """Sum and gradients on codebook rows with the same negatives, equal ones among them."""
    from transformers import Wav2Vec2ForPreTraining

    torch.manual_seed(4)
    B, m, D, V = 4, 30, 64, 12
    M = B * m
    codes = torch.randint(V, (M, 1))
    codes[-m:] = 5  # the last utterance has collapsed: each negative equals its positive
    negatives, usable = losses.sample_negatives(torch.ones(B, m), losses.N_NEGATIVES)
    codes[1] = codes[0]
    negatives[0, 0, 0] = 1  # one equal negative by hand, whatever the draw brought
    codebook = torch.randn(V, D)
    context, target = torch.randn(M, D), codebook[codes[:, 0]]
    inputs = [x.clone().requires_grad_() for x in (context, target, context, target)]

    mine = losses.contrastive(inputs[0], inputs[1], negatives, usable, codes)
    context, target = inputs[2:]
    flat = (negatives + m * torch.arange(B)[:, None, None]).flatten(0, 1)  # (M, K)
    others = target[flat].transpose(0, 1)  # (K, M, D)
    logits = Wav2Vec2ForPreTraining.compute_contrastive_logits(
        target[None], others, context, losses.CONTRASTIVE_TEMPERATURE
    )  # (1 + K, M)
    equal = (target == others).all(-1)
    # As their forward does it in place:
    logits = torch.cat([logits[:1], logits[1:].masked_fill(equal, -torch.inf)])
    theirs = F.cross_entropy(logits.T, torch.zeros(M, dtype=torch.int64), reduction="sum")
    mine.sum.backward()
    theirs.backward()
    name = hugging("compute_contrastive_logits + cross-entropy")
    note = (
        f"{mine.sum.item():.3f}; {int(equal.sum())} of {equal.numel()} negatives are equal (theirs "
        f"compares vectors, ours codes); ours counts {int(mine.count)} of {M} frames: not those of "
        "the collapsed utterance, whose loss is 0"
    )
    yield compared("contrastive, sum", name, mine.sum, theirs, FP32, note)
    yield compared("contrastive, context gradient", name, inputs[0].grad, inputs[2].grad, FP32)
    yield compared("contrastive, target gradient", name, inputs[1].grad, inputs[3].grad, FP32)


def check_wav2vec2() -> Iterator[Check]:
    """Contrastive and diversity sums of a whole wav2vec 2.0 that trains, from its own states."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining
    from transformers.models.wav2vec2 import modeling_wav2vec2 as hf

    torch.manual_seed(5)
    np.random.seed(5)  # theirs draws from numpy's global state
    G, V = 2, 8
    model = Wav2Vec2ForPreTraining(
        Wav2Vec2Config(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
            conv_dim=(32, 32), conv_kernel=(10, 8), conv_stride=(8, 8), num_feat_extract_layers=2,
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, layerdrop=0.0,
            num_codevector_groups=G, num_codevectors_per_group=V, codevector_dim=32,
            proj_codevector_dim=32,
        )
    )  # fmt: skip
    nn.init.uniform_(model.quantizer.codevectors)
    model.train()
    wave = torch.randn(3, 16_000)
    B, T = 3, int(model._get_feat_extract_output_lengths(16_000))
    masked = hf._compute_mask_indices((B, T), 0.65, 10, min_masks=2)
    sampled = hf._sample_negative_indices((B, T), losses.N_NEGATIVES, masked)
    sampled, masked = (
        torch.from_numpy(sampled).long(),
        torch.from_numpy(masked),
    )  # (B, T, K), (B, T)
    caught: list[Tensor] = []
    hook = model.quantizer.register_forward_hook(lambda _, __, out: caught.append(out[0].detach()))
    out = model(wave, mask_time_indices=masked, sampled_negative_indices=sampled)
    hook.remove()

    parts = caught[0][masked].view(-1, G, 32 // G).transpose(0, 1)  # (G, M, 16)
    rows = model.quantizer.codevectors.detach().view(G, V, -1)
    codes = torch.cdist(parts, rows).argmin(-1).T  # (M, G)
    place = masked.flatten().cumsum(0) - 1  # frame of B*T -> its number among the M masked ones
    negatives = place[sampled[masked]]  # (M, K)
    if not masked.flatten()[sampled[masked]].all():
        raise ValueError("transformers drew a negative from a frame that is not masked")
    usable = torch.ones(1, len(negatives), dtype=torch.bool)
    states, quantized = out.projected_states[masked], out.projected_quantized_states[masked]
    # As one row, whose places are all of the M: theirs has unequally many in each.
    mine = losses.contrastive(states, quantized, negatives[None], usable, codes)
    struck = (codes[negatives] == codes[:, None]).all(-1).double().mean().item()
    name = hugging("Wav2Vec2ForPreTraining.forward")
    note = f"{mine.sum.item():.3f} over {len(negatives)} frames; {struck:.1%} of negatives equal"
    yield compared("wav2vec 2.0, contrastive sum", name, mine.sum, out.contrastive_loss, FP32, note)
    spread = losses.diversity(out.codevector_perplexity, G * V, torch.ones(len(negatives)))
    note = f"{spread.sum.item():.3f}, both from their perplexity"
    yield compared("wav2vec 2.0, diversity sum", name, spread.sum, out.diversity_loss, FP32, note)


# ----------------------------------------------------------------------------- masks


def run_lengths(masks: np.ndarray) -> np.ndarray:
    """(rows, T) bool -> how long each masked run is."""
    edges = np.diff(np.pad(masks.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    return np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1]


def check_masks(kind: str, length: int, share: float, span: int) -> Iterator[Check]:
    """Share masked, and in long rows the mean run, over 2,000 rows: distributions, not bits.

    Theirs is asked for span x p, p the start probability whose spans cover `share`, and one row at
    a time, because it rounds its number of spans up or down once a call. Its rows vary in their
    share; ours have it exactly, for which the last span is cut short, and are rings.
    """
    from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

    rows = 2_000
    np.random.seed(6)  # theirs draws from numpy's global state
    asked = span * (1 - (1 - share) ** (1 / span))
    theirs = np.concatenate([_compute_mask_indices((1, length), asked, span) for _ in range(rows)])
    rng = np.random.default_rng(6)
    ours = np.stack([data.span_mask(rng, length, share, span) for _ in range(rows)])
    name = hugging("_compute_mask_indices")
    label = f"masks, {kind}, {share:.0%} of {length} in spans of {span}"
    cover, other = ours.mean(1), theirs.mean(1)
    runs, other_runs = run_lengths(ours), run_lengths(theirs)
    spread = (
        f"row by row ours {cover.mean():.2%} +- {cover.std():.2%}, "
        f"theirs {other.mean():.2%} +- {other.std():.2%}; "
        f"first position: {ours[:, 0].mean():.1%} of rows, theirs {theirs[:, 0].mean():.1%}"
    )
    lengths = (
        f"mean run ours {runs.mean():.2f}, theirs {other_runs.mean():.2f}; shorter than a span: "
        f"{(runs < span).sum() / rows:.2f} a row, theirs {(other_runs < span).sum() / rows:.2f}"
    )
    if length >= 100 * span:
        yield compared(f"{label}: share", name, cover.mean(), other.mean(), MASK_LONG, spread)
        yield compared(f"{label}: run", name, runs.mean(), other_runs.mean(), MASK_LONG, lengths)
    else:  # few runs a row: our cut span and ring seam show in their mean
        note = f"{spread}\n    {lengths} (not judged)"
        yield compared(f"{label}: share", name, cover.mean(), other.mean(), MASK_SHORT, note)


# ----------------------------------------------------------------------------- schedule, positions


def check_schedule() -> Iterator[Check]:
    """The rate of each of 200,000 steps. Theirs gives the first step 0, ours peak / warm-up."""
    from transformers import get_inverse_sqrt_schedule

    peak, warmup = 6e-4, 40_000
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=peak)
    scale = get_inverse_sqrt_schedule(optimizer, warmup).lr_lambdas[0]
    ours = np.array([training.inverse_sqrt(step, peak, warmup) for step in range(200_000)])
    theirs = np.array([peak * scale(step + 1) for step in range(200_000)])
    marks = ", ".join(f"{ours[step - 1]:.1e} at {step:,}" for step in (20_000, 40_000, 160_000))
    note = f"ours is one step ahead; {marks}"
    name = hugging("get_inverse_sqrt_schedule")
    yield compared("learning rate, 200,000 steps", name, ours, theirs, FP64, note)


def check_sinusoids() -> Iterator[Check]:
    """Their table; and their module on real tokens, whose positions begin at padding_idx + 1."""
    from transformers.models.speech_to_text import modeling_speech_to_text as hf

    L, D, padding_idx = 512, 256, 1
    theirs = hf.Speech2TextSinusoidalPositionalEmbedding(L, D, padding_idx)
    name, ours = hugging(type(theirs).__name__), conformer.sinusoids(L + padding_idx + 1, D)
    note = (
        "sines in the first half of the channels; frequencies from 1 to 1/10,000 in D/2 - 1 steps"
    )
    table = theirs.get_embedding(len(ours), D)
    yield compared("sinusoids, table", f"{name}.get_embedding", ours, table, FP32, note)
    output = theirs(torch.full((1, L), 7))[0]
    note = (
        f"theirs begins at position {padding_idx + 1}; ours begins at 0 and is shifted by as much"
    )
    yield compared("sinusoids, module", name, ours[padding_idx + 1 :], output, FP32, note)


# ----------------------------------------------------------------------------- table


def all_checks(heard: list[tuple[str, np.ndarray]]) -> Iterator[Check]:
    """Every comparison, in the order of the README."""
    yield from check_log_mel(heard)
    yield from check_conformer()
    yield from check_quantizer(G=1, V=256, code_dim=128)
    yield from check_quantizer(G=2, V=320, code_dim=256)
    yield from check_contrastive()
    yield from check_wav2vec2()
    for length in (4_000, 400):
        yield from check_masks("speech", length, data.SPEECH_MASK, data.SPEECH_SPAN)
    for length in (4_000, 256):
        yield from check_masks("text", length, data.TEXT_MASK, data.TEXT_SPAN)
    for length in (4_000, 64):
        yield from check_masks("paired text", length, data.TLM_TEXT_MASK, data.TEXT_SPAN)
    yield from check_schedule()
    yield from check_sinusoids()


def main(argv: list[str] | None = None) -> int:
    """Prints the table. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Numeric parity with kaldi-native-fbank and transformers."
    )
    parser.add_argument(
        "--audio",
        type=Path,
        nargs="+",
        default=[],
        help="recordings that the log-mel checks hear too",
    )
    parser.add_argument("--json", type=Path, help="also write the table here, as JSON")
    args = parser.parse_args(argv)
    checks = []
    try:
        heard = signals(args.audio)
        if args.json and not args.json.parent.is_dir():
            raise FileNotFoundError(f"--json {args.json}: there is no folder {args.json.parent}")
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        print(f"{'check':<{WIDTH}} {'max diff':>8} {'relative':>8} {'allowed':>8}    third party")
        for check in all_checks(heard):
            checks.append(check)
            numbers = f"{check.max_abs:8.1e} {check.relative:8.1e} {check.tolerance:8.1e}"
            verdict = "ok" if check.passed else "NO"
            print(f"{check.name:<{WIDTH}} {numbers} {verdict} {check.third_party}", flush=True)
            if check.note:
                print(f"    {check.note}")
    except ImportError as error:
        print(f"error: {error}: pip install -r benchmarks/requirements.txt", file=sys.stderr)
        return 2
    failed = [check.name for check in checks if not check.passed]
    print(f"{len(checks)} checks, {len(failed)} above their tolerance", *failed, sep="\n  ")
    if args.json:
        rows = [asdict(check) | {"passed": check.passed} for check in checks]
        for row in rows:  # NaN and infinity are no JSON
            row |= {k: None for k in ("max_abs", "relative") if not math.isfinite(row[k])}
        table = {"torch": torch.__version__, "checks": rows}
        args.json.write_text(json.dumps(table, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
