"""Upload a checkpoint to the Hub exactly as it was verified."""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Callable
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from typing import Any

from .history import PLAN_FILE
from .proof import PROOF_FILE, checkpoint, proven, verify

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
TRIES = 3  # of a commit, where the network fails; what was uploaded before is not sent again
CARD = (  # uploaded with what was proven: the card, and the files that its figures are read from
    "README.md", "pictures/*.png", "evaluation.json", "measurements.json", "measurements.md", "measurements.png",
    "int8.json", "LICENSE", "LICENSE.txt", "LICENSE.md", PROOF_FILE,
)  # fmt: skip
SHOWN = 8  # names in the warning about what is not uploaded
WAIT = 2.0  # seconds before the second try, doubled for each that follows


def push(
    directory: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Upload a pruned model",
    card: Callable[..., Any] | None = None,
) -> str:
    """Commit a checkpoint to a repository of the Hub, in one commit: all of it or nothing.

    The files that the save proved are uploaded, with the card and the files that its figures come from. Everything else
    stays here, and a warning names it.

    Args:
        repo: owner/name; created if it is not there.
        private: whether a repository that is created here is private.
        revision: a branch; created if it is not there. Default: main.
        token: default: the one that `hf auth login` or HF_TOKEN gave.
        card: called as card(directory, name=repo) where a pruned model has no README.md, to write one
            (`report.card.write_card`); default: none is written.

    Returns:
        The address of the commit.

    Raises:
        ValueError: a directory that was not proven to reload, that changed since, or with links that lead out of it.
        PermissionError: no token, or one that may not write there. ConnectionError: the Hub cannot be reached.
    """
    directory = checkpoint(directory)
    _check_names(repo, revision)
    verify(directory)
    if card is not None and (directory / PLAN_FILE).is_file() and not (directory / "README.md").is_file():
        card(directory, name=repo)
    sent = _sent(directory)
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    _asked(repo, lambda: api.create_repo(repo, private=private or None, exist_ok=True))
    if revision:
        _asked(repo, lambda: api.create_branch(repo, branch=revision, exist_ok=True))
    given: dict[str, Any] = {"repo_id": repo, "folder_path": directory, "revision": revision, "commit_message": message}
    given["allow_patterns"] = [escape(name) for name in sent]
    return str(_asked(repo, lambda: api.upload_folder(**given)).commit_url)


def _check_names(repo: str, revision: str | None) -> None:
    """Raise ValueError for names that the Hub cannot have, before a card is written with them."""
    from huggingface_hub.utils import validate_repo_id

    if not isinstance(repo, str) or not HUB_ID.fullmatch(repo):
        raise ValueError(f"repo={repo!r}: a repository of the Hub is owner/name.")
    validate_repo_id(repo)
    if revision is not None and (not isinstance(revision, str) or not revision.strip()):
        raise ValueError(f"revision={revision!r}: a branch has a name. Leave it out for main.")


def _sent(directory: Path) -> list[str]:
    """Relative paths of the files to upload; a warning names the others.

    Raises:
        ValueError: a link leads out of the directory.
    """
    files, known = [path for path in sorted(directory.rglob("*")) if path.is_file()], proven(directory)
    names = [path.relative_to(directory).as_posix() for path in files]
    sent = [name for name in names if name in known or _is_card(name)]
    home = directory.resolve()
    out = [name for name in sent if not (directory / name).resolve().is_relative_to(home)]
    if out:
        raise ValueError(f"{', '.join(out)}: links that lead out of {directory}. Put the files there, and push again.")
    left = sorted({name.split("/")[0] for name in {*names} - {*sent}})
    if left:
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        warnings.warn(
            f"Not pushed, as no save proved it: {', '.join(left[:SHOWN])}{more}. What belongs to the model is written "
            "by save_pretrained(..., processing_class=...).",
            stacklevel=3,
        )
    return sent


def _is_card(name: str) -> bool:
    """Whether a relative path is one of `CARD`; `*` does not match a slash."""
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in CARD)


def _asked(repo: str, request: Any) -> Any:
    """What a request returns. It is tried again where the network fails, up to `TRIES` times.

    Raises:
        PermissionError: no token, or one that may not write there. ConnectionError: the Hub cannot be reached.
    """
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
