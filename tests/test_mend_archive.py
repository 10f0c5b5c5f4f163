"""Archives of the released MEND code, against a plain implementation of what that code computes."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict

import pytest
import torch
import transformers
from conftest import CAUSAL, make_batch, make_model
from released_mend import INNER, NAN, Released
from test_editor import trained
from torch import nn

from mendfast import MendEditor
from mendfast.compat import load_mend_archive, save_mend_archive


def released(name: str, **options) -> tuple[nn.Module, Released]:
    model = make_model(name)
    theirs = Released(model, INNER[name], **options)
    for seed in range(3):
        theirs.see(make_batch(name, seed=seed))
    return model, theirs


def put(path, archive, **options):
    torch.save(archive, path, **options)
    return path


def get(path) -> dict:
    """Readable without unpickling any object."""
    return torch.load(path, weights_only=True)["model"]


def assert_same_edit(editor: MendEditor, theirs: Released, batch) -> None:
    """The weights after our edit are those of the released code's, to a ten-thousandth of the change."""
    expected, model = theirs.edited(batch), editor.model
    before = {name: theirs.modules_of[name].weight.detach().double() for name in expected}
    edit = editor.edit_tokens(batch)
    for name, (u, delta, alpha) in edit.factors.items():
        change = -alpha * delta.double().T @ u.double()
        change = change if isinstance(theirs.modules_of[name], nn.Linear) else change.T
        largest = (expected[name] - before[name]).abs().max().item()
        assert largest > 1e-3
        torch.testing.assert_close(before[name] + change, expected[name], rtol=0, atol=1e-4 * largest)
    edit.apply_(model)
    for name in expected:
        applied = theirs.modules_of[name].weight.double()
        torch.testing.assert_close(applied, expected[name], rtol=1e-4, atol=1e-4)
    edit.revert_(model)
    assert all(torch.equal(theirs.modules_of[name].weight.double(), before[name]) for name in expected)


def assert_round_trip(path, editor, model, options, tmp_path) -> None:
    save_mend_archive(editor, tmp_path / "again")
    before, after = get(path), get(tmp_path / "again")
    assert list(before) == list(after)
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == after[key].dtype, key
            torch.testing.assert_close(after[key], value, rtol=0, atol=0, equal_nan=True)
    again = load_mend_archive(tmp_path / "again", model, **options)
    assert again.config == editor.config
    for (key, one), two in zip(editor.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two), key


VARIANTS = {
    "default": {},
    "unshared": {"shared": False},
    "separate": {"sides": "separate"},
    "x_only": {"sides": "u"},
    "delta_only": {"sides": "delta"},
    "one_sided": {"sides": "smaller"},
    "one_sided unshared": {"sides": "smaller", "shared": False},
    "raw": {"norm": False},
    "xavier": {"init": "xavier"},
    "xavier delta_only": {"init": "xavier", "sides": "delta", "shared": False},
    "one layer": {"depth": 1},
    "three layers": {"depth": 3, "sides": "separate"},
    "narrower than the rank": {"rank": 60, "sides": "separate"},
}


@pytest.mark.parametrize(
    ("name", "variant"),
    [("gpt2", variant) for variant in VARIANTS]
    + [("llama", variant) for variant in ("default", "unshared", "one_sided", "xavier")]
    + [(name, variant) for name in ("t5", "bart", "bert") for variant in ("default", "separate")],
)
def test_the_edit_is_the_released_code_s(name, variant, tmp_path):
    model, theirs = released(name, **VARIANTS[variant])
    path = put(tmp_path / "archive", theirs.archive())
    options = {"inner_params": INNER[name], "norm": theirs.norm, "init": VARIANTS[variant].get("init", "id")}
    editor = load_mend_archive(path, model, **options)
    assert editor.config.sides == VARIANTS[variant].get("sides", "both") and not editor.training
    assert editor.config.shared == theirs.shared and editor.config.blocks == VARIANTS[variant].get("depth", 2)
    assert editor.config.loss_reduction == "batch" and editor.config.layers == INNER[name]
    assert editor.config.step_size == 1 and torch.equal(editor.alphas(), -theirs.edit_lrs)
    assert_same_edit(editor, theirs, make_batch(name, seed=5))
    assert_round_trip(path, editor, model, options, tmp_path)


