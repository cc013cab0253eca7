"""Flow matching on straight paths between data and noise (Lipman et al. 2023; rectified flow, Liu et al. 2023).

    x_t = (1 - t) data + t noise          t = 0 is data, t = 1 is noise (FlowAR's and SD3's direction)
    v   = dx_t / dt = noise - data        what a network predicts from x_t, t and its condition

A method that counts time the other way (t = 1 is data; MAR's successors, VGT) predicts -v at 1 - t.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def interpolate(data: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """x_t, with ``times`` broadcast against the tensors."""
    return (1 - times) * data + times * noise


def velocity(data: Tensor, noise: Tensor) -> Tensor:
    """v, the target of :func:`velocity_error`."""
    return noise - data


def velocity_error(predicted: Tensor, data: Tensor, noise: Tensor) -> Tensor:
    """Squared error of a predicted velocity, mean over channels: float32 [..., C] -> [...]."""
    return (predicted.float() - velocity(data, noise)).square().mean(-1)


def logit_normal(normal: Tensor, mean: float = 0.0, deviation: float = 1.0) -> Tensor:
    """Times in (0, 1) from standard normal numbers (Esser et al. 2024)."""
    return torch.sigmoid(mean + deviation * normal)


def shifted(times: Tensor, factor: float) -> Tensor:
    """Times moved towards noise by ``factor`` > 1 (Esser et al. 2024, Eq. 23): factor t / (1 + (factor - 1) t)."""
    return factor * times / (1 + (factor - 1) * times)


def euler(velocity_at: Callable[[Tensor, float], Tensor], start: Tensor, times: Sequence[float]) -> Tensor:
    """Integrate dx/dt = v from ``times[0]`` to ``times[-1]`` by Euler's method; the state is float64.

    Args:
        velocity_at: (x float32 [...], t) -> v [...].
        start: x at the first time, [...].
        times: n + 1 numbers, falling from noise to data.

    Returns:
        float32 [...].
    """
    state = start.double()
    for now, after in itertools.pairwise(times):
        state = state + (after - now) * velocity_at(state.float(), now).double()
    return state.float()


def euler_maruyama(
    velocity_at: Callable[[Tensor, float], Tensor],
    start: Tensor,
    times: Sequence[float],
    normal_at: Callable[[int], Tensor],
    *,
    plain_last: bool = True,
) -> Tensor:
    """Follow the stochastic equation with the marginals of the path, diffusing by sqrt(2 t) (VGT, NextStep-1).

    With time s = 1 - t towards data and u = -v the velocity towards it, the score is (s u - x) / t, and a step of size
    d adds (u + t score) d + sqrt(2 t d) w = ((1 + s) u - x) d + sqrt(2 t d) w. The state is float64.

    Args:
        velocity_at: (x float32 [...], t) -> v [...].
        start: x at the first time, [...].
        times: n + 1 numbers, falling from noise to data.
        normal_at: standard normal numbers w [...] of step 1, 2 ...
        plain_last: the last step is Euler's, without noise.

    Returns:
        float32 [...].
    """
    state = start.double()
    for step, (now, after) in enumerate(itertools.pairwise(times), 1):
        size, towards_data = now - after, -velocity_at(state.float(), now).double()
        if plain_last and step == len(times) - 1:
            state = state + size * towards_data
            continue
        drift = (2 - now) * towards_data - state
        state = state + size * drift + (2 * now * size) ** 0.5 * normal_at(step).double()
    return state.float()
