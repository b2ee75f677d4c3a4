"""Rows of ``benchmarks/runtime_speed.py``, a module for each kind of runner."""