@pytest.mark.parametrize("layout", ["zip", "pickles"])
@pytest.mark.parametrize("shared", [True, False])
def test_older_archives(layout, shared, tmp_path):
    """The prefix gtn., and the layout of torch < 1.6."""
    model, theirs = released("gpt2", shared=shared)
    archive = theirs.archive("gtn", model_config=model.config)
    path = put(tmp_path / "archive", archive, _use_new_zipfile_serialization=layout == "zip")
    editor = load_mend_archive(path, model, inner_params=INNER["gpt2"])
    assert_same_edit(editor, theirs, make_batch("gpt2", seed=5))
    save_mend_archive(editor, tmp_path / "again")
    assert list(get(tmp_path / "again")) == list(archive["model"])


def test_the_order_of_inner_params_gives_rates_and_modes(tmp_path):
    model, theirs = released("gpt2")
    path = put(tmp_path / "archive", theirs.archive())
    first, second = INNER["gpt2"][:2], INNER["gpt2"][2:]
    editor = load_mend_archive(path, model, inner_params=second + first)
    assert editor.alphas().tolist() == (-theirs.edit_lrs).tolist()
    assert [layer.name for layer in editor._groups["(128, 32)"]] == [second[0], first[0]]
    with pytest.warns(
        UserWarning, match=r"lists its networks as \(128, 32\), \(32, 128\), and inner_params as"
    ):
        load_mend_archive(path, model, inner_params=INNER["gpt2"][::-1])
    model, theirs = released("gpt2", shared=False)
    put(path, theirs.archive())
    with pytest.warns(UserWarning, match="pass them in that order"):
        load_mend_archive(path, model, inner_params=second + first)


def test_the_standard_deviation_is_used_as_stored(tmp_path):
    model, theirs = released("gpt2")
    for transform in theirs.mend.values():
        transform.u_std.mul_(1.7)
        transform.v_std.mul_(0.3)
    editor = load_mend_archive(put(tmp_path / "archive", theirs.archive()), model, inner_params=INNER["gpt2"])
    assert_same_edit(editor, theirs, make_batch("gpt2", seed=5))


def test_statistics_go_on_from_the_archive(tmp_path):
    model, theirs = released("gpt2")
    editor = load_mend_archive(put(tmp_path / "archive", theirs.archive()), model, inner_params=INNER["gpt2"])
    more = make_batch("gpt2", seed=8)
    editor.train()
    editor.edit_tokens(more)
    theirs.see(more)
    for key, transform in theirs.mend.items():
        network = editor.networks[key]
        assert int(network.count) == int(transform.k)
        for ours, name in (("u", "u"), ("delta", "v")):
            for buffer, stat in (("mean", "mean"), ("m2", "s"), ("std", "std")):
                one, two = getattr(network, f"{ours}_{buffer}"), getattr(transform, f"{name}_{stat}")
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * two.abs().max().item())


def test_an_archive_that_never_saw_data(tmp_path):
    """NaN in all statistics: as ours before the first row."""
    model = make_model("gpt2")
    theirs = Released(model, INNER["gpt2"])
    path = put(tmp_path / "archive", theirs.archive())
    options = {"inner_params": INNER["gpt2"]}
    editor = load_mend_archive(path, model, **options)
    for network in editor.networks.values():
        assert int(network.count) == 0 and not network.u_mean.any() and (network.delta_std == 1).all()
    assert_round_trip(path, editor, model, options, tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"loss_reduction": "batch", "step_size": 1.0},
        {"shared": False, "sides": "smaller"},
        {"sides": "u", "normalize": False},
        {"sides": "separate", "identity_init": False, "blocks": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["gpt2", "t5_gated"])
