"""The edited blocks in bfloat16: close to float32, the rest of a step untouched; refused where it would be slower."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model
from test_editor import same_bits, state, trained
from test_meta import batches, gradients
from test_training import base, facts, make  # noqa: F401  (a fixture)

from mendfast.choice import stacks
from mendfast.training import FactSampler, Trainer, editor_loss
from mendfast.training.cache import PrefixCache
from mendfast.training.precision import check_precision


@pytest.mark.parametrize(("name", "recompute", "cached"), [("gpt2", False, False), ("llama", True, True)])
def test_a_step_is_close(name, recompute, cached):
    """bfloat16 has 8 bits: a product of it is off by some 2^-8, and a loss or gradient is made of many of them."""
    model = make_model(name)
    editor, before = trained(model, name), state(model)
    dtypes: list[list[torch.dtype]] = []
    for block in stacks(model)[0][1]:
        dtypes.append([])
        inside = next(m for m in block.modules() if isinstance(m, torch.nn.Linear) or "Conv1D" in type(m).__name__)
        inside.register_forward_hook(lambda module, args, output, own=dtypes[-1]: own.append(output.dtype))
    results = []
    for precision in ("float32", "bfloat16"):
        editor.zero_grad()
        for own in dtypes:
            own.clear()
        cache = PrefixCache(model, editor.layers, 1 << 30) if cached else None
        options = {"checkpoint_activations": recompute, "cache": cache, "precision": precision}
        total, parts = editor_loss(editor, *batches(name), **options)
        total.backward()
        assert total.dtype == torch.float32 and all(p.grad.dtype == torch.float32 for p in editor.parameters())
        results.append({**gradients(editor), "total": total.detach(), **parts})
        assert set(dtypes[0]) == {torch.float32}  # below the edits
        if precision == "bfloat16":
            assert torch.bfloat16 in dtypes[-1]
    for key in ("total", "l_edit", "l_loc"):
        assert (results[1][key] - results[0][key]).abs() <= 0.05 * results[0][key].abs() + 1e-3, key
    one, other = (torch.cat([v.flatten() for v in found.values() if v.dim()]) for found in results)
    # .995, and of a cached Llama more than .98 on a CPU with AVX2 and .97 by AVX-512's bfloat16 units
    assert torch.cosine_similarity(one, other, dim=0) > 0.95
    assert same_bits(model, before) and all("forward" not in vars(m) for m in model.modules())


def test_refused_where_there_are_no_units(base, monkeypatch):  # noqa: F811
    monkeypatch.setattr("mendfast.training.precision.has_units", lambda device: False)
    editor, config = make(base, precision="bfloat16")
    with pytest.raises(ValueError, match="precision is 'bfloat16', and this cpu has no units for it"):
        Trainer(editor, FactSampler(facts()), config, progress=False)
    check_precision("float32", torch.device("cpu"))
    with pytest.raises(ValueError, match="precision is 'half'; choose one of float32, bfloat16"):
        make(base, precision="half")
