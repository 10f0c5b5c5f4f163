"""The installation: with and without nvcc, what it holds, and that kernels/ stands in nobody's way."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_cuda_build import load_setup

import mendfast
from mendfast import build_info

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="an installation without its sources")


def run(code, *, cwd=ROOT, path=(), **environment):
    """A program that is run at the checkout's root, as users do."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class TestKernelsFolder:
    def test_imports_as_a_subpackage(self):
        from mendfast.kernels import rank1_update

        assert rank1_update.__name__ == "mendfast.kernels.rank1_update"
        assert Path(rank1_update.__file__).parent.name == "kernels"

    def test_gives_way_to_hugging_faces_package(self, tmp_path):
        """`import kernels` at the checkout's root gives the installed package, though the folder comes first."""
        package = tmp_path / "kernels"
        package.mkdir()
        (package / "__init__.py").write_text("from .layer import LAYER\n__version__ = 'installed'")
        (package / "layer.py").write_text("LAYER = 5")
        code = (
            "import sys; sys.path.insert(0, ''); import kernels; from kernels import layer\n"
            "print(kernels.__version__, kernels.__file__, kernels.LAYER, layer.__file__)"
        )
        expected = f"installed {package / '__init__.py'} 5 {package / 'layer.py'}"
        assert run(code, path=[tmp_path]) == expected
        code += "; import mendfast.kernels.rank1_update as k; print(k.__name__)"
        assert run(code, path=[tmp_path, ROOT]).splitlines() == [expected, "mendfast.kernels.rank1_update"]

    def test_two_checkouts_on_the_path(self, tmp_path):
        """Neither takes the other for the installed package, to step aside for each other without end."""
        other = tmp_path / "kernels"
        other.mkdir()
        for name in ("__init__.py", "rank1_update.py"):
            (other / name).write_text((ROOT / "kernels" / name).read_text())
        code = "import sys; sys.path.insert(0, ''); import kernels; print(kernels.__file__)"
        assert Path(run(code, path=[tmp_path])) == ROOT / "kernels" / "__init__.py"

    def test_does_not_pass_for_it(self):
        """Where Hugging Face's package isn't installed, transformers must not take the folder for it. (Without a
        version some of its releases, 5.0 to 5.11 among them, could not be imported at all.)"""
        code = (
            "import sys, importlib.metadata as m; sys.path.insert(0, '')\n"
            "try: m.version('kernels'); print('installed')\n"
            "except m.PackageNotFoundError:\n"
            "    from transformers.utils import import_utils as u\n"
            "    f = getattr(u, 'is_kernels_available', lambda: False)\n"
            "    import transformers; transformers.GPT2LMHeadModel; print(f())"
        )
        assert run(code) in ("False", "installed")


class TestBuildInfo:
    def test_this_installation(self):
        info = build_info.build_info()
        assert info["built"] is (info["reason"] is None)
        assert isinstance(info["targets"], list)
        info = build_info.build_info("cpu")
        assert info["built"] is (info["reason"] is None)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (None, "was not installed"),
            ("{", "can't be read"),
            ('{"cpu": {"built": true}}', "was not installed"),
            ('{"cuda": {"reason": "why"}, "cpu": {"built": true}}', "why"),
        ],
    )
    def test_states(self, tmp_path, monkeypatch, content, reason):
        file = tmp_path / "_build_info.json"
        if content is not None:
            file.write_text(content)
        monkeypatch.setattr(build_info, "_FILE", file)
        info = build_info.build_info()
        assert info["built"] is False and reason in info["reason"] and info["targets"] == []


