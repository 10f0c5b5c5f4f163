"""Products of few rows on the CPU: the kernel against float64, where it is taken, and a model that uses it."""

from __future__ import annotations

import math
import random

import pytest
import torch
from conftest import make_batch, make_model
from op_cases import EditorCase, at_threads, error, poisoned, tolerance  # noqa: F401
from test_cuda_build import ROOT, load_setup
from transformers.pytorch_utils import Conv1D

import mendfast
from mendfast import MendConfig, MendEditor, backends, ops
from mendfast.build_info import build_info
from mendfast.capture import frozen
from mendfast.ops import few_rows, many_rows
from mendfast.training import editor_loss as meta_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_extension = pytest.mark.skipif(few_rows.problem() is not None, reason=f"{few_rows.problem()}")


@pytest.fixture
def always(monkeypatch):
    """The kernel whatever the size, and how often it was called."""
    calls = []

    def counted(x, w, bias=None):
        calls.append((tuple(x.shape), tuple(w.shape)))
        return kernel(x, w, bias)

    kernel = few_rows.kernel_mm
    monkeypatch.setattr(many_rows, "faster", lambda: False)
    monkeypatch.setattr(few_rows, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(few_rows, "kernel_mm", counted)
    return calls


def matrix(rows, cols, transposed, padding, dtype=torch.float32):
    """[rows, cols] with its rows or its columns contiguous, NaN between them."""
    shape = (cols, rows) if transposed else (rows, cols)
    whole = torch.full((shape[0], shape[1] + padding), float("nan"), dtype=dtype)
    part = whole[:, : shape[1]].copy_(torch.randn(shape))
    return part.T if transposed else part


@needs_extension
@pytest.mark.usefixtures("instructions")
class TestKernel:
    @pytest.mark.usefixtures("poisoned")
    @pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_shapes(self, transposed, dtype):
        torch.manual_seed(0)
        draw = random.Random(0)
        tall = [1, 2, 3, 4, 5, 6, 7, 12, 20, 43, 70, 96]
        edges = [1, 2, 7, 8, 9, 63, 64, 65, 383, 384, 385, 511, 513, 767, 769, 1537]
        for _ in range(150):
            rows, cols, depth = draw.choice(tall), draw.choice(edges), draw.choice(edges)
            x = matrix(rows, depth, False, draw.choice([0, 3]))
            w = matrix(depth, cols, transposed, draw.choice([0, 5]), dtype)
            bias = draw.choice([None, torch.randn(cols).to(dtype)])
            expected = x.double() @ w.double() + (0 if bias is None else bias.double())
            size = x.double().abs() @ w.double().abs() + (0 if bias is None else bias.double().abs())
            bound = torch.finfo(torch.float32).eps * (2 + math.sqrt(depth) / 4) * size
            assert ((few_rows.kernel_mm(x, w, bias) - expected).abs() <= bound).all(), (rows, cols, depth)

    @pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def test_16_bits_give_the_bits_of_the_widened_weights(self, transposed, dtype):
        """Of 1 to 7 rows, and of more than one and two tiles; columns and depths that no tile divides."""
        for rows in [*range(1, 8), 20, 96]:
            for depth, cols in ((1, 1), (9, 5), (777, 1), (1, 70), (100, 803), (1601, 34)):
                x, w = torch.randn(rows, depth), matrix(depth, cols, transposed, 3, dtype)
                bias = torch.randn(cols).to(dtype)
                expected = few_rows.kernel_mm(x, w.float(), bias.float())
                assert torch.equal(few_rows.kernel_mm(x, w, bias), expected), (rows, depth, cols)

    @pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
    @pytest.mark.parametrize("rows", [3, 20])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_bits_do_not_depend_on_the_threads(self, transposed, rows, dtype):
        x, w = torch.randn(rows, 1500), matrix(1500, 900, transposed, 0, dtype)
        out = at_threads(lambda: few_rows.kernel_mm(x, w))
        assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])

    def test_a_permuted_x(self):
        x, w = torch.randn(30, 7).T, torch.randn(30, 50)
        assert error(few_rows.kernel_mm(x, w), x.double() @ w.double()) <= tolerance(torch.float32, 30)

    @pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
    def test_a_row_without_a_stride(self, transposed):
        """PyTorch gives a single row any stride, and calls it contiguous."""
        row, w = torch.randn(300), matrix(300, 300, transposed, 0)
        x = row.as_strided((1, 300), (0, 1))
        assert x.is_contiguous() and x.stride(0) == 0
        assert torch.equal(few_rows.mm(x, w), few_rows.mm(row[None].clone(), w))

    @pytest.mark.parametrize("rows", [3, 8])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_not_a_number_stays(self, rows, dtype):
        x, w = torch.randn(rows, 40), torch.randn(40, 20).to(dtype)
        x[1, 7], w[5, 3], w[9, 17] = float("nan"), float("inf"), float("nan")
        for layout in (w, w.T.contiguous().T):
            out = few_rows.kernel_mm(x, layout)
            assert out[1].isnan().all() and not out[0, 3].isfinite() and out[0, :3].isfinite().all()
            assert out[:, 17].isnan().all() and out[2:, 4:17].isfinite().all()

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"rows": -1}, "rows and cols must not be negative, and depth must be at least 1"),
            ({"depth": 0}, "depth must be at least 1"),
            ({"threads": 0}, "threads must be at least 1"),
            ({"x_stride": 2}, "a stride is less than its row is long"),
            ({"w_stride": 3}, "a stride is less"),
            ({"w_stride": 2, "transposed": True}, "a stride is less"),
            ({"y_stride": 3}, "a stride is less"),
            ({"kind": "float64"}, "kind is float64; use float32, bfloat16 or float16"),
            ({"x": 0}, "a pointer is null"),
            ({"y": 0}, "a pointer is null"),
        ],
    )
    def test_the_binding_refuses(self, changes, match):
        from mendfast import _cpu

        good = {"x": 4096, "x_stride": 3, "w": 4096, "w_stride": 4, "transposed": False,
                "kind": "float32", "bias": 0, "y": 4096, "y_stride": 4, "rows": 2, "cols": 4, "depth": 3,
                "threads": 1}  # fmt: skip
        with pytest.raises(ValueError, match=match):
            _cpu.few_rows(**{**good, **changes})

    def test_nothing_to_do(self):
        assert few_rows.kernel_mm(torch.randn(0, 3), torch.randn(3, 4)).shape == (0, 4)


