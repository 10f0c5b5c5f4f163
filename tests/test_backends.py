"""Which backend serves what: the table, as plain functions of device, capability and dtypes, and the choice."""

import re
from pathlib import Path

import pytest
import torch
from op_cases import CPU

import mendfast
from mendfast import backends, ops
from mendfast.backends import Place, refusal
from mendfast.kernels._library import library_precision, split

KERNELS = [(op, name) for op, row in backends.TABLE.items() for name in ("cuda", "triton") if name in row]
SINGLE = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _not_interpreting(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("MENDFAST_BACKEND", raising=False)


@pytest.mark.parametrize(("op", "name"), KERNELS)
def test_kernels_ask_for_the_device_the_capability_and_the_dtypes(op, name):
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0)):
        assert refusal(op, name, Place("cuda", capability), SINGLE) is None
    for capability in ((7, 0), (7, 5)):
        assert "8.0 or newer, and this is 7." in refusal(op, name, Place("cuda", capability))
    assert "on CUDA devices, and this is 'cpu'" in refusal(op, name, Place("cpu"))
    assert "ROCm" in refusal(op, name, Place("cuda", (9, 4), rocm=True))
    assert "there is float64" in refusal(op, name, Place("cuda", (9, 0)), (torch.float32, torch.float64))


@pytest.mark.parametrize("place", [Place("cpu"), Place("cuda", (7, 0)), Place("cuda", (9, 4), True), Place("mps")])
@pytest.mark.parametrize("op", backends.TABLE)
def test_every_op_is_served_everywhere(op, place):
    assert "aten" in backends.TABLE[op] and list(backends.TABLE[op])[-1] == "reference"
    for name in ("aten", "reference"):
        assert refusal(op, name, place, (torch.float64, *SINGLE)) is None


def test_the_interpreter_takes_any_device_but_not_any_dtype(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert refusal("token_nll", "triton", Place("cpu"), (torch.float32,)) is None
    assert "float64" in refusal("token_nll", "triton", Place("cpu"), (torch.float64,))


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (9, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auto_takes_what_serves(monkeypatch, capability, dtype):
    """On an old GPU, and for float64 on any, the library's calls; no launcher gets to raise."""
    monkeypatch.setattr(backends, "place_of", lambda device: Place("cuda", capability))
    monkeypatch.setattr(backends, "MISSING", {})
    for op, row in backends.TABLE.items():
        chosen = backends.choose(op, torch.device("cuda"), None, (dtype,))
        fast = next(name for name in row if name != "cpu")
        assert chosen == (fast if capability >= (8, 0) and dtype == torch.float32 else "aten"), op
    with pytest.raises(TypeError, match="float64.*backend='aten'"):
        monkeypatch.setattr(backends, "place_of", lambda device: Place("cuda", (9, 0)))
        backends.choose("token_nll", torch.device("cuda"), "triton", (torch.float64,))


def test_a_choice_that_is_not_every_op_s_says_for_which():
    logits, labels = torch.randn(1, 1, 3), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="no backend 'cuda', which is of rank1_update_; it has triton, aten, ref"):
        ops.token_nll(logits, labels, backend="cuda")
    with mendfast.backend("cpu"), pytest.raises(RuntimeError, match=r"is of editor_mlp, frozen_linear"):
        ops.token_nll(logits, labels)


def test_a_choice_for_some_ops_leaves_the_others():
    cpu = torch.device("cpu")
    with mendfast.backend("reference", "editor_mlp", "token_nll"):
        assert backends.choose("editor_mlp", cpu) == backends.choose("token_nll", cpu) == "reference"
        assert backends.choose("kl_divergence", cpu) == CPU
        with mendfast.backend("aten"):  # for all of them
            assert backends.choose("editor_mlp", cpu) == "aten"
        assert backends.choose("editor_mlp", cpu) == "reference"
    with pytest.raises(ValueError, match="no op 'editor'; the ops are editor_mlp"), mendfast.backend("aten", "editor"):
        pass


def test_explain_goes_by_the_table():
    assert [row["op"] for row in backends.explain(torch.device("cpu"))] == list(backends.TABLE)


# -- products outside the kernels ------------------------------------------------------------------------------------


@pytest.fixture
def low_precision():
    """The process lets matrix products round their factors."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def matmul_settings(device):
    settings = (torch.backends.cuda if device == "cuda" else torch.backends.mkldnn).matmul
    return getattr(settings, "fp32_precision", None)


@pytest.mark.skipif(matmul_settings("cuda") is None, reason="PyTorch before 2.9 has another switch")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_the_guard_and_not_the_process_sets_the_precision(low_precision, device, precision):
    outside = matmul_settings(device)
    assert outside in ("bf16", "tf32")
    with library_precision(torch.device(device), precision):
        assert matmul_settings(device) == ("tf32" if (device, precision) == ("cuda", "tf32") else "ieee")
    assert matmul_settings(device) == outside


def spied(monkeypatch):
    """The settings at every product that the ops' library paths make."""
    seen = []
    for owner, name in ((torch.Tensor, "__matmul__"), (torch, "mm"), (torch, "addmm"), (torch, "baddbmm")):
        real = getattr(owner, name)

        def spy(*args, real=real, **kwargs):
            seen.append(matmul_settings("cpu"))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, spy)
    return seen


@pytest.mark.skipif(matmul_settings("cpu") is None, reason="PyTorch before 2.9 has another switch")
@pytest.mark.parametrize("op", ["editor_mlp", "lowrank_linear"])
def test_library_products_do_not_follow_the_process(monkeypatch, low_precision, op):
    from op_cases import editor_case
    from test_lowrank_linear import case

    editor = editor_case("plain")
    seen = spied(monkeypatch)
    if op == "editor_mlp":
        editor.run(ops.editor_mlp, backend="aten")
    else:
        for batched in (True, False):
            ops.lowrank_linear(*case(batched), backend="aten").sum().backward()
    assert len(seen) > 5 and set(seen) == {"ieee"}


def test_what_three_tf32_products_drop():
    """The bound that the GPU tests of the update go by, at the worst mantissas: all cut-off bits set."""
    from test_rank1_update import TF32X3

    x = torch.tensor([1 + 2**-10 - 2**-23, 1.0 - 2**-24, 1.5 + 2**-10 - 2**-23])
    a, b = x[:, None].double(), x[None].double()
    high, low = (part.double() for part in split(x))
    cut = split(low.float())[0].double()  # a matrix unit cuts the low halves to ten bits as well
    three = cut[:, None] * high + high[:, None] * cut + high[:, None] * high
    worst = ((a * b - three) / (a * b)).abs().max()
    assert 2**-21 < worst <= TF32X3


@pytest.mark.parametrize("op", backends.TABLE)
def test_an_op_s_page_names_its_backends(op):
    """docs/ops: one page each, with the rows of the table in their order."""
    folder = Path(__file__).parents[1] / "docs" / "ops"
    if not folder.is_dir():
        pytest.skip("an installation without its documentation")
    page = folder / ("few_rows.md" if op == "frozen_linear" else f"{op.rstrip('_')}.md")
    section = page.read_text().split("## Backends")[1]
    assert re.findall(r"^\| `(\w+)` \|", section, re.M) == list(backends.TABLE[op])
