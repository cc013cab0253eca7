"""What an image tokenizer costs, measured on its own code with tensors that have shapes but no memory."""

import functools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megavar.config.tokenizers.base import TokenizerChoice


@dataclass(frozen=True)
class TokenizerCost:
    """Costs per image in float32, apart from the parameters."""

    parameters: int
    encode_flops: float
    """Image to tokens and teacher-forcing features, forward only."""
    decode_flops: float
    encode_bytes: float
    """Peak of the memory that encoding takes without gradient."""
    training_bytes: float
    """What autograd keeps of a training forward pass of encoder and decoder."""


class LiveBytes(TorchDispatchMode):
    """Follows the memory of all tensors made within it, from creation to release."""

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        """Tensors in ``existing``, and views of them, do not count."""
        super().__init__()
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in existing}

    def _release(self, key: int, size: int) -> None:
        self.live -= size
        self._known.discard(key)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known.add(key)
                    self.live += size
                    weakref.finalize(storage, self._release, key, size)
        self.peak = max(self.peak, self.live)
        return result


def _count(work: Callable[[], Any], parameters: list[Tensor]) -> tuple[float, float]:
    """FLOPs of ``work`` and the peak of the memory it takes."""
    counter, memory = FlopCounterMode(display=False), LiveBytes(parameters)
    with torch.no_grad(), memory, counter:
        work()
    return counter.get_total_flops(), memory.peak


def saved_bytes(work: Callable[[], Any], ignored: list[Tensor]) -> int:
    """Bytes of the distinct memory that autograd saves during ``work``, that of ``ignored`` tensors left out."""
    known = {tensor.untyped_storage()._cdata for tensor in ignored}
    kept: list[Any] = []

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            kept.append(storage)  # alive, so that its address is not given to another one
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        result = work()
    del result
    return sum(storage.nbytes() for storage in kept)


@functools.lru_cache(maxsize=8)
def autoencoder_cost(config: TokenizerChoice) -> TokenizerCost:
    """Costs of the tokenizer that ``config`` describes."""
    from megavar.tokenizers.multiscale_vq import MultiScaleVQ

    side = config.image_side
    with FakeTensorMode():
        tokenizer = MultiScaleVQ(config)
        images = torch.empty(1, config.image_channels, side, side)
        latent = torch.empty(1, config.code_dimension, config.scales[-1], config.scales[-1])
        parameters: list[Tensor] = list(tokenizer.parameters())

        def encode() -> None:
            tokenizer.at(tokenizer.encode(images))

        def reconstruct() -> Tensor:
            return tokenizer.decoder(tokenizer.post_quant_conv(tokenizer.quant_conv(tokenizer.encoder(images))))

        encode_flops, encode_bytes = _count(encode, parameters)
        decode_flops, _ = _count(lambda: tokenizer.decode_features(latent), parameters)
        training_bytes = saved_bytes(reconstruct, [*parameters, images])
    return TokenizerCost(
        sum(parameter.numel() for parameter in parameters), encode_flops, decode_flops, encode_bytes, training_bytes
    )
