"""A family that the library does not know trains the same function under every layout."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from megavar.assembly import Assembly
from megavar.config.optimizer import ConstantSchedule, OptimizerConfig
from megavar.config.parallel import ParallelConfig
from megavar.data.batch import Batch
from megavar.data.build import build_source
from megavar.parallel import seeds, topology
from megavar.parallel.environment import environment
from tests.boundary.runs import MEPA, load, write_run, write_tokenizer
from tests.distributed.curves import Setup
from tests.distributed.harness import run_ranks
from tests.loops import EngineLoop, bare_loop

pytestmark = pytest.mark.distributed
STEPS, BATCH, TOLERANCE = 3, 8, 1e-5
OPTIMIZER = OptimizerConfig(lr=3e-3, weight_decay=0.05, gradient_clipping=0.5, schedule=ConstantSchedule())
METRICS = ("loss", "loss/student", "loss/toy_brightness", "gradient_norm")
GENERATORS: dict[str, Any] = {"dense": {"experts": None}, "own router": {}, "MEPA's router": {"experts": MEPA}}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A configuration per kind of generator."""
    folder = tmp_path_factory.mktemp("toy")
    tokenizer = write_tokenizer(folder / "tokenizer.safetensors")
    common = {"name": "toy_causal", "dropout": 0.2}
    return {
        kind: write_run(folder / f"{kind[:3]}.yaml", tokenizer, generator=common | changes)
        for kind, changes in GENERATORS.items()
    }


def batches(mesh: topology.Topology, size: int, step: int) -> list[Batch]:
    """This rank's micro-batches of a step: tokens and labels from counters."""
    first = step * BATCH + mesh.data_rank * (BATCH // mesh.data)
    result = []
    for ids in torch.arange(first, first + BATCH // mesh.data).split(size):
        tokens = seeds.random_bits(1, "tokens", ids[:, None], torch.arange(12)) % 32
        result.append(Batch(None, seeds.random_bits(1, "labels", ids) % 10, ids, torch.zeros_like(ids), tokens=tokens))
    return result


def curve(path: Path, setup: Setup | None) -> list[dict[str, Any]]:
    """Runs on every rank; without a setup: one process and plain torch."""
    parallel = ParallelConfig(**setup.parallel) if setup is not None else ParallelConfig()
    mesh = topology.initialize(parallel, environment())
    config = load(path)
    recipe = Assembly(config, build_source(config.data), torch.device("cpu"), mesh).recipe()
    size = (setup.micro_batch_size if setup is not None else None) or BATCH // mesh.data
    given = functools.partial(batches, mesh, size)
    if setup is None:
        return bare_loop(recipe, "generator", given, STEPS, optimizer=OPTIMIZER)
    zero = {"stage": setup.stage} | ({"stage3_param_persistence_threshold": 0} if setup.stage == 3 else {})
    loop = EngineLoop(
        recipe, mesh, given, optimizer=OPTIMIZER, zero=zero, global_batch_size=BATCH, micro_batch_size=size
    )
    return [loop.step(step) for step in range(STEPS)]


_reference: dict[Path, list[dict[str, Any]]] = {}


def assert_as_one_process(path: Path, setup: Setup) -> None:
    if path not in _reference:
        _reference[path] = run_ranks(1, curve, path, None)[0]
    expected = _reference[path]
    assert expected[0]["gradient_norm"] > OPTIMIZER.gradient_clipping, "clipping must be active"
    for found in run_ranks(setup.world_size, curve, path, setup):
        for name in METRICS:
            assert [step[name] for step in found] == pytest.approx([step[name] for step in expected], abs=TOLERANCE)
        for one, other in zip(found, expected):
            if "load" in other:
                assert torch.equal(one["load"].double(), other["load"].double())


DENSE = [
    Setup(1, 0),
    Setup(2, 3, micro_batch_size=2),
    Setup(2, 1, parallel={"tensor": 2}),
    Setup(2, 2, parallel={"tensor": 2, "sequence": True, "recompute": "full"}),
    Setup(2, 1, micro_batch_size=2, parallel={"pipeline": 2, "virtual_pipeline": 2}),
]
EXPERTS = [
    Setup(2, 0),
    Setup(2, 1, parallel={"recompute": "selective"}),
    Setup(2, 2, parallel={"expert": 2}),
    Setup(2, 3, parallel={"expert": 2, "recompute": "full"}),
    Setup(2, 3, parallel={"tensor": 2, "sequence": True}),
    Setup(2, 1, micro_batch_size=2, parallel={"pipeline": 2}),
    Setup(4, 1, micro_batch_size=2, parallel={"tensor": 2, "pipeline": 2, "expert": 2}),
]


@pytest.mark.parametrize("setup", DENSE, ids=str)
def test_dense(setup: Setup, files: dict[str, Path]) -> None:
    assert_as_one_process(files["dense"], setup)


@pytest.mark.parametrize("setup", EXPERTS, ids=str)
def test_experts_behind_its_own_router(setup: Setup, files: dict[str, Path]) -> None:
    assert_as_one_process(files["own router"], setup)


def test_experts_behind_one_of_mepas_routers(files: dict[str, Path]) -> None:
    assert_as_one_process(files["MEPA's router"], Setup(2, 2, parallel={"expert": 2}))
