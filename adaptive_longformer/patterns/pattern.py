"""What an attention pattern is: a rule that says which keys a query may attend to."""

import ast
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import ClassVar

import torch

_SPEC = re.compile(r"^(\w+)(\(.*\))$")
_REGISTRY: dict[str, type["Pattern"]] = {}


@dataclass(frozen=True)
class Pattern(ABC):
    """Which keys each query may attend to, before padding, causality and global tokens are applied.

    A pattern is immutable and hashable. `spec` is its text form, `pattern_from_spec` reads it back;
    operators that can only take plain values carry the pattern as this text.
    """

    name: ClassVar[str]
    spec: str = field(init=False, repr=False, compare=False, default="")

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            _REGISTRY[cls.name] = cls

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", self._build_spec())

    def _build_spec(self) -> str:
        values = tuple(getattr(self, f.name) for f in fields(self) if f.init)
        return f"{self.name}{values!r}"

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


@dataclass(frozen=True)
class Union(Pattern):
    """The union of patterns: a key is visible if any part lets it through. Written `a | b`."""

    name: ClassVar[str] = "union"
    members: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("Union: members is empty, at least one pattern is needed")
        super().__post_init__()

    def _build_spec(self) -> str:
        return " | ".join(member.spec for member in self.members)

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


def pattern_from_spec(spec: str) -> Pattern:
    """Reads a pattern back from `Pattern.spec`.

    Raises:
        ValueError: the text names no known pattern or its arguments are malformed.
    """
    patterns = []
    for part in spec.split(" | "):
        match = _SPEC.match(part)
        if match is None or match[1] not in _REGISTRY:
            raise ValueError(
                f"pattern spec {part!r} is not one of {sorted(_REGISTRY)} with its arguments"
            )
        patterns.append(_REGISTRY[match[1]](*ast.literal_eval(match[2])))
    result = union(tuple(patterns))
    assert result is not None
    return result


def check_positive(pattern: str, **values: int) -> None:
    """Raises ValueError unless every value is a whole number of at least 1."""
    for argument, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{pattern}: {argument} is {value!r}, a whole number >= 1 is needed")
