"""Putting a converted folder on the hub; a stand-in answers for it, nothing leaves the machine."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import write_source
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from adaptive_longformer.conversion import hub
from adaptive_longformer.conversion.convert import convert_checkpoint
from adaptive_longformer_command_line import main

ANSWER = SimpleNamespace(request=None, headers={})


class Hub:
    """Keeps what it is given: name -> files, and what was asked for."""

    def __init__(self):
        self.models = {"me/taken": {"old.bin": b"old"}}
        self.calls = []
        self.refuses = None

    def whoami(self):
        self.calls.append("whoami")
        if self.refuses == "whoami":
            raise HfHubHTTPError("Invalid user token.\nRequest ID: 1", response=ANSWER)
        if self.refuses == "connection":
            raise HTTPError("[Errno -2] Name or service not known")
        return {"name": "me", "orgs": [{"name": "ours"}]}

    def repo_exists(self, repo_id):
        return repo_id in self.models

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append(("create", repo_id, private))
        assert exist_ok or repo_id not in self.models
        self.models.setdefault(repo_id, {})
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, delete_patterns, commit_message):
        self.calls.append(("upload", repo_id))
        if self.refuses == "upload":
            raise HTTPError("The read operation timed out")
        assert delete_patterns == "*"
        folder = Path(folder_path)
        self.models[repo_id] = {
            str(file.relative_to(folder)): file.read_bytes()
            for file in folder.rglob("*")
            if file.is_file()
        }


@pytest.fixture
def the_hub(monkeypatch):
    stand_in = Hub()
    monkeypatch.setattr(hub, "HfApi", lambda: stand_in)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_token")
    return stand_in


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("hub") / "source", "roberta", "ForMaskedLM")


def test_the_whole_folder_goes_to_the_hub(the_hub, source, tmp_path):
    target = tmp_path / "target"
    report = convert_checkpoint(source, target, push_to="ours/long", private=True)
    assert report.address == "https://hub/ours/long"
    assert the_hub.calls == ["whoami", ("create", "ours/long", True), ("upload", "ours/long")]
    pushed = the_hub.models["ours/long"]
    assert pushed == {file.name: file.read_bytes() for file in target.iterdir()}
    card = ModelCard(pushed["README.md"].decode())
    assert 'from_pretrained("ours/long")' in card.text


def test_a_model_on_the_hub_is_replaced_only_if_told(the_hub, source, tmp_path):
    with pytest.raises(FileExistsError, match="push_to: the model me/taken exists"):
        convert_checkpoint(source, tmp_path / "target", push_to="me/taken")
    assert list(tmp_path.iterdir()) == []
    convert_checkpoint(source, tmp_path / "target", push_to="me/taken", overwrite=True)
    assert "old.bin" not in the_hub.models["me/taken"]
    assert "model.safetensors" in the_hub.models["me/taken"]


@pytest.mark.parametrize(
    ("refuses", "name", "message"),
    [
        ("whoami", "me/new", "push_to: me/new: the hub says: Invalid user token."),
        ("connection", "me/new", "the hub says: [Errno -2] Name or service not known"),
        (None, "you/new", "push_to: you/new is not yours; me, ours are"),
        (None, "new", "push_to: 'new' is not allowed; give USER/NAME, such as me/my-model"),
        (None, "me/../new", "push_to: 'me/../new' is not allowed"),
    ],
)
def test_what_the_hub_would_refuse_is_one_line_and_nothing_is_written(
    refuses, name, message, the_hub, source, tmp_path, capsys
):
    the_hub.refuses = refuses
    assert main(["convert", str(source), str(tmp_path / "target"), "--push-to", name]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert len(output.err.splitlines()) == 1 and output.out == ""
    assert list(tmp_path.iterdir()) == []
    assert set(the_hub.models) == {"me/taken"}


def test_without_a_token_nothing_is_asked_and_nothing_is_written(
    the_hub, source, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    assert main(["convert", str(source), str(tmp_path / "target"), "--push-to", "me/new"]) == 2
    error = capsys.readouterr().err
    assert "push_to: me/new needs a token of the hub, none was found: `hf auth login`" in error
    assert len(error.splitlines()) == 1
    assert the_hub.calls == [] and list(tmp_path.iterdir()) == []


def test_an_upload_that_fails_says_where_the_checkpoint_is(the_hub, source, tmp_path, capsys):
    the_hub.refuses = "upload"
    target = tmp_path / "target"
    assert main(["convert", str(source), str(target), "--push-to", "me/new"]) == 2
    error = capsys.readouterr().err
    assert "The read operation timed out" in error
    assert f"`hf upload me/new {target}` tries again" in error
    assert (target / "model.safetensors").is_file()
    assert the_hub.models["me/new"] == {}


def test_private_alone_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match="private: allowed only together with push_to"):
        convert_checkpoint(source, tmp_path / "target", private=True)


def test_the_card_takes_over_what_the_sources_card_says(tmp_path):
    source = write_source(tmp_path / "source", "bert", "ForSequenceClassification")
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_link: https://license\nlanguage:\n- en\n- de\n"
        "datasets: imdb\ntags: {a: b}\n---\n"
    )
    convert_checkpoint(source, tmp_path / "target", verify=True)
    data = ModelCard.load(tmp_path / "target" / "README.md").data
    assert data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["adaptive_sparse", "long-document", "bert"],
        "license": "other",
        "license_link": "https://license",
        "language": ["en", "de"],
        "datasets": "imdb",
    }


@pytest.mark.parametrize("text", ["license: [", "- a\n- b", "license: {a: b}", "no block"])
def test_a_damaged_card_of_the_source_is_not_taken_over(text, tmp_path):
    source = write_source(tmp_path / "source", "bert", "Model")
    (source / "README.md").write_text(f"---\n{text}\n---\n" if text != "no block" else text)
    convert_checkpoint(source, tmp_path / "target")
    data = ModelCard.load(tmp_path / "target" / "README.md").data
    assert set(data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
