"""Hypothesis strategies: valid plans over every option, on machines slow and fast enough for every regime to occur."""

from collections.abc import Sequence
from dataclasses import fields, replace

from hypothesis import strategies as st

from builders import AMPLE_BYTES, in_hbm, make_machine, make_model
from sim.access import AGES, AccessProfile, LivingAges
from sim.attention import Attention, Selector
from sim.cost import CostModel
from sim.flows import flows_of, home_columns
from sim.homes import TokenHomes
from sim.kv import KvFormat, KvFormats
from sim.occupancy import occupancy_of
from sim.plan import Admission, Mechanism, Placement, Plan, Preemption, Recompute, Setting, WriteBack
from sim.profile import Profile
from sim.recording import RecordedSelection
from sim.scheduled import paged_bytes
from sim.spec import DType, MachineSpec, ModelSpec, WeightFormat
from sim.workload import Workload


def _rates(lowest: int, highest: int) -> st.SearchStrategy[float]:
    """Powers of ten and all between them, so that slow and fast are drawn alike."""
    return st.floats(lowest, highest).map(lambda exponent: 10.0**exponent)


def _shares() -> st.SearchStrategy[float]:
    return st.one_of(st.sampled_from((0.0, 0.5, 1.0)), st.floats(0, 1))


@st.composite
def machines(draw: st.DrawFn) -> MachineSpec:
    """Memory for any plan; rates over many decades."""
    return make_machine(
        hbm_bytes_per_s=draw(_rates(7, 13)),
        flop_per_s=draw(_rates(9, 16)),
        link_bytes_per_s=draw(_rates(5, 12)),
        launch_s=draw(st.sampled_from((0.0, 2e-6, 1e-4))),
        dram_bytes_per_s=draw(_rates(6, 12)),
        host_flop_per_s=draw(_rates(8, 13)),
    )


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    """Shares down to a tenth, amounts from nothing to several times the nominal one."""
    constants = {}
    for member in fields(Profile):
        kind = member.metadata.get("kind")
        if kind == "share":
            lowest = 0.0 if member.name.endswith("sm_share") else 0.1
            constants[member.name] = draw(st.floats(lowest, 1))
        elif kind == "amount":
            constants[member.name] = draw(st.sampled_from((0.0, 1.0, 4.0))) * (member.default or 5e-6)
    return Profile(name="drawn", basis="hypothesis", **constants)


@st.composite
def costs(draw: st.DrawFn, machine: MachineSpec) -> CostModel:
    """Cost models of ``machine``."""
    nominal = st.just(Profile.nominal(machine))
    return CostModel(machine=machine, profile=draw(st.one_of(nominal, profiles())))


@st.composite
def models(draw: st.DrawFn) -> ModelSpec:
    """One to six small layers, grouped heads and gated feed-forward among them."""
    kv_heads, group = draw(st.sampled_from(((1, 1), (2, 1), (1, 4), (2, 2))))
    return make_model(
        layers=draw(st.integers(1, 6)),
        hidden=draw(st.sampled_from((16, 64))),
        intermediate=draw(st.sampled_from((8, 128))),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from((4, 16))),
        gated_mlp=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
    )


@st.composite
def living_ages(draw: st.DrawFn) -> LivingAges:
    """Alike, mostly old or mostly new, or any."""
    alike = tuple(eighth / AGES for eighth in range(1, AGES))
    old, new = (0.4, 0.7, 0.9, 1.0, 1.0, 1.0, 1.0), (0.0, 0.0, 0.1, 0.2, 0.4, 0.6, 0.8)
    ascending = st.lists(_shares(), min_size=AGES - 1, max_size=AGES - 1).map(lambda shares: tuple(sorted(shares)))
    either = st.one_of(st.sampled_from((alike, old, new)), ascending)
    return LivingAges(first=draw(either), later=draw(either))


