"""What files may say: types, ranges, versions, shapes; every refusal is a sentence of a bounded length.

Whatever is read from a file is data of unknown origin until it went through here: JSON by :func:`parse_json`, fields
of a dataclass by :func:`check_fields`, tensors by :func:`check_tensors`. The texts that sentences quote are cut by
:func:`shown`, since a value may be of any size.
"""

from __future__ import annotations

import json
import math
import numbers
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

MAX_DIGITS = 300
MAX_DEPTH = 100
_JSON_TYPES = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}


def brief(text: Any, most: int = 120) -> str:
    """A text, without its middle where it is longer than ``most``."""
    text = str(text)
    return text if len(text) <= most else f"{text[: most - most // 3 - 5]} ... {text[len(text) - most // 3 :]}"


def shown(value: Any, most: int = 60) -> str:
    """A value as a sentence names it: in at most about ``most`` characters, whatever it is and holds."""
    if isinstance(value, str):
        return brief(ascii(value[:most]) if not is_text(value) else repr(value[: most + 1]), most)
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if value.bit_length() <= 128 else f"an integer of {value.bit_length():,} bits"
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {shape_of(value.shape)}"
    if isinstance(value, (list, tuple)):
        if len(value) <= 4 and all(isinstance(x, (str, int, float, type(None))) for x in value):
            return f"[{', '.join(shown(x, most // 4) for x in value)}]"
        return f"a {type(value).__name__} of {len(value):,}"
    if isinstance(value, Mapping):
        return f"an object of {len(value):,} fields"
    return f"a {brief(type(value).__name__, most)}"


def some(values: Any, most: int = 4) -> str:
    """The first of several names, each cut short, and how many more there are."""
    values = list(values)
    more = f" and {len(values) - most:,} more" if len(values) > most else ""
    return ", ".join(brief(value, 60) for value in values[:most]) + more


# -- JSON ----------------------------------------------------------------------------------------------------


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:  # int() is quadratic in them, and refuses from 4,300 on
        raise ValueError(f"an integer of {len(digits):,} digits; at most {MAX_DIGITS} are read")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in values if names.count(name) > 1)
        raise ValueError(f"the field {shown(twice)} is there twice")
    return values


_STRICT = json.JSONDecoder(parse_int=_integer, object_pairs_hook=_object)


def parse_json(content: str | bytes, what: str) -> Any:
    """JSON in UTF-8; ``what`` it is opens the sentence.

    Raises:
        ValueError: no JSON, no UTF-8, a field twice, integers beyond :data:`MAX_DIGITS`, nested too deeply.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        return _STRICT.decode(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8.") from error
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply to be read; make or fetch it again.") from None
    except ValueError as error:
        raise ValueError(f"{what} is no JSON that can be read: {brief(error)}. Make or fetch it again.") from error


def check_object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {_JSON_TYPES.get(type(value), 'a number')}, {shown(value)}; it must be an object.")
    return value


def check_version(found: Any, newest: int, what: str) -> None:
    """``format_version`` of a file, a number or its digits; None where there is none, as in the oldest files."""
    if isinstance(found, str) and found.isascii() and found.isdigit() and len(found) < 10:
        found = int(found)
    if found is None:
        return
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise ValueError(f"{what} says format_version {shown(found)}; it must be a whole number from 1 to {newest}.")
    if found > newest:
        raise ValueError(
            f"{what} says format_version {shown(found)}, and this mendfast reads up to {newest}: a newer one wrote it; "
            "pip install --upgrade mendfast."
        )


def is_text(value: str) -> bool:
    """Whether a str has a spelling in UTF-8; one with half a surrogate pair has none, and tokenizers fail on it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def not_text(value: str) -> str | None:
    """What keeps a str from being text: half a surrogate pair, a NUL; None where nothing does."""
    if "\0" in value:
        return "holds a NUL character, as text of another encoding does; save it as UTF-8"
    if not is_text(value):
        return "holds half a surrogate pair, which is no character; write it again"
    return None


# -- dataclasses ----------------------------------------------------------------------------------------------


