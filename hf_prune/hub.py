"""Upload a checkpoint to the Hub exactly as it was verified."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from .checkpoint import PROOF_FILE, fingerprints
from .oneshot import PLAN_FILE
from .report.card import write_card

TRIES = 3  # of a commit, where the network fails; what was uploaded before is not sent again
NOT_PUSHED = ("checkpoint-*/*", "runs/*", ".*")  # what a Trainer leaves in its output_dir: nobody proved that
WAIT = 2.0  # seconds before the second try, doubled for each that follows


def push(
    directory: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Upload a pruned model",
) -> str:
    """Commit a directory to a repository of the Hub, in one commit: all of it or nothing.

    A Trainer's checkpoints and logs in it stay here. A pruned model without a README.md gets its card.

    Args:
        repo: owner/name; created if it is not there.
        private: of a new repository.
        revision: a branch; created if it is not there. Default: main.
        token: default: the one that `hf auth login` or HF_TOKEN gave.

    Returns:
        The address of the commit.

    Raises:
        ValueError: a directory that was not proven to reload, or that changed since.
        PermissionError: no token, or one that may not write there. ConnectionError: the Hub cannot be reached.
    """
    directory = Path(directory)
    _check_unchanged(directory)
    if (directory / PLAN_FILE).is_file() and not (directory / "README.md").is_file():
        write_card(directory, name=repo)
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    _asked(repo, lambda: api.create_repo(repo, private=private or None, exist_ok=True))
    if revision:
        _asked(repo, lambda: api.create_branch(repo, branch=revision, exist_ok=True))
    given: dict[str, Any] = {"repo_id": repo, "folder_path": directory, "revision": revision, "commit_message": message}
    given["ignore_patterns"] = list(NOT_PUSHED)
    return str(_asked(repo, lambda: api.upload_folder(**given)).commit_url)


def _check_unchanged(directory: Path) -> None:
    if not (directory / PROOF_FILE).is_file():
        raise ValueError(f"{directory} was never proven to reload: save the model with hf_prune.save_pretrained.")
    proven, found = json.loads((directory / PROOF_FILE).read_text())["files"], fingerprints(directory)
    changed = sorted(name for name in {*proven, *found} if proven.get(name) != found.get(name))
    if changed:
        raise ValueError(
            f"{directory} is not what was proven to reload: {', '.join(changed)} changed since. Save the model again "
            "with hf_prune.save_pretrained."
        )


def _asked(repo: str, request: Any) -> Any:
    """What a request returns; tried again where the network fails, with a plain error in the end."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    for left in reversed(range(TRIES)):
        try:
            return request()
        except OfflineModeIsEnabled as error:
            raise ConnectionError("HF_HUB_OFFLINE is set: unset it to push.") from error
        except LocalTokenNotFoundError as error:
            raise PermissionError("No token for the Hub: run `hf auth login`, or set HF_TOKEN.") from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403):
                raise PermissionError(
                    f"The Hub refused {repo} ({status}): log in with a token that may write there (`hf auth login`, "
                    "HF_TOKEN), or choose a repository of your own. No file was uploaded."
                ) from error
            if status < 500 or not left:
                raise ConnectionError(f"The Hub answered {status} for {repo}: {error}") from error
        except (HTTPError, ConnectionError, RuntimeError) as error:  # of the transport; RuntimeError: of LFS and Xet
            if not left:
                raise ConnectionError(
                    f"The connection failed {TRIES} times while pushing to {repo} ({error}). No commit was made, the "
                    "directory is as it was: push again; what was uploaded is not sent twice."
                ) from error
        time.sleep(WAIT * 2 ** (TRIES - 1 - left))
    raise AssertionError("not reached")
