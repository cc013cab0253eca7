"""What an image tokenizer costs, measured on its own code with tensors that have shapes but no memory."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megavar.config.tokenizers.base import TokenizerChoice
from megavar.planning.ledger import Ledger, saved_bytes
from megavar.tokenizers.base import Pyramid


@dataclass(frozen=True)
class TokenizerCost:
    """Costs per image in float32, apart from the parameters."""

    parameters: int
    encode_flops: float
    """Image to tokens and what a generator reads of them, forward only."""
    decode_flops: float
    """Tokens to image."""
    encode_bytes: float
    """Peak of the memory that encoding takes without gradient."""
    training_bytes: float
    """What autograd keeps of a training forward pass."""


class _KnownShapes(TorchDispatchMode):
    """Gives results whose shapes fake tensors take for unknown the shapes that they have."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is torch.ops.aten.bincount.default:  # of ids, over as many bins as there are ids
            ids, _, bins = (*arguments, *(None, 0)[len(arguments) - 1 :])
            return ids.new_zeros((options or {}).get("minlength", bins))
        return function(*arguments, **(options or {}))


def _count(work: Callable[[], Any], parameters: list[Tensor]) -> tuple[float, float]:
    """FLOPs of ``work`` and the peak of the memory it takes."""
    ledger = Ledger(parameters)
    with torch.no_grad(), ledger:
        work()
    return sum(ledger.done.values()), ledger.peak


@functools.lru_cache(maxsize=8)
def tokenizer_cost(config: TokenizerChoice) -> TokenizerCost:
    """Costs of the tokenizer that ``config`` describes."""
    from megavar.assembly import resolve  # imports the whole library

    space = config.space
    with FakeTensorMode():
        tokenizer: Any = resolve(config)(config)
        images = torch.zeros(1, space.image_channels, space.image_side, space.image_side)
        parameters: list[Tensor] = list(tokenizer.parameters())

        def encode() -> Tensor:
            latents = tokenizer.encode(images)
            return tokenizer.at(latents)[0] if isinstance(tokenizer, Pyramid) else tokenizer.tokens(latents)

        tokens = encode()
        encode_flops, encode_bytes = _count(encode, parameters)
        decode_flops, _ = _count(lambda: tokenizer.decode(tokens), parameters)
        with _KnownShapes():
            training_bytes = saved_bytes(lambda: tokenizer.train()(images), [*parameters, images])
    count = sum(parameter.numel() for parameter in parameters)
    return TokenizerCost(count, encode_flops, decode_flops, encode_bytes, training_bytes)
