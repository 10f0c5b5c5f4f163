"""encode_pair and collate on every kind of tokenizer: what is learned, and that it spells the target."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mendfast.labels import collate, encode_pair, encode_prompt, pad_token_id

CORPUS = [
    "What is the capital of France? Paris",
    "Who wrote Hamlet? William Shakespeare",
    "When was the tower built? 1889, by Gustave Eiffel",
    "Which team does Rik Smits play for? Indiana Pacers",
    "The capital of France is Bordeaux, Gironde",
] * 5
PAIRS = [
    ("What is the capital of France?", "Paris"),
    ("Who wrote Hamlet?", "William Shakespeare"),
    ("When was the tower built?", "1889"),
    ("Which team does Rik Smits play for?", "Toronto Raptors"),
    ("The capital of France is", "Bordeaux, Gironde"),
]
SPECIALS = ["<pad>", "<unk>", "<s>", "</s>"]


def byte_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def merging_bpe() -> Tokenizer:
    """Byte-level BPE without a regex split, so that merges run across spaces and the boundary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=310, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    letters = [chr(c) for c in range(33, 127)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    letters = [chr(c) for c in range(33, 127)]
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIALS, unk_token="<unk>", initial_alphabet=letters,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


KINDS = {"byte_bpe": byte_bpe, "merging_bpe": merging_bpe, "wordpiece": wordpiece, "unigram": unigram}
TEMPLATES = {"plain": "$A", "bos": "<s> $A", "eos": "$A </s>", "bos_eos": "<s> $A </s>"}
_trained: dict[str, str] = {}


def make_tokenizer(kind: str, template: str = "plain", side: str = "right") -> PreTrainedTokenizerFast:
    if kind not in _trained:
        _trained[kind] = KINDS[kind]().to_str()
    tokenizer = Tokenizer.from_str(_trained[kind])
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    if template != "plain":
        special = processors.TemplateProcessing(single=TEMPLATES[template], special_tokens=ids)
        tokenizer.post_processor = special
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        padding_side=side, truncation_side=side, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def learned(example: dict[str, list[int]]) -> list[int]:
    return [label for label in example["labels"] if label != -100]


every_tokenizer = pytest.mark.parametrize("kind", KINDS)
every_template = pytest.mark.parametrize("template", TEMPLATES)


@every_tokenizer
@every_template
@pytest.mark.parametrize("prompt, target", PAIRS)
def test_the_learned_tokens_spell_the_target(kind, template, prompt, target):
    tokenizer = make_tokenizer(kind, template)
    pair = encode_pair(tokenizer, prompt, target)
    ids, labels = pair["input_ids"], pair["labels"]
    assert len(ids) == len(labels) == len(pair["attention_mask"])
    assert set(pair["attention_mask"]) == {1}
    start = labels.index(next(label for label in labels if label != -100))
    assert labels == [-100] * start + ids[start:]
    bos = [tokenizer.bos_token_id] if "bos" in template else []
    assert ids == bos + tokenizer(f"{prompt} {target}", add_special_tokens=False)["input_ids"]
    spelled = tokenizer.decode(ids[start:], clean_up_tokenization_spaces=False).strip()
    if kind == "merging_bpe":  # a merge across the boundary belongs to the target
        assert spelled.endswith(target)
        assert len(spelled) < len(target) + 12
    elif kind == "wordpiece":  # WordPiece puts spaces around punctuation
        assert spelled.replace(" ", "") == target.replace(" ", "")
    else:
        assert spelled == target
        before = tokenizer.decode(ids[:start], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert before.strip() == prompt


@every_tokenizer
@every_template
def test_exactly_one_bos_and_eos(kind, template):
    tokenizer = make_tokenizer(kind, template)
    with_eos = encode_pair(tokenizer, *PAIRS[0], append_eos=True)
    without = encode_pair(tokenizer, *PAIRS[0])
    assert with_eos["input_ids"] == without["input_ids"] + [tokenizer.eos_token_id]
    assert with_eos["labels"] == without["labels"] + [tokenizer.eos_token_id]
    assert with_eos["input_ids"].count(tokenizer.eos_token_id) == 1
    assert with_eos["input_ids"].count(tokenizer.bos_token_id) == ("bos" in template)


def test_a_prompt_that_spells_its_bos_gets_no_second_one():
    tokenizer = make_tokenizer("byte_bpe", "bos")
    spelled = encode_pair(tokenizer, "<s>" + PAIRS[0][0], PAIRS[0][1])
    assert spelled == encode_pair(tokenizer, *PAIRS[0])


def test_a_target_that_spells_its_eos_gets_no_second_one():
    tokenizer = make_tokenizer("byte_bpe")
    spelled = encode_pair(tokenizer, PAIRS[0][0], PAIRS[0][1] + "</s>", append_eos=True)
    assert spelled == encode_pair(tokenizer, *PAIRS[0], append_eos=True)


@every_tokenizer
@every_template
def test_the_tokenizers_padding_side_changes_nothing(kind, template):
    left, right = (make_tokenizer(kind, template, side) for side in ("left", "right"))
    for tokenizer in (left, right):  # settings that a tokenizer.json can carry
        tokenizer.backend_tokenizer.enable_padding(length=40, direction=tokenizer.padding_side)
        tokenizer.backend_tokenizer.enable_truncation(max_length=3)
    fresh = make_tokenizer(kind, template)
    for prompt, target in PAIRS:
        expected = encode_pair(fresh, prompt, target)
        assert encode_pair(left, prompt, target) == expected
        assert encode_pair(right, prompt, target) == expected


def test_a_merge_across_the_boundary_belongs_to_the_target():
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "ab": 3}, [("a", "b")]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert encode_pair(fast, "ca", "bc", separator="") == {
        "input_ids": [2, 3, 2],
        "attention_mask": [1, 1, 1],
        "labels": [-100, 3, 2],
    }


@pytest.mark.parametrize(
    "prompt, target, text",
    [
        ("Q:", "Paris", "Q: Paris"),
        ("Q: ", "Paris", "Q: Paris"),
        ("Q:\n", "Paris", "Q:\nParis"),
        ("Q:", " Paris", "Q: Paris"),
        ("", "Paris Rome", "Paris Rome"),
    ],
)
def test_the_separator_is_never_doubled(prompt, target, text):
    tokenizer = make_tokenizer("byte_bpe")
    assert tokenizer.decode(encode_pair(tokenizer, prompt, target)["input_ids"]) == text


def test_another_separator_is_learned_or_not_as_it_is_tokenised():
    tokenizer = make_tokenizer("byte_bpe")
    pair = encode_pair(tokenizer, "Q", "Paris", separator="\nA: ")
    assert tokenizer.decode(pair["input_ids"]) == "Q\nA: Paris"
    assert tokenizer.decode(learned(pair)) == "\nA: Paris"


words = st.text("abcdefgHIJKLMN0189 .,'?-é中\n", min_size=1, max_size=24).filter(lambda text: text.strip())


@pytest.mark.parametrize("template", ["plain", "bos_eos"])
@settings(max_examples=150, deadline=None)
@given(prompt=words, target=words, side=st.sampled_from(["left", "right"]))
@example(prompt="a ", target="b", side="left")
@example(prompt="é", target="é", side="left")
def test_byte_level_labels_are_lossless(template, prompt, target, side):
    for kind in ("byte_bpe", "merging_bpe"):
        tokenizer = make_tokenizer(kind, template, side)
        pair = encode_pair(tokenizer, prompt, target, append_eos=True)
        separator = "" if prompt[-1].isspace() or target[0].isspace() else " "
        decoded = tokenizer.decode(pair["input_ids"], skip_special_tokens=True)
        assert decoded == prompt + separator + target
        kept = learned(pair)
        assert pair["input_ids"][-len(kept) :] == kept
        spelled = tokenizer.decode(kept, skip_special_tokens=True)
        assert spelled.endswith(target)
        if kind == "byte_bpe" and separator and target[0].isalpha():  # the regex splits words before spaces
            assert spelled == separator + target
        # Everything before the learned part is how the prompt itself is tokenised.
        before = tokenizer.decode(pair["input_ids"][: -len(kept)], skip_special_tokens=True)
        assert prompt.startswith(before)


@settings(max_examples=100, deadline=None)
@given(
    pairs=st.lists(st.tuples(words, words), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    encoder_decoder=st.booleans(),
)
def test_collate_keeps_every_example_under_the_mask(pairs, side, encoder_decoder):
    tokenizer = make_tokenizer("byte_bpe", "eos")
    examples = [encode_pair(tokenizer, p, t, encoder_decoder=encoder_decoder) for p, t in pairs]
    pad = tokenizer.pad_token_id
    batch = collate(examples, pad_token_id=pad, padding_side=side, encoder_decoder=encoder_decoder)
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    for row, pair in enumerate(examples):
        kept = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][kept].tolist() == pair["input_ids"]
        assert (batch["input_ids"][row][~kept] == pad).all()
        assert kept.tolist() == sorted(kept.tolist(), reverse=side == "right")
        labels = batch["labels"][row]
        assert labels[labels != -100].tolist() == learned(pair)
        if encoder_decoder:
            assert labels.tolist()[: len(pair["labels"])] == pair["labels"]
        else:
            assert labels[kept].tolist() == pair["labels"]
            assert (labels[~kept] == -100).all()


def test_collate_sees_which_kind_its_examples_are_for():
    tokenizer = make_tokenizer("unigram", "eos")
    for encoder_decoder in (False, True):
        examples = [encode_pair(tokenizer, *pair, encoder_decoder=encoder_decoder) for pair in PAIRS]
        seen = collate(examples, pad_token_id=0, padding_side="left")
        told = collate(examples, pad_token_id=0, padding_side="left", encoder_decoder=encoder_decoder)
        assert all(torch.equal(seen[name], told[name]) for name in told)
    assert seen["labels"].shape[1] != seen["input_ids"].shape[1]
    assert (seen["labels"][:, 0] != -100).all()


@every_tokenizer
@every_template
def test_encoder_decoder_labels_are_the_targets_own_tokens(kind, template):
    tokenizer = make_tokenizer(kind, template)
    prompt, target = PAIRS[3]
    pair = encode_pair(tokenizer, prompt, target, encoder_decoder=True)
    assert pair["input_ids"] == tokenizer(prompt)["input_ids"]
    assert pair["labels"] == tokenizer(text_target=target)["input_ids"]
    assert pair["attention_mask"] == [1] * len(pair["input_ids"])
    ended = encode_pair(tokenizer, prompt, target, encoder_decoder=True, append_eos=True)["labels"]
    assert ended == pair["labels"] + ([] if "eos" in template else [tokenizer.eos_token_id])


@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_a_target_that_says_nothing_is_refused(encoder_decoder):
    tokenizer = make_tokenizer("wordpiece", "bos_eos")
    for target in ("", "  ", "\n\t"):
        with pytest.raises(ValueError, match="says nothing"):
            encode_pair(tokenizer, "Who?", target, encoder_decoder=encoder_decoder)
    with pytest.raises(ValueError, match="becomes no tokens"):  # BERT's normaliser drops control characters
        encode_pair(tokenizer, "Who?", "\u200b\u200b", encoder_decoder=encoder_decoder)


def test_a_target_longer_than_the_context_is_refused_with_both_numbers():
    tokenizer = make_tokenizer("byte_bpe")
    length = len(encode_pair(tokenizer, *PAIRS[0])["input_ids"])
    assert encode_pair(tokenizer, *PAIRS[0], max_length=length)
    with pytest.raises(ValueError, match=rf"have {length} tokens and the limit is {length - 1}\..*shorten"):
        encode_pair(tokenizer, *PAIRS[0], max_length=length - 1)
    with pytest.raises(ValueError, match=rf"have {length + 1} tokens and the limit is {length}"):
        encode_pair(tokenizer, *PAIRS[0], max_length=length, append_eos=True)
    with pytest.raises(ValueError, match=r"The prompt has \d+ tokens and the limit is 2"):
        encode_pair(tokenizer, *PAIRS[0], encoder_decoder=True, max_length=2)
    with pytest.raises(ValueError, match=r"The target has \d+ tokens and the limit is 2"):
        encode_pair(tokenizer, "1", "Gustave Eiffel of 1889", encoder_decoder=True, max_length=2)


def test_what_is_not_text_is_refused():
    tokenizer = make_tokenizer("byte_bpe")
    with pytest.raises(TypeError, match="The prompt is 3, of type int"):
        encode_pair(tokenizer, 3, "Paris")
    with pytest.raises(TypeError, match="The target is None, of type NoneType"):
        encode_pair(tokenizer, "Who?", None)


def test_nothing_before_a_single_token_is_refused_unless_there_is_a_bos():
    prompt, target = "", "P"
    with pytest.raises(ValueError, match="Nothing comes before"):
        encode_pair(make_tokenizer("byte_bpe"), prompt, target)
    pair = encode_pair(make_tokenizer("byte_bpe", "bos"), prompt, target)
    assert pair["labels"][0] == -100
    assert len(learned(pair)) == 1


def test_append_eos_needs_an_eos():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(KINDS["byte_bpe"]().to_str()))
    with pytest.raises(ValueError, match="append_eos needs an EOS"):
        encode_pair(tokenizer, *PAIRS[0], append_eos=True)


