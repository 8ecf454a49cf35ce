"""The sidecar: the JSON next to a record of latents, which holds its captions."""

from __future__ import annotations

import json
from typing import Any, cast

from sdxl_distill.errors import CorruptError


def parse_captions(content: bytes, action: str, where: str | None = None) -> list[str]:
    """Return the captions that a sidecar holds, at least one.

    Args:
        content: the bytes of the sidecar; they may come from a stranger.
        action: the advice in the message when it is damaged.
        where: the set and the key, for the message.

    Raises:
        CorruptError: when it is missing, not JSON, or has no list of Unicode captions.
    """
    try:
        fields: Any = json.loads(content)
        captions = cast("list[str]", fields["captions"] if type(fields["captions"]) is list else [])
        "".join(captions).encode()  # refuses what is not text, and halves of surrogate pairs
    except (ValueError, LookupError, TypeError, RecursionError):
        captions = []
    if not captions:
        raise CorruptError(
            "the sidecar is missing, or has no captions",
            expected='JSON with "captions": [text, …]',
            where=where,
            action=action,
        )
    return captions
