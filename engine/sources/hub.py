"""Models of the Hugging Face hub, fetched by its own client into its own cache.

Decides which files of a repository are wanted: weights, config and tokenizer, never code and never
pickles. Knows nothing of what is in them.
"""

import re
from pathlib import Path

from engine.errors import CheckpointError

WANTED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `org/name`."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name


def resolve_hub(repository: str) -> Path:
    """The directory of a hub repository's newest snapshot, fetched if need be.

    Raises:
        CheckpointError: no connection and not in the cache, no such repository, or no access to it.
    """
    # Here, not above: the client takes a third of a second to import and most runs need no hub.
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(repository, allow_patterns=list(WANTED_FILES))
        )
    except errors.HFValidationError as error:
        raise CheckpointError(f"{repository}: no hub id: {_first_line(error)}") from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repository}: access is gated: accept its licence on its page, "
            "then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repository}: no such repository on the hub, or a private one and no login"
        ) from error
    except errors.HfHubHTTPError as error:  # an OSError too, so before those
        raise CheckpointError(f"{repository}: the hub refused: {_first_line(error)}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            f"{repository}: not in the local cache, and the hub cannot be reached: "
            f"{_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    """What a person is told: the client's errors go on with addresses and advice."""
    said = str(error).strip().removeprefix("Got: ")
    return (said or type(error).__name__).splitlines()[0]
