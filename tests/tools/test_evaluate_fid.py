"""The command line of FID: every input, every output, the same file from any number of ranks."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from megavar.evaluation.inception import WEIGHTS_NAME
from tests.distributed.harness import run_ranks
from tests.evaluation.conftest import SmallInception
from tools import evaluate_fid

COUNT = 150  # three chunks, the last one short


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    # The command line is tested; decomposing 2048 dimensions takes minutes on a busy core and is tested elsewhere.
    monkeypatch.setattr(evaluate_fid, "ADMInception", lambda weights, unofficial: SmallInception())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    generator = torch.Generator().manual_seed(0)
    for name, count in (("samples", COUNT), ("real", 200)):
        images = torch.randint(0, 256, (count, 8, 8, 3), generator=generator).to(torch.uint8).numpy()
        np.savez(directory / f"{name}.npz", arr_0=images, arr_1=np.arange(count) % 10)
    (directory / "png").mkdir()
    for index, image in enumerate(np.load(directory / "samples.npz")["arr_0"]):
        Image.fromarray(image).save(directory / "png" / f"{index}.png")
    return directory


def call(*arguments):
    return evaluate_fid.main([str(argument) for argument in arguments])


@pytest.fixture
def reference(folder, tmp_path):
    path = tmp_path / "ref.npz"
    weights = ("--inception-weights", "w")
    assert call("reference", "--images", folder / "real.npz", "--out", path, *weights) == 0
    assert not path.with_name("ref.npz.features").exists()
    return path


def score(images, reference, out, *more):
    return call("score", "--images", images, "--reference", reference, "--out", out, "--inception-weights", "w", *more)


def test_scores_and_their_identity_are_written(folder, reference, tmp_path, capsys):
    assert score(folder / "samples.npz", reference, tmp_path / "a.json", "--rounding", "round") == 0
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["count"] == COUNT and content["class_histogram"] == {str(c): 15 for c in range(10)}
    assert content["rounding"] == "round" and content["extractor"]["sha256"] == SmallInception.weights_sha256
    assert len(content["reference"]["sha256"]) == 64 and content["sampler"]["feature_chunk_size"] == 64
    assert {key.split("@")[0] for key in content["metrics"]} >= {
        "fid",
        "sfid",
        "is",
        "is_interleaved",
        "precision",
        "recall",
        "precision_fp32",
    }
    printed = capsys.readouterr().out
    assert "fid@150@small" in printed and "150 images instead of 50000" in printed


def test_png_folder_and_torch_fidelity_give_the_same_numbers(folder, reference, tmp_path):
    assert score(folder / "samples.npz", reference, tmp_path / "npz.json") == 0
    assert score(folder / "png", reference, tmp_path / "png.json") == 0
    assert score(folder / "png", reference, tmp_path / "tf.json", "--backend", "torch-fidelity") == 0
    npz, png, theirs = (json.loads((tmp_path / f"{name}.json").read_text())["metrics"] for name in ("npz", "png", "tf"))
    assert png == {key: value for key, value in npz.items() if "interleaved" not in key}
    assert theirs == pytest.approx({key: npz[key] for key in theirs}, rel=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_writes_the_same_file(folder, reference, tmp_path, world_size):
    assert score(folder / "samples.npz", reference, tmp_path / "one.json") == 0
    out = tmp_path / "many.json"
    assert run_ranks(world_size, score, folder / "samples.npz", reference, out) == [0] * world_size
    assert out.read_bytes() == (tmp_path / "one.json").read_bytes()


def test_interrupted_scoring_continues_and_other_images_are_refused(folder, reference, tmp_path, capsys):
    out, features = tmp_path / "a.json", tmp_path / "a.json.features"
    assert score(folder / "samples.npz", reference, out) == 0
    first = out.read_bytes()
    out.unlink()
    (features / "chunk_000001.npz").unlink()
    kept = (features / "chunk_000000.npz").stat().st_mtime_ns
    assert score(folder / "samples.npz", reference, out) == 0
    assert out.read_bytes() == first and (features / "chunk_000000.npz").stat().st_mtime_ns == kept
    assert score(folder / "real.npz", reference, out) == 2
    assert "other work" in capsys.readouterr().err and out.read_bytes() == first


def test_interleaved_export_of_interleaved_samples_changes_nothing(folder, tmp_path):
    out = tmp_path / "x.npz"
    assert call("export", "--images", folder / "samples.npz", "--out", out, "--order", "interleaved") == 0
    with np.load(out) as exported, np.load(folder / "samples.npz") as original:
        assert np.array_equal(exported["arr_0"], original["arr_0"])


def test_reference_from_a_run_configuration_and_from_adm(folder, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("run: {name: x}\ndata: {source: {name: digits}, image_size: 8}\n")
    given = ("--config", config, "data.image_size=16")
    assert call("reference", *given, "--out", tmp_path / "digits.npz", "--inception-weights", "w") == 0
    assert json.loads(np.load(tmp_path / "digits.npz")["meta"].tobytes())["count"] == 1433
    assert (
        call(
            "reference",
            "--from-reference",
            folder / "real.npz",
            "--out",
            tmp_path / "adm.npz",
            "--inception-weights",
            "w",
        )
        == 0
    )
    assert np.load(tmp_path / "adm.npz")["pool"].shape == (200, 24)


def test_another_crop_than_that_of_adm_is_pointed_out(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("data: {source: {name: photographs, length: 8}, image_size: 32, transform: {name: var}}\n")
    given = ("--out", tmp_path / "ref.npz", "--inception-weights", "w", "--config", config)
    assert call("reference", *given) == 0
    assert "went through VarTest" in capsys.readouterr().out
    assert call("reference", *given, "data.transform={name: adm_center_crop}") == 0
    assert "note" not in capsys.readouterr().out


def test_sorted_samples_are_pointed_out(folder, reference, tmp_path, capsys):
    with np.load(folder / "samples.npz") as content:
        order = np.argsort(content["arr_1"], kind="stable")
        np.savez(tmp_path / "sorted.npz", arr_0=content["arr_0"][order], arr_1=content["arr_1"][order])
    assert score(tmp_path / "sorted.npz", reference, tmp_path / "a.json") == 0
    assert "sorted by class" in capsys.readouterr().out


def test_missing_files_are_explained_before_anything_is_written(folder, reference, tmp_path, capsys, monkeypatch):
    monkeypatch.undo()
    before = set(tmp_path.iterdir())
    assert score(folder / "samples.npz", reference, tmp_path / "a.json") == 2
    assert WEIGHTS_NAME in capsys.readouterr().err
    assert score(folder / "samples.npz", tmp_path / "no.npz", tmp_path / "a.json") == 2
    assert "no.npz do not exist" in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before


def test_selfcheck_refuses_what_is_not_the_published_samples(folder, reference, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        call("selfcheck", "--images", folder / "samples.npz", "--reference", reference, "--inception-weights", "w") == 2
    )
    assert "differ from the published numbers" in capsys.readouterr().err
