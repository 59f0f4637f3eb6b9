"""MATH-500: competition problems with a closed-form answer."""
