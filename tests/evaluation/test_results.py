import json

import pytest
import torch

from megavar.errors import DataError
from megavar.evaluation.results import Result, class_histogram, read_result, write_result


def result():
    return Result(
        suite="digits",
        metrics={"fid@digits-cnn": 0.5},
        count=30,
        class_histogram=class_histogram(torch.arange(30) % 10),
        rounding="round",
        order="interleaved",
        extractor={"name": "digits-cnn", "sha256": "0"},
        reference={"name": "digits train", "count": 1433},
        sampler={"cfg": 1.5, "seed": 0, "chunk_size": 8},
        checkpoint={"step": 3, "ema": True},
    )


def test_result_file_identifies_the_number_and_is_the_same_bytes_again(tmp_path):
    write_result(tmp_path / "a.json", result())
    write_result(tmp_path / "b.json", result())
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    content = read_result(tmp_path / "a.json")
    assert content["class_histogram"] == {str(c): 3 for c in range(10)}
    assert content["tf32"] is False and content["versions"]["torch"] == torch.__version__
    assert content["sampler"]["chunk_size"] == 8 and content["checkpoint"]["ema"] is True


@pytest.mark.parametrize("text", ['{"format": 99}', "[]", '{"fo', json.dumps({"fid": 1})])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError, match="evaluate again"):
        read_result(path)
