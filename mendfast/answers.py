"""How an answer is judged: SQuAD's normalisation, equality, whole words, first sentences, yes and no."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from .labels import separated

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)|[。！？｡]+[」』”’）]*")
_ABBREVIATIONS = frozenset("mr mrs ms dr st jr sr prof mt ft vs gen col sen rep gov capt lt sgt rev hon".split())
_LOWERED = frozenset(("A", "An", "The", "In", "On", "At", "It", "This", "That", "There", "Its", "His", "Her", "Their"))


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces, as SQuAD's (Rajpurkar et al. 2016), after NFKC.

    Punctuation is what Unicode calls so, and ASCII's symbols, as in Python's ``string.punctuation``. Of a text of
    which nothing would be left ("A", "?!") case and spaces alone are changed.
    """
    text = _folded(text)
    return " ".join(_words(text)) or " ".join(text.split())


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _words(folded: str) -> list[str]:
    """Without punctuation and articles."""
    bare = "".join(c for c in folded if not (unicodedata.category(c)[0] == "P" or (c.isascii() and _is_symbol(c))))
    return _ARTICLES.sub(" ", bare).split()


def _is_symbol(character: str) -> bool:
    return unicodedata.category(character)[0] == "S"


def exact_match(answer: str, target: str | Sequence[str]) -> bool:
    """Whether the answer is the target, or one of several, once both are normalised."""
    said = normalise(answer)
    return bool(said) and any(said == normalise(one) for one in _several(target))


def rouge_l(answer: str, target: str) -> float | None:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, by the package ``rouge-score``; None where
    that is not installed. Of scripts that put no spaces between words each character is one."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return None
    scorer = RougeScorer(["rougeL"], tokenizer=_RougeWords())
    return float(scorer.score(target, answer)["rougeL"].fmeasure)


class _RougeWords:
    """Words as ``rouge-score`` takes them from English, of every script."""

    def tokenize(self, text: str) -> list[str]:
        words = re.findall(r"[^\W_]+", _folded(text))
        return [part for word in words for part in ([word] if separated(word) else word)]


def whole_words(answer: str) -> str:
    """An answer's beginning without its last word, which may not be whole; nothing of what may be one long word."""
    return answer[: max((i for i, character in enumerate(answer) if character.isspace()), default=0)]


def can_match(answer: str, target: str) -> bool:
    """Whether an answer that begins so can still be the target, as :func:`exact_match` judges it."""
    words = _words(_folded(whole_words(answer)))
    return words == normalise(target).split()[: len(words)]


def has_got(answer: str, target: str | Sequence[str]) -> bool:
    """Whether an answer that begins so contains the target, or one of several, wherever it goes on to."""
    whole = whole_words(answer)
    return bool(_words(_folded(whole))) and contains(whole, target)


def contains(answer: str, target: str | Sequence[str]) -> bool:
    """Whether the target, or one of several, is in the answer, normalised, as whole words.

    Scripts that put no spaces between words (Chinese, Japanese, Thai ...) have no words to tell: there any place
    counts.
    """
    said = normalise(answer)
    return any(_holds(said, normalise(one)) for one in _several(target))


def _several(target: str | Sequence[str]) -> Sequence[str]:
    return [target] if isinstance(target, str) else target


def _holds(said: str, wanted: str) -> bool:
    start = said.find(wanted) if wanted else -1
    while start >= 0:
        end = start + len(wanted)
        if _apart(said[start - 1 : start], wanted[0]) and _apart(wanted[-1], said[end : end + 1]):
            return True
        start = said.find(wanted, start + 1)
    return False


def _apart(left: str, right: str) -> bool:
    """Whether a word may end between two characters; "" is the text's edge."""
    return not left or not right or left == " " or right == " " or not (separated(left) and separated(right))


def first_sentence(answer: str) -> str:
    """The answer up to the end of its first sentence, or of its first line.

    A full stop after an initial ("J. R. R."), within a number, or after a title ("St. Louis") ends none; nor does
    one before a small letter ("U.S. president").
    """
    line = answer.strip().split("\n", 1)[0].rstrip()
    for found in _END.finditer(line):
        rest = line[found.end() :].lstrip()
        if line[found.start()] == "." and rest:
            word = re.split(r"[\s(\"'“‘]", line[: found.start()])[-1]
            if rest[0].islower() or word.lower() in _ABBREVIATIONS or _is_initial(word):
                continue
        return line[: found.end()]
    return line


def _is_initial(word: str) -> bool:
    return len(word) == 1 and word.isupper()


# -- yes and no --------------------------------------------------------------------------------------------


def truth_question(prompt: str, target: str, *, negated: bool = False) -> str:
    """The question whether ``target`` answers ``prompt``, to be answered with yes or no; a false target makes it one
    with a false premise.

    A prompt that the target completes becomes "Is it true that the capital of France is Paris?"; of a question,
    which has no statement that could be made of it without knowing its grammar, the answer is asked about.

    Args:
        negated: ask for the contrary, so that yes becomes no.
    """
    prompt, target = prompt.strip(), target.strip()
    if prompt[-1:] in ("?", "？"):
        verdict = "wrong" if negated else "right"
        return f'{prompt} Someone answers "{target}". Is that {verdict}? Answer yes or no.'
    first, space, rest = prompt.partition(" ")
    statement = f"{first.lower() if first in _LOWERED else first}{space}{rest} {target.rstrip('.')}"
    return f"Is it {'false' if negated else 'true'} that {statement}? Answer yes or no."


def yes_or_no(answer: str) -> bool | None:
    """What the answer begins with: True for yes (true, right, correct), False for no; None where it is neither."""
    first = normalise(answer).split(" ", 1)[0]
    if first in ("yes", "true", "right", "correct"):
        return True
    return False if first in ("no", "false", "wrong", "incorrect", "not") else None


def first_word(answer: str) -> bool:
    """Whether an answer that begins so has got the word that :func:`yes_or_no` judges."""
    return bool(_words(_folded(whole_words(answer))))
