"""What prompts take to pass through a layer: those of a prefill, and the beginnings that are forwarded anew in a decode step."""

from math import ceil, log

import numpy as np
from numpy.typing import NDArray

from sim.attention import Selector
from sim.attention_prices import rounding_s
from sim.capture import FORWARDED_TOGETHER, captures_prefill, forwarded_tokens, is_captured
from sim.cost import QUERY_TILE, CostModel, Pieces
from sim.counts import Column
from sim.footprint import prefill_rows
from sim.gemms import LayerGemms, prompt_products_s
from sim.hull import lower_hull
from sim.kv import KvFormat, kv_layer_bytes
from sim.launches import begin_operations, choice_operations
from sim.passes import OPERATIONS, of_layer
from sim.plan import Admission, Recompute, Setting
from sim.power import held_back_s, settled_share

# Of float32 weights until heads are summed: scores written and read in 16 bit, widened, scaled and masked (each a pass to
# and one from memory, or by a captured step's kernel all at once), their softmax, the sum.
_CHOICE_PASSES, _CAPTURED_CHOICE_PASSES = 9, 7
# Of captured prompts: a layer's kernels, none of them made one, that a decode step has not; 24 to 27 us a layer of few rows on
# an H200.
_PROMPT_LAUNCHES, _STAGED_LAUNCHES = 6, 2  # the latter of a prefix, whose keys and values are staged
_EACH_TOLD, _TOLD_APART = 2048, 0.01  # tokens whose price is looked at one by one; more of them by so large a share
_SMOOTH_ROWS = 128  # of what is multiplied together: over so many the steps of a prefix's price are evened out


def prefill_passes(sequences: int, prompt_tokens: int) -> int:
    """In which a prefill takes its prompts through a layer."""
    return ceil(sequences * prompt_tokens / prefill_rows(sequences, prompt_tokens))


def prompt_launch_s(cost: CostModel, setting: Setting, passed_s: Column) -> Column:
    """Of one pass through a layer, between whose products ``passed_s`` goes by: its kernels begin one after the other, which is
    felt the less the longer they take, as a hypotenuse. Eagerly longer launches hide it.
    """
    begun_s = cost.launch_s(_PROMPT_LAUNCHES * is_captured(setting))
    seconds: Column = cost.launch_s(cost.profile.kernels_per_layer) + np.hypot(begun_s, passed_s) - passed_s
    return seconds


def prompt_row_passes_s(cost: CostModel, setting: Setting) -> float:
    """A prompt token's passes between the products of one layer."""
    return of_layer(setting.model, fused=is_captured(setting)).seconds(cost, setting.dtype)


def first_choice_s(cost: CostModel, setting: Setting, sequences: int, passes: int) -> float:
    """A layer's first choice: from the weights of the prompt's last k queries (SWA) or of all (H2O), each head's; or digests."""
    if setting.attention.selector is Selector.PAGES:
        keys = float(sequences * setting.workload.prompt_tokens * setting.model.kv_dim)
        return OPERATIONS["digest_once" if is_captured(setting) else "digest"].seconds(cost, setting.dtype, keys)
    selector, prompt = setting.attention.selector, setting.workload.prompt_tokens
    if not selector.chooses_ahead:
        return 0.0
    queries = prompt if selector is Selector.H2O else setting.attention.history_steps(prompt)
    weights_bytes = 4.0 * sequences * setting.model.heads * queries * prompt
    over_weights = _CAPTURED_CHOICE_PASSES if is_captured(setting) else _CHOICE_PASSES
    return passes * cost.launch_s(choice_operations(setting)) + cost.elementwise_s(over_weights * weights_bytes)


def _rounded_prompt_s(cost: CostModel, setting: Setting, tokens: int) -> float:
    """A captured wave takes a prompt in by a kernel that reads keys and values once, and copies of what that wrote."""
    if not is_captured(setting) or setting.admission is Admission.CONTINUOUS:
        return rounding_s(cost, setting, tokens)
    native, stored = (
        tokens * kv_layer_bytes(setting.model, setting.dtype, kv_format)
        for kv_format in (KvFormat.NATIVE, setting.kv_format.gpu)
    )
    return cost.elementwise_s(native + 3 * stored)


