"""The simulator measured against the machine: the runtime's own kernels timed, a profile fitted, plans run and compared."""
