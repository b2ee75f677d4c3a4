"""The best plan by looking at every one: dynamic programming over whole tokens, judged by the engine.

What must be searched is every setting that the planner offers (with both kinds of write-back) and, for each, every row
of token homes at every step. Traffic and bytes are written down here afresh, from the words of ``sim.counts``,
``sim.flows`` and ``sim.occupancy``; seconds come from ``sim.layer_prices`` and ``sim.layer``; nothing of the planner's
bound, program or rounding is used. The winner is run by the engine.

A step takes max(own, shared + D f'), where f' is the next step's fetch: own and shared depend on this row and the next
one (what leaves HBM is written back), f' on the next row and, where both directions of the link are busy, the one after.
So the states are pairs of rows. First the bound in which f' meets no write-back discards pairs that cannot win, then
what remains is searched exactly. How many tokens have their inputs saved at birth couples all steps: it is tried out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import pairwise, product
from math import ceil

import numpy as np
from numpy.typing import NDArray

from planner.objective import Weights, objective_weights
from planner.options import assisted_settings, families, paged_settings, resident_settings, spilling_settings
from planner.request import Objective, Request
from sim.attention import Selector
from sim.capture import evicts_least_wanted
from sim.cost import CostModel
from sim.counts import Column, Counts, counts_of
from sim.engine import simulate
from sim.flows import Flows, flows_of, home_columns
from sim.forecast import static_host_bytes
from sim.homes import TokenHomes
from sim.kv import GROUP_TOKENS, KvFormat, KvFormats, inputs_layer_bytes, kv_layer_bytes
from sim.layer import layer_times, prompt_write_seconds
from sim.layer_prices import LayerPrices, layer_prices
from sim.occupancy import held_state_bytes, occupancy_of
from sim.plan import Admission, Placement, Plan, Recompute, Setting, WriteBack
from sim.scheduled import paged_bytes

Index = NDArray[np.intp]
SLACK = 1e-9  # relative: sums of the same seconds in another order


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimum:
    """The plan that no other beats, and what the engine says of it; ``cases`` counts what had to be searched."""

    plan: Plan
    objective_s: float
    cases: int


def exhaustive_optimum(request: Request, *, at_most_s: float = float("inf")) -> Optimum | None:
    """The best plan of ``request``; None if there is none of at most ``at_most_s``, which only spares time."""
    cost = CostModel(machine=request.machine, profile=request.profile)
    limit_s, best, searched = at_most_s * (1 + SLACK), None, 0
    for plan in (*_paged_plans(request), *_resident_plans(request)):
        paged_s = _measured(request.objective, plan, cost)
        best, limit_s = (plan, paged_s) if paged_s < limit_s else (best, limit_s)
    choices = [choice for setting in settings_to_search(request) if (choice := _Choice.of(setting, cost, request))]
    for choice in sorted(choices, key=lambda choice: choice.least_s):
        if choice.least_s > limit_s:
            break
        for case in choice.cases(limit_s):
            searched += 1
            found = case.search(limit_s)
            if found is not None:
                best, limit_s = found
    if best is None:
        return None
    measured_s = _measured(request.objective, best, cost)
    if abs(measured_s - limit_s) > SLACK * measured_s:
        raise AssertionError(f"{request.objective} of the best plan: searched {limit_s}, simulated {measured_s}")
    return Optimum(plan=best, objective_s=measured_s, cases=searched)


def optimum_of_setting(setting: Setting, request: Request, cost: CostModel) -> tuple[Plan, float] | None:
    """The best plan of one setting and its objective; None if none fits."""
    choice = _Choice.of(setting, cost, request)
    best, limit_s = None, float("inf")
    at_eviction = setting.write_back is WriteBack.AT_EVICTION
    if at_eviction and _hold(plan := _all_in_hbm(setting), setting.concurrency, in_pages=False):
        limit_s = _measured(request.objective, plan, cost)
        best = plan, limit_s
    for case in sorted(choice.cases(limit_s), key=lambda case: case.least_s) if choice else ():
        found = case.search(limit_s) if case.least_s <= limit_s else None
        if found is not None:
            best, limit_s = found, found[1]
    return best


def settings_to_search(request: Request) -> Iterator[Setting]:
    """All in HBM where that fits, with the CPU's help, and every way to spill, by either kind of write-back."""
    for family in families(request):
        for setting in resident_settings(family, request):
            yield setting
            spilling = (*assisted_settings(setting), *spilling_settings(setting, request))
            for choice, write_back in product(spilling, WriteBack):
                yield replace(choice, write_back=write_back)


