"""A whole pre-training step with AdamW, on speech and on text, beside transformers' models.

    python benchmarks/step.py [--parts speech,text] [--rounds 3] [--threads 2] [--no-memory]
                              [--json step.json]

Hidden size 256, 8 layers, 4 heads, feed-forward 1024, no dropout. Speech is 8 rows of 10 s: ours
is w2v-BERT (contrastive, diversity, masked codes) through SlamPretraining and
training.optimizer_step, from the waveform (log-mel, masks and batch are made in the step) and from
ready batches; theirs is Wav2Vec2ConformerForPreTraining on waveforms, which has frames of 20 ms,
and on ready features of 40 ms as ours has, its front end left out; masks and negatives are ready.
Text is 32 rows of 128 tokens of 32,000: ours is the span-masked LM, theirs BertForMaskedLM on the
same tokens. Theirs step as the class has it with torch's default AdamW. Peak memory is that of two
steps in a process of its own, beyond what importing takes.
Exit code 2 when a package is missing.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timing
import torch
from timing import BF16, DEFAULT, EQUAL, OWN
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules

import conformer  # noqa: E402
import data  # noqa: E402
import pretrain  # noqa: E402
import training  # noqa: E402

ROWS, SECONDS = 8, 10  # of speech
TEXTS, TOKENS, VOCABULARY = 32, 128, 32_000
D, LAYERS, HEADS = 256, 8, 4
RATE = 1e-4
Step = Callable[[timing.Setting], object]

# ---------------------------------------------------------------------------------------- batches


def waveforms() -> list[Tensor]:
    """Noise, of which any other sound would cost as much."""
    generator = torch.Generator().manual_seed(0)
    shape = ROWS, SECONDS * conformer.SAMPLE_RATE
    return list(0.1 * torch.randn(*shape, generator=generator))


def speech_batch(waves: list[Tensor]) -> data.Batch:
    """As data.SpeechRows makes it of audio that is read: log-mel a row, masks, padding."""
    features = [conformer.log_mel(wave) for wave in waves]
    rngs = [data.row_rng(0, 0, row, data.SPEECH_MASKING) for row in range(len(waves))]
    length = max(map(len, features))
    return data.Batch(speech=data._speech_batch(features, rngs, data.SPEECH_MASK, length))


def text_batch() -> tuple[data.Batch, Tensor]:
    """As data.TextRows makes it, and the labels (B, U) of the same masks, -100 elsewhere."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(conformer.N_SPECIAL, VOCABULARY, size=(TEXTS, TOKENS))
    tokens[:, 0], tokens[:, -1] = conformer.CLS_ID, conformer.SEP_ID
    rngs = [data.row_rng(0, 0, row, data.TEXT_MASKING) for row in range(TEXTS)]
    text = data._text_batch(list(tokens), rngs, data.TEXT_MASK, TOKENS, VOCABULARY)
    labels = torch.full((TEXTS * TOKENS,), -100)
    real = text.masked_weight > 0
    labels[text.masked_index[real]] = text.targets[real]
    return data.Batch(text=text), labels.view(TEXTS, TOKENS)


# ------------------------------------------------------------------------------------------ steps


def own_model(modality: str, kernel: int) -> pretrain.SlamPretraining:
    """Speech passes half of the layers before and half after the contrastive loss, text all."""
    speech = modality == "speech"
    config = conformer.SlamConfig(
        vocab_size=VOCABULARY, speech_layers=LAYERS // 2 if speech else 0,
        mm_layers=LAYERS // 2 if speech else LAYERS, d_model=D, d_ff=4 * D, n_heads=HEADS,
        conv_kernel=kernel, dropout=0.0, n_codebooks=1, n_codes=1024, code_dim=D,
    )  # fmt: skip
    torch.manual_seed(0)
    objectives = pretrain.Objectives(modalities=(modality,), align=())
    return pretrain.SlamPretraining(config, objectives).train()


def own_step(modality: str, kernel: int, make: Callable[[], data.Batch]) -> Step:
    """What training.train does in a step of one micro-batch; the rate stays small."""
    model = own_model(modality, kernel)
    optimizer = training.make_optimizer(model, weight_decay=0.01)
    for group in optimizer.param_groups:
        group["lr"] = RATE
    parameters = list(model.parameters())
    weights = {"diversity": pretrain.DIVERSITY_WEIGHT}

    def step(setting: timing.Setting) -> float:
        with setting.products():
            batch = make()
            counts = {
                name: torch.tensor(count, dtype=torch.float64)
                for name, count in model.counts(batch).items()
            }
            scales = training.loss_scales(counts, weights, world_size=1)
            with setting.autocast():
                found, _ = model(batch)
            total = sum(loss.sum * scales[name].to(loss.sum.dtype) for name, loss in found.items())
            total.backward()
            training.optimizer_step(optimizer, parameters, model.config.grad_clip)
            optimizer.zero_grad(set_to_none=True)
            model.step_done()
        return float(total.detach())

    return step