class TestPlan:
    """setup.py's choice, without building."""

    def plan(self, monkeypatch, nvcc, wanted):
        setup = load_setup()
        monkeypatch.setattr(setup, "find_nvcc", lambda: nvcc)
        if wanted is None:
            monkeypatch.delenv("MENDFAST_BUILD_CUDA", raising=False)
        else:
            monkeypatch.setenv("MENDFAST_BUILD_CUDA", wanted)
        return setup.plan_cuda()

    def test_without_nvcc(self, monkeypatch):
        plan = self.plan(monkeypatch, None, None)
        assert "path" not in plan and "no nvcc" in plan["reason"]

    def test_without_nvcc_but_wanted(self, monkeypatch):
        with pytest.raises(SystemExit, match="MENDFAST_BUILD_CUDA=1, but .* no nvcc .* set CUDA_HOME"):
            self.plan(monkeypatch, None, "1")

    def test_left_out(self, monkeypatch):
        assert "MENDFAST_BUILD_CUDA=0" in self.plan(monkeypatch, "/nowhere/nvcc", "0")["reason"]

    def test_unknown_wish(self, monkeypatch):
        with pytest.raises(SystemExit, match="MENDFAST_BUILD_CUDA is 'yes'; use 1"):
            self.plan(monkeypatch, None, "yes")

    @pytest.mark.parametrize(("codes", "targets"), [
        ("sm_80 sm_90 sm_100 sm_120", ["sm_80", "sm_90", "sm_100", "compute_100"]),
        ("sm_75 sm_80 sm_90", ["sm_80", "sm_90", "compute_90"]),
        ("sm_50", None),
    ])  # fmt: skip
    def test_targets_by_what_nvcc_knows(self, monkeypatch, tmp_path, codes, targets):
        nvcc = tmp_path / "nvcc"
        nvcc.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && echo "Cuda compilation tools, release 12.4, V1" || echo {codes}\n'
        )
        nvcc.chmod(0o755)
        plan = self.plan(monkeypatch, str(nvcc), None)
        if targets is None:
            assert "serves none of" in plan["reason"]
        else:
            assert plan["targets"] == targets and plan["nvcc"] == "12.4"

    @pytest.mark.parametrize(
        ("wanted", "machine", "compiler", "reason"),
        [
            (None, "x86_64", "sh", None),
            ("1", "x86_64", "sh", None),
            ("0", "x86_64", "sh", "MENDFAST_BUILD_CPU=0 left the CPU extension out"),
            (None, "aarch64", "sh", "written for Linux on x86_64, and this is Linux on aarch64"),
            (None, "x86_64", "no-such-compiler", "no C\\+\\+ compiler \\(no-such-compiler\\) on PATH; install g"),
        ],
    )
    def test_cpu(self, monkeypatch, wanted, machine, compiler, reason):
        setup = load_setup()
        monkeypatch.setattr(setup.platform, "machine", lambda: machine)
        monkeypatch.setattr(setup.platform, "system", lambda: "Linux")
        monkeypatch.setenv("CXX", compiler)
        monkeypatch.delenv("MENDFAST_BUILD_CPU", raising=False)
        if wanted is not None:
            monkeypatch.setenv("MENDFAST_BUILD_CPU", wanted)
        plan = setup.plan_cpu()
        if reason is None:
            assert plan == {"path": ["sh"], "forced": wanted == "1"}
        else:
            assert re.search(reason, plan["reason"]) and "path" not in plan
            if wanted is None:
                monkeypatch.setenv("MENDFAST_BUILD_CPU", "1")
                with pytest.raises(SystemExit, match=reason):
                    setup.plan_cpu()

    def test_needs_no_torch(self):
        code = "import sys, runpy; runpy.run_path('setup.py', run_name='setup'); print('torch' in sys.modules)"
        assert run(code) == "False"


def test_wheel(tmp_path):
    """Without compilers everything else is in the wheel; it imports from elsewhere, without the checkout."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for name in ("mendfast", "kernels", "csrc"):
        skipped = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
        shutil.copytree(ROOT / name, source / name, ignore=skipped)
    pytest.importorskip("setuptools", minversion="77", reason="setuptools builds the wheel")
    code = f"import setuptools.build_meta as b; print(b.build_wheel({str(tmp_path)!r}))"
    done = run(code, cwd=source, MENDFAST_BUILD_CUDA="0", MENDFAST_BUILD_CPU="0")
    with zipfile.ZipFile(tmp_path / done.splitlines()[-1]) as wheel:
        names = set(wheel.namelist())
        wheel.extractall(tmp_path / "site")
    assert {"mendfast/kernels/__init__.py", "mendfast/kernels/rank1_update.py", "mendfast/ops/rank1_update.py"} <= names
    assert any(name.startswith("mendfast/tasks/facts/") for name in names)
    assert not any(name.startswith("kernels/") or name.endswith(".so") for name in names)
    record = json.loads((tmp_path / "site" / "mendfast" / "_build_info.json").read_text())
    for name, module in (("cuda", "CUDA"), ("cpu", "CPU")):
        assert record[name]["built"] is False and f"MENDFAST_BUILD_{module}=0" in record[name]["reason"]
    code = (
        # an editable installation would lend the wheel what it lacks
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]; "
        "import mendfast, mendfast.kernels as k, mendfast.ops.rank1_update as r; print(mendfast.__file__); "
        "print(*k.__path__); print(r.extension_problem()); from mendfast.ops import few_rows; print(few_rows.problem())"
    )
    imported, kernels, problem, cpu_problem = run(code, cwd=tmp_path, path=[tmp_path / "site"]).splitlines()
    assert imported.startswith(str(tmp_path)) and kernels == str(tmp_path / "site" / "mendfast" / "kernels")
    assert "MENDFAST_BUILD_CUDA=0" in problem and "MENDFAST_BUILD_CPU=0" in cpu_problem


@pytest.mark.parametrize("missing", ["triton", "mendfast._C", "mendfast._cpu"])
def test_imports_without(missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "import torch, mendfast; from mendfast import ops\n"
        "print(ops.rank1_update_(torch.zeros(2, 3), torch.ones(1, 3), torch.ones(1, 2)).sum().item())"
    )
    assert run(code, path=[ROOT]) == "-6.0"


def test_version():
    """One source: the package's metadata, too, are made from ``mendfast.__version__``."""
    assert 'version = { attr = "mendfast.__version__" }' in (ROOT / "pyproject.toml").read_text()
    assert importlib.metadata.version("mendfast") == mendfast.__version__
