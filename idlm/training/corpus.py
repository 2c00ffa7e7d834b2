"""The documents of a run: from a registered source, from files, or from the model itself.

Rows are read and tokenised once, into `output_dir/data` (`idlm.training.store`). The first process
that comes does it while the others wait; then each maps the files. A resumed run uses them again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from idlm.config import EngineConfig
from idlm.engine.build import build_engine
from idlm.engine.engine import Engine
from idlm.errors import InputError
from idlm.models.idlm_model import Idlm
from idlm.models.sources import read_json
from idlm.training.config import DataConfig, TrainConfig, WeightedPath
from idlm.training.data import SOURCES, Example, chat_examples, fit
from idlm.training.distill import Recipe, distill
from idlm.training.origin import difference, origin
from idlm.training.plan import Bounds, Plan, Share
from idlm.training.prompts import Encoding, Prompts
from idlm.training.reading import Reader, Tally
from idlm.training.store import META, Chosen, Store, Writer, lengths, written
from idlm.training.strict import as_tree
from idlm.training.tables import Named, Tables

FOLDER, LOCK = "data", ".data.lock"
LIMIT = "the length limit"
"""Its key beside those of the config."""
LONGEST = 4096
"""The length limit of a model with a longer context, if the config has none: memory grows with
it."""
CHUNK = 1024
"""Problems that are encoded at a time."""


@dataclass(frozen=True)
class Corpus:
    """Training and held-out documents.

    Attributes:
        sources: the parts of `training` that have weights; () is one of all documents.
        tally: what happened to the rows.
        limit: the most tokens of a document.
        files: what the rows came from, as `training.origin` has it.
    """

    training: Sequence[Example]
    held_out: Sequence[Example]
    sources: tuple[Share, ...] = ()
    tally: Tally = field(default_factory=Tally)
    limit: int = 0
    files: dict[str, Any] = field(default_factory=dict)

    @property
    def shares(self) -> tuple[Share, ...]:
        """The sources, at least one."""
        return self.sources or (Share(0, len(self.training)),)

    def plan(self, config: TrainConfig, batches: int) -> Plan:
        """The steps of a run, each of so many batches on all ranks.

        Raises:
            InputError: a document does not fit into `batch_tokens`.
        """
        longest = max(int(lengths(part).max()) for part in (self.training, self.held_out))
        if config.batch_tokens is not None and longest > config.batch_tokens:
            raise InputError(
                f"batch_tokens is {config.batch_tokens} but a document has {longest} tokens; "
                "raise it or lower data.max_length"
            )
        room = max(self.limit, longest)
        row_length = min(room, config.batch_tokens or room) if config.packing else None
        bounds = Bounds(config.batch_rows, config.batch_tokens, row_length, batches)
        return Plan(lengths(self.training), self.shares, bounds, config.seed)


def check_drafts(corpus: Corpus) -> None:
    """Refuse texts that have nothing to draft: the MASK row of a response's last token predicts
    nothing, so a response of one token has none.

    Raises:
        InputError: no response to train on, or none that is held out, has a second token.
    """
    for what, part in (("to train on", corpus.training), ("held out", corpus.held_out)):
        if not any(stop - start > 1 for text in part for start, stop in text.answers):
            raise InputError(
                f"all responses {what} have one token, as that of {part[0].row}, and a draft needs "
                "a second; give longer ones, or raise data.max_length if it cut them"
            )


def check_source(config: DataConfig) -> None:
    """Refuse an unknown `data.source` before anything is made or loaded."""
    known = (*SOURCES, "jsonl", "self")
    if config.source not in known:
        raise InputError(f"data.source is {config.source!r}; expected {' or '.join(known)}")


def limit(config: DataConfig, idlm: Idlm) -> int:
    """The most tokens of a document."""
    return min(config.max_length or LONGEST, idlm.context)


def corpus(
    config: DataConfig, idlm: Idlm, draws: int | None, folder: Path, resumes: bool = False
) -> Corpus:
    """The documents of a run.

    Args:
        draws: how many documents the run takes, if that is known.
        folder: of the run; it gets the documents, and generated responses.
        resumes: whether the run has taken steps, so that its documents must be as they were.

    Raises:
        InputError: a row is broken (the message names it) and `data.skip_bad_rows` is not set,
            there are too few rows, or the data is not what it was.
    """
    check_source(config)
    if config.source in SOURCES and config.examples is None:
        if draws is None:
            raise InputError(
                f"data.examples is missing; data.source: {config.source} needs to know how many "
                "problems to make, unless the run has steps of a fixed number of rows"
            )
        config = replace(config, examples=draws)
    if config.source == "self":
        responses = folder / "responses"
        texts, how = own_prompts(config, idlm), recipe(config, idlm)
        distill(texts, how, responses, lambda: _engine(idlm), wait=True)  # for other ranks
        config = replace(config, path=str(responses))
    return _split(_stored(config, idlm, folder, resumes), config)


def _stored(config: DataConfig, idlm: Idlm, folder: Path, resumes: bool) -> Store:
    """The store of a run, which is written unless there is one of the same origin."""
    place = folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK):
        known = read_json(place / META)["origin"] if (place / META).exists() else {}
        now = origin(_files(config), idlm, _keys(config, idlm), known)
        changed = difference(known, now) if known else None
        if changed and resumes:
            raise InputError(
                f"data changed since step 0: {changed}; restore it or name another output_dir"
            )
        if changed or not known:
            with _room(folder), written(place) as writer:
                counts, tally = _write(config, idlm, writer)
                writer.meta = {"origin": now, "sources": counts, "tally": tally.as_dict()}
    return Store(place)


@contextmanager
def _room(folder: Path) -> Iterator[None]:
    """Turns an error of writing into one of the user."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write the documents to {str(folder / FOLDER)!r} ({error.strerror}); "
            "free space or name another output_dir"
        ) from None