def prefill_s(cost: CostModel, setting: Setting, sequences: int) -> dict[str, float]:
    """One layer of the prefill by operation, all its passes together."""
    model, prompt = setting.model, setting.workload.prompt_tokens
    passes, rows = prefill_passes(sequences, prompt), sequences * prompt
    quantises = not setting.kv_format.are_native
    norms_s = rows * prompt_row_passes_s(cost, setting)
    launch_s = float(prompt_launch_s(cost, setting, np.array([norms_s / passes]))[0])
    beside = {
        "attention": float(cost.prompt_attention_s(model.heads, model.head_dim, sequences, prompt, setting.dtype)),
        "convert": _rounded_prompt_s(cost, setting, rows) if quantises else 0.0,
        "select": first_choice_s(cost, setting, sequences, passes),
        "norms": norms_s,
        "launch": passes * launch_s + cost.profile.host_operation_s * begin_operations(setting) / model.layers,
    }
    by_name = prompt_products_s(cost, setting, np.array([rows / passes]))
    products = {name: passes * float(seconds[0]) for name, seconds in by_name.items()}
    whole_s = model.layers * (sum(products.values()) + beside["attention"] + beside["norms"])
    taken_before = captures_prefill(setting)  # a graph is replayed once before it counts, which takes it to the GPU
    slower = float(cost.settling(whole_s, whole_s * taken_before))
    return beside | {name: slower * seconds for name, seconds in products.items()}


def forwarded(cost: CostModel, setting: Setting, sequences: int, *, beside_s: float, layer_steps: int | None) -> Pieces:
    """Seconds of a prefix through one layer by its tokens: the convex hull below the prices of all numbers, to half a percent.

    A captured step forwards some more to make the number up, and multiplies some rows more: evened out over neighbours. What
    the few take that it forwards as they are would draw the hull below all the others: they are taken for what is rounded up.
    For ``beside_s`` and ``layer_steps`` see ``sim.power.recomputed``.
    """
    if setting.recompute is not Recompute.TOKENS:
        return Pieces(pieces=((0.0, 0.0),), free_at_zero=True)
    model, prompt = setting.model, setting.workload.prompt_tokens
    few = FORWARDED_TOGETHER - 1 if is_captured(setting) and prompt >= FORWARDED_TOGETHER else 0
    counts = np.arange(few + 1.0, prompt + 1)
    tokens = forwarded_tokens(counts, prompt) if is_captured(setting) else counts
    rows = sequences * tokens
    products_s = np.sum(list(prompt_products_s(cost, setting, rows).values()), axis=0)
    passed_s = rows * prompt_row_passes_s(cost, setting)
    others_s = (
        cost.prompt_attention_s(model.heads, model.head_dim, np.full_like(tokens, sequences), tokens, setting.dtype)
        + passed_s
        + prompt_launch_s(cost, setting, passed_s)
        + cost.launch_s(_STAGED_LAUNCHES * is_captured(setting))
    )
    row_s = LayerGemms.of(cost, setting).layer.pieces[-1][1]
    whole_s = beside_s + float(np.interp((prompt + 1) / 2, counts, products_s + others_s))
    share = settled_share(whole_s, layer_steps)
    seconds = products_s + others_s + held_back_s(cost, row_s * rows, beside_s + others_s, share)
    if is_captured(setting):
        seconds = _evened_out(seconds, max(FORWARDED_TOGETHER, ceil(_SMOOTH_ROWS / sequences)))
    told = _told(prompt)[few:] - few
    return Pieces(pieces=lower_hull(counts[told], seconds[told]), free_at_zero=True)


def _told(prompt_tokens: int) -> NDArray[np.intp]:
    """Places of the counts whose prices make the hull: all of some, then whole tiles of queries, each a little more than the
    one before, and the last.
    """
    if prompt_tokens <= _EACH_TOLD:
        return np.arange(prompt_tokens)
    more = np.geomspace(_EACH_TOLD, prompt_tokens, ceil(log(prompt_tokens / _EACH_TOLD) / _TOLD_APART) + 1)
    tiles = np.unique((more // QUERY_TILE).astype(np.intp) * QUERY_TILE)
    return np.unique([*range(1, _EACH_TOLD + 1), *tiles.tolist(), prompt_tokens]) - 1


def _evened_out(seconds: Column, window: int) -> Column:
    """The mean over half so many neighbours on each side, fewer at the ends."""
    sums = np.concatenate(([0.0], np.cumsum(seconds)))
    at = np.arange(len(seconds))
    first, last = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(seconds))
    means: Column = (sums[last] - sums[first]) / (last - first)
    return means
