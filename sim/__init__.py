"""The modelled world: machines, models, plans, what they cost and how they run."""
