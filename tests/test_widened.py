"""Products with 16-bit weights, by the kernel and part by part: as exact as rounding allows, in both directions."""

from __future__ import annotations

import pytest
import torch
from conftest import make_batch, make_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from mendfast import MendEditor
from mendfast.capture import frozen
from mendfast.ops import few_rows, frozen_linear, widened

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small parts of small matrices, as on a CPU without such units."""
    monkeypatch.setattr(widened, "PART", 1 << 9)
    monkeypatch.setattr(widened, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(widened, "has_units", lambda dtype: False)


@pytest.fixture(params=["kernel", "parts"])
def way(request, monkeypatch):
    """How few rows are multiplied."""
    kernel, made = few_rows.kernel_mm, []
    monkeypatch.setattr(few_rows, "kernel_mm", lambda *args: made.append(1) or kernel(*args))
    if request.param == "parts":
        monkeypatch.setattr(few_rows, "MOST_ROWS", 0)
    elif few_rows.problem():
        pytest.skip(few_rows.problem())
    yield request.param
    assert bool(made) is (request.param == "kernel")


def layer_of(kind: str, depth: int, cols: int, bias: bool, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(depth, cols, bias=bias) if kind == "linear" else Conv1D(cols, depth)
    if kind == "conv1d":
        nn.init.normal_(layer.bias)
    return layer.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "bias"), [("linear", True), ("linear", False), ("conv1d", True)])
@pytest.mark.parametrize(("rows", "depth", "cols"), [(8, 16, 32), (37, 33, 129), (8, 1025, 3), (20, 7, 600)])
@pytest.mark.usefixtures("way")
def test_a_product_and_its_gradient_are_those_of_float64_rounded(dtype, kind, bias, rows, depth, cols, monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr(widened, "mm", lambda *args, mm=widened.mm: calls.append(1) or mm(*args))
    layer = layer_of(kind, depth, cols, bias, dtype)
    x = torch.randn(2, rows // 2, depth).to(dtype).requires_grad_()
    y = frozen_linear.forward(layer, x)
    assert calls == [1]
    w = (layer.weight.T if kind == "linear" else layer.weight).double()
    exact = x.detach().double() @ w + (layer.bias.double() if bias else 0)
    size = x.detach().double().abs() @ w.abs() + (layer.bias.double().abs() if bias else 0)
    assert y.dtype == dtype and y.shape == exact.shape
    unit, sums = torch.finfo(dtype).eps, depth * torch.finfo(torch.float32).eps
    assert ((y.double() - exact).abs() <= 0.51 * unit * exact.abs() + sums * size + 1e-7).all()
    grad = torch.randn(2, rows // 2, cols).to(dtype)
    y.backward(grad)
    exact, size = grad.double() @ w.T, grad.double().abs() @ w.T.abs()
    sums = cols * torch.finfo(torch.float32).eps
    assert x.grad.dtype == dtype
    assert ((x.grad.double() - exact).abs() <= 0.51 * unit * exact.abs() + sums * size + 1e-7).all()


def test_what_is_left_to_pytorch(monkeypatch):
    x, w = torch.randn(8, 16).bfloat16(), torch.randn(16, 4).bfloat16()
    assert widened.served(x, w, None)
    assert widened.served(x.float(), w, None) and widened.served(x[:1].float(), w, None)
    assert not widened.served(x.float(), w.float(), None)
    assert not widened.served(x, w.half(), None)
    assert not widened.served(x, w, torch.zeros(4))
    apart = torch.randn(16, 8).bfloat16()[:, ::2]  # not for the kernel
    assert widened.served(x[:2], apart, None) and not widened.served(x[:1], apart, None)


@pytest.mark.parametrize("found", ["avx2", "avx512"])
def test_beside_units_the_kernel_serves_few_rows(found, monkeypatch):
    if few_rows.problem():
        pytest.skip(few_rows.problem())
    monkeypatch.setattr(widened, "has_units", lambda dtype: True)
    monkeypatch.setattr(widened, "instructions", lambda: found)
    x, w = torch.randn(widened.MOST_BESIDE_UNITS + 1, 16).bfloat16(), torch.randn(16, 4).bfloat16()
    assert widened.served(x[1:], w, None) is widened.served(x[:1], w.T.contiguous().T, None) is (found == "avx512")
    assert not widened.served(x, w, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_edit_of_a_16_bit_model_is_nearer_to_the_float32_ones(dtype, monkeypatch):
    """Than it may be by rounding of every product's sum; and the model's layers come back as they were."""
    model = make_model("llama").to(dtype)
    batch = make_batch("llama", 3)
    calls = []
    monkeypatch.setattr(widened, "mm", lambda *args, mm=widened.mm: calls.append(1) or mm(*args))
    editor = MendEditor.from_model(model)
    editor.train()
    with torch.no_grad():
        found = editor.gradients(batch)
    assert calls and all("forward" not in vars(module) for module in model.modules())
    exact = MendEditor.from_model(make_model("llama").to(dtype).float()).gradients(batch)
    for name, sides in found.items():
        for one, other in zip(sides, exact[name], strict=True):
            assert (one.float() - other).norm() <= 16 * torch.finfo(dtype).eps * other.norm()


def test_a_group_gives_a_row_the_same_bits():
    """As the cache of the frozen part needs: rows of one text do not depend on the others."""
    layer = layer_of("linear", 64, 48, True, torch.bfloat16)
    x = torch.randn(64, 64).bfloat16()
    with frozen(nn.Sequential(layer)):
        whole, part = frozen_linear.forward(layer, x), frozen_linear.forward(layer, x[16:32])
    assert part.equal(whole[16:32])
