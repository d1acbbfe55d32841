import sys

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from adaptive_longformer.analysis.sparsity import sparsity_report
from adaptive_longformer.modeling import modeling_adaptive_sparse as modeling
from adaptive_longformer.modeling.adaptive_selection import selections, set_selection_strength
from adaptive_longformer.modeling.head_budgets import density_loss
from adaptive_longformer.modeling.modeling_adaptive_sparse import (
    AdaptiveSparseForMaskedLM,
    AdaptiveSparseForSequenceClassification,
)
from adaptive_longformer.testing import (
    loss_of,
    run_two_processes,
    tiny_adaptive_model,
    tiny_inputs,
    tiny_model,
)
from adaptive_longformer.training.adaptive_optimizer import adaptive_parameter_groups
from adaptive_longformer.training.selection_ramp import SelectionRampCallback


def examples(model, count=8, length=100):
    inputs = tiny_inputs(model, length, batch_size=count, with_labels=True)
    return [{name: tensor[row] for name, tensor in inputs.items()} for row in range(count)]


def trainer_of(model, folder, callback, max_steps, **options):
    arguments = TrainingArguments(
        folder, max_steps=max_steps, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        disable_tqdm=True, **options,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(adaptive_parameter_groups(model, 1e-3))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return Trainer(
        model, arguments, train_dataset=examples(base), callbacks=[callback],
        optimizers=(optimizer, None),
    )  # fmt: skip


class Recorder(SelectionRampCallback):
    """Also notes the strength of every step."""

    def on_step_begin(self, args, state, control, **kwargs):
        super().on_step_begin(args, state, control, **kwargs)
        self.seen = [*getattr(self, "seen", []), selections(kwargs["model"])[0].strength.item()]


def test_strength_rises_over_the_first_quarter_and_is_saved(tmp_path):
    model = tiny_adaptive_model(
        AdaptiveSparseForSequenceClassification, selection_strength=0.0, num_hidden_layers=1
    )
    callback = Recorder()
    trainer = trainer_of(model, tmp_path, callback, 8, save_steps=4)
    trainer.train()
    assert callback.seen[1:] == [0.5] + [1.0] * 7
    assert model.config.selection_strength == 1.0
    loaded = AdaptiveSparseForSequenceClassification.from_pretrained(tmp_path / "checkpoint-8")
    assert selections(loaded)[0].strength == 1.0
    resumed = Recorder(ramp_ratio=1.0)
    trainer_of(model, tmp_path, resumed, 8).train(str(tmp_path / "checkpoint-4"))
    assert resumed.seen[1:] == [5 / 8, 6 / 8, 7 / 8, 1.0]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "head", [AdaptiveSparseForSequenceClassification, AdaptiveSparseForMaskedLM]
)
def test_the_log_tells_the_task_from_the_density(tmp_path, head, accumulation):
    """The density counts once for a step, also where the Trainer divides by the tokens of all its
    batches."""
    options = {"target_density": 0.5, "classifier_dropout": 0.0, "hidden_dropout_prob": 0.0}
    model = tiny_adaptive_model(head, **options)
    trainer = trainer_of(
        model, tmp_path, SelectionRampCallback(ramp_ratio=0.5), 2, logging_steps=1,
        gradient_accumulation_steps=accumulation, lr_scheduler_type="constant", seed=3,
    )  # fmt: skip
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer.train()
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert (first["selection_strength"], second["selection_strength"]) == (1.0, 1.0)
    with torch.no_grad():
        density = torch.stack([part.density() for part in selections(model)]).mean().item()
    assert second["selection_density"] == pytest.approx(density)
    # The price starts at 0 and rises by 1 % of the excess with every batch.
    expected = (density - 0.5) ** 2
    assert first["loss"] - first["task_loss"] == pytest.approx(expected, rel=0.02)
    assert second["loss"] - second["task_loss"] == pytest.approx(expected, rel=0.04)
    assert second["task_loss"] > 0.5  # about log 2


