"""What only a GPU runs, with the GPU left out: kernels and streams that do nothing, everything around them as it is."""

import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from calibration.bench import cases, measure, scope_of
from calibration.families import attention, choices, fetches, host, products, steps, transfers
from calibration.families.base import Scope
from calibration.fit import fit
from calibration.machine import machine_at, name_at
from calibration.runner import Runner
from calibration.timer import CpuTimer, CudaTimer
from runtime.graph import fetching, launch, recall
from runtime.graph import products as graph_products
from sim import catalogue
from sim.attention import Selector
from sim.cost import CostModel
from sim.measured import Measured
from sim.predict import RECORDED_ONLY, predictable
from sim.profile import Measurement, Profile
from sim.recipe import Recipe
from sim.spec import DType, MachineSpec
from sim.units import MIB
from tests.calibration.tiny import CPU, fingerprint

CARD = MachineSpec(name="h200", gpu=catalogue.gpu("h200"), host=catalogue.host())


class LikeAGpu(Scope):
    """A CPU that is taken for a GPU."""

    on_gpu = True  # type: ignore[assignment]


class Kernel:
    """Launched like a Triton kernel; does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(isinstance(size, int) and size > 0 for size in grid)
        return lambda *_, **__: None


class Stream:
    def __init__(self, *_: object) -> None:
        self.waited = list[object]()

    def wait_stream(self, other: object) -> None:
        self.waited.append(other)


class Event:
    def __init__(self, **_: object) -> None:
        self.at_s = 0.0

    def record(self) -> None:
        self.at_s = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: "Event") -> float:
        return 1e3 * (other.at_s - self.at_s)


class Graph:
    def __init__(self) -> None:
        self.replayed = 0

    def replay(self) -> None:
        self.replayed += 1


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = SimpleNamespace(attend=Kernel(), settle=Kernel(), exchange=Kernel(), product=Kernel(), add_norm=Kernel())
    monkeypatch.setattr(launch, "kernels", lambda: kernels)
    monkeypatch.setattr(launch, "_grouped_kernels", lambda: SimpleNamespace(attend=Kernel(), merge=Kernel()))
    monkeypatch.setattr(graph_products, "_kernels", lambda: kernels)
    monkeypatch.setattr(fetching, "kernels", lambda: SimpleNamespace(fetch=Kernel()))
    monkeypatch.setattr(recall, "kernels", lambda: SimpleNamespace(score=Kernel(), choose=Kernel(), digest=Kernel()))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(transfers, "_pair", lambda _, size, __: (torch.ones(size, dtype=torch.uint8),) * 2)
    monkeypatch.setattr(transfers, "GIB", MIB)
    torch.set_num_threads(1)


def scope(**changes: Any) -> Scope:
    settings: dict[str, Any] = {
        "machine": CARD,
        "device": CPU,
        "dtype": DType.FP16,
        "timer": CpuTimer(),
        "models": ("opt-125m/2/128", "llama-3-8b/2/512"),
        "batches": (2,),
        "prompts": (8,),
        "output": 4,
        "most_bytes": MIB,
        "cold_bytes": 2**18,
        "budget_s": 0.0,
        "thorough": False,
    }
    return LikeAGpu(**(settings | changes))


def test_attention_goes_through_the_slots_of_a_captured_step() -> None:
    taken = [one for case in attention.cases(scope()) for one in case.measure()]

    assert [one.family for one in taken].count("attention") >= 4
    assert {one.family for one in taken} == {"attention", "prompt_attention"}
    assert any("llama" in one.case for one in taken)
    assert {"kv=int8", "admission=continuous", "kv=fp8"} <= {word for one in taken for word in one.case.split()}
    assert predictable(taken, CARD)


@pytest.mark.parametrize(("thorough", "pages"), [(False, 1), (True, 2)])
def test_choices_are_made_by_the_slots_of_a_captured_step(thorough: bool, pages: int) -> None:
    """A window's of one kind of heads, pages' of both; what is read before a choice takes time as well, and is subtracted."""
    sparse = scope(thorough=thorough, batches=(2, 3), models=("opt-125m/2/128", "llama-3-8b/2/512", "opt-125m/4/128"))

    taken = [one for case in choices.cases(sparse) for one in case.measure()]

    assert {one.family for one in taken} == {"select"}
    recipes = [Recipe.of(one.case) for one in taken]
    assert [one.model for one in recipes if one.selector is Selector.SWA] == ["opt-125m/2/128"] * 4
    of_pages = [(one.model, one.batch) for one in recipes if one.selector is Selector.PAGES]
    assert of_pages == [(name, n) for name in sparse.models[:2] for n in (2, 3, 3)[: 1 + pages]]
    assert all(1e-7 <= one.seconds <= 1 for one in taken)
    assert len(predictable(taken, CARD)) == len(taken)


def test_attention_that_rounds_a_whole_group_of_keys_has_no_price() -> None:
    case = "model=opt-6.7b batch=4 prompt={} output=2 kv=int8"
    taken = [
        Measurement(family="attention", case=case.format(prompt), seconds=1.0, low_s=1.0, high_s=1.0, samples=1)
        for prompt in (223, 255)
    ]

    assert [took for took, _ in predictable(taken, CARD)] == taken[:1]


def test_products_go_through_the_runtimes_own_kernels() -> None:
    taken = [one for case in products.cases(scope()) for one in case.measure()]

    assert {one.text("as") for one in taken} == {"qkv", "out", "up", "down"}
    assert len({one.case for one in taken}) == len(taken)


def test_copies_run_alone_and_beside_others_gathers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "MIB", 1024)
    small = scope()
    made = [*transfers.copies(small), *transfers.gathers(small)]

    taken = [one for case in made for one in case.measure()]

    assert {one.family for one in taken} == {"copy", "duplex", "copy_beside", "gather"}
    assert {(one.text("to"), one.text("memory")) for one in taken if one.family == "copy"} == {
        (to, memory) for to in ("device", "host") for memory in ("pinned", "pageable")
    }
    priced = {one.case for one, _ in predictable(taken, CARD)}
    assert not any("pageable" in case for case in priced)


@pytest.mark.parametrize("thorough", [False, True])
def test_tokens_are_fetched_by_many_and_few_programs(thorough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime's own numbers of programs, alone and beside products, are priced, others are recorded."""
    programs, fetched = list[int](), fetching.fetch

    def noted(*args: Any, **options: Any) -> None:
        programs.append(options["programs"])
        fetched(*args, **options)

    monkeypatch.setattr(fetches, "fetch", noted)
    monkeypatch.setattr(fetches, "_BYTES", 64 * 1024)
    monkeypatch.setattr(fetches, "_SHAPE", (2, 64, 64))
    taken = [one for case in fetches.cases(scope(thorough=thorough)) for one in case.measure()]

    tried = {8, 32, 4096} if thorough else {32, 4096}
    assert {one.number("programs") for one in taken} == {0, *tried}
    assert set(programs) == tried
    assert {one.number("channels") for one in taken} == ({0, 4096, 1024} if thorough else {0, 4096})
    assert {one.family for one in taken} == {"fetch", "fetch_beside", "fetch_blocks", "fetch_blocks_beside"}
    assert {(one.family, one.number("programs")) for one, _ in predictable(taken, CARD)} == {
        ("fetch", fetching.PROGRAMS),
        ("fetch_beside", fetches._BESIDE),
    }


