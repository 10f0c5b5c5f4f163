"""The CUDA extension: what the compilers said of it, and what its binding refuses. No GPU is needed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from mendfast.build_info import build_info

ROOT = Path(__file__).parent.parent
KERNELS = [
    f"rank1_update_{path}_kernel<{types}>"
    for path in ("fma", "mma")
    for types in ("float, float", "bf16, bf16", "bf16, float", "f16, f16", "f16, float")
    if (path, types) != ("mma", "float, float")  # many terms of float32 weights are cuBLAS's
]


def load_setup():
    spec = importlib.util.spec_from_file_location("mendfast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def extension():
    if not build_info()["built"]:
        pytest.skip(f"there is no CUDA extension here: {build_info()['reason']}")
    from mendfast import _C

    return _C


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The installation's record if it is of these sources, else a new one."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("an installation without its sources")
    setup = load_setup()
    info = build_info()
    if info["built"] and info["sources"] == setup.fingerprint():
        return info
    if "path" not in setup.CUDA:
        pytest.skip(setup.CUDA["reason"])
    pytest.importorskip("ninja", reason="ninja is needed to compile the extension")
    folder = tmp_path_factory.mktemp("extension")
    log = setup.compile_cuda(setup.CUDA, folder / "_C.so", folder / "build")
    return {"targets": setup.CUDA["targets"], **setup.report(log)}


def test_every_kernel_on_every_target(record):
    machine = [target for target in record["targets"] if target.startswith("sm_")]
    assert machine and record["targets"][-1].startswith("compute_"), "PTX for the GPUs to come"
    assert set(record["kernels"]) == {f"{target} {kernel}" for target in machine for kernel in KERNELS}


def test_no_spills_no_stack_no_warnings(record):
    assert record["warnings"] == []
    for name, used in record["kernels"].items():
        assert used["stack"] == used["spill_stores"] == used["spill_loads"] == 0, (name, used)
        # two blocks of 256 threads to a multiprocessor, and static shared memory
        assert used["registers"] <= 128 and used["shared"] <= 48 * 1024, (name, used)


def test_report_sees_spills():
    log = """ptxas info    : Compiling entry function '_ZN8mendfast23rank1_update_fma_kernelINS_4bf16EfEEvNS_5GroupE' for 'sm_90'
ptxas info    : Function properties for _ZN8mendfast23rank1_update_fma_kernelINS_4bf16EfEEvNS_5GroupE
    24 bytes stack frame, 44 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 24 bytes cumulative stack size, 20480 bytes smem
ptxas warning : Registers are spilled to local memory
"""  # noqa: E501
    report = load_setup().report(log)
    used = {"stack": 24, "spill_stores": 44, "spill_loads": 28, "registers": 128, "shared": 20480}
    assert report["kernels"] == {"sm_90 rank1_update_fma_kernel<bf16, float>": used}
    assert len(report["warnings"]) == 1


def test_names():
    readable = load_setup().readable
    symbol = "_ZN8mendfast23rank1_update_{}_kernelI{}EEvNS_5GroupE"
    assert readable(symbol.format("mma", "ff")) == "rank1_update_mma_kernel<float, float>"
    assert readable(symbol.format("mma", "NS_4bf16ES1_")) == "rank1_update_mma_kernel<bf16, bf16>"
    assert readable(symbol.format("fma", "NS_3f16Ef")) == "rank1_update_fma_kernel<f16, float>"
    assert readable("_Z3foov") == "_Z3foov"


def test_stands_alone(extension):
    """The CUDA runtime is inside; nothing of PyTorch is needed."""
    content = Path(extension.__file__).read_bytes()
    for library in (b"libtorch", b"libc10", b"libcudart.so"):
        assert library not in content


# -- the binding ---------------------------------------------------------------------------------------------

GOOD = {"weight": 4096, "left": 8192, "right": 16384, "weight_stride": 8, "left_stride": 4, "right_stride": 8,
        "rows": 4, "cols": 8, "terms": 3, "alpha": 1.0, "seed": 0}  # fmt: skip
OPTIONS = {"weight_dtype": "float32", "factor_dtype": "float32", "stochastic": False, "device": 0, "stream": 0}


def call(extension, options=None, **changes):
    """With addresses that nobody may read: refused, or stopped for want of a driver, before a launch."""
    assert changes.keys() <= GOOD.keys()
    return extension.rank1_update_group([tuple({**GOOD, **changes}.values())], **{**OPTIONS, **(options or {})})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rows": -1}, "matrix 0: rows, cols and terms must not be negative"),
        ({"cols": 2**31 - 1, "weight_stride": 2**31, "right_stride": 2**31}, "below 2\\^31 - 1024"),
        ({"weight_stride": 7}, "weight_stride is 7, less than the 8 columns"),
        ({"left_stride": 3}, "left_stride is less than the number of rows"),
        ({"right_stride": 7}, "right_stride is less than the number of columns"),
        ({"weight": 0}, "a pointer is null"),
        ({"left": 8193}, "not aligned to its elements"),
        ({"options": {"weight_dtype": "int8"}}, "weight_dtype is 'int8'; use one of float32, bfloat16, float16"),
        ({"options": {"factor_dtype": "bfloat16"}}, "factors must be float32 or of the weight's type"),
        ({"options": {"path": "fast"}}, "path is 'fast'; use one of auto, fma, mma"),
    ],
)
def test_wrong_values(extension, changes, match):
    with pytest.raises(ValueError, match=match):
        call(extension, **changes)


def test_wrong_types(extension):
    for arguments in ({"rows": 2**40}, {"weight": -1}, {"alpha": "1"}, {"terms": 1.5}, {"seed": -1}):
        with pytest.raises(TypeError):
            call(extension, **arguments)
    with pytest.raises(TypeError):
        extension.rank1_update_group([tuple(GOOD.values())])
    with pytest.raises(TypeError):
        extension.rank1_update_group([tuple(GOOD.values())[:-1]], **OPTIONS)


def test_nothing_to_do(extension):
    assert extension.rank1_update_group([], **OPTIONS) == 0
    for empty in ("rows", "cols", "terms"):
        assert call(extension, **{empty: 0}) == 0


def test_the_second_matrix_is_named(extension):
    rows = [tuple(GOOD.values()), tuple({**GOOD, "weight_stride": 1}.values())]
    with pytest.raises(ValueError, match="matrix 1: weight_stride is 1"):
        extension.rank1_update_group(rows, **OPTIONS)


def test_without_a_driver_it_says_so(extension):
    problem = extension.device_problem()
    if not problem:
        pytest.skip("this machine has a CUDA device")
    for path in ("auto", "fma", "mma"):
        with pytest.raises(RuntimeError, match="no CUDA d(river|evice)|the CUDA driver serves"):
            call(extension, options={"path": path})


def test_rule_between_the_kernels(extension):
    for dtype in ("bfloat16", "float16"):
        assert not extension.prefers_mma(16, dtype) and extension.prefers_mma(17, dtype)
    assert not extension.prefers_mma(4096, "float32")
