"""What one decoder layer takes in each step: a plan's flows at the prices of ``sim.layer_prices``."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sim.cost import CostModel
from sim.counts import Column
from sim.flows import Flows, keeps_away
from sim.layer_prices import LayerPrices

# A layer's GPU operations in order: until its queries are known, attention and what must precede it, the rest.
QUERY_OPS = ("qkv", "score")
ATTEND_OPS = ("gather", "convert", "reproject", "forward", "attention")
REST_OPS = ("select", "out", "mlp", "norms", "gather_sms", "launch")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """Seconds and link bytes of one layer in each step, all columns; row 0 is the prefill.

    ``layer_s`` is from start to end of a layer that waits for no fetch; the CPU attends beside the GPU. ``in_line_s`` of it,
    at its end, is the prefill's write-back: kernels of the GPU's own stream write the prompt, so that the next layer waits.
    ``prefetch_s`` may run ahead of the layer, ``correct_s`` is fetched between its query and its attention. ``write_s`` is
    written beside later layers: in decode steps.
    ``head_s`` ends the step. ``launched_s`` is how long the host takes to launch the layer beside it.
    """

    decode_ops: dict[str, Column | float]
    prefill_ops: dict[str, float]
    query_s: Column
    attend_s: Column
    rest_s: Column
    layer_s: Column
    host_attention_s: Column
    prefetch_s: Column
    correct_s: Column
    in_line_s: Column
    write_s: Column
    head_s: Column
    launched_s: Column
    prefetch_bytes: Column
    correct_bytes: Column
    write_bytes: Column
    recalls: bool

    @property
    def ops(self) -> dict[str, Column]:
        """GPU seconds by operation."""
        return {name: _total(self.decode_ops, self.prefill_ops, (name,), len(self.query_s)) for name in self.decode_ops}


def layer_times(
    prices: LayerPrices,
    flows: Flows,
    cost: CostModel,
    *,
    away: bool | None = None,
    steps: NDArray[np.intp] | None = None,
) -> LayerTimes:
    """Times of every step at ``prices``. ``away``: whether the plan keeps tokens outside HBM, where ``flows`` are not a plan's
    but rows of any, of ``steps`` if not of each; each is then replayed in pieces for what it fetches itself.
    """
    fetched = prices.bytes_per_kv * flows.fetched_kv + prices.bytes_per_inputs * flows.fetched_inputs
    written = prices.bytes_per_kv * flows.written_kv + prices.bytes_per_inputs * flows.written_inputs
    ahead, exposed = fetched * prices.ahead_share, fetched * prices.exposed_share
    ahead_s, exposed_s = prices.fetch.at(ahead), prices.fetch.at(exposed)
    linked = flows.fetched_kv > 0
    if away is None:  # rows of one plan, which are all replayed in pieces if any is
        away, linked = keeps_away(flows), np.full(len(linked), linked.any())
    launched_s = launched_seconds(prices, linked, away=away)
    gather_sms_s = _affine(0.0, prices.sm_share, ahead_s + exposed_s)
    lost = prices.lost_in(np.arange(len(written)) if steps is None else steps)
    ops = {
        name: seconds * prices.slower(name, lost)
        for name, seconds in _decode_ops(prices, flows, gather_sms_s, linked, away=away).items()
    }
    prefill_ops = prices.prefill
    if prices.launches_felt:
        ops["launch"] = prices.launch_s + launched_s
        prefill_ops = prefill_ops | {"launch": prefill_ops["launch"] + float(launched_s[0])}
        launched_s = np.zeros_like(launched_s)
    query_s, attend_s, rest_s = (
        _total(ops, prefill_ops, names, len(written)) for names in (QUERY_OPS, ATTEND_OPS, REST_OPS)
    )
    prefetch_bytes = prices.weight_bytes + ahead
    delay_s = cost.duplex_delay_s(prefetch_bytes + exposed, written)
    exposed_delay_s = delay_s * (exposed > 0)
    host_attention_s = prices.host_attention.at(flows.host_attended)
    in_line_s, write_s = np.zeros(len(written)), prices.stream.at(written) + delay_s
    in_line_s[:1], write_s[:1] = prompt_write_seconds(prices, written[:1], cost), 0.0
    return LayerTimes(
        decode_ops=ops,
        prefill_ops=prefill_ops,
        query_s=query_s,
        attend_s=attend_s,
        rest_s=rest_s,
        layer_s=query_s + np.maximum(attend_s, host_attention_s) + rest_s + in_line_s,
        host_attention_s=host_attention_s,
        prefetch_s=prices.weights_s + ahead_s + (delay_s - exposed_delay_s),
        correct_s=exposed_s + exposed_delay_s,
        in_line_s=in_line_s,
        write_s=write_s,
        head_s=np.full(len(written), prices.slower("head", lost) * prices.head_s),
        launched_s=launched_s,
        prefetch_bytes=prefetch_bytes,
        correct_bytes=exposed,
        write_bytes=written,
        recalls=prices.recalls,
    )


def prompt_write_seconds(prices: LayerPrices, written: Column, cost: CostModel) -> Column:
    """Of a prefill's layer that writes so many bytes of the prompt to the host; streamed weights may come meanwhile."""
    seconds: Column = prices.prompt_write.at(written) + cost.duplex_delay_s(
        np.full(len(written), prices.weight_bytes), written
    )
    return seconds


