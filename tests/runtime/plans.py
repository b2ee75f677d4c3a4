"""Small plans for small models: any homes that the planner may choose."""

import random
from dataclasses import dataclass, field, replace

from sim import catalogue
from sim.access import measured_access
from sim.attention import Attention, Selector
from sim.flows import flows_of, home_columns
from sim.homes import TokenHomes
from sim.kv import KvFormats
from sim.occupancy import occupancy_of
from sim.plan import Admission, Placement, Plan, Preemption, Recompute, Setting, WriteBack
from sim.scheduled import page_rules
from sim.spec import DType, MachineSpec, ModelSpec, WeightFormat
from sim.workload import Workload
from tests.runtime.where import dtype_asked_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a plan leaves to draw."""

    selector: Selector = Selector.DENSE
    sparsity: float = 0.5
    local_fraction: float = 0.5
    drop_dead: bool = True
    placement: Placement = Placement.RECENT
    write_back: WriteBack = WriteBack.AT_EVICTION
    recompute: Recompute = Recompute.NONE
    batch: int = 3
    concurrency: int = 2
    prompt: int = 9
    output: int = 8
    dtype: DType = field(default_factory=dtype_asked_for)
    kv_format: KvFormats = field(default_factory=KvFormats)
    enough_copies: bool = True
    prefetch_layers: int = 1
    weights_on_host: float = 0.0
    weight_format: WeightFormat = WeightFormat.NATIVE
    host_attention: bool = False
    admission: Admission = Admission.WAVES
    preemption: Preemption = Preemption.RECOMPUTE


def machine() -> MachineSpec:
    return MachineSpec(name="test", gpu=catalogue.gpu("H100 SXM"), host=catalogue.host())


def draw_choice(rng: random.Random, selector: Selector) -> Choice:
    dense = selector is Selector.DENSE
    recomputes = [*Recompute] if dense else [r for r in Recompute if r is not Recompute.TOKENS]
    return Choice(
        selector=selector,
        sparsity=0.0 if dense else rng.choice([0.2, 0.5, 0.7]),
        local_fraction=rng.choice([0.25, 0.5, 0.75]),
        drop_dead=rng.random() < 0.7,
        placement=Placement.RECENT if dense else rng.choice([*Placement]),
        write_back=rng.choice([*WriteBack]),
        recompute=rng.choice(recomputes),
        concurrency=rng.choice([1, 2, 3]),
        prompt=rng.randint(2, 14),
        output=rng.choice([1, 2, 7, 12]),
        prefetch_layers=1 if selector.recalls else rng.choice([1, 2]),
        weights_on_host=rng.choice([0.0, 0.0, 0.3, 1.0]),
        host_attention=dense and rng.random() < 0.3,
    )


def draw_continuous(rng: random.Random, model: ModelSpec, selector: Selector) -> Plan:
    """Continuous admission under a budget in which some sequences must wait, and some step back."""
    choice = Choice(
        selector=selector,
        sparsity=rng.choice([0.2, 0.5, 0.7]),
        local_fraction=rng.choice([0.25, 0.5, 0.75]),
        drop_dead=rng.random() < 0.7,
        placement=Placement.RECENT if selector is Selector.DENSE else rng.choice([*Placement]),
        batch=5,
        concurrency=rng.choice([1, 3, 4, 5]),
        prompt=rng.choice([2, 11, 16, 30]),
        output=rng.choice([1, 20, 37]),
        weight_format=rng.choice([WeightFormat.NATIVE, WeightFormat.INT8]),
        admission=Admission.CONTINUOUS,
        preemption=rng.choice([*Preemption]),
    )
    plan = all_in_hbm(model, choice)
    homes = home_columns(plan.homes)
    rules = page_rules(plan.setting, occupancy_of(plan, homes, flows_of(plan, homes)))
    return with_budget(plan, round(max(rules.held_bytes) * rng.uniform(1.0, 3.5)))


def draw_plan(rng: random.Random, model: ModelSpec, choice: Choice) -> Plan:
    """Homes at random within what a plan allows."""
    setting = make_setting(model, choice)
    return Plan(setting=setting, homes=_draw_homes(rng, setting, choice))


def make_setting(model: ModelSpec, choice: Choice) -> Setting:
    attention = Attention(
        selector=choice.selector,
        sparsity=0.0 if choice.selector is Selector.DENSE else choice.sparsity,
        local_fraction=choice.local_fraction,
    )
    return Setting(
        machine=machine(),
        model=model,
        workload=Workload(batch=choice.batch, prompt_tokens=choice.prompt, output_tokens=choice.output),
        dtype=choice.dtype,
        concurrency=choice.concurrency,
        attention=attention,
        access=measured_access(choice.selector),
        drop_dead=choice.drop_dead,
        kv_format=choice.kv_format,
        placement=choice.placement,
        write_back=choice.write_back,
        recompute=choice.recompute,
        prefetch_layers=choice.prefetch_layers,
        weights_on_host=choice.weights_on_host,
        weight_format=choice.weight_format,
        host_attention=choice.host_attention,
        admission=choice.admission,
        preemption=choice.preemption,
        kv_budget_bytes=2**40,
    )


def all_in_hbm(model: ModelSpec, choice: Choice) -> Plan:
    """Nothing leaves HBM but what is dead."""
    setting = make_setting(model, choice)
    counts = setting.token_counts
    none = (0,) * len(counts.cached)
    living = tuple(cached - dead for cached, dead in zip(counts.cached, counts.dead, strict=True))
    homes = TokenHomes(hbm=living, host_kv=none, activations=none, dropped=counts.dead, copies=none)
    return Plan(setting=setting, homes=homes)


def _draw_homes(rng: random.Random, setting: Setting, choice: Choice) -> TokenHomes:
    counts = setting.token_counts
    resident = setting.placement is Placement.RESIDENT
    rows: list[tuple[int, int, int, int, int]] = []
    beyond = kept_out = lost = 0  # tokens off HBM, of them beyond host KV, of them dropped: none of these may shrink
    for step, (cached, dead, local, selected) in enumerate(
        zip(counts.cached, counts.dead, counts.local, counts.selected, strict=True)
    ):
        most_lost = min(setting.most_dropped[step], cached - 1)
        lost = max(lost, dead)
        if setting.recompute is Recompute.TOKENS and rng.random() < 0.4:
            lost = rng.randint(lost, max(lost, most_lost))
        kept_out = max(kept_out, lost)
        must_stay = 1 if setting.attention.is_dense else local
        most_beyond = cached - must_stay
        beyond = max(beyond, kept_out)
        if rng.random() < 0.6:
            beyond = rng.randint(min(beyond, most_beyond), most_beyond)
        beyond = max(beyond, kept_out)
        if setting.recompute.from_activations and rng.random() < 0.5:
            kept_out = rng.randint(kept_out, beyond)
        off = beyond - lost
        copies = 0
        if resident:
            need = max(0, local + selected - (cached - beyond))
            most = min(off, selected) if choice.enough_copies else need
            copies = min(off, max(need, most))
        rows.append((cached - beyond, beyond - kept_out, kept_out - lost, lost, copies))
    hbm, host_kv, activations, dropped, copies_column = zip(*rows, strict=True)
    return TokenHomes(hbm=hbm, host_kv=host_kv, activations=activations, dropped=dropped, copies=copies_column)


def with_budget(plan: Plan, kv_budget_bytes: int) -> Plan:
    return replace(plan, setting=replace(plan.setting, kv_budget_bytes=kv_budget_bytes))
