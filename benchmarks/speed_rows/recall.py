"""Plans of the rows that recall by page digests, and selections of a wanted turnover for them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sim import catalogue
from sim.access import measured_access
from sim.attention import PAGE_TOKENS, Attention, Selector
from sim.homes import TokenHomes
from sim.kv import KvFormats, kv_layer_bytes
from sim.plan import Placement, Plan, Setting
from sim.spec import DType, MachineSpec
from sim.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallCase:
    """What a recall row runs; ``keep`` is the share of the cached tokens that a step attends to."""

    model: str
    workload: Workload
    keep: float
    kv_budget_bytes: int

    @property
    def setting(self) -> Setting:
        return Setting(
            machine=MachineSpec(name="measured", gpu=catalogue.gpu("H200"), host=catalogue.host()),
            model=catalogue.model(self.model),
            workload=self.workload,
            dtype=DType.FP16,
            concurrency=self.workload.batch,
            attention=Attention(selector=Selector.PAGES, sparsity=1 - self.keep),
            access=measured_access(Selector.PAGES),
            kv_format=KvFormats(),
            placement=Placement.RESIDENT,
            kv_budget_bytes=self.kv_budget_bytes,
        )


def recall_plan(case: RecallCase) -> Plan:
    """As many slots as the budget has besides the digests: copies of what is selected, the newest tokens at home."""
    setting = case.setting
    counts = setting.token_counts
    slots = slots_beside_digests(setting)
    none = (0,) * len(counts.cached)
    homes = [
        min(cached, slots - far) if cached > slots else cached
        for cached, far in zip(counts.cached, counts.selected, strict=True)
    ]
    off, host = 0, []
    for cached, home in zip(counts.cached, homes, strict=True):
        off = max(off, cached - home)
        host.append(off)
    return Plan(
        setting=setting,
        homes=TokenHomes(
            hbm=tuple(cached - out for cached, out in zip(counts.cached, host, strict=True)),
            host_kv=tuple(host),
            activations=none,
            dropped=none,
            copies=tuple(min(out, far) for out, far in zip(host, counts.selected, strict=True)),
        ),
    )


def slots_beside_digests(setting: Setting) -> int:
    """HBM slots of each sequence."""
    model, pages = setting.model, -(-setting.workload.cached_tokens // PAGE_TOKENS)
    digests = pages * PAGE_TOKENS * setting.attention.state_bytes_per_token(model, setting.dtype)
    layer_bytes = setting.kv_budget_bytes / (model.layers * setting.concurrency)
    return int((layer_bytes - digests) // kv_layer_bytes(model, setting.dtype, setting.kv_format.gpu))


def selections(plan: Plan, turnover: float, device: torch.device) -> Tensor:
    """What to add to pages' scores, [row, lane, page], so that about ``turnover`` of each step's selected tokens are new.

    Each lane favours pages in an order of its own, in which some pages change their places at every step: 0.65 times as
    many as the turnover wanted, for a page that falls back brings another one in (found by trying, for few pages).
    """
    counts, lanes = plan.setting.token_counts, plan.setting.concurrency
    pages = -(-counts.cached[-1] // PAGE_TOKENS)
    generator = torch.Generator(device).manual_seed(1)
    liked = torch.rand((lanes, pages), generator=generator, device=device)
    rows = [liked]
    for _ in counts.cached[1:]:
        again = torch.rand((lanes, pages), generator=generator, device=device)
        changes = torch.rand((lanes, pages), generator=generator, device=device) < 0.65 * turnover
        liked = torch.where(changes, again, liked)
        rows.append(liked)
    return 1000.0 * torch.stack(rows)  # beyond any sum of shares over heads


def fetched_share(plan: Plan, fetched: Tensor) -> float:
    """Of the picks, the share that came from the host; ``fetched`` [layer, row, lane] tokens."""
    selected = torch.tensor(plan.setting.token_counts.selected, device=fetched.device)
    some_off = torch.tensor(plan.homes.host_kv, device=fetched.device) > 0
    picks = (selected * some_off)[1:].sum() * fetched.shape[0] * fetched.shape[2]
    return float(fetched[:, 1:].sum() / picks)


OPT_CASE = RecallCase(
    model="OPT-6.7B",
    workload=Workload(batch=64, prompt_tokens=128, output_tokens=512),
    keep=0.10,
    kv_budget_bytes=int(4.5 * 2**30),
)
LLAMA_CASE = RecallCase(
    model="Llama-3.1-8B",
    workload=Workload(batch=8, prompt_tokens=32_768 - 63, output_tokens=64),
    keep=0.05,
    kv_budget_bytes=6 * 2**30,
)
