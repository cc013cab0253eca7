"""Compare this trainer's speed with the public VAR code's: same machine, weights and work, one process, side by side.

    git clone https://github.com/FoundationVision/VAR DIR             (it needs huggingface_hub)
    python -m tools.benchmark_against DIR configs/mepa/var_d16.yaml generator.depth=8 train.precision=fp32

``train`` is a step from token maps: inputs of all scales, forward, loss, backward, clipping, AdamW and accuracy, as the
public ``trainer.py`` does it and as a run here does (DeepSpeed, the schedules, the metrics of every scale).
``sampling`` draws guided images, decoder included. Both models get the same random weights; before anything is timed
their logits and decoded images are compared. Rounds alternate, so that the ratio, taken round by round, holds on a busy
machine. The public code uses its optional CUDA kernels (flash-attn, xformers) where they are installed.
"""

import argparse
import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megavar import frozen
from megavar.assembly import build_generator, build_sampler, weight_layouts
from megavar.config.loading import load_config
from megavar.config.root import Config
from megavar.errors import ConfigError, ExitCode, MegavarError
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.run_samples import default_conditions
from megavar.storage import write_json_atomic
from megavar.training.checkpoint.weights import fill, shapes_of
from megavar.training.metrics import MetricAccumulator
from megavar.training.step import train_step
from tools.benchmark import rows, table
from tools.benchmark_bench import Bench, FreshAssembly, Part, trained_module
from tools.benchmark_cases import LEARNING_RATE, WEIGHT_DECAY
from tools.benchmark_timing import machine, measure

PUBLIC, OURS = "public code", "megavar"
_TOLERANCE = 1e-3
"""Of logits, whose standard deviation is about 1; kernels round differently."""


class Public:
    """The models of a checkout of FoundationVision/VAR, with our weights' distribution and a training step."""

    def __init__(self, checkout: Path, config: Config) -> None:
        """Build its tokenizer and transformer for ``config``.

        Raises:
            ConfigError: ``checkout`` is no such checkout, or the configuration describes a model that it lacks.
        """
        generator, tokenizer = config.generator, config.tokenizer
        if (
            generator is None
            or "var" not in type(generator).weight_layouts
            or generator.limits(tokenizer.space).experts is not None
        ):
            raise ConfigError("The public code has dense VARs only. Give such a configuration (configs/mepa/var_*).")
        if not (checkout / "models" / "var.py").is_file():
            raise ConfigError(f"{checkout} is no checkout of FoundationVision/VAR: models/var.py is missing.")
        sys.path.insert(0, str(checkout))
        try:
            build = importlib.import_module("models").build_vae_var
        except ImportError as error:
            raise ConfigError(f"{checkout} cannot be imported: {error}. Install what it needs.") from error
        given: Any = generator
        scales: Any = tokenizer
        with Path(os.devnull).open("w") as quiet, contextlib.redirect_stdout(quiet):
            self.tokenizer, self.model = build(
                device=torch.empty(0).device,
                patch_nums=scales.scales,
                V=scales.vocabulary_size,
                Cvae=scales.code_dimension,
                ch=scales.base_channels,
                num_classes=given.classes,
                depth=given.depth,
                shared_aln=given.shared_adaptive_norm,
                attn_l2_norm=given.qk_l2_norm,
            )
        _randomize(self.tokenizer)
        _randomize(self.model)
        self.clipping = config.optimizer.gradient_clipping or float("inf")
        decayed = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in self.model.parameters() if parameter.ndim <= 1]
        groups = [{"params": decayed}, {"params": others}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=LEARNING_RATE, betas=config.optimizer.betas, weight_decay=0.0, fused=True
        )

    def inputs(self, ids: Tensor, sides: Sequence[int]) -> Tensor:
        """Teacher-forcing inputs of token maps [B, L]."""
        with torch.no_grad():
            return self.tokenizer.quantize.idxBl_to_var_input(list(ids.split([side * side for side in sides], 1)))

    def step(self, labels: Tensor, ids: Tensor, sides: Sequence[int]) -> None:
        """What ``trainer.py`` does between two batches of token maps."""
        logits = self.model(labels, self.inputs(ids, sides))
        per_token = nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), ids.view(-1), reduction="none")
        per_token.view(ids.shape).mul(1 / ids.shape[1]).sum(-1).mean().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clipping)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        logits.detach().argmax(-1)


@torch.no_grad()
def _randomize(module: nn.Module) -> None:
    """Weights of the scale of trained ones: gates and heads that begin at zero would hide differences."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
        elif name.endswith("bias"):  # the code leaves some of them uninitialized
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


class PublicWeights(FreshAssembly):
    """Parts of a run with the public models' weights."""

    def with_weights_of(self, public: Public) -> "PublicWeights":
        """Take them."""
        object.__setattr__(self, "public", public)
        return self

    @functools.cached_property
    def _tokenizer(self) -> Any:
        """Frozen."""
        tokenizer = self.fresh_tokenizer()
        tokenizer.load_state_dict(self.public.tokenizer.state_dict())  # type: ignore[attr-defined]
        return frozen.ready(tokenizer, self.device)

    def tokenizer(self) -> Any:
        """The same for all."""
        return self._tokenizer

    def generator(self, **options: Any) -> nn.Module:
        """With the public model's weights."""
        return self.filled(super().generator(**options))

    def filled(self, model: nn.Module) -> nn.Module:
        """``model`` with the public one's weights."""
        choice = self.config.generator
        assert choice is not None
        layout = weight_layouts(choice, self.config.tokenizer.space)["var"]
        state = self.public.model.state_dict()  # type: ignore[attr-defined]
        fill(model, layout.load(state, shapes_of(model)))
        return model


