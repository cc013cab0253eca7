"""A run begins with given weights, whatever wrote them and whatever layout reads them."""

import functools

import pytest
import torch

from megavar.config.checkpoint import CheckpointConfig
from megavar.config.parallel import ParallelConfig
from megavar.errors import CheckpointError
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.training.checkpoint import Checkpointer, ModuleState, initial, master, read_weights
from megavar.training.checkpoint import manifest as manifests
from megavar.training.checkpoint.initial import InitialWeights
from megavar.training.checkpoint.ranks import Ranks
from megavar.training.checkpoint.weights import load_weights
from megavar.weight_file import About, read_weights_file, write_export
from megavar.weight_layout import NamedLayout
from tests.checkpoint.conftest import SAVED, assert_same
from tests.checkpoint.layered import Layout, Run
from tests.checkpoint.written import write_weights
from tests.distributed import curves
from tests.distributed.harness import run_ranks

Z0, TP2_PP2_Z1 = Layout(1, 0), Layout(4, 1, tensor=2, pipeline=2)
LAYOUTS = [
    Z0, Layout(2, 1), Layout(2, 2), Layout(2, 3), Layout(2, 3, offload=True), Layout(4, 2, expert=4), TP2_PP2_Z1,
    Layout(4, 1, tensor=2, expert=2), Layout(2, 1, bfloat16=True), Layout(2, 3, bfloat16=True),
]  # fmt: skip
FRESH = ("blocks.0.norm.", "blocks.1.row.weight", "blocks.1.seen", "blocks.1.stacked.experts.2.")


class Renamed(NamedLayout):
    """A public layout: other names, matrices transposed, no buffers."""

    belongs_to, remedy = "a layered model", "Check width."

    def names(self, name):
        return (f"public/{name}",)

    def split(self, name, value):
        return [value.T if value.dim() == 2 else value]

    def join(self, name, parts):
        return self.split(name, parts[0])[0]

    def load(self, state, expected, passed=()):
        return super().load(state, {n: s for n, s in expected.items() if not n.endswith("seen")}, passed)


READ = functools.partial(read_weights_file, layouts={"renamed": Renamed(None, None)})


def read(path, expected, fresh):
    return READ(path, expected, fresh=fresh)


def begin(layout, path, target, fresh=(), ema=False, width=8):
    """On every rank: train a step, then take initial weights, and save all as the checkpoint of step 1."""
    run = Run(layout, seed=5, width=width)
    run.step(0)  # leaves moments, step counts and an average that must be forgotten
    before = run.engine.module.state_dict() if layout.stage == 0 else {}
    before = {name: value.clone() for name, value in before.items()}
    initial.begin("model", run.state, InitialWeights(path, read, fresh, ema), Ranks())
    assert set(master.get_steps(run.engine)) == {0}
    assert not any(tensor.any() for tensors in master.moments(run.engine).values() for tensor in tensors)
    assert all(map(torch.equal, run.average, master.master_tensors(run.engine)))
    with Checkpointer(target, CheckpointConfig()) as checkpointer:
        checkpointer.save(1, {"model": run.state}, {})
    return before


@pytest.fixture(scope="module")
def sources(saved, tmp_path_factory):
    """The same weights as a checkpoint of another layout, as an export, and in a public layout."""
    root, files = saved(TP2_PP2_Z1), tmp_path_factory.mktemp("files")
    tensors = read_weights(root, "model")
    write_export(files / "ours.safetensors", tensors, About("model", SAVED, "model", {}, {}))
    trained = {name: value for name, value in tensors.items() if not name.endswith("seen")}
    torch.save(Renamed(None, None).export(trained), files / "public.pth")
    return {"checkpoint": root, "ours": files / "ours.safetensors", "public": files / "public.pth"}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_begins_with_the_same_weights(layout, sources, tmp_path):
    expected = read_weights(sources["checkpoint"], "model")
    if layout.bfloat16:  # what is not trained has no master copy
        fixed = {name: value for name, value in expected.items() if ".fixed." in name}
        expected |= {name: value.bfloat16().float() for name, value in fixed.items()}
    for kind in sources if layout.world < 4 else ("checkpoint", "ours"):
        run_ranks(layout.world, begin, layout, sources[kind], tmp_path / kind)
        actual = read_weights(tmp_path / kind, "model")
        if kind == "public":  # which has no buffers: they are what the step before has made of them
            assert {name: actual.pop(name).tolist() for name in list(actual) if name.endswith("seen")} == {
                "blocks.0.seen": [1, 1, 1], "blocks.1.seen": [1, 1, 1]
            }  # fmt: skip
        assert_same(actual, {name: expected[name] for name in actual})
        assert len(actual) >= len(expected) - 2


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["checkpoint", "ours", "public"])
def test_parts_that_are_named_stay_as_they_are(kind, sources, tmp_path):
    (before,) = run_ranks(1, begin, Z0, sources[kind], tmp_path / "one", FRESH)
    expected, actual = read_weights(sources["checkpoint"], "model"), read_weights(tmp_path / "one", "model")
    stayed = {name for name in actual if name.startswith(FRESH)}
    assert len(stayed) == 4
    for name, value in actual.items():
        if name in stayed and "experts" in name:
            assert torch.equal(value, before["blocks.1.stacked.experts.linear_fc2_weight"][2])
        elif name in stayed or (kind == "public" and name.endswith("seen")):
            assert torch.equal(value, before[name]), name
        else:
            assert torch.equal(value, expected[name]), name
    run_ranks(4, begin, TP2_PP2_Z1, sources[kind], tmp_path / "four", FRESH)
    assert_same(read_weights(tmp_path / "four", "model"), actual)


