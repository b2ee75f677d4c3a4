"""Times the runtime's own kernels and transfers, case by case, into a file that an interrupted run goes on from; before it
whatever needs no clock.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path

import torch

from calibration.access import SELECTORS, random_weights_access, seen_before
from calibration.ahead import done_ahead
from calibration.families import attention, choices, fetches, formats, host, passes, products, steps, transfers
from calibration.families.base import FAILURES, Case, Scope, reason_of
from calibration.machine import device_name, fingerprint_of, machine_at, require_answering
from calibration.runner import Runner
from calibration.timer import Untimed, timer_for
from sim.access import AccessProfile
from sim.attention import Selector
from sim.measured import Measured, load_measured, save_measured, told
from sim.recipe import Recipe
from sim.spec import DType, MachineSpec
from sim.units import GIB, MIB

_MOST_FAILURES = 25
_PROMPTS = (64, 128, 256, 512)  # over which pages are picked
OnCase = Callable[[int, int, str], None]
OnFailure = Callable[[str], None]
Look = tuple[Recipe, Sequence[Selector], Sequence[int]]  # whose picks, by which selectors, at which percentages kept
Picks = tuple[AccessProfile, ...]


def scope_of(device: torch.device, machine: MachineSpec, *, thorough: bool) -> Scope:
    """Sizes that suit the device: the families' models on a GPU, small ones on a CPU."""
    timer, budget_s = timer_for(device), 0.15 if thorough else 0.03
    if device.type == "cuda":
        return Scope(
            machine=machine,
            device=device,
            dtype=DType.FP16,
            timer=timer,
            models=("opt-6.7b", "llama-3-8b", "opt-1.3b", "opt-13b") if thorough else ("opt-6.7b", "llama-3-8b"),
            batches=(4, 16, 32, 64, 128) if thorough else (4, 32, 64),
            prompts=(64, 512) if thorough else (128, 512),
            output=24 if thorough else 16,
            most_bytes=min(machine.gpu.hbm_bytes, machine.host.dram_bytes) // 8,
            cold_bytes=512 * MIB,
            budget_s=budget_s,
            thorough=thorough,
        )
    return Scope(
        machine=machine,
        device=device,
        dtype=DType.FP32,
        timer=timer,
        models=("opt-125m/6/512", "opt-125m/6/256", "opt-125m") if thorough else ("opt-125m/6/512", "opt-125m/6/256"),
        batches=(1, 2, 4, 8, 12) if thorough else (2, 8),
        prompts=(16, 64, 160) if thorough else (16, 128),
        output=16 if thorough else 12,
        most_bytes=min(GIB, machine.gpu.hbm_bytes // 16),
        cold_bytes=128 * MIB,
        budget_s=budget_s,
        thorough=thorough,
    )


def access_recipes(scope: Scope) -> Iterator[Look]:
    """What to look at, model by model.

    Of all selectors a small model over enough tokens that they have a choice, on a GPU of its own width. Pages by their
    digests and a window also on whole models: how many picks are new at a step, and how old, depends on how deep the layer is,
    and of pages on how many there are.
    """
    model, keeps = "opt-1.3b/4" if scope.on_gpu else scope.models[-1], (5, 10, 20, 40, 70)
    base = Recipe(model=model, batch=2, prompt=192, output=32, dtype=scope.dtype)
    yield base, SELECTORS, keeps if scope.thorough else (10, 20, 40)
    if scope.thorough and scope.on_gpu:
        for name in scope.models:
            for prompt in _PROMPTS:
                yield replace(base, model=name, batch=8, prompt=prompt, output=96), (Selector.PAGES,), keeps[:-1]
            yield replace(base, model=name, batch=4, prompt=128, output=72), (Selector.SWA,), (5, 20, 40, 70)


def cases(scope: Scope, runner: Runner) -> Iterator[Case]:
    """Every family, the quick ones first."""
    yield from host.cases(scope)
    yield from transfers.copies(scope)
    yield from transfers.gathers(scope)
    yield from fetches.cases(scope)
    yield from formats.cases(scope)
    yield from formats.weights(scope)
    yield from products.cases(scope)
    yield from passes.cases(scope)
    yield from attention.cases(scope)
    yield from choices.cases(scope)
    yield from steps.cases(scope, runner)


def untimed(device: torch.device, machine: MachineSpec, *, thorough: bool) -> Iterator[Case]:
    """The same, to compile what they need."""
    scope = replace(scope_of(device, machine, thorough=thorough), timer=Untimed())
    return cases(scope, Runner(device=device))


def prepare(
    scope: Scope,
    file: Path | None,
    before: Measured,
    on_case: OnCase | None = None,
    on_failure: OnFailure | None = None,
) -> Measured:
    """``before``, and what selectors pick, as far as it lacks that, written to ``file`` as it is found. On a GPU several
    processes look at it, one at each model, and compile what ``measure`` needs.
    """
    looks = list(access_recipes(scope))
    found = {look[0]: picks for look in looks if (picks := seen_before(before.random_access, *look))}
    lacking = [look for look in looks if look[0] not in found]
    runner, where = Runner(device=scope.device), before.fingerprint.device

    def so_far() -> Measured:
        picks = tuple(one for recipe, _, _ in looks for one in found.get(recipe, ()))
        measured = replace(before, random_access=picks)
        if file is not None:
            save_measured(file, measured)
        return measured

    if scope.on_gpu:
        same = partial(untimed, scope.device, scope.machine, thorough=scope.thorough)
        models = [list(some) for _, some in groupby(lacking, lambda look: look[0].model)]
        others = [partial(_looked, runner, before.machine, where, some) for some in models]
        for number, total, looked in done_ahead(same, _waiting(scope, before), others):
            if on_case is not None:
                on_case(number, total, "compiling and looking at picks, by several processes")
            if looked:
                found |= looked
                so_far()
    for number, look in enumerate(lacking, start=1):
        what = f"what selectors pick of {look[0].case}"
        if look[0] in found:
            continue
        if on_case is not None:
            on_case(number, len(lacking), what)
        try:
            found[look[0]] = _picks(runner, before.machine, where, look)
            so_far()
        except FAILURES as error:
            if on_failure is not None:
                on_failure(f"{what}: {reason_of(error)}")
    return so_far() if lacking else before


def _picks(runner: Runner, machine: MachineSpec, where: str, look: Look) -> Picks:
    recipe, selectors, keeps = look
    return random_weights_access(runner, machine, recipe, keeps, where, selectors=selectors)


def _looked(runner: Runner, machine: MachineSpec, where: str, looks: Sequence[Look]) -> dict[Recipe, Picks]:
    """Of those at which it can be looked, beside other processes."""
    found = dict[Recipe, Picks]()
    for look in looks:
        with suppress(*FAILURES):
            found[look[0]] = _picks(runner, machine, where, look)
    return found


def measure(
    scope: Scope,
    file: Path | None,
    before: Measured,
    on_case: OnCase | None = None,
    on_failure: OnFailure | None = None,
) -> Measured:
    """All cases that ``before`` lacks, written to ``file`` after each one; ``on_failure`` is told of those that failed."""
    waiting = _waiting(scope, before)
    measured, failed = before, list[tuple[Case, str]]()
    for number, case in enumerate(waiting, start=1):
        if on_case is not None:
            on_case(number, len(waiting), f"{case.family} {case.case}")
        try:
            taken = case.measure()
        except FAILURES as error:  # costs its own family only; when nothing works any more, stop
            failed.append((case, reason_of(error)))
            require_answering(scope.device)
            if len(failed) > _MOST_FAILURES:
                raise ValueError(
                    f"{case.family} {case.case}: {failed[-1][1]} (after {_MOST_FAILURES} others)"
                ) from error
            continue
        measured = replace(measured, measurements=(*measured.measurements, *map(told, taken)))
        if file is not None:
            save_measured(file, measured)
    if on_failure is not None:
        for case, reason in failed:
            on_failure(f"{case.family} {case.case}: {reason}")
    return measured


def _waiting(scope: Scope, before: Measured) -> list[Case]:
    every = cases(scope, Runner(device=scope.device))
    return [case for case in every if not before.has(case.family, case.case)]


def begin(device: torch.device, file: Path | None) -> Measured:
    """What ``file`` holds already, or nothing yet.

    Raises ValueError for measurements of another machine.
    """
    if file is not None and file.exists():
        measured = load_measured(file)
        there, here = measured.fingerprint.device, device_name(device)
        if there != here:
            raise ValueError(f"{file}: measured on {there}, this is {here}: name another file by -o")
        return measured
    machine = machine_at(device)
    return Measured(fingerprint=fingerprint_of(device, machine), machine=machine)
