"""Verifiers: what turns an attempt into a verdict."""
