"""AIME 2024: thirty competition problems whose answers are integers from 0 to 999."""
