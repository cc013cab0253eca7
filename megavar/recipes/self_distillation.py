"""Self-distillation without labels: a small vision transformer from images alone (DINO, Caron et al. 2021).

    views          = two large and some small random crops of an image                       section 3.1
    student        : p_s = softmax(head(vit(view)) / tau_s)                                  all views
    average        : p_t = softmax(head(vit(view)) / tau_t + shift)                          large views, no gradient
    loss           = - mean over pairs of different views of  p_t . log p_s                  Eq. 3
    shift          : sinkhorn_knopp: spreads the images of the step evenly over the prototypes (SwAV; DINOv2), for which
                     a forward-only pass asks the average first; mean: - centre / tau_t      Eq. 4
    KoLeo          : - log distance of an image's vector to its nearest neighbour's          DINOv2
    after the step : average <- m average + (1 - m) student, m rising to 1 with a cosine
                     centre  <- mean of what the average said                                Eq. 4

The average is the result: semantic guidance where no published weights are at hand.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.config.deepspeed import load_deepspeed_json
from megavar.config.recipes.base import TEACHER_MODULE
from megavar.config.recipes.self_distillation import CropsConfig, SelfDistillationConfig
from megavar.config.root import Config
from megavar.data.batch import Batch
from megavar.errors import ConfigError
from megavar.parallel import seeds
from megavar.parallel.logical import initialize_parameters
from megavar.parallel.parameter_rule import ParameterRule
from megavar.recipes.base import BaseRecipe, Losses, Parts, Pass, WriteRows
from megavar.recipes.ranks import gather_over_ranks, sum_over_ranks
from megavar.teachers.vit import VisionTransformer, normalized

STUDENT = "heads.student."
"""What is trained; exports leave out everything under ``heads.``, so that the average remains."""
LARGE = 2
"""Large views of an image."""


class Said(NamedTuple):
    """Logits of views, and vectors of the large ones."""

    student: Tensor
    """[views, B, K], large views first."""
    average: Tensor
    """[2, B, K], without gradient."""
    vectors: Tensor
    """[2, B, C], the student's, pooled."""


@dataclass(frozen=True)
class Views:
    """A prepared micro-batch, normalized."""

    large: Tensor
    """[2, B, 3, H, W]."""
    small: Tensor
    """[n, B, 3, h, w]."""
    known: Tensor | None = None
    """Of the large views, from a pass before: the average's logits and the student's vectors, [2, B, K + C]."""


class ProjectionHead(nn.Module):
    """An image's vector to logits: three layers, unit length, unit-length prototypes (DINO's ``DINOHead``)."""

    def __init__(self, width: int, config: SelfDistillationConfig) -> None:
        super().__init__()
        hidden, bottleneck = config.head_hidden, config.head_bottleneck
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.prototypes = nn.Parameter(torch.zeros(config.prototypes, bottleneck))

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, C] to [B, K]."""
        return F.linear(F.normalize(self.layers(tokens), dim=-1), F.normalize(self.prototypes, dim=-1))


class Student(nn.Module):
    """A network with its head."""

    def __init__(self, config: SelfDistillationConfig) -> None:
        super().__init__()
        self.pooling = config.pooling
        self.network = VisionTransformer(config.network.shape)
        self.head = ProjectionHead(config.network.width, config)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized images to logits [B, K] and vectors [B, C]."""
        vectors = pooled(self.network(images), self.pooling)
        return self.head(vectors), vectors


def pooled(tokens: Tensor, pooling: str) -> Tensor:
    """The class token, or the mean of the patches: [B, 1 + N, C] to [B, C]."""
    return tokens[:, 0] if pooling == "class" else tokens[:, 1:].mean(1)


