"""Wrong input: one paragraph naming place and remedy, a non-zero exit code, nothing written over."""

import shutil
from pathlib import Path

import pytest

from megavar.errors import ExitCode
from tests.distributed.harness import run_ranks
from tests.end_to_end.conftest import overrides

pytestmark = pytest.mark.end_to_end
CONFIG = "configs/quickstart.yaml"


def run(*arguments: str) -> tuple[int, str]:
    """Run the command line in a forked process; return its exit code and what it printed as an error."""
    return run_ranks(1, _run, arguments)[0]


def _run(arguments: tuple[str, ...]) -> tuple[int, str]:
    import contextlib
    import tempfile

    from megavar.__main__ import main

    with tempfile.TemporaryFile("w+") as error:
        with contextlib.redirect_stderr(error):
            code = main(arguments)
        error.seek(0)
        return code, error.read()


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file that matters (not the lock, which comes and goes)."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.suffix not in (".lock", ".log")]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def expect(code: int, message: str, *parts: str) -> None:
    assert code == ExitCode.CONFIGURATION, message
    lines = [line for line in message.splitlines() if "error: " in line]
    assert len(lines) == 1, message
    for part in parts:
        assert part in lines[0], lines[0]
    assert "Traceback" not in message


def test_unknown_key(tokenizer_run: Path, tmp_path: Path) -> None:
    given = overrides(tmp_path / "run", tokenizer_run, "optimizer.gradient_cliping=1.0")
    expect(*run("train", CONFIG, *given), "optimizer.gradient_cliping", "'gradient_clipping'")
    assert not (tmp_path / "run").exists()


def test_more_validation_than_is_held_out(tokenizer_run: Path, tmp_path: Path) -> None:
    given = overrides(tmp_path / "run", tokenizer_run, "validation={interval: 10, samples: 4000}")
    expect(*run("train", CONFIG, *given), "validation.samples=4000", "there are 364", "validation=null")


def test_misspelled_deepspeed_key(tokenizer_run: Path, tmp_path: Path) -> None:
    json = tmp_path / "zero.json"
    json.write_text('{"zero_optimizaton": {"stage": 2}}')
    given = overrides(tmp_path / "run", tokenizer_run, f"deepspeed={json}")
    expect(*run("train", CONFIG, *given), "zero_optimizaton", "zero_optimization", str(json))


def test_checkpoint_of_another_model(tiny_run: Path, tokenizer_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy)
    (copy / "DONE").unlink()
    (copy / "config.yaml").unlink()  # with it, the changed width would be found first
    before = snapshot(copy / "checkpoints")
    given = overrides(copy, tokenizer_run, "generator.width=64")
    expect(*run("train", CONFIG, *given), "another model", "generator", str(copy))
    assert snapshot(copy / "checkpoints") == before


def test_directory_of_another_run(tiny_run: Path, tokenizer_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy)
    (copy / "DONE").unlink()
    before = snapshot(copy)
    given = overrides(copy, tokenizer_run, "generator.width=64")
    expect(*run("train", CONFIG, *given), "generator.width", "run.directory")
    assert snapshot(copy) == before


def test_truncated_checkpoints(tiny_run: Path, tokenizer_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy)
    for shard in (copy / "checkpoints").rglob("*.distcp"):
        shard.write_bytes(shard.read_bytes()[:-7])
    (copy / "DONE").unlink()
    before = snapshot(copy / "checkpoints")
    code, message = run("train", CONFIG, *overrides(copy, tokenizer_run))
    expect(code, message, "train.fresh=true", "checkpoints")
    after = snapshot(copy / "checkpoints")
    assert sorted(size for size, _ in after.values()) == sorted(size for size, _ in before.values())
    expect(*run("sample", CONFIG, *overrides(copy, tokenizer_run)), "damaged")


@pytest.mark.parametrize("content", ["missing", "empty", "no images"])
def test_image_folder_without_images(content: str, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    if content != "missing":
        folder.mkdir()
    if content == "no images":
        (folder / "class_a").mkdir()
        (folder / "class_a" / "notes.txt").write_text("not an image")
    code, message = run(
        "train", "configs/quickstart/tokenizer.yaml", f"run.directory={tmp_path / 'run'}",
        f"data.source={{name: image_folder, path: {folder}}}", "data.transform={name: var}",
    )  # fmt: skip
    expect(code, message, str(folder))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_missing_tokenizer(tmp_path: Path) -> None:
    given = overrides(tmp_path / "run", tmp_path / "nowhere")
    expect(*run("train", CONFIG, *given), "recipe.tokenizer_weights", "run.requires")


def test_classes_that_do_not_fit_the_data(tokenizer_run: Path, tmp_path: Path) -> None:
    given = overrides(tmp_path / "run", tokenizer_run, "generator.classes=7")
    expect(*run("train", CONFIG, *given), "generator.classes=7", "generator.classes=10")


def test_a_suite_that_the_generator_cannot_be_asked_for(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"tag": "colors", "include": [], "prompt": "a red bus"}\n')
    given = (f"run.directory={tmp_path / 'run'}", f"evaluation.suite={{name: geneval, prompts: {prompts}}}")
    expect(*run("train", CONFIG, *given), "evaluation.suite.name=geneval", "generator.name=var")
    assert not (tmp_path / "run").exists()
