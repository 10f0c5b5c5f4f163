"""Products by oneDNN, where it has wider units than MKL: the same numbers, chosen where they serve."""

import pytest
import torch
from conftest import make_batch, make_model
from op_cases import EditorCase

import mendfast
from mendfast import MendConfig, MendEditor, ops
from mendfast.capture import frozen
from mendfast.ops import few_rows, many_rows

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this PyTorch has no oneDNN",
)


@pytest.fixture
def always(monkeypatch):
    """oneDNN whatever the processor and the size, and how often it was called."""
    calls, made = [], many_rows.mm

    def counted(x, w, bias=None):
        calls.append(tuple(x.shape))
        return made(x, w, bias)

    monkeypatch.setattr(many_rows, "faster", lambda: True)
    monkeypatch.setattr(many_rows, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(many_rows, "mm", counted)
    monkeypatch.setattr(few_rows, "LEAST_WEIGHTS", 1 << 62)
    return calls


def strided(rows, cols, kind):
    if kind == "columns":
        return torch.randn(cols, rows).T
    if kind == "apart":
        return torch.randn(rows, cols + 3)[:, :cols]
    return torch.randn(rows, cols)


@pytest.mark.parametrize("rows", [4, 5, 17, 96, 300])
@pytest.mark.parametrize(("depth", "cols"), [(1, 1), (7, 33), (64, 65), (257, 130)])
@pytest.mark.parametrize("x_kind", ["rows", "columns", "apart"])
@pytest.mark.parametrize("w_kind", ["rows", "columns", "apart"])
def test_products(always, rows, depth, cols, x_kind, w_kind):
    torch.manual_seed(0)
    x, w = strided(rows, depth, x_kind), strided(depth, cols, w_kind)
    for bias in (None, torch.randn(cols)):
        expected = x.double() @ w.double() + (0 if bias is None else bias.double())
        found = few_rows.library_mm(x, w, bias)
        bound = 2 * torch.finfo(torch.float32).eps * depth**0.5 * (x.double().abs() @ w.double().abs() + 1)
        assert found.dtype == torch.float32 and ((found - expected).abs() <= bound).all()
    assert len(always) == 2


def test_what_is_left_to_mkl(always):
    x, w = torch.randn(8, 300), torch.randn(300, 300)
    assert many_rows.served(x, w) and many_rows.served(x, w.T, torch.randn(300))
    for other in ((x[:3], w), (x.double(), w.double()), (x.bfloat16(), w.bfloat16()), (x[:, :9], w), (x[0], w)):
        assert not many_rows.served(*other)
    assert not many_rows.served(x, w, torch.randn(1)) and not many_rows.served(x, w, torch.randn(300).double())


def test_a_processor_without_them(monkeypatch):
    x, w = torch.randn(8, 300), torch.randn(300, 300)
    monkeypatch.setattr(many_rows, "faster", lambda: False)
    assert not many_rows.served(x, w) and few_rows.most_rows(w) == few_rows.MOST_ROWS
    monkeypatch.setattr(many_rows, "faster", lambda: True)
    assert few_rows.most_rows(w) < few_rows.most_rows(w.T) <= few_rows.MOST_ROWS == few_rows.most_rows(w.bfloat16())


def test_the_rule(monkeypatch):
    for capability, of_intel, expected in (("AVX512", False, True), ("AVX512", True, False), ("AVX2", False, False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda kind=capability: kind)
        monkeypatch.setattr(many_rows, "_of_intel", lambda intel=of_intel: intel)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
        many_rows.faster.cache_clear()
        assert many_rows.faster() is expected
    many_rows.faster.cache_clear()


@pytest.mark.parametrize("shape", [(5, 4, 3, 2, 2), (43, 17, 30, 20, 3), (100, 9, 8, 5, 1)])
def test_the_editor_network(always, shape):
    EditorCase(*shape).check(ops.editor_mlp, backend="cpu")
    assert always


@pytest.mark.skipif(few_rows.problem() is not None, reason=f"{few_rows.problem()}")
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bert"])
def test_the_rows_of_an_edit(always, name):
    editor = MendEditor.from_model(make_model(name), None, MendConfig(rank=8))
    batch = make_batch(name)
    with mendfast.backend("aten"):
        expected = editor.gradients(batch)
    assert not always
    found = editor.gradients(batch)
    assert always
    for layer, sides in found.items():
        for one, other in zip(sides, expected[layer], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_frozen_layers_are_differentiable(always):
    layer = torch.nn.Linear(40, 30).requires_grad_(False)
    x = torch.randn(6, 40, requires_grad=True)
    weight = torch.randn(6, 30)
    with frozen(layer):
        (layer(x) * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight @ layer.weight)
