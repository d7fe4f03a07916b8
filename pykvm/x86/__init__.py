"""The vocabulary of the architecture, as the SDM names it: values and pure functions, no I/O."""