def _keys(config: DataConfig, idlm: Idlm) -> dict[str, Any]:
    """What the documents depend on besides files and tokenizer. The problems of a registered source
    stay as many as they are when a run becomes longer, and a run's own responses may move with
    it."""
    kept = config
    if config.source in SOURCES:
        kept = replace(config, examples=None)
    elif config.source == "self":
        kept = replace(config, path=None)
    return {**as_tree(kept), LIMIT: limit(config, idlm)}


def _files(config: DataConfig) -> list[Path]:
    """The files that rows come from; not those that the run wrote itself."""
    sources = _sources(config) if config.source == "jsonl" else []
    return [file for tables, _ in sources for file in tables.files()]


def _sources(config: DataConfig) -> list[tuple[Tables, float]]:
    """The sources of `data.path` with their weights. Paths without weights are one."""
    paths = (config.path,) if isinstance(config.path, str) else config.path or ()
    weighted = [(Tables((p.path,)), p.weight) for p in paths if isinstance(p, WeightedPath)]
    return weighted or [(Tables(tuple(p for p in paths if isinstance(p, str))), 1.0)]


def _write(config: DataConfig, idlm: Idlm, writer: Writer) -> tuple[list[int], Tally]:
    """Write all documents; returns the number of documents of each source."""
    if config.source in SOURCES:
        tally, row = Tally(), 0
        for row, example in enumerate(_problems(config, idlm)):
            found = fit(example, limit(config, idlm))
            tally.cut += found.length < example.length
            writer.add(found, row)
        tally.documents = row + 1
        return [tally.documents], tally
    reader, row, counts = Reader(config, idlm, limit(config, idlm)), 0, list[int]()
    for tables, _ in _sources(config):
        before = len(writer)
        for examples in reader.read(tables):
            for example in examples:
                writer.add(example, row)
            row += 1
        counts.append(len(writer) - before)
    return counts, reader.tally


def _problems(config: DataConfig, idlm: Idlm) -> Iterator[Example]:
    """The problems of a registered source to train on, and then those held out."""
    source = SOURCES[config.source]
    pairs = islice(source.training(config.seed), config.examples)
    while chunk := list(islice(pairs, CHUNK)):
        yield from chat_examples(chunk, idlm)
    yield from chat_examples(source.held_out(config.held_out), idlm)


