import pytest

from adaptive_longformer.training.resume import last_complete_checkpoint


@pytest.fixture
def output(tmp_path):
    """Checkpoints 9 and 10, both whole."""
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text('{"global_step": 9}')
    (tmp_path / "checkpoint-best").mkdir()
    return tmp_path


def test_the_newest_whole_checkpoint_is_taken(output, capsys):
    assert last_complete_checkpoint(output) == str(output / "checkpoint-10")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("state", [None, "", '{"global_st'])
def test_one_that_was_not_finished_is_left_out_with_a_line(output, capsys, state):
    file = output / "checkpoint-10" / "trainer_state.json"
    file.unlink() if state is None else file.write_text(state)
    assert last_complete_checkpoint(output) == str(output / "checkpoint-9")
    assert capsys.readouterr().out == f"{output / 'checkpoint-10'} is incomplete and is left out\n"


def test_without_any_the_training_starts_anew(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["rng_state_0.pth", "rng_state_1.pth"], "was written by 2 processes, these are 1"),
        (["rng_state.pth", "pytorch_model_fsdp_0/.metadata"], "is sharded by FSDP, this training"),
    ],
)
def test_one_of_other_processes_is_refused(output, names, message):
    for name in names:
        (output / "checkpoint-10" / name).parent.mkdir(exist_ok=True)
        (output / "checkpoint-10" / name).touch()
    with pytest.raises(ValueError, match=message):
        last_complete_checkpoint(output)