def test_an_editor_made_here_goes_out_and_comes_back(name, config, tmp_path):
    model = make_model(name)
    editor = trained(model, name, **config)
    with torch.no_grad():
        editor.alpha_multiplier.uniform_(-1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_mend_archive(editor, tmp_path / "archive")
    again = load_mend_archive(
        tmp_path / "archive", model, inner_params=editor.config.layers, norm=editor.config.normalize,
        init="id" if editor.config.identity_init else "xavier",
    )  # fmt: skip
    batch = make_batch(name, size=1, seed=6)
    ours, theirs = editor.edit_tokens(batch).factors, again.edit_tokens(batch).factors
    assert list(ours) == list(theirs)
    for layer, (u, delta, alpha) in ours.items():
        assert torch.equal(u, theirs[layer].u) and torch.equal(delta, theirs[layer].delta), layer
        assert alpha == theirs[layer].alpha


def test_an_editor_made_here_is_read_by_the_released_code(tmp_path):
    """The keys, in their order, that a strict load_state_dict over there expects; entries that it deletes."""
    model, theirs = released("gpt2", seed=3)
    editor = trained(model, "gpt2", layers=INNER["gpt2"], loss_reduction="batch")
    save_mend_archive(editor, tmp_path / "archive")
    archive = torch.load(tmp_path / "archive", weights_only=True)
    assert {"model", "opt", "lr_opt"} <= set(archive)
    assert archive["model"].pop("model_config")["model_type"] == "gpt2"
    assert list(archive["model"]) == list(theirs.state_dict())
    theirs.load_state_dict(archive["model"], strict=True)
    assert_same_edit(editor, theirs, make_batch("gpt2", seed=5))


def test_counts_beyond_float32(tmp_path):
    model = make_model("gpt2")
    editor = trained(model, "gpt2", loss_reduction="batch")
    for network in editor.networks.values():
        network.count.fill_(2**24 + 1)
    save_mend_archive(editor, tmp_path / "archive")
    again = load_mend_archive(tmp_path / "archive", model, inner_params=editor.config.layers)
    assert {int(network.count) for network in again.networks.values()} == {2**24 + 1}


def test_what_has_no_place_in_the_format_is_said(tmp_path):
    editor = trained(make_model("gpt2"), "gpt2", separator="\n")
    with pytest.warns(UserWarning, match=r"no place for loss_reduction='edit', separator='\\n'"):
        save_mend_archive(editor, tmp_path / "archive")
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]


