"""A Conformer layer or stack beside transformers' and torchaudio's: forward and backward.

    python benchmarks/encoder.py [--layers 1] [--shapes 8,400,256,4,5 4,800,512,8,5] [--rounds 7]
                                 [--threads 2] [--torchaudio FOLDER] [--json encoder.json]

The same rows of features, a quarter of them padded by up to a quarter, go through all encoders;
gradients go to weights and input; no dropout. Ours keeps padding out of convolution and norm, and
has no positions; theirs have them, BatchNorm (torchaudio's: GroupNorm), and let padding into the
convolution. Three settings of the matrix products for all, and a fourth for ours alone.
`--torchaudio` is a folder with an unpacked wheel of torchaudio (its Python is enough, and its
compiled part is not loaded); by default it is looked for where packages are installed.
Exit code 2 when a package is missing.
Letters: B rows, T frames, D width, H heads, K kernel of the depthwise convolution, N = B x T.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import timing
import torch
from timing import BF16, DEFAULT, EQUAL, OWN
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules

import conformer  # noqa: E402

RELATIVE, GROUP_NORM = "transformers, Conformer, relative", "torchaudio, GroupNorm"
OURS = "ours"


class Shape(NamedTuple):
    """Of the input, and of a layer."""

    B: int
    T: int
    D: int
    H: int
    K: int


class Peer(nn.Module):
    """transformers' layers, with what their encoder does once for all of them."""

    def __init__(
        self, layers: list[nn.Module], positions: nn.Module | None, conv_mask: bool
    ) -> None:
        super().__init__()
        self.layers, self.positions = nn.ModuleList(layers), positions
        self.conv_mask = conv_mask

    def forward(self, x: Tensor, lens: Tensor) -> Tensor:
        """(B, T, D) and (B,) lengths -> (B, T, D)."""
        T = x.shape[1]
        valid = conformer.valid_mask(lens, T)
        options = {"attention_mask": valid[:, None, None, :].expand(-1, 1, T, T)}
        options |= {"conv_attention_mask": valid} if self.conv_mask else {}
        positions = None if self.positions is None else self.positions(x)
        for layer in self.layers:
            x = layer(x, relative_position_embeddings=positions, **options)
        return x


