"""Paraphrases out of a plain file of questions and answers.

Data sets such as zsRE (Levy et al. 2017) ask for each relation through a few dozen question templates filled
with subjects. So the data itself holds other wordings of most questions, once it is known which templates
ask for the same. Three steps, none of which needs more than the file:

1. Split each question into template and subject. The subject is the span from the first to the last word
   that is written like a name (a capital or a digit), the first word of the question aside; a template
   counts when it occurs with several subjects. Questions that this misses (subjects that end in lower case)
   are matched against the templates so found.
2. Compare templates pairwise: the content words they share, weighted by rarity; whether their answers, and
   their subjects, are of one kind (dates, lower-case words, names; people share given names); the answers
   they have in common; and subjects asked about in both with the same answer.
3. Merge by average linkage down to a threshold that favours precision: a wrong group would teach an editor
   that questions with different answers are one, a missing one costs variety alone.

On top of these, :func:`rewrite` has a handful of rewrites of English questions that keep the meaning.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

SLOT = "{}"
_WORD = re.compile(r"'s\b|[?,](?=\s|$)|[^\s?',]+(?:(?:'(?!s\b)|,(?!\s|$))[^\s?',]*)*|\S")


class Wordings:
    """Templates of questions, in groups that ask for the same relation; made by :func:`mine_wordings`."""

    def __init__(self, groups: Sequence[Sequence[str]], answers: Sequence[Sequence[str]]):
        self.groups = [list(group) for group in groups]
        """Templates with "{}" for the subject; a relation is an index into this list, the largest first."""
        self._choices = [
            list(dict.fromkeys([*group, *(other for template in group for other in rewrite(template))]))
            for group in self.groups
        ]
        self._answers = [list(found) for found in answers]
        self._relation = {template: i for i, group in enumerate(self.groups) for template in group}
        self._constant = {word for template in self._relation for word in template.split()}
        self._by_length = sorted(self._relation, key=lambda template: (-len(template), template))

    def split(self, question: str) -> tuple[str, str] | None:
        """The question's template and subject, or None where no known template fits."""
        question = normalize(question)
        found = name_span(question)
        if found is not None and found[0] in self._relation:
            return found
        for template in self._by_length:
            before, _, after = template.partition(SLOT)
            if question.startswith(before) and question.endswith(after):
                subject = question[len(before) : len(question) - len(after)]
                first = subject.split(" ", 1)[0]
                # "the capital of France" fits "What is {}?" and is no subject.
                if subject == subject.strip() != "" and (is_name(first) or first not in self._constant):
                    return template, subject
        return None

    def relation(self, question: str) -> int | None:
        """Which group's relation the question asks for: an index into :attr:`groups`, or None."""
        found = self.split(question)
        return None if found is None else self._relation[found[0]]

    def answers(self, relation: int) -> list[str]:
        """The distinct answers seen for a relation, the most frequent first."""
        return list(self._answers[relation])

    def rephrasings(self, question: str) -> list[str]:
        """Every other wording of the question: its group's other templates, and the rewrites of all."""
        found = self.split(question)
        if found is None:
            return []
        template, subject = found
        choices = self._choices[self._relation[template]]
        return [other.replace(SLOT, subject) for other in choices if other != template]

    def rephrase(self, question: str, rng: random.Random) -> str | None:
        """One of :meth:`rephrasings`, drawn evenly with ``rng``; None where there is none."""
        choices = self.rephrasings(question)
        return rng.choice(choices) if choices else None


