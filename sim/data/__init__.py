"""TOML catalogues; see ``sim.catalogue``."""
