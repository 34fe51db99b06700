"""All that stands on the encoder: CTC searches, Transformer decoder, classifier, and task models.

A head turns the encoder's states into labels. For CTC it is one linear in the model that uses it,
so that only the searches live here; translation and text normalisation have a small Transformer
decoder that reads the states by cross-attention; GLUE has a linear on [CLS]. The transducer, with
its network and its search, is in rnnt.py.

Public:  Hypothesis, ctc_greedy, ctc_prefix_beam, ctc_align, TransformerDecoder and its parts,
         length_penalised, Classifier; HeadConfig, HEAD_SIZES, TaskBatch, TaskModel.
Letters: B rows, T encoder frames, U tokens, V vocabulary, D width, H heads, W beam width.
Source:  Graves et al. 2006 and Hannun et al. 2014 (CTC), Vaswani et al. 2017 (Transformer),
         Wu et al. 2016 (length penalty), SLAM (Bapna et al. 2021) for the decoder's size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import losses as L
from conformer import (
    FRAMES_PER_S,
    PAD_ID,
    SEP_ID,
    SlamConfig,
    SlamEncoder,
    sinusoids,
    subsampled_lens,
    valid_mask,
)
from losses import BLANK_ID
from rnnt import Hypothesis, Transducer
from training import RowFault, TensorBatch

# --------------------------------------------------------------------------------------------- CTC


def ctc_greedy(log_probs: Tensor, lens: Tensor) -> list[list[int]]:
    """The most probable symbol of each frame, with runs merged and then blanks removed.

    Args: log_probs (B, T, V), or logits; lens (B,) int64.
    """
    best = log_probs.argmax(-1)  # (B, T)
    before = F.pad(best, (1, 0), value=BLANK_ID)[:, :-1]
    begins = (best != BLANK_ID) & (best != before) & valid_mask(lens, best.shape[1])
    return [row[kept].tolist() for row, kept in zip(best.cpu(), begins.cpu(), strict=True)]


def ctc_prefix_beam(log_probs: Tensor, lens: Tensor, width: int) -> list[list[Hypothesis]]:
    """The most probable label sequences, each summed over its alignments.

    Many paths collapse to one sequence. So the beam holds prefixes, not paths, and of each prefix
    two masses: of the paths that end in a blank and of those that end in its last symbol. They part
    at a repeated symbol, which prolongs the last one unless a blank came between.

    Args:    log_probs (B, T, V) after log_softmax; lens (B,) int64; width, the prefixes kept at
             each frame.
    Returns: for each row up to `width` hypotheses, best first. A score is never above the
             sequence's true log-probability, and equals it when nothing had to be dropped.
    Source:  Hannun et al. 2014 (arXiv 1408.2873), algorithm 1, without a language model.
    """
    # Only a frame's W + 1 most probable symbols are tried. A label behind them would not be kept:
    # the same prefix goes on in W better ways, with each of those symbols (a blank leaves it as it
    # is) except its own last, which is partly spent on prolonging it.
    top = log_probs.topk(min(width + 1, log_probs.shape[2])).indices.tolist()
    n_best = []
    for row, row_top, n in zip(log_probs, top, lens.tolist(), strict=True):
        beam = {(): (0.0, -math.inf)}  # nothing said yet, as if a blank had come before
        for frame, labels in zip(row[:n].double().cpu().numpy(), row_top[:n], strict=True):
            beam = _next_beam(beam, frame, labels, width)
        n_best.append([Hypothesis(list(p), _log_add(*masses)) for p, masses in beam.items()])
    return n_best


_Beam = dict[tuple[int, ...], tuple[float, float]]  # prefix -> log masses (blank, symbol)


def _next_beam(beam: _Beam, frame: np.ndarray, labels: list[int], width: int) -> _Beam:
    """One frame further: every prefix stays or grows by a label; the best `width` are kept.

    Args:    beam, best first; frame (V,) float64 log-probabilities; labels, the candidates.
    Returns: the next beam, best first.
    """
    # A prefix also hands its mass on to a longer one that is in the beam already.
    symbols = sorted({*labels, *(prefix[-1] for prefix in beam if prefix)} - {BLANK_ID})
    log_p = dict(zip(symbols, frame[symbols].tolist(), strict=True))
    blank_p = float(frame[BLANK_ID])
    grown: dict[tuple[int, ...], list[float]] = {}
    for prefix, (blank, symbol) in beam.items():
        total = _log_add(blank, symbol)
        same = grown.setdefault(prefix, [-math.inf, -math.inf])
        same[0] = total + blank_p
        for s, p in log_p.items():
            longer = grown.setdefault((*prefix, s), [-math.inf, -math.inf])
            if prefix and s == prefix[-1]:
                same[1] = _log_add(same[1], symbol + p)  # the last symbol goes on
                longer[1] = _log_add(longer[1], blank + p)  # it comes again, after a blank
            else:
                longer[1] = _log_add(longer[1], total + p)
    possible = [(_log_add(*masses), prefix) for prefix, masses in grown.items()]
    possible = [(score, prefix) for score, prefix in possible if score > -math.inf]
    best = sorted(possible, reverse=True)[:width]
    return {prefix: (grown[prefix][0], grown[prefix][1]) for _, prefix in best}


def _log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    high, low = (a, b) if a > b else (b, a)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def ctc_align(log_probs: Tensor, targets: Tensor) -> tuple[Tensor, float]:
    """When is each token said? The most probable alignment of a transcript, by Viterbi.

    The states are the tokens with a blank before, between and after them: 2U+1. A path stays in its
    state, goes to the next, or skips the blank between two tokens that differ.

    Args:    log_probs (T, V) after log_softmax; targets (U,) int64 without blanks or padding.
    Returns: (U, 2) int64 on CPU, first and last frame of each token; and the path's
             log-probability.
    Raises:  ValueError when there are fewer frames than tokens, plus one between equal neighbours.
    Source:  Graves et al. 2006, section 4.1, with max in place of the sum.
    """
    T, U, targets = log_probs.shape[0], targets.shape[0], targets.cpu()
    if (targets == BLANK_ID).any():
        raise ValueError(f"targets hold the blank, {BLANK_ID}: give tokens without padding")
    repeats = int((targets[1:] == targets[:-1]).sum())
    if T < max(U + repeats, 1):
        needed = f"{U} tokens, {repeats} of them equal to the one before, need {U + repeats} frames"
        raise ValueError(f"no alignment: {needed}, at least 1; there are {T}")
    symbols = torch.full((2 * U + 1,), BLANK_ID)
    symbols[1::2] = targets
    may_skip = torch.zeros(2 * U + 1, dtype=torch.bool)  # enter from two states before
    may_skip[3::2] = targets[1:] != targets[:-1]
    emitted = log_probs[:, symbols.to(log_probs.device)].double().cpu()  # (T, 2U+1)
    score = torch.full((2 * U + 1,), -math.inf, dtype=torch.float64)
    score[:2] = emitted[0, :2]
    steps = torch.zeros(T, 2 * U + 1, dtype=torch.int64)  # taken into each state: 0, 1 or 2
    for t in range(1, T):
        go = F.pad(score, (1, 0), value=-math.inf)[:-1]
        skip = F.pad(score, (2, 0), value=-math.inf)[:-2].masked_fill(~may_skip, -math.inf)
        score, steps[t] = torch.stack([score, go, skip]).max(0)
        score = score + emitted[t]
    last = max(2 * U - 1, 0) + int(score[-2:].argmax())  # in the last token, or in a blank after it
    return _token_spans(steps, last), float(score[last])


def _token_spans(steps: Tensor, state: int) -> Tensor:
    """Walk a Viterbi path back from its last state.

    (T, 2U+1) steps into each state -> (U, 2) first and last frame in each token's state.
    """
    path = []
    for step in steps.flip(0):
        path.append(state)
        state -= int(step[state])
    path = torch.tensor(path[::-1])  # (T,), never falling
    token_states = torch.arange(1, steps.shape[1], 2)  # (U,)
    last = torch.searchsorted(path, token_states, right=True) - 1
    return torch.stack([torch.searchsorted(path, token_states), last], dim=1)


# ------------------------------------------------------------------------------ Transformer decoder


class Attention(nn.Module):
    """Multi-head attention. What is read becomes keys and values first, so that these can be kept.

    The key projection has no bias, for the reason given in conformer.SelfAttention.
    """

    def __init__(self, dim: int, source_dim: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        if dim % n_heads:
            raise ValueError(f"decoder width {dim} must be divisible by {n_heads} heads")
        self.n_heads, self.p_drop = n_heads, dropout
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(source_dim, dim, bias=False)
        self.value = nn.Linear(source_dim, dim)
        self.out = nn.Linear(dim, dim)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, H, L, D/H)."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def keys_values(self, source: Tensor) -> Tensor:
        """(B, L, source_dim) -> (2, B, H, L, D/H)."""
        return torch.stack([self._heads(self.key(source)), self._heads(self.value(source))])

    def forward(
        self, x: Tensor, keys_values: Tensor, readable: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Each of Q positions reads what it may.

        Args:    x (B, Q, D); keys_values (2, B, H, L, D/H); readable (B, 1, 1, L) bool, or None for
                 all; causal: position i reads 0..i.
        Returns: (B, Q, D).
        """
        q, (k, v) = self._heads(self.query(x)), keys_values
        p_drop = self.p_drop if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=readable, is_causal=causal, dropout_p=p_drop
        )
        return self.out(mixed.transpose(1, 2).flatten(2))  # from (B, H, Q, D/H)


