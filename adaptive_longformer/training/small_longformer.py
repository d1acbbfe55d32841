"""A small Longformer with random weights and its own tokenizer, written as an ordinary Transformers
checkpoint."""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LongformerConfig,
    LongformerForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def train_byte_level_tokenizer(
    texts: Iterable[str], *, vocab_size: int = 4096, max_length: int = 4096
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with RoBERTa's special tokens (`<s> ... </s>`, padding id
    1).

    Args:
        texts: What to train on.
        vocab_size: Number of tokens, the five special ones included.
        max_length: Longest input of the model it is for, special tokens included.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=max_length,
    )


def write_small_longformer(
    target: Path,
    tokenizer: PreTrainedTokenizerBase,
    label_names: list[str],
    *,
    max_length: int = 4096,
    seed: int = 0,
) -> LongformerConfig:
    """Write a Longformer for sequence classification with random weights, and its tokenizer, to a
    folder.

    Args:
        target: Folder to write to.
        tokenizer: As `train_byte_level_tokenizer` makes it. Saved beside the weights; its size is
            the vocabulary size.
        label_names: Names of the classes.
        max_length: Longest input in tokens; the position table has two rows more, as Longformer's
            has.
        seed: Seed of the weights. The global random state is left as it was.
    """
    config = LongformerConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        attention_window=256,
        max_position_embeddings=max_length + 2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        type_vocab_size=1,
        bos_token_id=SPECIAL_TOKENS.index("<s>"),
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        eos_token_id=SPECIAL_TOKENS.index("</s>"),
        sep_token_id=SPECIAL_TOKENS.index("</s>"),
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LongformerForSequenceClassification(config)
        _widen_the_way_of_words(model)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return config


_WIDE = ("self.value", "self.value_global", "attention.output.dense", "classifier.dense")


def _widen_the_way_of_words(model: LongformerForSequenceClassification) -> None:
    """Random weights on which a few hundred steps are enough to see what a document is about.

    Words outweigh positions, and values pass through attention and the head at full strength, so
    that the first token, which is global, starts as a random projection of the words of the whole
    document. Measured after two epochs of the quickstart: 52 % of ten classes, but 25 % without the
    head's and with larger positions.
    """
    std = model.config.hidden_size**-0.5
    torch.nn.init.normal_(model.longformer.embeddings.position_embeddings.weight, std=0.002)
    for name, module in model.named_modules():
        if name.endswith(_WIDE):
            assert isinstance(module, torch.nn.Linear)
            torch.nn.init.normal_(module.weight, std=std)
