"""Two tasks that a model solves only if it reads the few places in a document that matter.

Both are associative recall: some words carry a value (as their token type), and where the same word
stands elsewhere without it the model must name the value, one of 16. Words are otherwise unique in
a document, and nothing depends on positions, so that one model can learn both tasks, at any length.

- recall: words with values come in runs of 16, and are asked about in a run of 16 elsewhere, in
  another order, as a paragraph is about another one.
- needles: every word with a value stands alone, and so does every word that is asked about: the
  hardest case for a choice of blocks, as one word in a block of 64 must be found and 63 of the 64
  queries that vote want something else.

A question is near if a window of `NEAR` tokens to either side holds the answer, far if it is more
than `FAR` tokens away, beyond every window that is compared.
"""

from dataclasses import dataclass

import torch

NEAR, FAR = 64, 256
NUM_WORDS, FIRST_WORD = 4096, 8
VOCAB_SIZE = FIRST_WORD + NUM_WORDS
NUM_VALUES = 16
TYPE_VOCAB_SIZE = NUM_VALUES + 1
RUN_LENGTH = {"recall": 16, "needles": 1}
TASKS = tuple(RUN_LENGTH)
CHANCE = 1 / NUM_VALUES
# One run that is asked about, and one that is not, for so many tokens.
SPACING = {"recall": 128, "needles": 64}


@dataclass(frozen=True)
class Batch:
    """Documents with the tokens that are asked about.

    Attributes:
        inputs: what the model's forward takes, without labels.
        labels: int64 [batch, length], -100 where nothing is asked.
        is_far: bool [batch, length], whether the answer is far away.
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
        task: "recall" or "needles".
        batch_size: number of documents.
        length: tokens per document, the first of which is the classification token.
        far_share: probability that a question is far. With 0, needles are eight times as dense.
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
    run = RUN_LENGTH[task]
    spacing = SPACING[task] if far_share or run > 1 else SPACING[task] // 8
    for row in range(batch_size):
        document = _Document(words[row], types[row], labels[row], is_far[row], run, generator)
        for _ in range(length // spacing):
            document.ask(far=bool(torch.rand((), generator=generator) < far_share))
        for _ in range(length // spacing):
            document.distract()
    inputs = {
        "input_ids": words,
        "token_type_ids": types,
        "position_ids": torch.full((1, length), FIRST_WORD),
    }
    return Batch(inputs, labels, is_far)


class _Document:
    """One row of a batch, in which places are taken one after the other."""

    def __init__(self, words, types, labels, is_far, run: int, generator) -> None:
        self.words, self.types, self.labels, self.is_far = words, types, labels, is_far
        self.run, self.generator = run, generator
        self.taken = torch.zeros(len(words), dtype=torch.bool)
        self.taken[0] = True

    def ask(self, *, far: bool) -> None:
        """A run of words with values, and the same words elsewhere."""
        while True:
            asked, source = self._place(), self._place()
            if not far:
                reach = NEAR - self.run + 1
                source = asked + self._integer(-reach, reach + 1)
            distance = abs(asked - source)
            is_apart = distance > FAR + self.run if far else distance >= self.run
            if is_apart and self._is_free(asked) and self._is_free(source):
                break
        values = self._give_values(source)
        order = torch.randperm(self.run, generator=self.generator)
        here = slice(asked, asked + self.run)
        self.taken[here] = True
        self.words[here] = self.words[source : source + self.run][order]
        self.labels[here], self.is_far[here] = values[order], far

    def distract(self) -> None:
        """A run of words with values that nobody asks about, if there is room where it falls."""
        start = self._place()
        if self._is_free(start):
            self._give_values(start)

    def _give_values(self, start: int) -> torch.Tensor:
        values = torch.randint(0, NUM_VALUES, (self.run,), generator=self.generator)
        self.types[start : start + self.run] = values + 1
        self.taken[start : start + self.run] = True
        return values

    def _is_free(self, start: int) -> bool:
        is_inside = 1 <= start <= len(self.words) - self.run
        return is_inside and not self.taken[start : start + self.run].any()

    def _place(self) -> int:
        return self._integer(1, len(self.words) - self.run + 1)

    def _integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.generator))
