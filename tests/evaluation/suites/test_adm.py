import numpy as np
import pytest
import torch

from megavar.config.suites.adm import ADMSuite
from megavar.errors import CheckpointError, DataError
from megavar.evaluation import reference
from megavar.evaluation.suites import adm
from megavar.parallel.environment import Environment
from tests.evaluation.suites.conftest import PHOTOGRAPHS, SHAPES, real_images

ONE = Environment(0, 1, 0, "single")


def test_features_are_kept_and_keys_qualified(tmp_path, as_chunks, small_inception, monkeypatch):
    monkeypatch.setattr(adm, "ADMInception", lambda weights, unofficial: small_inception)
    real, _ = real_images(PHOTOGRAPHS, "train")
    features = small_inception(real)
    statistics = [reference.gaussian(part) for part in (features.pool, features.spatial)]
    made = reference.Reference(*statistics, features.pool, {"of": "photographs"})
    reference.save_reference(tmp_path / "ref.npz", made, small_inception)
    images = as_chunks(*real_images(PHOTOGRAPHS))
    for backend in ("megavar", "torch-fidelity"):
        choice = ADMSuite(inception_weights="w", reference=str(tmp_path / "ref.npz"), backend=backend)
        suite = adm.ADM(choice, PHOTOGRAPHS)
        suite.take_features(images, ONE, tmp_path)
        scores = suite.score(images, torch.device("cpu"), tmp_path)
        assert scores.metrics["fid@60@small"] > 0 and scores.reference["kind"] == "megavar"
        assert any("60 images instead of 50000" in note for note in scores.notes)
        assert suite.label == f"adm/{backend}" and not suite.untrained_beside and suite.images_kept == 100
    assert (tmp_path / "features-small" / "chunk_000000.npz").exists()


def test_missing_files_are_found_before_sampling(tmp_path, random_weights):
    np.savez(tmp_path / "mar.npz", mu=np.zeros(3), sigma=np.eye(3))
    given = {"inception_weights": str(random_weights), "unofficial_weights": True}

    def check(**values):
        adm.ADM(ADMSuite(**given | values), SHAPES).check()

    check(reference=str(tmp_path / "mar.npz"))
    with pytest.raises(DataError, match=r"none\.npz do not exist"):
        check(reference=str(tmp_path / "none.npz"))
    with pytest.raises(CheckpointError, match="do not exist"):
        check(inception_weights="w", reference=str(tmp_path / "mar.npz"))
