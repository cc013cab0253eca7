"""Noisy contexts (reAR Eq. 4 and 5): what a generator reads is partly wrong, what it predicts is true."""

import torch
from torch import Tensor

from megavar.config.noise import NoiseConfig
from megavar.data.batch import Batch
from megavar.parallel import seeds


def noisy(ids: Tensor, config: NoiseConfig | None, batch: Batch, progress: float, vocabulary: int, seed: int) -> Tensor:
    """Tokens [B, L] with a share of them replaced by uniformly drawn codes; a function of (seed, epoch, sample, place).

    Args:
        ids: int64 [B, L].
        config: None leaves them alone.
        progress: of the run, in [0, 1].
    """
    if config is None or config.most(progress) == 0:
        return ids
    keys = batch.epochs[:, None], batch.sample_ids[:, None]
    share = torch.full_like(keys[0], config.most(progress), dtype=torch.float64)
    if config.schedule != "fixed":
        share = share * seeds.uniform(seed, "noise_share", *keys)
    places = torch.arange(ids.shape[1], device=ids.device)
    replaced = seeds.uniform(seed, "noise_place", *keys, places) < share
    return torch.where(replaced, seeds.random_bits(seed, "noise_code", *keys, places) % vocabulary, ids)