class SelfDistilled(VisionTransformer):
    """The average of the student, which lies beside it under ``heads.`` with all that only training needs."""

    def __init__(self, config: SelfDistillationConfig, seed: int) -> None:
        super().__init__(config.network.shape)
        self.pooling = config.pooling
        head = ProjectionHead(config.network.width, config)
        head.register_buffer("centre", torch.zeros(config.prototypes))
        self.heads = nn.ModuleDict({"student": Student(config), "average": head})
        initialize_parameters(self, _initial_value, seed)
        with torch.no_grad():  # both begin alike
            for average, student in self.pairs():
                average.copy_(student)

    @property
    def centre(self) -> Tensor:
        """Mean logits of the average, [K]."""
        centre = self.heads["average"].centre
        assert isinstance(centre, Tensor)
        return centre

    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Parameters of the average with those of the student."""
        student = dict(self.heads["student"].named_parameters())
        own = {name: value for name, value in self.named_parameters() if not name.startswith("heads.")}
        pairs = [(value, student[f"network.{name}"]) for name, value in own.items()]
        return pairs + [(value, student[f"head.{name}"]) for name, value in self.heads["average"].named_parameters()]

    def rule(self, name: str) -> ParameterRule:
        """Only the student is trained; matrices decay."""
        decays = name.endswith("weight") and "norm" not in name
        return ParameterRule(decays=decays, frozen=not name.startswith(STUDENT))

    def forward(self, large: Tensor, small: Tensor | None, known: Tensor | None) -> Said:  # type: ignore[override]
        """Views of :class:`Views`; with ``known`` only the student is asked."""
        student, shape = self.heads["student"], large.shape[:2]
        if known is None:
            with torch.no_grad():
                vectors = pooled(super().forward(large.flatten(0, 1)), self.pooling)
                average = self.heads["average"](vectors).unflatten(0, shape)
        else:
            average = known[..., : len(self.centre)]
        logits, vectors = (part.unflatten(0, shape) for part in student(large.flatten(0, 1)))
        if small is None:
            return Said(logits, average, vectors)
        if len(small):
            logits = torch.cat([logits, student(small.flatten(0, 1))[0].unflatten(0, small.shape[:2])])
        return Said(logits, average, vectors)


class SelfDistillation(BaseRecipe):
    """Trains a :class:`SelfDistilled`."""

    def __init__(self, config: SelfDistillationConfig, *, steps: int, seed: int, device: torch.device) -> None:
        """Build the network with random weights, for a run of ``steps`` steps."""
        self.config, self.steps, self.seed = config, steps, seed
        self.network = SelfDistilled(config, seed).to(device)
        self._said: list[tuple[Tensor, int]] = []
        """Sum of what the average said in each micro-batch of this step, and of how many views."""
        self._known: list[Tensor] = []
        """What both said in the pass before, [2, B, K + C] per micro-batch; all ranks' in one once it is asked for."""

    @classmethod
    def build(cls, parts: Parts) -> "SelfDistillation":
        """See :meth:`Recipe.build`."""
        config = parts.config
        assert isinstance(config.recipe, SelfDistillationConfig)
        _check(config)
        assert config.train.steps is not None
        return cls(config.recipe, steps=config.train.steps, seed=config.train.seed, device=parts.device)

    def modules(self) -> dict[str, nn.Module]:
        """The one trained module."""
        return {TEACHER_MODULE: self.network}

    @torch.no_grad()
    def prepare(self, batch: Batch, step: int) -> Views:
        """Large and small views: functions of (seed, epoch, sample)."""
        crops, images = self.config.crops, batch.require_images()

        def views(number: int, first: int, side: int, scale: tuple[float, float]) -> Tensor:
            made = [self._view(batch, images, first + view, side, scale) for view in range(number)]
            return torch.stack(made) if made else images.new_zeros(0, len(images), 3, side, side)

        side = self.config.network.grid * self.config.network.patch
        return Views(
            views(LARGE, 0, side, crops.global_scale),
            views(crops.local_number, LARGE, crops.local_side, crops.local_scale),
        )

    def _view(self, batch: Batch, images: Tensor, view: int, side: int, scale: tuple[float, float]) -> Tensor:
        numbers = torch.arange(6, device=images.device)
        drawn = seeds.uniform(self.seed, f"view {view}", batch.epochs[:, None], batch.sample_ids[:, None], numbers)
        return normalized(crop(images, drawn.to(images.dtype), side, scale, self.config.crops), self.network.shape)

    def passes(self, module: str, step: int) -> Sequence[Pass]:
        """First without gradient, where what is said of all images must be known together; then with the loss."""
        self._said.clear()  # a step that was not applied leaves nothing
        self._known.clear()
        learning = Pass(self.forward, self.loss)
        if self.config.centering == "mean":
            return [learning]
        return [Pass(self.ask, None, carry=self.keep, following=self.with_known), learning]

    def ask(self, model: Callable[..., Said], inputs: Views) -> Said:
        """The large views through both."""
        return model(inputs.large, None, None)

    def keep(self, output: Said, inputs: Views) -> Tensor:
        """Logits of the average, vectors of the student."""
        self._known.append(torch.cat([output.average, output.vectors], -1).float())
        return self._known[-1]

    def with_known(self, inputs: Views, known: Tensor) -> Views:
        """Inputs of the second pass."""
        return replace(inputs, known=known)

    def forward(self, model: Callable[..., Said], inputs: Views) -> Said:
        """All views through the student; the large ones through the average, unless it was asked before."""
        return model(inputs.large, inputs.small, inputs.known)

    def loss(self, output: Said, inputs: Views) -> Losses:
        """Eq. 3 in nats, plus KoLeo; the entropy of the average beside it (0 or log K: it has collapsed)."""
        config = self.config
        target = (output.average.float() / config.teacher_temperature + self._shift()).softmax(-1)
        said = (output.student.float() / config.student_temperature).log_softmax(-1)
        cross = -torch.einsum("tbk,sbk->tsb", target, said)
        different = 1 - torch.eye(LARGE, len(said), device=cross.device)
        total = ((cross * different[:, :, None]).sum((0, 1)) / different.sum()).sum()
        entropy = -(target * target.clamp_min(1e-12).log()).sum(-1).mean(0).sum()
        named = {"loss": total.detach(), "entropy": entropy.detach()}
        if config.centering == "mean" and torch.is_grad_enabled():
            self._said.append((output.average.float().sum((0, 1)), output.average[..., 0].numel()))
        if config.koleo_weight:
            own, others = (cast(Tensor, known)[..., config.prototypes :] for known in (inputs.known, self._together()))
            by_view = [koleo(*views) for views in zip(output.vectors, own, others, strict=True)]
            apart = torch.stack(by_view).mean(0).sum()
            total = total + config.koleo_weight * apart
            named["koleo"] = apart.detach()
        return Losses(total, named)

    def _together(self) -> Tensor:
        """What both said of the images of this step on all ranks, [2, images, K + C]. Collective when new."""
        if len(self._known) > 1 or self._known[0].dim() == 3:
            mine = torch.cat(self._known, 1).transpose(0, 1)
            self._known = [gather_over_ranks(mine).transpose(0, 1)[None]]
        return self._known[0][0]

    @torch.no_grad()
    def _shift(self) -> Tensor:
        """Of the average's logits over its temperature: [K], or [2, 1, K] by view."""
        temperature = self.config.teacher_temperature
        if self.config.centering == "mean":
            return -self.network.centre / temperature
        return sinkhorn_shift(self._together()[..., : self.config.prototypes] / temperature)

    @torch.no_grad()
    def after_step(self, step: int, write_rows: WriteRows) -> None:
        """Move the centre (Eq. 4, where it is used) and the average; on all ranks alike."""
        if self.config.centering == "mean":
            self._move_centre(step)
        rise = (1 - math.cos(math.pi * step / self.steps)) / 2
        momentum = 1 - (1 - self.config.average_momentum) * (1 - rise)
        for average, student in self.network.pairs():
            average.lerp_(student, 1 - momentum)

    def _move_centre(self, step: int) -> None:
        sums = torch.stack([total for total, _ in self._said]).sum(0)
        count = sum(number for _, number in self._said)
        summed = sum_over_ranks(torch.cat([sums, sums.new_full((1,), count)]))
        # The first mean is taken as it is: before it is known, the average says the same of all images.
        share = 1.0 if step == 0 else 1 - self.config.center_momentum
        self.network.centre.lerp_(summed[:-1] / summed[-1], share)