def launched_seconds(prices: LayerPrices, linked: NDArray[np.bool_], *, away: bool) -> Column:
    """Host seconds of a layer in each step, of which some are ``linked`` to the host: what it has comes between their pieces;
    ``away``: of a plan that keeps some tokens outside HBM.
    """
    seconds = np.full(len(linked), prices.launched_away_s if away else prices.launched_s)
    if away and prices.launched_linked_s != prices.launched_away_s:
        seconds[linked] = prices.launched_linked_s
    seconds[0] = prices.prefill_launched_away_s if away else prices.prefill_launched_s
    return seconds


def _decode_ops(
    prices: LayerPrices, flows: Flows, gather_sms_s: Column | float, linked: NDArray[np.bool_], *, away: bool
) -> dict[str, Column | float]:
    """Seconds of a decode layer by operation; a plain number where they depend on no token count."""
    setup_s, attention_s = (
        (prices.attention_s_away, prices.attention_s_per_kept_away)
        if away
        else (prices.attention_s, prices.attention_s_per_kept)
    )
    return {
        "qkv": prices.qkv_s,
        "score": _affine(prices.score_s, prices.score_s_per_cached, flows.cached),
        "gather": _affine(0.0, prices.gather_s_per_selected, flows.selected),
        "convert": _affine(prices.convert_s, prices.convert_s_per_moved, flows.fetched_kv + flows.written_kv),
        "reproject": prices.reproject.at(flows.reprojected),
        "forward": prices.forward.at(flows.forwarded),
        "attention": _affine(setup_s, attention_s, flows.kept - flows.host_attended)
        - prices.spared_s_per_fetched * flows.fetched_kv,
        "select": _affine(prices.select_s, prices.select_s_per_kept, flows.kept),
        "out": prices.out_s,
        "mlp": prices.mlp_s,
        "norms": prices.completed_s,  # a decode step's norms are among its launches
        "gather_sms": gather_sms_s,
        "launch": prices.launch_s + prices.linked_s * linked if prices.linked_s else prices.launch_s,
    }


def _affine(constant_s: float, per_token_s: float, tokens: Column) -> Column | float:
    return constant_s + per_token_s * tokens if per_token_s else constant_s


def _total(decode: dict[str, Column | float], prefill: dict[str, float], names: tuple[str, ...], steps: int) -> Column:
    """The operations' sum in each step; row 0 is the prefill, which has seconds of its own."""
    total = np.full(steps, sum(decode[name] for name in names))
    total[0] = sum(prefill.get(name, 0.0) for name in names)
    return total
