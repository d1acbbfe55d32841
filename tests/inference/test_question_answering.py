from itertools import pairwise

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering

from adaptive_longformer import (
    AdaptiveSparseConfig,
    AdaptiveSparseForConditionalGeneration,
    AdaptiveSparseForMaskedLM,
    AdaptiveSparseForQuestionAnswering,
    AdaptiveSparseSeq2SeqForQuestionAnswering,
)
from adaptive_longformer.inference.question_answering import answer_question
from adaptive_longformer.testing import randomize_all_parameters, tiny_model, tiny_seq2seq_model
from adaptive_longformer.training.small_longformer import train_byte_level_tokenizer

WORDS = [f"w{i}" for i in range(300)]
DOCUMENT = " ".join(WORDS)


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_level_tokenizer([DOCUMENT, "where is it"], vocab_size=700, max_length=96)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = AdaptiveSparseConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        attention_window=32,
        max_position_embeddings=98,
    )
    return randomize_all_parameters(AdaptiveSparseForQuestionAnswering(config)).eval()


def point_at(model, tokenizer, word, score=50.0):
    """Makes the model sure of one word: its first token starts, its last token ends the answer."""
    target = tokenizer(" " + word, add_special_tokens=False)["input_ids"]

    def add_score(module, arguments, keywords, output):
        ids = keywords["input_ids"]
        for place in range(ids.shape[1] - len(target) + 1):
            if ids[0, place : place + len(target)].tolist() == target:
                output.start_logits[0, place] += score
                output.end_logits[0, place + len(target) - 1] += score
        return output

    return model.register_forward_hook(add_score, with_kwargs=True)


def test_an_answer_far_behind_the_models_length_is_found(model, tokenizer):
    handle = point_at(model, tokenizer, "w257")
    seen = []
    try:
        answers = answer_question(
            model, tokenizer, "where is it", DOCUMENT, stride=16,
            progress=lambda done, total: seen.append((done, total)),
        )  # fmt: skip
    finally:
        handle.remove()
    assert len(answers) == 1 and answers[0].text.strip() == "w257"
    assert DOCUMENT[answers[0].start : answers[0].end] == answers[0].text
    assert seen[-1][0] == seen[-1][1] == len(seen) > 5


def test_the_best_span_is_the_best_of_all_allowed_ones(model, tokenizer):
    document = " ".join(WORDS[:20])
    answers = answer_question(model, tokenizer, "where", document, max_answer_tokens=3)
    encoded = tokenizer("where", document, return_offsets_mapping=True, return_tensors="pt")
    offsets = encoded.pop("offset_mapping")[0].tolist()
    with torch.no_grad():
        output = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"])
    inside = [i for i, part in enumerate(encoded.sequence_ids(0)) if part == 1]
    best = max(
        (float(output.start_logits[0, i] + output.end_logits[0, j]), i, j)
        for i in inside
        for j in inside
        if i <= j < i + 3
    )
    assert answers[0].score == pytest.approx(best[0], abs=1e-5)
    assert (answers[0].start, answers[0].end) == (offsets[best[1]][0], offsets[best[2]][1])


def test_an_answer_may_be_as_long_as_the_document(model, tokenizer):
    document = " ".join(WORDS[:20])
    answers = answer_question(model, tokenizer, "where", document, max_answer_tokens=10**15)
    assert answers == answer_question(model, tokenizer, "where", document, max_answer_tokens=90)


def test_several_answers_do_not_overlap_and_are_in_order(model, tokenizer):
    answers = answer_question(model, tokenizer, "where", DOCUMENT, num_answers=4)
    assert len(answers) == 4
    assert [a.score for a in answers] == sorted((a.score for a in answers), reverse=True)
    spans = sorted((a.start, a.end) for a in answers)
    assert all(left[1] <= right[0] for left, right in pairwise(spans))


