"""Truncation of next-token distributions, as VAR, FlexVAR and SAR use it."""

import torch
from torch import Tensor


def truncate(logits: Tensor, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Set logits outside the top k, then outside the nucleus, to -inf.

    What is kept depends on values alone, never on the order of equal ones, which sorting leaves open.

    Args:
        logits: [..., V].
        top_k: number of tokens to keep; all ties with the k-th are kept. 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches p, ties with the last included; the
            most likely always stays. 0 keeps all.
    """
    by_number, by_share = 0 < top_k < logits.shape[-1], 0 < top_p < 1
    if not by_number and not by_share:
        return logits
    likely = logits.topk(top_k, dim=-1).values if by_number else logits.sort(dim=-1, descending=True).values
    threshold = likely[..., -1:]
    if by_share:
        share = (likely - likely[..., :1]).exp().double()
        ties = (logits >= threshold).sum(-1, keepdim=True) - likely.shape[-1]  # kept, though not among the top k
        reached = share.cumsum(-1)
        total = reached[..., -1:] + ties * share[..., -1:]
        kept = (reached - share < top_p * total).sum(-1, keepdim=True)  # tokens that have not reached p before them
        threshold = likely.gather(-1, kept - 1)
    return logits.masked_fill(logits < threshold, -torch.inf)
