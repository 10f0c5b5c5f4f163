import importlib

import mpmath
import pytest
import torch
from op_cases import double, error, poisoned, tolerance  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from mendfast import ops, reference
from mendfast.ops.least_squares import _bwd, _fwd, change_by_rows, fewer_by_rows, scales_of, second_moment_matrix
from mendfast.types import Spectrum

MODULE = importlib.import_module("mendfast.ops.least_squares")  # the attribute of this name is the function
pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = {  # T, m, n, k
    "few rows": (4, 13, 9, 13),
    "many rows": (40, 13, 9, 13),
    "as many rows as inputs": (13, 13, 9, 13),
    "one row": (1, 13, 9, 13),
    "one input": (3, 1, 2, 1),
    "one of each": (1, 1, 1, 1),
    "no rows": (0, 13, 9, 13),
    "low rank": (4, 13, 9, 5),
    "low rank, many rows": (40, 13, 9, 5),
    "a multiple of the identity": (4, 13, 9, 0),
    "a multiple of the identity, many rows": (40, 13, 9, 0),
}


def spectrum_of(m, k, seed=0, decay=6.0):
    """Eigenvalues over ``decay`` powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(m, m, dtype=torch.float64, generator=generator))[0]
    values = 10 ** -torch.linspace(0, decay, m, dtype=torch.float64)
    rest = values[k:].mean() if k < m else torch.zeros((), dtype=torch.float64)
    return Spectrum(values[:k].clone(), q[:, :k].contiguous(), rest)


def case(shape, groups=None, dtype=torch.float32, seed=1):
    t, m, n, k = shape
    generator = torch.Generator().manual_seed(seed)
    lead = () if groups is None else (groups,)
    u = torch.randn(*lead, t, m, generator=generator, dtype=torch.float64).to(dtype)
    d = torch.randn(*lead, t, n, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    lam, mu = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1e-2, 20.0))
    return u, d, spectrum_of(m, k), lam, mu


def change(factors):
    """S = -delta^T keys, in float64."""
    keys, delta = factors
    return -delta.double().mT @ keys.double()


@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_matches_the_reference_forward_and_backward(name, groups):
    u, d, spectrum, lam, mu = case(SHAPES[name], groups)
    out = ops.least_squares(u, d, spectrum, lam, mu)
    grads_out = [torch.randn(x.shape, generator=torch.Generator().manual_seed(2)) for x in out]
    expected = reference.least_squares(u.double(), double(d), spectrum, lam, mu)
    for x, ref in zip(out, expected, strict=True):
        assert x.dtype == torch.float32
        assert error(x, ref) <= tolerance(torch.float32, 1)
    exact = [d, lam, mu]
    grads = torch.autograd.grad(out, exact, grads_out)
    refs = torch.autograd.grad(
        reference.least_squares(u.double(), d, spectrum, lam, mu), exact, [grads_out[0].double(), grads_out[1]]
    )
    for g, ref in zip(grads, refs, strict=True):
        # the gradients of lam and mu are sums of terms of both signs
        assert error(g, ref) <= 1e-6


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "no rows"])
def test_both_forms_serve_every_shape(name, by_rows):
    t, m, n, k = SHAPES[name]
    u, d, spectrum, lam, mu = case((t, m, n, k), 2, torch.float64)
    scales, rest = (x.detach() for x in scales_of(spectrum, lam, mu))
    keys, *saved = torch.ops.mendfast.least_squares_fwd(u, spectrum.vectors, scales, rest, by_rows)
    expected, _ = reference.least_squares(u, d, spectrum, lam, mu)
    assert error(keys, expected) <= 1e-11
    grad = torch.randn(keys.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    grads = torch.ops.mendfast.least_squares_bwd(grad, u, spectrum.vectors, scales, rest, *saved, by_rows)
    trace = spectrum.trace()
    d_lam = trace * (grads[0].sum() + grads[1])
    d_mu = (spectrum.values * grads[0]).sum() + spectrum.rest * grads[1]
    for g, ref in zip((d_lam, d_mu), torch.autograd.grad(expected, [lam, mu], grad), strict=True):
        assert error(g, ref) <= 1e-9


def test_the_form_is_chosen_by_counting():
    assert fewer_by_rows(1, 15, 768, 768) and not fewer_by_rows(1, 1875, 768, 768)
    assert fewer_by_rows(1, 1875, 3072, 64)


@pytest.mark.parametrize("name", ["few rows", "many rows", "low rank", "low rank, many rows"])
def test_it_is_the_minimum(name):
    """No small step in any direction lowers sum |S u - d|^2 + tr(S M S^T): its gradient is 0."""
    u, d, spectrum, lam, mu = case(SHAPES[name], dtype=torch.float64)
    s = change(ops.least_squares(u, d, spectrum, lam, mu)).detach().requires_grad_()
    c = spectrum.vectors @ spectrum.values.diag() @ spectrum.vectors.T
    if spectrum.vectors.shape[1] < len(c):
        c = c + spectrum.rest * (torch.eye(len(c)) - spectrum.vectors @ spectrum.vectors.T)
    m = (lam * c.trace() * torch.eye(len(c)) + mu * c).detach()
    loss = (u @ s.T - d.detach()).square().sum() + (s @ m * s).sum()
    (gradient,) = torch.autograd.grad(loss, s)
    assert gradient.norm() <= 1e-9 * (u.norm() * d.norm())


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "no rows"])
@pytest.mark.parametrize("groups", [None, 2])
def test_gradcheck_in_float64(name, groups):
    u, d, spectrum, _, _ = case(SHAPES[name], groups, torch.float64)
    log_lam, log_mu = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (-3.0, 1.0))

    def op(d, log_lam, log_mu):
        return ops.least_squares(u, d, spectrum, log_lam.exp(), log_mu.exp())

    assert torch.autograd.gradcheck(op, [d, log_lam, log_mu])


def exact_change(u, d, spectrum, lam, mu):
    """S = D^T U (M + U^T U)^-1 with 60 digits."""
    mpmath.mp.dps = 60

    def matrix(x):
        return mpmath.matrix(x.detach().double().tolist())

    q, m = matrix(spectrum.vectors), spectrum.vectors.shape[0]
    values = [mpmath.mpf(v) for v in spectrum.values.tolist()]
    metric = q * mpmath.diag([mpmath.mpf(mu) * v for v in values]) * q.T + mpmath.mpf(lam) * sum(values) * mpmath.eye(m)
    u, d = matrix(u), matrix(d)
    s = (d.T * u) * (metric + u.T * u) ** -1
    return torch.tensor([[float(s[i, j]) for j in range(s.cols)] for i in range(s.rows)], dtype=torch.float64)


@pytest.mark.parametrize("rows", [6, 24])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8])
def test_float32_factors_are_right_at_every_condition(rows, condition):
    """Rows that share their direction up to a tenth, and a metric that hardly holds: the condition of B or H.

    The factors are rounded to float32 once. What cancels in -delta^T keys afterwards is bounded by |delta| |keys|.
    """
    m, n, lam, mu = 8, 3, 1e-5, 1e-5
    generator = torch.Generator().manual_seed(0)
    spectrum = spectrum_of(m, m, decay=3.0)
    u = torch.randn(1, m, generator=generator) + 0.1 * torch.randn(rows, m, generator=generator)
    d = torch.randn(rows, n, generator=generator)
    u[-1] = u[0]  # B has the eigenvalue 1
    scales = lam * spectrum.trace() + mu * spectrum.values
    whitened = u.double() @ spectrum.vectors / scales.sqrt()
    scale = condition**0.5 / torch.linalg.matrix_norm(whitened, 2)
    u, whitened = (u * scale).float(), whitened * scale
    assert 0.5 * condition <= torch.linalg.cond(torch.eye(rows) + whitened @ whitened.T) <= 2 * condition
    keys, delta = ops.least_squares(u, d, spectrum, lam, mu)
    expected = exact_change(u, d, spectrum, lam, mu)
    eps = torch.finfo(torch.float32).eps
    found = change((keys, delta))
    assert (found - expected).norm() <= 2 * eps * delta.double().norm() * keys.double().norm()
    # and before the rounding: float64's digits, less the condition's
    keys, delta = ops.least_squares(u.double(), d.double(), spectrum, lam, mu)
    assert error(change((keys, delta)), expected) <= 1e-14 * condition + 1e-13


@pytest.mark.parametrize("name", ["few rows", "many rows", "low rank"])
def test_rows_of_zeros_change_nothing(name):
    u, d, spectrum, lam, mu = case(SHAPES[name], 2)
    keys, delta = ops.least_squares(u, d, spectrum, lam, mu)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(2 * u.shape[1], generator=generator)
    padded_u, padded_d = (torch.cat([x, torch.zeros_like(x)], 1)[:, order] for x in (u, d))
    padded = ops.least_squares(padded_u, padded_d, spectrum, lam, mu)
    assert error(change(padded), change((keys, delta))) <= 1e-6
    zeros = (padded_u == 0).all(-1)
    assert (padded[0][zeros] == 0).all() and torch.isfinite(padded[0]).all()


@pytest.mark.parametrize("name", ["few rows", "many rows", "low rank"])
def test_repeated_rows_are_carried_by_the_metric(name):
    """The same row k times is one row that weighs k times as much."""
    u, d, spectrum, lam, mu = case(SHAPES[name])
    repeated = change(ops.least_squares(u.repeat(3, 1), d.repeat(3, 1), spectrum, lam, mu))
    weighted = change(ops.least_squares(u.double() * 3**0.5, d.double() * 3**0.5, spectrum, lam, mu))
    assert error(repeated, weighted) <= 1e-6


def test_a_row_that_wants_nothing_holds_still_and_does_not_blow_up():
    u, _, spectrum, lam, mu = case(SHAPES["few rows"])
    new_u, new_delta = torch.randn(4, 13), torch.randn(4, 9)
    new_u[1] -= u[1] * (u[1] @ new_u[1]) / u[1].square().sum()  # u . new_u = 0 up to rounding
    d = ops.wanted_changes(u, new_u, new_delta, torch.tensor(1e-3))
    assert d[1].norm() <= 1e-5 * d.norm()
    s = change(ops.least_squares(u, d, spectrum, lam, mu))
    assert torch.isfinite(s).all()
    assert (s @ u.double().T)[:, 1].norm() <= d.norm()
    one = torch.arange(4) == 1
    assert change(ops.least_squares(u[one], d[one], spectrum, lam, mu)).norm() <= 1e-4 * s.norm()


def test_what_a_row_wants_is_what_its_own_term_does():
    u, new_u, new_delta = torch.randn(5, 13), torch.randn(5, 13), torch.randn(5, 9)
    d = ops.wanted_changes(u, new_u, new_delta, 0.3)
    for i in range(5):
        assert torch.allclose(d[i], -(0.3 * torch.outer(new_delta[i], new_u[i])) @ u[i], atol=1e-5)


@pytest.mark.parametrize("name", ["few rows", "many rows"])
def test_the_order_of_the_rows_plays_no_part(name):
    u, d, spectrum, lam, mu = case(SHAPES[name])
    order = torch.randperm(len(u), generator=torch.Generator().manual_seed(0))
    there = change(ops.least_squares(u, d, spectrum, lam, mu))
    assert error(change(ops.least_squares(u[order], d[order], spectrum, lam, mu)), there) <= 1e-6


@pytest.mark.parametrize("name", ["few rows", "many rows"])
def test_disturbance_stays_below_the_guarantee(name):
    u, d, spectrum, lam, mu = case(SHAPES[name])
    s = change(ops.least_squares(u, d, spectrum, lam, mu)) @ spectrum.vectors
    assert (s.square() * spectrum.values).sum() <= d.double().square().sum() / mu


def test_groups_are_solved_by_themselves():
    u, d, spectrum, lam, mu = case(SHAPES["few rows"], 3)
    together = ops.least_squares(u, d, spectrum, lam, mu)
    for i in range(3):
        alone = ops.least_squares(u[i], d[i], spectrum, lam, mu)
        assert all(error(a[i], b) <= 1e-6 for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("name", ["few rows", "many rows", "low rank, many rows"])
def test_sums_over_the_rows_are_enough(name):
    u, d, spectrum, lam, mu = case(SHAPES[name])
    u64, d64 = u.double(), d.detach().double()
    factors = ops.least_squares_statistics(u64.T @ u64, u64.T @ d64, spectrum, lam, mu)
    assert error(change(factors), change(ops.least_squares(u, d, spectrum, lam, mu))) <= 1e-6


WIDE = {  # T, m, n, k; more rows than outputs, except where none are
    "few rows": (4, 13, 9, 13),
    "between": (11, 23, 5, 23),
    "few outputs": (7, 40, 2, 40),
    "many rows": (60, 23, 5, 23),
    "low rank": (11, 23, 5, 4),
    "low rank, many rows": (60, 23, 5, 4),
    "a multiple of the identity": (11, 23, 5, 0),
}


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("name", WIDE)
def test_the_change_itself_is_that_of_the_factors(name, kept, by_rows, monkeypatch):
    """Rows that are more than the outputs come back as the change, from both forms, with C given or made."""
    monkeypatch.setattr(MODULE, "change_by_rows", lambda *_: by_rows)
    u, d, spectrum, lam, mu = case(WIDE[name])
    dense = (lambda: second_moment_matrix(spectrum)) if kept else None
    keys, delta = ops.least_squares_change(u, d, spectrum, lam, mu, dense=dense)
    assert len(keys) == len(delta) == min(len(u), d.shape[1])
    assert keys.dtype == delta.dtype == torch.float32 and keys.is_contiguous()
    expected = change(reference.least_squares(u.double(), double(d), spectrum, lam, mu))
    assert error(change((keys, delta)), expected) <= tolerance(torch.float32, 1)


@pytest.mark.parametrize("condition", [1e2, 1e8])
@pytest.mark.parametrize("by_rows", [True, False])
def test_the_change_is_rounded_once_at_every_condition(by_rows, condition, monkeypatch):
    monkeypatch.setattr(MODULE, "change_by_rows", lambda *_: by_rows)
    m, n, rows, lam, mu = 8, 3, 6, 1e-5, 1e-5
    spectrum, generator = spectrum_of(m, m, decay=3.0), torch.Generator().manual_seed(0)
    u = torch.randn(1, m, generator=generator) + 0.1 * torch.randn(rows, m, generator=generator)
    d = torch.randn(rows, n, generator=generator)
    whitened = u.double() @ spectrum.vectors / (lam * spectrum.trace() + mu * spectrum.values).sqrt()
    u *= condition**0.5 / torch.linalg.matrix_norm(whitened, 2)
    found = change(ops.least_squares_change(u, d, spectrum, lam, mu))
    expected = exact_change(u, d, spectrum, lam, mu)
    assert error(found, expected) <= torch.finfo(torch.float32).eps + 1e-14 * condition


def test_the_change_s_form_is_chosen_by_counting():
    """A T x T matrix for few rows; for a metric that is kept whole, the m x m one long before rows reach inputs."""
    assert change_by_rows(400, 3072, 300, 3072, True) and not change_by_rows(1875, 3072, 768, 3072, True)
    assert change_by_rows(1875, 3072, 768, 3072, False) and not change_by_rows(6000, 3072, 768, 3072, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows(dtype):
    u, d, spectrum, lam, mu = case(SHAPES["few rows"])
    keys, delta = ops.least_squares(u.to(dtype), d.to(dtype), spectrum, lam, mu)
    exact = ops.least_squares(u.to(dtype).float(), d.to(dtype).float(), spectrum, lam, mu)
    assert keys.dtype == delta.dtype == torch.float32
    assert torch.equal(keys, exact[0]) and torch.equal(delta, exact[1])


def test_autocast_does_not_reach_the_products():
    arguments = case(SHAPES["few rows"])
    expected = ops.least_squares(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(ops.least_squares(*arguments), expected, strict=True))


class Products(TorchDispatchMode):
    """The largest tensor that any operation within makes, and the factorisations."""

    def __init__(self):
        super().__init__()
        self.largest, self.factored = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(word in str(func) for word in ("cholesky_ex", "linalg_cholesky", "eigh", "inv", "lu_")):
            self.factored.append(tuple(args[0].shape))
        for x in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def both_ways(u, spectrum, lam, mu, by_rows):
    """The op's two halves, seen from within: a dispatch mode sees a registered op as one."""
    scales, rest = (x.detach() for x in scales_of(spectrum, lam, mu))
    with Products() as products:
        keys, *saved = _fwd(u.unsqueeze(0), spectrum.vectors, scales, rest, by_rows)
        _bwd(torch.ones_like(keys), u.unsqueeze(0), spectrum.vectors, scales, rest, *saved, by_rows)
    return products


