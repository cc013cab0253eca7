"""Published layouts, the words of questions, and scores computed by hand."""

import pytest

from megavar.config.benchmarks.ai2d import AI2DBenchmark
from megavar.config.benchmarks.mmbench import MMBenchBenchmark
from megavar.config.benchmarks.mme import MMEBenchmark
from megavar.config.benchmarks.textvqa import TextVQABenchmark
from megavar.errors import DataError
from megavar.evaluation.understanding.ai2d import AI2D
from megavar.evaluation.understanding.choices import chosen
from megavar.evaluation.understanding.mmbench import MMBench
from megavar.evaluation.understanding.mme import MME, yes_or_no
from megavar.evaluation.understanding.textvqa import TextVQA, worth
from megavar.evaluation.understanding.vqa_answers import normalized
from tests.evaluation.understanding import files


def test_mme_in_both_layouts(tmp_path):
    """Images with one right answer count for accuracy alone."""
    of_table = MME(MMEBenchmark(path=str(files.mme(tmp_path / "MME.tsv"))), "internvl")
    of_folder = MME(MMEBenchmark(path=str(files.mme_folder(tmp_path / "release"))), "internvl")
    texts = [[question.text for question in one.questions] for one in (of_table, of_folder)]
    assert sorted(texts[0]) == sorted(texts[1]) and len(texts[0]) == 24
    assert texts[0][2] == "Is it 1? Please answer yes or no. Answer the question using a single word or phrase."
    images = [{question.text: question.image() for question in one.questions} for one in (of_table, of_folder)]
    assert images[0] == images[1] and of_table.questions[3].picture().size == (40, 20)
    all_right = ["Yes", "No"] * 12
    assert of_table.score(all_right)["mme_p"] == 2000 and "mme_c" not in of_table.score(all_right)
    wrong = [*all_right]
    wrong[2], wrong[23] = "it may be", "yes, two"  # a question of count's first image, one of its last
    found = of_table.score(wrong)
    assert (found["mme/count/accuracy"], found["mme/count/accuracy+"]) == (pytest.approx(4 / 6), pytest.approx(1 / 3))
    assert found["mme/count"] == pytest.approx(100) and found["mme_p"] == pytest.approx(1900)


@pytest.mark.parametrize(
    ("answer", "read"),
    [("Yes", "yes"), (" no.", "no"), ("YES, it is", "yes"), ("It is yes", None), ("Not there", "no"), ("", None)],
)
def test_yes_or_no_is_read_off_the_beginning(answer, read):
    assert yes_or_no(answer) == read


def test_mmbench_counts_what_is_right_in_every_rotation(tmp_path):
    published = MMBench(MMBenchBenchmark(path=str(files.mmbench(tmp_path / "all.tsv", rotated=True))), "vlmevalkit")
    turned = MMBench(MMBenchBenchmark(path=str(files.mmbench(tmp_path / "first.tsv", rotated=False))), "vlmevalkit")
    texts = [[question.text for question in one.questions] for one in (published, turned)]
    assert texts[0] == texts[1] and len(texts[0]) == 7
    assert texts[0][1] == (
        "Hint: Look.\nQuestion: What is 5?\nOptions:\nA. dog\nB. cow\nC. cat\n"
        "Please select the correct answer from the options above. \n"
    )
    answers = ["A", "The answer is C.", "the cat", "B", "A", "A", "A"]  # the last is wrong: rotated, A is B
    for benchmark in (published, turned):
        found = benchmark.score(answers)
        assert found["mmbench"] == pytest.approx(200 / 3) and found["mmbench/first"] == 100
        assert found["mmbench/logic_reasoning"] == 50 and found["mmbench/coarse_perception"] == 100
        assert found["mmbench/dev"] == found["mmbench"] and found["mmbench/of 7"] == 0
    assert [question.image() for question in published.questions[:3]] == [files.picture(5)] * 3


def test_ai2d_is_the_share_of_right_letters(tmp_path):
    benchmark = AI2D(AI2DBenchmark(path=str(files.ai2d(tmp_path / "AI2D_TEST.tsv"))), "internvl")
    assert benchmark.questions[0].text == (
        "Which part is 0?\nA. leaf\nB. root\nC. stem\nD. seed\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert benchmark.score(["A", "(B)", "leaf", "nothing of it"]) == {"ai2d": 75}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("B.", "B"), ("(C) dogs", "C"), ("A and B", None), ("I see a CAT", "A"), ("cat or dogs", None),
        ("A is what it says in the long text that follows", None), ("Cannot determine the answer", "Z"), ("Z", "Z"),
        ("The correct answer is **D** since A and B are not right", "D"),
    ],
)  # fmt: skip
def test_choices_are_read_as_vlmevalkit_reads_them(answer, letter):
    assert chosen(answer, {"A": "cat", "B": "a horse", "C": "dogs", "D": "birds"}) == letter


def test_textvqa_is_worth_what_people_agree_on(tmp_path):
    benchmark = TextVQA(TextVQABenchmark(path=str(files.textvqa(tmp_path))), "internvl")
    assert benchmark.questions[1].text.endswith("1 say?\nAnswer the question using a single word or phrase.")
    # "yes": four people, each with three others; "2": two people, beside one other, and eight beside both
    assert benchmark.score(["Stop!", "yes"]) == {"textvqa": 100}
    assert benchmark.score(["go", "Two"]) == {"textvqa": pytest.approx(100 * (2 * 1 / 3 + 8 * 2 / 3) / 10 / 2)}
    assert worth("b", ["b"] * 3 + ["c"] * 7) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("The  Two dogs.", "2 dogs"), ("1,000", "1000"), ("3.5%", "3.5%"), ("dont", "don't"), ("a - b", "b"),
        ("couldnt've", "couldn't've"), ("mr. x-ray", "mr x ray"), ("bob's", "bob 's"), ("shes", "shes"),
        ("somebody'd", "somebodyd"),
    ],
)  # fmt: skip
def test_answers_are_normalized_as_evalai_does(answer, form):
    assert normalized(answer) == form


def test_other_files_are_refused(tmp_path):
    hidden = [{"index": "1", "image": files.encoded(1), "question": "?", "A": "x", "B": "y", "answer": ""}]
    lost = [hidden[0] | {"answer": "A", "image": "7"}]
    for benchmark, rows, message in (
        (MMBench, hidden, "no answer among its options.*MMBench_DEV_EN"), (AI2D, lost, "row 1 has no image"),
        (MME, hidden, "no column 'category'"),
    ):  # fmt: skip
        choice = {MMBench: MMBenchBenchmark, AI2D: AI2DBenchmark, MME: MMEBenchmark}[benchmark]
        with pytest.raises(DataError, match=message):
            benchmark(choice(path=str(files.table(tmp_path / "x.tsv", rows))), "internvl")
    path = files.textvqa(tmp_path / "text")
    (path.parent / "train_images/im1.jpg").unlink()
    with pytest.raises(DataError, match=r"1 images of .* the first is .*im1\.jpg: unpack train_val_images"):
        TextVQA(TextVQABenchmark(path=str(path)), "internvl")
    with pytest.raises(DataError, match=r"cannot be read as a table .*name VLMEvalKit's"):
        AI2D(AI2DBenchmark(path=str(tmp_path / "absent.tsv")), "internvl")
