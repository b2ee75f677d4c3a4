"""What the cost model says a measurement should take: the simulator's own formulas, asked for one operation at a time."""

from collections.abc import Callable, Sequence

import numpy as np

from sim.attention import Selector
from sim.attention_prices import attention_flops, attention_prices
from sim.choice_prices import choice_prices, recall_prices
from sim.cost import CostModel
from sim.counts import Column
from sim.flows import flows_of, home_columns
from sim.kv import GROUP_TOKENS, KvFormat, kv_layer_bytes
from sim.layer import layer_times
from sim.layer_prices import at_pace, priced_layer
from sim.passes import OPERATIONS
from sim.pipeline import step_seconds
from sim.plan import Mechanism, Placement, Plan
from sim.profile import Measurement
from sim.recipe import Recipe, model_of, plan_of
from sim.spec import DType, MachineSpec, WeightFormat

FIRST_STEADY_STEP = 2
_RECALLED_APART = 0.7  # launches: scores and choices of pages by themselves take an H200 2 us longer than in a step
_QUIET_SHARE = 0.25
_ROUNDING_KERNELS = 12  # ranges, scales, levels and their packing, one operation after the other
Prediction = Callable[[CostModel], float]
# For the reader, no constant prices them. Fetches by other numbers of programs than the runtime's (alone: recall's, beside
# products: about what an exchange under a window has) say whether those are the right ones; constants rest on those alone.
RECORDED_ONLY = ("launch", "pin", "dram", "copy_beside", "fetch_blocks", "fetch_blocks_beside")


def predictable(measurements: Sequence[Measurement], machine: MachineSpec) -> list[tuple[Measurement, Prediction]]:
    """Those that constants price, each with its price. What no constant changes is worked out here, once."""
    steps, usual_s = dict[str, _Steps](), usual_launch_s(measurements)
    pairs = list[tuple[Measurement, Prediction]]()
    for one in measurements:
        if one.family == "decode" and _picks_unknown(one):
            continue
        if one.family in ("decode", "prefill"):
            if one.case not in steps:
                pace = one.launch_s / usual_s if one.launch_s else 1.0
                steps[one.case] = _Steps(Recipe.of(one.case), machine, pace)
            run = steps[one.case]
            pairs.append((one, run.prefill if one.family == "prefill" else run.decode))
        elif one.family not in RECORDED_ONLY and not _is_pageable(one) and not _completes_a_group(one):
            pairs.append((one, _operation(one, machine)))
    return pairs


def usual_launch_s(measurements: Sequence[Measurement]) -> float:
    """What the host took to launch a kernel in a quiet quarter of the time, 0 where that was not looked at: others slow it down, by
    two fifths for most of one H200's calibration, and constants are to be those of hosts that are left alone.
    """
    looked_at = [one.launch_s for one in measurements if one.launch_s]
    return float(np.quantile(looked_at, _QUIET_SHARE)) if looked_at else 0.0


def _operation(measurement: Measurement, machine: MachineSpec) -> Prediction:
    if measurement.family in ("attention", "select"):
        return _slots(plan_of(Recipe.of(measurement.case), machine), measurement.family)
    simple: dict[str, Callable[[Measurement, CostModel], float]] = {
        "product": _product,
        "prompt_attention": _prompt_attention,
        "passes": _passes,
        "copy": _copy,
        "duplex": _duplex,
        "gather": _gather,
        "fetch": _fetch,
        "fetch_beside": _products_beside,
        "quantise": _rounding,
        "dequantise": _widening,
        "widen_weights": _weight_widening,
        "host_attention": _host_attention,
    }
    if measurement.family not in simple:
        raise ValueError(f"measurement family={measurement.family}, is none of this version: measure again")
    return lambda cost: simple[measurement.family](measurement, cost)


class _Steps:
    """A plan's first wave on a host that takes ``pace`` times as long as usual to launch a kernel.

    Its prefill and its decode steps are asked for one after the other: the last answer is kept.
    """

    def __init__(self, recipe: Recipe, machine: MachineSpec, pace: float) -> None:
        self.plan, self.pace = plan_of(recipe, machine), pace
        self.flows = flows_of(self.plan, home_columns(self.plan.homes))
        self._last: tuple[CostModel, Column] | None = None

    def prefill(self, cost: CostModel) -> float:
        return float(self._step_s(cost)[0])

    def decode(self, cost: CostModel) -> float:
        """The median of the steady steps."""
        return float(np.median(self._step_s(cost)[FIRST_STEADY_STEP:]))

    def _step_s(self, cost: CostModel) -> Column:
        if self._last is None or self._last[0] is not cost:
            setting = self.plan.setting
            prices = at_pace(priced_layer(cost, setting, setting.concurrency, settled=True), self.pace)
            times = layer_times(prices, self.flows, cost)
            self._last = (cost, step_seconds(times, setting.model.layers, setting.prefetch_layers))
        return self._last[1]


