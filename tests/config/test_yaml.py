"""What YAML 1.1 reads otherwise than people is refused in a sentence with file and place; merge keys work."""

from pathlib import Path

import pytest

from megavar.config.loading import load_config
from megavar.config.yaml_text import parse_yaml
from megavar.errors import ConfigError

ROOT = Path(__file__).parents[2]
BASE = f"base: {ROOT}/configs/quickstart/tokenizer.yaml\n"


def load(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path)


def test_merge_keys_work(tmp_path):
    assert parse_yaml("a: &x {k: 1, l: 2}\nb: {<<: *x, l: 3}\n", "x") == {"a": {"k": 1, "l": 2}, "b": {"k": 1, "l": 3}}
    assert parse_yaml("a: &x {k: 1}\nc: &y {k: 2, l: 2}\nb: {<<: [*x, *y]}\n", "x")["b"] == {"k": 1, "l": 2}
    config = load(tmp_path, BASE + "train: &t {steps: 200}\nlogging:\n  <<: {interval: 5}\n")
    assert config.logging.interval == 5 and config.train.steps == 200


def test_keys_are_words():
    """YAML 1.1 takes ``on`` for a truth value, and the cluster file's ``notify`` has a key of that name."""
    assert parse_yaml("notify: {on: [failed], no: yes}\n", "x") == {"notify": {"on": ["failed"], "no": True}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("1_000", 1000), ("0", 0), ("-0", 0), ("0.5", 0.5), ("0x10", 16), ("0b11", 3), ("1e3", 1000.0),
        ("'010'", "010"), ("'1:30'", "1:30"), (".5", 0.5), ("00", 0), ("1.5e+3", 1500.0), ("0.0", 0.0), ("1.0", 1.0),
        ("a:b", "a:b"), ("09", "09"),
    ],
)  # fmt: skip
def test_numbers_that_everybody_reads_alike(text, value):
    found = parse_yaml(text, "x")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {global_batch_size: 010}", "010 is an octal number in YAML: write 10"),
        ("train: {global_batch_size: -017}", "-017 is an octal number"),
        ("train: {global_batch_size: 0_17}", "0_17 is an octal number"),
        ("train: {steps: 1:30}", "1:30 is a number to the base 60"),
        ("train: {epochs: 1:30.5}", "1:30.5 is a number to the base 60"),
        ("train: {steps: 24:00:00}", "base 60 in YAML: put quotes"),
        ("train: {steps: " + "9" * 5000 + "}", "number of 5000 digits"),
        ("train: {steps: 1, steps: 2}", "'steps' appears twice"),
        ("train: {<<: {a: 1}, <<: {b: 1}}", "'<<' appears twice"),
        ("train: {{ steps }}", "template that was not filled in"),
        ("train:\n  steps: {% if x %}3{% endif %}", "template that was not filled in"),
        ("train: ${{ values.steps }}", "(given: '${{ values.steps }}')"),
        ("? [a, b]\n: 1", "cannot be a key"),
        ("train: [1", "expected"),
        ("train: *nothing", "undefined alias"),
        ("train: !!python/object/apply:os.mkdir [x]", "could not determine a constructor"),
        ("a: \x01", "may not stand in YAML"),
        ("train: " + "[\n" * 3000 + "]" * 3000, "nested too deeply"),
        ("train:\n\tsteps: 3", "cannot start any token"),
        ("train: {steps: 2001-01-01}", "cannot have"),
        ("train: &x [*x]", "cannot have"),
        ("train: {steps: !!binary aGk=}", "cannot have"),
        (("caf\u00e9: 1").encode("latin-1"), "not UTF-8 text: line 2 holds the byte 0xe9"),
        ("train: {steps: 3}".encode("utf-16"), "UTF-8"),
    ],
)
def test_surprises_are_one_sentence_with_the_file(tmp_path, text, expected):
    base = BASE.encode() if isinstance(text, bytes) else BASE
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, base + text)
    message = str(caught.value)
    assert "run.yaml" in message and expected in message and "\n" not in message and len(message) < 1000, message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_files_of_other_encodings(tmp_path, encoding):
    with pytest.raises(ConfigError, match=r"run\.yaml is UTF-16 or UTF-32 text\. Save it as UTF-8"):
        load(tmp_path, BASE.encode(encoding))


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    assert load(tmp_path, BASE.encode("utf-8-sig")).run.name == "quickstart-tokenizer"
