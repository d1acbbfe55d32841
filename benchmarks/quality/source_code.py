"""Masked bytes in the source files of Python's standard library, for a model that reads bytes.

A masked name keeps its first bytes, and may stand elsewhere in the document unmasked: then it can
be read there. As in byte models that embed n-grams, every byte of a name from the fourth on comes
with a hash of the name's first three bytes and of its place in the name (as its token type).
"""

import re
import sysconfig
import zlib
from functools import cache
from pathlib import Path

import torch

from adaptive_longformer.training.source_code_documents import NOT_THE_LIBRARY

CLASSIFICATION, MASK, FIRST_BYTE = 0, 1, 2
VOCAB_SIZE = FIRST_BYTE + 256
TYPE_VOCAB_SIZE = 4096
MASKED_SHARE = 0.3
VISIBLE_BYTES = 3
LONGEST_DOCUMENT = 4096
_NAME = re.compile(rb"[A-Za-z_][A-Za-z0-9_]{5,}")
_LEFT_OUT = NOT_THE_LIBRARY | {"test", "tests"}


@cache
def files_of_the_library(held_out: bool) -> list[bytes]:
    """The standard library's longer source files without its tests, an eighth of them held out."""
    library = Path(sysconfig.get_path("stdlib"))
    return [
        path.read_bytes()
        for path in sorted(library.rglob("*.py"))
        if not _LEFT_OUT.intersection(path.relative_to(library).parts)
        and path.stat().st_size >= LONGEST_DOCUMENT
        and (zlib.crc32(str(path.relative_to(library)).encode()) % 8 == 0) == held_out
    ]


def masked_document(
    length: int, *, held_out: bool, near: int, far: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A part of a file, with names to complete.

    Args:
        length: tokens, the first of which is the classification token; up to `LONGEST_DOCUMENT`.
        held_out: whether from the eighth of the files that is not for training.
        near, far: in tokens. A masked name is near if it stands unmasked at most `near` away, far
            if it does so only more than `far` away.
        generator: where all randomness comes from.

    Returns:
        Token ids, token types, labels (-100 where nothing is masked), and which labels are near and
        which far: each [length].
    """
    files = files_of_the_library(held_out)
    text = files[int(torch.randint(len(files), (), generator=generator))]
    start = int(torch.randint(len(text) - length + 2, (), generator=generator))
    text = text[start : start + length - 1]
    words = torch.tensor([CLASSIFICATION, *(byte + FIRST_BYTE for byte in text)])
    types = torch.zeros(length, dtype=torch.int64)
    labels = torch.full((length,), -100)
    is_near = torch.zeros(length, dtype=torch.bool)
    is_far = torch.zeros(length, dtype=torch.bool)
    names = list(_NAME.finditer(text))
    draws = torch.rand(len(names), generator=generator).tolist()
    visible: dict[bytes, list[int]] = {}
    for name, draw in zip(names, draws, strict=True):
        if draw >= MASKED_SHARE:
            visible.setdefault(name.group(), []).append(name.start())
    for name, draw in zip(names, draws, strict=True):
        prefix = name.group()[:VISIBLE_BYTES]
        for place in range(VISIBLE_BYTES, len(name.group())):
            code = zlib.crc32(prefix + place.to_bytes(2, "big")) % (TYPE_VOCAB_SIZE - 1)
            types[1 + name.start() + place] = 1 + code
        if draw >= MASKED_SHARE:
            continue
        hidden = slice(1 + name.start() + VISIBLE_BYTES, 1 + name.end())
        labels[hidden] = words[hidden] - FIRST_BYTE
        words[hidden] = MASK
        distances = [abs(other - name.start()) for other in visible.get(name.group(), ())]
        if distances:
            is_near[hidden] = min(distances) <= near
            is_far[hidden] = min(distances) > far
    return words, types, labels, is_near, is_far
