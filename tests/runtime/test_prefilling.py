"""A captured prefill gives each wave what one launched kernel by kernel does, for every kind of slots.

Without a GPU the same operations run over the same buffers; graphs are then recorded, which holds them to what a capture allows.
"""

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from runtime.graph.copy_engine import Mark
from runtime.graph.dense import DenseSlots
from runtime.graph.forwarded import ForwardedSlots
from runtime.graph.prefilling import PromptGraph
from runtime.graph.quantised_dense import QuantisedSlots
from runtime.graph.quantised_recent import QuantisedRecentSlots
from runtime.graph.quantised_window import QuantisedWindowSlots
from runtime.graph.recall import RecallSlots
from runtime.graph.recent import RecentSlots
from runtime.graph.run import GraphWave
from runtime.graph.streamed import StreamedSlots
from runtime.graph.window import WindowSlots
from runtime.models import Decoder, as_planned
from runtime.wave import Prompts
from sim.attention import Selector
from sim.capture import captures_prefill
from sim.kv import KvFormat, KvFormats
from sim.plan import Admission, Mechanism, Plan, Recompute, WriteBack
from sim.spec import DType, ModelSpec, WeightFormat
from tests.runtime.graphs import (
    ON_GPU,
    decoder,
    draw_prompts,
    kernels,
    newest_in_hbm,
    padded,
    recent,
    resident,
)
from tests.runtime.plans import Choice, all_in_hbm
from tests.runtime.recorded import RecordedGraph, recorded_graphs
from tests.runtime.test_forwarded import without_host
from tests.runtime.test_graph_recall import recalled

BASE = Choice(batch=2, concurrency=2, prompt=20, output=4, dtype=DType.FP32)
WINDOW = replace(BASE, selector=Selector.SWA, sparsity=0.7, prompt=14)
LEVELS = KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT8)
PART: dict[str, Any] = {"prompt": 70, "output": 3, "kv_format": LEVELS}  # a whole group, and a part
ROUNDED = replace(BASE, **PART)
TOKENS = replace(BASE, recompute=Recompute.TOKENS)


def by_kernel(plan: Plan) -> Plan:
    return replace(plan, setting=replace(plan.setting, fetch_by=Mechanism.GATHER_KERNEL))


def with_inputs(plan: Plan, most: int = 200) -> Plan:
    """Inputs in place of what the host has, of the first tokens."""
    inputs = tuple(min(tokens, most) for tokens in plan.homes.host_kv)
    left = tuple(tokens - first for tokens, first in zip(plan.homes.host_kv, inputs, strict=True))
    homes = replace(plan.homes, host_kv=left, activations=inputs)
    return Plan(setting=replace(plan.setting, recompute=Recompute.ACTIVATIONS_HOST), homes=homes)


def at_birth(plan: Plan) -> Plan:
    return replace(plan, setting=replace(plan.setting, write_back=WriteBack.AT_BIRTH))