def test_pinning_and_launches_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_PINNED_BYTES", 4096)
    taken = [one for case in host.cases(scope()) for one in case.measure()]

    assert [one.text("how") for one in taken if one.family == "launch"] == ["captured", "queued", "host"]
    assert [one.samples for one in taken if one.family == "pin"] == [3]


@pytest.mark.parametrize("captured", [True, False])
def test_a_graph_is_replayed_and_other_work_is_queued(captured: bool) -> None:
    made = list[int]()

    spread = CudaTimer().time([lambda: made.append(1)] * 3, captured=captured, budget_s=0.0)

    once_to_warm_up_and_once_to_capture = 6
    assert len(made) == (once_to_warm_up_and_once_to_capture if captured else 3 * (1 + spread.samples))
    assert spread.samples == 5


@pytest.mark.parametrize("name", ["h200", "a100-40g"])  # with FP8 arithmetic and without
@pytest.mark.parametrize(("thorough", "most"), [(False, 160), (True, 520)])
def test_the_whole_list_of_a_card_is_named_apart_and_priced(thorough: bool, most: int, name: str) -> None:
    """Nothing is run: what a card's cases are called, and that each has a price or is there for the record."""
    device, card = torch.device("cuda"), replace(CARD, name=name, gpu=catalogue.gpu(name))
    named = [
        (case.family, case.case) for case in cases(scope_of(device, card, thorough=thorough), Runner(device=device))
    ]
    blank = [Measurement(family=f, case=c, seconds=1.0, low_s=1.0, high_s=1.0, samples=1) for f, c in named]

    cost = CostModel(machine=card, profile=Profile.nominal(card))
    assert len(set(named)) == len(named) <= most
    priced = predictable(blank, card)
    assert all(1e-7 < price(cost) < 2 for _, price in priced)
    assert {one.family for one, _ in priced} | set(RECORDED_ONLY) >= {family for family, _ in named}
    assert {"product", "attention", "select", "copy", "duplex", "gather", "fetch", "fetch_beside", "decode"} <= {
        family for family, _ in named
    }


