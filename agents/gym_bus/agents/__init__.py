"""Agents: what turns a rollout request into an attempt."""
