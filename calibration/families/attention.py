"""A prompt's attention; decode attention, through the slots of a captured step on a GPU, the eager parts on a CPU."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from calibration.families.base import Case, Scope, each, timed
from calibration.timer import Call
from runtime.attention import Part, attend, attend_prompt
from runtime.graph.dense import DenseSlots
from runtime.graph.paged import COUNT, SEQUENCE, TABLE, PagedSlots
from runtime.graph.quantised_dense import QuantisedSlots
from runtime.graph.recall import RecallSlots
from runtime.graph.run import slots_kind
from runtime.graph.window import WindowSlots
from runtime.lanes import Lanes
from runtime.models import Decoder, random_decoder
from runtime.models.config import config_from_spec
from sim.attention import Selector
from sim.capture import is_captured
from sim.kv import KvFormat, kv_layer_bytes
from sim.plan import Admission, Placement, Plan
from sim.recipe import Recipe, model_of, plan_of
from sim.spec import ModelSpec

_KEPT = (64, 256, 512, 1024)
_LISTED = (479, 70)  # prompt and percentage of a window over 8 bit, whose tokens come in a list's order
_KEPT_OTHERWISE = (
    224,
    992,
)  # half a group's keys wait, as they do on average: a step that completes a group rounds all of them
_BATCH_BETWEEN = 64  # sequences: more programs than fit the card at once, fewer than twice as many
_PROMPTS = ((16, 128), (64, 16), (4, 2048), (16, 512))  # sequences, tokens
_MOST_LAYERS = 16
WaveSlots = DenseSlots | QuantisedSlots | WindowSlots | RecallSlots


def cases(scope: Scope) -> Iterator[Case]:
    """By heads, sequences and tokens."""
    for name, model in kinds(scope):
        for lanes, tokens in scope.some(_PROMPTS) if scope.on_gpu else ():
            yield _prompt(scope, (model.heads, model.kv_heads, model.head_dim), lanes, tokens)
        recipes = (*_dense(scope, name), *(_stored(scope, name, model) if scope.on_gpu else ()))
        for case in map(partial(_attention, scope), recipes):
            if case is not None:
                yield case


def kinds(scope: Scope) -> Iterator[tuple[str, ModelSpec]]:
    """A model of each kind of heads. To a GPU many heads are as many sequences."""
    seen = set[tuple[int, ...]]()
    for name in scope.models:
        model = model_of(name)
        heads = (model.heads, model.kv_heads, model.head_dim)
        kind = (model.heads // model.kv_heads, model.head_dim) if scope.on_gpu else heads
        if kind not in seen:
            seen.add(kind)
            yield name, model


def _dense(scope: Scope, name: str) -> Iterator[Recipe]:
    for batch in scope.step_batches:
        for kept in scope.some(_KEPT):
            yield first_step(scope, name, batch, kept)


def _stored(scope: Scope, name: str, model: ModelSpec) -> Iterator[Recipe]:
    """Over tokens in 8 bit, and in pages. Where heads share keys few tokens in 8 bit say what comes before the first, which
    few sequences tell as well.
    """
    for batch in scope.step_batches:
        for kept in scope.some(_KEPT_OTHERWISE):
            dense = first_step(scope, name, batch, kept)
            if model.heads == model.kv_heads or batch == scope.step_batches[0] or kept > _KEPT_OTHERWISE[0]:
                yield replace(dense, kv=KvFormat.INT8)
            yield replace(dense, admission=Admission.CONTINUOUS)
        if scope.machine.gpu.fp8_flop_per_s is not None:
            yield replace(dense, admission=Admission.CONTINUOUS, kv=KvFormat.FP8)
    if _BATCH_BETWEEN in scope.batches:
        yield replace(first_step(scope, name, _BATCH_BETWEEN, _KEPT_OTHERWISE[-1]), kv=KvFormat.INT8)
    prompt, keep = _LISTED
    for batch in (scope.batches[0], _BATCH_BETWEEN, scope.batches[-1]) if scope.thorough else ():
        dense = replace(first_step(scope, name, batch, prompt + 1), kv=KvFormat.INT8)
        yield replace(dense, selector=Selector.SWA, keep=keep, placement=Placement.RESIDENT)


def _prompt(scope: Scope, heads: tuple[int, int, int], lanes: int, tokens: int) -> Case:
    """Causal attention over whole prompts, a layer's."""
    queries, keys, channels = heads

    def prepare() -> list[Call]:
        shapes = [(lanes, tokens, count, channels) for count in (queries, keys, keys)]
        prompts = [[scope.normal(*shape) for shape in shapes] for _ in range(2)]
        return each(lambda rows: attend_prompt(rows[0], rows[1], rows[2], None, channels**-0.5), prompts)

    words = (
        f"sequences={lanes} tokens={tokens} heads={queries} key_heads={keys} channels={channels} dtype={scope.dtype}"
    )
    return timed(scope, "prompt_attention", words, prepare, flops=2.0 * lanes * queries * channels * tokens**2)


