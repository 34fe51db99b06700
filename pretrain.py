"""Pre-train SLAM: one Conformer on unlabelled speech, unlabelled text and transcribed speech.

SLAM (Bapna et al. 2021) section 3. `python pretrain.py` makes a small embedded corpus and
pre-trains on it; `torchrun pretrain.py --modalities speech,text --align tlm,stm --speech ... --text
... --paired ...` is a real run.

Each optimiser step reads three streams and sums the gradients of all their objectives:
    speech   contrastive + 0.1 diversity on the speech encoder, masked code prediction on top
             (w2v-BERT)
    text     span-masked LM on top
    pairs    TLM (masked tokens and masked codes of the joined pair), STM (do they match?), CTC as
             an extension

Stages are runs: stage 1 `--align none`, stage 2 `--align tlm,stm --init STAGE1`, stage 3
`--modalities speech --init STAGE2`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import data
import demo
import fast
import losses as L
import training
from conformer import (
    FRAMES_PER_S,
    SIZES,
    SlamConfig,
    SlamEncoder,
    block_flops,
    join,
    sized,
    speech_flops,
    subsampled_lens,
    valid_mask,
)
from corpora import paths_of
from importers import covost_manifest, librispeech_manifest
from quantizer import GumbelQuantizer, LinearTarget
from training import Ranks

# UNSPECIFIED IN PAPER: deviation of the noise that replaces masked features, relative to their own.
MASK_FILL_STD = 0.1
FEATURE_MEAN = "encoder.speech.feature_mean"  # in a checkpoint: its normalisation was estimated
DIVERSITY_WEIGHT = 0.1  # w2v-BERT's alpha
# These decide the targets.
TARGET_PARTS = ("encoder.speech.subsampling", "quantizer.norm", "quantizer.logits", "linear_target")
# Held-out probe: find the transcript among so many texts, for so many utterances.
RETRIEVAL_TEXTS, RETRIEVAL_QUERIES = 100, 50

# ---------------------------------------------------------------------------------------- the model


@dataclasses.dataclass(frozen=True)
class Objectives:
    """What a run optimises. Raises ValueError when the switches do not go together."""

    modalities: tuple[str, ...] = ("speech", "text")
    align: tuple[str, ...] = ("tlm", "stm")
    speech_objective: str = "w2v-bert"
    stm_unmasked: bool = False

    def __post_init__(self) -> None:
        for given, known, flag in (
            (self.modalities, ("speech", "text"), "modalities"),
            (self.align, ("tlm", "stm", "ctc"), "align"),
        ):
            unknown = [name for name in given if name not in known]
            if unknown:
                raise ValueError(
                    f"--{flag} {','.join(given)}: {unknown[0]!r} is not one of {', '.join(known)}"
                )
        if not self.modalities:
            raise ValueError("--modalities is empty: give speech, text or speech,text")
        if self.align and set(self.modalities) != {"speech", "text"}:
            raise ValueError(
                f"--align {','.join(self.align)} needs --modalities speech,text; use --align none"
            )
        if self.align and self.align[0] != "tlm":
            raise ValueError(
                f"--align {','.join(self.align)}: stm and ctc come on top of tlm (none | tlm | "
                "tlm,stm | tlm,stm,ctc)"
            )
        if self.align and self.speech_objective == "contrastive":
            raise ValueError(
                "--speech-objective contrastive has no codes for TLM to predict: use --align none"
            )

    @property
    def loss_names(self) -> list[str]:
        """The losses of the run, in a fixed order."""
        names = []
        if "speech" in self.modalities:
            names += ["contrastive"]
            names += ["diversity", "code_mlm"] if self.speech_objective == "w2v-bert" else []
        names += ["span_lm"] if "text" in self.modalities else []
        names += ["tlm_text", "tlm_speech"] if "tlm" in self.align else []
        names += [name for name in ("stm", "ctc") if name in self.align]
        return names


def pick(x: Tensor, at: Tensor) -> Tensor:
    """Positions `at` (M,) of the flattened (B, L, D) -> (M, D).

    The gradient of x[at] would be added up one after the other, that of index_select is not.
    """
    return x.flatten(0, 1).index_select(0, at)


class SlamPretraining(nn.Module):
    """The encoder, the quantizer and one head an objective.

    Nothing is built that the objectives do not use.
    """

    def __init__(self, config: SlamConfig, objectives: Objectives) -> None:
        super().__init__()
        self.config, self.objectives, self.loss_names = config, objectives, objectives.loss_names
        D, V, G = config.d_model, config.n_codes, config.n_codebooks
        self.encoder = SlamEncoder(config, objectives.modalities)
        if "speech" in objectives.modalities:
            self.context_project = nn.Linear(D, config.code_dim)
            if objectives.speech_objective == "w2v-bert":
                schedule = (config.gumbel_start, config.gumbel_decay, config.gumbel_end)
                self.quantizer = GumbelQuantizer(
                    config.conv_dim, G, V, config.code_dim, schedule, config.codebook_init
                )
                # One head for code prediction and TLM's speech side, which ask the same.
                self.code_head = nn.Linear(D, G * V)
            else:
                self.linear_target = LinearTarget(config.conv_dim, config.code_dim)
        if "text" in objectives.modalities:
            # One head for the span LM and TLM's text side, untied from the embedding.
            self.text_head = nn.Linear(D, config.vocab_size)
            unigram = torch.full((config.vocab_size,), -math.log(config.vocab_size))
            # Log-frequencies of the training text.
            self.register_buffer("unigram", unigram, persistent=False)
        if "stm" in objectives.align:
            self.match_head = nn.Linear(D, 1)
        if "ctc" in objectives.align:
            self.ctc_head = nn.Linear(D, config.vocab_size)

    def step_done(self) -> None:
        """Called after each optimiser step: the Gumbel temperature counts them, over all stages."""
        if hasattr(self, "quantizer"):
            self.quantizer.step += 1

    def forward(self, batch: data.Batch) -> tuple[dict[str, L.Loss], dict[str, Tensor]]:
        """All objectives of one micro-batch: {name: Loss}, and statistics.

        The statistics add up over micro-batches.
        """
        out: dict[str, L.Loss] = {}
        statistics: dict[str, Tensor] = {}
        if batch.speech is not None:
            losses, statistics = self.speech_losses(batch.speech)
            out |= losses
        if batch.text is not None:
            out |= self.text_losses(batch.text)
        if batch.pairs is not None:
            out |= self.pair_losses(batch.pairs)
        return out, statistics

    def counts(self, batch: data.Batch) -> dict[str, float]:
        """What each loss of the run is divided by.

        Known before the forward pass: so it can be summed over ranks first.
        """
        counts = batch.counts()
        if hasattr(self, "ctc_head"):
            speech_lens = subsampled_lens(batch.pairs.speech.feature_lens)
            lens = batch.pairs.text.lens - 1  # without [CLS]
            fits = L.ctc_fits(speech_lens, batch.pairs.clean_tokens[:, 1:], lens)
            counts["ctc"] = float((lens * fits).sum())
        return {name: counts[name] for name in self.loss_names}

    def work(self, batch: data.Batch) -> dict[str, float]:
        """What a micro-batch holds, padding not counted.

        Returns: {"audio_s": seconds, "tokens": text tokens (transcripts among them), "flops":
                 floating-point operations of forward and backward, which has twice as many}.
        """
        config, audio_s, tokens, flops = self.config, 0.0, 0.0, 0.0
        D, M = config.d_model, config.mm_layers
        codes = 2 * D * config.n_codebooks * config.n_codes  # of a position, in the head
        quantized = 2 * config.n_codebooks * config.n_codes * (config.conv_dim + config.code_dim)
        if batch.speech is not None:
            speech, n_masked = batch.speech, float(batch.speech.masked_weight.sum())
            lens = subsampled_lens(speech.feature_lens)
            audio_s += float(speech.feature_lens.sum()) / FRAMES_PER_S
            flops += speech_flops(config, lens) + M * block_flops(config, lens)
            flops += n_masked * 2 * D * config.code_dim  # the context's projection
            if self.objectives.speech_objective == "w2v-bert":
                flops += n_masked * (codes + quantized)
        vocabulary = 2 * D * config.vocab_size
        if batch.text is not None:
            tokens += float(batch.text.lens.sum())
            flops += M * block_flops(config, batch.text.lens)
            flops += float(batch.text.masked_weight.sum()) * vocabulary
        if batch.pairs is not None:
            pairs, switches = batch.pairs, self.objectives
            lens = subsampled_lens(pairs.speech.feature_lens)
            audio_s += float(pairs.speech.feature_lens.sum()) / FRAMES_PER_S
            tokens += float(pairs.text.lens.sum())
            true, false = lens + pairs.text.lens, lens + pairs.negative_lens
            passes = 1 + (
                "ctc" in switches.align or "stm" in switches.align and switches.stm_unmasked
            )
            flops += passes * speech_flops(config, lens) + M * block_flops(config, true)
            if "stm" in switches.align:
                flops += M * block_flops(config, false)
                flops += M * block_flops(config, true) * switches.stm_unmasked
            flops += float(pairs.text.masked_weight.sum()) * vocabulary
            flops += float(pairs.speech.masked_weight.sum()) * codes
            if "ctc" in switches.align:
                flops += float(lens.sum()) * vocabulary
        return {"audio_s": audio_s, "tokens": tokens, "flops": 3 * flops}

    def mask_fill(self, conv: Tensor, masked: Tensor, lens: Tensor) -> Tensor:
        """Replace masked frames by noise: (B, T, C), (B, T) bool, (B,) -> (B, T, C).

        w2v-BERT fills with random vectors, not with one learned vector. Their deviation is relative
        to that of the row's features, so that the fill is faint whatever the convolutions' scale
        has become.
        """
        valid = valid_mask(lens, conv.shape[1])[..., None].to(conv.dtype)
        count = (valid.sum((1, 2), keepdim=True) * conv.shape[2]).clamp(min=1)
        mean = conv.sum((1, 2), keepdim=True) / count  # padding is zero
        variance = ((conv - mean) * valid).square().sum((1, 2), keepdim=True) / count
        noise = MASK_FILL_STD * variance.sqrt().detach() * torch.randn_like(conv)
        return torch.where(masked[..., None], noise, conv)

    def speech_losses(
        self, speech: data.SpeechBatch
    ) -> tuple[dict[str, L.Loss], dict[str, Tensor]]:
        """w2v-BERT on unlabelled speech, or w2v-conformer's contrastive loss alone, at the top."""
        conv, lens = self.encoder.speech.subsample(speech.features, speech.feature_lens)
        at, weight = speech.masked_index, speech.masked_weight  # (M,), M = B m
        rows = conv.shape[0], len(at) // conv.shape[0]  # (B, m)
        filled = self.mask_fill(conv, speech.masked, lens)  # (B, T, C)
        context, states = self.encoder.speech.encode(filled, lens)
        top = self.encoder.multimodal(states, lens)  # (B, T, D)
        unmasked = pick(conv, at)  # (M, C): what was there before the mask
        negatives = L.sample_negatives(weight.view(rows), L.N_NEGATIVES)

        if self.objectives.speech_objective == "contrastive":
            guess = self.context_project(pick(top, at))
            target = self.linear_target(unmasked)
            return {"contrastive": L.contrastive(guess, target, *negatives, None)}, {}

        codes = self.quantizer(unmasked, weight)
        guess = self.context_project(pick(context, at))  # (M, code_dim)
        losses = {
            "contrastive": L.contrastive(guess, codes.vectors, *negatives, codes.drawn),
            "diversity": L.diversity(codes.soft_perplexity, codes.hard_counts.numel(), weight),
            "code_mlm": L.code_prediction(self.code_logits(pick(top, at)), codes.ids, weight),
        }
        one = torch.ones_like(codes.soft_perplexity)
        return losses, {
            "code_counts": codes.hard_counts,
            "soft_perplexity": codes.soft_perplexity,
            "soft_perplexity_n": one * codes.hard_counts.shape[0],
        }

    def code_logits(self, states: Tensor) -> Tensor:
        """The head of masked codes, of speech alone and in pairs: (M, D) -> (M, G, V)."""
        return self.code_head(states).unflatten(1, (self.config.n_codebooks, -1))

    def text_losses(self, text: data.TextBatch) -> dict[str, L.Loss]:
        """Span-masked LM; the vocabulary softmax runs on masked positions only."""
        top = self.encoder.multimodal(self.encoder.text(text.tokens), text.lens)  # (B, U, D)
        logits = self.text_head(pick(top, text.masked_index))  # (M, V)
        loss = L.token_prediction(logits, text.targets, text.masked_weight, self.unigram)
        return {"span_lm": loss}

    def pair_losses(self, pairs: data.PairBatch) -> dict[str, L.Loss]:
        """TLM on the joined pair, STM on its [CLS] against another utterance's text, CTC.

        CTC is read before the text is joined: attention could copy the text. STM's negatives are
        extra rows: the same masked speech with masked foreign text, read for [CLS] alone. CTC, and
        STM with --stm-unmasked, read clean speech, at the price of a second pass through the speech
        encoder.
        """
        speech, text = pairs.speech, pairs.text
        with_stm, clean_stm = hasattr(self, "match_head"), self.objectives.stm_unmasked
        conv, lens = self.encoder.speech.subsample(speech.features, speech.feature_lens)
        filled = self.mask_fill(conv, speech.masked, lens)
        _, states = self.encoder.speech.encode(filled, lens)  # (B, T, D)
        negatives = with_stm and not clean_stm
        texts = torch.cat([text.tokens, pairs.negative_tokens]) if negatives else text.tokens
        text_lens = torch.cat([text.lens, pairs.negative_lens]) if negatives else text.lens
        top, text_start = self.encode_pairs(states, lens, texts, text_lens)
        out = self.tlm_losses(pairs, conv, top, text_start)
        if hasattr(self, "ctc_head") or (with_stm and clean_stm):
            _, states = self.encoder.speech.encode(conv, lens)
        if with_stm:
            if clean_stm:
                texts = torch.cat([pairs.clean_tokens, pairs.clean_negative_tokens])
                text_lens = torch.cat([text.lens, pairs.negative_lens])
                top, text_start = self.encode_pairs(states, lens, texts, text_lens)
            label = torch.cat([torch.ones_like(lens), torch.zeros_like(lens)])  # (2B,)
            out["stm"] = L.speech_text_matching(self.match_logit(top, text_start), label)
        if hasattr(self, "ctc_head"):
            # UNSPECIFIED IN PAPER (mSLAM): whether CTC sees masked speech. Here it hears all that
            # its transcript says.
            tokens, token_lens = pairs.clean_tokens[:, 1:], text.lens - 1  # without [CLS]
            out["ctc"] = L.ctc(self.ctc_head(states), lens, tokens, token_lens)
        return out

    def encode_pairs(
        self, states: Tensor, lens: Tensor, tokens: Tensor, token_lens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Join speech states (B, T, D) with B or 2B rows of text.

        Returns: (rows, T+U, D) and (rows,) places of [CLS].
        """
        copies = tokens.shape[0] // states.shape[0]
        states, lens = states.repeat(copies, 1, 1), lens.repeat(copies)
        joined, joined_lens = join(states, lens, self.encoder.text(tokens), token_lens)
        return self.encoder.multimodal(joined, joined_lens), lens

    def tlm_losses(
        self, pairs: data.PairBatch, conv: Tensor, top: Tensor, text_start: Tensor
    ) -> dict[str, L.Loss]:
        """Masked tokens and masked codes of the joined pair.

        Only of true texts, which are the first B rows of `top`.
        """
        speech, text = pairs.speech, pairs.text
        T, U, length = conv.shape[1], text.tokens.shape[1], top.shape[1]
        row, place = speech.masked_index // T, speech.masked_index % T
        ids = self.quantizer.name(pick(conv, speech.masked_index))  # (M, G)
        code_logits = self.code_logits(pick(top, row * length + place))  # (M, G, V)
        row, place = text.masked_index // U, text.masked_index % U
        token_logits = self.text_head(pick(top, row * length + text_start[row] + place))
        targets, weight = text.targets, text.masked_weight
        return {
            "tlm_text": L.token_prediction(token_logits, targets, weight, self.unigram),
            "tlm_speech": L.code_prediction(code_logits, ids, speech.masked_weight),
        }

    def match_logit(self, top: Tensor, text_start: Tensor) -> Tensor:
        """Logits (rows,) of "this text belongs to this speech".

        Args: top (rows, L, D); text_start (rows,) the place of [CLS].
        """
        cls = top[torch.arange(top.shape[0], device=top.device), text_start]  # (rows, D)
        return self.match_head(cls)[:, 0]


# ---------------------------------------------------------------------------------- held-out probes


def evaluate(
    model: SlamPretraining, rows: dict[str, Any], args: argparse.Namespace, ranks: Ranks
) -> dict[str, float]:
    """Held-out losses and accuracies of every objective, and two probes of alignment.

    `acc/tlm_text_wrong_speech` is TLM's text accuracy when each transcript is joined with another
    row's speech: what it lacks against `acc/tlm_text` is what the model hears. `acc/retrieval`
    finds the transcript among RETRIEVAL_TEXTS.
    """
    units = {  # as large as a micro-batch of training
        name: max(units // args.micro_batches, int(rows[name].lengths.max()))
        for name, units in stream_units(args).items()
        if name in rows
    }

    def measured(held_out: data.HeldOut) -> dict[str, float]:
        return training.means(training.evaluate_sums(model, held_out, args, ranks))

    metrics = measured(data.HeldOut(rows, units))
    if "pairs" in rows and "tlm" in model.objectives.align:
        pairs = {"pairs": rows["pairs"]}
        several = data.HeldOut(pairs, units, at_least=2, make=with_wrong_speech)
        wrong = measured(several)
        metrics["acc/tlm_text_wrong_speech"] = wrong.get("acc/tlm_text", math.nan)
    if "pairs" in rows and hasattr(model, "match_head"):
        metrics |= retrieval(model, rows["pairs"], args, ranks)
    return metrics


def with_wrong_speech(stream: str, pairs: data.PairBatch) -> data.Batch:
    """The same texts and text masks, each with the speech of the row before it."""
    speech = pairs.speech
    B, T = speech.masked.shape
    m = len(speech.masked_index) // B
    rolled = dataclasses.replace(
        speech,
        features=speech.features.roll(1, 0),
        feature_lens=speech.feature_lens.roll(1, 0),
        masked=speech.masked.roll(1, 0),
        masked_index=((speech.masked_index + T) % (B * T)).roll(m),
        masked_weight=speech.masked_weight.roll(m),
    )
    return data.Batch(**{stream: dataclasses.replace(pairs, speech=rolled)})


@torch.no_grad()
def retrieval(
    model: SlamPretraining, rows: data.PairRows, args: argparse.Namespace, ranks: Ranks
) -> dict[str, float]:
    """Share of held-out utterances whose own transcript has the highest match.

    It is looked for among RETRIEVAL_TEXTS different ones. Speech and text are whole (unmasked).
    Every candidate list is the same: the first different transcripts of the set.
    """
    texts: dict[str, int] = {}
    for i in range(len(rows.manifest)):
        texts.setdefault(rows.manifest.text(i), i)
    candidates = list(texts.values())[:RETRIEVAL_TEXTS]
    tokens = [torch.from_numpy(rows.tokens(i)) for i in candidates]
    lens = torch.tensor([len(t) for t in tokens], device=ranks.device)
    padded = nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(ranks.device)  # (candidates, U)
    model.eval()
    found = torch.zeros(2, dtype=torch.float64)
    for place in range(ranks.rank, min(RETRIEVAL_QUERIES, len(candidates)), ranks.world_size):
        row = torch.tensor([candidates[place]]).numpy()
        speech = rows.collate(row, row * 0, int(rows.lengths[row[0]])).speech.to(ranks.device)
        with fast.autocast(ranks.device, args.dtype):
            conv, speech_lens = model.encoder.speech.subsample(speech.features, speech.feature_lens)
            _, states = model.encoder.speech.encode(conv, speech_lens)  # (1, T, D)
            pairs = model.encode_pairs(states, speech_lens, padded, lens)
            scores = model.match_logit(*pairs)  # (candidates,)
        found += torch.tensor([float(scores.argmax() == place), 1.0], dtype=torch.float64)
    right, asked = ranks.sum(found.to(ranks.device)).tolist()
    return {
        "acc/retrieval": right / max(asked, 1),
        "chance/retrieval": 1 / max(len(candidates), 1),
        "count/retrieval": asked,
    }


# --------------------------------------------------------------------------------------------- data


def demo_files(root: Path, ranks: Ranks) -> dict[str, str]:
    """Make (or reuse) the demo corpus and what the importers and the tokenizer make of it.

    Returns: the path of each part by name; local rank 0 has made them, the others have waited.
    """
    prepared, stamp = root / "manifests", root / "demo.json"
    files = {name: prepared / f"{name}.jsonl" for name in (*DEMO_MANIFESTS, *DEMO_TRANSLATIONS)}
    files["tokenizer"] = prepared / "tokenizer.model"
    files |= {"text": root / "text" / "train.txt", "dev_text": root / "text" / "dev.txt"}
    if ranks.local_rank == 0:
        demo.make_demo(root, seed=0, log=ranks.log)
        voice, table = root / "cv-corpus-4" / "en", "covost_v2.en_de.tsv"
        for name, path in files.items():
            if path.exists() and path.stat().st_mtime >= stamp.stat().st_mtime:
                continue
            if name in DEMO_MANIFESTS:
                librispeech_manifest(root / "LibriSpeech", path, DEMO_MANIFESTS[name])
            elif name in DEMO_TRANSLATIONS:
                covost_manifest(voice, path, voice / table, DEMO_TRANSLATIONS[name])
            elif name == "tokenizer":
                with open(files["text"], encoding="utf-8") as lines:
                    data.Tokenizer.train(lines, SIZES["tiny"].vocab_size).save(path)
    ranks.wait()
    return {name: str(path) for name, path in files.items()}


# Splits of each manifest.
DEMO_MANIFESTS = {
    "speech": ["train-clean-100", "train-other-500"],
    "paired": ["train-clean-100"],
    "dev": ["dev-clean"],
    "test": ["test-clean"],
}
DEMO_TRANSLATIONS = {
    "st_train": ["train", "train_covost"],
    "st_dev": ["dev"],
    "st_test": ["test"],
}


def use_demo(args: argparse.Namespace, ranks: Ranks) -> None:
    """No data was given: fill in the demo's."""
    files = demo_files(args.demo_dir, ranks)
    args.speech, args.paired, args.text = (files[name] for name in ("speech", "paired", "text"))
    args.dev_speech = args.dev_paired = files["dev"]
    args.dev_text, args.tokenizer = files["dev_text"], args.tokenizer or Path(files["tokenizer"])


def load_rows(
    args: argparse.Namespace, objectives: Objectives, tokenizer: data.Tokenizer | None, dev: bool
) -> dict[str, Any]:
    """The rows of the streams that the objectives read.

    Returns: {"speech": SpeechRows, "text": TextRows, "pairs": PairRows}.
    Raises:  ValueError naming the flag when a stream of a training run has no data; held-out
             streams may be missing.
    """
    prefix, rows = ("dev_" if dev else ""), {}
    how = {"on_device": args.log_mel == "device"}
    wanted = [(name, name) for name in objectives.modalities]
    wanted += [("pairs", "paired")] if objectives.align else []
    for stream, name in wanted:
        paths = paths_of(getattr(args, prefix + name))
        if not paths:
            if dev:
                continue
            what = "--align" if stream == "pairs" else "--modalities"
            raise ValueError(
                f"--{name} is missing: {what} asks for {stream}; "
                "give its files, or no data at all for the demo"
            )
        if stream == "speech":
            manifest = data.Manifest.read(paths)
            rows[stream] = data.SpeechRows(manifest, args.max_audio_s, args.seed, **how)
        elif stream == "text":
            corpus = data.TextCorpus.open(paths, tokenizer)
            rows[stream] = data.TextRows.pack(corpus, args.row_tokens, args.seed)
        else:
            manifest = data.Manifest.read(paths, text_required=True)
            masks = {"speech_mask": args.tlm_speech_mask, "text_mask": args.tlm_text_mask}
            limits = args.max_audio_s, args.seed
            rows[stream] = data.PairRows(manifest, tokenizer, *limits, **masks, **how)
    return rows


def stream_units(args: argparse.Namespace) -> dict[str, int]:
    """What a step reads of each stream: log-mel frames of speech and of pairs, tokens of text."""
    return {
        "speech": int(FRAMES_PER_S * args.batch_s),
        "text": args.batch_tokens,
        "pairs": int(FRAMES_PER_S * args.batch_paired_s),
    }


def make_plans(rows: dict[str, Any], args: argparse.Namespace) -> dict[str, data.BatchPlan]:
    """One endless batch plan a stream.

    Streams have fixed numbers, so adding pairs leaves the order of speech alone.
    """
    common, plans = {"micro_batches": args.micro_batches, "seed": args.seed}, {}
    for number, (name, units) in enumerate(stream_units(args).items()):
        if name in rows:
            plans[name] = data.BatchPlan(rows[name].lengths, units, stream=number, **common)
    return plans


def unigram_of(rows: dict[str, Any], vocab_size: int) -> Tensor:
    """(V,) float32 log-frequencies of the training text's tokens.

    Each is counted once more than it occurs.
    """
    counts = torch.ones(vocab_size, dtype=torch.float64)
    counts += torch.as_tensor(rows["text"].corpus.counts.astype("float64"))
    counts[: data.N_SPECIAL] = 1
    return (counts / counts.sum()).log().float()


# ---------------------------------------------------------------------------- starting and going on


def initialise(
    model: SlamPretraining, checkpoint: dict[str, Any], ranks: Ranks
) -> dict[str, Tensor]:
    """Start a stage from another stage's weights; new heads stay as they were made.

    Returns: the weights that this stage does not build (text, when going on with speech alone).
             They are carried in its checkpoints unread, so that a later stage finds them.
    Raises:  ValueError naming a weight whose shape does not fit.
    """
    weights, own = checkpoint.get("carried", {}) | checkpoint["model"], model.state_dict()
    for name in own.keys() & weights.keys():
        if own[name].shape != weights[name].shape:
            raise ValueError(
                f"--init: {name} has shape {tuple(weights[name].shape)} in the checkpoint and "
                f"{tuple(own[name].shape)} here; "
                "give the --size and --tokenizer that it was trained with"
            )
    matched = {name: weights[name] for name in own if name in weights}
    model.load_state_dict(own | matched)
    carried = {name: value for name, value in weights.items() if name not in own}
    fresh = sorted({name.split(".")[0] for name in own.keys() - matched.keys()})
    taken = f"{len(matched)} of {len(own)} tensors taken, {len(carried)} carried unread"
    ranks.log(f"init: {taken}, new: {', '.join(fresh) or 'none'}")
    return carried


def identity_of(
    args: argparse.Namespace, config: SlamConfig, objectives: Objectives, rows: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """What a run is. "same": a resumed run must have it in common with the interrupted one, or
    steps would be replayed and skipped; "may change": a user may turn these on the way."""
    switches = json.loads(json.dumps(dataclasses.asdict(objectives)))  # lists, as when loaded
    batch = [args.batch_s, args.batch_tokens, args.batch_paired_s]
    same = {
        "--size and its options": dataclasses.asdict(config),
        "--modalities, --align, --speech-objective": switches,
        "--seed": args.seed,
        "--batch-s, --batch-tokens, --batch-paired-s": batch,
        "--tlm-speech-mask, --tlm-text-mask": [args.tlm_speech_mask, args.tlm_text_mask],
        "--max-audio-s, --row-tokens": [args.max_audio_s, args.row_tokens],
        "the data (rows and hash)": {
            name: [len(its.lengths), its.fingerprint] for name, its in rows.items()
        },
    }
    may_change = {
        "--lr": args.lr,
        "--warmup-steps": args.warmup_steps,
        "--weight-decay": args.weight_decay,
        "--grad-clip": args.grad_clip,
        "--loss-weights": args.loss_weights,
        "--dtype": args.dtype,
    }
    return {"same": same, "may change": may_change}


# ------------------------------------------------------------------------------- what the user sees


def parameter_table(model: SlamPretraining) -> str:
    """Lines of name and millions of parameters.

    The 24 blocks of `xl` stand apart from what surrounds them.
    """

    def count(*modules: nn.Module | None) -> int:
        there = (module for module in modules if module is not None)
        return sum(weight.numel() for module in there for weight in module.parameters())

    encoder, parts = model.encoder, []
    stacks = [encoder.multimodal] + ([encoder.speech.stack] if encoder.speech else [])
    blocks = sum(len(stack.blocks) for stack in stacks)
    parts.append((f"{blocks} Conformer blocks", count(*stacks)))
    if encoder.text is not None:
        parts.append(("text embedding", count(encoder.text)))
        parts.append(("blocks and embedding", count(*stacks, encoder.text)))
    if encoder.speech is not None:
        around = count(encoder.speech) - count(encoder.speech.stack)
        parts.append(("subsampling and linears", around))
    heads = {name: module for name, module in model.named_children() if name != "encoder"}
    parts += [(name.replace("_", " "), count(module)) for name, module in heads.items()]
    parts.append(("all", count(model)))
    return "\n".join(f"  {name:<26}{n / 1e6:10.2f} M" for name, n in parts)


def chance_table(model: SlamPretraining) -> str:
    """The loss of a model that has learned nothing, for each objective."""
    K, V, vocabulary = L.N_NEGATIVES, model.config.n_codes, model.config.vocab_size
    code, token = model.config.n_codebooks * math.log(V), math.log(vocabulary)
    levels = {
        "contrastive": f"{math.log(1 + K):.3f}  ln(1 + {K} distractors); "
        "less where rows are short or codes coincide",
        "diversity": "0 when all codes are used alike, near 1 when collapsed",
        "code_mlm": f"{code:.3f}  ln {V}; the log prints the entropy of the codes in use",
        "tlm_speech": f"{code:.3f}  the same",
        "span_lm": f"{token:.3f}  ln {vocabulary}; "
        "the log prints that of the corpus' frequencies",
        "tlm_text": f"{token:.3f}  the same",
        "stm": f"{math.log(2):.3f}  ln 2",
    }
    return "\n".join(f"  {name:<12}{levels[name]}" for name in model.loss_names if name in levels)


def plan_table(plans: dict[str, data.BatchPlan]) -> str:
    """Each stream's buckets: longest row, rows a micro-batch, and what padding the plan costs.

    The size of a step is what its rows hold, without padding: a micro-batch is whole rows, so this
    is below the --batch-... that was asked for, and above it where single rows are larger.
    """
    lines = []
    for name, plan in plans.items():
        unit, scale = ("tokens", 1) if name == "text" else ("s", FRAMES_PER_S)
        n_rows, waste = sum(map(len, plan.rows)), 100 * plan.padding_waste()
        size = f"{plan.mean_units() / scale:.6g} {unit} a step on average"
        lines.append(f"  {name}: {n_rows} rows, {size}, padding {waste:.1f}%")
        for row in plan.describe():
            longest, counts = row["longest"] / scale, f"{row['rows']:>9} rows"
            each = f"{row['rows_per_micro']} a micro-batch"
            lines.append(f"    up to {longest:7.2f} {unit:<6} {counts}, {each}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------- the entry point


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line; defaults that belong to a size stay None until the size is known."""
    parser = argparse.ArgumentParser(
        description="Pre-train SLAM. With no data arguments: on the embedded demo corpus."
    )
    add = parser.add_argument_group(
        "data (comma lists are pooled; manifests are JSON lines, see data.py)"
    ).add_argument
    add("--speech", metavar="A.jsonl,...", help="unlabelled audio")
    add(
        "--text",
        metavar="A.txt,...",
        help="plain sentences, one a line, blank lines between documents",
    )
    add("--paired", metavar="A.jsonl,...", help="transcribed audio")
    for name in ("speech", "text", "paired"):
        add(f"--dev-{name}", metavar="FILES", help=f"held-out {name}, for the evaluations")
    add("--tokenizer", type=Path, help="SentencePiece model made by `python data.py tokenizer`")
    add(
        "--demo-dir",
        type=Path,
        default=Path("demo_data"),
        help="where the demo is kept (default: %(default)s)",
    )
    add(
        "--max-audio-s",
        type=float,
        default=30.0,
        help="longer speech is cut, longer pairs left out (%(default)s)",
    )
    add(
        "--batch-s",
        type=float,
        help="seconds of unlabelled audio a step, all ranks (default: the size's)",
    )
    add(
        "--batch-paired-s",
        type=float,
        help="seconds of transcribed audio a step (default: the size's)",
    )
    add("--batch-tokens", type=int, help="text tokens a step, all ranks (default: the size's)")
    add("--row-tokens", type=int, help="longest text row in tokens (default: the size's)")
    add = parser.add_argument_group("model and objectives").add_argument
    add(
        "--size",
        choices=SIZES,
        default="tiny",
        help="see SIZES in conformer.py (default: %(default)s)",
    )
    add(
        "--modalities",
        default="speech,text",
        help="speech | text | speech,text (default: %(default)s)",
    )
    add(
        "--align", help="none | tlm | tlm,stm | tlm,stm,ctc (default: tlm,stm with both modalities)"
    )
    add(
        "--speech-objective",
        choices=("w2v-bert", "contrastive"),
        default="w2v-bert",
        help="contrastive: w2v-conformer",
    )
    add("--loss-weights", default="", metavar="NAME=W,...", help="weights other than the method's")
    add(
        "--stm-unmasked",
        action="store_true",
        help="matching on clean speech and text (default: masked as for TLM)",
    )
    for part, share in (("speech", data.TLM_SPEECH_MASK), ("text", data.TLM_TEXT_MASK)):
        about = f"share of {part} that TLM masks (default: %(default)s)"
        add(f"--tlm-{part}-mask", type=float, default=share, help=about)
    add(
        "--out-dir",
        type=Path,
        default=Path("runs/demo"),
        help="checkpoints, metrics.jsonl, curves.png (%(default)s)",
    )
    training.add_arguments(parser)
    return parser.parse_args(argv)


# Flags whose default is the size's; then those that must be above 0, 0 or more, 1 or more.
FLAGS_OF_SIZE = (
    "max_steps", "lr", "warmup_steps", "grad_clip",
    "batch_s", "batch_paired_s", "batch_tokens", "row_tokens",
)  # fmt: skip
FLAGS_ABOVE_0 = ("grad_clip", "batch_s", "batch_paired_s", "max_audio_s")
FLAGS_FROM_0 = (
    "lr", "seed", "num_workers", "warmup_steps", "weight_decay", "eval_every", "keep_every",
)  # fmt: skip
FLAGS_FROM_1 = (
    "max_steps", "micro_batches", "log_every", "save_every", "keep_last", "max_bad_steps",
    "batch_tokens",
)  # fmt: skip


def resolve(args: argparse.Namespace, ranks: Ranks) -> Objectives:
    """Fill in what depends on the size, on the ranks and on other flags.

    Raises: ValueError for what cannot be.
    """
    size = sized(args.size)
    for name in FLAGS_OF_SIZE:
        if getattr(args, name) is None:
            setattr(args, name, getattr(size, name))
    training.check_numbers(
        args, from_1=FLAGS_FROM_1, from_0=FLAGS_FROM_0, above_0=FLAGS_ABOVE_0,
        share=("tlm_speech_mask", "tlm_text_mask"), part=("max_bad_share",),
    )  # fmt: skip
    modalities = tuple(args.modalities.split(","))
    both = set(modalities) == {"speech", "text"} and args.speech_objective == "w2v-bert"
    align = args.align or ("tlm,stm" if both else "none")
    align = () if align == "none" else tuple(align.split(","))
    objectives = Objectives(modalities, align, args.speech_objective, args.stm_unmasked)
    args.dtype = training.resolve_dtype(args.dtype, ranks.device)
    args.log_mel = training.resolve_log_mel(args.log_mel, ranks.device)
    weights = training.parse_weights(args.loss_weights, objectives.loss_names)
    args.loss_weights = {"diversity": DIVERSITY_WEIGHT} | weights
    return objectives


def describe(
    model: SlamPretraining, plans: dict[str, data.BatchPlan], args: argparse.Namespace
) -> str:
    """What a run is, before it starts: parameters, chance levels, batch plan."""
    streams = [f"{args.batch_s:g} s of speech"] if "speech" in model.encoder.modalities else []
    streams += [f"{args.batch_tokens} text tokens"] if "text" in model.encoder.modalities else []
    streams += [f"{args.batch_paired_s:g} s of pairs"] if model.objectives.align else []
    no_plan = "no data given, and --dry-run does not make the demo: there is no plan to show"
    lines = [f"size {args.size}: parameters", parameter_table(model)]
    lines += ["loss at chance", chance_table(model)]
    lines.append(
        f"a step: {', '.join(streams)}, in {args.micro_batches} micro-batches; "
        f"{args.max_steps} steps, {args.dtype}"
    )
    lines.append(plan_table(plans) if plans else f"  {no_plan}")
    return "\n".join(lines)


def find_tokenizer(
    args: argparse.Namespace, objectives: Objectives, checkpoint: dict[str, Any] | None
) -> data.Tokenizer | None:
    """The checkpoint's tokenizer, or --tokenizer; None when neither is there.

    Raises: ValueError when they differ.
    """
    stored = checkpoint.get("tokenizer") if checkpoint else None
    kept = data.Tokenizer(bytes(stored.tolist())) if stored is not None else None
    given = data.Tokenizer.load(args.tokenizer) if args.tokenizer else None
    if kept and given and kept.fingerprint != given.fingerprint:
        raise ValueError(
            f"--tokenizer {args.tokenizer}: is not the one that the checkpoint was trained with; "
            "leave the flag out"
        )
    if "text" in objectives.modalities and not (kept or given):
        raise ValueError(
            "--tokenizer is missing: make one with "
            "`python data.py tokenizer --text ... --out tokenizer.model`"
        )
    return kept or given


@dataclasses.dataclass
class Run:
    """All that a run consists of once its arguments have been understood."""

    args: argparse.Namespace
    ranks: Ranks
    model: SlamPretraining
    optimizer: torch.optim.Optimizer
    rows: dict[str, Any]
    dev_rows: dict[str, Any]
    plans: dict[str, data.BatchPlan]
    tokenizer: data.Tokenizer | None
    identity: dict[str, Any]  # what a checkpoint must have in common with this run to be resumed
    start_step: int
    carried: dict[str, Tensor]  # weights of an earlier stage that this one does not build

    def save(self, step: int) -> None:
        """Write a checkpoint on rank 0."""
        if self.ranks.rank == 0:
            model_bytes = list(self.tokenizer.model_bytes) if self.tokenizer else None
            training.save_checkpoint(self.args.out_dir, step, {
                "entry_point": "pretrain.py",
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "config": dataclasses.asdict(self.model.config),
                "modalities": list(self.model.encoder.modalities),
                "tokenizer": torch.tensor(model_bytes, dtype=torch.uint8) if model_bytes else None,
                "args": {
                    name: getattr(self.args, name)
                    for name in ("micro_batches", "size", "fp32_matmul")
                },
                "run": self.identity,
                "carried": self.carried,
            }, self.args.keep_last, self.args.keep_every)  # fmt: skip


def prepare(args: argparse.Namespace, ranks: Ranks) -> Run | None:
    """From the command line to a run that can start.

    Returns: None when there is nothing to run (--dry-run, or it is done).
    """
    objectives = resolve(args, ranks)
    resumed, initial, path = training.find_start(args, "pretrain.py", ("pretrain.py",))
    training.resolve_micro_batches(args, ranks, resumed)
    given = [args.speech, args.text, args.paired]
    if args.dry_run and not any(given) and not demo.is_complete(args.demo_dir):
        with torch.device("meta"):
            ranks.log(describe(SlamPretraining(sized(args.size), objectives), {}, args))
        return None
    if not any(given):
        use_demo(args, ranks)
    tokenizer = find_tokenizer(args, objectives, resumed or initial)
    config = sized(args.size)
    if tokenizer:
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    for turn in (True, False):  # local rank 0 first: it writes the token cache that the others find
        if turn == (ranks.local_rank == 0):
            rows, dev_rows = (load_rows(args, objectives, tokenizer, dev) for dev in (False, True))
        ranks.wait()
    plans = make_plans(rows, args)
    if args.dry_run:
        with torch.device("meta"):
            ranks.log(describe(SlamPretraining(config, objectives), plans, args))
        return None
    for name, its in rows.items():
        for reason, n in getattr(its, "left_out", {}).items():
            ranks.log(f"{name}: {n} rows left out: {reason}")
        if getattr(its, "widened", 0):
            ranks.log(
                f"{name}: {its.widened} rows have no other transcript within 10% of their length; "
                "wider ones are drawn"
            )

    torch.manual_seed(args.seed)
    dtype = torch.float64 if args.dtype == "fp64" else torch.float32
    model = SlamPretraining(config, objectives).to(ranks.device, dtype)
    if "text" in rows:
        model.unigram.copy_(unigram_of(rows, config.vocab_size))
    identity, start_step, carried = identity_of(args, config, objectives, rows), 0, {}
    if resumed:
        changed = training.check_same_run(resumed["run"], identity, path)
        start_step, carried = resumed["step"], resumed["carried"]
        if start_step >= args.max_steps:
            ranks.log(
                f"{path}: this run has made its {args.max_steps} steps; "
                "raise --max-steps, or choose another --out-dir"
            )
            return None
        model.load_state_dict(resumed["model"])
        ranks.log("\n  ".join([f"resumed {path} at step {start_step}", *changed]))
    elif initial:
        carried = initialise(model, initial, ranks)
    normalised = initial and FEATURE_MEAN in initial["carried"] | initial["model"]
    if "speech" in objectives.modalities and not (resumed or normalised):
        mean, std = data.feature_statistics(rows["speech"].manifest, seed=args.seed)
        model.encoder.speech.feature_mean.copy_(torch.from_numpy(mean))
        model.encoder.speech.feature_std.copy_(torch.from_numpy(std))
    rates = dict.fromkeys(TARGET_PARTS, training.Rate(config.target_lr_scale))
    optimizer = training.make_optimizer(model, args.weight_decay, rates)
    if resumed:
        training.load_optimizer(optimizer, resumed["optimizer"])
    training.make_fast(model, args, ranks, resumed and resumed["args"].get("fp32_matmul"))
    return Run(
        args, ranks, model, optimizer, rows, dev_rows, plans, tokenizer,
        identity, start_step, carried,
    )  # fmt: skip


def follow(run: Run) -> int:
    """Train it. Returns 0, or the number of the signal that stopped it."""
    args, ranks, model = run.args, run.ranks, run.model

    def held_out(step: int) -> training.Evaluation:
        metrics = evaluate(model, run.dev_rows, args, ranks)
        names = [*model.loss_names, "tlm_text_wrong_speech", "retrieval"]
        return training.Evaluation(metrics, training.summary_table(metrics, names))

    return training.follow(
        model, data.PretrainData(**{name: (run.rows[name], run.plans[name]) for name in run.rows}),
        args, ranks, run.start_step, optimizer=run.optimizer, save=run.save,
        evaluate=held_out if run.dev_rows else None,
        about={"config": dataclasses.asdict(model.config)},
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """The entry point."""
    args = parse_arguments(argv)

    def run(ranks: Ranks) -> int:
        prepared = prepare(args, ranks)
        if prepared is None:
            return 0
        ranks.log(describe(prepared.model, prepared.plans, args))
        return follow(prepared)

    training.run_entry_point(run)


if __name__ == "__main__":
    main()
