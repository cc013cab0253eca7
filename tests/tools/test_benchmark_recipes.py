"""What a step keeps for its backward passes, on graphs whose memory is known; the tool on two recipes."""

import torch

from tools.benchmark_recipes import KeptMemory, main

SMALL = ("generator.depth=2", "generator.width=32", "generator.heads=2", "recipe.scale_lists={name: fixed}")


def test_storages_are_counted_once_and_while_they_are_kept():
    weight = torch.nn.Parameter(torch.randn(8, 8))
    memory = KeptMemory(iter([weight]))
    for rows in (16, 4):
        with memory.watch():
            hidden = (torch.randn(rows, 8) @ weight).exp()  # keeps the product's input, and the result of exp twice
            loss = (hidden * hidden).sum()
        assert memory.now == 2 * rows * 8 * 4
        loss.backward()
        del hidden, loss
        assert memory.now == 0 and memory.most == 2 * 16 * 8 * 4


def test_guidance_of_the_rollout_doubles_what_is_kept(capsys):
    code = main(["configs/demo/flexvar.yaml", "configs/demo/sar.yaml", *SMALL, "--batch", "2", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert code == 0 and "1 passes" in lines[-2] and "2 passes" in lines[-1]
    assert float(lines[-1].split()[-2]) > 1.8, "the first pass holds every image twice"


def test_rollouts_keep_nothing(capsys):
    rollouts = ("recipe.name=student_forcing", "recipe.rollout={guidance: 2.0, top_k: 0}", "run.name=rollouts")
    kept = []
    for more in ((), rollouts):
        assert main(["configs/demo/flexvar.yaml", *SMALL, *more, "--batch", "2", "--repeats", "1"]) == 0
        kept.append(float(capsys.readouterr().out.splitlines()[-1].split()[-4]))
    assert kept[0] == kept[1] > 0, "bytes for the backward pass of the one pass with a loss"