def their_step(model: nn.Module, inputs: dict[str, Tensor], n_predicted: int) -> Step:
    """Forward, backward, torch's AdamW; the loss is summed over predictions if n_predicted."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)

    def step(setting: timing.Setting) -> float:
        with setting.products():
            with setting.autocast():
                loss = model(**inputs).loss / max(n_predicted, 1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def their_speech(front_end: bool) -> Step:
    """Wav2Vec2ConformerForPreTraining, kernel 31 and 2 x 320 codes as it comes."""
    from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerForPreTraining
    from transformers.models.wav2vec2 import modeling_wav2vec2 as hf

    torch.manual_seed(0)
    np.random.seed(0)  # theirs draws from numpy's global state
    config = Wav2Vec2ConformerConfig(
        hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=4 * D, position_embeddings_type="relative", hidden_dropout=0.0,
        activation_dropout=0.0, attention_dropout=0.0, conformer_conv_dropout=0.0,
        feat_proj_dropout=0.0, feat_quantizer_dropout=0.0, layerdrop=0.0,
    )  # fmt: skip
    model = Wav2Vec2ConformerForPreTraining(config)
    waves = torch.stack(waveforms())
    if front_end:
        T, inputs = int(model._get_feat_extract_output_lengths(waves.shape[1])), waves
    else:
        T = conformer.subsampled_lens(conformer.n_frames(waves.shape[1]))
        model.wav2vec2_conformer.feature_extractor = nn.Identity()
        inputs = torch.randn(ROWS, config.conv_dim[-1], T)
    masked = hf._compute_mask_indices((ROWS, T), 0.65, 10, min_masks=2)
    negatives = hf._sample_negative_indices((ROWS, T), config.num_negatives, masked)
    batch = {"input_values": inputs, "mask_time_indices": torch.from_numpy(masked)}
    batch["sampled_negative_indices"] = torch.from_numpy(negatives).long()
    return their_step(model, batch, int(masked.sum()))


def their_text() -> Step:
    """BertForMaskedLM, whose logits are of all positions; its loss is a mean already."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=D, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, intermediate_size=4 * D, max_position_embeddings=TOKENS,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    batch, labels = text_batch()
    inputs = {"input_ids": batch.text.tokens, "labels": labels}
    inputs["attention_mask"] = conformer.valid_mask(batch.text.lens, TOKENS).long()
    return their_step(BertForMaskedLM(config), inputs, n_predicted=0)


def own_speech(kernel: int, from_waveform: bool) -> Step:
    """From waveforms, or from one batch that was made of them before."""
    waves = waveforms()
    ready = None if from_waveform else speech_batch(waves)
    return own_step("speech", kernel, lambda: ready or speech_batch(waves))


def own_text() -> Step:
    """Kernel 5: the project's."""
    batch, _ = text_batch()
    return own_step("text", 5, lambda: batch)


FULL, EQUAL_FRAMES = "transformers, waveform, 20 ms frames", "transformers, features, 40 ms frames"
OURS, BERT, OWN_TEXT = "ours, waveform", "transformers, BertForMaskedLM", "ours, span-masked LM"
CASES: dict[str, dict[str, Callable[[], Step]]] = {
    "speech": {
        FULL: lambda: their_speech(front_end=True),
        EQUAL_FRAMES: lambda: their_speech(front_end=False),
        OURS: lambda: own_speech(5, from_waveform=True),
        "ours, ready batch": lambda: own_speech(5, from_waveform=False),
        "ours, waveform, kernel 31": lambda: own_speech(31, from_waveform=True),
    },
    "text": {BERT: their_text, OWN_TEXT: own_text},
}
UNITS = {"speech": ROWS * SECONDS, "text": TEXTS * TOKENS}  # of a step: seconds, tokens


def settings_of(name: str) -> tuple[str, ...]:
    """The long one is spared the third, which changes nothing in its front end's convolutions."""
    if name == FULL:
        return DEFAULT, BF16
    return (DEFAULT, EQUAL, BF16) + ((OWN,) if name.startswith("ours") else ())


