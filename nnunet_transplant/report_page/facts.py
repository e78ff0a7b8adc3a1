"""A fact of the page, and values of JSON in words."""
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fact:
    name: str
    value: str
    digest: bool = False  # a checksum


def fact(name: str, value: Any) -> Fact:
    return Fact(name, in_words(value))


def in_words(value: Any) -> str:
    if isinstance(value, (list, tuple)) and not any(isinstance(each, (list, dict)) for each in value):
        return ", ".join(map(_plain, value))
    return _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
