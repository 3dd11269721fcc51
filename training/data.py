"""Windows of packed tokens in a seeded order that depends only on how many tokens were seen.

That makes resuming exact without saving any sampler state; text and tokenizers belong to `pack.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from training.common import InputError


def load_tokens(path: Path) -> np.ndarray:
    """Map a packed `.npy` file (uint16, 1-D) into memory."""
    if not path.is_file():
        raise InputError(f"no such token file: {path} (run pack.py first)")
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise InputError(f"{path} is not a packed token file: {error}") from error
    if tokens.dtype != np.uint16 or tokens.ndim != 1:
        raise InputError(f"{path} must hold one row of uint16 tokens, not {tokens.dtype} {tokens.shape}")
    return tokens


class WindowSampler:
    """Training batches without replacement within an epoch.

    The epoch's windows are shuffled one by one, from a fresh offset each epoch: pieces of one article that come
    close together would be learnt by heart and forgotten again. A stage of another window length goes on at the
    same token count in its own order, so it may repeat some of what the stage before it saw.

    Args:
        tokens: packed tokens `[N]`, uint16.
        longest: length of the longest window of any stage.
        seed: order of the run.
        device: where the tokens are kept and the batches made.
    """

    def __init__(self, tokens: np.ndarray, longest: int, seed: int, device: torch.device) -> None:
        self.windows = (len(tokens) - longest) // longest
        if self.windows < 1:
            raise InputError(f"{len(tokens)} tokens are too few for windows of {longest}")
        self.longest, self.seed, self.device = longest, seed, device
        self.tokens = torch.from_numpy(tokens.astype(np.int32)).to(device)
        self._cached: tuple[tuple[int, int], torch.Tensor] | None = None

    @property
    def epoch_tokens(self) -> int:
        """Tokens in one epoch."""
        return self.windows * self.longest

    def _starts(self, epoch: int, seq_len: int) -> torch.Tensor:
        """First positions of the epoch's windows of `seq_len`, in order, `[epoch_tokens / seq_len]`."""
        if self._cached is None or self._cached[0] != (epoch, seq_len):
            rng = np.random.default_rng((self.seed, epoch))
            offset = int(rng.integers(self.longest))
            starts = rng.permutation(self.epoch_tokens // seq_len).astype(np.int64) * seq_len + offset
            starts = np.minimum(starts, len(self.tokens) - seq_len - 1)
            self._cached = ((epoch, seq_len), torch.from_numpy(starts).to(self.device))
        return self._cached[1]

    def batch(self, tokens_seen: int, batch_tokens: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and next tokens, `[batch_tokens / seq_len, seq_len]` each, int64."""
        epoch, within = divmod(tokens_seen, self.epoch_tokens)
        first, count = within // seq_len, batch_tokens // seq_len
        rows: list[torch.Tensor] = []
        while count > 0:
            starts = self._starts(epoch, seq_len)[first : first + count]
            rows.append(starts)
            epoch, first, count = epoch + 1, 0, count - len(starts)
        positions = torch.cat(rows)[:, None] + torch.arange(seq_len + 1, device=self.device)
        window = self.tokens[positions].long()  # [B, seq_len + 1]
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()
