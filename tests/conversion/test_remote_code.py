import json
import os
import subprocess
import sys

from checkpoints import HEADS, write_source

from adaptive_longformer.conversion.convert import convert_checkpoint

LOAD = """
import sys
import torch
import transformers
assert "adaptive_longformer" not in sys.modules
for head in {heads!r}:
    auto = getattr(transformers, "AutoModel" + head.removeprefix("Model"))
    model = auto.from_pretrained({folder!r} + head, trust_remote_code=True).eval()
    ids = torch.arange(5, 45)[None].expand(2, -1)
    ids = ids[None] if head == "ForMultipleChoice" else ids
    before = model(ids, return_dict=False)[0]
    model.save_pretrained({folder!r} + head + "-saved")
    again = auto.from_pretrained({folder!r} + head + "-saved", trust_remote_code=True).eval()
    assert torch.equal(again(ids, return_dict=False)[0], before)
    import adaptive_longformer
    expected = getattr(adaptive_longformer, "AdaptiveSparse" + head)
    assert type(model) is expected and type(again) is expected, (type(model), type(again))
    assert type(model.config) is adaptive_longformer.AdaptiveSparseConfig
    again.save_pretrained({folder!r} + head + "-again")
"""

FILES = ("configuration_adaptive_sparse.py", "modeling_adaptive_sparse.py")


def python(code, tmp_path):
    environment = dict(os.environ, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300
    )


def test_auto_classes_load_converted_folders_without_our_import(tmp_path):
    for head in HEADS:
        source = write_source(tmp_path / ("source" + head), "longformer", head)
        convert_checkpoint(source, tmp_path / ("target" + head))
    done = python(LOAD.format(heads=HEADS, folder=str(tmp_path / "target")), tmp_path)
    assert done.returncode == 0, done.stderr
    for head in HEADS:
        for folder in (tmp_path / f"target{head}-saved", tmp_path / f"target{head}-again"):
            for file in FILES:
                expected = (tmp_path / f"target{head}" / file).read_text()
                assert (folder / file).read_text() == expected
            config = json.loads((folder / "config.json").read_text())
            auto = "AutoModel" + head.removeprefix("Model")
            assert config["auto_map"][auto] == f"modeling_adaptive_sparse.AdaptiveSparse{head}"


def test_a_converted_folder_says_what_to_install_where_the_package_is_missing(tmp_path):
    source = write_source(tmp_path / "source", "bert", "Model")
    convert_checkpoint(source, tmp_path / "target")
    code = f"""
import sys
sys.modules["adaptive_longformer"] = None
from transformers import AutoModel
AutoModel.from_pretrained({str(tmp_path / "target")!r}, trust_remote_code=True)
"""
    done = python(code, tmp_path)
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    # Transformers' own words would be `pip install adaptive_longformer`, whatever that is on PyPI.
    assert "ImportError: this model needs the package adaptive-longformer: `pip install .`" in last
