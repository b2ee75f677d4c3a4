"""Small decoders and prompts for tests of the captured step. Without a GPU its kernels are interpreted, which is slow."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

import pytest
import torch

from runtime.execute import DTYPES, execute
from runtime.graph.fused import FusedDecoder
from runtime.graph.run import GraphWave
from runtime.models import as_planned
from runtime.models.config import config_from_json
from runtime.models.decoder import Decoder
from runtime.models.random_weights import random_decoder
from runtime.options import Options, Run
from runtime.recorder import Record
from runtime.wave import Prompts
from runtime.wave import padded as in_front
from sim.homes import TokenHomes
from sim.plan import Placement, Plan
from sim.spec import DType
from tests.runtime.plans import Choice, make_setting
from tests.runtime.where import device_asked_for, on_gpu

kernels = pytest.mark.skipif(find_spec("triton") is None, reason="runs Triton's kernels")
ON_GPU = on_gpu()
DEVICE = torch.device(device_asked_for())
DTYPES_TRIED = [DType.FP32, DType.FP16] if ON_GPU else [DType.FP32]
ROUNDINGS = 24  # of a row's logits: two layers round a dozen results each, captured ones others than eager ones

_SHAPE = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = _SHAPE | {"num_key_value_heads": 4, "intermediate_size": 96, "max_position_embeddings": 160}
_FAMILIES = {
    "opt": _SHAPE | {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 160},
    "deep opt": _SHAPE
    | {"num_hidden_layers": 4, "ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 160},
    "odd opt": _SHAPE
    | {"num_hidden_layers": 5, "ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 160},
    "flat opt": _SHAPE
    | {"num_hidden_layers": 1, "ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 160},
    "wide opt": _SHAPE
    | {"hidden_size": 1024, "ffn_dim": 2048, "word_embed_proj_dim": 1024, "max_position_embeddings": 160},
    "llama": _LLAMA,
    "grouped llama": _LLAMA | {"num_key_value_heads": 2},
    "grouped qwen3": _LLAMA | {"num_key_value_heads": 2, "head_dim": 16},
}


def decoder(family: str, dtype: DType, seed: int) -> Decoder:
    """Random weights, large enough to attend unevenly; drawn on the CPU, so that texts are the same on every device."""
    config = config_from_json({"model_type": family.split()[-1]} | _FAMILIES[family], name="small", source="test")
    made = random_decoder(config, device=torch.device("cpu"), dtype=DTYPES[dtype], seed=seed)
    made.weights.embedding.mul_(30 if config.spec.hidden < 512 else 8)
    for layer in made.weights.layers:
        layer.qkv.weight.mul_(12 if config.spec.hidden < 512 else 3)
        layer.out.weight.mul_(4)
    return as_planned(made, make_setting(made.spec, Choice(dtype=dtype)), DEVICE)


def draw_prompts(lengths: Sequence[int], seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(97) for _ in range(length)] for length in lengths]


def padded(plan: Plan, made: Decoder, prompts: list[list[int]]) -> Prompts:
    return in_front(prompts, plan.setting.workload.prompt_tokens, made.device)


def resident(plan: Plan, slots: int) -> Plan:
    """The plan with ``slots`` in HBM: of what is more, the selected tokens have copies."""
    counts = plan.setting.token_counts
    rows, off = [], 0
    for cached, dead, local, selected in zip(counts.cached, counts.dead, counts.local, counts.selected, strict=True):
        living = cached - dead
        if living > slots:
            off = max(off, min(living - local, selected + living - slots))
        copies = max(0, min(off, slots - (living - off)))
        rows.append((living - off, off, copies))
    hbm, host, copies_column = zip(*rows, strict=True)
    none = (0,) * len(rows)
    homes = TokenHomes(hbm=hbm, host_kv=host, activations=none, dropped=counts.dead, copies=copies_column)
    return Plan(setting=replace(plan.setting, placement=Placement.RESIDENT), homes=homes)


def recent(plan: Plan, slots: Sequence[int]) -> Plan:
    """The plan with the newest living tokens in HBM, as many as its ``slots``, of which the last one stands for later rows."""
    counts, outside, rows = plan.setting.token_counts, 0, []
    for row, (cached, dead, local) in enumerate(zip(counts.cached, counts.dead, counts.local, strict=True)):
        room = max(local, slots[min(row, len(slots) - 1)])
        outside = max(outside, dead, cached - room)
        rows.append((cached - outside, outside - dead))
    hbm, host = zip(*rows, strict=True)
    none = (0,) * len(rows)
    homes = TokenHomes(hbm=hbm, host_kv=host, activations=none, dropped=counts.dead, copies=none)
    return Plan(setting=replace(plan.setting, placement=Placement.RECENT), homes=homes)


def newest_in_hbm(plan: Plan, slots: int) -> Plan:
    """The plan under dense attention with ``slots`` in HBM."""
    cached = plan.setting.token_counts.cached
    none = (0,) * len(cached)
    hbm, host = tuple(min(n, slots) for n in cached), tuple(max(0, n - slots) for n in cached)
    return replace(plan, homes=TokenHomes(hbm=hbm, host_kv=host, activations=none, dropped=none, copies=none))


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """``tokens`` [lane, row], ``logits`` [lane, decode step, vocab], and the slots' picks before each row and at the end."""

    tokens: list[list[int]]
    logits: torch.Tensor
    picks: list


