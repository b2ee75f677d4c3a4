"""A prompt's attention; decode attention and selection, through the slots of a captured step on a GPU, the eager parts on a CPU."""

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
from runtime.graph.run import slots_kind
from runtime.graph.window import WindowSlots
from runtime.lanes import Lanes
from runtime.models import Decoder, random_decoder
from runtime.models.config import config_from_spec
from sim.attention import Selector
from sim.capture import is_captured
from sim.kv import KvFormat, kv_layer_bytes
from sim.plan import Admission, Placement, Plan
from sim.profile import Measurement
from sim.recipe import Recipe, plan_of
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


def cases(scope: Scope) -> Iterator[Case]:
    """By heads, sequences and tokens; on a GPU, to which many heads are as many sequences, by kinds of heads, and the choice that
    follows a sparse step as well.
    """
    seen = set[tuple[int, ...]]()
    for name in scope.models:
        model = plan_of(_recipe(scope, name, 1, 64), scope.machine).setting.model
        heads = (model.heads, model.kv_heads, model.head_dim)
        kind = (model.heads // model.kv_heads, model.head_dim) if scope.on_gpu else heads
        if kind in seen:
            continue
        seen.add(kind)
        for lanes, tokens in scope.some(_PROMPTS) if scope.on_gpu else ():
            yield _prompt(scope, heads, lanes, tokens)
        recipes = (*_dense(scope, name), *(_stored(scope, name, model) if scope.on_gpu else ()))
        for case in map(partial(_attention, scope), recipes):
            if case is not None:
                yield case
        if scope.on_gpu:
            yield from _choices(scope, name)


def _dense(scope: Scope, name: str) -> Iterator[Recipe]:
    for batch in scope.step_batches:
        for kept in scope.some(_KEPT):
            yield _recipe(scope, name, batch, kept)


def _stored(scope: Scope, name: str, model: ModelSpec) -> Iterator[Recipe]:
    """Over tokens in 8 bit, and in pages. Where heads share keys few tokens in 8 bit say what comes before the first, which
    few sequences tell as well.
    """
    for batch in scope.step_batches:
        for kept in scope.some(_KEPT_OTHERWISE):
            dense = _recipe(scope, name, batch, kept)
            if model.heads == model.kv_heads or batch == scope.step_batches[0] or kept > _KEPT_OTHERWISE[0]:
                yield replace(dense, kv=KvFormat.INT8)
            yield replace(dense, admission=Admission.CONTINUOUS)
        if scope.machine.gpu.fp8_flop_per_s is not None:
            yield replace(dense, admission=Admission.CONTINUOUS, kv=KvFormat.FP8)
    if _BATCH_BETWEEN in scope.batches:
        yield replace(_recipe(scope, name, _BATCH_BETWEEN, _KEPT_OTHERWISE[-1]), kv=KvFormat.INT8)
    prompt, keep = _LISTED
    for batch in (scope.batches[0], _BATCH_BETWEEN, scope.batches[-1]) if scope.thorough else ():
        dense = replace(_recipe(scope, name, batch, prompt + 1), kv=KvFormat.INT8)
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


def _recipe(scope: Scope, name: str, batch: int, kept: int) -> Recipe:
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
    decoder, plan = _narrow(plan, layers, scope)
    slots, (q, k, v), attended = _slots(plan, decoder, scope)
    slots.begin_step()
    return each(lambda layer: slots.attend(layer, q, k, v, attended), range(layers))


def _choices(scope: Scope, name: str) -> Iterator[Case]:
    """The selection of a sparse step's successor."""
    for batch in scope.step_batches:
        for keep in (10, 70):
            recipe = replace(
                _recipe(scope, name, batch, 512), selector=Selector.SWA, keep=keep, placement=Placement.RESIDENT
            )
            plan = plan_of(recipe, scope.machine)
            if is_captured(plan.setting):
                yield Case(family="select", case=recipe.case, measure=partial(_selected, plan, recipe, scope))


def _selected(plan: Plan, recipe: Recipe, scope: Scope) -> tuple[Measurement, ...]:
    """A choice changes what it chooses from, so all is put back before each; what that takes is subtracted."""
    layers = 4
    with torch.inference_mode():
        decoder, plan = _narrow(plan, layers, scope)
        slots, (q, k, v), attended = _slots(plan, decoder, scope)
        assert isinstance(slots, WindowSlots)
        for layer in range(layers):
            slots.attend(layer, q, k, v, attended)
        saved = [tensor.clone() for tensor in slots.state]

        def restore(layer: int) -> None:
            for tensor, before in zip(slots.state, saved, strict=True):
                tensor[layer].copy_(before[layer])

        def choose(layer: int) -> None:
            restore(layer)
            slots.settle(layer)

        both, alone = (
            scope.timer.time(each(work, range(layers)), captured=True, budget_s=scope.budget_s)
            for work in (choose, restore)
        )
    least_s = 1e-7
    return (
        Measurement(
            family="select",
            case=recipe.case,
            seconds=max(least_s, both.seconds - alone.seconds),
            low_s=max(least_s, both.low_s - alone.seconds),
            high_s=max(least_s, both.high_s - alone.seconds),
            samples=both.samples,
        ),
    )


def _slots(
    plan: Plan, decoder: Decoder, scope: Scope
) -> tuple[DenseSlots | QuantisedSlots | WindowSlots | PagedSlots, tuple[Tensor, Tensor, Tensor], Tensor]:
    """Slots after a random prompt, the rows of a newborn token and where a step's result goes."""
    spec, work = decoder.spec, plan.setting.workload
    slots = _filled_pages(plan, decoder) if plan.setting.admission is Admission.CONTINUOUS else _wave(plan, decoder)
    if isinstance(slots, WindowSlots):
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


def _wave(plan: Plan, decoder: Decoder) -> DenseSlots | QuantisedSlots | WindowSlots:
    lanes = plan.setting.workload.batch
    padding = torch.zeros(lanes, dtype=torch.int64, device=decoder.device)
    row = torch.ones(1, dtype=torch.int64, device=decoder.device)
    slots = slots_kind(plan)(plan, decoder, Lanes.of(decoder.spec, lanes, per_head=False), padding, row)
    assert isinstance(slots, DenseSlots | QuantisedSlots | WindowSlots)
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


def _narrow(plan: Plan, layers: int, scope: Scope) -> tuple[Decoder, Plan]:
    """The plan with ``layers`` layers, and a decoder of its heads with hardly any feed-forward: only its shape is read."""
    model = replace(plan.setting.model, layers=layers, intermediate=64, vocab=64)
    decoder = random_decoder(config_from_spec(model), device=scope.device, dtype=scope.torch_dtype)
    return decoder, replace(plan, setting=replace(plan.setting, model=model))
