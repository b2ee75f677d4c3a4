"""Which older tokens a step attends to: one small file for each rule, behind one interface."""

from runtime.selectors.base import LayerSelector, Scope
from runtime.selectors.dense import Dense
from runtime.selectors.h2o import HeavyHitters
from runtime.selectors.local import Local
from runtime.selectors.pages import Pages
from runtime.selectors.strided import Strided
from runtime.selectors.swa import SparseWindow
from runtime.selectors.topk import TopK
from sim.attention import Selector

__all__ = ["LayerSelector", "Scope", "layer_selector"]


def layer_selector(scope: Scope) -> LayerSelector:
    """A fresh selector for one layer."""
    kinds: dict[Selector, type[LayerSelector]] = {
        Selector.DENSE: Dense,
        Selector.LOCAL: Local,
        Selector.STRIDED: Strided,
        Selector.SWA: SparseWindow,
        Selector.H2O: HeavyHitters,
        Selector.PAGES: Pages,
        Selector.TOPK: TopK,
    }
    return kinds[scope.attention.selector](scope)