def mine_wordings(
    questions_and_answers: Iterable[tuple[str, str]], *, min_subjects: int = 3, threshold: float = 0.6
) -> Wordings:
    """Find the question templates of a data set and group those that ask for the same relation.

    Args:
        questions_and_answers: (question, answer) pairs; an empty answer is no evidence. Subjects must be
            written with a capital or a digit somewhere, as names are in English.
        min_subjects: how many different subjects make a template.
        threshold: average similarity (0 to about 1.2) down to which groups are merged; higher is stricter.

    Returns:
        The templates in groups; a template that no other is like is a group of its own.

    Raises:
        ValueError: ``min_subjects`` below 2, since one subject can't tell a template from a sentence.
    """
    if min_subjects < 2:
        raise ValueError(f"min_subjects is {min_subjects}; at least 2 are needed to tell what varies.")
    pairs = [(normalize(question), " ".join(answer.split())) for question, answer in questions_and_answers]
    found: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for question, answer in pairs:
        split = name_span(question)
        if split is not None:
            found[split[0]].setdefault(split[1], []).append(answer)
    found = {template: subjects for template, subjects in found.items() if len(subjects) >= min_subjects}
    groups = _merge(_similarity(found), threshold) if found else []
    names = list(found)
    groups.sort(key=lambda group: (-sum(len(found[names[i]]) for i in group), min(group)))
    templates = [[names[i] for i in sorted(group)] for group in groups]
    counts = [Counter() for _ in groups]
    # Questions without a name-like span join only now, through the templates of the others.
    wordings = Wordings(templates, [[] for _ in groups])
    for question, answer in pairs:
        relation = wordings.relation(question)
        if relation is not None and answer:
            counts[relation][answer] += 1
    return Wordings(templates, [[answer for answer, _ in count.most_common()] for count in counts])


def normalize(question: str) -> str:
    """The question with single spaces, and none before its question mark."""
    return " ".join(question.split()).replace(" ?", "?")


def is_name(word: str) -> bool:
    """Whether a word is written like part of a name: with a capital or a digit."""
    return any(letter.isupper() or letter.isdigit() for letter in word)


def name_span(question: str) -> tuple[str, str] | None:
    """(template, subject); the subject runs from the first to the last name-like word after the first."""
    names = [match for match in list(_WORD.finditer(question))[1:] if is_name(match.group())]
    if not names or SLOT in question:
        return None
    start, end = names[0].start(), names[-1].end()
    return question[:start] + SLOT + question[end:], question[start:end]


# -- rewrites --------------------------------------------------------------------------------------

_NOUN = r"(?P<noun>(?!name of\b)[a-z]+(?: (?!of\b|for\b|in\b)[a-z]+){0,2})"
_VERBS = r"is|was|are|were|do|does|did|has|have|had|can|could|will|would"
_PREPOSITION = r"(?P<pre>In|On|At|From|To|For)"
_REWRITES: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    # What is the record label of {}? <-> The record label of {} is what? <-> What is {}'s record label?
    (
        re.compile(rf"(What|Who) (is|was) the {_NOUN} of \{{\}}\?"),
        lambda m: f"The {m['noun']} of {{}} {m[2]} {m[1].lower()}?",
    ),
    (
        re.compile(rf"(What|Who) (is|was) the {_NOUN} of \{{\}}\?"),
        lambda m: f"{m[1]} {m[2]} {{}}'s {m['noun']}?",
    ),
    (
        re.compile(rf"The {_NOUN} of \{{\}} (is|was) (what|who)\?"),
        lambda m: f"{m[3].capitalize()} {m[2]} the {m['noun']} of {{}}?",
    ),
    (
        re.compile(rf"(What|Who) (is|was) \{{\}}'s {_NOUN}\?"),
        lambda m: f"{m[1]} {m[2]} the {m['noun']} of {{}}?",
    ),
    # What is the name of {}'s team? -> What is {}'s team called?
    (
        re.compile(r"What (is|was) the name of (?P<what>(?:the [a-z ]+ (?:of|for) )?\{\}(?:'s [a-z ]+)?)\?"),
        lambda m: f"What {m[1]} {m['what']} called?",
    ),
    # What is the sex of {}? -> What's the sex of {}?
    (
        re.compile(r"(What|Who|When|Where) is (?P<rest>.*)"),
        lambda m: f"{m[1]}'s {m['rest']}",
    ),
    # Which network aired {}? <-> What network aired {}?
    (
        # At the start alone: further in, "which" may be a relative pronoun.
        re.compile(
            rf"((?:In|On|At|From|To|For|Of|By|With|Over) )?(?P<wh>[Ww]hich|[Ww]hat) "
            rf"(?P<rest>(?!(?:{_VERBS}|of|kind|type|sort)\b)[a-z].*)"
        ),
        lambda m: f"{m[1] or ''}{_OTHER[m['wh']]} {m['rest']}",
    ),
    # In what city was {} born? -> What city was {} born in?
    (
        re.compile(rf"{_PREPOSITION} (?P<wh>what|which) (?P<rest>(?!.* (?:in|on|at|from|to|for)\?).*)\?"),
        lambda m: f"{m['wh'].capitalize()} {m['rest']} {m['pre'].lower()}?",
    ),
)
_OTHER = {"which": "what", "what": "which", "Which": "What", "What": "Which"}


