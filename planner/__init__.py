"""Which caching plan is best for a machine, a model and a workload, and how sure that is."""