class DecoderLayer(nn.Module):
    """Self-attention, attention to the memory, feed-forward; LayerNorm before each (pre-norm)."""

    def __init__(self, dim: int, memory_dim: int, n_heads: int, d_ff: int, dropout: float) -> None:
        super().__init__()
        self.self_norm, self.memory_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attention = Attention(dim, dim, n_heads, dropout)
        self.memory_attention = Attention(dim, memory_dim, n_heads, dropout)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, d_ff),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(d_ff, dim),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, readable: Tensor) -> Tensor:
        """All U positions of B rows at once.

        Args:    x (B, U, D); memory (2, B, H, T, D/H), its keys and values; readable (B, 1, 1, T).
        Returns: (B, U, D).
        """
        h = self.self_norm(x)
        own = self.self_attention.keys_values(h)
        x = x + self.dropout(self.self_attention(h, own, causal=True))
        return self._read_memory(x, memory, readable)

    def step(
        self, x: Tensor, memory: Tensor, readable: Tensor, past: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The newest position of W hypotheses for each of B rows.

        For self-attention these are B x W sequences, each with a past of its own. For the memory
        they are W readers of the same row, so that it needs no copy for each.

        Args:    x (B, W, D); memory and readable as in forward; past (2, B x W, H, U, D/H), keys
                 and values of the positions before.
        Returns: (B, W, D); and the past with this position, U + 1.
        """
        h = self.self_norm(x).flatten(0, 1)[:, None]  # (B x W, 1, D)
        past = torch.cat([past, self.self_attention.keys_values(h)], dim=3)
        x = x + self.dropout(self.self_attention(h, past)).view_as(x)
        return self._read_memory(x, memory, readable), past

    def _read_memory(self, x: Tensor, memory: Tensor, readable: Tensor) -> Tensor:
        read = self.memory_attention(self.memory_norm(x), memory, readable)
        x = x + self.dropout(read)
        return x + self.dropout(self.feed_forward(x))


class DecoderState(NamedTuple):
    """What decoding token by token keeps between steps, for B rows of W hypotheses each."""

    memory: list[Tensor]  # of each layer (2, B, H, T, D/H): keys and values, computed once
    readable: Tensor  # (B, 1, 1, T) bool: frames that may be read
    past: list[Tensor]  # of each layer (2, B x W, H, U, D/H): keys and values of the tokens so far

    def reordered(self, source: Tensor) -> DecoderState:
        """Hypothesis i goes on from what was hypothesis source[i]; (B x W,) int64, same row."""
        return self._replace(past=[past.index_select(1, source) for past in self.past])


class TransformerDecoder(nn.Module):
    """Writes a token sequence while reading the encoder's states, the memory.

    The first input is a tag, which says what to write: in which language, where there are several;
    a mere beginning where there is one. SEP_ID ends a sequence. SLAM's translation decoder has 4
    layers of 384, feed-forward 1536, 4 heads, 8192 sub-words.
    """

    def __init__(
        self,
        vocab_size: int,
        memory_dim: int,
        *,
        dim: int,
        n_layers: int,
        n_heads: int,
        d_ff: int,
        dropout: float,
        n_tags: int = 1,
    ) -> None:
        """Make the layers.

        Args: vocab_size  V; the tags have the ids after it, and are never an output.
              memory_dim  width of the encoder's states.
              dim         D; n_layers, n_heads, d_ff and dropout are of the decoder, too.
        """
        super().__init__()
        self.vocab_size, self.dim = vocab_size, dim
        self.embedding = nn.Embedding(vocab_size + n_tags, dim)
        # After scaling by sqrt(D), of the size of the position encodings that are added.
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.layers = nn.ModuleList(
            DecoderLayer(dim, memory_dim, n_heads, d_ff, dropout) for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(dim)
        # UNSPECIFIED IN PAPER: tied or not. Untied, as the pre-training heads are.
        self.output = nn.Linear(dim, vocab_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, tags: Tensor, memory: Tensor, memory_lens: Tensor) -> Tensor:
        """Scores of every next token, given those before it (teacher forcing).

        Args:    tokens (B, U) int64, without tag and end. Beyond a row's end PAD_ID: no position
                 reads what comes after it. tags (B,) int64; memory (B, T, memory_dim); memory_lens
                 (B,) int64.
        Returns: logits (B, U+1, V). Position u predicts token u, a row's last one the end, SEP_ID.
        """
        inputs = torch.cat([(self.vocab_size + tags)[:, None], tokens], dim=1)  # (B, U+1)
        x = self._embed(inputs, sinusoids(inputs.shape[1], self.dim, inputs.device))
        memories, readable = self._prepare(memory, memory_lens)
        for layer, its_memory in zip(self.layers, memories, strict=True):
            x = layer(x, its_memory, readable)
        return self.output(self.norm(x))

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """(B, U) ids and (U, D) or (D,) position encodings -> (B, U, D)."""
        x = self.embedding(ids) * math.sqrt(self.dim)
        return self.dropout(x + positions.to(x.dtype))

    def _prepare(self, memory: Tensor, memory_lens: Tensor) -> tuple[list[Tensor], Tensor]:
        """The memory as each layer reads it: keys and values (2, B, H, T, D/H); and `readable`.

        A row without memory reads everywhere, but nothing besides zeros: what the padding holds
        never matters, and there is no NaN.
        """
        valid = valid_mask(memory_lens, memory.shape[1])  # (B, T)
        memory = memory.masked_fill(~valid[..., None], 0)
        readable = (valid | ~valid.any(1, keepdim=True))[:, None, None, :]
        return [layer.memory_attention.keys_values(memory) for layer in self.layers], readable

    # ------------------------------------------------------------------------------- token by token

    def start(self, memory: Tensor, memory_lens: Tensor, width: int = 1) -> DecoderState:
        """The state before the first input, with room for W = width hypotheses a row."""
        memories, readable = self._prepare(memory, memory_lens)
        empty = []
        for keys_values in memories:
            two, B, H, _, head_dim = keys_values.shape
            empty.append(keys_values.new_zeros(two, B * width, H, 0, head_dim))
        return DecoderState(memories, readable, empty)

    def step(self, newest: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """What forward says at one position, from the newest input and the past that is kept.

        Args:    newest (B, W) int64, tokens, or at first vocab_size + tag; state.
        Returns: log-probabilities (B, W, V), float32 at least; the state after this input.
        """
        u = state.past[0].shape[3]
        x = self._embed(newest, sinusoids(u + 1, self.dim, newest.device)[u])
        longer = []
        for layer, memory, past in zip(self.layers, state.memory, state.past, strict=True):
            x, past = layer.step(x, memory, state.readable, past)
            longer.append(past)
        logits = self.output(self.norm(x))
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return wide.log_softmax(-1), state._replace(past=longer)

    @torch.no_grad()
    def greedy(
        self, memory: Tensor, memory_lens: Tensor, tags: Tensor, max_tokens: int | Tensor
    ) -> list[list[int]]:
        """The most probable token each time, until the end symbol. To be called in eval mode.

        Args:    memory (B, T, memory_dim); memory_lens, tags (B,) int64; max_tokens (B,), or one
                 for all rows: where a row is cut if it has not ended.
        Returns: B token lists without tag and end.
        """
        limits = torch.as_tensor(max_tokens, device=tags.device).expand(len(tags))
        state, newest = self.start(memory, memory_lens), (self.vocab_size + tags)[:, None]
        tokens, lens = newest[:, :0], torch.zeros_like(tags)
        for u in range(int(limits.max())):
            log_probs, state = self.step(newest, state)
            newest = log_probs.argmax(-1)  # (B, 1)
            # Rows that have ended are computed on, but grow no longer.
            grows = (lens == u) & (newest[:, 0] != SEP_ID) & (u < limits)
            if not grows.any():
                break
            tokens, lens = torch.cat([tokens, newest], dim=1), lens + grows
        return [row[:n] for row, n in zip(tokens.tolist(), lens.tolist(), strict=True)]

    @torch.no_grad()
    def beam(
        self,
        memory: Tensor,
        memory_lens: Tensor,
        tags: Tensor,
        width: int,
        max_tokens: int | Tensor,
        length_penalty: float = 0.0,
    ) -> list[list[Hypothesis]]:
        """Beam search, all rows and hypotheses in one batch. To be called in eval mode.

        At each step a row's W hypotheses have W x V continuations. Ends among the W best of them
        are kept apart; the W best that go on are the next hypotheses. So width 1 is greedy search.

        Args:    as in greedy; width W; length_penalty alpha >= 0, by which length_penalised ranks.
        Returns: for each row up to W hypotheses, best first; those that did not end within
                 max_tokens only where none did. The lower the limits, the sooner a search with a
                 penalty can stop: it must allow for what an answer of that length might gain.
        """
        B, W, V = len(tags), width, self.vocab_size
        limits = torch.as_tensor(max_tokens).expand(B).tolist()
        rows = [_BeamRow(W, limit, length_penalty) for limit in limits]
        state = self.start(memory, memory_lens, W)
        tokens = (V + tags)[:, None, None].expand(B, W, 1)
        # W equal beginnings would stay equal: all but the first are impossible.
        scores = torch.full((B, W), -math.inf, device=tags.device)
        scores[:, 0] = 0.0
        first = W * torch.arange(B, device=tags.device)[:, None]  # place of a row's hypotheses
        for _ in range(max(limits) + 1):
            log_probs, state = self.step(tokens[..., -1], state)
            total = (scores[..., None] + log_probs).flatten(1)  # (B, W x V)
            best, index = total.topk(2 * W)  # (B, 2W): W at least are no ends
            source, newest = index // V, index % V
            everything = (x.cpu() for x in (tokens, scores, best, source, newest))
            for row, *its in zip(rows, *everything, strict=True):
                row.update(*its)
            if all(row.done for row in rows):
                break
            going_on = (newest == SEP_ID).int().argsort(dim=1, stable=True)[:, :W]  # (B, W)
            scores, source, newest = (x.gather(1, going_on) for x in (best, source, newest))
            tokens = tokens.gather(1, source[..., None].expand_as(tokens))
            tokens = torch.cat([tokens, newest[..., None]], dim=2)  # (B, W, 1+U)
            state = state.reordered((first + source).flatten())
        return [row.kept for row in rows]


def length_penalised(score: float, n_tokens: int, alpha: float) -> float:
    """score / ((5 + n_tokens) / 6)^alpha: what beam ranks by (Wu et al. 2016, equation 14).

    A log-probability falls with every token, which favours short answers; alpha 0 leaves it so.
    """
    return score / ((5 + n_tokens) / 6) ** alpha


class _BeamRow:
    """What one row of a beam search has found, and whether it is done."""

    def __init__(self, width: int, limit: int, alpha: float) -> None:
        if alpha < 0:
            raise ValueError(f"length penalty {alpha} is negative: the search would stop too early")
        self.width, self.limit, self.alpha = width, limit, alpha
        self.kept: list[Hypothesis] = []  # the ended ones, best first
        self.done = False

    def _rank(self, hypothesis: Hypothesis) -> float:
        return length_penalised(hypothesis.score, len(hypothesis.tokens), self.alpha)

    def update(
        self, tokens: Tensor, scores: Tensor, best: Tensor, source: Tensor, newest: Tensor
    ) -> None:
        """Keep what ends in this step; say whether what goes on could still be better.

        Args: tokens (W, 1+U) and scores (W,), the hypotheses before this step; best, source and
              newest (2W,), their best continuations: score, which hypothesis, which token.
        """
        if self.done:
            return
        ends = newest[: self.width] == SEP_ID
        ended = _hypotheses(tokens[source[: self.width][ends]], best[: self.width][ends])
        self.kept = sorted(self.kept + ended, key=self._rank, reverse=True)[: self.width]
        worst = self._rank(self.kept[-1]) if len(self.kept) == self.width else -math.inf
        # A score only falls from here on, and is divided by most at the greatest length.
        best_live = float(best[newest != SEP_ID][0])
        hopeless = length_penalised(best_live, self.limit, self.alpha) <= worst
        self.done = hopeless or tokens.shape[1] - 1 == self.limit
        if self.done and not self.kept:
            self.kept = _hypotheses(tokens, scores)


def _hypotheses(tokens: Tensor, scores: Tensor) -> list[Hypothesis]:
    """(N, 1+U) tokens after a tag and (N,) scores, without those that are impossible."""
    pairs = zip(tokens[:, 1:].tolist(), scores.tolist(), strict=True)
    return [Hypothesis(its_tokens, score) for its_tokens, score in pairs if score != -math.inf]


# ------------------------------------------------------------------------------------------- [CLS]


class Classifier(nn.Module):
    """A sentence, or a pair of sentences, is classified by its [CLS] state.

    UNSPECIFIED IN PAPER: BERT's dropout and linear, without its pooler, which belonged to next
    sentence prediction.
    """

    def __init__(self, dim: int, n_labels: int, dropout: float) -> None:
        super().__init__()
        self.dropout, self.output = nn.Dropout(dropout), nn.Linear(dim, n_labels)

    def forward(self, cls_state: Tensor) -> Tensor:
        """(B, D) -> logits (B, n_labels)."""
        return self.output(self.dropout(cls_state))


# ----------------------------------------------------------------------------------- task models


@dataclass(frozen=True)
class HeadConfig:
    """The head of one task. The defaults are the paper's where it tells, for `xl`."""

    kind: str  # ctc, rnnt, attention or classifier
    vocab_size: int = 0  # of the target's tokenizer; a classifier has none
    labels: tuple[str, ...] = ()  # of a classifier
    tags: tuple[str, ...] = ("",)  # of attention: the languages that it can be told to write
    # transducer (w2v-BERT section 4)
    rnnt_layers: int = 2
    rnnt_dim: int = 640
    joint_dim: int = 640
    # Transformer decoder (SLAM section 4)
    decoder_layers: int = 4
    decoder_dim: int = 384
    decoder_ff: int = 1536
    decoder_heads: int = 4
    dropout: float = 0.1  # UNSPECIFIED IN PAPER
    label_smoothing: float = 0.1  # of attention. UNSPECIFIED IN PAPER: the Transformer paper's


# What differs from the defaults at each size of the encoder.
HEAD_SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(
        rnnt_layers=1, rnnt_dim=128, joint_dim=128,
        decoder_layers=2, decoder_dim=128, decoder_ff=512,
    ),
    "small": dict(
        rnnt_layers=1, rnnt_dim=256, joint_dim=256,
        decoder_layers=3, decoder_dim=256, decoder_ff=1024,
    ),
    "base": {},
    "xl": {},
}  # fmt: skip


