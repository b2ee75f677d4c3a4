"""The numbers of ``sim.launches`` against the runtime's own operations, counted on tiny models in fp16.

In fp16 norms and scores pass through float32, which counts; in fp32 they would not. What only looks at memory in another
way is left out. Kernels that take a prompt in are one operation each; what they compute does not matter here.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from builders import make_machine
from runtime.attention import Plain
from runtime.execute import execute
from runtime.graph.fused import FusedDecoder
from runtime.graph.run import GraphWave, slots_kind
from runtime.graph.streamed_step import StreamedStep
from runtime.graph.widening import sharing_room
from runtime.lanes import Lanes
from runtime.models import Decoder, as_planned
from runtime.models.config import config_from_json
from runtime.models.random_weights import random_decoder
from runtime.options import Options
from runtime.prefill import prompt_layer
from runtime.tier import Tier
from sim.attention import Selector
from sim.capture import is_captured
from sim.flows import flows_of, home_columns, keeps_away
from sim.kv import KvFormat, KvFormats
from sim.launches import (
    choice_operations,
    decode_operations,
    end_operations,
    prefill_operations,
    prompt_operations,
)
from sim.plan import Placement, Plan, Recompute, WriteBack
from sim.prompt_prices import prefill_passes
from sim.recipe import Recipe, plan_for
from sim.spec import CPU_LINK, WeightFormat
from tests.runtime.graphs import ON_GPU, draw_prompts, kernels

pytestmark = pytest.mark.skipif(ON_GPU, reason="counts on the CPU's side, where kernels are interpreted")
CARD = make_machine()  # a GPU: on a CPU nothing is captured

CLOSE = 0.15
CPU = torch.device("cpu")
_SHAPE = {"vocab_size": 97, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}
_LLAMA = _SHAPE | {"num_key_value_heads": 4, "intermediate_size": 96}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", _SHAPE | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "llama": ("llama", _LLAMA),
    "grouped llama": ("llama", _LLAMA | {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", _LLAMA | {"num_key_value_heads": 2, "head_dim": 16}),
    "pythia": ("gpt_neox", _LLAMA | {"rotary_pct": 0.25}),
}
BASE = Recipe(model="small", batch=2, prompt=64, output=5)
INT8, RESIDENT = KvFormat.INT8, Placement.RESIDENT
DENSE: dict[str, dict[str, Any]] = {
    "dense": {},
    "off HBM": {"hbm": 50},
    "tokens": {"hbm": 50, "recompute": Recompute.TOKENS},
    "inputs on the host": {"hbm": 50, "recompute": Recompute.ACTIVATIONS_HOST},
    "inputs in HBM": {"hbm": 50, "recompute": Recompute.ACTIVATIONS_HBM},
    "int8": {"kv": INT8},
    "int8 off HBM": {"kv": INT8, "hbm": 50},
    "weights int8": {"weights": WeightFormat.INT8},
    "weights int4": {"weights": WeightFormat.INT4},
    "weights streamed": {"streamed": 50},
}
SPARSE = {
    f"{selector} {placement} {hbm}": {"selector": selector, "keep": 40, "placement": placement, "hbm": hbm}
    for selector in Selector
    if selector is not Selector.DENSE
    for placement in Placement
    for hbm in (100, 50)
}
ALL_NEEDED = {  # all that lives is attended to, so that HBM has a slot for it
    (Selector.LOCAL, Placement.RECENT),
    *((selector, RESIDENT) for selector in (Selector.LOCAL, Selector.H2O, Selector.STRIDED)),
}
ROUNDED = {
    "int8 two groups": {"kv": INT8, "prompt": 160},
    "int8 swa off HBM": {"kv": INT8, "selector": Selector.SWA, "keep": 40, "hbm": 50},
    "int8 topk": {"kv": INT8, "selector": Selector.TOPK, "keep": 40},
}
CASES = [
    *((family, name, changes) for family in ("opt", "grouped llama") for name, changes in DENSE.items()),
    *((family, name, DENSE[name]) for family in ("llama", "qwen3", "pythia") for name in ("off HBM", "int8", "tokens")),
    *(("opt", name, changes) for name, changes in (SPARSE | ROUNDED).items()),
    *(("grouped llama", name, changes) for name, changes in SPARSE.items() if name.startswith(("swa", "pages"))),
]
_VIEWS = (
    *("view", "slice", "select", "expand", "permute", "transpose", "unsqueeze", "squeeze", "detach", "alias"),
    *("as_strided", "split", "unbind", "narrow", "chunk", "flatten"),
)


class Counting(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        is_view = name == "t.default" or (any(view in name for view in _VIEWS) and not name.startswith("index_select"))
        self.count += not is_view
        return func(*args, **(kwargs or {}))

    def copy(self, *_: Any) -> None:
        """Stands for an order to the copy engine."""
        self.count += 1

    def launch(self, *_: Any) -> Callable[..., None]:
        """Stands for ``kernel[grid]``: counts it and computes nothing."""

        def launched(*_: Any, **__: Any) -> None:
            self.count += 1

        return launched


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU what is attended to is widened first, and multiplied in the compute type; a group's queries are by one kernel."""
    monkeypatch.setattr("runtime.attention._takes_groups", lambda *_: True)
    monkeypatch.setattr(Tier, "widens", property(lambda tier: tier.kv_format is not KvFormat.NATIVE))
    monkeypatch.setattr(Plain, "scores", _scores)
    monkeypatch.setattr(Plain, "mixed", _mixed)


