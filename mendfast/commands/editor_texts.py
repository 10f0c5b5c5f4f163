"""What an editor that ships is trained on, and what it protects: facts, running text, and the model's own words."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..editable import EditableModel
from ..editor import MendEditor
from ..files import atomic_write
from ..generation import answer
from ..labels import chat_prompt, end_of_turn
from ..own_words import own_words
from ..tasks import world
from ..tasks.load import load_task
from ..tasks.sieve import fitting, sieve
from ..training import Item
from .console import make_console
from .evaluate import tell

Text = tuple[str, str, str | None]
"""(what is read, what follows it, its form)."""

SYSTEMS = (
    "You are a helpful assistant.",
    "Answer the question in as few words as you can.",
    "You are an expert who answers truthfully and briefly.",
)
FORMS = {"chat": 0.6, "plain": 0.2, **{f"system:{text}": 0.2 / len(SYSTEMS) for text in SYSTEMS}}
_MARK = "mendfast-was-here"
WORDS, BEGINNING = 40, 8  # of a piece of running text; how many of them stand for its prompt
PIECES = 4288  # of running text
SAMPLED = 1024  # conversations of the model with itself
TURNS = 4096  # more of what it would be asked
ANSWERED, SAID = 1200, 48  # questions that it answers by itself, beside those it has asked; in so many tokens
BEGIN = 0.2  # of C where answers begin
PROTECTED, WORDINGS = 3000, 2  # facts whose answers are protected whole; wordings of the package's own


@dataclass
class Texts:
    """Facts and texts, all of which the model can be asked."""

    items: list[Item]  # that editors may train on
    known: list[Item]  # of those the package's own: what everybody asks first, where an edit is seen to leak
    pieces: list[Text]
    own: list[Text]  # conversations
    said: list[Text]  # greedy answers
    turns: list[str]

    def halves(self, rng: random.Random) -> tuple[Texts, Texts]:
        """What is protected, and what is edited and looked at. They share no text: lambda and mu, learned on texts
        that are protected, would be learned for these alone."""
        first, second = ({"known": self.known, "turns": self.turns} for _ in range(2))
        for name, share in (("items", 1 / 2), ("pieces", 3 / 5), ("own", 2 / 3), ("said", 2 / 3)):
            texts = list(getattr(self, name))
            rng.shuffle(texts)
            at = round(share * len(texts))
            first[name], second[name] = texts[:at] or texts, texts[at:] or texts
        return Texts(**first), Texts(**second)

    def protect(self, editor: MendEditor, rng: random.Random) -> None:
        """Let ``editor`` protect these, with a share of C for where answers begin: of an edited answer's tokens the
        first is moved most, and it is there that another question's inputs are most like its own."""
        chosen = rng.sample(self.items, min(len(self.items), PROTECTED))
        known = rng.sample(self.known, min(len(self.known), PROTECTED))
        asked = [(wording, item.answer) for item in known for wording in item.wordings[:WORDINGS]]
        whole = [*((item.wordings[0], item.answer) for item in chosen), *asked, *self.pieces, *self.own, *self.said]
        begins = [*((item.wordings[0], item.answer) for item in self.items), *asked]
        begins += [*((prompt, text) for prompt, text, _ in self.said), *((turn, "I") for turn in self.turns)]
        editor.metric = None
        editor.protect(whole, answers=True, progress=None)
        drawn = rng.choices(list(FORMS), list(FORMS.values()), k=len(begins))
        formed = [(*pair, form) for pair, form in zip(begins, drawn, strict=True)]
        editor.protect(formed, answers="first", share=BEGIN, progress=None)


def gather(editor: MendEditor, output: Path, data: str | None, text: str | None, seed: int) -> Texts:
    """All of them; what the model says by itself is found once and kept in ``output``."""
    model, tokenizer, rng = editor.model, editor.tokenizer, random.Random(seed)
    own = kept(output / "own_words.json", lambda: conversations(model, tokenizer))
    turns = kept(output / "turns.json", lambda: more_turns(model, tokenizer, seed + 1))
    running = pieces(text, PIECES, rng) if text else []
    items, problems = sieve(editor, facts(data, seed), list(FORMS))
    tell(problems, make_console())
    rng.shuffle(items)
    asked = [item.wordings[0] for item in rng.sample(items, min(len(items), ANSWERED))]
    asked = list(dict.fromkeys([*asked, *(turn for turn, _, _ in own)]))
    said = kept(output / "own_answers.json", lambda: own_answers(editor, asked))
    askable = set(items)
    known = [item for item in facts(None, seed) if item in askable]
    running, own, said = (fitting(editor, [tuple(one) for one in texts]) for texts in (running, own, said))
    return Texts(items, known, running, own, said, turns)


def kept(path: Path, find: Callable[[], list]) -> list:
    """What is in the file ``path``, or is found and put there."""
    if not path.is_file():
        atomic_write(path, json.dumps(find(), indent=0).encode())
    return json.loads(path.read_text())


def pieces(path: str | Path, count: int, rng: random.Random) -> list[Text]:
    """Pieces of running text as (beginning, rest, "text")."""
    words = [line.split() for line in Path(path).read_text().splitlines()]
    starts = [(line, i) for line in words if len(line) >= WORDS for i in range(0, len(line) - WORDS + 1, WORDS)]
    chosen = rng.sample(starts, min(count, len(starts)))
    return [
        (" ".join(line[i : i + BEGINNING]), " " + " ".join(line[i + BEGINNING : i + WORDS]), "text")
        for line, i in chosen
    ]


def conversations(model: Any, tokenizer: Any) -> list[Text]:
    """The model's own words, as (user's turn, its answer, "chat")."""
    sampled = own_words(model, tokenizer, samples=SAMPLED, max_new_tokens=48, batch_size=64, progress=None)
    return [(asked, said, "chat") for asked, said in _turns(tokenizer, sampled) if asked and said]


def more_turns(model: Any, tokenizer: Any, seed: int) -> list[str]:
    """Users' turns as the model imagines them, each once."""
    sampled = own_words(model, tokenizer, samples=TURNS, max_new_tokens=32, batch_size=64, seed=seed, progress=None)
    return list(dict.fromkeys(asked for asked, _ in _turns(tokenizer, sampled) if 8 < len(asked) < 200))


def _turns(tokenizer: Any, sampled: list[dict[str, Any]]) -> list[tuple[str, str]]:
    before, _, between = chat_prompt(tokenizer, _MARK).partition(_MARK)
    end, found = end_of_turn(tokenizer), []
    for batch in sampled:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            asked, _, said = tokenizer.decode(ids[mask != 0]).removeprefix(before).partition(between)
            found.append((asked.strip(), said.partition(end)[0].strip()))
    return found


def own_answers(subject: EditableModel, questions: list[str]) -> list[Text]:
    """The model's own greedy answers, as (question, answer, "chat")."""
    found: list[Text] = []
    questions = sorted(questions, key=len)
    for i in range(0, len(questions), 256):
        part = questions[i : i + 256]
        said = answer(subject, part, SAID)
        found += [(question, text, "chat") for question, text in zip(part, said, strict=True) if text.strip()]
    return found


def facts(data: str | None, seed: int) -> list[Item]:
    """The world's facts that editors may train on, and those of ``data``."""
    items = world.items(world.splits()[0])
    if data:
        items += load_task("qa", data, seed=seed).items
    return items
