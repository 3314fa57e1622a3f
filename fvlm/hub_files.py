"""Files of a published model: a local folder, or a name on the Hugging Face hub at one commit.

Whatever keeps a file from being read is a UserError that names the option, the model and the file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub import errors as hub_errors

from fvlm.errors import UserError

CONFIG = "config.json"
LFS_POINTER = b"version https://git-lfs"
_TRANSPORT: type[Exception] = hub_errors.HfHubHTTPError.__mro__[1]  # the HTTP library's own base error
TOKEN_CURE = "Ask for access on the model's page, set HF_TOKEN (or `hf auth login`), and check the name"
_TOKEN = "the hub wants a token that may read it: gated, private, or no model of that name"
REFUSALS = {
    401: _TOKEN,
    403: _TOKEN,
    404: "neither a local folder nor reachable on the hub, which has no model of that name",
}
"""What the hub means by an HTTP status."""


class NotHere(UserError):
    """Neither a local folder nor in the cache of this machine, and the hub was not asked or did not answer."""


@dataclass
class ModelFiles:
    """One model's files.

    option:     of the command line, for errors: "--model.language"
    name:       a folder, or a name on the hub
    revision:   a commit of the hub; "" stands for the newest one, and becomes a commit with the first file. Always ""
                for a folder
    local_only: look at the folder or the cache alone, and never ask the hub
    """

    option: str
    name: str
    revision: str = ""
    local_only: bool = False

    @property
    def is_folder(self) -> bool:
        try:
            return Path(self.name).is_dir()
        except OSError:  # too long for a path, or in a folder that may not be entered
            return False

    @property
    def where(self) -> str:
        """For people: option, name, and the commit."""
        at = f" at {self.revision[:12]}" if self.revision else ""
        return f"{self.option} {self.name!r}{at}"

    def path(self, *files: str) -> Path:
        """The first of these files that the model has, on this machine, fetched where need be.

        Raises UserError: it has none of them, or cannot be had.
        """
        found = next((path for path in map(self.find, files) if path is not None), None)
        if found is not None:
            return found
        if self.is_folder or not self.local_only:
            raise UserError(f"{self.where}: has no {' and no '.join(files)}.{self._listing()}")
        raise self._not_here(files[0])

    def find(self, file: str) -> Path | None:
        """As `path`, but None where the model has no such file."""
        found = self._in_folder(file) if self.is_folder else self._from_hub(file)
        if found is not None:
            _require_content(found)
        return found

    def json(self, file: str) -> dict[str, Any]:
        """The contents of a JSON file. Raises UserError as `path` does, and when it is none."""
        return read_json(self.path(file))

    def _in_folder(self, file: str) -> Path | None:
        path = Path(self.name) / file
        try:
            if path.is_symlink() and not path.exists():
                raise UserError(f"{path}: a link to a file that is not there. Copy the file itself, or fetch it again.")
            return path if path.is_file() else None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error}). Mend that.") from error

    def _from_hub(self, file: str) -> Path | None:
        try:
            found = hf_hub_download(self.name, file, revision=self.revision or None, local_files_only=self.local_only)
        except hub_errors.LocalEntryNotFoundError as error:
            if _status(error.__cause__) in REFUSALS:  # of the last try
                raise self._refused(error.__cause__) from error
            if not self.revision:
                raise self._not_here(file, error.__cause__) from error
            self.local_only = True  # other files of it are here; what is not cannot be had, and is not asked for again
            return None
        except hub_errors.EntryNotFoundError:
            return None
        except (OSError, ValueError, _TRANSPORT) as error:
            raise self._refused(error) from error
        path = Path(found)
        self.revision = self.revision or _commit(path)
        return path

    def _refused(self, error: BaseException | None) -> UserError:
        assert error is not None
        return UserError(f"{self.option} {self.name!r}: {_reason(error)}")

    def _not_here(self, file: str, cause: BaseException | None = None) -> NotHere:
        why = f" ({_first_line(cause)})" if cause else ""
        why = ", which HF_HUB_OFFLINE forbids to ask" if constants.HF_HUB_OFFLINE else why
        return NotHere(
            f"{self.where}: neither a local folder nor reachable on the hub{why}, and its {file} is not in the cache. "
            f"Run `hf download {self.name}` where there is a network and copy the cache ({constants.HF_HUB_CACHE}, or "
            "HF_HOME), give a folder, or train from scratch with --model.init random."
        )

    def _listing(self) -> str:
        """What a folder holds instead, so that a wrong folder is seen at once."""
        if not self.is_folder:
            return ""
        try:
            names = sorted(path.name for path in Path(self.name).iterdir())
        except OSError as error:
            return f" The folder cannot be read ({error.strerror})."
        return f" The folder holds {', '.join(names[:8])}{', ...' if names[8:] else ''}." if names else " It is empty."


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises UserError."""
    try:
        raw = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no valid JSON, cut short or damaged ({error}). Fetch it again.") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds a {type(raw).__name__}; a JSON object is expected. Fetch it again.")
    return raw


def _require_content(path: Path) -> None:
    """Raises UserError for what stands where a file should be: nothing, a pointer, or something unreadable."""
    try:
        with path.open("rb") as f:
            start = f.read(len(LFS_POINTER))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}). Mend that, or fetch it again.") from error
    if start == LFS_POINTER:
        raise UserError(
            f"{path}: a git-lfs pointer, not the file itself. Run `git lfs pull` in its repository, or `hf download`."
        )
    if not start:
        raise UserError(f"{path}: empty. Fetch it again.")


def _commit(path: Path) -> str:
    """The commit of a file in the hub's cache: .../snapshots/COMMIT/FILE."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else ""


def _reason(error: BaseException) -> str:
    """Why the hub does not give a file, and what to do."""
    if isinstance(error, hub_errors.HFValidationError):
        return (
            "neither a local folder nor reachable on the hub, whose names are NAME or OWNER/NAME. "
            "Give a folder that is there."
        )
    status = _status(error)
    if isinstance(error, hub_errors.GatedRepoError):
        return f"gated on the hub, which needs a token (HTTP {status}). {TOKEN_CURE}."
    if status in REFUSALS and not isinstance(error, hub_errors.RevisionNotFoundError):
        return f"{REFUSALS[status]} (HTTP {status}). {'Check the name' if status == 404 else TOKEN_CURE}."
    return f"cannot be fetched from the hub ({_first_line(error)}). Try again, or give a folder."


def _status(error: BaseException | None) -> int | None:
    """Of an answer of the hub."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _first_line(error: BaseException) -> str:
    if (status := _status(error)) is not None:
        return f"HTTP {status}"
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
