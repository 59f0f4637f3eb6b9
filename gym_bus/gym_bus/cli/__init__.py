"""The `gym-bus` command."""
