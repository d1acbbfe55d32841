"""Tasks that a model solves only if it reads the few places in a document that matter.

All but one are associative recall: some words carry a value (as their token type), and where the
same word stands elsewhere without it the model must name the value, one of 16. Words are otherwise
unique in a document, and nothing depends on positions, so that one model can learn all these tasks,
at any length.

- recall: words with values come in runs of 16, and are asked about in a run of 16 elsewhere, in
  another order, as a paragraph is about another one. Half of the questions are far.
- needles: every word with a value stands alone, and so does every word that is asked about: the
  hardest case for a choice of blocks, as one word in a block of 64 must be found and 63 of the 64
  queries that vote want something else. Half of the questions are far.
- nearby: recall without far questions; whoever learns it can do without everything far.
- pairs: two documents, one after the other. All words of the first have the value 0, those of the
  second none. Runs of the second are asked about: 0 where the run stands in the first document as
  well, far away, 1 where it is new. Half of them are new.
- table: all words with values stand in one run of 64, at a random place, and single words all over
  the document ask for them: what every query needs is the same.
- bytes: a real text, see source_code.py. Names in the source files of Python's standard library are
  to be completed; near and far are those that stand elsewhere too. It has a model of its own.

A question is near if a window of `NEAR` tokens to either side holds the answer, far if it is more
than `FAR` tokens away, beyond every window that is compared.
"""

from dataclasses import dataclass

import torch

from quality.source_code import masked_document

NEAR, FAR = 64, 256
NUM_WORDS, FIRST_WORD = 4096, 8
VOCAB_SIZE = FIRST_WORD + NUM_WORDS
NUM_VALUES = 16
TYPE_VOCAB_SIZE = NUM_VALUES + 1
RUN_LENGTH = {"recall": 16, "needles": 1, "nearby": 16, "pairs": 16, "table": 64}
TASKS = (*RUN_LENGTH, "bytes")
# What the models learn on short documents before they are converted, and for how many times the
# steps that are asked for.
PRETRAINING = {"words": ("recall", "needles"), "bytes": ("bytes",)}
MORE_STEPS = {"words": 1, "bytes": 3}
# How many of the questions are far, where nothing else is said.
FAR_SHARE = {"recall": 0.5, "needles": 0.5, "nearby": 0.0, "pairs": 1.0, "table": 1.0}
CHANCE = dict.fromkeys(RUN_LENGTH, 1 / NUM_VALUES) | {"pairs": 1 / 2, "bytes": 1 / 256}
# One run that is asked about, and one that is not, for so many tokens.
SPACING = {"recall": 128, "needles": 64, "nearby": 128, "pairs": 128, "table": 32}


@dataclass(frozen=True)
class Batch:
    """Documents with the tokens that are asked about.

    Attributes:
        inputs: what the model's forward takes, without labels.
        labels: int64 [batch, length], -100 where nothing is asked.
        is_near, is_far: bool [batch, length], whether something is asked whose answer is near or
            far.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    is_near: torch.Tensor
    is_far: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        tensors = (self.labels, self.is_near, self.is_far)
        return Batch(inputs, *(tensor.to(device) for tensor in tensors))


def pretraining_of(task: str) -> str:
    """Which pretraining a task starts from."""
    return "bytes" if task == "bytes" else "words"


def make_batch(
    task: str,
    batch_size: int,
    length: int,
    *,
    far_share: float | None = None,
    held_out: bool = False,
    generator: torch.Generator,
) -> Batch:
    """Draws documents of a task.

    Args:
        task: one of `TASKS`.
        batch_size: number of documents.
        length: tokens per document, the first of which is the classification token.
        far_share: probability that a question is far; None: as `FAR_SHARE` says. With 0, needles
            are eight times as dense. All of "pairs" and "table" is far. "bytes" is as it is, except
            that 0 asks for what is near only.
        held_out: whether "bytes" comes from files that are not for training; other tasks draw
            something new every time.
        generator: where all randomness comes from.

    Raises:
        ValueError: there is no such task, or the length leaves no room for what is far.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}, allowed are {', '.join(map(repr, TASKS))}")
    if task == "bytes":
        documents = [
            masked_document(length, held_out=held_out, near=NEAR, far=FAR, generator=generator)
            for _ in range(batch_size)
        ]
        words, types, labels, is_near, is_far = map(torch.stack, zip(*documents, strict=True))
        if far_share == 0.0:
            labels = labels.where(is_near, -100)
        return Batch(_inputs(words, types), labels, is_near, is_far)
    if far_share is None or FAR_SHARE[task] == 1.0:
        far_share = FAR_SHARE[task]
    shortest = 2 * FAR if far_share else 4 * NEAR
    if task == "table":  # in whose middle the table leaves room on either side
        shortest = 4 * FAR
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
        if task == "pairs":
            types[row, 1 : length // 2] = 1
            for _ in range(length // spacing):
                document.compare(is_shared=bool(torch.rand((), generator=generator) < 0.5))
            continue
        if task == "table":
            document.ask_table(length // spacing)
            continue
        for _ in range(length // spacing):
            document.ask(far=bool(torch.rand((), generator=generator) < far_share))
        for _ in range(length // spacing):
            document.distract()
    return Batch(_inputs(words, types), labels, (labels >= 0) & ~is_far, is_far)


def _inputs(words: torch.Tensor, types: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every token stands at the same position."""
    position_ids = torch.full((1, words.shape[1]), FIRST_WORD)
    return {"input_ids": words, "token_type_ids": types, "position_ids": position_ids}


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
        order = self._repeat(source, asked)
        here = slice(asked, asked + self.run)
        self.labels[here], self.is_far[here] = values[order], far

    def compare(self, *, is_shared: bool) -> None:
        """A run of the second half that the first half has as well, or a new one."""
        half = len(self.words) // 2
        while True:
            source, asked = self._integer(1, half - self.run + 1), half + self._integer(0, half)
            if asked - source > FAR + self.run and self._is_free(asked) and self._is_free(source):
                break
        here = slice(asked, asked + self.run)
        if is_shared:
            self._repeat(source, asked)
        self.taken[here] = True
        self.labels[here], self.is_far[here] = int(not is_shared), True

    def ask_table(self, count: int) -> None:
        """A run of words with values, and single ones of them far away, as often as asked."""
        source = self._place()
        values = self._give_values(source)
        asked = 0
        while asked < count:
            place = self._integer(1, len(self.words))
            is_apart = abs(place - source - self.run // 2) > FAR + self.run // 2
            if is_apart and not self.taken[place]:
                word = self._integer(0, self.run)
                self.words[place], self.labels[place] = self.words[source + word], values[word]
                self.taken[place] = self.is_far[place] = True
                asked += 1

    def distract(self) -> None:
        """A run of words with values that nobody asks about, if there is room where it falls."""
        start = self._place()
        if self._is_free(start):
            self._give_values(start)

    def _repeat(self, source: int, asked: int) -> torch.Tensor:
        """Writes a run a second time, in an order that is returned."""
        order = torch.randperm(self.run, generator=self.generator)
        for start in (source, asked):
            self.taken[start : start + self.run] = True
        self.words[asked : asked + self.run] = self.words[source : source + self.run][order]
        return order

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
