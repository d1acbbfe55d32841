"""Where results go, and the commit that they are of."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
# Results themselves may be new.
_CODE = ("--", ".", ":(exclude)benchmarks/results")


def add_results_arguments(parser: argparse.ArgumentParser, default: str = "results") -> None:
    """Add `--results` and `--allow-dirty`."""
    parser.add_argument(
        "--results", default=default, metavar="DIR", help=f"folder to write to (default: {default})"
    )
    parser.add_argument(
        "--allow-dirty",
        action="store_true",
        help="write results although their code is in no commit",
    )


def results_folder(args: argparse.Namespace) -> Path:
    """The folder for results; ends the program if nobody could say later what they are of.

    To be asked before anything is measured.
    """
    commit = commit_of_the_tree()
    if not args.allow_dirty and (commit == "unknown" or commit.endswith("-dirty")):
        what = "the tree is of no known commit"
        if commit != "unknown":
            what = f"the tree has changes that are not committed ({commit})"
        sys.exit(f"{what}: commit first, or write results all the same with --allow-dirty")
    return Path(args.results)


def commit_of_the_tree() -> str:
    """What is checked out, with "-dirty" if tracked files have changed, or "unknown"."""
    commit = _git("rev-parse", "--short", "HEAD")
    if not commit:
        return "unknown"
    is_dirty = _git("status", "--porcelain", "--untracked-files=no", *_CODE)
    return f"{commit}-dirty" if is_dirty else commit


def _git(*arguments: str) -> str:
    """What git says, or nothing outside of git."""
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(
        ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
