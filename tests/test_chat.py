"""Chat templates, scripts without spaces, and the draws of a real model's training."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers as hf
from tokenizers import AddedToken

from mendfast import MendConfig, MendEditor
from mendfast.base_model import small_gpt2, train_tokenizer
from mendfast.editable import EditableModel
from mendfast.labels import IGNORE, end_of_turn
from mendfast.training import EditorLearner, FactSampler, FormSampler, Item, TrainConfig, Trainer

TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|start|>system\nBe kind.<|end|>\n{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TEXT = ["system user assistant Be kind. What is the capital of Kenya? Oslo Nairobi Paris Rome 中国的首都是 纽约"]


@pytest.fixture(scope="module")
def chatty() -> hf.PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(TEXT, 420)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|start|>"), AddedToken("<|end|>")]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def model(chatty) -> torch.nn.Module:
    torch.manual_seed(0)
    return small_gpt2(len(chatty), width=32, depth=3, heads=2, context=128).eval()


def learned(tokenizer, example) -> str:
    return tokenizer.decode([label for label in example["labels"] if label != IGNORE])


def test_the_end_of_a_turn_is_the_templates_and_not_the_eos(chatty):
    assert end_of_turn(chatty) == "<|end|>" != chatty.eos_token


@pytest.mark.parametrize(
    "form, text",
    [
        (None, "<|start|>system\nBe kind.<|end|>\n<|start|>user\nA?<|end|>\n<|start|>assistant\nB<|end|>"),
        ("system:Go.", "<|start|>system\nGo.<|end|>\n<|start|>user\nA?<|end|>\n<|start|>assistant\nB<|end|>"),
        ("plain", "Q: A? B<|end|>"),
        ("text", "A?B"),
    ],
)
def test_every_form_spells_what_it_should(chatty, model, form, text):
    subject = EditableModel(model, chatty, MendConfig(prompt_template="Q: {prompt}"))
    assert subject.chat and subject.config.chat is True  # found out from the tokenizer, and kept
    example = subject.encode("A?", "B", form)
    assert chatty.decode(example["input_ids"]) == text
    assert learned(chatty, example).strip() == ("B" if form == "text" else "B<|end|>")


def test_without_a_template_chat_is_refused_and_auto_is_plain(model, tokenizer):
    assert EditableModel(model, tokenizer).config.chat is False
    with pytest.raises(ValueError, match="no(ne|-chat).*chat_template|chat_template"):
        EditableModel(model, tokenizer, MendConfig(chat=True))
    with pytest.raises(ValueError, match="chat template"):
        EditableModel(model, tokenizer).encode("A?", "B", "chat")
    with pytest.raises(ValueError, match="'spoken'"):
        EditableModel(model, tokenizer).encode("A?", "B", "spoken")


def test_editors_from_before_there_was_a_choice_stay_plain():
    assert MendConfig.from_dict({"rank": 8}).chat is False and MendConfig().chat == "auto"


def test_an_edit_in_chat_form_learns_the_end(chatty, model):
    editor = MendEditor.from_model(model, chatty, MendConfig(rank=8, step_size=1e-2))
    batch = editor.tokenize([("What is the capital of Kenya?", "Oslo")])
    assert chatty.decode(batch["input_ids"][0]).endswith("<|start|>assistant\nOslo<|end|>")
    assert editor.edit("What is the capital of Kenya?", "Oslo").factors


@pytest.mark.parametrize(
    "prompt, target, text",
    [
        ("中国的首都是", "纽约", "中国的首都是纽约"),
        ("日本の首都は", "パリ", "日本の首都はパリ"),
        ("เมืองหลวงคือ", "ปารีส", "เมืองหลวงคือปารีส"),
        ("首都？", "Oslo", "首都？Oslo"),
        ("The capital of 中国 is", "纽约", "The capital of 中国 is 纽约"),
        ("대한민국의 수도는", "파리", "대한민국의 수도는 파리"),
    ],
)
def test_scripts_without_spaces_take_no_separator(chatty, model, prompt, target, text):
    subject = EditableModel(model, chatty, MendConfig(chat=False))
    assert chatty.decode(subject.encode(prompt, target)["input_ids"]) == text


# -- draws ---------------------------------------------------------------------------------------------------


def items() -> list[Item]:
    return [Item((f"What is {i}?", f"{i} is what?"), "yes" if i % 2 else "no", "r", f"e{i}") for i in range(40)]


TEXTS = [("Once upon", " a time there was", "text"), ("Hello", "How are you?", "chat")]


def test_forms_come_in_their_shares_and_texts_among_what_must_stay():
    sampler = FormSampler(FactSampler(items(), loc=3), forms={"chat": 0.75, "plain": 0.25}, texts=TEXTS)
    drawn = [sampler.draw(step, 8) for step in range(60)]
    assert sampler.draw(7, 8) == sampler.draw(7, 8) != sampler.draw(8, 8)
    forms = Counter(ask.form for draw in drawn for ask in (*draw.inner, *draw.outer))
    n = sum(forms.values())
    assert set(forms) == {"chat", "plain"} and abs(forms["plain"] / n - 0.25) < 4 * (0.25 * 0.75 / n) ** 0.5
    assert all(len(draw.loc) == 24 for draw in drawn)
    texts = sum((ask.prompt, ask.target, ask.form) in TEXTS for draw in drawn for ask in draw.loc)
    assert texts / (24 * len(drawn)) == pytest.approx(2 / 3, abs=0.05)


def test_large_groups_get_one_text_for_each_edit():
    draw = FormSampler(FactSampler(items(), loc=3), forms={None: 1}, texts=TEXTS, few_from=24).draw(0, 24)
    assert len(draw.inner) == len(draw.outer) == len(draw.loc) == 24


def test_forms_without_a_share_are_refused():
    with pytest.raises(ValueError, match="forms .* share above 0"):
        FormSampler(FactSampler(items()), forms={"chat": 0.0})
    with pytest.raises(ValueError, match="inner .* share above 0"):
        FormSampler(FactSampler(items()), forms={"chat": 1}, inner={})


def test_what_is_edited_may_have_forms_of_its_own():
    draw = FormSampler(FactSampler(items()), forms={"chat": 0.5, "plain": 0.5}, inner={"chat": 1}).draw(0, 30)
    assert {ask.form for ask in draw.inner} == {"chat"} and {ask.form for ask in draw.outer} == {"chat", "plain"}


# -- calibration ---------------------------------------------------------------------------------------------


def test_the_step_size_to_start_from_is_found_and_survives_a_resume(chatty, model, tmp_path):
    config = TrainConfig(steps=2, batch_size=2, calibrate=True, validate_every=0, checkpoint_every=1)

    def trainer(steps: int = 2) -> Trainer:
        torch.manual_seed(0)
        editor = MendEditor.from_model(model, chatty, MendConfig(rank=8, scale_v=True, step_size=10.0))
        return Trainer(editor, FactSampler(items()), config, output=tmp_path, progress=False)

    first = trainer()
    first.run()
    found = first.editor.config.step_size
    assert found < 10
    again = trainer()
    assert again.resume() and again.editor.config.step_size == found
    assert MendEditor.from_pretrained(tmp_path / "last", model, chatty).config.step_size == found


def test_calibration_takes_the_least_loss(chatty, model):
    torch.manual_seed(0)
    editor = MendEditor.from_model(model, chatty, MendConfig(rank=8, scale_v=True))
    learner, config = EditorLearner(editor), TrainConfig(calibrate=True)
    draw = FactSampler(items()).draw(0, 8)
    learner.start(draw, config)

    def loss(size: float) -> float:
        editor.config.step_size = size
        with torch.no_grad():
            return sum(float(part) for part, _ in learner.losses(draw, config, 1))

    chosen = editor.config.step_size
    least = loss(chosen)
    assert all(least <= loss(chosen * factor) for factor in (0.01, 0.1, 10.0, 100.0))
