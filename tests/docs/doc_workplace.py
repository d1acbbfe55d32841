"""The folder in which a page is run: tiny checkpoints under the names of those on the hub, some
documents, and the scripts of the repository.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from doc_pages import ROOT
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BigBirdConfig,
    BigBirdForMaskedLM,
    LEDConfig,
    LEDForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LongformerConfig,
    LongformerForMaskedLM,
    LongformerForQuestionAnswering,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from adaptive_longformer.training.small_longformer import train_byte_level_tokenizer

SENTENCES = [
    "The council met in March and spoke about the budget of the harbour.",
    "Ada Lovelace wrote the notes, and the printer lost two pages of them.",
    "Nobody read the appendix, although the answer stood in its third table.",
    "The court found that the dog was not liable for the damages claimed.",
]
DOCUMENT = " ".join(SENTENCES * 5)
ROBERTA = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2, sep_token_id=2, type_vocab_size=1)
ENCODER = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


@cache
def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    return train_byte_level_tokenizer(SENTENCES, vocab_size=400, max_length=4096)


@cache
def word_tokenizer() -> PreTrainedTokenizerFast:
    """BERT's special tokens and whole words."""
    words = sorted({word for text in SENTENCES for word in pre_tokenize(text)})
    vocab = {
        word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    }
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", model_max_length=512,
    )  # fmt: skip


def pre_tokenize(text: str) -> list[str]:
    return [word for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text)]


def longformer(
    model_class=LongformerForMaskedLM,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = byte_level_tokenizer()
    config = LongformerConfig(
        vocab_size=len(tokenizer), max_position_embeddings=4098, attention_window=64, **ENCODER,
        **ROBERTA,
    )  # fmt: skip
    return model_class(config), tokenizer


def roberta() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = byte_level_tokenizer()
    config = RobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=514, **ENCODER, **ROBERTA
    )
    return RobertaForMaskedLM(config), tokenizer


def bert() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = word_tokenizer()
    return BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **ENCODER)), tokenizer


def big_bird() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = word_tokenizer()
    config = BigBirdConfig(
        vocab_size=len(tokenizer), max_position_embeddings=4096, block_size=16,
        num_random_blocks=1, sep_token_id=3, **ENCODER,
    )  # fmt: skip
    return BigBirdForMaskedLM(config), tokenizer


def led() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = byte_level_tokenizer()
    config = LEDConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_encoder_position_embeddings=1024,
        max_decoder_position_embeddings=64, attention_window=64, max_length=16,
    )  # fmt: skip
    return LEDForConditionalGeneration(config), tokenizer


def modern_bert() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = word_tokenizer()
    config = ModernBertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=2048, local_attention=32,
        pad_token_id=0, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3, **ENCODER,
    )  # fmt: skip
    return ModernBertForMaskedLM(config), tokenizer


def llama() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = byte_level_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_key_value_heads=1, **ENCODER, eos_token_id=2
    )
    return LlamaForCausalLM(config), tokenizer


# What stands in the pages -> what makes it. The names are folders in the page's own folder.
CHECKPOINTS: dict[str, Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]] = {
    "allenai/longformer-base-4096": longformer,
    "allenai/longformer-large-4096-finetuned-triviaqa": lambda: longformer(
        LongformerForQuestionAnswering
    ),
    "allenai/led-base-16384": led,
    "allenai/led-large-16384-arxiv": led,
    "answerdotai/ModernBERT-base": modern_bert,
    "google-bert/bert-base-uncased": bert,
    "FacebookAI/roberta-base": roberta,
    "google/bigbird-roberta-base": big_bird,
    "meta-llama/Llama-3.2-1B": llama,
}


def prepare(folder: Path, text: str) -> None:
    """Fills the folder with what a page names.

    Args:
        folder: an empty folder.
        text: the page; only checkpoints that it names are made.
    """
    for name, maker in CHECKPOINTS.items():
        if name in text:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model, tokenizer = maker()
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
    for name in ("examples", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "document.txt").write_text(DOCUMENT)
    rows = [
        {"text": f"Case {i}. {SENTENCES[i % 4]} {DOCUMENT}", "label": "ab"[i % 2]}
        for i in range(10)
    ]
    write_lines(folder / "articles.jsonl", rows)
    rows = [
        {
            "document": f"Case {i}. {DOCUMENT}",
            "summary": f"Case {i} was about the budget.",
            "query": "What was it about?",
            "answer": "the budget",
        }
        for i in range(6)
    ]
    write_lines(folder / "papers.jsonl", rows)
    words = SENTENCES[1].split()
    rows = [
        {"tokens": words[i % 5 :], "tags": [f"{word.istitle()}" for word in words[i % 5 :]]}
        for i in range(10)
    ]
    write_lines(folder / "words.jsonl", rows)
    rows = [
        {
            "document": f"Case {i}. {DOCUMENT}",
            "question": "Who wrote the notes?",
            "choices": ["Ada", "Nobody", "The court", "The dog"],
            "answer": 0,
        }
        for i in range(6)
    ]
    write_lines(folder / "choices.jsonl", rows)


def write_lines(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
