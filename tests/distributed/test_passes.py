"""Several passes per step, uneven numbers of valid tokens and terms under every layout: the numbers of one process."""

import functools

import pytest

from tests.distributed import rollouts
from tests.distributed.curves import CLIPPING, Setup
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed
TOLERANCE = 1e-5

LAYOUTS = [
    Setup(2, 0),
    Setup(2, 2, micro_batch_size=2),
    Setup(2, 3, micro_batch_size=2),
    Setup(4, 3, parallel={"tensor": 2}),
    Setup(2, 1, micro_batch_size=2, parallel={"pipeline": 2}),
    Setup(2, 1, micro_batch_size=2, parallel={"pipeline": 2, "virtual_pipeline": 2}),
    Setup(4, 1, micro_batch_size=2, parallel={"tensor": 2, "sequence": True, "pipeline": 2}),
]
WITH_EXPERTS = [Setup(2, 2, parallel={"expert": 2}), Setup(2, 1, parallel={"recompute": "full"})]
CASES = [*(Setup(**(vars(setup) | {"dense": True})) for setup in LAYOUTS), *LAYOUTS, *WITH_EXPERTS]


@functools.cache
def reference(dense):
    return run_ranks(1, rollouts.bare_values, Setup(dense=dense))[0]


@pytest.mark.parametrize("setup", CASES, ids=str)
def test_passes_are_those_of_one_process(setup):
    expected = reference(setup.dense)
    for values in run_ranks(setup.world_size, rollouts.engine_values, setup):
        for kind, steps in expected.items():
            for number, step in enumerate(steps):
                for name in set(step) & set(values[kind][number]) - {"load", "balance", "passes"}:
                    place = f"{kind}, step {number}: {name}"
                    assert values[kind][number][name] == pytest.approx(step[name], abs=TOLERANCE), place


@pytest.mark.parametrize("dense", [True, False])
def test_the_reference_does_what_the_names_say(dense):
    """Student forcing differs from teacher forcing, the mask is uneven, clipping is on, the term has a gradient."""
    two, rollout, masked = reference(dense).values()
    for steps in (two, rollout, masked):
        assert min(step["gradient_norm"] for step in steps) > CLIPPING
    assert min(abs(step["loss"] - step["loss/student"]) for step in two) > 1e-3
    assert abs(two[0]["loss/student"] - rollout[0]["loss"]) > 1e-4, "the second rollout changes nothing"
    assert abs(masked[-1]["reading/parity"] - masked[0]["reading/parity"]) > 1e-3, "its head has learned nothing"
    assert {"loss/student", "loss", "gradient_norm"} <= two[0].keys() and "loss/reading" in masked[0]


def test_a_mean_of_means_would_be_wrong():
    """What the uneven recipe shows: the mean of two ranks' means is another number than that of all valid tokens."""
    both = run_ranks(2, rollouts.losses_by_rank)
    (first, few), (second, many) = both[0]
    assert both[0] == both[1]
    assert many > 3 * few
    exact = (first * few + second * many) / (few + many)
    assert abs((first + second) / 2 - exact) > 1e-3
    assert exact == pytest.approx(reference(True)["masked, with a term"][0]["loss"], abs=TOLERANCE)


ONE_AT_A_TIME = [
    Setup(2, 3, micro_batch_size=1),
    Setup(2, 1, micro_batch_size=1, parallel={"pipeline": 2}),
    Setup(2, 1, micro_batch_size=1, parallel={"pipeline": 2, "virtual_pipeline": 2}),
]


@pytest.mark.parametrize("setup", ONE_AT_A_TIME, ids=str)
@pytest.mark.parametrize("passes", [1, 2])
def test_micro_batches_are_prepared_once_and_not_all_at_a_time(setup, passes):
    for prepared, most in run_ranks(setup.world_size, rollouts.preparations, setup, passes):
        count = 8 if setup.parallel else 4
        assert prepared == list(range(count))
        assert most < count if passes == 1 else most == count  # another pass needs all of them again
