"""The loss under a frozen head on the CPU: the kernel against float64, and logits that are computed when needed."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from conftest import VOCAB, make_batch, make_model
from op_cases import at_threads, error, poisoned, tolerance  # noqa: F401

import mendfast
from mendfast import MendConfig, MendEditor, ops
from mendfast.capture import frozen
from mendfast.objective import target_rows
from mendfast.ops import few_rows, linear_nll, many_rows, widened
from mendfast.ops.linear_nll import Logits, kernel_nll, serves
from mendfast.reference import token_nll_rows
from mendfast.wide import widening

pytestmark = pytest.mark.skipif(few_rows.problem() is not None, reason=f"{few_rows.problem()}")


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FIVE = 5  # rows


@pytest.fixture
def calls(monkeypatch):
    """The rows and the vocabulary of every call of the kernel, which takes heads of any size."""
    found = []

    def counted(x, weight, *others, **options):
        found.append((len(x), len(weight)))
        return kernel_nll(x, weight, *others, **options)

    monkeypatch.setattr(few_rows, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(linear_nll, "kernel_nll", counted)
    return found


def padded(rows, cols, padding, dtype=torch.float32):
    """[rows, cols] with NaN between its rows."""
    whole = torch.full((rows, cols + padding), float("nan"), dtype=dtype)
    return whole[:, :cols].copy_(torch.randn(rows, cols))


def expected(x, weight, bias, labels):
    x = x.double().requires_grad_()
    nll = token_nll_rows(F.linear(x, weight.double(), None if bias is None else bias.double()), labels)
    return nll.detach(), torch.autograd.grad(nll.sum(), x)[0]


def head(vocabulary=30, depth=8, **options):
    return torch.nn.Linear(depth, vocabulary, **options).requires_grad_(False)


@pytest.mark.usefixtures("instructions")
class TestKernel:
    @pytest.mark.usefixtures("poisoned")
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_shapes(self, dtype):
        torch.manual_seed(0)
        draw = random.Random(0)
        for _ in range(120 if dtype == torch.float32 else 40):
            rows, depth = draw.choice([1, 2, 5, 6, 7, 12, 20, 43]), draw.choice([1, 7, 8, 9, 64, 767, 769, 1537])
            vocabulary = draw.choice([1, 2, 15, 16, 17, 63, 65, 1000, 1025, 5000])
            x, weight = padded(rows, depth, draw.choice([0, 3])), padded(vocabulary, depth, draw.choice([0, 5]), dtype)
            weight *= 3 / math.sqrt(depth)
            bias = draw.choice([None, torch.randn(vocabulary).to(dtype)])
            labels = torch.randint(vocabulary, (rows,))
            labels[draw.randrange(rows)] = draw.choice([-100, 0, vocabulary - 1])
            nll, dx = kernel_nll(x, weight, bias, labels, gradient=True)
            exact, exact_dx = expected(x, weight, bias, labels)
            # a loss is the difference of numbers as large as the logits
            size = exact.norm() + F.linear(x, weight.float(), None if bias is None else bias.float()).abs().max()
            bound = tolerance(torch.float32, depth + vocabulary)
            assert (nll - exact).norm() <= bound * size, (rows, vocabulary, depth)
            assert (dx - exact_dx).norm() <= bound * size * (exact_dx.norm() + weight.norm(dim=1).max())
            alone, nothing = kernel_nll(x, weight, bias, labels, gradient=False)
            assert nothing is None and error(alone, nll) <= bound
            wide = kernel_nll(x, weight.float(), None if bias is None else bias.float(), labels, gradient=True)
            assert torch.equal(nll, wide[0]) and torch.equal(dx, wide[1])

    def test_a_row_without_a_stride(self):
        """PyTorch gives a single row any stride, and calls it contiguous."""
        row, weight, labels = torch.randn(30), torch.randn(50, 30), torch.tensor([7])
        x = row.as_strided((1, 30), (0, 1))
        made = [kernel_nll(r, weight, None, labels, gradient=True) for r in (x, row[None])]
        for out, plain in zip(*made, strict=True):
            assert torch.equal(out, plain)

    @pytest.mark.parametrize("rows", [3, 20])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_bits_do_not_depend_on_the_threads(self, rows, dtype):
        x, weight, labels = torch.randn(rows, 100), torch.randn(5000, 100).to(dtype), torch.randint(5000, (rows,))
        out = at_threads(lambda: torch.cat([o.flatten() for o in kernel_nll(x, weight, None, labels, gradient=True)]))
        assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])

    def test_permuted_rows_and_small_integers(self):
        x, weight, labels = torch.randn(9, 4).T, torch.randn(50, 9), torch.randint(50, (8,), dtype=torch.int32)[::2]
        nll, dx = kernel_nll(x, weight, None, labels, gradient=True)
        exact, exact_dx = expected(x, weight, None, labels)
        assert error(nll, exact) <= 1e-5 and error(dx, exact_dx) <= 1e-5

    @pytest.mark.parametrize("largest_first", [False, True])
    def test_huge_and_impossible_logits(self, largest_first):
        # the largest so far changes with every block, or never
        weight = torch.arange(-1500.0, 1500.0)[:, None].repeat(1, 2)
        bias = torch.zeros(3000)
        bias[7], weight[8] = -math.inf, -1e30
        if largest_first:
            weight, bias = weight.flip(0), bias.flip(0)
        x, labels = torch.ones(3, 2), torch.tensor([2999, 0, 1500])
        nll, dx = kernel_nll(x, weight, bias, labels, gradient=True)
        exact, exact_dx = expected(x, weight, bias, labels)
        assert torch.allclose(nll.double(), exact, rtol=1e-6)
        assert (dx - exact_dx).abs().max() <= 1e-6 * 1500  # a difference of rows of the weight

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_not_a_number_stays(self, dtype):
        for poison in (math.nan, math.inf):
            x, weight, labels = torch.randn(3, 40), torch.randn(500, 40).to(dtype), torch.tensor([1, 2, 3])
            x[1, 7] = poison
            nll, dx = kernel_nll(x, weight, None, labels, gradient=True)
            assert nll[1].isnan() and dx[1].isnan().all() and nll[::2].isfinite().all() and dx[::2].isfinite().all()
        weight[400, 0] = math.nan
        nll, dx = kernel_nll(x, weight, None, labels, gradient=True)
        assert nll.isnan().all() and dx.isnan().all()

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"rows": -1}, "rows must not be negative, and vocabulary and depth must be at least 1"),
            ({"vocabulary": 0}, "must be at least 1"),
            ({"depth": 0}, "must be at least 1"),
            ({"threads": 0}, "threads must be at least 1"),
            ({"x_stride": 2}, "a stride is less than its row is long"),
            ({"w_stride": 2}, "a stride is less"),
            ({"kind": "int8"}, "kind is int8; use float32, bfloat16 or float16"),
            ({"w": 0}, "a pointer is null"),
            ({"nll": 0}, "a pointer is null"),
            ({"vocabulary": 3}, "a label is not in the vocabulary"),
        ],
    )
    def test_the_binding_refuses(self, changes, match):
        from mendfast import _cpu

        labels = torch.tensor([0, 3])
        good = {"x": 4096, "x_stride": 3, "w": 4096, "w_stride": 3, "kind": "float32", "bias": 0,
                "labels": labels.data_ptr(), "nll": 4096, "dx": 0, "rows": 2, "vocabulary": 4, "depth": 3,
                "threads": 1}  # fmt: skip
        with pytest.raises(ValueError, match=match):
            _cpu.linear_nll(**{**good, **changes})

    def test_nothing_to_do(self):
        labels = torch.zeros(0, dtype=torch.long)
        nll, dx = kernel_nll(torch.randn(0, 3), torch.randn(4, 3), None, labels, gradient=True)
        assert nll.shape == (0,) and dx.shape == (0, 3)


class TestLogits:
    def logits(self, rows=4, **options):
        layer, x = head(**options), torch.randn(rows, 8, requires_grad=True)
        return layer, x, Logits.of(x, layer)

    def test_the_loss_does_without(self, calls):
        layer, x, logits = self.logits()
        labels = torch.tensor([3, -100, 0, 29])
        nll = ops.token_nll_rows(logits, labels)
        (grad,) = torch.autograd.grad((nll * torch.arange(1.0, 5)).sum(), x)
        assert logits._computed is None and calls == [(4, 30)]
        exact = token_nll_rows(layer(x), labels)
        (exact_grad,) = torch.autograd.grad((exact * torch.arange(1.0, 5)).sum(), x)
        assert error(nll, exact) <= 1e-6 and error(grad, exact_grad) <= 1e-6

    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def test_of_16_bits_the_gradient_alone_is_rounded(self, calls, dtype):
        layer, labels = head().to(dtype), torch.tensor([3, -100, 0, 29])
        x = torch.randn(4, 8).to(dtype).requires_grad_()
        nll = ops.token_nll_rows(Logits.of(x, layer), labels)
        (grad,) = torch.autograd.grad(nll.sum(), x)
        exact, exact_grad = expected(x.detach(), layer.weight, layer.bias, labels)
        assert calls == [(4, 30)] and nll.dtype == torch.float32 and error(nll, exact) <= 1e-6
        assert grad.dtype == dtype and error(grad, exact_grad) <= torch.finfo(dtype).eps

    def test_labels_are_checked(self):
        _, _, logits = self.logits()
        with pytest.raises(ValueError, match="labels go from 0 to 30"):
            ops.token_nll_rows(logits, torch.tensor([0, 1, 2, 30]))
        with pytest.raises(ValueError, match="must have the shape"):
            ops.token_nll_rows(logits, torch.tensor([0, 1]))
        with pytest.raises(TypeError, match="token ids"):
            ops.token_nll_rows(logits, torch.rand(4))

    def test_anything_else_computes_them_once(self):
        layer, x, logits = self.logits()
        assert logits.shape == (4, 30) and logits.dtype == torch.float32 and logits.dim() == 2
        assert logits._computed is None
        whole = layer(x)
        assert torch.equal(logits.argmax(-1), whole.argmax(-1))
        first = logits._computed
        assert torch.equal(torch.cat([logits, logits]), torch.cat([whole, whole]))
        assert logits._computed is first and type(logits * 2) is torch.Tensor
        (grad,) = torch.autograd.grad((logits * 2).sum(), x)
        assert torch.equal(grad, torch.autograd.grad((whole * 2).sum(), x)[0])

    def test_another_backend_takes_them_computed(self, calls):
        layer, x, logits = self.logits()
        labels = torch.tensor([3, 1, 0, 29])
        assert error(ops.token_nll_rows(logits, labels, backend="aten"), token_nll_rows(layer(x), labels)) <= 1e-6
        assert calls == []


class TestServes:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        monkeypatch.setattr(few_rows, "LEAST_WEIGHTS", 1)
        monkeypatch.setattr(widened, "has_units", lambda dtype: True)

    def test_a_frozen_head(self):
        layer = head().requires_grad_(True)
        with frozen(layer):
            assert serves(layer, FIVE)
        assert serves(head(bias=False), FIVE)

    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def test_16_bits_without_units(self, monkeypatch, dtype):
        monkeypatch.setattr(widened, "has_units", lambda dtype: False)
        assert serves(head().to(dtype), FIVE)
        assert not serves(head().to(dtype), few_rows.MOST_ROWS + 1)

    def test_what_it_leaves_alone(self):
        assert not serves(head(), 0)
        assert not serves(head(), few_rows.MOST_ROWS + 1)
        assert not serves(head().requires_grad_(True), FIVE)
        assert not serves(head().double(), FIVE) and not serves(head().bfloat16(), FIVE)
        assert not serves(torch.nn.Sequential(head()), FIVE)
        hooked = head()
        hooked.forward = hooked.forward
        assert not serves(hooked, FIVE)
        with frozen(hooked):
            assert not serves(hooked, FIVE)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not serves(head(), FIVE)

    @pytest.mark.parametrize("name", ["aten", "reference"])
    def test_not_where_another_backend_was_asked_for(self, name):
        with mendfast.backend(name):
            assert not serves(head(), FIVE)


class TestModels:
    @pytest.mark.parametrize("architecture", ["gpt2", "gptj", "llama", "t5", "gpt_neox"])
    @pytest.mark.parametrize("reduction", ["edit", "batch"])
    def test_an_edit_takes_it(self, calls, architecture, reduction):
        torch.manual_seed(0)
        config = MendConfig(rank=8, loss_reduction=reduction)
        editor = MendEditor.from_model(make_model(architecture), config=config)
        batch = make_batch(architecture)
        with mendfast.backend("aten"):
            expected = editor.gradients(batch)
        assert calls == []
        found = editor.gradients(batch)
        assert len(calls) == 1
        for name, (_, delta) in found.items():
            assert error(delta, expected[name][1]) <= 1e-5

    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def test_an_edit_of_a_16_bit_model_takes_it(self, calls, monkeypatch, dtype):
        monkeypatch.setattr(widened, "has_units", lambda dtype: False)
        model, batch = make_model("llama").to(dtype), make_batch("llama")
        editor = MendEditor.from_model(model)
        with widening(model):
            found = editor.gradients(batch)
        assert len(calls) == 1
        model.float()
        for name, (u, delta) in editor.gradients(batch).items():
            assert error(found[name][0], u) <= 1e-5 and error(found[name][1], delta) <= 1e-5

    @pytest.mark.parametrize("architecture", ["bart", "gemma2"])
    def test_a_model_that_does_more_with_its_logits(self, calls, monkeypatch, architecture):
        """BART adds a bias to what its head returns, Gemma 2 caps it: by the kernel for products, forward and back."""
        torch.manual_seed(0)
        if architecture == "bart":
            model, batch = make_model("bart"), make_batch("bart")
            model.final_logits_bias.normal_()
        else:
            sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
            config = hf.Gemma2Config(
                vocab_size=VOCAB, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5, **sizes
            )
            model, batch = hf.Gemma2ForCausalLM(config).eval(), make_batch("llama")
        products, kernel = [], few_rows.kernel_mm
        monkeypatch.setattr(many_rows, "faster", lambda: False)
        monkeypatch.setattr(few_rows, "kernel_mm", lambda x, w, b=None: (products.append(w.shape), kernel(x, w, b))[1])
        editor = MendEditor.from_model(model, config=MendConfig(rank=8))
        with mendfast.backend("aten"):
            expected = editor.gradients(batch)
        found = editor.gradients(batch)
        assert calls == [] and {(32, VOCAB), (VOCAB, 32)} <= set(products)
        for name, (_, delta) in found.items():
            assert error(delta, expected[name][1]) <= 1e-5

    def test_rows_are_not_counted_where_the_head_is_not_served(self):
        """On a GPU that would be one more wait."""
        assert not serves(head(device="meta"), None)

    def test_only_where_the_loss_alone_is_wanted(self, calls):
        model, batch = make_model("gpt2"), make_batch("gpt2")
        with frozen(model), torch.no_grad():
            assert type(target_rows(model, batch).logits) is torch.Tensor
            rows = target_rows(model, batch, for_nll=True)
        assert type(rows.logits) is Logits
        assert error(rows.logits.computed(), target_rows(model, batch).logits) <= 1e-6

    def test_an_edited_head_sees_its_samples(self, calls):
        model = make_model("llama")
        editor = MendEditor.from_model(model, config=MendConfig(rank=8, layers=["lm_head.weight"]))
        u, delta = editor.gradients(make_batch("llama"))["lm_head.weight"]
        assert calls == [] and u.dim() == delta.dim() == 3
