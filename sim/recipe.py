"""Plans in a line of words: what is measured, drawn and repeated is named so that it can be built again exactly."""

from dataclasses import dataclass, fields, replace
from math import ceil

from sim import catalogue
from sim.access import AccessProfile, measured_access
from sim.attention import Attention, Selector
from sim.checks import require_one_of, require_whole
from sim.flows import flows_of, home_columns
from sim.homes import TokenHomes
from sim.kv import KvFormat, KvFormats
from sim.occupancy import occupancy_of
from sim.plan import Admission, Mechanism, Placement, Plan, Recompute, Setting
from sim.profile import Profile
from sim.scheduled import paged_bytes
from sim.spec import DType, MachineSpec, ModelSpec, WeightFormat
from sim.workload import Workload

_AMPLE_BYTES = 2**62
_SMALL_VOCAB = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A plan of the runtime's. ``model`` is a name of the catalogue, with ``/layers`` and ``/hidden`` cut down if it says so.

    ``keep`` is the percentage of cached tokens attended to, ``hbm`` that of the living ones that HBM has slots for (those
    that a step needs are there in any case). Under continuous admission ``hbm`` is the percentage of the sequences that may
    run at once whose pages the budget holds, one at least. ``streamed`` is the percentage of each layer's weights on the
    host.
    """

    model: str
    batch: int
    prompt: int
    output: int
    dtype: DType = DType.FP16
    concurrency: int = 0
    selector: Selector = Selector.DENSE
    keep: int = 100
    placement: Placement = Placement.RECENT
    kv: KvFormat = KvFormat.NATIVE
    hbm: int = 100
    recompute: Recompute = Recompute.NONE
    admission: Admission = Admission.WAVES
    weights: WeightFormat = WeightFormat.NATIVE
    streamed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "prompt", "output", "keep"):
            require_whole(f"recipe.{name}", getattr(self, name))
        for name in ("keep", "hbm", "streamed"):
            require_one_of(f"recipe.{name}", getattr(self, name), range(101))

    @property
    def case(self) -> str:
        """``key=value`` words; what is as it is by default is left out."""
        return " ".join(
            f"{one.name}={getattr(self, one.name)}"
            for one in fields(self)
            if getattr(self, one.name) != one.default or one.name in ("model", "batch", "prompt", "output")
        )

    @classmethod
    def of(cls, case: str) -> "Recipe":
        """The recipe that ``case`` names.

        Raises ValueError for words that name none.
        """
        words = {name: text for name, _, text in (word.partition("=") for word in case.split())}
        kinds = {one.name: one.type for one in fields(cls)}
        try:
            return cls(**{name: kinds[name](text) for name, text in words.items()})  # type: ignore[operator]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"recipe={case!r}, cannot be read ({error}): prepare the campaign again") from None


def model_of(text: str) -> ModelSpec:
    """``opt-6.7b``, ``opt-6.7b/4`` with four layers, ``opt-125m/4/256`` narrowed to a hidden size of 256 as well."""
    name, *cuts = text.split("/")
    model = catalogue.model(name)
    if cuts:
        model = replace(model, name=text, layers=int(cuts[0]))
    if len(cuts) > 1:
        hidden = int(cuts[1])
        heads = hidden // model.head_dim
        model = replace(
            model,
            hidden=hidden,
            embedding_dim=hidden,
            intermediate=model.intermediate * hidden // model.hidden,
            heads=heads,
            kv_heads=max(1, heads * model.kv_heads // model.heads),
            vocab=min(model.vocab, _SMALL_VOCAB),
        )
    return model


def plan_of(recipe: Recipe, machine: MachineSpec, profile: Profile | None = None) -> Plan:
    """The plan, with a KV budget of just what it needs, and the traffic to expect by the profile's access."""
    return _plan(_setting(recipe, model_of(recipe.model), machine, profile), recipe.hbm)


def shortened(plan: Plan, steps: int) -> Plan:
    """The first ``steps`` rows of a plan: enough to load and compile what it needs."""
    work, homes = plan.setting.workload, plan.homes
    cut = {one.name: getattr(homes, one.name)[:steps] for one in fields(homes)}
    setting = replace(plan.setting, workload=replace(work, output_tokens=min(steps, work.output_tokens)))
    return Plan(setting=setting, homes=TokenHomes(**cut))


