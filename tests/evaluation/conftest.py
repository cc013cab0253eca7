import pytest
import torch
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from megavar.evaluation.inception import ADMInception, InceptionFeatures, full_precision


@pytest.fixture(scope="session")
def extractor_directory(tmp_path_factory):
    """One cache of trained extractors for the session, so that each is trained once and never in the user's cache."""
    return tmp_path_factory.mktemp("extractors")


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory):
    """Inception weights of the published layout with seeded random values (the published ones are a download)."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *args, **kwargs: None)
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        for module in network.modules():
            if isinstance(module, nn.Conv2d):  # the default initialization lets features collapse
                nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def inception(random_weights):
    return ADMInception(random_weights, unofficial=True)


class SmallInception(nn.Module):
    """Fixed random projections with the interface of ``ADMInception``.

    Reductions, references and ranks do not depend on what the features are, and decomposing covariances of 2048
    dimensions takes half a minute on a busy core.
    """

    pool_dimensions, spatial_dimensions = 24, 18
    weights_sha256, official, name = "5" * 64, False, "small"

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        sizes = {"pool": (3 * 64, 24), "spatial": (3 * 64, 18), "classes": (24, 10)}
        for key, size in sizes.items():
            setattr(self, key, nn.Parameter(torch.randn(size, generator=generator), requires_grad=False))

    def forward(self, images):
        x = nn.functional.adaptive_avg_pool2d(images.float() / 128 - 1, 8).flatten(1)
        return InceptionFeatures((x @ self.pool).relu(), (x @ self.spatial).relu())

    def logits(self, pool):
        with full_precision(pool.device):
            return pool @ self.classes


@pytest.fixture(scope="session")
def small_inception():
    return SmallInception()