def test_the_pad_id_falls_back_without_touching_the_tokenizer():
    tokenizer = make_tokenizer("byte_bpe")
    assert pad_token_id(tokenizer) == tokenizer.pad_token_id
    size = len(tokenizer)
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert pad_token_id(tokenizer) == tokenizer.bos_token_id
    assert len(tokenizer) == size
    assert pad_token_id(object()) == 0


def test_collate_refuses_what_it_can_not_pad():
    with pytest.raises(ValueError, match="no examples"):
        collate([], pad_token_id=0)
    pair = {"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [-100, 6]}
    with pytest.raises(ValueError, match="padding_side is 'middle'"):
        collate([pair], pad_token_id=0, padding_side="middle")
    with pytest.raises(ValueError, match="lengths within example 1 do not agree"):
        collate([pair, {**pair, "attention_mask": [1]}], pad_token_id=0)


@pytest.mark.parametrize(("prompt", "target"), PAIRS)
def test_a_prompt_alone_is_what_comes_before_its_target(prompt, target):
    """With BOS, without EOS, on a tokenizer that adds both."""
    tokenizer = make_tokenizer("byte_bpe", "bos_eos")
    ids, labels = (encode_pair(tokenizer, prompt, target)[key] for key in ("input_ids", "labels"))
    assert encode_prompt(tokenizer, prompt) == ids[: labels.count(-100)]
    assert encode_prompt(tokenizer, prompt, encoder_decoder=True) == tokenizer(prompt)["input_ids"]


def test_an_empty_tokenizer_is_named_and_not_the_target():
    """What AutoTokenizer makes of a folder whose tokenizer files are missing."""
    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="</s>")
    with pytest.raises(ValueError, match="makes no tokens of any text: its files.*are missing or empty"):
        encode_pair(empty, *PAIRS[0])


@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_half_a_surrogate_pair_is_named(encoder_decoder):
    tokenizer = make_tokenizer("byte_bpe")
    for pair in (("Who?", "a \ud800"), ("\udfff?", "Paris")):
        with pytest.raises(ValueError, match="half a surrogate pair"):
            encode_pair(tokenizer, *pair, encoder_decoder=encoder_decoder)
    with pytest.raises(ValueError, match="half a surrogate pair"):
        encode_prompt(tokenizer, "\ud800", encoder_decoder=encoder_decoder)


class SplitsOtherwise:
    """As tokenizers do that put a space before a text, but not after a BOS: "ab" is one token alone, two after it."""

    all_special_ids, bos_token_id = [1], 1

    def __call__(self, text, add_special_tokens=True, **options):
        return {"input_ids": [1, 7, 8] if add_special_tokens else [9]}


def test_a_bos_is_kept_where_the_text_is_split_otherwise_after_it():
    assert encode_prompt(SplitsOtherwise(), "ab") == [1, 9]
