"""What edits may be asked for in: pairs, EditRequests, and the dictionaries of EasyEdit and ROME."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .labels import check_text
from .schema import shown, some

FORMS = (
    '("prompt", "target"), EditRequest(prompt, target), {"prompt": ..., "target_new": ...} as EasyEdit has it, or '
    '{"prompt": "{} was born in", "subject": ..., "target_new": {"str": ...}} as ROME has it'
)
_TARGETS = ("target_new", "target")


class EditRequest(NamedTuple):
    """What a model is asked, and what it should answer."""

    prompt: str
    target: str


def as_requests(prompt: Any, target: str | None = None) -> list[EditRequest]:
    """One way or another of saying it -> EditRequests.

    Args:
        prompt: a prompt (then ``target`` is its answer); one request; or any iterable of requests. A request is
            a pair of str, an :class:`EditRequest`, or a dictionary: "prompt" and "target_new" (or "target"), of which
            EasyEdit's further fields ("subject", "ground_truth", ...) play no part; or ROME's, whose prompt has {}
            where the subject stands and whose "target_new" is {"str": ...}, inside "requested_rewrite" or not.

    Raises:
        TypeError, ValueError: names the request by its place, counted from 0, and shows the forms.
    """
    if target is not None:
        if not isinstance(prompt, str):
            raise TypeError(
                f"With a target comes one prompt, a str; got {shown(prompt)}. For several edits pass a list of pairs, "
                "and no target."
            )
        return [_checked(prompt, target, "The request")]
    if isinstance(prompt, str):
        raise TypeError(f"The prompt {shown(prompt)} needs the target: what the model should answer. Pass both.")
    # a pair of str is one request, and a list of two str is two requests that lack their targets
    if isinstance(prompt, (EditRequest, Mapping)) or isinstance(prompt, tuple) and _is_pair(prompt):
        return [_request(prompt, "The request")]
    if not isinstance(prompt, Iterable):
        raise TypeError(f"The requests are {shown(prompt)}; pass a list, each of them as {FORMS}.")
    return [_request(request, f"Request {i}") for i, request in enumerate(prompt)]


def _is_pair(value: tuple | list) -> bool:
    return len(value) == 2 and all(isinstance(part, str) for part in value)


def _request(value: Any, what: str) -> EditRequest:
    if isinstance(value, Mapping):
        return _from_dictionary(value, what)
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{what} is {shown(value)}, of type {type(value).__name__}; pass {FORMS}.")
    if len(value) != 2:
        raise ValueError(f"{what} has {len(value)} parts; a request has two. Pass {FORMS}.")
    return _checked(*value, what)


def _from_dictionary(value: Mapping[str, Any], what: str) -> EditRequest:
    if isinstance(inner := value.get("requested_rewrite"), Mapping):
        value = inner
    found = [name for name in _TARGETS if value.get(name) is not None]
    if "prompt" not in value or not found:
        has = some(map(str, value)) if value else "nothing"
        lacks = "prompt" if "prompt" not in value else "target_new"
        raise ValueError(f"{what} lacks {lacks}; it has {has}. Pass {FORMS}.")
    prompt, target = value["prompt"], value[found[0]]
    if isinstance(target, Mapping):
        if "str" not in target:
            raise ValueError(f'{what}: {found[0]} lacks "str"; it has {some(map(str, target)) or "nothing"}.')
        target = target["str"]
        if isinstance(prompt, str) and "{}" in prompt and not isinstance(value.get("subject"), str):
            raise ValueError(f"{what}: the prompt {shown(prompt)} has a place for the subject, and subject is missing.")
    if isinstance(prompt, str) and isinstance(value.get("subject"), str):
        prompt = prompt.replace("{}", value["subject"])
    return _checked(prompt, target, what)


def _checked(prompt: Any, target: Any, what: str) -> EditRequest:
    for name, text in (("prompt", prompt), ("target", target)):
        try:
            check_text(name, text)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{what}: {error}") from None
    if not target.strip():
        raise ValueError(f"{what}: The target is {target!r}, which says nothing; pass the answer to be learned.")
    return EditRequest(prompt, target)