def test_few_rows_make_nothing_of_the_metric_s_size():
    """One T x T factor serves both directions; a low-rank metric of 700 inputs makes no 700 x 700."""
    u, _, spectrum, lam, mu = case((5, 700, 30, 40))
    products = both_ways(u, spectrum, lam, mu, True)
    assert products.largest == 700 * 40 and products.factored == [(1, 5, 5)]


def test_many_rows_make_one_factor():
    u, _, spectrum, lam, mu = case((90, 13, 9, 13))
    assert both_ways(u, spectrum, lam, mu, False).factored == [(1, 13, 13)]


@pytest.mark.parametrize("op", [ops.least_squares, reference.least_squares])
def test_no_groups_and_no_rows(op):
    for groups in (None, 0, 2):
        u, d, spectrum, lam, mu = case(SHAPES["no rows"], groups)
        keys, delta = op(u, d, spectrum, lam, mu)
        assert keys.shape == u.shape and delta.shape == d.shape


@pytest.mark.parametrize("shape", [(4, 6, 3, 6), (4, 6, 3, 2), (9, 3, 2, 3), (9, 3, 2, 1)])
def test_opcheck(shape):
    u, d, spectrum, lam, mu = case(shape, 2)
    scales, rest = (x.detach() for x in scales_of(spectrum, lam, mu))
    for by_rows in (True, False):
        arguments = u, spectrum.vectors, scales, rest
        torch.library.opcheck(torch.ops.mendfast.least_squares_fwd.default, (*arguments, by_rows))
        permuted = u.transpose(0, 1).contiguous().transpose(0, 1), *arguments[1:]
        torch.library.opcheck(torch.ops.mendfast.least_squares_fwd.default, (*permuted, by_rows))
        keys, *saved = torch.ops.mendfast.least_squares_fwd(*arguments, by_rows)
        torch.library.opcheck(torch.ops.mendfast.least_squares_bwd.default, (keys, *arguments, *saved, by_rows))


