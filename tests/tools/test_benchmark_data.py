import json

from megavar.errors import ExitCode
from tools import benchmark_data


def test_every_path_is_measured(tmp_path, capsys):
    out = tmp_path / "speeds.json"
    arguments = ["--images", "24", "--size", "64", "--batch-size", "8", "--seconds", "0.05", "--repetitions", "2",
                 "--json", str(out)]  # fmt: skip
    assert benchmark_data.main(arguments) == ExitCode.FINISHED
    speeds = {speed["path"]: speed for speed in json.loads(out.read_text())["speeds"]}
    assert list(speeds) == ["raw JPEG", "index", "stream", "tokens"]
    assert all(speed["images_per_second"] > 0 for speed in speeds.values())
    # A float32 image is 64 * 64 * 3 * 4 bytes, a row of tokens 680 int64.
    for path, size in (("index", 49152), ("tokens", 5440)):
        ratio = speeds[path]["megabytes_per_second"] * 1e6 / speeds[path]["images_per_second"]
        assert abs(ratio - size) < 1
    assert "images/s per core" in capsys.readouterr().out


def test_the_data_of_a_run_can_be_measured(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("data: {source: {name: digits}, image_size: 16}\n")
    assert benchmark_data.main(["--config", str(config), "--seconds", "0.05", "--workers", "1"]) == ExitCode.FINISHED
    assert capsys.readouterr().out.count("digits") >= 2
    config.write_text("data: {source: {name: image_folder, path: /nowhere}}\n")
    assert benchmark_data.main(["--config", str(config)]) == ExitCode.CONFIGURATION
    assert "/nowhere does not exist" in capsys.readouterr().err