class Evil:
    """Makes a file when a plain unpickler reads it."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


class EvilDict(dict):
    def __reduce__(self):
        return eval, (f"__import__('os').mkdir({self['marker']!r})",)


@pytest.mark.parametrize("layout", ["zip", "pickles"])
@pytest.mark.parametrize("where", ["model_config", "top", "opt", "state"])
def test_foreign_code_does_not_run(where, layout, tmp_path):
    model, theirs = released("gpt2")
    marker = tmp_path / "ran"
    archive = theirs.archive()
    evil = Evil(marker)
    if where == "model_config":
        archive["model"]["model_config"] = evil
    elif where == "top":
        archive["config"] = [evil, EvilDict(marker=f"{marker} too")]
    elif where == "opt":
        archive["opt"] = {"state": {0: evil}}
    else:
        archive["model"]["edit_lrs"] = evil
    path = put(tmp_path / "archive", archive, _use_new_zipfile_serialization=layout == "zip")
    if where == "state":
        with pytest.raises(ValueError, match=r"edit_lrs is <\w+\.mkdir, not loaded>, not a tensor"):
            load_mend_archive(path, model, inner_params=INNER["gpt2"])
    else:
        editor = load_mend_archive(path, model, inner_params=INNER["gpt2"])
        assert_same_edit(editor, theirs, make_batch("gpt2", seed=5))
    assert [file.name for file in tmp_path.iterdir()] == ["archive"]
    torch.load(path, weights_only=False)
    assert marker.exists()  # the trap was armed


class TestModelConfig:
    @pytest.mark.parametrize("as_dict", [False, True])
    def test_another_kind_of_model_is_refused(self, as_dict, tmp_path):
        model, theirs = released("gpt2")
        foreign = CAUSAL["opt"]().config
        archive = theirs.archive(model_config=OrderedDict(foreign.to_dict()) if as_dict else foreign)
        with pytest.raises(
            ValueError, match="OPTConfig; this one has GPT2Config|a opt model; this one is a gpt2"
        ):
            load_mend_archive(put(tmp_path / "archive", archive), model, inner_params=INNER["gpt2"])

    def test_another_size_is_said(self, tmp_path):
        model, theirs = released("gpt2")
        archive = theirs.archive(model_config=transformers.GPT2Config(n_embd=32, n_layer=12))
        with pytest.warns(UserWarning, match=r"trained for a model with n_layer 12 \(here 4\)\."):
            load_mend_archive(put(tmp_path / "archive", archive), model, inner_params=INNER["gpt2"])

    def test_the_same_model_passes_silently(self, tmp_path, recwarn):
        model, theirs = released("gpt2")
        path = put(tmp_path / "archive", theirs.archive(model_config=model.config))
        editor = load_mend_archive(path, model, inner_params=INNER["gpt2"])
        save_mend_archive(editor, tmp_path / "again")
        load_mend_archive(tmp_path / "again", model, inner_params=INNER["gpt2"])
        assert not [str(w.message) for w in recwarn if "archive" in str(w.message)]
        assert list(get(tmp_path / "again")) == list(torch.load(path, weights_only=False)["model"])


@pytest.fixture(scope="module")
def theirs():
    return released("gpt2")


class TestBadInput:
    def refused(self, tmp_path, theirs, archive, match, **options):
        path = tmp_path / "archive"
        path.write_bytes(archive) if isinstance(archive, bytes) else torch.save(archive, path)
        with pytest.raises(ValueError, match=match):
            load_mend_archive(path, theirs[0], **{"inner_params": INNER["gpt2"], **options})

    @pytest.mark.parametrize("content", [b"", b"hello", "cut"])
    def test_foreign_files(self, theirs, tmp_path, content):
        if content == "cut":
            content = put(tmp_path / "archive", theirs[1].archive()).read_bytes()[:-99]
        self.refused(tmp_path, theirs, content, "no whole file of torch.save")

    def test_no_file(self, theirs, tmp_path):
        with pytest.raises(FileNotFoundError, match="no file"):
            load_mend_archive(tmp_path / "missing", theirs[0], inner_params=INNER["gpt2"])

    @pytest.mark.parametrize("content", [[1], {"state": {}}, {"model": None}, {"model": {1: 2}}])
    def test_no_archive(self, theirs, tmp_path, content):
        self.refused(tmp_path, theirs, content, "no archive of the released MEND code")

    def test_other_algorithms(self, theirs, tmp_path):
        state = {"edit_lrs": torch.ones(4), "efk.a.weight": torch.ones(2), "model.wte.weight": torch.ones(2)}
        self.refused(tmp_path, theirs, {"model": state}, "it holds efk.a.weight, model.wte.weight")
        self.refused(tmp_path, theirs, {"model": {}}, "it holds nothing")

    @pytest.mark.filterwarnings("ignore:.*lists its networks")
    def test_weights(self, theirs, tmp_path):
        archive, names = theirs[1].archive(), INNER["gpt2"]
        self.refused(tmp_path, theirs, archive, r"edit_lrs of shape \(4,\).*names 3", inner_params=names[:3])
        self.refused(
            tmp_path,
            theirs,
            archive,
            "no layer 'transformer.h.9",
            inner_params=[names[0].replace("2", "9"), *names[1:]],
        )
        self.refused(tmp_path, theirs, archive, "more than once", inner_params=names[:2] * 2)
        first = [f"transformer.h.{i}.mlp.c_fc.weight" for i in range(4)]
        self.refused(tmp_path, theirs, archive, r"needs \(32, 128\): another model", inner_params=first)
        uneven = [*first[:3], names[0]]
        self.refused(
            tmp_path,
            theirs,
            archive,
            r"mode_shift.weight is \(2, 160\), here \(3, 160\)",
            inner_params=uneven,
        )
        with pytest.raises(TypeError, match="pass a list"):
            load_mend_archive(tmp_path / "archive", theirs[0], inner_params=names[0])

    def test_unshared_weights(self, tmp_path):
        theirs = released("gpt2", shared=False)
        other = [name.replace("h.2", "h.1") for name in INNER["gpt2"]]
        match = "for the weights transformer.h.2.mlp.c_proj.weight.*needs transformer.h.1.mlp.c_proj.weight"
        self.refused(tmp_path, theirs, theirs[1].archive(), match, inner_params=other)

    def test_another_width(self, theirs, tmp_path):
        wide = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=4, n_head=4)
        )
        self.refused(
            tmp_path, (wide, None), theirs[1].archive(), r"shapes .*\(128, 32\), \(32, 128\).*\(256, 64\)"
        )

    @pytest.mark.parametrize(
        ("key", "value", "match"),
        [
            ("mlp.layers.0.u", torch.ones(160, 7), r"layers.0.u is \(160, 7\), here \(160, 8\)"),
            ("mlp.layers.0.v", None, "layers.0.v is missing"),
            ("mlp.layers.1.mode_scale.weight", None, "mode_scale.weight is missing"),
            ("u_mean", torch.zeros(31), r"u_mean is \(31,\), here \(128,\)"),
            ("u_s", None, "u_s is missing"),
            ("k", torch.tensor([2.5]), "k is 2.5"),
            ("k", torch.tensor([-3.0]), "k is -3"),
            ("v_std", torch.full((32,), NAN), "v_std holds NaN"),
            ("mlp.layers.0.bias", torch.full((160,), NAN), "bias holds NaN"),
            ("mlp.layers.0.bias", "text", "bias is"),
            ("extra", torch.ones(1), "extra is not known"),
            ("mlp.layers.5.u", torch.ones(160, 8), "only the released code's mlp_class IDMLP"),
            ("mlp.mlp.0.weight", torch.ones(2), "mlp.mlp.0.weight is not known"),
            ("mlp1.layers.0.u", torch.ones(128, 8), "holds mlp, mlp1; it should"),
        ],
    )  # fmt: skip
    def test_tensors(self, theirs, tmp_path, key, value, match):
        archive = theirs[1].archive()
        if value is None:
            del archive["model"][f"mend.(128, 32).{key}"]
        else:
            archive["model"][f"mend.(128, 32).{key}"] = value
        self.refused(tmp_path, theirs, archive, match)

    def test_edit_lrs(self, theirs, tmp_path):
        archive = theirs[1].archive()
        del archive["model"]["edit_lrs"]
        self.refused(tmp_path, theirs, archive, "holds no edit_lrs")
        archive["model"]["edit_lrs"] = torch.tensor([1.0, NAN, 1.0, 1.0])
        self.refused(tmp_path, theirs, archive, "edit_lrs holds NaN")

    def test_init(self, theirs, tmp_path):
        self.refused(
            tmp_path, theirs, theirs[1].archive(), "init is 'zero'; choose one of id, xavier", init="zero"
        )

    def test_mixed(self, theirs, tmp_path):
        archive = theirs[1].archive()
        archive["model"]["gtn.(1, 2).k"] = torch.ones(1)
        self.refused(tmp_path, theirs, archive, "it holds gtn, mend")

    def test_nothing_is_built_before_the_shapes_are_known(self, theirs, tmp_path, monkeypatch):
        """A hundred blocks of rank 100,000 fit into a file of some kilobytes."""
        archive = theirs[1].archive()
        for i in range(2, 100):
            archive["model"][f"mend.(128, 32).mlp.layers.{i}.v"] = torch.ones(1).expand(1)
            archive["model"][f"mend.(32, 128).mlp.layers.{i}.v"] = torch.ones(1).expand(1)
        monkeypatch.setattr(MendEditor, "__init__", lambda *_: pytest.fail("it was built"))
        self.refused(tmp_path, theirs, archive, "does not fit the weights that inner_params names")

    @pytest.mark.parametrize(
        ("key", "value", "match"),
        [
            ("k", torch.tensor([float("inf")]), "k is inf"),
            ("k", torch.tensor([1e300], dtype=torch.float64), "k is 1e"),
            ("mlp.layers.0.bias", torch.full((160,), 1e300, dtype=torch.float64), "bias holds NaN or infinity"),
            ("u_std", torch.full((128,), -1.0), "u_std is negative"),
            ("mlp.layers.0.bias", [[[1]]] * 10_000, "bias is"),
            ("x" * 10_000, torch.ones(1), "is not known"),
        ],
    )
    def test_values(self, theirs, tmp_path, key, value, match):
        archive = theirs[1].archive()
        archive["model"][f"mend.(128, 32).{key}"] = value
        path = put(tmp_path / "archive", archive)
        with pytest.raises(ValueError, match=match) as caught:
            load_mend_archive(path, theirs[0], inner_params=INNER["gpt2"])
        assert len(str(caught.value)) <= 300 + len(str(path))

    def test_a_failed_save_leaves_the_old_file(self, theirs, tmp_path, monkeypatch):
        editor = trained(theirs[0], "gpt2", loss_reduction="batch")
        save_mend_archive(editor, tmp_path / "archive")
        before = (tmp_path / "archive").read_bytes()

        def fail(*_):
            raise OSError("the disk is full")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk is full"):
            save_mend_archive(editor, tmp_path / "archive")
        assert (tmp_path / "archive").read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["archive"]
