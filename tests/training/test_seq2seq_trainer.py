import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from adaptive_longformer.modeling.modeling_adaptive_sparse_seq2seq import (
    AdaptiveSparseForConditionalGeneration,
)
from adaptive_longformer.testing import tiny_seq2seq_inputs, tiny_seq2seq_model


def examples(model, number, with_decoder_inputs):
    """Documents that differ in their second token, and texts that repeat it.

    With label smoothing Trainer keeps the labels to itself, so that collators for such models add
    the inputs of the decoder.
    """
    inputs = tiny_seq2seq_inputs(model, 40, padding="none")
    found = []
    for index in range(number):
        input_ids = inputs["input_ids"][0].clone()
        input_ids[1] = 10 + index
        global_attention_mask = torch.zeros_like(input_ids)
        global_attention_mask[0] = 1
        found.append(
            {
                "input_ids": input_ids,
                "attention_mask": torch.ones_like(input_ids),
                "global_attention_mask": global_attention_mask,
                "labels": torch.tensor([10 + index, 10 + index, 2]),
            }
        )
        if with_decoder_inputs:
            labels = found[-1]["labels"][None]
            found[-1]["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)[0]
    return found


@pytest.mark.parametrize("label_smoothing_factor", [0.0, 0.1])
def test_trainer_trains_evaluates_by_generating_and_resumes(tmp_path, label_smoothing_factor):
    model = tiny_seq2seq_model(AdaptiveSparseForConditionalGeneration, dropout=0.1)
    data = examples(model, 4, with_decoder_inputs=label_smoothing_factor > 0)
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"exact": (prediction.predictions[:, 1:4] == prediction.label_ids[:, :3]).mean()}

    def arguments(max_steps):
        return Seq2SeqTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=max_steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            learning_rate=1e-3,
            predict_with_generate=True,
            generation_max_length=8,
            label_smoothing_factor=label_smoothing_factor,
            save_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )

    def trainer(max_steps):
        return Seq2SeqTrainer(
            model=model,
            args=arguments(max_steps),
            train_dataset=data,
            eval_dataset=data,
            compute_metrics=compute_metrics,
        )

    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert trainer(1).train().training_loss > 0
    unchanged = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert unchanged == []
    metrics = trainer(1).evaluate()
    assert metrics["eval_loss"] > 0 and 0 <= metrics["eval_exact"] <= 1
    assert seen[0].predictions.shape[0] == 4
    resumed = trainer(2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2
