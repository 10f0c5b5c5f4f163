"""The kernels compiled for GPUs that this machine may not have: no spills, no stack, shared memory that fits."""

import json
import os

import pytest
import torch

pytest.importorskip("triton")
from mendfast.kernels import aot, configs  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing; unset TRITON_INTERPRET"
)
MATRIX_UNIT = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}


def heaviest(arch, case):
    """Of every kernel in the case the launch with most of its options on: it takes most registers."""
    found = {}
    for name, launch in aot.launches(arch, (case,)):
        if launch.args.get("MATMUL") is False:
            continue
        if "PRECISION" not in launch.args and not case.startswith("float32/tf32x3"):
            continue  # these don't depend on the precision, and bfloat16 takes less
        weight = sum(value is True for value in launch.args.values())
        if launch.name not in found or weight > found[launch.name][0]:
            found[launch.name] = weight, name, launch
    return [(name, launch) for _, name, launch in found.values()]


@pytest.mark.parametrize("case", aot.CASES)
@pytest.mark.parametrize("arch", configs.ARCHS)
def test_kernels_fit(arch, case):
    rows = [aot.compile_launch(name, launch, arch) for name, launch in heaviest(arch, case)]
    assert {"project", "editor_block_fwd", "outer", "expand"} <= {row["kernel"] for row in rows}
    for row in rows:
        assert not aot.problems(row), row
        if row["matrix_unit"] is not None:
            assert row["matrix_unit"] == MATRIX_UNIT[arch], row


def test_the_counts_of_a_launch():
    """At GPT-J's shape a product reads 157 MB of float32 parameters once, and does 2 N D R operations."""
    parameters = 20480 * 1920 * 4
    for case, launch in aot.launches("sm_90", ("float32/tf32x3",)):
        moved, operations = aot.work(launch)
        if launch.name in ("editor_block_fwd", "project") and launch.args.get("MATMUL", True) and "tf32x3" in case:
            if launch.args.get("width0") == 4096 and launch.grid[-1] != 4:
                assert operations == 2 * 60 * 20480 * 1920
                assert parameters < moved < 1.15 * parameters
    assert any(launch.name == "kl_divergence_fwd" and aot.work(launch)[0] == 2 * 200 * 50257 * 4
               for _, launch in aot.launches("sm_90", ("float32/tf32x3",)))  # fmt: skip


def test_every_kernel_of_the_ops_is_in_the_table():
    names = {launch.name for _, launch in aot.launches("sm_90", aot.CASES)}
    assert names == {
        "project", "sum_splits", "expand", "outer", "editor_block_fwd", "editor_normalise", "editor_gate_bwd",
        "running_stats_chunk", "running_stats_merge", "rank1_update", "token_nll_fwd", "token_nll_sum", "token_nll_bwd",
        "kl_divergence_fwd", "kl_divergence_sum", "kl_divergence_bwd",
    }  # fmt: skip


def test_shipped_configurations_are_valid():
    for arch, table in configs.SHIPPED.items():
        for name, config in table.items():
            assert config.problem(configs.SHARED_LIMIT[arch]) is None, (arch, name)


@pytest.mark.parametrize(
    "config, words",
    [
        (configs.ProductConfig(48, 64, 32, 4, 3), "power of two"),
        (configs.ProductConfig(8, 64, 32, 4, 3), "at least 16"),
        (configs.ProductConfig(256, 256, 32, 4, 1), "accumulators"),
        (configs.ProductConfig(128, 128, 128, 8, 6), "shared memory"),
        (configs.ProductConfig(64, 64, 32, 4, 3, registers=300), "registers"),
        (configs.SweepConfig(32, 4096, 4), "elements"),
    ],
)
def test_a_configuration_that_cannot_run_says_why(config, words):
    assert words in config.problem(227 * 1024)
    if words != "shared memory":
        with pytest.raises(ValueError, match=words):
            configs.fitted(config, 227 * 1024)


def test_less_shared_memory_takes_fewer_stages():
    config = configs.ProductConfig(128, 64, 32, 8, 4)
    smaller = configs.fitted(config, 99 * 1024)
    assert smaller.stages < 4 and smaller.problem(99 * 1024) is None
    assert config.for_rows(20).block_n == 32 and config.for_rows(1).block_n == 16


def test_a_tuned_table_is_read_and_a_broken_one_named(tmp_path):
    from mendfast.kernels import tune

    path = tmp_path / "kernels.json"
    config = configs.ProductConfig(64, 32, 32, 4, 2)
    tune.write(path, "Some GPU", {"project/tf32": config})
    tune.write(path, "Other GPU", {"project/tf32": config, "normalise": configs.SweepConfig(4, 64, 2)})
    assert configs.tuned(path, "Some GPU") == {"project/tf32": config}
    assert configs.tuned(path, "Other GPU")["normalise"] == configs.SweepConfig(4, 64, 2)
    assert "precision" not in json.dumps(json.loads(path.read_text()))
    path.write_text("{}")
    configs.tuned.cache_clear()
    with pytest.raises(ValueError, match="write it anew"):
        configs.tuned(path, "Some GPU")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and tuning would begin")
def test_tuning_without_a_gpu_says_so(capsys):
    from mendfast.kernels import tune

    assert tune.main([]) == 2
    assert "PyTorch sees none" in capsys.readouterr().err


@pytest.mark.parametrize("widths", [(1, 40), (40, 1)])
def test_a_side_of_one_number_compiles(widths, monkeypatch):
    """Triton makes a constant of an argument that is 1, and a constant can't be given another value."""
    monkeypatch.setattr(aot, "WIDTHS", widths)
    monkeypatch.setattr(aot, "RANK", 1)
    monkeypatch.setattr(aot, "ROWS", 1)
    with configs.pretend("sm_80"), aot.recording() as recorded:
        aot._editor(torch.float32, "tf32")
    names = {launch.name for launch in recorded}
    assert {"project", "editor_block_fwd", "editor_gate_bwd", "outer", "expand", "editor_normalise"} <= names
    for launch in {launch.identity(): launch for launch in recorded}.values():
        aot.compile_launch("float32/tf32", launch, "sm_80")