def rewrite(template: str) -> list[str]:
    """Other wordings of an English question template, by rules that keep its meaning; [] where none fits."""
    others = []
    for pattern, write in _REWRITES:
        match = pattern.fullmatch(template)
        if match:
            others.append(write(match))
    return [other for other in dict.fromkeys(others) if other != template]


# -- similarity of templates -----------------------------------------------------------------------

# Words that say of what kind the answer is, not which relation is meant; the answers say that better.
_KINDS = frozenset(
    """name named person people one word type kind sort date year day time place city town state location
    """.split()
)
_FUNCTION_WORDS = frozenset(
    """a an the of in on at to for from by with as and or is are was were be been being do does did has have
    had having what which who whom whose when where why how that this these those it its his her their he she
    they there will would can could may might must into over under within during about after before up out
    not no any some than then due called you your main specific associated s""".split()
)
# Irregular forms and plain synonyms of English that no suffix rule joins.
_FORMS = {
    "born": "birth", "die": "death", "died": "death", "dies": "death", "wrote": "write", "written": "write",
    "held": "hold", "made": "make", "built": "build", "fought": "fight", "won": "win", "led": "lead",
    "sang": "sing", "sung": "sing", "spoke": "speak", "spoken": "speak", "broadcasted": "broadcast",
    "taught": "teach", "began": "begin", "begun": "begin", "citizenship": "citizen", "nationality": "nation",
    "national": "nation", "wife": "spouse", "husband": "spouse", "dad": "father", "mom": "mother",
    "mum": "mother", "birthplace": "birth", "tongue": "language", "sex": "gender",
}  # fmt: skip
_SUFFIXES = (
    "ations", "ation", "ators", "ator", "ment", "ions", "ings", "ors", "ers", "ion", "ing", "ies", "ied",
    "or", "er", "ed", "es", "s", "e", "y",
)  # fmt: skip


def _content(template: str) -> Counter[str]:
    words = re.findall(r"[^\W\d_]+", template.replace("'s", " ").lower())
    return Counter({_stem(word): 1 for word in words if word not in _FUNCTION_WORDS})


def _stem(word: str) -> str:
    if word in _FORMS or word in _KINDS:
        return _FORMS.get(word, word)
    for ending in _SUFFIXES:
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word[: -len(ending)]
    return word


def _answer_kind(answer: str) -> str:
    if re.search(r"\d{3,4}$", answer):
        return "date"
    return "common" if answer[0].islower() else f"name of {min(3, len(answer.split()))}"


def _subject_kinds(subjects: Iterable[str], common_first: set[str]) -> Counter[str]:
    kinds: Counter[str] = Counter()
    for subject in subjects:
        words = subject.split()
        kinds[f"words {min(4, len(words))}"] += 1
        if any(word[0].islower() for word in words):
            kinds["lower"] += 1
        if words[0] in common_first:
            kinds["article" if words[0] in ("The", "A", "An") else "given name"] += 2
    return kinds