KINDS: dict[str, tuple[type, Callable[[ModelSpec], Plan]]] = {
    "dense": (DenseSlots, lambda spec: newest_in_hbm(all_in_hbm(spec, BASE), 200)),
    "dense, read where it lies": (DenseSlots, lambda spec: by_kernel(newest_in_hbm(all_in_hbm(spec, BASE), 12))),
    "int8": (QuantisedSlots, lambda spec: newest_in_hbm(all_in_hbm(spec, ROUNDED), 66)),
    "swa": (WindowSlots, lambda spec: resident(all_in_hbm(spec, WINDOW), 8)),
    "swa recent": (RecentSlots, lambda spec: recent(all_in_hbm(spec, replace(WINDOW, drop_dead=False)), [6])),
    "swa recent int8": (
        QuantisedRecentSlots,
        lambda spec: recent(all_in_hbm(spec, replace(WINDOW, drop_dead=False, kv_format=LEVELS)), [6]),
    ),
    "swa int8": (QuantisedWindowSlots, lambda spec: resident(all_in_hbm(spec, replace(WINDOW, kv_format=LEVELS)), 8)),
    "pages": (
        RecallSlots,
        lambda spec: recalled(
            all_in_hbm(spec, replace(BASE, selector=Selector.PAGES, sparsity=0.4)), 16, WriteBack.AT_EVICTION
        ),
    ),
    "copied": (StreamedSlots, lambda spec: newest_in_hbm(all_in_hbm(spec, BASE), 9)),
    "projected": (StreamedSlots, lambda spec: with_inputs(newest_in_hbm(all_in_hbm(spec, BASE), 9))),
    "int8 and projected": (StreamedSlots, lambda spec: with_inputs(newest_in_hbm(all_in_hbm(spec, ROUNDED), 9), 30)),
    "int8 and forwarded": (ForwardedSlots, lambda spec: without_host(spec, [9], replace(TOKENS, **PART))),
    "forwarded beside copies": (StreamedSlots, lambda spec: at_birth(without_host(spec, [9], TOKENS))),
    "forwarded": (ForwardedSlots, lambda spec: without_host(spec, [9], TOKENS)),
    "weights int8": (
        DenseSlots,
        lambda spec: newest_in_hbm(all_in_hbm(spec, replace(BASE, weight_format=WeightFormat.INT8)), 200),
    ),
}


class Made(NamedTuple):
    """A wave with a prefill to be captured, and the prompts of three: of the last one some are short."""

    wave: GraphWave
    one: Prompts
    other: Prompts
    short: Prompts

    @property
    def graph(self) -> PromptGraph:
        assert self.wave.whole_prompts is not None
        return self.wave.whole_prompts

    def outcome(self, prompts: Prompts) -> list[Tensor]:
        """Tokens and the last logits; without a GPU, where steps are slow, the first tokens and what the slots hold."""
        self.wave.prefill(prompts)
        if ON_GPU:
            self.wave.decode(1, self.wave.plan.homes.steps)
            return [self.wave.step.generated.clone(), self.wave.step.logits.clone()]
        slots = self.wave.slots
        held = tree_leaves([vars(slots), vars(slots.rows) if isinstance(slots, StreamedSlots) else {}])
        return [self.wave.step.generated.clone(), *(one.clone() for one in held if isinstance(one, Tensor))]

    def by_host(self) -> "Made":
        """Every prefill launched kernel by kernel."""
        self.wave.whole_prompts = None
        return self


def make(kind: str, family: str = "grouped qwen3") -> Made:
    slots, plan_for = KINDS[kind]
    made = decoder(family, DType.FP32, seed=3)
    plan = plan_for(made.spec)
    made, longest = as_planned(made, plan.setting), plan.setting.workload.prompt_tokens
    drawn = (([longest, longest], 1), ([longest, longest], 2), ([longest, 7], 3))
    prompts = [padded(plan, made, draw_prompts(lengths, seed)) for lengths, seed in drawn]
    wave = GraphWave(plan, made, [0, 0])
    assert type(wave.slots) is slots
    return Made(wave, *prompts)


def require_same(got: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0, equal_nan=True)


@kernels
@pytest.mark.parametrize("kind", KINDS)
def test_waves_one_after_the_other_are_what_they_are_launched_by_the_host(kind: str) -> None:
    """On a GPU from its graph, until prompts come that are short."""
    made, by_host = make(kind), make(kind).by_host()
    assert (made.graph.graph is not None) == ON_GPU
    first_tokens = list[Tensor]()

    for prompts, short in ((made.one, False), (made.short, True), (made.other, True)):
        got = made.outcome(prompts)
        require_same(got, by_host.outcome(prompts))
        assert (made.graph.graph is not None) == (ON_GPU and not short)
        first_tokens.append(got[0][:, 0])

    assert not torch.equal(first_tokens[0], first_tokens[2])


