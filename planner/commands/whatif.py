"""``planner whatif``."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from planner.commands import axes, options
from planner.commands.report import load_reports
from planner.inputs import whole
from planner.terminal import show, show_json, write_answer
from sim.outputs import require_outputs

EPILOG = """\
[bold]Examples[/bold]

  planner whatif --gpu a100-40g,l40s --batch 8,16,32

  planner whatif --link-gb-s 12,25,50 --host-gib 64,128 --lossless

  planner whatif --kv-formats native,int8,int8+int4 --sparsity 0,0.5,0.8 --csv formats.csv

  planner whatif --model opt-13b,llama-3-8b --prompt 500,1500 --json

  planner whatif --gpu a100-40g,l40s --batch 8,16,32,64 --sparsity 0,0.5,0.8 --html sweep.html

A comma stands between two values to compare, a plus joins names into one value. What is not given is as in planner solve.
"""

MOST_JOBS = 1024


def whatif(
    gpu: axes.Gpu = None,
    host: axes.Host = None,
    hbm_gib: axes.HbmGib = None,
    host_gib: axes.HostGib = None,
    link_gb_s: axes.LinkGbS = None,
    profile: axes.Profile = None,
    kv_budget_gib: axes.KvBudgetGib = None,
    model: axes.Model = None,
    batch: axes.Batch = None,
    prompt: axes.Prompt = None,
    output: axes.Output = None,
    dtype: axes.Dtype = None,
    weight_format: axes.WeightFormat = None,
    sparsity: axes.Sparsity = None,
    selector: axes.Selector = None,
    kv_formats: axes.KvFormats = None,
    concurrency: axes.Concurrency = None,
    objective: axes.Objective = None,
    max_tpot_ms: axes.MaxTpotMs = None,
    lossless: options.Lossless = False,
    csv: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write the rows to this file as CSV.", rich_help_panel="Answer"),
    ] = None,
    html: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Write a page with heat maps and fronts to this file.", rich_help_panel="Answer"
        ),
    ] = None,
    as_json: options.Json = False,
    jobs: Annotated[
        str | None,
        typer.Option("--jobs", "-j", metavar="N", help="Processes that work.", show_default="all cores"),
    ] = None,
) -> None:
    """Solve at every point of a grid, on all cores; a point where no plan fits is a row with its reason.

    The last option that varies changes fastest.
    """
    given = {
        "gpu": gpu,
        "host": host,
        "hbm_gib": hbm_gib,
        "host_gib": host_gib,
        "link_gb_s": link_gb_s,
        "profile": profile,
        "kv_budget_gib": kv_budget_gib,
        "model": model,
        "batch": batch,
        "prompt": prompt,
        "output": output,
        "dtype": dtype,
        "weight_format": weight_format,
        "sparsity": sparsity,
        "selector": selector,
        "kv_formats": kv_formats,
        "concurrency": concurrency,
        "objective": objective,
        "max_tpot_ms": max_tpot_ms,
    }
    grid = {name: _values(texts) for name, texts in given.items() if texts}
    processes = None if jobs is None else whole("--jobs", jobs, MOST_JOBS)
    files = Files(csv=None if csv is None else Path(csv), html=None if html is None else Path(html))
    _answer(grid, lossless=lossless, jobs=processes, files=files, as_json=as_json)


class Files(NamedTuple):
    """What is written besides the answer on the screen."""

    csv: Path | None
    html: Path | None


def _answer(grid: dict[str, list[str]], *, lossless: bool, jobs: int | None, files: Files, as_json: bool) -> None:
    require_outputs(files, [*grid.get("gpu", []), *grid.get("model", []), *grid.get("profile", [])])
    if files.html is not None:
        load_reports()  # or say now that it cannot be
    from planner.grid_table import csv_text, grid_table, point_to_json
    from planner.progress import counting
    from planner.sweep import sweep

    with counting("solving") as on_done:
        points = sweep(jobs=jobs, on_done=on_done, **grid, **({"lossless": True} if lossless else {}))
    if files.csv is not None:
        write_answer(files.csv, csv_text(points))
    if files.html is not None:
        from planner.reporting import page_of

        write_answer(files.html, page_of(load_reports(), points, lossless=lossless, file=files.html))
    if as_json:
        show_json([point_to_json(point) for point in points])
    else:
        show(grid_table(points))


def _values(texts: Iterable[str]) -> list[str]:
    return [part.strip() for text in texts for part in text.split(",")]