class OfTorchaudio(nn.Module):
    """torchaudio's Conformer, from its one file; its package would load a compiled library."""

    def __init__(self, file: Path, shape: Shape, n_layers: int) -> None:
        super().__init__()
        spec = importlib.util.spec_from_file_location("torchaudio_conformer", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        D, width = shape.D, 4 * shape.D
        self.stack = module.Conformer(D, shape.H, width, n_layers, shape.K, use_group_norm=True)

    def forward(self, x: Tensor, lens: Tensor) -> Tensor:
        """(B, T, D) and (B,) lengths -> (B, T, D)."""
        return self.stack(x, lens)[0]


def transformers_encoder(shape: Shape, n_layers: int, positions: str) -> Peer:
    """Layers of Wav2Vec2Conformer ("relative", "rotary") or Wav2Vec2Bert ("relative_key").

    Attention is scaled_dot_product_attention, as their models choose.
    """
    from transformers import Wav2Vec2BertConfig, Wav2Vec2ConformerConfig
    from transformers.models.wav2vec2_bert import modeling_wav2vec2_bert as bert
    from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer as hf

    of_bert = positions == "relative_key"
    config = (Wav2Vec2BertConfig if of_bert else Wav2Vec2ConformerConfig)(
        hidden_size=shape.D, intermediate_size=4 * shape.D, num_attention_heads=shape.H,
        hidden_act="swish", conv_depthwise_kernel_size=shape.K, position_embeddings_type=positions,
        attn_implementation="sdpa", hidden_dropout=0.0, activation_dropout=0.0,
        attention_dropout=0.0, conformer_conv_dropout=0.0,
    )  # fmt: skip
    kind = bert.Wav2Vec2BertEncoderLayer if of_bert else hf.Wav2Vec2ConformerEncoderLayer
    embeddings = {
        "relative": hf.Wav2Vec2ConformerRelPositionalEmbedding,
        "rotary": hf.Wav2Vec2ConformerRotaryPositionalEmbedding,
        "relative_key": lambda _: None,
    }
    layers = [kind(config) for _ in range(n_layers)]
    return Peer(layers, embeddings[positions](config), conv_mask=of_bert)


def own_encoder(shape: Shape, n_layers: int) -> nn.Module:
    """The project's stack."""
    config = conformer.SlamConfig(
        d_model=shape.D, d_ff=4 * shape.D, n_heads=shape.H, conv_kernel=shape.K, dropout=0.0
    )
    return conformer.ConformerStack(config, n_layers)


def find_torchaudio(folder: Path | None) -> Path | None:
    """Its file with the Conformer, in --torchaudio or where it is installed; None without."""
    if folder is None:
        spec = importlib.util.find_spec("torchaudio")  # does not import it
        folder = Path(spec.origin).parent.parent if spec else None
    file = folder / "torchaudio" / "models" / "conformer.py" if folder else None
    return file if file and file.is_file() else None


def encoders(shape: Shape, n_layers: int, torchaudio: Path | None) -> dict[str, nn.Module]:
    """All of the same shape, in training mode; the first is the reference."""
    found: dict[str, nn.Module] = {
        RELATIVE: transformers_encoder(shape, n_layers, "relative"),
        "transformers, Conformer, rotary": transformers_encoder(shape, n_layers, "rotary"),
        "transformers, Wav2Vec2-Bert": transformers_encoder(shape, n_layers, "relative_key"),
    }
    if torchaudio:
        found[GROUP_NORM] = OfTorchaudio(torchaudio, shape, n_layers)
    return found | {OURS: own_encoder(shape, n_layers)}


def forward_backward(
    encoder: nn.Module, setting: timing.Setting, x: Tensor, lens: Tensor, upstream: Tensor
) -> Callable[[], None]:
    """A case: gradients of weights and input, in a setting."""

    def case() -> None:
        encoder.zero_grad(set_to_none=True)
        x.grad = None
        with setting.products():
            with setting.autocast():
                out = encoder(x, lens)
            out.backward(upstream.to(out.dtype))

    return case


def model_flops(shape: Shape, n_layers: int) -> int:
    """FLOPs of our encoder, forward and backward, padding counted; positions would come on top."""
    B, T, D, _, K = shape
    N = B * T
    return 3 * n_layers * (46 * N * D**2 + 4 * B * T**2 * D + 2 * N * D * K)


def measured(shape: Shape, n_layers: int, rounds: int, torchaudio: Path | None) -> timing.Times:
    """Seconds of all encoders in all settings, and of products beside them: {(setting, name)}."""
    torch.manual_seed(0)
    B, T, D, _, _ = shape
    x, upstream = torch.randn(B, T, D).requires_grad_(), torch.randn(B, T, D)
    lens = torch.linspace(3 * T // 4, T, B).round().long().clamp(max=T)
    cases = timing.product_cases()
    for name, encoder in encoders(shape, n_layers, torchaudio).items():
        for setting in (DEFAULT, EQUAL, BF16) + ((OWN,) if name == OURS else ()):
            options = timing.SETTINGS[setting], x, lens, upstream
            cases[setting, name] = forward_backward(encoder, *options)
    return timing.taking_turns(cases, rounds)


def rows(taken: timing.Times, flops: int) -> list[dict[str, object]]:
    """A line for each encoder: milliseconds, ratio to the reference, share of the products' peak.

    The reference is that of the same setting; for our own choice it is that of the default.
    """
    median, peak = timing.medians(taken), timing.peaks(taken)
    lines = []
    for name in dict.fromkeys(name for _, name in taken if name != "product"):
        line: dict[str, object] = {"forward and backward": name}
        for setting in timing.SETTINGS:
            line[setting] = ""
            if (setting, name) in taken:
                beside = DEFAULT if setting == OWN else setting
                ratio = timing.ratios(taken, (beside, RELATIVE))[setting, name]
                seconds = median[setting, name]
                share = flops / seconds / peak[timing.SETTINGS[setting].bf16]
                line[setting] = f"{1e3 * seconds:.0f} ms, {ratio:.2f}, {share:.0%}"
        ratio = timing.ratios(taken, (DEFAULT, RELATIVE))[BF16, name]
        lines.append(line | {"bf16 / reference in fp32": ratio})
    return lines


def goals(shape: Shape, taken: timing.Times, flops: int) -> list[tuple[str, float, str, float]]:
    """Those of a single layer at this shape."""
    in_fp32 = timing.ratios(taken, (DEFAULT, RELATIVE))
    if shape == (8, 400, 256, 4, 5):
        found = [("1: own choice / relative", in_fp32[OWN, OURS], "<=", 0.55)]
        if (DEFAULT, GROUP_NORM) in taken:
            ratio = timing.ratios(taken, (DEFAULT, GROUP_NORM))[OWN, OURS]
            found.append(("1: own choice / torchaudio", ratio, "<=", 0.65))
        return found
    if shape == (4, 800, 512, 8, 5):
        share = flops / timing.medians(taken)[OWN, OURS] / timing.peaks(taken)[False]
        return [
            ("2: own choice / relative", in_fp32[OWN, OURS], "<=", 0.36),
            ("2: share of the peak in fp32", share, ">=", 0.67),
            ("3: bf16 / relative in fp32", in_fp32[BF16, OURS], "<=", 0.25),
            ("3: bf16 / relative in bf16",
             timing.ratios(taken, (BF16, RELATIVE))[BF16, OURS], "<=", 0.45),
        ]  # fmt: skip
    return []


def shape_of(text: str) -> Shape:
    """'8,400,256,4,5' -> Shape."""
    numbers = [int(part) for part in text.split(",")]
    if len(numbers) != 5 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not B,T,D,H,K")
    return Shape(*numbers)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = timing.parser("Conformer layers, forward and backward.", rounds=7)
    add = parser.add_argument
    add("--layers", type=int, default=1, help="of each encoder (%(default)s)")
    shapes = [Shape(8, 400, 256, 4, 5), Shape(4, 800, 512, 8, 5)]
    add("--shapes", type=shape_of, nargs="+", default=shapes, metavar="B,T,D,H,K")
    add("--torchaudio", type=Path, metavar="FOLDER", help="where a wheel of it was unpacked")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Prints the figures. Returns the exit code."""
    args = parse(argv)
    if not timing.ready(args, "transformers"):
        return 2
    torchaudio = find_torchaudio(args.torchaudio)
    if torchaudio is None:
        print("torchaudio: not found, left out (--torchaudio)")
    errors = {name: timing.product_error(name) for name in ("highest", "medium")}
    shown = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    print(
        f"error of a fp32 product, relative to float64: {shown}; own choice: {timing.own_matmul()}"
    )
    found = {}
    for shape in args.shapes:
        taken = measured(shape, args.layers, args.rounds, torchaudio)
        flops, peak = model_flops(shape, args.layers), timing.peaks(taken)
        letters = " ".join(f"{letter}{value}" for letter, value in shape._asdict().items())
        reached = f"{peak[False] / 1e9:.0f} GFLOP/s in fp32, {peak[True] / 1e9:.0f} in bf16"
        print(f"\n{letters}, {args.layers} layer(s): {flops / 1e9:.1f} GFLOP")
        print(f"products reach {reached}; cells: time, ratio to the reference, share of that\n")
        print(timing.table(rows(taken, flops)))
        asked = goals(shape, taken, flops) if args.layers == 1 else []
        print("\n" + timing.judged(asked) if asked else "")
        seconds = {f"{setting} | {name}": times for (setting, name), times in taken.items()}
        found[letters] = {"flops": flops, "peak": peak, "seconds": seconds, "goals": asked}
    about = {"layers": args.layers, "error": errors, "own_choice": timing.own_matmul()}
    timing.write_json(args.json, about | {"shapes": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
