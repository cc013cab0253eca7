"""One rank of a generator, run with tensors that have shapes but no memory, among ranks that do not exist.

A process of its own (``python -m megavar.planning.fake_run``, started by :mod:`megavar.planning.measure`), because
Megatron-core keeps process groups in global variables and the caller may have real ones. It reads pickled requests from
its standard input and writes one pickled reply per request to its standard output.
"""

import functools
import os
import pickle
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from megavar.config.generators.base import GeneratorChoice
from megavar.config.parallel import ParallelConfig
from megavar.config.token_space import TokenSpace
from megavar.config.tokenizers.base import TokenizerChoice
from megavar.parallel import cpu_backend
from megavar.planning.cost import Cost, Line, Part
from megavar.planning.ledger import Ledger
from megavar.planning.measure import DrawRequest, Request
from megavar.planning.tokenizer_cost import measure_tokenizer

IMAGES = (16, 32)
"""Micro-batches that are run; costs of others lie on the line through them."""
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BLOCK, _EXPERTS, _EMBEDDING, _HEAD = "block", "experts", "embedding", "head"


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
        kept = self.ledger.saved[_BLOCK] + self.ledger.saved[_EXPERTS]
        return max(self.ledger.peaks[account] for account in accounts) - kept


def _groups(tensor: int) -> None:
    """Megatron-core's groups of the first of ``tensor`` ranks, none of which communicates."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        if dist.get_world_size() == tensor:
            return
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tensor)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor, expert_tensor_parallel_size=1, create_gloo_process_groups=False
    )
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)


class Laboratory:
    """Measures requests one after the other; what they share is run once."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        """Of the pass that runs."""
        self._observed: dict[tuple[str, int], tuple[Observation, ...]] = {}
        self._counted: dict[tuple[str, int, bool, bool], tuple[int, int]] = {}
        self._stand_in()

    def _stand_in(self) -> None:
        """Replace what fake tensors cannot run by what only costs the same. This process computes nothing else."""
        from megavar.planning.attention_cost import attention_kernel
        from megavar.sampling.noise import FiniteLogits
        from megavar.transformer import attention, kernels
        from megavar.transformer.moe import layer

        nothing: Any = lambda *arguments: None  # noqa: E731
        FiniteLogits.require = nothing  # type: ignore[method-assign]  # there are no values to look at
        layer.check_installed = nothing  # a backend's package need not be installed here
        layer.choose_backend = lambda name, config: "grouped"  # whose experts are built at once
        on_gpu = torch.device("cuda")
        attention.choose_kernel = lambda name, visibility, device: kernels.choose_kernel(name, visibility, on_gpu)
        for name, kernel in kernels.KERNELS.items():
            kernels.KERNELS[name] = replace(kernel, function=attention_kernel(name, lambda: self.ledger))

    def answer(self, request: Request | DrawRequest | TokenizerChoice) -> Any:
        """What :mod:`megavar.planning.measure` asks for."""
        if isinstance(request, Request):
            return self.measure(request)
        return self.draw(request) if isinstance(request, DrawRequest) else measure_tokenizer(request)

    def measure(self, request: Request) -> Cost:
        """Costs of one rank."""
        _groups(request.tensor)
        with FakeTensorMode(allow_non_fake_inputs=True):
            kinds, kind_of_block = _kinds(request.choice, request.space)
            blocks = [self._block(request, number) for number in kinds]
            observed = self._observe(request, kinds[-1])
            shares = request.tensor if request.sequence else 1
            return Cost(
                embedding=self._end(request, kinds[-1], _EMBEDDING),
                kinds=tuple(blocks),
                kind_of_block=kind_of_block,
                head=self._end(request, kinds[-1], _HEAD),
                hidden=_line(observed, lambda seen: seen.hidden * shares),
                packed=Line.through((images, _packed(request, images)) for images in IMAGES),
                exchanged=_line(observed, lambda seen: seen.exchanged),
                weights_per_token=self._weights(request, kinds, kind_of_block, "products") // request.space.length,
                weights_per_image=self._weights(request, kinds, kind_of_block, "once"),
            )

    def draw(self, request: DrawRequest) -> float:
        """Operations of one drawn image, without those of the tokenizer."""
        from megavar.conditions import Condition
        from megavar.config.choice import resolve
        from megavar.sampling.noise import Noise

        space, classes = request.tokenizer.space, request.choice.class_count
        _groups(1)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            kinds, kind_of_block = _kinds(request.choice, space)
            tokenizer = resolve(request.tokenizer)(request.tokenizer).eval()
            indices = torch.zeros(1, dtype=torch.long)
            captions = ("a photograph",) if classes is None else None
            condition = Condition(indices, captions, -1 if classes is None else classes)
            drawn = []
            for number in kinds:
                model = _build(Request(request.choice, space), number, 1, first=True, last=True).eval()
                _spread_experts(model)
                self.ledger = ledger = Ledger()
                _follow(model, Observation(ledger, 1))
                model.step = _without_statistics(model.step)
                with ledger:
                    procedure = resolve(request.sampling)(request.sampling)
                    procedure.draw(model, _Apart(tokenizer, ledger), condition, Noise(0, indices))
                drawn.append(ledger.forward)
        blocks = sum(drawn[kind][_BLOCK] + drawn[kind][_EXPERTS] for kind in kind_of_block)
        return blocks + drawn[-1][_EMBEDDING] + drawn[-1][_HEAD]

    def _block(self, request: Request, number: int) -> Part:
        observed, plain = self._observe(request, number), self._observe(request.with_recompute("none"), number)
        replicated, experts = self._parameters(request, number, first=False, last=False)
        once = _per_image(plain, "done", _BLOCK, _EXPERTS)
        return Part(
            replicated=replicated,
            experts=experts,
            forward_flops=_per_image(plain, "forward", _BLOCK, _EXPERTS),
            model_flops=_per_image(plain, "needed", _BLOCK, _EXPERTS),
            hardware_flops=once,
            repeated_flops=_per_image(observed, "done", _BLOCK, _EXPERTS) - once,
            saved=_line(observed, lambda seen: seen.ledger.saved[_BLOCK]),
            routed=_line(observed, lambda seen: seen.ledger.saved[_EXPERTS]),
            peak=_line(observed, lambda seen: seen.peak(_BLOCK, _EXPERTS, _EMBEDDING)),
        )

    def _end(self, request: Request, number: int, account: str) -> Part:
        """Embedding or head: what a stage with it has beyond the same stage without it."""
        observed = self._observe(request, number)
        block = self._parameters(request, number, first=False, last=False)
        end = self._parameters(request, number, first=account == _EMBEDDING, last=account == _HEAD)
        return Part(
            replicated=end[0] - block[0],
            experts=end[1] - block[1],
            forward_flops=_per_image(observed, "forward", account),
            model_flops=_per_image(observed, "needed", account),
            hardware_flops=_per_image(observed, "done", account),
            saved=_line(observed, lambda seen: seen.ledger.saved[account]),
            peak=_line(observed, lambda seen: seen.peak(account)) if account == _HEAD else Line(),
        )

    def _weights(self, request: Request, kinds: list[int], kind_of_block: tuple[int, ...], products: str) -> int:
        """Weights of blocks and head that one image (with all its tokens) is multiplied with."""
        per_kind = [
            _per_image(self._observe(request.with_recompute("none"), number), products, _BLOCK, _EXPERTS) / 2
            for number in kinds
        ]
        ends = (_HEAD,) if products == "products" else (_HEAD, _EMBEDDING)
        outside = _per_image(self._observe(request.with_recompute("none"), kinds[-1]), products, *ends) / 2
        return round(sum(per_kind[kind] for kind in kind_of_block) + outside)

    def _observe(self, request: Request, number: int) -> tuple[Observation, ...]:
        """Passes over micro-batches of :data:`IMAGES`, with block ``number`` as the only one."""
        key = (request.key, number)
        if key not in self._observed:
            self._observed[key] = tuple(self._run(request, number, images) for images in IMAGES)
        return self._observed[key]

    def _parameters(self, request: Request, number: int, *, first: bool, last: bool) -> tuple[int, int]:
        """Scalars of a stage with block ``number``, outside and inside of experts."""
        key = (request.with_recompute("none").key, number, first, last)
        if key not in self._counted:
            self._counted[key] = _count(_build(request, number, 1, first=first, last=last))
        return self._counted[key]

    def _run(self, request: Request, number: int, images: int) -> Observation:
        model = _build(request, number, 1, first=True, last=True)
        _spread_experts(model)
        parameters = list(model.parameters())
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)  # not this pass has to make room for gradients
        inputs = model.example(images)
        existing = [*parameters, *(parameter.grad for parameter in parameters), *_tensors(inputs)]
        self.ledger = Ledger(existing, images)  # type: ignore[arg-type]
        observation = Observation(self.ledger, images)
        _follow(model, observation)
        with self.ledger:
            with self.ledger.forward_pass(existing):  # type: ignore[arg-type]
                loss = _loss(model(inputs), request.space)
            with self.ledger.backward():
                loss.backward()
        return observation


class _Apart:
    """A tokenizer whose work does not count."""

    def __init__(self, tokenizer: Any, ledger: Ledger) -> None:
        self._tokenizer, self._ledger = tokenizer, ledger

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._tokenizer, name)
        if not callable(value):
            return value

        def uncounted(*arguments: Any, **options: Any) -> Any:
            account = self._ledger.account
            self._ledger.enter("tokenizer")
            result = value(*arguments, **options)
            self._ledger.enter(account)
            return result

        return uncounted


def _without_statistics(step: Any) -> Any:
    """A generator's step of decoding that records no routing: which samples count depends on values."""
    return lambda inputs, cache, counted=None: step(inputs, cache)


