"""Is the hub there? Its client tries half a minute before it says no."""

from __future__ import annotations

from sfumato.errors import BadInput

PATIENCE = 4.0
"""Seconds."""


def require_hub(source: str, file: str = "config.json", kind: str = "model") -> None:
    """Refuse a hub id that is not on this machine when the hub does not answer within `PATIENCE`, asked once.

    Args:
        source: the id, "owner/name".
        file: a file that every download of it has: where the cache holds it, nothing is asked.
        kind: "model" or "dataset".

    Raises:
        BadInput: what to do instead.
    """
    from huggingface_hub import constants, get_session, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = isinstance(try_to_load_from_cache(source, file, repo_type=kind), str)
    except HFValidationError:
        return  # its loader says what is wrong with the name
    if cached:
        return
    if constants.HF_HUB_OFFLINE:
        raise BadInput(
            f"{source} is neither a folder here nor in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it: give a "
            "folder, or unset that"
        )
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # of whichever library the client is built on
        raise BadInput(
            f"{source} is no folder here, and the hub does not answer at {constants.ENDPOINT} "
            f"({type(error).__name__}): give a folder, or check the network, proxy and HF_ENDPOINT"
        ) from error
