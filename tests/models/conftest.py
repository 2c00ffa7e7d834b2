from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import tiny


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tied Llama checkpoint without a MASK token."""
    return tiny.write(tmp_path / "llama", "llama", tie_word_embeddings=True)
