import torch

from adaptive_longformer.attention import global_keys
from adaptive_longformer.modeling import padding as padding_of_rows
from adaptive_longformer.modeling.padding import (
    LeftPadding,
    effective_mask,
    first_slots,
    first_tokens,
    first_valid_token,
)
from adaptive_longformer.testing import tiny_adaptive_model

MASK = torch.tensor([[0, 1, 1], [1, 1, 0], [0, 0, 1], [0, 0, 0]]).bool()


def test_first_valid_token_reads_behind_left_padding():
    hidden_states = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    assert first_valid_token(hidden_states, mask).tolist() == [[2.0, 3.0], [6.0, 7.0]]
    assert torch.equal(first_valid_token(hidden_states, None), hidden_states[:, 0])


def test_the_first_token_is_found_and_marked():
    assert first_slots(MASK).tolist() == [1, 0, 2, 0]
    assert first_tokens(MASK).int().tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_rows_begin_with_their_tokens_and_come_back():
    padding = LeftPadding.of(MASK)
    assert padding.removed(MASK).int().tolist() == [[1, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0]]
    states = torch.randn(4, 2, 3, 5)
    removed = padding.removed(states, dim=2)
    assert torch.equal(removed[2, :, 0], states[2, :, 2])
    assert torch.equal(padding.restored(removed, dim=2), states)
    assert padding.removed(None) is None


def test_nothing_moves_without_padding_in_front():
    rows = torch.randn(2, 3)
    for mask in (None, MASK[1:2].expand(2, -1)):
        padding = LeftPadding.of(mask)
        assert padding.removed(rows) is rows
        assert padding.restored(rows) is rows


def test_a_mask_that_hides_nothing_is_none():
    assert effective_mask(torch.ones(2, 3, dtype=torch.bool), torch.device("cpu")) is None
    assert effective_mask(MASK, torch.device("cpu")) is MASK


def test_masks_are_made_once_for_all_layers(monkeypatch):
    calls = []

    def counted(module, name):
        function = getattr(module, name)

        def call(*arguments):
            calls.append(name)
            return function(*arguments)

        monkeypatch.setattr(module, name, call)

    model = tiny_adaptive_model(attention_backend="blocked").train()
    input_ids = torch.randint(5, 90, (2, 60))
    mask = torch.ones_like(input_ids)
    mask[1, :7] = 0
    counted(padding_of_rows, "first_slots")
    counted(global_keys, "pack_global_tokens")
    model(input_ids, mask).last_hidden_state.sum().backward()
    # The pooler looks for the first tokens, too.
    assert calls == ["first_slots", "pack_global_tokens", "first_slots"]
