"""torchrun, srun and single process map to the same description."""

import pytest

from megavar.errors import ClusterError
from megavar.parallel.environment import Environment, read_environment

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