def check_fields(settings: Any) -> None:
    """Hold each field of a dataclass to its annotation and to what its metadata says.

    Annotations: bool, int, float, str, list[...] and ``| None``. Metadata: "least" and "most" (of a number, or of
    each in a list), "choices". Numbers must be finite. A tuple becomes a list where a list is asked for, an int a
    float likewise.

    Raises:
        TypeError, ValueError: names the field, what it is, and what it may be.
    """
    hints = typing.get_type_hints(type(settings))
    for f in fields(settings):
        setattr(settings, f.name, _checked(f.name, getattr(settings, f.name), hints[f.name], f.metadata))


def _checked(name: str, value: Any, hint: Any, rules: Mapping[str, Any]) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if type(None) in options and value is None:
        return None
    options = tuple(option for option in options if option is not type(None))
    if len(options) > 1:  # of several types: the dataclass itself says what is right
        return value
    (hint,) = options
    if typing.get_origin(hint) is list:
        if isinstance(value, str):
            raise TypeError(f"{name} is the string {shown(value)}; pass a list, even of one.")
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} is {shown(value)}; it must be a list.")
        (item,) = typing.get_args(hint)
        return [_checked(f"{name}[{i}]", part, item, rules) for i, part in enumerate(value)]
    if hint is bool:
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {shown(value)}; it must be true or false.")
    elif hint is str:
        if not isinstance(value, str):
            raise TypeError(f"{name} is {shown(value)}; it must be text.")
        if why := not_text(value):
            raise ValueError(f"{name} is {shown(value)}: it {why}.")
        if "choices" in rules and value not in rules["choices"]:
            raise ValueError(f"{name} is {shown(value)}; choose one of {', '.join(rules['choices'])}.")
    elif hint in (int, float):
        value = _number(name, value, hint, rules)
    return value


def _number(name: str, value: Any, kind: type, rules: Mapping[str, Any]) -> Any:
    accepted = numbers.Integral if kind is int else numbers.Real
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise TypeError(f"{name} is {shown(value)}; it must be a {'whole ' if kind is int else ''}number.")
    try:
        value = kind(value)
    except OverflowError:
        raise ValueError(f"{name} is {shown(value)}; it must be a number that a float holds.") from None
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name} is {shown(value)}; it must be finite.")
    if kind is int and value.bit_length() > 128:
        raise ValueError(f"{name} is {shown(value)}; it must be a number of at most 128 bits.")
    least, most = rules.get("least"), rules.get("most")
    if least is not None and value < least:
        raise ValueError(f"{name} is {shown(value)}; it must be at least {least}.")
    if most is not None and value > most:
        raise ValueError(f"{name} is {shown(value)}; it must be at most {most}.")
    return value


# -- tensors --------------------------------------------------------------------------------------------------


def differences(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with names and shapes, a clause for each."""
    return [
        f"{brief(name, 60)} is {shape_of(found[name]) if name in found else 'missing'}, here {shape_of(shape)}"
        for name, shape in expected.items()
        if name not in found or tuple(found[name]) != tuple(shape)
    ] + [f"{brief(name, 60)} is not known here" for name in found if name not in expected]


def shape_of(shape: Any) -> str:
    return brief(tuple(shape), 40) if len(shape) <= 8 else f"of {len(shape)} dimensions"


def check_real(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """A tensor of finite floating-point numbers of 16 bits or more."""
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        raise ValueError(f"{what} is {shown(tensor)}; it must hold floating-point numbers of 16 bits or more.")
    if not tensor.isfinite().all():
        raise ValueError(f"{what} holds NaN or infinity; make it again.")
    return tensor


def check_dtypes(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], what: str) -> None:
    """Each tensor in the kind of number that its place takes: real for real, whole for whole."""
    for name, own in expected.items():
        kinds = [(t.dtype.is_floating_point, t.dtype.is_complex, t.dtype == torch.bool) for t in (found[name], own)]
        if kinds[0] != kinds[1] or found[name].dtype.itemsize < min(2, own.dtype.itemsize):
            raise ValueError(
                f"{what}: {brief(name, 60)} is {shown(found[name])}; it must be "
                f"{str(own.dtype).removeprefix('torch.')}. It is damaged, or another program wrote it."
            )


def check_settings(
    what: str, before: Mapping[str, Any], now: Mapping[str, Any], advice: str, *, named: bool = True
) -> None:
    """A ValueError where something that is gone on with, or taken again, was made with other settings, which are
    ``named``."""
    if changed := [name for name, value in now.items() if before.get(name) != value]:
        names = f" ({some(changed, 8)})" if named else ""
        raise ValueError(f"{what} with other settings{names}; {advice}")