# ------------------------------------------------------------------------------------- measurement


def measured(part: str, rounds: int) -> timing.Times:
    """{(setting, name): seconds of a step}."""
    cases = {}
    for name, make in CASES[part].items():
        step = make()
        for setting in settings_of(name):
            cases[setting, name] = functools.partial(step, timing.SETTINGS[setting])
    return timing.taking_turns(cases, rounds)


def memory(part: str, name: str, setting: str) -> float:
    """MiB of weights, moments, batch and two steps; this process must do nothing else."""
    import transformers.models.bert.modeling_bert  # noqa: F401
    import transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer  # noqa: F401

    before = timing.peak_mib()
    step = CASES[part][name]()
    for _ in range(2):
        step(timing.SETTINGS[setting])
    return timing.peak_mib() - before


def memories(part: str, threads: int) -> dict[str, dict[str, float]]:
    """{name: {setting: MiB}} in fp32 as it comes, ours as it chooses, and in bf16."""
    found: dict[str, dict[str, float]] = {}
    for name in CASES[part]:
        for setting in (OWN if name.startswith("ours") else DEFAULT, BF16):
            options = ("--memory-of", part, name, setting, "--threads", threads)
            found.setdefault(name, {})[setting] = timing.in_a_process(__file__, *options)
    return found


def rows(
    part: str, taken: timing.Times, peaks: dict[str, dict[str, float]]
) -> list[dict[str, object]]:
    """A line for each model: units a second in each setting, and its memory."""
    median, lines = timing.medians(taken), []
    unit = {"speech": "s of audio a second", "text": "tokens a second"}[part]
    for name in CASES[part]:
        line: dict[str, object] = {unit: name}
        for setting in timing.SETTINGS:
            seconds = median.get((setting, name))
            line[setting] = "" if seconds is None else UNITS[part] / seconds
        of_name = list(peaks.get(name, {}).values()) or [""] * 2
        line |= {"MiB, fp32": of_name[0], "MiB, bf16": of_name[1]}
        lines.append(line)
    return lines


def goals(part: str, taken: timing.Times) -> list[tuple[str, float, str, float]]:
    """Ratios within rounds; for speech of rates, for text of times."""

    def ratio(own: str, name: str, setting: str, theirs: str) -> float:
        return timing.ratios(taken, (setting, theirs))[own, name]

    if part == "text":
        return [
            ("6: own choice / BERT in fp32", ratio(OWN, OWN_TEXT, DEFAULT, BERT), "<=", 0.75),
            ("6: bf16 / BERT in bf16", ratio(BF16, OWN_TEXT, BF16, BERT), "<=", 0.55),
        ]
    found = []
    for theirs, goal in ((FULL, 25.0), (EQUAL_FRAMES, 4.0)):
        for own, setting in ((OWN, DEFAULT), (BF16, BF16)):
            faster = 1 / ratio(own, OURS, setting, theirs)
            found.append((f"5: {own} x {theirs}, {setting}", faster, ">=", goal))
    return found


# -------------------------------------------------------------------------------------------- main


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = timing.parser("A pre-training step, speech and text.", rounds=3)
    add = parser.add_argument
    add("--parts", default="speech,text", help="which of the two (%(default)s)")
    add("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure it too")
    add("--memory-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.parts = args.parts.split(",")
    unknown = [part for part in args.parts if part not in CASES]
    if unknown:
        parser.error(f"--parts: {unknown[0]!r} is not one of {', '.join(CASES)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Prints the figures. Returns the exit code."""
    args = parse(argv)
    if not timing.ready(args, "transformers"):
        return 2
    if args.memory_of:
        print(json.dumps(memory(*args.memory_of)))
        return 0
    # Before this process grows: a child's peak begins at what its parent holds.
    peaks = {part: memories(part, args.threads) if args.memory else {} for part in args.parts}
    found = {}
    for part in args.parts:
        taken = measured(part, args.rounds)
        asked = goals(part, taken)
        print(f"\n{part}: {UNITS[part]} {'s' if part == 'speech' else 'tokens'} a step\n")
        print(timing.table(rows(part, taken, peaks[part])))
        print("\n" + timing.judged(asked))
        times = {f"{setting} | {name}": values for (setting, name), values in taken.items()}
        found[part] = {"seconds": times, "goals": asked, "peak_mib": peaks[part]}
    timing.write_json(args.json, {"parts": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