def plan_for(model: ModelSpec, recipe: Recipe, machine: MachineSpec) -> Plan:
    """The plan of ``recipe`` with a model of one's own in place of the one it names."""
    return _plan(_setting(recipe, model, machine, None), recipe.hbm)


def _plan(setting: Setting, hbm_percent: int) -> Plan:
    if setting.admission is Admission.CONTINUOUS:
        return _paged(setting, hbm_percent)
    plan = Plan(setting=setting, homes=_homes(setting, hbm_percent))
    homes = home_columns(plan.homes)
    needed = ceil(setting.concurrency * float(occupancy_of(plan, homes, flows_of(plan, homes)).hbm.max()))
    spare = needed // (50 if setting.attention.is_dense else 4)  # picks differ from lane to lane
    return replace(plan, setting=replace(setting, kv_budget_bytes=needed + spare))


def _paged(setting: Setting, budget_percent: int) -> Plan:
    """All living tokens in HBM, of as many sequences at a time as the pages do for."""
    plan = Plan(setting=setting, homes=_homes(setting, 100))
    homes = home_columns(plan.homes)
    held_bytes = float(paged_bytes(setting, occupancy_of(plan, homes, flows_of(plan, homes)).hbm).max())
    budget_bytes = ceil(held_bytes * max(1.0, setting.concurrency * budget_percent / 100))
    return replace(plan, setting=replace(setting, kv_budget_bytes=budget_bytes))


def _setting(recipe: Recipe, model: ModelSpec, machine: MachineSpec, profile: Profile | None) -> Setting:
    sparse = recipe.selector is not Selector.DENSE
    return Setting(
        machine=machine,
        model=model,
        workload=Workload(batch=recipe.batch, prompt_tokens=recipe.prompt, output_tokens=recipe.output),
        dtype=recipe.dtype,
        weight_format=recipe.weights,
        weights_on_host=recipe.streamed / 100,
        concurrency=recipe.concurrency or recipe.batch,
        admission=recipe.admission,
        attention=Attention(selector=recipe.selector, sparsity=1 - recipe.keep / 100 if sparse else 0.0),
        access=_access(recipe, profile),
        kv_format=KvFormats(gpu=recipe.kv, host=recipe.kv),
        placement=recipe.placement,
        recompute=recipe.recompute,
        fetch_by=Mechanism.GATHER_KERNEL if sparse else Mechanism.COPY_ENGINE,  # as the planner does
        kv_budget_bytes=_AMPLE_BYTES,
    )


def _access(recipe: Recipe, profile: Profile | None) -> AccessProfile:
    if profile is None:
        return measured_access(recipe.selector)
    cached = recipe.prompt + recipe.output // 2
    return profile.random_access(recipe.selector, recipe.model.partition("/")[0], cached)


def _homes(setting: Setting, hbm_percent: int) -> TokenHomes:
    """The newest living tokens in HBM, as many as there are slots; the others where the recomputation source has them."""
    counts, needed = setting.token_counts, setting.slots_needed
    living = [cached - dead for cached, dead in zip(counts.cached, counts.dead, strict=True)]
    slots = max(1, *needed, round(max(living) * hbm_percent / 100))
    resident, off, rows = setting.placement is Placement.RESIDENT, 0, list[tuple[int, int, int]]()
    for alive, local, selected, least in zip(living, counts.local, counts.selected, needed, strict=True):
        if alive > slots:
            wanted = alive - slots + (selected if resident else 0)
            off = max(off, min(alive - (local if resident else least), wanted))
        copies = max(0, min(off, slots - (alive - off))) if resident else 0
        rows.append((alive - off, off, copies))
    hbm, outside, copies_column = (tuple(column) for column in zip(*rows, strict=True))
    none = (0,) * len(rows)
    tokens, inputs = setting.recompute is Recompute.TOKENS, setting.recompute.from_activations
    lost = tuple(min(gone, setting.workload.prompt_tokens) for gone in outside) if tokens else none
    rest = tuple(gone - away for gone, away in zip(outside, lost, strict=True))
    return TokenHomes(
        hbm=hbm,
        host_kv=none if inputs else rest,
        activations=rest if inputs else none,
        dropped=tuple(dead + away for dead, away in zip(counts.dead, lost, strict=True)),
        copies=copies_column,
    )
