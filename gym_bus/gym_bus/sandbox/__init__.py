"""The sandbox: where programs that models wrote are run."""