def _line(observed: tuple[Observation, ...], value: Any) -> Line:
    return Line.through((seen.images, value(seen)) for seen in observed)


def _per_image(observed: tuple[Observation, ...], what: str, *accounts: str) -> float:
    """Operations of ``accounts`` per image."""
    first = observed[0]
    return sum(getattr(first.ledger, what)[account] for account in accounts) / first.images


@functools.lru_cache(maxsize=1)
def _kinds(choice: GeneratorChoice, space: TokenSpace) -> tuple[list[int], tuple[int, ...]]:
    """The last block of each kind, and the kind of every block: blocks of a kind have parameters of the same shapes."""
    request = Request(choice, space)
    depth = choice.limits(space).depth
    shapes: dict[str, list[Any]] = {}
    for name, parameter in _build(request, 0, depth, first=False, last=False).named_parameters():
        _, number, rest = name.split(".", 2)
        shapes.setdefault(number, []).append((rest, tuple(parameter.shape)))
    kinds: dict[Any, int] = {}
    kind_of_block = tuple(kinds.setdefault(tuple(shapes[str(number)]), len(kinds)) for number in range(depth))
    return [max(n for n in range(depth) if kind_of_block[n] == kind) for kind in range(len(kinds))], kind_of_block


def _build(request: Request, number: int, blocks: int, *, first: bool, last: bool) -> Any:
    """A stage with ``blocks`` blocks from ``number`` on."""
    from megavar.config.choice import resolve
    from megavar.generators.base import Stage

    parallel = ParallelConfig(tensor=request.tensor, sequence=request.sequence, recompute=request.recompute)
    stage, dtype = Stage(number, blocks, first, last), TYPES[request.precision]
    return resolve(request.choice)(request.choice, request.space, parallel=parallel, stage=stage, dtype=dtype).train()


