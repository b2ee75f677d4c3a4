"""What is measured, a module for each kernel family; the one place that calls the runtime's kernels."""
