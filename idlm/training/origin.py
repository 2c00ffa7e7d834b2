"""What the documents of a run are made of, so that a resumed run notices what has changed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any

from idlm.errors import InputError
from idlm.models.idlm_model import Idlm

Origin = dict[str, Any]
"""`files`: {path: {size, mtime, digest}}, digests by sha256; `text`: a digest of what turns rows
into ids; `keys`: those of the config."""


def origin(files: Iterable[Path], idlm: Idlm, keys: dict[str, Any], known: Origin) -> Origin:
    """The origin of documents.

    Args:
        keys: plain values of the config that the documents depend on.
        known: an origin with digests; a file whose size and time are as they were is not read.
    """
    before = known.get("files", {})
    return {
        "files": {str(path): _file(path, before.get(str(path))) for path in files},
        "text": _text_digest(idlm),
        "keys": json.loads(json.dumps(keys)),
    }


def difference(old: Origin, new: Origin) -> str | None:
    """What differs, as the beginning of a sentence; None if nothing does."""
    if old.get("keys") != new["keys"]:
        changed = [key for key, value in new["keys"].items() if old["keys"].get(key) != value]
        return f"{', '.join(changed)} differ"
    if old["text"] != new["text"]:
        return "the tokenizer or the chat template of the model differs"
    one, other = (
        {path: file["digest"] for path, file in each["files"].items()} for each in (old, new)
    )
    for path in {**one, **other}:
        if path not in other:
            return f"{path!r} is missing"
        if path not in one:
            return f"{path!r} is new"
        if one[path] != other[path]:
            return f"{path!r} has other contents"
    return None


def _file(path: Path, known: Mapping[str, Any] | None) -> dict[str, Any]:
    try:
        stat = path.stat()
        seen = {"size": stat.st_size, "mtime": stat.st_mtime_ns}
        if known is not None and {**known, **seen} == known:
            return dict(known)
        with open(path, "rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r} ({error.strerror}); check the path") from None
    return {**seen, "digest": digest}


def _text_digest(idlm: Idlm) -> str:
    """Of what turns a text into ids: tokenizer, chat template, special tokens and the ends."""
    parts: list[Any] = [sorted(idlm.eos_ids), idlm.vocab_size]
    if (tokenizer := idlm.tokenizer) is not None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        parts += [
            sorted(tokenizer.get_vocab().items()) if backend is None else _backend(backend),
            tokenizer.chat_template,
            {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        ]
    return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _backend(tokenizer: Any) -> dict[str, Any]:
    """A fast tokenizer; padding and truncation are of its last call."""
    parts: dict[str, Any] = json.loads(tokenizer.to_str())
    return {name: part for name, part in parts.items() if name not in ("padding", "truncation")}
