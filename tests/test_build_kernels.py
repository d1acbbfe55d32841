import shutil

import pytest

from adaptive_longformer.attention.kernels import build, load
from adaptive_longformer_command_line import main


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler (c++)")
def test_kernels_are_built_once(sandbox, capsys):
    assert main(["build-kernels", "cpu"]) == 0
    assert "cpu: built by c++ in" in capsys.readouterr().out
    load.forget()
    assert main(["build-kernels"]) == 0
    assert f"cpu: already in {build.library_folder('cpu')}\n" in capsys.readouterr().out


def test_a_failed_build_is_told_with_its_reason(sandbox, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["build-kernels", "cpu"]) == 1
    assert "cpu: not built: no C++ compiler: no-such-compiler" in capsys.readouterr().out


def test_an_unknown_kind_is_one_line(capsys):
    assert main(["build-kernels", "tpu"]) == 2
    assert capsys.readouterr().err == "adaptive-longformer: KIND is 'tpu', allowed are cpu, cuda\n"
