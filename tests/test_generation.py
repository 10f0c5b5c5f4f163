"""Generated answers: batched as one at a time, and ended where the model ends them."""

from __future__ import annotations

import inspect

import pytest
import torch
from conftest import make_model
from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerFast

from mendfast import MendConfig, MendEditor
from mendfast.generation import Answer, agreed, answer, follow, generate_answers
from mendfast.labels import encode_prompt
from mendfast.prompt_keys import PromptKeys

PROMPTS = [
    "What is the capital of France?", "Rome", "Berlin? Madrid? Paris?", "What", "France", "capital of Berlin is the",
    "Madrid Madrid Madrid Madrid",
]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tokenizer) -> PreTrainedTokenizerFast:
    """The common one, with a decoder that gives the text back."""
    bpe = Tokenizer.from_str(tokenizer._tokenizer.to_str())
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")


def editor_of(name, tokenizer, seed=0, **options) -> MendEditor:
    """Random models mostly say the word that they were last told again; one with a head of its own does not."""
    model = make_model(name, seed)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.manual_seed(seed)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(0, 0.5)
    if model.get_output_embeddings() is not None:
        model.set_output_embeddings(torch.nn.Linear(32, len(tokenizer), bias=False).requires_grad_(False))
    return MendEditor.from_model(model, tokenizer, MendConfig(rank=4, step_size=0.5, **options))


def alone(editor, prompt, count, **options) -> list[int]:
    """What plain transformers code generates for one prompt."""
    ids = torch.tensor([encode_prompt(editor.tokenizer, prompt, encoder_decoder=editor.kind != "causal")])
    with torch.no_grad():
        out = editor.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, max_new_tokens=count, **options
        )
    return out[0, ids.shape[1] if editor.kind == "causal" else 1 :].tolist()


