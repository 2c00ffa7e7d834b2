"""Write the model of a GGUF file as a folder of float32 safetensors; `make models` calls it.

    python -m benchmarks.models build/models/SmolLM2-135M-Instruct-Q4_1.gguf \\
                                build/models/SmolLM2-135M-Instruct

The folder has the de-quantised weights and the tokenizer of the file, so both decode to the same
tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from idlm.models.loading import load


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    idlm = load(options.file, dtype="float32")
    if idlm.tokenizer is None:
        parser.error(f"{options.file} has no tokenizer; give a file that has one")
    idlm.model.save_pretrained(options.folder)
    idlm.tokenizer.save_pretrained(options.folder)


if __name__ == "__main__":
    main()
