"""``planner calibrate``: loaded by the command line when it is called."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sim.codec import to_plain
from sim.outputs import require_outputs

if TYPE_CHECKING:
    import torch

    from sim.measured import Measured

EPILOG = """\
[bold]Examples[/bold]

  planner calibrate --device cuda -o h200.json

  planner calibrate --device cpu --quick -o cpu.json

  planner calibrate --from h200.measurements.json -o h200.json

  planner calibrate --from h200.measurements.json --compare other-day.measurements.json

Raw measurements go beside the profile, FILE.measurements.json; interrupted, the same command goes on where it stopped.
"""


def calibrate(
    device: Annotated[
        str | None, typer.Option(metavar="cuda|cpu", help="What to measure.", show_default="cuda where there is one")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer sizes: one or two minutes instead of about five.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The profile.")] = Path("profile.json"),
    measurements: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="Fit these raw measurements; measure nothing.")
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Raw measurements of another machine or day: say how much they differ."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Measure how selectors pick on this checkpoint too, for the planner's traffic."
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="prompts.jsonl for --checkpoint; as `planner run` reads it.")
    ] = None,
    measure_only: Annotated[
        bool, typer.Option("--measure-only", help="Fit later, and elsewhere: --from FILE.measurements.json.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
) -> None:
    """Measure this machine with the runtime's own kernels and fit a profile to it."""
    require_outputs([out], [measurements, compare, prompts])
    given = [name for name, one in (("--device", device), ("--checkpoint", checkpoint)) if one is not None]
    given += [name for name, one in (("--quick", quick), ("--measure-only", measure_only)) if one]
    if measurements is not None and given:
        raise ValueError(f"--from and {given[0]}, exclude each other: --from measures nothing")
    _require_extra()
    from calibration.tables import constants_table, counting, differences_table, families_table, show
    from sim.measured import load_measured

    if (checkpoint is None) != (prompts is None):
        raise ValueError("--checkpoint and --prompts, one is missing: give both, or neither")
    other = load_measured(compare) if compare is not None else None
    if measurements is not None:
        measured = load_measured(measurements)
    else:
        measured = _measured(_device(device), out.with_suffix(".measurements.json"), quick, checkpoint, prompts)
    if other is not None:
        from calibration.repeat import differences

        found = differences(other, measured)
        if as_json:
            print(json.dumps(to_plain(found), indent=1, allow_nan=False))
        else:
            show(differences_table(found))
        return
    if measure_only:
        print(f"{out.with_suffix('.measurements.json')}: {len(measured.measurements)} measurements")
        return
    from calibration.fit import fit
    from sim.profile_files import save_profile

    taken = measured.fingerprint
    basis = f"measured on {taken.device}, {taken.date}, torch {taken.torch}: {len(measured.measurements)} measurements"
    with counting("fitting") as on_step:
        profile = fit(measured, name=f"measured-{taken.gpu}-{taken.date}", basis=basis, on_step=on_step)
    save_profile(out, profile)
    if as_json:
        evidence = {"name": profile.name, "basis": profile.basis, "evidence": to_plain(profile.evidence)}
        print(json.dumps(evidence, indent=1, allow_nan=False))
        return
    show(constants_table(profile), "", families_table(profile), "", f"{out}: {profile.name}, {profile.basis}")


def _measured(
    device: "torch.device", file: Path, quick: bool, checkpoint: Path | None, prompts: Path | None
) -> "Measured":
    from calibration.access import checkpoint_access
    from calibration.bench import begin, measure, prepare, scope_of
    from calibration.tables import counting
    from sim.measured import save_measured

    def failed(reason: str) -> None:
        print(f"not measured: {reason}", file=sys.stderr)

    before = begin(device, file)
    scope = scope_of(device, before.machine, thorough=not quick)
    with counting("measuring") as on_case:
        measured = prepare(scope, file, before, on_case, failed)
        measured = measure(scope, file, measured, on_case, failed)
        if checkpoint is not None and prompts is not None:
            on_case(1, 1, f"what selectors pick on {checkpoint}")
            measured = replace(measured, access=checkpoint_access(checkpoint, prompts, scope))
            save_measured(file, measured)
    return measured


def _device(name: str | None) -> "torch.device":
    import torch

    from calibration.machine import device_of

    return device_of(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _require_extra() -> None:
    """Raise ValueError where the extra is missing. Threads that wait must not spin: on busy cores that costs a factor."""
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        import safetensors  # noqa: F401
        import scipy  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'kvplan[calibration]'") from None