class TestChoice:
    x, w = torch.randn(4, 300), torch.randn(300, 300)

    @pytest.fixture(autouse=True)
    def beside_mkl(self, monkeypatch):
        monkeypatch.setattr(many_rows, "faster", lambda: False)

    def test_served(self):
        assert few_rows.served(self.x, self.w, None) and few_rows.served(self.x, self.w.T, torch.randn(300))
        for dtype in DTYPES[1:]:
            w, bias = self.w.to(dtype), torch.randn(300).to(dtype)
            assert few_rows.served(self.x, w, None) and few_rows.served(self.x, w.T, bias)
            assert not few_rows.served(self.x, w, bias.float())

    @pytest.mark.parametrize(
        ("x", "w", "bias"),
        [
            (torch.randn(few_rows.MOST_ROWS + 1, 300), w, None),
            (torch.randn(0, 300), w, None),
            (x[:, :10], torch.randn(10, 10), None),
            (x.double(), w.double(), None),
            (x.bfloat16(), w.bfloat16(), None),
            (x, torch.randn(600, 600)[::2, ::2], None),
            (x, w, torch.randn(600)[::2]),
            (x, w, torch.randn(300).double()),
            (x, w, torch.randn(1)),
            (x, w, torch.empty(300, device="meta")),
        ],
        ids=["many rows", "no rows", "small", "float64", "bfloat16", "strided", "strided bias", "float64 bias",
             "broadcast bias", "bias elsewhere"],
    )
    def test_left_to_pytorch(self, x, w, bias):
        assert not few_rows.served(x, w, bias)
        if bias is None or bias.dtype == x.dtype and bias.device == x.device:
            assert torch.equal(few_rows.mm(x, w, bias), x @ w + (0 if bias is None else bias))

    @pytest.mark.parametrize("name", ["aten", "reference"])
    def test_not_where_another_backend_was_asked_for(self, always, name):
        layer, x = torch.nn.Linear(5, 6), torch.randn(2, 5)
        with frozen(layer):
            layer(x)
            used = len(always)
            with mendfast.backend(name), frozen(layer):
                pass
        with mendfast.backend(name), frozen(layer):
            layer(x)
        assert len(always) == used == (few_rows.problem() is None)

    def test_a_gpu_backend_does_not_disturb_a_model_on_the_cpu(self):
        with mendfast.backend("cuda"), frozen(torch.nn.Linear(5, 6)) as _:
            pass

    def test_without_the_extension(self, monkeypatch):
        monkeypatch.setattr(few_rows, "problem", lambda: "why")
        monkeypatch.setitem(backends.MISSING, "cpu", lambda: "why")
        assert backends.probe("frozen_linear", "cpu", torch.device("cpu")) == "why"
        assert "runs on CPUs" in backends.probe("frozen_linear", "cpu", torch.device("cuda"))
        assert torch.equal(few_rows.mm(self.x, self.w), self.x @ self.w)


