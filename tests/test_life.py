"""The ten commands of the README's "An edit's life", as they stand there, on a model of a moment's training."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM

from mendfast import Edit, MendConfig, MendEditor
from mendfast.base_model import small_gpt2, train_tokenizer
from mendfast.cli import main
from mendfast.generation import answer
from mendfast.pretrained import load

README = Path(__file__).parents[1] / "README.md"
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CAPITALS = {"Kenya": "Nairobi", "Peru": "Lima", "France": "Paris", "Japan": "Tokyo", "Egypt": "Cairo", "Italy": "Rome",
            "Norway": "Oslo"}  # fmt: skip


def question(country: str) -> str:
    return f"What is the capital of {country}?"


def section() -> str:
    found = re.search(r"^## An edit's life\n(.*?)^## ", README.read_text(), re.MULTILINE | re.DOTALL)
    assert found, "the README has no section of that name"
    return found[1]


def commands() -> list[str]:
    block = re.search(r"```bash\n(.*?)```", section(), re.DOTALL)[1]
    return re.split(r"\n(?=mendfast |python )", block.strip())


def facts() -> list[list[str]]:
    """The lines of the file that the commands read, as the README shows them."""
    block = re.search(r"```text\n(.*?)```", section(), re.DOTALL)[1]
    return [re.split(r"\s{2,}|\t", line.strip()) for line in block.strip().splitlines()]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A chat model that knows seven capitals, and an editor of it, in the place of SmolLM2 and the one that ships."""
    place = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer([f"user assistant {question(c)} {a}" for c, a in CAPITALS.items()], 360)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|start|>"), AddedToken("<|end|>")]})
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    model = small_gpt2(len(tokenizer), width=64, depth=2, heads=2, context=96)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|end|>")
    layers = ["transformer.h.1.mlp.c_proj.weight"]
    editor = MendEditor.from_model(model, tokenizer, MendConfig(layers=layers, rank=1, step_size=1.0))
    batch = editor.tokenize([(question(country), capital) for country, capital in CAPITALS.items()])
    optimizer = torch.optim.Adam(model.train().parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    model.eval()
    # A plain gradient step is an edit if it is long enough.
    wanted = [tuple(fact) for fact in facts()]
    for step in (3.0, 10.0, 30.0, 100.0):
        editor.config.step_size = step
        if all(made(editor, edits) for edits in (wanted, wanted[:1] + wanted[2:], [(question("Kenya"), "Oslo")])):
            break
    else:
        pytest.fail("no step makes the edits")
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    editor.save_pretrained(place / "editor")
    return place


def made(editor: MendEditor, wanted: list[tuple[str, str]]) -> bool:
    with editor.edit(wanted).attached(editor.model):
        return answer(editor, [prompt for prompt, _ in wanted]) == [target for _, target in wanted]


def run(command: str, base: Path) -> int:
    words = shlex.split(command, comments=True)
    if words[0] == "python":
        assert words[1] == "-c" and len(words) == 3
        exec(words[2].replace("'smollm2'", repr(str(base / "model"))), {})
        return 0
    assert words[0] == "mendfast"
    named = [[str(base / "model"), "--editor", str(base / "editor")] if word == "smollm2" else [word] for word in words]
    return main([word for part in named for word in part][1:])


def test_ten_commands(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    edit, see, keep, remove, listing, export, with_peft, save, with_transformers, back = commands()
    Path("facts.tsv").write_text("".join("\t".join(fact) + "\n" for fact in facts()))
    kept, gone = [fact for fact in facts() if fact[0] not in remove], [fact for fact in facts() if fact[0] in remove]
    assert len(kept) == 2 and len(gone) == 1

    def said(command: str) -> str:
        assert run(command, base) == 0, capsys.readouterr().err
        return " ".join(capsys.readouterr().out.split())

    before = (base / "model" / "model.safetensors").read_bytes()
    assert "Nairobi -> Oslo" in said(edit)
    assert "an edit, format 1" in (shown := said(see)) and "-> Oslo" in shown
    assert "holds 3 edits" in said(keep) and "holds 2 edits" in said(remove)
    assert all(fact[1] in said(listing) for fact in kept)
    assert "vllm serve" in said(export)
    has_peft = importlib.util.find_spec("peft") is not None
    if has_peft:
        assert kept[0][1] in said(with_peft)
    assert f"Of {len(kept)} requests the model answers 0% before, 100% after" in said(save)
    assert kept[0][1] in said(with_transformers)
    said(back)
    # what is taken back is what there was, and nothing on the way has touched that
    original, again = (
        AutoModelForCausalLM.from_pretrained(base / "model"),
        AutoModelForCausalLM.from_pretrained("again"),
    )
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), again.parameters(), strict=True))
    assert (base / "model" / "model.safetensors").read_bytes() == before == Path("again/model.safetensors").read_bytes()
    if not has_peft:
        pytest.skip("peft, an optional extra, is missing: the adapter was not loaded; the nine other commands did run")


def test_the_same_life_in_python(base, tmp_path):
    """Applied to one model, and out again bit for bit, as the README's lines below the commands have it."""
    model, tokenizer = load(str(base / "model"))
    editor = MendEditor.from_pretrained(base / "editor", model, tokenizer)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    editor.edit(question("Kenya"), "Oslo").save(tmp_path / "kenya.safetensors")
    edit = Edit.load(tmp_path / "kenya.safetensors").apply_(model)
    assert answer(editor, [question("Kenya")]) == ["Oslo"]
    edit.revert_(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