@pytest.mark.distributed
def test_the_average_of_a_checkpoint_can_be_taken(sources, tmp_path):
    run_ranks(2, begin, Layout(2, 2), sources["checkpoint"], tmp_path, (), True)
    assert_same(read_weights(tmp_path, "model"), read_weights(sources["checkpoint"], "model", ema=True))


def _begin_as_var(setup, source, target):
    """As :func:`begin`, with an STMoE-VAR; without a source its random weights are saved."""
    mesh = topology.initialize(ParallelConfig(**setup.parallel), environment())
    recipe = curves.build(setup, mesh)
    engine = curves.engine_loop(setup, recipe, mesh).engines["generator"]
    state = ModuleState(engine.deepspeed)
    if source is not None:
        with torch.no_grad():
            for parameter in recipe.generator.parameters():
                parameter.fill_(7.0)
        initial.begin("generator", state, InitialWeights(source, read), Ranks())
    with Checkpointer(target, CheckpointConfig()) as checkpointer:
        checkpointer.save(0, {"generator": state}, {})


@pytest.mark.distributed
def test_interleaved_stages_begin_with_the_weights_of_one_process(tmp_path):
    run_ranks(1, _begin_as_var, curves.Setup(1, 1), None, tmp_path / "one")
    interleaved = curves.Setup(2, 1, 2, parallel={"pipeline": 2, "virtual_pipeline": 2})
    run_ranks(2, _begin_as_var, interleaved, tmp_path / "one", tmp_path / "two")
    assert_same(read_weights(tmp_path / "two"), read_weights(tmp_path / "one"))


def _refusal(layout, path, fresh, width):
    """The message on this rank, after making sure that nothing was written."""
    run = Run(layout, seed=5, width=width)
    before = [tensor.detach().clone() for tensor in master.master_tensors(run.engine)]
    with pytest.raises(CheckpointError) as caught:
        initial.begin("model", run.state, InitialWeights(path, read, fresh), Ranks())
    assert all(map(torch.equal, before, master.master_tensors(run.engine)))
    return str(caught.value)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "fresh", "width", "message"),
    [
        ("checkpoint", (), 16, "another model: other shapes: blocks.0.column.weight is 24x8 in the file and 48x16"),
        ("ours", (), 16, "does not fit the configured model: other shapes"),
        ("public", (), 16, "not a layered model of this configuration: other shapes: public/"),
        ("checkpoint", ("head.",), 8, "no tensor of this model begins with 'head.'. Its parts are blocks"),
        ("ours", ("head.",), 8, "no tensor of this model begins with 'head.'"),
    ],
)
def test_other_weights_are_refused_by_all_ranks(kind, fresh, width, message, sources):
    for text in run_ranks(2, _refusal, Layout(2, 1), sources[kind], fresh, width):
        assert message in text


@pytest.mark.distributed
def test_a_damaged_checkpoint_is_no_beginning(sources, tmp_path):
    import shutil

    shutil.copytree(sources["checkpoint"], tmp_path / "copy")
    (shard, *_) = sorted((tmp_path / "copy").rglob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    for text in run_ranks(2, _refusal, Layout(2, 1), tmp_path / "copy", (), 8):
        assert "is damaged" in text and shard.name in text


def _loaded_together(directory):
    """How many times this rank verified files, and what it loaded or why not."""
    topology.initialize(ParallelConfig(), environment())
    verified, damage = [], manifests.damage
    manifests.damage = lambda *arguments: verified.append(arguments) or damage(*arguments)
    target = torch.nn.Module()
    target.weight = torch.nn.Parameter(torch.zeros(3))
    try:
        load_weights(target, directory, together=True)
        return len(verified), target.weight.tolist()
    except CheckpointError as error:
        return len(verified), str(error)


def test_one_rank_of_a_node_verifies_for_the_others(tmp_path):
    checkpoint = write_weights(tmp_path, "net", {"weight": torch.arange(3.0)})
    assert run_ranks(2, _loaded_together, checkpoint) == [(1, [0.0, 1.0, 2.0]), (0, [0.0, 1.0, 2.0])]
    (shard, *_) = [path for path in checkpoint.iterdir() if path.name != manifests.FILE_NAME and path.is_file()]
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    (first, told), (second, also_told) = run_ranks(2, _loaded_together, checkpoint)
    assert (first, second) == (1, 0) and told == also_told and "is damaged" in told
