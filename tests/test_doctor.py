import pytest

from adaptive_longformer.attention.backends.choose import BACKENDS
from adaptive_longformer_command_line import main


@pytest.fixture
def no_kernels(no_library, monkeypatch):
    monkeypatch.setenv("ADAPTIVE_LONGFORMER_KERNELS", "off")


def test_doctor_says_for_every_backend_whether_it_runs_or_why_not(no_kernels, capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"nvcc", "ninja"} <= {line.split()[0] for line in lines if line}
    for kind in ("cpu", "cuda"):
        (line,) = [line for line in lines if line.startswith(f"{kind} kernels")]
        assert line.endswith("none: ADAPTIVE_LONGFORMER_KERNELS is 'off'")
    on_cpu = lines[lines.index("float32 on cpu") + 1 :]
    verdicts = {line.split()[0]: line.split()[1] for line in on_cpu[: len(BACKENDS)]}
    assert verdicts == {
        "sdpa": "yes:",
        "cuda": "no:",
        "triton": "no:",
        "cpp": "no:",
        "blocked": "yes:",
        "exportable": "yes:",
        "reference": "yes:",
    }
    assert "ADAPTIVE_LONGFORMER_KERNELS is 'off'" in next(line for line in on_cpu if "cpp" in line)
    auto = next(line for line in on_cpu if line.split()[0] == "auto")
    assert "takes blocked" in auto and auto.endswith("for want of cpp")


def test_doctor_finds_a_backend_that_is_wrong(no_kernels, monkeypatch, capsys):
    honest = BACKENDS["blocked"]

    def run(call):
        output, lse = honest.run(call)
        return output * 1.01, lse

    monkeypatch.setitem(BACKENDS, "blocked", honest._replace(run=run))
    assert main(["doctor"]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
    assert len(wrong) == 1 and wrong[0].split()[0] == "blocked"