@needs_extension
class TestFrozenModel:
    @pytest.mark.parametrize("make", [torch.nn.Linear, lambda m, n: Conv1D(n, m)], ids=["Linear", "Conv1D"])
    @pytest.mark.parametrize("shape", [(3,), (2, 3)])
    def test_a_layer(self, always, make, shape):
        layer, x, grad = make(11, 13), torch.randn(*shape, 11, requires_grad=True), torch.randn(*shape, 13)
        expected = layer(x)
        (expected_grad,) = torch.autograd.grad(expected, x, grad)
        with frozen(layer):
            out = layer(x)
        (out_grad,) = torch.autograd.grad(out, x, grad)
        assert len(always) == 2
        assert error(out, expected) <= 1e-6 and error(out_grad, expected_grad) <= 1e-6
        assert out.shape == expected.shape

    def test_what_it_leaves_alone(self, always):
        layer, x = torch.nn.Linear(11, 13), torch.randn(3, 11)
        with frozen(layer):
            layer.requires_grad_(True)
            layer(x)
            layer.requires_grad_(False)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert layer(x).dtype == torch.bfloat16
            assert layer(input=x).shape == (3, 13)
        layer.double()
        with frozen(layer):
            layer(x.double())
        assert always == []

    @pytest.mark.parametrize("make", [torch.nn.Linear, lambda m, n: Conv1D(n, m)], ids=["Linear", "Conv1D"])
    def test_what_does_not_fit_is_refused_as_ever(self, always, make):
        layer = make(11, 13)
        with frozen(layer):
            for x in (torch.randn(3, 10), torch.randn(()), "text", None):
                with pytest.raises((RuntimeError, TypeError, AttributeError, IndexError)):
                    layer(x)
            with pytest.raises(TypeError):
                layer()
        assert always == []

    @pytest.mark.filterwarnings("ignore:.*(beta state|prototype stage)")
    def test_tensors_that_are_not_plain(self, always):
        layer, x = torch.nn.Linear(11, 13).requires_grad_(False), torch.randn(3, 11)
        expected = layer(x)
        with frozen(layer):
            layer(torch.nested.nested_tensor([x, x[:2]]))
            layer.weight = torch.nn.Parameter(layer.weight.to_sparse_csr(), requires_grad=False)
            assert error(layer(x), expected) <= 1e-6
        assert always == []

    def test_a_forward_of_somebody_else_stays(self, always):
        layer, x = torch.nn.Linear(11, 13), torch.randn(3, 11)
        layer.forward = forward = lambda x: x
        with frozen(layer), frozen(layer):
            assert layer(x) is x
        assert layer.forward is forward and always == []

    def test_it_ends_with_the_block(self, always):
        model, x = torch.nn.Sequential(torch.nn.Linear(11, 13)), torch.randn(3, 11)
        with pytest.raises(KeyError), frozen(model):
            with frozen(model[0]):
                model(x)
            model(x)
            raise KeyError
        assert len(always) == 2 and "forward" not in vars(model[0])
        model(x)
        assert len(always) == 2

    def test_a_compiled_model(self, always):
        torch._dynamo.reset()
        layer, x = torch.nn.Linear(11, 13), torch.randn(3, 11)
        compiled, expected = torch.compile(layer, backend="aot_eager", fullgraph=True), layer(x)
        with frozen(layer), torch.no_grad():
            assert error(compiled(x), expected) <= 1e-6
        assert always == []  # what the compiler made of it runs as it is

    @pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5", "bart", "bert"])
    def test_an_edit_is_the_same(self, always, architecture):
        torch.manual_seed(0)
        editor = MendEditor.from_model(make_model(architecture), config=MendConfig(rank=8))
        batch = make_batch(architecture)
        with mendfast.backend("aten"):
            expected = editor.edit_tokens(batch)
        assert always == []
        edit = editor.edit_tokens(batch)
        assert len(always) > 4 * len(editor.layers) / 2
        for name, factor in edit.factors.items():
            assert error(factor.u, expected.factors[name].u) <= 1e-5
            assert error(factor.delta, expected.factors[name].delta) <= 1e-5

    @pytest.mark.parametrize("checkpoint_activations", [False, True])
    def test_meta_training_is_the_same(self, always, checkpoint_activations):
        torch.manual_seed(0)
        editor = MendEditor.from_model(make_model("gpt2"), config=MendConfig(rank=8)).train()
        state = {name: value.clone() for name, value in editor.state_dict().items()}
        batches = [make_batch("gpt2", seed=seed) for seed in range(3)]
        results = []
        for name in ("aten", "auto"):
            editor.load_state_dict(state)
            editor.zero_grad()
            with mendfast.backend(name):
                total, _ = meta_loss(editor, *batches, checkpoint_activations=checkpoint_activations)
                total.backward()
            results.append((total, [p.grad.clone() for p in editor.parameters() if p.grad is not None]))
        assert always
        (expected, expected_grads), (total, grads) = results
        assert error(total, expected) <= 1e-5
        for grad, other in zip(grads, expected_grads, strict=True):
            assert error(grad, other) <= 1e-4


@needs_extension
@pytest.mark.parametrize("shape", [(5, 4, 3, 2, 2), (43, 17, 30, 20, 3), (100, 9, 8, 5, 1)])
def test_the_editor_network(always, shape):
    EditorCase(*shape).check(ops.editor_mlp, backend="cpu")
    assert bool(always) is (shape[0] <= few_rows.MOST_ROWS)


def test_the_compiler_had_nothing_to_say(tmp_path):
    if not (ROOT / "setup.py").exists():
        pytest.skip("an installation without its sources")
    setup, info = load_setup(), build_info("cpu")
    if not info["built"] or info["sources"] != setup.fingerprint():
        if "path" not in setup.PLAN["cpu"]:
            pytest.skip(setup.PLAN["cpu"]["reason"])
        pytest.importorskip("ninja", reason="ninja is needed to compile the extension")
        log = setup.compile_cpu(setup.PLAN["cpu"], tmp_path / "_cpu.so", tmp_path / "build")
        info = setup.report(log)
    assert info["warnings"] == []