@st.composite
def accesses(draw: st.DrawFn, selector: Selector) -> AccessProfile:
    """Any turnover, early and later, of which any share may return; picks of every age alike, or mostly old or mostly new ones;
    of the living ones, or new ones, of any age at each of two keep shares.
    """
    straight = ((0.0, 0.0), (1.0, 1.0))
    return AccessProfile(
        selector=selector,
        keep_shares=(0.1, 0.5),
        turnovers=(draw(_shares()), draw(_shares())),
        perplexity_ratios=(1.2, 1.1),
        age_shares=draw(st.sampled_from((straight, ((0, 0), (0.5, 0.2), (1, 1)), ((0, 0), (0.3, 0.9), (1, 1))))),
        returned_share=draw(st.one_of(st.none(), _shares())),
        living_ages=draw(st.one_of(st.none(), st.tuples(living_ages(), living_ages()))),
        early_turnovers=draw(st.one_of(st.none(), st.tuples(_shares(), _shares()))),
        source="drawn",
    )


@st.composite
def workloads(draw: st.DrawFn, outputs: tuple[int, ...] = (1, 2, 3, 5, 9)) -> Workload:
    """One to seven short sequences."""
    return Workload(
        batch=draw(st.integers(1, 7)),
        prompt_tokens=draw(st.integers(1, 24)),
        output_tokens=draw(st.sampled_from(outputs)),
    )


@st.composite
def settings_of(
    draw: st.DrawFn, selector: Selector | None = None, outputs: tuple[int, ...] = (1, 2, 3, 5, 9)
) -> Setting:
    """Settings over every option, for sequences in waves."""
    model, machine = draw(models()), draw(machines())
    selector = selector or draw(st.sampled_from((Selector.DENSE, Selector.DENSE, *Selector)))
    dense, recalls = selector is Selector.DENSE, selector.recalls
    work = draw(workloads(outputs))
    sources = [source for source in Recompute if dense or source is not Recompute.TOKENS]
    formats = st.sampled_from(KvFormat)
    host_attention = dense and draw(st.booleans())
    deepest = 1 if recalls else max(1, model.layers - 1)
    return Setting(
        machine=machine,
        model=model,
        workload=work,
        dtype=draw(st.sampled_from(DType)),
        weight_format=draw(st.sampled_from(WeightFormat)),
        weights_on_host=draw(st.sampled_from((0.0, 0.0, 0.3, 1.0))),
        concurrency=draw(st.integers(1, work.batch)),
        attention=Attention(
            selector=selector,
            sparsity=0.0 if dense else draw(st.floats(0, 0.95)),
            local_fraction=draw(_shares()),
        ),
        access=draw(accesses(selector)),
        drop_dead=draw(st.booleans()),
        kv_format=KvFormats(gpu=draw(formats), host=KvFormat.NATIVE if host_attention else draw(formats)),
        placement=Placement.RECENT if dense else draw(st.sampled_from(Placement)),
        write_back=draw(st.sampled_from(WriteBack)),
        recompute=draw(st.sampled_from(sources)),
        fetch_by=draw(st.sampled_from(Mechanism)),
        host_attention=host_attention,
        guess_hits=draw(st.one_of(st.none(), _shares())) if recalls else None,
        prefetch_layers=draw(st.integers(1, deepest)),
        kv_budget_bytes=AMPLE_BYTES,
    )


@st.composite
def homes_of(draw: st.DrawFn, setting: Setting) -> TokenHomes:
    """Any homes that ``setting`` allows: three boundaries that only move outward, the oldest tokens beyond them.

    From a drawn step on tokens may leave HBM; before it all that live stay there.
    """
    counts, resident = setting.token_counts, setting.placement is Placement.RESIDENT
    starts = draw(st.integers(0, len(counts.cached)))
    rows: list[tuple[int, int, int, int, int]] = []
    gone = inputs = off = 0  # tokens dropped; those and the ones kept as inputs; all that are off HBM
    for step, (cached, dead, most, slots) in enumerate(
        zip(counts.cached, counts.dead, setting.most_dropped, setting.slots_needed, strict=True)
    ):
        limit = cached if resident else cached - slots
        free = step >= starts
        lowest = max(gone, dead)
        gone = draw(st.integers(lowest, max(lowest, min(most, limit)))) if free else lowest
        inputs, off = max(gone, inputs), max(gone, off)
        if free and setting.recompute.from_activations:
            inputs = draw(st.integers(inputs, limit))
        off = draw(st.integers(max(inputs, off), limit)) if free else off
        hbm = cached - off
        copies = draw(st.integers(max(0, slots - hbm), off - gone)) if resident else 0
        rows.append((hbm, off - inputs, inputs - gone, gone, copies))
    hbm_column, host_kv, activations, dropped, copied = zip(*rows, strict=True)
    return TokenHomes(hbm=hbm_column, host_kv=host_kv, activations=activations, dropped=dropped, copies=copied)


