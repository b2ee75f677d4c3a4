"""What it takes to choose the tokens of a step: ahead of it from attention weights, or once its query is known."""

from math import ceil, log2

from sim.attention import PAGE_TOKENS, Selector
from sim.attention_prices import attention_flops
from sim.capture import CHOOSING_WARPS, WEIGHED_TOGETHER, is_captured
from sim.cost import CostModel
from sim.gemms import filled_share
from sim.kv import KvFormat
from sim.plan import Setting
from sim.slots import WindowSize

_ENOUGH = 0.9  # of the multiprocessors that products have programs for: HBM keeps them waiting on an H200
_TOP_K_BYTES = 16.0  # of a token, four passes over float32 scores
_PAGES_BEGUN = 7  # pages that a program could score until it comes to its first: on an H200, cold
_ENTRIES_DOUBLING = 1024  # over which such a pass takes twice what it takes over few, on an H200
_WARP_ENTRIES, _AGREED_PASSES = 32, 1  # twice as many warps that must agree take as long as so many passes
_TOKENS_AT_ONCE = 512  # that a sequence's program chooses from at hardly more than the least: it takes powers of two


def recall_prices(cost: CostModel, setting: Setting, sequences: int) -> tuple[float, float]:
    """Constant and per cached token: what selectors with recall read once the query is known (digests, or every key)."""
    selector, model, dtype = setting.attention.selector, setting.model, setting.dtype
    if not selector.recalls:
        return 0.0, 0.0
    launched_s = cost.launch_s(cost.profile.kernels_per_selection)
    if is_captured(setting):
        page_s = _page_s(cost, setting, sequences)
        doublings = max(0, ceil(log2(setting.workload.cached_tokens / _TOKENS_AT_ONCE)))
        chosen_s = cost.profile.recall_setup_s + doublings * cost.profile.recall_doubling_s
        return launched_s + chosen_s + _PAGES_BEGUN * page_s, page_s / PAGE_TOKENS
    read_bytes = setting.attention.state_bytes_per_token(model, dtype) or model.kv_dim * dtype.size_bytes
    return launched_s, cost.selection_s(sequences * (read_bytes + _TOP_K_BYTES))


def _page_s(cost: CostModel, setting: Setting, sequences: int) -> float:
    """A page of each of ``sequences``: a captured step's digests are read as its attention reads a token's key and value, and
    again by each further query head that shares them.
    """
    model, dtype = setting.model, setting.dtype
    digest_bytes = PAGE_TOKENS * setting.attention.state_bytes_per_token(model, dtype)
    again = cost.profile.paged_again_share * (model.heads // model.kv_heads - 1)
    return cost.attention_s(
        sequences * digest_bytes * (1 + again), attention_flops(model, sequences), dtype, KvFormat.NATIVE
    )


def choice_prices(cost: CostModel, setting: Setting, sequences: int) -> tuple[float, float]:
    """Constant and per kept token: choosing the next step's tokens from this step's attention weights, with nothing beside."""
    selector, size_bytes = setting.attention.selector, setting.dtype.size_bytes
    if not selector.chooses_ahead:
        return 0.0, 0.0
    launched_s = cost.launch_s(cost.profile.kernels_per_selection)
    if is_captured(setting):
        return launched_s + _window_choice_s(cost, setting, sequences), 0.0
    weights = 2 * setting.model.heads * size_bytes  # written by attention, read to be summed over heads
    history = 2 * size_bytes if selector is Selector.SWA else 8  # newest row in, oldest out; or a running sum
    return launched_s, cost.selection_s(sequences * (weights + history + _TOP_K_BYTES))


def _window_choice_s(cost: CostModel, setting: Setting, sequences: int) -> float:
    """A sequence's program passes over this query's weights, some heads at a time, and over those of the last queries, some at a
    time: of all that live, made up to a power of two, the longer the more there are. Then it seeks the bound, bit by bit, which
    takes the longer the more warps must agree. All share HBM.
    """
    heads, size = setting.model.heads, WindowSize.of(setting)
    entries = 1 << ceil(log2(size.entries))
    weighed = ceil(heads / WEIGHED_TOGETHER) + ceil(size.queries / WEIGHED_TOGETHER)
    agreed = _AGREED_PASSES * log2(min(max(entries / _WARP_ENTRIES, 1), CHOOSING_WARPS))
    passes = weighed * (1 + entries / _ENTRIES_DOUBLING) + agreed
    read_bytes = 4 * heads * size.width + setting.dtype.size_bytes * size.queries * size.entries
    return cost.profile.selection_pass_s * passes + cost.selection_s(sequences * read_bytes)


def branches(setting: Setting) -> bool:
    """Whether a step's choices run beside it: captured or not, so that no plan is the better for being launched by the host."""
    return setting.attention.selector.chooses_ahead and not setting.machine.is_cpu


def exposed_share(cost: CostModel, setting: Setting, sequences: int) -> float:
    """Of a captured step's choice. A sequence's program holds a multiprocessor; on the others the products go on beside it, and
    lose nothing as long as those are nearly as many as they have programs for.
    """
    share, free = cost.profile.selection_exposed_share, max(0.0, 1 - sequences / cost.machine.gpu.sm_count)
    return share + (1 - share) * max(0.0, 1 - free / (_ENOUGH * filled_share(cost, setting, sequences)))