def test_a_model_in_training_stays_in_training(model, tokenizer):
    model.train()
    try:
        first = answer_question(model, tokenizer, "where", "w1 w2 w3")
        assert model.training
        assert answer_question(model, tokenizer, "where", "w1 w2 w3") == first  # no dropout
    finally:
        model.eval()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"question": " "}, "question is empty"),
        ({"document": ""}, "document is empty"),
        ({"question": DOCUMENT}, "must be left for the document"),
        ({"num_answers": 0}, "num_answers is 0"),
        ({"max_answer_tokens": 0}, "max_answer_tokens is 0"),
        ({"max_length": 1000}, "max_length is 1000, 1 to the model's 96"),
    ],
)
def test_bad_arguments_are_named(model, tokenizer, changes, words):
    arguments = {"question": "where", "document": "here", **changes}
    with pytest.raises(ValueError, match=words):
        answer_question(model, tokenizer, **arguments)


def test_an_encoder_decoder_reads_pieces_that_fit_into_its_decoder(tokenizer):
    sizes = {"vocab_size": len(tokenizer), "max_decoder_position_embeddings": 40}
    model = tiny_seq2seq_model(AdaptiveSparseSeq2SeqForQuestionAnswering, **sizes)
    seen = []
    answers = answer_question(
        model, tokenizer, "where", DOCUMENT, num_answers=3, max_answer_tokens=4,
        progress=lambda done, total: seen.append(total),
    )  # fmt: skip
    assert seen[-1] > 10 and len(answers) == 3


@pytest.mark.parametrize("words", [10, 38, 42])
def test_every_piece_of_a_long_question_brings_something_new(model, tokenizer, words):
    """However little of a piece the question leaves; much too little is refused."""
    question = " ".join(WORDS[:words])
    tokens = [len(tokenizer(text, add_special_tokens=False)["input_ids"])
              for text in (question, DOCUMENT)]  # fmt: skip
    room = 96 - 4 - tokens[0]
    if room < 12:
        with pytest.raises(ValueError, match=r"at least 12 of 96 must be left for the document"):
            answer_question(model, tokenizer, question, DOCUMENT)
        return
    seen = []
    answer_question(
        model, tokenizer, question, DOCUMENT, progress=lambda done, total: seen.append(total)
    )
    assert tokens[1] / room < seen[0] <= 2 * tokens[1] / room + 1


def writing_model(tokenizer, **settings):
    sizes = {"vocab_size": len(tokenizer), "max_encoder_position_embeddings": 96}
    model = tiny_seq2seq_model(AdaptiveSparseForConditionalGeneration, **sizes)
    model.generation_config.update(**settings)
    return model


def test_an_encoder_decoder_writes_what_it_generates(tokenizer):
    model = writing_model(tokenizer, num_beams=2, max_length=6, eos_token_id=None)
    document = " ".join(WORDS[:9])
    [answer] = answer_question(model, tokenizer, "where is it", document)
    inputs = tokenizer("where is it", document, return_tensors="pt", return_token_type_ids=False)
    written = model.generate(**inputs)
    assert written.shape == (1, 6)
    assert answer.text == tokenizer.decode(written[0], skip_special_tokens=True).strip() != ""
    assert document[answer.start : answer.end] == document
    with torch.no_grad():
        labels = written[:, 1:]
        loss = model(**inputs, decoder_input_ids=written[:, :-1], labels=labels).loss
    assert answer.score == pytest.approx(-loss.item(), abs=1e-4)


def test_an_encoder_decoder_reads_all_of_a_long_document(tokenizer):
    model = writing_model(tokenizer)
    answers = answer_question(
        model, tokenizer, "where is it", DOCUMENT, num_answers=3, max_answer_tokens=4
    )
    assert len({answer.text for answer in answers}) == 3
    assert [a.score for a in answers] == sorted((a.score for a in answers), reverse=True)
    assert all(0 < answer.end - answer.start < len(DOCUMENT) for answer in answers)


def test_a_model_with_another_head_is_refused(tokenizer):
    model = tiny_model(AdaptiveSparseForMaskedLM, vocab_size=len(tokenizer))
    with pytest.raises(ValueError, match="is a AdaptiveSparseForMaskedLM, which answers no"):
        answer_question(model, tokenizer, "where", DOCUMENT)


def test_a_model_of_another_family_is_refused_with_the_command_that_converts_it(tokenizer):
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"is a bert model.*adaptive-longformer convert"):
        answer_question(BertForQuestionAnswering(config), tokenizer, "where", DOCUMENT)