def test_a_failing_kernel_costs_its_own_family_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel image is available\nfor execution")

    monkeypatch.setattr(products, "linear", broken)
    monkeypatch.setattr("calibration.bench.cases", lambda scope, _: products.cases(scope))
    told = list[str]()

    measured = measure(scope(), None, Measured(fingerprint=fingerprint(), machine=CARD), on_failure=told.append)

    assert {one.text("as") for one in measured.measurements} == {"out", "down"}
    assert all(line.startswith("product rows=") and line.endswith("no kernel image is available") for line in told)


def test_measuring_ends_where_the_device_no_longer_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: torch.device) -> None:
        raise ValueError("cuda no longer answers (an illegal address): run the same command again")

    tried = list[int]()
    monkeypatch.setattr(products, "linear", lambda *_, **__: 1 / 0)
    monkeypatch.setattr("calibration.bench.FAILURES", (ZeroDivisionError,))
    monkeypatch.setattr("calibration.bench.cases", lambda scope, _: products.cases(scope))
    monkeypatch.setattr("calibration.bench.require_answering", gone)

    with pytest.raises(ValueError, match="no longer answers"):
        measure(scope(), None, Measured(fingerprint=fingerprint(), machine=CARD), lambda at, *_: tried.append(at))

    assert len(tried) < len(list(products.cases(scope())))


@pytest.mark.parametrize(
    ("device_name", "card"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100-80g-sxm"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
    ],
)
def test_a_card_is_found_by_what_its_driver_calls_it(
    device_name: str, card: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device_name)

    assert name_at(torch.device("cuda")) == machine_at(torch.device("cuda")).gpu.name == card


def test_products_alone_make_a_profile() -> None:
    taken = tuple(one for case in products.cases(scope()) for one in case.measure())

    profile = fit(Measured(fingerprint=fingerprint(), machine=CARD, measurements=taken), name="x", basis="y")

    assert profile.link_efficiency == Profile.nominal(CARD).link_efficiency
    assert profile.evidence
    assert profile.evidence.machine is None


def test_the_most_memory_is_that_of_the_run_that_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first, which is not timed; later ones replay what it captured."""
    taken = iter([9, *[5] * 20])
    monkeypatch.setattr(Runner, "_peak_bytes", lambda _: next(taken))
    recipe = Recipe(model="opt-125m/2/128", batch=2, prompt=8, output=4, dtype=DType.FP32)

    (_, prefill) = steps.measured(scope(), Runner(device=CPU), recipe)

    assert prefill.peak_bytes == 9
