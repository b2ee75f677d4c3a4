"""A plan in a few words, for a row of a table."""

from collections.abc import Iterator

from sim.attention import Attention
from sim.kv import KvFormats
from sim.plan import Admission, Plan, Recompute


def plan_words(plan: Plan) -> str:
    """``64 at once, swa 80 %, int8`` and what is done with the tokens that HBM has no room for."""
    return ", ".join(_words(plan))


def _words(plan: Plan) -> Iterator[str]:
    setting, homes = plan.setting, plan.homes
    paged = setting.admission is Admission.CONTINUOUS
    yield f"up to {setting.concurrency} by page" if paged else f"{setting.concurrency} at once"
    yield _attention(setting.attention)
    yield _formats(setting.kv_format, any(homes.host_kv))
    if setting.weights_on_host:
        yield f"{100 * setting.weights_on_host:.0f} % of weights streamed"
    if any(homes.host_kv):
        yield "CPU attends to KV on host" if setting.host_attention else f"KV on host ({setting.placement})"
    if any(homes.activations) or (setting.recompute is Recompute.TOKENS and any(homes.dropped)):
        yield "recompute"


def _attention(attention: Attention) -> str:
    return "dense" if attention.is_dense else f"{attention.selector} {100 * attention.sparsity:.0f} %"


def _formats(formats: KvFormats, both: bool) -> str:
    return str(formats.gpu) if formats.gpu is formats.host or not both else f"{formats.gpu}/{formats.host}"
