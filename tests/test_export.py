import pytest
import torch
from transformers import BertConfig, BertModel

import adaptive_longformer.export as exporting
from adaptive_longformer.modeling.adaptive_selection import selections
from adaptive_longformer.modeling.modeling_adaptive_sparse import (
    AdaptiveSparseForQuestionAnswering,
    AdaptiveSparseForSequenceClassification,
)
from adaptive_longformer.testing import tiny_adaptive_model, tiny_inputs, tiny_model
from adaptive_longformer_command_line import main

SIZES = [(1, 5), (4, 33), (2, 300)]  # lengths below and above the window of 32, in no export


def assert_equals_the_model(run, model, names, has_mask=False):
    for batch_size, length in SIZES:
        inputs = tiny_inputs(model, length, batch_size=batch_size, padding="left")
        if model.config.sep_token_id is not None:
            inputs["input_ids"][:, length // 2 + 2] = model.config.sep_token_id
        if has_mask:
            is_global = (torch.arange(length) % 30 == 4).long()
            inputs["global_attention_mask"] = is_global.repeat(batch_size, 1)
        with torch.no_grad():
            expected = model(**inputs)
        actual = run(inputs)
        assert set(actual) == set(names)
        for name in names:
            torch.testing.assert_close(
                actual[name], expected[name].to(actual[name].dtype), atol=1e-4, rtol=1e-4
            )


def test_onnx_runtime_equals_the_model(tmp_path, capsys):
    pytest.importorskip("onnxscript", reason="needs the extra 'export'")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
    model = tiny_model(
        AdaptiveSparseForQuestionAnswering, num_hidden_layers=1, sep_token_id=2,
        separate_global_projections=True, max_global_tokens=40,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "graph")]) == 0
    output, progress = capsys.readouterr()
    assert "model.onnx" in output and "at most: 40" in output and "difference" in output
    assert "checking: 100 %" in progress
    assert (tmp_path / "graph" / "config.json").is_file()
    session = onnxruntime.InferenceSession(tmp_path / "graph" / "model.onnx")
    assert [given.name for given in session.get_inputs()] == ["input_ids", "attention_mask"]
    names = [result.name for result in session.get_outputs()]

    def run(inputs):
        results = session.run(names, {name: given.numpy() for name, given in inputs.items()})
        return dict(zip(names, map(torch.from_numpy, results), strict=True))

    assert_equals_the_model(run, model, ["start_logits", "end_logits"])


def test_torch_export_equals_the_model_in_linear_memory(tmp_path, capsys):
    model = tiny_adaptive_model(
        AdaptiveSparseForSequenceClassification, num_hidden_layers=1,
        separate_global_projections=True,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    arguments = ["export", str(tmp_path / "model"), str(tmp_path / "graph"), "--format", "torch"]
    assert main([*arguments, "--window-only", "--global-attention-mask"]) == 0
    program = torch.export.load(tmp_path / "graph" / "model.pt2")
    module = program.module()
    model.set_selection_strength(0.0)
    assert_equals_the_model(lambda inputs: module(**inputs), model, ["logits"], has_mask=True)
    tensors = {node.name: node.meta.get("val") for node in program.graph.nodes}
    length = tensors["input_ids"].shape[1].node.expr
    for name, tensor in tensors.items():
        sizes = tensor.shape if isinstance(tensor, torch.Tensor) else ()
        symbols = [size.node.expr for size in sizes if isinstance(size, torch.SymInt)]
        assert sum(length in size.free_symbols for size in symbols) <= 1, (name, sizes)


@pytest.mark.parametrize("file_format", ["onnx", "torch"])
@pytest.mark.parametrize("repeats", [False, True])
def test_a_graph_selects_what_the_model_does(tmp_path, capsys, file_format, repeats):
    """Both stages, repeated positions, blocks for all, budgets, gates and spans. The model chooses
    in float64, as its kernels may choose by int8. No masses here are so near that rounding changes
    a choice.
    """
    if file_format == "onnx":
        pytest.importorskip("onnxscript", reason="needs the extra 'export'")
        pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
    model = tiny_adaptive_model(
        AdaptiveSparseForQuestionAnswering, num_hidden_layers=1, selection_candidates=32,
        num_learned_global_blocks=2, max_global_tokens=3, max_position_embeddings=1500,
        source_config={"max_position_embeddings": 52} if repeats else None,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    arguments = ["export", str(tmp_path / "model"), str(tmp_path / "graph")]
    assert main([*arguments, "--format", file_format]) == 0
    assert "tokens per sequence, at most, as blocks are selected: 1024" in capsys.readouterr().out
    run = exporting._runner(tmp_path / "graph" / exporting.FILES[file_format])
    assert_equals_the_model(run, model.double(), ["start_logits", "end_logits"])
    for part in selections(model):  # the choice is heard in the logits
        part.gate.data.zero_()
    with pytest.raises(AssertionError):
        assert_equals_the_model(run, model, ["start_logits", "end_logits"])


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        (None, [], ["bert", "convert"]),
        ({"attention_pattern": "strided"}, [], ["attention_pattern", "'strided'", "longformer"]),
        (
            {"attention_pattern": "adaptive", "selection_sampling": True},
            [],
            ["selection_sampling is True", "--window-only"],
        ),
        ({}, ["--format", "tflite"], ["--format", "tflite", "onnx", "torch"]),
        ({}, ["--max-global-tokens", "-1"], ["max_global_tokens", "-1"]),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, capsys, settings, options, words):
    if settings is None:
        config = BertConfig(vocab_size=40, hidden_size=16, num_attention_heads=2)
        BertModel(config).save_pretrained(tmp_path / "model")
    else:
        tiny_model(num_hidden_layers=1, **settings).save_pretrained(tmp_path / "model")
    capsys.readouterr()
    try:
        code = main(["export", str(tmp_path / "model"), str(tmp_path / "graph"), *options])
    except SystemExit as stop:  # argparse leaves this way
        code = stop.code
    error = capsys.readouterr().err.splitlines()
    assert code == 2
    assert all(word in error[-1] for word in words), error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_nothing_is_written_if_packages_are_missing_or_the_graph_is_wrong(
    tmp_path, capsys, monkeypatch
):
    tiny_model(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    arguments = ["export", str(tmp_path / "model"), str(tmp_path / "graph")]
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    assert main(arguments) == 2
    assert "pip install 'adaptive-longformer[export]'" in capsys.readouterr().err

    def write_nonsense(model, inputs, file):
        file.write_bytes(b"nonsense")

    monkeypatch.setattr(exporting, "export", write_nonsense)
    monkeypatch.setattr(exporting, "_runner", lambda file: lambda inputs: {
        "last_hidden_state": torch.zeros(()), "pooler_output": torch.zeros(()),
    })  # fmt: skip
    assert main([*arguments, "--format", "torch"]) == 2
    assert "nothing was written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    (tmp_path / "graph").mkdir()
    assert main([*arguments, "--format", "torch"]) == 2
    assert "exists" in capsys.readouterr().err