@pytest.mark.parametrize("name", ["few rows", "many rows"])
def test_compiles_without_a_graph_break(name):
    torch._dynamo.reset()
    u, d, spectrum, _, _ = case(SHAPES[name], 2)
    logs = [torch.tensor(x, requires_grad=True) for x in (-3.0, 1.0)]

    def step(u, d, log_lam, log_mu):
        keys, delta = ops.least_squares(u, d, spectrum, log_lam.exp(), log_mu.exp())
        return (keys.square().sum() + delta.square().sum()).float()

    def run(function):
        loss = function(u, d, *logs)
        return [loss, *torch.autograd.grad(loss, [d, *logs])]

    for a, b in zip(run(step), run(torch.compile(step, fullgraph=True, backend="aot_eager")), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-7)


def bad(i, value):
    arguments = list(case(SHAPES["few rows"]))
    arguments[i] = value
    return arguments


NAN = torch.full((4, 13), float("nan"))
EMPTY = Spectrum(torch.zeros(13).double(), torch.eye(13).double(), torch.zeros(()).double())


def test_the_change_of_bad_rows_is_refused():
    u, d, spectrum, lam, mu = case(WIDE["between"])
    with pytest.raises(ValueError, match="NaN or infinity"):
        ops.least_squares_change(torch.full_like(u, float("inf")), d, spectrum, lam, mu)
    with pytest.raises(ValueError, match="mu is 0.0"):
        ops.least_squares_change(u, d, spectrum, lam, 0.0)


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize(
    "arguments, kind, words",
    [
        (bad(0, NAN), ValueError, "NaN or infinity"),
        (bad(0, NAN.nan_to_num(float("inf"))), ValueError, "NaN or infinity"),
        (bad(0, torch.randn(4, 12)), ValueError, "metric is of 13 inputs"),
        (bad(0, torch.randn(5, 13)), ValueError, r"\[T, m\]"),
        (bad(0, torch.ones(4, 13, dtype=torch.int64)), TypeError, "int64"),
        (bad(2, EMPTY), ValueError, "trace .* is 0.0"),
        (bad(3, 0.0), ValueError, "lam is 0.0"),
        (bad(3, torch.tensor(-1.0)), ValueError, "lam is -1.0"),
        (bad(3, torch.ones(2)), ValueError, "one number"),
        (bad(4, 0.0), ValueError, "mu is 0.0"),
        (bad(4, float("nan")), ValueError, "mu is nan"),
    ],
)
def test_bad_input(arguments, kind, words, backend):
    with pytest.raises(kind, match=words):
        ops.least_squares(*arguments, backend=backend)