def _scores(self: Plain, q: Tensor) -> Tensor:
    return torch.einsum("lhgc,lthc->lhgt", q, self.entries).float()


def _mixed(self: Plain, weights: Tensor) -> Tensor:
    return torch.einsum("lhgt,lthc->lhgc", weights.to(self.entries.dtype), self.entries)


def decoder(family: str, layers: int) -> Decoder:
    kind, shape = FAMILIES[family]
    config = config_from_json({"model_type": kind, "num_hidden_layers": layers} | shape, name="small", source="test")
    return random_decoder(config, device=CPU, dtype=torch.float16)


def by_step(family: str, recipe: Recipe, layers: int) -> tuple[Plan, list[int]]:
    """Operations of an eager run: of its prefill, then of each step."""
    made = decoder(family, layers)
    plan = plan_for(made.spec, recipe, CARD)
    made, ends = as_planned(made, plan.setting), [0]
    prompts = draw_prompts([recipe.prompt] * recipe.batch, 1)
    with Counting() as counting:
        execute(
            plan,
            made,
            prompts,
            options=Options(captured=False, stop=False),
            on_tokens=lambda _: ends.append(counting.count),
        )
    return plan, [after - before for before, after in pairwise(ends)]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("family", ["opt", "grouped llama"])
def test_a_step_has_as_many_operations_besides_its_layers_as_are_priced(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, prefill, step = by_layer(family, BASE)
    _, (whole_prefill, _, whole_step, *_) = by_step(family, BASE, 2)
    monkeypatch.setattr("sim.launches.is_captured", lambda _: False)

    for prefills, besides in ((True, whole_prefill - 2 * prefill), (False, whole_step - 2 * step)):
        assert end_operations(plan.setting, prefill=prefills).total == pytest.approx(besides, rel=CLOSE)


def by_layer(family: str, recipe: Recipe) -> tuple[Plan, float, float]:
    """A plan, and its operations of one layer in the prefill and in a decode step."""
    plan, two = by_step(family, recipe, 2)
    _, four = by_step(family, recipe, 4)
    prefill, *steps = ((more - fewer) / 2 for more, fewer in zip(four, two, strict=True))
    return plan, prefill, median(steps)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(("family", "name", "changes"), CASES, ids=lambda part: part if isinstance(part, str) else "")
def test_an_eager_layer_is_as_many_operations_as_are_priced(
    family: str, name: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(BASE, **changes)
    monkeypatch.setattr("sim.launches.is_captured", lambda _: False)

    plan, prefill, step = by_layer(family, recipe)

    away = keeps_away(flows_of(plan, home_columns(plan.homes)))
    assert away == (recipe.hbm < 100 and (recipe.selector, recipe.placement) not in ALL_NEEDED), name
    said = prefill_operations(plan.setting, 1, away=away).total, decode_operations(plan.setting, away=away).total
    assert said == (pytest.approx(prefill, rel=CLOSE), pytest.approx(step, rel=CLOSE))


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("family", ["opt", "grouped llama"])
@pytest.mark.parametrize("weights", [WeightFormat.NATIVE, WeightFormat.INT4])
def test_several_passes_take_a_layer_each(family: str, weights: WeightFormat) -> None:
    """51 prompts of 160 tokens fit a pass."""
    recipe = replace(BASE, batch=120, prompt=160, output=2, selector=Selector.H2O, keep=40, weights=weights)
    plan, prefill, _ = by_layer(family, recipe)

    passes = prefill_passes(recipe.batch, recipe.prompt)
    assert passes == 3
    assert prefill_operations(plan.setting, passes, away=False).total == pytest.approx(prefill, rel=CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_cpu_a_prompts_layer_is_as_many_operations_as_are_priced(family: str) -> None:
    made = decoder(family, 2)
    wired = replace(CARD.gpu, link=replace(CARD.gpu.link, name=CPU_LINK))
    setting = plan_for(made.spec, BASE, replace(CARD, gpu=wired)).setting
    assert setting.machine.is_cpu
    x, positions = torch.randn(2, BASE.prompt, 64).half(), torch.arange(BASE.prompt).expand(2, -1)

    with torch.inference_mode():
        made.project(0, x, positions)  # cosines and sines are there from the first layer on
        with Counting() as counting:
            prompt_layer(made, 1, x, positions, None)

    assert prompt_operations(setting).total == pytest.approx(counting.count, abs=2)


@kernels
@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv": INT8},
        {"kv": INT8, "prompt": 160},
        {"selector": Selector.SWA, "keep": 40, "placement": RESIDENT},
        {"selector": Selector.SWA, "keep": 40, "placement": RESIDENT, "kv": INT8},
        {"selector": Selector.SWA, "keep": 40, "placement": RESIDENT, "kv": INT8, "prompt": 160},
        {"selector": Selector.SWA, "keep": 40, "hbm": 50},
        {"selector": Selector.PAGES, "keep": 40, "placement": RESIDENT},
        {"weights": WeightFormat.INT8},
        {"weights": WeightFormat.INT4, "selector": Selector.SWA, "keep": 40, "placement": RESIDENT},
    ],
    ids=[
        *("dense", "int8", "int8 two groups", "swa", "swa int8", "swa int8 two groups"),
        *("swa recent", "pages", "weights int8", "weights int4 swa"),
    ],
)
def test_a_captured_step_takes_a_prompt_in_with_as_many_operations_as_are_priced(
    family: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each of several passes: a single one is captured."""
    from triton.runtime.jit import KernelInterface

    monkeypatch.setattr("sim.launches.captures_prefill", lambda _: False)
    recipe, made = replace(BASE, **changes), decoder(family, 2)
    plan = plan_for(made.spec, recipe, CARD)
    assert is_captured(plan.setting)
    made = sharing_room(as_planned(made, plan.setting), 2)
    fused = FusedDecoder(made)
    lanes, row = Lanes.of(made.spec, 2, per_head=False), torch.ones(1, dtype=torch.int64)
    slots = slots_kind(plan)(plan, made, lanes, torch.zeros(2, dtype=torch.int32), row)
    x, positions = torch.randn(2, recipe.prompt, 64).half(), torch.arange(recipe.prompt).expand(2, -1)

    counts = Counter[str]()
    with torch.inference_mode(), Counting() as counting:
        monkeypatch.setattr(KernelInterface, "__getitem__", counting.launch)
        q, k, v, _ = prompt_layer(fused, 1, x, positions, None)
        counts["prompt"] = counting.count
        slots.start(1, 0, q, k, v)
        counts["prefill"] = counting.count

    widened, prompt = 4 * (plan.setting.weight_format is not WeightFormat.NATIVE), prompt_operations(plan.setting)
    second_norm = int(family == "pythia")  # comes without a sum
    assert prompt.total == pytest.approx(counts["prompt"] - widened, abs=second_norm)
    assert prefill_operations(plan.setting, 1, away=False).kernels >= prompt.kernels + widened
    assert prefill_operations(plan.setting, 1, away=False).total == pytest.approx(counts["prefill"], rel=CLOSE)
    if plan.setting.attention.selector is Selector.SWA:
        native = replace(plan.setting, kv_format=KvFormats())
        assert choice_operations(plan.setting) == choice_operations(native)
        if plan.setting == native:
            assert choice_operations(native) == counts["prefill"] - counts["prompt"]


class Replayed:
    """Stands for a piece that the host replays: one operation, which computes nothing."""

    def __init__(self, counting: Counting) -> None:
        self.counting = counting

    def replay(self) -> None:
        self.counting.count += 1


def between_pieces(family: str, recipe: Recipe, layers: int, write_back: WriteBack) -> tuple[Plan, list[int]]:
    """Operations of each step, pieces among them, and kernels that widen."""
    made = decoder(family, layers)
    plan = plan_for(made.spec, recipe, CARD)
    plan = replace(plan, setting=replace(plan.setting, write_back=write_back))
    made = as_planned(made, plan.setting)
    wave, counts = GraphWave(plan, made, [0] * recipe.batch), list[int]()
    assert isinstance(wave.step, StreamedStep)
    kinds = wave.step.slots.first_rows()
    wave.step.seek(1)
    for _ in range(1, plan.homes.steps):
        with (
            torch.inference_mode(),
            Counting() as counting,
            mock.patch("triton.runtime.jit.KernelInterface.__getitem__", counting.launch),
            mock.patch("runtime.graph.copy_engine.CopyEngine.copy", counting.copy),
        ):
            pieces: Any = [Replayed(counting)] * wave.step.pieces
            wave.step.graphs = dict.fromkeys(kinds, pieces)
            wave.step.replay()
        counts.append(counting.count)
    return plan, counts


@kernels
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("write_back", WriteBack)
@pytest.mark.parametrize("weights", WeightFormat)
@pytest.mark.parametrize("name", ["off HBM", "inputs on the host"])
@pytest.mark.parametrize("on_host", [0, 50])
def test_between_pieces_a_streamed_layer_is_as_many_operations_as_are_priced(
    family: str, write_back: WriteBack, name: str, weights: WeightFormat, on_host: int
) -> None:
    """A piece, copies and what projects inputs, whose matrix is widened by a kernel where it must be. Marks are taken for
    three, of weights that come for one, and what completes a matrix, an operation of torch's, for two. What is priced in any
    case: a write, though none may be due.
    """
    recipe = replace(BASE, output=9, weights=weights, streamed=on_host, **DENSE[name])
    plan, two = between_pieces(family, recipe, 2, write_back)
    _, four = between_pieces(family, recipe, 4, write_back)

    counted = median((more - fewer) / 2 for more, fewer in zip(four, two, strict=True))
    marks = 5 if on_host else 3
    assert decode_operations(plan.setting, away=True).total == pytest.approx(counted + marks, abs=1)


@kernels
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", [WeightFormat.NATIVE, WeightFormat.INT4])
def test_a_prefix_is_forwarded_within_pieces_between_which_no_more_is_launched_than_is_priced(
    family: str, weights: WeightFormat
) -> None:
    """What is written at birth, or lies on the host besides, comes and goes between pieces; without, nothing is launched."""
    recipe = replace(BASE, output=9, weights=weights, **DENSE["tokens"])
    plan, two = between_pieces(family, recipe, 2, WriteBack.AT_BIRTH)
    _, four = between_pieces(family, recipe, 4, WriteBack.AT_BIRTH)
    whole = replace(plan.setting, write_back=WriteBack.AT_EVICTION)

    counted = median((more - fewer) / 2 for more, fewer in zip(four, two, strict=True))
    marks = 3
    assert decode_operations(plan.setting, away=True).total == pytest.approx(counted + marks, abs=1)
    assert decode_operations(whole, away=True, linked=True) == decode_operations(plan.setting, away=True)
    assert decode_operations(whole, away=True).total == 0
