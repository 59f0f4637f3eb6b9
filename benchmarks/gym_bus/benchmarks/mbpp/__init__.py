"""MBPP: short Python functions from a sentence and three assertions."""
