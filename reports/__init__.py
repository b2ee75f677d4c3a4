"""Pages that an engineer reads at a glance and forwards to a colleague: one self-contained HTML file each."""

from reports.plan_page import plan_page
from reports.study import Answer, Origin, Rival, Run, Stretch, Study
from reports.sweep import Sweep
from reports.sweep_page import sweep_page

__all__ = ["Answer", "Origin", "Rival", "Run", "Stretch", "Study", "Sweep", "plan_page", "sweep_page"]