SINKHORN_ITERATIONS = 3
"""DINOv2's."""


def sinkhorn_shift(logits: Tensor) -> Tensor:
    """What to add to logits [..., N, K] so that their softmax spreads N images evenly over K: [..., 1, K].

    Sinkhorn-Knopp ends with making every image's shares sum to 1, which is a softmax: only the factors of the
    prototypes remain to be known (Caron et al. 2020, arXiv:2006.09882, section 3.1).
    """
    rows = torch.zeros_like(logits[..., :1])
    shift = torch.zeros_like(logits[..., :1, :])
    for _ in range(SINKHORN_ITERATIONS):
        shift = -(logits + rows).logsumexp(-2, keepdim=True)
        rows = -(logits + shift).logsumexp(-1, keepdim=True)
    return shift


def koleo(vectors: Tensor, own: Tensor, others: Tensor) -> Tensor:
    """- log distance of unit vectors to the nearest of the others, [B] (Sablayrolles et al. 2019, arXiv:1806.03198).

    Args:
        vectors: [B, C], of the student.
        own: [B, C], the same without gradient, by which an image is not its own neighbour.
        others: [N, C], of all images of the step, without gradient: the loss does not depend on how the step is split.
    """
    student, bank = F.normalize(vectors.float(), dim=-1), F.normalize(others, dim=-1)
    likeness = (F.normalize(own, dim=-1) @ bank.T).masked_fill((own[:, None] == others[None]).all(-1), -2.0)
    return -((student - bank[likeness.argmax(1)]).square().sum(-1) + 1e-8).sqrt().log()


