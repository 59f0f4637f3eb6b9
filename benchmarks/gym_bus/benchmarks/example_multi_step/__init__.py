"""A small tool-use environment: find the synonyms of a term, ask for their values, hand them in in order."""