def _paged_plans(request: Request) -> Iterator[Plan]:
    """The plans of continuous admission, which keeps everything in HBM: as many sequences as pages and places allow.

    Where they all fit they are of one length and leave together, which is what waves do.
    """
    if request.concurrency is not None:
        return
    for family in families(request):
        for setting in resident_settings(family, request):
            for paged in paged_settings(setting):
                plan = _all_in_hbm(paged)
                if not _hold(plan, setting.concurrency, in_pages=False) and _hold(plan, 1, in_pages=True):
                    yield plan


def _resident_plans(request: Request) -> Iterator[Plan]:
    """Those that keep nothing outside HBM: the host launches less for them than for any other of their settings."""
    for family in families(request):
        for setting in resident_settings(family, request):
            plan = _all_in_hbm(setting)
            if _hold(plan, setting.concurrency, in_pages=False):
                yield plan


def _all_in_hbm(setting: Setting) -> Plan:
    counts = setting.token_counts
    living = tuple(cached - dead for cached, dead in zip(counts.cached, counts.dead, strict=True))
    none = (0,) * len(living)
    homes = TokenHomes(hbm=living, host_kv=none, activations=none, dropped=counts.dead, copies=none)
    return Plan(setting=setting, homes=homes)


def _hold(plan: Plan, sequences: int, *, in_pages: bool) -> bool:
    """So many of them fit the budget at their longest."""
    setting, homes = plan.setting, home_columns(plan.homes)
    held = occupancy_of(plan, homes, flows_of(plan, homes)).hbm
    held = paged_bytes(setting, held) if in_pages else held
    return bool(sequences * held.max() <= setting.kv_budget_bytes)