def crop(images: Tensor, drawn: Tensor, side: int, scale: tuple[float, float], config: CropsConfig) -> Tensor:
    """Random squares of images in [-1, 1], resized to ``side`` pixels (bilinear), brighter or darker.

    Args:
        drawn: uniform numbers [B, 6]: area, place (two), mirror, brightness, contrast.
        scale: least and greatest share of the area.

    Returns:
        [B, 3, side, side].
    """
    area, left, top, mirror, brightness, contrast = drawn.unbind(1)
    length = (scale[0] + (scale[1] - scale[0]) * area).sqrt()  # of the image's side
    flipped = torch.where((mirror < 0.5) & torch.tensor(config.flip, device=mirror.device), -length, length)
    zero = torch.zeros_like(length)
    place = [(2 * at - 1) * (1 - length) for at in (left, top)]
    rows = [torch.stack([flipped, zero, place[0]], 1), torch.stack([zero, length, place[1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), [len(images), 3, side, side], align_corners=False)
    views = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    light = (views + 1) * (1 + config.brightness * (2 * brightness - 1))[:, None, None, None]
    mean = light.mean((1, 2, 3), keepdim=True)
    factor = (1 + config.contrast * (2 * contrast - 1))[:, None, None, None]
    return ((light - mean) * factor + mean).clamp(0, 2) - 1


def _initial_value(name: str, value: Tensor, generator: torch.Generator) -> None:
    """Zero biases, unit norms, normal weights of Xavier's deviation: DINO's 0.02 suits a width of 384 and more, and
    leaves a narrow network saying nearly the same of all images. Tokens, positions: 0.02."""
    if name.endswith("bias"):
        value.zero_()
    elif "norm" in name:
        value.fill_(1.0)
    elif name.endswith("prototypes"):
        value.normal_(generator=generator)
    else:
        fans = value.shape[0] + value[0].numel()
        std = math.sqrt(2 / fans) if name.endswith("weight") else 0.02
        nn.init.trunc_normal_(value, std=std, generator=generator)


def _check(config: Config) -> None:
    """What it cannot do is refused before the first step.

    Raises:
        ConfigError: with the key to change.
    """
    recipe = config.recipe
    assert isinstance(recipe, SelfDistillationConfig)
    side, patch = recipe.network.grid * recipe.network.patch, recipe.network.patch
    stage = load_deepspeed_json(Path(config.deepspeed)).get("zero_optimization", {}).get("stage", 0)
    wrong = {
        f"train.precision={config.train.precision}: the average of the weights needs float32. Set fp32":
            config.train.precision != "fp32",
        f"{config.deepspeed} asks for ZeRO stage 3, which cuts the student's weights, but every rank averages them. "
        f"Use stage 0 to 2": stage == 3,
        f"recipe.koleo_weight={recipe.koleo_weight} needs the vectors that recipe.centering=sinkhorn_knopp collects. "
        f"Set it to 0": recipe.centering == "mean" and recipe.koleo_weight > 0,
        "the average's momentum rises over the whole run. Give its length as train.steps": config.train.steps is None,
        f"data.image_size={config.data.image_size}, but recipe.network has {recipe.network.grid} patches of {patch} "
        f"pixels along a side, {side} pixels. Change one of them": config.data.image_size != side,
        f"recipe.crops.local_side={recipe.crops.local_side} is not a multiple of recipe.network.patch={patch}. Change "
        f"one of them": recipe.crops.local_side % patch != 0,
    }  # fmt: skip
    for problem, is_wrong in wrong.items():
        if is_wrong:
            raise ConfigError(f"recipe.name={recipe.name}: {problem}.")
