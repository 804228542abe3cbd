"""When each token was said (section 2 of Shi et al. 2023, arXiv 2301.12343): from where the rates complete tokens.

A second head predicts rates on a grid three times as fine. Token i lies between its completion and the next one's.

Shape suffixes: B clips, T frames, U = 3 T fine frames, W width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ..kernels.cif import mass

THRESHOLD = 1 - 1e-4  # a little less than a token, so that the last one is always completed
SHIFT = -1.5  # fine frames by which tokens begin before the rates complete the one before
LONGEST = 12  # frames of a token; what is longer is followed by silence
SILENCE = 5  # frames: less is no silence


class TimestampHead(nn.Module):
    """Fine rates fp32 [B, U]: frames spread to `times` as many, an LSTM over them, a linear layer.

    has_lstm: without it the linear layer reads the spread frames. reads_features: spread the rate predictor's features
    in the place of the frames. factor, threshold: of rates = ReLU(factor * sigmoid - threshold).
    """

    def __init__(
        self, width: int, times: int = 3, has_lstm: bool = True, reads_features: bool = False, factor: float = 0.25,
        threshold: float = 0.01,
    ):  # fmt: skip
        super().__init__()
        self.times, self.reads_features = times, reads_features
        self.factor, self.threshold = factor, threshold
        self.spread = nn.ConvTranspose1d(width, width, times, stride=times)
        self.lstm = nn.LSTM(width, width, batch_first=True, bidirectional=True) if has_lstm else None
        self.out = nn.Linear(2 * width if has_lstm else width, 1)

    def forward(self, frames_BTW: Tensor, lengths_B: Tensor, reads_padding: bool = False) -> Tensor:
        """Fine rates, zero past the end of each row.

        reads_padding: let the LSTM run over the padding, from behind, as the authors do in a batch.
        """
        with torch.autocast(frames_BTW.device.type, enabled=False):
            fine_BUW = self.spread(frames_BTW.float().transpose(1, 2)).transpose(1, 2)
            if self.lstm is not None:
                is_full = reads_padding or bool((lengths_B >= frames_BTW.shape[1]).all())
                fine_BUW = self._recur(fine_BUW, None if is_full else lengths_B * self.times)
            rates_BU = F.relu(self.out(fine_BUW)[..., 0].sigmoid() * self.factor - self.threshold)
            inside_BU = torch.arange(rates_BU.shape[1], device=lengths_B.device) < lengths_B[:, None] * self.times
            return rates_BU * inside_BU

    def _recur(self, fine_BUW: Tensor, lengths_B: Tensor | None) -> Tensor:
        if lengths_B is None:
            return self.lstm(fine_BUW)[0]
        packed = pack_padded_sequence(fine_BUW, lengths_B.cpu(), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=fine_BUW.shape[1])[0]

    def coarse(self, rates_BU: Tensor) -> Tensor:
        """The same rates on the frames' own grid [B, T]."""
        return rearrange(rates_BU, "b (t n) -> b t n", n=self.times).sum(dim=2)


def levels(rates_BT: Tensor) -> Tensor:
    """The mass that has gathered since the last completed token, with each frame's own; fp64 [B, T]."""
    mass_BT = mass(rates_BT)
    completed_BT = F.pad((mass_BT / THRESHOLD).floor(), (1, 0))[:, :-1]
    return mass_BT - completed_BT * THRESHOLD


def completions(rates_T: Tensor, num_tokens: int) -> list[int]:
    """The frames in which tokens are completed: `num_tokens` + 1 of them, the last for the end of the sentence.

    Rates that complete another number are scaled until they complete that one.
    """
    mass_T = mass(rates_T[None])[0]
    wanted, total = num_tokens + 1, float(mass_T[-1])
    if int(total // THRESHOLD) != wanted:
        # Where there is no mass at all tokens are spread evenly.
        mass_T = mass_T * (wanted / total) if total > 0 else torch.linspace(0, wanted, len(mass_T)).double()
    goals_K = torch.arange(1, wanted + 1, dtype=torch.float64, device=mass_T.device) * THRESHOLD
    return torch.searchsorted(mass_T, goals_K).clamp(max=len(mass_T) - 1).tolist()


@dataclass(frozen=True)
class Span:
    """Frames from `start` to `end` of token number `token`, or of silence where that is None."""

    token: int | None
    start: float
    end: float


def spans(completed: list[int], num_frames: int) -> list[Span]:
    """Spans of all tokens, and of the silences between them, from the frames of `completions`."""
    at = [frame + SHIFT for frame in completed]
    found: list[Span] = []
    if at[0] > SILENCE:
        found.append(Span(None, 0.0, at[0]))
    for token in range(len(at) - 1):
        start, end = at[token], at[token + 1]
        if end - start <= LONGEST:
            found.append(Span(token, start, end))
        else:
            found += [Span(token, start, start + LONGEST), Span(None, start + LONGEST, end)]
    if not found:
        return found
    last, left = found[-1], num_frames - at[-1]
    end = (num_frames + at[-1]) * 0.5 if left > SILENCE else float(num_frames)
    found[-1] = Span(last.token, last.start, end)
    if left > SILENCE:
        found.append(Span(None, end, float(num_frames)))
    return found


def token_seconds(
    rates_T: Tensor, num_tokens: int, seconds_per_frame: float, limit: float
) -> list[tuple[float, float]]:
    """Start and end of each token in seconds, in order and from 0 to `limit`."""
    if num_tokens == 0:
        return []
    return [
        tuple(min(max(frame * seconds_per_frame, 0.0), limit) for frame in (span.start, span.end))
        for span in spans(completions(rates_T, num_tokens), len(rates_T))
        if span.token is not None
    ]
