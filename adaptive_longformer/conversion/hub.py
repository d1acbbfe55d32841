"""Putting a checkpoint folder on the hub."""

import re
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined] # of httpx or httpx2

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def check_push(name: str | None, private: bool, overwrite: bool) -> None:
    """Raises before anything is written if a model cannot be put on the hub under a name.

    Args:
        name: USER/NAME or ORGANISATION/NAME; None: nothing is put there.
        private: whether nobody else is to see it.
        overwrite: whether a model of that name may be replaced.

    Raises:
        FileExistsError: there is a model of that name.
        OSError: there is no token, or the hub does not know it or cannot be reached.
        ValueError: the name is not of that form, or neither the user's nor of an organisation; or
            nothing is put there and that is to be private.
    """
    if name is None:
        if private:
            raise ValueError("private: allowed only together with push_to")
        return
    if not _NAME.fullmatch(name):
        raise ValueError(f"push_to: {name!r} is not allowed; give USER/NAME, such as me/my-model")
    if get_token() is None:
        raise OSError(
            f"push_to: {name} needs a token of the hub, none was found: `hf auth login` stores "
            "one, or HF_TOKEN holds it"
        )
    api = HfApi()
    try:
        user = api.whoami()
        exists = api.repo_exists(name)
    except (HTTPError, OSError) as error:
        raise OSError(f"push_to: {name}: the hub says: {_first_line(error)}") from error
    owners = [user["name"], *(org["name"] for org in user.get("orgs", []))]
    if name.split("/")[0] not in owners:
        raise ValueError(f"push_to: {name} is not yours; {', '.join(owners)} are")
    if exists and not overwrite:
        raise FileExistsError(
            f"push_to: the model {name} exists; choose another name, or replace it with "
            "--overwrite (overwrite=True)"
        )


def push(folder: Path, name: str, private: bool) -> str:
    """Puts a checkpoint folder on the hub, in one commit that replaces what was there.

    Returns:
        The address of the model.

    Raises:
        OSError: it failed; the folder stays as it is.
    """
    api = HfApi()
    try:
        address = api.create_repo(name, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            delete_patterns="*",
            commit_message="Checkpoint written by adaptive-longformer",
        )
    except (HTTPError, OSError) as error:
        raise OSError(
            f"push_to: {name}: {_first_line(error)}; the checkpoint is in {folder}, and "
            f"`hf upload {name} {folder}` tries again"
        ) from error
    return str(address)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
