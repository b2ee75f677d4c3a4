"""A decode step captured once as a CUDA graph and replayed: slots, lengths and selections stay on the device."""