def _split(store: Store, config: DataConfig) -> Corpus:
    """Hold out the last rows of each source: all documents of a row, or none."""
    counts, weights = store.meta["sources"], [weight for _, weight in _sources(config)]
    training, held_out, shares, first = list[torch.Tensor](), list[torch.Tensor](), [], 0
    taken = 0
    for number, weight, out in zip(counts, weights, _held_out(config, weights), strict=True):
        rows = store.rows[first : first + number]
        distinct = rows.unique_consecutive()
        if len(distinct) <= out:
            raise InputError(
                f"data.held_out is {config.held_out} but there are {len(distinct)} rows; "
                "lower it or add rows"
            )
        border = first + int(torch.searchsorted(rows, distinct[-out]))
        training.append(torch.arange(first, border))
        held_out.append(torch.arange(border, first + number))
        shares.append(Share(taken, taken + border - first, weight))
        first, taken = first + number, taken + border - first
    return Corpus(
        Chosen(store, torch.cat(training)),
        Chosen(store, torch.cat(held_out)),
        tuple(shares),
        Tally(**store.meta["tally"]),
        store.meta["origin"]["keys"][LIMIT],
        store.meta["origin"]["files"],
    )


def _held_out(config: DataConfig, weights: list[float]) -> list[int]:
    """The rows held out of each source: one, and of the others its share."""
    others = config.held_out - len(weights)
    if others < 0:
        raise InputError(
            f"data.held_out is {config.held_out} but data.path has {len(weights)} sources; "
            "hold out at least one row of each"
        )
    exact = [others * weight / sum(weights) for weight in weights]
    whole = [int(part) for part in exact]
    by_rest = sorted(range(len(weights)), key=lambda at: whole[at] - exact[at])
    for at in by_rest[: others - sum(whole)]:
        whole[at] += 1
    return [1 + rows for rows in whole]


def own_prompts(config: DataConfig, idlm: Idlm) -> Prompts:
    """The prompts that `data.prompts` and `data.examples` select."""
    encoding = Encoding(idlm, limit=config.max_length)
    return Prompts(lambda: _prompt_rows(config, idlm), encoding, config.examples, dedup=False)


def _prompt_rows(config: DataConfig, idlm: Idlm) -> Iterable[Named]:
    if config.prompts in ("bos", *SOURCES) and config.examples is None:
        raise InputError(
            f"data.examples is missing; data.prompts: {config.prompts} "
            "needs to know how many to generate"
        )
    if config.prompts == "bos":
        bos = getattr(idlm.model.config, "bos_token_id", None)
        if bos is None:
            raise InputError(
                f"the model {idlm.name!r} has no BOS token; "
                "give data.prompts a jsonl file of prompts"
            )
        return repeat(("the BOS prompt", {"prompt": [bos]}))
    if config.prompts in SOURCES:
        return (
            (f"problem {at}", {"messages": [{"role": "user", "content": question}]})
            for at, (question, _) in enumerate(SOURCES[config.prompts].training(config.seed))
        )
    return Tables((config.prompts,)).rows()


def recipe(config: DataConfig, idlm: Idlm) -> Recipe:
    """The settings of the responses: as the model decodes without a request's own, but for the
    temperature if the config has one. All are kept: `data.max_tokens` cuts training texts too."""
    given: dict[str, Any] = {"max_tokens": config.max_tokens}
    if config.temperature is not None:
        given["temperature"] = config.temperature
    params = idlm.sampling(given)
    return Recipe(params, seed=config.seed, keep_truncated=True, keep_repetitive=True)


def _engine(idlm: Idlm) -> Engine:
    """Its threads are those of the training. A model that was never trained to draft runs AR."""
    stride = 1 if idlm.block_size is None else EngineConfig.stride
    return build_engine(idlm, EngineConfig(stride, threads=torch.get_num_threads()))
