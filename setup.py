"""Builds the extensions that this machine can build, and installs without the others.

mendfast._C, for GPUs, needs nvcc, and links the CUDA runtime statically. mendfast._cpu, for x86-64 with AVX2 or AVX-512
(it asks the processor when it runs), needs a C++ compiler; its threads are those of PyTorch's OpenMP library. Both use
pybind11 and nothing of PyTorch.
MENDFAST_BUILD_CUDA=1 and MENDFAST_BUILD_CPU=1 make it an error when one can't be built, =0 leaves it out.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
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
KERNEL_FLAGS = ["-O3", "-mavx2", "-mfma", "-mf16c", "-fopenmp"]
AVX512_FLAGS = [
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mprefer-vector-width=512",
    # GCC 11 to 13 say it of their own header (GCC bug 105593)
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]
MODULES = {"cuda": "_C", "cpu": "_cpu"}

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


def wish(name: str) -> str:
    variable = f"MENDFAST_BUILD_{name.upper()}"
    wanted = os.environ.get(variable, "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"{variable} is {wanted!r}; use 1 (must build), 0 (leave out) or nothing (if it can be built).")
    return wanted


def plan_cuda() -> dict:
    """nvcc, its version and targets, or the reason to leave the extension out."""
    wanted = wish("cuda")
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


def plan_cpu() -> dict:
    """The C++ compiler, or the reason to leave the extension out."""
    wanted = wish("cpu")
    if wanted == "0":
        return {"reason": "MENDFAST_BUILD_CPU=0 left the CPU extension out"}
    cxx, here = shlex.split(os.environ.get("CXX", "c++")), f"{platform.system()} on {platform.machine()}"
    if here not in ("Linux on x86_64", "Linux on AMD64"):
        reason = f"the CPU extension was left out: it is written for Linux on x86_64, and this is {here}"
    elif not shutil.which(cxx[0]):
        reason = f"the CPU extension was left out: no C++ compiler ({cxx[0]}) on PATH; install g++ or set CXX"
    else:
        return {"path": cxx, "forced": wanted == "1"}
    if wanted == "1":
        sys.exit(f"MENDFAST_BUILD_CPU=1, but {reason}.")
    return {"reason": reason}


def gencode(architectures: list[int]) -> list[str]:
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    newest = architectures[-1]
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def compile_cuda(cuda: dict, target: Path, build_dir: Path) -> str:
    """Every source in csrc/, linked into ``target``; returns what the compilers said."""
    cxx = shlex.split(os.environ.get("CXX", "c++"))
    rules = {
        ".cu": [cuda["path"], *NVCC_FLAGS, *gencode(cuda["architectures"]), *includes("-isystem=")],
        ".cpp": [*cxx, *CXX_FLAGS, *includes("-isystem")],
        "link": [cuda["path"], "-shared", "--cudart=static", "-Xlinker=-s"],
    }
    # the slow ones first
    sources = sorted((ROOT / "csrc").glob("*.c[pu]*"), key=lambda source: (source.suffix != ".cu", source.name))
    return ninja(rules, [(s, s.suffix) for s in sources if s.suffix in rules], target, build_dir)


def compile_cpu(cpu: dict, target: Path, build_dir: Path) -> str:
    """Every kernel in csrc/cpu/, for AVX2 and for AVX-512; what asks the processor for them is compiled without."""
    cxx = [*cpu["path"], *CXX_FLAGS, *includes("-isystem")]
    avx2 = [*cxx, *KERNEL_FLAGS]
    # -fopenmp is not linked: the symbols are those of the library that PyTorch has loaded
    rules = {"cxx": cxx, "avx2": avx2, "avx512": [*avx2, *AVX512_FLAGS], "link": [*cpu["path"], "-shared", "-Wl,-s"]}
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    wanted = [(s, rule) for s in sources for rule in (("cxx",) if s.stem == "bindings" else ("avx2", "avx512"))]
    return ninja(rules, wanted, target, build_dir)


def includes(flag: str) -> list[str]:
    import pybind11

    return [f"{flag}{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]


def ninja(rules: dict[str, list[str]], sources: list[tuple[Path, str]], target: Path, build_dir: Path) -> str:
    """Compile each source by its rule and link the objects into ``target``; returns what the compilers said."""
    build_dir.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    headers = " ".join(escape(p) for p in sorted((ROOT / "csrc").rglob("*.*h")))
    lines = [
        f"rule {name.strip('.')}\n  command = {shlex.join(command)} "
        + ("$in -o $out" if name == "link" else f"-c $in -o $out {LOGGED}")
        for name, command in rules.items()
    ]
    objects = []
    for source, rule in sources:
        objects.append(escape(build_dir / f"{source.name}.{rule.strip('.')}.o"))
        lines.append(f"build {objects[-1]}: {rule.strip('.')} {escape(source)} | {headers}")
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
    for source in sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()


def escape(path: Path) -> str:
    return re.sub(r"([ :$])", r"$\1", str(path))


CUDA = plan_cuda()
PLAN = {"cuda": CUDA, "cpu": plan_cpu()}


def record(folder: Path, extension: str, **info: object) -> None:
    """What became of one extension, into the file that ``mendfast doctor`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / INFO
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        known = {}
    known = {name: known[name] for name in MODULES if name in known}
    file.write_text(json.dumps({**known, extension: info}, indent=1) + "\n", encoding="utf-8")


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        for name, plan in PLAN.items():
            if "path" not in plan:
                leave_out(package_folder(self), name, plan["reason"])


class BuildExt(build_ext):
    def run(self) -> None:
        self.in_place = bool(self.inplace or getattr(self, "editable_mode", False))  # run() clears inplace
        super().run()

    def build_extension(self, ext: Extension) -> None:
        folder, start = package_folder(self), time.monotonic()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        name = next(name for name, module in MODULES.items() if ext.name.endswith(f".{module}"))
        plan, build_dir = PLAN[name], Path(self.build_temp).resolve() / name
        known = {"nvcc": CUDA["nvcc"], "targets": CUDA["targets"]} if name == "cuda" else {}
        try:
            log = (compile_cuda if name == "cuda" else compile_cpu)(plan, target, build_dir)
        except (OSError, subprocess.CalledProcessError) as error:
            why = "a compiler reported an error" if isinstance(error, subprocess.CalledProcessError) else error
            reason = (
                f"the {name.upper()} extension was left out: its build failed ({why}; pip install -v -e . shows it)"
            )
            if not plan["forced"]:
                leave_out(folder, name, reason, **known)
            # An optional extension: setuptools warns and goes on.
            raise CompileError(reason) from error
        seconds = round(time.monotonic() - start, 1)
        record(folder, name, built=True, **known, seconds=seconds, sources=fingerprint(), **report(log))


def leave_out(folder: Path, name: str, reason: str, **known: object) -> None:
    print(f"mendfast: {reason}. Everything else is installed.", file=sys.stderr)
    # one that an earlier installation left would be imported
    (folder / f"{MODULES[name]}{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)
    record(folder, name, built=False, reason=reason, **known)


def package_folder(command: build_py | build_ext) -> Path:
    """Where the package's files go: the checkout for an editable installation, else the build folder."""
    in_place = getattr(command, "editable_mode", False) or getattr(command, "in_place", False)
    return ROOT / "mendfast" if in_place else Path(command.build_lib).resolve() / "mendfast"


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["mendfast", "mendfast.*"]), "mendfast.kernels"],
        ext_modules=[
            Extension(f"mendfast.{MODULES[name]}", ["csrc/bindings.cpp"], optional=not plan["forced"])
            for name, plan in PLAN.items()
            if "path" in plan
        ],
        cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
    )
