"""torchrun, srun and single process map to the same description."""

import pytest
import torch

from megavar.config.parallel import ParallelConfig
from megavar.errors import ClusterError
from megavar.parallel import topology
from megavar.parallel.environment import Environment, choose_kernels, read_environment

RENDEZVOUS = {"MASTER_ADDR": "n1", "MASTER_PORT": "20001"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **RENDEZVOUS}
SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", **RENDEZVOUS}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Environment(0, 1, 0, "single")),
        (TORCHRUN, Environment(3, 8, 1, "torchrun")),
        (SRUN, Environment(5, 8, 1, "srun")),
        (SRUN | TORCHRUN, Environment(3, 8, 1, "torchrun")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Environment(0, 1, 0, "single")),  # the batch script itself
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Environment(0, 1, 0, "torchrun")),
    ],
)
def test_mapping(variables: dict[str, str], expected: Environment) -> None:
    assert read_environment(variables) == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0", **RENDEZVOUS}, "lacks LOCAL_RANK, WORLD_SIZE"),
        (TORCHRUN | {"RANK": "8"}, "RANK=8 is not below WORLD_SIZE=8"),
        ({key: value for key, value in SRUN.items() if key != "MASTER_ADDR"}, "MASTER_ADDR is not set"),
    ],
)
def test_contradictions_are_explained(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        read_environment(variables)


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_ranks_of_mpi_do_not_train_alone(name):
    with pytest.raises(ClusterError, match=rf"{name}=2: .*every rank would train alone"):
        read_environment({name: "2"})
    assert read_environment({name: "1"}).world_size == 1  # as some clusters set it in every shell
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **RENDEZVOUS}
    assert read_environment({name: "2", **torchrun}).rank == 1
    assert read_environment({name: "8", **SRUN}).rank == 5


def test_empty_variables_are_absent_ones():
    empty = {"RANK": "", "WORLD_SIZE": " ", "SLURM_PROCID": "", "SLURM_STEP_ID": ""}
    assert read_environment(empty).launcher == "single"
    assert read_environment({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "", **SRUN}).launcher == "srun"


def test_variables_that_are_no_numbers_are_named():
    with pytest.raises(ClusterError, match="RANK='one' is not a number"):
        read_environment({"RANK": "one", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **RENDEZVOUS})


@pytest.fixture
def a_gpu(monkeypatch):
    """What PyTorch would say of one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    yield
    monkeypatch.undo()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.deterministic = False
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize(("precision", "tf32", "expected"), [
    ("bf16", None, True), ("fp32", None, False), ("bf16", False, False), ("fp32", True, True),
])  # fmt: skip
def test_float32_products_are_rounded_as_asked(a_gpu, precision, tf32, expected):
    choose_kernels(precision, tf32, deterministic=False)
    assert torch.backends.cuda.matmul.allow_tf32 == expected
    assert torch.get_float32_matmul_precision() == ("high" if expected else "highest")
    assert not torch.are_deterministic_algorithms_enabled()


def test_repeatable_kernels_are_asked_for(a_gpu, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    choose_kernels("bf16", None, deterministic=True)
    assert torch.is_deterministic_algorithms_warn_only_enabled() and torch.backends.cudnn.deterministic
    choose_kernels("bf16", None, deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_more_processes_than_gpus_are_refused(a_gpu, monkeypatch):
    monkeypatch.setattr(topology.cpu_backend, "install", lambda: None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(ClusterError, match=r"Process 1 of this node .* sees 1 GPUs"):
        topology.initialize(ParallelConfig(), Environment(1, 2, 1, "torchrun"))