def _cosines(rows: Sequence[Mapping[str, float]]) -> torch.Tensor:
    """Cosines between sparse rows: [n, n], 0 against an empty row."""
    columns = {key: i for i, key in enumerate(dict.fromkeys(key for row in rows for key in row))}
    matrix = torch.zeros(len(rows), max(1, len(columns)))
    for i, row in enumerate(rows):
        for key, value in row.items():
            matrix[i, columns[key]] = value
    matrix = torch.nn.functional.normalize(matrix, dim=1)
    return (matrix @ matrix.T).clamp(0, 1)


def _similarity(found: Mapping[str, Mapping[str, Sequence[str]]]) -> torch.Tensor:
    """Similarity of each two templates, [n, n]: 0 without a shared content word, about 1 for synonyms."""
    contents = [_content(template) for template in found]
    frequency = Counter(word for words in contents for word in words)
    weights = {word: math.log(1 + len(contents) / n) for word, n in frequency.items()}
    weights.update({word: 0.4 * weights[word] for word in _KINDS & weights.keys()})
    words = _cosines([{word: weights[word] for word in words} for words in contents])

    answers = [Counter(filter(None, itertools.chain(*subjects.values()))) for subjects in found.values()]
    shared = _cosines([{answer: math.sqrt(n) for answer, n in counts.items()} for counts in answers])
    kinds = []
    for counts in answers:
        kinds.append(Counter())
        for answer, n in counts.items():
            kinds[-1][_answer_kind(answer)] += n
    answer_kinds = _cosines(kinds)
    unknown = torch.tensor([not counts for counts in answers])
    answer_kinds[unknown] = answer_kinds[:, unknown] = 1.0

    first = Counter(subject.split()[0] for subjects in found.values() for subject in subjects)
    common_first = {word for word, n in first.items() if n >= 3}
    subject_kinds = _cosines([_subject_kinds(subjects, common_first) for subjects in found.values()])

    total = 0.75 * words * (answer_kinds * subject_kinds).sqrt()
    total = total + 0.25 * shared.sqrt() + 0.1 * _agreements(found)
    return torch.where((words > 0.3) & (answer_kinds > 0.3), total, torch.zeros(()))


def _agreements(found: Mapping[str, Mapping[str, Sequence[str]]]) -> torch.Tensor:
    """How often two templates ask about one subject and get one answer, at most 2: [n, n]."""
    asked = defaultdict(set)
    for i, subjects in enumerate(found.values()):
        for subject, answers in subjects.items():
            for answer in answers:
                if answer:
                    asked[subject, answer].add(i)
    agreed = torch.zeros(len(found), len(found))
    for templates in asked.values():
        index = torch.tensor(sorted(templates))
        agreed[index[:, None], index] += 1
    return agreed.clamp(max=2)


def _merge(similarity: torch.Tensor, threshold: float) -> list[list[int]]:
    """Average linkage: merge the two groups that are most similar on average, while that is >= threshold."""
    similarity = similarity.clone().fill_diagonal_(-1)
    groups = [[i] for i in range(len(similarity))]
    sizes = torch.ones(len(similarity))
    best, partner = similarity.max(1)
    while True:
        i = int(best.argmax())
        if best[i] < threshold:
            return [group for group in groups if group]
        j = int(partner[i])
        row = (similarity[i] * sizes[i] + similarity[j] * sizes[j]) / (sizes[i] + sizes[j])
        row[i] = row[j] = -1
        similarity[i] = similarity[:, i] = row
        similarity[j] = similarity[:, j] = -1
        sizes[i] += sizes[j]
        groups[i], groups[j] = groups[i] + groups[j], []
        # An average never exceeds the larger of its parts, so no other row's best can have risen.
        stale = ((partner == i) | (partner == j)).nonzero().flatten()
        stale = torch.cat([stale, torch.tensor([i, j])])
        best[stale], partner[stale] = similarity[stale].max(1)
