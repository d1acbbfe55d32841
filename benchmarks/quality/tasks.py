"""Two tasks that a model solves only if it reads the one place in a document that matters.

Both are answered token by token, share one vocabulary and one head, and need no positions, so that
one model can learn both, at any length. A word stands at most once in a document, except where the
task repeats it:

- recall: some words carry a value (as their token type). Elsewhere the same word stands without it:
  what was its value? One of 16, chance 1/16.
- spans: two documents, one after the other (token types tell which), have a span of 32 words in
  common. Which words of the second stand in the first as well? As many do as do not, chance 1/2.

A repetition is near if a window of `NEAR` tokens to either side holds both, far if they are more
than `FAR` tokens apart, beyond every window that is compared.
"""

from dataclasses import dataclass

import torch

NEAR, FAR = 64, 256
NUM_WORDS, FIRST_WORD = 4096, 8
VOCAB_SIZE = FIRST_WORD + NUM_WORDS
NUM_VALUES = 16
FIRST_DOCUMENT, SECOND_DOCUMENT = NUM_VALUES + 1, NUM_VALUES + 2
TYPE_VOCAB_SIZE = NUM_VALUES + 3
NO_MATCH, MATCH = NUM_VALUES, NUM_VALUES + 1
NUM_LABELS = NUM_VALUES + 2
SPAN_LENGTH = 32
TASKS = ("recall", "spans")
CHANCE = {"recall": 1 / NUM_VALUES, "spans": 0.5}


@dataclass(frozen=True)
class Batch:
    """Documents with the tokens that are asked about.

    Attributes:
        inputs: what the model's forward takes, without labels.
        labels: int64 [batch, length], -100 where nothing is asked.
        is_far: bool [batch, length], whether what is asked about is far away.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    is_far: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Batch(inputs, self.labels.to(device), self.is_far.to(device))


def make_batch(
    task: str, batch_size: int, length: int, *, far_share: float, generator: torch.Generator
) -> Batch:
    """Draws documents of a task.

    Args:
        task: "recall" or "spans".
        batch_size: number of documents.
        length: tokens per document, the first of which is the classification token.
        far_share: probability that a question ("recall") or a document ("spans") is far.
        generator: where all randomness comes from.

    Raises:
        ValueError: there is no such task, or the length leaves no room for what is far.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}, allowed are {', '.join(map(repr, TASKS))}")
    shortest = 2 * FAR if far_share else 4 * NEAR
    if not shortest <= length <= NUM_WORDS:
        raise ValueError(f"length is {length}, {shortest} to {NUM_WORDS} is allowed")
    size = (batch_size, length)
    draws = torch.rand(batch_size, NUM_WORDS, generator=generator)
    words = draws.argsort(dim=1)[:, :length] + FIRST_WORD
    words[:, 0] = 0
    types = torch.zeros(size, dtype=torch.int64)
    labels = torch.full(size, -100)
    is_far = torch.zeros(size, dtype=torch.bool)
    fill = _fill_recall if task == "recall" else _fill_spans
    for row in range(batch_size):
        fill(words[row], types[row], labels[row], is_far[row], far_share, generator)
    inputs = {
        "input_ids": words,
        "token_type_ids": types,
        "position_ids": torch.full((1, length), FIRST_WORD),
    }
    return Batch(inputs, labels, is_far)


def _integer(low: int, high: int, generator: torch.Generator) -> int:
    """A number from `low` up to and without `high`."""
    return int(torch.randint(low, high, (), generator=generator))


def _fill_recall(words, types, labels, is_far, far_share, generator) -> None:
    """One question per 64 tokens; as many words with a value that nobody asks about."""
    length = len(words)
    taken = {0}
    for _ in range(length // 64):
        far = bool(torch.rand((), generator=generator) < far_share)
        while True:
            asked = _integer(1, length, generator)
            source = _integer(1, length, generator)
            if not far:
                source = asked + _integer(-NEAR, NEAR + 1, generator)
            distance = abs(asked - source)
            is_apart = distance > FAR if far else 0 < distance <= NEAR
            if is_apart and 1 <= source < length and not {asked, source} & taken:
                break
        taken |= {asked, source}
        value = _integer(0, NUM_VALUES, generator)
        words[asked] = words[source]
        types[source] = value + 1
        labels[asked], is_far[asked] = value, far
    for _ in range(length // 64):
        other = _integer(1, length, generator)
        if other not in taken:
            types[other] = _integer(1, NUM_VALUES + 1, generator)


def _fill_spans(words, types, labels, is_far, far_share, generator) -> None:
    length = len(words)
    half = length // 2
    types[1:half], types[half:] = FIRST_DOCUMENT, SECOND_DOCUMENT
    far = bool(torch.rand((), generator=generator) < far_share)
    while True:
        source = _integer(1, half - SPAN_LENGTH + 1, generator)
        copy = _integer(half, length - SPAN_LENGTH + 1, generator)
        if not far:
            source = half - SPAN_LENGTH - _integer(0, NEAR // 4, generator)
            copy = source + _integer(half - source, NEAR + 1, generator)
        if not far or copy - source > FAR:
            break
    words[copy : copy + SPAN_LENGTH] = words[source : source + SPAN_LENGTH].clone()
    others = torch.randperm(half, generator=generator) + half
    others = others[(others < copy) | (others >= copy + SPAN_LENGTH)][:SPAN_LENGTH]
    labels[copy : copy + SPAN_LENGTH], labels[others] = MATCH, NO_MATCH
    is_far[half:] = far
