"""The model card of an exported I-DLM: front matter for the hub, and what a reader can check."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from idlm.models.sources import HUB_ID
from idlm.training.strict import read_yaml

MARK = "<!-- written by idlm export -->"
PACKAGES = ("idlm", "torch", "transformers", "accelerate")


@dataclass(frozen=True)
class Facts:
    """What a card says.

    Attributes:
        name: of the model: a repository or a folder.
        base: the model that was converted: a hub id, a folder or a bundled name.
        recipe: the run's config as YAML; empty if it is not known.
        measured: the run's last held-out measurement; empty if there is none.
        started: the run's entry in environment.json; empty if there is none.
    """

    name: str
    is_adapter: bool
    base: str | None
    mask_id: int | None
    block_size: int | None
    recipe: str
    measured: dict[str, Any]
    started: dict[str, Any]

    @property
    def base_id(self) -> str | None:
        """The base, if it is a repository of the hub."""
        return self.base if self.base and _is_repository(self.base) else None


def card(facts: Facts) -> str:
    """The text of the card."""
    sections = [_what(facts), _check(facts), _acceptance(facts), _data(facts)]
    if facts.recipe:
        sections.append(f"## Recipe\n```yaml\n{facts.recipe}```")
    sections.append(_versions(facts))
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{front_matter(facts).to_yaml()}\n---\n\n{body}\n\n{MARK}\n"


def front_matter(facts: Facts) -> ModelCardData:
    """The metadata that the hub reads."""
    base = facts.base_id
    relation = "adapter" if facts.is_adapter else "finetune"
    return ModelCardData(
        base_model=base,
        base_model_relation=relation if base else None,
        license=_license(facts.base),
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["idlm", "multi-token-decoding", *(["lora"] if facts.is_adapter else [])],
        datasets=[path for path in _paths(facts) if _is_repository(path)] or None,
    )


def _is_repository(name: str) -> bool:
    return "/" in name and HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _license(base: str | None) -> str | None:
    """The license that the card of the base names, if that is on this machine."""
    if base is None:
        return None
    found = Path(base) / "README.md"
    if not found.is_file() and _is_repository(base):
        cached = try_to_load_from_cache(base, "README.md")
        found = Path(cached) if isinstance(cached, str) else found
    named = ModelCard.load(found).data.license if found.is_file() else None
    return str(named) if named else None


def _what(facts: Facts) -> str:
    kind = "A gated LoRA that converts" if facts.is_adapter else "A conversion of"
    base = f"`{facts.base}`" if facts.base else "a causal language model"
    lines = [f"# {facts.name}", f"{kind} {base} into an introspective diffusion language model."]
    if facts.block_size is not None:
        stride = facts.block_size + 1
        lines.append(
            f"It drafts up to {facts.block_size} tokens ahead, for strides up to {stride}, by rows "
            f"of the MASK token {facts.mask_id}."
        )
    if facts.is_adapter:
        lines.append("The rows of the text use the base alone, so the output is the base's own.")
    return "\n\n".join([lines[0], " ".join(lines[1:])])


def _check(facts: Facts) -> str:
    base = facts.base or "BASE"
    model = f"{base} --adapter {facts.name}" if facts.is_adapter else facts.name
    what = "# that decoding several tokens per forward gives AR's output, token by token"
    return f"## Check it\n```sh\nidlm inspect {model}\nidlm verify {model}  {what}\n```"


def _acceptance(facts: Facts) -> str:
    measured = facts.measured
    if not measured:
        return ""
    columns = (measured["acceptance"], measured.get("alpha", measured["acceptance"]))
    rows = [
        f"| {depth} | {accepted:.3f} | {alpha:.3f} |"
        for depth, (accepted, alpha) in enumerate(zip(*columns, strict=True), start=1)
    ]
    return "\n".join(
        [
            "## Acceptance by draft depth",
            f"On held-out texts after step {measured['step']}, teacher-forced. Greedy decoding of "
            f"them takes a forward for {measured['tpf']:.2f} tokens.\n",
            "| depth | accepted, greedy | sum min(p, q) |",
            "|---|---|---|",
            *rows,
        ]
    )


def _tree(facts: Facts) -> dict[str, Any]:
    tree = read_yaml(facts.recipe, "config.yaml") if facts.recipe else {}
    return tree if isinstance(tree, dict) else {}


def _paths(facts: Facts) -> list[str]:
    """The files and datasets that the texts came from."""
    data = _tree(facts).get("data") or {}
    path = data.get("path") or []
    return [path] if isinstance(path, str) else [str(each) for each in path]


def _data(facts: Facts) -> str:
    data = _tree(facts).get("data") or {}
    if not data:
        return ""
    origin = ", ".join(f"`{path}`" for path in _paths(facts)) or f"`{data.get('source')}`"
    if data.get("source") == "self":
        origin = f"responses of the base itself to the prompts `{data.get('prompts')}`"
    lines = [f"## Data\nTexts from {origin}."]
    if digests := facts.started.get("data"):
        lines.append(f"```json\n{json.dumps(digests, indent=1)}\n```")
    return "\n".join(lines)


def _versions(facts: Facts) -> str:
    known = {name: facts.started.get(name) or version(name) for name in PACKAGES}
    return "## Versions\n" + ", ".join(f"{name} {number}" for name, number in known.items())
