"""Uploads of exported models to the hub."""

from pathlib import Path

from llamagen.hub.address import Address, repository_address
from llamagen.hub.errors import hub_errors

MESSAGE = "Upload a model of llamagen-lightning"


def upload_folder(folder: Path, address: str) -> str:
    """Upload all files of a folder to a repository, in one commit, so that readers see all of them or none.

    Args:
        folder: the folder; hidden files and folders are left out.
        address: ``hf://owner/repository``; it is created if it does not exist.

    Returns:
        The address of the repository's page.

    Raises:
        ValueError: in one line with what to do, if the address is wrong, there is no token, the token may not write
            there, there is no network, or the upload fails.
    """
    target = check_upload(address)
    from huggingface_hub import CommitOperationAdd, HfApi, constants

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder): path for path in files}
    operations = [
        CommitOperationAdd(name.as_posix(), path)
        for name, path in names.items()
        if not any(part.startswith(".") for part in name.parts)
    ]
    if not operations:
        raise ValueError(f"{folder} has no files to upload; give the folder of an exported model")
    with hub_errors(target, uploads=True):
        api = HfApi()
        api.create_repo(target.repository, exist_ok=True)
        api.create_commit(target.repository, operations, commit_message=MESSAGE, revision=target.revision)
    return f"{constants.ENDPOINT}/{target.repository}"


def check_upload(address: str) -> Address:
    """Check the address of an upload, and that there is a token, before the work whose result is uploaded.

    Args:
        address: ``hf://owner/repository``.

    Raises:
        ValueError: in one line, if the address is wrong, or there is no token.
    """
    target = repository_address(address)
    with hub_errors(target, uploads=True):
        from huggingface_hub import constants, get_token
    if get_token() is None and not constants.is_offline_mode():
        raise ValueError(
            f"{address}: an upload takes a token with the permission to write; run `hf auth login`, or set HF_TOKEN"
        )
    return target