@pytest.mark.parametrize("edited", ["plain", "attached", "applied"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
def test_a_batch_is_what_each_is_alone(name, edited, tokenizer, monkeypatch):
    """Prompts of seven lengths, in batches of several sizes, of a model with several end tokens."""
    monkeypatch.setattr("mendfast.generation.BATCH_TOKENS", 150)
    editor = editor_of(name, tokenizer, append_eos=True)
    free = [alone(editor, prompt, 24, eos_token_id=[]) for prompt in PROMPTS]
    ends = [1, free[0][7], free[2][11]]
    editor.model.generation_config.eos_token_id = ends
    editor.model.generation_config.forced_eos_token_id = None
    edit = editor.edit("Rome", "Berlin") if edited != "plain" else None
    unedited = generate_answers(editor, PROMPTS, 24)
    if edited == "applied":
        edit.apply_(editor.model)
    with edit.attached(editor.model) if edited == "attached" else torch.no_grad():
        found = generate_answers(editor, PROMPTS, 24)
        expected = [alone(editor, prompt, 24, eos_token_id=ends) for prompt in PROMPTS]
        assert answer(editor, PROMPTS, 24) == [a.text for a in found]
    assert [list(a.ids) for a in found] == expected
    assert [a.ended for a in found] == [ids[-1] in ends for ids in expected]
    assert [a.text for a in found] == [tokenizer.decode(i, skip_special_tokens=True).strip() for i in expected]
    assert edited != "plain" or len({len(ids) for ids in expected}) > 1
    assert (found != unedited) == (edited != "plain")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_all_begin_with_is_read_once(name, tokenizer, monkeypatch):
    """Each answer is what plain code gives alone, whatever its length and its room."""
    monkeypatch.setattr("mendfast.generation.ROUND", 3)
    monkeypatch.setattr("mendfast.shared_prefix.SHARED", 4)
    editor = editor_of(name, tokenizer, append_eos=True)
    prompts = [f"What is the capital of {rest}" for rest in ("France?", "Rome", "Paris Rome Berlin?", "Madrid? Paris")]
    rooms, widths = [12, 5, 9, 12], []
    free = [alone(editor, prompt, 12, eos_token_id=[]) for prompt in prompts]
    ends = [1, free[0][4]]
    editor.model.generation_config.eos_token_id = ends
    expected = [alone(editor, p, room, eos_token_id=ends) for p, room in zip(prompts, rooms, strict=True)]
    reads = editor.model.forward

    def counted(*args, **options):
        ids = args[0] if args else options["input_ids"]
        widths.append(tuple(ids.shape))
        return reads(*args, **options)

    counted.__signature__ = inspect.signature(reads)
    monkeypatch.setattr(editor.model, "forward", counted)
    found = generate_answers(editor, prompts, rooms)
    assert [list(a.ids) for a in found] == expected
    assert widths[0][0] == 1 and widths[0][1] >= 4 and widths[1][0] == 4
    assert widths[-1][0] < 4, "rows that have ended leave the batch"
    with pytest.raises(ValueError, match=r"max_new_tokens is \[0, 1\]"):
        generate_answers(editor, ["Rome", "Paris"], [0, 1])


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_what_is_known_of_an_answer_changes_nothing(name, tokenizer):
    """Continued from the answers of an unedited model, as far as one pass shows them to be the edited one's too."""
    editor = editor_of(name, tokenizer, append_eos=True)
    before = [a.ids for a in generate_answers(editor, PROMPTS, 12)]
    rows = follow(editor, PROMPTS, before)
    assert torch.equal(rows.logits.argmax(-1), rows.labels)
    assert agreed(rows.labels, rows.labels, rows.sample, len(PROMPTS)) == before
    with editor.edit("Rome", "Berlin").attached(editor.model):
        expected = generate_answers(editor, PROMPTS, 12)
        rows = follow(editor, PROMPTS, before)
        starts = agreed(rows.logits.argmax(-1), rows.labels, rows.sample, len(PROMPTS))
        assert generate_answers(editor, PROMPTS, 12, starts=starts) == expected
    assert [a.ids for a in expected] != before
    for a, start, old in zip(expected, starts, before, strict=True):
        assert a.ids[: len(start)] == start and (start[:-1] == old[: len(start) - 1])
    with pytest.raises(ValueError, match="2 starts for 1 prompts"):
        generate_answers(editor, ["Rome"], starts=[(), ()])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_the_blocks_below_an_edit_make_of_prompts_is_read_once(name, tokenizer, monkeypatch):
    monkeypatch.setattr("mendfast.shared_prefix.SHARED", 2)
    editor = editor_of(name, tokenizer)
    layers = editor.layers[-1:]
    keys, computed = PromptKeys(editor.model, layers, 1 << 20), []
    make = keys._computed
    monkeypatch.setattr(keys, "_computed", lambda prompts: (computed.append(len(prompts)), make(prompts))[1])
    assert keys.blocks
    prompts = [f"What is the capital of {rest}" for rest in ("France?", "Rome", "Paris Rome Berlin?", "Madrid? Paris")]
    for seed in range(2):
        torch.manual_seed(seed)
        with torch.no_grad():
            layers[0].weight.add_(torch.randn_like(layers[0].weight), alpha=0.2)
        plain = generate_answers(editor, prompts, 10)
        starts = [answer.ids[:i] for i, answer in enumerate(plain)]
        assert generate_answers(editor, prompts, 10, starts=starts, keys=keys) == plain
        assert generate_answers(editor, prompts, 10, keys=keys) == plain
    # a token at least is left to be read, which is the prompt's last where nothing has been said
    assert computed == [4, 3, 0, 0]
    assert PromptKeys(editor.model, [], 1 << 20).blocks == []


def test_where_they_part():
    chosen, labels = torch.tensor([5, 6, 7, 8, 9, 4]), torch.tensor([5, 6, 7, 9, 9, 4])
    assert agreed(chosen, labels, torch.tensor([0, 0, 1, 1, 1, 3]), 4) == [(5, 6), (7, 8), (), (4,)]


def ending(editor, *spoken: str) -> list[Answer]:
    """The answers of a model that says these texts, whatever it is asked."""
    model, tokenizer = editor.model, editor.tokenizer
    said = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in spoken]

    def generate(ids, max_new_tokens, **options):
        padded = [(new + [0] * 64)[:max_new_tokens] for new in said]
        return torch.cat([ids, torch.tensor(padded)], dim=1)

    model.generate = generate
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("mendfast.generation.ROUND", 64)  # it says all of it at once
    try:
        return generate_answers(editor, ["Rome"] * len(spoken), 40)
    finally:
        monkeypatch.undo()
        del model.generate


def test_a_base_model_ends_at_a_lines_end(tokenizer):
    """Its line must say something; a sentence's end is none, nor is a line's of a model that is taught an end."""
    texts = ["Paris\nRome", "\n\nParis. It\nis", "Paris<eos>Rome\n", " \n \n", "Paris. Rome"]
    ends = [("Paris", True), ("Paris. It", True), ("Paris", True)]
    found = ending(editor_of("gpt2", tokenizer), *texts)
    assert [a[:2] for a in found[:3]] == ends
    assert found[3][:2] == ("", False) and found[4].text == "Paris. Rome"
    found = ending(editor_of("gpt2", tokenizer, append_eos=True), *texts)
    assert [a[:2] for a in found[2:3]] == ends[2:] and found[0].text == "Paris\nRome" and not found[0].ended


def test_generation_stops_at_a_lines_end(tokenizer):
    """The model isn't run on beyond it, and what it would have said there doesn't show."""
    editor = editor_of("gpt2", tokenizer)
    (newline,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    free = [alone(editor, prompt, 16, eos_token_id=[]) for prompt in PROMPTS]
    third = free[0][3]
    assert third not in free[0][:3]
    with torch.no_grad():  # the newline becomes as likely as that token, and a little likelier
        head = editor.model.get_output_embeddings()
        bias = torch.zeros(len(tokenizer))
        bias[third] = -1e4
    handle = head.register_forward_hook(
        lambda module, args, out: torch.cat(
            [out[..., :newline], out[..., third, None], out[..., newline + 1 :]], -1
        ) + bias
    )  # fmt: skip
    try:
        passes = []
        counting = editor.model.register_forward_hook(lambda *_: passes.append(1))
        (found,) = generate_answers(editor, PROMPTS[:1], 16)
        counting.remove()
        more = []
        counting = editor.model.register_forward_hook(lambda *_: more.append(1))
        again = generate_answers(editor, PROMPTS[:1], 16, starts=[free[0][:2]])
        counting.remove()
    finally:
        handle.remove()
    assert found.ids == (*free[0][:3], newline) and found.ended and len(passes) == 4
    assert again == [found] and len(more) == 2
    assert found.text == tokenizer.decode(free[0][:3], skip_special_tokens=True).strip()


def chatting(tokenizer) -> PreTrainedTokenizerFast:
    bpe = Tokenizer.from_str(tokenizer._tokenizer.to_str())
    copied = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")
    copied.add_special_tokens({"additional_special_tokens": ["<end>", "<|user|>", "<|assistant|>", "<|system|>"]})
    copied.chat_template = TEMPLATE
    return copied


def test_a_chat_ends_with_its_turn(tokenizer):
    tokenizer = chatting(tokenizer)
    editor = editor_of("llama", tokenizer, chat=True)
    assert [a[:2] for a in ending(editor, "Paris\nRome<end>Berlin", "Rome<eos>Paris")] == [
        ("Paris\nRome", True), ("Rome", True),
    ]  # fmt: skip
    forms = {form: answer(editor, PROMPTS, 8, form) for form in (None, "chat", "plain", "system:Rome.")}
    assert forms[None] == forms["chat"] != forms["plain"] != forms["system:Rome."] != forms["chat"]


def test_the_context_is_the_limit(tokenizer):
    """Prompts of 10 to 63 of 64 tokens in one call: each has the room that it would have alone."""
    editor = editor_of("gpt2", tokenizer, append_eos=True)
    prompts = ["a" * count for count in (63, 10, 40, 62, 40, 11, 63)]
    found = generate_answers(editor, prompts, 30)
    assert [len(a.ids) for a in found if not a.ended] == [
        min(30, 64 - len(prompt)) for a, prompt in zip(found, prompts, strict=True) if not a.ended
    ]
    for prompt, a in zip(prompts, found, strict=True):
        assert list(a.ids) == alone(editor, prompt, min(30, 64 - len(prompt)), eos_token_id=[1, 50256])
    with pytest.raises(ValueError, match="The prompt has 64 tokens and the model takes 64; shorten it"):
        generate_answers(editor, ["Rome", "a" * 64])


def test_greedy_whatever_the_model_prefers(tokenizer):
    """A generation_config that samples, penalises and forces an end at the limit changes no answer."""
    editor = editor_of("bart", tokenizer)
    settings = editor.model.generation_config
    settings.forced_eos_token_id = None
    expected = [alone(editor, prompt, 9, eos_token_id=[1, 2]) for prompt in PROMPTS]
    settings.update(do_sample=True, temperature=2.0, repetition_penalty=3.0, no_repeat_ngram_size=1)
    settings.update(forced_eos_token_id=2, min_length=9, num_beams=3)
    assert [list(a.ids) for a in generate_answers(editor, PROMPTS, 9)] == expected


@pytest.mark.parametrize("name", ["bert", "bert_one_logit"])
def test_a_classifier_answers_with_its_label(name, tokenizer):
    editor = editor_of(name, tokenizer)
    found = generate_answers(editor, PROMPTS * 12)
    for prompt, a in zip(PROMPTS, found[-len(PROMPTS) :], strict=True):
        with torch.no_grad():
            logits = editor.model(**tokenizer([prompt], return_tensors="pt")).logits[0]
        labels = editor.model.config.id2label
        label = str(bool(logits[0] > 0)).lower() if len(logits) == 1 else labels[int(logits.argmax())]
        assert a == Answer(label, True, ())
    rows = follow(editor, PROMPTS * 3, [()] * 21)
    assert rows.logits.shape == (21, max(2, editor.model.config.num_labels)) and rows.sample.tolist() == list(range(21))


def test_nothing_asked(tokenizer):
    editor = editor_of("gpt2", tokenizer)
    assert generate_answers(editor, []) == []
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        generate_answers(editor, ["Rome"], 0)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_an_answer_is_cut_where_it_will_do(name, tokenizer):
    """It begins what it would be; the others are whole."""
    editor = editor_of(name, tokenizer, append_eos=True)
    editor.model.generation_config.eos_token_id = None
    prompts = [f"What is the capital of {rest}" for rest in ("France?", "Rome", "Paris Rome Berlin?", "Madrid? Paris")]
    whole = generate_answers(editor, prompts, 20)
    seen = []

    def enough(text):
        seen.append(text)
        return len(text) >= 6

    found = generate_answers(editor, prompts, 20, enough=[None, enough, None, lambda text: True])
    assert [found[0], found[2]] == [whole[0], whole[2]]
    for short, long in zip(found[1::2], whole[1::2], strict=True):
        assert short.ids == long.ids[: len(short.ids)] and len(long.ids) == 20
    assert seen and (len(found[1].ids) < 20) == (name != "t5" and len(whole[1].text) >= 6)
    assert name == "t5" or found[3].ids == ()
