"""Executes a caching plan with torch: the tiered KV cache, the selectors, the models, and the record of a run."""
