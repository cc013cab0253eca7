"""One rank of a generator, run with tensors that have shapes but no memory, among ranks that do not exist.

A process of its own (``python -m megavar.planning.fake_run``, started by :mod:`megavar.planning.measure`), because
Megatron-core keeps process groups in global variables and the caller may have real ones. It reads pickled requests from
its standard input and writes one pickled reply per request to its standard output.
"""

import os
import pickle
import sys
import traceback
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode

from megavar.config.teachers.base import TeacherChoice
from megavar.config.tokenizers.base import TokenizerChoice
from megavar.parallel import cpu_backend
from megavar.planning.cost import Cost, Line, Part
from megavar.planning.fake_drawing import drawing_flops
from megavar.planning.fake_model import (
    BLOCK,
    EMBEDDING,
    EXPERTS,
    HEAD,
    Observation,
    build,
    count_parameters,
    follow,
    kinds_of_blocks,
    loss_of,
    packed_bytes,
    spread_experts,
    tensors_in,
)
from megavar.planning.ledger import Ledger
from megavar.planning.measure import DrawRequest, Request
from megavar.planning.tokenizer_cost import measure_teacher, measure_tokenizer

IMAGES = (16, 32)
"""Micro-batches that are run; costs of others lie on the line through them."""


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
        from megavar.planning.attention_cost import attention_kernel, continued_attention
        from megavar.sampling.noise import FiniteLogits
        from megavar.transformer import attention, kernels
        from megavar.transformer.moe import layer

        nothing: Any = lambda *arguments: None  # noqa: E731
        torch.nn.init.trunc_normal_ = lambda tensor, *_, **__: tensor  # draws again what values say is too large
        FiniteLogits.require = nothing  # type: ignore[method-assign]  # there are no values to look at
        layer.check_installed = nothing  # a backend's package need not be installed here
        layer.choose_backend = lambda name, config: "grouped"  # whose experts are built at once
        on_gpu = torch.device("cuda")

        def choose_kernel(name: str, visibility: kernels.Visibility, device: torch.device, **options: bool) -> str:
            return kernels.choose_kernel(name, visibility, on_gpu, **options)

        attention.choose_kernel = choose_kernel
        attention.AttentionCore._continue = continued_attention(lambda: self.ledger)  # type: ignore[method-assign]
        for name, kernel in kernels.KERNELS.items():
            kernels.KERNELS[name] = replace(
                kernel, function=attention_kernel(name, lambda: self.ledger), prepare=nothing
            )

    def answer(self, request: Request | DrawRequest | TokenizerChoice | TeacherChoice) -> Any:
        """What :mod:`megavar.planning.measure` asks for."""
        if isinstance(request, Request):
            return self.measure(request)
        if isinstance(request, DrawRequest):
            _groups(1)
            return drawing_flops(request, self._keep)
        return measure_teacher(request) if isinstance(request, TeacherChoice) else measure_tokenizer(request)

    def _keep(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def measure(self, request: Request) -> Cost:
        """Costs of one rank."""
        _groups(request.tensor)
        with FakeTensorMode(allow_non_fake_inputs=True):
            kinds, kind_of_block = kinds_of_blocks(request.choice, request.space)
            blocks = [self._block(request, number) for number in kinds]
            observed = self._observe(request, kinds[-1])
            shares = request.tensor if request.sequence else 1
            return Cost(
                embedding=self._end(request, kinds[-1], EMBEDDING),
                kinds=tuple(blocks),
                kind_of_block=kind_of_block,
                head=self._end(request, kinds[-1], HEAD),
                hidden=_line(observed, lambda seen: seen.hidden * shares),
                packed=Line.through((images, packed_bytes(request, images)) for images in IMAGES),
                exchanged=_line(observed, lambda seen: seen.exchanged),
                weights_per_token=self._weights(request, kinds, kind_of_block, "products") // request.space.length,
                weights_per_image=self._weights(request, kinds, kind_of_block, "once"),
            )

    def _block(self, request: Request, number: int) -> Part:
        observed, plain = self._observe(request, number), self._observe(request.with_recompute("none"), number)
        replicated, experts = self._parameters(request, number, first=False, last=False)
        once = _per_image(plain, "done", BLOCK, EXPERTS)
        return Part(
            replicated=replicated,
            experts=experts,
            forward_flops=_per_image(plain, "forward", BLOCK, EXPERTS),
            model_flops=_per_image(plain, "needed", BLOCK, EXPERTS),
            hardware_flops=once,
            repeated_flops=_per_image(observed, "done", BLOCK, EXPERTS) - once,
            saved=_line(observed, lambda seen: seen.ledger.saved[BLOCK]),
            routed=_line(observed, lambda seen: seen.ledger.saved[EXPERTS]),
            peak=_line(observed, lambda seen: seen.peak(BLOCK, EXPERTS, EMBEDDING)),
        )

    def _end(self, request: Request, number: int, account: str) -> Part:
        """Embedding or head: what a stage with it has beyond the same stage without it."""
        observed = self._observe(request, number)
        block = self._parameters(request, number, first=False, last=False)
        end = self._parameters(request, number, first=account == EMBEDDING, last=account == HEAD)
        return Part(
            replicated=end[0] - block[0],
            experts=end[1] - block[1],
            forward_flops=_per_image(observed, "forward", account),
            model_flops=_per_image(observed, "needed", account),
            hardware_flops=_per_image(observed, "done", account),
            saved=_line(observed, lambda seen: seen.ledger.saved[account]),
            peak=_line(observed, lambda seen: seen.peak(account)) if account == HEAD else Line(),
        )

    def _weights(self, request: Request, kinds: list[int], kind_of_block: tuple[int, ...], products: str) -> int:
        """Weights of blocks and head that one image (with all its tokens) is multiplied with."""
        per_kind = [
            _per_image(self._observe(request.with_recompute("none"), number), products, BLOCK, EXPERTS) / 2
            for number in kinds
        ]
        ends = (HEAD,) if products == "products" else (HEAD, EMBEDDING)
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
            self._counted[key] = count_parameters(build(request, number, 1, first=first, last=last))
        return self._counted[key]

    def _run(self, request: Request, number: int, images: int) -> Observation:
        model = build(request, number, 1, first=True, last=True)
        spread_experts(model)
        parameters = list(model.parameters())
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)  # not this pass has to make room for gradients
        inputs = model.example(images)
        existing = [*parameters, *(parameter.grad for parameter in parameters), *tensors_in(inputs)]
        self.ledger = Ledger(existing, images)  # type: ignore[arg-type]
        observation = Observation(self.ledger, images)
        follow(model, observation)
        with self.ledger:
            with self.ledger.forward_pass(existing):  # type: ignore[arg-type]
                loss = loss_of(model(inputs), request.space)
            with self.ledger.backward():
                loss.backward()
        return observation


def _line(observed: tuple[Observation, ...], value: Any) -> Line:
    return Line.through((seen.images, value(seen)) for seen in observed)


def _per_image(observed: tuple[Observation, ...], what: str, *accounts: str) -> float:
    """Operations of ``accounts`` per image."""
    first = observed[0]
    return sum(getattr(first.ledger, what)[account] for account in accounts) / first.images


def main() -> None:
    """Answer the requests on standard input, one after the other."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the replies
    cpu_backend.install()
    laboratory = Laboratory()
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        reply: tuple[str, Any]
        try:
            reply = "measured", laboratory.answer(pickle.loads(request))
        except Exception as error:
            reply = "error", (f"{type(error).__name__}: {error}", traceback.format_exc())
        pickle.dump(reply, replies)
        replies.flush()


if __name__ == "__main__":
    main()
