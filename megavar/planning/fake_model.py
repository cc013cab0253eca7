"""Generators of one block whose tensors have shapes but no memory, and who says what part of them is at work."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from megavar.config.choice import resolve
from megavar.config.generators.base import GeneratorChoice
from megavar.config.parallel import ParallelConfig
from megavar.config.token_space import TokenSpace
from megavar.generators.base import Stage
from megavar.parallel.logical import logical_tensors
from megavar.parallel.vocabulary import vocabulary_cross_entropy
from megavar.planning.ledger import Ledger
from megavar.planning.measure import Request
from megavar.transformer.moe.even import EvenExperts

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BLOCK, EXPERTS, EMBEDDING, HEAD = "block", "experts", "embedding", "head"
"""Accounts of a ledger."""


@dataclass
class Observation:
    """What one forward and backward pass through embedding, one block and head took."""

    ledger: Ledger
    images: int
    hidden: int = 0
    """Bytes of the block's output on this rank."""
    exchanged: int = 0
    """Bytes of the copies of tokens that experts compute."""

    def peak(self, *accounts: str) -> int:
        """Most memory while one of ``accounts`` was at work, beyond what the block keeps."""
        kept = self.ledger.saved[BLOCK] + self.ledger.saved[EXPERTS]
        return max(self.ledger.peaks[account] for account in accounts) - kept


@functools.lru_cache(maxsize=1)
def kinds_of_blocks(choice: GeneratorChoice, space: TokenSpace) -> tuple[list[int], tuple[int, ...]]:
    """The last block of each kind, and the kind of every block: blocks of a kind have parameters of the same shapes."""
    request = Request(choice, space)
    depth = choice.limits(space).depth
    shapes: dict[str, list[Any]] = {}
    for name, parameter in build(request, 0, depth, first=False, last=False).named_parameters():
        _, number, rest = name.split(".", 2)
        shapes.setdefault(number, []).append((rest, tuple(parameter.shape)))
    kinds: dict[Any, int] = {}
    kind_of_block = tuple(kinds.setdefault(tuple(shapes[str(number)]), len(kinds)) for number in range(depth))
    return [max(n for n in range(depth) if kind_of_block[n] == kind) for kind in range(len(kinds))], kind_of_block


def build(request: Request, number: int, blocks: int, *, first: bool, last: bool) -> Any:
    """A stage with ``blocks`` blocks from ``number`` on. Heads read block ``number``, whichever they name."""
    parallel = ParallelConfig(tensor=request.tensor, sequence=request.sequence, recompute=request.recompute)
    stage, dtype = Stage(number, blocks, first, last), TYPES[request.precision]
    heads = {term.name: resolve(term).head_of(term, request.choice, request.space) for term in request.terms}
    heads = {name: replace(head, taps=(f"block.{number}",) * len(head.taps)) for name, head in heads.items()}
    model = resolve(request.choice)(
        request.choice, request.space, parallel=parallel, stage=stage, dtype=dtype, heads=heads
    )
    return model.train()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Scalars outside and inside of experts."""
    experts = {tensor.parameter for tensor in logical_tensors(model) if tensor.is_expert}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    inside = sum(size for name, size in sizes.items() if name in experts)
    return sum(sizes.values()) - inside, inside


def spread_experts(model: nn.Module) -> None:
    """Let mixtures of experts dispatch evenly: where tokens go depends on values, which there are none of."""
    for module in list(model.modules()):
        if hasattr(module, "spread_evenly"):
            module.spread_evenly()  # type: ignore[operator]


def follow(model: Any, observation: Observation) -> None:
    """Tell the ledger which part is at work."""
    ledger, run_block = observation.ledger, model.run_block
    ledger.enter(EMBEDDING)

    def follow_block(block: nn.Module, hidden: Tensor, *others: Any) -> Tensor:
        hidden = hidden.clone()  # what the embedding gives may be a view of more; another block's output is not
        ledger.enter(BLOCK)
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: ledger.enter(EMBEDDING))
        output: Tensor = run_block(block, hidden, *others)
        ledger.enter(HEAD)
        observation.hidden = bytes_of(output)
        if output.requires_grad:
            output.register_hook(lambda gradient: ledger.enter(BLOCK))
        return output

    def before_experts(module: nn.Module, arguments: Any) -> None:
        ledger.enter(EXPERTS)
        observation.exchanged = bytes_of(arguments[0])

    model.run_block = follow_block
    for module in model.modules():
        if isinstance(module, EvenExperts):
            module.register_forward_pre_hook(before_experts)
            module.register_forward_hook(lambda *arguments: ledger.enter(BLOCK))


def loss_of(output: Any, space: TokenSpace) -> Tensor:
    """Cross entropy where tokens are ids; a generator of vectors returns its loss itself."""
    prediction: Tensor = output.prediction
    of_heads = sum(head.float().sum() for head in output.heads.values())
    if space.vocabulary is None:
        return prediction.float().sum() + of_heads
    targets = torch.zeros(prediction.shape[:-1], dtype=torch.long)
    return vocabulary_cross_entropy(prediction, targets).sum() + of_heads


def packed_bytes(request: Request, images: int) -> int:
    """Bytes that a stage hands to the next one."""
    model = build(request, 0, 1, first=True, last=False)
    spread_experts(model)
    with torch.no_grad():
        return bytes_of(model(model.example(images)))


def bytes_of(tensor: Tensor) -> int:
    """Of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in the inputs of a generator."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif hasattr(value, "__dict__"):
        yield from tensors_in(vars(value))
