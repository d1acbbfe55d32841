"""Without a mask, a head reads what the source's class of that head reads, whichever head the
checkpoint was saved with.
"""

import pytest
import torch
import transformers
from checkpoints import HEADS, make_inputs, write_source

import adaptive_longformer
from adaptive_longformer.conversion.convert import convert_checkpoint

SAVED = HEADS[1:]


@pytest.fixture(scope="module", params=SAVED)
def checkpoint(request, tmp_path_factory):
    """A Longformer checkpoint as a class of Transformers saves it, and converted."""
    folder = tmp_path_factory.mktemp(request.param)
    write_source(folder / "source", "longformer", request.param)
    convert_checkpoint(folder / "source", folder / "target")
    return folder


@pytest.mark.parametrize("head", HEADS)
def test_the_loaded_head_decides(checkpoint, head):
    source = getattr(transformers, "Longformer" + head).from_pretrained(checkpoint / "source")
    ours = getattr(adaptive_longformer, "AdaptiveSparse" + head).from_pretrained(
        checkpoint / "target"
    )
    inputs = make_inputs(source.config, head, 200, padding="right")
    with torch.no_grad():
        expected = source.eval()(**inputs, output_hidden_states=True).hidden_states[-1][:, :200]
        found = ours.eval()(**inputs, output_hidden_states=True).hidden_states[-1]
    valid = inputs["attention_mask"].view(found.shape[:2]) == 1
    assert (found - expected)[valid].abs().max() < 1e-5 * max(1.0, expected[valid].abs().max())