@dataclass(frozen=True)
class TaskBatch(TensorBatch):
    """Speech or text, and the answers to it. What a task does not have is None."""

    lens: Tensor  # (B,) int64, log-mel frames of speech or tokens of text
    # (B, F, 80) float32 raw log-mel, zero after each row's end; data.Waveforms until it is moved
    features: Tensor | TensorBatch | None = None
    hidden_frames: Tensor | None = None  # (B, F) bool, SpecAugment's: frames that are not seen
    hidden_bins: Tensor | None = None  # (B, 80) bool: mel bins that are not seen
    tokens: Tensor | None = None  # (B, U) int64 beginning with [CLS], PAD after each row's end
    targets: Tensor | None = None  # (B, U) int64 without begin and end, PAD after each row's end
    target_lens: Tensor | None = None  # (B,) int64
    tags: Tensor | None = None  # (B,) int64, which of the head's tags the target has
    labels: Tensor | None = None  # (B,) int64, of a classifier
    faults: list[RowFault] | None = None  # rows that could not be read and were replaced


class TaskModel(nn.Module):
    """The pre-trained encoder under the head of one task.

    Speech or text goes through all of the encoder, alone; the head reads the top states. So speech
    is recognised by the same multimodal stack that has learned from text.
    """

    def __init__(self, config: SlamConfig, modality: str, head: HeadConfig) -> None:
        """Make the encoder, with the embedder of its one modality only, and the head.

        Args: modality  "speech" or "text", what the task reads.
        """
        super().__init__()
        self.head_config, self.modality = head, modality
        self.encoder = SlamEncoder(config, (modality,))
        self.loss_names = [head.kind]
        D = config.d_model
        if head.kind == "ctc":
            self.head = nn.Linear(D, head.vocab_size)
        elif head.kind == "rnnt":
            self.head = Transducer(
                head.vocab_size, D, dim=head.rnnt_dim, n_layers=head.rnnt_layers,
                joint_dim=head.joint_dim, dropout=head.dropout,
            )  # fmt: skip
        elif head.kind == "attention":
            self.head = TransformerDecoder(
                head.vocab_size, D, dim=head.decoder_dim, n_layers=head.decoder_layers,
                n_heads=head.decoder_heads, d_ff=head.decoder_ff, dropout=head.dropout,
                n_tags=len(head.tags),
            )  # fmt: skip
        else:
            assert head.kind == "classifier", head.kind
            self.head = Classifier(D, len(head.labels), head.dropout)

    def step_done(self) -> None:
        """Nothing here counts optimiser steps."""

    def states(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """Top states (B, T or U, D) and their lengths (B,) of a batch's speech or text."""
        if self.modality == "text":
            return self.encoder.multimodal(self.encoder.text(batch.tokens), batch.lens), batch.lens
        features = batch.features
        if batch.hidden_frames is not None:  # SpecAugment: what is hidden becomes the mean, 0 after
            hidden = batch.hidden_frames[..., None] | batch.hidden_bins[:, None]  # standardisation
            features = torch.where(hidden, self.encoder.speech.feature_mean, features)
        conv, lens = self.encoder.speech.subsample(features, batch.lens)
        _, states = self.encoder.speech.encode(conv, lens)
        return self.encoder.multimodal(states, lens), lens

    def work(self, batch: TaskBatch) -> dict[str, float]:
        """What a micro-batch holds, padding not counted: {"audio_s": seconds} or {"tokens": n}."""
        size = float(batch.lens.sum())
        return {"tokens": size} if self.modality == "text" else {"audio_s": size / FRAMES_PER_S}

    def counts(self, batch: TaskBatch) -> dict[str, float]:
        """What the loss is divided by: target tokens, with the end where it is predicted; rows."""
        if self.head_config.kind == "classifier":
            return {"classifier": float(len(batch.labels))}
        count = batch.target_lens
        if self.head_config.kind == "attention":
            count = count + 1
        elif self.head_config.kind == "ctc":
            fits = L.ctc_fits(subsampled_lens(batch.lens), batch.targets, batch.target_lens)
            count = count * fits
        return {self.head_config.kind: float(count.sum())}

    def forward(self, batch: TaskBatch) -> tuple[dict[str, L.Loss], dict[str, Tensor]]:
        """({name of the head: Loss}, no statistics): as the training loop asks for."""
        kind, (states, lens) = self.head_config.kind, self.states(batch)
        if kind == "classifier":
            loss = L.classification(self.head(states[:, 0]), batch.labels)
        elif kind == "ctc":
            loss = L.ctc(self.head(states), lens, batch.targets, batch.target_lens)
        elif kind == "rnnt":
            logits = self.head(states, lens, batch.targets, batch.target_lens)
            loss = L.rnnt(logits, lens, batch.targets, batch.target_lens)
        else:
            logits = self.head(batch.targets, batch.tags, states, lens)  # (B, U+1, V)
            B, U = batch.targets.shape
            place = torch.arange(U + 1, device=lens.device)[None]
            ended = F.pad(batch.targets, (0, 1), value=PAD_ID)  # then the end behind each row
            ended = torch.where(place == batch.target_lens[:, None], SEP_ID, ended)
            weight = (place <= batch.target_lens[:, None]).float()  # (B, U+1)
            flat = logits.flatten(0, 1), ended.flatten(), weight.flatten()
            loss = L.label_smoothed(*flat, self.head_config.label_smoothing)
        return {kind: loss}, {}

    @torch.no_grad()
    def decode(
        self, batch: TaskBatch, width: int = 1, length_penalty: float = 0.0
    ) -> list[list[int]]:
        """The best answer for each row: tokens, or of a classifier [index of the label].

        Width 1 is greedy search. In eval mode.
        """
        kind, (states, lens) = self.head_config.kind, self.states(batch)
        if kind == "classifier":
            return self.head(states[:, 0]).argmax(-1, keepdim=True).tolist()
        if kind == "attention":
            # Written forms grow when read out, and translations are about as long as the speech.
            limits = 16 + (3 * lens if self.modality == "text" else lens)
            search = (states, lens, batch.tags)
            if width == 1:
                return self.head.greedy(*search, limits)
            found = self.head.beam(*search, width, limits, length_penalty)
        elif kind == "ctc":
            log_probs = self.head(states).float().log_softmax(-1)
            if width == 1:
                return ctc_greedy(log_probs, lens)
            found = ctc_prefix_beam(log_probs, lens, width)
        else:
            if width == 1:
                return self.head.greedy(states, lens)
            found = self.head.beam(states, lens, width)
        return [hypotheses[0].tokens for hypotheses in found]
