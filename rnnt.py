"""Speech recognition by an RNN transducer: the network on top of the encoder, and its searches.

Graves 2012 (arXiv 1211.3711), with w2v-BERT's sizes (arXiv 2108.06209). At frame t, with u tokens
written, the joint network reads frame t and what was written, and names the next step: a token, or
the blank, which goes on to the next frame. Training sums over all ways to spell the transcript
(losses.rnnt); recognition looks for the likeliest transcript.

Writing begins from the blank: it is the "token before the first", in training and in both searches.

Public:  Transducer, Hypothesis.
Letters: B rows, T encoder frames, D the encoder's width, U tokens, J the joint network's width, V
         vocabulary with the blank, W hypotheses a row, R = B or B x W rows that write.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conformer import valid_mask
from losses import BLANK_ID

Memory = tuple[Tensor, Tensor]  # of an LSTM: hidden and cell states, (n_layers, R, dim) each


class Hypothesis(NamedTuple):
    """A transcript and the log of its probability, over all alignments that the beam kept."""

    tokens: list[int]
    score: float


class Transducer(nn.Module):
    """Projection block, prediction network and joint network.

    Padding never matters: the projection is frame by frame, with a LayerNorm where w2v-BERT has a
    BatchNorm, and the LSTM only looks back.
    """

    def __init__(
        self,
        vocab_size: int,
        encoder_dim: int,
        *,
        dim: int,
        n_layers: int,
        joint_dim: int,
        dropout: float,
    ) -> None:
        """Make the layers.

        Args: vocab_size   V, with BLANK_ID among the ids.
              encoder_dim  D.
              dim          width of the projection block, the embedding and the LSTM; paper 640.
              n_layers     of the LSTM; paper 2.
              joint_dim    J; paper 640.
        """
        super().__init__()
        self.project = nn.Sequential(nn.Linear(encoder_dim, dim), nn.SiLU(), nn.LayerNorm(dim))
        self.embedding = nn.Embedding(vocab_size, dim)
        between = dropout if n_layers > 1 else 0.0  # a single layer has nothing between
        self.lstm = nn.LSTM(dim, dim, n_layers, batch_first=True, dropout=between)
        self.dropout = nn.Dropout(dropout)
        self.from_speech = nn.Linear(dim, joint_dim)
        # Added to the speech's, which has a bias already.
        self.from_text = nn.Linear(dim, joint_dim, bias=False)
        self.out = nn.Linear(joint_dim, vocab_size)

    # The three parts, for training and for both searches.

    def hear(self, states: Tensor) -> Tensor:
        """Encoder states (B, T, D) -> what the joint network reads of each frame, (B, T, J)."""
        return self.from_speech(self.dropout(self.project(states)))

    def write(self, tokens: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """Prediction network: ids (R, U), each the one before the next -> (R, U, J), new memory."""
        x, memory = self.lstm(self.dropout(self.embedding(tokens)), memory)
        return self.from_text(self.dropout(x)), memory

    def join(self, speech: Tensor, text: Tensor) -> Tensor:
        """(..., J) and (..., J) -> logits (..., V) of the next step."""
        return self.out(torch.tanh(speech + text))

    def forward(self, states: Tensor, lens: Tensor, targets: Tensor, target_lens: Tensor) -> Tensor:
        """Logits of every cell of the lattice, for losses.rnnt.

        Args:    states (B, T, D) of the encoder; lens (B,) int64; targets (B, U) int64 without
                 blanks; target_lens (B,) int64. Frames and ids beyond the lengths are not read.
        Returns: (B, T, U+1, V): cell (t, u) has heard frame t and written the first u tokens.
        """
        states = states.masked_fill(~valid_mask(lens, states.shape[1])[..., None], 0.0)
        targets = targets.where(valid_mask(target_lens, targets.shape[1]), BLANK_ID)
        text, _ = self.write(F.pad(targets, (1, 0), value=BLANK_ID))  # (B, U+1, J)
        return self.join(self.hear(states)[:, :, None], text[:, None])

    # Searches. Call them in eval mode.

    def _begin(self, n_rows: int, device: torch.device) -> tuple[Tensor, Memory]:
        """Nothing written yet: (R, J) and the memory."""
        text, memory = self.write(torch.full((n_rows, 1), BLANK_ID, device=device))
        return text[:, 0], memory

    def _write_on(self, text: Tensor, memory: Memory, token: Tensor) -> tuple[Tensor, Memory]:
        """Write token (R,); where it is the blank, text (R, J) and memory stay as they were."""
        emits = token != BLANK_ID
        new_text, new_memory = self.write(token[:, None], memory)
        kept = (new.where(emits[:, None], old) for new, old in zip(new_memory, memory, strict=True))
        return new_text[:, 0].where(emits[:, None], text), tuple(kept)

    @torch.no_grad()
    def greedy(self, states: Tensor, lens: Tensor, max_symbols: int = 10) -> list[list[int]]:
        """The likeliest step, again and again; all rows hear the same frame at a time.

        Args:    states (B, T, D); lens (B,) int64; max_symbols that may be written at one frame, so
                 that no row writes for ever.
        Returns: B lists of ids.
        """
        speech = self.hear(states)  # (B, T, J)
        text, memory = self._begin(len(lens), states.device)
        written: list[list[int]] = [[] for _ in range(len(lens))]
        for frame in range(int(lens.max())):
            writing = frame < lens  # (B,)
            for _ in range(max_symbols):
                token = self.join(speech[:, frame], text).argmax(-1).where(writing, BLANK_ID)
                writing = token != BLANK_ID
                if not writing.any():
                    break
                for row, one in zip(written, token.tolist()):
                    if one != BLANK_ID:
                        row.append(one)
                text, memory = self._write_on(text, memory, token)
        return written

    @torch.no_grad()
    def beam(
        self, states: Tensor, lens: Tensor, width: int, u_max: int | None = None
    ) -> list[list[Hypothesis]]:
        """Alignment-synchronous beam search, which adds up alignments of the same transcript.

        After n steps a hypothesis of u tokens is at frame n - u, so those that compete have made
        equally many steps, not heard equally many frames. One that has taken the blank of its last
        frame is complete; it keeps its score and its place until better ones push it out.

        Args:    states (B, T, D); lens (B,) int64; width W; u_max tokens that a hypothesis may
                 have, None for 16 and three a frame. So each ends after at most T + u_max steps.
        Returns: for each row its complete hypotheses, at most W, the best first; of equal scores
                 the shorter first.
        Source:  Saon et al. 2020 (ALSD). There complete hypotheses leave the beam; here they
                 compete, so that W = 1 is greedy search (unless u_max or max_symbols is met).
        """
        speech = self.hear(states)  # (B, T, J)
        B, T, J = speech.shape
        row = torch.arange(B, device=lens.device)[:, None]  # (B, 1)
        limit = 16 + 3 * lens if u_max is None else torch.full_like(lens, u_max)
        limit = limit[:, None]
        text, memory = self._begin(B * width, states.device)
        prefixes: list[list[tuple[int, ...]]] = [[()] * width for _ in range(B)]
        n_tokens = torch.zeros(B, width, dtype=torch.int64, device=lens.device)
        score = torch.full((B, width), -torch.inf, device=lens.device, dtype=torch.float64)
        score[:, 0] = 0  # the others do not exist yet
        for step in itertools.count():
            frame = step - n_tokens  # (B, W)
            complete = frame >= lens[:, None]
            if bool((complete | score.isinf()).all()):
                break
            logits = self.join(speech[row, frame.clamp(0, T - 1)], text.view(B, width, J))
            steps = _allowed(logits.double().log_softmax(-1), complete, n_tokens >= limit)
            total = _merge(score[..., None] + steps, score, prefixes)  # (B, W, V)
            score, best = total.flatten(1).topk(width)  # (B, W)
            parent, token = best // total.shape[-1], best % total.shape[-1]
            prefixes = _extended(prefixes, parent.tolist(), token.tolist())
            n_tokens = n_tokens.gather(1, parent) + (token != BLANK_ID)
            of = (row * width + parent).flatten()  # (B x W)
            text, memory = self._write_on(
                text[of], tuple(x[:, of] for x in memory), token.flatten()
            )
        return [_sorted(*pair) for pair in zip(prefixes, score.tolist(), strict=True)]


def _allowed(steps: Tensor, complete: Tensor, full: Tensor) -> Tensor:
    """Log-probabilities of steps (B, W, V), -inf where a step is not open to a hypothesis.

    A complete one stays as it is: a blank for nothing. A full one may write no more.
    """
    blank = steps[..., BLANK_ID].masked_fill(complete, 0.0)
    steps = steps.masked_fill((complete | full)[..., None], -torch.inf)
    steps[..., BLANK_ID] = blank
    return steps


def _merge(total: Tensor, score: Tensor, prefixes: list[list[tuple[int, ...]]]) -> Tensor:
    """Add up the two ways to the same transcript at the same frame.

    If the beam holds y and y + k, then after this step y may have written k where y + k took a
    blank: they are one hypothesis. Its probability is gathered at the blank of y + k.

    Args: total (B, W, V) scores after each step, changed in place; score (B, W) before it.
    """
    same = []  # (row, y, y + k, k)
    for b, (row, alive) in enumerate(zip(prefixes, score.isfinite().tolist(), strict=True)):
        place = {prefix: w for w, prefix in enumerate(row) if alive[w]}
        same += [
            (b, place[prefix[:-1]], w, prefix[-1])
            for prefix, w in place.items()
            if prefix and prefix[:-1] in place
        ]
    if same:
        b, shorter, longer, k = torch.tensor(same, device=total.device).T
        both = torch.logaddexp(total[b, longer, BLANK_ID], total[b, shorter, k])
        total[b, longer, BLANK_ID] = both
        total[b, shorter, k] = -torch.inf
    return total


def _extended(
    prefixes: list[list[tuple[int, ...]]], parent: list[list[int]], token: list[list[int]]
) -> list[list[tuple[int, ...]]]:
    """What each hypothesis has written after its step: its parent's tokens, and its own if any."""
    return [
        [row[p] if t == BLANK_ID else (*row[p], t) for p, t in zip(parents, tokens, strict=True)]
        for row, parents, tokens in zip(prefixes, parent, token, strict=True)
    ]


def _sorted(prefixes: list[tuple[int, ...]], scores: list[float]) -> list[Hypothesis]:
    """The hypotheses that exist, the best first."""
    real = [(s, p) for s, p in zip(scores, prefixes, strict=True) if s != -float("inf")]
    real.sort(key=lambda pair: (-pair[0], len(pair[1])))
    return [Hypothesis(list(p), s) for s, p in real]
