"""HumanEval: write the body of a Python function from its signature and docstring."""
