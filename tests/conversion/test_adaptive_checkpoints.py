import json

import pytest
import torch
from checkpoints import FAMILIES, load_converted, write_source
from safetensors.torch import load_file

from adaptive_longformer.conversion.convert import convert_checkpoint
from adaptive_longformer.modeling.modeling_adaptive_sparse import AdaptiveSparseForMaskedLM


@pytest.fixture(params=FAMILIES)
def converted(request, tmp_path):
    """The folder of a converted checkpoint, saved again as an adaptive one."""
    source = write_source(tmp_path / "source", request.param, "ForMaskedLM")
    convert_checkpoint(source, tmp_path / "target")
    model = AdaptiveSparseForMaskedLM.from_pretrained(
        tmp_path / "target", attention_pattern="adaptive", num_selected_blocks=1
    )
    return model, tmp_path


def test_every_family_becomes_adaptive_by_configuration_with_the_same_logits(converted):
    """BigBird's blocks have no adaptive form: it becomes a sliding window first."""
    model, folder = converted
    plain = load_converted(folder / "target", "ForMaskedLM").eval()
    if plain.config.attention_pattern == "big_bird":
        plain = AdaptiveSparseForMaskedLM.from_pretrained(
            folder / "target", attention_pattern="longformer"
        ).eval()
    ids = torch.randint(5, 60, (2, 50))
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, plain(ids).logits)


def test_without_strength_it_goes_back_bit_for_bit(converted):
    model, folder = converted
    model.save_pretrained(folder / "adaptive")
    report = convert_checkpoint(folder / "adaptive", folder / "back", reverse=True)
    assert not any("adaptive" in note for note in report.notes)
    original = load_file(folder / "source" / "model.safetensors")
    back = load_file(folder / "back" / "model.safetensors")
    # What our model has no place for, such as an unread pooler, is not saved again.
    assert all(".pooler." in name for name in original.keys() - back.keys())
    assert back.keys() <= original.keys()
    for name, tensor in back.items():
        assert torch.equal(original[name], tensor), name
    kept = json.loads((folder / "back" / "config.json").read_text())
    assert kept == json.loads((folder / "source" / "config.json").read_text())


def test_with_strength_it_goes_back_only_without_its_selection(converted):
    model, folder = converted
    model.set_selection_strength(0.5)
    model.save_pretrained(folder / "adaptive")
    with pytest.raises(ValueError, match=r"strength 0\.5.*--drop-adaptive"):
        convert_checkpoint(folder / "adaptive", folder / "back", reverse=True)
    assert not (folder / "back").exists()
    report = convert_checkpoint(
        folder / "adaptive", folder / "back", reverse=True, drop_adaptive=True
    )
    assert any("selection was left out" in note for note in report.notes)
    assert not any("adaptive." in name for name in load_file(folder / "back" / "model.safetensors"))


def test_dropping_is_said_for_the_way_back_only(tmp_path):
    source = write_source(tmp_path / "source", "longformer", "ForMaskedLM")
    with pytest.raises(ValueError, match="drop_adaptive: allowed only together with reverse"):
        convert_checkpoint(source, tmp_path / "target", drop_adaptive=True)