def train(bench: Bench, public: Public, assembly: PublicWeights) -> Part:
    """A step from token maps."""
    recipe, batch = assembly.recipe(), bench.tokens()
    assert batch is not None and batch.tokens is not None
    _, model = trained_module(recipe)
    labels, ids, sides = batch.labels, batch.tokens, bench.space.sides
    inputs = recipe.prepare(batch, 0)
    with torch.no_grad():
        public.model.eval()
        model.eval()
        public.model.cond_drop_rate = 0.0  # it would drop labels in evaluation, too; dropping one or not costs nothing
        inputs.model.labels = labels
        own, theirs = model(inputs.model).prediction, public.model(labels, inputs.model.features)
        _require_equal("logits", own, theirs)
        _require_equal("inputs", inputs.model.features, public.inputs(ids, sides))
        public.model.train()
        model.train()
    engines, metrics = bench.engines(recipe), MetricAccumulator()

    def ours() -> None:
        train_step(
            recipe, engines, [batch], 0, rates=lambda name, step: (LEARNING_RATE, WEIGHT_DECAY), metrics=metrics,
            topology=bench.topology,
        )  # fmt: skip

    alternatives: dict[str, Callable[[], Any]] = {PUBLIC: lambda: public.step(labels, ids, sides), OURS: ours}
    return Part("train step from token maps", alternatives, images=bench.batch, baseline=PUBLIC)


def sampling(bench: Bench, public: Public, assembly: PublicWeights) -> Part:
    """Guided images, decoded."""
    settings: Any = bench.config.sampling
    model = assembly.filled(build_generator(bench.config, None, device=bench.device)).eval()
    tokenizer = assembly.tokenizer()
    sampler = build_sampler(bench.config, model, tokenizer, default_conditions(bench.config), bench.device)
    indices = torch.arange(bench.batch)
    labels = sampler.conditions.at(indices).labels
    assert labels is not None
    public.model.eval()
    ids = torch.from_numpy(sampler.draw(indices).arrays["tokens"].astype("int64"))
    parts = list(ids.split([side * side for side in bench.space.sides], 1))
    with torch.no_grad():
        theirs = public.tokenizer.idxBl_to_img(parts, same_shape=True, last_one=True)
        _require_equal("decoded images", tokenizer.decode(ids), theirs)

    def draw() -> None:
        public.model.autoregressive_infer_cfg(
            bench.batch, labels, g_seed=0, cfg=settings.guidance, top_k=settings.top_k, top_p=settings.top_p
        )

    alternatives: dict[str, Callable[[], Any]] = {PUBLIC: draw, OURS: lambda: sampler.draw(indices)}
    return Part("sampling, decoded", alternatives, images=bench.batch, baseline=PUBLIC)


PARTS = {"train": train, "sampling": sampling}


def _require_equal(what: str, own: Tensor, public: Tensor) -> None:
    difference = float((own - public).abs().max() / public.std().clamp(min=1e-6))
    print(f"  {what} differ by {difference:.1e} of their standard deviation", flush=True)
    if not difference < _TOLERANCE:
        raise ConfigError(f"Both codes compute different {what}: what follows would compare different work.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmark_against", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, metavar="DIR", help="a checkout of FoundationVision/VAR")
    parser.add_argument("config", metavar="CONFIG", help="configuration of a dense VAR")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--batch", type=int, default=4, help="images (default: 4)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default: 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    options = _parser().parse_intermixed_args(arguments)
    place = environment()
    figures: list[dict[str, Any]] = []
    try:
        config = load_config(options.config, options.overrides)
        public = Public(options.checkout, config)
        bench = Bench(config, topology.initialize(config.parallel, place), place.device, options.batch)
        assembly = PublicWeights(config, None, place.device, bench.topology).with_weights_of(public)  # type: ignore[arg-type]
        described = machine()
        print(", ".join(f"{key} {value}" for key, value in described.items()), flush=True)
        for name in options.parts:
            part = PARTS[name](bench, public, assembly)
            measured = rows(part, measure(part.alternatives, options.repeats), None)
            print(table(part, measured), flush=True)
            figures += measured
    except MegavarError as error:
        print(f"benchmark_against: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        topology.shutdown()
    if options.json is not None:
        settings = {"config": options.config, "overrides": options.overrides, "batch": options.batch}
        write_json_atomic(options.json, {"machine": described, "run": settings, "figures": figures})
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
