"""ADM's features on seeded random weights of the published layout."""

import pytest
import torch
from torch_fidelity.utils import create_feature_extractor

from megavar.errors import CheckpointError
from megavar.evaluation.inception import WEIGHTS_NAME, ADMInception, full_precision
from megavar.evaluation.statistics import frechet_distance, gaussian
from tests.distributed.harness import run_ranks


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (3, 3, 40, 40), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.fixture(scope="module")
def features(inception, images):
    return inception(images)


def test_pool_and_logits_are_those_of_torch_fidelity(inception, images, features, random_weights):
    theirs = create_feature_extractor(
        "inception-v3-compat",
        ["2048", "logits_unbiased"],
        cuda=False,
        verbose=False,
        feature_extractor_weights_path=str(random_weights),
    )
    pool, logits = theirs(images)
    assert torch.equal(features.pool, pool)
    torch.testing.assert_close(inception.logits(pool), logits)
    assert float((inception.logits(pool) - inception.network.fc(pool)).abs().max()) > 1e-3  # the bias is left out


def test_spatial_features_are_the_first_seven_channels_flattened_channels_last(inception, images, features):
    block = []
    with inception.network.Mixed_6d.register_forward_hook(lambda module, inputs, output: block.append(output)):
        inception(images)
    expected = block[0][:, :7]
    assert features.spatial.shape == (3, 2023)
    for place in ((0, 0, 0), (3, 11, 2), (16, 16, 6)):
        row, column, channel = place
        assert torch.equal(features.spatial[:, (row * 17 + column) * 7 + channel], expected[:, channel, row, column])


def test_channels_first_flattening_would_not_go_unnoticed(features):
    """Statistics stored channels last, as ADM's are, against features of the same images channels first."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.linspace(0.1, 3, 7)  # channels differ, as those of the network do
    right = torch.rand(60, 17, 17, 7, generator=generator) * scale
    wrong = right.permute(0, 3, 1, 2).reshape(60, -1)[:, ::17]
    right = right.reshape(60, -1)[:, ::17]
    assert frechet_distance(gaussian(right), gaussian(right)) < 1e-6
    assert frechet_distance(gaussian(wrong), gaussian(right)) > 10


def test_other_weights_change_the_name_and_must_be_asked_for(random_weights, inception, tmp_path):
    assert not inception.official and inception.name == f"inception-{inception.weights_sha256[:8]}"
    with pytest.raises(CheckpointError, match=r"starts with [0-9a-f]{8}, but .* 6726825d"):
        ADMInception(random_weights)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS_NAME}.*6726825d.*--inception-weights"):
        ADMInception(tmp_path / "absent.pth")


@pytest.mark.parametrize(
    ("name", "message"),
    [("text.pth", "Inception weights"), ("other.pth", "does not hold the tensors"), ("shape.pth", "size mismatch")],
)
def test_files_that_are_not_its_weights_are_explained(random_weights, tmp_path, name, message):
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    state = torch.load(random_weights)
    torch.save(state | {"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "shape.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        ADMInception(tmp_path / name, unofficial=True)
    assert len(str(caught.value)) < 600 and name in str(caught.value)


def legacy_switches():
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True


def newer_switches():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def precisions():
    backends = torch.backends
    switches = backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv
    return [switch.fp32_precision for switch in switches]


def precision_around(lower):
    """Before, inside and after, in a process of its own, as the two families of switches cannot be told apart again."""
    lower()
    before = precisions()
    with torch.autocast("cpu", torch.bfloat16), full_precision(torch.device("cpu")):
        inside = precisions(), (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    return before, inside, precisions()


@pytest.mark.parametrize("lower", [legacy_switches, newer_switches])
def test_full_precision_switches_off_and_restores_what_samplers_set(lower):
    ((before, inside, after),) = run_ranks(1, precision_around, lower)
    assert before[0] == "tf32" and before[2] == "bf16"
    assert inside == (["ieee"] * 4, torch.float32) and after == before


def test_features_do_not_depend_on_surrounding_autocast(inception, images, features):
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(inception(images).pool, features.pool)