def follow(wave: GraphWave, prompts: Prompts, eager: Run, dtype: DType) -> Followed:
    """Step by step; in 16 bit every step goes on from the eager run's token, for near ties between logits may turn."""
    logits, picks = list[torch.Tensor](), []

    def look() -> None:
        logits.append(wave.step.logits.float().clone())
        picks.append(wave.slots.picks())

    def before(row: int) -> None:
        look()
        if dtype is not DType.FP32:
            wave.step.tokens.copy_(torch.tensor([tokens[row - 1] for tokens in eager.completions]))

    run = wave.run(prompts, before)
    look()
    return Followed(tokens=run.tokens.tolist(), logits=torch.stack(logits[1:], 1), picks=picks)


def compare(plan: Plan, made: Decoder, lengths: list[int], dtype: DType) -> None:
    prompts = draw_prompts(lengths, seed=5)
    record = Record(picks=True, logits=True)
    # A level of int8 turns by a key's last bit: those prompts pass by the same kernels. Others' may differ, as tokens may not.
    reference = made if plan.setting.kv_format.are_native else FusedDecoder(made)
    eager = execute(plan, reference, prompts, options=Options(stop=False, record=record))
    prepared = padded(plan, made, prompts)
    wave = GraphWave(plan, made, prepared.padding.tolist())
    for _ in range(2 if ON_GPU else 1):  # the second run finds the slots as the first one left them
        seen = follow(wave, prepared, eager, dtype)
        parted = [
            first_other_pick(plan, eager, seen.picks, lane) if seen.picks[0] else plan.homes.steps
            for lane in range(len(lengths))
        ]
        check(eager, seen, parted, dtype)


def check(eager: Run, seen: Followed, parted: list[int], dtype: DType) -> None:
    """Logits of each lane's rows before the one in which a near tie has turned a pick, which it does in 16 bit alone."""
    assert eager.logits is not None
    if dtype is DType.FP32:
        assert seen.tokens == [list(row) for row in eager.completions]
    for lane, (row, expected) in enumerate(zip(parted, eager.logits, strict=True)):
        got, want = seen.logits[lane, : row - 1], expected[1:row]
        if dtype is DType.FP32:
            torch.testing.assert_close(got, want, atol=1e-3, rtol=0)
        else:  # unit roundoffs, 2^-11 in fp16, of the row's largest logit
            size = want.abs().amax(-1, keepdim=True)
            off = ROUNDINGS * torch.finfo(DTYPES[dtype]).eps / 2
            torch.testing.assert_close(got / size, want / size, atol=off, rtol=0)
        assert row >= (len(expected) if dtype is DType.FP32 else 4)


def first_other_pick(plan: Plan, eager: Run, picks: list, lane: int) -> int:
    """The first row in which a window picks otherwise, or the number of rows."""
    assert eager.picks is not None
    counts = plan.setting.token_counts
    for row in range(1, plan.homes.steps):
        older = counts.cached[row] - counts.local[row]
        for layer, lanes in enumerate(picks[row - 1]):
            got = [token for token in lanes[lane] if token < older]
            if got != sorted(eager.picks[row - 1][layer][lane]):
                return row
    return plan.homes.steps
