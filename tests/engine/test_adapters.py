"""Adapters that come and go while an engine runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from idlm import LLM, InputError, Result, SamplingParams
from idlm.engine import engine as engine_module
from idlm.engine.adapters import MOST
from idlm.engine.request import Terms
from idlm.models.gated_lora import LoraSpec, gated_layers
from idlm.models.idlm_model import Idlm
from idlm.models.more_adapters import Loaded
from tests.engine.tiny import tiny_idlm

PROMPT = [5, 9, 3, 7, 11, 4]
LAYERS = {"q_proj": (32, 32), "k_proj": (32, 16), "down_proj": (48, 32)}
RECORD = pytest.mark.parametrize("record", [False, True])


def adapter(seed: int, rank: int = 3, layers: tuple[str, ...] = ("k_proj", "down_proj")) -> Loaded:
    """A random adapter for the tiny model."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.3

    tensors = {}
    for number in range(2):
        for name in layers:
            part = "mlp" if name == "down_proj" else "self_attn"
            module, (inner, out) = f"model.layers.{number}.{part}.{name}", LAYERS[name]
            tensors[module, "lora_A"] = draw(rank, inner)
            tensors[module, "lora_B"] = draw(out, rank)
    return Loaded(LoraSpec(rank, 2.0 * rank, layers), tensors, draw(32))


def engine_of(idlm: Idlm, record: bool = False) -> LLM:
    return LLM(idlm, changing=True, stride=3, branches="all", max_num_seqs=4, record=record)


def params(seed: int = 2, max_tokens: int = 24) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=seed, temperature=0.8, ignore_eos=True)


class Watch:
    """Steps an engine and keeps the drafts that each request had after each step."""

    def __init__(self, llm: LLM) -> None:
        self.engine = llm.engine
        self.drafts: dict[str, list[list[int]]] = {}
        self.results: dict[str, Result] = {}

    def add(self, name: str | None) -> str:
        request = self.engine.add(PROMPT, params(), 2, Terms(name))
        self.drafts[request] = []
        return request

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            for update in self.engine.step():
                if update.result is not None:
                    self.results[update.request_id] = update.result
            state = self.engine.runner.slots.state
            for request in self.engine.scheduler.decoding:
                drawn = state.drafts[request.slot, : state.valid[request.slot]].tolist()
                seen = self.drafts[request.id]
                seen += [drawn] if not seen or seen[-1] != drawn else []
            self.engine.check()

    def end(self) -> None:
        while self.engine.busy:
            self.step()


def ask(llm: LLM, name: str | None = None) -> tuple[Result, list[list[int]]]:
    """The result of a request on its own, and its drafts."""
    watch = Watch(llm)
    request = watch.add(name)
    watch.end()
    return watch.results[request], watch.drafts[request]


def same_bytes(llm: LLM, ar: list[int], *names: str | None) -> dict[str | None, list[list[int]]]:
    """The drafts for each adapter, whose outputs have to be those of AR."""
    drawn = {}
    for name in names:
        result, drawn[name] = ask(llm, name)
        assert result.token_ids == ar
    return drawn


