"""What an image tokenizer costs, measured on its own code with tensors that have shapes but no memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megavar.config.choice import resolve
from megavar.config.teachers.base import TeacherChoice
from megavar.config.tokenizers.base import TokenizerChoice
from megavar.planning.cost import TokenizerCost
from megavar.planning.known_integers import KnownIntegers
from megavar.planning.ledger import Ledger, saved_bytes
from megavar.tokenizers.base import Pyramid
from megavar.tokenizers.trainable import Variational


class _KnownShapes(TorchDispatchMode):
    """Gives results whose shapes fake tensors take for unknown the shapes that they have."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is torch.ops.aten.bincount.default:  # of ids, over as many bins as there are ids
            bins = arguments[2] if len(arguments) > 2 else (options or {})["minlength"]
            return arguments[0].new_zeros(bins)
        return function(*arguments, **(options or {}))


def _count(work: Callable[[], Any], parameters: list[Tensor]) -> tuple[float, float]:
    """FLOPs of ``work`` and the peak of the memory it takes."""
    ledger = Ledger(parameters)
    with torch.no_grad(), ledger:
        work()
    return sum(ledger.done.values()), ledger.peak


def measure_teacher(choice: TeacherChoice) -> TokenizerCost:
    """Costs of the teacher that ``choice`` describes: of its features, and of training it where it can be called."""
    with FakeTensorMode():
        teacher: Any = resolve(choice)(choice)
        images = torch.zeros(1, 3, choice.image_side, choice.image_side)
        parameters: list[Tensor] = list(teacher.parameters())
        encode_flops, encode_bytes = _count(lambda: teacher.features(images), parameters)
        training_bytes = _training_bytes(teacher, {}, images, parameters)
    count = sum(parameter.numel() for parameter in parameters)
    return TokenizerCost(count, encode_flops, 0.0, encode_bytes, training_bytes)


def _training_bytes(
    network: nn.Module, options: dict[str, Tensor], images: Tensor, parameters: list[Tensor]
) -> int | None:
    if type(network).forward is nn.Module.forward:  # no recipe trains it
        return None
    with _KnownShapes():
        return saved_bytes(lambda: network.train().requires_grad_()(images, **options), [*parameters, images])


def measure_tokenizer(config: TokenizerChoice) -> TokenizerCost:
    """Costs of the tokenizer that ``config`` describes."""
    space = config.space
    with FakeTensorMode(), KnownIntegers():
        tokenizer: Any = resolve(config)(config)
        images = torch.zeros(1, space.image_channels, space.image_side, space.image_side)
        parameters: list[Tensor] = list(tokenizer.parameters())

        def encode() -> Tensor:
            latents = tokenizer.encode(images)
            return tokenizer.at(latents)[0] if isinstance(tokenizer, Pyramid) else tokenizer.tokens(latents)

        tokens = encode()
        encode_flops, encode_bytes = _count(encode, parameters)
        decode_flops, _ = _count(lambda: tokenizer.decode(tokens), parameters)
        options = {}
        if isinstance(tokenizer, Variational) and space.vocabulary is None:  # trained by samples of its posteriors
            options["normal"] = torch.zeros(1, space.length, space.channels)
        training_bytes = _training_bytes(tokenizer, options, images, parameters)
    count = sum(parameter.numel() for parameter in parameters)
    return TokenizerCost(count, encode_flops, decode_flops, encode_bytes, training_bytes)
