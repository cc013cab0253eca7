"""Fixtures of the tests of generators."""

import torch.utils._device

from tests.transformer.conftest import one_process  # noqa: F401

# Remembers PyTorch's factories before cpu_backend wraps them; later, `with torch.device("meta")` would not know them.
torch.utils._device._device_constructors()