@pytest.fixture(autouse=True)
def hardly_any_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a request needs is recorded when it comes."""
    monkeypatch.setattr(engine_module, "RECORD_SECONDS", 0.0)


@pytest.fixture(scope="module")
def ar() -> list[int]:
    """What every adapter has to give."""
    llm = LLM(tiny_idlm("llama", adapter=False), stride=1)
    return llm.generate([PROMPT], params())[0].token_ids


@RECORD
@pytest.mark.parametrize("first", [False, True])
def test_an_adapter_that_comes_later_drafts_as_one_that_was_there(
    record: bool, first: bool, ar: list[int]
) -> None:
    llm = engine_of(tiny_idlm("llama", adapter=first), record)
    before, drawn = ask(llm)
    assert before.token_ids == ar and (sum(before.reached) > 0) == first
    llm.engine.load_adapter("late", adapter(1))
    late, own = ask(llm, "late")
    assert late.token_ids == ar and sum(late.reached) > 0
    assert ask(llm)[1] == drawn != own, "the first adapter's drafts have changed"

    other = engine_of(tiny_idlm("llama", adapter=not first), record)
    for name, seed in (("other", 2), ("late", 1)):  # at another index
        other.engine.load_adapter(name, adapter(seed, rank=2 + seed))
    drawn = same_bytes(other, ar, "other", "late")
    assert drawn["late"] == own != drawn["other"]


@RECORD
def test_unloaded_and_loaded_again(record: bool, ar: list[int]) -> None:
    llm = engine_of(tiny_idlm("llama"), record)
    llm.engine.load_adapter("a", adapter(1))
    llm.engine.load_adapter("b", adapter(2, layers=("q_proj",)))
    seen = same_bytes(llm, ar, "a", "b")
    llm.engine.unload_adapter("a")
    with pytest.raises(InputError, match="'a' is not loaded; use one of default, b"):
        ask(llm, "a")
    assert ask(llm, "b")[1] == seen["b"]
    for seed in (2, 1):  # another adapter of that name, then the first again
        llm.engine.load_adapter("a", adapter(seed))
        again = same_bytes(llm, ar, "a", "b")
        assert (again["a"] == seen["a"]) == (seed == 1) and again["b"] == seen["b"]
        llm.engine.unload_adapter("a")
    assert llm.idlm.gate is not None and llm.idlm.gate.adapters == 3, "indexes are used again"
    assert all(len(layer.more) <= 1 for layer in gated_layers(llm.idlm.model))


def test_the_first_adapter_unloaded_leaves_ar(ar: list[int]) -> None:
    llm = engine_of(tiny_idlm("llama"))
    llm.engine.unload_adapter("default")
    result, _ = ask(llm)
    assert result.token_ids == ar and sum(result.reached) == 0
    llm.engine.load_adapter("a", adapter(1))
    fresh = engine_of(tiny_idlm("llama", adapter=False))
    fresh.engine.load_adapter("a", adapter(1))
    assert same_bytes(llm, ar, "a") == same_bytes(fresh, ar, "a")


@RECORD
@pytest.mark.parametrize("lookahead", [0, 1])
def test_requests_in_flight(record: bool, lookahead: int, ar: list[int]) -> None:
    """They do not see that adapters come and go; those of an unloaded one end with it."""
    options = {"stride": 3, "branches": "all", "max_num_seqs": 2, "record": record}
    llm = LLM(tiny_idlm("llama"), changing=True, lookahead=lookahead, **options)
    engine, watch = llm.engine, Watch(llm)
    engine.load_adapter("a", adapter(1))
    alone = same_bytes(llm, ar, None, "a")
    mine = {watch.add(name): name for name in (None, "a", None, "a")}
    watch.step(4)  # two of them wait
    engine.load_adapter("b", adapter(3))
    watch.step(2)
    engine.unload_adapter("a")
    engine.unload_adapter("b")
    engine.load_adapter("a", adapter(2))
    assert engine.adapters.retired == {1}
    newer = watch.add("a")
    watch.end()
    engine.step()
    assert engine.adapters.retired == set()
    for request, name in mine.items():
        assert watch.results[request].token_ids == ar
        drawn = watch.drafts[request]
        assert len(drawn) > 5 and drawn == alone[name][: len(drawn)]
    assert watch.results[newer].token_ids == ar
    assert watch.drafts[newer][:5] != alone["a"][:5]


def test_cached_prefixes_stay(ar: list[int]) -> None:
    """Committed rows are the base's, so that pages serve every adapter."""
    llm = LLM(tiny_idlm("llama"), changing=True, stride=3, branches="all", page_size=4)
    llm.generate([PROMPT], params())
    llm.engine.load_adapter("a", adapter(1))
    result, _ = ask(llm, "a")
    assert result.cached_tokens == 4 and result.token_ids == ar
    llm.engine.unload_adapter("a")
    assert ask(llm)[0].cached_tokens == 4


def broken(change: Callable[[torch.Tensor], torch.Tensor]) -> Loaded:
    good = adapter(1)
    tensors = {
        key: change(tensor) if key[1] == "lora_B" else tensor
        for key, tensor in good.tensors.items()
    }
    return good._replace(tensors=tensors)


def test_what_is_refused_changes_nothing(ar: list[int]) -> None:
    llm = engine_of(tiny_idlm("llama"), record=True)
    llm.engine.load_adapter("a", adapter(1))
    seen = same_bytes(llm, ar, None, "a")
    for name, loaded, named in (
        ("a", adapter(2), "loaded already"),
        ("bad", broken(lambda b: b * float("nan")), "does not fit"),
        ("bad", adapter(1)._replace(mask_row=torch.full((32,), float("inf"))), "does not fit"),
    ):
        with pytest.raises(InputError, match=named):
            llm.engine.load_adapter(name, loaded)
        with pytest.raises(InputError, match="'bad' is not loaded"):
            ask(llm, "bad")
        assert same_bytes(llm, ar, None, "a") == seen
    with pytest.raises(InputError, match="'bad' is not loaded"):
        llm.engine.unload_adapter("bad")
    llm.engine.load_adapter("b", adapter(2))
    drawn = same_bytes(llm, ar, None, "a", "b")
    assert {name: drawn[name] for name in seen} == seen


def test_there_is_a_bound() -> None:
    llm = engine_of(tiny_idlm("llama"))
    for number in range(MOST - 1):
        llm.engine.load_adapter(str(number), adapter(1, rank=1, layers=("q_proj",)))
    with pytest.raises(InputError, match=f"{MOST} adapters"):
        llm.engine.load_adapter("one more", adapter(1))
    llm.engine.unload_adapter("7")
    llm.engine.load_adapter("one more", adapter(1))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_engine_that_freed_its_weights(dtype: str, checkpoint: Path) -> None:
    """C kernels hold the weights of a float32 model that the engine has loaded itself."""
    from idlm.models.more_adapters import read_more

    options = {"stride": 3, "branches": "all", "dtype": dtype, "threads": 1, "max_num_seqs": 2}
    started = LLM(str(checkpoint / "base"), str(checkpoint / "lora"), changing=True, **options)
    later = LLM(str(checkpoint / "base"), changing=True, **options)
    loaded = read_more(later.idlm, checkpoint / "lora")
    later.engine.load_adapter("x", loaded)
    question = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    want = started.generate("Tom has 3 apples.", question)[0]
    got = later.generate("Tom has 3 apples.", question, adapter="x")[0]
    assert got.token_ids == want.token_ids and sum(got.reached) > 0
    if dtype == "float64":
        assert (got.reached, got.accepted) == (want.reached, want.accepted)
