"""What an attention pattern is: a rule that says which keys a query may attend to."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, ClassVar

import torch

# Of the numbers of a pattern: sums and products of two of them are no more than 64 bits hold.
LARGEST = 2**31 - 1
_REGISTRY: dict[int, type["Pattern"]] = {}


@dataclass(frozen=True)
class Pattern(ABC):
    """Which keys each query may attend to, before padding, causality and global tokens are applied.

    A pattern is immutable and hashable. Operators, which take only numbers, carry its `code`.

    Attributes:
        kind: a number made from the name, the same in every process.
        code: the kind, how many numbers follow, and these; `pattern_from_code` reads
            it back, in any process that has imported the class.
    """

    name: ClassVar[str]
    kind: ClassVar[int]
    code: tuple[int, ...] = field(init=False, repr=False, compare=False, default=())

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            cls.kind = zlib.crc32(cls.name.encode())
            _REGISTRY[cls.kind] = cls

    def __post_init__(self) -> None:
        object.__setattr__(self, "code", self._encode())

    def _encode(self) -> tuple[int, ...]:
        numbers = self._numbers()
        return (self.kind, len(numbers), *numbers)

    def _numbers(self) -> tuple[int, ...]:
        """The fields as whole numbers, which `_of_numbers` takes."""
        return tuple(getattr(self, f.name) for f in fields(self) if f.init)

    @classmethod
    def _of_numbers(cls, *numbers: int) -> "Pattern":
        return cls(*numbers)

    @abstractmethod
    def allowed(
        self,
        query_index: torch.Tensor,
        key_index: torch.Tensor,
        head_index: torch.Tensor,
        length: int,
    ) -> torch.Tensor:
        """Tells for each (query, key, head) whether the query may attend to the key.

        Args:
            query_index, key_index, head_index: integer tensors that broadcast against each other,
                positions in [0, length) and heads in [0, num_heads).
            length: number of tokens in the sequence.

        Returns:
            Boolean tensor of the broadcast shape (or one that broadcasts to it).
        """

    @property
    def varies_by_head(self) -> bool:
        """Whether `allowed` depends on the head."""
        return False

    @property
    def parts(self) -> tuple["Pattern", ...]:
        """The patterns this one is the union of; a simple pattern is its own only part."""
        return (self,)

    def __or__(self, other: "Pattern") -> "Union":
        if not isinstance(other, Pattern):
            return NotImplemented
        return Union((*self.parts, *other.parts))


@dataclass(frozen=True, repr=False)
class Union(Pattern):
    """The union of patterns: a key is visible if any part lets it through. Written `a | b`."""

    name: ClassVar[str] = "union"
    members: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        if not self.members or not all(isinstance(part, Pattern) for part in self.members):
            raise ValueError(f"Union: members is {self.members!r}, one or more patterns are needed")
        super().__post_init__()

    def _encode(self) -> tuple[int, ...]:
        return tuple(number for member in self.members for number in member.code)

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.members))

    def allowed(self, query_index, key_index, head_index, length):
        result = self.members[0].allowed(query_index, key_index, head_index, length)
        for member in self.members[1:]:
            result = result | member.allowed(query_index, key_index, head_index, length)
        return result

    @property
    def varies_by_head(self) -> bool:
        return any(member.varies_by_head for member in self.members)

    @property
    def parts(self) -> tuple[Pattern, ...]:
        return self.members


def union(patterns: tuple[Pattern, ...]) -> Pattern | None:
    """The union of any number of patterns; None of zero, the pattern itself of one."""
    if not patterns:
        return None
    return patterns[0] if len(patterns) == 1 else Union(patterns)


@lru_cache(maxsize=1024)
def pattern_from_code(code: Sequence[int]) -> Pattern | None:
    """Reads a pattern back from `Pattern.code`, a tuple; None of an empty one.

    Raises:
        ValueError: the numbers name no known pattern.
    """
    patterns, rest = [], tuple(code)
    while rest:
        kind, (count, *_) = _REGISTRY.get(rest[0]), (*rest[1:], 0)
        if kind is None or len(rest) < 2 + count:
            raise ValueError(
                f"pattern code {tuple(code)} is not made of one of "
                f"{sorted(known.name for known in _REGISTRY.values())} and its numbers"
            )
        patterns.append(kind._of_numbers(*rest[2 : 2 + count]))
        rest = rest[2 + count :]
    return union(tuple(patterns))


def check_types(values: Mapping[str, object], kind: Any, needed: str) -> None:
    """Raises ValueError on the first value that is not of a kind, which `isinstance` takes."""
    for name, value in values.items():
        if not isinstance(value, kind):
            raise ValueError(f"{name} is a {type(value).__name__}, {needed} is needed")


def check_whole(owner: str, minimum: int, **values: Any) -> None:
    """Raises ValueError unless every value is a whole number from `minimum` to `LARGEST`."""
    for argument, value in values.items():
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or not minimum <= value <= LARGEST:
            raise ValueError(
                f"{owner}: {argument} is {value!r}, a whole number >= {minimum} and < 2**31 is "
                "needed"
            )
