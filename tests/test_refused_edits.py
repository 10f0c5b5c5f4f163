"""What MendEditor and Edit refuse, with a sentence, before anything is written."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import CAUSAL, make_batch, make_model
from test_editor import SMALL, state, trained

from mendfast import Edit, MendConfig, MendEditor
from mendfast.choice import find_layers


class TestBadInput:
    def test_layers(self):
        model = make_model("gpt2")
        with pytest.raises(ValueError, match=r"no layer .*c_fcc.weight.*transformer.h.3.mlp.c_fc.weight"):
            find_layers(model, ["transformer.h.3.mlp.c_fcc.weight"])
        with pytest.raises(ValueError, match="LayerNorm, not a matrix"):
            find_layers(model, ["transformer.h.3.ln_1.weight"])

    def test_requests(self, tokenizer):
        model = make_model("gpt2")
        model.resize_token_embeddings(len(tokenizer))
        editor = MendEditor.from_model(model, tokenizer, MendConfig(**SMALL))
        with pytest.raises(ValueError, match="target"):
            editor.edit("What is the capital of France?", "  ")
        with pytest.raises(ValueError, match="64"):
            editor.edit("word " * 80, "Rome")
        with pytest.raises(TypeError, match="target"):
            editor.edit("What is the capital of France?")
        with pytest.raises(ValueError, match="no requests"):
            editor.edit([])

    def test_batches(self):
        model, batch = make_model("gpt2"), make_batch("gpt2")
        editor = MendEditor.from_model(model, None, MendConfig(**SMALL))
        with pytest.raises(ValueError, match="sample 1.*-100"):
            editor.edit_tokens({**batch, "labels": batch["labels"].index_fill(0, torch.tensor([1]), -100)})
        with pytest.raises(ValueError, match="lacks labels"):
            editor.edit_tokens({"input_ids": batch["input_ids"]})
        with pytest.raises(ValueError, match="70 tokens and the model takes 64"):
            editor.edit_tokens({k: v.repeat(1, 10)[:, :70] for k, v in batch.items()})
        with pytest.raises(TypeError, match="no tokenizer"):
            editor.edit("a", "b")

    def test_nan_in_the_model(self):
        model = make_model("gpt2")
        with torch.no_grad():
            model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
        editor = MendEditor.from_model(model, None, MendConfig(**SMALL))
        with pytest.raises(ValueError, match="NaN"):
            editor.edit_tokens(make_batch("gpt2"))

    def test_an_edit_for_another_model(self):
        edit = trained(make_model("gpt2"), "gpt2").edit_tokens(make_batch("gpt2"))
        with pytest.raises(ValueError, match="made for a gpt2 model; this one is a llama"):
            edit.apply_(make_model("llama"))
        wide = copy.deepcopy(make_model("gpt2"))
        for block in wide.transformer.h:
            block.mlp.c_fc.weight = torch.nn.Parameter(torch.zeros(32, 96))
        with pytest.raises(ValueError, match="another model"):
            edit.apply_(wide)

    def test_an_editor_for_another_model(self, tmp_path):
        MendEditor.from_model(make_model("gpt2"), None, MendConfig(**SMALL)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="editor for a gpt2 model; this one is a llama"):
            model = make_model("llama")
            MendEditor.from_pretrained(tmp_path, model)

    def test_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no file"):
            Edit.load(tmp_path / "missing.safetensors")
        (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00")
        with pytest.raises(ValueError, match="no whole safetensors file"):
            Edit.load(tmp_path / "cut.safetensors")
        editor = MendEditor.from_model(make_model("gpt2"), None, MendConfig(**SMALL))
        editor.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="holds mendfast.editor, not a mendfast edit"):
            Edit.load(tmp_path / "editor.safetensors")

    @pytest.mark.parametrize("how", ["meta", "tied", "quantised"])
    def test_weights_that_cannot_be_written(self, how):
        model = make_model("gpt2")
        edit = trained(model, "gpt2").edit_tokens(make_batch("gpt2"))
        mlp = model.transformer.h[3].mlp
        if how == "meta":
            mlp.c_fc.weight = torch.nn.Parameter(mlp.c_fc.weight.to("meta"))
        elif how == "tied":
            model.transformer.h[2].mlp.c_fc.weight = mlp.c_fc.weight
        else:
            mlp.c_fc.weight = torch.nn.Parameter(mlp.c_fc.weight.to(torch.int8), requires_grad=False)
        before = {k: v for k, v in state(model).items() if not v.is_meta}
        with pytest.raises(ValueError, match=f"{how}.*[Aa]ttach"):
            edit.apply_(model)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if k in before)

    @pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
    @pytest.mark.parametrize("norm", [torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.weight_norm])
    def test_a_weight_that_is_made_anew_in_each_pass(self, norm):
        """What is written there would be gone in the next pass, without a word."""
        model, batch = make_model("llama"), make_batch("llama")
        norm(model.model.layers[3].mlp.down_proj)
        edit = MendEditor.from_model(model, None, MendConfig(**SMALL)).edit_tokens(batch)
        with torch.no_grad():
            before = model(**batch).logits
            with pytest.raises(ValueError, match="made anew of other parameters .* attach the edit .* bake them in"):
                edit.apply_(model)
            with edit.attached(model):
                assert (model(**batch).logits - before).abs().max() > 1e-4
            assert torch.equal(model(**batch).logits, before)


def test_only_supported_models():
    assert set(CAUSAL) >= {"gpt2", "gptj", "gpt_neo", "gpt_neox", "opt", "llama", "qwen2", "mistral", "gemma", "phi"}
    with pytest.raises(TypeError, match="no output head"):
        MendEditor.from_model(make_model("gpt2").transformer)
