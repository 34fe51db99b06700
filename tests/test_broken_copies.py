"""Do the checks find their faults? Each is asked of a copy of a module with one fault in it.

A copy is the module's source with one textual replacement. The check must pass for the module as it
is and raise AssertionError for the copy; were it deaf to the fault, its test elsewhere would show
nothing.
"""

import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import checks
import pytest
import torch
from checks import micro_config

import losses
import quantizer


@dataclass(frozen=True)
class Fault:
    """One replacement in one module, and the check that must notice it."""

    module: str
    old: str
    new: str
    check: Callable[[types.ModuleType], None]


def deep(check: Callable) -> Callable[[types.ModuleType], None]:
    """The check on a narrow model in float64, where nothing hides behind rounding."""
    return lambda module: check(module, micro_config(), torch.float64, 1e-10)


FAULTS = {
    # conformer: padding
    "depthwise convolution sees padding": Fault(
        "conformer",
        "        x = x * valid[..., None].to(x.dtype)\n",
        "",
        deep(checks.check_stack_ignores_padding),
    ),
    "group norm averages over padding": Fault(
        "conformer",
        "keep = valid[:, :, None].to(wide.dtype)",
        "keep = torch.ones_like(valid)[:, :, None].to(wide.dtype)",
        deep(checks.check_stack_ignores_padding),
    ),
    "attention reads padding": Fault(
        "conformer",
        "keys = (valid | ~valid.any(1, keepdim=True))[:, None, None, :]",
        "keys = torch.ones_like(valid)[:, None, None, :]",
        deep(checks.check_stack_ignores_padding),
    ),
    "convolution bias fills padding": Fault(
        "conformer",
        "            x = x * valid_mask(lens, x.shape[2])[:, None, :, None].to(x.dtype)\n",
        "",
        lambda module: checks.check_subsampled_padding_is_zero(module, micro_config()),
    ),
    "convolution bias leaks into speech": Fault(
        "conformer",
        "            x = x * valid_mask(lens, x.shape[2])[:, None, :, None].to(x.dtype)\n",
        "",
        deep(checks.check_speech_ignores_padding),
    ),
    "junk in padded features is convolved": Fault(
        "conformer",
        "x = features * valid_mask(lens, features.shape[1])[..., None].to(features.dtype)",
        "x = features",
        lambda module: checks.check_subsampled_padding_is_zero(module, micro_config()),
    ),
    "length rounds down": Fault(
        "conformer",
        "return (frames + SUBSAMPLING - 1) // SUBSAMPLING",
        "return frames // SUBSAMPLING",
        lambda module: checks.check_subsampled_padding_is_zero(module, micro_config()),
    ),
    "padding stays in the middle of a pair": Fault(
        "conformer",
        "    starts = speech_lens[:, None]\n",
        "    starts = torch.full_like(speech_lens, T)[:, None]\n",
        deep(checks.check_pairs_ignore_padding),
    ),
    # quantizer
    "mixture instead of one entry": Fault(
        "quantizer",
        "        return _entries(codebook, drawn)\n",
        '        return torch.einsum("mgv,gvd->mgd", soft, codebook)\n',
        checks.check_vectors_are_codebook_rows,
    ),
    "no gradient through the draw": Fault(
        "quantizer",
        "_StraightThrough.apply(soft, self.codebook, drawn)",
        "_entries(self.codebook, drawn)",
        checks.check_vectors_are_codebook_rows,
    ),
    "temperature counts forward passes": Fault(
        "quantizer",
        "            if self.training:\n",
        "            self.step += 1\n            if self.training:\n",
        checks.check_temperature_counts_optimiser_steps,
    ),
    "temperature is lost by a checkpoint": Fault(
        "quantizer",
        'self.register_buffer("step", torch.zeros((), dtype=torch.int64))',
        'self.register_buffer("step", torch.zeros((), dtype=torch.int64), persistent=False)',
        checks.check_temperature_counts_optimiser_steps,
    ),
    "temperature has no floor": Fault(
        "quantizer",
        ".clamp(min=floor)",
        "",
        checks.check_temperature_counts_optimiser_steps,
    ),
    "noise in the ids": Fault(
        "quantizer",
        "return Quantized(vectors, ids, drawn,",
        "return Quantized(vectors, drawn, drawn,",
        checks.check_ids_are_free_of_noise,
    ),
    # losses
    "the positive is among its negatives": Fault(
        "losses",
        "step = 1 + (draw * (size - 1).clamp(min=1)).long()",
        "step = (draw * size).long()",
        checks.check_negatives,
    ),
    "filler is drawn": Fault(
        "losses",
        "size = real.sum(1)[:, None, None]",
        "size = torch.ones_like(real).sum(1)[:, None, None]",
        checks.check_negatives,
    ),
    "the last of the others is never drawn": Fault(
        "losses",
        "(draw * (size - 1).clamp(min=1))",
        "(draw * (size - 2).clamp(min=1))",
        checks.check_negatives,
    ),
    "negatives from another utterance": Fault(
        "losses",
        "similarity = context @ target.transpose(1, 2)",
        "similarity = context @ target.roll(1, 0).transpose(1, 2)",
        checks.check_distractors_are_of_the_same_utterance,
    ),
    "equal codes stay in": Fault(
        "losses",
        "        if codes is not None:\n",
        "        if False:\n",
        checks.check_equal_codes_are_struck_out,
    ),
    "diversity is not scaled by the frames": Fault(
        "losses",
        "return Loss(count * (n_entries - soft_perplexity) / n_entries, count)",
        "return Loss((n_entries - soft_perplexity) / n_entries, count)",
        lambda module: checks.check_diversity_grows_with_the_frames(module, quantizer),
    ),
    "perplexity is not of the batch's mean": Fault(
        "quantizer",
        ".sum(0) / weight.sum().clamp(min=1)  # (G, V)",
        ".sum(0)  # (G, V)",
        lambda module: checks.check_diversity_grows_with_the_frames(losses, module),
    ),
    # RNN-T
    "a token is read a frame late": Fault(
        "losses",
        "by_token = alpha[n, :, :-1] + token[n]\n",
        "by_token = alpha[n, :, :-1] + token[min(n + 1, N - 1)]\n",
        checks.check_rnnt_equals_the_sum_over_paths,
    ),
    "tokens are written after the last frame": Fault(
        "losses",
        "in_row = (frame < logit_lens[:, None, None]) & (place <= ends)",
        "in_row = (frame < T) & (place <= ends)",
        checks.check_rnnt_equals_the_sum_over_paths,
    ),
    "the blank has no gradient of its own": Fault(
        "losses",
        "out.copy_(wide.scatter_add_(1, two, -p_q))",
        "out.copy_(wide.scatter_add_(1, two[:, 1:], -p_q[:, 1:]))",
        checks.check_rnnt_equals_the_sum_over_paths,
    ),
    "cells that no path visits have a gradient": Fault(
        "losses",
        ".softmax(-1).mul_(p_q.sum(1, keepdim=True))",
        ".softmax(-1)",
        checks.check_rnnt_ignores_padding,
    ),
    "the beam keeps alignments of one transcript apart": Fault(
        "rnnt",
        "total = _merge(score[..., None] + steps, score, prefixes)",
        "total = score[..., None] + steps",
        checks.check_beam_finds_the_best_of_all,
    ),
    "a complete hypothesis pays for further blanks": Fault(
        "rnnt",
        "steps[..., BLANK_ID].masked_fill(complete, 0.0)",
        "steps[..., BLANK_ID].clone()",
        checks.check_beam_finds_the_best_of_all,
    ),
    "recognition begins from another id than training": Fault(
        "rnnt",
        "self.write(torch.full((n_rows, 1), BLANK_ID, device=device))",
        "self.write(torch.full((n_rows, 1), BLANK_ID + 1, device=device))",
        lambda module: checks.check_recognition_begins_as_training_does(losses, module),
    ),
    # decoders
    "paths to one prefix are not added up": Fault(
        "decoders",
        "longer[1] = _log_add(longer[1], total + p)",
        "longer[1] = total + p",
        checks.check_prefix_beam_sums_over_alignments,
    ),
    "a label comes again without a blank": Fault(
        "decoders",
        "longer[1] = _log_add(longer[1], blank + p)",
        "longer[1] = _log_add(longer[1], total + p)",
        checks.check_prefix_beam_sums_over_alignments,
    ),
    "equal neighbours are aligned without a blank": Fault(
        "decoders",
        "may_skip[3::2] = targets[1:] != targets[:-1]",
        "may_skip[3::2] = True",
        checks.check_alignment_is_the_best_path,
    ),
    "the decoder reads the memory's padding": Fault(
        "decoders",
        "readable = (valid | ~valid.any(1, keepdim=True))[:, None, None, :]",
        "readable = torch.ones_like(valid)[:, None, None, :]",
        checks.check_decoder_ignores_memory_padding,
    ),
    "rows without memory read padding": Fault(
        "decoders",
        "        memory = memory.masked_fill(~valid[..., None], 0)\n",
        "",
        checks.check_decoder_ignores_memory_padding,
    ),
    "hypotheses go on from another's past": Fault(
        "decoders",
        "            state = state.reordered((first + source).flatten())\n",
        "",
        checks.check_beam_scores_are_those_of_forward,
    ),
    "the search gives up on answers that would grow long": Fault(
        "decoders",
        "hopeless = length_penalised(best_live, self.limit, self.alpha) <= worst",
        "hopeless = length_penalised(best_live, tokens.shape[1] - 1, self.alpha) <= worst",
        checks.check_length_penalty_prefers_longer_answers,
    ),
    # training
    "each rank divides by its own count": Fault(
        "training",
        "total = ranks.sum(torch.tensor(own, dtype=torch.float64, device=ranks.device)).tolist()",
        "total = own",
        checks.check_two_ranks_equal_one_process,
    ),
    "the average over ranks is not undone": Fault(
        "training",
        "weights.get(name, 1.0) * world_size / count.clamp(min=1)",
        "weights.get(name, 1.0) / count.clamp(min=1)",
        checks.check_two_ranks_equal_one_process,
    ),
    # pretrain
    "TLM names masked features": Fault(
        "pretrain",
        "ids = self.quantizer.name(pick(conv, speech.masked_index))",
        "ids = self.quantizer.name(0 * pick(conv, speech.masked_index))",
        checks.check_codes_name_unmasked_speech,
    ),
    "masked features are quantized": Fault(
        "pretrain",
        "unmasked = pick(conv, at)",
        "unmasked = pick(self.mask_fill(conv, speech.masked, lens), at)",
        checks.check_codes_name_unmasked_speech,
    ),
}


def broken_copy(fault: Fault) -> types.ModuleType:
    """The module with the fault in it. The replaced text must occur exactly once."""
    path = Path(importlib.import_module(fault.module).__file__)
    source = path.read_text(encoding="utf-8")
    if source.count(fault.old) != 1:  # not an assertion: the test below expects one of the check
        raise ValueError(f"{path.name} has {source.count(fault.old)} times: {fault.old!r}")
    copy = types.ModuleType(f"broken_{fault.module}")
    copy.__file__ = str(path)
    sys.modules[copy.__name__] = copy  # dataclasses look their module up
    try:
        exec(compile(source.replace(fault.old, fault.new), copy.__name__, "exec"), copy.__dict__)
    finally:
        del sys.modules[copy.__name__]
    return copy


@pytest.mark.parametrize("name", FAULTS)
def test_check_passes_for_the_module_and_fails_for_the_broken_copy(name):
    fault = FAULTS[name]
    fault.check(importlib.import_module(fault.module))
    copy = broken_copy(fault)
    with pytest.raises(AssertionError):
        fault.check(copy)