@st.composite
def plans(draw: st.DrawFn, selector: Selector | None = None) -> Plan:
    """Valid plans over every option and all homes."""
    setting = draw(settings_of(selector))
    return Plan(setting=setting, homes=draw(homes_of(setting)))


@st.composite
def continuous_plans(draw: st.DrawFn, preemptions: Sequence[Preemption] = tuple(Preemption)) -> Plan:
    """Plans that admit sequences one by one, with room for one to three whole ones, so that some must step back."""
    setting = draw(settings_of(outputs=(1, 9, 18, 27)))
    most = draw(st.sampled_from((setting.concurrency, setting.workload.batch)))
    setting = replace(setting, concurrency=most, weights_on_host=0.0, host_attention=False, recompute=Recompute.NONE)
    plan = in_hbm(replace(setting, admission=Admission.CONTINUOUS, preemption=draw(st.sampled_from(preemptions))))
    homes = home_columns(plan.homes)
    whole_bytes = float(paged_bytes(setting, occupancy_of(plan, homes, flows_of(plan, homes)).hbm).max())
    budget_bytes = int(whole_bytes * draw(st.floats(1.0, 4.0)))
    return replace(plan, setting=replace(plan.setting, kv_budget_bytes=budget_bytes))


@st.composite
def priced_plans(draw: st.DrawFn, of: st.SearchStrategy[Plan] | None = None) -> tuple[Plan, CostModel]:
    """A plan (one that runs in waves unless ``of`` says otherwise) and a cost model of its machine."""
    plan = draw(plans() if of is None else of)
    return plan, draw(costs(plan.setting.machine))


def any_priced_plans() -> st.SearchStrategy[tuple[Plan, CostModel]]:
    """In waves four times out of five, else admitted one by one."""
    waves = priced_plans()
    return st.one_of(waves, waves, waves, waves, priced_plans(continuous_plans()))


@st.composite
def recordings_of(draw: st.DrawFn, plan: Plan) -> RecordedSelection:
    """Picks that ``plan`` can serve: among the older tokens that no layer of the sequence has had to drop."""
    lanes = plan.setting.model.layers * plan.setting.workload.batch
    drawn = [draw(_lane_picks(plan)) for _ in range(lanes)]
    batch = plan.setting.workload.batch
    picks = tuple(
        tuple(
            tuple(drawn[layer * batch + sequence][step] for sequence in range(batch))
            for layer in range(plan.setting.model.layers)
        )
        for step in range(plan.setting.workload.decode_steps)
    )
    return RecordedSelection(selector=plan.setting.attention.selector, picks=picks)


@st.composite
def _lane_picks(draw: st.DrawFn, plan: Plan) -> list[tuple[int, ...]]:
    """Picks of each decode step for one layer of one sequence; what is dropped on the way is never picked again."""
    counts, homes = plan.setting.token_counts, plan.homes
    alive, last, picks_by_step = set(range(counts.cached[0])), dict.fromkeys(range(counts.cached[0]), -1), []
    for step, (cached, local) in enumerate(zip(counts.cached, counts.local, strict=True)):
        alive.add(cached - 1)
        older = sorted(token for token in alive if token < cached - local)
        most = min(len(older), counts.selected[step]) if step else 0
        picks = tuple(draw(st.permutations(older)))[: draw(st.integers(0, most))] if most else ()
        last |= dict.fromkeys((*picks, *range(cached - local, cached)), step)
        idle = sorted(alive - set(picks) - set(range(cached - local, cached)), key=lambda token: (last[token], token))
        alive -= set(idle[: homes.dropped[step] - (cached - len(alive))])
        if step:
            picks_by_step.append(picks)
    return picks_by_step
