"""A small real model and recipe, and its training loop in plain torch as the reference."""

import itertools
import json
from pathlib import Path

import torch
from torch import nn

from megavar.config.deepspeed import complete_deepspeed
from megavar.config.logging import LoggingConfig
from megavar.config.optimizer import ConstantSchedule, OptimizerConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.train import TrainConfig
from megavar.data.batch import Batch
from megavar.parallel.environment import environment
from megavar.parallel.parameter_rule import ParameterRule
from megavar.parallel.topology import initialize
from megavar.recipes.base import BaseRecipe, Losses, Pass
from megavar.training.engine import Engine
from megavar.training.run import Run
from megavar.training.run_directory import RunDirectory

LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-2, 0.05, 0.5
OPTIMIZER = OptimizerConfig(
    lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, gradient_clipping=CLIP, schedule=ConstantSchedule()
)
GLOBAL_BATCH = 8


class Model(nn.Module):
    """Two layers of different sizes, one with a bias, and a parameter that never gets a gradient in odd steps."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 3, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def batch(step, size=GLOBAL_BATCH):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(size, 5, generator=generator), torch.randint(0, 3, (size,), generator=generator)


def rule(name):
    """Weights decay, the bias does not."""
    return ParameterRule(decays=name.endswith("weight"))


def loss_of(output, target):
    return nn.functional.cross_entropy(output.float(), target)


def reference(steps, scale=1.0):
    """Losses and gradient norms of plain torch on one process."""
    model = Model()
    groups = [
        {"params": [model.first.weight, model.second.weight], "weight_decay": WEIGHT_DECAY},
        {"params": [model.first.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=OPTIMIZER.betas, eps=OPTIMIZER.epsilon)
    curve = []
    for step in range(steps):
        x, target = batch(step)
        loss = loss_of(model(x), target) * scale
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), norm.item()))
    return curve


def build_engine(stage, micro_batch=None, precision="fp32", zero=None, module=None, parallel=None, rule=rule):
    topology = initialize(parallel or ParallelConfig(), environment())
    micro_batch = micro_batch or GLOBAL_BATCH // topology.data
    plan = complete_deepspeed(
        {"zero_optimization": {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
                               **(zero or {})}},
        where="test.json", parallel=topology.config, data_parallel_size=topology.data, global_batch_size=GLOBAL_BATCH,
        micro_batch_size=micro_batch, precision=precision, gradient_clipping=CLIP,
    )  # fmt: skip
    engine = Engine("model", module or Model(), rule=rule, optimizer=OPTIMIZER, plan=plan, topology=topology)
    return engine, topology, micro_batch


def local_micro_batches(step, topology, micro_batch):
    x, target = batch(step)
    share = GLOBAL_BATCH // topology.data
    start = topology.data_rank * share
    places = range(start, start + share, micro_batch)
    return [(x[i : i + micro_batch], target[i : i + micro_batch]) for i in places]


class TinyRecipe(BaseRecipe):
    """Classifies images [B, 3, 1, 5] with :class:`Model`; ``poison`` makes the loss of some samples infinite."""

    def __init__(self, poison=(), seed=0):
        self.model = Model(seed)
        self.poison = set(poison)

    def modules(self):
        return {"model": self.model}

    def prepare(self, batch, step):
        return batch

    def passes(self, module, step):
        return [Pass(lambda model, inputs: model(inputs.images[:, 0, 0]), lambda *pair: self.loss(*pair, step=step))]

    def loss(self, output, inputs, step):
        losses = nn.functional.cross_entropy(output.float(), inputs.labels, reduction="none")
        bad = torch.tensor([index in self.poison for index in inputs.sample_ids.tolist()])
        total = (losses + torch.where(bad, float("inf"), 0.0)).sum()  # infinite, with a finite gradient
        counts = torch.bincount(inputs.labels, minlength=3)
        return Losses(total, {"loss": total.detach()}, {"labels": counts})

    def rule(self, module, parameter):
        return rule(parameter)

    def summarize(self, statistics):
        return {f"labels/{i}": value for i, value in enumerate(statistics["labels"].tolist())}

def tiny_loader(topology):
    """Samples are numbered through the run: sample i of the data is the same for every layout."""

    def load(first_step, micro_batch):
        for step in itertools.count(first_step):
            x, target = batch(step)
            ids = torch.arange(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
            share = GLOBAL_BATCH // topology.data
            start = topology.data_rank * share
            places = [slice(i, i + micro_batch) for i in range(start, start + share, micro_batch)]
            images = x[:, None, None].expand(-1, 3, 1, -1)
            yield [Batch(images[p], target[p], ids[p], torch.zeros_like(ids[p])) for p in places]

    return load


def build_run(directory, *, stage=1, steps=6, recipe=None, train=None, config=None, **options):
    """A complete :class:`Run` of the tiny recipe in the current world."""
    topology = initialize(ParallelConfig(), environment())
    settings = {"steps": steps, "global_batch_size": GLOBAL_BATCH, "checkpoint": {"interval": 100}} | (train or {})
    train_config = TrainConfig.model_validate(settings)
    logging_config = LoggingConfig.model_validate({"interval": 1, "progress": "none", "wandb": {"mode": "disabled"}})
    return Run(
        name="tiny", train=train_config, optimizer=OPTIMIZER, logging=logging_config,
        deepspeed={"zero_optimization": {"stage": stage}}, deepspeed_origin="test.json",
        config=config or {"train": train_config.model_dump(mode="json")}, directory=RunDirectory(directory),
        recipe=recipe or TinyRecipe(), samples=100, loader=tiny_loader(topology), topology=topology, **options,
    )  # fmt: skip


def read_metrics(directory):
    return [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
