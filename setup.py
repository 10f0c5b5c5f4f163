"""Builds mendfast._C, the CUDA extension, when nvcc is found; installs without it otherwise.

The extension needs the CUDA runtime (linked statically) and pybind11, nothing of PyTorch.
MENDFAST_BUILD_CUDA=1 makes a missing nvcc an error, =0 leaves the extension out.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
ARCHITECTURES = (80, 90, 100)
INFO = "_build_info.json"
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
    "-Xptxas=-v,-warn-spills",
]
CXX_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]


# What the compilers say is kept for the record: registers, spills, warnings.
LOGGED = "> $out.log 2>&1 || { cat $out.log; exit 1; }"


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    for home in filter(None, homes):
        if (nvcc := Path(home, "bin", "nvcc")).exists():
            return str(nvcc)
    if on_path := shutil.which("nvcc"):
        return on_path
    return "/usr/local/cuda/bin/nvcc" if Path("/usr/local/cuda/bin/nvcc").exists() else None


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def plan() -> dict:
    """nvcc, its version and targets, or the reason to leave the extension out."""
    wanted = os.environ.get("MENDFAST_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"MENDFAST_BUILD_CUDA is {wanted!r}; use 1 (must build), 0 (leave out) or nothing (if nvcc is found).")
    if wanted == "0":
        return {"reason": "MENDFAST_BUILD_CUDA=0 left the CUDA extension out"}
    nvcc = find_nvcc()
    if nvcc is None:
        reason = "the CUDA extension was left out: no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda"
        if wanted == "1":
            sys.exit(f"MENDFAST_BUILD_CUDA=1, but {reason}. Install the CUDA toolkit or set CUDA_HOME.")
        return {"reason": reason}
    version = re.search(r"release (\d+\.\d+)", run(nvcc, "--version"))
    known = {int(n) for n in re.findall(r"sm_(\d+)\b", run(nvcc, "--list-gpu-code"))}
    architectures = [a for a in ARCHITECTURES if a in known]
    if not architectures:
        reason = f"the CUDA extension was left out: {nvcc} serves none of {ARCHITECTURES}"
        if wanted == "1":
            sys.exit(f"MENDFAST_BUILD_CUDA=1, but {reason}.")
        return {"reason": reason}
    return {
        "path": nvcc,
        "forced": wanted == "1",
        "nvcc": version[1] if version else "unknown",
        "architectures": architectures,
        "targets": [f"sm_{a}" for a in architectures] + [f"compute_{architectures[-1]}"],
    }


def gencode(architectures: list[int]) -> list[str]:
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    newest = architectures[-1]
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def compile_extension(cuda: dict, target: Path, build_dir: Path) -> str:
    """Every source in csrc/ through ninja, linked into ``target``; returns what the compilers said."""
    import pybind11

    build_dir.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    includes = [f"-isystem={pybind11.get_include()}", f"-isystem={sysconfig.get_path('include')}"]
    cxx = os.environ.get("CXX", "c++")
    nvcc_flags = [*NVCC_FLAGS, *gencode(cuda["architectures"])]
    cxx_flags = [*CXX_FLAGS, *(flag.replace("=", "", 1) for flag in includes)]
    headers = " ".join(escape(p) for p in sorted((ROOT / "csrc").glob("*.[ch]*")) if p.suffix in (".h", ".cuh"))
    lines = [
        f"rule nvcc\n  command = {shlex.join([cuda['path'], *nvcc_flags])} -c $in -o $out {LOGGED}",
        f"rule cxx\n  command = {shlex.join([*shlex.split(cxx), *cxx_flags])} -c $in -o $out {LOGGED}",
        f"rule link\n  command = {shlex.join([cuda['path'], '-shared', '--cudart=static', '-Xlinker=-s'])} $in -o $out",
    ]
    objects = []
    # the slow ones first
    for source in sorted((ROOT / "csrc").iterdir(), key=lambda p: (p.suffix != ".cu", p.name)):
        rule = {".cu": "nvcc", ".cpp": "cxx"}.get(source.suffix)
        if rule:
            objects.append(escape(build_dir / f"{source.name}.o"))
            lines.append(f"build {objects[-1]}: {rule} {escape(source)} | {headers}")
    lines.append(f"build {escape(target)}: link {' '.join(objects)}\n")
    (build_dir / "build.ninja").write_text("\n".join(lines), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "ninja", "-C", str(build_dir), "-v"], check=True)
    return "".join(log.read_text(encoding="utf-8") for log in sorted(build_dir.glob("*.log")))


def report(log: str) -> dict[str, object]:
    """What ptxas says of each kernel on each target, and every warning."""
    kernels, name = {}, None
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            name = f"{match[2]} {readable(match[1])}"
            kernels[name] = {}
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernels[name] |= dict(zip(("stack", "spill_stores", "spill_loads"), map(int, match.groups()), strict=True))
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[name] |= {"registers": int(match[1]), "shared": int(shared[1]) if shared else 0}
    return {"kernels": kernels, "warnings": [s for s in log.splitlines() if re.search(r"\bwarning\b", s, re.I)]}


def readable(symbol: str) -> str:
    """_ZN8mendfast23rank1_update_fma_kernelINS_4bf16EfEEvNS_5GroupE -> rank1_update_fma_kernel<bf16, float>."""
    match = re.search(r"_ZN8mendfast\d+(\w+_kernel)I(\w+)EEv", symbol)
    if match is None:
        return symbol
    types = re.findall(r"NS_\d(\w+?)E|(f)|(S1_)", match[2])
    names = [name or ("float" if f else None) for name, f, _ in types]
    return f"{match[1]}<{', '.join(n or names[0] for n in names)}>"


def fingerprint() -> str:
    """Of the sources, so that a test can tell whether the record is theirs."""
    digest = hashlib.sha256()
    for source in sorted((ROOT / "csrc").iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()


def escape(path: Path) -> str:
    return re.sub(r"([ :$])", r"$\1", str(path))


CUDA = plan()


def record(folder: Path, **info: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INFO).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if "path" not in CUDA:
            print(f"mendfast: {CUDA['reason']}. Everything else is installed.", file=sys.stderr)
            remove_stale(package_folder(self))
            record(package_folder(self), built=False, reason=CUDA["reason"])


class BuildExt(build_ext):
    def run(self) -> None:
        self.in_place = bool(self.inplace or getattr(self, "editable_mode", False))  # run() clears inplace
        super().run()

    def build_extension(self, ext: Extension) -> None:
        folder, start = package_folder(self), time.monotonic()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            log = compile_extension(CUDA, target, Path(self.build_temp).resolve() / "cuda")
        except (OSError, subprocess.CalledProcessError) as error:
            why = "a compiler reported an error" if isinstance(error, subprocess.CalledProcessError) else error
            reason = f"the CUDA extension was left out: its build failed ({why}; pip install -v -e . shows it)"
            if not CUDA["forced"]:
                remove_stale(folder)
                print(f"mendfast: {reason}. Everything else is installed.", file=sys.stderr)
                record(folder, built=False, reason=reason, nvcc=CUDA["nvcc"])
            # An optional extension: setuptools warns and goes on.
            raise CompileError(reason) from error
        seconds = round(time.monotonic() - start, 1)
        known = {"nvcc": CUDA["nvcc"], "targets": CUDA["targets"], "seconds": seconds}
        record(folder, built=True, **known, sources=fingerprint(), **report(log))


def package_folder(command: build_py | build_ext) -> Path:
    """Where the package's files go: the checkout for an editable installation, else the build folder."""
    in_place = getattr(command, "editable_mode", False) or getattr(command, "in_place", False)
    return ROOT / "mendfast" if in_place else Path(command.build_lib).resolve() / "mendfast"


def remove_stale(folder: Path) -> None:
    """An extension that an earlier installation left would be imported."""
    (folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["mendfast", "mendfast.*"]), "mendfast.kernels"],
        ext_modules=[Extension("mendfast._C", ["csrc/bindings.cpp"], optional=not CUDA["forced"])]
        if "path" in CUDA
        else [],
        cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
    )
