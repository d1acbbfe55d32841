"""A small Longformer and its tokenizer, made on the spot, written as an ordinary checkpoint."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_matrix
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfTransformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LongformerConfig,
    LongformerForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

PIECE_LENGTH = 256
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def train_byte_level_tokenizer(
    texts: Iterable[str], *, vocab_size: int = 4096, max_length: int = 4096
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with RoBERTa's special tokens (`<s>`, padding id 1, `</s>`).

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
    documents: Iterable[Sequence[int]] | None = None,
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
        documents: Token ids to take word vectors from, so that a few hundred steps of fine-tuning
            are enough to learn something; None: everything is random.
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
        if documents is not None:
            size = config.hidden_size
            vectors = latent_semantic_vectors(documents, len(tokenizer), size, seed=seed)
            _start_from_words(model, vectors)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return config


_WIDE = ("self.value", "self.value_global", "attention.output.dense", "classifier.dense")


def latent_semantic_vectors(
    documents: Iterable[Sequence[int]], vocab_size: int, size: int, *, seed: int = 0
) -> torch.Tensor:
    """Vectors of tokens that occur in similar places: latent semantic analysis, without labels.

    The counts of tokens in pieces of documents, weighted by TF-IDF, are reduced to their largest
    singular directions (Deerwester et al. 1990). The mean of a document's vectors then says what it
    is about; a token that is everywhere has a vector near zero.

    Args:
        documents: Token ids of each document.
        vocab_size: Number of tokens.
        size: Length of a vector.
        seed: Seed of the randomised decomposition.

    Returns:
        [vocab_size, size] with a mean square of 1; zeros for tokens that do not occur, and in the
        last columns if the documents do not span so many directions.
    """
    pieces = [
        np.bincount(document[start : start + PIECE_LENGTH], minlength=vocab_size)
        for document in documents
        for start in range(0, len(document), PIECE_LENGTH)
    ]
    counts = csr_matrix(np.stack(pieces).astype(np.float32))
    tfidf = TfidfTransformer(sublinear_tf=True)
    weighted = tfidf.fit_transform(counts)
    num_directions = min(size, len(pieces) - 1, vocab_size - 1)
    if num_directions < 1:
        return torch.zeros(vocab_size, size)
    decomposition = TruncatedSVD(num_directions, random_state=seed).fit(weighted)
    vectors = np.zeros((vocab_size, size), dtype=np.float32)
    vectors[:, :num_directions] = decomposition.components_.T * (tfidf.idf_ - 1)[:, None]
    vectors[np.asarray(counts.sum(axis=0)).ravel() == 0] = 0.0
    return torch.from_numpy(vectors / max(float(np.sqrt((vectors**2).mean())), 1e-6))


def _start_from_words(model: LongformerForSequenceClassification, vectors: torch.Tensor) -> None:
    """Give the model word vectors, and random weights through which it sees them from the start.

    Values pass through attention at full strength, so that the first token, which is global, starts
    as a projection of the words of the whole document. The one token type is long: the LayerNorm of
    the embeddings then keeps the lengths of the word vectors, which are the weights of the words.
    """
    embeddings = model.longformer.embeddings
    with torch.no_grad():
        embeddings.word_embeddings.weight.add_(vectors)
    torch.nn.init.normal_(embeddings.token_type_embeddings.weight, std=1.0)
    std = model.config.hidden_size**-0.5
    for layer in model.longformer.encoder.layer:
        attention = layer.attention
        for linear in (attention.self.value, attention.self.value_global, attention.output.dense):
            torch.nn.init.normal_(linear.weight, std=std)