def first_step(scope: Scope, name: str, batch: int, kept: int) -> Recipe:
    """The first decode step of this plan attends to ``kept`` tokens."""
    return Recipe(model=name, batch=batch, prompt=kept - 1, output=2, dtype=scope.dtype)


def _attention(scope: Scope, recipe: Recipe) -> Case | None:
    plan = plan_of(recipe, scope.machine)
    setting = plan.setting
    size_bytes = recipe.batch * (recipe.prompt + 1) * kv_layer_bytes(setting.model, setting.dtype, recipe.kv)
    if size_bytes > scope.most_bytes / 4 or (scope.on_gpu and not is_captured(setting)):
        return None

    def prepare() -> list[Call]:
        layers = scope.copies(size_bytes, _MOST_LAYERS)
        return _captured(plan, layers, scope) if scope.on_gpu else _eager(plan, layers, scope)

    flops = 4.0 * setting.model.query_dim * recipe.batch * (recipe.prompt + 1)
    return timed(scope, "attention", recipe.case, prepare, size_bytes=size_bytes, flops=flops)


def _eager(plan: Plan, layers: int, scope: Scope) -> list[Call]:
    model, tokens = plan.setting.model, plan.setting.token_counts.cached[1]
    lanes = plan.setting.concurrency
    q = scope.normal(lanes, model.kv_heads, model.heads // model.kv_heads, model.head_dim)
    positions = torch.arange(tokens, device=scope.device).expand(lanes, -1)
    shape = (lanes, tokens, model.kv_heads, model.head_dim)
    parts = [Part.of(scope.normal(*shape), scope.normal(*shape), positions, positions >= 0) for _ in range(layers)]
    return each(lambda part: attend(q, [part], model.head_dim**-0.5), parts)


def _captured(plan: Plan, layers: int, scope: Scope) -> list[Call]:
    decoder, plan = narrowed(plan, layers, scope)
    slots, (q, k, v), attended = slots_of(plan, decoder, scope)
    slots.begin_step()
    return each(lambda layer: slots.attend(layer, q, k, v, attended), range(layers))


def slots_of(
    plan: Plan, decoder: Decoder, scope: Scope
) -> tuple[WaveSlots | PagedSlots, tuple[Tensor, Tensor, Tensor], Tensor]:
    """Slots after a random prompt, the rows of a newborn token and where a step's result goes."""
    spec, work = decoder.spec, plan.setting.workload
    slots = _filled_pages(plan, decoder) if plan.setting.admission is Admission.CONTINUOUS else _wave(plan, decoder)
    if isinstance(slots, WindowSlots | RecallSlots):
        prompt = (work.batch, work.prompt_tokens)
        for layer in range(spec.layers):
            q, k, v = (
                scope.normal(*prompt, heads, spec.head_dim) for heads in (spec.heads, spec.kv_heads, spec.kv_heads)
            )
            slots.start(layer, 0, q, k, v)
    born = scope.normal(work.batch, spec.heads + 2 * spec.kv_heads, spec.head_dim)
    q, k, v = torch.split(born, [spec.heads, spec.kv_heads, spec.kv_heads], dim=1)
    attended = scope.normal(work.batch, spec.heads, spec.head_dim)
    return slots, (q, k, v), attended


def _wave(plan: Plan, decoder: Decoder) -> WaveSlots:
    lanes = plan.setting.workload.batch
    padding = torch.zeros(lanes, dtype=torch.int64, device=decoder.device)
    row = torch.ones(1, dtype=torch.int64, device=decoder.device)
    slots = slots_kind(plan)(plan, decoder, Lanes.of(decoder.spec, lanes, per_head=False), padding, row)
    assert isinstance(slots, WaveSlots)
    return slots


def _filled_pages(plan: Plan, decoder: Decoder) -> PagedSlots:
    """Every lane decodes, in pages of its own."""
    lanes, tokens = plan.setting.workload.batch, plan.setting.token_counts.cached[1]
    slots = PagedSlots(plan, decoder, lanes)
    columns = slots.state.shape[1] - TABLE
    pages = torch.arange(lanes * columns, dtype=torch.int32, device=decoder.device) % slots.pages
    slots.state[:, TABLE:] = pages.view(lanes, columns)
    slots.state[:, COUNT] = tokens
    slots.state[:, SEQUENCE] = torch.arange(lanes, dtype=torch.int32, device=decoder.device)
    return slots


def narrowed(plan: Plan, layers: int, scope: Scope) -> tuple[Decoder, Plan]:
    """The plan with ``layers`` layers, and a decoder of its heads with hardly any feed-forward: only its shape is read."""
    model = replace(plan.setting.model, layers=layers, intermediate=64, vocab=64)
    decoder = random_decoder(config_from_spec(model), device=scope.device, dtype=scope.torch_dtype)
    return decoder, replace(plan, setting=replace(plan.setting, model=model))