def _slots(plan: Plan, family: str) -> Prediction:
    """A layer's attention in the first decode step, or the choice after it, or before it where any token may return."""
    setting, counts = plan.setting, plan.setting.token_counts
    kept = counts.local[1] + counts.selected[1]

    def seconds(cost: CostModel) -> float:
        priced, tokens, apart_s = (choice_prices if family == "select" else attention_prices), kept, 0.0
        if family == "select" and setting.attention.selector.recalls:
            priced, tokens, apart_s = recall_prices, counts.cached[1], cost.launch_s(_RECALLED_APART)
        constant_s, per_token_s = priced(cost, setting, setting.concurrency)
        return constant_s + per_token_s * tokens + apart_s

    return seconds


def _product(took: Measurement, cost: CostModel) -> float:
    product = cost.gemm(took.number("inputs"), took.number("outputs"), DType(took.text("dtype")), WeightFormat.NATIVE)
    return product.at_one(took.number("rows"))


def _prompt_attention(took: Measurement, cost: CostModel) -> float:
    heads, channels = took.number("heads"), took.number("channels")
    sequences, tokens = took.number("sequences"), took.number("tokens")
    return float(cost.prompt_attention_s(heads, channels, sequences, tokens, DType(took.text("dtype"))))


def _passes(took: Measurement, cost: CostModel) -> float:
    entries = took.number("rows") * took.number("width")
    return OPERATIONS[took.text("op")].seconds(cost, DType(took.text("dtype")), entries)


def _copy(took: Measurement, cost: CostModel) -> float:
    return cost.transfer(Mechanism.COPY_ENGINE).at_one(took.number("bytes"))


def _duplex(took: Measurement, cost: CostModel) -> float:
    size = np.array([float(took.number("bytes"))])
    return _copy(took, cost) + float(cost.duplex_delay_s(size, size)[0])


def _gather(took: Measurement, cost: CostModel) -> float:
    size = took.number("bytes")
    if took.text("from") == "hbm":
        return cost.gather_s(size) + cost.launch_s(1)
    return _fetch(took, cost)


def _fetch(took: Measurement, cost: CostModel) -> float:
    return cost.transfer(Mechanism.GATHER_KERNEL).at_one(took.number("bytes"))


def _products_beside(took: Measurement, cost: CostModel) -> float:
    """Products lose the share of the SMs that the gather holds."""
    one = cost.gemm(took.number("inputs"), took.number("outputs"), DType.FP16, WeightFormat.NATIVE)
    return took.number("products") * one.at_one(took.number("rows")) * (1 + cost.profile.gather_sm_share)


def _rounding(took: Measurement, cost: CostModel) -> float:
    return cost.conversion_s(took.number("native") + took.number("stored")) + cost.launch_s(_ROUNDING_KERNELS)


def _widening(took: Measurement, cost: CostModel) -> float:
    return cost.widening_s(took.number("native") + took.number("stored")) + cost.launch_s(1)


def _weight_widening(took: Measurement, cost: CostModel) -> float:
    return cost.weight_widening_s(took.number("native") + took.number("stored")) + cost.launch_s(1)


def _host_attention(took: Measurement, cost: CostModel) -> float:
    model, sequences = model_of(took.text("model")), took.number("sequences")
    kv_bytes = sequences * kv_layer_bytes(model, DType(took.text("dtype")), KvFormat.NATIVE)
    return cost.host_attention(kv_bytes, attention_flops(model, sequences)).at_one(took.number("kept"))


def _completes_a_group(took: Measurement) -> bool:
    """Attention that rounds a whole group of keys besides: one step in so many, no step's price."""
    return took.family == "attention" and "kv=int8" in took.case and (took.number("prompt") + 1) % GROUP_TOKENS == 0


def _picks_unknown(took: Measurement) -> bool:
    """Steps whose fetches no other measurement tells: how many picks of first layers alone are new depends on the depth, and
    profiles are of all; how old a window's picks are, only an access profile says.
    """
    recipe = Recipe.of(took.case)
    window = recipe.selector is Selector.SWA and recipe.placement is Placement.RECENT
    return recipe.hbm < 100 and (window or (recipe.selector.recalls and "/" in recipe.model))


def _is_pageable(took: Measurement) -> bool:
    return took.family == "copy" and took.text("memory") == "pageable"