class Tracker(TrainerCallback):
    """As those of `report_to`: sends away what it is given, at once."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.sent = [*getattr(self, "sent", []), dict(logs)]


def test_trackers_see_the_selection(tmp_path):
    model = tiny_adaptive_model(AdaptiveSparseForSequenceClassification)
    tracker, ramp = Tracker(), SelectionRampCallback(ramp_ratio=1.0)
    trainer = trainer_of(model, tmp_path, tracker, 2, logging_steps=1)
    ramp.add_to(trainer)
    trainer.train()
    losses = [logs for logs in tracker.sent if "loss" in logs]
    assert [logs["selection_strength"] for logs in losses] == [0.5, 1.0]
    report = sparsity_report(model, tiny_inputs(model, 600, batch_size=1, padding="none"))
    # Every head has less at the ends of a document, and no head more.
    assert (
        0.8 * losses[-1]["selection_keys"] < report.keys_per_query <= losses[-1]["selection_keys"]
    )
    assert losses == [
        {name: entry[name] for name in logs}
        for logs, entry in zip(losses, trainer.state.log_history)
    ]


def test_a_loss_of_the_trainer_is_refused_where_the_model_adds_to_the_loss(tmp_path):
    model = tiny_adaptive_model(AdaptiveSparseForSequenceClassification, target_density=0.5)
    trainer = trainer_of(model, tmp_path, Tracker(), 1)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.loss
    with pytest.raises(ValueError, match=r"None is needed with config\.target_density"):
        SelectionRampCallback().add_to(trainer)


def test_zero_3_is_refused_where_a_density_is_asked_for():
    model = tiny_adaptive_model(AdaptiveSparseForSequenceClassification, target_density=0.5)
    for part in selections(model):  # as ZeRO-3 leaves a parameter outside its layer
        part.budget.data = part.budget.data.new_empty(0)
    with pytest.raises(RuntimeError, match="train with target_density under ZeRO-2"):
        density_loss(selections(model), 0.5)


def test_training_that_selects_nothing_warns_once(monkeypatch):
    model = tiny_adaptive_model(AdaptiveSparseForSequenceClassification, selection_strength=0.0)
    inputs = tiny_inputs(model, with_labels=True)
    warned = []
    monkeypatch.setattr(modeling.logger, "warning_once", warned.append)
    model(**inputs)
    assert warned == []
    model.train()(**inputs)
    assert warned == [modeling.NOTHING_IS_SELECTED]
    set_selection_strength(model, 0.5)
    model(**inputs)
    assert len(warned) == 1


@pytest.mark.parametrize(
    "options", [{"ramp_ratio": 1.5}, {"final_strength": 0.0}, {"final_strength": 2.0}]
)
def test_ramps_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        SelectionRampCallback(**options)


def test_smoothed_labels_are_refused_where_the_model_adds_to_the_loss(tmp_path):
    model = tiny_adaptive_model(AdaptiveSparseForSequenceClassification, target_density=0.5)
    trainer = trainer_of(model, tmp_path, SelectionRampCallback(), 1, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"0 is needed with config\.target_density"):
        trainer.train()


def test_adaptive_parameters_learn_faster_and_do_not_decay():
    model = tiny_adaptive_model(AdaptiveSparseForSequenceClassification)
    groups = adaptive_parameter_groups(model, 1e-4, weight_decay=0.1, multiplier=30)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]
    assert groups[2]["lr"] == pytest.approx(3e-3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(".adaptive." in names[id(p)] for p in groups[2]["params"])
    assert sum(len(group["params"]) for group in groups) == len(names)
    with pytest.raises(ValueError, match="multiplier is 0"):
        adaptive_parameter_groups(model, 1e-4, multiplier=0)
    with pytest.raises(ValueError, match="no trainable adaptive parameter"):
        adaptive_parameter_groups(tiny_model(), 1e-4)


EVERYTHING = {"num_learned_global_blocks": 1}


def adapted(base, **options):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        base, LoraConfig(task_type="SEQ_CLS", modules_to_save=["adaptive", "classifier"], **options)
    )


@pytest.mark.parametrize("fields", [{}, EVERYTHING], ids=["plain", "global blocks"])
def test_an_adapter_brings_its_selection_to_a_fresh_base(fields, tmp_path):
    pytest.importorskip("peft")
    from peft import PeftModel

    base = tiny_adaptive_model(
        AdaptiveSparseForSequenceClassification, selection_strength=0.0, **fields
    )
    base.save_pretrained(tmp_path / "base")
    model = adapted(base)
    inputs = tiny_inputs(base, 300, with_labels=True)
    callback = SelectionRampCallback()
    trainer_of(model, tmp_path / "run", callback, 3).train()
    assert all(part.strength == 1.0 for part in selections(model))
    model.eval()
    with torch.no_grad():
        expected = model(**inputs).logits
        with model.disable_adapter():
            plain = model(**inputs).logits
    assert not torch.allclose(expected, plain)
    model.save_pretrained(tmp_path / "adapter")

    fresh = AdaptiveSparseForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        torch.testing.assert_close(fresh(**inputs).logits, plain)
        loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(**inputs).logits, expected)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    assert [part.strength.item() for part in selections(merged)] == [1.0, 1.0]


def test_an_adapter_says_what_its_base_lacks(tmp_path):
    """A base that becomes adaptive only by an argument is not adaptive where it is stored."""
    peft = pytest.importorskip("peft")
    tiny_model(AdaptiveSparseForSequenceClassification).save_pretrained(tmp_path / "base")
    base = AdaptiveSparseForSequenceClassification.from_pretrained(
        tmp_path / "base", attention_pattern="adaptive"
    )
    model = adapted(base).eval()
    set_selection_strength(model, 1.0)
    model.save_pretrained(tmp_path / "adapter")

    inputs = tiny_inputs(base, 300)
    for load, error in (
        (peft.AutoPeftModelForSequenceClassification.from_pretrained, RuntimeError),
        (AdaptiveSparseForSequenceClassification.from_pretrained, ValueError),
    ):
        with pytest.raises(
            error, match=r"selects nothing: .* attention_pattern='adaptive'"
        ) as said:
            load(tmp_path / "adapter")
        assert str(said.value).count("selects nothing") == 1
        with torch.no_grad():
            found = load(tmp_path / "adapter", attention_pattern="adaptive").eval()(**inputs).logits
            torch.testing.assert_close(found, model(**inputs).logits)


STEPS = {
    "without strength": (0.0, [(100, 100), (100, 20)], {}),
    "documents shorter than the window": (1.0, [(100, 10), (10, 10)], {}),
    "global blocks": (1.0, [(100, 10), (10, 100)], EVERYTHING),
}


def _train(rank, folder):
    outcomes = {}
    for name, (strength, lengths, fields) in STEPS.items():
        model = tiny_adaptive_model(
            AdaptiveSparseForSequenceClassification, selection_strength=strength, **fields
        ).train()
        replica = torch.nn.parallel.DistributedDataParallel(model)
        for length in lengths:  # the second step fails if the first one missed a gradient
            inputs = tiny_inputs(model, length[rank], with_labels=True, seed=rank)
            loss_of(replica, inputs).backward()
        missing = [key for key, parameter in model.named_parameters() if parameter.grad is None]
        gradient = model.model.layers[0].attention.query.weight.grad
        outcomes[name] = (missing, gradient.clone())
    torch.save(outcomes, folder / f"{rank}.pt")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="starts processes that talk over gloo")
def test_two_processes_agree_on_their_gradients(tmp_path):
    run_two_processes(_train, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert set(first) == set(second) == set(STEPS)
    for name, (missing, gradient) in first.items():
        assert missing == second[name][0] == [], name
        assert torch.equal(gradient, second[name][1]), name
