"""Two processes that share a step's edits take the steps of one that has them all (gloo, on this machine)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import facts, make

from mendfast.base_model import small_gpt2, train_tokenizer
from mendfast.training import FactSampler, Trainer

pytest.importorskip("accelerate", reason="needs accelerate (pip install accelerate)")
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="needs gloo"
)

SETTINGS = {"steps": 5, "batch_size": 8, "joint": [1, 2], "validate_every": 2, "validation_size": 5, "warmup": 1}


def trainer(output: Path, fully_shard: bool = False, **changed) -> Trainer:
    """The same run in every process. The learning rate is large, so that five steps go a long way."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([w for item in facts() for w in item.wordings], 320)
    model = small_gpt2(len(tokenizer), width=32, depth=3, heads=4).double().eval()
    if fully_shard:
        from torch.distributed.fsdp import fully_shard as shard

        for block in model.transformer.h:
            shard(block)
        shard(model)
    editor, config = make((model, tokenizer), **{**SETTINGS, "learning_rate": 1e-2, **changed})
    # in float64: a pre-activation that rounding puts on the other side of the clamp moves a gradient by over 1e-4
    editor.double()
    one = Trainer(editor, FactSampler(facts()), config, output=output, validation=FactSampler(facts(), seed=5))
    for group in one.optimizer.param_groups:
        group["eps"] = 1e-4  # with 1e-8 the rounding of a gradient near 0 would turn into a whole step
    return one


SCRIPT = """
    import sys
    sys.path[:0] = {paths!r}
    import torch
    from pathlib import Path
    from accelerate import Accelerator
    from safetensors.torch import save_file
    from test_distributed import trainer
    torch.set_num_threads(1)
    Accelerator(cpu=True)
    one = trainer(Path(sys.argv[1]), **{options!r})
    if {different!r} and one.processes.rank:
        one.editor.alpha_multiplier.data.fill_(7.0)
    sys.stdout.write(f"from {{one.step if one.resume() else 0}}\\n")  # in one piece: two processes write
    sys.stdout.flush()
    one.run()
    print("count", one.processes.count, "shown", one.progress, flush=True)
    save_file(one.editor.state_dict(), Path(sys.argv[1]) / f"rank{{one.processes.rank}}.safetensors")
"""


def launch(tmp_path: Path, output: Path, *, different: bool = False, **options) -> str:
    """Run :func:`trainer` by torchrun in two processes; returns what they printed."""
    script = tmp_path / "run.py"
    paths = [p for p in sys.path if p]
    script.write_text(textwrap.dedent(SCRIPT).format(paths=paths, options=options, different=different))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, output],
        capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def lines(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def check_same_run(output: Path, whole: Trainer) -> None:
    ranks = [load_file(output / f"rank{rank}.safetensors") for rank in (0, 1)]
    state, start = whole.editor.state_dict(), trainer(output / "unused").editor.state_dict()
    for name, tensor in state.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name  # the processes agree to the bit
        gap, way = (ranks[0][name].double() - tensor).norm(), (tensor.double() - start[name]).norm()
        assert gap <= 1e-4 * way, f"{name}: {gap} after a way of {way}"
        assert way > 0, name
    assert all(int(tensor) > 100 for name, tensor in state.items() if name.endswith("count"))
    for ours, theirs in zip(lines(output), lines(whole.output), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Trainer:
    """One process with all the edits."""
    one = trainer(tmp_path_factory.mktemp("whole"))
    one.run()
    return one


def test_two_processes_go_on_from_one(tmp_path, whole):
    """Both read the checkpoint; the rest of the run is shared."""
    output = tmp_path / "two"
    first = trainer(output)
    gradients = first._gradients

    def stop_after_three(joint):
        if first.step == 3:
            raise KeyboardInterrupt
        return gradients(joint)

    first._gradients = stop_after_three
    with pytest.raises(KeyboardInterrupt):
        first.run()
    said = launch(tmp_path, output)
    assert said.count("from 2") == 2
    check_same_run(output, whole)


def test_two_processes_with_a_sharded_base(tmp_path, whole):
    """FSDP2: each process holds half of the base model's weights. Both start from the first one's editor,
    whatever the other's was; the first alone writes, and shows progress."""
    output = tmp_path / "two"
    said = launch(tmp_path, output, different=True, fully_shard=True)
    assert sorted(said.splitlines()[-2:]) == ["count 2 shown False", "count 2 shown True"]
    check_same_run(output, whole)
    assert len(lines(output)) == SETTINGS["steps"]


def test_shares_must_be_even(tmp_path):
    with pytest.raises(ValueError, match=r"batch_size 8 makes 4 edits of 2 at once.*multiple of 6"):
        trainer(tmp_path, accumulate=3, joint=[2])