def _count(model: nn.Module) -> tuple[int, int]:
    """Scalars outside and inside of experts."""
    from megavar.parallel.logical import logical_tensors

    experts = {tensor.parameter for tensor in logical_tensors(model) if tensor.is_expert}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    inside = sum(size for name, size in sizes.items() if name in experts)
    return sum(sizes.values()) - inside, inside


def _spread_experts(model: nn.Module) -> None:
    """Let mixtures of experts dispatch evenly: where tokens go depends on values, which there are none of."""
    for module in list(model.modules()):
        if hasattr(module, "spread_evenly"):
            module.spread_evenly()  # type: ignore[operator]


def _follow(model: Any, observation: Observation) -> None:
    """Tell the ledger which part is at work."""
    from megavar.transformer.moe.even import EvenExperts

    ledger, run_block = observation.ledger, model.run_block
    ledger.enter(_EMBEDDING)

    def follow_block(block: nn.Module, hidden: Tensor, *others: Any) -> Tensor:
        hidden = hidden.clone()  # what the embedding gives may be a view of more; another block's output is not
        ledger.enter(_BLOCK)
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: ledger.enter(_EMBEDDING))
        output: Tensor = run_block(block, hidden, *others)
        ledger.enter(_HEAD)
        observation.hidden = _bytes(output)
        if output.requires_grad:
            output.register_hook(lambda gradient: ledger.enter(_BLOCK))
        return output

    def before_experts(module: nn.Module, arguments: Any) -> None:
        ledger.enter(_EXPERTS)
        observation.exchanged = _bytes(arguments[0])

    model.run_block = follow_block
    for module in model.modules():
        if isinstance(module, EvenExperts):
            module.register_forward_pre_hook(before_experts)
            module.register_forward_hook(lambda *arguments: ledger.enter(_BLOCK))


def _loss(output: Any, space: TokenSpace) -> Tensor:
    """Cross entropy where tokens are ids; a generator of vectors returns its loss itself."""
    from megavar.parallel.vocabulary import vocabulary_cross_entropy

    prediction: Tensor = output.prediction
    if space.vocabulary is None:
        return prediction.float().sum()
    targets = torch.zeros(prediction.shape[:-1], dtype=torch.long)
    return vocabulary_cross_entropy(prediction, targets).sum()


def _packed(request: Request, images: int) -> int:
    """Bytes that a stage hands to the next one."""
    model = _build(request, 0, 1, first=True, last=False)
    _spread_experts(model)
    with torch.no_grad():
        return _bytes(model(model.example(images)))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in the inputs of a generator."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))


def main() -> None:
    """Answer the requests on standard input, one after the other."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the replies
    sys.path[:] = pickle.load(sys.stdin.buffer)
    cpu_backend.install()
    laboratory = Laboratory()
    while True:
        try:
            request = pickle.loads(pickle.load(sys.stdin.buffer))
        except EOFError:
            return
        reply: tuple[str, Any]
        try:
            reply = "measured", laboratory.answer(request)
        except Exception as error:
            reply = "error", (f"{type(error).__name__}: {error}", traceback.format_exc())
        pickle.dump(reply, replies)
        replies.flush()


if __name__ == "__main__":
    main()