def _measured(objective: Objective, plan: Plan, cost: CostModel) -> float:
    """What the engine makes of ``plan``."""
    outcome = simulate(plan, cost).outcome
    return {
        Objective.THROUGHPUT: outcome.makespan_s,
        Objective.TPOT: outcome.tpot_s or 0.0,
        Objective.TTFT: outcome.ttft_s,
    }[objective]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Candidate rows of token homes, sorted by step, [row] each; whole numbers, as floats."""

    step: Index
    hbm: Column
    host_kv: Column
    activations: Column
    dropped: Column
    copies: Column

    def take(self, which: Index | NDArray[np.bool_]) -> "Rows":
        return Rows(**{column.name: getattr(self, column.name)[which] for column in fields(self)})

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """Seconds of steps, [wave, row or pair]: max(own, shared + depth x the next step's fetch); ``fetch`` is their own."""

    own: Column
    shared: Column
    fetch: Column

    def seconds(self, ahead: Column, depth: int, weights: Weights, step: Index) -> Column:
        """What the steps of all waves add to the objective, when the next ones fetch for ``ahead``."""
        prefill, decode = (np.array(column)[:, None] for column in (weights.prefill, weights.decode))
        total: Column = np.where(step == 0, prefill, decode) * np.maximum(self.own, self.shared + depth * ahead)
        return total.sum(axis=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """A setting; in ``loosest`` every row has only its own inputs saved at birth, which no plan can undercut."""

    loosest: "_Case"

    @classmethod
    def of(cls, setting: Setting, cost: CostModel, request: Request) -> "_Choice | None":
        rows, weights = _all_rows(setting), objective_weights(request.objective, setting)
        case = _Case.of(setting, cost, weights, rows, (rows.dropped + rows.activations) * (rows.activations > 0))
        return None if case is None else cls(loosest=case)

    @property
    def least_s(self) -> float:
        return self.loosest.least_s

    def cases(self, limit_s: float) -> Iterator["_Case"]:
        """One for each number of tokens whose inputs are saved at birth; none of them too, whose kernels may be others than
        those of a setting that saves none.
        """
        loosest, recompute = self.loosest, self.loosest.setting.recompute
        most = loosest.setting.workload.cached_tokens if recompute.from_activations else 0
        promising = loosest.rows.take(loosest.least_by_row <= limit_s)
        for saved in range(most + 1):
            rows = promising.take((promising.activations == 0) | (promising.activations + promising.dropped <= saved))
            case = _Case.of(loosest.setting, loosest.cost, loosest.weights, rows, np.full(len(rows), float(saved)))
            if case is not None and case.least_s <= limit_s:
                yield case


def _all_rows(setting: Setting) -> Rows:
    """Every row that a plan of ``setting`` may have at each step.

    Copies are at least those that the access profile leads to expect: what was fetched stays until it is deselected.
    """
    counts, resident = setting.token_counts, setting.placement is Placement.RESIDENT
    recomputes = setting.recompute.from_activations
    grids = []
    for step, (cached, dead, most, slots) in enumerate(
        zip(counts.cached, counts.dead, setting.most_dropped, setting.slots_needed, strict=True)
    ):
        axes = (
            np.arange(cached + 1),
            np.arange(cached + 1 if recomputes else 1),
            np.arange(dead, most + 1),
            np.arange(cached + 1 if resident else 1),
        )
        host_kv, activations, dropped, copies = (axis.ravel() for axis in np.meshgrid(*axes, indexing="ij"))
        hbm = cached - host_kv - activations - dropped
        valid = (hbm >= 0) & (copies <= host_kv + activations) & (hbm + copies >= slots)
        expected = counts_of(setting).copy_rate[step] * (host_kv + activations - copies)
        valid &= copies >= np.ceil(expected - SLACK)
        columns = (column[valid] for column in (hbm, host_kv, activations, dropped, copies))
        grids.append(np.stack([np.full(int(valid.sum()), step), *columns]))
    step, *homes = np.concatenate(grids, axis=1)
    names = ("hbm", "host_kv", "activations", "dropped", "copies")
    return Rows(step=step, **{name: home.astype(np.float64) for name, home in zip(names, homes, strict=True)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Tokens that rows fetch or recompute, and the bytes of one sequence they hold but for what is written back, [row]."""

    fetched_kv: Column
    fetched_inputs: Column
    reprojected: Column
    forwarded: Column
    written_inputs: Column
    hbm_bytes: Column
    host_bytes: Column

    def take(self, which: Index | NDArray[np.bool_]) -> "Traffic":
        return Traffic(**{column.name: getattr(self, column.name)[which] for column in fields(self)})


def traffic_of(setting: Setting, rows: Rows, saved: Column) -> Traffic:
    """What ``rows`` cause by themselves when the first ``saved`` tokens, given row by row, have their inputs saved."""
    counts, model, dtype = counts_of(setting), setting.model, setting.dtype
    gpu_kv, host_kv, native_kv = (
        kv_layer_bytes(model, dtype, name) for name in (setting.kv_format.gpu, setting.kv_format.host, KvFormat.NATIVE)
    )
    inputs, step = inputs_layer_bytes(model, dtype), rows.step
    homed = rows.host_kv + rows.activations
    fetched = (homed - rows.copies) * counts.fetch_rate[step]
    share = rows.activations / np.maximum(homed, 1.0)
    reprojected = fetched * share
    fetched_inputs = reprojected * (setting.recompute is Recompute.ACTIVATIONS_HOST)
    forwarded = rows.dropped * (step > 0) * (setting.recompute is Recompute.TOKENS)
    attended_kv, slots = fetched - reprojected, rows.hbm + rows.copies
    state = setting.attention.offloaded_state_bytes_per_token(model, dtype)
    if keeps_key_ranges(setting):  # a least and a step of each channel, 16 bit each, for 64 tokens
        state += ceil(model.kv_dim * 4 / GROUP_TOKENS)
    off = counts.cached[step] - counts.dead[step] - slots
    held = slots * gpu_kv + held_state_bytes(setting)[step] + off * state
    kept = np.maximum(0.0, np.minimum(counts.cached[step], saved) - rows.dropped) * inputs
    ring_kv = attended_kv * (not setting.host_attention)
    staged = (setting.prefetch_layers + 1) * (ring_kv * gpu_kv + fetched_inputs * inputs)
    staged += reprojected * (native_kv if streams_levels(setting) else gpu_kv) + forwarded * (native_kv + 2 * inputs)
    staged += 2 * native_kv * (setting.workload.prompt_tokens - rows.hbm) * (step == 0)
    on_host = held_by_host(setting, rows)
    in_hbm, from_host = (
        setting.recompute is source for source in (Recompute.ACTIVATIONS_HBM, Recompute.ACTIVATIONS_HOST)
    )
    newborn = np.where(step == 0, np.minimum(saved, setting.workload.prompt_tokens), counts.cached[step] <= saved)
    return Traffic(
        fetched_kv=_crossing(setting, attended_kv, counts.cached[step]) if reads_in_place(setting) else attended_kv,
        fetched_inputs=fetched_inputs,
        reprojected=reprojected,
        forwarded=forwarded,
        written_inputs=newborn * from_host,
        hbm_bytes=model.layers * (held + kept * in_hbm) + staged,
        host_bytes=model.layers * (on_host * host_kv + kept * (not in_hbm)),
    )


def held_by_host(setting: Setting, rows: Rows) -> Column:
    """Tokens whose KV lies on the host; where the least wanted leave HBM, what has a copy there does not."""
    if setting.write_back is WriteBack.AT_BIRTH:
        return rows.host_kv + rows.hbm
    return rows.host_kv - rows.copies * evicts_least_wanted(setting)


def reads_in_place(setting: Setting) -> bool:
    """Captured steps over INT8 on both sides: dense waves that recompute nothing."""
    return setting.attention.is_dense and _in_int8_alone(setting)


def keeps_key_ranges(setting: Setting) -> bool:
    """Under sparse window attention, unless all is written at birth."""
    at_eviction = setting.write_back is WriteBack.AT_EVICTION
    window = setting.attention.selector is Selector.SWA and at_eviction and _in_int8_alone(setting)
    return window or streams_levels(setting)


def streams_levels(setting: Setting) -> bool:
    """Captured dense steps over INT8 that compute others again, for which weights must not stream in if layers are run twice."""
    again = setting.recompute is Recompute.ACTIVATIONS_HOST
    again |= setting.recompute is Recompute.TOKENS and not setting.weights_on_host
    at_eviction = setting.write_back is WriteBack.AT_EVICTION
    return setting.attention.is_dense and again and at_eviction and _in_int8(setting)


def _in_int8_alone(setting: Setting) -> bool:
    return _in_int8(setting) and setting.recompute is Recompute.NONE


def _in_int8(setting: Setting) -> bool:
    int8 = setting.kv_format == KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT8)
    ringed = not setting.weights_on_host or setting.model.layers % (setting.prefetch_layers + 1) == 0
    alone = ringed and not (setting.host_attention or setting.machine.is_cpu)
    return int8 and alone and setting.admission is Admission.WAVES


def _crossing(setting: Setting, attended: Column, cached: Column) -> Column:
    """In tokens of the host's format, group by group: positions from the first slot that is not in HBM to the newborn's.

    Of each the range of its values crosses the link. Of the newest group, which is not whole yet, keys are in HBM; so are,
    in the places of the keys that it lacks beside the newborn's, the last tokens of the group before, keys and values.
    """
    newborn = cached - 1
    first, opened = newborn - np.maximum(0.0, attended - 1), newborn // GROUP_TOKENS * GROUP_TOKENS
    kept_from = np.maximum(0.0, opened - (GROUP_TOKENS - 1 - (newborn - opened)))
    whole = np.maximum(0.0, kept_from - first)
    halves = newborn - np.maximum(first, opened)
    model, ranges = setting.model, newborn - first
    crossing = model.kv_dim * (2 * whole + halves) + 4 * model.kv_heads * ranges
    return crossing / kv_layer_bytes(model, setting.dtype, setting.kv_format.host)


def written_tokens(setting: Setting, here: Rows, later: Rows | None) -> Column:
    """KV tokens that cross to the host in the step of ``here`` if ``later`` follows it, row by row; None: nothing follows."""
    counts, step = counts_of(setting), here.step
    first = step == 0
    if setting.write_back is WriteBack.AT_BIRTH:
        return np.where(first, here.hbm + here.host_kv, 1.0)
    if later is None:
        return held_by_host(setting, here) * first
    if evicts_least_wanted(setting):
        off, off_later = here.host_kv - here.copies, later.host_kv - later.copies
        newly_dead = counts.dead[later.step] - counts.dead[step]
        gone = np.where(first, 0.0, np.minimum(off, newly_dead) + off * counts.fetch_rate[step])
        return np.maximum(0.0, off_later - off + gone) + off * first
    homed = here.host_kv + here.activations
    dying = counts.death_rate[step] * (1 - here.copies / np.maximum(homed, 1.0))
    staying = here.host_kv * (1 - dying)
    if setting.recompute is not Recompute.NONE:
        beyond = here.activations + here.dropped - counts.dead[step]
        beyond_later = later.activations + later.dropped - counts.dead[later.step]
        staying = np.maximum(0.0, staying - np.maximum(0.0, beyond_later - (beyond - here.activations * dying)))
    return np.maximum(0.0, later.host_kv - staying) + here.host_kv * first


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """One setting with some tokens' inputs saved at birth, and the rows that fit HBM and the host by themselves."""

    setting: Setting
    cost: CostModel
    weights: Weights
    rows: Rows
    traffic: Traffic
    still: Paths

    @classmethod
    def of(cls, setting: Setting, cost: CostModel, weights: Weights, rows: Rows, saved: Column) -> "_Case | None":
        traffic = traffic_of(setting, rows, saved)
        fits = setting.concurrency * traffic.hbm_bytes - setting.kv_budget_bytes <= 0
        fits &= setting.concurrency * traffic.host_bytes - room_on_host(setting) <= 0
        if len(np.unique(rows.step[fits])) < setting.workload.output_tokens:
            return None
        rows, traffic = rows.take(fits), traffic.take(fits)
        still = paths_of(setting, cost, rows, traffic, written_tokens(setting, rows, None))
        return cls(setting=setting, cost=cost, weights=weights, rows=rows, traffic=traffic, still=still)

    @property
    def depth(self) -> int:
        return self.setting.prefetch_layers

    @property
    def steps(self) -> int:
        return self.setting.workload.output_tokens

    @property
    def least_s(self) -> float:
        """Every step by itself, with nothing fetched for the next one: a bound that costs little."""
        return float(self._least_by_step().sum())

    @property
    def least_by_row(self) -> Column:
        """The same for plans that have the row, [row]."""
        least = self._least_by_step()
        by_row: Column = self._alone() - least[self.rows.step] + least.sum()
        return by_row

    def _least_by_step(self) -> Column:
        starts = np.searchsorted(self.rows.step, np.arange(self.steps))
        return np.minimum.reduceat(self._alone(), starts)

    def _alone(self) -> Column:
        seconds = self._weighed(self.rows.step, np.maximum(self.still.own, self.still.shared))
        alone: Column = seconds + (self.rows.step == 0) * self._fill_s(self.still.fetch)
        return alone

    def _weighed(self, step: Index | int, seconds: Column) -> Column:
        """Seconds of each wave, [wave, ...], to the objective's."""
        prefill, decode = (np.array(column)[:, None] for column in (self.weights.prefill, self.weights.decode))
        total: Column = (np.where(np.asarray(step) == 0, prefill, decode) * seconds).sum(axis=0)
        return total

    def _fill_s(self, fetch: Column) -> Column:
        """Before the first step: what the first layers fetch (streamed weights)."""
        return self.depth * self._weighed(0, fetch)

    def search(self, limit_s: float) -> tuple[Plan, float] | None:
        """The best plan of at most ``limit_s`` and its objective."""
        promising = self._promising_rows(limit_s)
        pairs = None if promising is None else self._pairs(promising)
        if pairs is None:
            return None
        pairs = _through(pairs, limit_s)
        return None if pairs is None else self._exact(pairs, limit_s)

    def _promising_rows(self, limit_s: float) -> list[Index] | None:
        """Rows of each step on some way whose bound, without write-backs, is within the limit."""
        by_step = [np.flatnonzero(self.rows.step == step) for step in range(self.steps)]
        links = []
        for step, (here, later) in enumerate(pairwise(by_step)):
            ahead = self.still.shared[:, here, None] + self.depth * self.still.fetch[:, None, later]
            seconds = np.maximum(self.still.own[:, here, None], ahead).reshape(len(ahead), -1)
            total = self._weighed(step, seconds).reshape(len(here), len(later))
            if step == 0:
                total += self._fill_s(self.still.fetch[:, here])[:, None]
            links.append(np.where(_outward(self.rows, here[:, None], later[None, :]), total, np.inf))
        last = by_step[-1]
        ends = self._weighed(self.steps - 1, np.maximum(self.still.own, self.still.shared)[:, last])
        if self.steps == 1:
            ends = ends + self._fill_s(self.still.fetch[:, last])
        behind = [ends]
        for link in reversed(links):
            behind.insert(0, (link + behind[0][None, :]).min(axis=1))
        before = [np.zeros(len(by_step[0]))]
        for link in links:
            before.append((before[-1][:, None] + link).min(axis=0))
        kept = [rows[first + rest <= limit_s] for rows, first, rest in zip(by_step, before, behind, strict=True)]
        return kept if all(len(rows) for rows in kept) else None

    def _pairs(self, rows: list[Index]) -> "_Pairs | None":
        """Pairs of successive rows that move outward and fit the host, priced exactly but for the next step's delay."""
        heres, laters, owns, totals, shareds, fetches = [], [], [], [], [], []
        for step in range(self.steps):
            last = step + 1 == self.steps
            here, later = (
                grid.ravel() for grid in np.meshgrid(rows[step], [-1] if last else rows[step + 1], indexing="ij")
            )
            if not last:
                outward = _outward(self.rows, here, later)
                here, later = here[outward], later[outward]
            own_rows, traffic = self.rows.take(here), self.traffic.take(here)
            written = written_tokens(self.setting, own_rows, None if last else self.rows.take(later))
            fits = self._fit_host(own_rows, traffic, written)
            here, later, written = here[fits], later[fits], written[fits]
            if not len(here):
                return None
            paths = paths_of(self.setting, self.cost, own_rows.take(fits), traffic.take(fits), written)
            following = 0.0 if last else self.depth * self.still.fetch[:, later]
            heres.append(here)
            laters.append(later)
            owns.append(paths.own)
            shareds.append(paths.shared)
            fetches.append(paths.fetch)
            total = self._weighed(step, np.maximum(paths.own, paths.shared + following))
            totals.append(total + self._fill_s(paths.fetch) if step == 0 else total)
        return _Pairs(here=heres, later=laters, own=owns, shared=shareds, fetch=fetches, least_s=totals)

    def _fit_host(self, rows: Rows, traffic: Traffic, written: Column) -> NDArray[np.bool_]:
        """What is on its way to the host takes room there."""
        setting = self.setting
        if setting.write_back is WriteBack.AT_BIRTH:
            return np.ones(len(rows), dtype=np.bool_)
        on_its_way = written - held_by_host(setting, rows) * (rows.step == 0)
        token = setting.model.layers * kv_layer_bytes(setting.model, setting.dtype, setting.kv_format.host)
        held = setting.concurrency * (traffic.host_bytes + on_its_way * token)
        fits: NDArray[np.bool_] = held - room_on_host(setting) <= 0
        return fits

    def _exact(self, pairs: "_Pairs", limit_s: float) -> tuple[Plan, float] | None:
        """Backwards over the pairs: the least from each to the end, its own step's seconds included."""
        last = self.steps - 1
        rest = self._weighed(last, np.maximum(pairs.own[last], pairs.shared[last]))
        choices: list[Index] = []
        for step in range(last - 1, -1, -1):
            rest, chosen = self._step_back(pairs, step, rest)
            choices.insert(0, chosen)
        rest = rest + self._fill_s(pairs.fetch[0])
        first = int(np.argmin(rest))
        if rest[first] > limit_s:
            return None
        way = [first]
        for chosen in choices:
            way.append(int(chosen[way[-1]]))
        rows = self.rows.take(np.array([pairs.here[step][pair] for step, pair in enumerate(way)]))
        return Plan(setting=self.setting, homes=_homes(rows)), float(rest[first])

    def _step_back(self, pairs: "_Pairs", step: int, rest: Column) -> tuple[Column, Index]:
        total, chosen = np.full(len(pairs.here[step]), np.inf), np.zeros(len(pairs.here[step]), dtype=np.intp)
        order = np.argsort(pairs.here[step + 1], kind="stable")
        names, starts = np.unique(pairs.here[step + 1][order], return_index=True)
        groups = dict(zip(names.tolist(), np.split(order, starts[1:]), strict=True))
        own_order = np.argsort(pairs.later[step], kind="stable")
        own_names, own_starts = np.unique(pairs.later[step][own_order], return_index=True)
        for middle, own in zip(own_names.tolist(), np.split(own_order, own_starts[1:]), strict=True):
            if middle not in groups:
                continue
            nexts = groups[middle]
            ahead = pairs.shared[step][:, own, None] + self.depth * pairs.fetch[step + 1][:, None, nexts]
            seconds = np.maximum(pairs.own[step][:, own, None], ahead).reshape(len(ahead), -1)
            sums = self._weighed(step, seconds).reshape(len(own), len(nexts)) + rest[None, nexts]
            best = sums.argmin(axis=1)
            total[own], chosen[own] = sums[np.arange(len(own)), best], nexts[best]
        return total, chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pairs:
    """By step: pairs of a row and the one that follows (-1 at the end), their paths, and seconds at the least."""

    here: list[Index]
    later: list[Index]
    own: list[Column]
    shared: list[Column]
    fetch: list[Column]
    least_s: list[Column]


def _through(pairs: _Pairs, limit_s: float) -> _Pairs | None:
    """The pairs on some way whose bound is within the limit."""
    size = max(int(max(here.max(), later.max())) for here, later in zip(pairs.here, pairs.later, strict=True)) + 2
    before, rest = [np.zeros(len(pairs.here[0]))], [pairs.least_s[-1]]
    for step in range(1, len(pairs.here)):
        best = np.full(size, np.inf)
        np.minimum.at(best, pairs.later[step - 1], before[-1] + pairs.least_s[step - 1])
        before.append(best[pairs.here[step]])
    for step in range(len(pairs.here) - 2, -1, -1):
        best = np.full(size, np.inf)
        np.minimum.at(best, pairs.here[step + 1], rest[0])
        rest.insert(0, pairs.least_s[step] + best[pairs.later[step]])
    kept = [np.flatnonzero(first + then <= limit_s) for first, then in zip(before, rest, strict=True)]
    if not all(len(which) for which in kept):
        return None
    picked = {
        column.name: [values[..., which] for values, which in zip(getattr(pairs, column.name), kept, strict=True)]
        for column in fields(pairs)
    }
    return _Pairs(**picked)


def paths_of(setting: Setting, cost: CostModel, rows: Rows, traffic: Traffic, written: Column) -> Paths:
    """Price ``rows`` that write back ``written`` tokens, for each distinct wave."""
    waves = [
        _wave_paths(setting, cost, layer_prices(cost, setting, sequences), rows, traffic, written)
        for sequences in dict.fromkeys(setting.wave_sizes)
    ]
    own, shared, fetch = (np.stack(column) for column in zip(*waves, strict=True))
    return Paths(own=own, shared=shared, fetch=fetch)


def _wave_paths(
    setting: Setting, cost: CostModel, prices: LayerPrices, rows: Rows, traffic: Traffic, written: Column
) -> tuple[Column, Column, Column]:
    """Each row is priced as a decode step behind one that stands for the prefill, whose GPU seconds do not vary, but for
    what it writes in line.

    The host launches for all as it does for plans that keep tokens outside HBM; those that do not are priced by themselves.
    """
    flows = _flows(setting, counts_of(setting), rows, traffic, written)
    times = layer_times(prices, flows, cost, away=True, steps=np.append(0, rows.step))
    first, layers, depth = rows.step == 0, setting.model.layers, setting.prefetch_layers
    layer_s = np.where(first, times.layer_s[0], times.layer_s[1:])
    query_s = np.where(first, times.query_s[0], times.query_s[1:])
    fetch_s, correct_s, write_s = times.prefetch_s[1:], times.correct_s[1:], np.where(first, 0.0, times.write_s[1:])
    layer_s = layer_s + np.where(first, prompt_write_seconds(prices, times.write_bytes[1:], cost), 0.0)
    slower_s = np.maximum(layer_s, fetch_s)
    if prices.recalls:
        asked_s = query_s + layers * correct_s + (layers - 1) * slower_s
        ended_s, first_s = asked_s + layer_s - query_s, layer_s + correct_s
        shared = asked_s
    else:
        ended_s = np.maximum(layers * layer_s, (layers - depth) * fetch_s + layer_s - query_s)
        first_s, shared = layer_s, (layers - depth) * slower_s
    own = np.maximum(ended_s + np.maximum(times.head_s[1:], write_s), first_s + layers * write_s)
    own = np.maximum(own, layers * np.where(first, times.launched_s[0], times.launched_s[1:]))
    return own, shared, fetch_s


def _flows(setting: Setting, counts: Counts, rows: Rows, traffic: Traffic, written: Column) -> Flows:
    step, assisted = rows.step, setting.host_attention
    columns = {
        "cached": counts.cached[step],
        "kept": (counts.local + counts.selected)[step],
        "selected": counts.selected[step],
        "fetched_kv": traffic.fetched_kv * (not assisted),
        "fetched_inputs": traffic.fetched_inputs,
        "reprojected": traffic.reprojected,
        "forwarded": traffic.forwarded,
        "host_attended": traffic.fetched_kv * assisted,
        "written_kv": written,
        "written_inputs": traffic.written_inputs,
        "on_host": held_by_host(setting, rows),
    }
    return Flows(**{name: np.concatenate(([0.0], column)) for name, column in columns.items()})


def _outward(rows: Rows, here: Index, later: Index) -> NDArray[np.bool_]:
    """No boundary between homes moves inward."""
    lost, inputs = rows.dropped, rows.dropped + rows.activations
    off = inputs + rows.host_kv
    moved: NDArray[np.bool_] = np.ones(np.broadcast_shapes(here.shape, later.shape), dtype=np.bool_)
    for boundary in (lost, inputs, off):
        moved &= boundary[here] <= boundary[later]
    return moved


def room_on_host(setting: Setting) -> float:
    return setting.machine.host.usable_bytes - static_host_bytes(setting)


def _homes(rows: Rows) -> TokenHomes:
    names = ("hbm", "host_kv", "activations", "dropped", "copies")
    return TokenHomes(**{name: tuple(int(tokens) for tokens in getattr(rows, name)) for name in names})
