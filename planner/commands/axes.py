"""The options of ``planner whatif``: each takes one or more values, with commas between or the option repeated."""

from typing import Annotated

import typer

_MACHINE = "Machine"
_WORK = "Model and work"
_ALLOWED = "What the plan may do"

Gpu = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME,...", help="GPUs, from `planner gpus`, or .toml files.", rich_help_panel=_MACHINE),
]
Host = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME,...", help="Hosts, from `planner hosts`.", rich_help_panel=_MACHINE),
]
HbmGib = Annotated[
    list[str] | None,
    typer.Option(metavar="GIB,...", help="HBM in GiB, instead of the GPU's own.", rich_help_panel=_MACHINE),
]
HostGib = Annotated[
    list[str] | None,
    typer.Option(metavar="GIB,...", help="Host memory in GiB, instead of the host's own.", rich_help_panel=_MACHINE),
]
LinkGbS = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GB/S,...", help="Datasheet rate of the host link, GB/s in each direction.", rich_help_panel=_MACHINE
    ),
]
KvBudgetGib = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GIB,...",
        help="HBM for KV in GiB, instead of what weights and workspace leave.",
        rich_help_panel=_MACHINE,
    ),
]
Profile = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE,...",
        help="Files that `planner calibrate` wrote, or nominal; by default as measured where a card has been.",
        rich_help_panel=_MACHINE,
    ),
]
Model = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME,...", help="Models, from `planner models`, or config.json files.", rich_help_panel=_WORK
    ),
]
Batch = Annotated[
    list[str] | None,
    typer.Option(metavar="N,...", help="Sequences to generate.", rich_help_panel=_WORK),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option(metavar="TOKENS,...", help="Prompt tokens of each sequence.", rich_help_panel=_WORK),
]
Output = Annotated[
    list[str] | None,
    typer.Option(metavar="TOKENS,...", help="Tokens to generate for each.", rich_help_panel=_WORK),
]
Dtype = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME,...", help="What the model computes in: fp16, bf16, fp32.", rich_help_panel=_WORK),
]
WeightFormat = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME,...", help="How the weights are stored: native, int8, int4.", rich_help_panel=_WORK),
]
Sparsity = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SHARE,...",
        help="Most of the cached tokens that attention may leave out, from 0 to below 1.",
        rich_help_panel=_ALLOWED,
    ),
]
Selector = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME+...,...",
        help="Rules that may pick the attended tokens; a plus joins several into one value: swa+pages.",
        rich_help_panel=_ALLOWED,
    ),
]
KvFormats = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME+...,...",
        help="How KV may be stored, besides native; a plus joins several into one value: int8+int4.",
        rich_help_panel=_ALLOWED,
    ),
]
Concurrency = Annotated[
    list[str] | None,
    typer.Option(metavar="N,...", help="Sequences that run at once: auto, all or a number.", rich_help_panel=_ALLOWED),
]
Objective = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME,...", help="What is best: throughput, tpot, ttft.", rich_help_panel=_ALLOWED),
]
MaxTpotMs = Annotated[
    list[str] | None,
    typer.Option(metavar="MS,...", help="Longest mean time per output token, ms.", rich_help_panel=_ALLOWED),
]
