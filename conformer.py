"""The encoder: log-mel, subsampling, Conformer blocks, and the stack that reads speech and text.

SLAM (Bapna et al. 2021, arXiv 2110.10329), section 3.1. Speech goes through two strided
convolutions and the *speech encoder* (N Conformer blocks and a closing linear); text goes through
an embedding; both end in the same *multimodal encoder* (M Conformer blocks), alone or joined into
one sequence. Nothing here masks, samples or computes a loss: those live in data.py and losses.py.

Padding never matters. Every convolution, norm and attention leaves padding out, so a row has the
same output alone and in any batch.

Public:  time constants, special ids, SlamConfig, SIZES, log_mel, subsampled_lens, block_flops,
         speech_flops, SlamEncoder and its parts.
Letters: B batch, N samples, F log-mel frames (10 ms), T encoder frames (40 ms), U text tokens,
         L = T+U joined, C convolution features (640), D model width, H heads.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------- constants


def exact_div(a: int, b: int) -> int:
    """a / b, which must be a whole number: time constants may not hide a rounding."""
    if a % b:
        raise ValueError(f"{a} is not divisible by {b}")
    return a // b


SAMPLE_RATE = 16_000  # samples per second
HOP_SAMPLES = exact_div(SAMPLE_RATE * 10, 1000)  # 160: a log-mel frame every 10 ms
WINDOW_SAMPLES = exact_div(SAMPLE_RATE * 25, 1000)  # 400: each sees 25 ms
N_MELS = 80
N_FFT = 512  # a window, filled up with zeros
CPU_FRAMES = 512  # made at a time on a CPU: their memory is still at hand for the next ones
SUBSAMPLING = 2 * 2  # two convolutions of stride 2
FRAMES_PER_S = exact_div(SAMPLE_RATE, HOP_SAMPLES)  # 100 log-mel frames
ENC_FRAMES_PER_S = exact_div(FRAMES_PER_S, SUBSAMPLING)  # 25 encoder frames, 40 ms each

PAD_ID, UNK_ID, CLS_ID, SEP_ID, MASK_ID = range(5)  # every tokenizer begins with these
N_SPECIAL = 5


@dataclass(frozen=True)
class SlamConfig:
    """One size of the model and the recipe that goes with it. The defaults are `xl`, the paper's.

    What the paper leaves open is marked UNSPECIFIED IN PAPER; README.md lists our choices.
    """

    # encoder
    vocab_size: int = 32_000
    speech_layers: int = 8  # N
    mm_layers: int = 16  # M
    d_model: int = 1024
    d_ff: int = 4096
    n_heads: int = 8
    conv_kernel: int = 5  # of the depthwise convolution, in encoder frames
    subsample_channels: int = 32  # UNSPECIFIED IN PAPER: Lingvo's 3x3 convolutions have 32
    norm_groups: int = 32  # UNSPECIFIED IN PAPER: Lingvo's default
    dropout: float = 0.1  # UNSPECIFIED IN PAPER: the Conformer paper's
    # quantizer (w2v-BERT table 1)
    n_codebooks: int = 1  # G
    n_codes: int = 1024  # V
    code_dim: int = 1024
    gumbel_start: float = 2.0
    gumbel_decay: float = 0.999995  # per optimiser step
    gumbel_end: float = 0.1
    codebook_init: str = "uniform"  # U(0, 1) as in wav2vec 2.0's code, or "normal"
    # learning rate of all that decides the codes (convolutions, quantizer logits), relative to lr
    target_lr_scale: float = 1.0
    # recipe
    lr: float = 6e-4  # UNSPECIFIED IN PAPER: mSLAM's peak rate and warm-up
    warmup_steps: int = 40_000
    grad_clip: float = 20.0
    max_steps: int = 500_000  # of stage 1
    batch_s: float = 30_000.0  # seconds of unlabelled audio a step: about 2048 utterances
    batch_paired_s: float = 3_200.0  # seconds of transcribed audio a step: about 256 utterances
    batch_tokens: int = 4_194_304  # text tokens a step: 8192 rows of 512
    row_tokens: int = 512  # longest text row

    def __post_init__(self) -> None:
        for divisor in ("n_heads", "norm_groups"):
            if self.d_model % getattr(self, divisor):
                parts = f"{divisor} {getattr(self, divisor)}"
                raise ValueError(f"d_model {self.d_model} must be divisible by {parts}")
        if self.code_dim % self.n_codebooks:
            raise ValueError(
                f"code_dim {self.code_dim} must be divisible by n_codebooks {self.n_codebooks}"
            )
        if self.codebook_init not in ("uniform", "normal"):
            raise ValueError(f"codebook_init {self.codebook_init!r} is neither uniform nor normal")
        if self.conv_kernel % 2 == 0:
            raise ValueError(
                f"conv_kernel {self.conv_kernel} must be odd, so that frames keep their place"
            )

    @property
    def conv_dim(self) -> int:
        """C: width of the subsampled features, channels x mel bins after two halvings (32 x 20)."""
        return self.subsample_channels * exact_div(N_MELS, SUBSAMPLING)


SIZES: dict[str, SlamConfig] = {
    # The demo's. It has minutes where the paper has days. Each departure from `xl` was put back
    # alone, on speech (EXPERIMENTS.md, "The contrastive plateau"); only the first made a difference
    # beyond noise in 200 steps:
    #   target_lr_scale  at 1 the codes drift toward few, faster than they are learned
    #   conv_kernel      3 layers of kernel 5 reach 6 frames, less than a masked run; 8 layers of
    #                    the paper reach 16
    #   codebook_init    U(0, 1) rows begin with cosines of 0.75: a quarter of the range is left
    #   dropout          random bits cost 18% of a CPU step, and a run of minutes does not overfit
    # Its vocabulary is words and parts of words, as the paper's is: text is learned from them in a
    # quarter of the time that letters take. Speech is not: two hours say each letter thousands of
    # times but a word only a few, so that whoever wants speech and text aligned on this corpus
    # gives a tokenizer of letters (EXPERIMENTS.md, "What TLM hears").
    "tiny": SlamConfig(
        vocab_size=512, speech_layers=3, mm_layers=3, d_model=128, d_ff=512, n_heads=4,
        conv_kernel=15, dropout=0.0, n_codes=256, code_dim=128, gumbel_decay=0.995, gumbel_end=0.5,
        codebook_init="normal", target_lr_scale=0.01,
        lr=2e-3, warmup_steps=100, grad_clip=5.0, max_steps=400,
        batch_s=32.0, batch_paired_s=24.0, batch_tokens=1024, row_tokens=128,
    ),
    "small": SlamConfig(
        vocab_size=8_000, speech_layers=4, mm_layers=8, d_model=256, d_ff=1024, n_heads=4,
        code_dim=256, gumbel_decay=0.999975, lr=1.5e-3, warmup_steps=5_000, max_steps=100_000,
        batch_s=800.0, batch_paired_s=100.0, batch_tokens=65_536,
    ),
    "base": SlamConfig(
        speech_layers=4, mm_layers=8, d_model=512, d_ff=2048,
        code_dim=512, gumbel_decay=0.9999875, lr=1e-3, warmup_steps=20_000, max_steps=200_000,
        batch_s=5_000.0, batch_paired_s=600.0, batch_tokens=524_288,
    ),
    "xl": SlamConfig(),
}  # fmt: skip

# ------------------------------------------------------------------------------------------ log-mel


def n_frames(n_samples: int | Tensor) -> int | Tensor:
    """Log-mel frames F of n_samples: whole windows only (Kaldi's snip-edges)."""
    frames = 1 + (n_samples - WINDOW_SAMPLES) // HOP_SAMPLES
    return max(0, frames) if isinstance(frames, int) else frames.clip(0)


def subsampled_lens(frames: int | Tensor) -> int | Tensor:
    """Encoder frames T of `frames` log-mel frames.

    Two 3x3 convolutions, stride 2, padding 1, each ceil(x/2).
    """
    return (frames + SUBSAMPLING - 1) // SUBSAMPLING


@functools.lru_cache(maxsize=4)
def _mel_filters(n_fft: int, low_hz: float = 20.0) -> Tensor:
    """Kaldi's triangular filters, (n_fft/2 + 1, 80) float32.

    Triangles on the mel axis, 20 Hz to Nyquist.
    """

    def mel(hz: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(hz / 700.0)

    bins = mel(torch.arange(n_fft // 2 + 1, dtype=torch.float64) * SAMPLE_RATE / n_fft)[:, None]
    low, high = mel(torch.tensor([low_hz, SAMPLE_RATE / 2], dtype=torch.float64))
    edges = torch.linspace(low, high, N_MELS + 2, dtype=torch.float64)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    return torch.minimum(rising, falling).clamp(min=0).float()


@functools.lru_cache(maxsize=4)
def _povey_window() -> Tensor:
    """Kaldi's default window, (400,) float32: a Hann window to the power 0.85."""
    return torch.hann_window(WINDOW_SAMPLES, periodic=False, dtype=torch.float64).pow(0.85).float()


@functools.lru_cache(maxsize=16)
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Window and filters, kept on the device: log_mel copies nothing from the host."""
    return _povey_window().to(device), _mel_filters(N_FFT).to(device)


@functools.lru_cache(maxsize=1)
def _mel_bands() -> list[tuple[slice, slice]]:
    """(bins, filters) of blocks that hold all of the filter matrix that is not 0: a quarter."""
    filters, width = _mel_filters(N_FFT), N_MELS // 5
    bands = []
    for first in range(0, N_MELS, width):
        bins = filters[:, first : first + width].any(1).nonzero()
        bands.append((slice(int(bins.min()), int(bins.max()) + 1), slice(first, first + width)))
    return bands


def log_mel(waveform: Tensor, lens: Tensor | None = None) -> Tensor:
    """80-dim log-mel filterbank energies, equal to Kaldi's fbank with dither 0.

    Args:    waveform (..., N) float32 in [-1, 1] at 16 kHz, N >= 400, on any device.
             lens     (B,) int64 samples of each row of a padded batch (B, N), which then has the
                      numbers of its rows alone, and zero after n_frames(lens) frames.
    Returns: (..., F, 80) float32, also under autocast: natural log of the energy at 16-bit scale,
             F = n_frames(N).
    Raises:  ValueError when the waveform is shorter than one window.
    """
    if waveform.shape[-1] < WINDOW_SAMPLES:
        n, window = waveform.shape[-1], f"one 25 ms window ({WINDOW_SAMPLES})"
        raise ValueError(f"audio of {n} samples is shorter than {window}")
    waveform, n = waveform.float(), n_frames(waveform.shape[-1])
    size = CPU_FRAMES if waveform.device.type == "cpu" else n
    blocks = []
    for start in range(0, n, size):
        stop = min(start + size, n) * HOP_SAMPLES + WINDOW_SAMPLES - HOP_SAMPLES
        with torch.autocast(waveform.device.type, enabled=False):
            blocks.append(_log_mel_block(waveform[..., start * HOP_SAMPLES : stop]))
    features = torch.cat(blocks, dim=-2)  # (..., F, 80)
    if lens is None:
        return features
    valid = valid_mask(n_frames(lens.to(features.device)), n)  # (B, F)
    return features.masked_fill(~valid[..., None], 0.0)


def _log_mel_block(waveform: Tensor) -> Tensor:
    """log_mel of a part, all frames at once."""
    window, filters = _tables(waveform.device)
    frames = (waveform * 32768.0).unfold(-1, WINDOW_SAMPLES, HOP_SAMPLES)  # (..., F, 400)
    frames = frames - frames.mean(-1, keepdim=True)
    emphasised = frames.new_zeros(*frames.shape[:-1], N_FFT)  # (..., F, 512)
    # Pre-emphasis within the frame. The first sample has none before it; its window is 0.
    emphasised[..., 1:WINDOW_SAMPLES] = torch.sub(frames[..., 1:], frames[..., :-1], alpha=0.97)
    emphasised[..., :WINDOW_SAMPLES] *= window
    spectrum = torch.fft.rfft(emphasised)  # (..., F, 257)
    power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)  # abs() takes 4x as long
    bands = [power[..., bins] @ filters[bins, mels] for bins, mels in _mel_bands()]
    energy = torch.cat(bands, dim=-1)  # (..., F, 80)
    return energy.clamp_(min=torch.finfo(torch.float32).eps).log_()


# ------------------------------------------------------------------------------------------- blocks


def valid_mask(lens: Tensor, length: int) -> Tensor:
    """(B,) lengths -> (B, length) bool, True on real data."""
    return torch.arange(length, device=lens.device)[None] < lens[:, None]


class FeedForward(nn.Module):
    """LayerNorm, Linear to d_ff, Swish, Linear back (Gulati et al. 2020, section 2.3)."""

    def __init__(self, config: SlamConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        self.up = nn.Linear(config.d_model, config.d_ff)
        self.down = nn.Linear(config.d_ff, config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.dropout(self.down(self.dropout(F.silu(self.up(self.norm(x))))))


class SelfAttention(nn.Module):
    """Multi-head self-attention without positions: order comes from the convolutions.

    w2v-BERT XL has no relative attention either (table 1 there). The key projection has no bias:
    one constant added to every key changes no softmax, so it has no gradient.
    """

    def __init__(self, config: SlamConfig) -> None:
        super().__init__()
        D = config.d_model
        self.n_heads = config.n_heads
        self.norm = nn.LayerNorm(D)
        self.query = nn.Linear(D, D)
        self.key = nn.Linear(D, D, bias=False)
        self.value = nn.Linear(D, D)
        self.out = nn.Linear(D, D)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """(B, L, D) and (B, L) bool -> (B, L, D).

        A row with no valid position attends everywhere, never NaN.
        """
        B, L, D = x.shape
        x = self.norm(x)
        projections = (self.query, self.key, self.value)
        q, k, v = (p(x).view(B, L, self.n_heads, -1).transpose(1, 2) for p in projections)
        # (B, 1, 1, L), broadcast over heads and queries
        keys = (valid | ~valid.any(1, keepdim=True))[:, None, None, :]
        p_drop = self.dropout.p if self.training else 0.0
        bf16_on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
        attend = _attention if bf16_on_cpu else F.scaled_dot_product_attention
        mixed = attend(q, k, v, attn_mask=keys, dropout_p=p_drop)
        mixed = mixed.transpose(1, 2).reshape(B, L, D)  # from (B, H, L, D/H)
        return self.dropout(self.out(mixed))


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, dropout_p: float) -> Tensor:
    """What F.scaled_dot_product_attention does, spelled out: softmax(q k^T / sqrt(d)) v.

    In bf16 on a CPU torch's own kernel takes 2 to 5 times as long at L = 100 to 400, and no less
    at 800.

    Args: q, k, v (B, H, L, d); attn_mask (B, 1, 1, L) bool, True where a key may be attended to.
    """
    with torch.autocast(q.device.type, enabled=False):  # which would make a wide softmax
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # (B, H, L, L)
        hidden = q.new_zeros(attn_mask.shape).masked_fill_(~attn_mask, -torch.inf)
        return F.dropout(scores.add_(hidden).softmax(-1), dropout_p) @ v


class MaskedGroupNorm(nn.Module):
    """GroupNorm whose statistics are taken over the valid positions and the channels of a group.

    SLAM has GroupNorm where the Conformer has BatchNorm, because batches of speech, of text and of
    pairs should not share running statistics. Centred before squaring: E[x^2] - E[x]^2 would cancel
    where the mean is large.
    """

    def __init__(self, n_groups: int, dim: int, eps: float = 1e-3) -> None:
        super().__init__()
        self.n_groups, self.eps = n_groups, eps
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """(B, L, D) and (B, L) bool -> (B, L, D); padding comes out as the bias, not to be read."""
        D, n_groups = x.shape[2], self.n_groups
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        keep = valid[:, :, None].to(wide.dtype)  # (B, L, 1)
        count = (keep.sum(1, keepdim=True) * (D // n_groups)).clamp(min=1)  # (B, 1, 1)

        def group_mean(of_channel: Tensor) -> Tensor:
            """Sums over positions (B, D) -> mean over valid positions and the group (B, 1, D)."""
            mean = of_channel.unflatten(1, (n_groups, -1)).sum(-1, keepdim=True) / count
            return mean.expand(-1, -1, D // n_groups).flatten(1)[:, None]

        centred = (wide - group_mean((wide * keep).sum(1))) * keep
        scale = torch.rsqrt(group_mean(centred.square().sum(1)) + self.eps) * self.weight
        return torch.addcmul(self.bias, centred, scale).to(x.dtype)


class ConvModule(nn.Module):
    """LayerNorm, pointwise, GLU, depthwise, GroupNorm, Swish, pointwise.

    Gulati et al. 2020, section 2.2, with GroupNorm for BatchNorm (SLAM 3.1).
    """

    def __init__(self, config: SlamConfig) -> None:
        super().__init__()
        D, K = config.d_model, config.conv_kernel
        self.norm = nn.LayerNorm(D)
        self.pointwise_in = nn.Linear(D, 2 * D)
        # A (K, 1) Conv2d over (B, D, L, 1) in channels-last layout, which is fastest on a CPU.
        self.depthwise = nn.Conv2d(D, D, (K, 1), padding=(K // 2, 0), groups=D, bias=False)
        self.group_norm = MaskedGroupNorm(config.norm_groups, D)
        self.pointwise_out = nn.Linear(D, D)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """(B, L, D) and (B, L) bool -> (B, L, D)."""
        x = F.glu(self.pointwise_in(self.norm(x)), dim=-1)
        # What the depthwise kernel sees beyond the end is zero, as alone.
        x = x * valid[..., None].to(x.dtype)
        x = self.depthwise(x.unsqueeze(2).permute(0, 3, 1, 2))  # (B, D, L, 1), channels last
        x = x.permute(0, 2, 3, 1).squeeze(2)  # (B, L, D)
        return self.dropout(self.pointwise_out(F.silu(self.group_norm(x, valid))))


class ConformerBlock(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward, LayerNorm.

    Gulati et al. 2020, section 2.4.
    """

    def __init__(self, config: SlamConfig) -> None:
        super().__init__()
        self.ff_in, self.ff_out = FeedForward(config), FeedForward(config)
        self.attention, self.conv = SelfAttention(config), ConvModule(config)
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """(B, L, D) and (B, L) bool -> (B, L, D)."""
        x = x + 0.5 * self.ff_in(x)
        x = x + self.attention(x, valid)
        x = x + self.conv(x, valid)
        x = x + 0.5 * self.ff_out(x)
        return self.norm(x)


class ConformerStack(nn.Module):
    """A pile of Conformer blocks: the multimodal encoder, and the body of the speech encoder.

    With `checkpointing`, training keeps only what goes into each block and computes its inside a
    second time for the gradient: a third more work for a fraction of the memory. Random numbers are
    drawn alike both times.
    """

    def __init__(self, config: SlamConfig, n_layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ConformerBlock(config) for _ in range(n_layers))
        self.checkpointing = False

    def forward(self, x: Tensor, lens: Tensor, layers: list[Tensor] | None = None) -> Tensor:
        """(B, L, D) and (B,) lengths -> (B, L, D).

        Each block's output is also appended to `layers`, if given.
        """
        valid = valid_mask(lens, x.shape[1])
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                keeps_noise = self.training and block.ff_in.dropout.p > 0
                keep = {"use_reentrant": False, "preserve_rng_state": keeps_noise}
                x = checkpoint(block, x, valid, **keep)
            else:
                x = block(x, valid)
            if layers is not None:
                layers.append(x)
        return x


def block_flops(config: SlamConfig, lens: Tensor) -> float:
    """Floating-point operations of one block's forward pass over rows of these lengths (B,).

    A multiplication and its addition are two. Per position: 8 D d_ff in the feed-forwards, 8 D^2 in
    the projections of attention, 4 L D in its scores and mixture, 6 D^2 in the pointwise and 2 D K
    in the depthwise convolution. Norms and activations are not counted, nor is padding. A gradient
    costs twice the forward pass.
    """
    D, lens = config.d_model, lens.double()
    a_position = 8 * D * config.d_ff + 14 * D**2 + 2 * D * config.conv_kernel
    return float((lens * a_position + 4 * D * lens.square()).sum())


# ---------------------------------------------------------------------------------- speech and text


class ConvSubsampling(nn.Module):
    """Two 3x3 convolutions of stride 2x2.

    10 ms frames of 80 mel bins become 40 ms frames of C features.
    """

    def __init__(self, config: SlamConfig) -> None:
        super().__init__()
        channels = config.subsample_channels
        self.conv1 = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, features: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F, 80) and (B,) lengths in frames -> (B, T, C) and (B,) lengths in encoder frames.

        Padded frames are set to zero before the first convolution and after each one: otherwise the
        bias would turn padding into data that the next convolution reads across the row's end.
        """
        x = features * valid_mask(lens, features.shape[1])[..., None].to(features.dtype)
        x = x.unsqueeze(1)  # (B, 1, F, 80)
        for conv in (self.conv1, self.conv2):
            lens = (lens + 1) // 2
            x = F.relu(conv(x))  # (B, channels, F/2, mels/2), then /4
            x = x * valid_mask(lens, x.shape[2])[:, None, :, None].to(x.dtype)
        return x.transpose(1, 2).flatten(2), lens  # (B, T, channels x mels/4)


class SpeechEncoder(nn.Module):
    """Normalisation, subsampling, linear to D, N Conformer blocks, closing linear (SLAM 3.1)."""

    def __init__(self, config: SlamConfig) -> None:
        super().__init__()
        # Estimated once on training audio, then part of the weights: never a flag at fine-tuning.
        self.register_buffer("feature_mean", torch.zeros(N_MELS))
        self.register_buffer("feature_std", torch.ones(N_MELS))
        self.subsampling = ConvSubsampling(config)
        self.project = nn.Linear(config.conv_dim, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.stack = ConformerStack(config, config.speech_layers)
        self.closing = nn.Linear(config.d_model, config.d_model)

    def subsample(self, features: Tensor, feature_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Raw log-mel (B, F, 80), lengths (B,) -> unmasked features (B, T, C), lengths (B,)."""
        features = (features.to(self.feature_mean.dtype) - self.feature_mean) / self.feature_std
        return self.subsampling(features, feature_lens)

    def encode(
        self, conv: Tensor, lens: Tensor, layers: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Convolution features (B, T, C), masked or not -> context and output, both (B, T, D).

        The contrastive context is read before the closing linear (UNSPECIFIED IN PAPER); the output
        is what the multimodal encoder reads.
        """
        context = self.stack(self.dropout(self.project(conv)), lens, layers)
        return context, self.closing(context)


def speech_flops(config: SlamConfig, lens: Tensor) -> float:
    """As block_flops, of the whole speech encoder; lens (B,) in encoder frames."""
    C, D = config.subsample_channels, config.d_model
    mels = N_MELS // 2  # of a frame after the first convolution; half as many after the second
    convolutions = 2 * 9 * (2 * mels * C + mels // 2 * C * C)
    around = convolutions + 2 * config.conv_dim * D + 2 * D * D
    return float(lens.sum()) * around + config.speech_layers * block_flops(config, lens)


def sinusoids(length: int, dim: int, device: torch.device | None = None) -> Tensor:
    """(length, dim) float32 position encodings.

    Sines in the first half of the channels, cosines in the second.
    """
    half = dim // 2
    step = -math.log(10_000.0) / max(half - 1, 1)
    rates = torch.exp(torch.arange(half, device=device) * step)
    angles = torch.arange(length, device=device)[:, None] * rates[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class TextEmbedder(nn.Module):
    """Token embedding and sinusoidal positions, then LayerNorm; no further layers (SLAM 3.1)."""

    def __init__(self, config: SlamConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.norm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, U) int64 ids -> (B, U, D)."""
        x = self.embedding(tokens)
        return self.dropout(self.norm(x + sinusoids(x.shape[1], x.shape[2], x.device).to(x.dtype)))


def join(
    speech: Tensor, speech_lens: Tensor, text: Tensor, text_lens: Tensor
) -> tuple[Tensor, Tensor]:
    """Concatenate a pair along time, the text right after the last *valid* speech frame.

    Padding in the middle would be seen by the convolutions; so every row is gathered from [speech;
    text] with an index that skips its speech padding. Token u of row b stands at position
    speech_lens[b] + u.

    Args:    speech (B, T, D), speech_lens (B,), text (B, U, D), text_lens (B,).
    Returns: (B, T+U, D), zero beyond the pair's end, and (B,) joined lengths.
    """
    T, L = speech.shape[1], speech.shape[1] + text.shape[1]
    position = torch.arange(L, device=speech.device)[None]  # (1, L)
    starts = speech_lens[:, None]
    in_text = (position - starts + T).clamp(max=L - 1)
    source = torch.where(position < starts, position, in_text)  # (B, L)
    both = torch.cat([speech, text.to(speech.dtype)], dim=1)
    joined = both.gather(1, source[..., None].expand(-1, -1, both.shape[2]))
    lens = speech_lens + text_lens
    return joined * valid_mask(lens, L)[..., None].to(joined.dtype), lens


class SlamEncoder(nn.Module):
    """The one encoder: speech encoder and text embedder under one multimodal stack.

    Of the two, only those are built that the run uses.
    """

    def __init__(
        self, config: SlamConfig, modalities: tuple[str, ...] = ("speech", "text")
    ) -> None:
        super().__init__()
        self.config, self.modalities = config, tuple(modalities)
        self.speech = SpeechEncoder(config) if "speech" in modalities else None
        self.text = TextEmbedder(config) if "text" in modalities else None
        self.multimodal = ConformerStack(config, config.mm_layers)
        self.tokenizer_model: bytes | None = None  # SentencePiece model, set by from_checkpoint

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: str | torch.device = "cpu") -> SlamEncoder:
        """The pre-trained encoder with its normalisation and tokenizer, in eval mode.

        Args:   path  a checkpoint file, or a run's folder (its latest checkpoint is taken).
        Raises: FileNotFoundError, ValueError when the file is not a checkpoint of this project.
        Example:
            encoder = SlamEncoder.from_checkpoint("runs/demo")
            layers = encoder.extract(waveform=waveform)  # or text="a sentence", or both: a pair
        """
        path = Path(path)
        if path.is_dir():
            latest = path / "ckpt" / "latest"
            if not latest.exists():
                missing = "no ckpt/latest in this folder; give a run's folder or a .pt file"
                raise FileNotFoundError(f"{path}: {missing}")
            path = latest.parent / latest.read_text().strip()
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such checkpoint") from None
        except Exception as error:  # of many kinds; each means that this is no checkpoint of ours
            kind = type(error).__name__
            raise ValueError(
                f"{path}: cannot be read as a checkpoint ({kind}); is the file whole?"
            ) from error
        is_dict = isinstance(checkpoint, dict)
        if not is_dict or not {"model", "config", "modalities"} <= checkpoint.keys():
            has = sorted(map(str, checkpoint)) if is_dict else type(checkpoint).__name__
            parts = "the model, config and modalities of a checkpoint"
            raise ValueError(f"{path}: has {has}, not {parts}")
        encoder = cls(SlamConfig(**checkpoint["config"]), checkpoint["modalities"])
        prefix = "encoder."
        own = (name for name in checkpoint["model"] if name.startswith(prefix))
        encoder.load_state_dict({name[len(prefix) :]: checkpoint["model"][name] for name in own})
        if checkpoint.get("tokenizer") is not None:
            encoder.tokenizer_model = bytes(checkpoint["tokenizer"].tolist())
        return encoder.to(device).eval()

    @torch.no_grad()
    def extract(self, waveform: Tensor | None = None, text: str | None = None) -> list[Tensor]:
        """Features of one utterance, one sentence, or a pair of both.

        Args:    waveform (N,) float32 in [-1, 1] at 16 kHz; text a sentence. At least one of the
                 two.
        Returns: one (length, D) tensor for each block. Speech encoder blocks first (T frames of 40
                 ms), then multimodal blocks (T frames, or 1 + U tokens beginning with [CLS], or the
                 frames and then the tokens).
        Raises:  ValueError when the encoder was built without that modality.
        """
        for name, given in (("speech", waveform), ("text", text)):
            if given is not None and name not in self.modalities:
                trained = f"--modalities {','.join(self.modalities)}"
                raise ValueError(f"this encoder was trained with {trained}: no {name}")
        if waveform is None and text is None:
            raise ValueError("nothing to encode: give waveform=, text= or both")
        if waveform is not None:
            waveform = torch.as_tensor(waveform)
            if waveform.dim() != 1 or not waveform.is_floating_point():
                found = f"{tuple(waveform.shape)} {waveform.dtype}"
                raise ValueError(f"waveform is {found}; expected (N,) floats in [-1, 1] at 16 kHz")
        device = next(self.parameters()).device
        layers: list[Tensor] = []
        if waveform is not None:
            features = log_mel(waveform.to(device))[None]  # (1, F, 80)
            feature_lens = torch.tensor([features.shape[1]], device=device)
            conv, lens = self.speech.subsample(features, feature_lens)
            _, x = self.speech.encode(conv, lens, layers)
        if text is not None:
            tokens = torch.tensor([[CLS_ID, *self._pieces(text)]], device=device)
            pair = self.text(tokens), torch.tensor([tokens.shape[1]], device=device)
            x, lens = pair if waveform is None else join(x, lens, *pair)
        self.multimodal(x, lens, layers)
        return [layer[0] for layer in layers]

    def _pieces(self, text: str) -> list[int]:
        import sentencepiece  # here, so that reading or training the encoder needs torch alone

        if self.tokenizer_model is None:
            advice = "load it with SlamEncoder.from_checkpoint"
            raise ValueError(f"this encoder has no tokenizer: {advice}")
        return sentencepiece.SentencePieceProcessor(model_proto=self.tokenizer_model).encode(text)


def sized(size: str, **changes: object) -> SlamConfig:
    """The configuration of a size by name, with fields replaced. Raises ValueError for others."""
    if size not in SIZES:
        raise ValueError(f"--size {size}: unknown; choose one of {', '.join(SIZES)}")
    return dataclasses.replace(SIZES[size], **changes)