@kernels
@pytest.mark.skipif(ON_GPU, reason="a GPU captures")
@pytest.mark.parametrize(("kind", "family"), [*((kind, "grouped qwen3") for kind in KINDS), ("dense", "opt")])
def test_a_prefill_captured_once_is_right_for_every_wave(
    kind: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks the device nothing, waits for no other stream's mark, and finds on the device all that changes."""
    made, by_host, hold = make(kind, family), make(kind, family).by_host(), Mark.hold

    def spy(mark: Mark, stream: torch.cuda.Stream | None) -> None:
        assert RecordedGraph.recording is None
        hold(mark, stream)

    monkeypatch.setattr(Mark, "hold", spy)
    for one in (made, by_host):
        one.wave.padding.copy_(one.short.padding)  # as any wave before leaves it
    with recorded_graphs(monkeypatch), torch.inference_mode():
        by_host.wave._take_in(made.graph.tokens)
        made.graph.graph = recorded = made.graph._captured(made.wave._take_in)
        for prompts in (made.one, made.other):
            require_same(made.outcome(prompts), by_host.outcome(prompts))

    assert isinstance(recorded, RecordedGraph)
    assert recorded.replays == 2


@kernels
def test_a_wave_goes_with_its_last_name() -> None:
    """Its memory must be there for the next one: nothing waits for the garbage collector."""
    made = make("dense")
    made.outcome(made.one)
    wave, graph = weakref.ref(made.wave), weakref.ref(made.graph)

    del made

    assert wave() is None
    assert graph() is None


@kernels
@pytest.mark.skipif(not ON_GPU, reason="a GPU has memory of its own")
def test_a_captured_prefill_takes_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks may lie otherwise."""
    made = decoder("wide opt", DType.FP32, seed=3)
    choice = replace(BASE, batch=16, concurrency=16, prompt=100, output=4)
    plan = newest_in_hbm(all_in_hbm(made.spec, choice), 200)
    prompts = padded(plan, made, draw_prompts([100] * 16, 1))

    def peak_bytes(at_once: bool) -> int:
        monkeypatch.setattr("runtime.graph.run.prefills_at_once", lambda *_: at_once)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        wave = GraphWave(plan, made, [0] * 16)
        assert (wave.whole_prompts is not None) == at_once
        wave.run(prompts)
        return torch.cuda.max_memory_allocated()

    peak_bytes(False)  # loads libraries
    by_host = peak_bytes(False)
    assert peak_bytes(True) <= by_host + 2**20


def planned(made: Decoder, choice: Choice) -> Plan:
    return newest_in_hbm(all_in_hbm(made.spec, choice), 200)


@kernels
@pytest.mark.parametrize(
    ("choice", "captured"),
    [
        (BASE, True),
        (replace(BASE, batch=3), True),  # the last wave is filled up
        (replace(BASE, batch=3, concurrency=3), False),  # in two passes
        (replace(BASE, concurrency=1, prompt=40), True),
        (replace(BASE, concurrency=1, prompt=41), False),  # in parts
        (replace(BASE, weight_format=WeightFormat.INT4), True),
        (replace(BASE, weights_on_host=0.5), False),
    ],
)
def test_prices_and_runtime_agree_on_which_prefills_are_captured(
    choice: Choice, captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass takes 40 tokens here."""
    for module in ("sim.footprint", "runtime.prefill"):
        monkeypatch.setattr(f"{module}.PREFILL_CHUNK_TOKENS", 40)
    made = decoder("opt", DType.FP32, seed=1)
    plan = planned(made, choice)

    wave = GraphWave(plan, as_planned(made, plan.setting), [0] * choice.concurrency)

    assert (wave.whole_prompts is not None) == captures_prefill(plan.setting) == captured


@pytest.mark.parametrize(
    "choice",
    [
        replace(BASE, admission=Admission.CONTINUOUS),
        replace(BASE, selector=Selector.TOPK),
        replace(BASE, output=1),
    ],
)
def test_prefills_of_newcomers_of_eager_plans_and_of_those_without_a_step_are_launched(choice: Choice) -> None:
    assert not captures_prefill(all_in_hbm(decoder("opt", DType.FP32, seed=1).spec, choice).setting)
