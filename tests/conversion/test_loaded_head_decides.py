"""Without a mask, a head reads what the source's class of that head reads, whichever head the
checkpoint was saved with.
"""

import pytest
import torch
import transformers
from checkpoints import HEADS, load_converted, make_inputs, write_source
from seq2seq_checkpoints import HEADS as LED_HEADS
from seq2seq_checkpoints import load_converted as load_led
from seq2seq_checkpoints import write_source as write_led

from adaptive_longformer.conversion.convert import convert_checkpoint

SAVED = HEADS[1:]


@pytest.fixture(scope="module", params=SAVED)
def checkpoint(request, tmp_path_factory):
    """A Longformer checkpoint as a class of Transformers saves it, and converted."""
    folder = tmp_path_factory.mktemp(request.param)
    # Longformer's question answering takes the number of labels for that of its scores.
    write_source(folder / "source", "longformer", request.param, num_labels=2)
    convert_checkpoint(folder / "source", folder / "target")
    return folder


@pytest.mark.parametrize("head", HEADS)
def test_the_loaded_head_decides(checkpoint, head):
    # Multiple choice has a classifier of another size.
    source = getattr(transformers, "Longformer" + head).from_pretrained(
        checkpoint / "source", ignore_mismatched_sizes=True
    )
    ours = load_converted(checkpoint / "target", head, ignore_mismatched_sizes=True)
    inputs = make_inputs(source.config, head, 200, padding="right")
    with torch.no_grad():
        expected = source.eval()(**inputs, output_hidden_states=True).hidden_states[-1][:, :200]
        found = ours(**inputs, output_hidden_states=True).hidden_states[-1]
    valid = inputs["attention_mask"].view(found.shape[:2]) == 1
    assert (found - expected)[valid].abs().max() < 1e-5 * max(1.0, expected[valid].abs().max())


@pytest.mark.parametrize("head", LED_HEADS["led"])
def test_of_an_led_the_loaded_head_decides_too(tmp_path, head):
    write_led(tmp_path / "source", "led", "ForConditionalGeneration")
    convert_checkpoint(tmp_path / "source", tmp_path / "target")
    source = getattr(transformers, "LED" + head).from_pretrained(tmp_path / "source").eval()
    ours = load_led(tmp_path / "target", head)
    inputs = {"input_ids": torch.randint(5, 90, (2, 200)), "attention_mask": torch.ones(2, 200)}
    inputs["input_ids"][:, -1] = source.config.eos_token_id
    with torch.no_grad():
        expected = source(**inputs, use_cache=False).encoder_last_hidden_state[:, :200]
        found = ours(**inputs).encoder_last_hidden_state
    assert (found - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max())
