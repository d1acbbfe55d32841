import pytest
from fuzz import main


@pytest.mark.slow
def test_two_thousand_cases_are_right_or_clear_errors(capsys):
    assert main(["--cases", "2000", "--seed", "0"]) == 0, capsys.readouterr().out
